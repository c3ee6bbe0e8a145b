"""Which modules of a model are attention output projections; their layer, number of heads and head_dim."""

import re
from dataclasses import dataclass, field

from torch import nn

# A child of one of these names, in an attention module of the decoder, is its output projection.
PROJECTION_NAMES = ("o_proj",)

# Attention classes by name: what transformers calls them, and what it calls the mixers that are no softmax attention over
# heads though some of them have an `o_proj` too (Kimi-Linear, Olmo-Hybrid), and the towers that are not the decoder.
ATTENTION = re.compile(r"(Attention|Attn|MLA)\w*$")
NOT_ATTENTION = re.compile(
    r"Vision|Audio|Encoder|Mixer|DeltaNet|DeltaAttention|LinearAttention|Lightning|Conv|Indexer"
)

# Where an attention module keeps the width of one head of the projection's input (MLA's is the value's); the first that divides
# that input is taken.
HEAD_DIM_ATTRIBUTES = ("v_head_dim", "value_head_dim", "head_dim", "head_size", "attention_head_size")
NUM_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head")


class NoSitesError(ValueError):
    """The model has no attention output projection that can be profiled."""


@dataclass(frozen=True)
class HeadSite:
    """One attention output projection: its input is `[batch, seq, num_heads * head_dim]`."""

    name: str  # of the projection, as in model.named_modules()
    layer: int
    num_heads: int
    head_dim: int
    module: nn.Module = field(repr=False, compare=False)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DataParallel", "DistributedDataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def decoder_of(model: nn.Module) -> nn.Module:
    """The stack of decoder layers: `get_decoder()` of the model, or of the outermost module in it that has one."""
    for module in model.modules():
        get_decoder = getattr(module, "get_decoder", None)
        decoder = get_decoder() if callable(get_decoder) else None
        if isinstance(decoder, nn.Module):
            return decoder
    return model


def find_sites(model: nn.Module) -> list[HeadSite]:
    """The attention output projections of `model`'s decoder, in the order of its modules.

    Raises NoSitesError, naming what was looked for and the attention classes found, where there is none.
    """
    decoder = decoder_of(model)
    inside = {id(m) for m in decoder.modules()}
    sites: list[HeadSite] = []
    attention_classes, seen = set(), set()
    for path, owner in model.named_modules():
        class_name = type(owner).__name__
        if id(owner) not in inside or not ATTENTION.search(class_name):
            continue
        attention_classes.add(class_name)
        if NOT_ATTENTION.search(class_name):
            continue
        for child in PROJECTION_NAMES:
            projection = getattr(owner, child, None)
            if isinstance(projection, nn.Module) and isinstance(
                getattr(projection, "in_features", None), int
            ):
                if id(projection) in seen:
                    break  # shared between attention modules: one site that fires for each
                seen.add(id(projection))
                name = f"{path}.{child}" if path else child
                sites.append(_site(name, owner, projection))
                break
    if not sites:
        found = ", ".join(sorted(attention_classes)) or "none"
        raise NoSitesError(
            f"no attention output projection to profile in {type(model).__name__}: looked in its decoder "
            f"({type(decoder).__name__}) for attention modules with a child {' or '.join(PROJECTION_NAMES)} "
            f"that has in_features; attention classes found: {found}"
        )
    return sites


def _site(name: str, owner: nn.Module, projection: nn.Module) -> HeadSite:
    width = int(projection.in_features)  # type: ignore[arg-type]
    head_dim = _head_dim(owner, width)
    if head_dim is None:
        raise NoSitesError(
            f"{name}: none of {', '.join(HEAD_DIM_ATTRIBUTES + NUM_HEADS_ATTRIBUTES)} of {type(owner).__name__} "
            f"divides the projection's input width {width} into heads"
        )
    # The number of heads is the width's, never the configuration's: layers and ranks may differ.
    return HeadSite(name, _layer(name, owner), width // head_dim, head_dim, projection)


def _head_dim(owner: nn.Module, width: int) -> int | None:
    for attribute in HEAD_DIM_ATTRIBUTES:
        head_dim = getattr(owner, attribute, None)
        if isinstance(head_dim, int) and head_dim > 0 and width % head_dim == 0:
            return head_dim
    for attribute in NUM_HEADS_ATTRIBUTES:
        num_heads = getattr(owner, attribute, None)
        if isinstance(num_heads, int) and num_heads > 0 and width % num_heads == 0:
            return width // num_heads
    return None


def _layer(name: str, owner: nn.Module) -> int:
    layer_idx = getattr(owner, "layer_idx", None)
    if isinstance(layer_idx, int) and layer_idx >= 0:
        return layer_idx
    first_integer = re.search(r"\d+", name)
    return int(first_integer.group()) if first_integer else 0
