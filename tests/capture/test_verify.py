"""The self-check: passes where the model does what is measured, and names the site where it does not."""

from contextlib import contextmanager, nullcontext

import families
import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune
import transformers as tf
from oracle import captured_inputs
from tiny_models import acts_as, build, tokens
from transformers.modeling_utils import AttentionInterface

import fastheads
from fastheads.capture.verify import CHANGED, EXACT, UNSEEN, VerificationError
from fastheads.models.weights import dense_weight

GET_INTERFACE = getattr(AttentionInterface, "get_interface", None)
# Where torch's attention and softmax are called.
TORCH_ATTENTION = (
    (F, "scaled_dot_product_attention"),
    (F, "softmax"),
    (torch, "softmax"),
    (torch.Tensor, "softmax"),
)
OF_TORCH = [getattr(owner, name) for owner, name in TORCH_ATTENTION]
SEEN = EXACT if GET_INTERFACE else UNSEEN  # in the first releases of transformers 5 nobody can listen


def run(model, *, attached_in=None, **options):
    """The results and the findings of one batch; the hooks are attached within the context `attached_in`."""
    options = {"verify": True, **options}
    with attached_in or nullcontext():
        hooks = fastheads.HookManager(model, "all", **options)
    with hooks, torch.no_grad():
        model(input_ids=tokens(2, 6), attention_mask=torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6]))
        findings = hooks.findings
        return hooks.get_results(), findings


def nothing_is_left(model):
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert getattr(AttentionInterface, "get_interface", None) is GET_INTERFACE
    assert [getattr(owner, name) for owner, name in TORCH_ATTENTION] == OF_TORCH


@pytest.mark.parametrize(
    ("family", "implementation", "dtype"),
    [
        ("llama-bias", "eager", torch.float32),
        ("llama-bias", "sdpa", torch.float64),
        ("llama-bias", "sdpa", torch.bfloat16),
        ("llama-bias", "sdpa", torch.float16),
        ("gemma3", "eager", torch.bfloat16),
        ("gpt-oss", "eager", torch.float32),
    ],
)
def test_a_model_that_does_what_is_measured_passes(family, implementation, dtype):
    model = build(family, dtype=dtype, attn_implementation=implementation)
    results, findings = run(model)
    assert list(findings) == [site.name for site in fastheads.find_sites(model)]
    assert {finding.geometry for finding in findings.values()} == {SEEN}
    assert all(finding.error < 4 * torch.finfo(dtype).eps for finding in findings.values())
    plain, _ = run(model, verify=False)
    assert torch.equal(
        results["head_output_norm"]["mean"], plain["head_output_norm"]["mean"]
    )  # checking changes nothing
    nothing_is_left(model)


@pytest.mark.parametrize(
    ("family", "geometry"),
    [
        ("bloom", UNSEEN),
        ("gpt2", SEEN),
        ("bitnet", CHANGED),
        ("diffllama", CHANGED),
        ("qwen3_next", CHANGED),
        ("laguna", CHANGED),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_families(family, geometry):
    if family not in families.FAMILIES or (geometry == CHANGED and GET_INTERFACE is None):
        pytest.skip("not in this release")
    _, findings = run(families.build(family))
    assert {finding.geometry for finding in findings.values()} == {geometry}


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_float32_products_may_be_rounded_where_the_user_allows_it(precision, monkeypatch):
    model = build()
    projection = model.model.layers[1].self_attn.o_proj
    for factor, allowed, passes in ((1.002, False, False), (1.002, True, True), (1.1, True, False)):
        acts_as(monkeypatch, projection, lambda x, f=factor: F.linear(x, f * projection.weight))
        matmul = torch.backends.mkldnn.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = precision if allowed else "ieee"
        try:
            with nullcontext() if passes else pytest.raises(VerificationError):
                run(model)
        finally:
            matmul.fp32_precision = before


def test_autocast():
    model = build("llama-bias")
    with torch.autocast("cpu", torch.bfloat16):
        _, findings = run(model)
    assert {finding.geometry for finding in findings.values()} == {SEEN}
    assert all(1e-4 < finding.error < 1e-2 for finding in findings.values())


def test_only_the_first_batch_is_checked():
    model = build()
    projection = model.model.layers[1].self_attn.o_proj

    @contextmanager
    def doubled():
        handle = projection.register_forward_hook(lambda _m, _a, output: 2 * output, prepend=True)
        try:
            yield
        finally:
            handle.remove()

    with fastheads.HookManager(model, verify=True) as hooks, torch.no_grad():
        with hooks.paused(), doubled():
            model(input_ids=tokens(1, 4))
        assert hooks.findings == {}
        with doubled(), pytest.raises(VerificationError):  # this would be seen
            model(input_ids=tokens(1, 4))
        model(input_ids=tokens(1, 4))
        found = dict(hooks.findings)
        assert list(found) == [site.name for site in hooks.sites]
        for _ in range(2):
            with doubled():
                model(input_ids=tokens(1, 4))
            assert hooks.findings == found
            assert all(hooks.findings[name] is finding for name, finding in found.items())
            assert getattr(AttentionInterface, "get_interface", None) is GET_INTERFACE


@contextmanager
def said_to_have(attention, number):
    """A context in which the module says of itself that it has another number of heads than it runs with."""
    dims = ("head_dim", "key_value_proj_dim", "attention_head_size", "head_size")
    counts = ("num_heads", "num_attention_heads", "n_heads", "n_head")
    kv_counts = ("num_key_value_heads", "num_kv_heads")
    own = {name: vars(attention)[name] for name in (*dims, *counts, *kv_counts) if name in vars(attention)}
    for name, value in own.items():
        setattr(attention, name, value * 4 // number if name in dims else value * number // 4)
    try:
        yield
    finally:
        for name, value in own.items():
            setattr(attention, name, value)


def test_a_wrong_number_of_heads_is_named():
    if GET_INTERFACE is None:
        pytest.skip("in this release nobody can listen to the attention interface")
    model = build()
    with said_to_have(model.model.layers[1].self_attn, 8):
        hooks = fastheads.HookManager(model, verify=True)
    with hooks, torch.no_grad():
        for _ in range(2):  # and again, for a caller that goes on
            with pytest.raises(
                VerificationError, match=r"layers\.1\.self_attn\.o_proj.*4 heads of 24.*8 of 12"
            ):
                model(input_ids=tokens(1, 4))
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()
    nothing_is_left(model)


@pytest.mark.parametrize("family", ["bloom", "falcon", "gptj", "gpt_neo", "codegen", "mpt", "dbrx", "t5"])
@pytest.mark.parametrize("number", [2, 8])
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_number_of_heads_shows_without_the_interface_too(family, number):
    if family == "t5":
        config = tf.T5Config(vocab_size=101, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=4)
        model = tf.T5EncoderModel(config).eval()
    else:
        model = families.build(family)
    run(model)
    site = fastheads.find_sites(model)[1]
    attention = model.get_submodule(site.name.rpartition(".")[0])
    with pytest.raises(VerificationError, match=rf"\.1\..*4 heads.*the site has {number} of"):
        run(model, attached_in=said_to_have(attention, number))
    nothing_is_left(model)


class HiddenAttention(torch.nn.Module):
    """Values half as wide as keys, and a projection that says nothing of it: `how` computes the attention."""

    head_dim = 8

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.everything, self.o_proj = torch.nn.Linear(64, 4 * (8 + 8 + 4)), torch.nn.Linear(16, 64)

    def forward(self, hidden_states, **_):
        q, k, v = (
            t.unflatten(-1, (4, -1)).transpose(1, 2)
            for t in self.everything(hidden_states).split([32, 32, 16], dim=-1)
        )
        return self.o_proj(self.how(q, k, v).transpose(1, 2).flatten(2)), None


@pytest.mark.parametrize(
    "how",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        lambda q, k, v: F.softmax(q @ k.mT, dim=-1) @ v,
        lambda q, k, v: torch.softmax(q @ k.mT, -1) @ v,
        lambda q, k, v: (q @ k.mT).softmax(-1) @ v,
        lambda q, k, v: torch.nn.Softmax(-1)(q.flatten(0, 1) @ k.flatten(0, 1).mT).unflatten(0, (-1, 4)) @ v,
    ],
)
def test_narrow_values_that_do_not_show_when_attaching(how):
    model = build()
    model.model.layers[1].self_attn = HiddenAttention(how)
    assert fastheads.find_sites(model)[1].num_heads == 2
    with pytest.raises(VerificationError, match=r"layers\.1\..*runs with 4 heads.*the site has 2 of 8"):
        run(model)
    nothing_is_left(model)
    model.model.layers[1].self_attn.v_head_dim = 4
    run(model)


def test_heads_of_which_two_are_one_at_the_projection():
    """DiffLlama's, as its releases without the interface compute them."""

    class DiffLlamaSdpaAttention(HiddenAttention):
        v_head_dim = 4

    model = build()
    model.model.layers[1].self_attn = DiffLlamaSdpaAttention(F.scaled_dot_product_attention)
    assert fastheads.find_sites(model)[1].num_heads == 2
    run(model)


def test_what_a_layer_without_a_site_attended_to_is_none_of_the_next_ones():
    model = build()
    model.model.layers[0].self_attn = HiddenAttention(F.scaled_dot_product_attention)
    model.model.layers[1].self_attn.forward = lambda hidden_states, **_: (
        hidden_states @ torch.zeros(64, 64),
        None,
    )
    owner = model.model.layers[2].self_attn
    owner.forward = lambda hidden_states, **_: (owner.o_proj(owner.q_proj(hidden_states)), None)
    _, findings = run(model, layers=[2])
    assert [finding.geometry for finding in findings.values()] == [UNSEEN]


@pytest.mark.parametrize("change", ["weight", "bias", "transposed"])
def test_a_weight_that_is_not_the_one_that_acts_is_named(change, monkeypatch):
    model = build("llama-bias", head_dim=16)
    projection = model.model.layers[1].self_attn.o_proj
    assert projection.weight.shape == (64, 64)

    own = {
        "weight": lambda x: F.linear(x, projection.weight * 1.01, projection.bias),
        "bias": lambda x: F.linear(x, projection.weight),
        "transposed": lambda x: F.linear(x, projection.weight.T, projection.bias),
    }[change]
    acts_as(monkeypatch, projection, own)
    with pytest.raises(VerificationError, match=r"model\.layers\.1\.self_attn\.o_proj.*do not sum"):
        run(model)
    nothing_is_left(model)


def test_padding_may_hold_nan_and_hides_nothing(monkeypatch):
    model = build()
    projection = model.model.layers[0].self_attn.o_proj
    padding = torch.tensor([[1, 1, 0, 0, 0, 0], [0] * 6]).bool()[..., None]
    projection.register_forward_pre_hook(lambda _m, args: (args[0].masked_fill(padding, torch.nan),))
    projection.register_forward_hook(lambda _m, _a, out: out.nan_to_num())
    _, findings = run(model)
    assert findings["model.layers.0.self_attn.o_proj"].error < 1e-6
    acts_as(monkeypatch, projection, lambda x: F.linear(x, 2 * projection.weight))
    with pytest.raises(VerificationError, match=r"layers\.0"):
        run(model)


def test_what_users_do_to_the_output_is_theirs():
    model = build()
    model.model.layers[1].self_attn.o_proj.register_forward_hook(lambda _m, _a, out: 3 * out)
    run(model)


def test_another_model_that_runs_inside_is_not_mistaken_for_this_one():
    model, other = build(), build(num_attention_heads=8, head_dim=8)
    ids = tokens(2, 6)
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda *_: [other(input_ids=ids), None][1]
    )
    _, findings = run(model)
    assert {finding.geometry for finding in findings.values()} == {SEEN}


def test_several_managers_and_models_at_once():
    models = [build(), build("qwen3")]
    with (
        fastheads.HookManager(models[0], verify=True) as first,
        fastheads.HookManager(models[0], verify=True) as second,
        fastheads.HookManager(models[1], verify=True) as third,
        torch.no_grad(),
    ):
        for model in models:
            model(input_ids=tokens(1, 4))
        for hooks in (first, second, third):
            assert {f.geometry for f in hooks.findings.values()} == {SEEN}
    for model in models:
        nothing_is_left(model)


def test_what_a_batch_does_not_reach_is_checked_later():
    model = build()
    with fastheads.HookManager(model, verify=True, allow_skipped=True) as hooks, torch.no_grad():
        layers = model.model.layers
        model.model.layers = layers[:2]
        model(input_ids=tokens(1, 4))
        assert list(hooks.findings) == [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1)]
        hooks.get_results()
        model.model.layers = layers
        model(input_ids=tokens(1, 4))
        assert list(hooks.findings) == [f"model.layers.{layer}.self_attn.o_proj" for layer in (0, 1, 2)]


def test_compiled_code_cannot_be_checked_and_says_so():
    model = torch.compile(build(), backend="eager")
    with fastheads.HookManager(model, "all", verify=True) as hooks, torch.no_grad():
        model(input_ids=tokens(2, 6))
        with pytest.raises(RuntimeError, match=r"verify=True could not check model\.layers\.0.*compiled"):
            hooks.get_results()


def test_an_interrupt_leaves_nothing_behind():
    model = build()

    def interrupt(*_):
        raise KeyboardInterrupt

    with fastheads.HookManager(model, verify=True) as hooks, torch.no_grad():
        handle = model.model.layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(input_ids=tokens(1, 4))
        handle.remove()
        assert len(hooks.findings) == 2
    nothing_is_left(model)
    assert isinstance(model, tf.LlamaForCausalLM)


def gpt2_with_an_adapter():
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=101, bos_token_id=1, eos_token_id=2)
    model = tf.AutoModelForCausalLM.from_config(config)
    assert model.transformer.h[0].attn.c_proj.weight.shape == (32, 32)  # lying the other way, and square
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["attn.c_proj"], fan_in_fan_out=True, init_lora_weights=False)
    return peft.get_peft_model(model, lora).eval()


@pytest.mark.filterwarnings("ignore")
def test_square_weights_that_lie_the_other_way_with_an_adapter():
    model = gpt2_with_an_adapter()
    _, findings = run(model)
    assert len(findings) == 2 and all(f.error < 1e-6 and f.geometry == SEEN for f in findings.values())
    with model.disable_adapter():
        run(model)
    model.merge_adapter()
    run(model)


@pytest.mark.parametrize("family", ["gpt2", "falcon", "moshi", "bert"])
@pytest.mark.filterwarnings("ignore")
def test_kinds_of_projections(family):
    """The dense weight is `[out, in]` whatever the layer's own is."""
    for site in fastheads.find_sites(families.build(family)):
        x = torch.randn(5, site.num_heads * site.head_dim)
        torch.testing.assert_close(
            x @ dense_weight(site).T, site.module(x) - site.module(torch.zeros_like(x))
        )


@pytest.mark.filterwarnings("ignore")
def test_merged_and_then_disabled_adapters_of_a_transposed_weight():
    """PEFT takes them off the weight as the layer runs; GPT-2's weight is square, so that a wrong order would go unseen."""
    model = gpt2_with_an_adapter()
    own = [
        site.module.base_layer.weight.detach().double() for site in fastheads.find_sites(model)
    ]  # [in, out]
    model.merge_adapter()
    sites = fastheads.find_sites(model)
    with (
        torch.no_grad(),
        fastheads.HookManager(model, "token") as hooks,
        model.disable_adapter(),
        captured_inputs([s.module for s in sites]) as inputs,
    ):
        model(input_ids=tokens(2, 9))
        got = hooks.get_results()["head_residual_contribution_norm"]["mean"]
    for row, weight in enumerate(own):
        z = inputs[row][0].view(-1, 2, 16)
        norms = torch.einsum("hdo,nhd->nho", weight.view(2, 16, 32), z).norm(dim=-1)
        torch.testing.assert_close(got[row], norms.mean(0), rtol=5e-6, atol=0)


def test_a_pruned_weight_that_lies_transposed():
    model = families.build("gpt2")
    for site in fastheads.find_sites(model):
        torch.nn.utils.prune.l1_unstructured(site.module, "weight", 0.5)
    run(model)
