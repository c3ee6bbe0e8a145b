"""The rooms of the package: what each may import."""

import ast
from pathlib import Path

import pytest

import fastheads

PACKAGE = Path(fastheads.__file__).parent
# A room imports only from rooms before it.
ORDER = (
    "errors",
    "stats",
    "corpus",
    "models",
    "results",
    "backends",
    "capture",
    "basic",
    "intervene",
    "run",
    "cli",
)
# Modules that stand outside the rooms: public names, and what may be imported from anywhere.
ANYWHERE = ("_version", "kernels")
FRONT_DOOR = ("__init__", "__main__", "distributed")


def name_of(path):
    """The module's name within the package: `stats.metrics`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(source):
    """The modules of the package that it imports, wherever in it: in functions and under TYPE_CHECKING too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "fastheads"}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastheads":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner.removeprefix("fastheads.") in MODULES else node.module)
    return {name.removeprefix("fastheads.") for name in found if name != "fastheads"}


def room(module):
    return module.split(".")[0]


def upward(module, imported):
    """True if the first may not import the second."""
    if room(imported) in ANYWHERE:
        return False
    return ORDER.index(room(imported)) > ORDER.index(room(module))


IMPORTS = {name: imports(path.read_text()) for name, path in MODULES.items()}


def test_the_test_sees_hidden_imports():
    source = "def f():\n    from fastheads.capture import manager\nif TYPE_CHECKING:\n    import fastheads.run.api\n"
    assert imports(source) == {"capture.manager", "run.api"}
    assert upward("models.sites", "capture.manager")
    assert not upward("capture.manager", "models.sites")


def test_every_module_is_in_a_room():
    assert {room(name) for name in MODULES} == {*ORDER, *FRONT_DOOR, "_version"}


@pytest.mark.parametrize("module", sorted(set(MODULES) - {*FRONT_DOOR, "_version"}))
def test_a_room_imports_only_from_rooms_before_it(module):
    assert not {other for other in IMPORTS[module] if upward(module, other)}


def test_no_imports_run_in_a_circle():
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, " -> ".join([*under_way, module])
        if module in done or module not in IMPORTS:
            return
        under_way.append(module)
        for other in sorted(IMPORTS[module]):
            visit(other)
        under_way.pop()
        done.add(module)

    for module in IMPORTS:
        visit(module)


def test_names_that_were_public_before_are_where_they_were():
    from fastheads.basic import HookManager
    from fastheads.corpus import Corpus, open_source
    from fastheads.distributed import Job

    assert [HookManager.__name__, Corpus.__name__, open_source.__name__, Job.__name__] == [
        *("HookManager", "Corpus", "open_source", "Job")
    ]
