"""Which modules are found, and what is said where there are none."""

import pytest
import torch
import transformers as tf
from tiny_models import FAMILIES, build, tokens

import fastheads
from fastheads import NoSitesError, find_sites


@pytest.mark.parametrize("family", FAMILIES)
def test_geometry_is_the_attention_interfaces_own(family, monkeypatch):
    """The interface returns [batch, seq, num_heads, head_dim]: that is the truth about the heads."""
    model = build(family, attn_implementation="eager")
    seen = {}
    module = __import__(type(model).__module__, fromlist=["eager_attention_forward"])
    eager = module.eager_attention_forward

    def spy(owner, *args, **kwargs):
        output = eager(owner, *args, **kwargs)
        seen[owner.layer_idx] = tuple(output[0].shape)
        return output

    monkeypatch.setattr(module, "eager_attention_forward", spy)
    with torch.no_grad():
        model(input_ids=tokens(2, 5))
    sites = find_sites(model)
    assert [s.layer for s in sites] == [0, 1, 2]
    for site in sites:
        assert seen[site.layer] == (2, 5, site.num_heads, site.head_dim)
        assert model.get_submodule(site.name) is site.module


def test_sites_of_a_base_model_and_through_wrappers():
    model = build()
    names = [s.name for s in find_sites(model)]
    assert names[0] == "model.layers.0.self_attn.o_proj"
    assert find_sites(model.model)[0].name == "layers.0.self_attn.o_proj"
    with fastheads.HookManager(torch.nn.DataParallel(model)) as hooks:
        assert [s.name for s in hooks.sites] == names


def test_linear_attention_with_an_o_proj_is_left_out():
    class ToyGatedDeltaNet(torch.nn.Module):
        head_dim = 8

        def __init__(self):
            super().__init__()
            self.o_proj = torch.nn.Linear(32, 32)

    class ToyLinearAttention(ToyGatedDeltaNet):
        pass

    model = build()
    model.model.layers[1].self_attn = ToyLinearAttention()
    assert [s.layer for s in find_sites(model)] == [0, 2]
    model.model.layers[1].self_attn = ToyGatedDeltaNet()
    assert [s.layer for s in find_sites(model)] == [0, 2]


def test_a_model_without_sites_says_what_was_looked_for_and_found():
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50)
    model = tf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(NoSitesError, match=r"GPT2LMHeadModel.*GPT2Model.*o_proj.*GPT2Attention"):
        fastheads.HookManager(model)
    with pytest.raises(NoSitesError, match="attention classes found: none"):
        find_sites(torch.nn.Linear(2, 2))


def test_an_attention_whose_heads_are_unknown_is_refused():
    class ToyAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj = torch.nn.Linear(30, 30)
            self.head_dim = 8

    with pytest.raises(NoSitesError, match=r"0\.o_proj.*ToyAttention.*30"):
        find_sites(torch.nn.Sequential(ToyAttention()))
