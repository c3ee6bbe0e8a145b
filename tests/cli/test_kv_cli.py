"""`fastheads kv`."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from fastheads import HeadProfile
from fastheads.intervene.kv_map import KvMap

SMALL = ("--data", "text.txt", "--sink", 2, "--window", 6, "--seq-len", 48, "--sequences", 3)


def test_from_a_model_to_a_map(run, here, model):
    outputs = ("-o", "map.json", "-o", "duo", "-o", "profile.safetensors")
    code, out, err = run("kv", model, *SMALL, *outputs)
    assert code == 0, err
    assert re.search(r"window +the first 2 tokens and the last 6", out)
    assert re.search(r"layer +KV group +error +cache", out)
    assert "2 + 6" in out
    assert "wrote map.json" in out
    found = KvMap.load("map.json")
    assert (found.sink, found.window) == (2, 6)
    assert len(found.kept) == len(found.streaming)
    assert np.loadtxt("duo/full_attention_heads.tsv", delimiter="\t").shape[0] == len(found.layers)
    profile = HeadProfile.load("profile.safetensors")
    assert profile.metadata["streaming"] == {"sink": 2, "window": 6}
    # Again from the profile, as JSON, without a model.
    code, out, err = run("kv", "--profile", "profile.safetensors", "--keep", 0.25, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["full"] == [list(row) for row in found.with_share(0.25).full]


def test_evaluation(run, here, model):
    code, out, err = run(
        "kv", model, *SMALL[:-4], "--seq-len", 64, "--sequences", 1, "--held-out", 2, "--curve", "--draws", 2
    )
    assert code == 0, err
    text = " ".join(out.split())
    assert "rise in loss" in text
    assert "2 random draws" in text
    assert "attention mass" in text
    assert "draw 2 of 2" in err
    code, out, err = run(
        "kv",
        model,
        *SMALL[:-4],
        "--seq-len",
        64,
        "--sequences",
        1,
        "--held-out",
        2,
        "--evaluate",
        "--draws",
        1,
        "--json",
    )
    found = json.loads(out)["evaluation"]
    assert [cost["chosen by"] for cost in found["costs"]] == [
        "streaming error",
        "attention mass",
        "all groups",
    ]
    assert set(found["costs"][0]["rise"]) == {"text", "repeated segment"}


def test_a_heatmap(run, here, model):
    pytest.importorskip("matplotlib")
    code, _, err = run("kv", model, *SMALL, "-o", "map.png")
    assert code == 0, err
    assert (here / "map.png").read_bytes().startswith(b"\x89PNG")


def test_profile_measures_the_errors_too(run, here, model):
    code, _, err = run(
        "profile",
        model,
        "--data",
        "text.txt",
        "--seq-len",
        48,
        "--max-tokens",
        200,
        "--streaming-error",
        "2,6",
    )
    assert code == 0, err
    assert "kv_group_streaming_error" in HeadProfile.load("head_profile.safetensors").metrics
    code, out, err = run("kv", "--profile", "head_profile.safetensors")
    assert code == 0, err
    assert "the first 2 tokens and the last 6" in out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--keep", 2), "keep must be a share of the KV groups from 0 to 1, not 2.0"),
        (("--keep", 0.5, "--max-error", 0.1), "give --keep or --max-error, not both"),
        (("--window", 0), "window must be a whole number of tokens, 1 or more, not 0"),
        (("-o", "map.txt"), "must end in .json, .safetensors"),
        (("--sequences", 0), "--sequences must be at least 1, not 0"),
    ],
)
def test_wrong_options_are_told_in_one_line(run, here, arguments, text):
    code, out, err = run("kv", "no-such-model", *arguments)
    assert (code, out) == (2, "")
    assert text in err


def test_short_texts_are_told(run, here, model):
    code, _, err = run("kv", model, *SMALL[:-2], "--sequences", 5000)
    assert code == 1
    assert "sequences of 48 tokens, and 5000 are needed" in err
    code, _, err = run("kv", model, "--data", "text.txt", "--seq-len", 48)
    assert code == 2
    assert "end within sink + window, 4 + 256: use longer ones" in err


def test_a_profile_of_another_window_or_model_is_refused(run, here, model):
    assert run("kv", model, *SMALL, "-o", "profile.safetensors")[0] == 0
    code, _, err = run("kv", "--profile", "profile.safetensors", "--window", 7)
    assert code == 2
    assert "the profile has sink 2 and window 6, not 2 and 7" in err


def test_help_has_an_example_and_output_may_be_piped(here, model):
    found = subprocess.run(
        [sys.executable, "-m", "fastheads", "kv", "--help"], capture_output=True, text=True, check=True
    )
    assert "Example: fastheads kv" in found.stdout
