"""What an ablation job begins with: rankings of heads, and sequences that the profile did not see."""

import warnings
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.corpus.docstrings import docstrings_text
from fastheads.corpus.in_memory import in_memory
from fastheads.corpus.opening import named_source
from fastheads.corpus.sources import Source, check_lengths
from fastheads.corpus.windows import Corpus
from fastheads.errors import DataError, OptionError, ResultsError
from fastheads.models.fingerprint import fingerprint
from fastheads.results.head_profile import HeadProfile
from fastheads.results.merge import data_of_runs, difference_of_weights
from fastheads.results.ranking import by_mean_ablation, by_metric, ranking_of
from fastheads.results.vectors import sites_of
from fastheads.run.head_sets import Pair
from fastheads.stats.names import KV_METRIC, RATIO_METRIC

# The name of `HeadProfile.mean_ablation_error_ratio` among the metrics.
MEAN_ABLATION_METRIC = "mean_ablation_error_ratio"


def check_options(
    *,
    fractions: Sequence[float],
    draws: int,
    seed: int,
    sequences: int,
    seq_len: int,
    batch_tokens: int | None,
) -> None:
    """Raise OptionError for options that are out of range."""
    check_lengths(seq_len, None)
    if seq_len < 2:
        raise OptionError(
            f"seq_len must be at least 2 tokens, of which the first is not predicted, not {seq_len}"
        )
    if sequences < 1:
        raise OptionError(f"sequences must be at least 1, not {sequences}")
    if not 0 <= draws <= 10_000:
        raise OptionError(f"random draws must be 0 to 10000, not {draws}")
    if not 0 <= seed < 2**32:
        raise OptionError(f"seed must be 0 or more, and below 2**32, not {seed}")
    if batch_tokens is not None and batch_tokens < 1:
        raise OptionError(f"batch_tokens must be at least 1 token, not {batch_tokens}")
    if not fractions:
        raise OptionError("fractions must be at least one, as in 0.1")
    for fraction in fractions:
        if not 0 < fraction <= 1:
            raise OptionError(f"fractions must be above 0 and up to 1, not {fraction}")
    if list(fractions) != sorted(set(fractions)):
        raise OptionError(f"fractions must increase, not {list(fractions)}")


def check_weights(profile: HeadProfile, model: nn.Module) -> str | None:
    """Return the hash of the model's weights.

    Raises:
        ResultsError: the profile is of another model, or known to be of other weights.
    """
    sites_of(profile, model)
    found, profiled = fingerprint(model), profile.metadata.get("weights")
    difference = difference_of_weights(profiled, found) if isinstance(profiled, dict) else None
    if difference:
        raise ResultsError(f"this profile is not of these weights; they differ in {difference}")
    digest = found.get("sha256")
    return digest if isinstance(digest, str) else None


def rankings(
    profile: HeadProfile, model: nn.Module, mode: str, metrics: Sequence[str] | None
) -> dict[str, list[Pair]]:
    """Return the heads as (layer, head) by metric, lowest first.

    Raises:
        OptionError: a metric is not in the profile, or not of heads.
        ResultsError: the profile lacks what the ranking needs.
    """
    layers = profile.layers
    if len(set(layers)) < len(layers):
        raise OptionError(
            "a layer of this model has several output projections, so that (layer, head) is ambiguous"
        )
    if metrics is None and mode == "mean":
        try:
            ranking = by_mean_ablation(profile, model)
        except ResultsError as error:
            warnings.warn(f"ranking by {RATIO_METRIC}: {error}", RuntimeWarning, stacklevel=3)
        else:
            return {MEAN_ABLATION_METRIC: [(layers[row], head) for row, head in ranking.cells()]}
    found = {}
    for metric in dict.fromkeys([RATIO_METRIC] if metrics is None else metrics):
        if metric == KV_METRIC:
            raise OptionError(f"{metric} ranks KV heads, not heads: name another metric")
        if metric == MEAN_ABLATION_METRIC:
            ranking = by_mean_ablation(profile, model)
        elif metric == RATIO_METRIC:
            ranking = ranking_of(profile, metric, "zero", None)  # raises if some heads lack it
        else:
            ranking = by_metric(profile, metric)
        found[metric] = [(layers[row], head) for row, head in ranking.cells()]
        if not found[metric]:
            raise ResultsError(f"this profile has no samples of {metric}")
    return found


def seen_by(profile: HeadProfile, identity: dict[str, Any]) -> str | None:
    """Tell that the profile has seen this data, or may have; None if it has not, by the hashes of both."""
    runs = data_of_runs(profile)
    own = _hashes(identity)
    for run in runs:
        theirs = _hashes(run)
        if own & theirs:
            return f"the profile has seen this data: {identity['source']!r:.200} is what it was measured on"
        if not theirs:
            return f"the profile does not say which data it has seen ({str(run.get('source'))[:200]!r} has no hash)"
    return None if runs else "the profile does not say which data it has seen"


def _hashes(run: dict[str, Any]) -> set[str]:
    several = run.get("files_sha256")
    found = [run.get("sha256"), run.get("head_sha256"), *(several if isinstance(several, list) else [])]
    return {value for value in found if isinstance(value, str)}


def source_of(data: Any, field: str | None) -> Source:
    """Open the texts. Raises DataError or OptionError."""
    if data is None:
        return docstrings_text()
    named = named_source(data, field=field)
    source = in_memory(data, field, "auto") if named is None else named
    if not isinstance(source, Source):
        raise OptionError("ablations are scored on texts, not on token batches")
    return source


def sequences_of(corpus: Corpus, number: int) -> Tensor:
    """Return the first whole blocks of the corpus, int64 `[number, seq_len]`. Raises DataError if there are fewer."""
    found: list[Tensor] = []
    with closing(corpus.windows()) as windows:
        for window in windows:
            found += [ids for ids in window.sequences if len(ids) == corpus.seq_len]
            if len(found) >= number:
                break
    if len(found) < number:
        raise DataError(
            f"{corpus.source.name} has {len(found)} whole sequences of {corpus.seq_len} tokens, not {number}: name more data, or "
            "lower --sequences or --seq-len"
        )
    return torch.stack(found[:number]).long()
