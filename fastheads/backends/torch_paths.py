"""The backends in plain torch: "loop", "einsum" and "factored". They serve every device, dtype and head_dim."""

import torch
from torch import Tensor

from fastheads.backends.protocol import NormsNeeds
from fastheads.stats.metrics import l2


class TorchPath:
    """Base of the torch backends, which serve every device, dtype and head_dim."""

    def missing(self) -> str | None:
        """None."""
        return None

    def unsupported(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
        """None."""
        return None


class Loop(TorchPath):
    """The plain algorithm: for each layer and head, multiply by the head's slice of the weight."""

    name = "loop"
    needs: NormsNeeds = "weight"

    def contribution_norms(self, x: Tensor, weights: Tensor) -> Tensor:
        """‖W_h z‖ `[G, N, heads]` with `weights` `[G, O, heads, head_dim]`."""
        z = split_heads(x, weights.shape[2])
        out = z.new_empty(z.shape[:-1], dtype=torch.float64)
        for g, weight in enumerate(weights):
            for h in range(z.shape[2]):
                out[g, :, h] = l2(z[g, :, h] @ weight[:, h].to(z.dtype).T)
        return out


class Einsum(TorchPath):
    """One einsum per layer: easy to read, but it allocates `[N, heads, O]`."""

    name = "einsum"
    needs: NormsNeeds = "weight"

    def contribution_norms(self, x: Tensor, weights: Tensor) -> Tensor:
        """‖W_h z‖ `[G, N, heads]` with `weights` `[G, O, heads, head_dim]`."""
        z = split_heads(x, weights.shape[2])
        return l2(torch.einsum("g n h d, g o h d -> g n h o", z, weights.to(z.dtype)))


class Factored(TorchPath):
    """‖W_h z‖ = ‖z L_h‖, W_hᵀW_h = L_h L_hᵀ: hidden_size/head_dim times fewer operations, a group of layers at once."""

    name = "factored"
    needs: NormsNeeds = "factor"

    def contribution_norms(self, x: Tensor, weights: Tensor) -> Tensor:
        """‖W_h z‖ `[G, N, heads]` with the factors L `[G, heads, head_dim, head_dim]`."""
        groups, heads = weights.shape[:2]
        z = split_heads(x, heads).transpose(1, 2).flatten(0, 1)  # [G * heads, N, head_dim]
        y = torch.bmm(z, weights.to(z.dtype).flatten(0, 1))
        return l2(y).unflatten(0, (groups, heads)).mT


def split_heads(x: Tensor, heads: int) -> Tensor:
    """`x` `[G, N, heads * head_dim]` viewed `[G, N, heads, head_dim]`."""
    return x.unflatten(-1, (heads, -1))
