"""Detect that the memory of a kept input was reused before it was measured.

Inputs are told apart by the address of their storage: of one memory there may be several storages, as a replayed CUDA graph makes
them for its outputs.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

from torch import Tensor

from fastheads.capture.profiled import Kept
from fastheads.errors import ForwardError

_AT_ONCE = "HookManager(..., group_bytes=0) measures each input at once"
_OVERWRITTEN = "was {} before it was measured: the model reuses its memory. " + _AT_ONCE
REUSED = (
    "inputs of earlier forwards were overwritten or freed before they were measured: the model reuses its memory. "
    + _AT_ONCE
)


def storages(inputs: Iterable[Tensor]) -> set[int]:
    """Return the addresses of the inputs' storages."""
    return {x.untyped_storage().data_ptr() for x in inputs}


def are_apart(inputs: Sequence[Tensor]) -> bool:
    """True if each input has a storage of its own."""
    return len(storages(inputs)) == len(inputs)


def is_changed(kept: list[Kept]) -> bool:
    """True if an input is known to have been changed in place."""
    return any([version is not None and x._version != version for _, x, version in kept])


def overlap(spans: list[tuple[int, int]]) -> bool:
    """True if any two of these (start, stop) have an address in common."""
    spans = sorted(spans)
    return any([stop > start for (_, stop), (start, _) in pairwise(spans)])


def check_unchanged(kept: list[Kept]) -> None:
    """Raise ForwardError if a kept input was changed, or may have been: another one lies in the same memory."""
    if are_apart([x for _, x, _ in kept]) and not is_changed(kept):
        return
    seen: set[int] = set()
    for profiled, x, version in kept:
        storage = x.untyped_storage().data_ptr()
        changed = version is not None and x._version != version
        if changed or (storage in seen and x.numel()):
            what = "modified in place" if changed else "overwritten"
            raise ForwardError(f"the input of {profiled.name} {_OVERWRITTEN.format(what)}")
        seen.add(storage)


def check_addresses(names: Sequence[str], inputs: Sequence[Tensor]) -> None:
    """Raise ForwardError if two inputs of one compiled group start at one address."""
    if inputs[0].numel() and len({x.data_ptr() for x in inputs}) < len(inputs):
        raise ForwardError(f"the input of one of {', '.join(names)} {_OVERWRITTEN.format('overwritten')}")
