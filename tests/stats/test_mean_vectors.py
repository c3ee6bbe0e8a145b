"""Running mean vectors against float64 over all tokens at once."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastheads.stats import mean_vectors
from fastheads.stats.mean_vectors import RunningMeanVectors, merged_buffers

CPU = torch.device("cpu")


def tokens_of(z, power, valid):
    """The tokens that count, one after another: z `[G, n, H, D]`, power `[G, n, H]`."""
    chosen = [n for n in range(z.shape[1]) if valid is None or valid[n]]
    return z[:, chosen], power[:, chosen]


def expected(batches):
    """Count, nonfinite, mean of power, of ‖z‖² and of z, by numpy, from `(z, power, valid)`."""
    parts = [tokens_of(z.double(), power.double(), valid) for z, power, valid in batches]
    z = np.concatenate([z.numpy() for z, _ in parts], 1)
    power = np.concatenate([p.numpy() for _, p in parts], 1)
    groups, _, heads, head_dim = z.shape
    count, nonfinite = np.zeros((2, groups, heads), dtype=np.int64)
    powers, outputs, mean = (
        *np.zeros((2, groups, heads)),
        np.zeros((groups, heads, head_dim)),
    )
    for g in range(groups):
        for h in range(heads):
            good = np.isfinite(power[g, :, h]) & np.isfinite(z[g, :, h]).all(-1)
            count[g, h], nonfinite[g, h] = good.sum(), (~good).sum()
            if good.any():
                powers[g, h] = power[g, good, h].mean()
                outputs[g, h] = (z[g, good, h] ** 2).sum(-1).mean()
                mean[g, h] = z[g, good, h].mean(0)
    return count, nonfinite, powers, outputs, mean


def assert_state(state, want, rtol=1e-13):
    planes = [plane.numpy() for plane in state.views()]
    for got, value in zip(planes[:2], want[:2], strict=True):
        assert got.dtype == np.int64
        np.testing.assert_array_equal(got, value)
    for got, value in zip(planes[2:], want[2:], strict=True):
        np.testing.assert_allclose(got, value, rtol=rtol, atol=1e-15)


def batch_of(seed, tokens, dtype=torch.float32, groups=2, heads=3, head_dim=4, masked=True):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(groups, tokens, heads, head_dim, generator=generator) + 3
    power = torch.rand(groups, tokens, heads, generator=generator, dtype=torch.float64)
    valid = torch.rand(tokens, generator=generator) < 0.6 if masked else None
    z = z.to(dtype)
    if valid is not None:
        z[:, ~valid] = math.nan  # padding may hold anything
        power[:, ~valid] = math.inf
    return z, power, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_means_are_those_of_all_tokens(dtype):
    batches = [batch_of(n, (1 + n % 3) * (5 + n), dtype, masked=n % 2 == 0) for n in range(6)]
    state = RunningMeanVectors(2, 3, 4, CPU)
    for z, power, valid in batches:
        state.update(slice(0, 2), z, power, valid)
    assert_state(state, expected(batches))


def test_a_nonfinite_token_is_left_out_for_its_head_alone():
    z, power, _ = batch_of(0, 6, masked=False)
    z[0, 2, 1, 3] = math.nan
    z[1, 5, 0, 0] = -math.inf
    power[0, 5, 2] = math.inf
    power[1, 0, 1] = math.nan
    state = RunningMeanVectors(2, 3, 4, CPU)
    state.update([0, 1], z, power)
    assert_state(state, expected([(z, power, None)]))
    assert int(state.views().nonfinite.sum()) == 4


def test_a_slice_of_tokens_at_a_time_gives_the_same(monkeypatch):
    z, power, valid = batch_of(1, 33)
    monkeypatch.setattr(mean_vectors, "SCRATCH_ELEMENTS", 2 * 3 * 4 * 5)
    state = RunningMeanVectors(2, 3, 4, CPU)
    state.update([0, 1], z, power, valid)
    assert_state(state, expected([(z, power, valid)]))


def test_rows_and_heads_that_are_not_there_stay_empty():
    state = RunningMeanVectors(4, 3, 6, CPU)
    z, power, valid = batch_of(2, 8, heads=2, head_dim=5)
    state.update([3, 1], z, power, valid)
    want = expected([(z, power, valid)])
    views = state.views()
    np.testing.assert_allclose(views.mean[[3, 1], :2, :5].numpy(), want[4], rtol=1e-13)
    assert not views.count[[0, 2]].any() and not views.count[:, 2].any()
    assert not state.buffer[[0, 2]].any() and not views.mean[..., 5:].any()


def test_no_tokens_change_nothing():
    state = RunningMeanVectors(1, 1, 2, CPU)
    state.update([0], torch.empty(1, 0, 1, 2), torch.empty(1, 0, 1))
    nothing = torch.zeros(3, dtype=torch.bool)
    state.update([0], torch.full((1, 3, 1, 2), math.nan), torch.full((1, 3, 1), math.nan), nothing)
    assert not state.buffer.any()


def filled(seed, tokens):
    state = RunningMeanVectors(2, 3, 4, CPU)
    if tokens:
        state.update([0, 1], *batch_of(seed, tokens, torch.float64, masked=False))
    return state


def test_merging_with_nothing_is_exact():
    some, none = filled(0, 7), filled(0, 0)
    some.views().mean[0, 0] = torch.tensor([1e308, -1e308, -0.0, 5e-324])
    for merged in (merged_buffers(some.buffer, none.buffer), merged_buffers(none.buffer, some.buffer)):
        assert torch.equal(merged.view(torch.int64), some.buffer.view(torch.int64))
    assert not merged_buffers(none.buffer, none.buffer).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.integers(0, 2**31))
def test_any_tree_of_merges_is_all_tokens_at_once(sizes, seed):
    states = [filled(seed + n, tokens) for n, tokens in enumerate(sizes)]
    batches = [batch_of(seed + n, t, torch.float64, masked=False) for n, t in enumerate(sizes) if t]
    left = states[0].buffer.clone()
    for state in states[1:]:
        left = merged_buffers(left, state.buffer)
    right = states[-1].buffer.clone()
    for state in reversed(states[:-1]):
        right = merged_buffers(state.buffer, right)
    for buffer in (left, right):
        if batches:
            assert_state(RunningMeanVectors.over(buffer), expected(batches))
        else:
            assert not buffer.any()


def test_a_constant_stays_what_it_is():
    state = RunningMeanVectors(1, 1, 3, CPU)
    z = torch.tensor([0.1, -1e20, 1 / 3]).expand(1, 21, 1, 3)
    for _ in range(50):
        state.update([0], z, torch.full((1, 21, 1), 1 / 3, dtype=torch.float64))
    views = state.views()
    assert torch.equal(views.mean[0, 0], z[0, 0, 0].double())
    assert views.power.item() == pytest.approx(1 / 3, rel=1e-15) and views.count.item() == 50 * 21


def test_a_state_made_in_inference_mode_is_updated_outside():
    with torch.inference_mode():
        state = RunningMeanVectors(1, 1, 2, CPU)
        state.update([0], torch.ones(1, 2, 1, 2), torch.ones(1, 2, 1))
    z = torch.ones(1, 2, 1, 2, requires_grad=True)
    state.update([0], z, torch.ones(1, 2, 1))
    assert state.views().count.item() == 4 and not state.buffer.requires_grad
