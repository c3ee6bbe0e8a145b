"""The dense W of an output projection, and what tells that it has changed."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastheads.sites import HeadSite

# How the weight of a linear layer lies, by the function that applies it: True for [in, out], False for [out, in].
TRANSPOSED = {
    "torch.nn.modules.linear.Linear.forward": False,
    "transformers.models.falcon.modeling_falcon.FalconLinear.forward": False,
    "transformers.pytorch_utils.Conv1D.forward": True,
}

DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class UnsupportedWeightError(ValueError):
    """The projection's dense weight cannot be had with certainty."""


def dense_weight(site: HeadSite) -> Tensor:
    """The weight `[out_features, num_heads * head_dim]` with which the projection now acts on its input.

    Raises UnsupportedWeightError for a projection whose weight is not plainly dense (quantised, sharded, offloaded …).
    """
    module = site.module
    base = getattr(module, "base_layer", None)
    weight = _plain_weight(site, module if base is None else base)
    transposed = _is_transposed(module if base is None else base)
    if base is None:
        return weight.T if transposed else weight
    acting = _acting_adapters(site)
    if acting and weight.dtype != torch.float64:
        weight = weight.float()  # the layer adds the adapter's output unrounded: so must this
    for name, sign in acting:
        # A delta lies as the weight does, and PEFT takes care of it.
        weight = weight + sign * module.get_delta_weight(name).to(weight.dtype)  # type: ignore[operator]
    return weight.T if transposed else weight


def _is_transposed(module: nn.Module) -> bool | None:
    """Whether the weight of this kind of layer lies `[in, out]`; None where the kind is not known."""
    forward = type(module).forward
    return TRANSPOSED.get(f"{forward.__module__}.{forward.__qualname__}")


def _plain_weight(site: HeadSite, module: nn.Module) -> Tensor:
    """The layer's own weight, as it lies."""
    if _is_transposed(module) is None:
        raise UnsupportedWeightError(
            f"{site.name} is a {type(module).__name__}; only torch.nn.Linear and its kin are supported"
        )
    weight: Any = module.weight
    if type(weight) not in (Tensor, nn.Parameter):
        raise UnsupportedWeightError(
            f"{site.name} has a weight of type {type(weight).__name__}; only plain tensors are supported"
        )
    if weight.dtype not in DENSE_DTYPES:
        raise UnsupportedWeightError(
            f"{site.name} has a weight of dtype {weight.dtype}; only floating point is supported"
        )
    if weight.device.type == "meta":
        raise UnsupportedWeightError(f"{site.name} has its weight on the meta device (offloaded?)")
    return weight.detach()


def _acting_adapters(site: HeadSite) -> list[tuple[str, int]]:
    """The LoRA adapters that act beside the base weight: added (1), or taken off (-1) where they are merged into it but disabled,
    for the layer unmerges them as soon as it runs.
    """
    module: Any = site.module
    if not hasattr(module, "lora_A") or not hasattr(module, "lora_dropout"):
        raise UnsupportedWeightError(
            f"{site.name} is a {type(module).__name__}; of adapters only PEFT's LoRA is supported"
        )
    if not all(isinstance(part, nn.Module) for part in module.lora_A.values()):
        raise UnsupportedWeightError(f"{site.name}: only plain LoRA is supported, not AdaLoRA")
    if module.disable_adapters:
        return [(name, -1) for name in module.merged_adapters]
    acting = [n for n in module.active_adapters if n in module.lora_A and n not in module.merged_adapters]
    variants = getattr(module, "lora_variant", {})  # DoRA and its like are not base + delta
    biases = getattr(module, "lora_bias", {})
    for name in acting:
        if name in variants or biases.get(name):
            raise UnsupportedWeightError(
                f"{site.name}: adapter {name!r} is more than plain LoRA (DoRA, lora_bias …)"
            )
        if module.training and getattr(module.lora_dropout[name], "p", 0.0) > 0:
            raise UnsupportedWeightError(
                f"{site.name}: adapter {name!r} drops inputs at random in training, so no one weight acts: model.eval()"
            )
    return [(name, 1) for name in acting]


def unmerges_when_run(site: HeadSite) -> bool:
    """Whether the layer itself will move its weight: it takes disabled adapters off the weight when it runs."""
    module: Any = site.module
    return bool(getattr(module, "disable_adapters", False) and getattr(module, "merged_adapters", ()))


def weight_key(site: HeadSite) -> tuple[Any, ...]:
    """What moves when a weight is replaced or changed in place the ordinary way: storage, versions, adapters' state.

    Reads no values, so it costs no wait; `weight.data.mul_()` and its like move none of it (see `checksum`).
    """
    module: Any = site.module
    weight = module._parameters.get("weight")  # module.weight takes as long as all the rest
    if weight is not None:
        return _tensor_key(weight)
    base = module._modules.get("base_layer")
    if base is None:
        return _tensor_key(module.weight)
    adapters = []
    for name in module.active_adapters:
        if name in getattr(module, "lora_A", {}):
            low_rank = (_tensor_key(module.lora_A[name].weight), _tensor_key(module.lora_B[name].weight))
            adapters.append((name, module.scaling[name], *low_rank))
    return (
        _tensor_key(base.weight),
        module.disable_adapters,
        module.training,  # with dropout no one weight acts
        tuple(module.merged_adapters),
        tuple(adapters),
    )


def _tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return (tensor.untyped_storage()._cdata, tensor.data_ptr(), version, tensor.dtype)


def hold_key(site: HeadSite) -> list[StorageWeakRef]:
    """What keeps the storages in `weight_key` from giving their addresses to others, though not their memory."""
    return [StorageWeakRef(p.untyped_storage()) for p in site.module.parameters()]


def checksum(weight: Tensor) -> Tensor:
    """Int64 scalar over the bits of `weight` `[O, I]`: sums over rows and over columns, each weighted by position."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = weight.view(integer)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    for dim in (0, 1):
        sums = bits.sum(dim=dim, dtype=torch.int64)
        odd = torch.arange(1, 2 * len(sums), 2, device=weight.device)
        total += ((sums ^ (sums >> 29)) * odd * (0x9E3779B97F4A7C1 + 2 * dim)).sum()  # wraps, as it should
    return total
