"""KV groups that really see a window, against dense attention in float64 that is put into the model."""

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastheads.errors import ForwardError, OptionError
from fastheads.intervene.streaming import Streamer, streaming
from tests.support.dense_attention import attend, in_place_of_own, masks, places
from tests.support.tiny_models import build, tokens

SINK, WINDOW = 2, 7
GROUPS = [(0, 1), (2, 0), (2, 1)]


def by_oracle(model, ids, groups=GROUPS, **kwargs):
    """The logits of the model with dense float64 attention, in which the heads of `groups` see a window."""
    where = places(ids.shape, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    full, near = masks(where, SINK, WINDOW)

    def attention(module, query, key, value, mask, scaling, softcap=None, s_aux=None, **_):
        size = query.shape[1] // key.shape[1]
        streams = [(module.layer_idx, head // size) in groups for head in range(query.shape[1])]
        seen = torch.where(torch.tensor(streams)[:, None, None], near, full)
        return attend(query, key, value, seen, scaling, softcap, s_aux)[0].to(value.dtype), None

    with in_place_of_own(model, attention):
        return model(ids, use_cache=False, **kwargs).logits


def layout(name, batch=2, seq=40):
    mask = torch.ones(batch, seq, dtype=torch.long)
    if name == "left":
        mask[0, :11] = 0
        return {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    if name == "right":
        mask[1, -13:] = 0
        return {"attention_mask": mask}
    if name == "packed":
        positions = torch.cat([torch.arange(n) for n in (25, 15)]).expand(batch, -1)
        return {"position_ids": positions}
    return {}


@pytest.mark.parametrize("padding", ["none", "left", "right", "packed"])
@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", dict(attn_implementation="sdpa")),
        ("llama", dict(attn_implementation="eager", num_key_value_heads=4)),
        ("qwen3", {}),
        ("gemma2", dict(layer_types=["full_attention"] * 3)),
        ("gpt-oss", dict(layer_types=["full_attention"] * 3)),
        ("granite", {}),
    ],
)
def test_chosen_groups_see_a_window(family, changes, padding):
    model, ids, kwargs = build(family, **changes), tokens(2, 40), layout(padding)
    if family == "gpt-oss" and padding == "packed":
        # transformers lets its packed sequences see each other: that is no attention within sequences
        with (
            torch.no_grad(),
            streaming(model, GROUPS, sink=SINK, window=WINDOW),
            pytest.raises(ForwardError, match="computes something else"),
        ):
            model(ids, use_cache=False, **kwargs)
        return
    with torch.no_grad():
        if family == "gpt-oss":
            for layer in model.model.layers:
                layer.self_attn.sinks.copy_(torch.linspace(-1, 1, 4))
        plain = model(ids, use_cache=False, **kwargs).logits
        want = by_oracle(model, ids, **kwargs)
        with streaming(model, GROUPS, sink=SINK, window=WINDOW) as context:
            got = model(ids, use_cache=False, **kwargs).logits
        assert torch.equal(model(ids, use_cache=False, **kwargs).logits, plain)
    real = kwargs.get("attention_mask", torch.ones_like(ids)).bool()
    assert context.kv_groups == GROUPS
    assert torch.allclose(got[real], want[real], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(got[real], plain[real], atol=1e-4)


@pytest.mark.slow  # it compiles
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, at flex attention
def test_flex_attention():
    model, ids, kwargs = build("qwen3", attn_implementation="flex_attention"), tokens(2, 40), layout("left")
    with torch.no_grad():
        with streaming(model, GROUPS, sink=SINK, window=WINDOW):
            got = model(ids, use_cache=False, **kwargs).logits
        want = by_oracle(model, ids, **kwargs)
    real = kwargs["attention_mask"].bool()
    assert torch.allclose(got[real], want[real], atol=1e-5, rtol=1e-4)


def test_multi_query_attention():
    model, ids = build("llama", num_key_value_heads=1), tokens(2, 40)
    with torch.no_grad():
        want = by_oracle(model, ids, [(1, 0)])
        with streaming(model, [(1, 0)], sink=SINK, window=WINDOW):
            got = model(ids).logits
    assert torch.allclose(got, want, atol=1e-5)


def test_a_window_as_long_as_the_sequence_changes_no_bit():
    model, ids = build("llama"), tokens(2, 40)
    with torch.no_grad():
        want = model(ids).logits
        for sink, window in ((0, 40), (4, 36), (50, 1)):
            with streaming(model, GROUPS, sink=sink, window=window):
                assert torch.equal(model(ids).logits, want)


def test_nothing_is_left_behind():
    model, ids = build("llama"), tokens(1, 20)
    classes = [type(module) for module in model.modules()]
    context = Streamer(model).streaming(GROUPS, sink=SINK, window=WINDOW)
    for _ in range(2):
        with pytest.raises(KeyError), context:
            model(ids)
            raise KeyError
    assert [type(module) for module in model.modules()] == classes
    assert not model.model._forward_hooks
    assert not model.model._forward_pre_hooks
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_gradients_flow():
    model, ids = build("llama"), tokens(1, 30)
    with streaming(model, GROUPS, sink=SINK, window=WINDOW):
        model(ids, labels=ids).loss.backward()
    assert model.model.layers[2].self_attn.q_proj.weight.grad.norm() > 0


@pytest.mark.parametrize(
    "groups, text",
    [
        ([(7, 0)], "no layer 7 with attention heads: there are 0 to 2"),
        ([(0, 2)], "no KV group 2 in layer 0, which has the groups 0 to 1"),
        ([(0, True)], "pairs"),
        ("01", "pairs"),
        ([3], "not 3"),
    ],
)
def test_wrong_groups_are_named(groups, text):
    with pytest.raises(OptionError, match=text):
        streaming(build("llama"), groups, sink=4, window=8)


@pytest.mark.parametrize(
    "sink, window, text", [(-1, 8, "sink"), (4, 0, "window"), (4, 2.5, "window"), (True, 1, "sink")]
)
def test_wrong_windows_are_named(sink, window, text):
    with pytest.raises(OptionError, match=f"{text} must be a whole number"):
        streaming(build("llama"), GROUPS, sink=sink, window=window)


def test_layers_that_cannot_be_streamed_are_named():
    with pytest.raises(
        OptionError, match="layer 0 cannot be streamed: its layer is one of sliding_attention"
    ):
        streaming(build("gemma2"), [(0, 0)], sink=4, window=8)


def test_decode_steps_are_refused():
    model = build("llama")
    with (
        streaming(model, GROUPS, sink=SINK, window=WINDOW),
        pytest.raises(ForwardError, match=r"a cache must be empty \(use_cache=False\)"),
    ):
        model.generate(tokens(1, 12), max_new_tokens=3)


def test_attention_that_is_something_else_is_refused():
    def sharper(module, query, key, value, mask, scaling, **kwargs):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=2 * scaling, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sharper"] = sharper
    try:
        model = build("llama", attn_implementation="sharper")
        with (
            torch.no_grad(),
            streaming(model, [(1, 0)], sink=SINK, window=WINDOW),
            pytest.raises(ForwardError, match="layer 1 .* computes something else"),
        ):
            model(tokens(1, 20))
    finally:
        del ALL_ATTENTION_FUNCTIONS["sharper"]


@pytest.mark.slow
def test_code_that_was_compiled_before_is_not_wrong_silently():
    model, ids = build("llama", num_hidden_layers=1), tokens(1, 20)
    compiled = torch.compile(model.model, backend="eager")
    with torch.no_grad():
        plain = compiled(ids).last_hidden_state
        with streaming(model, [(0, 0)], sink=SINK, window=WINDOW):
            want = model.model(ids).last_hidden_state
            try:
                got = compiled(ids).last_hidden_state
            except Exception as error:  # Dynamo wraps it in one of its own
                assert "compile" in str(error)
            else:
                assert torch.allclose(got, want, atol=1e-5)
        assert torch.allclose(compiled(ids).last_hidden_state, plain, atol=1e-6)
