"""The norms of the residual stream, for a group of layers at once."""

from collections.abc import Sequence

import torch
from torch import Tensor


def inverse_norm(stream: Tensor) -> Tensor:
    """1/‖r‖ of each token `[B, S]`, for r `[B, S, hidden]`; infinite where r is 0. Float32, or float64 where r is."""
    dtype = torch.promote_types(stream.dtype, torch.float32)
    return torch.linalg.vector_norm(stream, dim=-1, dtype=dtype).reciprocal()


def inverse_norms(streams: Sequence[Tensor]) -> Tensor:
    """1/‖r‖ of each token `[len(streams), B, S]`, for each r `[B, S, hidden]`, or 1/‖r‖ `[B, S]` itself."""
    return torch.stack([r if r.dim() == 2 else inverse_norm(r) for r in streams])
