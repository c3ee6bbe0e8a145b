"""Ranking and choosing heads: the default metric, what may be compared across layers, ties, ablation modes."""

import math
import warnings

import numpy as np
import pytest
import torch

from fastheads.errors import OptionError, ResultsError
from fastheads.results import ranking
from fastheads.results.head_profile import HeadProfile
from fastheads.stats.moments import Moments
from fastheads.stats.names import KV_METRIC, METRICS, RATIO_METRIC, RATIO_SQUARE_METRIC, UPDATE_METRIC
from fastheads.stats.scales import scale_of

RAW, RELATIVE = METRICS[0], METRICS[3]
ROWS, HEADS = 3, 4


def moments_of(samples: np.ndarray, without: list[tuple[int, int]] = ()) -> Moments:
    found = Moments.of(torch.tensor(samples, dtype=torch.float64))
    for row, head in without:
        for plane, empty in zip(found, (0, 0, 0.0, 0.0, math.inf, -math.inf), strict=True):
            plane[row, head] = empty
    return found


def make(kind: type[HeadProfile] = HeadProfile, layers=range(ROWS), **samples: np.ndarray) -> HeadProfile:
    sites = [{"name": f"layers.{n}", "layer": n, "num_heads": HEADS, "head_dim": 8} for n in layers]
    moments = {name: moments_of(values) for name, values in samples.items()}
    return kind(moments, {"model": "m", "sites": sites, "token_agg": "all", "skip_first": 0})


def drawn(seed: int, rows: int = ROWS) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(size=(7, rows, HEADS))


def sorted_heads(values: np.ndarray) -> list[tuple[int, int]]:
    return sorted(np.ndindex(values.shape), key=lambda cell: values[cell])


@pytest.fixture(autouse=True)
def not_warned(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr(ranking, "_warned", set())


@pytest.fixture
def profile() -> HeadProfile:
    return make(**{RAW: drawn(0), RELATIVE: drawn(1), RATIO_METRIC: drawn(2)})


def test_heads_are_ranked_by_the_ratio_to_the_residual_stream(profile):
    want = sorted_heads(drawn(2).mean(axis=0))
    assert profile.rank() == want
    assert profile.rank(descending=True) == profile.highest(1.0) == want[::-1]
    assert profile.lowest(0.25) == profile.lowest(n=3) == profile.rank(n=3) == want[:3]
    assert profile.highest(0.25) == profile.highest(n=3) == want[::-1][:3]
    assert profile.lowest(n=0) == [] and profile.highest(n=12) == want[::-1]
    assert profile.highest(n=2, metric=RELATIVE) == sorted_heads(drawn(1).mean(axis=0))[::-1][:2]


@pytest.mark.parametrize("choose", ["rank", "lowest", "highest"])
def test_without_the_ratio_they_raise_and_name_what_there_is(choose):
    profile = make(**{RAW: drawn(0), RELATIVE: drawn(1)})
    arguments = {} if choose == "rank" else {"n": 2}
    for metric in ({}, {"metric": RATIO_METRIC}):
        with pytest.raises(ResultsError) as raised:
            getattr(profile, choose)(**arguments, **metric)
        said = str(raised.value)
        assert "\n" not in said and f"no {RATIO_METRIC}" in said and RELATIVE in said
        assert RAW not in said  # no advice to rank by it
    with pytest.raises(ResultsError, match=RAW):  # all that it has
        getattr(make(**{RAW: drawn(0)}), choose)(**arguments)
    with pytest.raises(OptionError, match=f"no metric 'size' in this profile; it has {RAW}"):
        getattr(profile, choose)(metric="size", **arguments)


def test_a_ratio_that_some_heads_lack_does_not_rank_them_silently(profile):
    holes = moments_of(drawn(2), without=[(1, 0), (1, 2)])
    lacking = HeadProfile(profile.moments | {RATIO_METRIC: holes}, profile.metadata)
    with pytest.raises(ResultsError, match=rf"{RATIO_METRIC} is missing for 2 of 12 .*layer 1.*{RELATIVE}"):
        lacking.rank()
    nowhere = {m: moments_of(drawn(0), without=[(1, 0), (1, 2)]) for m in (RAW, RELATIVE, RATIO_METRIC)}
    assert len(HeadProfile(nowhere, profile.metadata).rank()) == 10


@pytest.mark.parametrize(
    "wrong",
    [{}, {"fraction": 0.1, "n": 2}, {"n": -1}, {"n": 13}, {"n": 2.0}, {"n": True}, {"fraction": math.nan}],
)
def test_a_number_of_heads_must_be_one_that_there_is(profile, wrong):
    for choose in (profile.lowest, profile.highest):
        with pytest.raises(OptionError):
            choose(**wrong)
    if "n" in wrong and "fraction" not in wrong:
        with pytest.raises(OptionError, match="n must be a whole number between 0 and the 12 heads ranked"):
            profile.rank(**wrong)


def test_what_may_be_compared_across_layers():
    comparable = {RATIO_METRIC, RATIO_SQUARE_METRIC, METRICS[2], METRICS[3], "of_somebody_else"}
    raw = {METRICS[0], METRICS[1], UPDATE_METRIC, KV_METRIC, "new_norm", "head_residual_contribution_power"}
    assert {metric for metric in comparable | raw if scale_of(metric).comparable} == comparable
    assert [scale_of(metric).centre for metric in (METRICS[2], METRICS[0], RATIO_METRIC)] == [1, None, None]


def test_a_raw_norm_across_layers_warns_once_and_says_why(profile):
    with pytest.warns(RuntimeWarning) as caught:
        ranked = profile.rank(RAW)
        profile.lowest(0.5, RAW)
        profile.highest(n=1, metric=RAW)
    assert ranked == sorted_heads(drawn(0).mean(axis=0))
    (warning,) = caught
    assert warning.filename == __file__
    said = str(warning.message)
    assert "\n" not in said
    assert all(word in said for word in (RAW, "depth", "random", RATIO_METRIC))


def test_the_warning_names_what_the_profile_has():
    with pytest.warns(RuntimeWarning, match=RELATIVE):
        make(**{RAW: drawn(0), RELATIVE: drawn(1)}).lowest(n=1, metric=RAW)


def test_a_raw_norm_within_one_layer_does_not_warn(profile):
    one = make(layers=[7], **{RAW: drawn(0, 1)})
    two_sites_of_one_layer = make(layers=[7, 7], **{RAW: drawn(0, 2)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one.rank(RAW)
        two_sites_of_one_layer.rank(RAW)
        profile.rank()
        profile.rank(RELATIVE)


class WithErrors(HeadProfile):
    """A profile whose mean-ablation errors are known."""

    errors = drawn(5)[0]

    def mean_ablation_error_ratio(self, model):
        assert model == "the model"
        return self.errors


def test_for_mean_ablation_the_error_of_mean_ablation_ranks():
    profile = make(WithErrors, **{RAW: drawn(0), RELATIVE: drawn(1)})
    want = sorted_heads(WithErrors.errors)
    mean = {"mode": "mean", "model": "the model"}
    assert profile.rank(**mean) == want
    assert profile.lowest(0.25, **mean) == want[:3]
    assert profile.highest(n=2, **mean) == want[::-1][:2]
    profile.errors = torch.tensor(WithErrors.errors)
    assert profile.rank(**mean) == want


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"mode": "mean"}, "mode 'mean' needs model="),
        ({"mode": "mean", "model": "the model", "metric": RAW}, "mode 'mean' .*leave metric out"),
        ({"model": "the model"}, "model= is for mode 'mean'"),
        ({"mode": "median"}, "unknown mode 'median': choose one of zero, mean"),
    ],
)
def test_modes_that_do_not_fit_are_refused(wrong, says):
    with pytest.raises(OptionError, match=says):
        make(WithErrors, **{RATIO_METRIC: drawn(2)}).rank(**wrong)


def test_heads_without_a_mean_ablation_error_are_not_left_out_silently(monkeypatch):
    errors = WithErrors.errors.copy()
    errors[2, 3] = math.nan
    monkeypatch.setattr(WithErrors, "errors", errors)
    profile = make(WithErrors, **{RATIO_METRIC: drawn(2)})
    with pytest.raises(ResultsError, match="1 of 12 .*layer 2"):
        profile.rank(mode="mean", model="the model")
    gone = HeadProfile(
        {RATIO_METRIC: moments_of(drawn(2), without=[(2, 3)])}, profile.metadata
    )  # no such head: nothing to miss
    gone.__class__ = WithErrors
    assert (2, 3) not in gone.rank(mode="mean", model="the model")


def test_ties_are_neighbours_within_their_combined_uncertainty():
    # Spread ±0.1 around each mean: std² = 0.02, sem = 0.1, so means within 1.96 · √2 · 0.1 = 0.2772 are ties.
    means = np.array([[1.0, 1.27, 5.0, 1.56]])
    samples = np.stack([means - 0.1, means + 0.1])
    found = ranking.by_metric(make(layers=[0], **{RATIO_METRIC: samples}), RATIO_METRIC)
    np.testing.assert_allclose(found.sem, np.full((1, 4), 0.1), rtol=1e-12)
    assert found.tied().tolist() == [[True, True, False, False]]
    certain = make(layers=[0], **{RATIO_METRIC: np.stack([means, means])})
    assert not ranking.by_metric(certain, RATIO_METRIC).tied().any()
    equal = make(layers=[0], **{RATIO_METRIC: np.ones((2, 1, 4))})
    assert ranking.by_metric(equal, RATIO_METRIC).tied().all()
    unknown = make(layers=[0], **{RATIO_METRIC: means[None]})  # one sample: no uncertainty is known
    assert ranking.by_metric(unknown, RATIO_METRIC).tied().all()


def test_the_root_mean_square_is_the_root_of_the_squares_mean():
    ratio = drawn(2)
    both = make(**{RATIO_METRIC: ratio, RATIO_SQUARE_METRIC: ratio**2})
    want = np.sqrt((ratio**2).mean(axis=0))
    for metric in (RATIO_METRIC, RATIO_SQUARE_METRIC):
        np.testing.assert_allclose(ranking.by_metric(both, metric).rms, want, rtol=1e-12)
    assert ranking.by_metric(make(**{RATIO_METRIC: ratio}), RATIO_METRIC).rms is None
    assert ranking.by_metric(make(**{RAW: ratio, RATIO_SQUARE_METRIC: ratio**2}), RAW).rms is None


@pytest.mark.parametrize(
    ("metrics", "shown"),
    [
        ([RAW, RELATIVE, RATIO_SQUARE_METRIC, RATIO_METRIC], RATIO_METRIC),
        ([RAW, METRICS[2], RELATIVE], RELATIVE),
        ([RAW, METRICS[2]], METRICS[2]),
        ([RAW, RATIO_SQUARE_METRIC], RATIO_SQUARE_METRIC),
        ([UPDATE_METRIC, RAW], UPDATE_METRIC),
    ],
)
def test_what_is_shown_where_no_metric_is_asked_for(metrics, shown):
    assert ranking.displayed_metric(metrics) == shown


def test_nan_ranks_last():
    values = np.array([[2.0, math.nan, 1.0]])
    found = ranking.Ranking("x", values, np.ones((1, 3), bool))
    assert found.cells() == [(0, 2), (0, 0), (0, 1)]
    assert found.cells(descending=True) == [(0, 0), (0, 2), (0, 1)]
