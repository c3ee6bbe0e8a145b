"""Families of models: what is particular to the attention and the decoder layers of each, in one entry.

Most families need no entry: `sites`, `geometry` and `residual` know the usual names of modules and attributes. What a family does
otherwise stands in FAMILIES; `register_family` adds families of other packages.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from fastheads.errors import OptionError

LAYOUTS = ("batch_first", "sequence_first")

_IDENTIFIER = r"[^\W\d]\w*"
_NAME = re.compile(_IDENTIFIER)
_ATTRIBUTE = re.compile(rf"{_IDENTIFIER}(\.{_IDENTIFIER})*")
_PATH = re.compile(r"(\.\./)?\w+(\.\w+)*")
_PATH_INSIDE = re.compile(r"\.|\w+(\.\w+)*")


@dataclass(frozen=True)
class Family:
    """What is particular to a family of models; None is what other models do.

    `attention`, `layer` and `decoder` say whose facts these are: patterns (`re.search`) of the class names of the attention
    modules, of the decoder layers and of the decoder. At least one is needed, and each fact needs its own.

    Raises OptionError if an entry is of the wrong kind, or says nothing.
    """

    name: str
    attention: str | None = None
    layer: str | None = None
    decoder: str | None = None
    package: str = ""  # only classes of modules whose name starts so: "mypackage."

    # Of the attention module:
    projection: str | None = (
        None  # path to the output projection: "o_proj", "mix.out", or "../out" beside the attention
    )
    num_heads: int | str | None = None  # number, or its attribute ("num_heads", "config.heads")
    head_dim: int | str | None = None  # of the values, as they reach the projection
    num_kv_heads: int | str | None = None
    heads_per_unit: int | None = None  # heads combined into one before the projection
    layout: str | None = None  # of the projection's input: "batch_first" or "sequence_first"
    refused: str | None = None  # the reason why it cannot be profiled
    refused_if: Callable[[Any], bool] | None = None  # only if this is true of the attention module

    # Of the decoder layer: what it does to the attention's output before it adds that to the residual stream, as attributes of
    # the layer. With a `layer` and neither, it adds the output as it is.
    norm: str | None = None  # an RMS norm
    multiplier: str | None = None  # a number, that multiplies after the norm
    child: str | None = None  # only of the child of this name: other attentions of the layer are unknown
    update_unknown: str | None = None  # the reason why it is not known what is added
    # The module inside the layer whose first argument is the residual stream that the attention's output is added to, "." the
    # layer itself; None: as the source of the layer's forward says.
    stream: str | None = None
    stream_unknown: str | None = None  # the reason why the residual stream is not known

    # Of the decoder: the number of rows of `input_ids` for each row of tokens, or its attribute.
    rows_of_ids: int | str | None = None

    def __post_init__(self) -> None:
        self._check(isinstance(self.name, str) and bool(self.name), "name", "a text")
        for key in _FACTS:
            self._check(
                _is_pattern(getattr(self, key)), key, "a pattern that matches class names, but not all"
            )
        self._check(isinstance(self.package, str), "package", "the start of a module's name")
        self._check(_is_text(self.projection, _PATH), "projection", 'a path such as "o_proj" or "../out"')
        for key in ("num_heads", "head_dim", "num_kv_heads", "rows_of_ids"):
            value = getattr(self, key)
            sound = _is_text(value, _ATTRIBUTE) or _is_positive(value)
            self._check(sound, key, "a positive whole number, or the name of an attribute")
        sound = self.heads_per_unit is None or _is_positive(self.heads_per_unit)
        self._check(sound, "heads_per_unit", "a positive whole number")
        self._check(self.layout in (None, *LAYOUTS), "layout", f"one of {', '.join(LAYOUTS)}")
        self._check(self.refused_if is None or callable(self.refused_if), "refused_if", "a function")
        sound = _is_text(self.stream, _PATH_INSIDE)
        self._check(sound, "stream", 'a path inside the layer, such as "norm1", or "." for the layer')
        for key in ("refused", "update_unknown", "stream_unknown"):
            value = getattr(self, key)
            self._check(value is None or (isinstance(value, str) and bool(value)), key, "a reason in words")
        for key in ("norm", "multiplier", "child"):
            self._check(_is_text(getattr(self, key), _NAME), key, "the name of an attribute of the layer")
        if all(getattr(self, whose) is None for whose in _FACTS):
            raise OptionError(
                f"family {self.name!r}: give attention=, layer= or decoder=, a pattern of class names"
            )
        for whose, facts in _FACTS.items():
            given = [key for key in facts if getattr(self, key) is not None]
            if given and getattr(self, whose) is None:
                raise OptionError(
                    f"family {self.name!r}: {given[0]} needs {whose}=, a pattern of class names"
                )
        if self.refused_if is not None and self.refused is None:
            raise OptionError(f"family {self.name!r}: refused_if needs refused=, the reason")

    def _check(self, sound: bool, key: str, what: str) -> None:
        if not sound:
            raise OptionError(f"family {self.name!r}: {key} must be {what}, not {getattr(self, key)!r}")

    def number(self, key: str, owner: nn.Module) -> int | None:
        """Return `num_heads`, `head_dim` or `num_kv_heads` of the attention module `owner`, or `rows_of_ids` of the decoder; None
        if the entry lacks it.

        Raises OptionError if the module lacks the attribute, or has no positive whole number there.
        """
        given: int | str | None = getattr(self, key)
        if not isinstance(given, str):
            return given
        kind = type(owner).__name__
        try:
            value: int = attrgetter(given)(owner)
        except AttributeError:
            raise OptionError(f"family {self.name!r}: {key} is {given!r}, which a {kind} has not") from None
        if not _is_positive(value):
            raise OptionError(
                f"family {self.name!r}: {given} of a {kind} must be a positive whole number, not {value!r}"
            )
        return value

    def refusal(self, owner: nn.Module) -> str | None:
        """Return the reason why the attention module `owner` cannot be profiled; None if it can."""
        return self.refused if self.refused_if is None or self.refused_if(owner) else None


# By the pattern that they need: the facts of a Family.
_FACTS = {
    "attention": (
        *("projection", "num_heads", "head_dim", "num_kv_heads", "heads_per_unit"),
        *("layout", "refused", "refused_if"),
    ),
    "layer": ("norm", "multiplier", "child", "update_unknown", "stream", "stream_unknown"),
    "decoder": ("rows_of_ids",),
}


def _is_pattern(value: Any) -> bool:
    if value is None:
        return True
    try:
        return isinstance(value, str) and not re.search(value, "")
    except re.error:
        return False


def _is_text(value: Any, pattern: re.Pattern[str]) -> bool:
    return value is None or (isinstance(value, str) and pattern.fullmatch(value) is not None)


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


FAMILIES = (
    # ---- attention that cannot be profiled
    Family(
        "blt",
        attention=r"^Blt",
        refused="its layers run over bytes and over patches of them, so that valid tokens are unknown",
    ),
    Family(
        "bloom",
        attention=r"^Bloom",
        refused="with slow_but_exact it never calls its output projection: set config.slow_but_exact = False",
        refused_if=lambda owner: owner.pretraining_tp > 1 and owner.slow_but_exact,
    ),
    Family(
        "cpmant",
        attention=r"^CpmAnt",
        refused="it puts a prompt of its own before the tokens, so that valid tokens are unknown",
    ),
    Family(
        "deepseek_v4",
        attention=r"^DeepseekV4",
        refused="its output projection is in two steps, and the input of o_b_proj is not the heads'",
    ),
    Family(
        "jetmoe",
        attention=r"^JetMoe",
        refused="its output projections are experts, chosen for each token",
    ),
    Family(
        "torch",
        attention=r"^MultiheadAttention$",
        refused="torch.nn.MultiheadAttention never calls its output projection",
    ),
    Family(
        "prophetnet",
        attention=r"^ProphetNet",
        refused="its n-gram streams share the output projection, so that valid tokens are unknown",
    ),
    Family(
        "reformer",
        attention=r"^Reformer",
        refused="it pads sequences to its chunks, so that valid tokens are unknown",
    ),
    Family("rwkv", attention=r"^Rwkv", refused="it is a linear recurrence without heads"),
    Family("xlnet", attention=r"^XLNet", refused="its output projection is a bare parameter and no module"),
    # ---- heads, and the layout of the projection's input
    Family(
        "diffllama", attention=r"^DiffLlama", heads_per_unit=2
    ),  # the difference of two heads, as wide as both
    Family("fsmt", attention=r"Attention", package="transformers.models.fsmt.", layout="sequence_first"),
    # ---- norms and multipliers between the attention and the residual stream
    Family(
        "gemma",
        layer=r"^(Gemma[234]|Gemma4Unified|DiffusionGemma|EmbeddingGemma2|MuseGlimmer)(Text|Encoder|Decoder)*Layer$",
        norm="post_attention_layernorm",
    ),
    Family(
        "olmo",
        layer=r"^(Olmo[23]|FlexOlmo|OlmoHybridAttention|Exaone4|Exaone4_5_|Afmoe)DecoderLayer$",
        norm="post_attention_layernorm",
    ),
    Family(
        "glm4",
        layer=r"^(Glm4|Kolibri1|T5Gemma2?|Glm4vText|GlmImageText|GlmOcrText)(En|De)?(coder)?Layer$",
        norm="post_self_attn_layernorm",
        child="self_attn",
    ),
    Family("lfm3", layer=r"^Lfm3DecoderLayer$", norm="post_operator_norm"),
    Family(
        "hyperclovax",
        layer=r"^HyperCLOVAXDecoderLayer$",
        norm="post_norm1",
        multiplier="residual_multiplier",
    ),
    Family("falcon_h1", layer=r"^FalconH1DecoderLayer$", multiplier="attn_out_multiplier"),
    Family("granite", layer=r"^Granite\w*DecoderLayer$", multiplier="residual_multiplier"),
    Family("minicpm3", layer=r"^MiniCPM3DecoderLayer$", multiplier="residual_scale"),
    Family("minimax", layer=r"^MiniMaxDecoderLayer$", multiplier="attn_beta_factor"),
    # ---- layers that do something else
    Family("beam", layer=r"^BeamDecoder", update_unknown="it scales the sum with the depth of the layer"),
    Family("gemma3n", layer=r"^Gemma3nText", update_unknown="it mixes several residual streams"),
    Family("hy_v4", layer=r"^HYV4", update_unknown="it mixes several residual streams"),
    Family("idefics", layer=r"^(Idefics|Mllama)\w*CrossAttention", update_unknown="a gate comes between"),
    Family("musicgen", decoder=r"^Musicgen", rows_of_ids="num_codebooks"),
    Family("inkling", layer=r"^Inkling", update_unknown="it convolves the attention's output"),
    Family("qwen4_exp", layer=r"^Qwen4Exp", update_unknown="it mixes several residual streams"),
    Family(
        "zamba",
        layer=r"^Zamba",
        update_unknown="the attention's output goes through another layer before it is added",
    ),
    Family("zaya", layer=r"^Zaya", update_unknown="it scales the output by learnt numbers of each channel"),
)

_registered: dict[str, Family] = {}


def _no_classes() -> dict[str, WeakKeyDictionary[type, Any]]:
    return {whose: WeakKeyDictionary() for whose in _FACTS}


# By the pattern that is matched, what was found for a class: of FAMILIES the first entry, of the registered families all.
_builtin_found = _no_classes()
_registered_found = _no_classes()


def register_family(family: Family) -> None:
    """Make a family of models known, in this process: managers that are attached later use it.

    It comes before the names that the library knows by itself, but does not lift its refusals of classes of transformers.

    Raises:
        OptionError: `family` is no Family, or another family has its name.
    """
    if not isinstance(family, Family):
        raise OptionError(f"a fastheads.Family is needed, not {type(family).__name__}")
    known = _registered.get(family.name) or next((f for f in FAMILIES if f.name == family.name), family)
    if known != family:
        changed = [f.name for f in fields(Family) if getattr(known, f.name) != getattr(family, f.name)]
        raise OptionError(
            f"a family {family.name!r} is known already, with another {', '.join(changed)}: choose another name"
        )
    _registered.setdefault(family.name, family)
    for found in _registered_found.values():
        found.clear()


def any_registered() -> bool:
    """True if a family was registered."""
    return bool(_registered)


def registered_family(whose: str, module: nn.Module) -> Family | None:
    """Return the registered family of `module`, an attention, a layer or a decoder as `whose` says; None if there is none.

    Raises OptionError if there are several.
    """
    if not _registered:
        return None
    kind, found = type(module), _registered_found[whose]
    matching: list[Family] | None = found.get(kind)
    if matching is None:
        matching = [family for family in list(_registered.values()) if _matches(family, whose, kind)]
        found[kind] = matching
    if len(matching) > 1:
        names = " and ".join(repr(family.name) for family in matching)
        raise OptionError(f"a {kind.__name__} is in the families {names}: make a pattern narrower")
    return matching[0] if matching else None


def builtin_family(whose: str, module: nn.Module) -> Family | None:
    """Return the first of FAMILIES that `module` is in, as `registered_family`; None if there is none."""
    kind, found = type(module), _builtin_found[whose]
    if kind not in found:
        found[kind] = next((family for family in FAMILIES if _matches(family, whose, kind)), None)
    family: Family | None = found[kind]
    return family


def family_of(whose: str, module: nn.Module) -> Family | None:
    """Return the family of `module`, as an attention, a layer or a decoder: a registered one, else one of FAMILIES, or None."""
    return registered_family(whose, module) or builtin_family(whose, module)


def rows_of_ids(decoder: nn.Module) -> int:
    """Return how many rows of `input_ids` the decoder takes for each row of tokens."""
    family = family_of("decoder", decoder)
    return 1 if family is None else family.number("rows_of_ids", decoder) or 1


def refusal_of(attention: nn.Module) -> str | None:
    """Return the reason why an attention module cannot be profiled; None if it can."""
    registered, builtin = registered_family("attention", attention), builtin_family("attention", attention)
    reason = None if registered is None else registered.refusal(attention)
    # A registered family may have a class of its own that is called as one of transformers.
    own = registered is not None and not type(attention).__module__.startswith("transformers.")
    return builtin.refusal(attention) if reason is None and builtin is not None and not own else reason


def _matches(family: Family, whose: str, kind: type) -> bool:
    pattern = getattr(family, whose)
    return (
        pattern is not None
        and kind.__module__.startswith(family.package)
        and re.search(pattern, kind.__name__) is not None
    )
