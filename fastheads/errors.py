"""Every error that a user of the library can meet. Each message is one line that says what to do.

All derive from `FastheadsError`, and from the built-in exception that fits, so that `except ValueError` catches what it should.
What the system says of files that are missing, or cannot be written, stays an OSError.

    before a run     OptionError, DataError, LoadError, NoSitesError, UnsupportedWeightError, BackendError, MissingExtraError,
                     CheckpointError
    in a forward     ForwardError, with StaleFactorError and VerificationError; TokensError
    in a run         TokenizerError; JobError, RankLostError; ProfileInterrupted, an interrupt, which derives from
                     KeyboardInterrupt alone
    of its results   ResultsError, StaleFactorError
    of profiles      ProfileError, with ProfileFileError; MergeError
"""

import signal
from pathlib import Path
from typing import Any


class FastheadsError(Exception):
    """The base of the errors below."""


class NoSitesError(FastheadsError, ValueError):
    """The model has no attention output projection that can be profiled."""


class UnsupportedWeightError(FastheadsError, ValueError):
    """The dense weight of a projection cannot be read with certainty."""


class BackendError(FastheadsError, RuntimeError):
    """The backend asked for cannot work here."""


class TokensError(FastheadsError, ValueError):
    """Which tokens of a call are valid, or where its sequences begin, cannot be told from its arguments."""


class ForwardError(FastheadsError, RuntimeError):
    """A forward cannot be measured. It is raised out of the forward, which then does not count."""


class StaleFactorError(ForwardError):
    """A projection's weight changed behind the factor: what was measured since may be wrong."""


class VerificationError(ForwardError):
    """The model does not do at a site what is measured there (`verify=True`)."""


class ResultsError(FastheadsError, RuntimeError):
    """The results would be wrong or incomplete, so that none are given."""


class DataError(FastheadsError, ValueError):
    """The data to profile on cannot be read, or hold no tokens."""


class TokenizerError(FastheadsError, RuntimeError):
    """The tokenizer failed, or a process that runs it has ended."""


class LoadError(FastheadsError, ValueError):
    """The model or its tokenizer cannot be loaded."""


class ProfileError(FastheadsError, ValueError):
    """Moments and metadata that no profile can have: other shapes, or moments of no samples."""


class ProfileFileError(ProfileError):
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

    def __init__(self, profile: Any, number: int = signal.SIGINT, checkpoint: Path | None = None) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "ended by a signal")
        self.profile = profile
        self.number = number
        self.checkpoint = checkpoint


class CheckpointError(FastheadsError, ValueError):
    """A checkpoint is damaged, or of another run than the one that is to go on with it."""


class JobError(FastheadsError, RuntimeError):
    """Several processes cannot work together here, or do not know of each other yet."""


class RankLostError(FastheadsError, RuntimeError):
    """Another process of the same job has died or failed."""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return the message of an error in one line, its class where it has no message; longer than `limit`, with an ellipsis."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."
