"""Weights that are not plainly dense: each form against the weight that its format defines."""

import warnings

import numpy as np
import pytest
import torch
from oracle import assert_results, captured_inputs
from tiny_models import tokens
from torch import nn
from weight_forms import (
    FORMS,
    HIDDEN,
    WIDTH,
    Bnb4,
    Fp8,
    Quanto,
    dense_weights,
    integration,
    linear,
    model_with,
    projections,
)

import fastheads
from fastheads.basic import HookManager as BasicHookManager

CHANGES = [(name, change) for name, form in FORMS.items() for change in form.changes]
BEHIND = [(name, change) for name, form in FORMS.items() for change in form.behind]


@pytest.fixture(autouse=True)
def quiet():
    """What the packages warn of on import and on their first use; and BitNet's helpers are compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compiler.set_stance("force_eager")
        try:
            yield
        finally:
            torch.compiler.set_stance("default")


@pytest.fixture
def made(request, monkeypatch):
    """A model of the form, and the form."""

    def make(name):
        form = FORMS[name]
        np.random.seed(0)
        model = model_with(form.make)
        if getattr(form, "stand_in", None):
            form.stand_in(monkeypatch)
        return model, form

    return make


def manager_of(model, backend):
    if backend == "basic":
        return BasicHookManager(model, "all")
    return fastheads.HookManager(model, "all", backend=backend)


@pytest.mark.parametrize("backend", ["factored", "einsum", "basic"])
@pytest.mark.parametrize("name", FORMS)
def test_the_weight_is_the_one_that_the_format_defines(made, name, backend):
    model, form = made(name)
    sites = fastheads.find_sites(model)
    weights = dense_weights(model, form)
    kinds = [type(p) for p in projections(model)]
    with (
        torch.no_grad(),
        captured_inputs(projections(model)) as inputs,
        manager_of(model, backend) as hooks,
    ):
        for seed in range(3):
            model(input_ids=tokens(2, 9, seed=seed))
        assert_results(hooks.get_results(), sites, inputs, [None] * 3, "all", 1e-5, weights=weights)
    assert [type(p) for p in projections(model)] == kinds


@pytest.mark.parametrize("name", FORMS)
def test_profiling_does_not_change_what_the_model_says(made, name):
    model, plain = made(name)[0], made(name)[0]
    with torch.no_grad():
        with fastheads.HookManager(model):
            profiled = [model(input_ids=tokens(2, 9, seed=s)).logits for s in range(2)]
        for seed, logits in enumerate(profiled):
            assert torch.equal(plain(input_ids=tokens(2, 9, seed=seed)).logits, logits)


def changed_between_forwards(model, form, change, backend="factored"):
    """Asserts that each of two forwards was measured with the weight that it ran with."""
    sites = fastheads.find_sites(model)
    wanted, got = [], fastheads.HookManager(model, "token", backend=backend)
    with torch.no_grad(), got as hooks:
        for step in range(2):
            if step:
                change(projections(model)[1])
            weights = dense_weights(model, form)
            with captured_inputs(projections(model)) as inputs:
                model(input_ids=tokens(2, 9, seed=step))
            for row, site in enumerate(sites):
                x = inputs[row][0].view(-1, site.num_heads, site.head_dim)
                w = weights[row].view(HIDDEN, site.num_heads, site.head_dim)
                wanted.append((row, torch.einsum("ohd,nhd->nho", w, x).norm(dim=-1)))
        results = hooks.get_results()["head_residual_contribution_norm"]
    for row in range(len(sites)):
        values = torch.cat([v for r, v in wanted if r == row])
        np.testing.assert_allclose(results["mean"][row], values.mean(0), rtol=1e-5)
        np.testing.assert_allclose(results["max"][row], values.amax(0), rtol=1e-5)


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_an_ordinary_change_gives_the_right_number(made, name, change):
    model, form = made(name)
    changed_between_forwards(model, form, form.changes[change])


@pytest.mark.parametrize(("name", "change"), BEHIND)
def test_a_change_behind_autograds_back_raises(made, name, change):
    model, form = made(name)
    with pytest.raises(fastheads.StaleFactorError, match=r"layers\.1\.self_attn\.o_proj"), torch.no_grad():
        with fastheads.HookManager(model) as hooks:
            for _ in range(2):  # the second: bitsandbytes repacks its weight in the first
                model(input_ids=tokens(2, 9))
            form.behind[change](projections(model)[1])
            hooks.get_results()


# ---------------------------------------------------------------- what runs changes, or makes no one weight


def test_a_weight_that_is_quantized_while_hooks_are_on_it():
    """By quanto: the weight that acts is quantized all along."""
    form = Quanto("qint8")
    quanto = pytest.importorskip("optimum.quanto", reason="quanto is not installed")
    model = model_with(lambda _: quanto.QLinear.from_module(linear(), weights="qint8"))
    frozen = model_with(form.make)
    weights = dense_weights(frozen, form)
    sites = fastheads.find_sites(model)
    with (
        torch.no_grad(),
        captured_inputs(projections(model)) as inputs,
        fastheads.HookManager(model, "all") as hooks,
    ):
        model(input_ids=tokens(2, 9))
        for module in projections(model):
            module.freeze()
        model(input_ids=tokens(2, 9, seed=1))
        assert_results(hooks.get_results(), sites, inputs, [None] * 2, "all", 1e-5, weights=weights)


def test_torchao_quantizes_a_plain_weight_while_hooks_are_on_it():
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    form = FORMS["torchao int8"]
    changed_between_forwards(
        model_with(linear), form, lambda module: torchao.quantize_(module, form.configured(torchao))
    )


@pytest.mark.parametrize("name", ["gemma int4", "torchao int8", "bitsandbytes nf4", "bitsandbytes int8"])
def test_compiled_models(made, name):
    model, form = made(name)
    torch.compiler.set_stance("default")
    sites, weights = fastheads.find_sites(model), dense_weights(model, form)
    with torch.no_grad(), captured_inputs(projections(model)) as inputs:
        model(input_ids=tokens(2, 9))
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), fastheads.HookManager(compiled, "all") as hooks:
        for _ in range(2):
            compiled(input_ids=tokens(2, 9))
        twice = [captured * 2 for captured in inputs]
        assert_results(hooks.get_results(), sites, twice, [None] * 2, "all", 1e-4, weights=weights)


@pytest.mark.parametrize("manager", [fastheads.HookManager, BasicHookManager])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_keeps_its_layout_for_inputs_with_gradients(nested, manager):
    """Then the scales act as they are, not rounded to bfloat16."""
    model, form = model_with(Bnb4("nf4", nested).make), Bnb4("nf4", nested)
    for module in projections(model):
        module.train()
    weights = dense_weights(model, form)  # unrounded
    model.eval()
    sites = fastheads.find_sites(model)
    with (
        captured_inputs(projections(model)) as inputs,
        manager(model, "all") as hooks,
    ):
        for seed in range(2):
            model(input_ids=tokens(2, 9, seed=seed))
        assert_results(hooks.get_results(), sites, inputs, [None] * 2, "all", 1e-5, weights=weights)


def test_bitsandbytes_repacks_in_a_forward_where_that_was_not_to_be_expected():
    """Gradients are on, and nothing has any: the forward in which it shows does not count, and says so."""
    form = Bnb4("nf4", False)
    model = model_with(form.make).requires_grad_(False)
    if not projections(model)[0].support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX512-BF16, so nothing is repacked")
    weights, sites = dense_weights(model, form), fastheads.find_sites(model)
    with fastheads.HookManager(model, "all") as hooks:
        with pytest.raises(fastheads.StaleFactorError, match="during a forward"):
            model(input_ids=tokens(2, 9))
        with captured_inputs(projections(model)) as inputs:
            model(input_ids=tokens(2, 9))
        assert_results(hooks.get_results(), sites, inputs, [None], "all", 1e-5, weights=weights)


def int8_with_float_weights(_layer):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return bnb.nn.Linear8bitLt(WIDTH, HIDDEN, bias=False)


def unquantized_4bit(_layer):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    return bnb.nn.Linear4bit(WIDTH, HIDDEN, bias=False)


def quanto_with_activations(_layer):
    quanto = pytest.importorskip("optimum.quanto", reason="quanto is not installed")
    return quanto.QLinear.from_module(linear(), weights="qint8", activations="qint8")


def packed_fp4(_layer):
    module = Fp8().make(0)
    module.weight = nn.Parameter(torch.zeros(HIDDEN, WIDTH // 2, dtype=torch.int8), requires_grad=False)
    return module


def normalizing_bitnet(_layer):
    from transformers.integrations.bitnet import BitLinear

    return BitLinear(WIDTH, HIDDEN, bias=False, dtype=torch.float32, use_rms_norm=True)


def normalizing_auto_bitnet(_layer):
    from transformers.integrations.bitnet import AutoBitLinear

    return AutoBitLinear(WIDTH, HIDDEN, bias=False, use_rms_norm=True)


def scaled_torchao(_layer):
    pytest.importorskip("torchao", reason="torchao is not installed")
    module = FORMS["torchao int8"].make(0)
    module.weight.act_pre_scale = torch.full((WIDTH,), 2.0)
    return module


def metal(_layer):
    return integration("metal_quantization").MetalLinear(WIDTH, HIDDEN)


def grouped_fp8(_layer):
    grouped = getattr(integration("finegrained_fp8"), "FP8GroupedLinear", None)
    if grouped is None:
        pytest.skip("not in this release of transformers")
    module = grouped.__new__(grouped)
    nn.Module.__init__(module)
    module.in_features = WIDTH
    return module


def packed_bits(_layer):
    """GPTQ's and AWQ's layers, and most others: some module of their own with packed integers."""

    class TorchQuantLinear(nn.Module):
        in_features = WIDTH

        def __init__(self):
            super().__init__()
            self.qweight = nn.Buffer(torch.zeros(WIDTH // 8, HIDDEN, dtype=torch.int32))

    return TorchQuantLinear()


def derived(_layer):
    """One that is known, and changed: its type is not in the table."""

    class Halved(integration("gemma_quant").QuantizedLinear):
        def forward(self, x):
            return super().forward(x) / 2

    return Halved(WIDTH, HIDDEN)


def patched(_layer):
    """As compressed-tensors does: the class says nothing of what runs."""
    module = linear()
    module.forward = lambda x: nn.functional.linear(x, module.weight.round())
    return module


def old_weight_norm(_layer):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(linear())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (int8_with_float_weights, "has_fp16_weights"),
        (unquantized_4bit, "not quantized yet"),
        (quanto_with_activations, "quantizes its input"),
        (packed_fp4, "dtype torch.int8"),
        (normalizing_bitnet, "normalizes its input"),
        (normalizing_auto_bitnet, "normalizes its input"),
        (scaled_torchao, "act_pre_scale"),
        (metal, "MetalLinear of transformers.integrations.metal_quantization"),
        (grouped_fp8, "is a FP8GroupedLinear"),
        (packed_bits, "is a TorchQuantLinear"),
        (derived, "is a Halved"),
        (patched, "forward of its own"),
        (old_weight_norm, "is no parameter"),
    ],
)
def test_what_cannot_be_read_with_certainty_is_refused_by_name(make, says):
    with pytest.raises(
        fastheads.UnsupportedWeightError, match=rf"^model\.layers\.0\.self_attn\.o_proj .*{says}"
    ) as error:
        fastheads.HookManager(model_with(make))
    assert "\n" not in str(error.value)
