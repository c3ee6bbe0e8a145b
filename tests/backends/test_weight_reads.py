"""How often attaching reads the weights, by a format whose reading is observed: dequantizing one can take seconds."""

import weakref

import pytest
import torch
from oracle import equal_results
from tiny_models import build, tokens
from torch import nn

import fastheads
from fastheads.models.weight_formats import MODULES, WeightFormat, qualified_name


class Packed(nn.Module):
    """A linear layer with its weight in bytes."""

    def __init__(self, plain):
        super().__init__()
        self.out_features, self.in_features = plain.weight.shape
        self.scale = plain.weight.detach().abs().max() / 127
        self.register_buffer("codes", (plain.weight.detach() / self.scale).round().to(torch.int8))

    def dense(self):
        return self.codes * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dense())


class Observed:
    """The format of Packed, which notes each reading."""

    def __init__(self):
        self.reads, self.keys, self.most_held = [], 0, 0
        self._given = []

    def read(self, module):
        self.most_held = max(self.most_held, sum(given() is not None for given in self._given))
        weight = module.dense()
        self.reads.append(module)
        self._given.append(weakref.ref(weight))
        return weight

    def parts(self, module):
        self.keys += 1
        return (module.codes, float(module.scale))


@pytest.fixture
def observed(monkeypatch):
    format_ = Observed()
    monkeypatch.setitem(MODULES, qualified_name(Packed), WeightFormat(format_.read, format_.parts))
    return format_


def packed_model(family):
    model = build(family)
    for layer in model.model.layers:
        layer.self_attn.o_proj = Packed(layer.self_attn.o_proj)
    return model


@pytest.mark.parametrize("backend", ["factored", "loop", "einsum"])
@pytest.mark.parametrize(("family", "kv_groups"), [("llama", False), ("llama", True), ("gemma2", True)])
def test_attaching_reads_each_weight_once_and_holds_one_at_a_time(observed, family, kv_groups, backend):
    model = packed_model(family)
    with fastheads.HookManager(model, backend=backend, kv_groups=kv_groups) as hooks:
        assert observed.reads == [site.module for site in hooks.sites]
    assert observed.most_held == 0  # when the next is read


def test_several_metrics_look_at_a_weights_version_as_often_as_one(observed):
    def looks(family, **options):
        observed.keys = 0
        with fastheads.HookManager(packed_model(family), **options):
            return observed.keys

    assert looks("gemma2", kv_groups=True) == looks("llama")


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_is_measured_is_that_of_the_dense_weight(observed, family):
    packed, plain = packed_model(family), build(family)
    for layer, of_plain in zip(packed.model.layers, plain.model.layers, strict=True):
        of_plain.self_attn.o_proj.weight.data.copy_(layer.self_attn.o_proj.dense())
    results = []
    for model in (packed, plain):
        with fastheads.HookManager(model, "token", kv_groups=True) as hooks, torch.no_grad():
            model(input_ids=tokens(2, 7))
            results.append(hooks.get_results())
    assert equal_results(*results)
    for metric in ("kv_group_residual_contribution_norm", "head_residual_update_norm"):
        torch.testing.assert_close(*(result[metric]["mean"] for result in results), equal_nan=True)


def test_a_weight_that_changes_is_followed_by_every_metric(observed):
    def means(change):
        model = packed_model("gemma2")
        first = model.model.layers[0].self_attn.o_proj
        with fastheads.HookManager(model, "token", kv_groups=True) as hooks, torch.no_grad():
            if change:
                first.scale = first.scale * 2
            model(input_ids=tokens(2, 7))
            results = hooks.get_results()
        kinds = ("head_residual_contribution", "kv_group_residual_contribution", "head_residual_update")
        return [results[f"{kind}_norm"]["mean"][0] for kind in kinds]

    before, after = means(change=False), means(change=True)
    torch.testing.assert_close(after[:2], [2 * mean for mean in before[:2]], equal_nan=True)
    torch.testing.assert_close(
        after[2], before[2], rtol=1e-2, atol=0.0
    )  # the norm takes it back, but for its epsilon
