"""Forward after forward of one form goes by a short way: the same numbers, and none of the hazards unseen.

On a GPU marked `gpu`; under TRITON_INTERPRET=1 (see test_kernel.py) on the CPU.
"""

import os

import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.grouping import Repeat

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = (
    []
    if INTERPRETED
    else [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
)
DEVICE = "cpu" if INTERPRETED else "cuda"
RTOL = 5e-6


@pytest.fixture
def repeats(monkeypatch):
    """Whether the short way was taken, each time that it was tried."""
    seen = []
    of_kept = Repeat.of_kept

    def spy(self, kept, real):
        seen.append(of_kept(self, kept, real))
        return seen[-1]

    monkeypatch.setattr(Repeat, "of_kept", spy)
    return seen


def model_on_device(**changes):
    return build(head_dim=16, **changes).to(DEVICE)


def some(batch, seq, seed):
    return tokens(batch, seq, seed=seed).to(DEVICE)


@pytest.mark.parametrize(("token_agg", "skip_first"), [("all", 0), ("all", 2), ("last", 0)])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_taken_from_the_second_forward_on_with_the_same_numbers(repeats, token_agg, skip_first, mode):
    model = model_on_device()
    sites = fastheads.find_sites(model)
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2], device=DEVICE)
    masks = []
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg, backend="triton", skip_first=skip_first) as hooks,
        mode(),
    ):
        for shape, attention_mask in [((2, 6), None)] * 3 + [((2, 6), mask), ((1, 5), None), ((1, 5), None)]:
            ids = some(*shape, len(masks))
            model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
            masks.append(None if attention_mask is None else attention_mask.cpu().numpy())
        results = hooks.get_results()
    # True: a repeat; False: another form, after which a new one is remembered, but not of a mask.
    assert repeats == [True, True, False, True]
    assert_results(results, sites, inputs, masks, token_agg, RTOL, skip_first)


def test_a_weight_that_changes_in_between_is_followed(repeats):
    model = model_on_device()
    first = fastheads.find_sites(model)[0]
    with fastheads.HookManager(model, backend="triton") as hooks, torch.no_grad():
        for _ in range(3):
            model(input_ids=some(2, 6, 0), use_cache=False)
        before = hooks.get_results()["head_residual_contribution_norm"]["mean"][0]
        first.module.weight.mul_(2.0)
        hooks.reset()
        for _ in range(3):
            model(input_ids=some(2, 6, 0), use_cache=False)
        after = hooks.get_results()["head_residual_contribution_norm"]["mean"][0]
        first.module.weight.mul_(2.0)
        for _ in range(3):
            model(input_ids=some(2, 6, 0), use_cache=False)
        mixed = hooks.get_results()["head_residual_contribution_norm"]["mean"][0]
    torch.testing.assert_close(after, 2 * before, rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed, 3 * before, rtol=1e-6, atol=0)
    assert repeats.count(True) >= 4


def test_a_change_behind_autograds_back_is_found_after_repeats(repeats):
    model = model_on_device()
    first = fastheads.find_sites(model)[0]
    with fastheads.HookManager(model, backend="triton") as hooks, torch.no_grad():
        for _ in range(3):
            model(input_ids=some(2, 6, 0), use_cache=False)
        hooks.get_results()
        first.module.weight.data.mul_(2.0)
        model(input_ids=some(2, 6, 0), use_cache=False)
        with pytest.raises(RuntimeError, match="behind autograd's back"):
            hooks.get_results()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_workspace_that_layers_come_to_share_is_an_error(repeats, mode):
    model = model_on_device()
    workspace = torch.empty(2, 6, 64, device=DEVICE)

    def use_workspace(_module, args):
        workspace.data.copy_(args[0])
        return (workspace.detach(),)

    with fastheads.HookManager(model, backend="triton") as hooks, mode():
        for _ in range(2):
            model(input_ids=some(2, 6, 0), use_cache=False)
        for layer in model.model.layers:
            layer.self_attn.o_proj.register_forward_pre_hook(use_workspace)
        with pytest.raises(RuntimeError, match="reuses its memory"):
            model(input_ids=some(2, 6, 0), use_cache=False)
        assert (hooks.get_results()["head_output_norm"]["count"] == 4).all()
    assert repeats == [True, False]


def test_an_input_that_is_modified_in_place_is_an_error(repeats):
    model = model_on_device()
    with fastheads.HookManager(model, backend="triton"), torch.no_grad():
        for _ in range(2):
            model(input_ids=some(2, 6, 0), use_cache=False)
        model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _m, args, _o: args[0].zero_())
        with pytest.raises(RuntimeError, match="modified in place"):
            model(input_ids=some(2, 6, 0), use_cache=False)
    assert repeats == [True, False]
