"""Which profiles may be merged, and what the merged one says of its origin.

Metadata may come from anybody's file: nothing here takes an entry for what it should be.
"""

import copy
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastheads.errors import MergeError
from fastheads.results.possible import MOST_SAMPLES
from fastheads.results.protocol import Profile
from fastheads.stats.arrays import Array
from fastheads.stats.names import UPDATE_METRIC

Metadata = dict[str, Any]
DISJOINT = ""  # what two runs both had where they are known to have had nothing


def check_mergeable(profiles: Sequence[Profile], names: Sequence[str], *, allow_repeated: bool) -> None:
    """Raise MergeError, naming two of the profiles and what is between them, unless they are of the same model, weights,
    aggregation and metrics, and of data that do not overlap where they measured the same heads; and where the counts of all of
    them together would be more than can be told exactly.
    """
    for (a, name_a), (b, name_b) in itertools.combinations(zip(profiles, names, strict=True), 2):
        difference = _difference(a, b)
        if difference is not None:
            raise MergeError(f"cannot merge {name_a} and {name_b}: they differ in {difference}")
    for metric in profiles[0].metrics:
        for plane in ("count", "nonfinite"):
            # In float64, where no sum wraps; each count is exact there, or beyond what is allowed.
            counts = np.stack([getattr(p.arrays[metric], plane).astype(np.float64) for p in profiles])
            if bool((counts.sum(axis=0) > MOST_SAMPLES).any()) or bool((counts < 0).any()):
                raise MergeError(
                    f"cannot merge {', '.join(names)}: together they have more samples of {metric} than can be counted"
                )
    if allow_repeated:
        return
    measured, digests = [_measured(p) for p in profiles], [_digest(p) for p in profiles]
    for i, j in itertools.combinations(range(len(profiles)), 2):
        if not bool((measured[i] & measured[j]).any()):
            continue  # other layers, say, over the same data: each head got each sample once
        leaves = itertools.product(_leaves(profiles[i].metadata), _leaves(profiles[j].metadata))
        told = list(itertools.starmap(_shared_data, leaves))
        repeated = next((text for text in told if text not in (None, DISJOINT)), None)
        # Disjoint parts of some data, all alike, may well have the same moments to the last bit.
        disjoint = bool(told) and all(text == DISJOINT for text in told)
        if repeated is None and not disjoint and digests[i] == digests[j]:
            repeated = "the very same samples"
        if repeated is not None:
            raise MergeError(
                f"cannot merge {names[i]} and {names[j]}: both hold {repeated}, which would count twice "
                "(allow_repeated=True, or --allow-repeated, merges them all the same)"
            )


def _difference(a: Profile, b: Profile) -> str | None:
    """What keeps two profiles from being merged, whatever their data; None where nothing does."""
    one, two = a.metadata, b.metadata
    weights = _difference_of_weights(one.get("weights"), two.get("weights"))
    if one.get("model") != two.get("model") and weights != "":
        told = f" ({weights})" if weights else ""
        return f"model: {one.get('model')!r} and {two.get('model')!r}{told}"
    if weights:
        return weights
    if one["sites"] != two["sites"]:
        return f"sites: {_difference_of_sites(one['sites'], two['sites'])}"
    for key in ("token_agg", "skip_first"):
        if one.get(key) != two.get(key):
            return f"{key}: {one.get(key)!r} and {two.get(key)!r}"
    if set(a.metrics) != set(b.metrics):
        return f"metrics: only one has {', '.join(sorted(set(a.metrics) ^ set(b.metrics)))}"
    for row, (left, right) in enumerate(zip(_updates(a), _updates(b), strict=True)):
        if left and right and left != right:
            return f"what layer {a.layers[row]} adds to the residual stream: {left!r} and {right!r}"
    return None


def _difference_of_weights(one: Any, two: Any) -> str | None:
    """What differs, "" where nothing does, None where that cannot be told.

    Fingerprints of two schemes say nothing of each other. The first scheme read a few numbers of each tensor: what differs
    there is different, what does not may be. Where tensors were not seen, the rest can be compared if they were the same ones.
    """
    if not (isinstance(one, dict) and isinstance(two, dict)):
        return None
    schemes = [weights.get("scheme", 1) for weights in (one, two)]
    if schemes[0] != schemes[1]:
        return None
    complete = one.get("unseen") == two.get("unseen") == 0
    if one.get("sha256") == two.get("sha256"):
        return "" if complete and schemes[0] != 1 else None
    if one.get("layout") != two.get("layout"):
        kinds = [_dtypes(weights) for weights in (one, two)]
        return (
            f"weights: those of one are {kinds[0]}, of the other {kinds[1]}"
            if kinds[0] != kinds[1]
            else ("weights: they have other names or shapes")
        )
    same_unseen = isinstance(one.get("unseen_names"), str) and one["unseen_names"] == two.get("unseen_names")
    return "weights: names and shapes are the same, the numbers are not" if complete or same_unseen else None


def _dtypes(weights: Metadata) -> str:
    names = weights.get("dtypes")
    return (
        "+".join(str(name) for name in names if str(name).isidentifier()) if isinstance(names, list) else ""
    )


def _difference_of_sites(one: list[Metadata], two: list[Metadata]) -> str:
    if len(one) != len(two):
        return f"{len(one)} and {len(two)} of them"
    left, right = next((x, y) for x, y in zip(one, two, strict=True) if x != y)
    shown = [f"{s['name']!r} with {s['num_heads']} heads of {s['head_dim']}" for s in (left, right)]
    return (
        f"{shown[0]}, and {shown[1]}"
        if shown[0] != shown[1]
        else f"{left['name']!r} is layer {left['layer']} and {right['layer']}"
    )


def _updates(profile: Profile) -> list[str]:
    """What is said of the update of each row that has samples of it; "" for the others."""
    told = _by_row(profile)
    moments = profile.arrays.get(UPDATE_METRIC)
    if moments is None:
        return [""] * len(told)
    some = np.any(moments.count > 0, axis=1)
    return [text if there else "" for text, there in zip(told, some, strict=True)]


def _by_row(profile: Profile) -> list[str]:
    """`residual_update` of each row; "" where nothing is said."""
    rows, told = profile.shape[0], profile.metadata.get("residual_update")
    texts = told if isinstance(told, list) and len(told) == rows else [told] * rows
    return [text if isinstance(text, str) else "" for text in texts]


def _measured(profile: Profile) -> Array:
    """Which heads got samples, bool `[rows, heads]`."""
    return np.any([m.count + m.nonfinite > 0 for m in profile.arrays.values()], axis=0)


def _digest(profile: Profile) -> bytes:
    digest = hashlib.sha256()
    for metric in sorted(profile.metrics):
        for plane in profile.arrays[metric]:
            digest.update(plane.tobytes())
    return digest.digest()


def _leaves(metadata: Metadata) -> list[Metadata]:
    """The data of each run that is in a profile."""
    data = metadata.get("data")
    if not isinstance(data, dict):
        return []
    parts = data.get("parts")
    return [part for part in parts if isinstance(part, dict)] if isinstance(parts, list) else [data]


def _shared_data(one: Metadata, two: Metadata) -> str | None:
    """What of the data two runs both had, or may have had; DISJOINT where they had parts that are; None where nothing tells.

    The same content is the same hash of all of it, or, where that is not known of both, of its first documents
    (`Corpus.identity`). Files that are not the same and begin with the same documents may be two versions of one, or in another
    container. Parts of it are disjoint where they are windows with other indices modulo the number of parts.
    """
    wholes, heads = ([run.get(key) for run in (one, two)] for key in ("sha256", "head_sha256"))
    pairs = [pair for pair in (wholes, heads) if all(isinstance(h, str) for h in pair)]
    alike = [pair[0] == pair[1] for pair in pairs]
    if wholes[0] != wholes[1] and _files(one) & _files(two):
        return f"a file that {str(one.get('source'))[:200]!r} and {str(two.get('source'))[:200]!r} share"
    if not any(alike):
        return None
    what = repr(str(one.get("source"))[:200])
    if not alike[0]:
        return f"documents with which both {what} and {str(two.get('source'))[:200]!r} begin"
    shards = [_shard(run) for run in (one, two)]
    (i, n), (j, m) = shards
    if n == m == 1:
        return what
    if one.get("window_characters") != two.get("window_characters"):
        return f"parts of {what} that were cut in windows of different sizes"
    if one.get("cut") != two.get("cut"):
        return f"parts of {what} that were cut in different ways"
    if (i - j) % math.gcd(n, m):
        return DISJOINT
    return f"a part of {what} ({i + 1}/{n}" + (")" if (i, n) == (j, m) else f" and {j + 1}/{m})")


def _files(run: Metadata) -> set[str]:
    """The hashes of the files that a run read, as far as they are known."""
    several = run.get("files_sha256")
    return {h for h in (several if isinstance(several, list) else [run.get("sha256")]) if isinstance(h, str)}


def _shard(run: Metadata) -> tuple[int, int]:
    """Which part of how many, counted from 0."""
    shard = run.get("shard")
    if isinstance(shard, list) and len(shard) == 2 and all(type(number) is int for number in shard):
        i, n = shard
        if 0 <= i < n:
            return i, n
    return 0, 1


def merged_metadata(profiles: Sequence[Profile]) -> Metadata:
    """The first one's, with the layers united, options that differ listed, and the data summed."""
    parts = [profile.metadata for profile in profiles]
    merged = copy.deepcopy(parts[0])
    if len(parts) == 1:
        return merged
    for key in ("backend", "precision"):
        names = [name for part in parts if key in part for name in str(part[key]).split("+")]
        if names:
            merged[key] = "+".join(dict.fromkeys(names))
    if "layers" in merged:
        lists = [part.get("layers") for part in parts]
        merged["layers"] = (
            None if None in lists else sorted({layer for some in lists for layer in some or []})
        )
    if any("residual_update" in part for part in parts):
        merged["residual_update"] = _merged_updates(profiles)
    if any("weights" in part for part in parts):
        merged["weights"] = copy.deepcopy(_best_weights(parts))
    flat = [copy.deepcopy(leaf) for part in parts for leaf in _leaves(part)]
    if flat:
        merged["data"] = {
            "source": " + ".join(dict.fromkeys(str(leaf.get("source", "?")) for leaf in flat)),
            "tokens": sum(leaf.get("tokens", 0) for leaf in flat),
            "sequences": sum(leaf.get("sequences", 0) for leaf in flat),
            "complete": all("data" in part for part in parts)
            and all(leaf.get("complete", False) for leaf in flat),
            "parts": flat,
        }
    return merged


def _best_weights(parts: Sequence[Metadata]) -> Any:
    """The fingerprint that says most: of the newest scheme, and with everything seen. The first of such."""

    def worth(weights: Any) -> tuple[int, bool]:
        if not isinstance(weights, dict):
            return 0, False
        scheme = weights.get("scheme", 1)
        return scheme if isinstance(scheme, int) else 0, weights.get("unseen") == 0

    return max((part.get("weights") for part in parts), key=worth)


def _merged_updates(profiles: Sequence[Profile]) -> str | list[str]:
    """What is said of each row where it was measured, or else anywhere; once where all rows are alike."""

    def said(row: int) -> Iterator[str]:
        for told in (*measured, *everywhere):
            if told[row]:
                yield told[row]

    measured, everywhere = [_updates(p) for p in profiles], [_by_row(p) for p in profiles]
    texts = [next(said(row), "") for row in range(profiles[0].shape[0])]
    return texts[0] if len(set(texts)) == 1 else texts
