"""`head_residual_ratio` and its square: by the oracle, in every way that an input is measured."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from oracle import RATIO_METRICS, WITHOUT_RATIO, dense_norms, statistics
from tiny_models import build, tokens

import fastheads
from fastheads.basic import HookManager as BasicHookManager
from fastheads.errors import ForwardError

MASKS = [torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1] * 7]), None]


def keeping(kept):
    """A pre-hook that keeps a module's first argument."""
    return lambda _module, args: kept.append(args[0].detach().double().cpu().clone())


class Seen:
    """The inputs of the projections and of the layers, in float64, as hooks of its own see them."""

    def __init__(self, model):
        self.inputs, self.streams, self.outputs, self.handles = [], [], [], []
        for site, layer in zip(fastheads.find_sites(model), model.model.layers, strict=True):
            inputs, streams, outputs = [], [], []
            self.inputs.append(inputs)
            self.streams.append(streams)
            self.outputs.append(outputs)
            self.handles += [
                site.module.register_forward_pre_hook(keeping(inputs)),
                layer.register_forward_pre_hook(keeping(streams)),
                site.module.register_forward_hook(
                    lambda _m, _a, out, kept=outputs: kept.append(out.detach().double().cpu().clone())
                ),
            ]

    def close(self):
        for handle in self.handles:
            handle.remove()


def expected(model, seen, masks, token_agg, skip_first=0):
    """By row, the statistics of the ratio and of its square."""
    found = []
    for row, site in enumerate(fastheads.find_sites(model)):
        values = []
        for x, r, out, mask in zip(
            seen.inputs[row], seen.streams[row], seen.outputs[row], masks, strict=True
        ):
            weight = site.module.weight.detach().double().cpu()
            norm = getattr(model.model.layers[row], "post_feedforward_layernorm", None)
            scale = torch.ones(x.shape[:2], dtype=torch.float64)
            if norm is not None:  # Gemma 2: an RMS norm of gain 1 + w is on the branch
                norm = model.model.layers[row].post_attention_layernorm
                weight = (1 + norm.weight.detach().double().cpu())[:, None] * weight
                scale = (out.square().mean(-1) + norm.eps).rsqrt()
            _, contribution = dense_norms(x, weight, site.num_heads)
            ratio = contribution * scale.numpy()[..., None] / r.norm(dim=-1).numpy()[..., None]
            for b in range(len(ratio)):
                valid = [s for s in range(ratio.shape[1]) if mask is None or mask[b][s]][skip_first:]
                of_tokens = np.stack([ratio[b, valid], ratio[b, valid] ** 2])  # [2, tokens, heads]
                reduced = {
                    "last": of_tokens[:, -1:],
                    "all": of_tokens.mean(1, keepdims=True),
                    "token": of_tokens,
                }
                values.append(reduced[token_agg])
        found.append([statistics(each) for each in np.concatenate(values, axis=1)])
    return found


def check(results, want, rtol):
    for row, of_row in enumerate(want):
        for name, stats in zip(RATIO_METRICS, of_row, strict=True):
            for stat in ("mean", "min", "max", "count", "nonfinite"):
                got = results[name][stat][row].numpy()
                np.testing.assert_allclose(got, stats[stat], rtol=rtol, err_msg=f"{name} {stat} {row}")


def profiled(model, token_agg, *, called=None, manager=fastheads.HookManager, mode=torch.no_grad, **options):
    called = model if called is None else called
    seen = Seen(model)
    with manager(model, token_agg, **options) as hooks, mode():
        for i, mask in enumerate(MASKS):
            called(input_ids=tokens(3, 7, seed=i), attention_mask=mask, use_cache=False)
        results = hooks.get_results()
    seen.close()
    return results, seen


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", ["loop", "einsum", "factored"])
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_it_is_the_update_over_the_stream(kind, backend, token_agg):
    model = build(kind)
    results, seen = profiled(model, token_agg, backend=backend)
    check(results, expected(model, seen, MASKS, token_agg), 2e-5)


@pytest.mark.parametrize(
    "options", [{"group_bytes": 0}, {"group_bytes": 9000}, {"skip_first": 1}, {"kv_groups": True}]
)
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_however_inputs_are_kept(kind, options):
    model = build(kind)
    results, seen = profiled(model, "all", **options)
    check(results, expected(model, seen, MASKS, "all", options.get("skip_first", 0)), 2e-5)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
def test_in_every_gradient_mode(mode):
    model = build()
    results, seen = profiled(model, "all", mode=mode)
    check(results, expected(model, seen, MASKS, "all"), 2e-5)


def test_the_basic_manager_has_the_same_numbers():
    model = build()
    results, seen = profiled(model, "all", manager=BasicHookManager)
    check(results, expected(model, seen, MASKS, "all"), 1e-10)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("compiling", ["model", "decoder", "layers"])
def test_in_compiled_code(kind, compiling):
    torch._dynamo.reset()
    model = build(kind)
    twin = build(kind)
    twin.load_state_dict(model.state_dict())
    _, seen = profiled(twin, "all")
    called = model
    if compiling == "model":
        called = torch.compile(model, backend="aot_eager")
    elif compiling == "decoder":
        model.model.compile(backend="aot_eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="aot_eager")
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        for i, mask in enumerate(MASKS):
            called(input_ids=tokens(3, 7, seed=i), attention_mask=mask, use_cache=False)
        results = hooks.get_results()
    check(results, expected(twin, seen, MASKS, "all"), 2e-5)
    torch._dynamo.reset()


def test_hooks_of_others_on_the_layer_come_before_whenever_they_were_registered():
    model = build()
    seen = Seen(model)
    for handle in seen.handles:
        handle.remove()
    layer = model.model.layers[1]
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        handle = layer.register_forward_pre_hook(lambda _m, args: (3 * args[0], *args[1:]))
        seen = Seen(model)
        model(input_ids=tokens(3, 7), use_cache=False)
        results = hooks.get_results()
    handle.remove()
    seen.close()
    check(results, expected(model, seen, [None], "all"), 2e-5)


def test_a_forward_that_was_replaced_since_is_followed():
    model = build()
    layer = model.model.layers[1]
    original = layer.forward
    seen = Seen(model)
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        layer.forward = original  # not the one with the tap
        for i in range(2):
            model(input_ids=tokens(3, 7, seed=i), use_cache=False)
        results = hooks.get_results()
        del layer.forward
    seen.close()
    check(results, expected(model, seen, [None] * 2, "all"), 2e-5)
    assert not layer._forward_pre_hooks


def test_a_stream_that_is_zero_makes_the_sample_nonfinite():
    model = build()
    model.model.embed_tokens.weight.data[5] = 0
    with fastheads.HookManager(model, "token") as hooks, torch.no_grad(), nullcontext():
        model(input_ids=torch.tensor([[3, 5, 4]]), use_cache=False)
        results = hooks.get_results()
    assert results["head_residual_ratio"]["nonfinite"][0].tolist() == [1] * 4
    assert results["head_residual_ratio"]["count"][0].tolist() == [2] * 4
    assert results["head_output_norm"]["nonfinite"].sum() == 0


def test_an_input_without_its_stream_is_refused_by_name():
    model = build()

    def without_tap(self, *args, **kwargs):
        return type(self).__mro__[1].forward(self, *args, **kwargs)

    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        other = model.model.layers[0].forward.__func__
        type(model.model.layers[0]).forward = without_tap
        with pytest.raises(ForwardError, match=r"layers\.0.*without .* leave head_residual_ratio out"):
            model(input_ids=tokens(3, 7), use_cache=False)
        type(model.model.layers[0]).forward = other
        hooks.reset()
        model(input_ids=tokens(3, 7), use_cache=False)
        assert (hooks.get_results()["head_residual_ratio"]["count"] == 3).all()


def test_left_out_it_costs_nothing_and_is_not_in_the_results():
    model = build()
    with fastheads.HookManager(model, "all", metrics=WITHOUT_RATIO) as hooks, torch.no_grad():
        assert all("_fastheads_taps" not in vars(layer) for layer in model.model.layers)
        model(input_ids=tokens(3, 7), use_cache=False)
        assert set(hooks.get_results()) == {*WITHOUT_RATIO, "metadata"}


def test_a_layer_whose_stream_is_not_known_has_no_samples_and_a_reason():
    model = build()

    class Halved(type(model.model.layers[1])):
        def forward(self, hidden_states, **kwargs):
            return super().forward(hidden_states, **kwargs) / 2

    model.model.layers[1].__class__ = Halved
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        model(input_ids=tokens(3, 7), use_cache=False)
        results = hooks.get_results()
    assert results["head_residual_ratio"]["count"][:, 0].tolist() == [3, 0, 3]
    assert torch.isnan(results["head_residual_ratio"]["mean"][1]).all()
    assert "Halved" in results["metadata"]["residual_stream"][1]
