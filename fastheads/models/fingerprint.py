"""Fingerprint a model's weights: a checksum of all bits of each tensor.

The bytes of a tensor, in the order of its elements, are read as little-endian 32-bit words w_0, w_1, ..., padded with zeros, in
rows of `ROW` words. Each row is hashed to one number,

    sum_j m_j w_j  mod 2^64,

with fixed odd 64-bit multipliers m_j (multilinear hashing: Lemire & Kaser, "Strongly universal string hashing is fast", 2014). A
change inside one word always changes it: an odd number times a difference of less than 2^32 is not 0 modulo 2^64. A change of
several words (two swapped, say) goes unnoticed with a probability of about 2^-32 or less. The numbers of all rows are hashed with
SHA-256. The arithmetic is wrapping integer arithmetic, so every device gives the same result.
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

THREADS = 8  # at most, to read weights in the CPU's memory, if torch may use more than one

SCHEME = 2  # version of the format; version 1 read 128 numbers of each tensor, and had no such entry

ROW = 4096  # words
_ROW_BYTES = 4 * ROW
# Bytes read in one step: on a CPU what fits its cache, on a GPU enough to keep it busy. The products take twice as many.
_STEP_BYTES = {"cpu": 64 * _ROW_BYTES, "cuda": 2048 * _ROW_BYTES}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return a fingerprint of the weights of `model`: a checksum of its parameters, of its persistent buffers, and of what its
    quantized layers keep in attributes.

    It is the same on every device and in every process, wherever the weights were loaded from. A change of any one number always
    changes it, any other change unless crafted not to. It does not cover what the configuration alone decides (rotary
    frequencies, a window). Quantized weights are read as they are in memory: codes and scales.

    Covered by name, shape and dtype only ("unseen"): weights on the meta device, unless accelerate holds them in the CPU's
    memory; shards of a DTensor, FSDP or ZeRO-3, of which a rank has only its own; sparse tensors and those of torch.ao.

    Reads each tensor once, also tied ones, and waits for each device once. Takes up to 100 MB of memory on a GPU.

    Returns JSON values: `scheme`, the version of this format; `sha256`, of everything; `layout`, the SHA-256 of names, shapes and
    dtypes; `dtypes`, sorted; `tensors`, their number; `unseen`, the number of unseen tensors, and `unseen_names`, the SHA-256 of
    their names, or None. If `unseen` is not 0, equal fingerprints mean that the seen tensors are equal.
    """
    layout: list[tuple[str, list[int], str]] = []
    sums: list[list[Tensor] | None] = []  # None: not seen
    unseen: list[str] = []
    with torch.no_grad(), ThreadPoolExecutor(min(THREADS, torch.get_num_threads())) as pool:
        reader = _Reader(pool)
        for name, tensor in _tensors(model):
            layout.append(
                (name, list(tensor.visible.shape), str(tensor.visible.dtype).removeprefix("torch."))
            )
            found = [reader.sums(leaf) for leaf in _data(tensor.stored)]
            seen = [leaf for leaf in found if leaf is not None]
            if not found or len(seen) < len(found):
                unseen.append(name)
            sums.append(seen if seen else None)
        digest = hashlib.sha256(json.dumps([SCHEME, layout]).encode())
        of_layout = hashlib.sha256(json.dumps(layout).encode()).hexdigest()
        for pieces in _on_cpu(sums):
            digest.update(json.dumps([len(piece) for piece in pieces]).encode())  # separates the tensors
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
class _ModelTensor:
    """A tensor of the model, and the tensor with its data: another one if accelerate offloads it to the CPU's memory."""

    visible: Tensor
    stored: Tensor


def _tensors(model: nn.Module) -> Iterator[tuple[str, _ModelTensor]]:
    """Yield the name and the tensor; a tied tensor under each of its names."""
    for path, module in model.named_modules():
        non_persistent = module._non_persistent_buffers_set
        named = [
            *module._parameters.items(),
            *((n, b) for n, b in module._buffers.items() if n not in non_persistent),
        ]
        for name, tensor in named:
            if tensor is None:
                continue
            held = offload.held(module, name) if tensor.device.type == "meta" else None
            yield f"{path}.{name}".lstrip("."), _ModelTensor(tensor, tensor if held is None else held)
        for number, tensor in enumerate(_quantization_state(module)):
            yield f"{path}.beside.{number}".lstrip("."), _ModelTensor(tensor, tensor)


def _quantization_state(module: nn.Module) -> list[Tensor]:
    """Return the tensors of a quantized layer that are neither parameters nor buffers: mostly scales."""
    weight_format = MODULES.get(qualified_name(type(module)))
    if weight_format is None:
        return []
    try:
        parts = weight_format.parts(module)
    except (NotDenseError, AttributeError):  # not quantized yet, or offloaded: there are none
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
    """Return the plain tensors that hold the data; none if this rank has only a shard of it."""
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
    """Read each memory once, also if several tensors share it."""

    pool: ThreadPoolExecutor
    known: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    def sums(self, tensor: Tensor) -> Tensor | None:
        """Return the hashes of all rows, int64 `[rows]` on the tensor's device; None if the data cannot be read."""
        if tensor.device.type == "meta" or tensor.layout is not torch.strided or tensor.is_quantized:
            return None
        # Without the methods of a subclass, as bitsandbytes and GGUF weights have.
        plain = tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        key = (plain.device, plain.data_ptr(), plain.dtype, plain.shape, plain.stride())
        if key not in self.known:
            pieces = self._pieces(plain)
            none = torch.empty(0, dtype=torch.int64, device=plain.device)
            # Keep the tensor, so that its memory is not reused meanwhile.
            self.known[key] = (torch.cat(pieces) if pieces else none, plain)
        return self.known[key][0]

    def _pieces(self, tensor: Tensor) -> list[Tensor]:
        pieces = _pieces(tensor)
        # If nothing is copied, all pieces can be processed at once; a single core is slower than memory.
        if tensor.device.type == "cpu" and tensor.is_contiguous() and torch.get_num_threads() > 1:
            return list(self.pool.map(_sums_of_rows, pieces))
        return [_sums_of_rows(piece) for piece in pieces]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensor's bytes in the order of its elements, as uint8 `[n]`, whole rows in each but the last."""
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
    """Yield contiguous copies of consecutive parts of the tensor, of about `step` bytes at most."""
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
    """Hash each row of the bytes `[n]` (the last may be short) to int64 `[rows]`."""
    if piece.device.type not in _STEP_BYTES:
        piece = piece.cpu()  # other devices may lack 64-bit integers
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
    """Multiply int32 `[rows, n]` by int64 `[n]` with wrap-around: int64 `[rows]`."""
    if words.device.type != "cpu":
        return (words * multipliers).sum(dim=-1)
    # NumPy starts no threads; torch's would wait for each other at the end of each short step.
    wide = _scratch()[: words.numel()].reshape(words.shape)
    np.copyto(wide, words.numpy())
    return torch.from_numpy(np.einsum("rn,n->r", wide, multipliers.numpy()))


@cache
def _multipliers(device: torch.device) -> Tensor:
    """Return fixed pseudorandom odd numbers, int64 `[ROW]`."""
    numbers = np.frombuffer(hashlib.shake_256(b"fastheads").digest(8 * ROW), dtype="<i8") | 1
    return torch.from_numpy(numbers.astype(np.int64)).to(device)


def _scratch() -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the thread's buffer for the words of one step; page faults of fresh memory would cost more than the sums."""
    if not hasattr(_own, "scratch"):
        _own.scratch = np.empty(_STEP_BYTES["cpu"] // 4, dtype=np.int64)
    return _own.scratch  # type: ignore[no-any-return]


_own = threading.local()


def _on_cpu(sums: list[list[Tensor] | None]) -> Iterator[list[bytes]]:
    """Yield the bytes of each tensor's hashes, with one copy from each device."""
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
