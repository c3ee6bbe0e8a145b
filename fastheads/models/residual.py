"""Find what a decoder layer does to its attention's output before it adds that to the residual stream.

With a = sum over heads of W_h z_h + bias, the projection's output, a decoder layer adds

    c a,  or  c g * a / rms(a),  rms(a) = sqrt(mean(a²) + eps)

where c is a multiplier (mostly 1) and g the gain of an RMS norm. Given rms(a), one number for each token, a head's share is
linear in z_h: c W_h z_h, or (c / rms(a)) diag(g) W_h z_h.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastheads.errors import OptionError, UnsupportedWeightError
from fastheads.models.computed_weights import isolated
from fastheads.models.families import Family, builtin_family, registered_family
from fastheads.models.geometry import output_width
from fastheads.models.sites import HeadSite, registered_attention_of, unwrapped
from fastheads.models.weight_formats import is_dtensor


@dataclass(frozen=True)
class Rule:
    """Attribute names in a decoder layer: the norm and multiplier that it applies to its attention's output."""

    norm: str | None = None
    multiplier: str | None = None


# A layer may also scale the output with parameters of its own, or with children of these names.
SCALES = re.compile(r"scale|residual_gate|(attn|attention)\w*gate", re.IGNORECASE)
SCALES_THE_RESIDUAL = re.compile(r"^Doge")  # these scale the stream, not what is added to it


# Modules of these packages between the projection and the layer do nothing else to its output.
KNOWN_PACKAGES = ("transformers.", "torch.nn.")


# A slot that holds a module or a parameter: its owner's `_modules` or `_parameters`, and the key.
Place = tuple[dict[str, Any], str]


class UnknownUpdateError(UnsupportedWeightError):
    """It is not known what a layer adds to the residual stream."""


@dataclass(frozen=True, eq=False)
class Update:
    """The norm and multiplier that a decoder layer applies to its attention's output; read each time, since they may change."""

    layer: Any = None
    rule: Rule = Rule()
    out_features: int = 1  # of the projection

    @property
    def multiplier(self) -> float:
        return 1.0 if self.rule.multiplier is None else float(getattr(self.layer, self.rule.multiplier))

    @property
    def norm(self) -> nn.Module | None:
        return None if self.rule.norm is None else getattr(self.layer, self.rule.norm)

    @property
    def width(self) -> int:
        """The width of the norm's gain: that of its parameters; the projection's if it has none, or one number for all."""
        return next((p.numel() for p in self.parameters() if p.numel() > 1), self.out_features)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def parameters(self) -> list[Tensor]:
        """Return the norm's parameters."""
        return [] if self.norm is None else list(self.norm.parameters())

    def places(self) -> list[Place] | None:
        """Return the slots of the norm and its parameters; None if it is no plain child with plain parameters."""
        norm, name = self.norm, self.rule.norm
        if norm is None or name is None:
            return []
        if self.layer._modules.get(name) is not norm or norm._modules:
            return None
        if any(p is not None and type(p) is not nn.Parameter for p in norm._parameters.values()):
            return None
        return [(self.layer._modules, name), *[(norm._parameters, key) for key in norm._parameters]]

    def key(self) -> tuple[Any, ...]:
        """Return the version key of the gain: it changes when the gain is replaced or changed in place."""
        versions = [
            (p.untyped_storage()._cdata, p.data_ptr(), None if p.is_inference() else p._version)
            for p in self.parameters()
        ]
        return (id(self.norm), *versions)

    def __str__(self) -> str:
        """Describe it for a profile's metadata."""
        text = "as it is" if self.norm is None else f"normed ({type(self.norm).__name__})"
        return text if self.multiplier == 1.0 else f"{text}, times {self.multiplier:g}"

    def check(self) -> None:
        """Raise UnknownUpdateError if the multiplier is no number, or the norm is no RMS norm or cannot be run.

        Waits for the device.
        """
        try:
            multiplier = self.multiplier
        except (TypeError, ValueError, RuntimeError) as error:  # a tensor of several numbers, say
            raise UnknownUpdateError(f"its {self.rule.multiplier} is no number") from error
        if not math.isfinite(multiplier):
            raise UnknownUpdateError(f"its {self.rule.multiplier} is {multiplier}")
        norm = self.norm
        if norm is None:
            return
        if next(norm.children(), None) is not None or "_hf_hook" in vars(norm) or self.device.type == "meta":
            raise UnknownUpdateError(f"{type(norm).__name__} is wrapped or offloaded")
        if any(is_dtensor(parameter) for parameter in self.parameters()):
            raise UnknownUpdateError(f"{type(norm).__name__} is spread over ranks")
        width = self.width
        probe = torch.linspace(-1.0, 2.0, width, device=self.device)
        try:
            gain = self.gain(width, self.device)
            with torch.no_grad():
                got = self._normed(probe[None, None])[0, 0].double()
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            if isinstance(error, UnknownUpdateError):
                raise
            raise UnknownUpdateError(
                f"{type(norm).__name__} cannot be run on what the projection gives"
            ) from error
        want = gain * probe.double() / (probe.double().square().mean() + self.eps).sqrt()
        if got.shape != want.shape or not torch.allclose(
            got, want, rtol=2e-2, atol=2e-2 * float(gain.abs().max())
        ):
            raise UnknownUpdateError(f"{type(norm).__name__} is no RMS norm")

    def gain(self, width: int, device: torch.device) -> Tensor:
        """Return the norm's gain, float64 `[width]`, computed from its output for ones."""
        with torch.no_grad():
            ones = torch.ones(1, 1, width, dtype=torch.float32, device=device)
            return self._normed(ones)[0, 0].double() * (1.0 + self.eps) ** 0.5

    def _normed(self, x: Tensor) -> Tensor:
        """Apply the norm to `x`. Raises UnknownUpdateError if that changes the norm, or draws random numbers."""
        norm = self.norm
        assert norm is not None
        # By forward(), since a call would run other libraries' hooks.
        if type(norm).__module__.startswith(KNOWN_PACKAGES):
            return type(norm).forward(norm, x)  # type: ignore[no-any-return]
        with isolated(norm) as changes:
            normed: Tensor = type(norm).forward(norm, x)
            what = changes()
        if what is not None:
            raise UnknownUpdateError(f"{type(norm).__name__} {what} as it runs")
        return normed

    @property
    def eps(self) -> float:
        """The norm's epsilon, added to the mean of squares."""
        for name in ("eps", "variance_epsilon"):
            value = getattr(self.norm, name, None)
            if isinstance(value, float):
                return value
        raise UnknownUpdateError(f"{type(self.norm).__name__} does not say its epsilon")

    def of_output(self, output: Tensor) -> "OutputNorms":
        """Reduce `output` `[batch, seq, out_features]` to what `scales` needs: one launch after each projection."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        norms = torch.linalg.vector_norm(output, dim=-1, dtype=dtype)
        return OutputNorms(norms, self.multiplier, self.eps, output.shape[-1])


class OutputNorms(NamedTuple):
    """‖a‖ of each token `[batch, seq]` for the output a of one projection (float32, or float64 for a float64 output), with the
    layer's multiplier, eps and width at that time.
    """

    norms: Tensor
    multiplier: float
    eps: float
    width: int


def scales(outputs: Sequence[OutputNorms]) -> Tensor:
    """Return c / rms(a) of each token, `[len(outputs), batch, seq]`; in one step if all layers have the same c and eps."""
    norms = torch.stack([output.norms for output in outputs])
    numbers = [output[1:] for output in outputs]
    if all(number == numbers[0] for number in numbers):
        scale = _scale(norms, *numbers[0])
    else:
        scale = torch.stack(
            [_scale(of_layer, *n) for of_layer, n in zip(norms.unbind(0), numbers, strict=True)]
        )
    return scale.masked_fill(norms.isinf(), torch.nan)  # as the norm gives: inf / inf


def _scale(norms: Tensor, multiplier: float, eps: float, width: int) -> Tensor:
    return multiplier * torch.rsqrt(norms.square() / width + eps)


def update_of(model: nn.Module, site: HeadSite) -> Update:
    """Find what the decoder layer of `site` does to its output.

    Raises:
        UnknownUpdateError: that is not known.
        OptionError: a registered family does not fit the layer.
    """
    parts = site.name.split(".")
    registered = registered_attention_of(model, site)
    outermost = len(parts) if registered is None else registered[1]
    layer: Any = model
    for depth in range(len(parts) - 1, 0, -1):
        above: Any = unwrapped(model.get_submodule(".".join(parts[:depth])))
        kind = type(above).__name__
        family = registered_family("layer", above)
        if family is None and depth >= outermost:
            continue  # inside the attention of a registered family, of which the projection's output is the output
        known = type(above).__module__.startswith(KNOWN_PACKAGES)
        if family is None and layer is model and not known:
            raise UnknownUpdateError(f"what a {kind}, which is not of transformers, does to it is not known")
        family = family or builtin_family("layer", above)
        if family is not None:
            if family.update_unknown is not None:
                raise UnknownUpdateError(
                    f"what a {kind} adds to the residual stream is not known: {family.update_unknown}"
                )
            if family.child not in (None, parts[depth]):
                raise UnknownUpdateError(f"what a {kind} adds of {parts[depth]} is not known")
            _check_fits(above, family)
            return Update(above, Rule(family.norm, family.multiplier), output_width(site.module) or 1)
        if layer is model and parts[depth - 1].isdigit():
            layer = above
    kind = type(layer).__name__
    if not type(layer).__module__.startswith("transformers."):
        raise UnknownUpdateError(f"{kind} is no layer of transformers")
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    own += [name for name, _ in layer.named_children() if SCALES.search(name)]
    if own and layer is not model and not SCALES_THE_RESIDUAL.search(kind):
        raise UnknownUpdateError(f"what a {kind} does with its {own[0]} is not known")
    return Update()


def _check_fits(layer: nn.Module, family: Family) -> None:
    """Raise OptionError if the layer lacks the norm or the multiplier that its family names."""
    kind = type(layer).__name__
    for key in ("norm", "multiplier"):
        name = getattr(family, key)
        if name is not None and not hasattr(layer, name):
            raise OptionError(f"family {family.name!r}: {key} is {name!r}, which a {kind} has not")
    if family.norm is not None and not isinstance(getattr(layer, family.norm), nn.Module | None):
        raise OptionError(f"family {family.name!r}: {family.norm} of a {kind} is no module")
