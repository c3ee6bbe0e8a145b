"""What the command line says on stderr: notes, what takes a while, warnings and errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fastheads.errors import one_line


def tell_of_replaced(output: Path, checkpoint: Path | None = None) -> None:
    """Say which earlier results a run will replace."""
    if checkpoint is not None and checkpoint.parent.is_dir():
        left = [path.name for path in checkpoint.parent.iterdir() if path.name.startswith(checkpoint.name)]
        if left:
            note(
                f"an earlier run left {min(left)}: it is replaced, for --resume, which goes on from it, is not given"
            )
    if output.exists():
        note(f"{output} exists: it is replaced")


def note(line: str) -> None:
    typer.echo(f"fastheads: {line}", err=True)


@contextmanager
def doing(what: str, terminal: Console) -> Iterator[None]:
    """Say what takes a while: with a spinner on a terminal, as a line elsewhere."""
    if terminal.is_terminal:
        from rich.markup import escape

        with terminal.status(escape(what)):
            yield
    else:
        terminal.print(what, markup=False, soft_wrap=True)
        yield


def fail(line: str, code: int) -> int:
    """Say why the program ends, and return the status that it ends with."""
    note(line)
    return code


def message(error: Exception) -> str:
    """One line; of an OSError, what happened to which file."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return one_line(error)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning as a line of its own, without the place in the source."""
    typer.echo(f"fastheads: warning: {message}", err=True)
