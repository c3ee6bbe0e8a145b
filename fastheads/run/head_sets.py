"""Choose the sets of heads of an ablation job: by rankings, at random, and one by one. The same arguments give the same sets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastheads.errors import OptionError

Pair = tuple[int, int]
Pairs = tuple[Pair, ...]


@dataclass
class HeadSets:
    """Sets of heads, each once, and where they belong: indices in `sets`."""

    fractions: list[float]
    num_heads: int
    sets: list[Pairs] = field(default_factory=list)
    curves: dict[str, list[int]] = field(default_factory=dict)  # metric -> set by fraction
    random: list[list[int]] = field(default_factory=list)  # [fractions][draws]
    matched: dict[str, list[list[int]]] = field(default_factory=dict)  # metric -> [fractions][draws]
    each_head: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._known = {heads: n for n, heads in enumerate(self.sets)}

    def add(self, heads: Sequence[Pair]) -> int:
        """Return the index of the set, which is added if it is new."""
        key = tuple(sorted(heads))
        if key not in self._known:
            self._known[key] = len(self.sets)
            self.sets.append(key)
        return self._known[key]


def head_sets(
    rankings: Mapping[str, Sequence[Pair]],
    fractions: Sequence[float],
    *,
    draws: int,
    seed: int,
    matched: bool = True,
    each_head: bool = False,
) -> HeadSets:
    """Choose the lowest heads by each ranking, as many at random, and as many in the same layers at random.

    A draw orders all heads, and takes the first: its sets contain one another.

    Args:
        rankings: by metric: all heads as (layer, head), lowest first; the same heads in each.
        fractions: of the heads, each rounded to a whole number of them.
        draws: random draws of each kind; 0 for none.
        seed: of the draws.
        matched: draw within the layers, too.
        each_head: add each head alone.

    Raises:
        OptionError: the rankings are of different heads, or a fraction is no head, or all fractions are not above 0 and up to 1.
    """
    (first, *others) = rankings.items()
    heads = sorted(first[1])
    for metric, ranked in others:
        if sorted(ranked) != heads:
            raise OptionError(
                f"{first[0]} and {metric} were not measured for the same heads: ablate by them one by one"
            )
    found = HeadSets(list(fractions), len(heads))
    counts = [_count(fraction, len(heads)) for fraction in fractions]
    for metric, ranked in rankings.items():
        found.curves[metric] = [found.add(ranked[:count]) for count in counts]
    orders = [np.random.default_rng([seed, 0, draw]).permutation(len(heads)) for draw in range(draws)]
    if draws:
        found.random = [
            [found.add([heads[n] for n in order[:count]]) for order in orders] for count in counts
        ]
    by_layer: dict[int, list[Pair]] = {}
    for pair in heads:
        by_layer.setdefault(pair[0], []).append(pair)
    for index, (metric, ranked) in enumerate(rankings.items() if draws and matched else ()):
        shuffled = []
        for draw in range(draws):
            generator = np.random.default_rng([seed, 1 + index, draw])
            shuffled.append(
                {
                    layer: [some[n] for n in generator.permutation(len(some))]
                    for layer, some in by_layer.items()
                }
            )
        found.matched[metric] = [
            [found.add(_matched(ranked[:count], order)) for order in shuffled] for count in counts
        ]
    if each_head:
        found.each_head = [found.add([pair]) for pair in heads]
    return found


def _count(fraction: float, heads: int) -> int:
    if not 0 < fraction <= 1:
        raise OptionError(f"fractions must be above 0 and up to 1, not {fraction}")
    count = round(fraction * heads)
    if not count:
        raise OptionError(f"the fraction {fraction} of {heads} heads is no head")
    return count


def _matched(chosen: Sequence[Pair], order: Mapping[int, Sequence[Pair]]) -> list[Pair]:
    """Take as many heads of each layer as are chosen there, the first in `order`."""
    numbers: dict[int, int] = {}
    for layer, _ in chosen:
        numbers[layer] = numbers.get(layer, 0) + 1
    return [pair for layer, number in numbers.items() for pair in order[layer][:number]]
