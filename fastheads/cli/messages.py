"""Messages of the command line on stderr: notes, progress, warnings and errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console

from fastheads.errors import one_line, printable


def tell_of_replaced(output: Path, checkpoint: Path | None = None) -> None:
    """Print which earlier results a run will replace."""
    if checkpoint is not None and checkpoint.parent.is_dir():
        left = [path.name for path in checkpoint.parent.iterdir() if path.name.startswith(checkpoint.name)]
        if left:
            note(f"replacing {min(left)} of an earlier run (--resume would continue it)")
    if output.exists():
        note(f"{output} exists: it is replaced")


def note(line: str) -> None:
    """Print a line, which may repeat text from a file."""
    typer.echo(f"fastheads: {printable(line)}", err=True)


@contextmanager
def doing(what: str, terminal: Console) -> Iterator[None]:
    """Print what takes a while: with a spinner on a terminal, else as a line."""
    if terminal.is_terminal:
        from rich.markup import escape

        with terminal.status(escape(what)):
            yield
    else:
        terminal.print(what, markup=False, soft_wrap=True)
        yield


def fail(line: str, code: int) -> int:
    """Print why the program ends, and return its exit status."""
    note(line)
    return code


def message(error: Exception) -> str:
    """Format an error as one line; an OSError with the file's name and the reason."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return one_line(error)


def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Print a warning as one line, without its location in the source."""
    typer.echo(f"fastheads: warning: {printable(str(message))}", err=True)
