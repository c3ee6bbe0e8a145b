"""Which tokens are real: everything that is not padding, less the first `skip_first` of each sequence.

The arguments of the decoder's call say it, in this order of trust: a 2D attention mask, a 4D one, no mask at all.
A sequence is one row of one call. What cannot be told apart for certain is refused.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RealTokens:
    """The real tokens of one call of the decoder: B rows by S positions.

    `valid` is bool `[B, S]` with `skip_first` already taken off; None means that every token is real but the first
    `skip_first` of each row.
    """

    valid: Tensor | None = None
    skip_first: int = 0

    def mask(self, x: Tensor) -> Tensor | None:
        """Bool `[B, S]` for `x` `[B, S, ...]` on x's device, or None where every token is real."""
        batch, seq = x.shape[:2]
        if self.valid is None:
            if self.skip_first == 0:
                return None
            return (torch.arange(seq, device=x.device) >= self.skip_first).expand(batch, seq)
        valid = self.valid
        if valid.shape[0] == 1 and batch > 1:
            valid = valid.expand(batch, -1)  # one mask for all rows
        if valid.shape != (batch, seq):
            raise ValueError(
                f"the attention mask speaks of {list(valid.shape)} tokens, but an attention output is {[batch, seq]}"
            )
        return valid.to(x.device, non_blocking=True)


def take_last(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The last real token of each row of `x` `[G, B, S, W]`: `[G, B, W]`, and which rows have one, bool `[B]` (None: all)."""
    if mask is None:
        return x[:, :, -1], None
    rows, seq = mask.shape
    last = torch.where(mask, torch.arange(seq, device=mask.device), -1).amax(dim=1)
    return x[:, torch.arange(rows, device=mask.device), last.clamp(min=0)], last >= 0


def mean_over_tokens(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The mean over the real tokens of each row, `values` `[..., B, S, H]` to `[..., B, H]`, and which rows have any."""
    if mask is None:
        return values.mean(dim=-2), None
    count = mask.sum(dim=1)  # [B]
    # Padding is selected away: it may hold NaN.
    total = torch.where(mask.unsqueeze(-1), values, 0.0).sum(dim=-2)
    return total / count.clamp(min=1).unsqueeze(-1), count > 0


class DecoderArguments:
    """Reads the real tokens off the arguments of a decoder's `forward`."""

    def __init__(self, decoder: nn.Module) -> None:
        parameters = inspect.signature(decoder.forward).parameters.values()
        self._positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    def real_tokens(self, args: tuple[Any, ...], kwargs: dict[str, Any], skip_first: int) -> RealTokens:
        """Raises ValueError for arguments whose real tokens cannot be told: packed rows, masks of unknown form."""
        given = dict(zip(self._positional, args, strict=False)) | kwargs
        mask, cache = given.get("attention_mask"), given.get("past_key_values")
        if given.get("cu_seq_lens_q") is not None:
            raise ValueError("packed rows (cu_seq_lens_q) are not supported: give one sequence a row")
        if isinstance(mask, Mapping):  # one for each type of layer; windows hide tokens that are real
            mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
        if mask is None:
            return _without_mask(given.get("position_ids"), cache, skip_first)
        if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
            form = f"{mask.dim()}D" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"an attention mask of 2 or 4 dimensions is needed to tell real tokens, got {form}"
            )
        queries = _num_queries(given, mask)
        past = None if not hasattr(cache, "get_seq_length") else cache.get_seq_length()  # type: ignore[union-attr]
        valid = (_columns if mask.dim() == 2 else _diagonal)(mask, queries, past)
        if skip_first:
            valid = valid & (valid.cumsum(dim=1) > skip_first)
        return RealTokens(valid, skip_first)


def _num_queries(given: dict[str, Any], mask: Tensor) -> int:
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        if isinstance(given.get(name), Tensor):
            return given[name].shape[1]
    return mask.shape[-2] if mask.dim() == 4 else mask.shape[1]


def _columns(mask: Tensor, queries: int, past: int | Tensor | None) -> Tensor:
    """The columns of a 2D mask `[B, past + S]` that speak of this call's S tokens: the last ones."""
    keys = mask.shape[1]
    if keys < queries:
        raise ValueError(f"the attention mask has {keys} columns for {queries} tokens")
    if keys > queries and isinstance(past, Tensor):
        raise ValueError(
            f"a 2D attention mask of {keys} columns for {queries} tokens beside a static cache does not say whose they are"
        )
    start = keys - queries
    if past is None or (isinstance(past, int) and 0 < past <= start):
        # A mask may run past the tokens. (A cache that says 0 may not know its length: MiniMax's.)
        start = past or 0
    return mask[:, start : start + queries] != 0


def _diagonal(mask: Tensor, queries: int, past: int | Tensor | None) -> Tensor:
    """A 4D mask `[B, 1, S, keys]`: a token is real where it may attend to itself (True, or 0 of an additive mask)."""
    keys = mask.shape[-1]
    if mask.shape[-2] != queries or keys < queries or (past is None and keys != queries):
        raise ValueError(
            f"a 4D attention mask {list(mask.shape)} does not fit {queries} tokens without a cache"
        )
    query = torch.arange(queries, device=mask.device)
    # The cache of a window holds no more than its length: the call's own keys are then the last.
    start = torch.as_tensor(0 if past is None else past, device=mask.device).clamp(max=keys - queries)
    diagonal = mask[:, 0, query, query + start]
    # An additive mask may hold a bias where it does not forbid.
    return diagonal if diagonal.dtype == torch.bool else diagonal > torch.finfo(diagonal.dtype).min / 2


def _without_mask(position_ids: Any, cache: Any, skip_first: int) -> RealTokens:
    """All tokens are real; but positions that start again inside a row mean several sequences, which is refused.

    Reads the positions, as transformers itself does in this case. A graph cannot: there packed rows give no samples at all.
    """
    if cache is not None or not isinstance(position_ids, Tensor) or position_ids.dim() != 2:
        return RealTokens(skip_first=skip_first)
    in_order = (position_ids.diff(dim=1) == 1).all()
    if torch.compiler.is_compiling() or (position_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        kept = torch.arange(position_ids.shape[1], device=position_ids.device) >= skip_first
        return RealTokens((in_order & kept).expand(position_ids.shape[0], -1), skip_first)
    if not bool(in_order):
        raise ValueError(
            "packed rows (position_ids that start again) are not supported: give one sequence a row"
        )
    return RealTokens(skip_first=skip_first)
