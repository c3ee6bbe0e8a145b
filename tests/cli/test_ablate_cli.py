"""`fastheads ablate`: what it prints and writes, in a pipe and under Ctrl-C, and one clear line for every bad input."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from mean_profiles import drawn_profile

from fastheads.results.ablation import AblationResult
from fastheads.run import loading

PROGRAM = [sys.executable, "-c", "from fastheads.cli.commands import main; main()"]
SMALL = ("--random", "3", "--sequences", "4", "--seq-len", "16", "--fractions", "0.25,0.5")


@pytest.fixture
def profiled(run, here, model):
    """A profile of the text, and another text."""
    assert run("profile", model, "--data", "text.txt", "-o", "p.safetensors")[0] == 0
    (here / "other.txt").write_text("Pack my box with five dozen liquor jugs. " * 8)
    return ("ablate", model, "--profile", "p.safetensors")


def test_the_table_the_file_and_the_plot(run, here, profiled):
    code, out, err = run(
        *profiled, *SMALL, "--data", "other.txt", "--plot", "new/a.png", "-o", "new/a.json", "--each-head"
    )
    assert code == 0, err
    result = AblationResult.load(here / "new" / "a.json")
    assert (result.complete, result.sequences, result.about["data"]["source"]) == (True, 4, "other.txt")
    assert result.about["model"] == profiled[1]
    assert (here / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (here / "new").iterdir()) == ["a.json", "a.png"]
    assert (
        "heads replaced by zero: rise in loss, nats per token, on 4 sequences of 16 tokens of other.txt"
        in out
    )
    assert "lowest by head_residual_ratio" in out
    table = result.table()
    for row in table:
        share = f"{row['heads']} ({row['fraction']:.0%})".replace("%", " %")
        lines = [
            re.findall(r"-?\d+\.\d+|\d+ of \d+", line)
            for line in out.splitlines()
            if line.strip().startswith(share)
        ]
        want = [[f"{row[name]:.4f}" for name in ("rise", "median", "low", "high", "kl")]]
        for name in ("random", "matched"):
            want.append(
                [f"{row[f'{name}_mean']:.4f}", f"{row[f'{name}_least']:.4f}", f"{row[f'{name}_below']} of 3"]
            )
        assert lines == want
    assert max(map(len, out.splitlines()[1:])) <= 80
    assert "each of 12 heads alone" in out
    assert out.rstrip().endswith("saved new/a.json\ndrawn new/a.png")
    assert "\x1b" not in out


def test_json_alone_on_stdout(run, profiled):
    code, out, err = run(
        *profiled, *SMALL, "--data", "other.txt", "--json", "--no-matched", "--metric", "head_residual_ratio"
    )
    assert code == 0, err
    assert json.loads(out) == json.loads(AblationResult.load("ablation.json").to_json())
    assert json.loads(out)["matched"] == []


def test_the_default_text_is_one_that_the_profile_has_not_seen(run, profiled):
    code, out, err = run(*profiled, *SMALL, "--random", "1")
    assert code == 0, err
    assert "no --data: using docstrings of Python's standard library" in err
    assert "docstrings of Python" in out


def test_seen_data(run, here, profiled):
    code, out, err = run(*profiled, *SMALL, "--data", "text.txt")
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("fastheads: the profile has seen this data: 'text.txt'")
    assert "--allow-seen" in err
    assert not (here / "ablation.json").exists()
    assert run(*profiled, *SMALL, "--data", "text.txt", "--allow-seen")[0] == 0


def test_mean_mode(run, here, model):
    found = loading.load_model(loading.find_model(model))
    seen = {"source": "x", "sha256": "0" * 64, "tokens": 1, "sequences": 1}
    drawn_profile(found, data=seen).save(here / "p.safetensors")
    code, out, err = run(
        "ablate", model, "--profile", "p.safetensors", *SMALL, "--mode", "mean", "--data", "text.txt"
    )
    assert code == 0, err
    assert "replaced by their mean" in out and "lowest by mean_ablation_error_ratio" in out
    run("profile", model, "--data", "text.txt", "-o", "without.safetensors")
    code, _, err = run("ablate", model, "--profile", "without.safetensors", *SMALL, "--mode", "mean")
    assert code == 1
    assert err.splitlines()[-1].startswith("fastheads: ") and "no mean vectors" in err


def test_help_has_an_example(run):
    code, out, _ = run("ablate", "--help")
    assert code == 0
    assert "Example: fastheads ablate" in out
    assert "ablate" in run("--help")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (
            ["--fractions", "0.3:0.1:0.1"],
            2,
            "--fractions '0.3:0.1:0.1': expected FIRST:LAST:STEP or numbers with commas",
        ),
        (["--fractions", "x"], 2, "--fractions 'x': expected"),
        (["--fractions", "0.1:0.2"], 2, "--fractions '0.1:0.2': expected"),
        (["--fractions", "2"], 2, "fractions must be above 0 and up to 1, not 2.0"),
        (["--fractions", "0.5,0.1"], 2, "fractions must increase"),
        (["--fractions", "0.001"], 2, "the fraction 0.001 of 12 heads is no head"),
        (["--metric", "size"], 2, "no metric 'size' in this profile"),
        (["--random", "-1"], 2, "random draws must be 0 to 10000, not -1"),
        (["--sequences", "0"], 2, "sequences must be at least 1, not 0"),
        (["--seq-len", "1"], 2, "seq_len must be at least 2"),
        (["--mode", "max"], 2, "max"),
        (["--dtype", "int8"], 2, "unknown dtype 'int8'"),
        (["--data", ""], 2, "--data is empty"),
        (["--data", "none.txt"], 1, "none.txt"),
        (
            ["--data", "other.txt", "--sequences", "1000"],
            1,
            "other.txt has 20 whole sequences of 16 tokens, not 1000",
        ),
        (["--field", "x"], 2, "the text of Python"),
        (["--profile", "none.safetensors"], 1, "none.safetensors: No such file"),
        (["--profile", "text.txt"], 1, "text.txt"),
        (["--plot", "a.txt"], 2, "a picture's name must end in one of"),
        (["-o", "a.txt"], 2, "the output's name must end in .json, not 'a.txt'"),
        (["-o", "mine.json"], 1, "mine.json exists and is no ablation result: it is not overwritten"),
        (["-o", "text.txt/a.json"], 1, "cannot write to the folder text.txt: it is a file"),
    ],
)
def test_bad_input_gets_one_clear_line(run, here, profiled, arguments, code, says):
    (here / "mine.json").write_text("[]")
    before = {path.name for path in here.iterdir()}
    found, out, err = run(*profiled, *SMALL, *arguments)
    assert (found, out) == (code, ""), err
    assert says in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("fastheads: ")
    assert {path.name for path in here.iterdir()} == before


def test_the_profile_of_other_weights_is_refused(run, here, model, profiled):
    other = loading.load_model(loading.find_model(model))
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.mul_(2)
    drawn_profile(other).save(here / "other.safetensors")
    code, _, err = run("ablate", model, "--profile", "other.safetensors", *SMALL)
    assert code == 1
    assert "not of these weights" in err.splitlines()[-1]


def test_in_a_pipe(here, profiled):
    done = subprocess.run(
        [*PROGRAM, *profiled, *SMALL, "--data", "-"],
        input="Sphinx of black quartz, judge my vow. " * 9,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "on 4 sequences" in done.stdout and "\x1b" not in done.stdout + done.stderr
    assert sorted(path.name for path in here.iterdir()) == [
        "ablation.json",
        "other.txt",
        "p.safetensors",
        "text.txt",
    ]


def test_ctrl_c_keeps_what_was_scored_and_the_same_command_goes_on(run, here, profiled, monkeypatch):
    from fastheads.run import ablation as job

    (here / "other.txt").write_text("".join(chr(97 + n * n % 26) for n in range(3_000)))
    arguments = (*profiled, *SMALL, "--sequences", "6", "--batch-tokens", "32", "--data", "other.txt")
    code, out, _ = run(*arguments, "-o", "whole.json")
    assert code == 0
    report, reports = job._Run._report, []

    def stopping(self):
        report(self)
        reports.append(self)
        if len(reports) == 22:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(job._Run, "_report", stopping)
    code, out, err = run(*arguments)
    assert code == 130
    assert "(incomplete)" in out
    assert err.splitlines()[-1] == (
        "fastheads: interrupted: the results on 2 sequences are saved in ablation.json; the same command continues"
    )
    kept = AblationResult.load("ablation.json")
    assert (kept.complete, kept.sequences) == (False, 2)
    code, _, err = run(*arguments, "--seed", "1")
    assert code == 1
    assert (
        "cannot continue from ablation.json.checkpoint: seed is not what it was: 0 then and 1 now"
        in err.splitlines()[-1]
    )
    code, out, err = run(*arguments)
    assert code == 0, err
    assert re.search(
        r"fastheads: continuing from ablation.json.checkpoint: \d+ of \d+ evaluations are done", err
    )
    whole, found = (AblationResult.load(f"{name}.json") for name in ("whole", "ablation"))
    assert found.to_json() == whole.to_json()
    assert not (here / "ablation.json.checkpoint").exists()


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_torchrun_shares_the_work(run, here, profiled):
    arguments = (*profiled, *SMALL, "--data", "other.txt", "--each-head")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "fastheads", *arguments, "-o", "two.json"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved two.json") == 1
    run(*arguments, "-o", "one.json")
    one, two = (AblationResult.load(f"{name}.json") for name in ("one", "two"))
    assert two.curves[0].heads == one.curves[0].heads
    torch.testing.assert_close(
        torch.tensor(two.each_head.rise), torch.tensor(one.each_head.rise), rtol=0, atol=1e-6
    )
    assert not list(here.glob("*.checkpoint*"))
