"""By which metric --until-stable decides."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastheads.errors import OptionError
from fastheads.run.job import Job, RankInfo
from fastheads.run.stability import StabilityChecks, check_ranked, deciding_metric
from fastheads.stats.confidence import StableRule
from fastheads.stats.moments import Moments
from fastheads.stats.names import METRICS, RATIO_METRIC
from fastheads.stats.options import MeasureOptions

RELATIVE = METRICS[3]


def moments_of(spread: float, without: int | None = None) -> Moments:
    """Of four heads with means 1 to 4 and 200 samples each."""
    noise = spread * torch.linspace(-1, 1, 200, dtype=torch.float64)
    found = Moments.of(torch.arange(1.0, 5.0, dtype=torch.float64).view(1, 1, 4) + noise.view(-1, 1, 1))
    if without is not None:
        for plane, empty in zip(found, (0, 0, 0.0, 0.0, math.inf, -math.inf), strict=True):
            plane[0, without] = empty
    return found


CLEAR, VAGUE = moments_of(0.01), moments_of(50.0)


@pytest.mark.parametrize(
    ("moments", "metric", "settled"),
    [
        ({RELATIVE: CLEAR}, RELATIVE, True),
        ({RELATIVE: CLEAR, RATIO_METRIC: VAGUE}, RATIO_METRIC, False),
        ({RELATIVE: VAGUE, RATIO_METRIC: CLEAR}, RATIO_METRIC, True),
        ({RATIO_METRIC: CLEAR}, RATIO_METRIC, True),
        # A head without the ratio would not be ranked at all.
        ({RELATIVE: VAGUE, RATIO_METRIC: moments_of(0.01, without=2)}, RELATIVE, False),
    ],
)
def test_the_ratio_decides_where_it_is_measured(moments, metric, settled):
    assert deciding_metric(moments) == metric
    others = {METRICS[0]: CLEAR, "other": VAGUE}
    hooks = SimpleNamespace(to_profile=lambda: SimpleNamespace(moments=others | moments))
    checks = StabilityChecks(StableRule(), Job(place=RankInfo()), hooks)
    assert checks.catch_up(1) == settled


def test_the_metric_is_chosen_by_the_samples_of_all_processes():
    """One process has seen no samples of a head yet, and another no ratio of it: together they rank by the relative one."""
    empty = moments_of(0.01, without=2)

    class Merging(Job):
        def merged(self, moments):
            return {RELATIVE: CLEAR, RATIO_METRIC: empty} if set(moments) == {RELATIVE, RATIO_METRIC} else {}

    hooks = SimpleNamespace(
        to_profile=lambda: SimpleNamespace(moments={RELATIVE: empty, RATIO_METRIC: empty})
    )
    assert StabilityChecks(StableRule(), Merging(place=RankInfo()), hooks).catch_up(1)


def test_a_metric_that_it_looks_at_must_be_measured():
    check_ranked(MeasureOptions.of())
    check_ranked(MeasureOptions.of(metrics=[METRICS[0], RELATIVE]))
    says = f"until_stable looks at {RATIO_METRIC} or {RELATIVE} or kv_group_streaming_error_square: name one"
    with pytest.raises(OptionError, match=says):
        check_ranked(MeasureOptions.of(metrics=[METRICS[0]]))
