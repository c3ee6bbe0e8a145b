"""What can go wrong with things that users hand in; each message is one line that says what to do."""

import signal
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from fastheads.results import HeadProfile


class FastheadsError(Exception):
    """The base of the errors below."""


class DataError(FastheadsError, ValueError):
    """The data to profile on cannot be read, or hold no tokens."""


class LoadError(FastheadsError, ValueError):
    """The model or its tokenizer cannot be loaded."""


class ProfileFileError(FastheadsError, ValueError):
    """A file is no head profile, or a damaged one."""


class MergeError(FastheadsError, ValueError):
    """Profiles that must not be merged: of different things, or of the same data."""


class OptionError(FastheadsError, ValueError):
    """An option is unknown, out of range, or does not fit the model. The command line calls it wrong usage."""


class MissingExtraError(FastheadsError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'fastheads[{extra}]'")


class ProfileInterrupted(KeyboardInterrupt):  # an interrupt, like its base, rather than an error
    """Ctrl-C or SIGTERM during `profile()`.

    `profile` holds what was measured until then, marked as incomplete; of several processes, this one's part.
    `number` is the signal's, and `checkpoint` the file that a run with `resume=True` goes on from, or None.
    """

    def __init__(
        self, profile: "HeadProfile", number: int = signal.SIGINT, checkpoint: "Path | None" = None
    ) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "ended by a signal")
        self.profile = profile
        self.number = number
        self.checkpoint = checkpoint


class CheckpointError(FastheadsError, ValueError):
    """A checkpoint is damaged, or of another run than the one that is to go on with it."""


class RankLostError(FastheadsError, RuntimeError):
    """Another process of the same job has died or failed."""
