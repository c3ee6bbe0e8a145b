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


def tokens_of(z, power, valid, last):
    """The tokens that count, one after another: z `[G, n, H, D]`, power `[G, n, H]`."""
    batch, seq = z.shape[1:3]
    chosen = []
    for b in range(batch):
        there = [s for s in range(seq) if valid is None or valid[b, s]]
        chosen += [(b, s) for s in (there[-1:] if last else there)]
    rows, columns = [b for b, _ in chosen], [s for _, s in chosen]
    return z[:, rows, columns], power[:, rows, columns]


def expected(batches, last):
    """Count, nonfinite, mean of power, of ‖z‖² and of z, by numpy, from `(z, power, valid)`."""
    parts = [tokens_of(z.double(), power.double(), valid, last) for z, power, valid in batches]
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


def batch_of(seed, batch, seq, dtype=torch.float32, groups=2, heads=3, head_dim=4, masked=True):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(groups, batch, seq, heads, head_dim, generator=generator) + 3
    power = torch.rand(groups, batch, seq, heads, generator=generator, dtype=torch.float64)
    valid = torch.rand(batch, seq, generator=generator) < 0.6 if masked else None
    z = z.to(dtype)
    if valid is not None:
        z[:, ~valid] = math.nan  # padding may hold anything
        power[:, ~valid] = math.inf
    return z, power, valid


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("last", [False, True])
def test_means_are_those_of_all_tokens(dtype, last):
    batches = [batch_of(n, 1 + n % 3, 5 + n, dtype, masked=n % 2 == 0) for n in range(6)]
    state = RunningMeanVectors(2, 3, 4, CPU)
    for z, power, valid in batches:
        state.update(slice(0, 2), z, power, valid, last=last)
    assert_state(state, expected(batches, last))


@pytest.mark.parametrize("last", [False, True])
def test_a_nonfinite_token_is_left_out_for_its_head_alone(last):
    z, power, _ = batch_of(0, 2, 3, masked=False)
    z[0, 0, 2, 1, 3] = math.nan
    z[1, 1, 2, 0, 0] = -math.inf
    power[0, 1, 2, 2] = math.inf
    power[1, 0, 0, 1] = math.nan
    state = RunningMeanVectors(2, 3, 4, CPU)
    state.update([0, 1], z, power, last=last)
    assert_state(state, expected([(z, power, None)], last))
    assert int(state.views().nonfinite.sum()) == (3 if last else 4)


def test_a_slice_of_tokens_at_a_time_gives_the_same(monkeypatch):
    z, power, valid = batch_of(1, 3, 11)
    monkeypatch.setattr(mean_vectors, "SCRATCH_ELEMENTS", 2 * 3 * 4 * 5)
    state = RunningMeanVectors(2, 3, 4, CPU)
    state.update([0, 1], z, power, valid)
    assert_state(state, expected([(z, power, valid)], last=False))


def test_rows_and_heads_that_are_not_there_stay_empty():
    state = RunningMeanVectors(4, 3, 6, CPU)
    z, power, valid = batch_of(2, 2, 4, heads=2, head_dim=5)
    state.update([3, 1], z, power, valid)
    want = expected([(z, power, valid)], last=False)
    views = state.views()
    np.testing.assert_allclose(views.mean[[3, 1], :2, :5].numpy(), want[4], rtol=1e-13)
    assert not views.count[[0, 2]].any() and not views.count[:, 2].any()
    assert not state.buffer[[0, 2]].any() and not views.mean[..., 5:].any()


def test_no_tokens_change_nothing():
    state = RunningMeanVectors(1, 1, 2, CPU)
    state.update([0], torch.empty(1, 0, 3, 1, 2), torch.empty(1, 0, 3, 1))
    state.update([0], torch.empty(1, 2, 0, 1, 2), torch.empty(1, 2, 0, 1), last=True)
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for last in (False, True):
        state.update(
            [0], torch.full((1, 2, 3, 1, 2), math.nan), torch.full((1, 2, 3, 1), math.nan), nothing, last=last
        )
    assert not state.buffer.any()


def test_one_mask_for_all_rows():
    z, power, _ = batch_of(3, 3, 4, masked=False)
    valid = torch.tensor([[False, True, True, False]])
    for last in (False, True):
        state = RunningMeanVectors(2, 3, 4, CPU)
        state.update([0, 1], z, power, valid, last=last)
        assert_state(state, expected([(z, power, valid.expand(3, 4))], last))


def filled(seed, tokens):
    state = RunningMeanVectors(2, 3, 4, CPU)
    if tokens:
        state.update([0, 1], *batch_of(seed, 1, tokens, torch.float64, masked=False))
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
    batches = [batch_of(seed + n, 1, t, torch.float64, masked=False) for n, t in enumerate(sizes) if t]
    left = states[0].buffer.clone()
    for state in states[1:]:
        left = merged_buffers(left, state.buffer)
    right = states[-1].buffer.clone()
    for state in reversed(states[:-1]):
        right = merged_buffers(state.buffer, right)
    for buffer in (left, right):
        if batches:
            assert_state(RunningMeanVectors.over(buffer), expected(batches, last=False))
        else:
            assert not buffer.any()


def test_a_constant_stays_what_it_is():
    state = RunningMeanVectors(1, 1, 3, CPU)
    z = torch.tensor([0.1, -1e20, 1 / 3]).expand(1, 3, 7, 1, 3)
    for _ in range(50):
        state.update([0], z, torch.full((1, 3, 7, 1), 1 / 3, dtype=torch.float64))
    views = state.views()
    assert torch.equal(views.mean[0, 0], z[0, 0, 0, 0].double())
    assert views.power.item() == pytest.approx(1 / 3, rel=1e-15) and views.count.item() == 50 * 21


def test_the_state_keeps_its_address():
    pending, committed = filled(0, 3), filled(1, 5)
    addresses = pending.buffer.data_ptr(), committed.buffer.data_ptr()
    pending.copy_(committed)
    assert torch.equal(pending.buffer, committed.buffer)
    pending.update([1], *(t[:1] if t is not None else t for t in batch_of(4, 2, 2, masked=False)))
    assert not torch.equal(pending.buffer, committed.buffer)
    committed.copy_(pending)
    other = filled(7, 4)
    want = merged_buffers(committed.buffer, other.buffer)
    committed.merge_(other.buffer)
    assert torch.equal(committed.buffer, want)
    pending.clear()
    assert (pending.buffer.data_ptr(), committed.buffer.data_ptr()) == addresses
    assert not pending.buffer.any() and committed.like().buffer.shape == committed.buffer.shape
    assert RunningMeanVectors.over(committed.buffer).buffer.data_ptr() == addresses[1]


def test_a_state_made_in_inference_mode_is_updated_outside():
    with torch.inference_mode():
        state = RunningMeanVectors(1, 1, 2, CPU)
        state.update([0], torch.ones(1, 1, 2, 1, 2), torch.ones(1, 1, 2, 1))
    z = torch.ones(1, 1, 2, 1, 2, requires_grad=True)
    state.update([0], z, torch.ones(1, 1, 2, 1))
    assert state.views().count.item() == 4 and not state.buffer.requires_grad
