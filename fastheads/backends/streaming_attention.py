"""Attention once more, on the same queries, keys and values, where a query sees only the first tokens and the last ones.

A query at position p of its sequence sees the keys at positions j ≤ p with j < sink or p − j < window: positions count the valid
tokens of the sequence. Queries are taken a block at a time, each with the keys of its window and the sink's, so that memory grows
with seq × (window + sink) and never with seq². Scores and sums are in float32 (float64 for a float64 model).

Shapes: B rows, S tokens, H query heads, K KV heads, D the width of a query, Dv that of a value; N blocks of Q queries each, which
see W = window − 1 + Q keys besides the sink's.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.errors import ForwardError, OptionError
from fastheads.models.attention import AttentionCall, of_layer
from fastheads.stats.token_layout import TokenLayout

# Queries in a block: as many as the window, within these limits. More mean more masked scores, fewer more copies of keys.
LEAST_BLOCK, MOST_BLOCK = 64, 256
# Elements that a step may allocate for copies of keys and for scores: 128 MiB of float32.
SCRATCH_ELEMENTS = 2**25
TINY = 1e-5  # of the norm: not worth telling apart
ALIGNED = 16  # keys: torch pads other masks, at each call


@dataclass(frozen=True)
class Window:
    """The window of a streaming head: the first `sink` tokens of the sequence, and the last `window`, its own included.

    Raises OptionError for numbers that are none of tokens.
    """

    sink: int
    window: int

    def __post_init__(self) -> None:
        for name, least in (("sink", 0), ("window", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} must be a whole number of tokens, {least} or more, not {value!r}")

    @property
    def reach(self) -> int:
        """The number of tokens at the start of a sequence that see everything before them."""
        return self.sink + self.window


@dataclass(eq=False)
class TokenPlaces:
    """The positions of a call's tokens in their sequences, shared by all layers of the call; `places_of` makes it.

    Tensors are in compact order: each row's valid tokens first, in order. `order` `[B, S]` are their indices among all tokens of
    the row, None if that is the same order.
    """

    shape: tuple[int, int]
    order: Tensor | None
    valid: Tensor | None  # bool [B, S], None: all
    sequence: Tensor | None  # int64 [B, S]: the number of the sequence, None: one in each row
    start: Tensor | None  # int64 [B, S]: the index of the sequence's first token
    # bool [B, S], in the order of the model's tokens: valid tokens that do not see all before them; those that do
    beyond: Tensor
    early: Tensor
    # By the id of a model's mask, which is kept alive: the masks of the blocks, as made for the layer before.
    masks: dict[Any, Any] = field(default_factory=dict)


def places_of(
    layout: TokenLayout, shape: tuple[int, int], window: Window, device: torch.device
) -> TokenPlaces:
    """Find the places of the tokens of a call with this layout (`skip_first` 0), for inputs `[B, S, ...]` on `device`.

    Waits for the device only if that is the CPU.
    """
    batch, seq = shape
    token = torch.arange(seq, device=device)
    mask = layout.mask(torch.empty(1, 1, device=device).expand(shape))
    sequence = start = None
    if layout.cu_seqlens is not None:
        flat = torch.arange(batch * seq, device=device).view(shape)
        bounds = layout.cu_seqlens.to(device)
        sequence = torch.searchsorted(bounds, flat, right=True)
    order = None
    if mask is not None and not (device.type == "cpu" and bool(mask.all())):
        order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        mask = mask.gather(1, order)
        sequence = None if sequence is None else sequence.gather(1, order)
        if device.type == "cpu" and bool((order == token).all()):
            order = None
    elif mask is not None:
        mask = None
    if sequence is None:
        position = token.expand(shape)
    else:
        is_first = torch.ones(shape, dtype=torch.bool, device=device)
        is_first[:, 1:] = sequence[:, 1:] != sequence[:, :-1]
        if mask is not None:
            is_first[:, 1:] |= mask[:, 1:] != mask[:, :-1]
        start = torch.where(is_first, token, 0).cummax(dim=1).values
        position = token - start
    beyond = position >= window.reach
    early = ~beyond
    if mask is not None:
        beyond, early = beyond & mask, early & mask
    if order is not None:
        beyond, early = (torch.zeros_like(x).scatter(1, order, x) for x in (beyond, early))
    return TokenPlaces(shape, order, mask, sequence, start, beyond, early)


def streamed(
    call: AttentionCall, output: Tensor, places: TokenPlaces, window: Window, *, check: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return `output` `[B, S, H, Dv]` of an attention, with that of the streaming attention at tokens beyond sink + window.

    At the tokens before, the two are the same if the attention is computed as it says. With `check` return the distance of the
    two there too, over the norm of `output` (one number on the device); compare it with `tolerance`.
    """
    if places.shape[1] <= window.reach:
        return output, None
    z = streaming_attention(call, places, window)
    distance = None
    if check:
        early = places.early[:, :, None, None]
        apart, size = (torch.where(early, x, 0.0).detach().float().norm() for x in (z - output, output))
        distance = apart / size.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(places.beyond[:, :, None, None], z, output), distance


def check_distance(module: nn.Module, distance: Tensor, dtype: torch.dtype) -> None:
    """Raise ForwardError if an attention is not what its arguments say, by what `streamed` found. Waits for the device.

    Two ways to compute the same attention differ by a few roundings of its dtype; in float32 exponentials add more.
    """
    apart = float(distance)
    if not apart <= 16 * max(torch.finfo(dtype).eps, TINY):
        raise ForwardError(
            f"the attention{of_layer(module)} computes something else than softmax(q k^T) v of its arguments (off by "
            f"{apart:.2g} of its norm): it cannot be streamed"
        )


def of_groups(call: AttentionCall, groups: Tensor) -> tuple[AttentionCall, Tensor]:
    """Return the part of a call that these KV groups (int64) are, and the indices of their query heads."""
    size = call.query.shape[1] // call.key.shape[1]
    heads = (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
    mask = call.mask
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[1] > 1:
        mask = mask[:, heads]
    sinks = None if call.sinks is None else call.sinks[heads]
    query, key, value = call.query[:, heads], call.key[:, groups], call.value[:, groups]
    return replace(call, query=query, key=key, value=value, mask=mask, sinks=sinks), heads


def streaming_attention(call: AttentionCall, places: TokenPlaces, window: Window) -> Tensor:
    """Return the streaming attention's output `[B, S, H, Dv]`, in the dtype of the values; at padding anything, even NaN."""
    query, key, value = (_in_order(x, places.order) for x in (call.query, call.key, call.value))
    blocks = _Blocks(call, places, window)
    out = value.new_empty(value.shape[0], query.shape[2], query.shape[1], value.shape[-1])  # [B, S, H, Dv]
    for part in blocks.parts(query.shape[1], key.shape[1], query.shape[-1]):
        q, k, v = blocks.queries(query, part), blocks.keys(key, part), blocks.keys(value, part)
        mask = blocks.mask(part)
        if call.softcap is None and call.sinks is None and not blocks.own_sinks:
            z = _fused(q, k, v, mask, call.scaling)
        else:
            own = blocks.sinks(key, value, part) if blocks.own_sinks else None
            z = _explicit(q, k, v, mask, call=call, sinks=own)
        z = (
            z.unflatten(0, (-1, part.stop - part.start)).permute(0, 1, 3, 2, 4).flatten(1, 2)
        )  # [B, n·Q, H, Dv]
        first = part.start * blocks.size
        last = min(part.stop * blocks.size, out.shape[1])
        out[:, first:last] = z[:, : last - first].to(out.dtype)
    if places.order is None:
        return out
    index = places.order[:, :, None, None].expand_as(out)
    return torch.empty_like(out).scatter_(1, index, out)


def attention_beyond(call: AttentionCall, places: TokenPlaces, window: Window) -> Tensor:
    """Return the share of each query's attention that is on keys which the streaming attention does not see, float32 `[B, S, H]`.

    All scores are computed, a block of queries at a time. Queries that see everything have 0; at padding it is any number.
    """
    query, key = (_in_order(x, places.order) for x in (call.query, call.key))
    batch, heads, seq, _ = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros(batch, seq, heads, dtype=torch.float32, device=query.device)
    token = torch.arange(seq, device=query.device)
    step = max(1, min(MOST_BLOCK, SCRATCH_ELEMENTS // (batch * heads * seq)))
    for first in range(0, seq, step):
        asks = token[first : first + step]
        q = query[:, :, asks].unflatten(1, (-1, groups)).float()  # [B, K, H / K, Q, D]
        scores = _capped(
            torch.matmul(q, key.float().unsqueeze(2).transpose(-1, -2)) * call.scaling, call.softcap
        )
        index = (asks.expand(batch, -1)[:, :, None], token[None, None])
        seen, bias = _seen(places, *index), _model_mask(call, places, *index)
        scores = _masked(scores, seen, bias, groups)
        if call.sinks is not None:
            sinks = call.sinks.float().view(1, -1, groups, 1, 1).expand(*scores.shape[:-1], 1)
            share = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        else:
            share = scores.softmax(dim=-1)
        near = _near(places, *index, window)[:, None, None]
        beyond = torch.where(near, 0.0, share).sum(dim=-1)  # [B, K, H / K, Q]
        out[:, first : first + step] = beyond.flatten(1, 2).transpose(1, 2)
    if places.order is None:
        return out
    return torch.empty_like(out).scatter_(1, places.order[:, :, None].expand_as(out), out)


class _Blocks:
    """The blocks of queries of one call, and the keys that each sees: first the sink's, then those of the window."""

    def __init__(self, call: AttentionCall, places: TokenPlaces, window: Window) -> None:
        self._call, self._places, self._window = call, places, window
        seq = places.shape[1]
        self.size = min(max(window.window, LEAST_BLOCK), MOST_BLOCK)
        self.count = -(-seq // self.size)
        self.own_sinks = places.sequence is not None  # the queries of a block have different sinks
        self._shared = 0 if self.own_sinks else min(window.sink, seq)
        # Keys before the block's first query. Some too many, which are masked, so that the rows of a mask are aligned.
        self.before = window.window - 1
        self.before += -(self._shared + self.before + self.size) % ALIGNED
        self._seq, self._device = seq, call.query.device

    def parts(self, heads: int, kv_heads: int, width: int) -> Iterator[slice]:
        """Yield ranges of blocks, as many at once as memory allows."""
        of_keys = 2 * kv_heads * width * (self.before + self.size + self._shared)
        of_scores = heads * self.size * (self.before + self.size + self._shared) if self._is_explicit else 0
        step = max(1, SCRATCH_ELEMENTS // (self._places.shape[0] * (of_keys + of_scores)))
        for first in range(0, self.count, step):
            yield slice(first, min(first + step, self.count))

    @property
    def _is_explicit(self) -> bool:
        return self._call.softcap is not None or self._call.sinks is not None or self.own_sinks

    def queries(self, query: Tensor, part: slice) -> Tensor:
        """The queries of these blocks, `[B · n, H, Q, D]`."""
        x = query[:, :, part.start * self.size : part.stop * self.size]
        missing = (part.stop - part.start) * self.size - x.shape[2]
        if missing:
            x = torch.nn.functional.pad(x, (0, 0, 0, missing))
        return x.unflatten(2, (-1, self.size)).transpose(1, 2).flatten(0, 1)

    def keys(self, x: Tensor, part: slice) -> Tensor:
        """The keys, or values, that these blocks see, `[B · n, K, sink + W, D]`."""
        first, last = part.start * self.size - self.before, part.stop * self.size
        taken = x[:, :, max(first, 0) : last]
        after = last - max(first, 0) - taken.shape[2]
        if first < 0 or after:
            taken = torch.nn.functional.pad(taken, (0, 0, max(-first, 0), after))
        near = taken.unfold(2, self.before + self.size, self.size).permute(0, 2, 1, 4, 3)  # [B, n, K, W, D]
        if not self._shared:
            return near.flatten(0, 1)
        sinks = x[:, None, :, : self._shared].expand(-1, near.shape[1], -1, -1, -1)
        return torch.cat([sinks, near], dim=3).flatten(0, 1)

    def mask(self, part: slice) -> tuple[Tensor, Tensor | None]:
        """Return the keys that the queries of these blocks see, bool `[B or 1, n, Q, sink + W]`, and the mask added to their
        scores, `[B or 1, H or 1, n, Q, sink + W]`, or None. A query sees at least itself.
        """
        key = (part.start, part.stop, id(self._call.mask))
        known = self._places.masks.get(key)
        if known is None:
            known = self._places.masks[key] = (self._make_mask(part), self._call.mask)
        found: tuple[Tensor, Tensor | None] = known[0]
        return found

    def _make_mask(self, part: slice) -> tuple[Tensor, Tensor | None]:
        places, window = self._places, self._window
        device, blocks = self._device, torch.arange(part.start, part.stop, device=self._device)
        asks = (blocks * self.size)[:, None] + torch.arange(self.size, device=device)  # [n, Q]
        near = (blocks * self.size - self.before)[:, None] + torch.arange(
            self.before + self.size, device=device
        )
        sinks = torch.arange(self._shared, device=device).expand(len(blocks), -1)
        keys = torch.cat([sinks, near], dim=1)  # [n, sink + W]
        is_sink = torch.arange(keys.shape[1], device=device) < self._shared
        q, k = asks[:, :, None], keys[:, None, :]
        distance = q - k
        in_window = (distance >= 0) & (distance < window.window) & (k >= 0)
        seen = torch.where(is_sink, distance >= window.window, in_window)  # [n, Q, sink + W]
        rows = 1 if places.valid is None and places.sequence is None else places.shape[0]
        q, k = q.clamp(max=self._seq - 1), k.clamp(0, self._seq - 1)
        q, k = q.expand(rows, -1, -1, -1), k.expand(rows, -1, -1, -1)
        itself = (distance == 0) & ~is_sink
        bias = _model_mask(self._call, places, q.flatten(1, 2), k.expand(-1, -1, self.size, -1).flatten(1, 2))
        seen = seen & _seen(places, q, k)
        if bias is not None:
            bias = bias.unflatten(-2, (len(blocks), self.size))  # [B, H or 1, n, Q, sink + W]
            if bias.dtype == torch.bool:
                if bias.shape[1] == 1:
                    seen, bias = seen & bias[:, 0], None
                else:
                    bias = torch.where(bias, 0.0, -torch.inf)
        return seen | itself, bias

    def sinks(
        self, key: Tensor, value: Tensor, part: slice
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
        """Each query's own sinks: keys and values `[B · n, K, Q, sink, D]`, which are seen, `[B · n, Q, sink]`, and the bias."""
        if not self._window.sink:
            return None
        places, sink = self._places, self._window.sink
        assert places.start is not None
        asks = torch.arange(part.start * self.size, part.stop * self.size, device=self._device)
        inside = asks.clamp(max=self._seq - 1)
        start = places.start[:, inside]  # [B, n·Q]
        index = (start[:, :, None] + torch.arange(sink, device=self._device)).clamp(max=self._seq - 1)
        q = inside.expand(index.shape[0], -1)[:, :, None]
        seen = (q - index >= self._window.window) & _seen(places, q.expand_as(index), index)
        bias = _model_mask(self._call, places, q.expand_as(index), index)
        if bias is not None and bias.dtype == torch.bool and bias.shape[1] == 1:
            seen, bias = seen & bias[:, 0], None
        elif bias is not None and bias.dtype == torch.bool:
            bias = torch.where(bias, 0.0, -torch.inf)
        k, v = (_taken(x, index).unflatten(2, (-1, self.size)) for x in (key, value))  # [B, K, n, Q, sink, D]
        seen = seen.unflatten(1, (-1, self.size)).flatten(0, 1)
        if bias is not None:
            bias = bias.unflatten(2, (-1, self.size)).transpose(1, 2).flatten(0, 1)  # [B·n, H or 1, Q, sink]
        return k.transpose(1, 2).flatten(0, 1), v.transpose(1, 2).flatten(0, 1), seen, bias


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: tuple[Tensor, Tensor | None], scaling: float) -> Tensor:
    """Attention of `q` `[B·n, H, Q, D]` to `k`, `v` `[B·n, K, sink + W, ...]`, by torch's function."""
    seen, bias = mask
    many, groups = q.shape[0] // seen.shape[1], q.shape[1] // k.shape[1]
    given = seen[:, None] if bias is None else torch.where(seen[:, None], bias, -torch.inf).to(q.dtype)
    given = given.transpose(1, 2).expand(many, -1, -1, -1, -1).flatten(0, 1)  # [B·n, H or 1, Q, sink + W]
    # Query heads that share keys become more queries of one head, so that nothing is copied.
    packed = q.unflatten(1, (-1, groups)).flatten(2, 3)  # [B·n, K, H / K · Q, D]
    if given.shape[1] == 1:
        given = given.expand(-1, groups, -1, -1).flatten(1, 2).unsqueeze(1)
    else:
        given = given.unflatten(1, (-1, groups)).flatten(2, 3)
    z = torch.nn.functional.scaled_dot_product_attention(packed, k, v, attn_mask=given, scale=scaling)
    return z.unflatten(2, (groups, -1)).flatten(1, 2)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: tuple[Tensor, Tensor | None],
    *,
    call: AttentionCall,
    sinks: tuple[Tensor, Tensor, Tensor, Tensor | None] | None,
) -> Tensor:
    """As `_fused`, with soft-cap, learned sinks, and `sinks` of each query's own."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    seen, bias = mask
    many, groups = q.shape[0] // seen.shape[1], q.shape[1] // k.shape[1]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q = q.unflatten(1, (-1, groups))  # [B·n, K, H / K, Q, D]
    scores = _capped(torch.matmul(q, k.unsqueeze(2).transpose(-1, -2)) * call.scaling, call.softcap)
    seen = seen.expand(many, -1, -1, -1).flatten(0, 1)
    if bias is not None:
        bias = bias.transpose(1, 2).expand(many, -1, -1, -1, -1).flatten(0, 1)
    parts, own = [_masked(scores, seen, bias, groups)], 0
    if sinks is not None:
        key, value, is_seen, added = sinks
        own = key.shape[-2]
        near = torch.einsum("nkgqd,nkqsd->nkgqs", q, key.to(dtype)) * call.scaling
        parts.append(_masked(_capped(near, call.softcap), is_seen, added, groups))
    if call.sinks is not None:
        parts.append(call.sinks.to(dtype).view(1, -1, groups, 1, 1).expand(*scores.shape[:-1], 1))
    share = torch.cat(parts, dim=-1).softmax(dim=-1) if len(parts) > 1 else parts[0].softmax(dim=-1)
    count = scores.shape[-1]
    z = torch.matmul(share[..., :count], v.unsqueeze(2))
    if own:
        z = z + torch.einsum("nkgqs,nkqsd->nkgqd", share[..., count : count + own], value.to(dtype))
    return z.flatten(1, 2)


def _capped(scores: Tensor, softcap: float | None) -> Tensor:
    return scores if softcap is None else torch.tanh(scores / softcap) * softcap


def _masked(scores: Tensor, seen: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Add `bias` `[N, H or 1, Q, keys]` to scores `[N, K, groups, Q, keys]`; -inf where `seen` `[N, Q, keys]` is False."""
    if bias is not None:
        bias = bias.unsqueeze(1) if bias.shape[1] == 1 else bias.unflatten(1, (-1, groups))
        if bias.dtype == torch.bool:
            bias = torch.where(bias, 0.0, -torch.inf)
        scores = scores + bias
    return scores.masked_fill(~seen[:, None, None], -torch.inf)


def _in_order(x: Tensor, order: Tensor | None) -> Tensor:
    """Bring `[B, heads, S, D]` to compact order."""
    return x if order is None else x.gather(2, order[:, None, :, None].expand_as(x))


def _taken(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens `index` `[B, n, s]` of `x` `[B, K, S, D]`: `[B, K, n, s, D]`."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None, None]
    return x.transpose(1, 2)[rows, index].permute(0, 3, 1, 2, 4)


def _at(numbers: Tensor, index: Tensor) -> Tensor:
    """Take `numbers` `[B, S]` at `index` `[B, ...]`."""
    return numbers.gather(1, index.flatten(1)).view(index.shape)


def _seen(places: TokenPlaces, q: Tensor, k: Tensor) -> Tensor:
    """True where the query of index `q` may see the key `k` by causality, padding and sequences; `[B or 1, ...]`, broadcast."""
    q, k = torch.broadcast_tensors(q, k)
    seen = k <= q
    if places.valid is not None:
        seen = seen & _at(places.valid, k.contiguous())
    if places.sequence is not None:
        seen = seen & (_at(places.sequence, q.contiguous()) == _at(places.sequence, k.contiguous()))
    return seen


def _near(places: TokenPlaces, q: Tensor, k: Tensor, window: Window) -> Tensor:
    """True where the streaming attention of the query `q` sees the key `k`, of those that `_seen` allows."""
    q, k = torch.broadcast_tensors(q, k)
    position = k if places.start is None else k - _at(places.start, k.contiguous())
    return (position < window.sink) | (q - k < window.window)


def _model_mask(call: AttentionCall, places: TokenPlaces, q: Tensor, k: Tensor) -> Tensor | None:
    """The model's own mask at queries `q` `[B or 1, n, 1 or s]` and keys `k` `[B or 1, n or 1, s]`: `[B or 1, H or 1, n, s]`,
    bool or added to the scores; None where it says no more than the layout of the tokens (none, or two dimensions).
    """
    mask, order = call.mask, places.order
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        return None
    q, k = torch.broadcast_tensors(q, k)
    batch = places.shape[0]
    if order is not None:
        q, k = (_at(order, x.expand(batch, -1, -1).contiguous()) for x in (q, k))
    if isinstance(mask, Tensor):
        rows = max(q.shape[0], mask.shape[0])
        q, k = q.expand(rows, -1, -1), k.expand(rows, -1, -1)
        row = torch.arange(rows, device=mask.device)[:, None, None]
        if mask.shape[0] == 1:
            row = torch.zeros_like(row)
        if mask.shape[1] == 1:
            return mask[row, 0, q, k].unsqueeze(1)
        return mask[row, :, q, k].movedim(-1, 1)
    # flex attention's: a function of indices
    q, k = q.expand(batch, -1, -1), k.expand(batch, -1, -1)
    row = torch.arange(batch, device=q.device)[:, None, None].expand_as(q)
    allowed: Tensor = mask.mask_mod(row, torch.zeros_like(row), q, k)
    return allowed.unsqueeze(1)
