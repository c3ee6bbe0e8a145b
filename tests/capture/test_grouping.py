"""Inputs kept for one launch: the same numbers, within the budget, and no hazard unseen."""

import pytest
import torch
from oracle import assert_results, captured_inputs, equal_results
from tiny_models import build, tokens

import fastheads
from fastheads.backends.accumulator import Accumulator
from fastheads.capture.queue import CPU_KEEP_BYTES


@pytest.fixture
def groups(monkeypatch):
    """The rows of each group that was recorded."""
    seen = []
    record = Accumulator.record

    def spy(self, rows, inputs, real, moments, **options):
        seen.append(list(rows))
        record(self, rows, inputs, real, moments, **options)

    monkeypatch.setattr(Accumulator, "record", spy)
    return seen


def profiled(model, token_agg="all", forwards=2, seq=6, **options):
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg, **options) as hooks,
        torch.no_grad(),
    ):
        for i in range(forwards):
            model(input_ids=tokens(2, seq, seed=i))
        return hooks.get_results(), sites, inputs


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", ["factored", "einsum", "loop"])
def test_small_inputs_are_measured_together_with_the_same_numbers(groups, backend, token_agg):
    together, sites, inputs = profiled(build(), token_agg, backend=backend)
    # Those without factors read the weight: at once, or a hook of others could change it before.
    assert groups == ([[0, 1, 2]] if backend == "factored" else [[0], [1], [2]]) * 2
    groups.clear()
    at_once, _, _ = profiled(build(), token_agg, backend=backend, group_bytes=0)
    assert groups == [[0], [1], [2]] * 2
    assert_results(together, sites, inputs, [None] * 2, token_agg, 5e-6)
    for metric, stats in at_once.items():
        if metric != "metadata":
            for stat, value in stats.items():
                torch.testing.assert_close(together[metric][stat], value, rtol=2e-6, atol=1e-9)


def test_the_budget_bounds_what_is_kept(groups):
    one = 2 * 6 * 96 * 4  # bytes of an input
    profiled(build(), forwards=1, group_bytes=2 * one)
    assert groups == [[0, 1], [2]]
    groups.clear()
    profiled(build(), forwards=1, group_bytes=one - 1)
    assert groups == [[0], [1], [2]]


def test_large_inputs_on_a_cpu_are_measured_at_once(groups):
    seq = CPU_KEEP_BYTES // (2 * 96 * 4) + 1
    profiled(build(max_position_embeddings=4096), forwards=1, seq=seq)
    assert groups == [[0], [1], [2]]


def test_ragged_layers_make_groups_of_their_own(groups):
    model = build()
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(64, 2 * 24, bias=False)
    attention.o_proj = torch.nn.Linear(2 * 24, 64, bias=False)
    attention.num_key_value_groups = 1
    results, sites, inputs = profiled(model, forwards=1)
    assert groups == [[0, 2], [1]]
    assert_results(results, sites, inputs, [None], "all", 5e-6)


def test_a_looped_layer_is_merged_firing_by_firing(groups):
    model = build()
    model.model.layers.extend([model.model.layers[0], model.model.layers[2]])
    model.config.num_hidden_layers = 5
    sites = fastheads.find_sites(model)
    with captured_inputs([s.module for s in sites]) as inputs, fastheads.HookManager(model, "all") as hooks:
        with torch.no_grad():
            model(input_ids=tokens(2, 6), use_cache=False)
        results = hooks.get_results()
    assert groups == [[0, 1, 2], [0, 2]]
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


def test_the_graph_of_autograd_is_not_held():
    model = build().train()
    ids = tokens(2, 6)
    with fastheads.HookManager(model) as hooks:
        seen = []
        record = hooks._record
        hooks._record = lambda forward, queue, rows, inputs, **options: (
            seen.extend(x.requires_grad for x in inputs),
            record(forward, queue, rows, inputs, **options),
        )
        model(input_ids=ids, labels=ids).loss.backward()
    assert seen == [False] * 3
    assert all(not queue.kept for queue in hooks._queues.values())


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
    model = build()
    hooks = fastheads.HookManager(model, "all")
    with torch.no_grad():
        model(input_ids=tokens(2, 6))
    want = hooks.get_results()
    buffers = [b for q in hooks._queues.values() for b in q.moments.buffers()]
    hooks.remove()
    for buffer in buffers:  # what a replay of a captured graph would write
        buffer.fill_(7.0)
    assert equal_results(hooks.get_results(), want)


def test_a_queue_that_is_made_in_a_forward_that_fails_counts_nothing_of_it():
    """A model that was moved: its first inputs come from a device that had no queue."""
    model = build()
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        elsewhere = hooks._queues.pop(torch.device("cpu"))
        elsewhere.device = torch.device("meta")
        elsewhere.index = 7
        handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(input_ids=tokens(2, 6))
        handle.remove()
        model(input_ids=tokens(2, 6))
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()
