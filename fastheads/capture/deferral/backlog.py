"""Keep the deferred forwards of one device, and decide if the forward under way may be deferred too."""

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor

from fastheads.capture.memory import are_apart, storages
from fastheads.capture.profiled import Kept, KeptLaunch
from fastheads.stats.token_layout import TokenLayout

# Forwards that wait, at most; of how many the inputs must fit into the budget, and how many must come between changes of the
# weights, or it is not worth while.
MOST_FORWARDS = 32
LEAST_IN_BUDGET = 4
FEWEST_FORWARDS = 4


class EndedForward(NamedTuple):
    """A forward to be measured after its end: its launch, its inputs with their addresses, its valid tokens."""

    kept_launch: KeptLaunch
    kept: list[Kept]
    addresses: list[int]
    layout: TokenLayout

    def spans(self) -> list[tuple[int, int]]:
        """Return the addresses (start, stop) of each input and residual stream."""
        return self.kept_launch.spans(self.addresses)

    def addresses_now(self) -> list[int]:
        """Return where the inputs, and then the streams, lie now."""
        in_order = sorted(self.kept, key=lambda entry: entry[0].is_residual)
        return [x.data_ptr() for _, x, _ in in_order]


class DeferredForwards:
    """The inputs of deferred forwards. In a decode step, a launch between the model's kernels costs more of the host's time than
    all hooks; launches in a row cost a fraction of that.
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
        """Note that `kept` was launched at once: inputs like it may be deferred, if the next ones lie in other memory."""
        self.forget_form()
        self._form_size = sum(x.untyped_storage().nbytes() for _, x, _ in kept)
        if self._pays and LEAST_IN_BUDGET * self._form_size <= budget:
            self._probe = kept

    def may_take(self) -> bool:
        """Return True if the inputs of the forward under way may be offered."""
        return (self._is_safe or self._probe is not None) and self._candidate is None

    def offer(self, ended: EndedForward) -> bool:
        """Keep inputs like those watched until the forward has ended. Returns False if they must be measured now."""
        if not self._is_safe:
            probe, self._probe = self._probe, None
            if probe is None or not are_apart([x for _, x, _ in (*probe, *ended.kept)]):
                return False
            self._is_safe = True
        self._candidate = ended
        return True

    def overwritten_by(self, inputs: Iterable[Tensor]) -> bool:
        """Return True if one of these inputs shares memory with a deferred one, or with one of the forward under way."""
        waiting = self.forwards if self._candidate is None else [*self.forwards, self._candidate]
        if not waiting:
            return False
        return not storages(x for ended in waiting for _, x, _ in ended.kept).isdisjoint(storages(inputs))

    def confirm(self) -> bool:
        """End the forward under way normally. Returns True if inputs of it are deferred now."""
        if self._candidate is None:
            return False
        self.forwards.append(self._candidate)
        self.size += self._form_size
        self._candidate = None
        return True

    def withdraw(self) -> list[Tensor]:
        """Drop the inputs of the forward under way, which failed, and return them."""
        left, self._candidate = self._candidate, None
        return [] if left is None else [x for _, x, _ in left.kept]

    def is_full(self, budget: int) -> bool:
        """Return True if the deferred forwards must be measured now."""
        return len(self.forwards) >= MOST_FORWARDS or self.size + self._form_size > budget

    def take(self) -> list[EndedForward]:
        """Remove and return the deferred forwards."""
        taken, self.forwards, self.size = self.forwards, [], 0
        return taken

    def interrupted(self) -> None:
        """Note that a weight changed; stop deferring if that happens every few forwards, as in training."""
        if 0 < len(self.forwards) < FEWEST_FORWARDS:
            self._pays = False
            self.forget_form()

    def forget_form(self) -> None:
        """Defer nothing more until `watch`."""
        self._is_safe, self._probe = False, None

    def held(self) -> list[EndedForward]:
        """Return every forward whose inputs are held: the deferred ones, and the one under way."""
        candidate = self._candidate
        return [*self.forwards] if candidate is None else [*self.forwards, candidate]

    def clear(self) -> None:
        """Forget everything."""
        self.take()
        self.withdraw()
        self.forget_form()
        self._pays = True
