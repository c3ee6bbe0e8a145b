"""Read weights that are not plain tensors (quantized, packed): tables by the qualified names of module and tensor types.

Names rather than classes, so that nothing is imported that the model does not use. Types that are not in the tables are refused,
since their `weight` may be packed bits, or only part of the weight.

A weight is what its format defines, scales times codes; rounding of a kernel's input or output is not part of it.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Attribute of a hook's `forward` that holds the original function.
PLAIN_ATTRIBUTE = "_fastheads_plain"


def plain_function(forward: Any) -> Any:
    """Return the plain function of a `forward`, unbound and without the hooks of this library."""
    forward = getattr(forward, "__func__", forward)
    return getattr(forward, PLAIN_ATTRIBUTE, forward)


class NotDenseError(Exception):
    """The weight cannot be read; the message continues a sentence that begins with the projection's name."""


# All that a weight depends on: tensors, and values that can be compared.
Parts = tuple[Any, ...]


@dataclass(frozen=True)
class WeightFormat:
    """Functions that read the weight of one type of projection.

    `read` returns the dense weight of a module (or of a tensor, in TENSORS), `[out_features, in_features]`, or `[in_features,
    out_features]` if `transposed`; `parts` returns everything that the weight depends on. Both may raise NotDenseError.
    """

    read: Callable[[Any], Tensor]
    parts: Callable[[Any], Parts]
    transposed: bool = False


def qualified_name(kind: type) -> str:
    """Return the key of a type in the tables, such as `torch.nn.modules.linear.Linear`."""
    return f"{kind.__module__}.{kind.__qualname__}"


# ---------------------------------------------------------------- bitsandbytes


def _read_4bit(module: Any) -> Tensor:
    state = _quant_state(module)
    absmax, code = state.absmax, state.code
    if state.nested:
        inner = state.state2
        absmax = _by_blocks(inner.code[absmax.long().flatten()], inner.absmax, inner.blocksize) + state.offset
    absmax = absmax.float()
    packed = module.weight.detach().view(torch.uint8)
    if getattr(state, "packing_format_for_cpu", False):
        rows, columns = state.shape
        levels = _from_cpu_layout(packed, rows, columns)
        absmax = absmax.T.flatten()
    else:
        packed = packed.flatten()
        levels = torch.stack([packed >> 4, packed & 0xF], dim=-1).flatten()
        if repacks_when_run(module):
            absmax = absmax.bfloat16().float()
    return _by_blocks(code.float()[levels.long()], absmax, state.blocksize).view(tuple(state.shape))


def _from_cpu_layout(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Unpack the 4-bit codes `[rows * columns]` of a weight that bitsandbytes has repacked for its CPU kernels.

    The layout is blocks of 32 rows by 2 columns: each of a block's 32 bytes holds a code of its first half in the lower four
    bits, and one of its second half in the upper four.
    """
    packed = packed.reshape(-1, 32)
    levels = torch.cat([packed & 0xF, packed >> 4], dim=-1)
    return levels.view(rows // 32, columns // 2, 32, 2).transpose(1, 2).flatten()


def _by_blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Multiply each block of `size` values by its scale; the last block may be shorter."""
    return values * scales.flatten().repeat_interleave(size)[: values.numel()]


def _quant_state(module: Any) -> Any:
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    state = getattr(module, "quant_state", None) if state is None else state
    if state is None or weight.device.type == "meta":
        raise NotDenseError("is not quantized yet, or offloaded")
    if state.quant_type not in ("nf4", "fp4") or len(state.shape) != 2:
        raise NotDenseError(f"has a weight quantized as {state.quant_type}")
    return state


def _parts_of_4bit(module: Any) -> Parts:
    state = _quant_state(module)
    parts = [module.weight, state.absmax, state.code, repacks_when_run(module)]
    if state.nested:
        parts += [state.state2.absmax, state.state2.code, state.offset]
    return tuple(parts)


def repacks_when_run(module: Any) -> bool:
    """True if a bitsandbytes 4-bit layer will repack its weight when it runs.

    It does so on CPUs with AVX512-BF16, in evaluation mode, for an input without gradient. That rounds the scales to bfloat16
    permanently, so the weight that counts is the rounded one.
    """
    state = getattr(module.weight, "quant_state", None)
    return bool(
        getattr(module, "support_avx512bf16_for_cpu", False)
        and not module.training
        and not torch.is_grad_enabled()
        and module.weight.device.type == "cpu"
        and not getattr(state, "packing_format_for_cpu", False)
    )


def _codes_and_scales(module: Any) -> tuple[Tensor, Tensor]:
    """Return the codes and scales of an LLM.int8() layer, which move from the weight to the module's state in the first run."""
    weight, state = module.weight, module.state
    if state.has_fp16_weights:
        raise NotDenseError("quantizes its weight again in each forward (has_fp16_weights)")
    codes, scales = (weight.CB, weight.SCB) if weight.CB is not None else (state.CB, state.SCB)
    if codes is None or scales is None or codes.device.type == "meta" or codes.dtype != torch.int8:
        raise NotDenseError("is not quantized yet, or offloaded")
    return codes, scales


def _read_8bit(module: Any) -> Tensor:
    codes, scales = _codes_and_scales(module)
    return codes.float() * (scales.float() / 127).unsqueeze(1)


# ---------------------------------------------------------------- transformers' own


def _read_fp8(module: Any) -> Tensor:
    weight, scale, block = module.weight.detach(), module.weight_scale_inv.detach(), module.block_size
    if weight.element_size() > 1:
        return weight
    if not weight.dtype.is_floating_point:
        raise NotDenseError(f"has a weight of dtype {weight.dtype} (packed FP4?)")
    scale = scale.float()
    if block is None:
        if scale.numel() != 1:
            raise NotDenseError(f"has scales {list(scale.shape)} and no block size")
        return weight.float() * scale
    rows, columns = weight.shape
    scale = scale.repeat_interleave(block[0], dim=0)[:rows].repeat_interleave(block[1], dim=1)[:, :columns]
    return weight.float() * scale


def _read_scaled_rows(module: Any) -> Tensor:
    """Multiply the codes by one scale for each row; the scales may have any shape."""
    return module.weight.detach().float() * module.weight_scale.detach().float().view(-1, 1)


def _read_gguf(module: Any) -> Tensor:
    from transformers.integrations.gguf.dequant import dequantize

    dense = dequantize(module.weight.detach(), module.ggml_type, torch.float32)
    dense = dense.reshape(module.out_features, module.in_features)
    if module.input_permutation is None:
        return dense
    return torch.zeros_like(dense).index_copy_(1, module.input_permutation, dense)


def _read_bitnet(module: Any) -> Tensor:
    if module.rms_norm is not None:
        raise NotDenseError("normalizes its input over all heads first")
    packed = module.weight.detach()
    ternary = torch.cat([(packed >> shift) & 3 for shift in (0, 2, 4, 6)]).float() - 1
    return ternary / module.weight_scale.detach().float()


def _read_auto_bitnet(module: Any) -> Tensor:
    if module.rms_norm is not None:
        raise NotDenseError("normalizes its input over all heads first")
    weight = module.weight.detach()
    if not module.online_quant:
        return weight.float() * module.weight_scale.detach().float()
    scale = 1.0 / weight.float().abs().mean().clamp(min=1e-5)
    return ((weight.float() * scale).round().clamp(-1, 1) / scale).to(weight.dtype)


def _read_gemma(module: Any) -> Tensor:
    return module._dequantize_weights().detach()  # type: ignore[no-any-return]


# ---------------------------------------------------------------- quanto, HQQ


def _read_quanto(module: Any) -> Tensor:
    _refuse_quantized_input(module)
    weight = module.qweight
    if weight is None:
        return module.weight.detach()  # type: ignore[no-any-return]
    return weight.dequantize().detach()  # type: ignore[no-any-return]


def _parts_of_quanto(module: Any) -> Parts:
    _refuse_quantized_input(module)
    return (module.weight,)


def _refuse_quantized_input(module: Any) -> None:
    if module.activation_qtype is not None:
        raise NotDenseError("quantizes its input before a hook sees it")


def _parts_of_hqq(module: Any) -> Parts:
    if not module.ready:
        raise NotDenseError("is not quantized yet")
    return (module.W_q, *_values(module.meta))


def _values(meta: dict[str, Any]) -> Parts:
    values = (_values(v) if isinstance(v, dict) else v for v in meta.values())
    return tuple(v if isinstance(v, Tensor | tuple) else str(v) for v in values)


# ---------------------------------------------------------------- the tables


def _named(*names: str) -> Callable[[Any], Parts]:
    return lambda module: tuple(getattr(module, name) for name in names)


# Formats by the projection's type.
MODULES: dict[str, WeightFormat] = {
    "bitsandbytes.nn.modules.Linear4bit": WeightFormat(_read_4bit, _parts_of_4bit),
    "bitsandbytes.nn.modules.LinearNF4": WeightFormat(_read_4bit, _parts_of_4bit),
    "bitsandbytes.nn.modules.LinearFP4": WeightFormat(_read_4bit, _parts_of_4bit),
    "bitsandbytes.nn.modules.Linear8bitLt": WeightFormat(
        _read_8bit, lambda module: (module.weight, *_codes_and_scales(module))
    ),
    "transformers.integrations.finegrained_fp8.FP8Linear": WeightFormat(
        _read_fp8, _named("weight", "weight_scale_inv", "block_size")
    ),
    "transformers.integrations.fbgemm_fp8.FbgemmFp8Linear": WeightFormat(
        _read_scaled_rows, _named("weight", "weight_scale")
    ),
    "transformers.integrations.compressed_tensors.CompressedTensorsFP8Linear": WeightFormat(
        _read_scaled_rows, _named("weight", "weight_scale")
    ),
    "transformers.integrations.gguf.utils.GgufLinear": WeightFormat(
        _read_gguf, _named("weight", "input_permutation", "ggml_type")
    ),
    "transformers.integrations.bitnet.BitLinear": WeightFormat(
        _read_bitnet, _named("weight", "weight_scale")
    ),
    "transformers.integrations.bitnet.AutoBitLinear": WeightFormat(
        _read_auto_bitnet,
        lambda module: (module.weight, getattr(module, "weight_scale", None), module.online_quant),
    ),
    "transformers.integrations.gemma_quant.QuantizedLinear": WeightFormat(
        _read_gemma, _named("weight", "weight_scale", "num_bits")
    ),
    "optimum.quanto.nn.qlinear.QLinear": WeightFormat(_read_quanto, _parts_of_quanto),
    "hqq.core.quantize.HQQLinear": WeightFormat(lambda module: module.dequantize().detach(), _parts_of_hqq),
}


def _read_torchao(tensor: Any) -> Tensor:
    if getattr(tensor, "act_pre_scale", None) is not None:
        raise NotDenseError("scales its input before it multiplies (act_pre_scale)")
    return tensor.dequantize().detach()  # type: ignore[no-any-return]


_TORCHAO = WeightFormat(_read_torchao, lambda tensor: (tensor,))

# Formats by the weight's type, in a plain torch.nn.Linear. torchao's types carry the name of the package that exports them.
TENSORS: dict[str, WeightFormat] = {
    f"torchao.quantization.{name}": _TORCHAO
    for name in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor")
}


def leaves(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that hold the data: those inside a wrapper subclass (torchao, quanto), else the tensor itself."""
    if type(tensor) is nn.Parameter or not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [leaf for name in names for leaf in leaves(getattr(tensor, name))]


def is_dtensor(tensor: Tensor) -> bool:
    """True for a DTensor; does not import torch.distributed."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


# The `forward` functions that multiply by `weight` and add the bias; True if the weight is stored [in, out].
LINEAR_FORWARDS = {
    "torch.nn.modules.linear.Linear.forward": False,
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward": False,
    "transformers.pytorch_utils.Conv1D.forward": True,
}


def _forward(module: nn.Module) -> str:
    forward = plain_function(type(module).forward)
    return f"{forward.__module__}.{forward.__qualname__}"


def plain_forward(module: nn.Module) -> bool:
    """True if the module multiplies by its `weight` and adds its bias, as torch.nn.Linear does."""
    return _forward(module) in LINEAR_FORWARDS


def is_transposed(module: nn.Module) -> bool:
    """True if such a module's weight is stored [in, out]."""
    return LINEAR_FORWARDS.get(_forward(module), False)
