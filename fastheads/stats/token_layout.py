"""Find the valid tokens of a call: those that are not padding, less the first `skip_first` of each sequence.

They are read from the arguments of the decoder's call, in this order of precedence: `cu_seq_lens_q` (where packed sequences begin
and end; a mask can only remove tokens), a 2D attention mask, a 4D one, and, with neither mask nor cache, positions that restart.
A sequence is one row of one call, or one segment of a packed row. Arguments that leave doubt are refused.
"""

import inspect
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.errors import TokensError

# Arguments that are no tokens: images and audio, whose number of tokens the model decides.
NO_TOKENS = re.compile(r"pixel|image|video|audio|input_features|input_values|pictures|spectrogram")
# Names of arguments that may mark padding, and names that match but do not.
PADDING = re.compile(r"mask|pad|length", re.IGNORECASE)
NO_PADDING = re.compile(
    r"head_mask|encoder|cross|causal|global|image|visual|vision|protein|structure|msa|conditioning|max_length|video|audio|text_row"
    r"|mask_token|masked_pos|mask_time|mask_feature|bool_masked|use_|output_|return_"
)

# A possible number of tokens of a decoder's call, (batch, seq); seq is None if the arguments leave it open.
Shape = tuple[int, int | None]

# An additive mask blocks attention with -10,000 (-9,984 in bfloat16) or less (-1e9, the dtype's minimum, -inf); other entries may
# hold a bias.
FORBIDDEN = -9.9e3

# The caller's own mask for a call of the decoder: bool [batch, seq], or a function from the call's arguments to it.
TokenMask = Tensor | Callable[[dict[str, Any]], Tensor | None]


@dataclass(frozen=True)
class TokenLayout:
    """The valid tokens of one call of the decoder: B rows by S positions.

    `valid` is bool `[B, S]`, with `skip_first` already applied; None means that every token is valid but the first `skip_first`
    of each row.

    `cu_seqlens` is None if each row is a sequence. For packed rows it is int64 `[N + 1]`: sequence n is the tokens
    `cu_seqlens[n]` to `cu_seqlens[n + 1] - 1` of all B·S, row after row, and `valid` is never None. Sequences may be empty (they
    give no samples): if only the device knows their number, N is B·S.

    `tokens` is (B, S); None if the arguments do not determine it. Then it is one of `shapes`: that of the first attention output
    (`settled`).
    """

    valid: Tensor | None = None
    skip_first: int = 0
    cu_seqlens: Tensor | None = None
    tokens: tuple[int, int] | None = None
    shapes: tuple[Shape, ...] = ()

    def settled(self, shape: Sequence[int]) -> "TokenLayout":
        """Return the layout with `tokens` set from the first attention output's shape `[B, S, ...]`, if it is one of `shapes`."""
        batch, seq = shape[0], shape[1]
        fits = any(batch == b and s in (seq, None) for b, s in self.shapes)
        return replace(self, tokens=(batch, seq)) if fits else self

    def described(self) -> str:
        """Describe the number of tokens, for messages."""
        known = self.shapes if self.tokens is None else (self.tokens,)
        return (
            " or ".join(f"[{b}, {'?' if s is None else s}]" for b, s in known)
            or "an unknown number of tokens"
        )

    def mask(self, x: Tensor) -> Tensor | None:
        """Return the valid tokens of `x` `[B, S, ...]`, bool `[B, S]` on its device; None if all are."""
        batch, seq = x.shape[:2]
        if self.valid is None:
            if self.skip_first == 0:
                return None
            return (torch.arange(seq, device=x.device) >= self.skip_first).expand(batch, seq)
        valid = self.valid
        if valid.shape[0] == 1 and batch > 1:
            valid = valid.expand(batch, -1)  # one mask for all rows
        if valid.shape != (batch, seq):
            raise TokensError(
                f"the attention mask is for {list(valid.shape)} tokens, but an attention output has {[batch, seq]}: set the "
                "valid tokens with token_mask()"
            )
        return valid.to(x.device, non_blocking=True)

    def packed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mask `[B, S]` and `cu_seqlens` `[N + 1]` of packed rows, for `x` `[B, S, ...]`, on its device."""
        mask = self.mask(x)
        assert mask is not None and self.cu_seqlens is not None
        return mask, self.cu_seqlens.to(x.device, non_blocking=True)

    @cached_property
    def last_of_sequences(self) -> tuple[Tensor, Tensor]:
        """The index of each packed sequence's last valid token among all B·S, int64 `[N]`, and bool `[N]`: True if it has one."""
        assert self.valid is not None and self.cu_seqlens is not None
        cu_seqlens, valid = (
            self.cu_seqlens,
            self.valid.flatten().to(self.cu_seqlens.device, non_blocking=True),
        )
        token = torch.arange(1, valid.shape[0] + 1, device=cu_seqlens.device)
        # latest[i]: the last valid token before token i, plus one
        latest = torch.cat([token.new_zeros(1), torch.where(valid, token, 0).cummax(0).values])
        last = latest[cu_seqlens[1:]] - 1
        return last.clamp(min=0), last >= cu_seqlens[:-1]


def last_tokens(inputs: Sequence[Tensor], layout: TokenLayout) -> tuple[Sequence[Tensor], TokenLayout]:
    """Reduce `inputs`, `[B, S, W]` each, to the last valid token of each packed sequence; return them with their layout.

    One gather per layer. If the number of sequences is unknown, only the layout changes: it may be as large as that of tokens.
    """
    x = inputs[0]
    layout.mask(x)  # raises if it is for another number of tokens
    last, present = (t.to(x.device, non_blocking=True) for t in layout.last_of_sequences)
    batch, seq = x.shape[:2]
    if last.shape[0] < batch * seq:
        return [x.flatten(0, 1)[last].unsqueeze(0) for x in inputs], TokenLayout(present.unsqueeze(0))
    is_last = torch.zeros(batch * seq + 1, dtype=torch.bool, device=x.device)
    is_last[torch.where(present, last, batch * seq)] = True
    return inputs, TokenLayout(is_last[:-1].view(batch, seq))


def take_last(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Take each row's last valid token from `x` `[G, B, S, W]`: `[G, B, W]`, and bool `[B]`, True if it has one (None: all)."""
    if mask is None:
        return x[:, :, -1], None
    rows, seq = mask.shape
    last = torch.where(mask, torch.arange(seq, device=mask.device), -1).amax(dim=1)
    return x[:, torch.arange(rows, device=mask.device), last.clamp(min=0)], last >= 0


def mean_over_tokens(values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Average `values` `[..., B, S, H]` over each row's valid tokens: `[..., B, H]`, and bool `[B]`, True if any (None: all)."""
    if mask is None:
        return values.mean(dim=-2), None
    count = mask.sum(dim=1)  # [B]
    # Select rather than multiply by the mask: padding may hold NaN.
    total = torch.where(mask.unsqueeze(-1), values, 0.0).sum(dim=-2)
    return total / count.clamp(min=1).unsqueeze(-1), count > 0


def mean_over_sequences(values: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Average `values` `[..., T, H]` over each packed sequence's valid tokens: `[..., N, H]`, and bool `[N]`, True if it has any.

    `mask` is bool `[T]`, `cu_seqlens` `[N + 1]`.
    """
    before = torch.cat([cu_seqlens.new_zeros(1), mask.cumsum(0)])
    count = before[cu_seqlens[1:]] - before[cu_seqlens[:-1]]
    kept = torch.where(mask.unsqueeze(-1), values, 0.0).movedim(-2, 0).contiguous()  # [T, ..., H]
    # Not by differences of a cumulative sum, where a NaN would spread. `unsafe` skips checks that would wait for the device.
    total = torch.segment_reduce(kept, "sum", offsets=cu_seqlens, axis=0, unsafe=True).movedim(0, -2)
    return total / count.clamp(min=1).unsqueeze(-1), count > 0


class DecoderArguments:
    """Read the valid tokens from the arguments of a decoder's `forward`."""

    def __init__(self, decoder: nn.Module, rows_of_ids: int = 1) -> None:
        """`rows_of_ids`: the number of rows of `input_ids` for each row of tokens."""
        self._decoder, self._rows_of_ids = decoder, rows_of_ids
        self._local = threading.local()  # `token_mask` for this thread's calls
        self._read_signature()

    def _read_signature(self) -> None:
        self._forward = vars(self._decoder).get("forward")
        parameters = inspect.signature(self._decoder.forward).parameters.values()
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self._positional = [p.name for p in parameters if p.kind in named]

    def follow_signature(self) -> None:
        """Read the argument names again if the decoder's `forward` was replaced."""
        if vars(self._decoder).get("forward") is not self._forward:
            self._read_signature()

    @contextmanager
    def overridden(self, token_mask: TokenMask) -> Iterator[None]:
        """In this context, use `token_mask` for this thread's calls in place of the attention mask."""
        if not isinstance(token_mask, Tensor) and not callable(token_mask):
            raise TokensError(f"token_mask must be a tensor or a function, not {type(token_mask).__name__}")
        before = getattr(self._local, "token_mask", None)
        self._local.token_mask = token_mask
        try:
            yield
        finally:
            self._local.token_mask = before

    def token_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any], skip_first: int) -> TokenLayout:
        """Return the token layout of a call of the decoder with these arguments.

        Raises TokensError if the valid tokens are not clear: masks of unknown shape, wrong `cu_seq_lens_q`, positional arguments
        without a name.
        """
        if len(args) > len(self._positional):
            raise TokensError(
                f"the decoder's forward names {len(self._positional)} of {len(args)} positional arguments, so that its mask is "
                "not known: give them by keyword (input_ids=..., attention_mask=...), or wrap the forward with functools.wraps"
            )
        given = dict(zip(self._positional, args, strict=False)) | kwargs
        mask, cache, cu_seqlens = given.get("attention_mask"), given.get("past_key_values"), None
        if isinstance(mask, Mapping):  # one for each type of layer; sliding windows hide valid tokens
            mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
        if given.get("cu_seq_lens_q") is not None:
            cu_seqlens = _given_cu_seqlens(given, self._tokens_of(given))
            mask = _mask_beside_cu_seqlens(mask, self._tokens_of(given))
        elif mask is None and cache is None:
            cu_seqlens = self._cu_seqlens_of_positions(given)
        token_mask = getattr(self._local, "token_mask", None)
        valid = None if token_mask is None else self._given_mask(token_mask, given)
        if valid is None and mask is not None:
            valid = _valid(mask, given, cache, self._past(given, cache))
        elif valid is None:
            _check_unread(given)
        if cu_seqlens is not None:
            valid = _within(cu_seqlens, valid, skip_first, self._tokens_of(given))
        elif skip_first and valid is not None:
            valid = valid & (valid.cumsum(dim=1) > skip_first)
        shapes = self._shapes(given)
        tokens = None
        if len(shapes) == 1 and shapes[0][1] is not None:
            tokens = (shapes[0][0], shapes[0][1])
        return TokenLayout(valid, skip_first, cu_seqlens, tokens, shapes)

    def own_layout(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout:
        """Return the layout that the call's own arguments give, whatever `overridden` says: all that are not padding."""
        before = getattr(self._local, "token_mask", None)
        self._local.token_mask = None
        try:
            return self.token_layout(args, kwargs, 0)
        finally:
            self._local.token_mask = before

    def _shapes(self, given: dict[str, Any]) -> tuple[Shape, ...]:
        """Return the possible numbers of tokens of the call; empty if unknown."""
        ids = given.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim():
            shape = ids.shape
            if ids.dim() == 1:
                return ((1, shape[0]),)
            if ids.dim() > 2:  # several ids a token (Csm), or several texts a row (GPT-2's double heads)
                return ((shape[0], shape[1]), (shape[:-1].numel(), shape[-1]))
            rows = self._rows_of_ids
            return ((shape[0] // rows, shape[1]),)
        for name in ("inputs_embeds", "hidden_states"):
            found = given.get(name)
            if isinstance(found, Tensor) and found.dim() > 2:
                return ((found.shape[0], found.shape[1]),)
        name, first = next(
            ((n, value) for n, value in given.items() if isinstance(value, Tensor) and value.dim()),
            ("", None),
        )
        if first is None:
            return ()
        # Tokens under another name: ids [batch, seq], or embeddings [batch, seq, width].
        if first.dim() == (3 if first.is_floating_point() else 2) and not NO_TOKENS.search(name):
            return ((first.shape[0], first.shape[1]),)
        return ((first.shape[0], None),)

    def _tokens_of(self, given: dict[str, Any]) -> tuple[int, int]:
        """Return (batch, seq) of the call; raise TokensError if unknown."""
        batch, seq = next(iter(self._shapes(given)), (0, None))
        if seq is None:
            for name in ("position_ids", "attention_mask"):
                if isinstance(given.get(name), Tensor):
                    batch, seq = given[name].shape[:2]
                    return batch, seq
            raise TokensError(
                "the decoder's call has no input_ids, inputs_embeds or hidden_states, so that its number of tokens is unknown: "
                "pass one of them"
            )
        return batch, seq

    def _past(self, given: dict[str, Any], cache: Any) -> int | Tensor | None:
        """Return the number of cached tokens before this call's; None if unknown."""
        past = None if not hasattr(cache, "get_seq_length") else cache.get_seq_length()
        position = given.get("cache_position") if "cache_position" in self._positional else None
        if isinstance(position, Tensor) and not isinstance(past, int):
            # Only decoders of older releases read it. Some keep a cache of their own; and static caches count the nonzero keys,
            # which misses padding with a zero embedding.
            return position[0]
        return past

    def _given_mask(self, token_mask: TokenMask, given: dict[str, Any]) -> Tensor | None:
        """Return the mask that the caller set with `token_mask()`, checked; None if the function returned None."""
        mask = token_mask if isinstance(token_mask, Tensor) else token_mask(given)
        if mask is None:
            return None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            what = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TokensError(f"token_mask must be a bool tensor [batch, seq], not {what}")
        tokens = self._tokens_of(given)
        if mask.shape != tokens:
            raise TokensError(
                f"token_mask must have the shape of the call's tokens, [batch, seq] = {list(tokens)}, not {list(mask.shape)}"
            )
        return mask.clone()  # the caller may change it before the inputs are measured

    def _cu_seqlens_of_positions(self, given: dict[str, Any]) -> Tensor | None:
        """Detect packed rows as transformers does, by positions that do not go up by one: cu_seqlens `[N + 1]`; None if all do.

        If the positions must not be read (on a GPU), N is the number of tokens, and the sequences that are not there are empty.
        """
        positions = given.get("position_ids")
        if not isinstance(positions, Tensor):
            return None
        if positions.dim() == 3 and positions.shape[0] == 4:
            positions = positions[0]  # models with several axes: the text's come first
        if positions.dim() != 2 or positions.shape[1] < 2:
            return None
        starts = positions.diff(dim=1, prepend=positions[:, :1]) != 1  # the first of a row always is one
        read = self._reads_positions(given, positions)
        if read and not bool(starts[:, 1:].any()):
            return None
        starts = starts.expand(self._tokens_of(given)[0], -1).flatten()
        tokens = starts.shape[0]
        first = torch.arange(tokens, device=starts.device)
        first = first[starts] if read else torch.where(starts, first, tokens).sort().values
        return torch.cat([first, first.new_full((1,), tokens)])

    def _reads_positions(self, given: dict[str, Any], positions: Tensor) -> bool:
        """True if reading the positions costs no extra wait: on a CPU, and where transformers reads them itself for its mask.

        It does so if the decoder neither makes a cache nor is compiled.
        """
        if torch.compiler.is_compiling():
            return False
        if positions.device.type == "cpu":
            return True
        use_cache = given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(getattr(self._decoder, "config", None), "use_cache", True)
        if use_cache or self._decoder._compiled_call_impl is not None:
            return False
        return not (positions.is_cuda and torch.cuda.is_current_stream_capturing())


def _check_unread(given: dict[str, Any]) -> None:
    """Raise TokensError if, without an attention mask, another argument seems to mark padding (FSMT, XLM, XLNet)."""
    for name, value in given.items():
        if value is None or name == "attention_mask" or not isinstance(value, Tensor | list | tuple):
            continue
        if isinstance(value, Tensor) and value.dim() == 0:
            continue  # one number for all rows
        if PADDING.search(name) and not NO_PADDING.search(name):
            raise TokensError(f"padding given as {name} is not read: set the valid tokens with token_mask()")


def _given_cu_seqlens(given: dict[str, Any], call: tuple[int, int]) -> Tensor:
    cu = given["cu_seq_lens_q"]
    if not isinstance(cu, Tensor) or cu.dim() != 1 or cu.shape[0] < 2 or cu.is_floating_point():
        form = f"{cu.dtype} {list(cu.shape)}" if isinstance(cu, Tensor) else type(cu).__name__
        raise TokensError(f"cu_seq_lens_q must be whole numbers [sequences + 1], not {form}")
    tokens, cu_seqlens = call[0] * call[1], cu.to(torch.int64)
    if not torch.compiler.is_compiling() and cu.device.type == "cpu":
        values = cu_seqlens.tolist()
        if values[0] < 0 or values[-1] > tokens or values != sorted(values):
            raise TokensError(f"cu_seq_lens_q must go up from 0 to at most {tokens} tokens, not {values}")
        return cu_seqlens
    # On a GPU the values are not checked, but must not lead to reads out of bounds.
    return cu_seqlens.clamp(min=0, max=tokens).cummax(0).values


def _mask_beside_cu_seqlens(mask: Any, call: tuple[int, int]) -> Any:
    """Return the mask if it can mark padding in packed rows; None if it only separates the sequences."""
    if not isinstance(mask, Tensor):
        return None
    _, seq = call
    return mask if mask.dim() == 2 or mask.shape[2:] == (seq, seq) else None


def _within(cu_seqlens: Tensor, valid: Tensor | None, skip_first: int, tokens: tuple[int, int]) -> Tensor:
    """Mark the tokens that are in a sequence, valid, and not among its first `skip_first` valid ones; bool `[B, S]`."""
    token = torch.arange(tokens[0] * tokens[1], device=cu_seqlens.device)
    inside = (token >= cu_seqlens[0]) & (token < cu_seqlens[-1])
    if valid is not None:
        inside = inside & valid.expand(tokens).flatten().to(cu_seqlens.device, non_blocking=True)
    if skip_first:
        before = torch.cat([cu_seqlens.new_zeros(1), inside.cumsum(0)])  # [T + 1]
        sequence = torch.searchsorted(cu_seqlens, token, right=True) - 1  # of each token
        first = cu_seqlens[sequence.clamp(min=0)]
        inside = inside & (before[1:] - before[first] > skip_first)
    return inside.view(tokens)


def _valid(mask: Any, given: dict[str, Any], cache: Any, past: int | Tensor | None) -> Tensor:
    """Return the valid tokens, bool `[B, S]` or `[1, S]`, by a mask of 2 or 4 dimensions; `past` tokens are in the cache."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        form = f"{mask.dim()}D" if isinstance(mask, Tensor) else type(mask).__name__
        raise TokensError(
            f"an attention mask of 2 or 4 dimensions is needed to find the valid tokens, got {form}"
        )
    queries = _num_queries(given, mask)
    if mask.dim() == 4:
        return _diagonal(mask, queries, past)
    if isinstance(past, int) and past == 0 and mask.shape[1] > queries:
        past = _longest_layer(cache)
    return _columns(mask, queries, past)


def _longest_layer(cache: Any) -> int:
    """Return the number of tokens in a cache that reports 0, since its first layer may keep none (MiniMax); -1 if unknown."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return -1
    return max((layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length")), default=0)


def _num_queries(given: dict[str, Any], mask: Tensor) -> int:
    for name in ("input_ids", "inputs_embeds", "hidden_states"):
        if isinstance(given.get(name), Tensor):
            return given[name].shape[1]
    return mask.shape[-2] if mask.dim() == 4 else mask.shape[1]


def _columns(mask: Tensor, queries: int, past: int | Tensor | None) -> Tensor:
    """Return the columns of a 2D mask for this call's S tokens: those after `past`; a mask may have more columns.

    They are the last ones if the cache does not know (-1), or holds only a window.
    """
    keys = mask.shape[1]
    if keys < queries:
        raise TokensError(
            f"the attention mask has {keys} columns for {queries} tokens: one for each is needed"
        )
    start = keys - queries
    if isinstance(past, Tensor):  # from a static cache: it stays on the device
        first = past.to(mask.device, non_blocking=True).clamp(max=start)
        return mask[:, first + torch.arange(queries, device=mask.device)] != 0
    if past is None or 0 <= past <= start:
        start = past or 0
    return mask[:, start : start + queries] != 0


def _diagonal(mask: Tensor, queries: int, past: int | Tensor | None) -> Tensor:
    """Return the valid tokens by a 4D mask `[B, 1, S, keys]`: those that may attend to themselves (True, or above FORBIDDEN)."""
    keys = mask.shape[-1]
    if mask.shape[-2] != queries or keys < queries or (past is None and keys != queries):
        raise TokensError(
            f"a 4D attention mask {list(mask.shape)} does not fit {queries} tokens without a cache"
        )
    query = torch.arange(queries, device=mask.device)
    # A sliding-window cache holds at most its length; the call's own keys are then the last.
    start = torch.as_tensor(0 if past is None else past, device=mask.device).clamp(max=keys - queries)
    diagonal = mask[:, 0, query, query + start]
    if diagonal.dtype == torch.bool:
        return diagonal
    if not diagonal.is_floating_point():
        raise TokensError(f"a 4D attention mask must be in bool or in floating point, not {diagonal.dtype}")
    return diagonal > FORBIDDEN
