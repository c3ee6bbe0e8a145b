"""Profiles that must be the same in every bit, and texts to make them from."""

import random

import torch

from fastheads import HeadProfile


def some_texts(number: int = 60, longest: int = 90) -> list[str]:
    chance = random.Random(0)
    return [
        "".join(chance.choice("abc defgh ijk") for _ in range(chance.randint(1, longest)))
        for _ in range(number)
    ]


def same_bits(one: HeadProfile, other: HeadProfile) -> bool:
    return one.metrics == other.metrics and all(
        torch.equal(a, b)
        for metric in one.metrics
        for a, b in zip(one.moments[metric], other.moments[metric], strict=True)
    )


def assert_same(found: HeadProfile, want: HeadProfile) -> None:
    assert same_bits(found, want)

    def plain(profile):
        data = {k: v for k, v in profile.metadata["data"].items() if k not in ("seconds", "overhead")}
        return profile.metadata | {"data": data}

    assert plain(found) == plain(want)
