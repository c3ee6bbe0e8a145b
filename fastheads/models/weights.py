"""Read the dense weight of an output projection, and detect when it changes."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from fastheads.errors import UnsupportedWeightError
from fastheads.models import offload, sharding
from fastheads.models.computed_weights import format_of_computed, is_shadowed, isolated
from fastheads.models.sites import HeadSite
from fastheads.models.weight_formats import (
    MODULES,
    TENSORS,
    NotDenseError,
    Parts,
    WeightFormat,
    is_dtensor,
    is_transposed,
    leaves,
    plain_forward,
    plain_function,
    qualified_name,
    repacks_when_run,
)

__all__ = [
    "checksum",
    "dense_weight",
    "hold",
    "hold_key",
    "is_plain",
    "key_reader",
    "moves_when_run",
]

DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# PEFT's LoRA layers whose base layer can be read; all compute base + scaling · B A.
LORA = frozenset(
    f"peft.tuners.lora.{name}"
    for name in (
        "layer.Linear",
        "bnb.Linear4bit",
        "bnb.Linear8bitLt",
        "torchao.TorchaoLoraLinear",
        "hqq.HqqLoraLinear",
    )
)


def dense_weight(site: HeadSite) -> Tensor:
    """Return the weight `[out_features, num_heads * head_dim]` that the projection now multiplies its input by.

    Quantized weights are dequantized, offloaded ones fetched to their execution device, and unmerged LoRA is added. For a
    tensor-parallel weight pass a site that counts this rank's heads; the result is this rank's columns.

    Raises UnsupportedWeightError, naming the site, if the projection's type is unknown, or its weight is sharded in another way,
    on the meta device, or no fixed matrix.
    """
    try:
        weight = _read(site.module)
        if weight.device.type == "meta":
            raise NotDenseError(
                "has its weight on the meta device: not loaded yet, or offloaded in a way that is not known"
            )
        if weight.dtype not in DENSE_DTYPES:
            raise NotDenseError(f"has a weight of dtype {weight.dtype}; only floating point is supported")
        width = site.num_heads * site.head_dim
        if weight.dim() != 2 or weight.shape[1] != width:
            raise NotDenseError(
                f"has a weight {list(weight.shape)} where [out_features, {width}] was expected (sharded?)"
            )
    except NotDenseError as error:
        raise UnsupportedWeightError(f"{site.name} {error}") from None
    return weight


def is_plain(site: HeadSite) -> bool:
    """True if the projection's weight is simply its parameter `weight`."""
    module = site.module
    return (
        plain_forward(module)
        and type(module._parameters.get("weight")) is nn.Parameter
        and not is_shadowed(module)
        and offload.source(module) is None
    )


def key_reader(site: HeadSite) -> Callable[[], Parts]:
    """Return a function that returns the weight's version key: storages, versions, scales, the adapters' state.

    The key changes when the weight is replaced or changed in place, but not by `weight.data.mul_()` and the like (see
    `checksum`). Once it has changed, make a new function, since the weight may have another format. Reads no values, so it never
    waits for the device.
    """
    module = site.module
    if not is_plain(site):
        parts = _parts_reader(module)

        def read() -> Parts:
            with (
                torch._C.DisableTorchFunctionSubclass()
            ):  # else addresses of quantized tensors take microseconds each
                try:
                    return _key(parts())
                except (NotDenseError, NotImplementedError):
                    return (None,)  # a changed key: `dense_weight` then raises the error

        return read

    def plain() -> Parts:
        weight = module._parameters.get("weight")  # module.weight would take as long as all the rest
        if weight is None:
            return (None,)
        # As _tensor_key, inlined: this runs for each projection in each forward.
        version = None if weight.is_inference() else weight._version
        try:
            return (weight.untyped_storage()._cdata, weight.data_ptr(), version, weight.dtype)
        except NotImplementedError:
            return (None,)  # it became sparse

    return plain


def hold_key(site: HeadSite) -> list[StorageWeakRef]:
    """Weak references that pin the addresses of the key's storages against reuse, without keeping their memory."""
    return hold(_tensors(_parts_reader(site.module)()))


def hold(tensors: Iterable[Tensor]) -> list[StorageWeakRef]:
    """As `hold_key`, for any tensors."""
    return [StorageWeakRef(t.untyped_storage()) for t in tensors]


def moves_when_run(site: HeadSite) -> bool:
    """True if the layer will change its weight when it runs; `dense_weight` already returns the weight after that.

    PEFT unmerges disabled adapters when it runs; bitsandbytes repacks 4-bit weights on some CPUs.
    """
    module: Any = site.module
    if getattr(module, "disable_adapters", False) and getattr(module, "merged_adapters", ()):
        return True
    base = module._modules.get("base_layer", module)
    return hasattr(base, "support_avx512bf16_for_cpu") and repacks_when_run(base)


def checksum(weight: Tensor) -> Tensor:
    """Checksum of the bits of `weight` `[O, I]`, int64 scalar: sums over rows and over columns, each weighted by position."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[weight.element_size()]
    bits = weight.view(integer)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    # For 64-bit types also sum the upper halves: the sign bits of an even number of rows would cancel.
    for place, part in enumerate([bits] if weight.element_size() < 8 else [bits, bits >> 32]):
        for dim in (0, 1):
            sums = part.sum(dim=dim, dtype=torch.int64)
            odd = torch.arange(1, 2 * len(sums), 2, device=weight.device)
            total += (
                (sums ^ (sums >> 29)) * odd * (0x9E3779B97F4A7C1 + 2 * (dim + 2 * place))
            ).sum()  # wraps around, as intended
    return total


# ---------------------------------------------------------------- one projection


def _read(module: nn.Module) -> Tensor:
    base = module._modules.get("base_layer")
    if base is not None:
        return _read_adapted(module, base)
    weight_format = _format(module)
    weight = weight_format.read(module)
    return weight.T if weight_format.transposed else weight


def _parts_reader(module: nn.Module) -> Callable[[], Parts]:
    """Return a function that returns all that the weight depends on; valid while the weight keeps its format."""
    base = module._modules.get("base_layer")
    if base is None:
        weight_format = _format(module)
        return lambda: weight_format.parts(module)
    parts = _parts_reader(base)
    return lambda: (module._modules.get("base_layer") is base, *parts(), *_parts_of_adapters(module))


def _format(module: nn.Module) -> WeightFormat:
    """Return the weight format of a projection without adapters."""
    weight_format = _format_ignoring_transpose(module)
    return replace(weight_format, transposed=True) if is_transposed(module) else weight_format


def _format_ignoring_transpose(module: nn.Module) -> WeightFormat:
    _check_own_forward(module)
    weight_format = MODULES.get(qualified_name(type(module)))
    if weight_format is not None:
        return weight_format
    if not plain_forward(module):
        kind = type(module)
        raise NotDenseError(
            f"is a {kind.__name__} of {kind.__module__}, whose weight cannot be read with certainty: "
            "only torch.nn.Linear and the formats listed under Weights in the README are supported"
        )
    weight = module._parameters.get("weight")
    if weight is None or is_shadowed(module):
        return format_of_computed(module)
    if offload.source(module) is not None:
        return OFFLOADED
    if is_dtensor(weight):
        sharding.check_layout(module)
        return LOCAL
    if weight.layout is not torch.strided:
        raise NotDenseError(
            f"has a weight of layout {weight.layout}, which is not read: make it dense, as with "
            "module.weight = torch.nn.Parameter(module.weight.to_dense())"
        )
    if type(weight) is nn.Parameter or type(weight) is Tensor:
        return PLAIN
    weight_format = TENSORS.get(qualified_name(type(weight)))
    if weight_format is None:
        named = f"{type(weight).__name__} of {type(weight).__module__}"
        raise NotDenseError(
            f"has a weight of type {named}; only plain tensors and the formats listed under Weights in the README are supported"
        )
    return WeightFormat(lambda m: weight_format.read(m.weight), lambda m: weight_format.parts(m.weight))


def _check_own_forward(module: nn.Module) -> None:
    """Raise NotDenseError for an instance `forward`, which may do anything, unless it is one of accelerate's or transformers'."""
    own = vars(module).get("forward")
    if own is None or plain_function(own) is plain_function(type(module).forward):
        return  # accelerate leaves the class's forward behind as an attribute
    if sharding.is_rowwise(module):
        return
    if not offload.only_aligns_devices(module):
        code = getattr(
            getattr(own, "__func__", own), "__code__", None
        )  # __name__ may be that of a wrapped function
        name = type(own).__name__ if code is None else code.co_qualname
        hint = ": load it with dequantize=True" if hasattr(module, "quantization_scheme") else ""
        if type(own).__module__.startswith("nnsight."):
            hint = ": nnsight put it there; profile a model that is loaded anew"
        raise NotDenseError(f"runs a forward of its own ({name}), which may be more than its weight{hint}")


def _read_plain(module: nn.Module) -> Tensor:
    weight: Tensor = module._parameters["weight"]  # type: ignore[assignment]
    return weight.detach()


def _read_local(module: nn.Module) -> Tensor:
    return module._parameters["weight"].to_local().detach()  # type: ignore[union-attr,operator,no-any-return]


def _parts_of_local(module: nn.Module) -> Parts:
    weight = module._parameters["weight"]
    local = getattr(weight, "_local_tensor", None)
    if weight is None or local is None:
        return (None,)
    # A change in place moves only the DTensor's version, not the local tensor's.
    return (local, None if weight.is_inference() else weight._version)


def _read_offloaded(module: nn.Module) -> Tensor:
    found = offload.source(module)
    assert found is not None
    return found.fetch()


def _parts_of_offloaded(module: nn.Module) -> Parts:
    found = offload.source(module)
    return (None,) if found is None else found.parts()


PLAIN = WeightFormat(_read_plain, lambda module: (module._parameters["weight"],))
# This rank's columns of a weight that is split over ranks.
LOCAL = WeightFormat(_read_local, _parts_of_local)
OFFLOADED = WeightFormat(_read_offloaded, _parts_of_offloaded)


# ---------------------------------------------------------------- adapters


def _read_adapted(module: Any, base: nn.Module) -> Tensor:
    _check_own_forward(module)
    if qualified_name(type(module)) not in LORA:
        kind = type(module)
        raise NotDenseError(
            f"is a {kind.__name__} of {kind.__module__}; of adapters only PEFT's plain LoRA is supported"
        )
    if sharding.is_rowwise(base):
        raise NotDenseError(
            "has adapters over a tensor-parallel weight: merge them before the model is sharded"
        )
    weight = _read(base)
    if module.disable_adapters:
        return _unmerged(module, base, weight)
    acting = _acting_adapters(module)
    if acting and weight.dtype != torch.float64:
        weight = weight.float()  # the layer does not round the adapter's output to the weight's dtype
    with torch.autocast(weight.device.type, enabled=False):
        for name in acting:
            down, up = (_read(part[name]).to(weight) for part in (module.lora_A, module.lora_B))
            weight = weight + up @ down * module.scaling[name]
    return weight


def _unmerged(module: Any, base: nn.Module, weight: Tensor) -> Tensor:
    """Return the weight without its merged adapters, which are disabled: the layer unmerges them when it runs."""
    weight_format = _format(base)
    if module.merged_adapters and weight_format.read is not _read_plain:
        raise NotDenseError(
            "has disabled adapters merged into a weight that is not a plain tensor, which the layer quantizes again when it "
            "unmerges them: call unmerge_adapter() first"
        )
    with torch.no_grad():
        for name in reversed(module.merged_adapters):
            _check_no_variant(module, name)
            with isolated(
                module.lora_A[name], module.lora_B[name]
            ):  # some releases of PEFT replace their data
                delta = module.get_delta_weight(name)  # transposed where the weight is
            weight = weight - (delta.T if weight_format.transposed else delta).to(weight)
    return weight


def _acting_adapters(module: Any) -> list[str]:
    """Return the names of the LoRA adapters whose output is added to the base layer's."""
    if module.merged_adapters:
        return []  # if one is merged, the layer ignores all others
    acting = [name for name in module.active_adapters if name in module.lora_A]
    for name in acting:
        _check_plain_lora(module, name)
        if module.training and getattr(module.lora_dropout[name], "p", 0.0) > 0:
            raise NotDenseError(
                f"has adapter {name!r}, which drops inputs at random in training, so that no fixed weight acts: call model.eval()"
            )
    return acting


def _check_plain_lora(module: Any, name: str) -> None:
    _check_no_variant(module, name)
    if getattr(module, "lora_bias", {}).get(name):
        raise NotDenseError(f"has adapter {name!r}, which is more than plain LoRA (lora_bias)")


def _check_no_variant(module: Any, name: str) -> None:
    if name in getattr(module, "lora_variant", {}):  # DoRA and the like are not base + delta
        raise NotDenseError(f"has adapter {name!r}, which is more than plain LoRA (DoRA …)")


def _parts_of_adapters(module: Any) -> Parts:
    down, up = getattr(module, "lora_A", {}), getattr(module, "lora_B", {})
    adapters = tuple(
        [
            (name, module.scaling[name], _parts_of_low_rank(down[name]), _parts_of_low_rank(up[name]))
            for name in module.active_adapters
            if name in down
        ]
    )
    # In training, dropout may make the weight unreadable.
    return (adapters, tuple(module.merged_adapters), module.disable_adapters, module.training)


def _parts_of_low_rank(module: nn.Module) -> Parts:
    if "_hf_hook" in vars(module) or "weight" not in module._parameters:
        return _parts_reader(module)()
    return (module._parameters.get("weight"),)


# ---------------------------------------------------------------- keys


def _key(parts: Parts) -> Parts:
    return tuple([_key_of(part) for part in parts])


def _key_of(part: Any) -> Any:
    kind = type(part)
    if kind is nn.Parameter:
        return _tensor_key(part)
    if kind is tuple or kind is list:
        return _key(part)
    if isinstance(part, Tensor):
        return tuple(_tensor_key(leaf) for leaf in leaves(part))
    return part


def _tensors(parts: Parts) -> Iterator[Tensor]:
    for part in parts:
        if isinstance(part, Tensor):
            yield from leaves(part)
        elif isinstance(part, tuple | list):
            yield from _tensors(tuple(part))


def _tensor_key(tensor: Tensor) -> Parts:
    version = None if tensor.is_inference() else tensor._version
    return (tensor.untyped_storage()._cdata, tensor.data_ptr(), version, tensor.dtype)
