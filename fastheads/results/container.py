"""The file format of this package: a safetensors file with arrays, a JSON document, and a digest of both.

The document is the only string of the file's metadata. Its entry `sha256` is the SHA-256 of everything else: of the document
without that entry, with sorted keys, and of each array's name, dtype, shape and bytes, in the order of the names.

Files may come from anywhere. They are read into memory once, so that they cannot change after the checks; and everything is
checked before use: sizes before memory is allocated, the document before arrays are made.
"""

import hashlib
import json
import math
import struct
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fastheads.errors import one_line

if TYPE_CHECKING:
    from torch import Tensor

Array = NDArray[Any]

DIGEST_KEY = "sha256"
MAX_DEPTH = 64  # levels of lists and objects in a document
MAX_NESTS = 2**20  # lists and objects
_DTYPES = ("F64", "I64")
_LENGTH = struct.Struct("<Q")


class ContainerError(ValueError):
    """The content is no valid file; the caller adds the file's name."""


def pack(tensors: Mapping[str, "Array | Tensor"], key: str, document: dict[str, Any]) -> bytes:
    """Return the content of a file with these arrays or CPU tensors, float64 or int64.

    Raises:
        ContainerError: the document is not JSON, or holds NaN.
    """
    try:
        plain = json.loads(
            json.dumps(document, allow_nan=False)
        )  # as it will be read: numbers as keys become strings
    except (TypeError, ValueError, RecursionError) as error:
        raise ContainerError(f"its metadata cannot be written as JSON: {error}") from error
    arrays = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    plain[DIGEST_KEY] = digest(arrays, plain)
    return safetensors.numpy.save(arrays, {key: json.dumps(plain)})


def unpack(content: bytes, key: str, **limits: Any) -> tuple[dict[str, "Tensor"], dict[str, Any]]:
    """As `unpack_arrays`, with tensors."""
    import torch

    arrays, document = unpack_arrays(content, key, **limits)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}, document


def unpack_arrays(
    content: bytes, key: str, *, formats: Sequence[int], digested: Sequence[int], header_limit: int
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays (float64 or int64, not empty) of a file's content, and its document without the digest.

    Raises:
        ContainerError: the content was not made by `pack`, the document's `format` is not in `formats`, or the digest does not
            match; formats in `digested` must have one.
    """
    header = _header(content, header_limit)
    about = header.pop("__metadata__", {})
    if not isinstance(about, dict) or not isinstance(about.get(key), str):
        raise ContainerError("it has no fastheads metadata")
    document = _json(about[key])
    if not isinstance(document, dict):
        raise ContainerError("its metadata are not an object")
    version = document.get("format")
    if type(version) is not int or version not in formats:
        raise ContainerError(
            f"its format is {_shown(version)}; this version reads {' and '.join(map(str, formats))}"
        )
    for name, array in header.items():
        _check_array(name, array)
    try:
        # Also checks that the arrays fill the file and do not overlap.
        arrays = safetensors.numpy.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise ContainerError(one_line(error)) from error
    expected = document.pop(DIGEST_KEY, None)
    if version in digested and expected != digest(arrays, document):
        raise ContainerError("it is damaged: its content does not match its checksum")
    # Writable copies, if safetensors returned read-only memory.
    return {name: np.require(array, requirements=["C", "W"]) for name, array in arrays.items()}, document


def digest(arrays: dict[str, Array], document: dict[str, Any]) -> str:
    """Compute the SHA-256 of `arrays` and `document`. Dtypes are named as in torch."""
    found = hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode())
    for name in sorted(arrays):
        array = arrays[name]
        found.update(json.dumps([name, f"torch.{array.dtype.name}", list(array.shape)]).encode())
        found.update(array.tobytes())
    return found.hexdigest()


def _header(content: bytes, limit: int) -> dict[str, Any]:
    if len(content) < _LENGTH.size:
        raise ContainerError("it is no safetensors file")
    (length,) = _LENGTH.unpack_from(content)
    if length > min(limit, len(content) - _LENGTH.size):
        raise ContainerError("it is no safetensors file, or its header is too large")
    try:
        text = content[_LENGTH.size : _LENGTH.size + length].decode()
    except UnicodeDecodeError as error:
        raise ContainerError("it is no safetensors file: its header is no UTF-8") from error
    header = _json(text)
    if not isinstance(header, dict):
        raise ContainerError("it is no safetensors file: its header is not an object")
    return header


def _check_array(name: str, array: Any) -> None:
    """Raise ContainerError unless the header's entry describes an array that is not empty and as large as its shape says."""
    if not isinstance(array, dict) or set(array) != {"dtype", "shape", "data_offsets"}:
        raise ContainerError(f"its array {_shown(name)} is not described")
    kind, shape, offsets = array["dtype"], array["shape"], array["data_offsets"]
    numbers = [*shape, *offsets] if isinstance(shape, list) and isinstance(offsets, list) else [None]
    if not (all(type(number) is int and number >= 0 for number in numbers) and len(offsets) == 2):
        raise ContainerError(f"its array {_shown(name)} has no shape or no offsets")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ContainerError(
            f"its array {_shown(name)} is of {_shown(kind)}: it must be torch.float64 or torch.int64 (F64, I64)"
        )
    if len(shape) > 8 or not 0 < math.prod(shape) * 8 == offsets[1] - offsets[0]:
        raise ContainerError(f"its array {_shown(name)} is empty, or not as large as its shape says")


def _json(text: str) -> Any:
    """Parse JSON. Raise ContainerError for invalid JSON, duplicate keys, NaN, infinite numbers, deep nesting, and more lists and
    objects than any run writes.
    """
    if text.count("{") + text.count("[") > MAX_NESTS:  # each takes memory, and a call of Python
        raise ContainerError(f"its metadata hold more than {MAX_NESTS:,} lists and objects")

    def refuse(constant: str) -> NoReturn:
        raise ContainerError(f"its metadata hold {constant}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            raise ContainerError("its metadata hold a key twice")
        return found

    try:
        value = json.loads(text, parse_constant=refuse, object_pairs_hook=unique)
    except RecursionError as error:
        raise ContainerError("its metadata are nested too deeply") from error
    except ContainerError:
        raise
    except ValueError as error:
        raise ContainerError(f"its metadata are no JSON: {one_line(error, 200)}") from error
    level = [value]
    for _ in range(MAX_DEPTH):
        nests = [
            outer.values() if type(outer) is dict else outer for outer in level if type(outer) in (dict, list)
        ]
        # Lists may hold millions of numbers, of which nothing is kept but what is wrong: a number such as 1e999 is infinite.
        level = [
            inner
            for nest in nests
            for inner in nest
            if (kind := type(inner)) is dict or kind is list or (kind is float and not isfinite(inner))
        ]
        if float in map(type, level):
            raise ContainerError("its metadata hold a number that is too large")
    if level:
        raise ContainerError("its metadata are nested too deeply")
    return value


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
