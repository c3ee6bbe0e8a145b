"""Dense attention in float64, with heads that see only the first tokens and the last ones: the oracle of streaming attention."""

from contextlib import contextmanager

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def places(shape, attention_mask=None, position_ids=None):
    """(sequence, position) of each token, [B, S] each; padding has sequence -1."""
    valid = torch.ones(shape, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    starts = torch.zeros(shape, dtype=torch.long)
    if position_ids is not None and attention_mask is None:
        starts[:, 1:] = (position_ids.diff(dim=1) != 1).long()
    sequence = torch.where(valid, starts.cumsum(1), -1)
    position = torch.zeros(shape, dtype=torch.long)
    for row in range(shape[0]):
        for name in sequence[row].unique():
            of = sequence[row] == name
            position[row, of] = torch.arange(int(of.sum()))
    return sequence, position


def attend(query, key, value, seen, scaling, softcap=None, s_aux=None):
    """Attention [B, S, H, Dv] and its probabilities [B, H, S, S]; `seen` bool [B, H or 1, S, S]."""
    size = query.shape[1] // key.shape[1]
    q = query.double()
    k, v = (x.double().repeat_interleave(size, dim=1) for x in (key, value))
    scores = q @ k.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~(seen | torch.eye(scores.shape[-1], dtype=torch.bool)), -torch.inf)
    if s_aux is not None:
        sinks = s_aux.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        share = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        share = scores.softmax(dim=-1)
    return (share @ v).transpose(1, 2), share


def masks(where, sink, window):
    """What a query sees, and what it sees with a window: bool [B, 1, S, S]."""
    sequence, position = where
    token = torch.arange(sequence.shape[1])
    causal = (token[:, None] >= token) & (sequence[:, :, None] == sequence[:, None])
    near = (position[:, None] < sink) | (position[:, :, None] - position[:, None] < window)
    return causal[:, None], (causal & near)[:, None]


@contextmanager
def in_place_of_own(model, function):
    """Let the model's layers call `function(module, query, key, value, mask, **kwargs)` as their attention function."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = {id(config): config._attn_implementation for config in configs}
    ALL_ATTENTION_FUNCTIONS["oracle"] = function
    try:
        for config in configs:
            config._attn_implementation_internal = "oracle"
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["oracle"]
        for config in configs:
            config._attn_implementation_internal = before[id(config)]
