"""What a document gives must not depend on the documents that share its batch, nor on those that ran before."""

import contextlib
import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import ascii_tokenizer, tiny_llama
from oracle import METRICS, captured_inputs, expected
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    PhimoeConfig,
)

from fastheads import find_sites, profile
from fastheads.errors import ForwardError, OptionError
from fastheads.models.batch_sharing import Sharing, sharing_of

ORIGINAL = 16
SMALL = dict(
    **dict(vocab_size=130, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4),
    **dict(num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2),
)
LONG = {
    **{"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": ORIGINAL},
    **{"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [4.0, 8.0, 16.0, 32.0], "factor": 4.0},
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}


def phi3():
    rope = {key: value for key, value in LONG.items() if key not in ("rope_theta", "factor")}
    return Phi3Config(
        **SMALL,
        max_position_embeddings=64,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope | {"rope_theta": 10000.0},
    )


def phimoe():
    rope = LONG | {"short_mscale": 1.2, "long_mscale": 1.9}
    return PhimoeConfig(
        **SMALL,
        max_position_embeddings=64,
        original_max_position_embeddings=ORIGINAL,
        rope_parameters=rope,
        num_local_experts=2,
    )


def llama(rope, positions=64):
    return LlamaConfig(**SMALL, max_position_embeddings=positions, rope_parameters=dict(rope))


def gemma3():
    """A table for each kind of layer."""
    rope = {"full_attention": dict(LONG), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    return Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        max_position_embeddings=64,
        rope_parameters=rope,
        layer_types=["full_attention", "sliding_attention"],
    )


def gemma3_dynamic():
    rope = {"full_attention": dict(DYNAMIC), "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
    return Gemma3TextConfig(
        **SMALL,
        head_dim=8,
        max_position_embeddings=ORIGINAL,
        rope_parameters=rope,
        layer_types=["full_attention", "sliding_attention"],
    )


CONFIGS = {
    "phi3": phi3,
    "phimoe": phimoe,
    "llama longrope": lambda: llama(LONG),
    "llama dynamic": lambda: llama(DYNAMIC, ORIGINAL),
    "gemma3 longrope": gemma3,
    "gemma3 dynamic": gemma3_dynamic,
}


def built(name):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), experts_implementation="eager").eval()


@pytest.fixture(scope="module")
def texts():
    chance = random.Random(0)
    lengths = [chance.randint(12, 24) for _ in range(40)] + [ORIGINAL, ORIGINAL + 1] * 3
    return ["".join(chance.choice("abc defgh ijk") for _ in range(n)) for n in lengths]


def ids_of(text):
    return [ord(c) + 1 for c in text]


def alone(model, rows):
    """{metric: {statistic: [layers, heads]}} of each row run by itself, in float64, in a model that ran nothing before."""
    sites = [site.name for site in find_sites(model)]
    inputs = [[] for _ in sites]
    for row in rows:
        fresh = copy.deepcopy(model).double()
        with captured_inputs([fresh.get_submodule(name) for name in sites]) as seen, torch.no_grad():
            fresh(input_ids=torch.tensor([row]), use_cache=False)
        for kept, found in zip(inputs, seen, strict=True):
            kept += found
    weights = [site.module.weight for site in find_sites(model)]
    found = [
        expected(x, weight, 4, [None] * len(rows), "all") for x, weight in zip(inputs, weights, strict=True)
    ]
    return {m: {s: np.stack([row[m][s] for row in found]) for s in found[0][m]} for m in METRICS}


def assert_alone(found, want):
    results = found.results()
    for metric in METRICS:
        for statistic in ("count", "mean", "min", "max"):
            np.testing.assert_allclose(
                results[metric][statistic].numpy(), want[metric][statistic], rtol=2e-5, err_msg=metric
            )


@contextlib.contextmanager
def memory_for(module, tokens):
    def hook(module, args):
        if args[0].shape[0] * args[0].shape[1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handle = module.register_forward_pre_hook(hook)
    yield
    handle.remove()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_document_gives_what_it_gives_alone(name, texts):
    model, tokenizer = built(name), ascii_tokenizer()
    want = alone(model, [ids_of(text) for text in texts])
    # A table that an earlier forward of the caller's left must not matter either.
    with torch.no_grad():
        model(input_ids=torch.ones(1, 60, dtype=torch.long), use_cache=False)
    options = {"tokenizer": tokenizer, "seq_len": 24}
    for budget in (4096, 256, 64, 20):
        assert_alone(profile(model, texts, batch_tokens=budget, **options), want)
    with memory_for(model.model.layers[1].mlp, 70):
        assert_alone(profile(model, texts, batch_tokens=500, **options), want)
    assert_alone(profile(model, texts[::-1], batch_size=5, **options), want)


@pytest.mark.parametrize("name", ["llama dynamic", "gemma3 dynamic"])
def test_the_table_that_a_model_keeps_is_left_as_it_was(name, texts):
    model = built(name)
    row = torch.tensor([ids_of("abcdefgh abcdefgh abcdefgh")])
    with torch.no_grad():
        model(input_ids=torch.ones(1, 60, dtype=torch.long), use_cache=False)
        before = copy.deepcopy(model)(input_ids=row[:, :20], use_cache=False).logits
        profile(model, texts, tokenizer=ascii_tokenizer(), seq_len=24)
        assert torch.equal(model(input_ids=row[:, :20], use_cache=False).logits, before)


def test_batches_of_the_callers_are_run_as_they_are(texts):
    """Short rows beside a long one have the long one's table, as in the caller's own forward; halves keep its width."""
    model = built("phi3")
    ids = torch.randint(1, 130, (8, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, 12:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    whole = profile(model, dict(batch)).results()
    with memory_for(model.model.layers[1].mlp, 100):
        halved = profile(model, dict(batch)).results()
        for metric in METRICS:
            torch.testing.assert_close(whole[metric]["mean"], halved[metric]["mean"], rtol=2e-5, atol=0)
        # Halves with positions of their own would not have the greatest one of the whole.
        positions = torch.arange(24).expand(8, -1) * mask
        with pytest.raises(ForwardError, match="8 rows, which cannot be halved"):
            profile(model, batch | {"position_ids": positions})


def test_lengths_beyond_the_positions_are_refused_where_nothing_makes_tables_for_them(texts):
    options = {"tokenizer": ascii_tokenizer(), "seq_len": 65}
    with pytest.raises(OptionError, match="max_position_embeddings, 64"):
        profile(built("phi3"), texts, **options)
    assert profile(built("llama dynamic"), texts, **options).metadata["data"]["sequences"] == len(texts)


def test_the_rule_is_read_from_the_configuration():
    assert sharing_of(tiny_llama()) == Sharing()
    assert sharing_of(tiny_llama()).described() is None
    assert sharing_of(built("gemma3 longrope")) == Sharing(bounds=(ORIGINAL,))
    assert sharing_of(built("llama dynamic")) == Sharing(equal_beyond=ORIGINAL)
    assert Sharing().groups([3, 1, 2]) == [[0, 1, 2]]
    assert Sharing(bounds=(2, 4)).groups([1, 5, 3, 2, 4]) == [[1], [2, 4], [0, 3]]
    assert Sharing(equal_beyond=2).groups([1, 4, 3, 2, 4]) == [[1, 4], [2], [0, 3]]


class Coupled(torch.nn.Module):
    """A layer that scales its input by the greatest number in the batch and rounds it, as float8 by tensors does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.quantization_scheme = SimpleNamespace(
            input_activations=SimpleNamespace(dynamic=True, strategy=SimpleNamespace(value="tensor"))
        )

    def forward(self, x):
        scale = x.abs().amax() / 7
        return self.inner((x / scale).round() * scale)


def coupled():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp = Coupled(layer.mlp)
    return model


def test_rows_that_quantization_couples_run_alone(texts):
    model = coupled()
    rows = [ids_of(text) for text in texts]
    one_by_one = profile(model, [torch.tensor([row]) for row in rows])
    found = profile(model, texts, tokenizer=ascii_tokenizer(), seq_len=24, batch_tokens=4096)
    for metric in METRICS:
        a, b = found.results()[metric]["mean"], one_by_one.results()[metric]["mean"]
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    with memory_for(model.model.layers[1].mlp, 100), pytest.raises(ForwardError, match="cannot be halved"):
        profile(model, torch.ones(8, 24, dtype=torch.long))


@pytest.mark.parametrize("granularity", ["PerTensor", "PerRow"])
def test_torchao_and_bitsandbytes_say_how_they_scale(granularity):
    model = tiny_llama()
    kind = type(granularity, (), {})
    linear = model.model.layers[0].mlp.up_proj
    linear.weight.act_quant_kwargs = SimpleNamespace(granularity=kind())
    assert (sharing_of(model).alone is not None) == (granularity == "PerTensor")


@pytest.mark.parametrize(("threshold", "alone"), [(6.0, True), (0.0, False)])
def test_outliers_of_int8_are_of_the_whole_batch(threshold, alone):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = LlamaForCausalLM(llama({"rope_type": "default", "rope_theta": 1e4}))
    inner = model.model.layers[0].mlp
    inner.up_proj = bitsandbytes.nn.Linear8bitLt(
        32, 48, bias=False, has_fp16_weights=False, threshold=threshold
    )
    assert (sharing_of(model).alone is not None) == alone


def test_attention_that_a_short_batch_changes_for_good_is_refused():
    from transformers import BigBirdConfig, BigBirdForCausalLM

    config = BigBirdConfig(**{**SMALL, "attention_type": "block_sparse"}, max_position_embeddings=64)
    with pytest.raises(OptionError, match="set_attention_type"):
        profile(BigBirdForCausalLM(config), ["abc"], tokenizer=ascii_tokenizer())
