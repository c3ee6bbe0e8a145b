"""Mean vectors measured by the manager: against float64 over the tokens, in every way that an input is measured."""

import os
import threading

import numpy as np
import pytest
import torch
from oracle import captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.capture.collect import load_state, state
from fastheads.capture.manager import recorder_of
from fastheads.errors import CheckpointError, StaleFactorError

if os.environ.get("TRITON_INTERPRET") == "1":
    DEVICE, BACKENDS = "cpu", ("triton",)
else:
    DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    BACKENDS = ("loop", "einsum", "factored") if DEVICE == "cpu" else ("factored", "triton")

MASKS = [torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1] * 7]), None]


def tokens_of(x, mask, token_agg, skip_first=0):
    """The tokens that count, `[n, width]`, of an input `[batch, seq, width]`."""
    found = []
    for b in range(x.shape[0]):
        valid = [s for s in range(x.shape[1]) if mask is None or mask[b][s]][skip_first:]
        found.append(x[b, valid[-1:] if token_agg == "last" else valid])
    return torch.cat(found).cpu()


def check(profile, sites, by_row, rtol):
    """The vectors of `profile` are those of the tokens `by_row`, `[n, width]` float64."""
    vectors = profile.vectors
    for row, (site, x) in enumerate(zip(sites, by_row, strict=True)):
        z = x.view(len(x), site.num_heads, site.head_dim)
        weight = site.module.weight.detach().double().cpu()
        written = torch.einsum("nhd,ohd->nho", z, weight.view(-1, site.num_heads, site.head_dim))
        good = z.isfinite().all(-1) & written.isfinite().all(-1)
        for h in range(site.num_heads):
            own, power = z[good[:, h], h], written[good[:, h], h].square().sum(-1)
            assert vectors.count[row, h] == len(own) and vectors.nonfinite[row, h] == len(z) - len(own)
            scale = float(own.square().mean().sqrt())
            mean = vectors.mean[row, h, : site.head_dim]
            np.testing.assert_allclose(mean, own.mean(0).numpy(), rtol=0, atol=rtol * scale)
            assert vectors.power[row, h] == pytest.approx(float(power.mean()), rel=4 * rtol)
            assert vectors.output_power[row, h] == pytest.approx(
                float(own.square().sum(-1).mean()), rel=4 * rtol
            )


def run(model, hooks, masks, token_agg, skip_first=0, call=None):
    """Run a batch for each mask, and return the profile with the tokens by row."""
    call = model if call is None else call
    with captured_inputs([site.module for site in hooks.sites]) as inputs, torch.no_grad():
        for n, mask in enumerate(masks):
            mask = None if mask is None else mask.to(hooks.model.device)
            call(input_ids=tokens(3, 7, seed=n).to(hooks.model.device), attention_mask=mask)
    by_row = [
        torch.cat([tokens_of(x, m, token_agg, skip_first) for x, m in zip(xs, masks, strict=True)])
        for xs in inputs
    ]
    return hooks.to_profile(), by_row


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_they_are_those_of_the_valid_tokens(family, backend, token_agg):
    model = build(family, head_dim=16).to(DEVICE)
    with fastheads.HookManager(model, token_agg, vectors=True, backend=backend, skip_first=1) as hooks:
        # Forwards of one form, which wait where the kernel measures them, and others between them.
        profile, by_row = run(model, hooks, [None, None, *MASKS, None, None], token_agg, skip_first=1)
        check(profile, hooks.sites, by_row, 5e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("group_bytes", [0, 2**26])
def test_of_every_dtype_at_once_and_together(dtype, group_bytes):
    model = build(dtype=dtype)
    with fastheads.HookManager(model, "all", vectors=True, group_bytes=group_bytes) as hooks:
        profile, by_row = run(model, hooks, MASKS, "all")
        check(profile, hooks.sites, by_row, 1e-12 if dtype is torch.float64 else 4e-6)


@pytest.mark.parametrize("token_agg", ["last", "all"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_packed_sequences(token_agg, backend):
    model = build(head_dim=16).to(DEVICE)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1]], device=DEVICE)
    with (
        fastheads.HookManager(model, token_agg, vectors=True, backend=backend) as hooks,
        captured_inputs([s.module for s in hooks.sites]) as inputs,
        torch.no_grad(),
    ):
        model(input_ids=tokens(1, 9).to(DEVICE), position_ids=positions)
        chosen = [2, 6, 8] if token_agg == "last" else list(range(9))
        profile = hooks.to_profile()
        check(profile, hooks.sites, [x[0][0, chosen].cpu() for x in inputs], 5e-6)


def test_under_compile():
    model = build()
    with fastheads.HookManager(model, "all", vectors=True) as hooks:
        compiled = torch.compile(model, backend="eager")
        with torch.no_grad():
            for n in range(2):
                compiled(input_ids=tokens(3, 7, seed=n))
        profile = hooks.to_profile()
    with fastheads.HookManager(model, "all", vectors=True) as hooks:
        eager, by_row = run(model, hooks, [None, None], "all")
        check(eager, hooks.sites, by_row, 2e-6)
        check(profile, hooks.sites, by_row, 2e-6)


def test_a_token_that_is_not_finite_is_left_out():
    model = build()
    o_proj = model.model.layers[1].self_attn.o_proj

    def spoil(_module, args):
        x = args[0].clone()
        x[0, 2, 30] = torch.inf
        return (x,)

    handle = o_proj.register_forward_pre_hook(spoil)
    with fastheads.HookManager(model, "all", vectors=True) as hooks, pytest.warns(RuntimeWarning):
        profile, by_row = run(model, hooks, [None], "all")
        handle.remove()
        check(profile, hooks.sites[:2], by_row[:2], 2e-6)
        assert profile.vectors.nonfinite[1].tolist() == [0, 1, 0, 0]


def test_a_forward_that_fails_and_those_of_other_threads():
    model = build()
    with fastheads.HookManager(model, "all", vectors=True) as hooks:
        batches = [tokens(2, 5, seed=n) for n in range(4)]
        with captured_inputs([s.module for s in hooks.sites]) as inputs:
            model(input_ids=batches[0])
            beside = threading.Thread(target=lambda: model(input_ids=batches[1]))

            def start_beside(*_):
                handle.remove()  # the other forward runs through this layer too
                beside.start()
                beside.join()

            handle = model.model.layers[2].mlp.register_forward_pre_hook(start_beside)
            model(input_ids=batches[2])
            assert not beside.is_alive() and len(inputs[0]) == 3

        def fail(*_):
            raise KeyError

        failing = model.model.layers[2].mlp.register_forward_pre_hook(fail)
        with pytest.raises(KeyError):
            model(input_ids=batches[3])
        failing.remove()
        by_row = [torch.cat([x.flatten(0, 1) for x in xs]) for xs in inputs]
        check(hooks.to_profile(), hooks.sites, by_row, 2e-6)


def test_a_weight_that_changes_is_refused():
    model = build()
    weight = model.model.layers[1].self_attn.o_proj.weight
    for backend in ("einsum", "factored"):
        with fastheads.HookManager(model, "all", vectors=True, backend=backend) as hooks:
            model(input_ids=tokens(1, 4))
            with torch.no_grad():
                weight.mul_(2)
            model(input_ids=tokens(1, 4))
            with pytest.raises(
                StaleFactorError, match=r"layers\.1\.self_attn\.o_proj changed while mean vectors"
            ):
                hooks.to_profile()
            with pytest.raises(StaleFactorError):
                state(recorder_of(hooks))
            hooks.reset()
            profile, by_row = run(model, hooks, [None], "all")
            check(profile, hooks.sites, by_row, 2e-6)
            weight.data.mul_(2)
            model(input_ids=tokens(1, 4))
            with pytest.raises(StaleFactorError):
                hooks.to_profile()


def test_without_the_option_there_are_none():
    model = build()
    with fastheads.HookManager(model, "all") as hooks:
        model(input_ids=tokens(1, 4))
        assert hooks.to_profile().vectors is None


def test_the_mean_ablation_error_is_that_of_a_dense_covariance():
    model = build(num_hidden_layers=2)
    with fastheads.HookManager(model, "all", vectors=True) as hooks:
        profile, by_row = run(model, hooks, MASKS, "all")
        error = profile.mean_ablation_error(model)
        for row, (site, x) in enumerate(zip(hooks.sites, by_row, strict=True)):
            weight = site.module.weight.detach().double().view(-1, site.num_heads, site.head_dim)
            z = x.view(len(x), site.num_heads, site.head_dim)
            for h in range(site.num_heads):
                covariance = torch.cov(z[:, h].T, correction=0)
                want = torch.trace(weight[:, h] @ covariance @ weight[:, h].T)
                assert error[row, h].item() == pytest.approx(want.item(), rel=1e-4)
        assert (error >= 0).all()


def test_a_state_with_vectors_is_restored_and_one_without_is_refused():
    model = build()
    with fastheads.HookManager(model, "all", vectors=True) as hooks:
        run(model, hooks, MASKS, "all")
        saved = state(recorder_of(hooks))
        whole, _ = run(model, hooks, MASKS, "all")
    with fastheads.HookManager(model, "all", vectors=True) as hooks:
        load_state(recorder_of(hooks), *saved)
        resumed, _ = run(model, hooks, MASKS, "all")
    for name in ("count", "mean", "power", "output_power"):
        np.testing.assert_array_equal(getattr(whole.vectors, name), getattr(resumed.vectors, name))
    with fastheads.HookManager(model, "all") as hooks, pytest.raises(CheckpointError):
        load_state(recorder_of(hooks), *saved)


def test_files_and_merging_keep_them(tmp_path):
    model = build()
    profiles, rows = [], []
    for n in range(2):
        with fastheads.HookManager(model, "all", vectors=True) as hooks:
            profile, by_row = run(model, hooks, MASKS[n:], "all")
            profile.save(tmp_path / f"{n}.safetensors")
            profiles.append(fastheads.HeadProfile.load(tmp_path / f"{n}.safetensors"))
            rows.append(by_row)
    together = [torch.cat(both) for both in zip(*rows, strict=True)]
    check(fastheads.HeadProfile.merge(profiles), hooks.sites, together, 2e-6)
