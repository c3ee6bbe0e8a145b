"""From tensors to launches: what the kernel cannot take is copied or refused here, and nothing waits for the GPU."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import lru_cache, reduce
from functools import partial as bind
from operator import attrgetter, or_

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import kernel
from .config import (
    INTERPRETED,
    MAX_HEAD_DIM,
    Config,
    config_for,
    programs_at_once,
    triangle_elements,
)
from .factor import PRECISIONS, KernelFactor, new_factor

IS_INTERPRETED = not isinstance(kernel.head_stats_kernel, triton.JITFunction)
TOKEN_AGGS = {"all": kernel.ALL, "last": kernel.LAST, "token": kernel.TOKEN}
_TL_DTYPE = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Layers in one launch; each size is one compilation, a larger group is several launches.
_TABLE_SIZES = (1, 8, 16, 32)
# The norms of token mode between its two kernels: small enough to stay in the L2 of a data-centre GPU.
WORKSPACE_BYTES = 32 << 20
# Tiles that one program takes at most: it adds up the norms of a row in float32.
_MOST_TILES = 256
# Rows times heads in a block of the merge, a warp: one a thread, of four metrics, or it sets the registers of the kernel.
_MERGE_LANES = 32
# The same in the kernel of token mode, a program.
_MERGE_ELEMENTS = 256
_TOKEN_PROGRAMS = 128


_SLOT = int(kernel.SLOT.value)
_PLANES, _SUMS = int(kernel.PLANES.value), int(kernel.SUMS.value)
_METRICS, _RATIO_METRICS = int(kernel.METRICS.value), int(kernel.RATIO_METRICS.value)
_VECTOR_HEADER = int(kernel.VECTOR_HEADER.value)


def _cdiv(a: int, b: int) -> int:
    """As triton.cdiv, which takes ten times as long outside a kernel."""
    return -(-a // b)


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


@lru_cache
def _gpu(index: int) -> tuple[str, int, int]:
    """Compute capability, shared memory a program may hold, multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    shared = getattr(properties, "shared_memory_per_block_optin", 99 << 10)
    return f"{properties.major}.{properties.minor}", shared, properties.multi_processor_count


def _device(device: torch.device) -> tuple[str, int, int]:
    if device.type != "cuda":
        return INTERPRETED, 1 << 30, 2
    return _gpu(torch.cuda.current_device() if device.index is None else device.index)


def unsupported(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why the kernel does not serve such tensors; None where it does."""
    if dtype not in _TL_DTYPE:
        return f"dtype {dtype} (the kernel takes {', '.join(str(known) for known in _TL_DTYPE)})"
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        return f"head_dim {head_dim} (the kernel takes 1 to {MAX_HEAD_DIM})"
    if head_dim * dtype.itemsize % 16:
        return f"head_dim {head_dim} in {dtype}: a head does not end on a multiple of 16 bytes"
    if IS_INTERPRETED:
        return None if device.type == "cpu" else f"{device.type} tensors while TRITON_INTERPRET=1"
    if device.type != "cuda":
        return f"{device.type} tensors (the kernel needs a GPU, or TRITON_INTERPRET=1)"
    if torch.version.hip is not None:
        return "AMD GPUs"
    capability, shared, _ = _device(device)
    if float(capability) < 8.0:
        return f"compute capability {capability} (the kernel needs 8.0)"
    for precision in PRECISIONS:
        if config_for(capability, head_dim, dtype, precision, shared) is None:
            return f"head_dim {head_dim} in {shared >> 10} KB of shared memory"
    return None


def config_on(device: torch.device, head_dim: int, dtype: torch.dtype, precision: str) -> Config:
    """The configuration in use; raises ValueError where there is none."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision {precision!r}: expected one of {', '.join(map(repr, PRECISIONS))}")
    reason = unsupported(device, dtype, head_dim)
    if reason is not None:
        raise ValueError(f"the triton backend does not serve {reason}")
    capability, shared, _ = _device(device)
    config = config_for(capability, head_dim, dtype, precision, shared)
    assert config is not None  # or unsupported() had said so
    return config


def prepare(L: Tensor, dtype: torch.dtype, precision: str, *, config: Config | None = None) -> KernelFactor:
    """The factor of one layer as the kernel reads it.

    `L` is float64 `[heads, D, D]`, lower triangular, with |W_h z| = |z @ L_h|; `dtype` is that of the inputs. `precision`:
    "exact" (two parts of L), or "fast" (one; a head for which that could be wrong by more than 2e-3 keeps two). `config`
    overrides the table (for tuning). The factor's `refresh(L)` writes new weights in place.
    """
    if config is None:
        config = config_on(L.device, L.shape[-1], dtype, precision)
    return new_factor(L, dtype, precision, config)


def head_stats(
    inputs: Sequence[Tensor],
    factors: Sequence[KernelFactor],
    state: Tensor,
    rows: Sequence[int],
    *,
    token_agg: str,
    valid: Tensor | None = None,
    skip_first: int = 0,
    scale: Tensor | None = None,
    ratio: Tensor | None = None,
    vectors: Tensor | None = None,
) -> "Launch | None":
    """Merge the samples of a group of layers into `state`, in place, without waiting for the GPU.

    Args:
        inputs: x `[batch, seq, heads * head_dim]` of each layer; one shape, dtype (bfloat16, float16, float32) and device.
            Rows may be slices of wider ones; what 16-byte loads cannot read is copied.
        factors: from `prepare`, one an input.
        state: float64 `[6, metrics, rows, max_heads]`, the buffer of `fastheads.stats.moments.RunningMoments`. Four metrics: |z|,
            |W z| and each over its mean over the layer's heads; two more are for `ratio`: |W z| * ratio and its square.
        rows: the row of the state of each input, all different.
        token_agg: "all", "last" or "token": what one sample is.
        valid: bool `[batch, seq]`, the valid tokens, less the `skip_first` first of each sequence; None where all are.
        skip_first: tokens at the start of each row that are left out; counts only where `valid` is None.
        scale: `[batch, seq]`, or `[layers, batch, seq]` with one for each input, multiplied into the norms of the contributions
            |W z| (not of |z|), token by token.
        ratio: likewise: what |W z| (times `scale`) is multiplied with for the last two metrics, as 1 / |r| from `inverse_norms`.
            Under "all" the ratio's square is float32: from 1.8e19 on a ratio makes the sample nonfinite.
        vectors: float64 `[rows, max_heads, 4 + max_head_dim]`, the buffer of `fastheads.stats.mean_vectors.RunningMeanVectors`:
            takes the valid tokens (under "last" the last of each sequence), in place. Counts of tokens, means of |W z|² (without
            `scale`), of |z|² and of z; a token with a square beyond float32 counts as not finite, for that head.

    Returns:
        What makes these launches again for other inputs of the same form; None where each must be made anew.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit together.
    """
    _check(inputs, factors, state, rows, token_agg, ratio is not None)
    if vectors is not None:
        _check_vectors(vectors, factors[0], state, rows)
    if inputs[0].shape[0] == 0 or inputs[0].shape[1] == 0:
        return None
    mask, last = _as_kernel_reads(valid, token_agg)
    if scale is not None:
        scale = _per_token(scale, len(inputs), inputs[0].shape, "scale")
    if ratio is not None:
        ratio = _per_token(ratio, len(inputs), inputs[0].shape, "ratio")
    loadable = [_loadable(x) for x in inputs]
    with _on(state.device):
        parts = _launch_groups(
            loadable, factors, state, rows, token_agg, mask, last, skip_first, scale, ratio, vectors
        )
    if parts is None or len({(x.stride(), type(x)) for x in inputs}) > 1:
        return None
    if any(x is not given for x, given in zip(loadable, inputs, strict=True)):
        return None  # a copy must be made each time
    return Launch(
        parts,
        inputs,
        factors,
        state,
        token_agg,
        valid,
        skip_first,
        scale is not None,
        ratio is not None,
        vectors,
    )


def _last_of(valid: Tensor) -> Tensor:
    """The last valid token of each row of `valid` `[B, S]`, -1 where there is none: int64 `[B]`."""
    if valid.shape[1] == 1:
        return valid.squeeze(1).to(torch.int64) - 1
    positions = torch.arange(1, valid.shape[1] + 1, device=valid.device)
    return torch.where(valid, positions, 0).amax(1) - 1


def _as_kernel_reads(valid: Tensor | None, token_agg: str) -> tuple[Tensor | None, Tensor | None]:
    """The mask in bytes, and the last valid token of each row, int64 `[batch]`, where it is the sample."""
    if valid is None:
        return None, None
    last = _last_of(valid) if token_agg == "last" else None
    return valid.contiguous().view(torch.uint8), last


def _per_token(numbers: Tensor, layers: int, shape: torch.Size, name: str) -> Tensor:
    """A scale or a ratio for inputs of this shape as the kernel reads it: contiguous float32 `[layers, batch, seq]`."""
    try:
        return numbers.to(torch.float32).expand(layers, *shape[:2]).contiguous()
    except RuntimeError:
        raise ValueError(
            f"expected a {name} [batch, seq] or [layers, batch, seq] for {layers} inputs {list(shape)}, got {list(numbers.shape)}"
        ) from None


def _on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which that GPU is the current one."""
    is_elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if is_elsewhere else nullcontext()


@dataclass(frozen=True, eq=False)
class _Part:
    """One launch of a group, of up to 32 layers: the compiled kernel with its grid, and the arguments that stay."""

    run: Callable[..., object]
    inputs: slice  # of the group
    padding: tuple[int, ...]  # of the table of addresses
    tables: tuple[object, object]  # addresses of the factors, places of the rows
    numbers: tuple[object, ...]  # the arguments after the tensors
    partial: int  # elements of the partial sums


_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")


class Launch:
    """The launches that measured a group of inputs, to be made again for others that differ in nothing but their addresses: small
    forwards take as long as their Python does. The compiled kernel looks at no argument again, so `matches` and `run` do.
    """

    def __init__(
        self,
        parts: Sequence[_Part],
        inputs: Sequence[Tensor],
        factors: Sequence[KernelFactor],
        state: Tensor,
        token_agg: str,
        valid: Tensor | None,
        skip_first: int,
        is_scaled: bool,
        has_ratio: bool,
        vectors: Tensor | None,
    ) -> None:
        """`inputs` are of one type, shape, strides and dtype; none was copied."""
        x = inputs[0]
        self.factors = tuple(factors)  # whose addresses are in the tables
        self._parts = tuple(parts)
        self._shape, self._strides, self._is_contiguous = x.shape, x.stride(), x.is_contiguous()
        self._count, self._dtypes, self._types = len(inputs), {x.dtype}, {type(x)}
        # Bytes from the first of an input to beyond its last.
        self.extent = x.element_size() * (
            1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        )
        self._index = x.get_device()
        self._device, self._state_shape = state.device, state.shape
        self._token_agg = token_agg
        self._vector_shape = None if vectors is None else vectors.shape
        self._form = (len(inputs), skip_first, is_scaled, has_ratio)
        self._valid_like = None if valid is None else (valid.shape, valid.device)
        self._scratch = max(part.partial for part in parts)

    def matches(
        self,
        inputs: Sequence[Tensor],
        valid: Tensor | None,
        skip_first: int,
        *,
        is_scaled: bool = False,
        has_ratio: bool = False,
    ) -> list[int] | None:
        """The addresses of these inputs, all on one device, for `run`; None where these launches do not serve them."""
        if (len(inputs), skip_first, is_scaled, has_ratio) != self._form:
            return None
        if valid is None or self._valid_like is None:
            if valid is not self._valid_like:
                return None
        elif (valid.shape, valid.device) != self._valid_like:
            return None
        if (
            set(map(type, inputs)) != self._types
            or set(map(_DTYPE, inputs)) != self._dtypes
            or set(map(_SHAPE, inputs)) != {self._shape}
            or inputs[0].get_device() != self._index
        ):
            return None
        if self._is_contiguous:
            if not all(map(Tensor.is_contiguous, inputs)):
                return None
        elif any(x.stride() != self._strides for x in inputs):
            return None
        addresses = list(map(Tensor.data_ptr, inputs))
        # The compiled code may be for addresses that are multiples of 16.
        return None if reduce(or_, addresses) & 15 else addresses

    def new_scratch(self) -> Tensor:
        """Memory for the partial sums of one launch at a time: to be kept from `run` to `run`, but not for a CUDA graph."""
        return torch.empty(self._scratch, dtype=torch.float64, device=self._device)

    def run(
        self,
        addresses: Sequence[int],
        state: Tensor,
        valid: Tensor | None,
        *,
        scale: Tensor | None = None,
        ratio: Tensor | None = None,
        scratch: Tensor | None = None,
        vectors: Tensor | None = None,
    ) -> bool:
        """Launch for the inputs at these addresses, which `matches` gave. False, and nothing was done, where the kernel cannot
        read the state, the mask, the scale, the ratio or the mean vectors.
        """
        mask, last = _as_kernel_reads(valid, self._token_agg)
        scales, ratios = self._of_parts(scale, "scale"), self._of_parts(ratio, "ratio")
        if state.shape != self._state_shape or not self._is_readable(state):
            return False
        if (None if vectors is None else vectors.shape) != self._vector_shape:
            return False
        if vectors is not None and not self._is_readable(vectors):
            return False
        if any([tensor is not None and tensor.data_ptr() & 15 for tensor in (mask, last, *scales, *ratios)]):
            return False
        with _on(self._device):
            if scratch is None:
                scratch = self.new_scratch()
            for part, *per_token in zip(self._parts, scales, ratios, strict=True):
                table = (*addresses[part.inputs], *part.padding)
                part.run(
                    table,
                    *part.tables,
                    state,
                    scratch,
                    None,
                    mask,
                    last,
                    *per_token,
                    vectors,
                    *part.numbers,
                )
        return True

    def _is_readable(self, state: Tensor) -> bool:
        """Whether the kernel can read a state of the right shape. It may lie anywhere in a larger buffer."""
        return state.is_contiguous() and state.dtype == torch.float64 and state.device == self._device

    def _of_parts(self, numbers: Tensor | None, name: str) -> list[Tensor | None]:
        """The scale or ratio of each launch."""
        if numbers is None:
            return [None] * len(self._parts)
        numbers = _per_token(numbers, self._count, self._shape, name)
        return [numbers[part.inputs] for part in self._parts]


def _check(
    inputs: Sequence[Tensor],
    factors: Sequence[KernelFactor],
    state: Tensor,
    rows: Sequence[int],
    token_agg: str,
    has_ratio: bool = False,
) -> None:
    if token_agg not in TOKEN_AGGS:
        raise ValueError(f"token_agg {token_agg!r}: expected one of {', '.join(map(repr, TOKEN_AGGS))}")
    if not len(inputs) == len(factors) == len(rows) == len(set(rows)) > 0:
        raise ValueError(
            f"expected one factor and one distinct row per input, got {len(inputs)} inputs, "
            f"{len(factors)} factors, rows {list(rows)}"
        )
    forms = [(_PLANES, _METRICS + _RATIO_METRICS)] + ([] if has_ratio else [(_PLANES, _METRICS)])
    if state.dtype != torch.float64 or state.shape[:2] not in forms or not state.is_contiguous():
        raise ValueError(
            f"expected a contiguous float64 state [{_PLANES}, {forms[-1][1]}, rows, heads] "
            f"{'with' if has_ratio else 'without'} a ratio, got {list(state.shape)}"
        )
    if min(rows) < 0 or max(rows) >= state.shape[2]:
        raise ValueError(f"rows {list(rows)} of a state of {state.shape[2]}")
    like = factors[0]
    for x, factor in zip(inputs, factors, strict=True):
        if x.dim() != 3 or x.shape != inputs[0].shape or x.shape[2] != factor.heads * factor.head_dim:
            raise ValueError(
                f"expected inputs [batch, seq, {factor.heads} * {factor.head_dim}] of one shape, got {list(x.shape)}"
            )
        if x.dtype != factor.dtype or x.device != state.device or factor.buffer.device != state.device:
            raise ValueError(
                f"input {x.dtype} on {x.device}, factor for {factor.dtype} on {factor.buffer.device}, state on "
                f"{state.device}: expected one device, and the factor's dtype"
            )
        if (factor.heads, factor.head_dim, factor.precision) != (like.heads, like.head_dim, like.precision):
            raise ValueError("the factors of a group must have one shape and one precision")
    if like.heads > state.shape[3]:
        raise ValueError(f"{like.heads} heads and a state of {state.shape[3]}")


def _check_vectors(vectors: Tensor, factor: KernelFactor, state: Tensor, rows: Sequence[int]) -> None:
    least = (max(rows) + 1, factor.heads, _VECTOR_HEADER + factor.head_dim)
    if vectors.dtype != torch.float64 or vectors.dim() != 3 or not vectors.is_contiguous():
        raise ValueError(
            f"expected contiguous float64 mean vectors [rows, heads, {_VECTOR_HEADER} + head_dim], got {vectors.dtype} "
            f"{list(vectors.shape)}"
        )
    if any(size < needed for size, needed in zip(vectors.shape, least, strict=True)):
        raise ValueError(f"expected mean vectors of at least {list(least)}, got {list(vectors.shape)}")
    if vectors.device != state.device:
        raise ValueError(f"mean vectors on {vectors.device}, state on {state.device}: expected one device")


def _loadable(x: Tensor) -> Tensor:
    """X itself, or a copy where its elements or rows do not lie as 16-byte loads need them."""
    unit = 16 // x.element_size()
    batch, seq, _ = x.shape
    aligned = x.data_ptr() % 16 == 0 and (x.stride(2) == 1 or x.shape[2] == 1)
    if (seq > 1 and x.stride(1) % unit) or (batch > 1 and x.stride(0) % unit):
        aligned = False
    return x if aligned else x.clone(memory_format=torch.contiguous_format)


def _launch_groups(
    inputs: Sequence[Tensor],
    factors: Sequence[KernelFactor],
    state: Tensor,
    rows: Sequence[int],
    token_agg: str,
    valid: Tensor | None,
    last: Tensor | None,
    skip_first: int,
    scale: Tensor | None,
    ratio: Tensor | None,
    vectors: Tensor | None,
) -> tuple[_Part, ...] | None:
    """Launch for layers with the same strides, no factor twice in one (its ticket counts one layer). Returns the launches, if
    each is of neighbours and can be made again.
    """
    parts: list[_Part | None] = []
    waiting = list(zip(inputs, factors, rows, range(len(rows)), strict=True))
    while waiting:
        strides = _strides(waiting[0][0])
        group: list[tuple[Tensor, KernelFactor, int, int]] = []
        later = []
        taken = set()
        for item in waiting:
            if len(group) < _TABLE_SIZES[-1] and _strides(item[0]) == strides and id(item[1]) not in taken:
                group.append(item)
                taken.add(id(item[1]))
            else:
                later.append(item)
        waiting = later
        xs, fs, rs, places = zip(*group, strict=True)
        of_group = (scale, ratio)
        if len(group) < len(inputs):
            of_group = (_at(scale, places), _at(ratio, places))
        part = None
        if token_agg == "token":
            _launch_tokens(xs, fs, state, rs, valid, skip_first, *of_group, vectors)
        else:
            part = _launch_one(
                xs, fs, state, rs, token_agg, valid, last, skip_first, *of_group, None, vectors
            )
        first, stop = places[0], places[0] + len(places)
        if part is not None:
            part = replace(part, inputs=slice(first, stop)) if places == tuple(range(first, stop)) else None
        parts.append(part)
    known = [part for part in parts if part is not None]
    return tuple(known) if len(known) == len(parts) else None


def _at(numbers: Tensor | None, places: Sequence[int]) -> Tensor | None:
    """The numbers of some of the layers."""
    return None if numbers is None else torch.stack([numbers[place] for place in places])


def _strides(x: Tensor) -> tuple[int, int]:
    """Strides of batch and seq; 0 where there is one element (torch reports anything there)."""
    return (x.stride(0) if x.shape[0] > 1 else 0, x.stride(1) if x.shape[1] > 1 else 0)


def _tables(
    xs: Sequence[Tensor], factors: Sequence[KernelFactor], rows: Sequence[int]
) -> tuple[int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Addresses and rows as tuples of integers, padded to the next table size.

    They travel as kernel arguments: nothing is copied to the GPU, nothing can be overwritten before it was read, and a
    CUDA graph keeps them.
    """
    size = next(size for size in _TABLE_SIZES if len(xs) <= size)
    padding = (0,) * (size - len(xs))  # never read
    pad_address = (xs[0].data_ptr(),) * len(padding)
    return (
        size,
        tuple(x.data_ptr() for x in xs) + pad_address,
        tuple(factor.buffer.data_ptr() for factor in factors) + pad_address,
        tuple(row * _SLOT for row in rows) + padding,
    )


def _launch_one(
    xs: Sequence[Tensor],
    factors: Sequence[KernelFactor],
    state: Tensor,
    rows: Sequence[int],
    token_agg: str,
    valid: Tensor | None,
    last: Tensor | None,
    skip_first: int,
    scale: Tensor | None,
    ratio: Tensor | None,
    norms: Tensor | None,
    vectors: Tensor | None = None,
) -> _Part | None:
    batch, seq, _ = xs[0].shape
    factor = factors[0]
    heads, pieces = factor.heads, factor.pieces
    _, _, multiprocessors = _device(state.device)
    config = _sized(factor.config, batch if token_agg == "last" else seq)
    if token_agg == "last":
        programs, tiles_per_program, chunks = _cdiv(batch, config.block_tokens), 1, 1
    else:
        tiles = _cdiv(seq, config.block_tokens)
        at_once = multiprocessors * programs_at_once(config, factor.head_dim, factor.dtype, factor.precision)
        tiles_per_program = _share(batch * tiles, len(xs) * heads, at_once)
        programs = _cdiv(batch * tiles, tiles_per_program)
        chunks = _most_programs(tiles, tiles_per_program)
    sums = 0  # of each layer
    if token_agg != "token":
        sums = (_SUMS if ratio is None else _SUMS + _RATIO_METRICS) * chunks * batch * heads
    if vectors is not None:
        sums += programs * heads * (_VECTOR_HEADER + factor.head_dim)
    partial = torch.empty(len(xs) * sums, dtype=torch.float64, device=state.device) if sums else None
    size, addresses, factor_addresses, slots = _tables(xs, factors, rows)
    stride_b, stride_s = _strides(xs[0])
    unit = 16 // xs[0].element_size()
    padded_heads = max(16, _next_power_of_2(heads))
    masked = valid is not None or skip_first > 0 or seq % config.block_tokens > 0
    # Bulk copies see x as [batch * seq, width]: evenly spaced rows, and no piece that reaches into the next head. They leave no
    # token out.
    even = stride_s > 0 and (batch == 1 or stride_b == seq * stride_s)
    tma = config.tma and token_agg != "last" and even and sum(pieces) == factor.head_dim
    tma = tma and not (masked and vectors is not None)
    # The bits of one bfloat16, as wide as what they are multiplied with.
    together = config.together and xs[0].dtype == torch.bfloat16 and len(set(pieces)) == 1
    if vectors is not None and factor.precision == "exact":
        together = False  # with the sums of z beside it, two reductions are faster
    grid = (heads * programs, len(xs), 1)  # all three: a compiled kernel asks for them
    tensors = (state, partial, norms, valid, last, scale, ratio, vectors)
    numbers = (
        stride_b // unit,
        stride_s // unit,
        batch,
        seq,
        heads,
        state.shape[2],
        state.shape[3],
        skip_first,
        tiles_per_program,
        chunks,
        *((0, 0) if vectors is None else vectors.shape[1:]),
    )
    compiled_for = {
        "DTYPE": _TL_DTYPE[xs[0].dtype],
        "SIZE": size,
        "MODE": TOKEN_AGGS[token_agg],
        "MASKED": masked,
        "HEAD_DIM": factor.head_dim,
        "PIECES": pieces,
        "COUNT": len(pieces),
        "BLOCKS": triangle_elements(pieces),
        "BT": config.block_tokens,
        "HP": padded_heads,
        "BB": max(1, _MERGE_LANES * config.num_warps // padded_heads),
        "VP": _next_power_of_2(factor.head_dim),
        "FAST": factor.precision == "fast",
        "Z_PARTS": 3 if xs[0].dtype == torch.float32 else 1,
        "PARTS": factor.parts,
        "SIDE_BY_SIDE": config.side_by_side and factor.parts == 2,
        "TOGETHER": together,
        "TMA": tma,
        "UPCAST": IS_INTERPRETED,
        "STAGES": config.num_stages,
        "EXACT_STAGES": config.exact_stages,
        "WIDE": state.shape[1] > _METRICS,
    }
    options = {"num_warps": config.num_warps, "maxnreg": config.max_registers}
    launcher = kernel.head_stats_kernel[grid]
    run = bind(launcher, addresses, factor_addresses, slots, *tensors, *numbers, **compiled_for, **options)
    if tma and not IS_INTERPRETED:
        copy_context().run(_with_scratch, run)
        return None  # only large inputs, whose launches hide behind the GPU's work
    compiled = run()
    if token_agg == "token" or any(tensor is not None and tensor.data_ptr() % 16 for tensor in tensors[1:-1]):
        return None
    return _Part(
        bind(launcher, **options) if IS_INTERPRETED else compiled[grid],  # type: ignore[index]
        slice(0, len(xs)),
        addresses[len(xs) :],
        (factor_addresses, slots),
        (*numbers, *compiled_for.values()),
        len(xs) * sums,
    )


def _with_scratch(run: Callable[[], object]) -> None:
    """Launch with memory for descriptors that the kernel writes, in a context of its own: others may set allocators too."""
    triton.set_allocator(_scratch)
    run()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _sized(config: Config, tokens: int) -> Config:
    """The configuration with a tile no larger than needed: few rows are not worth a tile of many."""
    block = max(16, _next_power_of_2(tokens))
    return config if block >= config.block_tokens else replace(config, block_tokens=block, num_warps=4)


@lru_cache(maxsize=1024)
def _share(tiles: int, heads: int, at_once: int) -> int:
    """Tiles that one program takes, of all those of a head; `heads` counts those of all layers of the launch.

    All programs take as long, so the time is that of the rounds in which `at_once` of them run; a program starts by reading
    its factor, which costs about two tiles. Most often one round is best.
    """
    fewest = _cdiv(heads, at_once)
    best = (float("inf"), 1)
    for rounds in range(fewest, fewest + 16):
        share = _cdiv(tiles, max(1, min(tiles, rounds * at_once // heads)))
        if share <= _MOST_TILES or rounds == fewest + 15:
            best = min(best, (rounds * (share + 2.0), min(share, _MOST_TILES)))
    return best[1]


def _most_programs(tiles: int, share: int) -> int:
    """Programs that at most take part in one row of `tiles` tiles."""
    if share % tiles == 0:
        return 1
    return tiles // share if tiles % share == 0 else _cdiv(tiles - 1, share) + 1


def _launch_tokens(
    xs: Sequence[Tensor],
    factors: Sequence[KernelFactor],
    state: Tensor,
    rows: Sequence[int],
    valid: Tensor | None,
    skip_first: int,
    scale: Tensor | None,
    ratio: Tensor | None,
    vectors: Tensor | None,
) -> None:
    """Token mode: norms into a workspace, then moments of them; a window of tokens at a time."""
    batch, seq, _ = xs[0].shape
    heads = factors[0].heads
    window = max(1, WORKSPACE_BYTES // (8 * heads * len(xs)))
    rows_at_once, tokens_at_once = max(1, window // seq), min(seq, window)
    most = min(batch, rows_at_once) * tokens_at_once
    norms = torch.empty(len(xs) * 2 * heads * most, dtype=torch.float32, device=state.device)
    for b in range(0, batch, rows_at_once):
        for t in range(0, seq, tokens_at_once):
            part = (slice(b, b + rows_at_once), slice(t, t + tokens_at_once))
            _launch_window(
                [x[part] for x in xs],
                factors,
                state,
                rows,
                None if valid is None else valid[part].contiguous(),
                max(0, skip_first - t),
                None if scale is None else scale[:, *part].contiguous(),
                None if ratio is None else ratio[:, *part].contiguous(),
                norms,
                vectors,
            )


def token_norms(
    inputs: Sequence[Tensor], factors: Sequence[KernelFactor], *, scale: Tensor | None = None
) -> Tensor:
    """|z| and |W z| of every token, float32 `[layers, 2, heads, batch * seq]`: for samples that `head_stats` does not know.

    Arguments and errors as those of `head_stats`; waits for nothing. Reads x once, writes 8 bytes a head and token.
    """
    batch, seq, _ = inputs[0].shape
    heads, device = factors[0].heads, inputs[0].device
    state = torch.empty(6, 4, len(inputs), heads, dtype=torch.float64, device=device)  # checked; not written
    _check(inputs, factors, state, range(len(inputs)), "token")
    norms = torch.empty(len(inputs), 2, heads, batch * seq, dtype=torch.float32, device=device)
    if norms.numel() == 0:
        return norms
    xs = [_loadable(x) for x in inputs]
    if scale is not None:
        scale = _per_token(scale, len(inputs), inputs[0].shape, "scale")
    with _on(device):
        _launch_norms(xs, factors, state, scale, norms)
    return norms


def _launch_norms(
    xs: Sequence[Tensor],
    factors: Sequence[KernelFactor],
    state: Tensor,
    scale: Tensor | None,
    norms: Tensor,
) -> None:
    """Launches of neighbours with the same strides."""
    start = 0
    for stop in range(1, len(xs) + 1):
        full = stop - start == _TABLE_SIZES[-1]
        if full or stop == len(xs) or _strides(xs[stop]) != _strides(xs[start]):
            part, rows = slice(start, stop), range(start, stop)
            scales = None if scale is None else scale[part]
            _launch_one(
                xs[part], factors[part], state, rows, "token", None, None, 0, scales, None, norms[part]
            )
            start = stop


def _launch_window(
    xs: Sequence[Tensor],
    factors: Sequence[KernelFactor],
    state: Tensor,
    rows: Sequence[int],
    valid: Tensor | None,
    skip_first: int,
    scale: Tensor | None,
    ratio: Tensor | None,
    norms: Tensor,
    vectors: Tensor | None,
) -> None:
    batch, seq, _ = xs[0].shape
    heads = factors[0].heads
    # The moments' kernel leaves tokens out; for the mean vectors the first one does.
    mask, skip = (None, 0) if vectors is None else (valid, skip_first)
    _launch_one(xs, factors, state, rows, "token", mask, None, skip, scale, None, norms, vectors)
    padded_heads = max(16, _next_power_of_2(heads))
    block_tokens = max(1, 2 * _MERGE_ELEMENTS // padded_heads)
    programs = min(_TOKEN_PROGRAMS, _cdiv(batch * seq, block_tokens))
    metrics = _METRICS if ratio is None else _METRICS + _RATIO_METRICS
    partial = torch.empty(
        len(xs) * programs * metrics * _PLANES * padded_heads, dtype=torch.float64, device=state.device
    )
    size, _, factor_addresses, slots = _tables(xs, factors, rows)
    kernel.token_moments_kernel[(programs, len(xs))](
        factor_addresses,
        slots,
        state,
        partial,
        norms,
        valid,
        ratio,
        batch * seq,
        seq,
        heads,
        state.shape[2],
        state.shape[3],
        skip_first,
        SIZE=size,
        WIDE=state.shape[1] > _METRICS,
        HP=padded_heads,
        BT=block_tokens,
        BP=max(1, _MERGE_ELEMENTS // padded_heads),
        num_warps=8,
    )
