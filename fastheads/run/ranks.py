"""Across the ranks of a job: check that all have the same configuration, and merge their profiles."""

from functools import reduce
from typing import Any

import torch

from fastheads.errors import OptionError
from fastheads.results.head_profile import HeadProfile
from fastheads.results.mean_vectors import MeanVectors
from fastheads.run.checkpoint import shown
from fastheads.run.job import Job

# Entries of the configuration in which ranks may differ; copies of one file have different times.
OF_ONE_RANK = ("process", "data shard", "data modified_ns", "data source")


def check_same(job: Job, configuration: dict[str, Any]) -> None:
    """Raise OptionError, on all ranks, unless they have the same configuration. Collective."""
    if job.place.shard[1] == 1:
        return
    own = {key: value for key, value in configuration.items() if key not in OF_ONE_RANK}
    everyone = job.all_gather_object(own)
    for part, other in enumerate(everyone):
        keys = (*everyone[0], *other)
        different = next((key for key in keys if everyone[0].get(key) != other.get(key)), None)
        if different is not None:
            values = f"{shown(everyone[0].get(different))} and {shown(other.get(different))}"
            raise OptionError(
                f"ranks 0 and {part * job.place.tp} were given different options: {different.replace('_', ' ')} is {values}; "
                "give all ranks the same"
            )


def merge_profiles(job: Job, profile: HeadProfile, shard: tuple[int, int]) -> None:
    """Merge the profiles of all parts of the data into `profile`, in place, the same on every rank. Collective.

    `shard`: the shard of all ranks together.
    """
    if job.place.shard[1] == 1:
        return
    metadata = profile.metadata
    data = job.all_gather_object(metadata["data"])
    backends = job.all_gather_object(metadata["backend"])
    profile.moments = job.merged(profile.moments)
    if profile.vectors is not None:
        gathered = {n: job.all_gather(torch.from_numpy(a)) for n, a in profile.vectors.arrays().items()}
        parts = [
            MeanVectors.of_arrays(dict(zip(gathered, (part.numpy() for part in arrays), strict=True)))
            for arrays in zip(*gathered.values(), strict=True)
        ]
        profile.vectors = reduce(MeanVectors.merged, parts)
    total = {key: sum(part[key] for part in data) for key in ("tokens", "sequences")}
    area = sum(part["tokens"] / (1 - part["padding"]) for part in data)
    metadata["data"] = data[0] | {
        **total,
        "seconds": max(part["seconds"] for part in data),
        "padding": round(1 - total["tokens"] / area, 6) if area else 0.0,
        "complete": all(part["complete"] for part in data),
        "processes": job.place.world,
    }
    if "shard" in data[0]:
        metadata["data"]["shard"] = list(shard)
    metadata["backend"] = "+".join(dict.fromkeys(name for part in backends for name in part.split("+")))
