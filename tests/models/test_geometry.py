"""How many heads there are, where what an attention says of itself is not the whole of it."""

import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens
from torch import nn
from torch.nn import functional as F

import fastheads
from fastheads import NoSitesError, find_sites

HEADS, DIM, HIDDEN = 4, 8, 32  # of queries; DIM is that of queries and keys


def linear(inputs, outputs):
    return nn.Linear(inputs, outputs, bias=False)


class NarrowAttention(nn.Module):
    """Attention whose values are `value_dim` wide: `head_dim` is that of its queries and keys."""

    head_dim = DIM

    def __init__(self, value_dim=4, kv_heads=2, gate=False, **projections):
        super().__init__()
        self.value_dim, self.kv_heads, self.gate = value_dim, kv_heads, gate
        self.q_proj = linear(HIDDEN, HEADS * DIM * (2 if gate else 1))
        self.k_proj = linear(HIDDEN, kv_heads * DIM)
        self.v_proj = linear(HIDDEN, kv_heads * value_dim)
        self.o_proj = linear(HEADS * value_dim, HIDDEN)
        for name, projection in projections.items():
            setattr(self, name, projection)

    def forward(self, hidden_states, **_):
        batch, seq, _ = hidden_states.shape
        q = self.q_proj(hidden_states)[..., : HEADS * DIM].view(batch, seq, HEADS, DIM)
        k = self.k_proj(hidden_states).view(batch, seq, self.kv_heads, DIM)
        v = self.v_proj(hidden_states).view(batch, seq, self.kv_heads, self.value_dim)
        k, v = (t.repeat_interleave(HEADS // self.kv_heads, dim=2).transpose(1, 2) for t in (k, v))
        heads = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        return self.o_proj(heads.transpose(1, 2).flatten(2)), None


def model_with(make):
    model = build(hidden_size=HIDDEN, head_dim=DIM, num_hidden_layers=2)
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.self_attn = make()
    return model


def heads_of(owner):
    """What is found of one attention module: (number of heads, width of one)."""
    (site,) = find_sites(nn.Sequential(owner))
    return site.num_heads, site.head_dim


@pytest.mark.parametrize("value_dim", [2, 4, 8, 16])
def test_values_of_another_width_than_keys(value_dim):
    model = model_with(lambda: NarrowAttention(value_dim))
    sites = find_sites(model)
    assert [(site.num_heads, site.head_dim) for site in sites] == [(HEADS, value_dim)] * 2
    with (
        torch.no_grad(),
        captured_inputs([site.module for site in sites]) as inputs,
        fastheads.HookManager(model, "all", verify=True) as hooks,
    ):
        model(input_ids=tokens(2, 6))
        results = hooks.get_results()
    heads = [type(site)(site.name, site.layer, HEADS, value_dim, site.module) for site in sites]
    assert_results(results, heads, inputs, [None], "all", 5e-6)


def test_a_llama_whose_value_projection_was_made_narrower():
    model = build(hidden_size=HIDDEN, head_dim=DIM, num_hidden_layers=2)
    for layer in model.model.layers:
        layer.self_attn.v_proj, layer.self_attn.o_proj = linear(HIDDEN, 8), linear(16, HIDDEN)
    assert [(site.num_heads, site.head_dim) for site in find_sites(model)] == [(4, 4)] * 2


def test_heads_that_are_pruned_away_everywhere():
    owner = NarrowAttention(DIM)
    owner.q_proj, owner.k_proj, owner.v_proj = linear(HIDDEN, 16), linear(HIDDEN, 8), linear(HIDDEN, 8)
    owner.o_proj = linear(16, HIDDEN)
    assert heads_of(owner) == (2, 8)


def test_only_the_weights_were_replaced():
    """What multiplies is the weight; out_features stays behind."""
    owner = NarrowAttention(DIM)
    owner.v_proj.weight = nn.Parameter(owner.v_proj.weight.detach()[:8])
    owner.o_proj = linear(16, HIDDEN)
    assert heads_of(owner) == (4, 4)


@pytest.mark.parametrize("value_dim", [4, 8])
def test_a_gate_beside_each_query(value_dim):
    owner = NarrowAttention(value_dim, gate=True)
    if value_dim == DIM:
        assert heads_of(owner) == (HEADS, DIM)
    else:  # eight heads of two, or four of four with gates
        with pytest.raises(NoSitesError, match="q_proj 64 wide, k_proj 16 wide, v_proj 8 wide"):
            heads_of(owner)


def named_children(owner, names):
    """The same module with its projections called by other names."""
    for old, new in zip(("q_proj", "k_proj", "v_proj", "o_proj"), names, strict=True):
        owner.add_module(new, owner._modules.pop(old))
    return owner


@pytest.mark.parametrize(
    ("names", "attribute"),
    [
        (("query", "key", "value", "dense"), "attention_head_size"),
        (("q", "k", "v", "o"), "key_value_proj_dim"),
        (("q_lin", "k_lin", "v_lin", "out_lin"), "head_dim"),
        (("Wq", "Wk", "Wv", "dense"), "head_dim"),
    ],
)
def test_other_names(names, attribute):
    kind = type("ToyAttention", (NarrowAttention,), {"head_dim": None, attribute: DIM})
    assert heads_of(named_children(kind(4), names)) == (4, 4)


@pytest.mark.parametrize("name", ["qkv_proj", "query_key_value", "c_attn", "Wqkv"])
@pytest.mark.parametrize("value_dim", [4, 8])
def test_fused_projections(name, value_dim):
    class ToyAttention(nn.Module):
        head_dim, num_key_value_groups = DIM, 2

        def __init__(self):
            super().__init__()
            setattr(self, name, linear(HIDDEN, 4 * 8 + 2 * (8 + value_dim)))
            self.o_proj = linear(4 * value_dim, HIDDEN)

    owner = ToyAttention()
    if value_dim == DIM:
        assert heads_of(owner) == (4, 8)
        return
    with pytest.raises(NoSitesError, match=f"16 wide.*head_dim 8.*{name} 56 wide"):
        heads_of(owner)
    owner.num_heads = 4
    assert heads_of(owner) == (4, 4)


def test_a_fused_projection_that_gives_more_than_the_three():
    class ToyAttention(nn.Module):
        head_dim, num_heads = 24, 4

        def __init__(self):
            super().__init__()
            self.qkv = linear(HIDDEN, 4 * 96)  # and a gate
            self.o_proj = linear(96, HIDDEN)

    assert heads_of(ToyAttention()) == (4, 24)


def test_latent_attention():
    class ToyMLA(nn.Module):
        qk_nope_head_dim, qk_rope_head_dim, v_head_dim = 16, 8, 12

        def __init__(self):
            super().__init__()
            self.q_b_proj, self.kv_b_proj = linear(32, 4 * 24), linear(32, 4 * (16 + 12))
            self.o_proj = linear(48, HIDDEN)

    assert heads_of(ToyMLA()) == (4, 12)
    owner = ToyMLA()
    owner.v_head_dim = 24  # says two heads, the projections four
    with pytest.raises(NoSitesError, match=r"v_head_dim 24.*q_b_proj 96 wide, kv_b_proj 112 wide"):
        heads_of(owner)
    del ToyMLA.v_head_dim
    owner = ToyMLA()
    owner.head_dim = 8  # of the rotary part
    assert heads_of(owner) == (4, 12)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(q_proj=linear(HIDDEN, 24)), "q_proj 24 wide, k_proj 16 wide, v_proj 16 wide"),
        (dict(k_proj=linear(HIDDEN, 64)), "q_proj 32 wide, k_proj 64 wide, v_proj 16 wide"),
        (dict(v_proj=linear(HIDDEN, 6)), "v_proj 6 wide"),
        (dict(o_proj=linear(24, HIDDEN)), "head_dim 8, q_proj 32 wide"),
    ],
)
def test_contradictions_are_refused_with_their_numbers(changes, says):
    with pytest.raises(NoSitesError, match=rf"^0\.o_proj: its input.*NarrowAttention.*{says}"):
        heads_of(NarrowAttention(DIM, **changes))


def test_a_width_of_values_that_the_projections_contradict():
    model = build()
    model.model.layers[1].self_attn.v_head_dim = 12
    with pytest.raises(
        NoSitesError, match=r"layers\.1\.self_attn\.o_proj: its input, 96 wide.*v_head_dim 12, head_dim 24"
    ):
        find_sites(model)


def test_queries_alone():
    def without_keys(**changes):
        owner = NarrowAttention(**changes)
        del owner.k_proj, owner.v_proj
        return owner

    assert heads_of(without_keys(value_dim=2)) == (4, 2)
    assert heads_of(without_keys(value_dim=8)) == (4, 8)
    owner = without_keys(value_dim=4)  # or two of eight, with gates
    with pytest.raises(NoSitesError, match="head_dim 8, q_proj 32 wide"):
        heads_of(owner)
    owner.num_heads = 4
    assert heads_of(owner) == (4, 4)


def test_adapters_and_quantized_projections_of_queries():
    import peft

    model = build(hidden_size=HIDDEN, head_dim=DIM, num_hidden_layers=2)
    for layer in model.model.layers:
        layer.self_attn.v_proj, layer.self_attn.o_proj = linear(HIDDEN, 8), linear(16, HIDDEN)
    config = peft.LoraConfig(
        r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, config)
    assert [(site.num_heads, site.head_dim) for site in find_sites(model)] == [(4, 4)] * 2

    class Packed(nn.Module):  # as bitsandbytes and its like: the weight's shape says nothing
        out_features = HEADS * DIM

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(512, 1, dtype=torch.uint8), requires_grad=False)

    assert heads_of(NarrowAttention(4, q_proj=Packed())) == (4, 4)


# ---------------------------------------------------------------- KV heads


@pytest.mark.parametrize("value_dim", [4, 8])
def test_kv_groups_by_the_keys(value_dim):
    model = model_with(lambda: NarrowAttention(value_dim))
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = 2
    sites = find_sites(model)
    with (
        torch.no_grad(),
        captured_inputs([site.module for site in sites]) as inputs,
        fastheads.HookManager(model, "token", kv_groups=True) as hooks,
    ):
        model(input_ids=tokens(2, 6))
        got = hooks.get_results()["kv_group_residual_contribution_norm"]["mean"]
    for row, site in enumerate(sites):
        z = inputs[row][0].view(-1, 2, 2 * value_dim)
        w = site.module.weight.detach().double().view(HIDDEN, 2, 2 * value_dim)
        want = torch.einsum("ogd,ngd->ngo", w, z).norm(dim=-1).mean(0)
        torch.testing.assert_close(got[row, :2], want, rtol=5e-6, atol=0)


@pytest.mark.parametrize(
    ("attribute", "number"),
    [("num_key_value_groups", 4), ("num_key_value_groups", 1), ("num_key_value_heads", 4)],
)
def test_kv_heads_that_the_keys_contradict(attribute, number):
    model = model_with(lambda: NarrowAttention(8))
    setattr(model.model.layers[1].self_attn, attribute, number)
    model.model.layers[0].self_attn.num_key_value_groups = 2
    with pytest.raises(
        ValueError, match=rf"layers\.1\.self_attn\.o_proj.*{attribute} {number}.*k_proj.*kv_groups=False"
    ) as error:
        fastheads.HookManager(model, kv_groups=True)
    assert isinstance(error.value, fastheads.errors.FastheadsError)
    fastheads.HookManager(model).remove()


def test_kv_heads_that_two_attributes_say_differently():
    model = model_with(lambda: NarrowAttention(8))
    for layer in model.model.layers:
        del layer.self_attn.k_proj, layer.self_attn.v_proj
        layer.self_attn.num_key_value_groups, layer.self_attn.num_key_value_heads = 2, 4
    with pytest.raises(ValueError, match="num_key_value_groups 2, num_key_value_heads 4"):
        fastheads.HookManager(model, kv_groups=True)


def test_kv_heads_that_a_fused_projection_contradicts():
    model = build("phi3")
    fastheads.HookManager(model, kv_groups=True).remove()
    for layer in model.model.layers:
        layer.self_attn.num_key_value_heads, layer.self_attn.num_key_value_groups = 4, 1
    with pytest.raises(ValueError, match="qkv_proj 128 wide"):
        fastheads.HookManager(model, kv_groups=True)
