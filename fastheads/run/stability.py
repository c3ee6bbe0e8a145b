"""Check after each window of the corpus whether the ranking of heads has settled (`stats.confidence`).

All processes of a job make the same number of checks, as many as the one with the most windows, and each check uses the samples
of all: so they get the same answer and stop together.
"""

from collections.abc import Mapping

from fastheads.capture.manager import HookManager
from fastheads.errors import OptionError
from fastheads.results.ranking import RELATIVE_METRIC, covers
from fastheads.run.job import Job
from fastheads.stats.arrays import as_arrays
from fastheads.stats.confidence import StableRule, judge
from fastheads.stats.moments import Moments
from fastheads.stats.names import KV_STREAMING_SQUARE_METRIC, RATIO_METRIC
from fastheads.stats.options import MeasureOptions

# The metrics whose ranking may end a run, the better one first. That of KV groups decides where the others are not measured.
DECIDING = (RATIO_METRIC, RELATIVE_METRIC, KV_STREAMING_SQUARE_METRIC)


def check_ranked(options: MeasureOptions) -> None:
    """Raise OptionError if `options` measure none of the metrics that may end a run."""
    if options.metrics is not None and not set(DECIDING) & set(options.metrics):
        raise OptionError(f"until_stable looks at {' or '.join(DECIDING)}: name one of them in metrics too")


def deciding_metric(moments: Mapping[str, Moments]) -> str:
    """Return the metric whose ranking ends a run: the ratio to the residual stream if all heads have it."""
    if RATIO_METRIC not in moments or RELATIVE_METRIC not in moments:
        return next(metric for metric in DECIDING if metric in moments)
    ratio, relative = (as_arrays(moments[metric]).count for metric in (RATIO_METRIC, RELATIVE_METRIC))
    return RATIO_METRIC if covers(ratio, relative) else RELATIVE_METRIC


class StabilityChecks:
    """The checks made so far. `checks` and `settled` are part of a checkpoint."""

    def __init__(self, rule: StableRule | None, job: Job, hooks: HookManager) -> None:
        """`rule`: None for no checks."""
        self.rule, self._job, self._hooks = rule, job, hooks
        self.checks = 0
        self.settled = False
        self._known_checks = 0  # most checks that a process had made before this run began
        self._settled_at: int | None = None  # number of the known check that found the ranking settled
        self._all_done = False  # all processes have run all their windows

    def share_known(self, *, ended: bool) -> None:
        """Exchange the checks that each process made before this run began: some may have made more than others."""
        if self.rule is None:
            return
        known = self._job.all_gather_object([self.checks, self.settled, ended])
        self._known_checks = max(checks for checks, _, _ in known)
        self._settled_at = next((checks for checks, settled, _ in known if settled), None)
        # A process that ended without settling knew that all had run their windows.
        self._all_done = any(ended for _, _, ended in known)

    def catch_up(self, windows: int) -> bool:
        """Make the checks of the first `windows` windows, and return True if the ranking has settled."""
        if self.rule is not None:
            while not self.settled and self.checks < windows:
                self._check(self.rule, done=False)
        return self.settled

    def finish(self) -> None:
        """Take part in the checks of the other processes until they too have run all their windows."""
        while self.rule is not None and not (self.settled or self._others_are_done()):
            self._check(self.rule, done=True)

    def _check(self, rule: StableRule, *, done: bool) -> None:
        """Check whether the ranking has settled by the samples of all processes. `done`: this one has run all its windows."""
        number = self.checks + 1
        if number <= self._known_checks:
            settled = number == self._settled_at
        else:
            self._job.barrier(number)
            self._all_done = all(self._job.all_gather_object(done))
            found = self._hooks.to_profile().moments
            # All processes measure the same metrics, but only what all of them have measured shows which one decides.
            merged = self._job.merged({metric: found[metric] for metric in DECIDING if metric in found})
            settled = judge(merged[deciding_metric(merged)], rule).settled
        self.checks, self.settled = number, settled  # last, so that an interrupted check is made again

    def _others_are_done(self) -> bool:
        return self._job.place.shard[1] == 1 or (self._all_done and self.checks >= self._known_checks)
