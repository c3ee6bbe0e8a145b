"""The seed's older manager, as a baseline: it computes the attention of each layer again, in a hook, and loops over heads.

It takes the queries, keys and values from the layer's input once more, the attention weights too, and keeps a list of norms. For
models with Llama's attention. What it measures is head output norms and contribution norms at the last token or over all.
"""

from typing import Any, Self

import torch
from torch import Tensor, nn


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class RecomputingManager:
    """Attaches in the constructor to every `self_attn` of `model.model.layers`."""

    def __init__(self, model: nn.Module, token_agg: str = "last") -> None:
        self.token_agg = token_agg
        self.norms: list[Tensor] = []
        self.handles = [
            layer.self_attn.register_forward_hook(self.hook, with_kwargs=True)  # type: ignore[union-attr, operator]
            for layer in model.model.layers  # type: ignore[union-attr]
        ]

    @torch.no_grad()
    def hook(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden_states = kwargs["hidden_states"]
        cos, sin = (t.unsqueeze(1) for t in kwargs["position_embeddings"])
        shape = (*hidden_states.shape[:-1], -1, module.head_dim)
        q = module.q_proj(hidden_states).view(shape).transpose(1, 2)
        k = module.k_proj(hidden_states).view(shape).transpose(1, 2)
        v = module.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        k, v = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (k, v))
        scores = q @ k.transpose(-1, -2) * module.scaling
        causal = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        weights = scores.masked_fill(~causal, -torch.inf).softmax(-1, dtype=torch.float32).to(q.dtype)
        heads = weights @ v  # [batch, heads, seq, head_dim]
        heads = heads[:, :, -1:] if self.token_agg == "last" else heads
        head_dim = module.head_dim
        for h in range(heads.shape[1]):
            head_out = heads[:, h]
            o_proj_slice = module.o_proj.weight[:, h * head_dim : (h + 1) * head_dim]
            contribution = head_out @ o_proj_slice.T
            self.norms += [head_out.norm(dim=-1).mean(-1), contribution.norm(dim=-1).mean(-1)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()
        self.norms.clear()
