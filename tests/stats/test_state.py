"""The state of a measurement: begin, commit, and merging of moments and mean vectors in one buffer."""

import math

import pytest
import torch

from fastheads.stats.mean_vectors import RunningMeanVectors
from fastheads.stats.moments import RunningMoments
from fastheads.stats.state import CommittedState, PendingState, StateLayout

CPU = torch.device("cpu")
LAYOUT = StateLayout((6, 1), rows=3, heads=2, head_dim=5)


def fill(state, seed):
    """Merge random samples and tokens into a pending state; returns them."""
    generator = torch.Generator().manual_seed(seed)
    values = [torch.randn(4, n, 3, 2, generator=generator, dtype=torch.float64) for n in (6, 1)]
    z = torch.randn(3, 4, 2, 5, generator=generator, dtype=torch.float64)
    power = torch.rand(3, 4, 2, generator=generator, dtype=torch.float64)
    for moments, some in zip(state.pending, values, strict=True):
        moments.update(slice(0, 3), some)
    state.pending[0].vectors.update(slice(0, 3), z, power)
    return *values, z, power


def assert_holds(moments, batches):
    """The moments by channel, with the mean vectors, are those of all batches."""
    by_channel = [torch.cat(some) for some in list(zip(*batches, strict=True))[:2]]
    for found, values in zip(moments, by_channel, strict=True):
        planes = found.views()
        torch.testing.assert_close(planes.mean, values.mean(0))
        torch.testing.assert_close(planes.m2, (values - values.mean(0)).square().sum(0))
        assert planes.count.eq(len(values)).all() and torch.equal(planes.max, values.amax(0))
    z, power = (torch.cat([batch[n] for batch in batches], 1) for n in (2, 3))
    vectors = moments[0].vectors.views()
    torch.testing.assert_close(vectors.mean, z.mean(1))
    torch.testing.assert_close(vectors.power, power.mean(1))
    assert vectors.count.eq(z.shape[1]).all()


def test_parts_are_aligned_share_the_buffer_and_do_not_overlap():
    buffer = LAYOUT.buffer(CPU)
    parts = LAYOUT.parts(buffer)
    assert [tuple(part.shape) for part in parts] == [(6, 6, 3, 2), (6, 1, 3, 2), (3, 2, 9)]
    assert all(part.data_ptr() % 16 == buffer.data_ptr() % 16 and part.is_contiguous() for part in parts)
    for n, part in enumerate(parts):
        part.fill_(n + 1)
    assert [part.unique().tolist() for part in parts] == [[1.0], [2.0], [3.0]]
    assert buffer[-1] in (0.0, 3.0)


def test_a_forward_counts_when_it_is_committed():
    state = CommittedState(LAYOUT, CPU)
    first = fill(state, 0)
    state.commit()
    state.begin(always=False)
    fill(state, 1)  # fails
    state.begin(always=False)
    second = fill(state, 2)
    assert_holds(state.committed, [first])
    state.commit()
    assert_holds(state.committed, [first, second])


def test_a_forward_beside_another_is_merged():
    state = CommittedState(LAYOUT, CPU)
    state.begin(always=False)
    first = fill(state, 0)
    others = [state.like() for _ in range(2)]
    batches = [fill(other, n + 1) for n, other in enumerate(others)]
    assert all(isinstance(other, PendingState) for other in others)
    for other in others:
        state.add(other.pending_buffer)
    assert_holds(state.committed, batches)
    state.commit()
    assert_holds(state.committed, [first, *batches])


def test_without_mean_vectors_there_are_none():
    layout = StateLayout((4,), 1, 2)
    state = CommittedState(layout, CPU)
    assert layout.vectors(state.committed_buffer) is None and state.pending[0].vectors is None


def test_a_channel_of_a_copy_has_its_own_vectors():
    """As a compiled graph gives them: of a copy of the whole state."""
    state = CommittedState(LAYOUT, CPU)
    batch = fill(state, 3)
    copy = state.pending_buffer.clone()
    state.clear()
    channels = [LAYOUT.channel(copy, n) for n in range(2)]
    assert_holds(channels, [batch])
    assert isinstance(channels[0], RunningMoments) and channels[1].vectors is None
    assert isinstance(channels[0].vectors, RunningMeanVectors)


def test_state_keeps_its_address():
    state = CommittedState(StateLayout((4,), 2, 3), CPU)
    address = state.committed_buffer.data_ptr(), state.pending_buffer.data_ptr()
    state.begin(always=False)
    state.pending[0].update([1], torch.randn(5, 4, 1, 3, dtype=torch.float64))
    assert state.committed[0].views().count.sum() == 0
    state.commit()
    assert (
        state.committed[0].views().count[:, 1].eq(5).all()
        and state.committed[0].views().count[:, 0].eq(0).all()
    )
    state.clear()
    assert (state.committed_buffer.data_ptr(), state.pending_buffer.data_ptr()) == address
    assert state.committed[0].views().max.eq(-math.inf).all()


@pytest.mark.parametrize("always", [False, True])
def test_what_was_begun_and_not_committed_is_overwritten(always):
    state = CommittedState(StateLayout((4,), 1, 1), CPU)
    one = torch.ones(1, 4, 1, 1, dtype=torch.float64)
    for step in range(4):
        state.begin(always=always)
        state.pending[0].update([0], one)
        if step % 2:
            state.commit()
    assert state.committed[0].views().count.eq(2).all()
    state.begin(always=always)
    assert state.pending[0].views().count.eq(2).all()
