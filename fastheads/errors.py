"""What can go wrong with things that users hand in; each message is one line that says what to do."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastheads.results import HeadProfile


class FastheadsError(Exception):
    """The base of the errors below."""


class DataError(FastheadsError, ValueError):
    """The data to profile on cannot be read, or hold no tokens."""


class LoadError(FastheadsError, ValueError):
    """The model or its tokenizer cannot be loaded."""


class ProfileFileError(FastheadsError, ValueError):
    """A file is no head profile, or a damaged one."""


class MissingExtraError(FastheadsError, ImportError):
    """An optional dependency is not installed."""

    def __init__(self, what: str, package: str, extra: str) -> None:
        super().__init__(f"{what} needs {package}: pip install 'fastheads[{extra}]'")


class ProfileInterrupted(KeyboardInterrupt):  # an interrupt, like its base, rather than an error
    """Ctrl-C during `profile()`; `profile` holds what was measured until then, marked as incomplete."""

    def __init__(self, profile: "HeadProfile") -> None:
        super().__init__("interrupted")
        self.profile = profile
