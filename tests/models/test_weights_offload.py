"""Weights that are elsewhere between forwards: accelerate's offloading, and shards of FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_submodules
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens
from transformers import AutoModelForCausalLM

import fastheads


def in_memory(model, _folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def in_memory_by_itself(model, _folder):
    """Each hook with a map of its own."""
    for module in model.modules():
        if not list(module.children()):
            hook = accelerate.hooks.AlignDevicesHook(execution_device="cpu", offload=True)
            add_hook_to_module(module, hook, append=True)
    return model


def on_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device="cpu")


def on_disk_as_loaded(model, folder):
    """Straight from the checkpoint's safetensors."""
    model.save_pretrained(folder / "checkpoint")
    places = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "disk"}
    return AutoModelForCausalLM.from_pretrained(
        folder / "checkpoint", device_map=places, offload_folder=folder / "offload"
    ).eval()


WAYS = [in_memory, in_memory_by_itself, on_disk, on_disk_as_loaded]


def projections(model):
    return [site.module for site in fastheads.find_sites(model)]


def weights_of(model):
    return [p.weight.detach().clone() for p in projections(model)]


def on_meta(model):
    return [p.weight.device.type == "meta" for p in projections(model)]


@pytest.mark.parametrize("backend", ["factored", "einsum"])
@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_weight_is_fetched(way, backend, tmp_path):
    model = build()
    weights = weights_of(model)
    model = way(model, tmp_path)
    away = on_meta(model)
    assert any(away)
    sites = fastheads.find_sites(model)
    with (
        torch.no_grad(),
        captured_inputs(projections(model)) as inputs,
        fastheads.HookManager(model, "all", backend=backend) as hooks,
    ):
        for seed in range(2):
            model(input_ids=tokens(2, 5, seed=seed))
        assert on_meta(model) == away
        assert_results(hooks.get_results(), sites, inputs, [None] * 2, "all", 5e-6, weights=weights)


def test_the_dtype_is_the_one_in_which_the_weight_acts(tmp_path):
    model = accelerate.disk_offload(build(), tmp_path, execution_device="cpu").bfloat16()
    site = fastheads.find_sites(model)[0]
    assert fastheads.models.weights.dense_weight(site).dtype == torch.bfloat16


def kept(model):
    """What accelerate loads the second projection from."""
    weights_map = projections(model)[1]._hf_hook.weights_map
    return weights_map.dataset, f"{weights_map.prefix}weight"


def tensor_replaced(model, weight):
    weights, name = kept(model)
    weights[name] = weight.clone()


def tensor_changed(model, weight):
    weights, name = kept(model)
    weights[name].copy_(weight)


def file_rewritten(model, weight):
    weights, name = kept(model)
    path = Path(weights.save_folder) / f"{name}.dat"
    before = path.stat().st_mtime_ns
    path.write_bytes(weight.numpy().tobytes())
    os.utime(path, ns=(before + 1_000_000_000,) * 2)  # a coarse clock would not tell


def fetched_for_good(model, weight):
    remove_hook_from_submodules(model)
    model.load_state_dict(build(seed=3).state_dict(), assign=True)
    with torch.no_grad():
        projections(model)[1].weight.copy_(weight)


@pytest.mark.parametrize(
    ("way", "change"),
    [
        (in_memory, tensor_replaced),
        (in_memory, tensor_changed),
        (on_disk, file_rewritten),
        (in_memory, fetched_for_good),
    ],
)
def test_a_change_where_the_weight_is_kept(way, change, tmp_path):
    model = build(seed=3)
    weights = weights_of(model)
    model = way(model, tmp_path)
    sites, new = fastheads.find_sites(model), torch.randn(64, 96)
    norms = []
    with torch.no_grad(), fastheads.HookManager(model, "token") as hooks:
        for step in range(2):
            if step:
                change(model, new)
                weights[1] = new
            with captured_inputs(projections(model)) as inputs:
                model(input_ids=tokens(2, 5, seed=step))
            x = inputs[1][0].view(-1, sites[1].num_heads, sites[1].head_dim)
            w = weights[1].double().view(64, sites[1].num_heads, sites[1].head_dim)
            norms.append(torch.einsum("ohd,nhd->nho", w, x).norm(dim=-1))
        results = hooks.get_results()["head_residual_contribution_norm"]
    np.testing.assert_allclose(results["mean"][1], torch.cat(norms).mean(0), rtol=5e-6)


def test_a_change_behind_autograds_back_raises(tmp_path):
    model = in_memory(build(), tmp_path)
    with torch.no_grad(), fastheads.HookManager(model) as hooks:
        model(input_ids=tokens(2, 5))
        weights, name = kept(model)
        weights[name].data.mul_(2)
        with pytest.raises(fastheads.StaleFactorError, match=r"layers\.1"):
            hooks.get_results()


def test_a_file_that_is_gone_is_named(tmp_path):
    model = on_disk(build(), tmp_path)
    with torch.no_grad(), fastheads.HookManager(model):
        weights, name = kept(model)
        (Path(weights.save_folder) / f"{name}.dat").unlink()
        with pytest.raises((fastheads.UnsupportedWeightError, FileNotFoundError), match=r"layers\.1.*o_proj"):
            model(input_ids=tokens(2, 5))


def by_blocks(model, _folder):
    return accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=["LlamaAttention"])


def behind_another_hook(model, _folder):
    for module in projections(model):
        add_hook_to_module(module, ModelHook())
    return model


def quantized(model, _folder):
    from transformers.integrations.gemma_quant import QuantizedLinear

    for layer in model.model.layers:
        layer.self_attn.o_proj = QuantizedLinear(96, 64).requires_grad_(False)
    return accelerate.cpu_offload(model, execution_device="cpu")


@pytest.mark.parametrize(
    ("way", "says"),
    [(by_blocks, "meta device"), (behind_another_hook, "forward of its own"), (quantized, "meta device")],
)
def test_what_accelerate_does_otherwise_is_refused(way, says, tmp_path):
    model = way(build(), tmp_path)
    with pytest.raises(fastheads.UnsupportedWeightError, match=rf"layers\.0\.self_attn\.o_proj.*{says}"):
        fastheads.HookManager(model)


def test_a_weight_that_is_moved_by_hooks_and_not_offloaded(tmp_path):
    model = accelerate.dispatch_model(build(), {"": "cpu"}, force_hooks=True)
    assert hasattr(model, "_hf_hook") or hasattr(projections(model)[0], "_hf_hook")
    sites = fastheads.find_sites(model)
    with (
        torch.no_grad(),
        captured_inputs(projections(model)) as inputs,
        fastheads.HookManager(model, "all") as hooks,
    ):
        model(input_ids=tokens(2, 5))
        assert_results(hooks.get_results(), sites, inputs, [None], "all", 5e-6)


# ---------------------------------------------------------------- FSDP2

TWO_RANKS = """
import sys
sys.path.insert(0, {support!r})
import torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from tiny_models import build, tokens
import fastheads

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)

def sharded(model):
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)

model = sharded(build())
try:
    fastheads.HookManager(model)
except fastheads.UnsupportedWeightError as error:
    print("REFUSED", error)
with torch.no_grad():
    model(input_ids=tokens(2, 5))  # the hooks are gone, and the model runs

model = build()
with fastheads.HookManager(model), torch.no_grad():
    model(input_ids=tokens(2, 5))
    sharded(model)
    try:
        model(input_ids=tokens(2, 5))
    except fastheads.UnsupportedWeightError as error:
        print("REFUSED LATER", error)
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_shards_of_fsdp2_are_refused_on_every_rank(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(TWO_RANKS.format(support=str(Path(__file__).parents[1] / "support")))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (out, err) in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, err
        for says in ("REFUSED ", "REFUSED LATER "):
            line = next(line for line in out.splitlines() if line.startswith(says))
            assert "layers.0.self_attn.o_proj" in line
            assert "sharded over ranks ((Shard(dim=0),)" in line
