"""What of an attention's output reaches the residual stream: all of it, or what a norm and a multiplier make of it.

With a = sum over heads of W_h z_h + bias what the projection gives, a decoder layer adds to the residual stream

    c a,  or  c g * a / rms(a),  rms(a) = sqrt(mean(a²) + eps)

where c is a multiplier (1 of most) and g the gain of an RMS norm. A head's share is linear in z_h once rms(a), a number of
each token, is given: c W_h z_h, or (c / rms(a)) diag(g) W_h z_h.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.sites import HeadSite


@dataclass(frozen=True)
class Rule:
    """Where a decoder layer keeps what it applies to its attention's output before adding it."""

    norm: str | None = None
    multiplier: str | None = None


# By the class of the decoder layer. All other layers of transformers add the output as it is.
RULES: dict[str, Rule] = {
    r"^(Gemma[234]|Gemma4Unified|DiffusionGemma|EmbeddingGemma2|MuseGlimmer)(Text|Encoder|Decoder)*Layer$": Rule(
        "post_attention_layernorm"
    ),
    r"^(Olmo[23]|FlexOlmo|OlmoHybridAttention|Exaone4|Exaone4_5_|Afmoe)DecoderLayer$": Rule(
        "post_attention_layernorm"
    ),
    r"^(Glm4|Kolibri1|T5Gemma2?|Glm4vText|GlmImageText|GlmOcrText)(En|De)?(coder)?Layer$": Rule(
        "post_self_attn_layernorm"
    ),
    r"^Lfm3DecoderLayer$": Rule("post_operator_norm"),
    r"^HyperCLOVAXDecoderLayer$": Rule("post_norm1", "residual_multiplier"),
    r"^Granite\w*DecoderLayer$": Rule(multiplier="residual_multiplier"),
    r"^MiniCPM3DecoderLayer$": Rule(multiplier="residual_scale"),
    r"^MiniMaxDecoderLayer$": Rule(multiplier="attn_beta_factor"),
}
# Layers that do something else, and what.
UNKNOWN: dict[str, str] = {
    r"^BeamDecoder": "it scales the sum with the depth of the layer",
    r"^Gemma3nText": "it mixes several residual streams",
    r"^HYV4": "it mixes several residual streams",
    r"^Inkling2": "it convolves the attention's output",
    r"^Qwen4Exp": "it mixes several residual streams",
    r"^Zamba": "the attention's output goes through another layer before it is added",
    r"^Zaya": "it scales the output by learnt numbers of each channel",
}


class UnknownUpdateError(ValueError):
    """What a layer adds to the residual stream is not known."""


@dataclass(frozen=True)
class Update:
    """What one decoder layer makes of its attention's output."""

    multiplier: float = 1.0
    norm: nn.Module | None = None

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

    def key(self) -> tuple[Any, ...]:
        """What moves when the gain is changed the ordinary way."""
        return tuple([(p.data_ptr(), None if p.is_inference() else p._version) for p in self.parameters()])

    def __str__(self) -> str:
        """As in a profile's metadata."""
        text = "as it is" if self.norm is None else f"normed ({type(self.norm).__name__})"
        return text if self.multiplier == 1.0 else f"{text}, times {self.multiplier:g}"

    def gain(self, width: int, device: torch.device) -> Tensor:
        """The norm's gain, float64 `[width]`. Raises UnknownUpdateError for a norm that is no RMS norm."""
        assert self.norm is not None
        eps = self.eps
        with torch.no_grad():
            # What the norm does to ones is its gain; on another vector an RMS norm must then do what its formula says.
            ones = torch.ones(1, 1, width, dtype=torch.float32, device=device)
            gain = self.norm(ones)[0, 0].double() * (1.0 + eps) ** 0.5
            probe = torch.linspace(-1.0, 2.0, width, device=device)
            want = gain * probe.double() / (probe.double().square().mean() + eps).sqrt()
            got = self.norm(probe[None, None])[0, 0].double()
        if not torch.allclose(got, want, rtol=2e-2, atol=2e-2 * float(gain.abs().max())):
            raise UnknownUpdateError(f"{type(self.norm).__name__} is no RMS norm")
        return gain

    @property
    def eps(self) -> float:
        """What the norm adds to the mean of squares."""
        for name in ("eps", "variance_epsilon"):
            value = getattr(self.norm, name, None)
            if isinstance(value, float):
                return value
        raise UnknownUpdateError(f"{type(self.norm).__name__} does not say its epsilon")

    def scale(self, output: Tensor) -> Tensor:
        """The number c / rms(a) of each token, `[batch, seq]`, for a = `output` `[batch, seq, out_features]`: float32, or float64
        for such an output.
        """
        dtype = torch.promote_types(output.dtype, torch.float32)
        norm = torch.linalg.vector_norm(output, dim=-1, dtype=dtype)
        return self.multiplier * torch.rsqrt(norm.square() / output.shape[-1] + self.eps)


def update_of(model: nn.Module, site: HeadSite) -> Update:
    """What the decoder layer of `site` makes of its output. Raises UnknownUpdateError where that is not known."""
    parts = site.name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        layer: Any = model.get_submodule(".".join(parts[:depth]))
        kind = type(layer).__name__
        for pattern, why in UNKNOWN.items():
            if re.search(pattern, kind):
                raise UnknownUpdateError(f"what a {kind} adds to the residual stream is not known: {why}")
        for pattern, rule in RULES.items():
            if re.search(pattern, kind):
                multiplier = 1.0 if rule.multiplier is None else float(getattr(layer, rule.multiplier))
                return Update(multiplier, None if rule.norm is None else getattr(layer, rule.norm))
    if not type(model).__module__.startswith("transformers."):
        raise UnknownUpdateError(f"{type(model).__name__} is no model of transformers")
    return Update()
