"""Build the page: the template, the style, the script and the data, in one file that loads nothing.

A content-security policy in the page allows the script and the style of these very bytes and nothing else. The data are text in
base64; the script decodes them and inserts what it finds as text, never as markup.
"""

import base64
import gzip
import hashlib
import html
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastheads._version import __version__
from fastheads.errors import OptionError
from fastheads.results.files import write_atomic
from fastheads.results.protocol import Profile
from fastheads.results.report.payload import Named, payload
from fastheads.results.text import clean

SUFFIXES = (".html", ".htm")
SCRIPTS = ("data.js", "pictures.js", "page.js")  # parts of one script, in the scope of one function
FRAME_HEIGHT = 760  # pixels, of the page in a notebook


def page(profiles: Sequence[Named], curves: Mapping[str, Any] | None = None) -> str:
    """Return the page that shows `profiles`, and the curves of an ablation (`report.ablation`), as HTML.

    Raises:
        OptionError: there are no profiles.
    """
    if not profiles:
        raise OptionError("a report needs a profile at least")
    created = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    # mtime 0: the same profiles give the same bytes
    data = gzip.compress(payload(profiles, curves, created, __version__), 9, mtime=0)
    style = _part("report.css")
    script = '"use strict";\n(() => {\n' + "\n".join(map(_part, SCRIPTS)) + "})();\n"
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": policy,
        "TITLE": html.escape(f"{clean(profiles[0].profile.metadata.get('model', '?'))}: attention heads"),
        "STYLE": style,
        "SCRIPT": script,
        "DATA": base64.b64encode(data).decode(),
    }
    # One pass over the template, so that nothing is looked for in what was inserted.
    text, *rest = _part("report.html").split("{{")
    for piece in rest:
        name, _, after = piece.partition("}}")
        text += parts[name] + after
    return text


def frame(profile: Profile) -> str:
    """Return the page as an iframe for a notebook: sandboxed, so that it reaches nothing of the notebook's."""
    inner = html.escape(page([Named("this profile", profile)]))
    return (
        f'<iframe title="attention heads" sandbox="allow-scripts" width="100%" height="{FRAME_HEIGHT}" '
        f'style="border: 0" srcdoc="{inner}"></iframe>'
    )


def save_page(
    profiles: Sequence[Named], path: str | os.PathLike[str], curves: Mapping[str, Any] | None = None
) -> None:
    """Write the page to `path`, atomically.

    Raises:
        OptionError: the suffix of `path` is not in `SUFFIXES`, or there are no profiles.
        OSError: `path` cannot be written.
    """
    check_name(path)
    write_atomic(path, page(profiles, curves).encode())


def check_name(path: str | os.PathLike[str]) -> None:
    """Raise OptionError unless the suffix of `path` is in `SUFFIXES`."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise OptionError(f"a report's name must end in {' or '.join(SUFFIXES)}, not {Path(path).name!r}")


def _part(name: str) -> str:
    return files("fastheads.results.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """Return the source expression of the content-security policy that allows an element with this text."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
