"""Which tokens are real: padding on any side, decode steps, no mask; and what is refused."""

import pytest
import torch
from oracle import METRICS, assert_results, captured_inputs
from tiny_models import build, tokens
from transformers import (
    DynamicCache,
    FSMTConfig,
    FSMTModel,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    StaticCache,
)

import fastheads
from fastheads.basic import HookManager as BasicHookManager
from fastheads.stats.token_layout import DecoderArguments

LENGTHS = (6, 1, 4, 9)


def sequences():
    return [tokens(1, n, seed=n)[0] for n in LENGTHS]


def padded(side):
    width = max(LENGTHS)
    ids = torch.zeros(len(LENGTHS), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences()):
        start = {"left": width - len(sequence), "right": 0, "middle": (width - len(sequence)) // 2}[side]
        ids[row, start : start + len(sequence)] = sequence
        mask[row, start : start + len(sequence)] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, mask, positions


@pytest.mark.parametrize("skip_first", [0, 2])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_batch_invariance(token_agg, skip_first):
    """The same sequences alone, and batched with padding on either side, give the same moments."""
    model = build(dtype=torch.float64)
    results = []
    for way in ("alone", "left", "right", "middle"):
        with fastheads.HookManager(model, token_agg, skip_first=skip_first) as hooks, torch.no_grad():
            if way == "alone":
                for sequence in sequences():
                    model(input_ids=sequence[None])
            else:
                ids, mask, positions = padded(way)
                model(input_ids=ids, attention_mask=mask, position_ids=positions)
            results.append(hooks.get_results())
    samples = [n - skip_first for n in LENGTHS if n > skip_first]
    count = sum(samples) if token_agg == "token" else len(samples)
    for result in results:
        for metric in METRICS:
            assert (result[metric]["count"] == count).all()
            for stat in ("mean", "std", "min", "max"):
                torch.testing.assert_close(
                    result[metric][stat], results[0][metric][stat], rtol=1e-9, atol=1e-10
                )


@pytest.mark.parametrize("mask_type", [torch.long, torch.bool, torch.float32])
@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
def test_generate_counts_prefill_and_each_decode_step(token_agg, mask_type):
    model = build()
    sites = fastheads.find_sites(model)
    ids, mask, _ = padded("left")
    new = 4
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, token_agg) as hooks,
        BasicHookManager(model, token_agg) as basic,
    ):
        model.generate(
            ids, attention_mask=mask.to(mask_type), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        results, by_basic = hooks.get_results(), basic.get_results()
    steps = [mask.tolist()] + [[[1]] * len(LENGTHS)] * (new - 1)
    assert [x.shape[1] for x in inputs[0]] == [9, 1, 1, 1]
    assert_results(results, sites, inputs, steps, token_agg, 5e-6)
    assert_results(by_basic, sites, inputs, steps, token_agg, 5e-6)


def test_rows_that_begin_with_padding_in_a_later_chunk():
    """A prompt in two calls over one cache: each call's own columns of the mask count."""
    model = build()
    sites = fastheads.find_sites(model)
    ids, mask, positions = padded("left")
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all") as hooks,
        torch.no_grad(),
    ):
        out = model(
            input_ids=ids[:, :5], attention_mask=mask[:, :5], position_ids=positions[:, :5], use_cache=True
        )
        model(
            input_ids=ids[:, 5:],
            attention_mask=mask,
            position_ids=positions[:, 5:],
            past_key_values=out.past_key_values,
        )
        results = hooks.get_results()
    assert_results(results, sites, inputs, [mask[:, :5].tolist(), mask[:, 5:].tolist()], "all", 5e-6)


def test_a_mask_that_runs_past_the_tokens():
    """Some callers allocate the mask for all that is to come."""
    model = build()
    ids, mask, _ = padded("left")
    longer = torch.cat([mask, torch.zeros(4, 3, dtype=torch.long)], dim=1)
    with torch.no_grad():
        cache = model.model(input_ids=ids[:, :5], attention_mask=mask[:, :5], use_cache=True).past_key_values
    given = dict(input_ids=ids[:, 5:], attention_mask=longer, past_key_values=cache)
    real = DecoderArguments(model.model).token_layout((), given, 0)
    assert torch.equal(real.valid, mask[:, 5:].bool())


def test_a_static_cache_passes_a_4d_mask():
    model = build()
    sites = fastheads.find_sites(model)
    ids, mask, _ = padded("left")
    with captured_inputs([s.module for s in sites]) as inputs, fastheads.HookManager(model, "all") as hooks:
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )
        results = hooks.get_results()
    assert_results(results, sites, inputs, [mask.tolist()] + [[[1]] * 4] * 2, "all", 5e-6)


@pytest.mark.parametrize("additive", [False, True])
def test_the_diagonal_of_a_4d_mask(additive):
    model = build()
    sites = fastheads.find_sites(model)
    ids, mask, positions = padded("right")
    square = torch.ones(9, 9).tril().bool() & mask[:, None, None, :].bool() & mask[:, None, :, None].bool()
    if additive:
        square = torch.where(square, 0.0, torch.finfo(torch.float32).min)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all") as hooks,
        torch.no_grad(),
    ):
        model(input_ids=ids, attention_mask=square, position_ids=positions)
        results = hooks.get_results()
    assert_results(results, sites, inputs, [mask.tolist()], "all", 5e-6)


def test_what_does_not_tell_the_valid_tokens_is_refused():
    model = build()
    ids = tokens(2, 6)
    for manager in (fastheads.HookManager, BasicHookManager):
        with manager(model) as hooks, torch.no_grad():
            with pytest.raises(ValueError, match="2 or 4 dimensions.*got 3D"):
                model.model(input_ids=ids, attention_mask=torch.ones(2, 1, 6))
            with pytest.raises(ValueError, match="3 columns for 6 tokens"):
                model.model(input_ids=ids, attention_mask=torch.ones(2, 3))
            assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()


def test_a_bias_in_an_additive_mask_is_no_padding():
    model = build()
    sites = fastheads.find_sites(model)
    ids, mask, positions = padded("right")
    square = torch.ones(9, 9).tril().bool() & mask[:, None, None, :].bool()
    additive = torch.where(square, -0.3, torch.finfo(torch.float32).min)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all") as hooks,
        torch.no_grad(),
    ):
        model(input_ids=ids, attention_mask=additive, position_ids=positions)
        assert_results(hooks.get_results(), sites, inputs, [mask.tolist()], "all", 5e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("low", [-1e4, -65504.0, -1e9, -1e38, -torch.inf, "lowest"])
def test_additive_masks_that_people_make(low, dtype):
    """Each of these numbers forbids as well as the dtype's lowest."""
    low = torch.finfo(dtype).min if low == "lowest" else low
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    square = torch.ones(5, 5).tril().bool() & mask[:, None, None, :].bool()
    for bias in (0.0, -8.0, 3.0):
        additive = torch.where(square, bias, low).to(dtype)
        given = dict(input_ids=tokens(1, 5), attention_mask=additive)
        real = DecoderArguments(build().model).token_layout((), given, 0)
        assert torch.equal(real.valid, mask.bool())


def test_a_4d_mask_of_whole_numbers_is_refused():
    """Some take 1 for seen, and a model that adds it takes it for a bias."""
    given = dict(input_ids=tokens(1, 5), attention_mask=torch.ones(1, 1, 5, 5, dtype=torch.long).tril())
    with pytest.raises(ValueError, match="in bool or in floating point, not torch.int64"):
        DecoderArguments(build().model).token_layout((), given, 0)


def test_one_mask_for_all_rows():
    model = build()
    sites = fastheads.find_sites(model)
    row = [0, 0, 1, 1, 1, 1]
    square = (torch.ones(6, 6).tril().bool() & torch.tensor(row).bool())[None, None]
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all") as hooks,
        torch.no_grad(),
    ):
        model(input_ids=tokens(3, 6), attention_mask=square)
        assert_results(hooks.get_results(), sites, inputs, [[row] * 3], "all", 5e-6)


@pytest.mark.parametrize("family", ["gemma3", "gemma2", "gpt-oss", "mistral-window"])
def test_static_caches_of_layers_with_windows(family):
    """generate() passes a dict with a 4D mask for each type of layer, or the window's alone."""
    changes = dict(sliding_window=8)
    model = build(family.removesuffix("-window"), **changes)
    sites = fastheads.find_sites(model)
    ids, mask, _ = padded("left")
    with captured_inputs([s.module for s in sites]) as inputs, fastheads.HookManager(model, "all") as hooks:
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
        )
        results = hooks.get_results()
    assert_results(results, sites, inputs, [mask.tolist()] + [[[1]] * 4] * 3, "all", 5e-6)


def test_a_cache_that_does_not_know_its_length():
    """MiniMax's says 0: in decode the call's columns of the mask are the last all the same."""

    class Ignorant:
        def get_seq_length(self):
            return 0

    given = dict(
        input_ids=tokens(2, 1),
        attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]),
        past_key_values=Ignorant(),
    )
    real = DecoderArguments(build().model).token_layout((), given, 0)
    assert real.valid.tolist() == [[True], [True]]


@pytest.mark.parametrize("family", ["llama", "minimax"])
def test_a_mask_that_runs_past_the_tokens_beside_an_empty_cache(family):
    """An empty cache and one whose first layer keeps nothing both say 0."""
    if family == "minimax":
        small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
        types = ["linear_attention", "full_attention"]
        config = MiniMaxConfig(
            num_key_value_heads=2,
            **small,
            vocab_size=101,
            head_dim=8,
            num_local_experts=2,
            block_size=4,
            layer_types=types,
        )
        model = MiniMaxForCausalLM(config).eval()
    else:
        model = build()
    reader = DecoderArguments(model.model)
    ids, mask = tokens(2, 5), torch.tensor([[0, 1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 0, 0, 0]])
    with torch.no_grad():
        cache = model.model(input_ids=ids[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
    given = dict(input_ids=ids[:, 3:], attention_mask=mask, past_key_values=cache)
    assert reader.token_layout((), given, 0).valid.tolist() == [[False, True], [True, False]]
    given = dict(input_ids=ids[:, :3], attention_mask=mask, past_key_values=DynamicCache())
    assert reader.token_layout((), given, 0).valid.tolist() == [[False, True, True], [True, True, True]]


@pytest.mark.parametrize("columns", [9, 12])
def test_2d_masks_beside_a_static_cache(columns):
    """As long as what was seen, or as what is to come."""
    model = build()
    sites = fastheads.find_sites(model)
    ids, mask, positions = padded("middle")
    whole = torch.cat([mask, torch.ones(4, columns - 9, dtype=torch.long)], dim=1)
    cache = StaticCache(config=model.config, max_cache_len=12)
    parts = [slice(0, 5), slice(5, 8), slice(8, 9)]
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all") as hooks,
        torch.no_grad(),
    ):
        for part in parts:
            model(
                input_ids=ids[:, part],
                attention_mask=whole[:, : part.stop] if columns == 9 else whole,
                position_ids=positions[:, part],
                past_key_values=cache,
                cache_position=torch.arange(9)[part],  # which older releases do not count right themselves
            )
        results = hooks.get_results()
    assert_results(results, sites, inputs, [mask[:, part].tolist() for part in parts], "all", 5e-6)


def test_caches_that_do_not_say_how_much_they_hold():
    """Transformers 5.0 counts keys that are not zero, as those of padding are; the decoder is told the right number."""

    class Decoder(torch.nn.Module):
        def forward(self, input_ids, attention_mask, past_key_values, cache_position):
            pass

    class Cache:
        def get_seq_length(self):
            return torch.tensor(1)

    mask = torch.tensor([[0, 0, 1, 1, 0]])
    given = dict(input_ids=tokens(1, 2), attention_mask=mask, past_key_values=Cache())
    given["cache_position"] = torch.tensor([2, 3])
    assert DecoderArguments(Decoder()).token_layout((), given, 0).valid.tolist() == [[True, True]]
    four = torch.ones(2, 5).tril(2).bool() & mask[:, None, None, :].bool()
    given["attention_mask"] = four
    assert DecoderArguments(Decoder()).token_layout((), given, 0).valid.tolist() == [[True, True]]
    # RecurrentGemma's, then: a cache inside the model
    given |= dict(attention_mask=mask, past_key_values=None)
    assert DecoderArguments(Decoder()).token_layout((), given, 0).valid.tolist() == [[True, True]]


def test_padding_that_is_not_read_is_refused():
    """FSMT's decoder is told of it by another name, and with another sense."""
    small = dict(d_model=32, encoder_layers=1, decoder_layers=1, langs=["de", "en"], src_vocab_size=50)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, tgt_vocab_size=50)
    model = FSMTModel(FSMTConfig(**small, **heads))
    reader = DecoderArguments(model.get_decoder())
    given = dict(input_ids=tokens(2, 3))
    assert reader.token_layout((), given, 0).valid is None
    given["decoder_padding_mask"] = torch.tensor([[True, False, False]] * 2)
    with pytest.raises(ValueError, match="decoder_padding_mask is not read.*token_mask"):
        reader.token_layout((), given, 0)
    with reader.overridden(~given["decoder_padding_mask"]):
        assert reader.token_layout((), given, 0).valid.tolist() == [[False, True, True]] * 2


def test_a_mask_longer_than_the_tokens_without_a_cache():
    """The model itself takes its first columns."""
    given = dict(input_ids=tokens(1, 3), attention_mask=torch.tensor([[0, 1, 1, 0, 0]]))
    real = DecoderArguments(build().model).token_layout((), given, 0)
    assert real.valid.tolist() == [[False, True, True]]


@pytest.mark.parametrize("manager", [fastheads.HookManager, BasicHookManager])
def test_a_wrapper_without_get_decoder(manager):
    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = build(dtype=torch.float64)

        def forward(self, batch):
            return self.lm(**batch)

    wrapper = Wrapper()
    sites = fastheads.find_sites(wrapper)
    ids, mask, positions = padded("left")
    batch = dict(input_ids=ids, attention_mask=mask, position_ids=positions)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(wrapper, "all") as hooks,
        torch.no_grad(),
    ):
        wrapper(batch)
        wrapper.lm(**batch)
        assert_results(hooks.get_results(), sites, inputs, [mask.tolist()] * 2, "all", 1e-12)


def test_a_mask_of_another_batch_is_refused():
    model = build()
    arguments = DecoderArguments(model.model)
    real = arguments.token_layout((), {"input_ids": tokens(2, 6), "attention_mask": torch.ones(3, 6)}, 0)
    with pytest.raises(ValueError, match=r"\[3, 6\] tokens.*\[2, 6\]"):
        real.mask(torch.zeros(2, 6, 8))


# ------------------------------------------------------------------ token_mask

TOLD = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.bool)
MANAGERS = [fastheads.HookManager, BasicHookManager]


@pytest.mark.parametrize("token_agg", ["last", "all", "token"])
@pytest.mark.parametrize("manager", MANAGERS)
def test_a_token_mask_goes_before_the_arguments(manager, token_agg):
    model = build()
    sites = fastheads.find_sites(model)
    given = dict(input_ids=tokens(3, 6), attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]] * 3))
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(model, token_agg) as hooks,
        torch.no_grad(),
    ):
        with hooks.token_mask(TOLD):
            model(**given)
            with hooks.token_mask(~TOLD):
                model(**given)
        model(**given)
        # what could not be read is not read
        with hooks.token_mask(TOLD):
            model.model(input_ids=tokens(3, 6), attention_mask=torch.ones(3, 1, 1, 1).bool())
        results = hooks.get_results()
    masks = [TOLD.tolist(), (~TOLD).tolist(), given["attention_mask"].tolist(), TOLD.tolist()]
    assert_results(results, sites, inputs, masks, token_agg, 5e-6)


def test_skip_first_comes_after_a_token_mask():
    model = build()
    sites = fastheads.find_sites(model)
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all", skip_first=2) as hooks,
    ):
        with hooks.token_mask(TOLD), torch.no_grad():
            model(input_ids=tokens(3, 6))
        assert_results(hooks.get_results(), sites, inputs, [TOLD.tolist()], "all", 5e-6, skip_first=2)


@pytest.mark.parametrize("how", ["cu_seq_lens_q", "position_ids"])
def test_packed_rows_stay_packed_under_a_token_mask(how):
    model = build()
    sites = fastheads.find_sites(model)
    given = {"cu_seq_lens_q": torch.tensor([0, 4, 6, 12, 18])}
    if how == "position_ids":
        given = {how: torch.tensor([[0, 1, 2, 3, 0, 1], [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])}
    with captured_inputs([s.module for s in sites]) as inputs, fastheads.HookManager(model, "last") as hooks:
        with hooks.token_mask(TOLD), torch.no_grad():
            model.model(input_ids=tokens(3, 6), **given)
        results = hooks.get_results()
    parts = [(0, 0, 4), (0, 4, 6), (1, 0, 6), (2, 0, 6)]
    cut = [[x[b : b + 1, start:stop] for b, start, stop in parts] for (x,) in inputs]
    masks = [TOLD[b : b + 1, start:stop].tolist() for b, start, stop in parts]
    assert_results(results, sites, cut, masks, "last", 5e-6)


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_token_mask_that_does_not_fit_is_refused(manager):
    model = build()
    with manager(model) as hooks, torch.no_grad():
        for mask, message in (
            (torch.ones(3, 5).bool(), r"token_mask.*\[3, 6\], not \[3, 5\]"),
            (torch.ones(1, 6).bool(), r"token_mask.*\[3, 6\], not \[1, 6\]"),
            (torch.ones(3, 6), "token_mask must be a bool tensor.*float32"),
            (lambda given: [[1] * 6] * 3, "token_mask must be a bool tensor.*list"),
        ):
            with hooks.token_mask(mask), pytest.raises(ValueError, match=message):
                model(input_ids=tokens(3, 6))
        with pytest.raises(ValueError, match="token_mask must be a tensor or a function, not list"):
            with hooks.token_mask([[True] * 6] * 3):
                pass
        assert (hooks.get_results()["head_output_norm"]["count"] == 0).all()
        model(input_ids=tokens(3, 6))  # the context is over, though a forward in it failed
        assert (hooks.get_results()["head_output_norm"]["count"] == 3).all()


# ------------------------------------------------------------------ other calls of the decoder


@pytest.mark.parametrize("manager", MANAGERS)
def test_embeddings_in_place_of_ids(manager):
    model = build()
    sites = fastheads.find_sites(model)
    ids, mask, _ = padded("left")
    embeds = model.get_input_embeddings()(ids).detach()
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(model, "all") as hooks,
        torch.no_grad(),
    ):
        cache = model(inputs_embeds=embeds[:, :5], attention_mask=mask[:, :5]).past_key_values
        model(inputs_embeds=embeds[:, 5:], attention_mask=mask, past_key_values=cache)
        results = hooks.get_results()
    assert_results(results, sites, inputs, [mask[:, :5].tolist(), mask[:, 5:].tolist()], "all", 5e-6)


@pytest.mark.parametrize("manager", MANAGERS)
def test_a_decoder_that_is_called_several_times_in_a_forward(manager):
    """Each call has its own tokens, as many as it likes."""

    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = build()

        def forward(self, ids, mask):
            draft = self.lm.model(input_ids=ids, attention_mask=mask).last_hidden_state
            return self.lm.model(inputs_embeds=draft[:, 2:], attention_mask=mask[:, 2:])

    model = Twice()
    sites = fastheads.find_sites(model)
    ids, mask, _ = padded("right")
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        manager(model, "last") as hooks,
        torch.no_grad(),
    ):
        model(ids, mask)
        results = hooks.get_results()
    assert_results(results, sites, inputs, [mask.tolist(), mask[:, 2:].tolist()], "last", 5e-6)
