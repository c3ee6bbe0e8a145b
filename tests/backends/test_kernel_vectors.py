"""The mean vectors of the kernel, means of z, |z|² and |W z|², against float64 algebra written here.

On a GPU these are tests marked `gpu`; under TRITON_INTERPRET=1 (see test_kernel.py) they run on the CPU.
"""

import math
from collections.abc import Iterator

import pytest
import torch
from on_kernel import DEVICE, INTERPRETED, MARKS, RUNS, poison_fresh_buffers
from torch import Tensor

triton = pytest.importorskip("triton")
pytestmark = MARKS
EXACT, FAST = 1e-5, 4e-3  # of |W z|², twice those of |W z|
SUM = 1e-6  # of a mean of z, in units of the root mean square of z; and of |z|²
COUNT, NONFINITE, POWER, OUTPUT_POWER, MEAN = range(5)
AGGS = ("all", "last", "token")

if RUNS:
    from fastheads.kernels import KernelFactor, head_stats, kernel, prepare
    from fastheads.kernels import launch as launcher


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers hold NaN."""
    poison_fresh_buffers(monkeypatch, launcher)
    yield


def new_state(rows: int, heads: int, metrics: int = 4) -> Tensor:
    state = torch.zeros(6, metrics, rows, heads, dtype=torch.float64, device=DEVICE)
    state[4] = math.inf
    state[5] = -math.inf
    return state


def new_vectors(rows: int, heads: int, head_dim: int) -> Tensor:
    return torch.zeros(rows, heads, MEAN + head_dim, dtype=torch.float64, device=DEVICE)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int64), b.contiguous().view(torch.int64))


def case(
    *,
    heads: int = 3,
    head_dim: int = 16,
    batch: int = 3,
    seq: int = 19,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "exact",
    seed: int = 0,
) -> tuple[Tensor, Tensor, "KernelFactor"]:
    """X with a mean other than 0, W `[hidden, heads, head_dim]` in float64, and the factor."""
    torch.manual_seed(seed)
    hidden = 4 * head_dim if precision == "exact" else 1024
    weights = torch.randn(hidden, heads, head_dim, dtype=torch.float64).to(dtype).double().to(DEVICE)
    per_head = weights.permute(1, 0, 2)
    factor = prepare(torch.linalg.cholesky(per_head.mT @ per_head), dtype, precision)
    x = torch.randn(batch, seq, heads * head_dim) + torch.randn(heads * head_dim)
    return x.to(DEVICE, dtype), weights, factor


class Tokens:
    """The tokens of one row of the buffer, collected from batches: float64 z `[n, heads, head_dim]` and |W z|² `[n, heads]`."""

    def __init__(self, x: Tensor, weights: Tensor, real: Tensor, token_agg: str) -> None:
        _, heads, head_dim = weights.shape
        z = x.double().unflatten(-1, (heads, head_dim))
        power = torch.einsum("bshd,ohd->bsho", z, weights).square().sum(-1)
        if token_agg == "last":
            real = real & (real.flip(1).cumsum(1).flip(1) == 1)
        self.z, self.power = z[real].cpu(), power[real].cpu()

    def __add__(self, other: "Tokens") -> "Tokens":
        both = Tokens.__new__(Tokens)
        both.z, both.power = torch.cat((self.z, other.z)), torch.cat((self.power, other.power))
        return both


def check(vectors: Tensor, row: int, tokens: Tokens, tolerance: float = EXACT) -> None:
    """`vectors[row]` holds the means over the finite tokens of each head, and nothing else."""
    heads, head_dim = tokens.z.shape[1:]
    got = vectors[row].cpu()
    assert (got[heads:] == 0).all()
    assert (got[:, MEAN + head_dim :] == 0).all()
    counts = got[:, :POWER].clone().view(torch.int64)
    for head in range(heads):
        z, power = tokens.z[:, head], tokens.power[:, head]
        outputs = z.square().sum(-1)
        finite = power.isfinite() & outputs.isfinite()
        assert counts[head].tolist() == [int(finite.sum()), int((~finite).sum())]
        if not finite.any():
            assert (got[head, POWER:] == 0).all()
            continue
        z, power, outputs = z[finite], power[finite], outputs[finite]
        torch.testing.assert_close(got[head, POWER], power.mean(), rtol=tolerance, atol=0.0)
        torch.testing.assert_close(got[head, OUTPUT_POWER], outputs.mean(), rtol=SUM, atol=0.0)
        size = z.square().mean().sqrt().item()
        torch.testing.assert_close(got[head, MEAN : MEAN + head_dim], z.mean(0), rtol=0.0, atol=SUM * size)


MASKS = ("none", "skip_first", "skip all", "right", "left", "holes")


def mask_of(kind: str, x: Tensor) -> tuple[Tensor | None, int, Tensor]:
    """`valid` and `skip_first` as the kernel takes them, and which tokens count."""
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    skip = {"skip_first": 3, "skip all": x.shape[1]}.get(kind, 0)
    if kind in ("none", "skip_first", "skip all"):
        real[:, :skip] = False
        return None, skip, real
    if kind == "right":
        real[0, 12:] = False
        real[1, 1:] = False
    elif kind == "left":
        real[0, :7] = False
        real[1, :-1] = False
    else:
        real[0, 4:8] = False
        real[1, ::2] = False
    real[2] = False  # no valid token
    return real.clone(), 0, real


def check_moments_stay(state: Tensor, x: Tensor, factor: "KernelFactor", **given: object) -> None:
    """The moments are what they are without mean vectors."""
    without = torch.zeros_like(state)
    without[4:] = new_state(*state.shape[2:], state.shape[1])[4:]
    head_stats([x], [factor], without, [0], **given)
    if INTERPRETED:
        assert same_bits(state, without)
    else:
        counts = (s[:2].contiguous().view(torch.int64) for s in (state, without))
        assert torch.equal(*counts)
        torch.testing.assert_close(state[2], without[2], rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("token_agg", AGGS)
def test_only_valid_tokens_count(token_agg: str, mask: str) -> None:
    """Whatever the others are: NaN, infinite. A scale is of the moments alone."""
    x, weights, factor = case()
    valid, skip, real = mask_of(mask, x)
    tokens = Tokens(x, weights, real, token_agg)
    x[~real & (torch.rand(real.shape, device=DEVICE) < 0.6)] = math.nan
    x[~real & (torch.rand(real.shape, device=DEVICE) < 0.3)] = math.inf
    scale = torch.rand(x.shape[:2], device=DEVICE) + 0.5 if mask in ("none", "left") else None
    given = {"token_agg": token_agg, "valid": valid, "skip_first": skip, "scale": scale}
    state, vectors = new_state(1, 3), new_vectors(1, 3, 16)
    head_stats([x], [factor], state, [0], vectors=vectors, **given)
    check(vectors, 0, tokens)
    check_moments_stay(state, x, factor, **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 128] if INTERPRETED else [16, 24, 64, 80, 128, 192, 256])
@pytest.mark.parametrize("token_agg", AGGS)
def test_every_dtype_and_head_dim(token_agg: str, head_dim: int, dtype: torch.dtype) -> None:
    x, weights, factor = case(head_dim=head_dim, dtype=dtype, heads=1)
    valid, _, real = mask_of("left", x)
    vectors = new_vectors(1, 1, head_dim)
    for mask, counted in ((valid, real), (None, torch.ones_like(real))):
        vectors.zero_()
        head_stats([x], [factor], new_state(1, 1), [0], token_agg=token_agg, valid=mask, vectors=vectors)
        check(vectors, 0, Tokens(x, weights, counted, token_agg))


@pytest.mark.parametrize("token_agg", AGGS)
@pytest.mark.parametrize(
    ("batch", "seq", "heads"),
    [(1, 1, 1), (17, 2, 2), (1, 32, 17), (1, 400, 1), (2, 128, 1)],
)
def test_batches_and_lengths_that_no_tile_divides(token_agg: str, batch: int, seq: int, heads: int) -> None:
    """Several programs a row and rows a program, tiles that end beyond the row."""
    x, weights, factor = case(batch=batch, seq=seq, heads=heads)
    everything = torch.ones(batch, seq, dtype=torch.bool, device=DEVICE)
    vectors = new_vectors(1, heads, 16)
    head_stats([x], [factor], new_state(1, heads), [0], token_agg=token_agg, vectors=vectors)
    check(vectors, 0, Tokens(x, weights, everything, token_agg))


@pytest.mark.parametrize("token_agg", AGGS)
def test_fast_mixes_heads_of_one_and_two_passes(token_agg: str) -> None:
    x, weights, _ = case(head_dim=64, precision="fast", batch=1, seq=40)
    decay = torch.logspace(0, -4, 64, dtype=torch.float64, device=DEVICE)
    u, _, v = torch.linalg.svd(weights[:, 1], full_matrices=False)
    weights[:, 1] = (u * decay) @ v
    per_head = weights.permute(1, 0, 2)
    factor = prepare(torch.linalg.cholesky(per_head.mT @ per_head), x.dtype, "fast")
    assert factor.two_passes().tolist() == [False, True, False]
    everything = torch.ones(1, 40, dtype=torch.bool, device=DEVICE)
    x[0, 7, 3] = math.nan  # a stretch that is read once more
    vectors = new_vectors(1, 3, 64)
    head_stats([x], [factor], new_state(1, 3), [0], token_agg=token_agg, vectors=vectors)
    check(vectors, 0, Tokens(x, weights, everything, token_agg), FAST)


@pytest.mark.parametrize(("dtype", "masked"), [(torch.bfloat16, False), (torch.float32, True)], ids=str)
@pytest.mark.parametrize("token_agg", AGGS)
def test_tokens_that_are_not_finite_are_left_out_of_their_head_alone(
    token_agg: str, dtype: torch.dtype, masked: bool
) -> None:
    x, weights, factor = case(batch=4, seq=40, dtype=dtype)
    z = x.unflatten(-1, (3, 16))
    z[0, -1, 1, 5] = math.nan
    z[1, 3, 1, 0] = math.inf
    z[2, -1, 0] = -math.inf
    z[2, -2, 0, 7] = 3e30  # finite, but not its square in float32
    real = torch.ones(4, 40, dtype=torch.bool, device=DEVICE)
    if masked:
        real[0, -1] = False
        real[3, 5:] = False
    truth = x.clone()
    truth.unflatten(-1, (3, 16))[2, -2, 0, 7] = math.inf  # as the kernel takes it
    state, vectors = new_state(1, 3), new_vectors(1, 3, 16)
    given = {"token_agg": token_agg, "valid": real if masked else None}
    for _ in range(2):  # and merges with what is there
        head_stats([x], [factor], state, [0], vectors=vectors, **given)
    tokens = Tokens(truth, weights, real, token_agg)
    check(vectors, 0, tokens + tokens)
    once = new_state(1, 3)
    head_stats([x], [factor], once, [0], vectors=vectors, **given)
    check_moments_stay(once, x, factor, **given)


@pytest.mark.parametrize("token_agg", AGGS)
def test_dead_and_poisoned_heads(token_agg: str) -> None:
    """A head without weights has power 0; of one with NaN no token is finite."""
    x, weights, _ = case()
    per_head = weights.permute(1, 0, 2)
    L = torch.linalg.cholesky(per_head.mT @ per_head)
    L[1] = 0.0
    L[2, 5, 5] = math.nan
    weights[:, 1] = 0.0
    weights[:, 2] = math.nan
    factor = prepare(L, x.dtype, "exact")
    valid, _, real = mask_of("holes", x)
    vectors = new_vectors(1, 3, 16)
    head_stats([x], [factor], new_state(1, 3), [0], token_agg=token_agg, valid=valid, vectors=vectors)
    check(vectors, 0, Tokens(x, weights, real, token_agg))


def test_weights_of_any_size() -> None:
    """|W z|² is formed in units of the factor's scale: beyond float32 it is finite still."""
    x, weights, _ = case()
    everything = torch.ones(x.shape[:2], dtype=torch.bool, device=DEVICE)
    for size in (1e-25, 1e25):
        per_head = weights.permute(1, 0, 2) * size
        factor = prepare(torch.linalg.cholesky(per_head.mT @ per_head), x.dtype, "exact")
        vectors = new_vectors(1, 3, 16)
        head_stats([x], [factor], new_state(1, 3), [0], token_agg="all", vectors=vectors)
        check(vectors, 0, Tokens(x, weights * size, everything, "all"))


@pytest.mark.parametrize("token_agg", AGGS)
def test_batches_add_up_in_one_row_of_a_larger_buffer(token_agg: str) -> None:
    """Of more rows, heads and dimensions; a batch without valid tokens, and one after it."""
    _, weights, factor = case()
    vectors = new_vectors(4, 5, 40)
    tokens = None
    for batch, seq in ((2, 9), (1, 20), (3, 4), (2, 2)):
        x = torch.randn(batch, seq, 3 * 16).to(DEVICE, torch.bfloat16) + 1
        real = torch.ones(batch, seq, dtype=torch.bool, device=DEVICE)
        if seq == 20:
            real[:] = False
        new = Tokens(x, weights, real, token_agg)
        tokens = new if tokens is None else tokens + new
        head_stats([x], [factor], new_state(4, 3), [2], token_agg=token_agg, valid=real, vectors=vectors)
    check(vectors, 2, tokens)
    assert (vectors[[0, 1, 3]] == 0).all()


@pytest.mark.parametrize("token_agg", AGGS)
def test_means_of_many_tokens_far_from_zero(token_agg: str) -> None:
    """Sums of float32 would lose what lies under them: they are of few tokens."""
    seq = 1000 if INTERPRETED else 200_000
    x, weights, factor = case(batch=1, seq=seq, heads=1)
    x += 8
    everything = torch.ones(1, seq, dtype=torch.bool, device=DEVICE)
    vectors = new_vectors(1, 1, 16)
    head_stats([x], [factor], new_state(1, 1), [0], token_agg=token_agg, vectors=vectors)
    check(vectors, 0, Tokens(x, weights, everything, token_agg))


@pytest.mark.parametrize("token_agg", AGGS)
def test_a_group_of_layers_with_ratios_and_scales(token_agg: str) -> None:
    """Rows of two strides, a factor that comes twice: several launches; and neither ratio nor scale counts here."""
    cases = [case(seed=seed, seq=11, batch=2) for seed in range(4)]
    order, rows = [0, 1, 0, 2, 3], [4, 0, 3, 6, 1]
    inputs = [torch.randn_like(cases[i][0]) for i in order]
    wide = torch.full((2, 11, 96), math.nan, dtype=inputs[0].dtype, device=DEVICE)
    wide[..., :48] = inputs[3]
    inputs[3] = wide[..., :48]
    everything = torch.ones(2, 11, dtype=torch.bool, device=DEVICE)
    given = {
        "token_agg": token_agg,
        "scale": torch.rand(5, 2, 11, device=DEVICE) + 0.5,
        "ratio": torch.rand(5, 2, 11, device=DEVICE),
    }
    factors = [cases[i][2] for i in order]
    state, vectors = new_state(7, 5, 6), new_vectors(7, 5, 20)
    head_stats(inputs, factors, state, rows, vectors=vectors, **given)
    for x, i, row in zip(inputs, order, rows, strict=True):
        check(vectors, row, Tokens(x, cases[i][1], everything, token_agg))
    assert (vectors[[2, 5]] == 0).all()
    without = new_state(7, 5, 6)
    head_stats(inputs, factors, without, rows, **given)
    if INTERPRETED:
        assert same_bits(state, without)
    else:
        torch.testing.assert_close(state[2], without[2], rtol=1e-6, atol=0.0)


def test_the_workspace_of_token_mode_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of rows, and of parts of rows."""
    for tokens, mask, skip in ((7, "none", 9), (40, "right", 0)):
        x, weights, factor = case()
        monkeypatch.setattr(launcher, "WORKSPACE_BYTES", tokens * 8 * 3)
        valid, _, real = mask_of(mask, x)
        real[:, :skip] = False
        given = {"token_agg": "token", "valid": valid, "skip_first": skip}
        state, vectors = new_state(1, 3), new_vectors(1, 3, 16)
        head_stats([x], [factor], state, [0], vectors=vectors, **given)
        check(vectors, 0, Tokens(x, weights, real, "token"))
        check_moments_stay(state, x, factor, **given)


@pytest.mark.parametrize(("with_ratio", "masked"), [(False, False), (True, True)])
@pytest.mark.parametrize("token_agg", ["all", "last"])
def test_launches_made_again(
    monkeypatch: pytest.MonkeyPatch, token_agg: str, with_ratio: bool, masked: bool
) -> None:
    """More layers than one launch takes; other inputs and buffers, in any place of a larger one."""
    layers, batch, seq, metrics = 34, 1, 8, 6 if with_ratio else 4
    if INTERPRETED:  # which takes as long for a layer as all other tests
        layers = 3
        monkeypatch.setattr(launcher, "_TABLE_SIZES", (1, 2))
    factors = [case(heads=2, seed=seed)[2] for seed in range(layers)]
    valid = torch.rand(batch, seq, device=DEVICE) < 0.7 if masked else None
    rows = list(range(layers))

    def drawn() -> tuple[list[Tensor], Tensor | None]:
        inputs = [torch.randn(batch, seq, 32, device=DEVICE).bfloat16() for _ in range(layers)]
        return inputs, torch.rand(layers, batch, seq, device=DEVICE) if with_ratio else None

    def odd(buffer: Tensor) -> Tensor:
        """The same at an address that is no multiple of 16."""
        flat = torch.empty(buffer.numel() + 1, dtype=buffer.dtype, device=DEVICE)
        view = flat[1:].view(buffer.shape).copy_(buffer)
        assert view.data_ptr() % 16 == 8
        return view

    inputs, ratio = drawn()
    state, vectors = new_state(layers, 2, metrics), new_vectors(layers, 2, 16)
    given = {"token_agg": token_agg, "valid": valid}
    launch = head_stats(inputs, factors, odd(state), rows, ratio=ratio, vectors=odd(vectors), **given)
    assert launch is not None
    expected, expected_vectors = state.clone(), vectors.clone()
    again, again_vectors = odd(state), odd(vectors)
    for scratch in (None, launch.new_scratch()):
        inputs, ratio = drawn()
        addresses = launch.matches(inputs, valid, 0, has_ratio=with_ratio)
        assert addresses is not None
        assert launch.run(addresses, again, valid, ratio=ratio, scratch=scratch, vectors=again_vectors)
        head_stats(inputs, factors, expected, rows, ratio=ratio, vectors=expected_vectors, **given)
    assert same_bits(again, expected)
    assert same_bits(again_vectors, expected_vectors)
    # What it cannot read, and what it was not made for.
    before = again.clone(), again_vectors.clone()
    strided = torch.zeros(layers, 2, 2 * (MEAN + 16), dtype=torch.float64, device=DEVICE)[..., ::2]
    wrong = (None, new_vectors(layers, 2, 17), new_vectors(layers + 1, 2, 16), strided, vectors.float())
    for other in wrong:
        assert not launch.run(addresses, again, valid, ratio=ratio, vectors=other)
    assert same_bits(again, before[0])
    assert same_bits(again_vectors, before[1])
    plain = head_stats(inputs, factors, state, rows, ratio=ratio, **given)
    addresses = plain.matches(inputs, valid, 0, has_ratio=with_ratio)
    assert not plain.run(addresses, again, valid, ratio=ratio, vectors=again_vectors)
    assert plain.run(addresses, again, valid, ratio=ratio)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_the_place_of_the_buffers_compiles_nothing_anew() -> None:
    x, _, factor = case()
    compiled = kernel.head_stats_kernel.device_caches[torch.cuda.current_device()][0]
    flat = torch.zeros(1000, dtype=torch.float64, device=DEVICE)
    counts = []
    for start in (0, 1, 2, 3):
        state, vectors = (
            flat[start : start + 72].view(6, 4, 1, 3),
            flat[200 + start : 260 + start].view(1, 3, 20),
        )
        for buffers in ({}, {"vectors": vectors}):
            for token_agg in AGGS:
                head_stats([x], [factor], state, [0], token_agg=token_agg, **buffers)
        counts.append(len(compiled))
    assert len(set(counts)) == 1


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("token_agg", AGGS)
def test_two_runs_are_bit_identical(token_agg: str, precision: str) -> None:
    x, _, factor = case(batch=2, seq=50, precision=precision)
    x[1, 30, 4] = math.nan
    found = []
    for _ in range(2):
        vectors = new_vectors(1, 3, 16)
        for _ in range(2):
            head_stats([x], [factor], new_state(1, 3), [0], token_agg=token_agg, vectors=vectors)
        found.append(vectors)
    assert same_bits(*found)


@pytest.mark.parametrize("token_agg", AGGS)
def test_no_tokens_change_nothing(token_agg: str) -> None:
    _, _, factor = case()
    vectors = new_vectors(1, 3, 16)
    for shape in ((0, 5, 48), (2, 0, 48)):
        x = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        head_stats([x], [factor], new_state(1, 3), [0], token_agg=token_agg, vectors=vectors)
    assert (vectors == 0).all()


def test_buffers_that_do_not_fit_are_refused() -> None:
    x, _, factor = case()
    for vectors, word in (
        (new_vectors(1, 3, 16).float(), "float64"),
        (new_vectors(1, 3, 16)[0], "head_dim"),
        (new_vectors(3, 2, 16).transpose(0, 1), "contiguous"),
        (new_vectors(1, 3, 15), r"at least \[2, 3, 20\]"),
        (new_vectors(2, 2, 16), r"at least \[2, 3, 20\]"),
        (new_vectors(1, 3, 16), r"at least \[2, 3, 20\]"),
        (new_vectors(2, 3, 16).to("meta"), "one device"),
    ):
        with pytest.raises(ValueError, match=word):
            head_stats([x], [factor], new_state(2, 3), [1], token_agg="all", vectors=vectors)
