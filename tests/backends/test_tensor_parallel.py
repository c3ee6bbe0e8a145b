"""Tensor parallelism for real: two processes load one checkpoint with tp_plan="auto", with gloo on the CPU or NCCL on two GPUs.

The oracle is float64 algebra over the inputs of both ranks' projections, put side by side.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracle import METRICS, UPDATE_METRIC, assert_results, equal_results
from parallel_ranks import ABLATED, MASKS, RESULTS, measured
from tiny_models import build, tokens
from transformers import AutoModelForCausalLM

import fastheads

pytest.importorskip("transformers.distributed.tensor_parallel", reason="another tensor parallelism")

SUPPORT = Path(__file__).parents[1] / "support"
CHECKPOINTS = {
    "llama": ("llama", {}),
    "llama-bias": ("llama-bias", {}),
    "llama-two-heads": ("llama", {"num_attention_heads": 2}),
    "llama-one-kv-head": ("llama", {"num_key_value_heads": 1}),
    "qwen2": ("qwen2", {}),
    "olmo2": ("olmo2", {}),
    "olmo2-one-kv-head": ("olmo2", {"num_key_value_heads": 1}),
    "olmo2-three-heads": (
        "olmo2",
        {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 72},
    ),
    "gemma2": ("gemma2", {}),
    "phi3": ("phi3", {}),
    "gpt-oss": ("gpt-oss", {}),
}
REFUSED = {
    "triton": "BackendError: backend 'triton' cannot be used with tensor parallelism",
    "verify": "verify=True cannot check tensor-parallel",
    "other-options": "ResultsError: the ranks of a tensor-parallel model must attach with the same options",
    "other-layers": "ResultsError: the ranks of a tensor-parallel model must attach with the same options",
    "cut-heads": "UnsupportedWeightError: model.layers.0.self_attn.o_proj has 3 heads of 24 over 2 ranks",
    "torch-style": "UnsupportedWeightError: model.layers.0.self_attn.o_proj has its weight sharded over ranks",
    "fsdp-by-columns": "UnsupportedWeightError: model.layers.0.self_attn.o_proj has its weight sharded over ranks",
    "fsdp-and-tensor-parallel": "UnsupportedWeightError: model.layers.0.self_attn.o_proj has its weight sharded over ranks",
    "adapters": "model.layers.0.self_attn.o_proj has adapters over a tensor-parallel weight",
}
OTHERS = (
    *("kv-heads-not-divisible", "error-on-both", "error-on-one", "errors-in-turn", "stale-on-one"),
    *("one-sum", "changed-weight", "whole-job", "ablation"),
)
# Float32, in which the model itself sums in another order over ranks: 4e-7 was the most that was seen on a CPU.
RTOL = {"cpu": 1e-6, "cuda": 5e-6}
GROUPS = {"results": tuple(RESULTS), "refusals": tuple(REFUSED), "others": OTHERS}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package"),
    pytest.mark.parametrize(
        "device",
        [
            "cpu",
            pytest.param(
                "cuda",
                marks=[
                    pytest.mark.gpu,
                    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
                ],
            ),
        ],
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The checkpoints; what the ranks leave is beside them, a folder for each device."""
    folder = tmp_path_factory.mktemp("ranks")
    for device in ("cpu", "cuda"):
        for name, (family, changes) in CHECKPOINTS.items():
            # an even vocabulary: transformers 5.18 splits no other
            build(family, vocab_size=102, **changes).save_pretrained(folder / device / name)
    return folder


@pytest.fixture(scope="module")
def ran():
    """What became of a group of cases, by (device, group): None, or the errors."""
    return {}


def run_ranks(folder, device, cases, seconds=300):
    """Two ranks run `cases`; None, or what they said where one failed or hung."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"},
        **{"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path])},
    }
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # transformers takes an accelerator where there is one
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "parallel_ranks.py"), str(folder), device]
    ranks = [
        subprocess.Popen(
            [*command, *cases],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=seconds)[0] for rank in ranks]
    except subprocess.TimeoutExpired:
        return f"the ranks hang after {seconds} s"
    finally:
        for rank in ranks:
            rank.kill()
    if any(rank.returncode for rank in ranks):
        return "\n".join(f"rank {n}:\n{text[-3000:]}" for n, text in enumerate(said))
    return None


@pytest.fixture
def seen(folder, ran, device, request):
    """`seen(case)`: what both ranks saw of it. All of its group are run together, for each start takes seconds."""

    def both(case):
        group = next(name for name, cases in GROUPS.items() if case in cases)
        if (device, group) not in ran:
            ran[device, group] = run_ranks(folder / device, device, GROUPS[group])
        paths = [folder / device / f"{case}.{rank}.pt" for rank in range(2)]
        if not all(path.exists() for path in paths):
            pytest.fail(ran[device, group] or f"nothing of {case}")
        return [torch.load(path, map_location="cpu", weights_only=True) for path in paths]

    return both


def alone(folder, device, checkpoint, dtype=torch.float32):
    """The same checkpoint on one process."""
    return AutoModelForCausalLM.from_pretrained(folder / device / checkpoint, dtype=dtype).to(device).eval()


def assert_close(got, want, rtol):
    """Results of one model, computed in another order."""
    for metric in (*METRICS, UPDATE_METRIC):
        for stat, value in want[metric].items():
            if stat in ("count", "nonfinite"):
                assert torch.equal(got[metric][stat], value), (metric, stat)
                continue
            # A spread is known only as well as the samples that it is the spread of.
            scale = {"std": 1.0, "sem": 1.0, "var": 2 * want[metric]["std"]}.get(stat, 0.0)
            bound = rtol * (value.abs() + scale * want[metric]["mean"].abs()).nan_to_num()
            away = (got[metric][stat] - value).abs()
            assert torch.equal(got[metric][stat].isnan(), value.isnan()), (metric, stat)
            assert bool((away.nan_to_num() <= bound).all()), (metric, stat, (away / bound).nan_to_num().max())


def side_by_side(ranks, row, sites):
    """The inputs of one projection by forward, and its weight, from what both ranks have of them."""
    width = sites[row].num_heads * sites[row].head_dim
    inputs = [
        parts[0] if parts[0].shape[-1] == width else torch.cat(parts, dim=-1)
        for parts in zip(*(rank["inputs"][row] for rank in ranks), strict=True)
    ]
    weights = [rank["weights"][row] for rank in ranks]
    return inputs, weights[0] if weights[0].shape[1] == width else torch.cat(weights, dim=1)


@pytest.mark.parametrize("case", RESULTS)
def test_results_are_those_of_one_process(case, device, seen, folder):
    checkpoint, token_agg, options, special = RESULTS[case]
    ranks = seen(case)
    results = ranks[0]["results"]
    assert equal_results(results, ranks[1]["results"])
    assert results["metadata"] == ranks[1]["results"]["metadata"]
    if checkpoint in ("gemma2", "olmo2"):
        assert results["metadata"]["residual_update"].startswith("normed")
        assert (results[UPDATE_METRIC]["count"] > 0).all()

    dtype = torch.float64 if special == "float64" else torch.float32
    rtol = 1e-12 if special == "float64" else RTOL[device]
    model = alone(folder, device, checkpoint, dtype)
    if special == "mixed":
        model.model.layers[2].self_attn = alone(folder, device, "llama-two-heads").model.layers[2].self_attn
    sites = fastheads.find_sites(model)
    # Where every rank has the whole of each projection, "auto" chooses as it does alone.
    chosen = "auto" if case == "gpt-oss" else "factored"
    options = options | {"backend": options.get("backend", chosen)}
    want = measured(model, token_agg, options, special, torch.device(device))
    assert_close(results, want["results"], rtol)
    for name, array in want["vectors"].items():
        assert torch.equal(ranks[0]["vectors"][name].isnan(), array.isnan()), name
        bound = 20 * rtol * array.nan_to_num().abs().max()
        assert (ranks[0]["vectors"][name] - array).nan_to_num().abs().max() <= bound, name
        assert torch.equal(ranks[0]["vectors"][name], ranks[1]["vectors"][name]) or bool(array.isnan().any())
    assert results["metadata"]["sites"] == want["results"]["metadata"]["sites"]
    assert results["metadata"]["backend"] == want["results"]["metadata"]["backend"]

    if special == "compiled":
        return
    inputs, weights = zip(*(side_by_side(ranks, row, sites) for row in range(len(sites))), strict=True)
    for row, weight in enumerate(weights):
        assert torch.equal(weight, want["weights"][row].cpu())
    if "layers" in options:
        assert results["head_output_norm"]["count"][1].sum() == 0
        sites[1], inputs[1][:] = sites[0], inputs[0]
        results = {m: {s: v[[0, 0, 2]] for s, v in results[m].items()} for m in METRICS}
        weights = (weights[0], weights[0], weights[2])
    masks = [np.array(mask) for mask in MASKS]
    assert_results(
        results,
        sites,
        inputs,
        masks,
        token_agg,
        1e-12 if special == "float64" else 5e-6,
        skip_first=options.get("skip_first", 0),
        weights=weights,
    )


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_so_on_every_rank(case, device, seen):
    for rank in seen(case):
        assert REFUSED[case] in rank["says"]
        if case not in ("fsdp-by-columns", "fsdp-and-tensor-parallel", "torch-style"):  # they have hooks
            assert rank["hooks"] == 0


def test_kv_heads_that_do_not_divide_are_the_models_own_error(device, seen):
    for rank in seen("kv-heads-not-divisible"):
        assert "shape '[3, 6, -1, 24]' is invalid" in rank["says"]
        assert rank["count"].sum() == 0


def test_an_error_in_the_middle_of_a_forward_counts_nothing(device, seen, folder):
    first, second = seen("error-on-both")
    assert equal_results(first["results"], second["results"])
    want = measured(alone(folder, device, "llama"), "all", {}, "", torch.device(device))
    assert_close(first["results"], want["results"], RTOL[device])


def test_a_forward_that_ended_on_one_rank_only(device, seen, folder):
    ranks = seen("error-on-one")
    assert [rank["failed"] for rank in ranks] == [False, True]
    for rank in ranks:
        assert "did not count the same forwards (6 on rank 0, 3 on rank 1, in samples" in rank["says"]
    assert equal_results(ranks[0]["results"], ranks[1]["results"])
    want = measured(alone(folder, device, "llama"), "all", {}, "", torch.device(device))
    assert_close(ranks[0]["results"], want["results"], RTOL[device])


def test_different_forwards_with_as_many_samples(device, seen):
    for rank in seen("errors-in-turn"):
        assert "did not count the same forwards (as many of others" in rank["says"]


def test_a_rank_without_results_is_named(device, seen):
    ranks = seen("stale-on-one")
    assert ranks[0]["says"].startswith("ResultsError: rank 1 of the tensor-parallel group could not give")
    assert ranks[1]["says"].startswith("StaleFactorError: the weight of model.layers.1.self_attn.o_proj")


def test_one_sum_over_ranks_a_forward(device, seen):
    for rank in seen("one-sum"):
        assert rank["seen"] == {"attached": 0, "run": 2, "asked": 2, "paused": 2}
        assert rank["sizes"] == [3 * 6 * 2 * 3] * 2  # tokens, norms, layers


def test_the_weight_may_change_between_forwards(device, seen, folder):
    ranks = seen("changed-weight")
    assert equal_results(ranks[0]["results"], ranks[1]["results"])
    row, site = 1, fastheads.find_sites(alone(folder, device, "llama"))[1]
    norms = []
    for step in range(3):
        x = torch.cat([rank["inputs"][row][step] for rank in ranks], dim=-1).flatten(0, 1)
        w = torch.cat([rank["weights"][step] for rank in ranks], dim=1).double()
        heads = [slice(h * site.head_dim, (h + 1) * site.head_dim) for h in range(site.num_heads)]
        norms.append(torch.stack([(x[:, h] @ w[:, h].T).norm(dim=-1) for h in heads], dim=-1))
        norms[-1] = norms[-1][torch.tensor(MASKS[0]).flatten() != 0]
    want = torch.cat(norms)
    for metric, values in {
        "head_residual_contribution_norm": want,
        "relative_head_residual_contribution_norm": want / want.mean(dim=-1, keepdim=True),
    }.items():
        got = ranks[0]["results"][metric]
        torch.testing.assert_close(got["mean"][row], values.mean(0), rtol=5e-6, atol=0)
        torch.testing.assert_close(got["std"][row], values.std(0), rtol=5e-6, atol=0)


def test_profiles_merge_with_those_of_one_process(device, seen, folder):
    for rank in seen("whole-job"):
        assert rank["sequences"] == 5
    model = alone(folder, device, "llama")
    parallel = fastheads.HeadProfile.load(folder / device / "whole-job.safetensors")
    batch = {"input_ids": torch.arange(3, 15).view(2, 6).to(device)}
    one = fastheads.profile(model, batch, backend="factored")
    merged = fastheads.HeadProfile.merge([parallel, one])
    assert merged.moments["head_output_norm"].count.unique().tolist() == [7]
    assert merged.metadata["sites"] == one.metadata["sites"]


@pytest.mark.parametrize("checkpoint", ["llama", "olmo2", "gpt-oss"])
def test_ablation_is_that_of_one_process(checkpoint, device, seen, folder):
    ranks = seen("ablation")
    model = alone(folder, device, checkpoint)
    sites = {site.layer: site for site in fastheads.find_sites(model)}
    with torch.no_grad():
        for layer, head in ABLATED:
            width = sites[layer].head_dim
            sites[layer].module.weight[:, head * width : (head + 1) * width] = 0.0
        want = model(
            input_ids=tokens(3, 6, seed=0).to(device), attention_mask=torch.tensor(MASKS[0], device=device)
        ).logits.cpu()
    valid = torch.tensor(MASKS[0], dtype=torch.bool)
    for rank in ranks:
        torch.testing.assert_close(rank[checkpoint][valid], want[valid], rtol=0, atol=2e-6)
        assert not torch.allclose(rank[f"{checkpoint} intact"][valid], want[valid], atol=1e-4)
        silent = torch.argwhere(rank[f"{checkpoint} norms"] == 0).tolist()
        assert [tuple(pair) for pair in silent] == ABLATED
        assert "split over ranks by tensor parallelism" in rank["says"]
