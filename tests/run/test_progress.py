"""What is said of a run under way: a bar on a terminal, a line a minute elsewhere, and estimates from what was read."""

import io
import re

import pytest
from checkpoints import ascii_tokenizer, tiny_llama
from rich.console import Console
from whole_profiles import some_texts

from fastheads.corpus.sources import held_texts
from fastheads.corpus.windows import Corpus
from fastheads.run import terminal
from fastheads.run.api import profile
from fastheads.run.loop import Run
from fastheads.run.progress import Status


def test_a_line_soon_and_then_one_a_minute(monkeypatch):
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    out = io.StringIO()
    with terminal.progress_bar(Console(file=out, width=40)) as report:
        for second in range(200):
            now = 100.0 + second
            report(Status(7, 1000 + 10 * second, expected=11_000, padding=0.031, overhead=0.004))
    lines = out.getvalue().splitlines()
    assert lines == [
        "1,020 of about 11,000 tokens, 10 tokens/s, 3.1% padding, profiling +0.4%, 998 s left",
        "1,620 of about 11,000 tokens, 10 tokens/s, 3.1% padding, profiling +0.4%, 938 s left",
        "2,220 of about 11,000 tokens, 10 tokens/s, 3.1% padding, profiling +0.4%, 878 s left",
        "2,820 of about 11,000 tokens, 10 tokens/s, 3.1% padding, profiling +0.4%, 818 s left",
    ]


def test_a_resumed_run_has_its_own_speed(monkeypatch):
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    out = io.StringIO()
    with terminal.progress_bar(Console(file=out)) as report:
        report(Status(5_000, 5_000))
        now = 10.0
        report(Status(5_100, 5_100))
    assert out.getvalue() == "5,100 tokens, 10 tokens/s, 0.0% padding\n"


@pytest.mark.parametrize("width", [60, 80, 130])
def test_a_bar_on_a_terminal(width):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None)
    with terminal.progress_bar(console) as report:
        report(Status(0, 0, expected=2_000))
        report(Status(500, 1_500, 2_000, 2_000, padding=0.021, overhead=-0.002))
    last = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", out.getvalue().split("\r")[-1])
    assert "1,500/2,000 tokens" in last
    assert ("2.1% padding, profiling -0.2%" in last) == (width >= terminal.NOTES_FROM)


def test_the_number_of_tokens_is_expected_from_what_was_read(monkeypatch):
    """Of each shard, also of the first, which is a window ahead of the others."""
    texts = some_texts(400)
    statuses = []
    tell = Run._report
    monkeypatch.setattr(
        Run, "_report", lambda run: (tell(run), statuses.append((run.tokens, run.feed.expected)))
    )
    model, tokenizer = tiny_llama(), ascii_tokenizer()
    for i in range(3):
        statuses.clear()
        corpus = Corpus(
            held_texts(texts), tokenizer, seq_len=48, shard=(i, 3), window_characters=500, workers=0
        )
        found = profile(model, corpus, batch_tokens=400)
        tokens = found.metadata["data"]["tokens"]
        assert statuses[-1][0] == tokens
        assert all(expected == pytest.approx(tokens, rel=0.25) for _, expected in statuses)
