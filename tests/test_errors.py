"""Every error that the package raises has a class of `fastheads.errors`, and the documentation says when."""

import ast
import re
from pathlib import Path

import pytest

import fastheads
from fastheads import errors
from fastheads.cli import messages

PACKAGE = Path(fastheads.__file__).parent
PAGE = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
OURS = {
    name
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and kind.__module__ == errors.__name__
}

# What may be raised besides: by the file that raises it (None: any), and why.
OTHERS = {
    (None, "OSError"): "the system's own, with the file's name, as open() gives it",
    (None, "IsADirectoryError"): "the same",
    (None, "NotADirectoryError"): "the same",
    (None, "StopIteration"): "the protocol of iterators",
    (None, "NotImplementedError"): "of what subclasses must define",
    ("__init__.py", "AttributeError"): "the protocol of modules",
    ("checkpoint.py", "ContainerError"): "inside: CheckpointError is made of it",
    ("head_profile.py", "ContainerError"): "inside: ProfileError is made of it",
    ("signals.py", "KeyboardInterrupt"): "Ctrl-C once more",
    ("container.py", "ContainerError"): "inside: head_profile.py and checkpoint.py say of which file",
    ("files.py", "UnreadableError"): "inside: the same",
    ("plausible.py", "_BrokenError"): "inside: a LoadError is made of it",
    ("channels.py", "UnknownUpdateError"): "inside: the metric is NaN, and the metadata say why",
    ("residual.py", "UnknownUpdateError"): "inside: the same",
    ("residual_stream.py", "UnknownStreamError"): "inside: the same, of the ratio",
    ("stream.py", "UnknownStreamError"): "inside: the same",
    ("dataflow.py", "UnreadableError"): "inside: stream.py makes an UnknownStreamError of it",
    ("dataflow.py", "AttributeError"): "inside: the same, of a missing attribute",
    ("weight_formats.py", "NotDenseError"): "inside: weights.py names the site",
    ("offload.py", "NotDenseError"): "inside: the same",
    ("sharding.py", "NotDenseError"): "inside: the same",
    ("weights.py", "NotDenseError"): "inside: the same",
    ("signals.py", "Stopped"): "inside: an interrupt, which becomes ProfileInterrupted",
    ("loop.py", "Stopped"): "inside: the same",
    ("commands.py", "Exit"): "typer's, with the code of the process",
    ("ablate.py", "Exit"): "the same",
    ("prune.py", "Exit"): "the same",
    ("options.py", "BadParameter"): "typer's, which the command line prints as wrong usage",
    ("commands.py", "SystemExit"): "the end of the process, with its code",
    ("commands.py", "KeyboardInterrupt"): "Ctrl-C once more",
    ("computed_weights.py", "NotDenseError"): "inside: weights.py names the site",
    ("streaming.py", "TypeError"): "inside: the same file makes an OptionError of it",
    ("geometry.py", "ValueError"): "inside: channels.py makes an OptionError of it",
}


def raised(path: Path) -> list[tuple[int, str]]:
    """Line and name of the class of each `raise` that names one. An error that is caught and raised again is not among them."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Raise) or node.exc is None:
            continue
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        name = kind.attr if isinstance(kind, ast.Attribute) else getattr(kind, "id", "")
        if name[:1].isupper():
            found.append((node.lineno, name))
    return found


def test_the_test_sees_what_is_raised(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "raise ValueError('x')\nraise\nraise a.B from c\nraise error\nraise KeyError\nraise kind(e)(1)\n"
    )
    assert raised(path) == [(1, "ValueError"), (3, "B"), (5, "KeyError")]


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_what_is_raised_has_a_class_of_the_package(path):
    others = {name for file, name in OTHERS if file in (None, path.name)}
    bare = [f"line {line}: {name}" for line, name in raised(path) if name not in OURS | others]
    assert not bare


def test_the_lists_name_files_that_there_are():
    assert {file for file, _ in OTHERS if file} <= {path.name for path in PACKAGE.rglob("*.py")}


def test_all_have_the_base_and_say_when():
    for name in OURS - {"ProfileInterrupted", "AblationInterrupted"}:
        kind = getattr(errors, name)
        assert issubclass(kind, errors.FastheadsError)
        assert kind.__doc__, name
        builtin = [base for base in kind.__mro__ if base.__module__ == "builtins" and base is not Exception]
        assert builtin, name


def test_the_documentation_and_the_module_list_every_error():
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (.+) \|$", PAGE, re.MULTILINE)
    assert {name for name, _, _ in rows} == OURS - {"FastheadsError"}
    for name, base, _ in rows:
        assert base in {kind.__name__ for kind in getattr(errors, name).__mro__}, name
    for name in OURS:
        assert f"{name}" in (errors.__doc__ or ""), name


@pytest.mark.parametrize(
    "error, limit, line",
    [
        (ValueError("first\n   second\tthird"), None, "first second third"),
        (ValueError("  \n"), None, "ValueError"),
        (KeyError(), 20, "KeyError"),
        (ValueError("x" * 20), 20, "x" * 20),
        (ValueError("x" * 21), 20, "x" * 17 + "..."),
    ],
)
def test_one_line_of_an_error(error, limit, line):
    assert errors.one_line(error, limit) == line


FOREIGN = "name\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e\u2066\ud800\0 \u00e9\u3000\u4e2d\n"
SAFE = r"name\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e\u2066\ud800\x00" + " \u00e9\u3000\u4e2d\n"


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name in OURS - {"MissingExtraError"}
        if issubclass(getattr(errors, name), errors.FastheadsError)
    ),
)
def test_no_message_controls_a_terminal_or_fills_it(name):
    kind = getattr(errors, name)
    assert str(kind(FOREIGN)) == SAFE
    assert errors.one_line(kind(FOREIGN)) == " ".join(SAFE.split())
    assert len(str(kind("x" * 10**7))) == errors.LONGEST_MESSAGE
    assert str(kind("as it is")) == "as it is"
    "".join(map(str, [kind(FOREIGN)])).encode()


def test_nor_do_the_lines_of_the_command_line(capsys):
    for show in (messages.note, messages.show_warning):
        show(FOREIGN)
        show("x" * 10**7)
    messages.note(messages.message(FileNotFoundError(2, "No such file", FOREIGN)))
    err = capsys.readouterr().err
    assert not set(err) & set("\x1b\x07\r\x9b\u202e")
    assert r"\x1b]0;owned\x07" in err
    assert len(err) < 5 * errors.LONGEST_MESSAGE
