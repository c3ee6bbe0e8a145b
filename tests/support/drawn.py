"""What the property tests share: options that hypothesis draws, the oracle over sequences, and a count of what happened."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import strategies as st
from oracle import assert_results
from tiny_models import build

import fastheads

# Examples of each property by default, 2,000 at the least; `-m thorough` runs 20 times as many.
EXAMPLES = {"calls": 1200, "layouts": 800, "forwards": 1000}
THOROUGH = 20
RTOL = 2e-5
SMALL = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=8, max_position_embeddings=32
)


def examples(name):
    """Parametrize a test by `number`, how many examples to draw."""
    number = EXAMPLES[name]
    thorough = pytest.param(THOROUGH * number, marks=pytest.mark.thorough)
    return pytest.mark.parametrize("number", [number, thorough], ids=["default", "thorough"])


def small_llama():
    """Two layers of four heads, eight wide."""
    return build(**SMALL)


@dataclass(frozen=True)
class Options:
    """Those of a HookManager."""

    token_agg: str = "all"
    skip_first: int = 0
    backend: str = "factored"
    group_bytes: int = 2**26

    def attach(self, model):
        return fastheads.HookManager(model, **vars(self))


def options():
    """Options; 1,500 bytes hold the input of some layers and not of others."""
    return st.builds(
        Options,
        token_agg=st.sampled_from(["all", "last", "token"]),
        skip_first=st.sampled_from([0, 0, 1, 2, 3]),
        backend=st.sampled_from(["factored", "einsum", "loop"]),
        group_bytes=st.sampled_from([2**26, 1500, 0]),
    )


def bits(batch, seq):
    """Rows of 0 and 1: padding on any side, between the tokens, or everywhere."""
    return st.lists(
        st.lists(st.integers(0, 1), min_size=seq, max_size=seq), min_size=batch, max_size=batch
    ).map(lambda rows: tuple(map(tuple, rows)))


def sequences(batch, seq, valid=None, bounds=None):
    """The valid tokens of each sequence, as places in the flattened `[batch * seq]`.

    `valid`: rows of 0 and 1, or None for all 1. `bounds`: where packed sequences begin and end, or None for one in each row.
    """
    flags = [1] * (batch * seq) if valid is None else [flag for row in valid for flag in row]
    edges = [row * seq for row in range(batch + 1)] if bounds is None else bounds
    return [[token for token in range(start, stop) if flags[token]] for start, stop in pairwise(edges)]


def cut(x, places):
    """The tokens of each sequence, `[n, width]`, of `x` `[batch, seq, width]`."""
    flat = x.reshape(-1, x.shape[-1])
    return [flat[tokens] for tokens in places if tokens]


def assert_sequences(results, sites, inputs, how):
    """Results are the oracle's over `inputs`: for each site a list of sequences `[n, width]` of valid tokens."""
    padded, masks = [], []
    for site, of_site in zip(sites, inputs, strict=True):
        width = site.num_heads * site.head_dim
        longest = max([len(x) for x in of_site], default=1)
        batch = torch.zeros(max(len(of_site), 1), longest, width, dtype=torch.float64)
        for row, x in enumerate(of_site):
            batch[row, : len(x)] = x
        padded.append([batch])
        lengths = [len(x) for x in of_site] or [0]
        masks.append([[n < length for n in range(longest)] for length in lengths])
    assert all(mask == masks[0] for mask in masks)
    assert_results(results, sites, padded, masks[:1], how.token_agg, RTOL, how.skip_first)


class Tally(Counter):
    """How many examples ran, and how many forwards were measured, refused and so on."""

    def check(self, number, **least):
        """At least `number` examples ran, and of the forwards at least these shares went so."""
        assert self["examples"] >= number, self
        forwards = sum(count for what, count in self.items() if what != "examples")
        for what, share in least.items():
            assert self[what] >= share * forwards, (what, self)
