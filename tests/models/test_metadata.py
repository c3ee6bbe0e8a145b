"""The metadata of a profile: the KV heads of each site."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fastheads import HookManager
from fastheads.basic import HookManager as BasicHookManager
from fastheads.results.kv_groups import kv_heads

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}


@pytest.mark.parametrize("manager", [HookManager, BasicHookManager])
def test_the_kv_heads_of_each_site_are_told(manager):
    config = LlamaConfig(num_attention_heads=8, num_key_value_heads=2, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    with manager(model) as hooks:
        model(torch.tensor([[3, 4, 5]]))
        profile = hooks.to_profile()
    assert profile.metadata["kv_heads"] == kv_heads(profile) == [2, 2]


def test_where_an_attention_does_not_tell_they_are_unknown():
    model = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_head=4, n_layer=1, vocab_size=50))
    with HookManager(model) as hooks:
        profile = hooks.to_profile()
    assert profile.metadata["kv_heads"] == kv_heads(profile) == [None]
