"""What a head adds to the residual stream, of every causal-LM family: against the change of the residual stream itself.

The truth is the layer's own: with the rest of the layer silenced, what it gives with its attention's output less what it gives
without is what the attention adds. A family whose layer does something else has to be in the table of those that are not known.
"""

import os
import re
from types import SimpleNamespace

import families
import pytest
import torch
from oracle import UPDATE_METRIC, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.basic import HookManager as BasicHookManager
from fastheads.capture.channels import Updates
from fastheads.capture.collect import state
from fastheads.capture.manager import recorder_of
from fastheads.models.families import FAMILIES
from fastheads.models.residual import Rule, UnknownUpdateError, Update, scales, update_of

MASK = [[0, 0, 1, 1, 1, 1, 1], [1] * 7]
INTERPRETED = ["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []
METRIC = "head_residual_update_norm"
UNKNOWN = [family.layer for family in FAMILIES if family.update_unknown is not None]
COVERED = [f for f in families.FAMILIES if f not in families.REFUSED and families.why_missing(f) is None]
# Norms come after the sum: what is added is the output as it is, but the layer does not show it.
NORM_AFTER_THE_SUM = re.compile(
    r"^(Bert|BertGeneration|BigBird|Camembert|Data2VecText|Electra|Ernie|Git|RemBert|Roberta|RoCBert|RoFormer|XLMRoberta|Xmod)Layer$"
    r"|^(Bart|BlenderbotSmall|Marian|MiniMax|Mvp|PLBart|TrOCR)DecoderLayer$|^Block$|^MultiHeadAttention$"
)
SEVERAL_ATTENTIONS = re.compile(r"^LongcatFlash")


def layer_of(model, site):
    parts = site.name.split(".")
    first = next(i for i, part in enumerate(parts) if part.isdigit())
    return model.get_submodule(".".join(parts[: first + 1]))


def attention_of(model, site):
    parts = site.name.split(".")
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts) - 1, 0, -1)]
    return next(m for m in above if re.search("Attention|Attn|MLA|Sdpa", type(m).__name__))


def silence(model, layers, owners):
    """Zero all that lies in a layer beside its attention and its norms; give the norms gains that differ."""
    attending = {id(p) for owner in owners for p in owner.parameters()}
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if id(parameter) in attending:
                continue
            if "norm" in name.lower() or re.search(r"\bln", name):
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            elif "residual" not in name:
                parameter.data.zero_()


def first(value):
    while isinstance(value, (tuple, list)):
        value = value[0]
    return value


def changes(model, sites, batch):
    """By site: what its layer gives with the attention's output, less what the same layer gives without, `[B, S, O]`."""
    found, replaying = {}, []
    handles = []

    def layer_hook(site, layer):
        def hook(module, args, kwargs, output):
            if replaying or site.name in found:
                return
            replaying.append(True)
            silent = site.module.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out))
            without = first(module.forward(*args, **kwargs))
            silent.remove()
            replaying.pop()
            found[site.name] = (first(output) - without).double()

        return layer.register_forward_hook(hook, with_kwargs=True)

    for site in sites:
        handles.append(layer_hook(site, layer_of(model, site)))
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("family", COVERED)
@pytest.mark.filterwarnings("ignore")
def test_the_updates_of_the_heads_sum_to_the_change_of_the_residual_stream(family):
    model = families.build(family)
    sites = fastheads.find_sites(model)
    owners = [attention_of(model, site) for site in sites]
    kinds = {type(layer_of(model, site)).__name__ for site in sites}
    unknown = {s.name for s in sites if any(re.search(p, type(layer_of(model, s)).__name__) for p in UNKNOWN)}
    for site in sites:
        if site.name in unknown:
            with pytest.raises(UnknownUpdateError):
                update_of(model, site)
    if len(unknown) == len(sites):
        return
    if any(NORM_AFTER_THE_SUM.search(kind) or SEVERAL_ATTENTIONS.search(kind) for kind in kinds):
        assert all(str(update_of(model, site)) == "as it is" for site in sites)
        return
    silence(model, {id(layer_of(model, s)): layer_of(model, s) for s in sites}.values(), owners)
    batch = families.batch(family, MASK)
    outputs = []
    taken = [
        s.module.register_forward_hook(lambda m, _a, out: outputs.append((m, out.clone().double())) and None)
        for s in sites
    ]
    with captured_inputs([s.module for s in sites]) as inputs, torch.no_grad():
        model(**batch)
    for handle in taken:
        handle.remove()
    change = changes(model, sites, batch)
    with (
        fastheads.HookManager(model, "token", allow_skipped=family in families.SKIPS) as hooks,
        torch.no_grad(),
    ):
        model(**batch)
        results = hooks.get_results()
    real = torch.tensor(MASK).bool()
    for row, site in enumerate(sites):
        if site.name in unknown or site.name not in change or not inputs[row]:
            continue
        update, weight = update_of(model, site), weight_of(site)
        given = [out for m, out in outputs if m is site.module]
        norms = []  # of each firing
        for firing, (x, output) in enumerate(zip(inputs[row], given, strict=True)):
            heads, total = added(site, update, torch.as_tensor(x), output, weight)
            norms.append(heads.norm(dim=-1)[real])
            if firing == 0:
                want = change[site.name].view_as(total)[real]
                error = (total[real] - want).norm() / want.norm()
                assert error < 2e-4, f"{site.name}: {update}, {error:.1e}"
        got = results[METRIC]["mean"][row, : site.num_heads]
        torch.testing.assert_close(got, torch.cat(norms).mean(0), rtol=1e-5, atol=0)


def added(site, update, x, output, weight):
    """What each head adds, `[B, S, H, O]`, and what all add with the bias; by dense algebra, from the update's norm alone."""
    output = output.view(*x.shape[:2], -1)
    z = x.view(*x.shape[:2], site.num_heads, site.head_dim)
    heads = torch.einsum("bshd,ohd->bsho", z, weight.view(-1, site.num_heads, site.head_dim))
    bias = output - heads.sum(2)  # belongs to no head
    if update.norm is not None:
        root = (output.square().mean(-1) + update.eps).sqrt()[..., None]
        ones = torch.ones(1, 1, output.shape[-1])
        gain = update.norm(ones)[0, 0].double().detach() * (1 + update.eps) ** 0.5
        heads, bias = gain * heads / root[..., None, :], gain * bias / root
    heads, bias = update.multiplier * heads, update.multiplier * bias
    return heads, heads.sum(2) + bias


def weight_of(site):
    """The weight `[out, in]` in float64, by an identity through the projection."""
    identity = torch.eye(site.num_heads * site.head_dim)
    with torch.no_grad():
        zero = site.module(torch.zeros_like(identity)[None])[0]
        return (site.module(identity[None])[0] - zero).double().T


def test_every_rule_is_used():
    """Rules of classes that no release has are dead."""
    from pathlib import Path

    from transformers import models

    source = "\n".join(p.read_text() for p in Path(models.__path__[0]).glob("*/modeling_*.py"))
    classes = re.findall(r"^class (\w+)", source, re.MULTILINE)
    if families.RELEASE == families.WRITTEN_FOR:
        for pattern in (family.layer for family in FAMILIES if family.layer is not None):
            assert any(re.search(pattern, name) for name in classes), pattern


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", ["factored", "einsum", "loop", *INTERPRETED])
@pytest.mark.parametrize("family", [f for f in ("gemma2", "hyperclovax") if f in families.FAMILIES])
@pytest.mark.filterwarnings("ignore")
def test_backends_agree_with_the_basic_manager(family, backend, token_agg):
    """Grouped and at once; the sum above has tied the basic manager's algebra to the model."""
    model = families.build(family)
    batch = families.batch(family, MASK)
    with BasicHookManager(model, token_agg) as basic, torch.no_grad():
        model(**batch)
        want = basic.get_results()[METRIC]
    for group_bytes in (0, 2**20):
        with (
            fastheads.HookManager(model, token_agg, backend=backend, group_bytes=group_bytes) as hooks,
            torch.no_grad(),
        ):
            model(**batch)
            results = hooks.get_results()
        assert results["metadata"]["residual_update"].startswith("normed")
        # float32 numbers for each token: what deviates from the mean by little is known to that of the mean
        atol = 1e-6 * float(want["mean"].nan_to_num().max())
        for statistic, value in want.items():
            torch.testing.assert_close(
                results[METRIC][statistic], value, rtol=1e-5, atol=atol, equal_nan=True
            )


def test_a_multiplier_scales_every_statistic():
    """Granite's: nothing more is measured."""
    model = families.build("granite")
    model.config.residual_multiplier = 0.25
    for layer in model.model.layers:
        layer.residual_multiplier = -0.25
    batch = families.batch("granite", MASK)
    with fastheads.HookManager(model, "token") as hooks, BasicHookManager(model, "token") as basic:
        with torch.no_grad():
            model(**batch)
        got, want = hooks.get_results(), basic.get_results()
    assert got["metadata"]["residual_update"] == "as it is, times -0.25"
    for statistic, value in want[METRIC].items():
        torch.testing.assert_close(got[METRIC][statistic], value, rtol=1e-5, atol=1e-9)
    contribution = got["head_residual_contribution_norm"]
    assert torch.equal(got[METRIC]["count"], contribution["count"])
    torch.testing.assert_close(got[METRIC]["max"], contribution["max"] / 4)


@pytest.mark.parametrize("family", [f for f in ("granite", "hyperclovax") if f in families.FAMILIES])
def test_a_multiplier_that_changes_in_the_middle_is_refused(family):
    """The samples before and after do not go together; the profile tells of one number."""
    model = families.build(family)
    batch = families.batch(family, MASK)
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        model(**batch)
        model.model.layers[1].residual_multiplier = 0.5
        model(**batch)
        for ask in (hooks.get_results, lambda: state(recorder_of(hooks))):
            with pytest.raises(
                fastheads.StaleFactorError, match=r"multiplies the output of model\.layers\.1"
            ):
                ask()
        hooks.reset()
        model(**batch)
        assert "times 0.5" in hooks.get_results()["metadata"]["residual_update"][1]


def test_a_multiplier_that_changes_for_one_forward_is_refused_and_one_after_all_is_not():
    model, batch = families.build("granite"), families.batch("granite", MASK)
    layer = model.model.layers[1]
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        before, layer.residual_multiplier = layer.residual_multiplier, 5.0
        model(**batch)
        layer.residual_multiplier = before
        with pytest.raises(fastheads.StaleFactorError, match=r"multiplies the output of model\.layers\.1"):
            hooks.get_results()
        hooks.reset()
        model(**batch)
        want = hooks.get_results()
    layer.residual_multiplier = 7.0  # after the hooks are gone
    found = hooks.get_results()
    assert torch.equal(found[METRIC]["mean"], want[METRIC]["mean"])
    assert found["metadata"]["residual_update"] == want["metadata"]["residual_update"]


@pytest.mark.filterwarnings("ignore:.*NaN or infinite")  # of the layers behind
def test_a_multiplier_that_becomes_no_number_is_not_known_after_a_reset():
    model, batch = families.build("granite"), families.batch("granite", MASK)
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        model.model.layers[1].residual_multiplier = float("nan")
        hooks.reset()
        model(**batch)
        results = hooks.get_results()
    assert results["metadata"]["residual_update"][1] == "its residual_multiplier is nan"
    assert (results[METRIC]["count"][1] == 0).all() and (results[METRIC]["count"][0] == 2).all()


def test_a_multiplier_of_several_numbers_is_not_known():
    model = families.build("granite")
    model.model.layers[0].residual_multiplier = torch.full((model.config.hidden_size,), 0.5)
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        model(**families.batch("granite", MASK))
        results = hooks.get_results()
    assert results["metadata"]["residual_update"][0] == "its residual_multiplier is no number"
    assert (results[METRIC]["count"][0] == 0).all()


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_multiplier_that_is_no_number_is_not_known(number):
    model = families.build("granite")
    model.model.layers[1].residual_multiplier = number
    with fastheads.HookManager(model, layers=[1]) as hooks, torch.no_grad():
        model(**families.batch("granite", MASK))
        results = hooks.get_results()
    assert results["metadata"]["residual_update"][1] == f"its residual_multiplier is {number}"
    assert results[METRIC]["mean"].isnan().all() and (results[METRIC]["count"] == 0).all()
    assert (results["head_residual_contribution_norm"]["count"][1] == 2).all()


@pytest.mark.filterwarnings("ignore")
def test_a_multiplier_of_falcon_h1_is_found():
    model = families.build("falcon_h1")
    for layer in model.model.layers:
        layer.attn_out_multiplier = 0.5
    with fastheads.HookManager(model, "token") as hooks, torch.no_grad():
        model(**families.batch("falcon_h1", MASK))
        results = hooks.get_results()
    want = results["head_residual_contribution_norm"]["mean"] / 2
    torch.testing.assert_close(results[METRIC]["mean"], want)


@pytest.mark.filterwarnings("ignore")
def test_gates_and_scales_that_nobody_knows_are_not_taken_for_nothing():
    model = families.build("mllama")
    kinds = {type(layer_of(model, s)).__name__: s for s in fastheads.find_sites(model)}
    gated = kinds["MllamaCrossAttentionDecoderLayer"]
    with pytest.raises(UnknownUpdateError, match="gate"):
        update_of(model, gated)
    model = families.build("llama")
    model.model.layers[0].layer_scale = torch.nn.Identity()
    site = fastheads.find_sites(model)[0]
    with pytest.raises(UnknownUpdateError, match="layer_scale"):
        update_of(model, site)


def test_what_others_put_around_the_attention_may_do_anything():
    """PEFT's LLaMA-Adapter gives the projection a second input, and scales what comes of it."""

    class Halved(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            output, *rest = self.inner(*args, **kwargs)
            return output / 2, *rest

    model = families.build("llama")
    model.model.layers[1].self_attn = Halved(model.model.layers[1].self_attn)
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        model(**families.batch("llama", MASK))
        results = hooks.get_results()
    assert results["metadata"]["residual_update"][0] == "as it is"
    assert "Halved, which is not of transformers" in results["metadata"]["residual_update"][1]
    assert results[METRIC]["mean"][1].isnan().all() and not results[METRIC]["mean"][0].isnan().any()


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_layers_that_are_compiled_one_by_one_are_known(family):
    model = families.build(family)
    plain = [str(update_of(model, site)) for site in fastheads.find_sites(model)]
    for number, layer in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(layer)
    assert [str(update_of(model, site)) for site in fastheads.find_sites(model)] == plain


@pytest.mark.filterwarnings("ignore")
def test_a_norm_that_is_replaced_and_one_that_a_fused_optimizer_writes():
    model = families.build("gemma2")
    batch = families.batch("gemma2", MASK)
    layer = model.model.layers[0]
    other = families.build("gemma2", seed=1).model.layers[0].post_attention_layernorm
    other.weight.data.add_(3.0)
    with fastheads.HookManager(model) as hooks, BasicHookManager(model) as basic, torch.no_grad():
        model(**batch)
        layer.post_attention_layernorm = other
        model(**batch)
        other.weight.grad = torch.ones_like(other.weight)
        torch.optim.SGD([other.weight], lr=1.0, fused=True).step()
        model(**batch)
        got, want = hooks.get_results()[METRIC]["mean"], basic.get_results()[METRIC]["mean"]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_an_infinite_output_is_no_sample():
    model = families.build("gemma2")
    site = fastheads.find_sites(model)[1]
    site.module.register_forward_hook(
        lambda _m, _a, out: out.index_fill(1, torch.tensor([3]), torch.inf), prepend=True
    )
    with (
        torch.no_grad(),
        BasicHookManager(model, "token") as basic,
        fastheads.HookManager(model, "token") as hooks,
    ):
        site.module._forward_hooks.move_to_end(next(iter(site.module._forward_hooks)), last=True)
        site.module.bias = torch.nn.Parameter(torch.zeros(site.module.out_features))
        site.module.bias.data[0] = torch.inf
        model(**families.batch("gemma2", MASK))
        for results in (hooks.get_results(), basic.get_results()):
            assert (results[METRIC]["nonfinite"][1] > 0).all() and (results[METRIC]["count"][1] == 0).all()


@pytest.fixture
def one_rank():
    """A mesh of this process alone."""
    dist = torch.distributed
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
@pytest.mark.filterwarnings("ignore")
def test_what_ranks_have_in_part_is_no_norm(one_rank):
    """Of tensor parallelism that leaves each rank a part of the output, or of the gain: no plan of transformers does."""
    dtensor = pytest.importorskip("torch.distributed.tensor")
    model = families.build("gemma2")
    sites = dict(enumerate(fastheads.find_sites(model)))
    parts = SimpleNamespace(whole_output=lambda row: row > 0)
    updates = Updates(model, sites, parts)
    assert updates.unknown == {0: "the norm needs the sum over ranks, and each has a part of it"}
    assert set(updates.normed) == set(sites) - {0}
    for module in model.modules():
        if type(module).__name__ == "Gemma2RMSNorm":
            whole = dtensor.distribute_tensor(module.weight.detach(), one_rank, [dtensor.Replicate()])
            module.weight = torch.nn.Parameter(whole)
    assert set(Updates(model, sites).unknown.values()) == {"Gemma2RMSNorm is spread over ranks"}


def test_updates_that_are_infinite_are_told_of():
    """The heads are finite, what the layer adds is not."""
    model = families.build("gemma2")
    last = fastheads.find_sites(model)[-1].module
    last.bias = torch.nn.Parameter(torch.full((last.out_features,), torch.inf))
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        model(**families.batch("gemma2", MASK))
        with pytest.warns(RuntimeWarning, match="8 samples were NaN or infinite"):
            results = hooks.get_results()
    assert (results["head_residual_contribution_norm"]["nonfinite"] == 0).all()
    assert (results[METRIC]["nonfinite"][-1] == 2).all()


@pytest.mark.filterwarnings("ignore")
def test_double_models_are_measured_in_double():
    model = families.build("gemma2").double()
    with fastheads.HookManager(model, "token") as hooks, BasicHookManager(model, "token") as basic:
        with torch.no_grad():
            model(**families.batch("gemma2", MASK))
        got, want = hooks.get_results()[METRIC], basic.get_results()[METRIC]
    torch.testing.assert_close(got["mean"], want["mean"], rtol=1e-12, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_gain_that_changes_makes_new_factors():
    model = families.build("gemma2")
    batch = families.batch("gemma2", MASK)
    norm = model.model.layers[1].post_attention_layernorm
    with fastheads.HookManager(model) as hooks, BasicHookManager(model) as basic, torch.no_grad():
        model(**batch)
        norm.weight.mul_(3).add_(0.5)
        model(**batch)
        torch.testing.assert_close(
            hooks.get_results()[METRIC]["mean"], basic.get_results()[METRIC]["mean"], rtol=1e-5, atol=0
        )
        model(**batch)
        norm.weight.data.mul_(2)  # without a trace
        with pytest.raises(fastheads.StaleFactorError, match=r"layers\.1"):
            hooks.get_results()


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_is_not_known_has_no_update():
    model = families.build("zamba")
    with fastheads.HookManager(model) as hooks, BasicHookManager(model) as basic, torch.no_grad():
        model(**families.batch("zamba", MASK))
        for results in (hooks.get_results(), basic.get_results()):
            assert (results[METRIC]["count"] == 0).all() and results[METRIC]["mean"].isnan().all()
            assert "not known" in str(results["metadata"]["residual_update"])


@pytest.mark.filterwarnings("ignore")
def test_compiled():
    model = families.build("gemma2")
    batch = families.batch("gemma2", MASK)
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        model(**batch)
        want = hooks.get_results()[METRIC]
        hooks.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            compiled(**batch)
        got = hooks.get_results()[METRIC]
    assert (got["count"] == 2 * want["count"]).all()
    torch.testing.assert_close(got["mean"], want["mean"], rtol=1e-5, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", ["factored", *INTERPRETED])
@pytest.mark.filterwarnings("ignore")
def test_packed_rows(backend, token_agg):
    model = families.build("gemma2")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 5]])
    batch = dict(
        input_ids=families.batch("gemma2", MASK)["input_ids"], position_ids=positions, use_cache=False
    )
    with (
        BasicHookManager(model, token_agg) as basic,
        fastheads.HookManager(model, token_agg, backend=backend) as hooks,
        torch.no_grad(),
    ):
        model(**batch)
        got, want = hooks.get_results()[METRIC], basic.get_results()[METRIC]
    assert (want["count"] == (14 if token_agg == "token" else 4)).all()
    for statistic in ("mean", "min", "max", "count"):
        torch.testing.assert_close(got[statistic], want[statistic], rtol=1e-5, atol=0)


def test_the_scales_of_layers_that_differ():
    torch.manual_seed(0)
    outputs = [torch.randn(2, 3, width, dtype=torch.bfloat16) * 3 for width in (32, 32, 32)]
    outputs[1][0, 1, 5] = torch.inf
    layers = []
    for multiplier, eps in ((1.0, 1e-6), (0.25, 1e-6), (1.0, 0.5)):
        layer = torch.nn.Module()
        layer.norm, layer.factor = torch.nn.RMSNorm(32, eps=eps), multiplier
        layers.append(Update(layer, Rule("norm", "factor")))
    want = []
    for (multiplier, eps), output in zip(((1.0, 1e-6), (0.25, 1e-6), (1.0, 0.5)), outputs, strict=True):
        want.append(multiplier / (output.double().square().mean(-1) + eps).sqrt())
    want[1][0, 1] = torch.nan  # infinity over infinity
    for alike in ([0, 1, 2], [0, 0]):
        measured = [layers[i].of_output(outputs[i]) for i in alike]
        got = scales(measured)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), torch.stack([want[i] for i in alike]), rtol=2e-6, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("form", ["plain", "parametrized", "wrapped"])
def test_a_gain_is_followed_in_whatever_form_it_comes(form):
    class Wrapper(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.eps = inner, inner.eps

        def forward(self, x):
            return self.inner(x)

    model = families.build("gemma2")
    layer = model.model.layers[0]
    norm = layer.post_attention_layernorm
    weight, batch = norm.weight, families.batch("gemma2", MASK)
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        model(**batch)
        if form == "parametrized":
            torch.nn.utils.parametrize.register_parametrization(norm, "weight", torch.nn.Identity())
            weight = norm.parametrizations.weight.original
        elif form == "wrapped":
            layer.post_attention_layernorm = Wrapper(norm)
        hooks.reset()
        model(**batch)
        before = hooks.get_results()[METRIC]["mean"][0]
        weight.add_(1.0).mul_(3.0).sub_(1.0)  # Gemma's gain is 1 + weight
        model(**batch)
        after = hooks.get_results()[METRIC]["mean"][0]
    torch.testing.assert_close(after, 2 * before, rtol=1e-5, atol=0)  # of gains of 1 and 3


def test_an_epsilon_that_holds_for_one_call_is_the_one_that_counts():
    model = families.build("gemma2")
    layer, batch = model.model.layers[0], families.batch("gemma2", MASK)
    norm = layer.post_attention_layernorm
    plain = norm.eps
    layer.register_forward_pre_hook(lambda *_: setattr(norm, "eps", 0.3))
    layer.register_forward_hook(lambda *_: setattr(norm, "eps", plain))
    found = []
    with torch.no_grad():
        for group_bytes in (0, 2**26):
            with fastheads.HookManager(model, group_bytes=group_bytes) as hooks:
                model(**batch)
                found.append(hooks.get_results()[METRIC]["mean"][0])
    torch.testing.assert_close(*found, rtol=1e-6, atol=0)


class CountingNorm(torch.nn.Module):
    """Gemma's norm, which counts its calls and keeps what it saw last."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps
        self.calls = torch.nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.last = None

    def forward(self, x):
        self.calls += 1
        self.last = x
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


@pytest.mark.parametrize("backend", ["factored", "einsum"])
def test_a_norm_that_keeps_count_is_left_alone(backend):
    """Its gain is read by running it: then it would have run once too often."""
    model = build("gemma2")
    for layer in model.model.layers:
        layer.post_attention_layernorm = CountingNorm(layer.post_attention_layernorm)
    with fastheads.HookManager(model, "all", backend=backend) as hooks, torch.no_grad():
        assert all(layer.post_attention_layernorm.calls == 0 for layer in model.model.layers)
        assert all(layer.post_attention_layernorm.last is None for layer in model.model.layers)
        model(input_ids=tokens(2, 5))
        results = hooks.get_results()
    assert all(layer.post_attention_layernorm.calls == 1 for layer in model.model.layers)
    assert (results[UPDATE_METRIC]["count"] == 0).all()
    assert "CountingNorm changes" in results["metadata"]["residual_update"]
