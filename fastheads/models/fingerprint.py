"""Whether two models have the same weights: a checksum of all bits of each tensor.

The bytes of a tensor, in the order of its elements, are taken as little-endian 32-bit words w_0, w_1, ..., padded with zeros, in
rows of `ROW` words. Of each row one number is kept,

    sum_j m_j w_j  mod 2^64,

with fixed odd 64-bit multipliers m_j (multilinear hashing: Lemire & Kaser, "Strongly universal string hashing is fast", 2014). A
change inside one word always changes it: an odd number times a difference of less than 2^32 is not 0 modulo 2^64. A change of
several words, two that change places for instance, escapes with a probability of about 2^-32 or less. SHA-256 over the numbers of
all rows does the rest. The arithmetic is that of integers and wraps, so that every device gives the same.
"""

import hashlib
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastheads.models import offload
from fastheads.models.weight_formats import MODULES, NotDenseError, Parts, is_dtensor, leaves, qualified_name

THREADS = 8  # that read weights in a CPU's memory, at most, and where torch may have more than one

SCHEME = 2  # of how the weights are read; 1, which had no such entry, read 128 numbers of each tensor

ROW = 4096  # words
_ROW_BYTES = 4 * ROW
# What is read in one step: on a CPU what its cache can hold, on a GPU as much as keeps it busy. The products take twice this.
_STEP_BYTES = {"cpu": 64 * _ROW_BYTES, "cuda": 2048 * _ROW_BYTES}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what tells the weights of `model` from others: a checksum of its parameters, of the buffers that a checkpoint
    holds, and of what its quantized layers keep beside them.

    The same on every device and in every process, wherever the weights were loaded from. A change of any one number always
    shows, any other change unless it was made to escape. What the configuration alone decides (rotary frequencies, a window) is
    not seen. Quantized weights are taken as they are in memory: codes and scales.

    Not seen but for name, shape and dtype: weights on the meta device, unless accelerate holds them in the CPU's memory;
    shards of a DTensor, FSDP or ZeRO-3, of which a rank has only its own; sparse tensors and those of torch.ao.

    Reads each tensor once, tied ones too, and waits for each device once. Takes up to 100 MB of memory on a GPU.

    Returns plain data (JSON): `scheme`, the version of this format; `sha256`, of everything; `layout`, of names, shapes and
    dtypes; `dtypes`, those that occur, sorted; `tensors`, how many there are; `unseen`, how many of these were not seen, and
    `unseen_names`, the SHA-256 of their names, or None. Where `unseen` is not 0, equal ones mean that what was seen is equal.
    """
    layout: list[tuple[str, list[int], str]] = []
    sums: list[list[Tensor] | None] = []  # None: not seen
    unseen: list[str] = []
    with torch.no_grad(), ThreadPoolExecutor(min(THREADS, torch.get_num_threads())) as pool:
        reader = _Reader(pool)
        for name, tensor in _tensors(model):
            layout.append((name, list(tensor.told.shape), str(tensor.told.dtype).removeprefix("torch.")))
            found = [reader.sums(leaf) for leaf in _data(tensor.held)]
            seen = [leaf for leaf in found if leaf is not None]
            if not found or len(seen) < len(found):
                unseen.append(name)
            sums.append(seen if seen else None)
        digest = hashlib.sha256(json.dumps([SCHEME, layout]).encode())
        of_layout = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
        for pieces in _on_cpu(sums):
            digest.update(json.dumps([len(piece) for piece in pieces]).encode())  # parts the tensors
            for piece in pieces:
                digest.update(piece)
    names = hashlib.sha256(json.dumps(unseen).encode()).hexdigest()
    return {
        "scheme": SCHEME,
        "sha256": digest.hexdigest(),
        "layout": of_layout,
        "dtypes": sorted({dtype for _, _, dtype in layout}),
        "tensors": len(layout),
        "unseen": len(unseen),
        "unseen_names": names if unseen else None,
    }


# ---------------------------------------------------------------- which tensors


@dataclass(frozen=True)
class _Found:
    """A tensor as the model shows it, and the one that holds its data, where accelerate keeps them elsewhere in memory."""

    told: Tensor
    held: Tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, _Found]]:
    """Name and tensor. A tied one comes by each name."""
    for path, module in model.named_modules():
        passing = module._non_persistent_buffers_set
        named = [
            *module._parameters.items(),
            *((n, b) for n, b in module._buffers.items() if n not in passing),
        ]
        for name, tensor in named:
            if tensor is None:
                continue
            held = offload.held(module, name) if tensor.device.type == "meta" else None
            yield f"{path}.{name}".lstrip("."), _Found(tensor, tensor if held is None else held)
        for number, tensor in enumerate(_beside(module)):
            yield f"{path}.beside.{number}".lstrip("."), _Found(tensor, tensor)


def _beside(module: nn.Module) -> list[Tensor]:
    """What a quantized layer's weight depends on that is neither a parameter nor a buffer: scales, mostly."""
    form = MODULES.get(qualified_name(type(module)))
    if form is None:
        return []
    try:
        parts = form.parts(module)
    except (NotDenseError, AttributeError):  # not quantized yet, or offloaded: there is nothing beside
        return []
    own = [*module._parameters.values(), *module._buffers.values()]
    return [part for part in _flat(parts) if not any(part is tensor for tensor in own)]


def _flat(parts: Parts) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, tuple | list):
            yield from _flat(tuple(part))


def _data(tensor: Any) -> list[Tensor]:
    """The plain tensors that hold the data; none where they are not all here."""
    if is_dtensor(tensor):
        if not all(placement.is_replicate() for placement in tensor.placements):
            return []
        tensor = tensor.to_local()
    if hasattr(tensor, "ds_id") or type(tensor).__name__ == "FlatParameter":  # ZeRO-3's and FSDP1's shards
        return []
    return leaves(tensor)


# ---------------------------------------------------------------- their bits


@dataclass
class _Reader:
    """Reads each memory once, by whatever names it comes."""

    pool: ThreadPoolExecutor
    known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def sums(self, tensor: Tensor) -> Tensor | None:
        """The numbers of all rows, int64 `[rows]` on the tensor's device; None where they cannot be had."""
        if tensor.device.type == "meta" or tensor.layout is not torch.strided or tensor.is_quantized:
            return None
        # Not by the methods of a subclass, which bitsandbytes and GGUF weights are.
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        key = (plain.device, plain.data_ptr(), plain.dtype, plain.shape, plain.stride())
        if key not in self.known:
            pieces = self._pieces(plain)
            none = torch.empty(0, dtype=torch.int64, device=plain.device)
            # With the tensor itself, so that its memory is not given to another meanwhile.
            self.known[key] = (torch.cat(pieces) if pieces else none, plain)
        return self.known[key][0]

    def _pieces(self, tensor: Tensor) -> list[Tensor]:
        pieces = _pieces(tensor)
        # Where nothing is copied, all of them may be in hand at once. One core alone is slower than memory.
        if tensor.device.type == "cpu" and tensor.is_contiguous() and torch.get_num_threads() > 1:
            return list(self.pool.map(_sums_of_rows, pieces))
        return [_sums_of_rows(piece) for piece in pieces]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The bytes of the tensor in the order of its elements, uint8 `[n]`: whole rows in each but the last."""
    step = _STEP_BYTES.get(tensor.device.type, _STEP_BYTES["cuda"])
    if tensor.is_contiguous():
        yield from tensor.view(-1).view(torch.uint8).split(step) if tensor.numel() else ()
        return
    rest = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    for part in _contiguous_parts(tensor, step):
        rest = torch.cat((rest, part.view(-1).view(torch.uint8)))
        whole = len(rest) - len(rest) % _ROW_BYTES
        if whole:
            yield rest[:whole]
            rest = rest[whole:].clone()
    if len(rest):
        yield rest


def _contiguous_parts(tensor: Tensor, step: int) -> Iterator[Tensor]:
    """Copies of consecutive parts of the tensor, of about `step` bytes at most."""
    if tensor.numel() * tensor.element_size() <= step or tensor.dim() == 0:
        if tensor.numel():
            yield tensor.contiguous()
        return
    many = len(tensor) * step // (tensor.numel() * tensor.element_size())
    if many:
        for part in tensor.split(many):
            yield part.contiguous()
        return
    for part in tensor:
        yield from _contiguous_parts(part, step)


def _sums_of_rows(piece: Tensor) -> Tensor:
    """The number of each row of the bytes `[n]`, the last of which may be short: int64 `[rows]`."""
    if piece.device.type not in _STEP_BYTES:
        piece = piece.cpu()  # other devices may lack integers of 64 bits
    if len(piece) % 4:
        piece = torch.cat((piece, piece.new_zeros(-len(piece) % 4)))
    if piece.storage_offset() % 4 or piece.data_ptr() % 4:
        piece = piece.clone()
    words = piece.view(torch.int32)
    multipliers = _multipliers(piece.device)
    rows, short = divmod(len(words), ROW)
    whole = _products(words[: rows * ROW].view(rows, ROW), multipliers)
    return torch.cat((whole, _products(words[None, rows * ROW :], multipliers[:short]))) if short else whole


def _products(words: Tensor, multipliers: Tensor) -> Tensor:
    """Int32 `[rows, n]` times int64 `[n]`, wrapping: int64 `[rows]`."""
    if words.device.type != "cpu":
        return (words * multipliers).sum(dim=-1)
    # By NumPy, which makes no threads of its own: torch's would wait for each other at the end of each short step.
    wide = _scratch()[: words.numel()].reshape(words.shape)
    np.copyto(wide, words.numpy())
    return torch.from_numpy(np.einsum("rn,n->r", wide, multipliers.numpy()))


@cache
def _multipliers(device: torch.device) -> Tensor:
    """Odd int64 `[ROW]` that look random and are the same everywhere."""
    numbers = np.frombuffer(hashlib.shake_256(b"fastheads").digest(8 * ROW), dtype="<i8") | 1
    return torch.from_numpy(numbers.astype(np.int64)).to(device)


def _scratch() -> np.ndarray[Any, np.dtype[np.int64]]:
    """The thread's memory for the words of one step. Fresh memory would cost more than the sums: its pages come one by one."""
    if not hasattr(_own, "scratch"):
        _own.scratch = np.empty(_STEP_BYTES["cpu"] // 4, dtype=np.int64)
    return _own.scratch  # type: ignore[no-any-return]


_own = threading.local()


def _on_cpu(sums: list[list[Tensor] | None]) -> Iterator[list[bytes]]:
    """The bytes of each, with one copy from each device."""
    groups: dict[torch.device, list[Tensor]] = defaultdict(list)
    for found in sums:
        for part in found or ():
            groups[part.device].append(part)
    there = {device: iter(_bytes_of(parts)) for device, parts in groups.items()}
    for found in sums:
        yield [] if found is None else [next(there[part.device]) for part in found]


def _bytes_of(parts: list[Tensor]) -> Iterator[bytes]:
    together = torch.cat(parts).cpu()
    for part in together.split([len(part) for part in parts]):
        yield part.numpy().astype("<i8").tobytes()
