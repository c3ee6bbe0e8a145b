"""1 / |r| of residual streams: one read of each, all layers in one launch. What `head_stats` takes as its ratio."""

from collections.abc import Callable, Sequence
from functools import lru_cache, reduce
from operator import attrgetter, or_

import torch
import triton
import triton.language as tl
from torch import Tensor

from .kernel import entry
from .launch import (
    _TABLE_SIZES,
    _TL_DTYPE,
    IS_INTERPRETED,
    _cdiv,
    _next_power_of_2,
    _on,
    _strides,
    unsupported,
)

# Elements in a block: 32 a thread of four warps, loads enough under way to fill the memory's pipe.
_BLOCK = 4096
_DTYPE, _SHAPE = attrgetter("dtype"), attrgetter("shape")


@triton.jit(do_not_specialize=["stride_b", "stride_s", "seq", "tokens", "first_layer"])
def inverse_norms_kernel(  # type: ignore[no-untyped-def]
    table,  # addresses of the residual streams, one a layer
    out,  # float32 [layers, tokens]
    stride_b,  # in units of UNIT elements
    stride_s,
    seq,
    tokens,  # batch * seq
    first_layer,  # of this launch
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,  # entries in the tables
    UNIT: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,  # HIDDEN, padded to a power of two
    ROWS: tl.constexpr,  # tokens a program
):
    """Grid: (tokens by ROWS; layers)."""
    i_l = tl.program_id(1)
    p = tl.multiple_of(entry(table, i_l, SIZE).to(tl.pointer_type(DTYPE)), 16)
    o_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = tl.minimum(o_t, tokens - 1)
    o_row = (token // seq * stride_b + token % seq * stride_s) * UNIT
    o_h = tl.arange(0, BLOCK)[None, :]
    if BLOCK == HIDDEN:
        r = tl.load(p + o_row[:, None] + o_h)
    else:
        r = tl.load(p + o_row[:, None] + o_h, mask=o_h < HIDDEN, other=0.0)
    r = r.to(tl.float32)
    square = tl.sum(r * r, axis=1)
    unit = tl.full([ROWS], 1.0, tl.float32)
    # Beyond float32, or so small that squares were lost under it: once more in another unit. (Or 0, infinite, NaN: as it was.)
    rare = (square < 1e-24) | (square == float("inf"))
    if tl.max(rare.to(tl.int32), axis=0) > 0:
        unit = tl.where(rare, tl.where(square < 1.0, 2.0**80, 2.0**-80), unit)
        r *= unit[:, None]
        square = tl.sum(r * r, axis=1)
    inverse = 1.0 / tl.sqrt(square)
    tl.store(out + (first_layer + i_l).to(tl.int64) * tokens + o_t, inverse * unit, mask=o_t < tokens)


class _Launch:
    """One launch for up to 32 streams of one form. The first compiles; the others start what it compiled, which looks at no
    argument again.
    """

    def __init__(
        self,
        count: int,
        shape: torch.Size,
        strides: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        reason = unsupported(device, dtype, 16)
        if reason is not None:
            raise ValueError(f"the triton backend does not serve {reason}")
        batch, seq, hidden = shape
        unit = 16 // dtype.itemsize
        if strides[0] % unit or strides[1] % unit:
            unit = 1  # rows that 16-byte loads cannot read
        size = next(size for size in _TABLE_SIZES if count <= size)
        block = _next_power_of_2(hidden)
        rows = max(1, _BLOCK // block)
        self._padding = size - count
        self._numbers = (strides[0] // unit, strides[1] // unit, seq, batch * seq)
        self._constants = {
            "DTYPE": _TL_DTYPE[dtype],
            "SIZE": size,
            "UNIT": unit,
            "HIDDEN": hidden,
            "BLOCK": block,
            "ROWS": rows,
        }
        self._warps = min(16, max(4, rows * block // 1024))
        self._grid = (_cdiv(batch * seq, rows), count, 1)
        self._run: Callable[..., object] | None = None

    def __call__(self, addresses: list[int], out: Tensor, first_layer: int) -> None:
        """Addresses are multiples of 16; `out` is that of all launches, of which this writes the layers from `first_layer` on."""
        table = (*addresses, *addresses[:1] * self._padding)
        if self._run is not None:
            self._run(table, out, *self._numbers, first_layer, *self._constants.values())
            return
        launcher = inverse_norms_kernel[self._grid]
        given = (table, out, *self._numbers, first_layer)
        compiled = launcher(*given, **self._constants, num_warps=self._warps)
        self._run = launcher if IS_INTERPRETED else compiled[self._grid]


@lru_cache(maxsize=1024)
def _launch_of(
    count: int,
    shape: torch.Size,
    strides: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> _Launch:
    return _Launch(count, shape, strides, dtype, device)


def _readable(r: Tensor) -> Tensor:
    """The stream itself, or a copy where its rows are strided or the first does not start on a multiple of 16 bytes."""
    is_readable = r.data_ptr() % 16 == 0 and (r.stride(2) == 1 or r.shape[2] == 1)
    return r if is_readable else r.clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def inverse_norms(residuals: Sequence[Tensor]) -> Tensor:
    """Compute 1 / |r| of every token of residual streams: float32 `[layers, batch, seq]`, without waiting for the GPU.

    Args:
        residuals: r `[batch, seq, hidden]` of each layer; one shape, dtype (bfloat16, float16, float32) and device. What does not
            lie in rows of neighbouring elements is copied.

    Returns:
        Infinity where r is 0, and 0 where r holds infinity; squares beyond float32 do not matter.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    count = len(residuals)
    if count == 0:
        raise ValueError("expected at least one residual stream")
    first = residuals[0]
    shape, dtype, device = first.shape, first.dtype, first.device
    if len(shape) != 3:
        raise ValueError(f"expected residual streams [batch, seq, hidden], got {list(shape)}")
    if (
        set(map(_SHAPE, residuals)) != {shape}
        or set(map(_DTYPE, residuals)) != {dtype}
        or len(set(map(Tensor.get_device, residuals))) > 1
    ):
        found = sorted({f"{r.dtype} {list(r.shape)} on {r.device}" for r in residuals})
        raise ValueError(f"expected residual streams of one shape, dtype and device, got {', '.join(found)}")
    out = torch.empty(count, *shape[:2], dtype=torch.float32, device=device)
    if first.numel() == 0:
        return out.fill_(torch.inf)
    readable: Sequence[Tensor] = residuals
    addresses = list(map(Tensor.data_ptr, residuals))
    is_contiguous = all(map(Tensor.is_contiguous, residuals))
    if not is_contiguous or reduce(or_, addresses) & 15:
        readable = list(map(_readable, residuals))  # copies live until their launch is under way
        addresses = list(map(Tensor.data_ptr, readable))
    strides = [_strides(readable[0])] * count if is_contiguous else list(map(_strides, readable))
    with _on(device):
        start = 0
        while start < count:
            stop = min(start + _TABLE_SIZES[-1], count)
            # Neighbours with the same strides.
            stop = next((i for i in range(start, stop) if strides[i] != strides[start]), stop)
            launch = _launch_of(stop - start, shape, strides[start], dtype, device)
            launch(addresses[start:stop], out, start)
            start = stop
    return out
