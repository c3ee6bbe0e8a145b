"""What of an attention's output reaches the residual stream: all of it, or what a norm and a multiplier make of it.

With a = sum over heads of W_h z_h + bias what the projection gives, a decoder layer adds to the residual stream

    c a,  or  c g * a / rms(a),  rms(a) = sqrt(mean(a²) + eps)

where c is a multiplier (1 of most) and g the gain of an RMS norm. A head's share is linear in z_h once rms(a), a number of
each token, is given: c W_h z_h, or (c / rms(a)) diag(g) W_h z_h.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastheads.errors import UnsupportedWeightError
from fastheads.models.computed_weights import isolated
from fastheads.models.sites import HeadSite, unwrapped
from fastheads.models.weight_formats import is_dtensor


@dataclass(frozen=True)
class Rule:
    """Where a decoder layer keeps what it applies to the output of its attention (a child of that name) before adding it."""

    norm: str | None = None
    multiplier: str | None = None
    attention: str | None = None  # None: whatever its name


# By the class of the decoder layer. Other layers of transformers that show nothing of the kind (SCALES) add the output as it is.
RULES: dict[str, Rule] = {
    r"^(Gemma[234]|Gemma4Unified|DiffusionGemma|EmbeddingGemma2|MuseGlimmer)(Text|Encoder|Decoder)*Layer$": Rule(
        "post_attention_layernorm"
    ),
    r"^(Olmo[23]|FlexOlmo|OlmoHybridAttention|Exaone4|Exaone4_5_|Afmoe)DecoderLayer$": Rule(
        "post_attention_layernorm"
    ),
    r"^(Glm4|Kolibri1|T5Gemma2?|Glm4vText|GlmImageText|GlmOcrText)(En|De)?(coder)?Layer$": Rule(
        "post_self_attn_layernorm", attention="self_attn"
    ),
    r"^Lfm3DecoderLayer$": Rule("post_operator_norm"),
    r"^HyperCLOVAXDecoderLayer$": Rule("post_norm1", "residual_multiplier"),
    r"^FalconH1DecoderLayer$": Rule(multiplier="attn_out_multiplier"),
    r"^Granite\w*DecoderLayer$": Rule(multiplier="residual_multiplier"),
    r"^MiniCPM3DecoderLayer$": Rule(multiplier="residual_scale"),
    r"^MiniMaxDecoderLayer$": Rule(multiplier="attn_beta_factor"),
}
# Layers that do something else, and what.
UNKNOWN: dict[str, str] = {
    r"^BeamDecoder": "it scales the sum with the depth of the layer",
    r"^Gemma3nText": "it mixes several residual streams",
    r"^HYV4": "it mixes several residual streams",
    r"^(Idefics|Mllama)\w*CrossAttention": "a gate comes between",
    r"^Inkling2": "it convolves the attention's output",
    r"^Qwen4Exp": "it mixes several residual streams",
    r"^Zamba": "the attention's output goes through another layer before it is added",
    r"^Zaya": "it scales the output by learnt numbers of each channel",
}


# What else a layer would scale its attention's output with: parameters of its own, or children so called.
SCALES = re.compile(r"scale|residual_gate|(attn|attention)\w*gate", re.IGNORECASE)
SCALES_THE_RESIDUAL = re.compile(r"^Doge")  # and not what is added to it


# Whose modules between the projection and the layer do nothing else to its output.
KNOWN_PACKAGES = ("transformers.", "torch.nn.")


# Where a module or a parameter hangs: its owner's children or parameters, and its name among them.
Place = tuple[dict[str, Any], str]


class UnknownUpdateError(UnsupportedWeightError):
    """What a layer adds to the residual stream is not known."""


@dataclass(frozen=True, eq=False)
class Update:
    """What one decoder layer makes of its attention's output, read off the layer each time: it may be changed."""

    layer: Any = None
    rule: Rule = Rule()

    @property
    def multiplier(self) -> float:
        return 1.0 if self.rule.multiplier is None else float(getattr(self.layer, self.rule.multiplier))

    @property
    def norm(self) -> nn.Module | None:
        return None if self.rule.norm is None else getattr(self.layer, self.rule.norm)

    @property
    def width(self) -> int:
        """Of the attention's output, as the gain has it."""
        return next((p.numel() for p in self.parameters()), 1)

    @property
    def device(self) -> torch.device:
        return next((p.device for p in self.parameters()), torch.device("cpu"))

    def parameters(self) -> list[Tensor]:
        """What the gain depends on."""
        return [] if self.norm is None else list(self.norm.parameters())

    def places(self) -> list[Place] | None:
        """Where the norm and what the gain depends on hang; None where it is no plain child with plain parameters."""
        norm, name = self.norm, self.rule.norm
        if norm is None or name is None:
            return []
        if self.layer._modules.get(name) is not norm or norm._modules:
            return None
        if any(p is not None and type(p) is not nn.Parameter for p in norm._parameters.values()):
            return None
        return [(self.layer._modules, name), *[(norm._parameters, key) for key in norm._parameters]]

    def key(self) -> tuple[Any, ...]:
        """What moves when the gain is changed the ordinary way."""
        versions = [
            (p.untyped_storage()._cdata, p.data_ptr(), None if p.is_inference() else p._version)
            for p in self.parameters()
        ]
        return (id(self.norm), *versions)

    def __str__(self) -> str:
        """As in a profile's metadata."""
        text = "as it is" if self.norm is None else f"normed ({type(self.norm).__name__})"
        return text if self.multiplier == 1.0 else f"{text}, times {self.multiplier:g}"

    def check(self) -> None:
        """Raises UnknownUpdateError for a multiplier that is no number, or a norm that is no RMS norm or cannot be asked. Waits
        for the device.
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
        gain, width = self.gain(self.width, self.device), self.width
        with torch.no_grad():
            probe = torch.linspace(-1.0, 2.0, width, device=self.device)
            want = gain * probe.double() / (probe.double().square().mean() + self.eps).sqrt()
            got = self._normed(probe[None, None])[0, 0].double()
        if not torch.allclose(got, want, rtol=2e-2, atol=2e-2 * float(gain.abs().max())):
            raise UnknownUpdateError(f"{type(norm).__name__} is no RMS norm")

    def gain(self, width: int, device: torch.device) -> Tensor:
        """The norm's gain, float64 `[width]`: what it does to ones."""
        with torch.no_grad():
            ones = torch.ones(1, 1, width, dtype=torch.float32, device=device)
            return self._normed(ones)[0, 0].double() * (1.0 + self.eps) ** 0.5

    def _normed(self, x: Tensor) -> Tensor:
        """What the norm makes of `x`, without a trace on it. Raises UnknownUpdateError where it leaves one, or draws numbers."""
        norm = self.norm
        assert norm is not None
        # Not by a call, which others' hooks would see.
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
        """What the norm adds to the mean of squares."""
        for name in ("eps", "variance_epsilon"):
            value = getattr(self.norm, name, None)
            if isinstance(value, float):
                return value
        raise UnknownUpdateError(f"{type(self.norm).__name__} does not say its epsilon")

    def of_output(self, output: Tensor) -> "OutputNorms":
        """What is needed of `output` `[batch, seq, out_features]`: one launch behind each projection."""
        dtype = torch.promote_types(output.dtype, torch.float32)
        norms = torch.linalg.vector_norm(output, dim=-1, dtype=dtype)
        return OutputNorms(norms, self.multiplier, self.eps, output.shape[-1])


class OutputNorms(NamedTuple):
    """|a| of each token, `[batch, seq]`, for the output a of one attention: float32, or float64 for such an output; and the
    numbers that the layer had when it ran.
    """

    norms: Tensor
    multiplier: float
    eps: float
    width: int


def scales(outputs: Sequence[OutputNorms]) -> Tensor:
    """The number c / rms(a) of each token, `[len(outputs), batch, seq]`; all at once where the layers have one c and eps."""
    norms = torch.stack([output.norms for output in outputs])
    numbers = [output[1:] for output in outputs]
    if all(number == numbers[0] for number in numbers):
        scale = _scale(norms, *numbers[0])
    else:
        scale = torch.stack(
            [_scale(of_layer, *n) for of_layer, n in zip(norms.unbind(0), numbers, strict=True)]
        )
    return scale.masked_fill(norms.isinf(), torch.nan)  # as the norm itself gives: infinity over infinity


def _scale(norms: Tensor, multiplier: float, eps: float, width: int) -> Tensor:
    return multiplier * torch.rsqrt(norms.square() / width + eps)


def update_of(model: nn.Module, site: HeadSite) -> Update:
    """What the decoder layer of `site` makes of its output. Raises UnknownUpdateError where that is not known."""
    parts = site.name.split(".")
    layer: Any = model
    for depth in range(len(parts) - 1, 0, -1):
        above: Any = unwrapped(model.get_submodule(".".join(parts[:depth])))
        kind = type(above).__name__
        if layer is model and not type(above).__module__.startswith(KNOWN_PACKAGES):
            raise UnknownUpdateError(f"what a {kind}, which is none of transformers, does to it is not known")
        for pattern, why in UNKNOWN.items():
            if re.search(pattern, kind):
                raise UnknownUpdateError(f"what a {kind} adds to the residual stream is not known: {why}")
        for pattern, rule in RULES.items():
            if re.search(pattern, kind):
                if rule.attention not in (None, parts[depth]):
                    raise UnknownUpdateError(f"what a {kind} adds of {parts[depth]} is not known")
                return Update(above, rule)
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
