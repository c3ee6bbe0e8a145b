"""Find the attention output projections of a model, with their layer, number of heads and head_dim.

The usual names are in the tables at the top; what a family does otherwise is in `families`.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os import PathLike

from torch import nn

from fastheads.errors import NoSitesError, OptionError
from fastheads.models.families import any_registered, family_of, refusal_of, registered_family
from fastheads.models.geometry import WRAPPED, declared_head_dim, describe, head_dim_of, input_width
from fastheads.models.geometry import num_kv_heads as declared_num_kv_heads
from fastheads.stats.options import checked_names

# Paths from an attention module to its output projection; the first that exists is used. ".." is the parent, if that is an
# attention module too: BERT keeps the projection beside the attention.
PROJECTION_PATHS = (
    "o_proj",
    "out_proj",
    "dense",
    "c_proj",
    "o",  # T5
    "Wo",  # ModernBERT
    "out_lin",  # XLM
    "output",  # Pix2Struct
    "proj",  # vision towers
    "linear_out",  # speech towers
    "../output.dense",
)

# Class names of attention in transformers; and those of mixers that are no softmax attention over heads, though some have an
# `o_proj` too (Kimi-Linear, Olmo-Hybrid), and of towers outside the decoder.
ATTENTION = re.compile(r"(Attention|Attn|MLA)\w*$")
NOT_ATTENTION = re.compile(
    r"Vision|(?<!Higgs)Audio|Encoder|Mixer|DeltaNet|DeltaAttention|(?<!Kimi)LinearAttention|Lightning|Conv|Indexer|Residual|Pooling"
    r"|^MultiheadAttention$"  # torch's, in towers
)
# Module names of attention to an encoder's output, which a model without an encoder never runs.
CROSS_ATTENTION = re.compile(r"\b(encoder_attn|crossattention|EncDecAttention)\b")

# Packages whose attention passes [batch, seq, width]; packages of wrappers that may lie between an attention and its projection.
BATCH_FIRST = ("transformers.",)
WRAPPER_PACKAGES = ("torch.", "peft.", "fastheads.")


# Wrappers of other packages, by package and class among the bases, which replace what the model's modules compute.
FOREIGN_WRAPPERS = {
    ("nnsight", "Envoy"): "nnsight replaces the forward of every module",
    (
        "transformer_lens",
        "TransformerBridge",
    ): "TransformerLens replaces the projections of the model that it bridges",
    ("transformer_lens", "HookedRootModule"): "TransformerLens keeps weights of its own, in other shapes",
}


def check_module(model: object) -> None:
    """Raise NoSitesError for a wrapper of another package, which runs the model in another way, and OptionError for what is no
    module.
    """
    how = "transformers.AutoModelForCausalLM.from_pretrained(...)"
    for kind in type(model).__mro__:
        why = FOREIGN_WRAPPERS.get((kind.__module__.partition(".")[0], kind.__name__))
        if why is not None:
            raise NoSitesError(
                f"{type(model).__name__} cannot be profiled: {why}. Profile a model of its own, loaded with {how}"
            )
    if not isinstance(model, nn.Module):
        what = f"{model!r:.100}" if isinstance(model, str | PathLike) else f"a {type(model).__name__}"
        raise OptionError(
            f"model must be a torch.nn.Module, not {what}: load it first, as with {how}; fastheads.profile() also takes the "
            "name of a folder, a GGUF file or a Hub id"
        )


@dataclass(frozen=True)
class HeadSite:
    """One attention output projection: its input is `[batch, seq, num_heads * head_dim]`.

    In a tensor-parallel model `num_heads` counts the heads of all ranks, on every rank, so that profiles can be merged with
    those of one process. This rank's input may hold only some of them.
    """

    name: str  # the projection's name in model.named_modules()
    layer: int
    num_heads: int
    head_dim: int
    module: nn.Module = field(repr=False, compare=False)


def num_kv_heads(model: nn.Module, site: HeadSite) -> int | None:
    """Return the number of KV heads of the attention of `site`, a site of `model`; None if it is unknown.

    Raises ValueError, with the numbers, if the attention says it in several ways that contradict each other.
    """
    parts = site.name.split(".")
    for depth in range(
        len(parts) - 1, 0, -1
    ):  # the attention is above the projection, most often right above
        owner = model.get_submodule(".".join(parts[:depth]))
        if (count := declared_num_kv_heads(owner, site.num_heads)) is not None:
            return count
    return None


def known_num_kv_heads(model: nn.Module, site: HeadSite) -> int:
    """As `num_kv_heads`. Raises OptionError, naming the site, if the number is unknown or contradictory."""
    try:
        count = num_kv_heads(model, site)
    except ValueError as error:
        raise OptionError(
            f"{site.name}: how many query heads share keys and values is said in several ways ({error})"
        ) from None
    if count is None:
        raise OptionError(
            f"{site.name}: its attention does not say how many query heads share keys and values"
        )
    return count


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DataParallel, DistributedDataParallel and torch.compile's wrappers.

    Raises:
        NoSitesError: it is a wrapper of another package, which runs the model in another way.
        OptionError: it is no module.
    """
    while True:
        check_module(model)
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def decoder_of(model: nn.Module) -> nn.Module:
    """Return the stack of decoder layers: `get_decoder()` of the outermost module that has one.

    Repeated while the result has one too, as in BLIP-2 and Florence-2, whose language model is a whole model itself.
    """
    for module in model.modules():
        decoder = _decoder_within(module)
        while decoder is not None:
            inner = _decoder_within(decoder)
            if inner is None or inner is decoder:
                return decoder
            decoder = inner
    return model


def _decoder_within(module: nn.Module) -> nn.Module | None:
    """Return `module.get_decoder()`; None if that is not the module or inside it, or has no children."""
    get_decoder = getattr(module, "get_decoder", None)
    decoder = get_decoder() if callable(get_decoder) else None
    if not isinstance(decoder, nn.Module) or all(decoder is not inside for inside in module.modules()):
        return None
    return decoder if next(decoder.children(), None) is not None else None  # ModernBERT names its head so


def sites_of_layers(sites: list[HeadSite], layers: list[int] | None) -> dict[int, HeadSite]:
    """Select the sites in `layers` (None: all), keyed by index in `sites`. Raises OptionError for layers without a site."""
    rows = dict(enumerate(sites))
    if layers is None:
        return rows
    known = {site.layer for site in sites}
    if not layers or not known.issuperset(layers):
        raise OptionError(
            f"layers must name some of the layers {min(known)} to {max(known)} that have a site, not {layers}"
        )
    return {row: site for row, site in rows.items() if site.layer in layers}


def is_sequence_first(model: nn.Module, site: HeadSite) -> bool:
    """True if the projection's input is `[seq, batch, width]`."""
    family = family_of("attention", attention_of(model, site))
    return family is not None and family.layout == "sequence_first"


def has_known_layout(model: nn.Module, site: HeadSite) -> bool:
    """True if the order of the projection's input dimensions is known: the attention runs a forward of transformers, or its own
    of a registered family that says the order.
    """
    owner = attention_of(model, site)
    if "forward" in vars(owner):
        return False
    forward = getattr(inspect.unwrap(type(owner).forward), "__module__", "")
    family = registered_family("attention", owner)
    if family is not None and family.layout is not None:
        return forward in {kind.__module__ for kind in type(owner).__mro__}
    return type(owner).__module__.startswith(BATCH_FIRST) and forward.startswith(BATCH_FIRST)


def attention_of(model: nn.Module, site: HeadSite) -> nn.Module:
    """Return the module that calls the projection."""
    registered = registered_attention_of(model, site)
    if registered is not None:
        return registered[0]
    parts = site.name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        above = model.get_submodule(".".join(parts[:depth]))
        if not type(above).__module__.startswith(WRAPPER_PACKAGES):
            return above
    return model


def registered_attention_of(model: nn.Module, site: HeadSite) -> tuple[nn.Module, int] | None:
    """Return the attention of a registered family that the projection belongs to, and the number of parts of the projection's
    name that lead to the outermost module of that attention; None if there is none.
    """
    if not any_registered():
        return None
    parts = site.name.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        above = model.get_submodule(".".join(parts[:depth]))
        if registered_family("attention", above) is not None:
            return above, depth
        for child in above.children():
            family = registered_family("attention", child)
            if family is not None and family.projection == f"../{'.'.join(parts[depth:])}":
                return child, depth + 1
    return None


def find_sites(
    model: nn.Module, include: str | Iterable[str] = (), *, layers: Collection[int] | None = None
) -> list[HeadSite]:
    """Find the attention output projections of `model`'s decoder, in the order of its modules.

    Vision and audio towers, linear attention, and attention to an encoder that the model does not have are left out. `include`
    adds them: `fnmatch` patterns (a "*" matches dots too) for the names of attention modules or projections in
    `model.named_modules()`, such as "*.linear_attn" or "vision_tower.*". Matches that cannot be profiled are skipped. With
    `layers`, attention of other layers is left out if it cannot be profiled.

    Raises:
        NoSitesError: there is no site, a pattern matches none, or some attention cannot be profiled; the message says why.
        OptionError: a registered family does not fit the model, or it is no module.
    """
    check_module(model)
    patterns = checked_names("include", include)
    attentions = list(_attentions(model))
    included: set[str] = set()
    for pattern in patterns:
        included |= _matching(pattern, attentions, type(model).__name__)
    chosen = [a for a in attentions if a.by_default or a.path in included]
    if layers is not None:
        chosen = [a for a in chosen if a.layer in layers or a.is_profilable(chosen)]
    for attention in chosen:
        attention.check_profilable()
    # Keyed by projection: one that several modules share is one site, which fires for each of them.
    sites: dict[int, HeadSite] = {}
    for attention in chosen:
        if attention.projection is not None:
            sites.setdefault(id(attention.projection), attention.site())
    if not sites:
        for attention in attentions:
            attention.check_profilable()  # also of what is left out, since its reason says more
        decoder = type(decoder_of(model)).__name__
        missing = f"linear layer called {', '.join(PROJECTION_PATHS)}" if chosen else "softmax attention"
        raise NoSitesError(
            f"no attention output projection to profile in {type(model).__name__}: its decoder ({decoder}) has no {missing}; "
            f"attention classes found: {_examples(attentions)}"
            + ("; include=... adds those that are left out" if attentions else "")
        )
    _check_complete(chosen)
    return list(sites.values())


def _matching(pattern: str, attentions: "list[_Attention]", model: str) -> set[str]:
    """Return the paths of attention modules that match `pattern` and can be profiled; raise NoSitesError if there are none."""
    candidates = [a for a in attentions if a.projection is not None]
    matching = [a for a in candidates if a.is_called(pattern)]
    if not matching:
        left_out = _examples(a for a in candidates if not a.by_default)
        raise NoSitesError(
            f"no attention module of {model} matches include={pattern!r}; those left out by default: {left_out}"
        )
    profilable = {a.path for a in matching if refusal_of(a.owner) is None}
    if not profilable:
        matching[0].check_profilable()
    return profilable


@dataclass(frozen=True)
class _Attention:
    """An attention module, or another module with heads and an output projection."""

    path: str
    owner: nn.Module
    by_default: bool  # True: profiled without include
    name: str = ""  # the projection's
    projection: nn.Module | None = None

    def is_called(self, pattern: str) -> bool:
        return fnmatchcase(self.path, pattern) or fnmatchcase(self.name, pattern)

    def check_profilable(self) -> None:
        """Raise NoSitesError, with the reason, if it cannot be profiled."""
        if (why := refusal_of(self.owner)) is not None:
            kind = type(self.owner).__name__
            raise NoSitesError(f"{self.path or 'the model'} ({kind}) cannot be profiled: {why}")

    @property
    def layer(self) -> int:
        return _layer(self.name or self.path, self.owner)

    def is_profilable(self, chosen: "list[_Attention]") -> bool:
        """True if neither its site nor a missing projection among `chosen` is an error."""
        try:
            self.check_profilable()
            if self.projection is not None:
                self.site()
        except NoSitesError:
            return False
        return self.is_served(chosen)

    def is_served(self, chosen: "list[_Attention]") -> bool:
        """True if it has a projection, or contains or is inside attention that has one."""
        return any(
            a.projection is not None
            and (f"{self.path}.".startswith(f"{a.path}.") or a.name.startswith(f"{self.path}."))
            for a in chosen
        )

    def site(self) -> HeadSite:
        assert self.projection is not None
        width = input_width(self.projection) or 0
        head_dim = head_dim_of(self.owner, width)
        if head_dim is None:
            raise NoSitesError(
                f"{self.name}: its input, {width} wide, has an unknown or ambiguous number of heads by the attributes and "
                f"projections of {type(self.owner).__name__}: it has {describe(self.owner)}"
            )
        # From the width, never from the configuration: layers and ranks may differ.
        return HeadSite(self.name, self.layer, width // head_dim, head_dim, self.projection)


def _attentions(model: nn.Module) -> Iterator[_Attention]:
    """Yield every attention module, profiled by default or not, in the order of the model's modules."""
    modules = dict(model.named_modules(remove_duplicate=False))
    decoder = decoder_of(model)
    in_decoder = {id(m) for m in decoder.modules()}
    around = [m for m in unwrapped(model).modules() if any(inside is decoder for inside in m.modules())]
    has_encoder = any(getattr(getattr(m, "config", None), "is_encoder_decoder", False) for m in around)
    for path, owner in model.named_modules():
        kind = type(owner).__name__
        registered = registered_family("attention", owner) is not None
        is_attention = registered or ATTENTION.search(kind) is not None
        name, projection = _projection(path, modules)
        if not is_attention and (
            projection is None or declared_head_dim(owner, input_width(projection) or 0) is None
        ):
            continue
        usual = registered or not NOT_ATTENTION.search(kind)
        by_default = is_attention and id(owner) in in_decoder and usual
        if by_default and not has_encoder:
            by_default = not CROSS_ATTENTION.search(path)
        yield _Attention(path, owner, by_default, name, projection)


def _projection(path: str, modules: dict[str, nn.Module]) -> tuple[str, nn.Module | None]:
    """Return the name and the output projection of the attention module at `path`; "" and None if there is none."""
    family = family_of("attention", modules[path])
    named = None if family is None else family.projection
    for relative in PROJECTION_PATHS if named is None else (named,):
        parts = path.split(".") if path else []
        steps = relative.split("/")
        if steps[0] == "..":
            parts = parts[:-1]
            if named is None and not ATTENTION.search(type(modules[".".join(parts)]).__name__):
                continue
        name = ".".join([*parts, *steps[-1].split(".")])
        module = modules.get(name)
        while module is not None and input_width(module) is None:
            name = f"{name}.{WRAPPED}"
            module = modules.get(name)
        if module is not None:
            return name, module
    if family is not None and named is not None:
        kind = type(modules[path]).__name__
        raise OptionError(
            f"family {family.name!r}: projection is {named!r}, but {path} ({kind}) has no linear layer there"
        )
    return "", None


def _layer(name: str, owner: nn.Module) -> int:
    layer_idx = getattr(owner, "layer_idx", None)
    if isinstance(layer_idx, int) and layer_idx >= 0:
        return layer_idx
    first_integer = re.search(r"\d+", name)
    return int(first_integer.group()) if first_integer else 0


def _check_complete(chosen: list[_Attention]) -> None:
    """Raise NoSitesError if an attention module has no projection, and neither contains nor is inside one that has."""
    for attention in chosen:
        if not attention.is_served(chosen):
            raise NoSitesError(
                f"{attention.path} ({type(attention.owner).__name__}) has no linear layer called "
                f"{', '.join(PROJECTION_PATHS)}: the profile would lack its heads"
            )


def _examples(attentions: Iterable[_Attention]) -> str:
    """List the classes, each with the path of one module, for a message."""
    by_class = {type(a.owner).__name__: a.path for a in attentions}
    return ", ".join(f"{kind} ({path})" for kind, path in sorted(by_class.items())) or "none"
