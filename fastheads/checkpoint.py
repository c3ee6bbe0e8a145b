"""Checkpoints: what a run needs to go on where it stood, in one safetensors file for each process.

The file holds the moments as they are in memory, bit for bit, and as JSON the position in the data, the counts so far and the
configuration. It may come from anywhere, so all of it is checked; a run goes on only with its own configuration.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fastheads.errors import CheckpointError
from fastheads.files import write_atomic
from fastheads.moments import PLANES, RunningMoments

FILE_KEY = "fastheads_checkpoint"
FORMAT_VERSION = 2
LARGEST = 2**30  # bytes; more than any run writes


class Checkpoint:
    """One process's file."""

    def __init__(self, path: str | os.PathLike[str], rank: int = 0, world: int = 1) -> None:
        """`path`: the file; of several processes, each adds its number."""
        path = Path(path)
        self._shared, self._world = path, world
        self.path = path if world == 1 else path.with_name(f"{path.name}-{rank + 1}-of-{world}")
        self._warned = False

    def save(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> bool:
        """Write the file whole. Where that fails the one before stays, a warning on stderr says so once, and it returns False."""
        text = json.dumps({"format": FORMAT_VERSION, **document}, allow_nan=False)
        try:
            write_atomic(self.path, safetensors.torch.save(tensors, {FILE_KEY: text}))
        except OSError as error:
            if not self._warned:
                self._warned = True
                kept = "the one before is kept" if self.path.exists() else "there is none yet"
                reason = error.strerror or str(error)
                print(
                    f"fastheads: warning: cannot write the checkpoint {self.path}: {reason}; {kept}, and the run goes on",
                    file=sys.stderr,
                    flush=True,
                )
            return False
        self._warned = False
        return True

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The tensors and the document of the file; None where there is no file.

        Raises:
            CheckpointError: if it is no checkpoint, or a damaged one, or there are only those of another number of processes.
            OSError: if it cannot be read.
        """
        if not self.path.exists():
            others = self._of_other_numbers()
            if others:
                raise CheckpointError(
                    f"cannot resume: {self.path} is not there, and {', '.join(others)} of another number of processes "
                    f"{'is' if len(others) == 1 else 'are'}. Start as many processes, or go without --resume to start afresh"
                )
            return None
        if self.path.stat().st_size > LARGEST:
            raise CheckpointError(f"{self.path} is not a checkpoint: it is too large for one")
        with self.path.open("rb"):  # an error of this one names the file
            pass
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                document = _parsed((file.metadata() or {}).get(FILE_KEY))
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, ValueError) as error:
            line = " ".join(str(error).split())
            raise CheckpointError(
                f"{self.path} is not a checkpoint: {line}. Without --resume the run starts afresh"
            ) from error
        return tensors, document

    def _of_other_numbers(self) -> list[str]:
        """Checkpoints of the same run by other numbers of processes, three of them at most."""
        name = self._shared.name
        pattern = re.compile(re.escape(name) + r"(-\d+-of-(\d+))?")
        folder = self._shared.parent
        names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
        found = [(other, pattern.fullmatch(other)) for other in names]
        return [other for other, match in found if match is not None and int(match[2] or 1) != self._world][
            :3
        ]

    def remove(self) -> None:
        """Delete the file, and what a process that was killed while it wrote left beside it."""
        self.path.unlink(missing_ok=True)
        self.tidy()

    def tidy(self) -> None:
        """Delete what a process that was killed while it wrote left."""
        if self.path.parent.is_dir():
            for rest in self.path.parent.glob(f".{_escaped(self.path.name)}.*.tmp"):
                rest.unlink(missing_ok=True)

    def check(self, then: Any, now: dict[str, Any]) -> None:
        """Raise CheckpointError, naming what differs, unless the configurations are equal."""
        if not isinstance(then, dict):
            raise CheckpointError(f"{self.path} is not a checkpoint: it has no configuration")
        for key in dict.fromkeys((*now, *then)):
            if then.get(key) != now.get(key):
                told = f": {shown(then.get(key))} then and {shown(now.get(key))} now"
                raise CheckpointError(
                    f"cannot resume from {self.path}: {key.replace('_', ' ')} is not what it was{told}. "
                    "Without --resume the run starts afresh"
                )


def check_state(path: Path, buffers: list[Tensor], notes: dict[str, Any]) -> None:
    """Raise CheckpointError unless the moments and their notes are some that a run can have written
    (`HookManager.state`): a profile would have their faults.
    """
    used, missed = notes.get("used"), notes.get("missed")
    names = used if isinstance(used, list) and all(isinstance(some, list) for some in used) else [[None]]
    if not (
        all(isinstance(name, str) for some in names for name in some)
        and isinstance(missed, list)
        and all(type(row) is int and row >= 0 for row in missed)
    ):
        raise CheckpointError(f"{path} is not a checkpoint: its notes are not those of moments")
    for buffer in buffers:
        if buffer.dtype != torch.float64 or buffer.dim() != 5 or buffer.shape[1] != PLANES:
            raise CheckpointError(f"{path} is not a checkpoint: its moments have another shape or type")
        for channel in buffer:
            m = RunningMoments.over(channel.contiguous()).views()
            some = m.count > 0
            values = torch.stack([m.mean, m.m2, m.min, m.max])
            if not (
                bool((m.count >= 0).all() and (m.nonfinite >= 0).all() and (m.m2 >= 0).all())
                and not bool(values.isnan().any())
                and bool((values.isfinite().all(dim=0) & (m.min <= m.max) | ~some).all())
            ):
                raise CheckpointError(f"{path} is not a checkpoint: its moments contradict each other")


def _parsed(text: str | None) -> dict[str, Any]:
    if text is None:
        raise ValueError("it has no fastheads metadata")
    try:
        document = json.loads(text)
    except RecursionError as error:
        raise ValueError("its metadata are nested too deeply") from error
    if not isinstance(document, dict):
        raise ValueError("its metadata are not an object")
    if document.get("format") != FORMAT_VERSION:
        raise ValueError(f"its format is {document.get('format')!r}; this version reads {FORMAT_VERSION}")
    return document


def shown(value: Any) -> str:
    """A value of a configuration, in a message."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
