"""What the command line ranks by, measures and shows: --metrics, --metric, --mode, ties."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastheads import HeadProfile
from fastheads.run import loading
from fastheads.stats.moments import Moments
from fastheads.stats.names import METRICS, RATIO_METRIC, RATIO_SQUARE_METRIC

OUTPUT, CONTRIBUTION, _, RELATIVE = METRICS
NO_RATIO = "shown since this profile has no head_residual_ratio"
FILE = "head_profile.safetensors"


def save(*metrics: str, rows: int = 6, heads: int = 4, path: str = FILE) -> HeadProfile:
    """A file with these metrics of lognormal samples, in which 1 stands for the average head."""
    samples = np.random.default_rng(0).lognormal(size=(50, rows, heads)) / 16
    sites = [{"name": f"layers.{n}", "layer": n, "num_heads": heads, "head_dim": 8} for n in range(rows)]
    moments = {}
    for number, metric in enumerate(metrics, 1):
        values = samples**2 if metric == RATIO_SQUARE_METRIC else samples * number
        moments[metric] = Moments.of(torch.tensor(values))
    data = {"source": "a.txt", "tokens": 5000, "sequences": 50, "complete": True}
    profile = HeadProfile(moments, {"model": "m", "sites": sites, "token_agg": "all", "data": data})
    profile.save(path)
    return profile


def test_the_ratio_is_shown_where_the_file_has_it(run, here):
    save(OUTPUT, RELATIVE, RATIO_METRIC, RATIO_SQUARE_METRIC)
    code, out, err = run("show", FILE)
    assert (code, err) == (0, "")
    assert re.search(rf"metric +{RATIO_METRIC} \(relative to the residual stream\)", out)
    assert NO_RATIO not in out
    assert re.search(r"layer +head +mean +± sem +rms", out)
    assert "~ a tie: within 1.96" in out


def test_where_the_file_lacks_it_a_relative_metric_is_shown_and_a_line_says_so(run, here):
    save(OUTPUT, CONTRIBUTION, RELATIVE)
    code, out, err = run("show", FILE)
    assert (code, err) == (0, "")
    assert re.search(rf"metric +{RELATIVE}", out)
    assert sum(NO_RATIO in line for line in out.splitlines()) == 1
    code, out, _ = run("show", FILE, "--metric", RELATIVE)
    assert NO_RATIO not in out
    code, out, _ = run("show", FILE, "--metric", OUTPUT)
    assert "grows with depth: compare heads within a layer only" in " ".join(out.split())
    code, out, err = run("show", FILE, "--metric", RATIO_METRIC)
    assert (code, out) == (2, "")
    assert err.startswith(f"fastheads: no metric '{RATIO_METRIC}' in this profile; it has ")


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize(
    "metrics", [(OUTPUT, RELATIVE), (OUTPUT, RELATIVE, RATIO_METRIC, RATIO_SQUARE_METRIC)]
)
def test_in_a_pipe_the_lines_fit_eighty_columns(here, metrics, encoding):
    save(*metrics)
    environment = os.environ | {"PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    environment.pop("COLUMNS", None)
    done = subprocess.run(
        [sys.executable, "-m", "fastheads", "show", FILE], env=environment, capture_output=True, check=True
    )
    out = done.stdout.decode(encoding)
    assert max(map(len, out.splitlines())) <= 80
    assert "\x1b" not in out


def test_the_metrics_that_are_named_are_measured_and_stored(run, here, model):
    arguments = ["profile", model, "--data", "text.txt", "--metrics"]
    code, out, err = run(*arguments, f"{OUTPUT}, {CONTRIBUTION}")
    assert code == 0, err
    assert HeadProfile.load(FILE).metrics == (OUTPUT, CONTRIBUTION)
    assert re.search(rf"metric +{OUTPUT}", out) and NO_RATIO in out
    code, out, err = run(*arguments, f"{OUTPUT},size")
    assert (code, out) == (2, "")
    assert err.startswith(f"fastheads: unknown metric 'size': choose among {OUTPUT}, ")
    assert err.count("\n") == 1
    for empty in ("", OUTPUT + ",", ","):
        code, _, err = run(*arguments, empty)
        assert (code, err) == (
            2,
            f"fastheads: --metrics {empty!r}: expected names with commas between them\n",
        )


def test_help_shows_how_metrics_are_named(run):
    code, out, _ = run("profile", "--help")
    assert code == 0
    said = " ".join(out.replace("│", "").split())
    assert "--metrics NAMES" in said and "as in 'head_output_norm, head_residual_ratio'" in said


def test_a_run_until_stable_measures_what_it_looks_at(run, here, model, monkeypatch):
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model is loaded"))
    code, out, err = run("profile", model, "--data", "text.txt", "--until-stable", "--metrics", OUTPUT)
    assert (code, out) == (2, "")
    assert err == (
        f"fastheads: until_stable looks at {RATIO_METRIC} or {RELATIVE} or kv_group_streaming_error_square: name one of them in "
        "metrics too\n"
    )


def test_a_run_that_has_settled_says_by_what(run, here, model):
    text = "".join(f"{n} brown foxes jump over {n * n % 97} lazy dogs.\n" for n in range(3000))
    (here / "long.txt").write_text(text)
    arguments = ["--data", "long.txt", "--until-stable", "--seq-len", "16", "--cut", "stream"]
    code, _, err = run("profile", model, *arguments)
    assert code == 0, err
    found = HeadProfile.load(FILE).metadata["data"]["until_stable"]
    assert found["settled"]
    assert re.search(
        rf"^fastheads: the ranking has settled: 12 heads, .* \(by {found['metric']}\)$", err, re.M
    )


class TestMode:
    @pytest.fixture(autouse=True)
    def errors(self, monkeypatch):
        errors = np.arange(24.0).reshape(6, 4) / 100
        monkeypatch.setattr(HeadProfile, "mean_ablation_error_ratio", lambda _, model: errors, raising=False)

    def test_for_mean_ablation_its_error_ranks(self, run, here, model):
        save(RELATIVE, RATIO_METRIC)
        code, out, err = run("show", FILE, "--mode", "mean", "--model", model, "--heads", "all")
        assert code == 0, err
        assert err == f"loading {model}\n"
        assert re.search(r"metric +mean-ablation error per residual", out)
        rows = re.findall(r"^ +(\d+) +(\d+) +([\d.]+) *$", out, re.MULTILINE)
        assert [4 * int(layer) + int(head) for layer, head, _ in rows] == [*range(23, -1, -1)]
        assert "~" not in out and "sem" not in out

    @pytest.mark.parametrize(
        ("wrong", "says"),
        [
            (["--mode", "mean"], "--mode mean needs --model, the model that was profiled"),
            (["--model", "m"], "--model is for --mode mean"),
            (
                ["--mode", "mean", "--model", "m", "--metric", RELATIVE],
                "--mode mean ranks by the error of mean ablation: leave out --metric",
            ),
        ],
    )
    def test_options_that_do_not_fit_are_refused(self, run, here, wrong, says):
        save(RELATIVE)
        assert run("show", FILE, *wrong) == (2, "", f"fastheads: {says}\n")

    def test_an_error_that_is_unknown_is_no_rank(self, run, here, model, monkeypatch):
        save(RELATIVE)
        unknown = np.full((6, 4), math.nan)
        monkeypatch.setattr(HeadProfile, "mean_ablation_error_ratio", lambda _, model: unknown, raising=False)
        code, out, err = run("show", FILE, "--mode", "mean", "--model", model)
        assert (code, out) == (1, "")
        assert "is unknown for 24 of 24 heads (layer 0, ...)" in err
