"""`fastheads prune`: what it writes, prints and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from fastheads import HeadProfile
from fastheads.run import pruned_folder

QUICK = ("--rounds", 1, "--sequences", 2, "--seq-len", 32)


@pytest.fixture(scope="module")
def profiled(model, tmp_path_factory):
    """A profile of the tiny model."""
    from fastheads import profile

    path = tmp_path_factory.mktemp("profiled") / "heads.safetensors"
    text = path.with_suffix(".txt")
    text.write_text("Some heads matter. " * 30)
    profile(model, str(text), output=path)
    return path


def loaded(folder):
    found = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return found, transformers.AutoTokenizer.from_pretrained(folder)


def test_zeroed_heads(run, here, model, profiled):
    code, out, err = run("prune", model, "--profile", profiled, "--fraction", 0.3, "-o", "out", *QUICK)
    assert code == 0, err
    assert "4 heads" in out and "zeroed, chosen by head_residual_ratio" in out
    for row in ("parameters", "loss", "tokens/s", "saved out; load it with"):
        assert row in out
    found, tokenizer = loaded("out")
    zeros = sum(
        int(not part.any())
        for layer in found.model.layers
        for part in layer.self_attn.o_proj.weight.split(8, 1)
    )
    assert zeros == 4
    assert tokenizer("fox").input_ids == loaded(model)[1]("fox").input_ids
    plan = json.loads(Path("out/pruning_plan.json").read_text())
    assert plan["heads"] == sorted(map(list, HeadProfile.load(profiled).lowest(0.3)))
    assert plan["data"]["sha256"] == HeadProfile.load(profiled).metadata["data"]["sha256"]


def test_uniform_as_json_in_a_pipe(here, model, profiled):
    arguments = [
        "prune",
        model,
        "--profile",
        profiled,
        "--fraction",
        0.5,
        "--uniform",
        "-o",
        "small",
        "--json",
        *QUICK,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "fastheads", *map(str, arguments)], capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    found, _ = loaded("small")
    before, _ = loaded(model)
    assert result["parameters"] == [sum(p.numel() for p in m.parameters()) for m in (before, found)]
    assert result["parameters"][1] < result["parameters"][0]
    assert (found.config.num_attention_heads, found.config.num_key_value_heads, found.config.head_dim) == (
        2,
        1,
        8,
    )
    assert result["kv_groups"] and len(result["heads"]) == 6
    assert result["rise"] == pytest.approx(result["loss"][1] - result["loss"][0])
    assert (result["sequences"], result["seq_len"], len(result["speed_ratios"])) == (2, 32, 1)
    assert result["options"] == {"fraction": 0.5, "group_by": "sum"}


def test_a_plan_or_a_list_of_heads(run, here, model, profiled):
    Path("heads.json").write_text("[[0, 1], [2, 3]]")
    code, out, err = run("prune", model, "--heads", "heads.json", "-o", "a", "--data", "text.txt", *QUICK)
    assert code == 0, err
    assert "2 heads of 2 layers zeroed\n" in out and "text.txt" in out
    code, _, err = run("prune", model, "--heads", "a/pruning_plan.json", "-o", "b", *QUICK)
    assert code == 0, err
    assert json.loads(Path("a/pruning_plan.json").read_text())["weights"]["dtypes"] == ["float32"]
    one, two = (loaded(folder)[0].state_dict() for folder in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)
    code, _, err = run("prune", model, "--heads", "heads.json", "-o", "a", *QUICK)
    assert (code, err.count("\n")) == (2, 1)
    assert "is not empty" in err
    code, _, err = run("prune", model, "--heads", "heads.json", "-o", "a", "--force", *QUICK)
    assert code == 0, err


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        ("", 2, "Missing option '--output'"),
        ("-o out", 2, "give either --fraction, with --profile, or --heads"),
        ("-o out --fraction 0.1", 2, "--fraction needs --profile"),
        ("-o out --profile PROFILE --fraction 2", 2, "between 0 and 1, not 2.0"),
        ("-o out --heads text.txt", 1, "text.txt is no pruning plan"),
        ("-o out --heads none.json", 1, "none.json: No such file"),
        ("-o out --heads none.json --mode mean", 2, "--mode mean needs --profile"),
        ("-o out --profile PROFILE --fraction 0.5 --rounds 0", 2, "--rounds must be at least 1, not 0"),
        ("-o out --profile PROFILE --fraction 0.5 --seq-len 65", 2, "max_position_embeddings, 64"),
        ("-o out --profile PROFILE --fraction 0.5 --metric size", 2, "no metric 'size'"),
        ("-o out --profile PROFILE --fraction 0.5 --data none.txt", 1, "none.txt"),
        ("-o text.txt --profile PROFILE --fraction 0.5", 1, "text.txt is a file"),
        ("-o MODEL --profile PROFILE --fraction 0.5 --force", 2, "is the model to prune"),
        ("-o out --profile PROFILE --fraction 0.5 --mode mean", 1, "mean vectors"),
    ],
)
def test_bad_input_gets_one_line(run, here, model, profiled, arguments, code, message):
    words = [{"PROFILE": profiled, "MODEL": model}.get(word, word) for word in arguments.split()]
    found, out, err = run("prune", model, *words)
    lines = [line for line in err.splitlines() if not line.startswith(("loading", "pruning"))]
    assert (found, out, len(lines)) == (code, "", 1), err
    assert message in lines[0]
    assert [path.name for path in here.iterdir()] == ["text.txt"]


def test_ctrl_c_while_measuring_keeps_the_folder(run, here, model, profiled, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruned_folder, "compare_models", interrupted)
    code, out, err = run("prune", model, "--profile", profiled, "--fraction", 0.3, "-o", "out", *QUICK)
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "fastheads: interrupted: out is written, and not measured"
    loaded("out")


def test_a_model_without_a_tokenizer_is_pruned_and_not_measured(run, here, model):
    loaded(model)[0].save_pretrained("bare")
    Path("heads.json").write_text("[[0, 1]]")
    code, out, err = run("prune", "bare", "--heads", "heads.json", "-o", "out")
    assert code == 0, err
    assert "no tokenizer is written" in err and "loss" not in out and "parameters" in out


def test_the_help_has_an_example(run):
    code, out, _ = run("prune", "--help")
    assert code == 0
    assert "Example: fastheads prune my-llama --profile" in " ".join(out.split())
