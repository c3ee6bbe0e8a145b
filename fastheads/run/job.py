"""Profile one corpus with several processes: ranks, heartbeats, collectives, and the merge of their moments.

`torchrun` starts them and sets their ranks in the environment. Each runs its own windows of the corpus, independently until the
end. Each writes a heartbeat to torchrun's store every second, so that none waits at the end for one that has died.

Processes exchange only numbers and JSON, never pickled objects.
"""

import datetime
import json
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from fastheads.errors import JobError, OptionError, RankLostError, one_line
from fastheads.stats.moments import Moments

HEARTBEAT = 1.0  # seconds between heartbeats
HEARTBEAT_TIMEOUT = 25.0  # seconds without a heartbeat after which a rank counts as lost
GRACE = 10.0  # seconds for a rank to end by itself once another is lost
RESUME = "its last checkpoint is kept; run the same command with --resume to continue from it"
LONGEST_REASON = 200  # characters of an error that other ranks are shown
STAGES = ("works", "measured", "saved", "ended")  # of a process that did not fail
# Heartbeats decide whether a rank is lost, not the timeout of a collective: the slowest may take any time.
NEVER = datetime.timedelta(days=30)


@dataclass(frozen=True)
class RankInfo:
    """The rank of this process. Each `tp` consecutive ranks share one model by tensor parallelism."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    tp: int = 1

    @property
    def shard(self) -> tuple[int, int]:
        """The part of the data that this rank runs, and the number of parts."""
        return self.rank // self.tp, self.world // self.tp


def rank_info_from_environment(tp: int = 1) -> RankInfo:
    """Read RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them; without them, return one process alone.

    Raises:
        OptionError: they are not valid ranks, or `tp` does not divide the number of processes.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [os.environ.get(name) for name in names]
    if given[0] is None or given[1] is None:
        rank, world, local = 0, 1, 0
    else:
        variables = ", ".join(f"{name}={value}" for name, value in zip(names, given, strict=True))
        if not all(value is None or (value.isascii() and value.isdecimal()) for value in given):
            raise OptionError(f"the environment's {variables} are not whole numbers: start with torchrun")
        rank, world, local = (int(value or 0) for value in given)
        if not rank < world:
            raise OptionError(f"the environment's {variables} contradict each other: start with torchrun")
    if tp < 1 or world % tp:
        raise OptionError(
            f"tp={tp} does not divide the number of processes, {world}: start them with torchrun"
        )
    return RankInfo(rank, world, local, tp)


class Job:
    """All processes of one `torchrun`; one process without torchrun. A context manager.

    With `profile(model, data, job=job)` the data are sharded over the processes, and each returns the profile of all of them.
    Every process must make the same calls.

        with Job() as job:
            found = profile("my-llama", "texts.jsonl", job=job)
        if job.place.rank == 0:
            found.save("profile.safetensors")
    """

    def __init__(self, tp: int = 1, device: str = "auto", *, place: RankInfo | None = None) -> None:
        """`tp`: number of processes that share one model by tensor parallelism. `device`: as for `load_model`. `place`: this
        process's rank; None: from the environment.

        Raises:
            OptionError: as `rank_info_from_environment`.
        """
        self.place = rank_info_from_environment(tp) if place is None else place
        self._device = device
        self._owns_group = False
        self._group: Any = None  # all processes, for CPU tensors
        self._tp_group: Any = None
        self._mesh: Any = None
        self._heartbeat: Heartbeat | None = None

    def __enter__(self) -> Self:
        if self.place.world == 1:
            return self
        import torch.distributed as dist

        if not dist.is_available():
            raise JobError("this torch cannot run several processes together: it has no distributed package")
        self._heartbeat = Heartbeat(self.place)
        on_gpu = self.device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            # Without tensor parallelism processes exchange only the moments, on the CPU.
            backend = "cpu:gloo,cuda:nccl" if on_gpu and self.place.tp > 1 else "gloo"
            dist.init_process_group(backend)
            self._owns_group = True
        self._group = dist.new_group(backend="gloo", timeout=NEVER)
        if self.place.tp > 1:
            from torch.distributed.device_mesh import init_device_mesh

            groups = self.place.world // self.place.tp
            kind = "cuda" if on_gpu else "cpu"
            mesh = init_device_mesh(kind, (groups, self.place.tp), mesh_dim_names=("data", "tp"))
            self._mesh = mesh["tp"]
            for first in range(0, self.place.world, self.place.tp):
                ranks = list(range(first, first + self.place.tp))
                group = dist.new_group(
                    ranks, backend="gloo", timeout=NEVER
                )  # every process makes every group
                if self.place.rank in ranks:
                    self._tp_group = group
        self._heartbeat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._heartbeat is None:
            return
        self._heartbeat.publish(
            *(("ended", "") if error is None else ("failed", one_line(error, LONGEST_REASON)))
        )
        if (
            error is None and self._heartbeat.owns_store
        ):  # the store ends with this process, so wait for the others
            end = time.monotonic() + GRACE
            while not self._heartbeat.all_reached("ended") and time.monotonic() < end:
                time.sleep(0.05)
        self._heartbeat.stop()
        if self._owns_group and error is None:
            torch.distributed.destroy_process_group()
        # After an error do not destroy the group: that would wait for processes that may be gone.

    def check_entered(self) -> None:
        """Raise JobError outside the `with` block, where the processes are not connected."""
        if self.place.world > 1 and self._heartbeat is None:
            raise JobError("the processes are not connected yet: use the job inside `with Job() as job:`")

    def begin(self) -> None:
        """Start the next `profile()`: heartbeats of the previous one no longer count."""
        if self._heartbeat is not None:
            self._heartbeat.begin()

    @property
    def device(self) -> str:
        """The device of this process's model; with several GPUs, the one of its local rank."""
        if self.place.world == 1 or self._device not in ("auto", "cuda"):
            return self._device
        if torch.cuda.is_available():
            return f"cuda:{self.place.local_rank}"
        return self._device if self._device != "auto" else "cpu"

    @property
    def mesh(self) -> Any:
        """The mesh for `from_pretrained(device_mesh=)`; None without tensor parallelism."""
        return self._mesh

    @property
    def tokens(self) -> int | None:
        """Tokens done by all processes, by their last heartbeats; None for a single process."""
        return None if self._heartbeat is None else self._heartbeat.total

    def report(self, tokens: int) -> None:
        """Publish the number of tokens done with the next heartbeat."""
        if self._heartbeat is not None:
            self._heartbeat.tokens = tokens

    def check(self) -> None:
        """Raise RankLostError if another rank is lost."""
        if self._heartbeat is not None and self._heartbeat.lost is not None:
            self._heartbeat.loss_noticed.set()
            raise RankLostError(self._heartbeat.lost)

    def finish(self, stage: str) -> None:
        """Publish that this rank has reached `stage`, and wait until all have.

        Raises:
            RankLostError: a rank is lost meanwhile.
        """
        if self._heartbeat is None:
            return
        self._heartbeat.publish(stage, "")
        while not self._heartbeat.all_reached(stage):
            self.check()
            time.sleep(0.05)  # not a collective: a signal must get through

    def barrier(self, number: int) -> None:
        """Wait until every rank has reached barrier `number` or a later one.

        Raises:
            RankLostError: a rank is lost meanwhile.
        """
        if self._heartbeat is None:
            return
        self._heartbeat.arrive(number)
        while not self._heartbeat.all_arrived(number):
            self.check()
            time.sleep(0.02)  # not a collective: a signal must get through

    def all_reduce_max(self, value: int) -> int:
        """all_reduce(MAX) over the ranks that share a model. Collective among them."""
        if self._tp_group is None:
            return value
        maximum = torch.tensor([value])
        self._collective(
            lambda: torch.distributed.all_reduce(
                maximum, torch.distributed.ReduceOp.MAX, group=self._tp_group
            )
        )
        return int(maximum.item())

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """all_gather of a CPU tensor of the same shape on all ranks: one for each part of the data, in order. Collective."""
        if self.place.world == 1:
            return [tensor]
        here = tensor.contiguous()
        everyone = [torch.empty_like(here) for _ in range(self.place.world)]
        self._collective(lambda: torch.distributed.all_gather(everyone, here, group=self._group))
        return everyone[:: self.place.tp]  # one for each group that shares a model

    def all_gather_object(self, document: Any) -> list[Any]:
        """all_gather of JSON values: one for each part of the data, in order. Collective."""
        if self.place.world == 1:
            return [document]
        text = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
        lengths = [int(n) for n in self.all_gather(torch.tensor(len(text)))]
        longest = torch.tensor(max(lengths))
        self._collective(
            lambda: torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=self._group)
        )
        padded = torch.zeros(int(longest), dtype=torch.uint8)
        padded[: len(text)] = text
        parts = self.all_gather(padded)
        return [
            json.loads(part[:n].numpy().tobytes().decode()) for part, n in zip(parts, lengths, strict=True)
        ]

    def merged(self, moments: dict[str, Moments]) -> dict[str, Moments]:
        """Merge the moments of all parts of the data by Chan's formula, in order: the same bits on every rank. Collective."""
        if self.place.shard[1] == 1:
            return moments
        counts = torch.stack([torch.stack([m.count, m.nonfinite]) for m in moments.values()])
        values = torch.stack([torch.stack([m.mean, m.m2, m.min, m.max]) for m in moments.values()])
        by_part = list(zip(self.all_gather(counts), self.all_gather(values), strict=True))
        total: dict[str, Moments] = {}
        for count, value in by_part:
            for index, name in enumerate(moments):
                part = Moments(*count[index], *value[index])
                total[name] = total[name].merged(part) if name in total else part
        return total

    def _collective(self, call: Any) -> None:
        try:
            call()
        except RuntimeError as error:  # gloo raises when a peer is gone
            self.check()
            reason = one_line(error, LONGEST_REASON)
            raise RankLostError(
                f"rank {self.place.rank}: the connection to another rank was lost ({reason}). Ended; {RESUME}"
            ) from error


class Heartbeat:
    """The heartbeats of all ranks: a thread writes this one's to the store and reads the others'."""

    def __init__(self, rank_info: RankInfo) -> None:
        import torch.distributed as dist

        self._rank_info = rank_info
        # A separate connection, since a wait on that of the process group would delay heartbeats.
        connection, self.owns_store = _connection()
        # With torchrun --max-restarts the store outlives the processes, with the entries of earlier attempts.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"fastheads/{attempt}", connection)
        self._thread = threading.Thread(target=self._run_thread, name="fastheads-heartbeat", daemon=True)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._state, self._reason = STAGES[0], ""
        self._heard: dict[int, tuple[str, float]] = {}
        self._beats: dict[int, dict[str, Any]] = {}
        self._barrier = 0
        self._run = 0  # number of the profile() call in the job
        self.tokens = 0
        self.total = 0
        self.lost: str | None = None
        self.loss_noticed = threading.Event()  # the main thread knows that a rank is lost

    def start(self) -> None:
        now = time.monotonic()
        self._heard = {
            rank: ("", now) for rank in range(self._rank_info.world) if rank != self._rank_info.rank
        }
        self._beats = {rank: _beat_of(STAGES[0]) for rank in self._heard}
        self._thread.start()

    def begin(self) -> None:
        """Publish at once that another run begins."""
        with self._lock:
            self._run += 1
            self._barrier = self.tokens = self.total = 0
        self.publish(STAGES[0], "")

    def publish(self, state: str, reason: str) -> None:
        """Publish the state of this rank at once."""
        with self._lock:
            self._state, self._reason = state, reason
            with suppress(RuntimeError):  # the store is gone; the thread reports that
                self._write()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * HEARTBEAT)

    def _write(self) -> None:
        beat = _beat_of(
            self._state, run=self._run, tokens=self.tokens, barrier=self._barrier, reason=self._reason
        )
        self._store.set(f"heartbeat/{self._rank_info.rank}", json.dumps(beat))

    def all_reached(self, stage: str) -> bool:
        """True if all other ranks have reached `stage` or a later one. Reads the store."""
        return all(
            beat["state"] in STAGES
            and (beat["run"], STAGES.index(beat["state"])) >= (self._run, STAGES.index(stage))
            for beat in self._read_now()
        )

    def arrive(self, number: int) -> None:
        """Publish at once that this rank has reached barrier `number`."""
        self._barrier = number
        self.publish(self._state, self._reason)

    def all_arrived(self, number: int) -> bool:
        """True if all other ranks have reached barrier `number` or a later one. Reads the store."""
        return all((beat["run"], beat["barrier"]) >= (self._run, number) for beat in self._read_now())

    def _read_now(self) -> list[dict[str, Any]]:
        """Read the store and return the other ranks' heartbeats."""
        with self._lock:
            if self._thread.is_alive():  # else the store may be gone
                with suppress(RuntimeError):  # the thread reports the reason
                    self._read()
            return [self._beats[rank] for rank in self._heard]

    def _run_thread(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._lock:
                    self._write()
                    self._read()
            except RuntimeError as error:
                if self._state == STAGES[-2]:  # all is done, and rank 0 has ended with its store
                    self._beats = {rank: _beat_of(STAGES[-1], run=self._run) for rank in self._heard}
                    return
                if not self._stopped.is_set():
                    self._lose(
                        f"the store that the ranks share cannot be reached ({one_line(error, LONGEST_REASON)})"
                    )
            if self.lost is not None:
                self._exit_if_stuck()
                return
            self._stopped.wait(HEARTBEAT if self._state == STAGES[0] else HEARTBEAT / 10)

    def _read(self) -> None:
        """Read the other ranks' heartbeats."""
        now = time.monotonic()
        total = self.tokens
        for rank, (last, heard_at) in list(self._heard.items()):
            key = f"heartbeat/{rank}"
            text = self._store.get(key).decode() if self._store.check([key]) else ""
            beat: dict[str, Any] = json.loads(text) if text else _beat_of(STAGES[0])
            if text != last:
                self._heard[rank] = (text, now)
            elif beat["state"] != STAGES[-1] and now - heard_at > HEARTBEAT_TIMEOUT:
                self._lose(f"no heartbeat of rank {rank} for {HEARTBEAT_TIMEOUT:.0f} s")
            if beat["state"] == "failed":
                self._lose(f"rank {rank} failed: {beat['reason']}")
            self._beats[rank] = beat
            total += beat["tokens"] if beat["run"] == self._run else 0
        self.total = total

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = f"rank {self._rank_info.rank}: {reason}. Ended; {RESUME}"

    def _exit_if_stuck(self) -> None:
        """Exit after GRACE seconds if the process has not ended by itself: it may block forever in a collective."""
        if not self.loss_noticed.wait(GRACE) and not self._stopped.is_set():
            print(f"fastheads: {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)


def _beat_of(
    state: str, *, run: int = 0, tokens: int = 0, barrier: int = 0, reason: str = ""
) -> dict[str, Any]:
    return {
        "time": time.time(),
        "state": state,
        "run": run,
        "tokens": tokens,
        "barrier": barrier,
        "reason": reason,
    }


def _connection() -> tuple[Any, bool]:
    """Connect to the store of the process group; also return True if this process hosts it (under torchrun none does)."""
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if address is None or not port.isdecimal():
        raise OptionError(
            "several processes need MASTER_ADDR and MASTER_PORT in the environment: use torchrun"
        )
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ.get("RANK") == "0"
    if own:
        # The process group would create this store itself; `multi_tenant` lets it share the one created here.
        store = dist.TCPStore(address, int(port), is_master=True, wait_for_workers=False, multi_tenant=True)
        return store, True
    return dist.TCPStore(address, int(port), is_master=False, wait_for_workers=False), False
