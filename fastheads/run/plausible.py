"""Check that a model's files can hold the model that they describe, before it is built: what they lack would take memory too.

A file of some kilobytes may describe a model of terabytes: by its configuration, or by tensors that lie over one another.
"""

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastheads.errors import LoadError

MOST_LAYERS = 10_000
MOST_WIDTH = 2**31 - 1
LARGEST_CONFIG = 2**24  # bytes
# Numbers of a configuration, by their names in the families of transformers and in GGUF files (after the architecture's name).
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "block_count")
HIDDEN = ("hidden_size", "n_embd", "d_model", "embedding_length")
INNER = ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "feed_forward_length")
VOCABULARY = ("vocab_size",)
HEADS = ("num_attention_heads", "n_head", "attention.head_count")
HEAD_DIM = ("head_dim", "attention.key_length")
POSITIONS = ("n_positions",)  # learned ones: by other names they are mostly rotary, which have no parameters
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "expert_count")
OTHERS = (
    *HIDDEN,
    *INNER,
    *VOCABULARY,
    *HEADS,
    *HEAD_DIM,
    *POSITIONS,
    "num_key_value_heads",
    "max_position_embeddings",
)
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
# The densest formats have 1.5 bits a parameter: as many in a byte would have half a bit.
MOST_PER_BYTE = 16
# Parameters that a configuration describes are estimated from below: a model has at least 1/8 of the estimate.
SLACK = 8
SMALL = (
    2**24
)  # parameters; a model of as many takes no memory that matters, and what its files lack is said as it is loaded


def check_folder(folder: Path) -> None:
    """Check the configuration of a folder against the size of its weights. Raises LoadError, in one line."""
    path = folder / "config.json"
    if path.stat().st_size > LARGEST_CONFIG:
        raise LoadError(f"{path} has more than {LARGEST_CONFIG:,} bytes: it is no configuration")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return  # transformers says what is wrong with it
    size = sum(file.stat().st_size for pattern in WEIGHTS for file in folder.glob(pattern) if file.is_file())
    for part in _parts(config):
        described = _described(part, str(path))
        if size and described > max(SMALL, SLACK * MOST_PER_BYTE * size):
            raise LoadError(
                f"{path} describes a model of about {described:,} parameters, but its weights have {size:,} bytes"
            )


def check_gguf(path: Path) -> None:
    """Check the header of a GGUF file against its size: counts, tensors, the model described. Raises LoadError, in one line."""
    size = path.stat().st_size
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        try:
            header = _GGUF(content)
        except (struct.error, IndexError, UnicodeDecodeError, _BrokenError) as error:
            reason = str(error) if isinstance(error, _BrokenError) else "it ends too early"
            raise LoadError(f"{path} is a damaged GGUF file: {reason}") from error
    if isinstance(parts := header.values.get("split.count"), int) and parts > 1:
        raise LoadError(
            f"{path} is one of {parts} parts of a GGUF file, which are not read: join them first, as with "
            "llama-gguf-split --merge"
        )
    architecture = header.values.get("general.architecture")
    prefix = f"{architecture}." if isinstance(architecture, str) else ""
    config = {
        key.removeprefix(prefix): value for key, value in header.values.items() if key.startswith(prefix)
    }
    if "vocab_size" not in config and "tokenizer.ggml.tokens" in header.lengths:
        config["vocab_size"] = header.lengths["tokenizer.ggml.tokens"]
    described = _described(config, str(path))
    starts = [*sorted({tensor.start for tensor in header.tensors}), max(size - header.data, 0)]
    room = dict(pairwise(starts))
    held = 0
    taken: set[int] = set()
    for tensor in header.tensors:
        if tensor.start in taken and tensor.elements:
            raise LoadError(f"{path} is a damaged GGUF file: tensors lie over one another")
        taken.add(tensor.start)
        space = room.get(tensor.start, tensor.start) - tensor.start
        if tensor.elements > MOST_PER_BYTE * max(space, 0):
            raise LoadError(
                f"{path} is a damaged GGUF file: a tensor of {tensor.elements:,} numbers has {max(space, 0):,} bytes"
            )
        held += tensor.elements
    if described > max(SMALL, SLACK * held):
        raise LoadError(f"{path} describes a model of about {described:,} parameters, but holds {held:,}")


def _parts(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the configuration and those of its parts."""
    if isinstance(config, dict):
        yield config
        for key, value in config.items():
            if key.endswith("_config"):
                yield from _parts(value)


def _described(config: Mapping[str, Any], where: str) -> int:
    """Return about how many parameters a configuration describes at least. Raises LoadError for numbers that no model has."""
    for names, most in (((*LAYERS, *EXPERTS), MOST_LAYERS), (OTHERS, MOST_WIDTH)):
        for name in names:
            value = config.get(name)
            if isinstance(value, int) and not -1 <= value <= most:
                raise LoadError(
                    f"{where}: {name} is {_short(value)}, which no model has: the largest read is {most:,}"
                )
    sizes = (LAYERS, HIDDEN, INNER, VOCABULARY, POSITIONS, HEADS, HEAD_DIM)
    layers, hidden, inner, words, positions, heads, head_dim = (_first(config, names) for names in sizes)
    return hidden * (layers * (hidden + inner + heads * head_dim) + words + positions)


def _first(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), 0)


def _short(number: int) -> str:
    return str(number) if abs(number) < 10**30 else f"a number of {number.bit_length()} bits"


class _BrokenError(Exception):
    """What no GGUF file has."""


@dataclass(frozen=True)
class _Tensor:
    elements: int
    start: int  # of its bytes, from the begin of the data


# The types of values, by number: their struct formats; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


class _GGUF:
    """The header of a GGUF file: the values that are no arrays, the lengths of the arrays, and the tensors."""

    def __init__(self, content: Any) -> None:
        self._content, self._at = content, 4
        (version,) = self._take("I")
        self._order = "<" if version & 0xFFFF else ">"
        (tensors, values) = self._take("QQ")
        self.values: dict[str, Any] = {}
        self.lengths: dict[str, int] = {}
        for _ in range(self._checked(values, 12)):
            key = self._string()
            (kind,) = self._take("I")
            if kind == _ARRAY:
                self.lengths[key] = self._skip_array(1)
            else:
                self.values[key] = self._string() if kind == _STRING else self._take(self._format(kind))[0]
        self.tensors = [self._tensor() for _ in range(self._checked(tensors, 24))]
        alignment = self.values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise _BrokenError("its alignment is none")
        self.data = self._at + -self._at % alignment

    _order = "<"

    def _take(self, form: str) -> tuple[Any, ...]:
        form = self._order + form
        found = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        return found

    def _checked(self, count: int, least: int) -> int:
        """Return a count of things of at least so many bytes each. Raises _BrokenError if the file does not have as many."""
        if count * least > len(self._content) - self._at:
            raise _BrokenError(f"it announces {count:,} entries, more than it has bytes for")
        return count

    def _string(self) -> str:
        start = self._at + 8
        self._skip_string()
        text: bytes = self._content[start : self._at]
        return text.decode()

    def _skip_string(self) -> None:
        length = self._checked(self._take("Q")[0], 1)
        self._at += length

    def _format(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise _BrokenError(f"it has values of the unknown type {kind}")
        return _SCALARS[kind]

    def _skip_array(self, depth: int) -> int:
        if depth > 8:
            raise _BrokenError("its arrays are nested too deeply")
        kind, length = self._take("IQ")
        if kind == _STRING:
            for _ in range(self._checked(length, 8)):
                self._skip_string()
        elif kind == _ARRAY:
            for _ in range(self._checked(length, 12)):
                self._skip_array(depth + 1)
        else:
            size = struct.calcsize("<" + self._format(kind))
            self._at += self._checked(length, size) * size
        return int(length)

    def _tensor(self) -> _Tensor:
        self._string()
        (dimensions,) = self._take("I")
        if dimensions > 8:
            raise _BrokenError(f"a tensor of {dimensions:,} dimensions")
        elements = 1
        for size in self._take("Q" * dimensions):
            elements *= size
        _, start = self._take("IQ")
        return _Tensor(elements, start)
