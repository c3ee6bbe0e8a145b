"""Whether two models have the same weights, told without reading all of them."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastheads import offload
from fastheads.forms import is_dtensor, leaves

SAMPLES = 128  # numbers of each tensor, evenly spaced, its first among them

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What tells the weights of `model` from others: of its parameters and of the buffers that a checkpoint holds, the names,
    shapes, dtypes, and the bits of up to `SAMPLES` numbers each.

    The same on every device and in every process, wherever the weights were loaded from. Other weights of the same architecture
    give another one; an edit of few numbers in a large tensor can escape it. What the configuration alone decides (rotary
    frequencies, a window) is not seen. Quantised weights are taken as they lie in memory: codes, and scales where they are
    tensors of the weight, its buffers or its bitsandbytes state.

    Not seen but for name, shape and dtype: weights on the meta device, unless accelerate holds them in the CPU's memory;
    shards of a DTensor, of which a rank has only its own.

    Costs a copy of a few hundred KB from each device, and waits for it.

    Returns plain data (JSON): `sha256`, of everything; `layout`, of names, shapes and dtypes; `dtypes`, those that occur, sorted;
    `tensors`, how many there are; `unseen`, how many of these were not seen. Where `unseen` is not 0, equal ones mean
    that what was seen is equal.
    """
    layout: list[tuple[str, list[int], str]] = []
    samples: list[Tensor | None] = []  # None: not seen
    unseen = 0
    with torch.no_grad():
        for name, tensor, held in _tensors(model):
            layout.append((name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")))
            found = [_sample(leaf) for leaf in _data(tensor if held is None else held)]
            unseen += not found or any(sample is None for sample in found)
            samples += [*found, None]  # None parts the tensors
        digest = hashlib.sha256(json.dumps(layout).encode())
        of_layout = digest.hexdigest()
        for piece in _on_cpu(samples):
            digest.update(b"-" if piece is None else piece)
    return {
        "sha256": digest.hexdigest(),
        "layout": of_layout,
        "dtypes": sorted({dtype for _, _, dtype in layout}),
        "tensors": len(layout),
        "unseen": unseen,
    }


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Name, tensor, and its data where accelerate holds them elsewhere in memory. A tied tensor comes by each name."""
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
            yield f"{path}.{name}".lstrip("."), tensor, held
            yield from _bitsandbytes(f"{path}.{name}".lstrip("."), tensor)


def _bitsandbytes(name: str, weight: Any) -> Iterator[tuple[str, Tensor, None]]:
    """The scales of a 4-bit weight, which are neither parameters nor buffers."""
    state = getattr(weight, "quant_state", None)
    absmax = getattr(state, "absmax", None)
    if isinstance(absmax, Tensor):
        yield f"{name}.absmax", absmax, None


def _data(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold the data; none where they are not all here."""
    if is_dtensor(tensor):
        whole: Any = tensor
        if not all(placement.is_replicate() for placement in whole.placements):
            return []
        tensor = whole.to_local()
    return leaves(tensor)


def _sample(tensor: Tensor) -> Tensor | None:
    """The bits of up to `SAMPLES` numbers as integers, a view where that can be; None where there is nothing to see."""
    if tensor.device.type == "meta" or tensor.layout is not torch.strided:
        return None
    # Not by the methods of a subclass, which bitsandbytes and GGUF weights are.
    plain = tensor.detach().as_subclass(Tensor)
    step = max(1, -(-plain.numel() // SAMPLES))
    if plain.is_contiguous():
        plain = plain.view(-1)[::step]
    else:
        index = torch.arange(0, plain.numel(), step, device=plain.device)
        plain = plain[torch.unravel_index(index, plain.shape)]
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    return plain.view(_INTEGERS[plain.element_size()]).flatten()


def _on_cpu(samples: list[Tensor | None]) -> list[bytes | None]:
    """The bytes of each, with one copy for each device and width of numbers."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
    for place, sample in enumerate(samples):
        if sample is not None:
            groups[sample.device, sample.dtype].append(place)
    pieces: list[bytes | None] = [None] * len(samples)
    for places in groups.values():
        tensors = [sample for place in places if (sample := samples[place]) is not None]
        together = torch.cat(tensors).cpu()
        for place, part in zip(places, together.split([len(t) for t in tensors]), strict=True):
            pieces[place] = part.numpy().tobytes()
    return pieces
