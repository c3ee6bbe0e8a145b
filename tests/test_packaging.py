"""The wheel, in a clean environment outside the checkout."""

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command, cwd, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env=clean | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    # A copy, so that setuptools' build folder does not appear in the checkout.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fastheads", "kernels"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_and_no_top_level_kernels(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "fastheads/__init__.py" in names and "fastheads/kernels/__init__.py" in names
    assert "fastheads/py.typed" in names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fastheads").rglob("*.py")}
    assert modules <= set(names)
    page = ("report.html", "report.css", "data.js", "pictures.js", "page.js")
    assert {f"fastheads/results/report/{name}" for name in page} <= set(names)
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"fastheads"}


@pytest.mark.slow
def test_the_wheel_installs_with_its_dependencies_and_works(wheel, tmp_path):
    venv.create(tmp_path / "clean", with_pip=True)
    bin_ = tmp_path / "clean" / ("Scripts" if os.name == "nt" else "bin")
    pip = (bin_ / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check")
    run(*pip, "-c", ROOT / "constraints.txt", "torch", cwd=tmp_path)
    run(*pip, "-c", ROOT / "constraints.txt", wheel, cwd=tmp_path)
    program = """
import json, sys, importlib.util, fastheads, transformers
print(json.dumps({"file": fastheads.__file__, "version": fastheads.__version__, "triton": "triton" in sys.modules,
                  "kernels": importlib.util.find_spec("kernels") is not None}))
"""
    told = json.loads(run(bin_ / "python", "-c", program, cwd=tmp_path).splitlines()[-1])
    assert Path(told["file"]).is_relative_to(tmp_path)
    assert not told["triton"], "importing fastheads must not import triton"
    assert not told["kernels"], "a top-level package `kernels` would shadow Hugging Face's"
    assert told["version"] in run(bin_ / "fastheads", "--version", cwd=tmp_path)
    assert "profile" in run(bin_ / "fastheads", "--help", cwd=tmp_path)
    shutil.rmtree(tmp_path / "clean")  # gigabytes


def test_no_top_level_kernels_can_be_imported():
    program = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    assert run(sys.executable, "-c", program, cwd=ROOT.parent).strip() == "None"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_fastheads_works_where_triton_is_absent(tmp_path):
    """As on macOS and Windows: importing it fails, and asking for it says so."""
    program = """
import sys

class Absent:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent)
import torch, transformers, fastheads
config = transformers.LlamaConfig(vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                  num_attention_heads=2, num_key_value_heads=2)
model = transformers.AutoModelForCausalLM.from_config(config)
with fastheads.HookManager(model) as hooks:
    model(torch.tensor([[3, 4, 5]]))
    assert hooks.get_results()["head_output_norm"]["count"].tolist() == [[1, 1]]
try:
    fastheads.HookManager(model, backend="triton")
except RuntimeError as error:
    print(error)
"""
    said = run(sys.executable, "-c", program, cwd=tmp_path)
    assert "triton" in said and "loop, einsum, factored" in said
