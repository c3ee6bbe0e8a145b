"""One thread: the models are tiny, and threads that wait for one another would take most of the time."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# The same examples in each run: a failure is that of the change, not of the day. They draw models' arguments, slow to generate.
settings.register_profile(
    "fastheads",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("fastheads")

SUPPORT = Path(__file__).parent / "support"


def pytest_collection_modifyitems(config, items):
    """Leave out what is marked `thorough` or `browser` unless `-m` speaks of it; keep a file in one process, for its fixtures."""
    # Those of the whole checkout first: they install, which takes long, and the other process would wait for them at the end.
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))
    for marker in ("thorough", "browser"):
        left_out = [item for item in items if item.get_closest_marker(marker)]
        if left_out and marker not in config.option.markexpr:
            config.hook.pytest_deselected(items=left_out)
            items[:] = [item for item in items if not item.get_closest_marker(marker)]


@pytest.fixture(scope="session")
def happened(tmp_path_factory):
    """What became of a scenario of tests/support/runs.py, and the folder with what it left.

    One process runs all that are asked for: each start of Python and torch takes seconds.
    """
    from checkpoints import save_checkpoint
    from whole_profiles import some_texts

    folder = tmp_path_factory.mktemp("runs")
    save_checkpoint(folder / "tiny")
    lines = [json.dumps({"text": text}) + "\n" for text in some_texts(2500)]
    (folder / "text.jsonl").write_text("".join(lines))
    environment = os.environ | {
        **{"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        "PYTHONPATH": os.pathsep.join([str(SUPPORT), *sys.path]),
    }
    command = [sys.executable, "-W", "ignore", str(SUPPORT / "runs.py"), str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        done = {}

        def result(name):
            if name not in done:
                limit = threading.Timer(120, process.kill)
                limit.start()
                try:
                    print(name, file=process.stdin, flush=True)
                    assert process.stdout.readline() == name + "\n"
                finally:
                    limit.cancel()
                done[name] = json.loads((folder / f"{name}.json").read_text())
            assert "error" not in done[name], done[name]["error"]
            return done[name], folder

        yield result
