"""Find data that profiles share, so that merging them does not count samples twice: among thousands of runs, by an index.

Metadata may come from any file, so the type of every entry is checked before use.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fastheads.results.protocol import Profile
from fastheads.stats.arrays import Array

Metadata = dict[str, Any]
DISJOINT = ""  # result of `_shared_data` for runs known to share no data


def first_repeat(profiles: Sequence[Profile]) -> tuple[int, int, str] | None:
    """Return the first two profiles with samples of the same data for the same heads, and what they share; None if no two have.

    The data are those of their runs; profiles with the very same moments share theirs, unless all their runs are disjoint.
    """
    measured = [_measured(profile) for profile in profiles]
    runs = [runs_of(profile.metadata) for profile in profiles]
    heads: dict[bytes, tuple[Array, _Index]] = {}  # an index for each set of measured heads
    contents = _Contents()
    pairs: list[tuple[int, int]] = []
    for j, own in enumerate(measured):
        placed = [(contents.of(run), *_shard(run)) for run in runs[j]]
        # Different layers over the same data, say, share no samples.
        others = [index for of_index, index in heads.values() if bool((own & of_index).any())]
        owners = [i for index in others for run in placed if (i := index.shares(run)) is not None]
        if owners:
            pairs.append((min(owners), j))
        index = heads.setdefault(own.tobytes(), (own, _Index(contents)))[1]
        for run in placed:
            index.add(run, j)
    alike: dict[bytes, list[int]] = {}
    for number, profile in enumerate(profiles):
        if measured[number].any():
            alike.setdefault(_digest(profile), []).append(number)
    for numbers in alike.values():
        # Parts of one corpus with equal contents may have the same moments, bit for bit: the index has compared them.
        if len(numbers) > 1 and not contents.are_parts_of_one(runs[number] for number in numbers):
            equal = itertools.combinations(numbers, 2)
            pairs.extend(itertools.islice((ij for ij in equal if not _are_disjoint(runs, *ij)), 1))
    if not pairs:
        return None
    i, j = min(pairs)
    texts = itertools.starmap(_shared_data, itertools.product(runs[i], runs[j]))
    return i, j, next((text for text in texts if text), "the very same samples")


def _are_disjoint(runs: list[list[Metadata]], i: int, j: int) -> bool:
    """True if all runs of two profiles are known to share no data."""
    pairs = itertools.product(runs[i], runs[j])
    return bool(runs[i]) and bool(runs[j]) and all(_shared_data(*pair) == DISJOINT for pair in pairs)


class _Contents:
    """The different contents of runs, numbered; runs that differ in nothing but their shard have one."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.examples: list[Metadata] = []
        self._relations: dict[tuple[int, int], tuple[str | None, bool]] = {}

    def of(self, run: Metadata) -> int:
        """Return the number of the run's content."""
        compared = [run.get(key) for key in ("sha256", "head_sha256", "window_characters", "cut")]
        key = json.dumps([*compared, sorted(_files(run))], sort_keys=True, default=id)
        number = self._numbers.setdefault(key, len(self.examples))
        if number == len(self.examples):
            self.examples.append(run)
        return number

    def relation(self, one: int, two: int) -> tuple[str | None, bool]:
        """Describe what two contents share, None if nothing; and True if it depends on the runs' shards."""
        if (one, two) not in self._relations:
            pair = self.examples[one], self.examples[two]
            shared, is_one = _shared_content(*pair)
            self._relations[one, two] = shared, is_one and _difference_of_cut(*pair) is None
        return self._relations[one, two]

    def are_parts_of_one(self, several: Iterable[list[Metadata]]) -> bool:
        """True if these are runs over parts of one content, whose shards alone say whether they are disjoint."""
        numbers: set[int | None] = set()
        for runs in several:
            numbers.update(map(self.of, runs) if runs else (None,))
            if len(numbers) > 1:
                return False
        (number,) = numbers
        return number is not None and self.relation(number, number)[1]


_Placed = tuple[int, int, int]  # the content of a run, its shard's index, and the number of shards


class _Index:
    """Runs by all that two which share data have in common; each with the first profile that has it."""

    def __init__(self, contents: _Contents) -> None:
        self._contents = contents
        self._by_hash: dict[tuple[str, str], dict[int, None]] = {}  # contents
        self._owner: dict[int, int] = {}  # by content
        # By content, number of shards n, and a divisor d of n: by index modulo d.
        self._by_shard: dict[int, dict[int, dict[int, dict[int, int]]]] = {}

    def add(self, run: _Placed, owner: int) -> None:
        """Add a run of the profile `owner`, which comes after those of the runs before."""
        content, i, n = run
        if content not in self._owner:
            self._owner[content] = owner
            for key in _hashes(self._contents.examples[content]):
                self._by_hash.setdefault(key, {})[content] = None
        by_divisor = self._by_shard.setdefault(content, {}).setdefault(n, {n: {}})
        for divisor, owners in by_divisor.items():
            owners.setdefault(i % divisor, owner)

    def shares(self, run: _Placed) -> int | None:
        """Return the first profile with a run that shares data with this one; None if there is none."""
        content = run[0]
        keys = _hashes(self._contents.examples[content])
        found: list[int] = []
        for other in dict.fromkeys(c for key in keys for c in self._by_hash.get(key, ())):
            shared, by_shard = self._contents.relation(other, content)
            if by_shard:
                found.extend(self._owners_of_part(other, *run[1:]))
            elif shared is not None:
                found.append(self._owner[other])
        return min(found, default=None)

    def _owners_of_part(self, content: int, i: int, n: int) -> Iterator[int]:
        """Yield owners of runs over parts of `content` that are not disjoint with part i of n, the first of them included."""
        for m, by_divisor in self._by_shard[content].items():
            divisor = math.gcd(n, m)
            if divisor not in by_divisor:
                owners: dict[int, int] = {}
                for j, owner in by_divisor[m].items():
                    owners[j % divisor] = min(owner, owners.get(j % divisor, owner))
                by_divisor[divisor] = owners
            if (first := by_divisor[divisor].get(i % divisor)) is not None:
                yield first


def _hashes(run: Metadata) -> list[tuple[str, str]]:
    """Return the hashes of which two runs have one in common if they share data, as far as known."""
    kinds = ("sha256", "head_sha256")
    named = [(kind, run[kind]) for kind in kinds if isinstance(run.get(kind), str)]
    return named + [("file", h) for h in sorted(_files(run))]


def _shared_data(one: Metadata, two: Metadata) -> str | None:
    """Describe the data that two runs share, or may share; DISJOINT if they ran disjoint parts; None if none is known."""
    what, is_one = _shared_content(one, two)
    (i, n), (j, m) = _shard(one), _shard(two)
    if not is_one or n == m == 1:
        return what
    if (difference := _difference_of_cut(one, two)) is not None:
        return f"parts of {what} {difference}"
    if (i - j) % math.gcd(n, m):
        return DISJOINT
    return f"a part of {what} ({i + 1}/{n}" + (")" if (i, n) == (j, m) else f" and {j + 1}/{m})")


def _shared_content(one: Metadata, two: Metadata) -> tuple[str | None, bool]:
    """Describe what the contents of two runs have in common, None if nothing is known; and True if they are the same.

    Contents are equal if their hashes are, or, if not both are known, those of their first documents (`Corpus.identity`). Files
    that differ but begin with the same documents may be versions of one, or in different containers. Parts are disjoint if their
    windows have different indices modulo the greatest common divisor of the numbers of parts.
    """
    wholes, heads = ([run.get(key) for run in (one, two)] for key in ("sha256", "head_sha256"))
    pairs = [pair for pair in (wholes, heads) if all(isinstance(h, str) for h in pair)]
    alike = [pair[0] == pair[1] for pair in pairs]
    if wholes[0] != wholes[1] and _files(one) & _files(two):
        return (
            f"a file that {str(one.get('source'))[:200]!r} and {str(two.get('source'))[:200]!r} share",
            False,
        )
    if not any(alike):
        return None, False
    what = repr(str(one.get("source"))[:200])
    if not alike[0]:
        return f"documents with which both {what} and {str(two.get('source'))[:200]!r} begin", False
    return what, True


def _difference_of_cut(one: Metadata, two: Metadata) -> str | None:
    """Describe how two runs cut one content differently, so that their shards do not fit together; None if they do not."""
    if one.get("window_characters") != two.get("window_characters"):
        return "that were cut in windows of different sizes"
    return "that were cut in different ways" if one.get("cut") != two.get("cut") else None


def _files(run: Metadata) -> set[str]:
    """Return the hashes of the files that a run read, as far as known."""
    several = run.get("files_sha256")
    return {h for h in (several if isinstance(several, list) else [run.get("sha256")]) if isinstance(h, str)}


def _shard(run: Metadata) -> tuple[int, int]:
    """Return the index of the run's part, from 0, and the number of parts."""
    shard = run.get("shard")
    if isinstance(shard, list) and len(shard) == 2 and all(type(number) is int for number in shard):
        i, n = shard
        if 0 <= i < n:
            return i, n
    return 0, 1


def _measured(profile: Profile) -> Array:
    """Mark the heads with samples, bool `[rows, heads]`."""
    return np.any([m.count + m.nonfinite > 0 for m in profile.arrays.values()], axis=0)


def _digest(profile: Profile) -> bytes:
    digest = hashlib.sha256()
    for metric in sorted(profile.metrics):
        for plane in profile.arrays[metric]:
            digest.update(plane.tobytes())
    return digest.digest()


def runs_of(metadata: Metadata) -> list[Metadata]:
    """Return the data entries of all runs merged in a profile."""
    data = metadata.get("data")
    if not isinstance(data, dict):
        return []
    parts = data.get("parts")
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else [data]
