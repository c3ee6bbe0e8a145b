"""The ratio of the kernel, |W z| * c / |r|, and its square against float64 algebra written here; and 1 / |r| of residual streams.

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
EXACT, FAST = 5e-6, 2e-3  # of a token's norm
COUNT, NONFINITE, MEAN, M2, MIN, MAX = range(6)
PLANES = 6
WITHOUT, WITH = 4, 6  # metrics
AGGS = ("all", "last", "token")

if RUNS:
    from fastheads.kernels import KernelFactor, head_stats, inverse_norms, prepare, residual_norms
    from fastheads.kernels import launch as launcher


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh buffers hold NaN."""
    poison_fresh_buffers(monkeypatch, launcher)
    yield


def new_state(metrics: int, rows: int, heads: int) -> Tensor:
    state = torch.zeros(PLANES, metrics, rows, heads, dtype=torch.float64, device=DEVICE)
    state[MIN] = math.inf
    state[MAX] = -math.inf
    return state


def case(
    *,
    heads: int = 3,
    head_dim: int = 16,
    batch: int = 5,
    seq: int = 19,
    dtype: torch.dtype = torch.bfloat16,
    precision: str = "exact",
    seed: int = 0,
) -> tuple[Tensor, Tensor, "KernelFactor"]:
    """x, W `[hidden, heads, head_dim]` in float64, and the factor."""
    torch.manual_seed(seed)
    hidden = 4 * head_dim
    weights = torch.randn(hidden, heads, head_dim, dtype=torch.float64).to(dtype).double().to(DEVICE)
    per_head = weights.permute(1, 0, 2)
    factor = prepare(torch.linalg.cholesky(per_head.mT @ per_head), dtype, precision)
    return torch.randn(batch, seq, heads * head_dim).to(DEVICE, dtype), weights, factor


def random_ratio(*shape: int) -> Tensor:
    """Numbers as c / |r|, float32, over three orders of magnitude."""
    return (torch.randn(*shape, device=DEVICE) * 2).exp() / 50


def true_samples(
    x: Tensor, weights: Tensor, real: Tensor, token_agg: str, scale: Tensor | None, ratio: Tensor
) -> Tensor:
    """Samples `[n, 6, heads]` in float64 where `real` `[batch, seq]`, from W itself."""
    _, heads, head_dim = weights.shape
    z = x.double().unflatten(-1, (heads, head_dim))
    output, contribution = z.norm(dim=-1), torch.einsum("bshd,ohd->bsho", z, weights).norm(dim=-1)
    if scale is not None:
        contribution = contribution * scale.double()[..., None]
    values = contribution * ratio.double()[..., None]
    tokens = torch.stack((output, contribution, values, values.square()), dim=2)  # [batch, seq, 4, heads]
    rows = []
    for b in range(x.shape[0]):
        valid = tokens[b, real[b]]
        if len(valid) == 0:
            continue
        rows += {"all": [valid.mean(0)], "last": [valid[-1]], "token": list(valid)}[token_agg]
    if not rows:
        return torch.empty(0, WITH, heads, dtype=torch.float64)
    samples = torch.stack(rows).cpu()
    norms = samples[:, :2]
    return torch.cat((norms, norms / norms.mean(-1, keepdim=True), samples[:, 2:]), dim=1)


def check(state: Tensor, row: int, samples: Tensor, tolerance: float = EXACT) -> None:
    """The moments in `row` are those of `samples` `[n, 6, heads]`."""
    heads = samples.shape[-1]
    got = state[:, :, row, :heads].cpu()
    counts = got[: NONFINITE + 1].clone().view(torch.int64)
    finite = samples.isfinite()
    assert torch.equal(counts[COUNT], finite.sum(0))
    assert torch.equal(counts[NONFINITE], (~finite).sum(0))
    for metric in range(WITH):
        error = (2 if metric == WITH - 1 else 1) * tolerance  # of a square, twice that of its root
        for head in range(heads):
            values = samples[:, metric, head][finite[:, metric, head]]
            here = got[:, metric, head]
            if len(values) == 0:
                assert here[MIN] == math.inf
                assert here[MAX] == -math.inf
                continue
            size = values.abs().max().item()
            close = {"rtol": 0.0, "atol": error * size}
            torch.testing.assert_close(here[MEAN], values.mean(), **close)
            torch.testing.assert_close(here[MIN], values.min(), **close)
            torch.testing.assert_close(here[MAX], values.max(), **close)
            spread = (values - values.mean()).square().sum().sqrt()
            bound = 2 * error * size * math.sqrt(len(values))
            torch.testing.assert_close(here[M2].sqrt(), spread, rtol=0.0, atol=bound)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.int64), b.contiguous().view(torch.int64))


def check_against_without(state: Tensor, inputs, factors, rows, **given) -> None:
    """The other metrics are bit for bit what they are without a ratio."""
    given.pop("ratio")
    without = new_state(WITHOUT, *state.shape[2:])
    head_stats(inputs, factors, without, rows, **given)
    if INTERPRETED:
        assert same_bits(state[:, :WITHOUT], without)
    else:
        torch.testing.assert_close(state[MEAN, :WITHOUT], without[MEAN], rtol=1e-6, atol=0.0, equal_nan=True)


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


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("token_agg", AGGS)
def test_only_valid_tokens_count(token_agg: str, mask: str, scaled: bool) -> None:
    """Whatever the numbers of the others are: infinite, NaN; those of |W z| there too."""
    x, weights, factor = case()
    valid, skip, real = mask_of(mask, x)
    ratio = random_ratio(*x.shape[:2])
    scale = torch.rand(x.shape[:2], device=DEVICE) + 0.5 if scaled else None
    samples = true_samples(x, weights, real, token_agg, scale, ratio)
    others = ~real
    ratio[others] = torch.tensor([math.inf, math.nan, -math.inf], device=DEVICE).repeat(40)[
        : int(others.sum())
    ]
    x[others & (torch.rand(others.shape, device=DEVICE) < 0.3)] = math.nan
    given = {"token_agg": token_agg, "valid": valid, "skip_first": skip, "scale": scale, "ratio": ratio}
    state = new_state(WITH, 1, 3)
    for _ in range(2):  # and merges with what is there
        head_stats([x], [factor], state, [0], **given)
    check(state, 0, samples.repeat(2, 1, 1))
    once = new_state(WITH, 1, 3)
    head_stats([x], [factor], once, [0], **given)
    check_against_without(once, [x], [factor], [0], **given)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("token_agg", AGGS)
def test_every_dtype_and_head_dim(token_agg: str, head_dim: int, dtype: torch.dtype) -> None:
    x, weights, factor = case(head_dim=head_dim, dtype=dtype, batch=3, heads=2)
    valid, _, real = mask_of("left", x)
    scale, ratio = torch.rand(x.shape[:2], device=DEVICE) + 0.5, random_ratio(*x.shape[:2])
    samples = true_samples(x, weights, real, token_agg, scale, ratio)
    ratio[~real] = math.nan
    given = {"token_agg": token_agg, "valid": valid, "scale": scale, "ratio": ratio}
    state = new_state(WITH, 1, 2)
    head_stats([x], [factor], state, [0], **given)
    check(state, 0, samples)
    check_against_without(state, [x], [factor], [0], **given)


@pytest.mark.parametrize("token_agg", AGGS)
@pytest.mark.parametrize(
    ("batch", "seq", "heads"), [(1, 1, 1), (17, 2, 3), (2, 64, 17), (33, 5, 2), (1, 400, 2)]
)
def test_batches_and_lengths_that_no_tile_divides(token_agg: str, batch: int, seq: int, heads: int) -> None:
    """Several rows of the batch in a slot of the merge, several programs a row, tiles that end beyond it."""
    x, weights, factor = case(batch=batch, seq=seq, heads=heads)
    ratio = random_ratio(batch, seq)
    everything = torch.ones(batch, seq, dtype=torch.bool, device=DEVICE)
    given = {"token_agg": token_agg, "ratio": ratio}
    state = new_state(WITH, 1, heads)
    head_stats([x], [factor], state, [0], **given)
    check(state, 0, true_samples(x, weights, everything, token_agg, None, ratio))
    check_against_without(state, [x], [factor], [0], **given)


@pytest.mark.parametrize("token_agg", AGGS)
def test_one_pass(token_agg: str) -> None:
    x, weights, factor = case(head_dim=64, precision="fast")
    ratio = random_ratio(*x.shape[:2])
    everything = torch.ones(x.shape[:2], dtype=torch.bool, device=DEVICE)
    state = new_state(WITH, 1, 3)
    head_stats([x], [factor], state, [0], token_agg=token_agg, ratio=ratio)
    check(state, 0, true_samples(x, weights, everything, token_agg, None, ratio), FAST)


@pytest.mark.parametrize("token_agg", AGGS)
def test_nonfinite_ratios_of_valid_tokens_are_counted_and_disturb_no_other_metric(token_agg: str) -> None:
    x, weights, factor = case(batch=6, seq=4)
    ratio = random_ratio(6, 4)
    ratio[0, -1], ratio[1, -1], ratio[2, -1] = math.inf, math.nan, math.inf
    x.unflatten(-1, (3, 16))[2, -1, 1] = 0.0  # 0 * inf
    ratio[3, -1] = 0.0
    everything = torch.ones(6, 4, dtype=torch.bool, device=DEVICE)
    samples = true_samples(x, weights, everything, token_agg, None, ratio)
    assert (~samples[:, 4:].isfinite()).sum(0).eq(3).all()
    given = {"token_agg": token_agg, "ratio": ratio}
    state = new_state(WITH, 1, 3)
    head_stats([x], [factor], state, [0], **given)
    check(state, 0, samples)
    check_against_without(state, [x], [factor], [0], **given)


@pytest.mark.parametrize("shared", [False, True], ids=["of each layer", "one for all"])
@pytest.mark.parametrize("token_agg", AGGS)
def test_each_layer_of_a_group_has_its_ratios(token_agg: str, shared: bool) -> None:
    """Also where the group is several launches: rows of two strides, a factor that comes twice; and in a larger state."""
    cases = [case(seed=seed, seq=11, batch=2) for seed in range(4)]
    order, rows = [0, 1, 0, 2, 3], [4, 0, 3, 6, 1]
    inputs = [torch.randn_like(cases[i][0]) for i in order]
    wide = torch.full((2, 11, 96), math.nan, dtype=inputs[0].dtype, device=DEVICE)
    wide[..., :48] = inputs[3]
    inputs[3] = wide[..., :48]
    ratio = random_ratio(2, 11) if shared else random_ratio(5, 2, 11)
    scale = torch.rand(5, 2, 11, device=DEVICE) + 0.5
    everything = torch.ones(2, 11, dtype=torch.bool, device=DEVICE)
    given = {"token_agg": token_agg, "scale": scale, "ratio": ratio}
    state = new_state(WITH, 7, 5)
    factors = [cases[i][2] for i in order]
    head_stats(inputs, factors, state, rows, **given)
    for place, (i, row) in enumerate(zip(order, rows, strict=True)):
        own = ratio if shared else ratio[place]
        check(state, row, true_samples(inputs[place], cases[i][1], everything, token_agg, scale[place], own))
    assert (state[COUNT, :, :, 3:] == 0).all()
    assert (state[COUNT, :, [2, 5]] == 0).all()
    check_against_without(state, inputs, factors, rows, **given)


def test_the_workspace_of_token_mode_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of rows, and of parts of rows, of two layers."""
    for tokens in (7, 40):
        cases = [case(batch=3, seed=seed) for seed in range(2)]
        monkeypatch.setattr(launcher, "WORKSPACE_BYTES", tokens * 8 * 3 * 2)
        for mask, skip in (("right", 0), ("none", 9)):
            valid, _, real = mask_of(mask, cases[0][0])
            real[:, :skip] = False
            ratio = random_ratio(2, 3, 19)
            state = new_state(WITH, 2, 3)
            given = {"token_agg": "token", "valid": valid, "skip_first": skip, "ratio": ratio}
            head_stats([c[0] for c in cases], [c[2] for c in cases], state, [0, 1], **given)
            for row, (x, weights, _) in enumerate(cases):
                check(state, row, true_samples(x, weights, real, "token", None, ratio[row]))


@pytest.mark.parametrize("form", ["float64", "strided", "expanded", "unaligned"])
def test_any_form_of_the_numbers(form: str) -> None:
    x, weights, factor = case(batch=4, seq=19)
    ratio = random_ratio(4, 19)
    if form == "float64":
        ratio = ratio.double()
    elif form == "strided":
        ratio = random_ratio(19, 4).T
    elif form == "expanded":
        ratio = ratio[:1].expand(4, 19)
    else:
        ratio = random_ratio(4 * 19 + 1)[1:].view(4, 19)
    everything = torch.ones(4, 19, dtype=torch.bool, device=DEVICE)
    state = new_state(WITH, 1, 3)
    launch = head_stats([x], [factor], state, [0], token_agg="all", ratio=ratio)
    check(state, 0, true_samples(x, weights, everything, "all", None, ratio))
    if form == "unaligned":
        assert launch is None
        launch = head_stats([x], [factor], new_state(WITH, 1, 3), [0], token_agg="all", ratio=ratio.clone())
        addresses = launch.matches([x], None, 0, has_ratio=True)
        before = state.clone()
        assert not launch.run(addresses, state, None, ratio=ratio)
        assert same_bits(state, before)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("token_agg", ["all", "last"])
def test_launches_made_again(token_agg: str, scaled: bool, masked: bool) -> None:
    """More layers than one launch takes; other inputs and numbers, and the state that `head_stats` leaves."""
    layers, batch, seq = 34, 1, 8
    _, _, factor = case(heads=2)
    factors = [factor, *(case(heads=2, seed=seed)[2] for seed in range(1, layers))]
    valid = torch.rand(batch, seq, device=DEVICE) < 0.7 if masked else None

    def drawn() -> tuple[list[Tensor], Tensor | None, Tensor]:
        inputs = [torch.randn(batch, seq, 32, device=DEVICE).bfloat16() for _ in range(layers)]
        scale = torch.rand(layers, batch, seq, device=DEVICE) if scaled else None
        return inputs, scale, random_ratio(layers, batch, seq)

    inputs, scale, ratio = drawn()
    rows = list(range(layers))
    given = {"token_agg": token_agg, "valid": valid}
    launch = head_stats(inputs, factors, new_state(WITH, layers, 2), rows, **given, scale=scale, ratio=ratio)
    assert launch is not None
    assert launch.matches(inputs, valid, 0, is_scaled=scaled) is None
    assert launch.matches(inputs, valid, 0, is_scaled=not scaled, has_ratio=True) is None
    again, expected = new_state(WITH, layers, 2), new_state(WITH, layers, 2)
    for scratch in (None, launch.new_scratch()):
        inputs, scale, ratio = drawn()
        addresses = launch.matches(inputs, valid, 0, is_scaled=scaled, has_ratio=True)
        assert addresses is not None
        assert launch.run(addresses, again, valid, scale=scale, ratio=ratio.double(), scratch=scratch)
        head_stats(inputs, factors, expected, rows, **given, scale=scale, ratio=ratio)
    assert same_bits(again, expected)
    # Of another form: a state without the ratio's planes.
    assert not launch.run(addresses, new_state(WITHOUT, layers, 2), valid, scale=scale, ratio=ratio)
    plain = head_stats(inputs, factors, new_state(WITHOUT, layers, 2), rows, **given, scale=scale)
    assert plain.matches(inputs, valid, 0, is_scaled=scaled, has_ratio=True) is None
    assert plain.matches(inputs, valid, 0, is_scaled=scaled) is not None


def test_two_runs_are_bit_identical() -> None:
    x, _, factor = case(batch=3, seq=50)
    ratio = random_ratio(3, 50)
    for token_agg in AGGS:
        states = [new_state(WITH, 1, 3) for _ in range(2)]
        for state in states:
            head_stats([x], [factor], state, [0], token_agg=token_agg, ratio=ratio)
        assert same_bits(*states)


def test_a_state_of_another_form_is_refused() -> None:
    x, _, factor = case()
    ratio = random_ratio(*x.shape[:2])
    with pytest.raises(ValueError, match=r"\[6, 6, rows, heads\]"):
        head_stats([x], [factor], new_state(WITHOUT, 1, 3), [0], token_agg="all", ratio=ratio)
    with pytest.raises(ValueError, match=r"\[6, 4, rows, heads\]"):
        head_stats([x], [factor], new_state(3, 1, 3), [0], token_agg="all")
    with pytest.raises(ValueError, match="ratio"):
        head_stats([x], [factor], new_state(WITH, 1, 3), [0], token_agg="all", ratio=ratio[:, 1:])


@pytest.mark.parametrize("token_agg", ["all", "last", "token"])
def test_a_state_with_room_for_the_ratio_takes_samples_without_one(token_agg: str) -> None:
    x, _, factor = case()
    narrow, wide = new_state(WITHOUT, 1, 3), new_state(WITH, 1, 3)
    untouched = wide[:, WITHOUT:].clone()
    for state in (narrow, wide):
        head_stats([x], [factor], state, [0], token_agg=token_agg)
    assert torch.equal(wide[:, :WITHOUT].view(torch.int64), narrow.view(torch.int64))
    assert torch.equal(wide[:, WITHOUT:].view(torch.int64), untouched.view(torch.int64))


def true_inverse(residuals: list[Tensor]) -> Tensor:
    return 1 / torch.stack([r.double().cpu().norm(dim=-1) for r in residuals])


def check_inverse(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-6, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("hidden", [1, 7, 64, 576, 2048, 5120])
@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (3, 5)])
def test_inverse_norms(batch: int, seq: int, hidden: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    residuals = [torch.randn(batch, seq, hidden).to(DEVICE, dtype) * (layer + 1) for layer in range(3)]
    check_inverse(inverse_norms(residuals), true_inverse(residuals))
    torch.testing.assert_close(
        inverse_norms(residuals)[1].cpu(),
        1 / torch.linalg.vector_norm(residuals[1].cpu().float(), dim=-1),
        rtol=1e-6,
        atol=0.0,
    )


def test_inverse_norms_of_nothing_too_large_too_small_and_not_finite() -> None:
    torch.manual_seed(0)
    r = torch.randn(1, 9, 300, device=DEVICE)
    r[0, 0] = 0.0
    r[0, 1] *= 1e30
    r[0, 2] *= 1e-30
    r[0, 3, 5] = 2e38  # alone it outweighs the row
    r[0, 4] = 3e38  # the norm itself lies beyond float32
    r[0, 5, 7] = math.nan
    r[0, 6, 7] = math.inf
    r[0, 7] = 0.0
    r[0, 7, 299] = 3e-20
    got = inverse_norms([r])[0, 0].cpu().double()
    want = true_inverse([r])[0, 0]
    assert got[0] == math.inf
    torch.testing.assert_close(got[4], want[4], rtol=1e-3, atol=2e-45)  # subnormal: fewer bits
    keep = [1, 2, 3, 5, 6, 7, 8]
    torch.testing.assert_close(got[keep], want[keep], rtol=1e-6, atol=2e-45, equal_nan=True)
    zeros = torch.zeros(1, 2, 64, dtype=torch.bfloat16, device=DEVICE)
    assert (inverse_norms([zeros]) == math.inf).all()


def test_inverse_norms_of_any_layout() -> None:
    """Slices, transposed batches, expanded rows; unaligned starts and strided elements, which are copied; all in one call."""
    torch.manual_seed(0)
    shape = (3, 5, 64)
    for dtype in (torch.bfloat16, torch.float32):
        wide = torch.full((3, 5, 192), math.nan, dtype=dtype, device=DEVICE)
        wide[..., 64:128] = torch.randn(shape)
        odd = torch.full((3, 5, 67), math.nan, dtype=dtype, device=DEVICE)
        odd[..., :64] = torch.randn(shape)
        late = torch.full((3, 5, 67), math.nan, dtype=dtype, device=DEVICE)
        late[..., 3:] = torch.randn(shape)
        residuals = [
            torch.randn(shape, device=DEVICE).to(dtype),
            wide[..., 64:128],
            torch.randn(5, 3, 64, device=DEVICE).to(dtype).transpose(0, 1),
            odd[..., :64],
            late[..., 3:],
            torch.randn(1, 5, 64, device=DEVICE).to(dtype).expand(shape),
            torch.randn(3, 1, 64, device=DEVICE).to(dtype).expand(shape),
            torch.randn(3, 5, 128, device=DEVICE).to(dtype)[..., ::2],
            torch.randn(3, 64, 5, device=DEVICE).to(dtype).mT,
            torch.randn(shape, device=DEVICE).to(dtype),
        ]
        check_inverse(inverse_norms(residuals), true_inverse(residuals))


@pytest.mark.parametrize("layers", [1, 2, 9, 32, 33, 70])
def test_inverse_norms_of_many_layers(layers: int) -> None:
    """Up to 32 a launch; a repeat has other addresses and the same launch."""
    torch.manual_seed(0)
    for repeat in range(3):
        residuals = [torch.randn(2, 3, 32, device=DEVICE).bfloat16() for _ in range(layers)]
        check_inverse(inverse_norms(residuals), true_inverse(residuals))
        if repeat == 0:
            made = residual_norms._launch_of.cache_info().misses
    assert residual_norms._launch_of.cache_info().misses == made


def test_inverse_norms_of_what_requires_grad_and_of_nothing() -> None:
    r = torch.randn(2, 3, 16, device=DEVICE, requires_grad=True)
    assert not inverse_norms([r]).requires_grad
    assert inverse_norms([r[:0], r[:0]]).shape == (2, 0, 3)
    with torch.inference_mode():
        check_inverse(inverse_norms([r.clone()]), true_inverse([r.detach()]))


def test_inverse_norms_refuse_what_does_not_fit() -> None:
    r = torch.randn(2, 3, 16, device=DEVICE)
    for residuals, word in (
        ([], "at least one"),
        ([r[0]], "batch, seq, hidden"),
        ([r, r[:, 1:]], "one shape"),
        ([r, r.half()], "dtype"),
        ([r.double()], "dtype"),
    ):
        with pytest.raises(ValueError, match=word):
            inverse_norms(residuals)


def test_the_ratio_of_residual_streams() -> None:
    """Both together: |W z| c / |r|, where |r| = 0 at one token that counts and at one that does not."""
    torch.manual_seed(0)
    cases = [case(seed=seed, batch=3, seq=7) for seed in range(2)]
    residuals = [torch.randn(3, 7, 40, device=DEVICE) for _ in cases]
    valid = torch.ones(3, 7, dtype=torch.bool, device=DEVICE)
    valid[0, 5:] = False
    residuals[0][0, 6] = 0.0  # padding
    residuals[0][1, 6] = 0.0
    ratio = inverse_norms(residuals)
    for token_agg in AGGS:
        state = new_state(WITH, 2, 3)
        head_stats(
            [c[0] for c in cases],
            [c[2] for c in cases],
            state,
            [0, 1],
            token_agg=token_agg,
            valid=valid,
            ratio=ratio,
        )
        for row, (x, weights, _) in enumerate(cases):
            own = true_inverse(residuals)[row].to(DEVICE)
            check(state, row, true_samples(x, weights, valid, token_agg, None, own))
