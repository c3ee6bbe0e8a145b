"""Which modules are found, and what is said where there are none."""

import families
import pytest
import torch
import transformers as tf
from oracle import METRICS, assert_results, captured_inputs
from tiny_models import FAMILIES, build, tokens

import fastheads
from fastheads import NoSitesError, find_sites
from fastheads.models.sites import decoder_of

MASK = [[0, 0, 1, 1, 1, 1, 1], [1] * 7]


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


@pytest.mark.parametrize(
    ("name", "by_default"),
    [
        *(("KimiLinearAttention", True), ("KimiLinearDeltaAttention", False), ("FalconMLA", True)),
        *(("HiggsAudioV2Attention", True), ("Qwen2AudioAttention", False), ("GitVisionAttention", False)),
        *(
            ("BertSelfAttention", True),
            ("LasrEncoderAttention", False),
            ("SiglipMultiheadAttentionPoolingHead", False),
        ),
        *(
            ("MiniMaxLightningAttention", False),
            ("Inkling2BlockAttentionResidual", False),
            ("GPT2MLP", False),
        ),
    ],
)
@pytest.mark.parametrize("projection", ["o_proj", "proj", "linear_out"])
def test_names_of_classes(name, by_default, projection):
    """What they are called says what they are; `include` reaches the others."""
    toy = type(name, (torch.nn.Module,), {"num_heads": 4})()
    setattr(toy, projection, torch.nn.Linear(32, 16))
    model = torch.nn.ModuleDict({"attn": toy})
    reached = [(f"attn.{projection}", 0, 4, 8)]
    assert named(model, "attn") == reached
    if by_default:
        assert named(model) == reached
    else:
        with pytest.raises(
            NoSitesError, match=rf"no softmax attention.*{name} \(attn\); include=\.\.\. adds"
        ):
            find_sites(model)


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
    class ToyAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unknown = torch.nn.Linear(32, 32)

    with pytest.raises(NoSitesError, match=r"Sequential.*no linear layer called o_proj.*ToyAttention \(0\)"):
        fastheads.HookManager(torch.nn.Sequential(ToyAttention()))
    with pytest.raises(NoSitesError, match="no softmax attention; attention classes found: none"):
        find_sites(torch.nn.Linear(2, 2))
    with pytest.raises(NoSitesError, match=r"torch\.nn\.MultiheadAttention never calls"):
        find_sites(torch.nn.TransformerEncoderLayer(16, 2))


def test_attention_that_would_be_missing_from_the_profile_is_refused():
    class ToyAttention(torch.nn.Module):
        pass

    model = build()
    model.model.layers[1].self_attn = ToyAttention()
    with pytest.raises(
        NoSitesError, match=r"layers\.1\.self_attn \(ToyAttention\) has no linear layer.*o_proj"
    ):
        find_sites(model)
    model = build()
    model.model.layers[1].self_attn.inner = ToyAttention()  # part of attention that has one
    assert len(find_sites(model)) == 3


def test_an_attention_whose_heads_are_unknown_is_refused():
    class ToyAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.o_proj = torch.nn.Linear(30, 30)
            self.head_dim = 8

    toy = ToyAttention()
    with pytest.raises(NoSitesError, match=r"0\.o_proj.*30 wide.*ToyAttention.*it has head_dim 8$"):
        find_sites(torch.nn.Sequential(toy))
    toy.head_dim, toy.num_heads = 10, 5  # 3 heads, or 5 of them
    with pytest.raises(NoSitesError, match=r"ambiguous number of heads .*: it has head_dim 10, num_heads 5$"):
        find_sites(torch.nn.Sequential(toy))
    toy.v_head_dim = 6
    assert named(torch.nn.Sequential(toy)) == [("0.o_proj", 0, 5, 6)]
    del toy.head_dim, toy.num_heads, toy.v_head_dim
    with pytest.raises(NoSitesError, match=r"it has none of v_head_dim"):
        find_sites(torch.nn.Sequential(toy))


def named(model, include=()):
    return [(site.name, site.layer, site.num_heads, site.head_dim) for site in find_sites(model, include)]


def test_include_reaches_linear_attention():
    model = families.build("qwen3_next")
    plain = named(model)
    assert plain == [(f"model.layers.{n}.self_attn.o_proj", n, 4, 24) for n in (1, 3)]
    linear = [(f"model.layers.{n}.linear_attn.out_proj", n, 4, 16) for n in (0, 2)]
    for pattern in ("*.linear_attn", "model.layers.*.linear_attn.out_proj", ["*.linear_attn", "*.self_attn"]):
        assert named(model, pattern) == [linear[0], plain[0], linear[1], plain[1]]
    assert named(model, "model.layers.2.*") == [plain[0], linear[1], plain[1]]
    with (
        captured_inputs([s.module for s in find_sites(model, "*.linear_attn")]) as inputs,
        fastheads.HookManager(model, "all", include="*.linear_attn", verify=True) as hooks,
        torch.no_grad(),
    ):
        model(**families.batch("qwen3_next", MASK))
        results = hooks.get_results()
    assert len(results["metadata"]["sites"]) == 4
    assert_results(results, hooks.sites, inputs, [MASK], "all", 5e-6)


def test_profile_takes_include_too():
    model = families.build("qwen3_next")
    found = fastheads.profile(model, tokens(2, 7), include="*.linear_attn")
    assert found.shape == (4, 4) and [site["layer"] for site in found.metadata["sites"]] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore")
def test_include_reaches_towers_and_leaves_out_what_cannot_be_profiled_there():
    model = families.build("gemma3")
    # the first reaches a head that is torch.nn.MultiheadAttention
    for pattern in ("*.vision_tower.*", "model.vision_tower.*encoder.layers.?.self_attn"):
        tower = [name for name, *_ in named(model, pattern) if ".vision_tower." in name]
        assert [name.partition(".encoder.")[2] for name in tower] == [
            f"layers.{n}.self_attn.out_proj" for n in range(4)
        ]
    with pytest.raises(NoSitesError, match=r"vision_tower.*\.head.*MultiheadAttention never calls"):
        find_sites(model, "*.head.attention")
    with fastheads.HookManager(model, include="*.vision_tower.*"), torch.no_grad():
        # a forward with a picture in it
        model.register_forward_pre_hook(
            lambda m, _: (m.model.vision_tower(torch.randn(1, 3, 32, 32)), None)[1]
        )
        with pytest.raises(RuntimeError, match=r"vision_tower.*tokens are not known.*as a model of its own"):
            model(**families.batch("gemma3", MASK))


def test_a_tower_is_a_model_of_its_own():
    tower = families.build("gemma3").model.vision_tower
    with fastheads.HookManager(tower, "all", verify=True) as hooks, torch.no_grad():
        tower(torch.randn(3, 3, 32, 32))
        counts = hooks.get_results()["head_output_norm"]["count"]
    assert counts.tolist() == [[3] * 4] * 4


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(
        ValueError, match=r"LlamaForCausalLM matches include='\*\.vision'; those left out by default: none"
    ):
        find_sites(build(), ["*.self_attn", "*.vision"])
    with pytest.raises(
        ValueError,
        match=r"left out by default: Qwen3NextGatedDeltaNet \(model\.layers\.\d\.linear_attn\)",
    ):
        find_sites(families.build("qwen3_next"), "linear_attn")  # the whole name, as fnmatch has it


def test_attention_to_an_encoder_counts_where_there_is_one():
    sizes = dict(vocab_size=101, d_model=64, encoder_layers=1, decoder_layers=2, decoder_attention_heads=4)
    config = tf.BartConfig(**sizes, encoder_attention_heads=4, decoder_ffn_dim=32, encoder_ffn_dim=32)
    whole = tf.BartForConditionalGeneration(config)
    assert [name.split(".")[-2] for name, *_ in named(whole)] == ["self_attn", "encoder_attn"] * 2
    assert [name.split(".")[-2] for name, *_ in named(torch.nn.DataParallel(whole))][1] == "encoder_attn"
    alone = tf.BartForCausalLM(config)
    assert [name.split(".")[-2] for name, *_ in named(alone)] == ["self_attn"] * 2
    assert len(named(alone, "*.encoder_attn")) == 4


IDS = dict(vocab_size=101, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TOWER = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    image_size=28,
    patch_size=14,
)


def blip2():
    text = tf.T5Config(
        **IDS, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    former = dict(vocab_size=101, num_hidden_layers=1, hidden_size=32, encoder_hidden_size=32)
    former |= dict(num_attention_heads=2, intermediate_size=48)
    config = tf.Blip2Config(
        vision_config=TOWER, qformer_config=former, text_config=text.to_dict(), image_token_index=99
    )
    config.num_query_tokens, config.use_decoder_only_language_model = 3, False
    ids = tokens(2, 7)
    ids[:, 2:5] = 99
    pixels = torch.zeros(2, 3, 28, 28)
    return tf.Blip2ForConditionalGeneration(config), dict(input_ids=ids, pixel_values=pixels)


def florence2():
    small = dict(d_model=64, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=96, decoder_ffn_dim=96)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=4, max_position_embeddings=64)
    text = tf.BartConfig(**IDS, **small, **heads)
    config = tf.Florence2Config(text_config=text.to_dict(), image_token_id=99)
    return tf.Florence2ForConditionalGeneration(config), dict(input_ids=tokens(2, 7))


@pytest.mark.parametrize("make", [blip2, florence2])
def test_a_language_model_with_an_encoder_of_its_own(make):
    """Its decoder is what counts: the padding is its, and not the encoder's, and attention to the encoder runs."""
    torch.manual_seed(0)
    model, batch = make()
    model = model.eval()
    sites = find_sites(model)
    assert [(s.layer, s.num_heads, s.head_dim) for s in sites] == [(n, 4, 16) for n in (0, 0, 1, 1)]
    assert all(".decoder." in s.name for s in sites)
    assert [("EncDec" in s.name or "encoder_attn" in s.name) for s in sites] == [False, True] * 2
    others = torch.tensor([[1] * 7, [0] + [1] * 6])
    batch |= dict(
        attention_mask=others, decoder_input_ids=tokens(2, 7), decoder_attention_mask=torch.tensor(MASK)
    )
    with (
        captured_inputs([s.module for s in sites]) as inputs,
        fastheads.HookManager(model, "all") as hooks,
        torch.no_grad(),
    ):
        model(**batch)
        assert_results(hooks.get_results(), sites, inputs, [MASK], "all", 5e-6)


def test_t5_and_encoders():
    t5 = tf.T5Config(vocab_size=101, d_model=32, d_kv=12, d_ff=32, num_layers=1, num_heads=4)
    assert named(tf.T5ForConditionalGeneration(t5)) == [
        ("decoder.block.0.layer.0.SelfAttention.o", 0, 4, 12),
        ("decoder.block.0.layer.1.EncDecAttention.o", 0, 4, 12),
    ]
    bert = tf.BertConfig(
        vocab_size=101, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    assert named(tf.BertModel(bert)) == [("encoder.layer.0.attention.output.dense", 0, 4, 16)]


def test_differential_heads_are_units_of_two_whatever_computes_them():
    for implementation in ("eager", "sdpa"):  # classes of their own, in some releases
        config = tf.DiffLlamaConfig(
            hidden_size=64, intermediate_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=101
        )
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
        assert [site[2:] for site in named(model)] == [(2, 32)]


def test_bloom_that_bypasses_its_projection_is_refused():
    model = families.build("bloom")
    assert len(find_sites(model)) == 4
    for block in model.transformer.h:
        block.self_attention.slow_but_exact = True
    assert len(find_sites(model)) == 4  # pretraining_tp is 1: it does not
    for block in model.transformer.h:
        block.self_attention.pretraining_tp = 2
    with pytest.raises(NoSitesError, match=r"h\.0\.self_attention.*slow_but_exact = False"):
        find_sites(model)


def test_a_head_called_decoder_is_not_the_decoder():
    model = families.build("modernbert-decoder")
    assert isinstance(model.get_decoder(), torch.nn.Linear)
    assert decoder_of(model) is model.model


def test_two_attentions_in_a_layer():
    if "longcat_flash" not in families.FAMILIES:
        pytest.skip("not in this release")
    names = [name for name, *_ in named(families.build("longcat_flash"))]
    assert names[:2] == ["model.layers.0.self_attn.0.o_proj", "model.layers.0.self_attn.1.o_proj"]


def test_looped_layers_count_each_firing():
    if "hrm_text" not in families.FAMILIES:
        pytest.skip("not in this release")
    model = families.build("hrm_text")
    with fastheads.HookManager(model, "token") as hooks, torch.no_grad():
        model(**families.batch("hrm_text", MASK))
        counts = hooks.get_results()["head_output_norm"]["count"]
    real = sum(map(sum, MASK))
    low, high = [real * 6] * 4, [real * 2] * 4  # L_cycles · H_cycles, H_cycles
    assert counts.tolist() == [low] * 4 + [high] * 4


def test_a_shared_module_is_one_site_that_counts_each_firing():
    model = build()
    model.model.layers[2].self_attn = model.model.layers[0].self_attn
    assert [s.name for s in find_sites(model)] == [f"model.layers.{n}.self_attn.o_proj" for n in (0, 1)]
    with (
        captured_inputs([s.module for s in find_sites(model)]) as inputs,
        fastheads.HookManager(model, "all", verify=True) as hooks,
        torch.no_grad(),
    ):
        model(input_ids=tokens(2, 7), attention_mask=torch.tensor(MASK), use_cache=False)
        results = hooks.get_results()
    assert [len(x) for x in inputs] == [2, 1]
    assert results["head_output_norm"]["count"].tolist() == [[4] * 4, [2] * 4]
    for row, firings in enumerate(inputs):
        assert_results(
            {m: {s: t[row : row + 1] for s, t in results[m].items()} for m in METRICS},
            [hooks.sites[row]], [firings], [MASK] * len(firings), "all", 5e-6,
        )  # fmt: skip


def test_a_projection_that_two_attentions_share_is_one_site():
    model = build()
    model.model.layers[2].self_attn.o_proj = model.model.layers[0].self_attn.o_proj
    assert [s.layer for s in find_sites(model)] == [0, 1]
    with fastheads.HookManager(model, "all") as hooks, torch.no_grad():
        model(input_ids=tokens(2, 7))
        assert hooks.get_results()["head_output_norm"]["count"].tolist() == [[4] * 4, [2] * 4]
