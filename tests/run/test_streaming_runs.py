"""Streaming errors in runs: they resume, merge by shards, and may decide when a run has settled."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from checkpoints import ascii_tokenizer, save_checkpoint, tiny_llama
from whole_profiles import assert_same, some_texts

from fastheads import HeadProfile
from fastheads.corpus.sources import held_texts
from fastheads.corpus.windows import Corpus
from fastheads.errors import OptionError, ProfileInterrupted
from fastheads.run.api import profile
from fastheads.stats.confidence import StableRule
from fastheads.stats.names import KV_STREAMING_METRIC, STREAMING_METRICS

OPTIONS = {"batch_tokens": 200, "streaming": (2, 6)}


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


def corpus():
    return Corpus(held_texts(some_texts()), ascii_tokenizer(), seq_len=48, window_characters=500, workers=0)


def test_a_stopped_run_goes_on_where_it_stood(model, tmp_path):
    want = profile(model, corpus(), **OPTIONS)
    assert want.arrays[KV_STREAMING_METRIC].count.max() > 50
    path, batches = tmp_path / "c", 0

    def progress(done, total):
        nonlocal batches
        batches += 1
        if batches == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(ProfileInterrupted):
        profile(model, corpus(), checkpoint=path, progress=progress, **OPTIONS)
    found = profile(model, corpus(), checkpoint=path, resume=True, **OPTIONS)
    assert_same(found, want)


def test_batches_and_padding_do_not_matter(model):
    """Rows are padded on the right, without a mask."""
    want = profile(model, corpus(), batch_size=1, streaming=(2, 6))
    found = profile(model, corpus(), **OPTIONS)
    for metric in STREAMING_METRICS:
        for stat in ("count", "mean", "max"):
            got, expected = (torch.tensor(p.statistics(metric)[stat]) for p in (found, want))
            assert torch.allclose(got, expected, rtol=1e-4, equal_nan=True)


def test_shards_merge_to_the_whole(model):
    want = profile(model, corpus(), **OPTIONS)
    parts = [profile(model, corpus(), shard=(n, 2), **OPTIONS) for n in range(2)]
    merged = HeadProfile.merge(parts)
    for metric in STREAMING_METRICS:
        got, expected = (torch.tensor(p.statistics(metric)["mean"]) for p in (merged, want))
        assert torch.allclose(got, expected, rtol=1e-5, equal_nan=True)


def test_a_run_ends_when_the_kv_groups_have_settled(model):
    found = profile(
        model,
        corpus(),
        metrics=STREAMING_METRICS,
        until_stable=StableRule(tolerance=9.0, min_samples=2),
        **OPTIONS,
    )
    rule = found.metadata["data"]["until_stable"]
    assert rule["settled"]
    assert not found.metadata["data"]["complete"]
    assert rule["metric"] == "kv_group_streaming_error_square"


def test_compiled_runs_are_refused(model):
    with pytest.raises(OptionError, match="leave out compile"):
        profile(model, corpus(), compile=True, **OPTIONS)


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    save_checkpoint(tmp_path / "tiny")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some_texts()))
    command = [
        "fastheads",
        "profile",
        "tiny",
        "--data",
        "text.jsonl",
        "--seq-len",
        "48",
        "--streaming-error",
        "2,6",
    ]
    for start, name in (
        ((sys.executable, "-m"), "one"),
        (
            (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"),
            "two",
        ),
    ):
        subprocess.run(
            [*start, *command, "--device", "cpu", "-o", f"{name}.safetensors"], cwd=tmp_path, check=True
        )
    one, two = (HeadProfile.load(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    for metric in STREAMING_METRICS:
        for stat in ("count", "mean", "max"):
            got, expected = (torch.tensor(p.statistics(metric)[stat]) for p in (two, one))
            assert torch.allclose(got, expected, rtol=1e-4, equal_nan=True)
