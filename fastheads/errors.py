"""Every error that a user of the library can meet. Each message is one line that says what to do.

All derive from `FastheadsError` and from the built-in exception that fits, so that `except ValueError` works. Files that are
missing, or cannot be written, raise the system's OSError.

    before a run     OptionError, DataError, LoadError, NoSitesError, UnsupportedWeightError, BackendError, MissingExtraError,
                     CheckpointError, FileInUseError
    in a forward     ForwardError, with StaleFactorError and VerificationError; TokensError
    in a run         TokenizerError; JobError, RankLostError; ProfileInterrupted and AblationInterrupted, interrupts, which
                     derive from KeyboardInterrupt alone
    of its results   ResultsError, StaleFactorError
    of its objects   NotCopyableError
    of profiles      ProfileError, with ProfileFileError; MergeError
    of pruning       PlanError, PruningError
    of ablations     AblationFileError
    of maps          KvMapError
"""

import signal
from pathlib import Path
from typing import Any
from unicodedata import category

LONGEST_MESSAGE = 4000  # characters; a message may repeat text from a file


def printable(text: str, limit: int = LONGEST_MESSAGE) -> str:
    """Escape what could control a terminal (escape sequences, directions of writing) or not be printed, and shorten to `limit`
    characters. Lines, tabs and blanks stay.
    """
    text = text if len(text) <= limit else text[: limit - 3] + "..."
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in _KEPT or category(c) == "Zs" else ascii(c)[1:-1] for c in text
    )


_KEPT = "\n\t"


class FastheadsError(Exception):
    """The base of the errors below. Their messages may repeat text from a file, and are always printable."""

    def __str__(self) -> str:
        return printable(super().__str__())


class NoSitesError(FastheadsError, ValueError):
    """The model has no attention output projection that can be profiled."""


class UnsupportedWeightError(FastheadsError, ValueError):
    """The dense weight of a projection cannot be read with certainty."""


class BackendError(FastheadsError, RuntimeError):
    """The backend asked for cannot work here."""


class TokensError(FastheadsError, ValueError):
    """The arguments of a call do not show which tokens are valid, or where sequences begin."""


class ForwardError(FastheadsError, RuntimeError):
    """A forward cannot be measured. Raised inside the forward, which then does not count."""


class StaleFactorError(ForwardError):
    """A projection's weight changed without its factor being rebuilt: samples since then may be wrong."""


class VerificationError(ForwardError):
    """The self-check (`verify=True`) found that the model computes something else at a site than what is measured."""


class ResultsError(FastheadsError, RuntimeError):
    """The results would be wrong or incomplete, so none are returned."""


class NotCopyableError(FastheadsError, TypeError):
    """A HookManager, or a model with its hooks on, can be neither copied nor pickled."""


class FileInUseError(FastheadsError, OSError):
    """Another run is writing the output or the checkpoint."""


class DataError(FastheadsError, ValueError):
    """The data to profile on cannot be read, or hold no tokens."""


class TokenizerError(FastheadsError, RuntimeError):
    """The tokenizer failed, or a process that runs it has ended."""


class LoadError(FastheadsError, ValueError):
    """The model or its tokenizer cannot be loaded."""


class ProfileError(FastheadsError, ValueError):
    """Moments or metadata that no profile can have: wrong shapes, or moments that no samples have."""


class ProfileFileError(ProfileError):
    """A file is no head profile, or a damaged one."""


class MergeError(FastheadsError, ValueError):
    """Profiles must not be merged: they are of different models or settings, or of the same data."""


class PlanError(FastheadsError, ValueError):
    """A file is no pruning plan, or a damaged one, or a plan is of another model."""


class PruningError(FastheadsError, ValueError):
    """The model cannot be pruned as asked without computing something else."""


class AblationFileError(FastheadsError, ValueError):
    """A file is no result of ablations, or a damaged one."""


class KvMapError(FastheadsError, ValueError):
    """A file is no map of KV groups, or it is not of this model."""


class OptionError(FastheadsError, ValueError):
    """An option is unknown, out of range, or does not fit the model. The command line exits with 2."""


class MissingExtraError(FastheadsError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'fastheads[{extra}]'")


class ProfileInterrupted(KeyboardInterrupt):  # an interrupt, like its base, rather than an error
    """Ctrl-C or SIGTERM during `profile()`.

    `profile` holds the results until then, marked as incomplete; with several processes, this one's part.
    `number` is the signal's number; `checkpoint` is the file that a run with `resume=True` continues from, or None.
    """

    def __init__(self, profile: Any, number: int = signal.SIGINT, checkpoint: Path | None = None) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "ended by a signal")
        self.profile = profile
        self.number = number
        self.checkpoint = checkpoint


class AblationInterrupted(KeyboardInterrupt):  # an interrupt, like its base, rather than an error
    """Ctrl-C or SIGTERM while ablations were scored.

    `result` holds the sequences scored until then, or is None if there are none, or several processes; `number` is the signal's
    number; `checkpoint` is the file that the same call continues from, or None.
    """

    def __init__(self, result: Any, number: int = signal.SIGINT, checkpoint: Path | None = None) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "ended by a signal")
        self.result = result
        self.number = number
        self.checkpoint = checkpoint


class CheckpointError(FastheadsError, ValueError):
    """A checkpoint is damaged, or belongs to another run than the one that would resume from it."""


class JobError(FastheadsError, RuntimeError):
    """Several processes cannot work together here, or are not connected yet."""


class RankLostError(FastheadsError, RuntimeError):
    """Another process of the same job has died or failed."""


def one_line(error: BaseException, limit: int | None = None) -> str:
    """Return an error's message in one line (its class if it has none), shortened to `limit` characters with an ellipsis."""
    line = printable(" ".join(str(error).split())) or type(error).__name__
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."
