"""What the factored path allocates: nothing of the size tokens × hidden_size."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from tiny_models import build, tokens
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import fastheads
from fastheads.stats import metrics


class Storages(TorchDispatchMode):
    """How many storages of each size, in bytes, operators made while `active`."""

    def __init__(self):
        super().__init__()
        self.active, self.sizes = False, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {
            t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out) if self.active else ():
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in known:
                self.sizes[tensor.untyped_storage().nbytes()] += 1
        return out


def largest(backend, token_agg, seq, hidden):
    """Of what the hooks of one forward allocate, in the projection and at the end of the decoder's call: more than the model."""

    def storages(attach):
        model = build(hidden_size=hidden, num_hidden_layers=1, max_position_embeddings=seq)
        with Storages() as mode, torch.no_grad(), attach(model):

            def measuring(active):
                return lambda *_: setattr(mode, "active", active)

            (site,) = fastheads.find_sites(model)
            site.module.register_forward_pre_hook(measuring(True))
            site.module.register_forward_hook(measuring(False))
            model.model.norm.register_forward_hook(measuring(True))
            model.model(input_ids=tokens(4, seq), use_cache=False)
        return mode.sizes

    own = storages(lambda model: fastheads.HookManager(model, token_agg, backend=backend))
    return max(own - storages(lambda _: nullcontext()))


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_the_factored_path_does_not_grow_with_tokens_times_hidden_size(token_agg, monkeypatch):
    monkeypatch.setattr(metrics, "SCRATCH_ELEMENTS", 2**14)
    scratch = 2**14 * 4
    for seq in (128, 512):
        samples = 4 * seq * 4 * 6 * 8  # [tokens, heads, metrics] float64: no width in it
        for hidden in (64, 512):
            got = largest("factored", token_agg, seq, hidden)
            assert got <= max(scratch, samples) + 4096
    # the test can fail: the einsum makes [tokens, heads, hidden_size]
    step = max(1, 2**14 // 96) if token_agg != "last" else 4
    assert largest("einsum", token_agg, 512, 512) >= min(step, 4 * 512) * 4 * 512 * 4
