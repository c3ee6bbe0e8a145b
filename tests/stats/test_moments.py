"""Running moments against certified values and against float64 over everything at once."""

import math

import numpy as np
import pytest
import torch

from fastheads.basic import Welford
from fastheads.stats.moments import Moments, RunningMoments

CPU = torch.device("cpu")

# NIST StRD, univariate: data, certified mean and standard deviation.
NIST = {
    "NumAcc1": ([10000001.0, 10000003.0, 10000002.0], 10000002.0, 1.0),
    "NumAcc2": ([1.2] + [1.1, 1.3] * 500, 1.2, 0.1),
    "NumAcc3": ([1000000.2] + [1000000.1, 1000000.3] * 500, 1000000.2, 0.1),
    "NumAcc4": ([10000000.2] + [10000000.1, 10000000.3] * 500, 10000000.2, 0.1),
}
# The digits that the data's own rounding to float64 leaves to the standard deviation.
STD_DIGITS = {"NumAcc1": 14.0, "NumAcc2": 14.0, "NumAcc3": 9.3, "NumAcc4": 8.2}


def log_relative_error(got, certified):
    """Number of right digits, 15 at most."""
    return 15.0 if got == certified else min(15.0, -math.log10(abs(got - certified) / abs(certified)))


def stream(values, batch):
    running = RunningMoments(1, 1, 1, CPU)
    for start in range(0, len(values), batch):
        part = torch.as_tensor(values[start : start + batch], dtype=torch.float64)
        running.update([0], part.view(-1, 1, 1, 1))
    m = running.views()
    return m.count.item(), m.mean.item(), math.sqrt(m.var().item()), m.min.item(), m.max.item()


@pytest.mark.parametrize("batch", [1, 7, 64, 5000])
@pytest.mark.parametrize("name", NIST)
def test_nist(name, batch):
    data, mean, std = NIST[name]
    count, got_mean, got_std, low, high = stream(data, batch)
    assert (count, low, high) == (len(data), min(data), max(data))
    assert log_relative_error(got_mean, mean) >= 14
    assert log_relative_error(got_std, std) >= STD_DIGITS[name]


@pytest.mark.parametrize("name", NIST)
def test_nist_by_the_basic_managers_welford(name):
    data, mean, std = NIST[name]
    welford = Welford()
    for value in data:
        welford.update(value)
    assert log_relative_error(welford.mean, mean) >= 14
    assert log_relative_error(math.sqrt(welford.m2 / (welford.count - 1)), std) >= STD_DIGITS[name]


@pytest.mark.parametrize("ratio", [0.1, 1, 30, 1000])
def test_any_split_gives_the_same(ratio):
    rng = np.random.default_rng(0)
    values = rng.normal(size=3000)
    values = values / values.std(ddof=1) + ratio
    mean, std = math.fsum(values) / len(values), None
    std = math.sqrt(math.fsum((values - mean) ** 2) / (len(values) - 1))
    for split in range(30):
        cuts = np.sort(
            rng.choice(np.arange(1, len(values)), size=rng.integers(0, 400 if split else 2999), replace=False)
        )
        running = RunningMoments(1, 1, 1, CPU)
        for part in np.split(values, cuts):
            running.update([0], torch.from_numpy(part).view(-1, 1, 1, 1))
        m = running.views()
        assert m.count.item() == 3000
        assert abs(m.mean.item() - mean) <= 1e-12 * abs(mean)
        assert abs(math.sqrt(m.var().item()) - std) <= 1e-12 * std


def test_a_tree_of_merges_equals_one_pass():
    values = torch.randn(1000, 3, dtype=torch.float64) + 5
    parts = [Moments.of(p) for p in values.split([1, 499, 300, 200])]
    left = parts[0].merged(parts[1]).merged(parts[2]).merged(parts[3])
    tree = parts[0].merged(parts[1]).merged(parts[2].merged(parts[3]))
    whole = Moments.of(values)
    for m in (left, tree):
        torch.testing.assert_close(m.mean, whole.mean, rtol=1e-14, atol=0)
        torch.testing.assert_close(m.m2, whole.m2, rtol=1e-13, atol=0)
        assert torch.equal(m.count, whole.count)
        assert torch.equal(m.min, whole.min) and torch.equal(m.max, whole.max)
    torch.testing.assert_close(whole.var(), values.var(0), rtol=1e-13, atol=0)


def test_counts_pass_what_float32_and_float64_can_hold():
    a = Moments.of(torch.ones(2, 1, dtype=torch.float64))
    big = a._replace(count=torch.tensor([2**53 + 1]))
    assert big.merged(a).count.item() == 2**53 + 3


def test_empty_and_nonfinite():
    running = RunningMoments(1, 1, 2, CPU)
    running.update([0], torch.empty(0, 1, 1, 2, dtype=torch.float64))
    nan, inf = math.nan, math.inf
    running.update(
        [0], torch.tensor([[1.0, nan], [inf, nan], [3.0, -inf]], dtype=torch.float64).view(3, 1, 1, 2)
    )
    running.update(
        [0], torch.tensor([[nan, 7.0]], dtype=torch.float64).view(1, 1, 1, 2), present=torch.tensor([False])
    )
    m = running.views()
    assert m.count.tolist() == [[[2, 0]]] and m.nonfinite.tolist() == [[[1, 3]]]
    assert m.mean.tolist() == [[[2.0, 0.0]]] and m.m2.tolist() == [[[2.0, 0.0]]]
    assert m.min.tolist() == [[[1.0, inf]]] and m.max.tolist() == [[[3.0, -inf]]]
    assert m.var()[0, 0, 0] == 2 and m.var()[0, 0, 1].isnan()
