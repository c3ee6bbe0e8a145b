"""Checkpoints: the state from which a run resumes, in one safetensors file for each process.

The file holds the moments and mean vectors bit for bit, and as JSON the position in the data, the counts so far and the
configuration, with a digest of everything (`results.container`). It may come from anywhere, so all of it is checked; a run
resumes only with the same configuration.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastheads.errors import CheckpointError
from fastheads.results.container import ContainerError, pack, unpack
from fastheads.results.files import UnreadableError, read_once, remove_temporaries, write_atomic
from fastheads.results.possible import MOST_SAMPLES, ROUNDING, TINY, impossible
from fastheads.stats.mean_vectors import MEAN, MeanVectorPlanes, RunningMeanVectors
from fastheads.stats.metric import HEAD_METRICS
from fastheads.stats.moments import PLANES, RunningMoments

FILE_KEY = "fastheads_checkpoint"
FORMAT_VERSION = 4  # no other is read: a run is resumed by the version that began it
LARGEST = 2**30  # bytes; more than any run writes
LARGEST_HEADER = (
    2**24
)  # bytes of the document, of which a run writes a few thousand; reading as many takes seconds
COUNTS = ("tokens", "sequences", "area", "batches", "looks")


class Checkpoint:
    """The checkpoint file of one process."""

    def __init__(self, path: str | os.PathLike[str], rank: int = 0, world: int = 1) -> None:
        """`path`: the file; if there are several ranks, each adds its number to the name."""
        path = Path(path)
        self._shared, self._world = path, world
        self.path = path if world == 1 else path.with_name(f"{path.name}-{rank + 1}-of-{world}")
        self._warned = False

    def save(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> bool:
        """Write the file atomically. If that fails, keep the previous one, warn on stderr once, and return False."""
        content = pack(tensors, FILE_KEY, {"format": FORMAT_VERSION, **document})
        try:
            if int.from_bytes(content[:8], "little") > LARGEST_HEADER or len(content) > LARGEST:
                raise OSError("it would be larger than what is read again")
            write_atomic(self.path, content)
        except OSError as error:
            if not self._warned:
                self._warned = True
                kept = "the previous one is kept" if self.path.exists() else "there is none yet"
                reason = error.strerror or str(error)
                print(
                    f"fastheads: warning: cannot write the checkpoint {self.path}: {reason}; {kept}, and the run continues",
                    file=sys.stderr,
                    flush=True,
                )
            return False
        self._warned = False
        return True

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the tensors and the document of the file; None if there is no file.

        Raises:
            CheckpointError: it is no checkpoint, or damaged, or there are only checkpoints of another number of processes.
            OSError: it cannot be read.
        """
        if not self.path.exists():
            others = self._of_other_numbers()
            if others:
                raise CheckpointError(
                    f"cannot resume: there is no {self.path}, but {', '.join(others)} from another number of processes. Start as "
                    "many processes, or leave out --resume to start from the beginning"
                )
            return None
        try:
            content = read_once(self.path, LARGEST)
            tensors, document = unpack(
                content,
                FILE_KEY,
                formats=(FORMAT_VERSION,),
                digested=(FORMAT_VERSION,),
                header_limit=LARGEST_HEADER,
            )
            _check_counts(document)
        except (ContainerError, UnreadableError) as error:
            raise CheckpointError(
                f"{self.path} is not a checkpoint: {error}. Leave out --resume to start from the beginning"
            ) from error
        return tensors, document

    def _of_other_numbers(self) -> list[str]:
        """Find checkpoints of the same run by another number of processes, at most three."""
        name = self._shared.name
        pattern = re.compile(re.escape(name) + r"(-\d+-of-(\d+))?")
        folder = self._shared.parent
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        found = [(other, pattern.fullmatch(other)) for other in names]
        return [other for other, match in found if match is not None and int(match[2] or 1) != self._world][
            :3
        ]

    def remove(self) -> None:
        """Delete the file, and temporary files of a process that was killed while writing."""
        self.path.unlink(missing_ok=True)
        self.tidy()

    def tidy(self) -> None:
        """Delete temporary files of a process that was killed while writing."""
        remove_temporaries(self.path)

    def check(self, then: Any, now: dict[str, Any]) -> None:
        """Raise CheckpointError, naming what differs, unless the configurations are equal."""
        if not isinstance(then, dict):
            raise CheckpointError(f"{self.path} is not a checkpoint: it has no configuration")
        for key in dict.fromkeys((*now, *then)):
            if then.get(key) != now.get(key):
                difference = f"{shown(then.get(key))} then and {shown(now.get(key))} now"
                raise CheckpointError(
                    f"cannot resume from {self.path}: {key.replace('_', ' ')} is not what it was: {difference}. "
                    "Leave out --resume to start from the beginning"
                )


def names_of(devices: list[list[Tensor]]) -> dict[str, Tensor]:
    """Name the parts of the state of each device (`capture.collect.state`)."""
    return {f"state/{n}/{i}": part for n, parts in enumerate(devices) for i, part in enumerate(parts)}


def devices_of(path: Path, tensors: dict[str, Tensor]) -> list[list[Tensor]]:
    """Return what `names_of` named. Raises CheckpointError for other names."""
    devices: list[list[Tensor]] = []
    while f"state/{len(devices)}/0" in tensors:
        parts: list[Tensor] = []
        while (name := f"state/{len(devices)}/{len(parts)}") in tensors:
            parts.append(tensors[name])
        devices.append(parts)
    if set(names_of(devices)) != set(tensors):
        raise CheckpointError(f"{path} is not a checkpoint: it has no moments")
    return devices


def check_state(path: Path, devices: list[list[Tensor]], notes: dict[str, Any]) -> None:
    """Raise CheckpointError for samples and notes that no run can have written (`capture.collect.state`)."""
    used, missed = notes.get("used"), notes.get("missed")
    names = used if isinstance(used, list) and all(isinstance(some, list) for some in used) else [[None]]
    if not (
        all(isinstance(name, str) for some in names for name in some)
        and isinstance(missed, list)
        and all(type(row) is int and row >= 0 for row in missed)
    ):
        raise CheckpointError(f"{path} is not a checkpoint: its notes are not those of moments")
    for parts in devices:
        for part in parts:
            if part.dtype != torch.float64 or not part.is_contiguous():
                raise CheckpointError(f"{path} is not a checkpoint: its moments have another shape or type")
            if part.dim() == 3 and part.shape[-1] > MEAN:
                if not _are_possible(RunningMeanVectors.over(part).views()):
                    raise CheckpointError(
                        f"{path} is not a checkpoint: its mean vectors contradict each other"
                    )
            elif part.dim() != 4 or part.shape[0] != PLANES:
                raise CheckpointError(f"{path} is not a checkpoint: its moments have another shape or type")
            else:
                # [metrics, rows, heads], every metric with the same samples; the ratios with these or none
                m = RunningMoments.over(part).views()
                totals = m.count + m.nonfinite
                fits = totals == totals[:1]
                fits[len(HEAD_METRICS) :] |= totals[len(HEAD_METRICS) :] == 0
                if bool(impossible(m, least=0.0).any()) or not bool(fits.all()):
                    raise CheckpointError(f"{path} is not a checkpoint: its moments contradict each other")


def _are_possible(vectors: MeanVectorPlanes) -> bool:
    """True if tokens can have these mean vectors."""
    counts = torch.stack([vectors.count, vectors.nonfinite])
    constant = vectors.mean.square().sum(-1)
    fits = (constant <= vectors.output_power * (1 + ROUNDING) + TINY) & (vectors.power >= 0)
    fits &= (vectors.count > 0) | ((vectors.output_power == 0) & (vectors.power == 0))
    fits &= vectors.power.isfinite() & vectors.output_power.isfinite() & (counts >= 0).all(0)
    return bool((fits & (counts <= MOST_SAMPLES).all(0)).all())


def _check_counts(document: dict[str, Any]) -> None:
    """Raise ContainerError unless the counts are integers ≥ 0, and the seconds a float ≥ 0."""
    for key in COUNTS:
        if key in document and not (type(document[key]) is int and 0 <= document[key] < 2**62):
            raise ContainerError(f"its number of {key} is {shown(document[key])}")
    seconds = document.get("seconds", 0.0)
    if not (isinstance(seconds, float) and seconds >= 0):
        raise ContainerError(f"its number of seconds is {shown(seconds)}")


def shown(value: Any) -> str:
    """Format a value of a configuration for a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
