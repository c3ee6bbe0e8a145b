"""Which moments are taken for those of samples: all that samples give, and as few others as can be told."""

import math

import numpy as np
import pytest
import torch

from fastheads.errors import MergeError, ProfileError
from fastheads.results.head_profile import HeadProfile
from fastheads.results.possible import MOST_SAMPLES, contradiction, impossible
from fastheads.stats.metrics import KV_METRIC, METRICS, UPDATE_METRIC
from fastheads.stats.moments import Moments


def accumulated(samples: np.ndarray, size: int) -> Moments:
    """Moments of samples `[n, ...]`, taken `size` at a time, from none."""
    planes = [torch.zeros(samples.shape[1:], dtype=torch.int64) for _ in range(2)]
    planes += [torch.full(samples.shape[1:], value).double() for value in (0.0, 0.0, math.inf, -math.inf)]
    moments = Moments(*planes)
    for start in range(0, len(samples), size):
        moments = moments.merged(Moments.of(torch.from_numpy(samples[start : start + size])))
    return moments


RANDOM = np.random.default_rng(5)
SAMPLES = {
    "lognormal": RANDOM.lognormal(sigma=3, size=(400, 8)),
    "constants": np.tile(RANDOM.lognormal(sigma=9, size=8), (400, 1)),
    "a third": np.full((1000, 3), 1 / 3),
    "far from 0": 1e9 + RANDOM.normal(size=(400, 8)),
    "an ulp apart": np.nextafter(7.1, 8) + np.where(RANDOM.random((400, 8)) < 0.5, 0, np.spacing(7.1)),
    "one apart": np.concatenate((np.ones((399, 8)), np.full((1, 8), 1e6))),
    "two values": np.where(RANDOM.random((400, 8)) < 0.5, 0.0, 3.7),
    "tiny": RANDOM.lognormal(size=(400, 8)) * 1e-300,
    "tiny squares": RANDOM.lognormal(size=(400, 8)) * 1e-161,
    "denormal": RANDOM.lognormal(size=(400, 8)) * 1e-320,
    "zeros": np.zeros((5, 8)),
    "one": RANDOM.lognormal(size=(1, 8)),
    "two": RANDOM.lognormal(size=(2, 8)),
    "not finite": np.where(RANDOM.random((400, 8)) < 0.3, math.nan, RANDOM.lognormal(size=(400, 8))),
    "nothing finite": np.full((3, 8), math.inf),
    "negative": -RANDOM.lognormal(size=(400, 8)),
    "squares overflow": RANDOM.lognormal(size=(7, 8)) * 1e200,
    "one square overflows": RANDOM.lognormal(size=(1, 8)) * 1e200,
    "sums overflow": np.full((5, 8), 1.7e308),
}


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("size", [1, 3, 64, 1000])
def test_moments_of_samples_are_possible(name, size):
    moments = accumulated(SAMPLES[name], size)
    assert not impossible(moments).any()
    assert not impossible(moments.scaled(torch.tensor(0.22, dtype=torch.float64))).any()
    merged = moments.merged(accumulated(SAMPLES[name][::-1].copy(), 7))
    assert not impossible(merged).any()


def test_many_merges_leave_them_possible():
    constant = accumulated(np.full((1, 4), math.pi), 1)
    spread = accumulated(RANDOM.lognormal(size=(3, 4)), 3)
    for moments in (constant, spread):
        total = moments
        for _ in range(20_000):
            total = total.merged(moments)
        for _ in range(30):
            total = total.merged(total)
        assert int(total.count.min()) > 10**13
        assert not impossible(total).any()


def cell(count=4, nonfinite=0, mean=2.0, m2=2.0, low=1.0, high=3.0) -> Moments:
    return Moments(
        *(torch.tensor([n]) for n in (count, nonfinite)),
        *(torch.tensor([x], dtype=torch.float64) for x in (mean, m2, low, high)),
    )


def test_the_good_cell_is_good():
    assert not impossible(cell()).any()  # 1, 2, 2, 3


@pytest.mark.parametrize(
    "change",
    [
        {"mean": 0.9},
        {"mean": 3.000001},
        {"mean": 1.1},  # one of four is 3
        {"mean": 2.9},
        {"mean": math.nan},
        {"mean": math.inf},
        {"m2": -1e-9},
        {"m2": 4.1},  # of two 1 and two 3 it is 4
        {"m2": 0.0},  # they are not all one
        {"m2": 1.9},
        {"m2": math.nan},
        {"m2": math.inf},
        {"low": 3.1},
        {"low": -math.inf},
        {"high": math.inf},
        {"low": math.nan},
        {"low": 2.0, "high": 2.0},  # and still a spread
        {"count": 1},
        {"count": 1, "low": 2.0, "high": 2.0},  # one sample with a spread
        {"count": 1, "m2": 0.0},
        {"count": 1, "m2": 0.0, "low": 2.0, "high": 2.0, "mean": 2.1},
        {"count": 0},
        {"count": -4},
        {"nonfinite": -1},
        {"count": MOST_SAMPLES + 1},
        {"nonfinite": MOST_SAMPLES + 1},
        {"count": 2**63 - 1},
        {"count": 0, "mean": 0.0, "m2": 0.0},
        {"count": 0, "mean": 0.0, "m2": 1.0, "low": math.inf, "high": -math.inf},
    ],
)
def test_moments_of_no_samples_are_not(change):
    assert impossible(cell(**change)).all()


def test_samples_below_the_least_are_not():
    assert impossible(cell(mean=0.0, low=-1.0, high=1.0), least=0.0).all()
    assert not impossible(cell(mean=0.0, low=-1.0, high=1.0)).any()


def several(samples: int = 4, heads: int = 4, **others: Moments) -> dict[str, Moments]:
    found = {metric: Moments.of(torch.rand(samples, 2, heads).double()) for metric in METRICS}
    return found | others


def of(*counts: int, rows: int = 2) -> Moments:
    """Moments of so many samples of each head in turn, all 1."""
    count = torch.tensor([counts] * rows)
    some = count > 0
    return Moments(
        count,
        torch.zeros_like(count),
        some.double(),
        some.double() * 0,
        torch.where(some, 1.0, math.inf).double(),
        torch.where(some, 1.0, -math.inf).double(),
    )


def test_metrics_of_the_same_samples_have_as_many():
    assert contradiction(several()) is None
    for metric in METRICS:
        told = several() | {metric: of(4, 4, 3, 4)}
        assert "different numbers of samples" in (contradiction(told) or "")
    lost = several()  # a sample that one metric has and another counts as not finite
    m = lost[METRICS[2]]
    lost[METRICS[2]] = of(3, 3, 3, 3)._replace(nonfinite=torch.ones_like(m.count))
    assert contradiction(lost) is None


def test_updates_may_be_unknown_in_a_part_but_not_more():
    for counts in ((4, 4, 4, 4), (0, 0, 0, 0), (2, 2, 2, 2)):
        assert contradiction(several() | {UPDATE_METRIC: of(*counts)}) is None
    assert "more samples" in (contradiction(several() | {UPDATE_METRIC: of(5, 5, 5, 5)}) or "")


def test_groups_of_heads_have_the_samples_of_their_layer():
    for counts in ((4, 4, 0, 0), (4, 0, 0, 0), (4, 4, 4, 4)):
        assert contradiction(several() | {KV_METRIC: of(*counts)}) is None
    for counts in ((5, 5, 0, 0), (0, 0, 0, 0), (4, 3, 0, 0), (0, 4, 0, 0), (4, 0, 4, 0)):
        assert contradiction(several() | {KV_METRIC: of(*counts)}) is not None


def profile_of(moments: Moments, source: str) -> HeadProfile:
    rows, heads = moments.count.shape
    sites = [{"name": f"{row}", "layer": row, "num_heads": heads, "head_dim": 8} for row in range(rows)]
    return HeadProfile({METRICS[0]: moments}, {"sites": sites, "data": {"source": source, "sha256": source}})


def test_more_samples_than_can_be_counted_do_not_merge():
    half = MOST_SAMPLES // 2 + 1
    with pytest.raises(MergeError, match="more samples of head_output_norm than can be counted"):
        HeadProfile.merge([profile_of(of(half, half), "a"), profile_of(of(half, half), "b")])
    huge = profile_of(of(2**62, 2**62), "a")
    with pytest.raises(MergeError, match="can be counted"):
        HeadProfile.merge([huge, profile_of(of(2**62, 2**62), "b"), profile_of(of(2**62, 1), "c")])


@pytest.mark.parametrize("scale", [1e-320, 1.0, 1e153, 1e155, 1e200, 1.7e308])
def test_what_is_saved_loads_however_large_the_samples(scale, tmp_path):
    samples = np.minimum(RANDOM.random((5, 2, 3)) + 0.1, 1.0) * scale
    parts = [profile_of(accumulated(samples[:n], 2), f"{n}") for n in (1, 2, 5)]
    for found in (*parts, HeadProfile.merge(parts)):
        found.save(tmp_path / "p.safetensors")
        loaded = HeadProfile.load(tmp_path / "p.safetensors").results()[METRICS[0]]
        assert loaded["max"].tolist() == found.moments[METRICS[0]].max.tolist()


DEEP: list = []
for _ in range(100):
    DEEP = [DEEP]


@pytest.mark.parametrize("metadata", [{"x": math.nan}, {"x": object()}, {"x": DEEP}])
def test_what_could_not_be_loaded_is_not_saved(metadata, tmp_path):
    found = profile_of(of(2, 2), "a")
    found.metadata |= metadata
    with pytest.raises(ProfileError, match="cannot be saved"):
        found.save(tmp_path / "p.safetensors")
    assert list(tmp_path.iterdir()) == []
