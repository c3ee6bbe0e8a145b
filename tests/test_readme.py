"""Every code block of the README runs."""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
BIN = Path(sys.executable).parent


def test_every_block_is_python_or_shell():
    assert {kind for kind, _ in BLOCKS} == {"python", "sh"}


def test_figures_are_those_of_the_committed_measurements():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.with_tables(README) == README, "run python bench/tables.py"


@pytest.fixture
def newcomers_folder(tmp_path, monkeypatch):
    """A folder with the model and the text that the README speaks of."""
    save_checkpoint(tmp_path / "my-llama", positions=256)
    (tmp_path / "corpus.txt").write_text("A corpus is many sentences, one after another. " * 80)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(BIN), prepend=os.pathsep)
    return tmp_path


def test_python_blocks_run_in_order(newcomers_folder):
    namespace = {}
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["results"]["head_output_norm"]["count"].eq(1).all()
    assert namespace["head_profile"].metadata["data"]["tokens"] == 2000
    assert (newcomers_folder / "my-heads.png").stat().st_size > 1000
    assert isinstance(namespace["model"], torch.nn.Module)


def shell_blocks():
    return [block for kind, block in BLOCKS if kind == "sh"]


def test_command_line_blocks_run(newcomers_folder):
    (block,) = [b for b in shell_blocks() if b.startswith("fastheads")]
    done = subprocess.run(["bash", "-euc", block], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "12 heads, highest first" in done.stdout and "head_output_norm" in done.stdout
    assert (newcomers_folder / "my-heads.safetensors").exists()


def test_make_knows_the_two_commands():
    """`make test` is what runs this test; `make demo` is run below."""
    (block,) = [b for b in shell_blocks() if b.startswith("make")]
    assert block.split("\n") == ["make demo", "make test", ""]
    for command in block.strip().split("\n"):
        done = subprocess.run(
            [*shlex.split(command), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files of the checkout alone, as a clone has them."""
    folder = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns(
        ".git", ".venv", "__pycache__", "*.egg-info", "demo", ".*_cache", "build"
    )
    shutil.copytree(ROOT, folder / "fastheads", ignore=ignored)
    yield folder / "fastheads"
    shutil.rmtree(folder)  # gigabytes


def outside(command, cwd):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV", "MAKE"))}
    done = subprocess.run(
        ["bash", "-euc", command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_installing_by_hand_and_the_demo(clone):
    (block,) = [b for b in shell_blocks() if b.startswith("python3 -m venv")]
    outside(block, clone)
    assert "profile" in outside(".venv/bin/fastheads --help", clone)
    # make finds the environment complete and goes on to the demonstration itself
    said = outside("touch .venv/.installed && make demo", clone)
    assert "10 highest heads" in said and "layers" in said
    assert (clone / "demo" / "smollm2.png").stat().st_size > 10_000
    assert "8 random draws of as many heads" in said
    assert (clone / "demo" / "ablation.png").stat().st_size > 10_000
    assert said.splitlines()[-1].startswith("wrote demo/report.html; open it in a browser: file://")
    assert "Ablation" in (clone / "demo" / "report.html").read_text()
