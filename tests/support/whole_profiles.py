"""Profiles that must be the same in every bit, and texts to make them from."""

import random

import numpy as np
import torch

from fastheads import HeadProfile


def some_texts(number: int = 60, longest: int = 90) -> list[str]:
    chance = random.Random(0)
    return [
        "".join(chance.choice("abc defgh ijk") for _ in range(chance.randint(1, longest)))
        for _ in range(number)
    ]


def same_bits(one: HeadProfile, other: HeadProfile) -> bool:
    return (
        one.metrics == other.metrics
        and all(
            torch.equal(a, b)
            for metric in one.metrics
            for a, b in zip(one.moments[metric], other.moments[metric], strict=True)
        )
        and same_vectors(one, other, 0.0)
    )


def same_vectors(one: HeadProfile, other: HeadProfile, rtol: float) -> bool:
    """True if the mean vectors are equal to `rtol` of the heads' root mean square, or neither has any."""
    if one.vectors is None or other.vectors is None:
        return one.vectors is other.vectors
    a, b = one.vectors.arrays(), other.vectors.arrays()
    scale = np.sqrt(one.vectors.output_power).max()
    return all(np.allclose(a[name], b[name], rtol=rtol, atol=rtol * scale, equal_nan=True) for name in a)


def assert_same(found: HeadProfile, want: HeadProfile) -> None:
    assert same_bits(found, want)

    def plain(profile):
        data = {k: v for k, v in profile.metadata["data"].items() if k not in ("seconds", "overhead")}
        return profile.metadata | {"data": data}

    assert plain(found) == plain(want)
