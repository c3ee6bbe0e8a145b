"""Check which profiles may be merged, and merge their metadata.

Metadata may come from any file, so the type of every entry is checked before use.
"""

import copy
import itertools
import json
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastheads.errors import MergeError
from fastheads.results.mean_vectors import MeanVectors
from fastheads.results.overlap import first_repeat, runs_of
from fastheads.results.possible import MOST_SAMPLES
from fastheads.results.protocol import Profile
from fastheads.stats.names import RATIO_METRIC, UPDATE_METRIC

Metadata = dict[str, Any]


def check_mergeable(profiles: Sequence[Profile], names: Sequence[str], *, allow_repeated: bool) -> None:
    """Raise MergeError, naming two profiles and the reason, unless all profiles may be merged.

    They must be of the same model, weights, aggregation and metrics; their data must not overlap where they measured the same
    heads; and their counts together must stay exact in float64.
    """
    kinds: dict[
        str, tuple[Profile, str]
    ] = {}  # one profile of each kind stands for all: there may be thousands
    for profile, name in zip(profiles, names, strict=True):
        kinds.setdefault(_kind(profile), (profile, name))
    for (a, name_a), (b, name_b) in itertools.combinations(kinds.values(), 2):
        difference = _difference(a, b)
        if difference is not None:
            raise MergeError(f"cannot merge {name_a} and {name_b}: they differ in {difference}")
    for metric in profiles[0].metrics:
        for plane in ("count", "nonfinite"):
            # In float64, where sums do not wrap; counts that are not exact there are above the limit anyway.
            counts = np.stack([getattr(p.arrays[metric], plane).astype(np.float64) for p in profiles])
            if bool((counts.sum(axis=0) > MOST_SAMPLES).any()) or bool((counts < 0).any()):
                raise MergeError(
                    f"cannot merge {', '.join(names)}: together they have more samples of {metric} than can be counted"
                )
    vectors = [p.vectors for p in profiles if p.vectors is not None]
    if len(vectors) == len(profiles):
        for plane in ("count", "nonfinite"):
            tokens = np.stack([getattr(v, plane).astype(np.float64) for v in vectors])
            if bool((tokens.sum(axis=0) > MOST_SAMPLES).any()) or bool((tokens < 0).any()):
                raise MergeError(
                    f"cannot merge {', '.join(names)}: together their mean vectors have more tokens than can be counted"
                )
    if allow_repeated:
        return
    found = first_repeat(profiles)
    if found is not None:
        i, j, repeated = found
        raise MergeError(
            f"cannot merge {names[i]} and {names[j]}: both hold {repeated}, which would count twice "
            "(allow_repeated=True, or --allow-repeated, merges them anyway)"
        )


def merged_vectors(profiles: Sequence[Profile], names: Sequence[str]) -> MeanVectors | None:
    """Merge the mean vectors of all profiles; None, with a warning if only some have them, unless all do."""
    vectors = [p.vectors for p in profiles]
    without = [name for name, v in zip(names, vectors, strict=True) if v is None]
    if without:
        if len(without) < len(vectors):
            warnings.warn(
                f"the merged profile has no mean vectors, since these have none: {', '.join(without)}",
                RuntimeWarning,
                stacklevel=3,
            )
        return None
    merged = vectors[0]
    for other in vectors[1:]:
        assert merged is not None and other is not None
        merged = merged.merged(other)
    return merged


# Options that profiles to be merged must share.
SAME_OPTIONS = ("token_agg", "skip_first", "streaming")


def _kind(profile: Profile) -> str:
    """Return a text of all that `_difference` compares: profiles with one text do not differ."""
    metadata = profile.metadata
    compared = [metadata.get(key) for key in ("model", "weights", "sites", *SAME_OPTIONS)]
    return json.dumps([*compared, sorted(profile.metrics), _updates(profile)], sort_keys=True, default=id)


def _difference(a: Profile, b: Profile) -> str | None:
    """Describe why two profiles cannot be merged, whatever their data; None if they can."""
    one, two = a.metadata, b.metadata
    weights = difference_of_weights(one.get("weights"), two.get("weights"))
    if one.get("model") != two.get("model") and weights != "":
        detail = f" ({weights})" if weights else ""
        return f"model: {one.get('model')!r} and {two.get('model')!r}{detail}"
    if weights:
        return weights
    if one["sites"] != two["sites"]:
        return f"sites: {_difference_of_sites(one['sites'], two['sites'])}"
    for key in SAME_OPTIONS:
        if one.get(key) != two.get(key):
            return f"{key}: {one.get(key)!r} and {two.get(key)!r}"
    if set(a.metrics) != set(b.metrics):
        return f"metrics: only one has {', '.join(sorted(set(a.metrics) ^ set(b.metrics)))}"
    for row, (left, right) in enumerate(zip(_updates(a), _updates(b), strict=True)):
        if left and right and left != right:
            return f"what layer {a.layers[row]} adds to the residual stream: {left!r} and {right!r}"
    return None


def difference_of_weights(one: Any, two: Any) -> str | None:
    """Describe how two fingerprints of weights differ; "" if the weights are equal, None if that is unknown.

    Fingerprints of different schemes cannot be compared. Scheme 1 read a few numbers of each tensor, so that equal fingerprints
    do not prove equal weights. If tensors were unseen, the rest can be compared if the same ones were.
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
            f"weights: one has {kinds[0]}, the other {kinds[1]}"
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
    """Return `residual_update` of each row with samples of that metric; "" for the others."""
    return _texts_of_measured(profile, "residual_update")


# Entries of the metadata that describe each row, and the metric that they are of.
_TEXTS = {"residual_update": UPDATE_METRIC, "residual_stream": RATIO_METRIC}


def _texts_of_measured(profile: Profile, key: str) -> list[str]:
    """Return the entry `key` of each row with samples of its metric; "" for the others."""
    texts = _by_row(profile, key)
    moments = profile.arrays.get(_TEXTS[key])
    if moments is None:
        return [""] * len(texts)
    measured = np.any(moments.count > 0, axis=1)
    return [text if has_samples else "" for text, has_samples in zip(texts, measured, strict=True)]


def _by_row(profile: Profile, key: str) -> list[str]:
    """Return the entry `key` of each row; "" if unknown."""
    rows, given = profile.shape[0], profile.metadata.get(key)
    texts = given if isinstance(given, list) and len(given) == rows else [given] * rows
    return [text if isinstance(text, str) else "" for text in texts]


def updates_by_row(profile: Profile) -> list[str]:
    """Return `residual_update` of each row; "" if unknown."""
    return _by_row(profile, "residual_update")


def data_of_runs(profile: Profile) -> list[Metadata]:
    """Return the data entries of the run, or of all runs merged in the profile."""
    return runs_of(profile.metadata)


def merged_metadata(profiles: Sequence[Profile]) -> Metadata:
    """Return the first profile's metadata with the union of layers, all differing options joined, and the sum of the data."""
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
    for key in _TEXTS:
        if any(key in part for part in parts):
            merged[key] = _merged_texts(profiles, key)
    if any("weights" in part for part in parts):
        merged["weights"] = copy.deepcopy(_best_weights(parts))
    flat = [copy.deepcopy(leaf) for part in parts for leaf in runs_of(part)]
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
    """Return the best fingerprint: of the newest scheme, then without unseen tensors, then the first."""

    def worth(weights: Any) -> tuple[int, bool]:
        if not isinstance(weights, dict):
            return 0, False
        scheme = weights.get("scheme", 1)
        return scheme if isinstance(scheme, int) else 0, weights.get("unseen") == 0

    return max((part.get("weights") for part in parts), key=worth)


def _merged_texts(profiles: Sequence[Profile], key: str) -> str | list[str]:
    """Merge the entry `key` by row, preferring profiles that measured the row; one text if all rows are equal."""

    def known(row: int) -> Iterator[str]:
        for of_profile in (*measured, *everywhere):
            if of_profile[row]:
                yield of_profile[row]

    measured = [_texts_of_measured(profile, key) for profile in profiles]
    everywhere = [_by_row(profile, key) for profile in profiles]
    texts = [next(known(row), "") for row in range(profiles[0].shape[0])]
    return texts[0] if len(set(texts)) == 1 else texts
