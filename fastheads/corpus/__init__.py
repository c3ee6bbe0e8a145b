"""Read files and data sets, and cut them into windows of token sequences."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Corpus": "windows",
    "open_source": "opening",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
