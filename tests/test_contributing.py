"""CONTRIBUTING.md names files and objects that are there, and every module of the package."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
NAMED = sorted(set(re.findall(r"`((?:fastheads|kernels|tests|bench)/[\w./]*)`", TEXT)))
# Of the package, those without a line of their own.
SMALL = {
    "fastheads/_version.py",
    "fastheads/__main__.py",
    "fastheads/distributed.py",
    "fastheads/models/metadata.py",
    "fastheads/results/protocol.py",
    "fastheads/stats/numerics.py",
}


def test_the_files_are_there():
    assert [name for name in NAMED if not (ROOT / name).exists()] == []


def test_the_source_map_names_every_module():
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "fastheads").rglob("*.py")}
    modules = {name for name in modules if not name.endswith("__init__.py") and "/kernels/" not in name}
    assert modules - set(NAMED) - SMALL == set()


@pytest.mark.parametrize(
    "module, name",
    [
        ("fastheads.models.sites", "PROJECTION_PATHS"),
        ("fastheads.models.sites", "ATTENTION"),
        ("fastheads.models.families", "FAMILIES"),
        ("fastheads.models.families", "Family"),
        ("fastheads.backends.registry", "register_backend"),
        ("fastheads.backends.registry", "backend_for"),
        ("fastheads.backends.torch_paths", "Einsum"),
        ("fastheads.run.checkpoint", "FORMAT_VERSION"),
        ("fastheads.corpus.sources", "text_file"),
    ],
)
def test_the_objects_are_there(module, name):
    assert f"`{name}`" in TEXT
    assert hasattr(__import__(module, fromlist=[name]), name)
