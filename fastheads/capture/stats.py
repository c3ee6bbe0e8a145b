"""Count launches and deferred forwards, and the memory that inputs hold, for `hooks.stats`."""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LaunchStats:
    """Counts of a HookManager's launches and deferred forwards since it was attached or reset, and the memory it holds now.

    All are plain numbers that Python counts: reading them never waits for a device, and replays of a CUDA graph, which run
    without Python, count nothing.

    Attributes:
        launches: how often inputs were measured. The inputs of several layers that are measured together are one launch. With
            `kv_groups` they are measured once more, and so are inputs whose projection is followed by a norm. Launches of
            forwards that failed count too.
        repeated: how many of these reused the plan of an earlier launch of the same layers and shape, eager or compiled.
        deferred: how many forwards ended before they were measured, to be measured together with later ones.
        waiting: how many of those are still to be measured. `get_results()` measures them.
        kept_bytes: bytes of memory that inputs yet to be measured keep allocated, on all devices: those of forwards that wait,
            and those of forwards under way. Memory that several of them share counts once.
    """

    launches: int
    repeated: int
    deferred: int
    waiting: int
    kept_bytes: int


class LaunchCounter:
    """The running counts behind `LaunchStats`. Written with the manager's lock held."""

    __slots__ = ("deferred", "launches", "repeated")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Set every count to zero."""
        self.launches = self.repeated = self.deferred = 0

    def count(self, *, repeated: bool) -> None:
        """Count a launch, and whether it repeated an earlier one."""
        self.launches += 1
        self.repeated += repeated

    def read(self, waiting: int, inputs: Iterable[Tensor]) -> LaunchStats:
        """Return the counts, with the number of waiting forwards and the memory of the inputs held now."""
        storages = {}
        for x in inputs:
            storage = x.untyped_storage()
            storages[x.device, storage.data_ptr()] = storage.nbytes()
        return LaunchStats(self.launches, self.repeated, self.deferred, waiting, sum(storages.values()))
