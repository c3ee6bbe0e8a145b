"""The tokens that a projection sees are those of the decoder's call, or the forward is refused."""

import functools

import pytest
import torch
import transformers as tf
from oracle import assert_results, captured_inputs, dense_norms, statistics
from tiny_models import build, tokens
from torch import nn

import fastheads
from fastheads.errors import ForwardError, TokensError

RTOL = 2e-5
IDS = tokens(2, 6)
MASK = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])


def counted(hooks):
    return hooks.to_profile().moments["head_output_norm"].count.amax(dim=1).tolist()


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("length", [5, 2])  # 2: as many tokens as rows
def test_a_decoder_whose_attention_is_sequence_first(token_agg, length):
    config = tf.FSMTConfig(
        **dict(
            langs=["en", "de"], src_vocab_size=101, tgt_vocab_size=101, d_model=32, max_position_embeddings=64
        ),
        **dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
        **dict(encoder_ffn_dim=32, decoder_ffn_dim=32),
    )
    torch.manual_seed(0)
    model = tf.FSMTForConditionalGeneration(config).eval()
    call = dict(input_ids=IDS, decoder_input_ids=IDS[:, :length])
    with fastheads.HookManager(model, token_agg) as hooks, torch.no_grad():
        model(**call)
        results = hooks.get_results()
    sites = fastheads.find_sites(model)
    with captured_inputs([site.module for site in sites]) as inputs, torch.no_grad():
        model(**call)
    assert all(x.shape == (length, 2, 32) for firings in inputs for x in firings)
    inputs = [[x.transpose(0, 1) for x in firings] for firings in inputs]
    assert_results(results, sites, inputs, [None], token_agg, RTOL)


@pytest.mark.parametrize("length", [8, 6])
def test_a_model_that_pads_to_its_window_is_refused_where_it_pads(length):
    config = tf.LongformerConfig(
        **dict(
            vocab_size=101, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32
        ),
        **dict(attention_window=4, max_position_embeddings=64, pad_token_id=1),
    )
    torch.manual_seed(0)
    model = tf.LongformerModel(config).eval()
    ids = tokens(2, length)
    with fastheads.HookManager(model) as hooks, torch.no_grad():
        if length == 6:
            with pytest.raises(
                ForwardError, match=r"over \[2, 8\] tokens and the decoder's call over \[2, 6\]"
            ):
                model(ids)
            assert counted(hooks) == [0, 0]
        else:
            model(ids)
            assert counted(hooks) == [2, 2]


class OddAttention(nn.Module):
    """Hands its projection something else than [batch, seq, width]."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.num_heads, self.head_dim = layout, 4, 8
        self.v_proj, self.o_proj = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, hidden):
        z = self.v_proj(hidden)
        if self.layout == "transposed":
            return self.o_proj(z.transpose(0, 1)).transpose(0, 1)
        if self.layout == "every other":
            return self.o_proj(z[:, ::2]).repeat_interleave(2, dim=1)[:, : z.shape[1]]
        if self.layout == "halves of the sequence":
            return torch.cat([self.o_proj(part) for part in z.chunk(2, dim=1)], dim=1)
        if self.layout == "halves of the batch":
            return torch.cat([self.o_proj(part) for part in z.chunk(2, dim=0)], dim=0)
        if self.layout == "longer":
            return self.o_proj(nn.functional.pad(z, (0, 0, 0, 2)))[:, : z.shape[1]]
        return self.o_proj(z)


class OddModel(nn.Module):
    def __init__(self, *layouts):
        super().__init__()
        self.embed = nn.Embedding(101, 32)
        self.layers = nn.ModuleList([OddAttention(layout) for layout in layouts])

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden


ODD = ["transposed", "every other", "halves of the sequence", "halves of the batch", "longer"]


@pytest.mark.parametrize("mask", [None, MASK], ids=["no mask", "mask"])
@pytest.mark.parametrize("group_bytes", [0, 2**26])
@pytest.mark.parametrize("layout", ODD)
def test_inputs_over_other_tokens_than_the_calls_are_refused(layout, group_bytes, mask):
    torch.manual_seed(0)
    model = OddModel("plain", layout).eval()
    with fastheads.HookManager(model, "all", group_bytes=group_bytes) as hooks, torch.no_grad():
        with pytest.raises(
            ForwardError, match=r"layers\.1.*over .* tokens and the decoder's call over \[2, 6\]"
        ) as error:
            model(IDS, attention_mask=mask)
        assert "group_bytes" not in str(error.value)
        assert counted(hooks) == [0, 0]


@pytest.mark.parametrize("compiled", [False, True])
def test_as_many_rows_as_tokens_do_not_hide_a_layout(compiled):
    """Only a batch that is no square shows which dimension is which; a module of transformers needs no proof."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    square, oblong = tokens(4, 4), tokens(4, 6)
    for layout in ("plain", "transposed"):
        model = OddModel(layout).eval()
        run = torch.compile(model, backend="eager") if compiled else model
        with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
            with pytest.raises(Exception, match="rows and tokens cannot be told apart"):
                run(square)
            if layout == "plain":
                run(oblong)
                run(square)
                assert counted(hooks) == [8]
            else:
                with pytest.raises(Exception, match="decoder's call"):
                    run(oblong)
                with pytest.raises(Exception, match="rows and tokens cannot be told apart"):
                    run(square)
                assert counted(hooks) == [0]
    llama = build()
    with fastheads.HookManager(llama, "all") as hooks, torch.no_grad():
        llama(square)
        assert counted(hooks) == [4] * 3
    torch._dynamo.reset()


def test_a_compiled_layout_is_refused_too():
    torch._dynamo.reset()
    model = OddModel("plain", "every other").eval()
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        with pytest.raises(Exception, match="decoder's call"):
            torch.compile(model, backend="eager", fullgraph=True)(IDS)
        assert counted(hooks) == [0, 0]
    torch._dynamo.reset()


# ---------------------------------------------------------------- arguments without names


def wrapped(model, how):
    """The decoder's forward replaced in one of the ways that people have."""
    forward = model.model.forward

    def anything(*args, **kwargs):
        return forward(*args, **kwargs)

    if how == "partial":
        model.model.forward = functools.partial(anything)
    elif how == "wraps":
        model.model.forward = functools.wraps(forward)(anything)
    else:
        model.model.forward = anything


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["function", "partial", "wraps"])
def test_a_positional_mask_without_a_name_is_refused_and_one_with_a_name_is_read(how, when):
    model = build()
    if when == "before":
        wrapped(model, how)
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        if when == "after":
            wrapped(model, how)
        if how == "wraps":
            model.model(IDS, MASK)
        else:
            with pytest.raises(TokensError, match="by keyword"):
                model.model(IDS, MASK)
            assert counted(hooks) == [0] * 3
            model.model(input_ids=IDS, attention_mask=MASK)
        results = hooks.get_results()
    sites = fastheads.find_sites(model)
    with captured_inputs([site.module for site in sites]) as inputs, torch.no_grad():
        model.model(input_ids=IDS, attention_mask=MASK)
    assert_results(results, sites, inputs, [MASK.tolist()], "all", RTOL)


def test_ids_of_several_texts_a_row():
    """GPT-2 takes ids [batch, choices, seq] and makes rows of them."""
    torch.manual_seed(0)
    config = tf.GPT2Config(vocab_size=101, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    model = tf.GPT2Model(config).eval()
    ids = tokens(6, 5).view(2, 3, 5)
    sites = fastheads.find_sites(model)
    with (
        fastheads.HookManager(model, "all") as hooks,
        captured_inputs([site.module for site in sites]) as inputs,
        torch.no_grad(),
    ):
        model(input_ids=ids)
        results = hooks.get_results()
    for row, site in enumerate(sites):
        norms, _ = dense_norms(inputs[row][0], site.module.weight.T, 4)
        want = statistics(norms.mean(axis=1))
        assert results["head_output_norm"]["count"][row].tolist() == [6] * 4
        torch.testing.assert_close(
            results["head_output_norm"]["mean"][row], torch.as_tensor(want["mean"]), rtol=RTOL, atol=0
        )


# ---------------------------------------------------------------- layers that do not run


class Skipping(nn.Module):
    """A layer that can be left out."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.skip = layer, False

    def forward(self, hidden, *args, **kwargs):
        return hidden if self.skip else self.layer(hidden, *args, **kwargs)


@pytest.mark.parametrize("how", ["whole", "model", "decoder", "layers"])
@pytest.mark.parametrize("skipped", ["eager", "compiled"])
def test_a_layer_that_is_left_out_shows_after_compiled_forwards_too(how, skipped):
    torch._dynamo.reset()
    model = build()
    model.model.layers[1] = Skipping(model.model.layers[1])
    compiled = model
    if how == "whole":

        def call(**arguments):  # the model's own hooks included
            return model(**arguments)

        compiled = torch.compile(call, backend="eager")
    elif how == "model":
        compiled = torch.compile(model, backend="eager")
    elif how == "decoder":
        compiled = torch.compile(model.model, backend="eager")
    else:
        for layer in (model.model.layers[0], model.model.layers[1].layer, model.model.layers[2]):
            layer.self_attn.compile(backend="eager")
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        compiled(input_ids=IDS)
        assert counted(hooks) == [2] * 3
        hooks.reset()
        model(input_ids=IDS)
        assert counted(hooks) == [2] * 3
        model.model.layers[1].skip = True
        (model if skipped == "eager" else compiled)(input_ids=IDS)
        with pytest.raises(fastheads.FastheadsError, match=r"layers\.1\..*did not run in every forward"):
            hooks.get_results()
        model.model.layers[1].skip = False
        hooks.reset()
        (model if skipped == "eager" else compiled)(input_ids=IDS)
        assert counted(hooks) == [2] * 3
    torch._dynamo.reset()


def test_lengths_of_packed_rows_are_no_padding():
    """What transformers itself gives beside `cu_seq_lens_q`: one number for all rows."""
    model = build()
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    lengths = dict(max_length_q=torch.tensor(4), max_length_k=torch.tensor(4))
    cu = torch.tensor([0, 4, 6])
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        model(IDS[:1], position_ids=positions, cu_seq_lens_q=cu, cu_seq_lens_k=cu, **lengths, use_cache=False)
        assert counted(hooks) == [2] * 3
