"""Compute the metrics in torch, from the norms of contributions that a backend gives.

Shapes: B rows (sequences), S positions, H heads, D = head_dim, N = B·S tokens, O = the projection's out_features.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor

# Re-exported.
from fastheads.stats.names import (  # noqa: F401
    KV_METRIC,
    METRICS,
    RATIO_METRIC,
    RATIO_SQUARE_METRIC,
    TOKEN_AGGS,
    UPDATE_METRIC,
)
from fastheads.stats.token_layout import (
    TokenLayout,
    last_tokens,
    mean_over_sequences,
    mean_over_tokens,
    take_last,
)

# (z [G, N, H, D]) -> contribution norms [G, N, H], for a group of G layers of one shape
ContributionNorms = Callable[[Tensor], Tensor]
# (x [G, N, H·D], contribution norms [G, N, H], present bool [N] or None) of the tokens that samples are made of
TokenReader = Callable[[Tensor, Tensor, Tensor | None], None]

# Elements that one step of a torch path may allocate: 16 MiB of float32. Because of this limit the factored path's memory does
# not grow with tokens × hidden_size.
SCRATCH_ELEMENTS = 2**22


def l2(x: Tensor) -> Tensor:
    """L2 norms over the last dimension, in float64, since squares can overflow float32 and bfloat16."""
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)


def token_norms(
    x: Tensor, num_heads: int, contribution: ContributionNorms, scale: Tensor | None = None
) -> Tensor:
    """Output and contribution norms of every token and head, float64 `[2, G, N, H]`, for `x` `[G, N, H·D]`.

    Contributions are multiplied by `scale` `[G, N]`, if given. Products are computed in float32 (float64 for a float64 model), a
    slice of tokens at a time.
    """
    groups, tokens, width = x.shape
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = torch.empty(2, groups, tokens, num_heads, dtype=torch.float64, device=x.device)
    step = max(1, SCRATCH_ELEMENTS // (groups * width))
    for start in range(0, tokens, step):
        z = rearrange(x[:, start : start + step], "g n (h d) -> g n h d", h=num_heads).to(dtype)
        out[0, :, start : start + step] = l2(z)
        out[1, :, start : start + step] = contribution(z)
    if scale is not None:
        out[1] *= scale.unsqueeze(-1)
    return out


def samples(
    x: Tensor,
    mask: Tensor | None,
    token_agg: str,
    num_heads: int,
    contribution: ContributionNorms,
    *,
    scale: Tensor | None = None,
    ratio: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    read_tokens: TokenReader | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the samples of one call of G projections with inputs `x` `[G, B, S, H·D]`.

    `mask`, bool `[B, S]`: the valid tokens. `scale` `[G, B, S]`: factors of each token's contributions. `ratio` `[G, B, S]`:
    1/‖r‖ of each token.

    Returns values, float64 `[n, 4, G, H]` in the order of METRICS, and bool `[n]`, True for those that count (None: all); n is B
    for "last" and "all", B·S for "token". With `ratio` there are two more, `[n, 6, G, H]`: the contribution norm (scaled) times
    `ratio`, and the square of that. With `cu_seqlens` `[N + 1]` of packed sequences n is N for "all"; "last" takes none.
    `read_tokens` is given the tokens with the norms of their contributions.
    """
    present: Tensor | None
    if token_agg == "last":
        last, present = take_last(x, mask)
        scale, ratio = (
            None if each is None else take_last(each.unsqueeze(-1), mask)[0].squeeze(-1)
            for each in (scale, ratio)
        )
        tokens = last
    else:
        scale, ratio = (None if each is None else each.flatten(1, 2) for each in (scale, ratio))
        tokens, present = x.flatten(1, 2), None if mask is None else mask.flatten()
    norms = token_norms(tokens, num_heads, contribution, scale)
    if read_tokens is not None:
        read_tokens(tokens, norms[1], present)
    norms = with_ratio(norms, ratio)  # [2 or 4, G, B or B·S, H]
    if token_agg == "all" and cu_seqlens is not None:
        assert mask is not None
        return packed_samples(norms, mask, cu_seqlens)
    if token_agg == "all":
        norms, present = mean_over_tokens(rearrange(norms, "k g (b s) h -> k g b s h", b=x.shape[1]), mask)
    return _with_relative(norms), present


def token_samples(values: Tensor, layout: TokenLayout, token_agg: str) -> tuple[Tensor, Tensor | None]:
    """The samples `[n, H]` of values `[B, S, H]` of every token, and bool `[n]`, True for those that count (None: all)."""
    if layout.cu_seqlens is not None and token_agg == "last":
        (values,), layout = last_tokens([values], layout)
        token_agg = "token"
    mask = layout.mask(values)
    if token_agg == "last":
        last, present = take_last(values.unsqueeze(0), mask)
        return last[0], present
    if token_agg == "token":
        return values.flatten(0, 1), None if mask is None else mask.flatten()
    if layout.cu_seqlens is not None:
        assert mask is not None
        mask, cu_seqlens = layout.packed(values)
        means, present = mean_over_sequences(values.flatten(0, 1)[None, None], mask.flatten(), cu_seqlens)
    else:
        means, present = mean_over_tokens(values[None, None], mask)
    return means[0, 0], present


def with_ratio(norms: Tensor, ratio: Tensor | None) -> Tensor:
    """Norms `[2, G, N, H]` of every token, and with `ratio` `[G, N]` two more: the second times `ratio`, and its square."""
    if ratio is None:
        return norms
    ratios = norms[1].double() * ratio.double().unsqueeze(-1)
    return torch.cat([norms.double(), torch.stack([ratios, ratios.square()])])


def packed_samples(norms: Tensor, mask: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """As `samples`, for "all" with packed sequences, from the values `[2 or 4, G, B·S, H]` of all tokens (`with_ratio`)."""
    means, present = mean_over_sequences(norms.double(), mask.flatten(), cu_seqlens)
    return _with_relative(means), present


def _with_relative(norms: Tensor) -> Tensor:
    return rearrange([*norms[:2], *relative_to_layer(norms[:2]), *norms[2:]], "k g n h -> n k g h")


def relative_to_layer(norms: Tensor, mean: Tensor | None = None) -> Tensor:
    """Divide samples `[..., H]` by their mean over the layer's heads; per sample, since running means cannot reproduce that.

    `mean` `[..., 1]` is that mean, if the layer has more heads than these. An infinite mean gives NaN, not 0, since the ratio is
    then unknown.
    """
    mean = norms.mean(dim=-1, keepdim=True) if mean is None else mean
    return norms / mean.masked_fill(mean.isinf(), torch.nan)
