"""`fastheads show` and `report`: options that choose what is printed, files that they write."""

import csv
import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from fastheads import HeadProfile
from fastheads.stats.moments import Moments
from fastheads.stats.names import METRICS, RATIO_METRIC

FILE = "p.safetensors"
RELATIVE = METRICS[3]


@pytest.fixture
def saved(here) -> HeadProfile:
    samples = np.random.default_rng(0).lognormal(size=(50, 6, 8)) / 16
    samples[:, 1, 4:] = np.nan
    moments = {m: Moments.of(torch.tensor(samples * n)) for n, m in enumerate((RELATIVE, RATIO_METRIC), 1)}
    sites = [
        {"name": f"layers.{n}", "layer": n, "num_heads": 4 if n == 1 else 8, "head_dim": 8} for n in range(6)
    ]
    for planes in moments.values():
        planes.nonfinite[1, 4:] = 0  # these heads do not exist
    weights = {"dtypes": ["bfloat16"]}
    data = {"source": "a.txt", "tokens": 5000, "sequences": 50, "complete": True}
    metadata = {"model": "m", "sites": sites, "token_agg": "all", "skip_first": 1, "layers": [0, 1, 2, 5]}
    profile = HeadProfile(moments, metadata | {"weights": weights, "data": data})
    profile.save(FILE)
    return profile


def listed(out: str) -> list[tuple[int, int]]:
    rows = re.findall(r"^ +(\d+) +(\d+) +[\d.]+ +±[\d.]+[ ~]*$", out, re.MULTILINE)
    return [(int(layer), int(head)) for layer, head in rows]


def test_either_end_can_be_listed_alone(run, saved):
    ranked = saved.rank(descending=True)
    code, out, err = run("show", FILE, "--top", "3")
    assert (code, err) == (0, "")
    assert listed(out) == ranked[:3]
    assert "3 highest heads" in out and "lowest heads" not in out
    _, out, _ = run("show", FILE, "--bottom", "1", "--metric", RELATIVE)
    assert listed(out) == saved.rank(RELATIVE)[:1]
    assert "1 lowest head\n" in re.sub(" +\n", "\n", out) and "highest heads" not in out
    code, out, err = run("show", FILE, "--top", "3", "--heads", "4")
    assert (code, out, err) == (2, "", "fastheads: give either --heads, or --top and --bottom\n")
    assert run("show", FILE, "--top", "0")[0] == 2


def test_the_head_of_the_table_says_how_it_was_measured(run, saved):
    out = " ".join(run("show", FILE)[1].split())
    assert "model m: 6 layers of 8 heads, bfloat16" in out
    assert "layers 0-2, 5 only" in out
    assert "samples 50 sequences a head, token_agg all, skip_first 1" in out


def test_the_heatmap_marks_the_highest_and_the_lowest(run, saved):
    out = run("show", FILE)[1]
    assert "▲ the 10 highest, ▼ the 10 lowest" in out
    drawn = out[out.index(" head 0") :].splitlines()[1:7]
    for mark, cells in (("▲", saved.rank(descending=True)[:10]), ("▼", saved.rank()[:10])):
        found = {
            (row, (at - 6) // 4)
            for row, line in enumerate(drawn)
            for at in range(len(line))
            if line[at] == mark
        }
        assert found == set(cells)


def test_the_ranking_as_csv_and_as_json(run, saved):
    code, out, err = run("show", FILE, "--csv")
    assert (code, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [(int(row["layer"]), int(row["head"])) for row in rows] == saved.rank(descending=True)
    stats = saved[RATIO_METRIC]
    for row in rows:
        cell = int(row["layer"]), int(row["head"])
        assert float(row["mean"]) == stats["mean"][cell] and float(row["sem"]) == stats["sem"][cell]
    code, out, err = run("show", FILE, "--json", "--top", "1", "--bottom", "2", "--metric", RELATIVE)
    found = json.loads(out)
    assert (code, err, found["metric"], found["skip_first"]) == (0, "", RELATIVE, 1)
    lowest = saved.rank(RELATIVE)
    assert [(head["layer"], head["head"]) for head in found["heads"]] == [lowest[-1], lowest[1], lowest[0]]
    assert [head["rank"] for head in found["heads"]] == [1, 43, 44]
    assert run("show", FILE, "--json", "--csv")[0] == 2


def test_a_picture_is_drawn_beside(run, here, saved):
    code, out, err = run("show", FILE, "--plot", "new/p.svg")
    assert code == 0 and "10 highest heads" in out
    assert err == "fastheads: drawn new/p.svg\n"
    assert (here / "new/p.svg").read_bytes().startswith(b"<?xml")
    code, out, err = run("show", FILE, "--plot", "p.bmp")
    assert (code, out) == (2, "")
    assert err.startswith("fastheads: a picture's name must end in one of .png")


@pytest.mark.parametrize("columns", ["60", "80", "200"])
@pytest.mark.parametrize("color", [{"NO_COLOR": "1"}, {"PYTHONIOENCODING": "ascii"}])
def test_the_lines_fit_the_terminal(saved, columns, color):
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"COLUMNS": columns} | color
    command = [sys.executable, "-m", "fastheads", "show", FILE]
    out = subprocess.run(command, env=environment, capture_output=True, check=True).stdout.decode()
    assert max(map(len, out.splitlines())) <= int(columns)
    assert "\x1b" not in out and (out.isascii() or "NO_COLOR" in color)
    assert (("▲" in out or "^" in out) and "±" in out) or "+-" in out


def test_a_report_is_written(run, here, saved):
    code, out, err = run("report", FILE, "-o", "new/r.html")
    assert (code, err) == (0, "")
    assert out == f"wrote new/r.html; open it in a browser: {(here / 'new/r.html').resolve().as_uri()}\n"
    assert (here / "new/r.html").read_text().startswith("<!DOCTYPE html>")
    code, _, err = run("report", FILE, FILE, "-o", "new/r.html")
    assert (code, err) == (0, "fastheads: new/r.html exists: it is replaced\n")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([FILE, "-o", "r.pdf"], 2, "a report's name must end in .html or .htm, not 'r.pdf'"),
        (["none", "-o", "r.html"], 1, "none: No such file or directory"),
        ([FILE, "text.txt"], 1, "text.txt is not a head profile"),
        ([FILE, "--ablation", "text.txt"], 1, "text.txt: no JSON: "),
        ([FILE, "-o", "text.txt/r.html"], 1, "cannot write to the folder text.txt: it is a file"),
        (["-o", "r.html"], 2, "Missing argument"),
    ],
)
def test_a_report_that_cannot_be_written_is_one_line(run, here, saved, arguments, code, says):
    found, out, err = run("report", *arguments)
    assert (found, out) == (code, "")
    assert err.startswith("fastheads: ") and says in err and err.count("\n") == 1
    assert not list(here.glob("*.html"))
