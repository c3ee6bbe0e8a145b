"""Forward after forward of one form goes by a short way: the same numbers, and none of the hazards unseen.

On a GPU marked `gpu`; under TRITON_INTERPRET=1 (see test_kernel.py) on the CPU.
"""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.capture.stats import LaunchStats

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = (
    []
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
DEVICE = "cpu" if INTERPRETED else "cuda"
RTOL = 5e-6

pytest.importorskip("fastheads.kernels.launch")


def forward_bytes(batch, seq):
    """Bytes of the inputs of a forward of `model_on_device()`, and as many of the residual streams."""
    return 3 * batch * seq * 64 * 4


def at_once(batch, seq):
    """A `group_bytes` that leaves forwards of that size, and larger ones, no room to wait: each is measured as it ends."""
    return 4 * forward_bytes(batch, seq) - 1


class Launched:
    """What `hooks.stats` counted since it was last asked: (launches made anew, repeated ones)."""

    def __init__(self, hooks):
        self._hooks = hooks
        self.since()

    def since(self):
        stats, before = self._hooks.stats, getattr(self, "_before", (0, 0))
        self._before = stats.launches - stats.repeated, stats.repeated
        return self._before[0] - before[0], self._before[1] - before[1]


NEW, AGAIN, NONE = (1, 0), (0, 1), (0, 0)


def model_on_device(**changes):
    return build(head_dim=16, **changes).to(DEVICE)


def some(batch, seq, seed):
    return tokens(batch, seq, seed=seed).to(DEVICE)


@pytest.mark.parametrize(("token_agg", "skip_first"), [("all", 0), ("all", 2), ("last", 0)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_taken_from_the_second_forward_on_with_the_same_numbers(token_agg, skip_first, mode):
    model = model_on_device()
    sites = fastheads.find_sites(model)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=DEVICE)
    masks = []
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(
            model, token_agg, backend="triton", skip_first=skip_first, group_bytes=at_once(1, 5)
        ) as hooks,
        mode(),
    ):
        launched, seen = Launched(hooks), []
        for shape, attention_mask in [((2, 6), None)] * 3 + [((2, 6), mask)] * 2 + [((1, 5), None)] * 2:
            ids = some(*shape, len(masks))
            model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            masks.append(None if attention_mask is None else attention_mask.cpu().numpy())
            seen.append(launched.since())
        results = hooks.get_results()
    # Another form is launched anew, and then remembered.
    assert seen == [NEW, AGAIN, AGAIN, NEW, AGAIN, NEW, AGAIN]
    assert_results(results, sites, inputs, masks, token_agg, RTOL, skip_first)


@pytest.mark.parametrize("token_agg", ["all", "last"])
def test_more_layers_than_one_launch_of_the_kernel_takes_are_measured_and_repeated(token_agg):
    """It takes 32."""
    model = model_on_device(num_hidden_layers=34, num_attention_heads=1, num_key_value_heads=1)
    sites = fastheads.find_sites(model)
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4], device=DEVICE)
    masks, one = [None] * 2 + [mask] * 2, 2 * 6 * (16 + 64) * 4  # of a layer's input and stream
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        # room for one forward and not for four
        fastheads.HookManager(model, token_agg, backend="triton", group_bytes=34 * one) as hooks,
        torch.no_grad(),
    ):
        launched, seen = Launched(hooks), []
        for i, attention_mask in enumerate(masks):
            model(input_ids=some(2, 6, i), attention_mask=attention_mask, use_cache=False)
            seen.append(launched.since())
        results = hooks.get_results()
    assert seen == [NEW, AGAIN, NEW, AGAIN]
    masks = [None if m is None else m.cpu().numpy() for m in masks]
    assert_results(results, sites, inputs, masks, token_agg, RTOL)


def test_updates_behind_a_norm_are_measured_beside_repeated_launches():
    found = []
    for group_bytes in (0, 2**26):
        model = build("gemma2", head_dim=16).to(DEVICE)
        with (
            fastheads.HookManager(model, "all", backend="triton", group_bytes=group_bytes) as hooks,
            torch.no_grad(),
        ):
            launched, seen = Launched(hooks), []
            for i in range(3):
                model(input_ids=some(2, 6, i), use_cache=False)
                seen.append(launched.since())
            found.append(hooks.get_results())
    assert seen == [(2, 0), (0, 2), (0, 2)]  # the updates by a launch of their own
    for metric in set(found[0]) - {"metadata"}:
        for statistic in ("count", "mean", "max"):
            want, got = (results[metric][statistic] for results in found)
            torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    assert (found[1]["head_residual_update_norm"]["count"] == 6).all()


def test_a_weight_that_changes_in_between_is_followed():
    model = model_on_device()
    first = fastheads.find_sites(model)[0]
    with (
        fastheads.HookManager(model, backend="triton", group_bytes=at_once(2, 6)) as hooks,
        torch.no_grad(),
    ):
        launched = Launched(hooks)
        for _ in range(3):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert launched.since() == (1, 2)
        before = hooks.get_results()["head_residual_contribution_norm"]["mean"][0]
        first.module.weight.mul_(2.0)
        hooks.reset()
        launched = Launched(hooks)
        for _ in range(3):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert launched.since() == (0, 3)  # the factor was rewritten where it lay
        after = hooks.get_results()["head_residual_contribution_norm"]["mean"][0]
        first.module.weight.mul_(2.0)
        for _ in range(3):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert launched.since() == (0, 3)
        mixed = hooks.get_results()["head_residual_contribution_norm"]["mean"][0]
    torch.testing.assert_close(after, 2 * before, rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed, 3 * before, rtol=1e-6, atol=0)


def test_a_change_behind_autograds_back_is_found_after_repeats():
    model = model_on_device()
    first = fastheads.find_sites(model)[0]
    with (
        fastheads.HookManager(model, backend="triton", group_bytes=at_once(2, 6)) as hooks,
        torch.no_grad(),
    ):
        for _ in range(3):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert hooks.stats.repeated == 2
        hooks.get_results()
        first.module.weight.data.mul_(2.0)
        model(input_ids=some(2, 6, 0), use_cache=False)
        with pytest.raises(RuntimeError, match="behind autograd's back"):
            hooks.get_results()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_workspace_that_layers_come_to_share_is_an_error(mode):
    model = model_on_device()
    workspace = torch.empty(2, 6, 64, device=DEVICE)

    def use_workspace(_module, args):
        workspace.data.copy_(args[0])
        return (workspace.detach(),)

    with fastheads.HookManager(model, backend="triton", group_bytes=at_once(2, 6)) as hooks, mode():
        launched = Launched(hooks)
        for _ in range(2):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert launched.since() == (1, 1)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(use_workspace)
        with pytest.raises(RuntimeError, match="reuses its memory"):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert (hooks.get_results()["head_output_norm"]["count"] == 4).all()
        assert launched.since() == NONE


def test_an_input_that_is_modified_in_place_is_an_error():
    model = model_on_device()
    with (
        fastheads.HookManager(model, backend="triton", group_bytes=at_once(2, 6)) as hooks,
        torch.no_grad(),
    ):
        launched = Launched(hooks)
        for _ in range(2):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert launched.since() == (1, 1)
        model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _m, args, _o: args[0].zero_())
        with pytest.raises(RuntimeError, match="modified in place"):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert launched.since() == NONE


@pytest.mark.parametrize(("token_agg", "skip_first"), [("all", 0), ("all", 2), ("last", 0)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_forwards_that_ended_wait(token_agg, skip_first, mode):
    model = model_on_device()
    sites = fastheads.find_sites(model)
    shapes = [(2, 6)] * 5 + [(1, 5)] * 4
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg, backend="triton", skip_first=skip_first) as hooks,
        mode(),
    ):
        launched = Launched(hooks)
        for i, shape in enumerate(shapes):
            model(input_ids=some(*shape, i), use_cache=False)
        # The first of each form is measured as it ends.
        assert (launched.since(), hooks.stats.waiting, hooks.stats.deferred) == ((2, 0), 7, 7)
        assert hooks.stats.kept_bytes == 2 * (4 * forward_bytes(2, 6) + 3 * forward_bytes(1, 5))
        results = hooks.get_results()
        assert (launched.since(), hooks.stats.waiting, hooks.stats.deferred) == ((0, 7), 0, 7)
        assert hooks.stats.kept_bytes == 0
    assert_results(results, sites, inputs, [None] * len(shapes), token_agg, RTOL, skip_first)


@pytest.mark.parametrize(("token_agg", "skip_first"), [("all", 0), ("all", 1), ("last", 0)])
@pytest.mark.parametrize("lengths", [[(5, 3), (6, 1), (4, 5), (0, 2), (6, 6)], [(1, 1)] * 3 + [(0, 1)] * 2])
def test_forwards_with_padding_wait_too(token_agg, skip_first, lengths):
    model = model_on_device()
    sites = fastheads.find_sites(model)
    seq = max(max(pair) for pair in lengths)
    masks = [torch.tensor([[1] * n + [0] * (seq - n) for n in pair], device=DEVICE) for pair in lengths]
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg, backend="triton", skip_first=skip_first) as hooks,
        torch.inference_mode(),
    ):
        launched = Launched(hooks)
        for i, mask in enumerate(masks):
            model(input_ids=some(2, seq, i), attention_mask=mask, use_cache=False)
        assert (launched.since(), hooks.stats.waiting) == (NEW, 4)
        results = hooks.get_results()
        assert launched.since() == (0, 4)
    assert_results(results, sites, inputs, [m.cpu().numpy() for m in masks], token_agg, RTOL, skip_first)


def test_the_steps_of_generate_wait_and_a_mask_of_the_callers_own_may_change_after_them():
    model = model_on_device()
    prompt = some(2, 5, 0)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], device=DEVICE)
    told = torch.tensor([[True], [False]], device=DEVICE)
    with fastheads.HookManager(model, "token", backend="triton") as by_token, torch.no_grad():
        model.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
        want = by_token.get_results()["head_output_norm"]
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.no_grad():
        launched = Launched(hooks)
        model.generate(prompt, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
        assert (launched.since(), hooks.stats.waiting) == ((2, 0), 7)  # the prompt and the first step
        assert (hooks.get_results()["head_output_norm"]["count"] == 2 * 9).all()
        assert launched.since() == (0, 7)
        hooks.reset()
        for i in range(4):
            with hooks.token_mask(told):
                model(input_ids=some(2, 1, i), use_cache=False)
        assert hooks.stats.waiting > 0
        told.zero_()
        assert (hooks.get_results()["head_output_norm"]["count"] == 4).all()
    assert (want["count"] == 8 + 2 * 8).all()


def test_what_waits_is_bounded():
    model = model_on_device()
    one = forward_bytes(2, 6)
    with fastheads.HookManager(model, backend="triton", group_bytes=8 * one) as hooks, torch.no_grad():
        launched = Launched(hooks)
        model(input_ids=some(2, 6, 0), use_cache=False)
        assert launched.since() == NEW
        for i in range(1, 8):
            model(input_ids=some(2, 6, i), use_cache=False)
            assert (launched.since(), hooks.stats.waiting, hooks.stats.kept_bytes) == (NONE, i, i * 2 * one)
        model(input_ids=some(2, 6, 8), use_cache=False)
        assert (launched.since(), hooks.stats.waiting, hooks.stats.kept_bytes) == ((0, 8), 0, 0)
        assert (hooks.get_results()["head_output_norm"]["count"] == 18).all()
    with (
        fastheads.HookManager(model, backend="triton", group_bytes=at_once(2, 6)) as hooks,
        torch.no_grad(),
    ):
        launched = Launched(hooks)
        for i in range(4):
            model(input_ids=some(2, 6, i), use_cache=False)
            assert launched.since() == (AGAIN if i else NEW)  # at once: so little room is not worth the wait
        assert (hooks.get_results()["head_output_norm"]["count"] == 8).all()
        assert hooks.stats.deferred == 0


@pytest.mark.parametrize("where", ["layer", "head"])
def test_a_forward_that_fails_does_not_count_and_those_that_wait_do(where):
    model = model_on_device()
    broken = model.model.layers[2].mlp if where == "layer" else model.lm_head
    with fastheads.HookManager(model, backend="triton") as hooks, torch.no_grad():
        for i in range(4):
            model(input_ids=some(2, 6, i), use_cache=False)

        def fail(*_):
            raise torch.OutOfMemoryError("out of memory")

        handle = broken.register_forward_pre_hook(fail)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                model(input_ids=some(2, 6, 9), use_cache=False)
        handle.remove()
        assert (hooks.stats.launches, hooks.stats.waiting) == (1, 3)
        model(input_ids=some(2, 6, 4), use_cache=False)
        assert (hooks.stats.launches, hooks.stats.waiting) == (1, 4)
        results = hooks.get_results()
        assert (results["head_output_norm"]["count"] == 10).all()
        hooks.reset()
        for i in range(5):
            model(input_ids=some(2, 6, i), use_cache=False)
        again = hooks.get_results()
    for metric in ("head_output_norm", "head_residual_contribution_norm"):
        torch.testing.assert_close(results[metric]["mean"], again[metric]["mean"], rtol=1e-12, atol=0)


def test_what_waits_is_measured_with_the_weights_that_it_had():
    model = model_on_device()
    sites = fastheads.find_sites(model)
    with fastheads.HookManager(model, backend="triton") as hooks, torch.no_grad():
        for _ in range(4):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert hooks.stats.waiting == 3
        sites[2].module.weight.mul_(3.0)  # of the last layer: no other's input changes
        for _ in range(4):
            model(input_ids=some(2, 6, 0), use_cache=False)
        mean = hooks.get_results()["head_residual_contribution_norm"]["mean"][2]
        hooks.reset()
        model(input_ids=some(2, 6, 0), use_cache=False)
        after = hooks.get_results()["head_residual_contribution_norm"]["mean"][2]
    torch.testing.assert_close(mean, 2 / 3 * after, rtol=1e-6, atol=0)


def test_nothing_waits_where_a_model_has_its_inputs_in_the_same_memory_each_time():
    model = model_on_device()
    places = [torch.empty(2, 6, 64, device=DEVICE) for _ in range(3)]
    for layer, place in zip(model.model.layers, places, strict=True):

        def use(_module, args, place=place):
            place.data.copy_(args[0])
            return (place.detach(),)

        layer.self_attn.o_proj.register_forward_pre_hook(use)
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, backend="triton") as hooks,
        torch.no_grad(),
    ):
        for i in range(4):
            model(input_ids=some(2, 6, i), use_cache=False)
        assert (hooks.stats.launches, hooks.stats.repeated, hooks.stats.deferred) == (4, 3, 0)
        results = hooks.get_results()
    assert_results(results, sites, inputs, [None] * 4, "last", RTOL)


def test_an_input_that_changes_while_it_waits_is_an_error():
    model = model_on_device()
    held = []
    with fastheads.HookManager(model, backend="triton") as hooks, torch.no_grad():
        for i in range(3):
            model(input_ids=some(2, 6, i), use_cache=False)
        model.model.layers[1].self_attn.o_proj.register_forward_hook(
            lambda _m, args, _o: held.append(args[0])
        )
        model(input_ids=some(2, 6, 3), use_cache=False)
        assert hooks.stats.waiting == 3
        held[0].zero_()
        with pytest.raises(RuntimeError, match="modified in place"):
            hooks.get_results()
        with pytest.raises(RuntimeError, match="3 forwards that had ended: reset"):
            hooks.get_results()
        hooks.reset()
        model(input_ids=some(2, 6, 3), use_cache=False)
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()


def test_detaching_measures_what_waits_and_a_reset_forgets_it():
    model = model_on_device()
    hooks = fastheads.HookManager(model, backend="triton")
    with torch.no_grad():
        for i in range(4):
            model(input_ids=some(2, 6, i), use_cache=False)
        assert hooks.stats == LaunchStats(1, 0, 3, 3, 3 * 2 * forward_bytes(2, 6))
        hooks.reset()
        assert hooks.stats == LaunchStats(0, 0, 0, 0, 0)
        for i in range(3):
            model(input_ids=some(2, 6, i), use_cache=False)
        assert hooks.stats.waiting == 2
    hooks.remove()
    assert hooks.stats == LaunchStats(3, 3, 2, 0, 0)
    assert (hooks.get_results()["head_output_norm"]["count"] == 6).all()


def test_a_change_of_the_inputs_dtype_is_seen_and_weights_that_change_then_are_followed():
    model = model_on_device()
    sites = fastheads.find_sites(model)
    weights = []
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all", backend="triton") as hooks,
        torch.no_grad(),
    ):
        for i in range(4):
            model(input_ids=some(2, 6, i), use_cache=False)
        assert (hooks.stats.launches, hooks.stats.waiting) == (1, 3)
        with torch.autocast(DEVICE, torch.bfloat16):
            model(input_ids=some(2, 6, 4), use_cache=False)
        assert hooks.stats.launches - hooks.stats.repeated == 2
        mean = hooks.get_results()["head_residual_contribution_norm"]["mean"]
        weights = [s.module.weight.clone() for s in sites]
        sites[2].module.weight.mul_(3.0)
        hooks.reset()
        model(input_ids=some(2, 6, 5), use_cache=False)
        after = hooks.get_results()
    first = [layer[:5] for layer in inputs]
    for row, layer in enumerate(first):
        z = torch.cat([x.reshape(2, 6, 4, 16) for x in layer])
        w = weights[row].double().reshape(64, 4, 16)
        want = torch.einsum("bshd,ohd->bsho", z.cpu(), w.cpu()).norm(dim=-1).mean(dim=(0, 1))
        torch.testing.assert_close(mean[row], want, rtol=2e-5, atol=0)
    assert_results(after, sites, [layer[5:] for layer in inputs], [None], "all", RTOL)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_nothing_waits_where_weights_change_every_few_steps(every):
    model = model_on_device()
    weight = fastheads.find_sites(model)[0].module.weight
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.no_grad():
        for i in range(9):
            model(input_ids=some(2, 6, i), use_cache=False)
            if i % every == every - 1:
                weight.mul_(1.01)
        assert (hooks.get_results()["head_output_norm"]["count"] == 18).all()
        # Those before the first change waited, and were measured twice.
        assert hooks.stats.deferred == every - 1
        assert hooks.stats.launches <= 9 + every - 1


@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # on a GPU; exact products are wanted
@pytest.mark.parametrize(("token_agg", "padded"), [("all", False), ("last", True)])
def test_compiled_forwards_repeat_their_launch(token_agg, padded):
    model = model_on_device()
    sites = fastheads.find_sites(model)
    masks = [torch.tensor([[1] * n + [0] * (6 - n), [1] * 6], device=DEVICE) for n in (6, 3, 0, 5)]
    masks = masks if padded else [None] * 4
    with captured_inputs([s.module for s in sites]) as inputs, torch.no_grad():
        for i, mask in enumerate(masks):
            model(input_ids=some(2, 6, i), attention_mask=mask, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True)
    with fastheads.HookManager(model, token_agg, backend="triton") as hooks, torch.no_grad():
        launched, seen = Launched(hooks), []
        for i, mask in enumerate(masks):
            compiled(input_ids=some(2, 6, i), attention_mask=mask, use_cache=False)
            seen.append(launched.since())
        results = hooks.get_results()
    assert seen == [NEW, AGAIN, AGAIN, AGAIN]
    masks = [None if m is None else m.cpu().numpy() for m in masks]
    assert_results(results, sites, inputs, masks, token_agg, RTOL)


def test_eager_forwards_wait_again_after_compiled_ones():
    torch._dynamo.reset()
    model = model_on_device()
    sites = fastheads.find_sites(model)
    batches = [some(2, 6, i) for i in range(7)]
    with captured_inputs([s.module for s in sites]) as inputs, torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        compiled(input_ids=batches[0], use_cache=False)
        compiled(input_ids=batches[1], use_cache=False)
        for ids in batches[2:]:
            model(input_ids=ids, use_cache=False)
        launched = Launched(hooks)
        assert hooks.stats.waiting == 4  # all that came after the first of their form
        results = hooks.get_results()
        assert launched.since() == (0, 4)
    assert_results(results, sites, inputs, [None] * 7, "all", RTOL)
    torch._dynamo.reset()


def test_what_waits_is_measured_while_a_forward_of_another_thread_is_under_way():
    """Results are asked for in the middle of it: what waits counts, and what is under way does not yet."""
    model = model_on_device()
    sites = fastheads.find_sites(model)
    batches = [some(2, 6, i) for i in range(6)]
    under_way, asked = threading.Event(), threading.Event()
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.no_grad():
        for ids in batches[:4]:
            model(input_ids=ids, use_cache=False)

        def wait(*_):
            if threading.current_thread() is not threading.main_thread():
                under_way.set()
                asked.wait(timeout=60)

        handle = model.model.layers[1].mlp.register_forward_pre_hook(wait)

        # On the same stream: a forward on another one has what waits measured first.
        stream = torch.cuda.stream(torch.cuda.current_stream()) if DEVICE == "cuda" else nullcontext()

        def run():
            with torch.no_grad(), stream:
                model(input_ids=batches[4], use_cache=False)

        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run)
            under_way.wait(timeout=60)
            assert hooks.stats.waiting == 3
            assert (hooks.get_results()["head_output_norm"]["count"] == 8).all()
            assert (hooks.stats.waiting, hooks.stats.repeated) == (0, 3)
            model(input_ids=batches[5], use_cache=False)  # beside it
            assert (hooks.get_results()["head_output_norm"]["count"] == 10).all()
            asked.set()
            future.result(timeout=60)
        handle.remove()
        results = hooks.get_results()
    with captured_inputs([s.module for s in sites]) as inputs, torch.no_grad():
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    assert_results(results, sites, inputs, [None] * 6, "all", RTOL)


def using(memory, from_forward=0):
    """A hook for each layer that lays the projection's input into `memory(layer)`, from that forward on."""

    def hook_of(layer):
        ran = []

        def use(_module, args):
            ran.append(None)
            if len(ran) <= from_forward:
                return None
            place = memory(layer)
            place.copy_(args[0])
            return (place,)

        return use

    return hook_of


def inference_buffers(size):
    with torch.inference_mode():
        return [torch.empty(size, device=DEVICE) for _ in range(3)]


def use_memory(model, memory, from_forward=0):
    hook_of = using(memory, from_forward)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.register_forward_pre_hook(hook_of(i))


def test_a_forward_of_another_dtype_does_not_wait_for_weights_that_come_after_it():
    largest = []
    for group_bytes in (0, 2**26):
        model = model_on_device()
        weight = fastheads.find_sites(model)[2].module.weight
        with (
            fastheads.HookManager(model, "all", backend="triton", group_bytes=group_bytes) as hooks,
            torch.no_grad(),
        ):
            for i in range(4):
                model(input_ids=some(2, 6, i), use_cache=False)
            with torch.autocast(DEVICE, torch.bfloat16):
                model(input_ids=some(2, 6, 4), use_cache=False)
            weight.mul_(100.0)
            largest.append(hooks.get_results()["head_residual_contribution_norm"]["max"][2])
            assert hooks.stats.deferred == (3 if group_bytes else 0)
    torch.testing.assert_close(*largest, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fault", ["mask", "dtype", "subclass"])
def test_what_cannot_be_measured_is_refused_in_its_own_forward(fault):
    class Marked(torch.Tensor):
        pass

    model = model_on_device()
    ids, wrong = some(2, 6, 9), {}
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.no_grad():
        for i in range(4):
            mask = torch.ones(2, 6, device=DEVICE) if fault == "mask" else None
            model(input_ids=some(2, 6, i), attention_mask=mask, use_cache=False)
        if fault == "mask":
            wrong["attention_mask"] = torch.ones(3, 6, device=DEVICE)
        elif fault == "dtype":
            model.double()
        else:
            model.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
                lambda _module, args: (args[0].as_subclass(Marked),)
            )
        with pytest.raises((RuntimeError, ValueError)):
            model(input_ids=ids, use_cache=False, **wrong)
        if fault == "dtype":
            model.float()
        assert (hooks.get_results()["head_output_norm"]["count"] == 8).all()


def test_one_mask_for_all_rows_is_not_taken_for_one_of_each():
    model = model_on_device()
    sites = fastheads.find_sites(model)
    causal = torch.ones(6, 6, dtype=torch.bool, device=DEVICE).tril()
    causal[4, 4] = False  # a token that may not attend to itself is padding
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all", backend="triton") as hooks,
        torch.no_grad(),
    ):
        for i in range(4):
            model(input_ids=some(2, 6, i), attention_mask=causal[None, None], use_cache=False)
        results = hooks.get_results()
        assert (hooks.stats.repeated, hooks.stats.deferred) == (
            3,
            0,
        )  # by the mask as it is spread over the rows
    mask = causal.diagonal().expand(2, 6).cpu().numpy()
    assert_results(results, sites, inputs, [mask] * 4, "all", RTOL)


def test_results_in_between_do_not_end_the_repeating():
    model = model_on_device()
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.no_grad():
        launched = Launched(hooks)
        for new in (1, 0, 0):
            for i in range(5):
                model(input_ids=some(2, 6, i), use_cache=False)
            assert hooks.stats.waiting == 4
            hooks.get_results()
            assert launched.since() == (new, 5 - new)
        assert (hooks.get_results()["head_output_norm"]["count"] == 30).all()


def test_waiting_inputs_that_overlap_are_an_error():
    model = model_on_device()
    buffers, offsets = inference_buffers(2 * 6 * 64 + 64 * 24), iter(range(0, 64 * 24, 64))
    use_memory(model, lambda i: buffers[i][next(offsets) :][: 2 * 6 * 64].view(2, 6, 64), from_forward=3)
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.inference_mode():
        for i in range(7):
            model(input_ids=some(2, 6, i), use_cache=False)
        with pytest.raises(RuntimeError, match="reuses its memory"):
            hooks.get_results()
        with pytest.raises(RuntimeError, match="that had ended: reset"):
            hooks.get_results()


def test_an_input_that_is_freed_while_it_waits_is_an_error():
    model = model_on_device()
    held = []
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _m, args, _o: held.append(args[0]))
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.inference_mode():
        for i in range(4):
            model(input_ids=some(2, 6, i), use_cache=False)
        held[-1].data = torch.empty(1, device=DEVICE)
        with pytest.raises(RuntimeError, match="overwritten or freed"):
            hooks.get_results()


def test_a_large_input_in_the_memory_of_one_that_waits_is_an_error():
    model = model_on_device()
    buffers, lengths = inference_buffers((1, 110, 64)), iter([4] * 3 + [110] * 3)
    use_memory(model, lambda i: buffers[i][:, : next(lengths)], from_forward=3)
    with (
        fastheads.HookManager(model, "all", backend="triton", group_bytes=2**14) as hooks,
        torch.inference_mode(),
    ):
        for i in range(4):
            model(input_ids=some(1, 4, i), use_cache=False)
        with pytest.raises(RuntimeError, match="overwritten or freed"):
            model(input_ids=some(1, 110, 9), use_cache=False)
        with pytest.raises(RuntimeError, match="that had ended: reset"):
            hooks.get_results()


@pytest.mark.parametrize("where", ["head", "layer"])
def test_a_forward_that_overwrites_what_waits_and_fails_is_not_overlooked(where):
    model = model_on_device()
    buffers = inference_buffers((2, 6, 64))
    use_memory(model, lambda i: buffers[i], from_forward=3)

    def fail(*_):
        raise torch.OutOfMemoryError("out of memory")

    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.inference_mode():
        for i in range(4):
            model(input_ids=some(2, 6, i), use_cache=False)
        broken = model.lm_head if where == "head" else model.model.layers[2].mlp
        broken.register_forward_pre_hook(fail)
        with pytest.raises(torch.OutOfMemoryError):
            model(input_ids=some(2, 6, 9), use_cache=False)
        with pytest.raises(RuntimeError, match="3 forwards that had ended: reset"):
            hooks.get_results()


def test_a_second_call_of_the_decoder_that_overwrites_the_firsts_inputs_is_an_error():
    class Twice(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, *batches):
            for ids in batches:
                self.inner.model(input_ids=ids, use_cache=False)

    inner = model_on_device()
    buffers = inference_buffers((2, 6, 64))
    use_memory(inner, lambda i: buffers[i], from_forward=3)
    model = Twice(inner)
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.inference_mode():
        for i in range(3):
            model(some(2, 6, i))
        with pytest.raises(RuntimeError, match="reuses its memory"):
            model(some(2, 6, 3), some(2, 6, 4))
        del hooks


class InterruptedWhen:
    """A context in which Ctrl-C comes once: at the first line of Python of which `happened(hooks.stats)` is true."""

    def __init__(self, hooks, happened):
        self._hooks, self._happened = hooks, happened

    def _trace(self, frame, event, arg):
        if frame.f_code.co_filename.startswith(os.path.dirname(fastheads.__file__)):
            if self._happened(self._hooks.stats):
                sys.settrace(None)
                raise KeyboardInterrupt
            return self._trace
        return None

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._trace)

    def __exit__(self, *_):
        sys.settrace(self._before)


@pytest.mark.parametrize(
    "happened",
    [
        pytest.param(lambda stats: stats.waiting == 0, id="taken"),
        pytest.param(lambda stats: stats.repeated == 1, id="one of four launches made"),
    ],
)
def test_forwards_that_an_interrupt_loses_are_not_forgotten(happened):
    model = model_on_device()
    with fastheads.HookManager(model, "all", backend="triton") as hooks, torch.no_grad():
        for i in range(5):
            model(input_ids=some(2, 6, i), use_cache=False)
        assert hooks.stats.waiting == 4
        with pytest.raises(KeyboardInterrupt), InterruptedWhen(hooks, happened):
            hooks.get_results()
        with pytest.raises(RuntimeError, match="4 forwards that had ended: reset"):
            hooks.get_results()
        hooks.reset()
        model(input_ids=some(2, 6, 0), use_cache=False)
        assert (hooks.get_results()["head_output_norm"]["count"] == 2).all()
