"""Pairs of whole numbers that name a head, or a KV group, of a layer."""

from collections.abc import Iterable
from operator import index
from typing import Any

import numpy as np

from fastheads.errors import OptionError


def whole_pair(pair: Any, name: str, what: str) -> tuple[int, int]:
    """Return `pair` as two plain integers. Raises OptionError, which says that `name` must be pairs of `what`."""
    numbers = [*pair] if isinstance(pair, Iterable) and not isinstance(pair, str | bytes) else []
    if len(numbers) != 2 or not all(map(_is_whole, numbers)):
        raise OptionError(f"{name} must be pairs {what} of whole numbers, not {pair!r:.80}")
    first, second = map(index, numbers)
    return first, second


def _is_whole(number: Any) -> bool:
    return hasattr(number, "__index__") and not isinstance(number, bool | np.bool_)
