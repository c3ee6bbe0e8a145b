"""Keep track of sites that did not run in a forward that counts: results without their samples would be wrong unnoticed."""

from collections.abc import Iterable

from torch import Tensor

from fastheads.capture.profiled import Profiled
from fastheads.errors import ResultsError
from fastheads.stats.moments import Moments


class Coverage:
    """The rows that were skipped. Python does not see replays of CUDA graphs: for those, `check` compares numbers of samples."""

    def __init__(self, profiled: Iterable[Profiled], *, allow_skipped: bool) -> None:
        self._names = {p.row: p.name for p in profiled}
        self.rows = frozenset(self._names)
        self._allow_skipped = allow_skipped
        self.missed: set[int] = set()  # rows that did not run in a forward that ended
        self._unseen: set[int] = set()  # the same of rows that CUDA graphs measure
        self.in_captured: set[int] = set()  # rows that CUDA graphs measure
        self.captured_since_reset = False

    def captured(self, rows: Iterable[int]) -> None:
        """Note that a captured CUDA graph measures these rows."""
        self.in_captured.update(rows)
        self.captured_since_reset = True

    def skipped(self, rows: Iterable[int]) -> None:
        """Note that these rows did not run in a forward that counts."""
        rows = set(rows)
        self.missed |= rows - self.in_captured
        self._unseen |= rows & self.in_captured

    def clear(self) -> None:
        """Forget the skipped rows, for a reset. The rows of captured graphs stay known: their replays still measure."""
        self.missed.clear()
        self._unseen.clear()
        self.captured_since_reset = False

    def check(self, moments: Moments) -> None:
        """Raise ResultsError, with the sites' names, if sites did not run in every forward of the decoder."""
        if self._allow_skipped:
            return
        given = samples_of_rows(moments)
        any_ran = any(given[row] for row in self._names)
        most = given.max()
        missed = [
            name
            for row, name in self._names.items()
            if row in self.missed
            or (any_ran and not given[row])
            or (row in self._unseen and given[row] < most)
        ]
        if missed:
            raise ResultsError(
                f"{', '.join(missed)} did not run in every forward: nothing, or too little, was measured there. Where the model "
                "skips layers by design, HookManager(..., allow_skipped=True) accepts it"
            )


def samples_of_rows(moments: Moments) -> Tensor:
    """Count the samples of each row, int64 `[rows]`, in moments `[metrics, rows, heads]`."""
    return (moments.count + moments.nonfinite)[0].amax(dim=-1)
