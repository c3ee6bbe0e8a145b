"""Compute what a profile's mean vectors and the model's weights together say; `results.with_model` documents it.

The mean-ablation error is a difference, E‖W z‖² - ‖W z̄‖², whose first term was measured in float32. Its rounding error:
with W'W = L L' and L rounded to two bfloat16 parts (the coarsest of the exact paths; float32 products add less), the error of
‖z L‖ is at most about 2⁻¹⁶ ‖L‖₂ ‖z‖ (measured on random and on ill-conditioned weights: a third of that), so that of E‖W z‖²
is by Cauchy and Schwarz at most 2 r √E‖W z‖² + r², r = 2⁻¹⁶ ‖W‖₂ √E‖z‖². The mean vector itself is exact to float64.
"""

import os
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fastheads.errors import NoSitesError, OptionError, ResultsError, UnsupportedWeightError
from fastheads.models.fingerprint import fingerprint
from fastheads.models.residual import UnknownUpdateError, Update, update_of
from fastheads.models.sharding import shard_of
from fastheads.models.sites import HeadSite, find_sites, unwrapped
from fastheads.models.weights import dense_weight
from fastheads.results.directions import directions_of
from fastheads.results.mean_vectors import MeanVectors
from fastheads.results.merge import difference_of_weights, updates_by_row
from fastheads.results.protocol import Profile
from fastheads.stats.names import METRICS, RATIO_METRIC

CONTRIBUTION_METRIC = METRICS[1]

EXACT_ERROR = 2.0**-16  # of ‖W z‖, relative to ‖W‖₂ ‖z‖
FAST_ERROR = 4e-3  # of ‖W z‖ with precision "fast", relative to itself
UNDERFLOW = 1e-38  # norms below 1e-19 may have been squared to 0


def constant_share(profile: Profile, model: nn.Module) -> Tensor:
    """As `HeadProfile.constant_share`."""
    vectors = _vectors(profile)
    constant, error = _constant_part(profile, vectors, checked_sites(profile, model))
    power = torch.from_numpy(vectors.power)
    share = torch.where(power > 0, constant / power, torch.nan).clamp(max=1.0)
    # By more than rounding it cannot exceed 1: then the numbers do not belong together.
    return torch.where(constant <= power + error, share, torch.nan)


def mean_ablation_error(profile: Profile, model: nn.Module) -> Tensor:
    """As `HeadProfile.mean_ablation_error`."""
    return _mean_ablation_error(profile, checked_sites(profile, model))


def mean_ablation_error_ratio(profile: Profile, model: nn.Module) -> Tensor:
    """As `HeadProfile.mean_ablation_error_ratio`."""
    _vectors(profile)
    missing = [name for name in (RATIO_METRIC, CONTRIBUTION_METRIC) if name not in profile.metrics]
    if missing:
        raise ResultsError(
            f"this profile lacks {' and '.join(missing)}, which the mean-ablation error per residual needs: profile with it"
        )
    sites = checked_sites(profile, model)
    updates = _updates(profile, model, sites)
    ratio, norm = (
        torch.from_numpy(profile.statistics(name)["mean"]) for name in (RATIO_METRIC, CONTRIBUTION_METRIC)
    )
    root = _mean_ablation_error(profile, sites).sqrt()
    error = torch.where(root == 0, 0.0, root / norm * ratio)  # 0/0 where a head writes nothing
    error[[row for row in range(len(sites)) if row not in updates]] = torch.nan
    return error


def mean_bias(profile: Profile, model: nn.Module, heads: Iterable[tuple[int, int]]) -> dict[int, Tensor]:
    """As `HeadProfile.mean_bias`."""
    vectors = _vectors(profile)
    chosen = _rows_of(profile, vectors, heads)
    sites = checked_sites(profile, model)
    biases = {}
    for row, some in chosen.items():
        contributions, _ = _contributions(vectors, sites[row], row)
        biases[sites[row].layer] = contributions[some].sum(0).cpu()
    return biases


def project(
    profile: Profile, directions: Tensor | Sequence[int] | str | os.PathLike[str], model: nn.Module
) -> Tensor:
    """As `HeadProfile.project`."""
    vectors = _vectors(profile)
    sites = checked_sites(profile, model)
    wanted = directions_of(directions, unwrapped(model), sites)  # [n, hidden]
    updates = _updates(profile, model, sites)
    found = torch.full((*profile.shape, wanted.shape[0]), torch.nan, dtype=torch.float64, device="cpu")
    for row in _measured(vectors):
        if row not in updates:
            continue
        contributions, _ = _contributions(vectors, sites[row], row)
        if contributions.shape[1] != wanted.shape[1]:
            raise OptionError(
                f"directions must be {contributions.shape[1]} wide, as the output of {sites[row].name}, not {wanted.shape[1]}"
            )
        projected = contributions @ wanted.to(contributions.device).T
        found[row, : sites[row].num_heads] = (updates[row].multiplier * projected).cpu()
    return found


# ---------------------------------------------------------------- what is at hand


def _vectors(profile: Profile) -> MeanVectors:
    if profile.vectors is None:
        raise ResultsError(
            "this profile has no mean vectors: profile with vectors=True (on the command line --vectors)"
        )
    return profile.vectors


def _measured(vectors: MeanVectors) -> list[int]:
    """Return the rows with tokens."""
    return [int(row) for row in np.flatnonzero((vectors.count > 0).any(axis=1))]


def checked_sites(profile: Profile, model: nn.Module) -> list[HeadSite]:
    """Return the model's sites by row. Raises ResultsError unless the profile is of this model and these weights."""
    model = unwrapped(model)
    sites = sites_of(profile, model)
    for site in sites:
        # A site of another layout is refused by name as its weight is read.
        if shard_of(site) is not None:
            raise UnsupportedWeightError(
                f"{site.name} is split over ranks by tensor parallelism, where this cannot be computed: load the whole model"
            )
    weights = profile.metadata.get("weights")
    if not isinstance(weights, dict):
        raise ResultsError(
            "this profile has no fingerprint of the model's weights, so that it may be of others: profile again"
        )
    difference = difference_of_weights(weights, fingerprint(model))
    if difference is None:
        raise ResultsError(
            "the fingerprints of the profile and of the model do not prove that their weights are the same: they are of "
            "different versions, or leave some weights out"
        )
    if difference:
        raise ResultsError(f"this profile is not of these weights; they differ in {difference}")
    return sites


def sites_of(profile: Profile, model: nn.Module) -> list[HeadSite]:
    """Find the sites that the profile names. Raises ResultsError if the model has others."""
    expected = [(s["name"], s["layer"], s["num_heads"], s["head_dim"]) for s in profile.metadata["sites"]]

    def fits(sites: list[HeadSite]) -> bool:
        return [(s.name, s.layer, s.num_heads, s.head_dim) for s in sites] == expected

    try:
        sites = find_sites(model)
        if not fits(sites):
            known = {site.name for site in sites}
            # Some are left out by default. Any one character in place of those that a pattern reads otherwise.
            extra = [
                "".join("?" if c in "*?[" else c for c in name) for name, *_ in expected if name not in known
            ]
            sites = find_sites(model, include=extra)
    except NoSitesError:
        sites = []
    if not fits(sites):
        raise ResultsError(
            f"this profile is of another model than {type(model).__name__}: their attention output projections differ"
        )
    return sites


def _updates(profile: Profile, model: nn.Module, sites: list[HeadSite]) -> dict[int, Update]:
    """Return by row what the layer does to the attention's output, if it is the same for each token.

    Warns of rows with tokens where it is not. Raises ResultsError if it is not what it was in the run.
    """
    model = unwrapped(model)
    found, left_out = {}, {}
    recorded = updates_by_row(profile)
    for row in _measured(_vectors(profile)):
        site = sites[row]
        try:
            update = update_of(model, site)
            if update.norm is None:
                update.check()
        except UnknownUpdateError as error:
            left_out[row] = str(error)
            continue
        if recorded[row] and recorded[row] != str(update):
            raise ResultsError(
                f"what layer {site.layer} adds to the residual stream differs: {recorded[row]!r} in this profile, "
                f"{str(update)!r} in the model"
            )
        if update.norm is None:
            found[row] = update
        else:
            left_out[row] = f"a {type(update.norm).__name__} on the branch, whose scale varies by token"
    if left_out:
        layers = ", ".join(str(sites[row].layer) for row in left_out)
        reasons = "; ".join(dict.fromkeys(left_out.values()))
        warnings.warn(
            f"NaN in layers {layers}, since what they add to the residual stream is no fixed multiple of the attention's output: "
            f"{reasons}",
            RuntimeWarning,
            stacklevel=4,
        )
    return found


def _rows_of(
    profile: Profile, vectors: MeanVectors, heads: Iterable[tuple[int, int]]
) -> dict[int, list[int]]:
    """Return the heads by row, each once."""
    rows: dict[int, list[int]] = {}
    for row, layer in enumerate(profile.layers):
        rows.setdefault(layer, []).append(row)
    chosen: dict[int, list[int]] = {}
    for pair in heads:
        whole = isinstance(pair, Sequence) and len(pair) == 2 and all(type(number) is int for number in pair)
        if not whole:
            raise OptionError(f"heads must be pairs of whole numbers, (layer, head), not {pair!r}")
        layer, head = pair
        among = rows.get(layer, [])
        if len(among) > 1:
            names = ", ".join(profile.metadata["sites"][row]["name"] for row in among)
            raise OptionError(
                f"layer {layer} has several output projections, so that {pair} is ambiguous: {names}"
            )
        if not among or not 0 <= head < profile.metadata["sites"][among[0]]["num_heads"]:
            raise OptionError(f"this profile has no head {head} in layer {layer}")
        row = among[0]
        if vectors.count[row, head] == 0:
            raise ResultsError(
                f"head {head} of layer {layer} has no mean vector: no token of it was measured"
            )
        some = chosen.setdefault(row, [])
        if head not in some:
            some.append(head)
    return chosen


# ---------------------------------------------------------------- algebra


@torch.no_grad()
def _contributions(vectors: MeanVectors, site: HeadSite, row: int) -> tuple[Tensor, Tensor]:
    """Return W_h z̄_h `[num_heads, out_features]` and W_h `[num_heads, out_features, head_dim]`, float64 on its device."""
    weight = dense_weight(site)
    if weight.device.type == "mps":
        weight = weight.cpu()  # MPS has no float64
    by_head = weight.double().unflatten(1, (site.num_heads, site.head_dim)).transpose(0, 1)
    mean = torch.from_numpy(vectors.mean[row, : site.num_heads, : site.head_dim]).to(by_head.device)
    return (by_head @ mean.unsqueeze(-1)).squeeze(-1), by_head


@torch.no_grad()
def _constant_part(profile: Profile, vectors: MeanVectors, sites: list[HeadSite]) -> tuple[Tensor, Tensor]:
    """Return ‖W_h z̄_h‖² and a bound of the rounding error of E‖W_h z_h‖², both `[rows, heads]` on the CPU."""
    constant, largest = torch.full((2, *profile.shape), torch.nan, dtype=torch.float64, device="cpu")
    for row in _measured(vectors):
        contributions, by_head = _contributions(vectors, sites[row], row)
        heads = slice(sites[row].num_heads)
        constant[row, heads] = contributions.square().sum(-1).cpu()
        gram = by_head.mT @ by_head
        finite = gram.isfinite().flatten(1).all(-1)
        gram[~finite] = 0.0  # eigvalsh would raise
        norm = torch.linalg.eigvalsh(gram)[:, -1].clamp(min=0.0).sqrt()
        largest[row, heads] = torch.where(finite, norm, torch.nan).cpu()
    power, output_power = (torch.from_numpy(values) for values in (vectors.power, vectors.output_power))
    of_norm = EXACT_ERROR * largest * output_power.sqrt()
    error = 2 * of_norm * power.sqrt() + of_norm.square() + UNDERFLOW
    if profile.metadata.get("precision") != "exact":
        error += 2 * FAST_ERROR * power
    return constant, error


def _mean_ablation_error(profile: Profile, sites: list[HeadSite]) -> Tensor:
    vectors = _vectors(profile)
    constant, error = _constant_part(profile, vectors, sites)
    power = torch.from_numpy(vectors.power)
    difference = power - constant
    known = torch.where(difference > error, difference, torch.nan)
    return torch.where((power == 0) & (constant == 0), 0.0, known)  # no token wrote anything
