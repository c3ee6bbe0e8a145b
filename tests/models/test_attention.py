"""Attention functions are seen, and what cannot be seen is named."""

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import eager_attention_forward

from fastheads.errors import ForwardError
from fastheads.models.attention import cannot_stream, tap_attention
from fastheads.models.sites import attention_of, find_sites
from tests.support.tiny_models import build, tokens


def attentions(model):
    return [attention_of(model, site) for site in find_sites(model)]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_tap_sees_each_call_and_changes_nothing(implementation):
    model, other = (build("llama", attn_implementation=implementation) for _ in range(2))
    ids, calls = tokens(2, 9), []
    with torch.no_grad():
        want = model(ids).logits
        handle = tap_attention(dict.fromkeys(attentions(model), lambda *call: calls.append(call)))
        assert torch.equal(model(ids).logits, want)
        other(ids)
        handle.remove()
        handle.remove()
        assert torch.equal(model(ids).logits, want)
    assert [call.module.layer_idx for call, _ in calls] == [0, 1, 2]
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)
    call, output = calls[0]
    assert call.query.shape == (2, 4, 9, 24)
    assert call.key.shape == call.value.shape == (2, 2, 9, 24)
    assert call.scaling == 24**-0.5
    # The function that the output comes from is given what the tap sees.
    causal = torch.full((9, 9), -torch.inf).triu(1)[None, None]
    again, _ = eager_attention_forward(
        call.module, call.query, call.key, call.value, causal, scaling=call.scaling
    )
    assert torch.allclose(output, again, atol=1e-6)


def test_what_a_tap_returns_goes_to_the_model():
    model, ids = build("llama"), tokens(1, 5)
    inputs = []
    site = find_sites(model)[1]
    site.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    handle = tap_attention({attention_of(model, site): lambda call, output: torch.full_like(output, 3.0)})
    with torch.no_grad():
        model(ids)
    handle.remove()
    assert torch.equal(inputs[0], torch.full_like(inputs[0], 3.0))


def test_several_taps_on_one_module():
    model, ids, seen = build("llama"), tokens(1, 5), []
    module = attentions(model)[0]
    first = tap_attention({module: lambda *_: seen.append("first")})
    second = tap_attention({module: lambda *_: seen.append("second")})
    with torch.no_grad():
        model(ids)
        first.remove()
        model(ids)
    second.remove()
    assert seen == ["first", "second", "second"]
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_softcap_and_learned_sinks_are_seen():
    for family, name in (("gemma2", "softcap"), ("gpt-oss", "sinks")):
        model, calls = build(family, layer_types=["full_attention"] * 3), []
        handle = tap_attention({attentions(model)[0]: lambda call, output, to=calls: to.append(call)})
        with torch.no_grad():
            model(tokens(1, 5))
        handle.remove()
        assert getattr(calls[0], name) is not None


def refused(model, **kwargs):
    handle = tap_attention(dict.fromkeys(attentions(model), lambda *_: None))
    try:
        with torch.no_grad(), pytest.raises(ForwardError) as caught:
            model(tokens(1, 9), **kwargs)
    finally:
        handle.remove()
    return str(caught.value)


def test_dropout_is_refused():
    assert "model.eval()" in refused(build("llama", attention_dropout=0.1).train())


def test_windows_are_refused_where_the_call_has_them():
    assert "sliding_window 4" in refused(build("mistral", sliding_window=4))


def test_attention_to_all_tokens_is_refused():
    model = build("llama")
    attentions(model)[1].is_causal = False
    assert "of layer 1 (LlamaAttention) is not causal" in refused(model)


def test_a_filled_cache_is_refused():
    model = build("llama")
    with torch.no_grad():
        cache = model(tokens(1, 4)).past_key_values
    assert "13 keys for 9 tokens" in refused(model, past_key_values=cache)


def test_arguments_of_unknown_meaning_are_refused():
    assert "relative_bias" in refused(build("llama"), relative_bias=torch.zeros(1))


def test_compiled_code_is_refused():
    model = build("llama", num_hidden_layers=1)
    handle = tap_attention(dict.fromkeys(attentions(model), lambda *_: None))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    try:
        with torch.no_grad(), pytest.raises(Exception, match="without torch.compile|torch._dynamo|observed"):
            compiled(tokens(1, 5))
    finally:
        handle.remove()


@pytest.mark.parametrize(
    "family, reason",
    [
        ("llama", None),
        ("gpt-oss", "sliding_attention"),
        ("mistral", None),
        ("gemma2", "sliding_attention"),
    ],
)
def test_layers_with_a_window_are_named(family, reason):
    found = cannot_stream(attentions(build(family))[0])
    assert found is None if reason is None else reason in found


def test_windows_without_types_of_layers_are_named():
    module = attentions(build("mistral", sliding_window=32))[0]
    assert "sliding_window is 32" in cannot_stream(module)


def test_attention_outside_the_interface_is_named():
    class OwnAttention(nn.Module):
        def forward(self, x):
            return x

    assert "does not use transformers' attention interface" in cannot_stream(OwnAttention())
    module = attentions(build("llama"))[0]
    module.forward = lambda *_: None
    assert "was replaced" in cannot_stream(module)


def test_a_family_with_attention_of_its_own_is_named():
    import transformers as tf

    bloom = tf.BloomForCausalLM(tf.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)).eval()
    assert "BloomAttention does not use" in cannot_stream(attentions(bloom)[0])
