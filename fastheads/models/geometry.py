"""How the input of an attention's output projection divides into heads.

What an attention module says of its heads is said of queries and keys first, and of the model as it was built: values may be
narrower or wider, and heads may have been pruned away. So the widths of its other projections are asked too. Where they and what
the module says leave one number of heads, that is the number; where they contradict one another, there is none.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from fastheads.models.weight_formats import is_transposed, plain_forward

# Where a layer that is no linear layer itself keeps the one that it calls (MoshiLinear), and an adapter the layer it adapts.
WRAPPED = "linear"
ADAPTED = "base_layer"
# What a linear layer calls the width of its input, and of its output; `nx` and `nf` are transformers' Conv1D.
WIDTH_ATTRIBUTES = ("in_features", "nx")
OUTPUT_WIDTH_ATTRIBUTES = ("out_features", "nf")

# Where an attention module keeps the width of one head's value; then of its query and key, which is that of the value too where
# nothing says otherwise; and how many heads there are.
VALUE_DIM_ATTRIBUTES = ("v_head_dim", "value_head_dim", "head_v_dim")
# (LXMERT's head_size is that of all heads.)
COMMON_DIM_ATTRIBUTES = ("key_value_proj_dim", "head_dim", "attention_head_size", "head_size")
HEAD_DIM_ATTRIBUTES = VALUE_DIM_ATTRIBUTES + COMMON_DIM_ATTRIBUTES
NUM_HEADS_ATTRIBUTES = ("num_heads", "num_attention_heads", "n_heads", "n_head")
# The width of queries and keys where it is another one than the value's (MLA), or the parts that it has there.
QUERY_DIM_ATTRIBUTES = ("qk_head_dim", "q_head_dim")
QUERY_DIM_PARTS = ("qk_nope_head_dim", "qk_rope_head_dim")
NUM_KV_HEADS_ATTRIBUTES = ("num_key_value_heads", "num_kv_heads")
GROUP_ATTRIBUTE = "num_key_value_groups"

# The projections of an attention module, as its children are called.
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
LATENT_PROJECTIONS = ("kv_b_proj",)  # of MLA: keys without their rotary part, and values
FUSED_PROJECTIONS = ("qkv_proj", "query_key_value", "c_attn", "Wqkv", "qkv")
QUERY_APART = (
    "q_attn"  # beside a fused projection that is none of queries then: GPT-2's attention to an encoder
)

# Heads that are one unit where they reach the output projection, by patterns of the attention's class.
HEADS_PER_UNIT = {
    r"^DiffLlama": 2,  # the difference of two heads, as wide as both
}


def heads_per_unit(owner: nn.Module) -> int:
    """How many heads of an attention module make one where they reach its projection: 1 of nearly all."""
    return next((n for kind, n in HEADS_PER_UNIT.items() if re.search(kind, type(owner).__name__)), 1)


def input_width(projection: nn.Module) -> int | None:
    """The width of a linear layer's input; an adapter has that of its base layer."""
    for layer in (projection, getattr(projection, ADAPTED, None)):
        for attribute in WIDTH_ATTRIBUTES:
            width = getattr(layer, attribute, None)
            if isinstance(width, int):
                return width
    return None


def output_width(layer: Any) -> int | None:
    """The width of a linear layer's output; an adapter has that of its base layer. None of what is no linear layer."""
    if not isinstance(layer, nn.Module):
        return None
    inner = layer._modules.get(ADAPTED) or layer._modules.get(WRAPPED)
    if inner is not None:
        return output_width(inner)
    weight = layer._parameters.get("weight")
    if plain_forward(layer) and type(weight) is nn.Parameter and weight.dim() == 2:
        # What is multiplied with: the attributes stay behind where only the weight is replaced.
        return weight.shape[1 if is_transposed(layer) else 0]
    return next((n for n in _numbers(layer, OUTPUT_WIDTH_ATTRIBUTES)), None)


def head_dim_of(owner: nn.Module, width: int) -> int | None:
    """The width of one unit of heads in an input of the projection that is `width` wide; None where what there is does not say,
    or contradicts itself.
    """
    said = said_head_dim(owner, width)
    number = _number(owner, width, None if said is None else width // said)
    return None if number is None else width // number


def said_head_dim(owner: nn.Module, width: int) -> int | None:
    """The same by what the module says of itself, its projections not asked."""
    units = heads_per_unit(owner)
    widths = [n for n in _numbers(owner, HEAD_DIM_ATTRIBUTES) if width % (units * n) == 0]
    counts = [n for n in _numbers(owner, NUM_HEADS_ATTRIBUTES) if width % n == 0]
    if widths and counts:
        widths = [n for n in widths if width // n in counts]
        return units * widths[0] if widths else None
    if widths:
        return units * widths[0]
    return units * (width // counts[0]) if counts else None


def _number(owner: nn.Module, width: int, said: int | None) -> int | None:
    """How many units there are; `said` is that number by what the module says."""
    queries, values, fused = (
        _from_queries(owner, width),
        _from_values(owner, width),
        _from_fused(owner, width),
    )
    counts = _from_counts(owner, width)
    if counts and fused is not None and not fused & counts:
        fused = None  # it gives something else besides, and the number is known without it
    if queries is None:
        projections = _common(values, fused)
        if projections is None or said in projections:
            return said
        # One equation of a fused projection alone may have a solution by chance.
        return (
            None
            if values is None and counts is None
            else _only(_common(projections, _explicit(owner, width), counts))
        )
    others = _common(values, fused, _explicit(owner, width), counts)
    if others is not None:
        if queries in others:
            return queries
        # Twice as many queries: a gate comes with each (Qwen3-Next).
        return said if said in others and said is not None and queries == 2 * said else None
    if queries == said:
        return said
    # With nobody else to ask, twice as many are heads with narrow values, or a gate with each.
    return None if width % queries or (said is not None and queries == 2 * said) else queries


def _from_queries(owner: nn.Module, width: int) -> int | None:
    """By the projection of queries, where it gives nothing but them. A number that `width` does not divide by contradicts all."""
    dim, given = _query_dim(owner), _projected(owner, QUERY_PROJECTIONS)[1]
    if dim is None or given is None:
        return None
    number, rest = divmod(given, heads_per_unit(owner) * dim)
    return width + 1 if rest or not number else number


def _from_values(owner: nn.Module, width: int) -> set[int] | None:
    """By the width of a head's value: there are as many heads of values as of keys."""
    units, (_, latent) = heads_per_unit(owner), _projected(owner, LATENT_PROJECTIONS)
    without_rotary = getattr(owner, QUERY_DIM_PARTS[0], None)
    if latent is not None and isinstance(without_rotary, int) and without_rotary > 0:
        number, rest = divmod(latent - width, without_rotary)
        return {number} if rest == 0 and number > 0 and width % number == 0 else set()
    kv_heads, values = kv_heads_of_keys(owner), _projected(owner, VALUE_PROJECTIONS)[1]
    if kv_heads is None or values is None:
        return None
    dim, rest = divmod(values, kv_heads)
    if rest or not dim or width % (units * dim):
        return set()
    number = width // (units * dim)
    return {number} if number * units % kv_heads == 0 else set()


def _from_fused(owner: nn.Module, width: int) -> set[int] | None:
    """By a projection of queries, keys and values in one."""
    dim, given = _query_dim(owner), _projected(owner, FUSED_PROJECTIONS)[1]
    if dim is None or given is None or heads_per_unit(owner) > 1 or QUERY_APART in owner._modules:
        return None
    found = set()
    for number in (n for n in range(1, given // dim + 1) if width % n == 0):
        kv_heads = said_kv_heads(owner, number) or [number]
        found |= {number for n in kv_heads if given == number * dim + n * (dim + width // number)}
    return found


def _from_counts(owner: nn.Module, width: int) -> set[int] | None:
    units = heads_per_unit(owner)
    return {
        n // units for n in _numbers(owner, NUM_HEADS_ATTRIBUTES) if width % n == 0 and n % units == 0
    } or None


def _explicit(owner: nn.Module, width: int) -> set[int] | None:
    """By what the module says of its values in particular."""
    units = heads_per_unit(owner)
    return {
        width // (units * n) for n in _numbers(owner, VALUE_DIM_ATTRIBUTES) if width % (units * n) == 0
    } or None


def _query_dim(owner: nn.Module) -> int | None:
    """The width of one head's query and key."""
    parts = _numbers(owner, QUERY_DIM_PARTS)
    of_parts = [sum(parts)] if len(parts) == len(QUERY_DIM_PARTS) else []
    return next(
        iter(_numbers(owner, QUERY_DIM_ATTRIBUTES) + of_parts + _numbers(owner, COMMON_DIM_ATTRIBUTES)), None
    )


def num_kv_heads(owner: nn.Module, num_heads: int) -> int | None:
    """How many KV heads `num_heads` query heads share, by all that the module has to say; None where it does not say.

    Raises ValueError, with the numbers, where they contradict one another.
    """
    said = said_kv_heads(owner, num_heads)
    if not said:
        return None
    # Of units of several heads the projection of keys cannot tell: several heads of keys may go into one.
    asked = kv_heads_of_keys(owner) if heads_per_unit(owner) == 1 else None
    if len({*said, asked or said[0]}) > 1:
        names = (GROUP_ATTRIBUTE, *NUM_KV_HEADS_ATTRIBUTES)
        has = [f"{name} {getattr(owner, name)}" for name in names if hasattr(owner, name)]
        raise ValueError(", ".join([*has, describe(owner)]))
    return said[0]


def kv_heads_of_keys(owner: nn.Module) -> int | None:
    """How many heads of keys the module's own projection of keys gives; None where that does not show."""
    dim, keys = _query_dim(owner), _projected(owner, KEY_PROJECTIONS)[1]
    return None if dim is None or not keys or keys % dim else keys // dim


def said_kv_heads(owner: nn.Module, num_heads: int) -> list[int]:
    """How many KV heads the module says that there are to `num_heads` query heads: each number that it gives."""
    groups = [num_heads // n for n in _numbers(owner, (GROUP_ATTRIBUTE,)) if num_heads % n == 0]
    return groups + [n for n in _numbers(owner, NUM_KV_HEADS_ATTRIBUTES) if num_heads % n == 0]


def describe(owner: nn.Module) -> str:
    """What there is that says anything of the heads, for an error."""
    names = (*HEAD_DIM_ATTRIBUTES, *QUERY_DIM_ATTRIBUTES, *QUERY_DIM_PARTS, *NUM_HEADS_ATTRIBUTES)
    has = [f"{name} {getattr(owner, name)}" for name in names if hasattr(owner, name)]
    for kind in (
        QUERY_PROJECTIONS,
        KEY_PROJECTIONS,
        VALUE_PROJECTIONS,
        LATENT_PROJECTIONS,
        FUSED_PROJECTIONS,
    ):
        name, given = _projected(owner, kind)
        if given is not None:
            has.append(f"{name} {given} wide")
    return ", ".join(has) or "none of " + ", ".join(HEAD_DIM_ATTRIBUTES + NUM_HEADS_ATTRIBUTES)


def _projected(owner: nn.Module, names: Iterable[str]) -> tuple[str, int | None]:
    """The first child that is called like one of `names` and is a linear layer, and the width that it gives."""
    for name in names:
        given = output_width(owner._modules.get(name))
        if given is not None:
            return name, given
    return "", None


def _common(*witnesses: set[int] | None) -> set[int] | None:
    """What all that say anything agree on; None where none does."""
    said = [witness for witness in witnesses if witness is not None]
    return set.intersection(*said) if said else None


def _only(numbers: set[int] | None) -> int | None:
    return next(iter(numbers)) if numbers is not None and len(numbers) == 1 else None


def _numbers(owner: Any, attributes: Iterable[str]) -> list[int]:
    values = [getattr(owner, attribute, None) for attribute in attributes]
    return [n for n in values if isinstance(n, int) and not isinstance(n, bool) and n > 0]
