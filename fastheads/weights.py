"""The dense W of an output projection, its factor, and the proof that the factor is not stale.

With W_h `[hidden, head_dim]` one head's slice of W and G_h = W_hᵀW_h = L_h L_hᵀ, ‖W_h z‖ = ‖z L_h‖ exactly. G is built in
float64: it squares W's condition number, and in float32 the weak directions of a head would be lost.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastheads.sites import HeadSite

DENSE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# float64 elements of W to widen at a time: 256 MiB, so that a 405B layer does not need 2 GB at once.
CHUNK_ELEMENTS = 2**25


class StaleFactorError(RuntimeError):
    """A projection's weight changed behind the factor: what was measured since may be wrong."""


class UnsupportedWeightError(ValueError):
    """The projection's dense weight cannot be had with certainty."""


def dense_weight(site: HeadSite) -> Tensor:
    """The weight `[out_features, num_heads * head_dim]` with which the projection now acts on its input.

    Raises UnsupportedWeightError for a projection whose weight is not plainly dense (quantised, sharded, offloaded …).
    """
    module = site.module
    base = getattr(module, "base_layer", None)
    if base is None:
        return _plain_weight(site, module)
    weight, acting = _plain_weight(site, base), _acting_adapters(site)
    if acting and weight.dtype != torch.float64:
        weight = weight.float()  # the layer adds the adapter's output unrounded: so must this
    for name in acting:
        weight = weight + module.get_delta_weight(name).to(weight.dtype)  # type: ignore[operator]
    return weight


def _plain_weight(site: HeadSite, module: nn.Module) -> Tensor:
    kind = type(module)
    if not isinstance(module, nn.Linear) or kind.forward is not nn.Linear.forward:
        raise UnsupportedWeightError(f"{site.name} is a {kind.__name__}; only torch.nn.Linear is supported")
    weight = module.weight
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


def _acting_adapters(site: HeadSite) -> list[str]:
    """The names of the LoRA adapters that act beside the base weight (merged ones are inside it)."""
    module: Any = site.module
    if not hasattr(module, "get_delta_weight") or not hasattr(module, "lora_A"):
        raise UnsupportedWeightError(
            f"{site.name} is a {type(module).__name__}; of adapters only PEFT's LoRA is supported"
        )
    if module.disable_adapters:
        return []
    acting = [
        name
        for name in module.active_adapters
        if name in module.lora_A and name not in module.merged_adapters
    ]
    variants = getattr(module, "lora_variant", {})  # DoRA and its like are not base + delta
    if any(name in variants for name in acting) or any(
        getattr(module, "lora_bias", {}).get(name) for name in acting
    ):
        raise UnsupportedWeightError(
            f"{site.name}: only plain LoRA is supported, not {sorted(variants) or 'lora_bias'}"
        )
    return acting


def weight_key(site: HeadSite) -> tuple[Any, ...]:
    """What moves when a weight is replaced or changed in place the ordinary way: storage, versions, adapters' state.

    Reads no values, so it costs no wait; `weight.data.mul_()` and its like move none of it (see `checksum`).
    """
    module: Any = site.module
    base = getattr(module, "base_layer", None)
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
        tuple(module.merged_adapters),
        tuple(adapters),
    )


def _tensor_key(tensor: Tensor) -> tuple[Any, ...]:
    version = None if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), version, tensor.dtype, tensor.device, tuple(tensor.stride()))


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


class SiteFactor:
    """The factor of one projection, kept as long as the weight it was made from stands.

    A weight that is replaced, moved or changed in place the ordinary way is seen by `refresh` before the next forward; one that is
    changed behind autograd's back (`weight.data.mul_()`, a write through numpy) is seen by `verify` afterwards.
    """

    def __init__(self, site: HeadSite) -> None:
        self.site = site
        self.rebuild()

    def rebuild(self) -> None:
        """Make the factor of the weight as it is now, on the weight's device (the CPU where that has no float64)."""
        with torch.no_grad(), torch.inference_mode(False):
            weight = dense_weight(self.site)
            self._key = weight_key(self.site)
            self._checksum = checksum(weight)
            self._lower = lower_factor(weight, self.site.num_heads)
            if weight.dtype != torch.float64:
                self._lower = (
                    self._lower.float()
                )  # a rounding of 6e-8, as large as that of the products themselves
        self._unverified = False

    def refresh(self) -> None:
        """Rebuild where the weight is known to have changed; reads no value back."""
        if weight_key(self.site) != self._key:
            self.rebuild()

    def lower(self, x: Tensor) -> Tensor:
        """L `[num_heads, head_dim, head_dim]`, lower triangular, for an input `x`, on its device."""
        self._unverified = True
        return self._lower.to(x.device)

    def verify(self) -> bool:
        """Whether the bits of the weight are those that the factor was made from. Waits for the device.

        Where the weight has since been changed the ordinary way there is nothing left to compare with, and nothing measured with
        it either: that is no failure.
        """
        if self._unverified and weight_key(self.site) == self._key:
            with torch.no_grad():
                self._unverified = not torch.equal(checksum(dense_weight(self.site)), self._checksum)
            return not self._unverified
        return True


def lower_factor(weight: Tensor, num_heads: int) -> Tensor:
    """L with W_hᵀW_h = L_h L_hᵀ for `weight` `[O, H·D]`: float64 `[H, D, D]`, lower triangular."""
    out_features, width = weight.shape
    head_dim = width // num_heads
    if weight.device.type == "mps":
        weight = weight.cpu()
    step = max(1, CHUNK_ELEMENTS // (out_features * head_dim))
    chunks = []
    with torch.autocast(weight.device.type, enabled=False):
        for start in range(0, num_heads, step):
            w = weight[:, start * head_dim : (start + step) * head_dim].double()
            w = w.view(out_features, -1, head_dim).transpose(0, 1)  # [h, O, D]
            chunks.append(_factor_of_gram(w.mT @ w))
    return torch.cat(chunks)


def _factor_of_gram(gram: Tensor) -> Tensor:
    """Cholesky where it exists. A pruned or rank-deficient head has none: eigenvalues, the negative ones clamped, then a QR
    to have the factor triangular again. No jitter: it would be a bias.
    """
    lower, info = torch.linalg.cholesky_ex(gram)
    finite = gram.isfinite().all(dim=-1).all(dim=-1)
    lower[~finite] = torch.nan  # as W z would be; eigh would raise
    failed = ((info != 0) & finite).nonzero().flatten()
    if failed.numel():
        values, vectors = torch.linalg.eigh(gram[failed])
        root = vectors * values.clamp(min=0.0).sqrt().unsqueeze(-2)  # root @ root.mT = gram
        lower[failed] = torch.linalg.qr(root.mT, mode="r").R.mT
    return lower.tril()
