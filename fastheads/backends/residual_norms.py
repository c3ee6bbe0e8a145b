"""The norms of the residual stream, for a group of layers at once."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from fastheads.backends.registry import TRITON
from fastheads.backends.triton import kernels


@cache
def _serves(device: torch.device, dtype: torch.dtype) -> bool:
    """True if the kernel serves such streams."""
    return (
        device.type == "cuda" and TRITON.missing() is None and TRITON.unsupported(device, dtype, 16) is None
    )


def inverse_norm(residual: Tensor) -> Tensor:
    """1/‖r‖ of each token `[B, S]`, for r `[B, S, hidden]`; infinite where r is 0. Float32, or float64 where r is."""
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return torch.linalg.vector_norm(residual, dim=-1, dtype=dtype).reciprocal()


def inverse_norms(residuals: Sequence[Tensor]) -> Tensor:
    """1/‖r‖ of each token `[len(streams), B, S]`, for each r `[B, S, hidden]`, or 1/‖r‖ `[B, S]` itself: on a GPU one launch."""
    first = residuals[0]
    is_one_form = first.dim() == 3 and len({(r.shape, r.dtype) for r in residuals}) == 1
    if is_one_form and _serves(first.device, first.dtype):
        norms: Tensor = kernels().inverse_norms(residuals)
        return norms
    return torch.stack([r if r.dim() == 2 else inverse_norm(r) for r in residuals])
