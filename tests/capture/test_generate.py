"""What generate() counts, as the README says it: all calls of the decoder, all rows, all tokens that its mask does not hide."""

import pytest
import torch
import transformers as tf
from oracle import assert_results, captured_inputs
from tiny_models import build, tokens

import fastheads
from fastheads.basic import HookManager as BasicHookManager

TOKEN_AGGS = ["last", "all", "token"]
PROMPT = tokens(3, 7)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
NEW = 4
OPTIONS = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)


def ones(rows, seq=1):
    return [[1] * seq] * rows


def assert_counts(model, run, shapes, masks, token_agg="all", skip_first=0):
    """`run()` calls the decoder on tokens of these shapes, and what these masks leave of them is counted."""
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg, skip_first=skip_first) as hooks,
        BasicHookManager(model, token_agg) as basic,
    ):
        out = run()
        results, by_basic = hooks.get_results(), basic.get_results()
    assert [tuple(x.shape[:2]) for x in inputs[0]] == shapes
    assert_results(results, sites, inputs, masks, token_agg, 5e-6, skip_first)
    assert_results(by_basic, sites, inputs, masks, token_agg, 5e-6)
    return out


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
def test_a_prompt_in_chunks_is_several_sequences(token_agg):
    model = build()
    cache = tf.DynamicCache(config=model.config)  # older releases of transformers want it given
    assert_counts(
        model,
        lambda: model.generate(
            PROMPT, attention_mask=MASK, prefill_chunk_size=3, past_key_values=cache, **OPTIONS
        ),
        [(3, 3), (3, 3), (3, 1), (3, 1), (3, 1), (3, 1)],
        [MASK[:, :3].tolist(), MASK[:, 3:6].tolist(), MASK[:, 6:].tolist(), *[ones(3)] * (NEW - 1)],
        token_agg,
    )


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
@pytest.mark.parametrize("way", ["beams", "sequences"])
def test_beams_and_returned_sequences_are_rows(way, token_agg):
    model = build()
    options = dict(num_beams=2) if way == "beams" else dict(num_return_sequences=2, do_sample=True)
    twice = MASK.repeat_interleave(2, dim=0).tolist()
    assert_counts(
        model,
        lambda: model.generate(PROMPT, attention_mask=MASK, **(OPTIONS | options)),
        [(6, 7), *[(6, 1)] * (NEW - 1)],
        [twice, *[ones(6)] * (NEW - 1)],
        token_agg,
    )


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
def test_without_a_cache_every_call_counts_all_tokens_again(token_agg):
    model = build()
    assert_counts(
        model,
        lambda: model.generate(PROMPT, attention_mask=MASK, use_cache=False, **OPTIONS),
        [(3, 7), (3, 8), (3, 9), (3, 10)],
        [torch.nn.functional.pad(MASK, (0, i), value=1).tolist() for i in range(NEW)],
        token_agg,
    )


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
def test_assisted_decoding_counts_rejected_tokens(token_agg):
    """The other model's guesses are checked in one call; those that are not taken were computed all the same."""
    model, other = build(), build(seed=1)
    sites = fastheads.find_sites(model)
    new = 6
    for each in (model, other):  # not by `min_new_tokens`, which older releases refuse here
        each.generation_config.eos_token_id = None
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg) as hooks,
    ):
        out = model.generate(PROMPT[1:2], max_new_tokens=new, do_sample=False, assistant_model=other)
        results = hooks.get_results()
    computed = sum(x.shape[1] for x in inputs[0])
    assert (
        computed > out.shape[1] - 1
    )  # rejected ones among them: a token more than in plain decoding, at the least
    assert_results(results, sites, inputs, [None] * len(inputs[0]), token_agg, 5e-6)
    if token_agg == "token":
        assert (results["head_output_norm"]["count"] == computed).all()
    else:
        assert (results["head_output_norm"]["count"] == len(inputs[0])).all()


def ended_early(model):
    """A token that ends some row of the prompt before the last step, and the rows as they then go on."""
    plain = model.generate(PROMPT, attention_mask=MASK, **OPTIONS)
    end = plain[1, 8].item()
    options = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=end, pad_token_id=0)
    out = model.generate(PROMPT, attention_mask=MASK, **options)
    assert (out[1, 9:] == 0).all() and (out[0, 7:] != 0).all()
    return options, out


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
def test_rows_that_ended_count_on(token_agg):
    """generate() gives them pads, whose mask is 1."""
    model = build()
    options, _ = ended_early(model)
    assert_counts(
        model,
        lambda: model.generate(PROMPT, attention_mask=MASK, **options),
        [(3, 7), *[(3, 1)] * (NEW - 1)],
        [MASK.tolist(), *[ones(3)] * (NEW - 1)],
        token_agg,
    )


def test_rows_that_ended_do_not_count_where_a_token_mask_says_so():
    model = build()
    sites = fastheads.find_sites(model)
    options, out = ended_early(model)
    prompt = torch.where(MASK.bool(), PROMPT, 0)

    def no_pads(given):
        return given["input_ids"] != 0

    with captured_inputs([s.module for s in sites]) as inputs:
        with fastheads.HookManager(model, "all") as hooks, hooks.token_mask(no_pads):
            model.generate(prompt, attention_mask=MASK, **options)
            results = hooks.get_results()
    steps = [(out[:, i : i + 1] != 0).tolist() for i in range(7, 7 + NEW - 1)]
    assert_results(results, sites, inputs, [MASK.tolist(), *steps], "all", 5e-6)


def test_skip_first_leaves_no_decode_step():
    """Each step is a sequence of one token: its first."""
    model = build()
    sites = fastheads.find_sites(model)
    with captured_inputs([s.module for s in sites]) as inputs:
        with fastheads.HookManager(model, "all", skip_first=1) as hooks:
            model.generate(PROMPT, attention_mask=MASK, **OPTIONS)
            results = hooks.get_results()
    assert (results["head_output_norm"]["count"] == 3).all()
    assert_results(results, sites, inputs, [MASK.tolist(), *[ones(3)] * (NEW - 1)], "all", 5e-6, skip_first=1)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["gemma3", "gemma2", "mistral"])
def test_windows_hide_no_token(family, cache):
    """A mask for each type of layer, and caches of a window's length: what a window hides from others is real."""
    model = build(family, sliding_window=4)
    options = OPTIONS | dict(max_new_tokens=6, min_new_tokens=6)
    if cache == "static":
        options |= dict(cache_implementation="static", disable_compile=True)
    assert_counts(
        model,
        lambda: model.generate(PROMPT, attention_mask=MASK, **options),
        [(3, 7), *[(3, 1)] * 5],
        [MASK.tolist(), *[ones(3)] * 5],
    )


# ------------------------------------------------------------------ encoder-decoders


def t5gemma():
    part = dict(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = tf.T5GemmaConfig(
        encoder=part | ids,
        decoder=part | ids | dict(cross_attention_hidden_size=32),
        vocab_size=101,
        decoder_start_token_id=1,
        **ids,
    )
    torch.manual_seed(0)
    return tf.T5GemmaForConditionalGeneration(config).eval()


def moonshine():
    config = tf.MoonshineConfig(
        vocab_size=101,
        hidden_size=32,
        intermediate_size=48,
        encoder_num_hidden_layers=1,
        decoder_num_hidden_layers=2,
        encoder_num_attention_heads=4,
        decoder_num_attention_heads=4,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    torch.manual_seed(0)
    return tf.MoonshineForConditionalGeneration(config).eval()


ENCODED = {
    t5gemma: dict(input_ids=PROMPT, attention_mask=MASK),
    moonshine: dict(
        input_values=torch.randn(3, 4000, generator=torch.Generator().manual_seed(0)),
        attention_mask=torch.tensor([[1] * 4000, [1] * 2000 + [0] * 2000, [1] * 4000]),
    ),
}


@pytest.mark.parametrize("token_agg", TOKEN_AGGS)
@pytest.mark.parametrize("family", ENCODED)
def test_the_decoders_own_mask_counts(family, token_agg):
    """Not the encoder's, though cross-attention is measured too."""
    model = family()
    own = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])

    def run():
        with torch.no_grad():
            model(**ENCODED[family], decoder_input_ids=tokens(3, 5), decoder_attention_mask=own)

    assert_counts(model, run, [(3, 5)], [own.tolist()], token_agg)


@pytest.mark.parametrize("family", ENCODED)
def test_encoder_decoders_generate(family):
    """The decoder's prompt is its start token."""
    model = family()
    assert_counts(
        model,
        lambda: model.generate(**ENCODED[family], **OPTIONS),
        [(3, 1)] * NEW,
        [ones(3)] * NEW,
    )


def test_an_encoder_decoder_goes_on_from_a_padded_start():
    model = t5gemma()
    start, own = (
        torch.tensor([[0, 0, 1], [0, 1, 5], [1, 6, 7]]),
        torch.tensor([[0, 0, 1], [0, 1, 1], [1] * 3]),
    )
    assert_counts(
        model,
        lambda: model.generate(
            **ENCODED[t5gemma], decoder_input_ids=start, decoder_attention_mask=own, **OPTIONS
        ),
        [(3, 3), *[(3, 1)] * (NEW - 1)],
        [own.tolist(), *[ones(3)] * (NEW - 1)],
    )


def test_a_decoder_that_takes_embeddings_only():
    model = t5gemma()
    embeds = model.get_decoder().embed_tokens(tokens(3, 5)).detach()
    own = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 1]])

    def run():
        with torch.no_grad():
            model(**ENCODED[t5gemma], decoder_inputs_embeds=embeds, decoder_attention_mask=own)

    assert_counts(model, run, [(3, 5)], [own.tolist()])
