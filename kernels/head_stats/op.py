"""`head_stats`: a plain launch in eager mode, a registered operator under torch.compile."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .factor import KernelFactor
from .launch import config_on, launch


def head_stats(
    inputs: Sequence[Tensor],
    factors: Sequence[KernelFactor],
    state: Tensor,
    rows: Sequence[int],
    *,
    token_agg: str,
    valid: Tensor | None = None,
    last: Tensor | None = None,
    skip_first: int = 0,
    scale: Tensor | None = None,
    alike: bool = False,
) -> None:
    """Merge the samples of a group of layers into `state`, in place, without waiting for the GPU.

    Args:
        inputs: x `[batch, seq, heads * head_dim]` of each layer; one shape, dtype (bfloat16, float16, float32) and device.
            Rows may be slices of wider ones; what 16-byte loads cannot read is copied.
        factors: from `prepare`, one an input.
        state: float64 `[6, 4, rows, max_heads]`, the buffer of `fastheads.stats.moments.RunningMoments`.
        rows: the row of the state of each input, all different.
        token_agg: "all", "last" or "token": what one sample is.
        valid: bool `[batch, seq]`, the valid tokens, less the `skip_first` first of each sequence; None where all are.
        last: int64 `[batch]`, the last valid token of each row, -1 where there is none; None where it is seq - 1 in each.
        skip_first: tokens at the start of each row that are not real; counts only where `valid` is None.
        scale: `[batch, seq]`, or `[layers, batch, seq]` with one for each input, multiplied into the norms of the contributions
            |W z| (not of |z|), token by token.
        alike: the caller has seen that all inputs have the first one's shape, strides, dtype and device: they are not looked at
            again.

    Raises:
        ValueError: shapes, dtypes, devices or names that do not fit together.
    """
    if torch.compiler.is_compiling():
        _operator(
            list(inputs),
            [factor.buffer for factor in factors],
            state,
            list(rows),
            factors[0].head_dim,
            factors[0].precision,
            token_agg,
            valid,
            last,
            skip_first,
            scale,
        )
    else:
        launch(
            inputs,
            factors,
            state,
            rows,
            token_agg=token_agg,
            valid=valid,
            last=last,
            skip_first=skip_first,
            scale=scale,
            alike=alike,
        )


# The factors' tickets are written too, but each launch leaves them as it found them: declared as mutated, functionalisation
# would copy the factors.
@torch.library.custom_op("fastheads::head_stats", mutates_args=("state",))
def _operator(
    inputs: list[Tensor],
    buffers: list[Tensor],
    state: Tensor,
    rows: list[int],
    head_dim: int,
    precision: str,
    token_agg: str,
    valid: Tensor | None,
    last: Tensor | None,
    skip_first: int,
    scale: Tensor | None,
) -> None:
    x = inputs[0]
    config = config_on(x.device, head_dim, x.dtype, precision)
    heads = x.shape[-1] // head_dim
    factors = [KernelFactor(buffer, heads, head_dim, x.dtype, precision, config) for buffer in buffers]
    launch(
        inputs,
        factors,
        state,
        rows,
        token_agg=token_agg,
        valid=valid,
        last=last,
        skip_first=skip_first,
        scale=scale,
    )


@_operator.register_fake
def _(
    inputs: list[Tensor],
    buffers: list[Tensor],
    state: Tensor,
    rows: list[int],
    head_dim: int,
    precision: str,
    token_agg: str,
    valid: Tensor | None,
    last: Tensor | None,
    skip_first: int,
    scale: Tensor | None,
) -> None:
    return None
