"""The forwards that wait on one device, and whether the one under way may join them."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from fastheads.backends.launch import CachedLaunch, Kept
from fastheads.capture.memory import are_apart, storages
from fastheads.stats.token_layout import TokenLayout

# Forwards that wait, at most; of how many the inputs must fit into the budget, and how many must come between changes of the
# weights, or it is not worth while.
MOST_FORWARDS = 32
LEAST_IN_BUDGET = 4
FEWEST_FORWARDS = 4


class EndedForward(NamedTuple):
    """A forward that is measured once it has ended: its inputs and where they lie, the launches for them, its valid tokens."""

    cached_launch: CachedLaunch
    kept: list[Kept]
    addresses: list[int]
    layout: TokenLayout

    def spans(self) -> list[tuple[int, int]]:
        """From where to where each input reaches."""
        return [(start, start + self.cached_launch.extent) for start in self.addresses]


class DeferredForwards:
    """Inputs of forwards that ended, which wait: where a forward is a decode step, a launch between its kernels costs more of
    the host's time than all its hooks. Launches right after one another cost a fraction.
    """

    def __init__(self) -> None:
        self.forwards: list[EndedForward] = []
        self.size = 0  # bytes that these keep from being freed
        self._candidate: EndedForward | None = None  # of the forward under way, which may yet fail
        self._form_size = 0  # bytes of a forward of the form that was launched last
        # The inputs of a forward that was launched at once: where those of the next lie elsewhere, the model does not reuse their
        # memory, and they may wait.
        self._probe: list[Kept] | None = None
        self._is_safe = False
        self._pays = True

    def watch(self, kept: list[Kept], budget: int) -> None:
        """`kept` was just launched, and those that are like it may wait if that is safe."""
        self.forget_form()
        self._form_size = sum(x.untyped_storage().nbytes() for _, x, _ in kept)
        if self._pays and LEAST_IN_BUDGET * self._form_size <= budget:
            self._probe = kept

    def may_take(self) -> bool:
        """Whether the inputs of the forward under way might wait."""
        return (self._is_safe or self._probe is not None) and self._candidate is None

    def offer(self, ended: EndedForward) -> bool:
        """Keep inputs that are like those watched until the forward has ended; False where they have to be measured now."""
        if not self._is_safe:
            probe, self._probe = self._probe, None
            if probe is None or not are_apart([x for _, x, _ in (*probe, *ended.kept)]):
                return False
            self._is_safe = True
        self._candidate = ended
        return True

    def overwritten_by(self, inputs: Iterable[Tensor]) -> bool:
        """Whether one of these may lie where one lies that waits, or of the forward under way will."""
        waiting = self.forwards if self._candidate is None else [*self.forwards, self._candidate]
        if not waiting:
            return False
        return not storages(x for ended in waiting for _, x, _ in ended.kept).isdisjoint(storages(inputs))

    def confirm(self) -> bool:
        """The forward ended: whether something of it waits now."""
        if self._candidate is None:
            return False
        self.forwards.append(self._candidate)
        self.size += self._form_size
        self._candidate = None
        return True

    def withdraw(self) -> list[Tensor]:
        """The forward failed: what it left."""
        left, self._candidate = self._candidate, None
        return [] if left is None else [x for _, x, _ in left.kept]

    def is_full(self, budget: int) -> bool:
        """Whether it is time for the launches."""
        return len(self.forwards) >= MOST_FORWARDS or self.size + self._form_size > budget

    def take(self) -> list[EndedForward]:
        """What waited; nothing waits any more."""
        taken, self.forwards, self.size = self.forwards, [], 0
        return taken

    def interrupted(self) -> None:
        """A weight changed: where that happens every few forwards, as in training, waiting does not pay."""
        if 0 < len(self.forwards) < FEWEST_FORWARDS:
            self._pays = False
            self.forget_form()

    def forget_form(self) -> None:
        """Nothing waits any more until `watch`."""
        self._is_safe, self._probe = False, None

    def held(self) -> list[EndedForward]:
        """All whose inputs are held: those that wait, and that of the forward under way."""
        candidate = self._candidate
        return [*self.forwards] if candidate is None else [*self.forwards, candidate]

    def clear(self) -> None:
        """Forget everything."""
        self.take()
        self.withdraw()
        self.forget_form()
        self._pays = True
