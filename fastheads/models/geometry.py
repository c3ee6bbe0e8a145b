"""Determine how the input of an attention's output projection divides into heads.

The attributes of an attention module describe queries and keys, and the model as built: values may be narrower or wider, and
heads may have been pruned. So the widths of its other projections are used too. If attributes and widths leave one number of
heads, that is the number; if they contradict each other, there is none.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from fastheads.models.families import family_of
from fastheads.models.weight_formats import is_transposed, plain_forward

# Attribute of a wrapper that holds its linear layer (MoshiLinear), and of an adapter that holds the layer it adapts.
WRAPPED = "linear"
ADAPTED = "base_layer"
# Attributes of a linear layer with the width of its input and output; `nx` and `nf` are those of transformers' Conv1D.
WIDTH_ATTRIBUTES = ("in_features", "nx")
OUTPUT_WIDTH_ATTRIBUTES = ("out_features", "nf")

# Attributes of an attention module: the width of one head's value; of its query and key, used for the value where there is no
# other; the number of heads.
VALUE_DIM_ATTRIBUTES = ("v_head_dim", "value_head_dim", "head_v_dim")
# (LXMERT's head_size is the width of all heads.)
COMMON_DIM_ATTRIBUTES = ("key_value_proj_dim", "head_dim", "attention_head_size", "head_size")
HEAD_DIM_ATTRIBUTES = VALUE_DIM_ATTRIBUTES + COMMON_DIM_ATTRIBUTES
NUM_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
# The width of a query and key where it differs from the value's (MLA), or its parts.
QUERY_DIM_ATTRIBUTES = ("qk_head_dim", "q_head_dim")
QUERY_DIM_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim")
NUM_KV_HEADS_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads")
GROUP_ATTRIBUTE = "num_key_value_groups"

# Names of an attention module's projections among its children.
QUERY_PROJECTIONS = (
    "q_b_proj",
    "q_proj",
    "query",
    "q",
    "Wq",
    "wq",
    "q_lin",
    "query_proj",
    "linear_q",
    "to_q",
)
KEY_PROJECTIONS = ("k_proj", "key", "k", "Wk", "wk", "k_lin", "key_proj", "linear_k", "to_k")
VALUE_PROJECTIONS = ("v_proj", "value", "v", "Wv", "wv", "v_lin", "value_proj", "linear_v", "to_v")
LATENT_PROJECTIONS = ("kv_b_proj",)  # MLA: keys without their rotary part, and values
FUSED_PROJECTIONS = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
SEPARATE_QUERY = "q_attn"  # beside a fused projection without queries: GPT-2's attention to an encoder


def heads_per_unit(owner: nn.Module) -> int:
    """Return how many heads the attention combines into one unit before its output projection: mostly 1."""
    family = family_of("attention", owner)
    return 1 if family is None or family.heads_per_unit is None else family.heads_per_unit


def input_width(projection: nn.Module) -> int | None:
    """Return the width of a linear layer's input, or an adapter's; None if it is no linear layer."""
    for layer in (projection, getattr(projection, ADAPTED, None)):
        for attribute in WIDTH_ATTRIBUTES:
            width = getattr(layer, attribute, None)
            if isinstance(width, int):
                return width
    return None


def output_width(layer: Any) -> int | None:
    """Return the width of a linear layer's output, or an adapter's; None if it is no linear layer."""
    if not isinstance(layer, nn.Module):
        return None
    inner = layer._modules.get(ADAPTED) or layer._modules.get(WRAPPED)
    if inner is not None:
        return output_width(inner)
    weight = layer._parameters.get("weight")
    if plain_forward(layer) and type(weight) is nn.Parameter and weight.dim() == 2:
        # The weight itself, since the attributes are stale if only the weight was replaced.
        return weight.shape[1 if is_transposed(layer) else 0]
    return next((n for n in _positive_ints(layer, OUTPUT_WIDTH_ATTRIBUTES)), None)


def head_dim_of(owner: nn.Module, width: int) -> int | None:
    """Return head_dim (the width of a unit of heads) for a projection input of `width`; None if unknown or contradictory."""
    declared = declared_head_dim(owner, width)
    number = _num_units(owner, width, None if declared is None else width // declared)
    if number is None or width % number:
        return None
    family, units = family_of("attention", owner), heads_per_unit(owner)
    if family is not None:
        heads, head_dim = family.number("num_heads", owner), family.number("head_dim", owner)
        if heads not in (None, units * number) or head_dim not in (None, width // (units * number)):
            return None  # the module contradicts its family
    return width // number


def declared_head_dim(owner: nn.Module, width: int) -> int | None:
    """As `head_dim_of`, from the module's attributes alone."""
    units = heads_per_unit(owner)
    widths = [n for n in _head_dims(owner, HEAD_DIM_ATTRIBUTES) if width % (units * n) == 0]
    counts = [n for n in _head_counts(owner) if width % n == 0]
    if widths and counts:
        widths = [n for n in widths if width // n in counts]
        return units * widths[0] if widths else None
    if widths:
        return units * widths[0]
    return units * (width // counts[0]) if counts else None


def _num_units(owner: nn.Module, width: int, declared: int | None) -> int | None:
    """Return the number of units; `declared` is the number that the attributes give."""
    queries, values, fused = (
        _from_queries(owner, width),
        _from_values(owner, width),
        _from_fused(owner, width),
    )
    counts = _from_counts(owner, width)
    if counts and fused is not None and not fused & counts:
        fused = None  # its output holds something else besides, and the number is known without it
    if queries is None:
        projections = _intersection(values, fused)
        if projections is None or declared in projections:
            return declared
        # One equation of a fused projection alone may have a solution by chance.
        return (
            None
            if values is None and counts is None
            else _only(_intersection(projections, _from_value_dims(owner, width), counts))
        )
    others = _intersection(values, fused, _from_value_dims(owner, width), counts)
    if others is not None:
        if queries in others:
            return queries
        # Twice as many queries: each comes with a gate (Qwen3-Next).
        return declared if declared in others and declared is not None and queries == 2 * declared else None
    if queries == declared:
        return declared
    # Without other evidence, twice as many is ambiguous: heads with narrow values, or a gate with each.
    return None if width % queries or (declared is not None and queries == 2 * declared) else queries


def _from_queries(owner: nn.Module, width: int) -> int | None:
    """Return the number of units by the query projection's width; None if unknown, an impossible number if it does not divide."""
    dim, given = _query_dim(owner), _first_projection(owner, QUERY_PROJECTIONS)[1]
    if dim is None or given is None:
        return None
    number, rest = divmod(given, heads_per_unit(owner) * dim)
    return width + 1 if rest or not number else number


def _from_values(owner: nn.Module, width: int) -> set[int] | None:
    """Return the possible numbers of units by the value projection's width, since there are as many value heads as key heads."""
    units, (_, latent) = heads_per_unit(owner), _first_projection(owner, LATENT_PROJECTIONS)
    without_rotary = getattr(owner, QUERY_DIM_PARTS[0], None)
    if latent is not None and isinstance(without_rotary, int) and without_rotary > 0:
        number, rest = divmod(latent - width, without_rotary)
        return {number} if rest == 0 and number > 0 and width % number == 0 else set()
    kv_heads, values = kv_heads_of_keys(owner), _first_projection(owner, VALUE_PROJECTIONS)[1]
    if kv_heads is None or values is None:
        return None
    dim, rest = divmod(values, kv_heads)
    if rest or not dim or width % (units * dim):
        return set()
    number = width // (units * dim)
    return {number} if number * units % kv_heads == 0 else set()


def _from_fused(owner: nn.Module, width: int) -> set[int] | None:
    """Return the possible numbers of units by the width of a fused query, key and value projection."""
    dim, given = _query_dim(owner), _first_projection(owner, FUSED_PROJECTIONS)[1]
    if dim is None or given is None or heads_per_unit(owner) > 1 or SEPARATE_QUERY in owner._modules:
        return None
    found = set()
    for number in (n for n in range(1, given // dim + 1) if width % n == 0):
        kv_heads = declared_kv_heads(owner, number) or [number]
        found |= {number for n in kv_heads if given == number * dim + n * (dim + width // number)}
    return found


def _from_counts(owner: nn.Module, width: int) -> set[int] | None:
    units = heads_per_unit(owner)
    return {n // units for n in _head_counts(owner) if width % n == 0 and n % units == 0} or None


def _from_value_dims(owner: nn.Module, width: int) -> set[int] | None:
    """Return the possible numbers of units by the attributes for the value's width."""
    units = heads_per_unit(owner)
    return {
        width // (units * n) for n in _head_dims(owner, VALUE_DIM_ATTRIBUTES) if width % (units * n) == 0
    } or None


def _query_dim(owner: nn.Module) -> int | None:
    """Return the width of one head's query and key."""
    parts = _positive_ints(owner, QUERY_DIM_PARTS)
    of_parts = [sum(parts)] if len(parts) == len(QUERY_DIM_PARTS) else []
    return next(
        iter(
            _positive_ints(owner, QUERY_DIM_ATTRIBUTES)
            + of_parts
            + _positive_ints(owner, COMMON_DIM_ATTRIBUTES)
        ),
        None,
    )


def num_kv_heads(owner: nn.Module, num_heads: int) -> int | None:
    """Return the number of KV heads that `num_heads` query heads share, by attributes and the key projection; None if unknown.

    Raises ValueError, with the numbers, if they contradict each other.
    """
    declared = declared_kv_heads(owner, num_heads)
    if not declared:
        return None
    # Not from the keys where heads are combined: several key heads may form one unit.
    asked = kv_heads_of_keys(owner) if heads_per_unit(owner) == 1 else None
    if len({*declared, asked or declared[0]}) > 1:
        names = (GROUP_ATTRIBUTE, *NUM_KV_HEADS_ATTRIBUTES)
        has = [f"{name} {getattr(owner, name)}" for name in names if hasattr(owner, name)]
        raise ValueError(", ".join([*has, describe(owner)]))
    return declared[0]


def kv_heads_of_keys(owner: nn.Module) -> int | None:
    """Return the number of key heads by the key projection's width; None if unknown."""
    dim, keys = _query_dim(owner), _first_projection(owner, KEY_PROJECTIONS)[1]
    return None if dim is None or not keys or keys % dim else keys // dim


def declared_kv_heads(owner: nn.Module, num_heads: int) -> list[int]:
    """Return every number of KV heads for `num_heads` query heads that the module's family or attributes give."""
    family = family_of("attention", owner)
    if family is not None and (given := family.number("num_kv_heads", owner)) is not None:
        return [given] if num_heads % given == 0 else []
    groups = [num_heads // n for n in _positive_ints(owner, (GROUP_ATTRIBUTE,)) if num_heads % n == 0]
    return groups + [n for n in _positive_ints(owner, NUM_KV_HEADS_ATTRIBUTES) if num_heads % n == 0]


def describe(owner: nn.Module) -> str:
    """List the attributes and projection widths that concern heads, for an error message."""
    names = (*HEAD_DIM_ATTRIBUTES, *QUERY_DIM_ATTRIBUTES, *QUERY_DIM_PARTS, *NUM_HEADS_ATTRIBUTES)
    has = [f"{name} {getattr(owner, name)}" for name in names if hasattr(owner, name)]
    family = family_of("attention", owner)
    for key in ("num_heads", "head_dim") if family is not None else ():
        assert family is not None
        if (number := family.number(key, owner)) is not None:
            has.append(f"{key} {number} by its family {family.name!r}")
    for kind in (
        QUERY_PROJECTIONS,
        KEY_PROJECTIONS,
        VALUE_PROJECTIONS,
        LATENT_PROJECTIONS,
        FUSED_PROJECTIONS,
    ):
        name, given = _first_projection(owner, kind)
        if given is not None:
            has.append(f"{name} {given} wide")
    return ", ".join(has) or "none of " + ", ".join(HEAD_DIM_ATTRIBUTES + NUM_HEADS_ATTRIBUTES)


def _first_projection(owner: nn.Module, names: Iterable[str]) -> tuple[str, int | None]:
    """Return the name and the output width of the first child in `names` that is a linear layer; "" and None if there is none."""
    for name in names:
        given = output_width(owner._modules.get(name))
        if given is not None:
            return name, given
    return "", None


def _intersection(*candidates: set[int] | None) -> set[int] | None:
    """Intersect the sets that are not None; None if all are."""
    known = [numbers for numbers in candidates if numbers is not None]
    return set.intersection(*known) if known else None


def _only(numbers: set[int] | None) -> int | None:
    return next(iter(numbers)) if numbers is not None and len(numbers) == 1 else None


def _head_dims(owner: nn.Module, attributes: Iterable[str]) -> list[int]:
    """Return the width of one head that the module's family gives; else what these attributes give."""
    family = family_of("attention", owner)
    given = None if family is None else family.number("head_dim", owner)
    return _positive_ints(owner, attributes) if given is None else [given]


def _head_counts(owner: nn.Module) -> list[int]:
    """Return the number of heads that the module's family gives; else what its attributes give."""
    family = family_of("attention", owner)
    given = None if family is None else family.number("num_heads", owner)
    return _positive_ints(owner, NUM_HEADS_ATTRIBUTES) if given is None else [given]


def _positive_ints(owner: Any, attributes: Iterable[str]) -> list[int]:
    values = [getattr(owner, attribute, None) for attribute in attributes]
    return [n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 0]
