"""The fingerprint of weights: the same for the same weights wherever they lie, another for others."""

import copy
import json

import accelerate
import pytest
import torch
from tiny_models import build, tokens
from torch import nn

import fastheads
from fastheads.fingerprint import ROW, fingerprint


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def found(model):
    return fingerprint(model)


def test_it_is_json_and_the_same_for_a_copy_and_through_a_file(model, found, tmp_path):
    assert json.loads(json.dumps(found)) == found
    assert (found["dtypes"], found["unseen"]) == (["float32"], 0)
    assert found["tensors"] == len(model.state_dict())
    assert fingerprint(copy.deepcopy(model)) == found
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == found


@pytest.mark.parametrize("name", [name for name, _ in build().named_parameters()])
def test_a_change_of_any_parameter_shows(model, found, name):
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter(name).mul_(1 + 2**-20)
    other = fingerprint(changed)
    assert other["sha256"] != found["sha256"]
    assert other["layout"] == found["layout"]


def test_another_seed_has_the_same_layout_and_another_dtype_has_not(found):
    other, half = fingerprint(build(seed=1)), fingerprint(build(dtype=torch.bfloat16))
    assert other["layout"] == found["layout"] != half["layout"]
    assert len({other["sha256"], found["sha256"], half["sha256"]}) == 3
    assert half["dtypes"] == ["bfloat16"]


def test_samples_reach_the_end_of_a_tensor():
    layer = nn.Linear(ROW + 1, ROW - 1, bias=False)
    before = fingerprint(layer)
    with torch.no_grad():
        layer.weight[-1] += 1
    assert fingerprint(layer) != before


def test_how_a_tensor_lies_in_memory_does_not_matter():
    layer, turned = nn.Linear(70, 30), nn.Linear(70, 30)
    turned.load_state_dict(layer.state_dict())
    turned.weight = nn.Parameter(layer.weight.detach().T.contiguous().T)
    assert not turned.weight.is_contiguous()
    assert fingerprint(turned) == fingerprint(layer)


def test_buffers_count_where_a_checkpoint_holds_them():
    def layer(held, passing):
        module = nn.Linear(2, 2)
        nn.init.ones_(module.weight)
        nn.init.ones_(module.bias)
        module.register_buffer("held", torch.tensor(held))
        module.register_buffer("passing", torch.tensor(passing), persistent=False)
        return fingerprint(module)

    assert layer(1, 1) == layer(1, 2) != layer(2, 2)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.complex128, torch.uint8]
)
def test_every_width_of_numbers_is_read(dtype):
    def of(value):
        module = nn.Module()
        module.register_buffer("x", torch.full((300, 3), value, dtype=torch.float32).to(dtype))
        return fingerprint(module)

    assert of(1.0) == of(1.0) != of(0.0)
    assert of(1.0)["unseen"] == 0


def test_weights_offloaded_to_memory_are_seen_and_those_on_meta_or_disk_are_not(model, found, tmp_path):
    assert fingerprint(accelerate.cpu_offload(copy.deepcopy(model), execution_device="cpu")) == found
    away = fingerprint(accelerate.disk_offload(copy.deepcopy(model), tmp_path, execution_device="cpu"))
    assert away["layout"] == found["layout"]
    assert away["unseen"] == found["tensors"]
    assert fingerprint(copy.deepcopy(model).to("meta")) == away


def test_wrapped_weights_are_read_inside(model):
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")

    def quantised(factor):
        copied = copy.deepcopy(model)
        with torch.no_grad():
            copied.model.layers[0].mlp.up_proj.weight.mul_(factor)  # of its int8 codes, none moves
        torchao.quantize_(copied, torchao.Int8WeightOnlyConfig())
        return fingerprint(copied)

    once, twice = quantised(1), quantised(2)
    assert once == quantised(1) != twice
    assert once["unseen"] == twice["unseen"] == 0


def test_a_profile_knows_the_weights_it_was_made_of(model, found):
    from fastheads.basic import HookManager as BasicHookManager

    changed = copy.deepcopy(model)
    for manager in (fastheads.HookManager, BasicHookManager):
        with manager(changed) as hooks, torch.inference_mode():
            changed(input_ids=tokens(1, 4))
            assert hooks.to_profile().metadata["weights"] == fingerprint(changed)
            changed.model.layers[0].mlp.up_proj.weight.data.mul_(2)
            hooks.reset()
            changed(input_ids=tokens(1, 4))
            assert hooks.to_profile().metadata["weights"] == fingerprint(changed) != found
