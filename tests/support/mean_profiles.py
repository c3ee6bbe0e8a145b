"""Profiles with mean vectors that no run measured: drawn at random."""

import numpy as np
import torch

from fastheads.models.fingerprint import fingerprint
from fastheads.models.metadata import describe, kv_heads_of
from fastheads.models.sites import find_sites
from fastheads.results.head_profile import HeadProfile
from fastheads.results.mean_vectors import MeanVectors
from fastheads.stats.moments import Moments

RATIO, CONTRIBUTION = "head_residual_ratio", "head_residual_contribution_norm"


def drawn_profile(model, *, seed=0, unmeasured=(), vectors=True, data=None):
    """A profile with random mean vectors of norm about 1, and random ratios and contributions. `unmeasured`: (row, head)."""
    sites = find_sites(model)
    shape = (len(sites), max(s.num_heads for s in sites))
    width = max(s.head_dim for s in sites)
    generator = np.random.default_rng(seed)
    count = np.zeros(shape, dtype=np.int64)
    mean = np.full((*shape, width), np.nan)
    for row, site in enumerate(sites):
        heads = [h for h in range(site.num_heads) if (row, h) not in unmeasured]
        count[row, heads] = 8
        mean[row, heads] = 0.0
        mean[row, heads, : site.head_dim] = generator.normal(size=(len(heads), site.head_dim))
    power = np.where(count > 0, 4.0 * width * generator.uniform(2, 9, shape), np.nan)
    output_power = np.where(count > 0, np.square(mean).sum(-1) + 1.0, np.nan)
    samples = torch.from_numpy(np.where(count > 0, generator.uniform(0.1, 1.0, (8, *shape)), np.nan))
    present = torch.from_numpy(count > 0)

    def moments(values):
        found = Moments.of(values)
        empty = (0, 0, 0.0, 0.0, float("inf"), float("-inf"))
        return Moments(
            *(
                torch.where(present, p, torch.tensor(e, dtype=p.dtype))
                for p, e in zip(found, empty, strict=True)
            )
        )

    about = describe(
        model,
        sites,
        kv_heads_of(model, sites),
        token_agg="token",
        skip_first=0,
        precision="exact",
        backend="factored",
    )
    about |= {"weights": fingerprint(model)} | ({} if data is None else {"data": data})
    return HeadProfile(
        {RATIO: moments(samples), CONTRIBUTION: moments(samples.flip(0) * 3)},
        about,
        MeanVectors(count, np.zeros(shape, dtype=np.int64), mean, power, output_power) if vectors else None,
    )
