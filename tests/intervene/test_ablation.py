"""ablate() against dense algebra: columns of the weight zeroed by hand, and W_h z̄_h added by hand for means."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import accelerate
import families
import numpy as np
import peft
import pytest
import torch
from mean_profiles import drawn_profile
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens
from torch import nn
from weight_forms import FORMS, linear, model_with

import fastheads
from fastheads.basic import HookManager as BasicHookManager
from fastheads.capture.projection_hook import GATES_ATTRIBUTE
from fastheads.errors import (
    ForwardError,
    OptionError,
    ResultsError,
    UnsupportedWeightError,
)
from fastheads.intervene.ablation import Ablator

HEADS = [(0, 1), (2, 0), (2, 3)]
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])


def logits(model, batch=None, **arguments):
    with torch.no_grad():
        return model(**({"input_ids": tokens(2, 6)} if batch is None else batch), **arguments).logits


def columns(site, head):
    return slice(head * site.head_dim, (head + 1) * site.head_dim)


def by_hand(model, heads, profile=None):
    """A copy whose weights have the heads' columns zeroed, and of whose projections the outputs have W_h z̄_h added."""
    model = copy.deepcopy(model)
    sites = fastheads.find_sites(model)
    for layer, head in heads:
        row = next(row for row, site in enumerate(sites) if site.layer == layer)
        site, module = sites[row], sites[row].module
        transposed = type(module).__name__ == "Conv1D"
        weight = module.weight.data.T if transposed else module.weight.data
        part = weight[:, columns(site, head)].clone()
        weight[:, columns(site, head)] = 0.0
        if profile is not None:
            add = part @ torch.from_numpy(profile.vectors.mean[row, head, : site.head_dim]).to(part)
            module.register_forward_hook(lambda _m, _a, out, add=add: out + add)
    return model


def left_on(model):
    """What is left of gates on the model."""
    return [
        name
        for name, module in model.named_modules()
        if GATES_ATTRIBUTE in vars(module)
        or any(
            "gate" in hook.__name__
            for hook in module._forward_pre_hooks.values()
            if hasattr(hook, "__name__")
        )
        or any(key.startswith("_fastheads") for key in vars(module))
    ]


# ---------------------------------------------------------------- what it computes

ARCHITECTURES = ("llama", "gpt2", "gemma2", "gpt_neox", "bloom", "cohere", "minicpm3", "falcon")


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_it_is_zeroing_columns_of_the_weight(family, mode):
    model = families.build(family).double()
    profile = drawn_profile(model) if mode == "mean" else None
    heads = [(site.layer, h) for site in fastheads.find_sites(model)[::2] for h in (0, site.num_heads - 1)]
    for mask in ([[1] * 7] * 2, [[1, 1, 1, 1, 1, 0, 0], [1] * 7]):
        batch = families.batch(family, mask)
        intact = logits(model, batch)
        want = logits(by_hand(model, heads, profile), batch)
        with fastheads.ablate(model, heads, mode, means=profile) as ablation:
            got = logits(model, batch)
        valid = torch.tensor(mask, dtype=torch.bool)
        torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=1e-10)
        assert not torch.allclose(got[valid], intact[valid], atol=1e-4)
        assert torch.equal(logits(model, batch), intact)
        assert ablation.heads == sorted(heads)
    assert not left_on(model)


def test_half_precision_rounds_the_mean_once():
    model = build(dtype=torch.bfloat16)
    profile = drawn_profile(model)
    seen = []
    with fastheads.ablate(model, [(1, 2)], "mean", means=profile):
        with captured_inputs([fastheads.find_sites(model)[1].module]) as seen:
            logits(model)
    (x,) = seen[0]
    assert torch.equal(
        x[..., 48:72], torch.from_numpy(profile.vectors.mean[1, 2]).bfloat16().double().expand(2, 6, 24)
    )


def test_autocast_converts_the_mean_to_its_dtype():
    model = build()
    profile = drawn_profile(model)
    with torch.autocast("cpu", dtype=torch.bfloat16), fastheads.ablate(model, HEADS, "mean", means=profile):
        with captured_inputs([fastheads.find_sites(model)[0].module]) as seen:
            logits(model)
    mean = torch.from_numpy(profile.vectors.mean[0, 1])
    assert torch.equal(seen[0][0][0, 0, 24:48], mean.bfloat16().double())


def test_nan_in_a_head_that_is_ablated_is_gone():
    """0 · NaN would be NaN."""
    model = build()
    weight = model.model.layers[0].self_attn.v_proj.weight
    with torch.no_grad():
        weight[:24] = torch.nan  # the values of query heads 0 and 1
    assert logits(model).isnan().all()
    with fastheads.ablate(model, [(0, 0), (0, 1)]):
        assert logits(model).isfinite().all()
    with fastheads.ablate(model, [(0, 0), (0, 1)], "mean", means=drawn_profile(model)):
        assert logits(model).isfinite().all()


def test_gradients_flow_past_it():
    model, ids = build().double(), tokens(2, 6)
    reference = by_hand(model, HEADS)
    with fastheads.ablate(model, HEADS):
        model(input_ids=ids).logits.sum().backward()
    reference(input_ids=ids).logits.sum().backward()
    for name, parameter in reference.named_parameters():
        if "o_proj" not in name:  # the reference's own columns are zero but have gradients
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-9, atol=1e-9)


def test_entered_under_inference_mode_it_serves_forwards_with_gradients():
    model = build()
    with torch.inference_mode():
        ablation = fastheads.ablate(model, HEADS, "mean", means=drawn_profile(model))
        ablation.__enter__()
    model(input_ids=tokens(1, 3)).logits.sum().backward()
    ablation.__exit__(None, None, None)
    assert not left_on(model)


def test_all_heads_and_none():
    model = build()
    intact = logits(model)
    everything = [(s.layer, h) for s in fastheads.find_sites(model) for h in range(s.num_heads)]
    with fastheads.ablate(model, everything):
        torch.testing.assert_close(logits(model), logits(by_hand(model, everything)))
    with fastheads.ablate(model, []):
        assert torch.equal(logits(model), intact)


def test_heads_given_twice_as_numpy_integers_or_from_an_iterator():
    model = build()
    with fastheads.ablate(model, HEADS):
        want = logits(model)
    with fastheads.ablate(model, iter([np.array(pair) for pair in HEADS * 2])) as ablation:
        assert torch.equal(logits(model), want)
        assert ablation.heads == HEADS


# ---------------------------------------------------------------- ways of loading


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.set_stance("force_eager")
        yield
        torch.compiler.set_stance("default")


def replaced_by_hand(model, heads):
    """The model's logits with the heads' part of the input zeroed in place, by pre-hooks of our own."""
    sites = {site.layer: site for site in fastheads.find_sites(model)}
    handles = []
    for layer, head in heads:

        def hook(_module, args, site=sites[layer], head=head):
            x = args[0].clone()
            x[..., columns(site, head)] = 0.0
            return (x, *args[1:])

        handles.append(sites[layer].module.register_forward_pre_hook(hook))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", FORMS)
def test_quantized(name, quiet, monkeypatch):
    form = FORMS[name]
    np.random.seed(0)
    model = model_with(form.make)
    if getattr(form, "stand_in", None):
        form.stand_in(monkeypatch)
    intact = logits(model)
    want = replaced_by_hand(model, HEADS)
    with fastheads.ablate(model, HEADS):
        got = logits(model)
    assert torch.equal(got, want)
    assert not torch.equal(got, intact)
    assert torch.equal(logits(model), intact)


def lora(model):
    config = peft.LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_lora(mode):
    model = lora(model_with(linear)).double()
    wrappers = [site.module for site in fastheads.find_sites(model)]
    profile = drawn_profile(model) if mode == "mean" else None
    merged = copy.deepcopy(model).merge_and_unload()
    want = logits(by_hand(merged, HEADS, profile))
    with fastheads.ablate(model, HEADS, mode, means=profile):
        torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-10)
        with model.disable_adapter():
            without = logits(model)
    with model.disable_adapter():
        assert not torch.allclose(without, logits(model))
    assert [type(w) for w in wrappers] == [type(wrappers[0])] * 3
    assert not left_on(model)


def test_lora_that_changes_within():
    """Adapters may be merged and switched while heads are ablated."""
    model = lora(model_with(linear)).double()
    reference = copy.deepcopy(model)
    want = logits(by_hand(reference.merge_and_unload(), HEADS))
    with fastheads.ablate(model, HEADS):
        model.merge_adapter()
        torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-10)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloaded(where, mode, tmp_path):
    model = build()
    profile = drawn_profile(model) if mode == "mean" else None
    want = logits(by_hand(model, HEADS, profile))
    if where == "memory":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    else:
        model = accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    intact = logits(model)
    if (where, mode) == ("disk", "mean"):  # no fingerprint is taken of weights on the disk
        with pytest.raises(ResultsError, match="leave some weights out"):
            fastheads.ablate(model, HEADS, mode, means=profile)
        return
    for _ in range(2):
        with fastheads.ablate(model, HEADS, mode, means=profile):
            torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-6)
    assert torch.equal(logits(model), intact)
    assert any(p.device.type == "meta" for p in model.parameters())


def test_a_projection_that_layers_share():
    model = build().double()
    for layer in model.model.layers[1:]:
        layer.self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    with fastheads.ablate(model, [(0, 1)]):
        got = logits(model)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 24:48] = 0
    torch.testing.assert_close(got, logits(model), rtol=0, atol=1e-10)


def test_keyword_arguments_of_a_projection():
    model = build()
    with fastheads.ablate(model, [(0, 1)]):
        module, x = model.model.layers[0].self_attn.o_proj, torch.randn(1, 2, 96)
        assert torch.equal(module(input=x), module(x))


def test_weights_that_profiling_refuses_are_refused():
    model = build()
    model.model.layers[1].self_attn.o_proj.forward = lambda x: x[..., :64]
    with pytest.raises(UnsupportedWeightError, match=r"layers\.1.*forward of its own"):
        fastheads.ablate(model, [(1, 0)])
    fastheads.ablate(model, [(0, 0)])
    assert not left_on(model)


# ---------------------------------------------------------------- with profiling


@pytest.mark.parametrize("first", ["ablate", "profile"])
@pytest.mark.parametrize("make", ["llama", "gemma2", "gpt2", "lora", "basic"])
def test_what_is_measured_is_what_acts(make, first):
    model = families.build("gpt2") if make == "gpt2" else build("gemma2" if make == "gemma2" else "llama")
    if make == "lora":
        model = lora(model)
    manager = BasicHookManager if make == "basic" else fastheads.HookManager
    ablation = fastheads.ablate(model, HEADS)
    if first == "ablate":
        with ablation, manager(model, "token") as hooks:
            got = logits(model)
            results = hooks.get_results()
    else:
        with manager(model, "token") as hooks, ablation:
            got = logits(model)
            results = hooks.get_results()
    norms = results["head_residual_contribution_norm"]
    assert {(r, h) for r, h in np.argwhere(norms["max"].numpy() == 0.0).tolist()} == set(HEADS)
    for metric in ("head_output_norm", "head_residual_update_norm", "head_residual_ratio"):
        assert all(results[metric]["max"][pair] == 0 for pair in HEADS), metric
    with (
        fastheads.ablate(model, HEADS),
        captured_inputs([s.module for s in fastheads.find_sites(model)]) as inputs,
    ):
        assert torch.equal(logits(model), got)
    if make == "llama":
        assert_results(results, fastheads.find_sites(model), inputs, [None], "token", 1e-5)
    assert not left_on(model)


def test_means_are_what_is_measured():
    model = build()
    profile = drawn_profile(model)
    with (
        fastheads.ablate(model, HEADS, "mean", means=profile),
        fastheads.HookManager(model, "token") as hooks,
    ):
        logits(model)
        norms = hooks.get_results()["head_output_norm"]
    for pair in HEADS:
        want = np.linalg.norm(profile.vectors.mean[pair])
        np.testing.assert_allclose([norms[s][pair] for s in ("mean", "min", "max")], want, rtol=1e-5)


@pytest.mark.parametrize("how", ["plain", "gemma2", "gpt2"])
def test_the_means_of_a_run_are_what_replaces(how):
    """Means of a real run, on the run's own data: the mean of the projection's input stays what it is."""
    model = families.build("gpt2") if how == "gpt2" else build("gemma2" if how == "gemma2" else "llama")
    modules = [site.module for site in fastheads.find_sites(model)]
    batches = [dict(input_ids=tokens(2, 6, seed=n), attention_mask=LEFT) for n in range(2)]
    with captured_inputs(modules) as inputs, fastheads.HookManager(model, "all", vectors=True) as hooks:
        for batch in batches:
            logits(model, batch)
        profile = hooks.to_profile()
    valid = torch.cat([LEFT.bool()] * 2)
    with fastheads.ablate(model, HEADS, "mean", means=profile), captured_inputs(modules) as ablated:
        logits(model, batches[0])
    for row, head in HEADS:
        width = columns(fastheads.find_sites(model)[row], head)
        mean = torch.cat(inputs[row])[..., width][valid].mean(0)
        torch.testing.assert_close(ablated[row][0][..., width], mean.expand(2, 6, -1), rtol=0, atol=1e-6)


def test_profile_runs_inside():
    model = build()
    batches = [{"input_ids": tokens(2, 6, seed=n)} for n in range(3)]
    with fastheads.ablate(model, HEADS):
        found = fastheads.profile(model, batches)
        assert all(found.moments["head_output_norm"].max[pair] == 0 for pair in HEADS)
        assert [p for p in found.rank(n=3)] == HEADS
    assert not left_on(model)


def test_a_hook_of_somebody_else_that_was_there_first_acts_first():
    model = build()
    module = model.model.layers[0].self_attn.o_proj
    handle = module.register_forward_pre_hook(lambda _m, args: (args[0] + 1.0,))
    with fastheads.ablate(model, [(0, 1)]), captured_inputs([module]) as inputs:
        logits(model)
    handle.remove()
    assert (inputs[0][0][..., 24:48] == 0).all()


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def dynamo():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


def whole(model):
    return torch.compile(model, fullgraph=True, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def each_layer(model):
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


def each_projection(model):
    for layer in model.model.layers:
        layer.self_attn.o_proj.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("how", "mode"),
    [(whole, "zero"), (whole, "mean"), (in_place, "mean"), (each_layer, "mean"), (each_projection, "zero")],
)
@pytest.mark.parametrize("when", ["before", "within"])
def test_compiled(how, when, mode, dynamo):
    model = build().double()
    profile = drawn_profile(model) if mode == "mean" else None
    intact, want = logits(model), logits(by_hand(model, HEADS, profile))
    others = [(0, 0), (1, 3)]
    want_others = logits(by_hand(model, others, profile))
    compiled = None
    if when == "before":
        compiled = how(model)
        torch.testing.assert_close(logits(compiled), intact)
    for heads, expected in ((HEADS, want), (others, want_others), (HEADS, want)):
        with fastheads.ablate(model, heads, mode, means=profile):
            compiled = how(model) if compiled is None else compiled
            torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(logits(compiled), intact, rtol=0, atol=1e-10)
    assert not dynamo["graph_break"]


@pytest.mark.slow
def test_compiled_by_inductor_with_a_manager(dynamo):
    model = build()
    want = logits(by_hand(model, HEADS))
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad(), fastheads.HookManager(model, "token") as hooks:
        logits(compiled)
        hooks.reset()
        with fastheads.ablate(model, HEADS):
            torch.testing.assert_close(logits(compiled), want, rtol=1e-4, atol=1e-5)
            norms = hooks.get_results()["head_output_norm"]
        assert {(r, h) for r, h in np.argwhere(norms["max"].numpy() == 0.0).tolist()} == set(HEADS)
        hooks.reset()
        logits(compiled)
        assert (hooks.get_results()["head_output_norm"]["min"] > 0).all()


def test_a_manager_that_comes_and_goes_between_layers_compiled_alone(dynamo):
    """No layer gets the graph of another."""
    model = build().double()
    intact, want = logits(model), logits(by_hand(model, [(1, 2)]))
    each_layer(model)
    with fastheads.ablate(model, [(1, 2)]):
        torch.testing.assert_close(logits(model), want)
        with fastheads.HookManager(model):
            torch.testing.assert_close(logits(model), want)
        torch.testing.assert_close(logits(model), want)
    with fastheads.HookManager(model):
        torch.testing.assert_close(logits(model), intact)
        with fastheads.ablate(model, [(1, 2)]):
            torch.testing.assert_close(logits(model), want)
        torch.testing.assert_close(logits(model), intact)
    torch.testing.assert_close(logits(model), intact)


def test_another_set_of_heads_in_the_same_layers_uses_the_graph_again(dynamo):
    model = build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for head in range(4):
        with fastheads.ablate(model, [(layer, head) for layer in range(3)]):
            logits(compiled)
    assert dynamo["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("how", [None, in_place])
def test_generate(how, dynamo):
    model = build()
    arguments = dict(
        input_ids=tokens(2, 6),
        attention_mask=LEFT,
        max_new_tokens=5 if how is None else 2,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    scores = dict(arguments, return_dict_in_generate=True, output_scores=True)
    want = by_hand(model, HEADS).generate(**scores)
    intact = model.generate(**arguments)
    compiled = model if how is None else how(model)
    with fastheads.ablate(model, HEADS):
        got = compiled.generate(**scores)
    assert torch.equal(got.sequences, want.sequences)
    for one, two in zip(got.scores, want.scores, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert torch.equal(compiled.generate(**arguments), intact)


# ---------------------------------------------------------------- nesting, exceptions, copies


def test_nested():
    model = build().double()
    outer, inner = [(0, 1), (1, 1)], [(1, 2), (2, 0)]
    intact = logits(model)
    with fastheads.ablate(model, outer):
        with fastheads.ablate(model, inner):
            torch.testing.assert_close(logits(model), logits(by_hand(model, outer + inner)))
        torch.testing.assert_close(logits(model), logits(by_hand(model, outer)))
    assert torch.equal(logits(model), intact)


def test_where_nested_contexts_name_one_head_the_last_decides():
    model = build().double()
    profile = drawn_profile(model)
    by_zero, by_mean = logits(by_hand(model, HEADS)), logits(by_hand(model, HEADS, profile))
    zero, mean = fastheads.ablate(model, HEADS), fastheads.ablate(model, HEADS, "mean", means=profile)
    with zero, mean:
        torch.testing.assert_close(logits(model), by_mean)
    with mean, zero:
        torch.testing.assert_close(logits(model), by_zero)


def test_left_in_another_order():
    model = build().double()
    one, two = fastheads.ablate(model, [(0, 1)]), fastheads.ablate(model, [(0, 2)])
    hooks = fastheads.HookManager(model)
    one.__enter__()
    two.__enter__()
    hooks.remove()
    one.__exit__(None, None, None)
    torch.testing.assert_close(logits(model), logits(by_hand(model, [(0, 2)])))
    two.__exit__(None, None, None)
    assert not left_on(model)


def test_a_context_may_be_entered_again_but_not_twice():
    model = build()
    ablation = fastheads.ablate(model, HEADS)
    with ablation:
        want = logits(model)
        with pytest.raises(OptionError, match="entered already"):
            ablation.__enter__()
        assert torch.equal(logits(model), want)
    with ablation:
        assert torch.equal(logits(model), want)
    assert not left_on(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_after_an_exception(error):
    model = build()
    intact, kinds = logits(model), [type(m) for m in model.modules()]
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(error), fastheads.ablate(model, HEADS):
        logits(model)
    handle.remove()
    assert torch.equal(logits(model), intact)
    assert [type(m) for m in model.modules()] == kinds
    assert not left_on(model)
    assert not any(m._forward_pre_hooks or m._forward_pre_hooks_with_kwargs for m in model.modules())


def test_nothing_is_left_where_entering_fails(monkeypatch):
    model = build()
    ablation = fastheads.ablate(model, HEADS)
    monkeypatch.setattr("fastheads.intervene.gates.RetraceHandle", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError), ablation:
        pass
    assert not left_on(model)


def test_a_copy_made_inside_is_intact():
    model = build()
    intact = logits(model)
    with fastheads.ablate(model, HEADS):
        copied = copy.deepcopy(model)
        state = copy.deepcopy(model.state_dict())
        assert not any("fastheads" in key for key in state)
    assert torch.equal(logits(copied), intact)


def test_the_model_is_not_kept_alive():
    model = build()
    with fastheads.ablate(model, HEADS):
        logits(model)
    seen = [site.module for site in fastheads.find_sites(model)]
    seen = [weakref.ref(module) for module in seen]
    del model
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_wrappers_are_looked_through():
    model = build()
    with fastheads.ablate(nn.DataParallel(model), HEADS):
        got = logits(model)
    with fastheads.ablate(torch.compile(model, backend="eager"), HEADS):
        assert torch.equal(logits(model), got)


# ---------------------------------------------------------------- rows of a batch


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "xlm"])
def test_rows_with_heads_of_their_own(family, mode):
    model = families.build(family).double()
    profile = drawn_profile(model) if mode == "mean" else None
    ablator = Ablator(model, mode, profile)
    sets = [[], [(0, 1), (2, 0)], [(2, 3)], [(1, 0), (0, 1)]]
    batch = families.batch(family, [[1] * 5] * 4)
    assert ablator.takes_rows
    with ablator.ablate_rows(sets):
        got = logits(model, batch)
    for row, heads in enumerate(sets):
        alone = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with ablator.ablate(heads):
            torch.testing.assert_close(got[row : row + 1], logits(model, alone), rtol=0, atol=1e-10)
    assert not left_on(model)


def test_rows_of_another_number_are_refused():
    model = build()
    with Ablator(model).ablate_rows([[(0, 1)], []]), pytest.raises(ForwardError, match="has not 2 rows"):
        model(input_ids=tokens(3, 4))
    assert not left_on(model)


def test_rows_of_an_unknown_layout_are_refused():
    model = build()
    kind = type(model.model.layers[0].self_attn)
    model.model.layers[0].self_attn.forward = kind.forward.__get__(model.model.layers[0].self_attn)
    ablator = Ablator(model)
    assert not ablator.takes_rows
    with pytest.raises(OptionError, match="unknown which dimension"):
        ablator.ablate_rows([[(0, 1)], []])


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("heads", "says"),
    [
        ([(3, 0)], "no layer 3 to ablate head 0 of: the model has 3 layers with heads, 0 to 2"),
        ([(-1, 0)], "no layer -1"),
        ([(0, 4)], "no head 4 in layer 0, which has the heads 0 to 3"),
        ([(0, -1)], "no head -1 in layer 0"),
        ([(0, 1.0)], r"pairs \(layer, head\) of whole numbers, not \(0, 1.0\)"),
        ([(0, True)], "whole numbers"),
        ([0, 1], "whole numbers, not 0"),
        ([(0, 1, 2)], "whole numbers, not"),
        ("12", "heads must be pairs"),
        ({0: 1}, "heads must be pairs"),
        (5, "heads must be pairs"),
    ],
)
def test_heads_that_are_not_there(heads, says):
    model = build()
    with pytest.raises(OptionError, match=says) as raised:
        fastheads.ablate(model, heads)
    assert "\n" not in str(raised.value)
    assert not left_on(model)


def test_modes_and_means_that_do_not_fit():
    model = build()
    profile = drawn_profile(model)
    with pytest.raises(OptionError, match="unknown mode 'max': choose one of zero, mean"):
        fastheads.ablate(model, HEADS, "max")
    with pytest.raises(OptionError, match="needs means="):
        fastheads.ablate(model, HEADS, "mean")
    with pytest.raises(OptionError, match="means= is for mode 'mean'"):
        fastheads.ablate(model, HEADS, means=profile)
    with pytest.raises(OptionError, match="means must be a HeadProfile, not str"):
        fastheads.ablate(model, HEADS, "mean", means="profile.safetensors")
    with pytest.raises(ResultsError, match=r"no mean vectors: profile with vectors=True"):
        fastheads.ablate(model, HEADS, "mean", means=drawn_profile(model, vectors=False))
    with pytest.raises(ResultsError, match="head 3 of layer 2 has no mean vector"):
        fastheads.ablate(model, HEADS, "mean", means=drawn_profile(model, unmeasured=[(2, 3)]))
    fastheads.ablate(model, [(2, 0)], "mean", means=drawn_profile(model, unmeasured=[(2, 3)]))


def test_means_of_other_weights_are_refused():
    profile = drawn_profile(build(seed=1))
    with pytest.raises(ResultsError, match="not of these weights"):
        fastheads.ablate(build(), HEADS, "mean", means=profile)
    with pytest.raises(ResultsError, match="another model"):
        fastheads.ablate(build(num_hidden_layers=2), [(0, 0)], "mean", means=profile)


def test_the_profile_is_not_changed():
    model = build()
    profile = drawn_profile(model)
    before = profile.vectors.mean.copy()
    with fastheads.ablate(model, HEADS, "mean", means=profile):
        logits(model)
    np.testing.assert_array_equal(profile.vectors.mean, before)


def test_two_projections_in_a_layer_are_ambiguous():
    model = build()
    model.model.layers[1].self_attn.layer_idx = 0
    with pytest.raises(OptionError, match="several output projections"):
        fastheads.ablate(model, [(0, 0)])


def test_pickling_a_model_inside_saves_none_of_it():
    model = build()
    with fastheads.ablate(model, HEADS):
        content = pickle.dumps(model.model.layers[0].self_attn.o_proj)
    assert b"fastheads" not in content or pickle.load(io.BytesIO(content))(torch.zeros(1, 96)).shape == (
        1,
        64,
    )
