"""The metrics, and the torch paths that compute them: loop, einsum and factored.

Shapes: B rows (sequences), S positions, H heads, D = head_dim, N = B·S tokens, O = the projection's out_features.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

from fastheads.tokens import RealTokens, mean_over_tokens, take_last

METRICS = (
    "head_output_norm",
    "head_residual_contribution_norm",
    "relative_head_output_norm",
    "relative_head_residual_contribution_norm",
)
TOKEN_AGGS = ("last", "all", "token")

# (z [N, H, D]) -> contribution norms [N, H]
ContributionNorms = Callable[[Tensor], Tensor]

# What one step of a torch path may hold beside its input, in elements: 16 MiB of float32. It is the reason
# why the factored path's memory does not grow with tokens × hidden_size.
SCRATCH_ELEMENTS = 2**22


def l2(x: Tensor) -> Tensor:
    """L2 norms over the last dimension in float64: the squares of float32 and bfloat16 leave those types' range."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)


def loop_norms(weight: Tensor, num_heads: int) -> ContributionNorms:
    """The seed's algorithm: a product with each head's slice of `weight` `[O, H·D]`, in turn."""

    def norms(z: Tensor) -> Tensor:
        head_dim = z.shape[-1]
        per_head = []
        for h in range(num_heads):
            o_proj_slice = weight[:, h * head_dim : (h + 1) * head_dim].to(z.dtype)  # [O, D]
            per_head.append(l2(z[:, h] @ o_proj_slice.T))
        return torch.stack(per_head, dim=-1)

    return norms


def einsum_norms(weight: Tensor, num_heads: int) -> ContributionNorms:
    """One batched product with `weight` viewed `[O, H, D]`: fast to read, but it makes `[N, H, O]`."""
    w = rearrange(weight, "o (h d) -> o h d", h=num_heads)

    def norms(z: Tensor) -> Tensor:
        return l2(torch.einsum("n h d, o h d -> n h o", z, w.to(z.dtype)))

    return norms


def factored_norms(factor: Tensor) -> ContributionNorms:
    """‖W_h z‖ = ‖z L_h‖ with `factor` `[H, D, D]`, W_hᵀW_h = L_h L_hᵀ: hidden_size/head_dim times fewer operations."""

    def norms(z: Tensor) -> Tensor:
        y = torch.bmm(rearrange(z, "n h d -> h n d"), factor.to(z.dtype))
        return rearrange(l2(y), "h n -> n h")

    return norms


def token_norms(x: Tensor, num_heads: int, contribution: ContributionNorms) -> Tensor:
    """Both norms of every token and head, float64 `[2, N, H]`, for `x` `[N, H·D]`.

    Products are taken in float32 (float64 for a float64 model), a slice of tokens at a time.
    """
    tokens, width = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(2, tokens, num_heads, dtype=torch.float64, device=x.device)
    step = max(1, SCRATCH_ELEMENTS // width)
    for start in range(0, tokens, step):
        z = rearrange(x[start : start + step], "n (h d) -> n h d", h=num_heads).to(dtype)
        out[0, start : start + step] = l2(z)
        out[1, start : start + step] = contribution(z)
    return out


def samples(
    x: Tensor, real: RealTokens, token_agg: str, num_heads: int, contribution: ContributionNorms
) -> tuple[Tensor, Tensor | None]:
    """The samples of one firing of a projection with input `x` `[B, S, H·D]`.

    Returns values, float64 `[n, 4, H]` in the order of METRICS, and which of the n count, bool `[n]` (None: all); n is B for
    "last" and "all", B·S for "token".
    """
    mask = real.mask(x)
    present: Tensor | None
    if token_agg == "last":
        last, present = take_last(x, mask)
        norms = token_norms(last, num_heads, contribution)  # [2, B, H]
    else:
        norms = token_norms(x.reshape(-1, x.shape[-1]), num_heads, contribution)  # [2, B·S, H]
        present = None if mask is None else mask.flatten()
    if token_agg == "all":
        norms, present = mean_over_tokens(rearrange(norms, "k (b s) h -> k b s h", b=x.shape[0]), mask)
    return rearrange([*norms, *relative_to_layer(norms)], "k n h -> n k h"), present


def relative_to_layer(norms: Tensor) -> Tensor:
    """Samples `[..., H]` divided by their mean over the layer's heads, sample by sample: a running mean could not give it back.

    A sample of a layer whose mean is infinite is NaN, not 0: nothing was measured there.
    """
    mean = norms.mean(dim=-1, keepdim=True)
    return norms / mean.masked_fill(mean.isinf(), torch.nan)
