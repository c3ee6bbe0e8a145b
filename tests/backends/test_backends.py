"""Every backend against the float64 oracle, for every family, aggregation and form of padding."""

import os

import pytest
import torch
from oracle import METRICS, assert_results, captured_inputs, dense_norms
from tiny_models import FAMILIES, build, tokens

import fastheads
from fastheads.basic import HookManager as BasicHookManager

BACKENDS = ("loop", "einsum", "factored", "basic")
if os.environ.get("TRITON_INTERPRET") == "1":  # as test_kernel.py runs this file once more
    BACKENDS = ("triton",)
TOKEN_AGGS = ("last", "all", "token")

# Float32 products of up to 96 terms; the metric itself asks for 5e-6.
RTOL = 5e-6

MASKS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1] * 7, [1, 0, 0, 0, 0, 0, 0]],
    "both": [[0, 1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]],
    "empty row": [[0] * 7, [1] * 7, [0, 1, 1, 1, 0, 0, 0]],
}


def manager(backend, model, token_agg, **options):
    if backend == "basic":
        return BasicHookManager(model, token_agg)
    return fastheads.HookManager(model, token_agg, backend=backend, **options)


def run(model, backend, token_agg, masks, **options):
    """Results, captured inputs and masks of a few forwards of three rows of seven tokens."""
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(backend, model, token_agg, **options) as hooks,
    ):
        for i, mask in enumerate(masks):
            attention_mask = None if mask is None else torch.tensor(mask)
            with torch.no_grad():
                model(input_ids=tokens(3, 7, seed=i), attention_mask=attention_mask)
        return hooks.get_results(), sites, inputs


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", MASKS)
def test_agrees_with_the_oracle_under_padding(backend, token_agg, form):
    masks = [MASKS[form], MASKS["right"], None]
    results, sites, inputs = run(build(), backend, token_agg, masks)
    assert_results(results, sites, inputs, masks, token_agg, RTOL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_the_oracle_for_every_family(backend, family):
    masks = [MASKS["left"], None]
    results, sites, inputs = run(build(family), backend, "all", masks)
    assert len(sites) == 3
    assert all(s.num_heads == 4 for s in sites)
    assert_results(results, sites, inputs, masks, "all", RTOL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_within_the_references_own_error(backend, dtype):
    # The reference of users rounds W z to the model's dtype: half a unit in the last place for each element, averaged by the norm
    # over hidden_size = 64 of them. A tenth of that leaves the library no room to round even once itself.
    bound = torch.finfo(dtype).eps / 10
    masks = [MASKS["left"], None]
    results, sites, inputs = run(build(dtype=dtype), backend, "token", masks)
    assert_results(results, sites, inputs, masks, "token", min(bound, 2e-5))


@pytest.mark.parametrize("backend", BACKENDS)
def test_double_models_are_measured_in_double(backend):
    masks = [MASKS["both"]]
    if backend == "triton":
        with pytest.raises(RuntimeError, match=r"'triton' cannot be used: dtype torch\.float64.*factored"):
            manager(backend, build(dtype=torch.float64), "all")
        return
    results, sites, inputs = run(build(dtype=torch.float64), backend, "all", masks)
    assert_results(results, sites, inputs, masks, "all", 1e-12)


@pytest.mark.parametrize("backend", ["loop", "einsum", "factored"])
@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
@pytest.mark.parametrize("skip_first", [1, 3, 50])
def test_skip_first(backend, token_agg, skip_first):
    masks = [MASKS["left"], MASKS["both"], None]
    results, sites, inputs = run(build(), backend, token_agg, masks, skip_first=skip_first)
    assert_results(results, sites, inputs, masks, token_agg, RTOL, skip_first=skip_first)


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_and_bias_sum_to_the_projections_output(family):
    model = build(family, dtype=torch.float64)
    for site in fastheads.find_sites(model):
        x = torch.randn(2, 5, site.num_heads * site.head_dim, dtype=torch.float64)
        weight = site.module.weight.view(-1, site.num_heads, site.head_dim)
        heads = torch.einsum("bshd,ohd->bsho", x.view(2, 5, site.num_heads, site.head_dim), weight)
        total = heads.sum(2) + (0 if site.module.bias is None else site.module.bias)
        torch.testing.assert_close(total, site.module(x), rtol=1e-12, atol=1e-12)
        # and the norms of those very heads are what is reported
        _, contribution = dense_norms(x, site.module.weight, site.num_heads)
        torch.testing.assert_close(heads.norm(dim=-1), torch.from_numpy(contribution), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e25, 1e-25])
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_beyond_the_range_of_float32_squares(backend, scale):
    """‖z‖² overflows float32 at 1e19 and vanishes at 1e-23; the norms themselves do neither."""
    model = build()
    sites = fastheads.find_sites(model)
    for site in sites:
        site.module.register_forward_pre_hook(lambda _m, args: (args[0] * scale,))
        site.module.register_forward_hook(lambda _m, _args, out: torch.zeros_like(out))
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(backend, model, "token") as hooks,
        torch.no_grad(),
    ):
        model(input_ids=tokens(2, 5))
        results = hooks.get_results()
    assert_results(results, sites, inputs, [None], "token", RTOL)


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
def test_padding_may_hold_nan(token_agg):
    model = build()
    mask = torch.tensor(MASKS["both"])
    sites = fastheads.find_sites(model)

    def poison(_module, args):
        return (args[0].masked_fill(mask.unsqueeze(-1) == 0, torch.nan),)

    for site in sites:
        site.module.register_forward_pre_hook(poison)
        site.module.register_forward_hook(lambda _m, _a, out: out.nan_to_num())
    for backend in BACKENDS:
        with (
            captured_inputs([s.module for s in sites]) as inputs,
            manager(backend, model, token_agg) as hooks,
            torch.no_grad(),
        ):
            model(input_ids=tokens(3, 7), attention_mask=mask)
            results = hooks.get_results()
        assert all((results[m]["nonfinite"] == 0).all() for m in METRICS)
        assert_results(results, sites, inputs, [MASKS["both"]], token_agg, RTOL)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
def test_nonfinite_samples_are_counted_and_left_out_with_one_warning(backend, token_agg):
    model = build()
    sites = fastheads.find_sites(model)

    def poison(_module, args):
        x = args[0].clone()
        x[0, -1, 3] = torch.nan  # head 0 of the first row
        x[1, -1, 30] = torch.inf  # head 1 of the second
        x[2] = 0  # 0/0 in the relative metrics
        return (x,)

    for site in sites:
        site.module.register_forward_pre_hook(poison)
        site.module.register_forward_hook(lambda _m, _a, out: out.nan_to_num(0, 0, 0))
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(backend, model, token_agg) as hooks,
        torch.no_grad(),
    ):
        model(input_ids=tokens(3, 7))
        if backend == "basic":
            results = hooks.get_results()
        else:
            with pytest.warns(RuntimeWarning, match="NaN or infinite"):
                results = hooks.get_results()
            hooks.get_results()  # warns once: warnings are errors here
    assert results["head_output_norm"]["nonfinite"][0, 0] == 1
    assert results["relative_head_output_norm"]["nonfinite"][0, 3] >= 3
    assert_results(results, sites, inputs, [None], token_agg, RTOL)


def test_ragged_heads_are_padded_with_nan_and_count_0():
    model = build()
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(64, 2 * 24, bias=False)
    attention.o_proj = torch.nn.Linear(2 * 24, 64, bias=False)
    attention.num_key_value_groups = 1
    for backend in BACKENDS:
        results, sites, inputs = run(model, backend, "all", [None])
        assert [s.num_heads for s in sites] == [4, 2, 4]
        assert_results(results, sites, inputs, [None], "all", RTOL)
        stats = results["head_output_norm"]
        assert (stats["count"][1, 2:] == 0).all()
        assert stats["mean"][1, 2:].isnan().all() and stats["min"][1, 2:].isnan().all()


def test_layers_chooses_rows_and_leaves_the_others_at_count_0():
    results, _, _ = run(build(), "factored", "all", [None])
    chosen, _, _ = run(build(), "factored", "all", [None], layers=[1])
    for metric in METRICS:
        assert chosen[metric]["count"].tolist() == [[0] * 4, [3] * 4, [0] * 4]
        assert torch.equal(chosen[metric]["mean"][1], results[metric]["mean"][1])
        assert chosen[metric]["mean"][0].isnan().all()


def test_an_unusual_input_is_refused():
    model = build()
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        with pytest.raises(RuntimeError, match=r"expected an input \[batch, seq, 96\]"):
            model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
                lambda _m, args: (args[0][0],), prepend=True
            )
            model(input_ids=tokens(1, 4))
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(token_agg="mean"), "token_agg"),
        (dict(backend="cuda"), "loop, einsum, factored, triton"),
        (dict(precision="half"), "precision"),
        (dict(skip_first=-1), "skip_first"),
        (dict(layers=[7]), "layers"),
        (dict(layers=[]), "layers"),
        (dict(layers=1), "layers must be whole numbers"),
        (dict(layers=[True]), "layers must be whole numbers"),
        (dict(group_bytes=-1), "group_bytes"),
    ],
)
def test_wrong_options_are_named(options, message):
    model = build()
    with pytest.raises(ValueError, match=message):
        fastheads.HookManager(model, **options)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "basic"])
def test_what_heads_that_share_keys_and_values_contribute_together(backend, token_agg):
    """The norm of the sum over a group's heads, by dense algebra; heads of another group do not count."""
    model = build("llama-bias")
    sites = fastheads.find_sites(model)
    mask = [[0, 0, 1, 1, 1, 1], [1] * 6]
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(backend, model, token_agg, kv_groups=True) as hooks,
        torch.no_grad(),
    ):
        model(input_ids=tokens(2, 6), attention_mask=torch.tensor(mask))
        results = hooks.get_results()
    found = results["kv_group_residual_contribution_norm"]
    kv_heads = model.config.num_key_value_heads
    assert sites[0].num_heads // kv_heads == 2
    for row, site in enumerate(sites):
        x = torch.as_tensor(inputs[row][0]).double()
        weight = site.module.weight.double().detach().view(-1, kv_heads, x.shape[-1] // kv_heads)
        sums = torch.einsum("bskd,okd->bsko", x.view(2, 6, kv_heads, -1), weight).norm(dim=-1)
        samples = {
            "last": torch.stack([sums[0, -1], sums[1, -1]]),
            "all": torch.stack([sums[0, 2:].mean(0), sums[1].mean(0)]),
            "token": torch.cat([sums[0, 2:], sums[1]]),
        }[token_agg]
        torch.testing.assert_close(found["mean"][row, :kv_heads], samples.mean(0), rtol=RTOL, atol=0)
        assert (found["count"][row, :kv_heads] == len(samples)).all()
        assert (found["count"][row, kv_heads:] == 0).all() and found["mean"][row, kv_heads:].isnan().all()
