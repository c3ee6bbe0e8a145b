"""Repeated data among many profiles: found as by comparing each two, in a time that does not grow with the square."""

import itertools
import math
import random
import time

import numpy as np
import pytest

from fastheads.errors import MergeError
from fastheads.results.head_profile import HeadProfile
from fastheads.results.overlap import first_repeat, runs_of
from fastheads.stats.arrays import MomentArrays

ROWS = 3


def profile_of(runs, rows=range(ROWS), value=0.0, **metadata):
    """A profile with one sample of `value` in each of the rows, of the data of these runs."""
    count = np.zeros((ROWS, 1), dtype=np.int64)
    count[list(rows)] = 1
    some = count > 0
    moments = MomentArrays(
        count=count,
        mean=np.where(some, value, 0.0),
        m2=np.zeros((ROWS, 1)),
        min=np.where(some, value, np.inf),
        max=np.where(some, value, -np.inf),
        nonfinite=np.zeros((ROWS, 1), dtype=np.int64),
    )
    sites = [{"name": f"{n}.o_proj", "layer": n, "num_heads": 1, "head_dim": 2} for n in range(ROWS)]
    data = {"source": "s", "tokens": 1, "sequences": 1, "complete": True}
    data = data | runs[0] if len(runs) == 1 else data | {"parts": [data | run for run in runs]}
    return HeadProfile(
        {"head_output_norm": moments},
        {"model": "m", "token_agg": "all", "sites": sites, "data": data} | metadata,
    )


def share_data(one, two):
    """True if two runs share windows, or may: the windows of a content are numbers, of which a shard has every n-th."""
    known = None not in (one["sha256"], two["sha256"])
    heads = one["head_sha256"] == two["head_sha256"]
    if one["sha256"] != two["sha256"] and set(one["files_sha256"]) & set(two["files_sha256"]):
        return True
    if known and one["sha256"] != two["sha256"]:
        return heads
    if not known and not heads:  # the contents are one where their first documents are
        return False
    (i, n), (j, m) = one["shard"], two["shard"]
    if n * m > 1 and (one["window_characters"], one["cut"]) != (two["window_characters"], two["cut"]):
        return True
    windows = range(math.lcm(n, m))
    return bool(set(windows[i::n]) & set(windows[j::m]))


def random_run(rng):
    n = rng.choice([1, 2, 3, 4, 6])
    content = rng.randrange(40)
    return {
        "sha256": rng.choice([f"w{content}", f"w{content}", None]),
        "head_sha256": f"h{content // 2}" if rng.random() < 0.3 else f"only {rng.random()}",
        "files_sha256": [f"f{rng.randrange(200)}" for _ in range(rng.randrange(3))],
        "window_characters": rng.choice([100, 100, 100, 200]),
        "cut": rng.choice(["documents", "documents", "stream"]),
        "shard": [rng.randrange(n), n],
    }


def test_it_finds_the_first_pair_that_comparing_each_two_finds():
    seen = set()
    for seed in range(400):
        rng = random.Random(seed)
        profiles = []
        for number in range(rng.randrange(2, 9)):
            rows = rng.choice([[0], [1, 2], [0, 1, 2], []])
            runs = [random_run(rng) for _ in range(rng.randrange(1, 4))]
            profiles.append(profile_of(runs, rows, value=float(number)))
        expected = None
        counts = [profile.arrays["head_output_norm"].count for profile in profiles]
        for i, j in itertools.combinations(range(len(profiles)), 2):
            both = (counts[i] & counts[j]).any()
            runs = [runs_of(profiles[k].metadata) for k in (i, j)]
            if both and any(share_data(a, b) for a in runs[0] for b in runs[1]):
                expected = (i, j)
                break
        found = first_repeat(profiles)
        assert (None if found is None else found[:2]) == expected, seed
        assert found is None or found[2]
        seen.add(expected is None)
    assert seen == {True, False}


@pytest.mark.parametrize("same", [True, False])
def test_equal_moments_are_the_same_samples_unless_all_runs_are_disjoint(same):
    parts = [profile_of([{"sha256": "w", "shard": [n, 3]}]) for n in range(3)]
    assert first_repeat(parts) is None
    other = profile_of([{"sha256": "v", "shard": [0, 1]}], value=0.0 if same else 1.0)
    assert first_repeat([*parts, other]) == ((0, 3, "the very same samples") if same else None)
    unknown = profile_of([{}], value=0.0)
    assert first_repeat([unknown, parts[0]]) == (0, 1, "the very same samples")
    empty = profile_of([{}], rows=[])
    assert first_repeat([empty, empty]) is None


def test_thousands_of_parts_merge_in_seconds():
    def part(shards, n, value):
        runs = [{"sha256": "w", "head_sha256": "h", "files_sha256": ["f"], "shard": [i, n]} for i in shards]
        return profile_of(runs, value=value)

    parts = [part([i], 5000, value=i / 7) for i in range(5000)]
    halves = [part(range(i, 5000, 2), 5000, value=float(i)) for i in range(2)]
    alike = [part([i], 5000, value=1.0) for i in range(5000)]  # bit for bit
    for profiles in (parts, halves, alike):
        began = time.process_time()
        merged = HeadProfile.merge(profiles)
        assert time.process_time() - began < 15  # about 1 s; by comparing each two, more than a minute
        assert len(merged.metadata["data"]["parts"]) == 5000
    began = time.process_time()
    with pytest.raises(MergeError, match=r"profile 8 and profile 5001: both hold a part of 's' \(8/5000\)"):
        HeadProfile.merge([*parts, part([7], 5000, value=-1.0)])
    with pytest.raises(MergeError, match="profile 1 and profile 5001: they differ in model"):
        HeadProfile.merge([*parts, profile_of([{"sha256": "x"}], model="other")])
    assert time.process_time() - began < 30
