"""Quantized checkpoints: loaded so that their weights can be had, or refused in one line."""

import json
import warnings

import pytest
import torch
from checkpoints import ascii_tokenizer, tiny_llama
from safetensors.torch import save_file

import fastheads
from fastheads.errors import LoadError
from fastheads.models.weights import dense_weight
from fastheads.run import loading

BLOCK = 16


@pytest.fixture(autouse=True)
def quiet():
    """What the packages warn of as they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def checkpoint(folder, quantized, change=lambda name, weight: {name: weight}):
    """A tiny Llama whose config says how it is quantized, and whose tensors are what `change` makes of them."""
    model = tiny_llama()
    model.config.save_pretrained(folder)
    ascii_tokenizer().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantized}))
    tensors = {}
    for name, weight in model.state_dict().items():
        tensors |= change(name, weight.contiguous()) if "_proj" in name else {name: weight.contiguous()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors


def load(folder):
    return loading.load_model(loading.find_model(str(folder)))


def profiled(model):
    with torch.no_grad(), fastheads.HookManager(model, "all") as hooks:
        model(input_ids=torch.arange(1, 11).view(1, 10))
        return hooks.get_results()["head_residual_contribution_norm"]["mean"]


def in_fp8(name, weight):
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
    return {name: codes, f"{name}_scale_inv": scale}


def in_int8(name, weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}


def dense(tensors, name):
    codes = tensors[name].double()
    if f"{name}_scale_inv" in tensors:
        scale = tensors[f"{name}_scale_inv"].double()
        return codes * scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return codes * tensors[f"{name}_scale"].double()


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
        }
    },
}


@pytest.mark.parametrize(
    ("quantized", "change", "package"),
    [
        pytest.param(FP8, in_fp8, "transformers", id="fp8"),
        pytest.param(INT8, in_int8, "compressed_tensors", id="compressed-tensors"),
    ],
)
def test_a_checkpoint_that_is_made_dense_on_a_cpu(quantized, change, package, tmp_path):
    pytest.importorskip(package, reason=f"{package} is not installed")
    tensors = checkpoint(tmp_path, quantized, change)
    model = load(tmp_path)
    for site in fastheads.find_sites(model):
        want = dense(tensors, f"{site.name}.weight")
        got = dense_weight(site).double()
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    assert profiled(model).isfinite().all()


def test_compressed_tensors_that_stay_compressed_are_refused(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from transformers import AutoModelForCausalLM

    checkpoint(tmp_path, INT8, in_int8)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(
        fastheads.UnsupportedWeightError, match=r"forward of its own .*quantized.*dequantize=True"
    ):
        fastheads.HookManager(model)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_of_bitsandbytes(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from weight_forms import Bnb4, Bnb8

    tiny_llama().save_pretrained(tmp_path / "dense")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if bits == 4 else {"load_in_8bit": True}
    AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=BitsAndBytesConfig(**options), device_map="cpu"
    ).save_pretrained(tmp_path / "quantized")
    model = load(tmp_path / "quantized")
    assert type(fastheads.find_sites(model)[0].module).__name__ == {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    form = Bnb4("nf4", nested=False) if bits == 4 else Bnb8()
    with torch.no_grad():
        for site in fastheads.find_sites(model):
            got = dense_weight(site).double()
            want = torch.from_numpy(form.dense(site.module)).view_as(got)
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    ("quantized", "says"),
    [
        ({"quant_method": "gone"}, "is quantized by 'gone', which transformers does not know: .*gptq"),
        ({"bits": 4}, "quant_method"),
    ],
)
def test_a_method_that_nobody_knows_is_refused(quantized, says, tmp_path):
    checkpoint(tmp_path, quantized)
    with pytest.raises(LoadError, match=says) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "package"),
    [("awq", "gptqmodel"), ("gptq", "optimum"), ("hqq", "hqq"), ("aqlm", "aqlm"), ("vptq", "vptq")],
)
def test_the_package_that_is_missing_is_named(method, package, tmp_path, monkeypatch):
    checkpoint(
        tmp_path,
        {"quant_method": method, "bits": 4, "group_size": 32, "quant_config": {}, "skip_modules": []},
    )
    monkeypatch.setattr("transformers.quantizers.quantizer_hqq.is_hqq_available", lambda: False)
    with pytest.raises(LoadError, match=f"(?i){package}") as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_that_the_checkpoint_lacks_are_not_made_up(tmp_path):
    lacking = "model.layers.1.self_attn.o_proj.weight"
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    tensors = {name: w.contiguous() for name, w in model.state_dict().items() if name != lacking}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LoadError, match=f"lacks 1 of the decoder's weights, such as {lacking}"):
        load(tmp_path)


def test_a_head_that_the_checkpoint_lacks_is_not_needed(tmp_path):
    model = tiny_llama()
    model.config.save_pretrained(tmp_path)
    tensors = {name: w.contiguous() for name, w in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert profiled(load(tmp_path)).isfinite().all()
