"""The kernel against float64 algebra written here: W z itself, no factor, no library code but the kernel.

On a GPU these are tests marked `gpu`; under TRITON_INTERPRET=1 (see test_kernel.py) they run on the CPU.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from on_kernel import DEVICE, INTERPRETED, MARKS, RUNS, poison_fresh_buffers
from torch import Tensor

triton = pytest.importorskip("triton")
pytestmark = MARKS
# Two parts of L in bfloat16 hold 16 bits: 4e-6 in one element, less in a sum (at D = 128 with weights of κ = 1e4, 2.4e-6).
# Below D = 64 there are three. float32 sums of squares and the square root add under 3e-7.
EXACT = 5e-6
FAST = 2e-3
COUNT, NONFINITE, MEAN, M2, MIN, MAX = range(6)
PLANES = 6

if RUNS:
    from fastheads.kernels import KernelFactor, head_stats, prepare, token_norms, unsupported
    from fastheads.kernels import launch as launcher


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers hold NaN."""
    poison_fresh_buffers(monkeypatch, launcher)
    yield


def random_weights(heads: int, head_dim: int, hidden: int, dtype: torch.dtype, kappa: float = 0.0) -> Tensor:
    """W `[hidden, heads, head_dim]` as float64 values that `dtype` holds; κ > 0 has the spectrum decay to 1/κ."""
    weights = torch.randn(heads, hidden, head_dim, dtype=torch.float64)
    if kappa:
        u, _, v = torch.linalg.svd(weights, full_matrices=False)
        weights = (u * torch.logspace(0, -math.log10(kappa), head_dim, dtype=torch.float64)) @ v
    return weights.permute(1, 0, 2).to(dtype).double().to(DEVICE)


def factor_of(weights: Tensor, dtype: torch.dtype, precision: str = "exact") -> "KernelFactor":
    per_head = weights.permute(1, 0, 2)
    return prepare(torch.linalg.cholesky(per_head.mT @ per_head), dtype, precision)


def true_norms(x: Tensor, weights: Tensor) -> Tensor:
    """|z| and |W z| in float64, `[2, batch, seq, heads]`."""
    _, heads, head_dim = weights.shape
    z = x.double().unflatten(-1, (heads, head_dim))
    return torch.stack((z.norm(dim=-1), torch.einsum("bshd,ohd->bsho", z, weights).norm(dim=-1)))


def true_samples(norms: Tensor, real: Tensor, token_agg: str, scale: Tensor | None = None) -> Tensor:
    """Samples `[n, 4, heads]` of norms `[2, batch, seq, heads]` where `real` `[batch, seq]`."""
    if scale is not None:
        norms = torch.stack((norms[0], norms[1] * scale.double()[..., None]))
    rows = []
    for b in range(norms.shape[1]):
        values = norms[:, b, real[b]]  # [2, tokens, heads]
        if values.shape[1] == 0:
            continue
        if token_agg == "token":
            rows += list(values.unbind(1))
        else:
            rows.append(values.mean(1) if token_agg == "all" else values[:, -1])
    if not rows:
        return torch.empty(0, 4, norms.shape[-1], dtype=torch.float64)
    first_two = torch.stack(rows)
    return torch.cat((first_two, first_two / first_two.mean(-1, keepdim=True)), dim=1)


def new_state(rows: int, heads: int) -> Tensor:
    """An empty state; the rows and heads that no launch may touch are poisoned by `check`'s callers."""
    state = torch.zeros(PLANES, 4, rows, heads, dtype=torch.float64, device=DEVICE)
    state[MIN] = math.inf
    state[MAX] = -math.inf
    return state


def check(state: Tensor, row: int, samples: Tensor, tolerance: float) -> None:
    """The moments in `row` are those of `samples` `[n, 4, heads]`."""
    heads = samples.shape[-1]
    got = state[:, :, row, :heads].cpu()
    counts = got[: NONFINITE + 1].clone().view(torch.int64)
    samples = samples.cpu()
    finite = samples.isfinite()
    assert torch.equal(counts[COUNT], finite.sum(0))
    assert torch.equal(counts[NONFINITE], (~finite).sum(0))
    for metric in range(4):
        for head in range(heads):
            values = samples[:, metric, head][finite[:, metric, head]]
            here = got[:, metric, head]
            if len(values) == 0:
                assert here[MIN] == math.inf
                assert here[MAX] == -math.inf
                continue
            size = values.abs().max().item()
            close = {"rtol": 0.0, "atol": tolerance * size}
            torch.testing.assert_close(here[MEAN], values.mean(), **close)
            torch.testing.assert_close(here[MIN], values.min(), **close)
            torch.testing.assert_close(here[MAX], values.max(), **close)
            # Errors e of the samples move the root of m2 by at most |e|.
            spread = (values - values.mean()).square().sum().sqrt()
            bound = 2 * tolerance * size * math.sqrt(len(values))
            torch.testing.assert_close(here[M2].sqrt(), spread, rtol=0.0, atol=bound)


def case(
    token_agg: str,
    *,
    heads: int = 3,
    head_dim: int = 32,
    batch: int = 2,
    seq: int = 37,
    hidden: int = 200,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "exact",
    seed: int = 0,
) -> tuple[Tensor, Tensor, "KernelFactor", float]:
    torch.manual_seed(seed)
    weights = random_weights(heads, head_dim, hidden, dtype)
    x = torch.randn(batch, seq, heads * head_dim).to(DEVICE, dtype)
    return x, weights, factor_of(weights, dtype, precision), EXACT if precision == "exact" else FAST


def all_real(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


AGGS = ("all", "last", "token")
HEAD_DIMS = (16, 24, 40, 48, 64, 72, 80, 96, 112, 128, 192, 256)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_and_dtype(head_dim: int, dtype: torch.dtype) -> None:
    x, weights, factor, tolerance = case(
        "token", head_dim=head_dim, heads=2, batch=1, seq=21, dtype=dtype, hidden=4 * head_dim
    )
    state = new_state(1, 2)
    head_stats([x], [factor], state, [0], token_agg="token")
    check(state, 0, true_samples(true_norms(x, weights), all_real(x), "token"), tolerance)


@pytest.mark.parametrize("token_agg", AGGS)
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 1), (1, 100), (17, 2), (2, 64), (33, 5)])
def test_batches_and_lengths_that_no_tile_divides(token_agg: str, batch: int, seq: int) -> None:
    x, weights, factor, tolerance = case(token_agg, batch=batch, seq=seq)
    state = new_state(1, 3)
    head_stats([x], [factor], state, [0], token_agg=token_agg)
    check(state, 0, true_samples(true_norms(x, weights), all_real(x), token_agg), tolerance)


@pytest.mark.parametrize("token_agg", AGGS)
@pytest.mark.parametrize("heads", [1, 2, 17, 33])
def test_any_number_of_heads(token_agg: str, heads: int) -> None:
    x, weights, factor, tolerance = case(token_agg, heads=heads, head_dim=16, seq=5)
    state = new_state(1, heads)
    head_stats([x], [factor], state, [0], token_agg=token_agg)
    check(state, 0, true_samples(true_norms(x, weights), all_real(x), token_agg), tolerance)


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("token_agg", AGGS)
def test_batches_add_up(token_agg: str, precision: str) -> None:
    _, weights, factor, tolerance = case(token_agg, precision=precision, head_dim=64, hidden=2048)
    state = new_state(3, 5)
    samples = []
    for batch, seq in ((2, 9), (1, 20), (3, 4)):
        x = torch.randn(batch, seq, 3 * 64).to(DEVICE, torch.bfloat16)
        head_stats([x], [factor], state, [1], token_agg=token_agg)
        samples.append(true_samples(true_norms(x, weights), all_real(x), token_agg))
    check(state, 1, torch.cat(samples), tolerance)
    untouched = new_state(3, 5)
    untouched[:, :, 1, :3] = state[:, :, 1, :3]
    assert torch.equal(state, untouched)


@pytest.mark.parametrize("token_agg", AGGS)
def test_padding_is_selected_away_even_where_it_is_nan(token_agg: str) -> None:
    x, weights, factor, tolerance = case(token_agg, batch=5, seq=19)
    valid = all_real(x)
    valid[0, 12:] = False  # right padding
    valid[1, :7] = False  # left padding
    valid[2] = False  # no valid token
    valid[3, 4:8] = False  # a hole
    samples = true_samples(true_norms(x, weights), valid, token_agg)
    assert len(samples) == (int(valid.sum()) if token_agg == "token" else 4)
    x[~valid] = math.nan
    state = new_state(1, 3)
    head_stats([x], [factor], state, [0], token_agg=token_agg, valid=valid)
    check(state, 0, samples, tolerance)


@pytest.mark.parametrize("token_agg", AGGS)
@pytest.mark.parametrize("skip_first", [1, 18, 19, 40])
def test_skip_first(token_agg: str, skip_first: int) -> None:
    x, weights, factor, tolerance = case(token_agg, seq=19)
    real = all_real(x)
    real[:, :skip_first] = False
    state = new_state(1, 3)
    head_stats([x], [factor], state, [0], token_agg=token_agg, skip_first=skip_first)
    check(state, 0, true_samples(true_norms(x, weights), real, token_agg), tolerance)


@pytest.mark.parametrize("token_agg", AGGS)
def test_a_scale_per_token_multiplies_the_contributions(token_agg: str) -> None:
    x, weights, factor, tolerance = case(token_agg, seq=19)
    scale = torch.rand(x.shape[:2], device=DEVICE) + 0.5
    state = new_state(1, 3)
    head_stats([x], [factor], state, [0], token_agg=token_agg, scale=scale)
    check(state, 0, true_samples(true_norms(x, weights), all_real(x), token_agg, scale), tolerance)


@pytest.mark.parametrize("token_agg", AGGS)
def test_nonfinite_samples_are_counted_and_left_out(token_agg: str) -> None:
    x, weights, factor, tolerance = case(token_agg, batch=4, seq=6)
    z = x.unflatten(-1, (3, 32))
    z[0, -1, 1, 5] = math.nan  # makes the layer's mean, and with it every relative sample, NaN
    z[1, -1, 0, 0] = math.inf
    z[2, -1] = 0.0  # 0/0 in the relative metrics of "last" and "token"
    norms = true_norms(x, weights)
    # inf - inf inside W z is NaN where the kernel may see inf: neither is finite.
    state = new_state(1, 3)
    head_stats([x], [factor], state, [0], token_agg=token_agg)
    samples = true_samples(norms, all_real(x), token_agg)
    # A finite value over an infinite mean is 0 and finite, for both.
    infinite_mean = samples[:, :2].isinf().any(-1, keepdim=True) | samples[:, :2].isnan().any(
        -1, keepdim=True
    )
    got = state[NONFINITE, :, 0].cpu().contiguous().view(torch.int64)
    assert torch.equal(got[:2], (~samples[:, :2].isfinite()).sum(0).cpu())
    assert (got[2] >= (samples[:, 2].isnan()).sum(0).cpu()).all()
    keep = ~infinite_mean.any(1)[:, 0]
    clean = new_state(1, 3)
    kept_rows = x if token_agg == "token" else x[keep.to(DEVICE)]
    if token_agg != "token":
        head_stats([kept_rows], [factor], clean, [0], token_agg=token_agg)
        check(clean, 0, samples[keep], tolerance)


@pytest.mark.parametrize("token_agg", AGGS)
def test_a_group_of_layers_in_one_launch(token_agg: str) -> None:
    layers, rows = 9, [7, 0, 3, 1, 9, 8, 2, 6, 5]
    state = new_state(10, 4)
    inputs, factors, samples = [], [], []
    for seed in range(layers):
        x, weights, factor, tolerance = case(token_agg, seed=seed, seq=11)
        inputs.append(x)
        factors.append(factor)
        samples.append(true_samples(true_norms(x, weights), all_real(x), token_agg))
    head_stats(inputs, factors, state, rows, token_agg=token_agg)
    for row, expected in zip(rows, samples, strict=True):
        check(state, row, expected, tolerance)
    assert (state[COUNT, :, 4] == 0).all()
    assert (state[COUNT, :, :, 3] == 0).all()


@pytest.mark.parametrize("token_agg", AGGS)
def test_each_layer_of_a_group_has_its_scales(token_agg: str) -> None:
    """Also where the group is two launches: a factor that comes twice."""
    cases = [case(token_agg, seed=seed, seq=11) for seed in range(2)]
    order = [0, 1, 0]
    inputs = [torch.randn_like(cases[i][0]) for i in order]
    scale = torch.rand(3, *inputs[0].shape[:2], device=DEVICE) + 0.5
    state = new_state(3, 3)
    head_stats(inputs, [cases[i][2] for i in order], state, [0, 1, 2], token_agg=token_agg, scale=scale)
    for row, i in enumerate(order):
        norms = true_norms(inputs[row], cases[i][1])
        samples = true_samples(norms, all_real(inputs[row]), token_agg, scale[row])
        check(state, row, samples, cases[i][3])


def test_one_factor_for_several_layers() -> None:
    x, weights, factor, tolerance = case("all")
    other = torch.randn_like(x)
    state = new_state(2, 3)
    head_stats([x, other], [factor, factor], state, [0, 1], token_agg="all")
    for row, layer in enumerate((x, other)):
        check(state, row, true_samples(true_norms(layer, weights), all_real(x), "all"), tolerance)


@pytest.mark.parametrize("token_agg", AGGS)
def test_slices_and_copies(token_agg: str) -> None:
    """Wider rows, transposed batches, unaligned starts, strided elements: the same moments."""
    x, weights, factor, tolerance = case(token_agg)
    batch, seq, width = x.shape
    samples = true_samples(true_norms(x, weights), all_real(x), token_agg)
    wide = torch.full((batch, seq, 3 * width), math.nan, dtype=x.dtype, device=DEVICE)
    wide[..., width : 2 * width] = x
    time_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    unaligned = torch.full((batch, seq, width + 3), math.nan, dtype=x.dtype, device=DEVICE)
    unaligned[..., 3:] = x
    every_other = torch.full((batch, seq, 2 * width), math.nan, dtype=x.dtype, device=DEVICE)
    every_other[..., ::2] = x
    views = [
        wide[..., width : 2 * width],
        time_first,
        unaligned[..., 3:],
        every_other[..., ::2],
        x[:, ::1],
        x,
    ]
    factors = [factor, *(factor_of(weights, x.dtype) for _ in views[1:])]
    state = new_state(len(views), 3)
    head_stats(views, factors, state, list(range(len(views))), token_agg=token_agg)
    for row in range(len(views)):
        check(state, row, samples, tolerance)


@pytest.mark.parametrize("token_agg", AGGS)
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_two_runs_are_bit_identical(token_agg: str, precision: str) -> None:
    x, _, factor, _ = case(token_agg, precision=precision, batch=3, seq=50)
    states = [new_state(1, 3) for _ in range(2)]
    for state in states:
        head_stats([x], [factor], state, [0], token_agg=token_agg)
        head_stats([x], [factor], state, [0], token_agg=token_agg)
    assert torch.equal(*(state.view(torch.int64) for state in states))


def norms_of(x: Tensor, factor: "KernelFactor") -> Tensor:
    """|z| and |W z| of every token as the kernel has them, float64 `[2, batch, seq, heads]`."""
    batch, seq, _ = x.shape
    norms = token_norms([x], [factor])[0]  # [2, heads, batch * seq]
    return norms.unflatten(-1, (batch, seq)).permute(0, 2, 3, 1).double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kappa", [0.0, 1e4])
def test_exact_to_5e6_a_token(dtype: torch.dtype, kappa: float) -> None:
    torch.manual_seed(0)
    weights = random_weights(2, 128, 1024, dtype, kappa)
    x = torch.randn(1, 100, 256).to(DEVICE, dtype)
    got, want = norms_of(x, factor_of(weights, dtype)), true_norms(x, weights)
    assert ((got - want).abs() / want).max() <= EXACT


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 40, 48])
def test_exact_in_small_heads_whose_tokens_may_miss_what_is_large(head_dim: int, dtype: torch.dtype) -> None:
    """Of few dimensions a random token may hold little of the large ones: rounding errors of 16 bits of L come to 2e-5."""
    torch.manual_seed(0)
    weights = random_weights(2, head_dim, 1024, dtype, 1e4)
    x = torch.randn(1, 400, 2 * head_dim).to(DEVICE, dtype)
    got, want = norms_of(x, factor_of(weights, dtype)), true_norms(x, weights)
    assert ((got - want).abs() / want).max() <= 1e-6


@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_both_squares_in_one_reduction(head_dim: int, precision: str) -> None:
    x, weights, factor, tolerance = case("all", head_dim=head_dim, precision=precision, seq=50)
    together = replace(factor.config, together=True)
    per_head = weights.permute(1, 0, 2)
    factor = prepare(torch.linalg.cholesky(per_head.mT @ per_head), x.dtype, precision, config=together)
    state = new_state(1, 3)
    head_stats([x], [factor], state, [0], token_agg="all")
    check(state, 0, true_samples(true_norms(x, weights), all_real(x), "all"), tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_exact_to_1e3_in_the_weakest_directions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = random_weights(1, 128, 1024, dtype, 1e4)
    weakest = torch.linalg.svd(weights[:, 0])[2][-16:]
    x = (torch.randn(1, 100, 16, dtype=torch.float64, device=DEVICE) @ weakest).to(dtype)
    got, want = norms_of(x, factor_of(weights, dtype)), true_norms(x, weights)
    assert ((got - want).abs() / want).max() <= 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kappa", [0.0, 3.0, 1e4])
def test_fast_to_2e3_a_token_and_unbiased(dtype: torch.dtype, kappa: float) -> None:
    torch.manual_seed(0)
    weights = random_weights(2, 128, 1024, dtype, kappa)
    x = torch.randn(1, 200, 256).to(DEVICE, dtype)
    factor = factor_of(weights, dtype, "fast")
    got, want = norms_of(x, factor), true_norms(x, weights)
    assert ((got - want).abs() / want).max() <= FAST
    assert (got.mean((1, 2)) / want.mean((1, 2)) - 1).abs().max() <= 2e-4
    # And for tokens that bring out the worst: those along the weakest directions of W.
    weakest = torch.linalg.svd(weights[:, 0])[2][-16:]
    x = (torch.randn(1, 100, 16, dtype=torch.float64, device=DEVICE) @ weakest).repeat(1, 1, 2).to(dtype)
    got, want = norms_of(x, factor)[..., :1], true_norms(x, weights)[..., :1]
    assert ((got - want).abs() / want).max() <= FAST


def test_fast_mixes_heads_of_both_kinds() -> None:
    torch.manual_seed(0)
    good, bad = random_weights(1, 64, 1024, torch.bfloat16), random_weights(1, 64, 1024, torch.bfloat16, 1e4)
    weights = torch.cat((good, bad, good), dim=1)
    factor = factor_of(weights, torch.bfloat16, "fast")
    assert factor.two_passes().tolist() == [False, True, False]
    x = torch.randn(2, 50, 192).to(DEVICE, torch.bfloat16)
    state = new_state(1, 3)
    head_stats([x], [factor], state, [0], token_agg="all")
    check(state, 0, true_samples(true_norms(x, weights), all_real(x), "all"), FAST)


def test_dead_and_poisoned_heads() -> None:
    """A head without weights contributes 0; one with NaN gives NaN, and only to itself and the layer's mean."""
    torch.manual_seed(0)
    weights = random_weights(3, 32, 200, torch.bfloat16)
    per_head = weights.permute(1, 0, 2)
    L = torch.linalg.cholesky(per_head.mT @ per_head)
    L[1] = 0.0
    x = torch.randn(2, 9, 96).to(DEVICE, torch.bfloat16)
    weights[:, 1] = 0.0
    for precision in ("exact", "fast"):
        state = new_state(1, 3)
        head_stats([x], [prepare(L, torch.bfloat16, precision)], state, [0], token_agg="all")
        check(
            state,
            0,
            true_samples(true_norms(x, weights), all_real(x), "all"),
            FAST if precision == "fast" else EXACT,
        )
        state = new_state(1, 3)
        poisoned = L.clone()
        poisoned[2, 5, 5] = math.nan
        head_stats([x], [prepare(poisoned, torch.bfloat16, precision)], state, [0], token_agg="all")
        nonfinite = state[NONFINITE, :, 0].cpu().contiguous().view(torch.int64)
        assert nonfinite.tolist() == [[0, 0, 0], [0, 0, 2], [0, 0, 0], [2, 2, 2]]


def test_weights_of_any_size() -> None:
    for size in (1e-15, 1e15):
        x, weights, _, tolerance = case("all")
        state = new_state(1, 3)
        head_stats([x], [factor_of(weights * size, x.dtype)], state, [0], token_agg="all")
        check(state, 0, true_samples(true_norms(x, weights * size), all_real(x), "all"), tolerance)


def test_refresh_writes_in_place() -> None:
    x, _, factor, tolerance = case("all")
    address = factor.buffer.data_ptr()
    weights = random_weights(3, 32, 200, torch.bfloat16)
    per_head = weights.permute(1, 0, 2)
    factor.refresh(torch.linalg.cholesky(per_head.mT @ per_head))
    assert factor.buffer.data_ptr() == address
    state = new_state(1, 3)
    head_stats([x], [factor], state, [0], token_agg="all")
    check(state, 0, true_samples(true_norms(x, weights), all_real(x), "all"), tolerance)


def test_works_under_inference_mode() -> None:
    x, weights, factor, tolerance = case("all")
    state = new_state(1, 3)
    with torch.inference_mode():
        inside = x.clone()
        head_stats([inside], [factor], state, [0], token_agg="all")
    check(state, 0, true_samples(true_norms(x, weights), all_real(x), "all"), tolerance)


@pytest.mark.slow
def test_a_thousand_batches() -> None:
    """Errors do not add up: the moments after many batches are as good as after one."""
    _, weights, factor, tolerance = case("all", heads=2, head_dim=16)
    state = new_state(1, 2)
    samples = []
    for _ in range(100 if INTERPRETED else 1000):
        x = torch.randn(2, 5, 32).to(DEVICE, torch.bfloat16)
        head_stats([x], [factor], state, [0], token_agg="all")
        samples.append(true_samples(true_norms(x, weights), all_real(x), "all"))
    check(state, 0, torch.cat(samples), tolerance)


@pytest.mark.skipif(INTERPRETED, reason="5 GB")
def test_more_than_2_to_the_31_elements() -> None:
    torch.manual_seed(0)
    weights = random_weights(32, 128, 512, torch.bfloat16)
    factor = factor_of(weights, torch.bfloat16)
    x = torch.zeros(9, 65536, 4096, dtype=torch.bfloat16, device=DEVICE)
    assert x.numel() > 2**31
    x[-1, -50:] = torch.randn(50, 4096, device=DEVICE).bfloat16()
    valid = torch.zeros(x.shape[:2], dtype=torch.bool, device=DEVICE)
    valid[-1, -50:] = True
    expected = true_norms(x[-1:, -50:], weights)
    for token_agg in AGGS:
        state = new_state(1, 32)
        head_stats([x], [factor], state, [0], token_agg=token_agg, valid=valid)
        check(state, 0, true_samples(expected, valid[-1:, -50:], token_agg), EXACT)


def test_the_workspace_of_token_mode_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of rows, and of parts of rows, give the moments of one window."""
    for tokens in (7, 40):
        x, weights, factor, tolerance = case("token", batch=3, seq=19)
        monkeypatch.setattr(launcher, "WORKSPACE_BYTES", tokens * 8 * 3)
        valid = all_real(x)
        valid[1, 3:] = False
        for mask, skip in ((None, 9), (valid, 0)):
            real = all_real(x) if mask is None else mask.clone()
            real[:, :skip] = False
            state = new_state(1, 3)
            head_stats([x], [factor], state, [0], token_agg="token", valid=mask, skip_first=skip)
            check(state, 0, true_samples(true_norms(x, weights), real, "token"), tolerance)


@pytest.mark.parametrize("scaled", [False, True])
def test_norms_of_every_token(scaled: bool) -> None:
    """More layers than one launch takes, rows of two strides, a factor that serves twice."""
    weights = [random_weights(2, 16, 64, torch.float32) for _ in range(3)]
    factors = [factor_of(w, torch.float32) for w in weights]
    inputs = [torch.randn(2, 5, 32, device=DEVICE) for _ in range(34)]
    inputs += [torch.randn(2, 5, 64, device=DEVICE)[..., :32] for _ in range(2)]
    scale = torch.rand(36, 2, 5, device=DEVICE) if scaled else None
    norms = token_norms(inputs, [factors[i % 3] for i in range(36)], scale=scale)
    for i, x in enumerate(inputs):
        truth = true_norms(x, weights[i % 3])
        if scale is not None:
            truth[1] *= scale[i].double()[..., None]
        torch.testing.assert_close(
            norms[i].double(), truth.flatten(1, 2).transpose(1, 2), rtol=EXACT, atol=1e-12
        )
    assert token_norms([x[:0] for x in inputs[:2]], factors[:2]).shape == (2, 2, 2, 0)
    with pytest.raises(ValueError, match="expected inputs"):
        token_norms([inputs[0], inputs[1][:, :4]], factors[:2])


def test_empty_inputs_give_no_sample() -> None:
    _, _, factor, _ = case("all")
    state = new_state(1, 3)
    for shape in ((0, 5, 96), (2, 0, 96)):
        head_stats(
            [torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)], [factor], state, [0], token_agg="all"
        )
    assert torch.equal(state, new_state(1, 3))


def test_what_does_not_fit_is_refused() -> None:
    x, _, factor, _ = case("all")
    state = new_state(2, 3)
    for arguments, word in (
        (([x], [factor], state, [0], {"token_agg": "mean"}), "token_agg"),
        (([x, x], [factor, factor], state, [0, 0], {"token_agg": "all"}), "distinct"),
        (([x], [factor], state, [2], {"token_agg": "all"}), "rows"),
        (([x[..., :32]], [factor], state, [0], {"token_agg": "all"}), "expected inputs"),
        (([x.half()], [factor], state, [0], {"token_agg": "all"}), "dtype"),
        (([x], [factor], state[..., :2], [0], {"token_agg": "all"}), "state"),
        (([x], [factor], new_state(1, 2), [0], {"token_agg": "all"}), "heads"),
    ):
        *positional, keywords = arguments
        with pytest.raises(ValueError, match=word):
            head_stats(*positional, **keywords)
    assert unsupported(DEVICE, torch.bfloat16, 128) is None
    assert "float64" in str(unsupported(DEVICE, torch.float64, 128))
    assert "512" in str(unsupported(DEVICE, torch.bfloat16, 512))
    assert "20" in str(unsupported(DEVICE, torch.bfloat16, 20))
    with pytest.raises(ValueError, match="precision"):
        prepare(torch.eye(32, dtype=torch.float64, device=DEVICE)[None], torch.bfloat16, "approximate")
