"""bench/runner.py runs and says what it measured; its figures are for GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "runner.py"


@pytest.mark.slow
def test_the_three_ways_on_a_tiny_model(tmp_path):
    options = ["--cpu", "--tokens", "6000", "--seq-len", "128", "--rounds", "1", "--json", "a.json"]
    subprocess.run(
        [sys.executable, "-W", "ignore", str(BENCH), *options],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert 6000 <= row["tokens"] < 6200
    assert row["padding"] < 0.06 < row["plain_padding"]
    for name in ("runner", "bare", "plain"):
        assert row[f"{name}_tokens_s"] > 0
    assert row["runner_over_bare"] > 0
