"""Inputs kept for one launch: the same numbers, within the budget, and no hazard unseen."""

import gc
import weakref

import pytest
import torch
from oracle import WITHOUT_RATIO, assert_results, captured_inputs, equal_results
from tiny_models import build, tokens

import fastheads
from fastheads.capture.queue import CPU_KEEP_BYTES

ONE = 2 * 6 * 96 * 4  # bytes of an input


def watched(model, hooks):
    """The launches so far and the inputs held (in bytes of one), behind each projection and at the end of the forward."""
    seen = []

    def look(*_):
        seen.append((hooks.stats.launches, hooks.stats.kept_bytes / ONE))

    for module in {id(site.module): site.module for site in hooks.sites}.values():
        module.register_forward_hook(look)
    model.register_forward_hook(look)
    return seen


# What `watched` sees of three layers in a first forward: kept until one launch at the end; measured at once.
TOGETHER = [(0, 1), (0, 2), (0, 3), (1, 0)]
AT_ONCE = [(1, 0), (2, 0), (3, 0), (3, 0)]


def profiled(model, token_agg="all", forwards=2, seq=6, **options):
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg, metrics=WITHOUT_RATIO, **options) as hooks,
        torch.no_grad(),
    ):
        seen = watched(model, hooks)
        for i in range(forwards):
            model(input_ids=tokens(2, seq, seed=i))
        return hooks.get_results(), sites, inputs, seen


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", ["factored", "einsum", "loop"])
def test_small_inputs_are_measured_together_with_the_same_numbers(backend, token_agg):
    together, sites, inputs, seen = profiled(build(), token_agg, backend=backend)
    # Those without factors read the weight: at once, or a hook of others could change it before.
    first = TOGETHER if backend == "factored" else AT_ONCE
    assert seen == first + [(first[-1][0] + launches, held) for launches, held in first]
    at_once, _, _, seen = profiled(build(), token_agg, backend=backend, group_bytes=0)
    assert seen == AT_ONCE + [(3 + launches, held) for launches, held in AT_ONCE]
    assert_results(together, sites, inputs, [None] * 2, token_agg, 5e-6)
    for metric, stats in at_once.items():
        if metric != "metadata":
            for stat, value in stats.items():
                torch.testing.assert_close(together[metric][stat], value, rtol=2e-6, atol=1e-9)


def test_the_budget_bounds_what_is_kept():
    *_, seen = profiled(build(), forwards=1, group_bytes=2 * ONE)
    assert seen == [(0, 1), (0, 2), (1, 1), (2, 0)]
    *_, seen = profiled(build(), forwards=1, group_bytes=ONE - 1)
    assert seen == AT_ONCE


def test_large_inputs_on_a_cpu_are_measured_at_once():
    seq = CPU_KEEP_BYTES // (2 * 96 * 4) + 1
    *_, seen = profiled(build(max_position_embeddings=4096), forwards=1, seq=seq)
    assert seen == AT_ONCE


def test_ragged_layers_make_groups_of_their_own():
    model = build()
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(64, 2 * 24, bias=False)
    attention.o_proj = torch.nn.Linear(2 * 24, 64, bias=False)
    attention.num_key_value_groups = 1
    results, sites, inputs, seen = profiled(model, forwards=1)
    assert seen == [(0, 1), (0, 1.5), (0, 2.5), (2, 0)]
    assert_results(results, sites, inputs, [None], "all", 5e-6)


def test_a_looped_layer_is_merged_firing_by_firing():
    model = build()
    model.model.layers.extend([model.model.layers[0], model.model.layers[2]])
    model.config.num_hidden_layers = 5
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all", metrics=WITHOUT_RATIO) as hooks,
    ):
        seen = watched(model, hooks)
        with torch.no_grad():
            model(input_ids=tokens(2, 6), use_cache=False)
        results = hooks.get_results()
    assert seen == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (2, 0)]  # the second launch: what came again
    flat = [[torch.cat(x)] for x in inputs]
    assert_results(results, sites, flat, [None], "all", 5e-6)


def overwrite(model, layer, how):
    def hook(_module, args, _output):
        with torch.no_grad():
            how(args[0])

    return model.model.layers[layer].self_attn.o_proj.register_forward_hook(hook)


def test_a_kept_input_that_is_modified_in_place_is_an_error():
    model = build()
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        handle = overwrite(model, 1, lambda x: x.zero_())
        with pytest.raises(
            RuntimeError, match=r"layers\.1\.self_attn\.o_proj was modified in place.*group_bytes=0"
        ):
            model(input_ids=tokens(2, 6))
        handle.remove()
        model(input_ids=tokens(2, 6))
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()
    # measured at once it does no harm
    with fastheads.HookManager(model, group_bytes=0) as hooks, torch.no_grad():
        overwrite(model, 1, lambda x: x.zero_())
        model(input_ids=tokens(2, 6))
        assert (hooks.get_results()["head_output_norm"]["mean"][1] > 0).all()


def share_a_workspace(model):
    workspace = torch.empty(2, 6, 96)

    def use_workspace(_module, args):
        workspace.data.copy_(args[0])  # as a foreign kernel writes: no version moves
        return (workspace.detach(),)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_pre_hook(use_workspace)
    return model


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_workspace_that_layers_share_is_an_error(mode):
    model = share_a_workspace(build())
    with fastheads.HookManager(model), mode(), pytest.raises(RuntimeError, match="reuses its memory"):
        model(input_ids=tokens(2, 6))
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all", group_bytes=0) as hooks,
        mode(),
    ):
        model(input_ids=tokens(2, 6))
    assert_results(hooks.get_results(), sites, inputs, [None], "all", 5e-6)


class Saved:
    """A tensor that autograd saves: it lives as long as the graph that holds it."""

    def __init__(self, tensor):
        self.tensor = tensor.detach()  # or it would hold the graph itself


def test_the_graph_of_autograd_is_not_held():
    """Layer 0's input is kept until the end of the forward, and the user lets go of the layer's graph before that."""
    model = build().train()
    saved = []

    def save(tensor):
        kept = Saved(tensor)
        saved.append(weakref.ref(kept))
        return kept

    alive, before = [], []
    first, second = model.model.layers[:2]
    first.register_forward_pre_hook(lambda *_: before.append(len(saved)))
    first.register_forward_hook(lambda _module, _args, output: output.detach())
    with fastheads.HookManager(model) as hooks:

        def look(*_):
            gc.collect()
            of_layer = saved[before[0] :]
            alive.append((hooks.stats.kept_bytes, len(of_layer), sum(ref() is not None for ref in of_layer)))

        second.register_forward_pre_hook(look)
        ids = tokens(2, 6)
        with torch.autograd.graph.saved_tensors_hooks(save, lambda kept: kept.tensor):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        assert hooks.stats.kept_bytes == 0
        loss.backward()
    ((held, number, left),) = alive
    assert held == ONE + 2 * 6 * 64 * 4  # and the residual stream
    assert number > 10 and left == 0


def test_a_site_that_does_not_run_is_an_error_that_names_it():
    model = build()
    layer = model.model.layers[1]
    forward = layer.forward
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        model(input_ids=tokens(2, 6))
        layer.forward = lambda hidden, **_: hidden  # skipped
        model(input_ids=tokens(2, 6))
        with pytest.raises(
            RuntimeError, match=r"^model\.layers\.1\.self_attn\.o_proj did not run in every forward"
        ):
            hooks.get_results()
        layer.forward = forward
        hooks.reset()
        model(input_ids=tokens(2, 6))
        hooks.get_results()
    layer.forward = lambda hidden, **_: hidden
    with fastheads.HookManager(model, allow_skipped=True) as hooks, torch.no_grad():
        model(input_ids=tokens(2, 6))
        assert hooks.get_results()["head_output_norm"]["count"][:, 0].tolist() == [2, 0, 2]
    with fastheads.HookManager(model, layers=[0, 2]) as hooks, torch.no_grad():
        model(input_ids=tokens(2, 6))
        assert hooks.get_results()["head_output_norm"]["count"][:, 0].tolist() == [2, 0, 2]


def test_func_transforms_and_replicas_are_refused():
    model = build()
    with fastheads.HookManager(model), torch.no_grad():
        with pytest.raises(RuntimeError, match=r"torch\.func"):
            torch.func.vmap(lambda ids: model(input_ids=ids[None]).logits)(tokens(2, 6))
        replica = model._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="DataParallel"):
            replica(input_ids=tokens(2, 6))


def test_a_decoder_that_is_called_several_times_in_one_forward():
    class TwoCalls(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = build()

        def get_decoder(self):
            return self.inner.model

        def forward(self, a, b):
            return self.inner.model(a, use_cache=False), self.inner.model(b, use_cache=False)

    model = TwoCalls()
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all") as hooks,
        torch.no_grad(),
    ):
        model(tokens(2, 6), tokens(3, 4))
        with pytest.raises(IndexError):
            model(tokens(2, 6), torch.tensor([[10**6]]))  # the first call's samples go with the second's
        results = hooks.get_results()
    two = [x[:2] for x in inputs]
    assert_results(results, sites, two, [None] * 2, "all", 5e-6)


def test_results_stand_still_after_remove():
    """Code that was compiled with the hooks holds the memory of the moments, and may write to it whenever it is run."""
    model = build()
    given = []

    def backend(graph, _inputs):
        def run(*args):
            given.extend(x for x in args if isinstance(x, torch.Tensor) and x.dtype == torch.float64)
            return graph(*args)

        return run

    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: model(input_ids=ids), backend=backend)  # the hooks of the model too
    hooks = fastheads.HookManager(model, "all")
    with torch.no_grad():
        compiled(tokens(2, 6))
    want = hooks.get_results()
    assert given  # the model computes in float32
    hooks.remove()
    for memory in given:  # as a replay of a CUDA graph would
        memory.fill_(7.0)
    assert equal_results(hooks.get_results(), want)
    torch._dynamo.reset()
