"""The default text for evaluations: docstrings of Python's standard library, which no default run of `profile` has seen."""

import ast
import hashlib
import platform
import sysconfig
from pathlib import Path

from fastheads.corpus.sources import TextSource
from fastheads.errors import DataError

# Modules that explain much in prose.
MODULES = (
    *("statistics", "difflib", "random", "doctest", "optparse", "decimal", "textwrap", "fractions", "heapq"),
    *("argparse", "pickletools", "turtle", "unittest/case", "typing", "logging/__init__", "cmd", "string"),
    *("configparser", "shelve", "sched", "shutil", "subprocess", "tempfile", "threading", "inspect", "pdb"),
    *(
        "email/message",
        "mailbox",
        "smtplib",
        "ipaddress",
        "datetime",
        "calendar",
        "gettext",
        "pprint",
        "code",
    ),
    *("codeop", "functools", "contextlib", "traceback", "timeit", "trace", "zipfile", "tarfile", "uuid"),
)
SHORTEST = 150  # characters of a docstring
MOST = 6_000  # characters of one module


def docstrings_text() -> TextSource:
    """Return the docstrings as one text, about 200,000 characters. Its name and hash tell which version of Python it is from.

    Raises:
        DataError: the sources of the standard library are not there.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    text = "\n\n".join(part for name in MODULES for part in _docstrings(folder / f"{name}.py"))
    if not text:
        raise DataError(
            f"there are no Python sources in {folder}, whose docstrings are the default text: name data (--data)"
        )
    name = f"docstrings of Python {platform.python_version()}"
    content = text.encode()
    return TextSource(name, "stream", hashlib.sha256(content).hexdigest(), len(content), held=(text,))


def _docstrings(path: Path) -> list[str]:
    """Return the longer docstrings of a module, up to `MOST` characters; none if there is no such module."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    found, taken = [], 0
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = (ast.get_docstring(node) or "").strip()
            if len(text) >= SHORTEST and taken + len(text) <= MOST:
                found.append(text)
                taken += len(text)
    return found
