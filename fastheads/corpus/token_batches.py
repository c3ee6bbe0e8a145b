"""Make the model's arguments from token ids: pad rows of a corpus to batches; check and truncate a caller's own batches."""

import sys
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from fastheads.errors import DataError, OptionError

MAX_PADDING = 0.045  # share of a batch; a little below the 5 % that is promised


def plan(lengths: Sequence[int], budget: int, max_rows: int | None = None) -> list[list[int]]:
    """Group rows into batches of at least one row, with rows × longest ≤ `budget` and rows ≤ `max_rows`.

    Rows are sorted by length, longest first, so that running out of memory shows at once; equal lengths keep their order.
    If filling every batch would pad them by more than `MAX_PADDING` in all, a batch ends once its own padding exceeds that
    and it holds at least half the budget; if that does not suffice, a quarter, … down to a sixteenth.
    """
    if budget < 1 or (max_rows is not None and max_rows < 1):
        raise OptionError(f"a batch needs room: budget {budget} tokens, max_rows {max_rows}")
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[list[int]] = []
    for least in (budget, budget // 2, budget // 4, budget // 8, budget // 16):
        batches, width, valid = [], 0, 0
        for row in order:
            rows = len(batches[-1]) + 1 if batches else 0
            full = not batches or rows * width > budget or rows - 1 == max_rows
            padded = valid + lengths[row] < (1 - MAX_PADDING) * rows * width and (rows - 1) * width >= least
            if full or padded:
                batches.append([])
                width, valid = lengths[row], 0
            batches[-1].append(row)
            valid += lengths[row]
        if sum(lengths) >= (1 - MAX_PADDING) * sum(len(batch) * lengths[batch[0]] for batch in batches):
            break
    return batches


def collate(rows: Sequence[Tensor], pad_token_id: int = 0, *, pin_memory: bool = False) -> dict[str, Tensor]:
    """Make the model's arguments: `input_ids` int64 `[rows, tokens]`, padded on the right.

    If the rows are of unequal length, `attention_mask`, of the same shape, marks the padding with 0. `pin_memory` allocates
    page-locked memory, from which `.to("cuda", non_blocking=True)` does not wait.
    """
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64, pin_memory=pin_memory)
    for target, row in zip(input_ids, rows, strict=True):
        target[: len(row)] = row
    batch = {"input_ids": input_ids}
    if int(lengths.min()) < width:
        mask = torch.empty_like(input_ids, pin_memory=pin_memory)
        batch["attention_mask"] = mask.copy_(torch.arange(width) < lengths.view(-1, 1))
    return batch


def as_batch(item: Any) -> dict[str, Any]:
    """Make the model's arguments of a token batch: token ids `[rows, tokens]` or `[tokens]`, or a mapping with `input_ids`.

    Lists and numpy arrays of integers become tensors.

    Raises:
        DataError: the item is anything else, or a mapping without `input_ids`.
    """
    item = as_int_tensor(item)
    if isinstance(item, Tensor):
        item = {"input_ids": item}
    if not isinstance(item, Mapping):
        raise DataError(f"a token batch is a tensor or a mapping with input_ids, not {type(item).__name__}")
    batch = {key: as_int_tensor(value) for key, value in item.items()}
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex():
        raise DataError("input_ids of a token batch must be a tensor of whole numbers [rows, tokens]")
    if ids.dim() == 1:
        batch = {
            key: value[None] if isinstance(value, Tensor) and value.shape == ids.shape else value
            for key, value in batch.items()
        }
    mask = batch.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != batch["input_ids"].shape):
        raise DataError(
            "the attention_mask of a token batch must have the shape of its input_ids [rows, tokens]"
        )
    return batch


def as_int_tensor(value: Any) -> Any:
    """Convert integer lists `[tokens]` or `[rows, tokens]` and integer arrays to an int64 tensor; return all else unchanged."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return torch.from_numpy(value.astype("int64")) if value.dtype.kind in "iu" and value.ndim else value
    if isinstance(value, list | tuple) and value:
        rows = value if isinstance(value[0], list | tuple) else [value]
        whole = all(
            isinstance(row, list | tuple)
            and len(row) == len(rows[0])
            and all(isinstance(n, Integral) and not isinstance(n, bool) for n in row)
            for row in rows
        )
        return torch.tensor(value, dtype=torch.int64) if whole else value
    return value


def tokens_by_row(batch: Mapping[str, Any]) -> Tensor:
    """Count the valid tokens of each row, int64 `[rows]`."""
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return torch.full((ids.shape[0],), ids.shape[1]) if mask is None else (mask != 0).sum(1).cpu()


def truncate(batch: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """Cut `batch` after its first `max_tokens` valid tokens: drop later rows, mask later tokens."""
    ids: Tensor = batch["input_ids"]
    before = tokens_by_row(batch).cumsum(0) - tokens_by_row(batch)  # valid tokens in the rows above
    keep = int((before < max_tokens).sum())
    batch = {
        key: value[:keep] if isinstance(value, Tensor) and value.shape[:1] == ids.shape[:1] else value
        for key, value in batch.items()
    }
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask.clone()
    room = max_tokens - int(before[keep - 1])
    mask[-1] *= ((mask[-1] != 0).cumsum(0) <= room).to(mask.dtype)
    return batch | {"attention_mask": mask}
