"""Several processes that profile one corpus together: who they are, whether they live, how they put their moments together.

`torchrun` starts them and says in the environment who each is. Each runs its own windows of the corpus and needs nobody until the
end; so that nobody then waits for one that died hours ago, each leaves a sign of life in torchrun's store every second.

Only numbers and JSON go between processes, never pickled objects.
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

PULSE = 1.0  # seconds between two signs of life
PATIENCE = 25.0  # seconds without one, after which a rank is lost
GRACE = 10.0  # seconds that a rank has to end by itself once it is told that another is lost
RESUME = "its last checkpoint is kept, and the same command with --resume goes on from it"
LONGEST_REASON = 200  # characters of an error, as it is told to the other ranks
STAGES = ("works", "measured", "saved", "ended")  # of a process that did not fail
# Ranks may wait for the slowest for as long as it lives: the signs of life tell, not this.
NEVER = datetime.timedelta(days=30)


@dataclass(frozen=True)
class Place:
    """Which of the processes this one is. `tp` of them that follow one another hold one model between them."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    tp: int = 1

    @property
    def shard(self) -> tuple[int, int]:
        """(which part of the data this process runs, of how many)."""
        return self.rank // self.tp, self.world // self.tp


def place_in_environment(tp: int = 1) -> Place:
    """What torchrun says in RANK, WORLD_SIZE and LOCAL_RANK; one process alone where it did not start this one.

    Raises:
        OptionError: if they are no numbers that make sense, or `tp` does not divide the number of processes.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    given = [os.environ.get(name) for name in names]
    if given[0] is None or given[1] is None:
        rank, world, local = 0, 1, 0
    else:
        said = ", ".join(f"{name}={value}" for name, value in zip(names, given, strict=True))
        if not all(value is None or (value.isascii() and value.isdecimal()) for value in given):
            raise OptionError(f"the environment's {said} are not whole numbers")
        rank, world, local = (int(value or 0) for value in given)
        if not rank < world:
            raise OptionError(f"the environment's {said} contradict each other")
    if tp < 1 or world % tp:
        raise OptionError(
            f"tp={tp} does not divide the number of processes, {world}: start them with torchrun"
        )
    return Place(rank, world, local, tp)


class Job:
    """All processes of one `torchrun`; alone where there is no torchrun. A context manager.

    With `profile(model, data, job=job)` the processes share the data out, and each returns the profile of all of it. Every
    process must make the same calls.

        with Job() as job:
            found = profile("my-llama", "texts.jsonl", job=job)
        if job.place.rank == 0:
            found.save("profile.safetensors")
    """

    def __init__(self, tp: int = 1, device: str = "auto", *, place: Place | None = None) -> None:
        """`tp`: how many processes share one model by tensor parallelism. `device`: as for `load_model`. `place`: None: as the
        environment says.

        Raises:
            OptionError: as `place_in_environment`.
        """
        self.place = place_in_environment(tp) if place is None else place
        self._device = device
        self._owns_group = False
        self._group: Any = None  # of all processes, for tensors on the CPU
        self._tp_group: Any = None
        self._mesh: Any = None
        self._pulse: _Pulse | None = None

    def __enter__(self) -> Self:
        if self.place.world == 1:
            return self
        import torch.distributed as dist

        if not dist.is_available():
            raise JobError("this torch cannot run several processes together: it has no distributed package")
        self._pulse = _Pulse(self.place)
        on_gpu = self.device.startswith("cuda")
        if on_gpu:
            torch.cuda.set_device(self.device)
        if not dist.is_initialized():
            # Without tensor parallelism nothing but the moments, on the CPU, ever goes between processes.
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
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pulse is None:
            return
        self._pulse.tell(*(("ended", "") if error is None else ("failed", one_line(error, LONGEST_REASON))))
        if error is None and self._pulse.owns_store:  # which goes with this process
            end = time.monotonic() + GRACE
            while not self._pulse.all_reached("ended") and time.monotonic() < end:
                time.sleep(0.05)
        self._pulse.stop()
        if self._owns_group and error is None:
            torch.distributed.destroy_process_group()
        # After an error the others may be gone: to end the groups in order would wait for them.

    def check_entered(self) -> None:
        """Raise JobError unless this is within the `with` block, where the processes know of each other."""
        if self.place.world > 1 and self._pulse is None:
            raise JobError("the processes do not know of each other yet: use the job in `with Job() as job:`")

    def begin(self) -> None:
        """Say that the next `profile()` begins: what was said of the one before is no news of this one."""
        if self._pulse is not None:
            self._pulse.begin()

    @property
    def device(self) -> str:
        """Where this process's model goes: of several GPUs, the one with its number on this host."""
        if self.place.world == 1 or self._device not in ("auto", "cuda"):
            return self._device
        if torch.cuda.is_available():
            return f"cuda:{self.place.local_rank}"
        return self._device if self._device != "auto" else "cpu"

    @property
    def mesh(self) -> Any:
        """What `from_pretrained(device_mesh=)` takes for tensor parallelism; None without it."""
        return self._mesh

    @property
    def tokens(self) -> int | None:
        """Tokens that all processes did so far, as far as this one has heard; None for one process alone."""
        return None if self._pulse is None else self._pulse.total

    def report(self, tokens: int) -> None:
        """Leave with the next sign of life how many tokens this process did."""
        if self._pulse is not None:
            self._pulse.tokens = tokens

    def check(self) -> None:
        """Raise RankLostError if another process is lost."""
        if self._pulse is not None and self._pulse.lost is not None:
            self._pulse.heard.set()
            raise RankLostError(self._pulse.lost)

    def finish(self, stage: str) -> None:
        """Say that this process has come to that stage, and wait until all have.

        Raises:
            RankLostError: if one is lost meanwhile.
        """
        if self._pulse is None:
            return
        self._pulse.tell(stage, "")
        while not self._pulse.all_reached(stage):
            self.check()
            time.sleep(0.05)  # and no collective: a signal must get through

    def meet(self, number: int) -> None:
        """Wait until every process has come to its `number`-th meeting, or has none left.

        Raises:
            RankLostError: if one is lost meanwhile.
        """
        if self._pulse is None:
            return
        self._pulse.arrive(number)
        while not self._pulse.all_arrived(number):
            self.check()
            time.sleep(0.02)  # and no collective: a signal must get through

    def agree(self, wish: int) -> int:
        """The greatest wish of the processes that hold a part of the same model. Collective among them."""
        if self._tp_group is None:
            return wish
        votes = torch.tensor([wish])
        self._collective(
            lambda: torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX, group=self._tp_group)
        )
        return int(votes.item())

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """`tensor`, a CPU tensor of one shape everywhere, of each part of the data in order. Collective among all."""
        if self.place.world == 1:
            return [tensor]
        here = tensor.contiguous()
        everyone = [torch.empty_like(here) for _ in range(self.place.world)]
        self._collective(lambda: torch.distributed.all_gather(everyone, here, group=self._group))
        return everyone[:: self.place.tp]  # of those with one model between them, the first speaks

    def told(self, document: Any) -> list[Any]:
        """`document` (JSON) of each part of the data, in order. Collective among all."""
        if self.place.world == 1:
            return [document]
        text = torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)
        lengths = [int(n) for n in self.gathered(torch.tensor(len(text)))]
        longest = torch.tensor(max(lengths))
        self._collective(
            lambda: torch.distributed.all_reduce(longest, torch.distributed.ReduceOp.MAX, group=self._group)
        )
        padded = torch.zeros(int(longest), dtype=torch.uint8)
        padded[: len(text)] = text
        parts = self.gathered(padded)
        return [
            json.loads(part[:n].numpy().tobytes().decode()) for part, n in zip(parts, lengths, strict=True)
        ]

    def merged(self, moments: dict[str, Moments]) -> dict[str, Moments]:
        """The moments of all parts of the data together, by Chan's formula in the order of the parts: the same bits on every
        process. Collective among all.
        """
        if self.place.shard[1] == 1:
            return moments
        counts = torch.stack([torch.stack([m.count, m.nonfinite]) for m in moments.values()])
        values = torch.stack([torch.stack([m.mean, m.m2, m.min, m.max]) for m in moments.values()])
        by_part = list(zip(self.gathered(counts), self.gathered(values), strict=True))
        total: dict[str, Moments] = {}
        for count, value in by_part:
            for index, name in enumerate(moments):
                part = Moments(*count[index], *value[index])
                total[name] = total[name].merged(part) if name in total else part
        return total

    def _collective(self, call: Any) -> None:
        try:
            call()
        except RuntimeError as error:  # gloo notices at once when the other end of a connection is gone
            self.check()
            reason = one_line(error, LONGEST_REASON)
            raise RankLostError(
                f"rank {self.place.rank}: the connection to another rank broke ({reason}). Ended; {RESUME}"
            ) from error


class _Pulse:
    """The signs of life of all processes, looked after in a thread."""

    def __init__(self, place: Place) -> None:
        import torch.distributed as dist

        self._place = place
        # A connection of its own: a wait in the process group's would hold the signs up.
        connection, self.owns_store = _connection()
        # With torchrun --max-restarts the store outlives the processes, and what those before left in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = dist.PrefixStore(f"fastheads/{attempt}", connection)
        self._thread = threading.Thread(target=self._beat, name="fastheads-pulse", daemon=True)
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._state, self._reason = STAGES[0], ""
        self._seen: dict[int, tuple[str, float]] = {}
        self._signs: dict[int, dict[str, Any]] = {}
        self._meeting = 0
        self._run = 0  # which profile() of the job
        self.tokens = 0
        self.total = 0
        self.lost: str | None = None
        self.heard = threading.Event()  # the main thread knows that one is lost

    def start(self) -> None:
        now = time.monotonic()
        self._seen = {rank: ("", now) for rank in range(self._place.world) if rank != self._place.rank}
        self._signs = {rank: _sign(STAGES[0]) for rank in self._seen}
        self._thread.start()

    def begin(self) -> None:
        """Say at once that another run begins."""
        with self._lock:
            self._run += 1
            self._meeting = self.tokens = self.total = 0
        self.tell(STAGES[0], "")

    def tell(self, state: str, reason: str) -> None:
        """Say at once what has become of this process."""
        with self._lock:
            self._state, self._reason = state, reason
            with suppress(RuntimeError):  # nobody can be told any more; the thread finds out by itself
                self._leave()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * PULSE)

    def _leave(self) -> None:
        sign = _sign(
            self._state, run=self._run, tokens=self.tokens, meeting=self._meeting, reason=self._reason
        )
        self._store.set(f"pulse/{self._place.rank}", json.dumps(sign))

    def all_reached(self, stage: str) -> bool:
        """Whether the others have come to that stage, or beyond, by what they say now."""
        return all(
            sign["state"] in STAGES
            and (sign["run"], STAGES.index(sign["state"])) >= (self._run, STAGES.index(stage))
            for sign in self._looked()
        )

    def arrive(self, number: int) -> None:
        """Say at once that this process has come to that meeting."""
        self._meeting = number
        self.tell(self._state, self._reason)

    def all_arrived(self, number: int) -> bool:
        """Whether the others have come to that meeting, or beyond, by what they say now."""
        return all((sign["run"], sign["meeting"]) >= (self._run, number) for sign in self._looked())

    def _looked(self) -> list[dict[str, Any]]:
        """The signs of the others as they are now."""
        with self._lock:
            if self._thread.is_alive():  # else the store may be gone
                with suppress(RuntimeError):  # the thread says what is the matter
                    self._look()
            return [self._signs[rank] for rank in self._seen]

    def _beat(self) -> None:
        while not self._stopped.is_set():
            try:
                with self._lock:
                    self._leave()
                    self._look()
            except RuntimeError as error:
                if self._state == STAGES[-2]:  # all have what they need, and the first is gone with its store
                    self._signs = {rank: _sign(STAGES[-1], run=self._run) for rank in self._seen}
                    return
                if not self._stopped.is_set():
                    self._lose(
                        f"the store that the ranks share cannot be reached ({one_line(error, LONGEST_REASON)})"
                    )
            if self.lost is not None:
                self._see_to_the_end()
                return
            self._stopped.wait(PULSE if self._state == STAGES[0] else PULSE / 10)

    def _look(self) -> None:
        """Read what the others left."""
        now = time.monotonic()
        total = self.tokens
        for rank, (last, heard_at) in list(self._seen.items()):
            key = f"pulse/{rank}"
            text = self._store.get(key).decode() if self._store.check([key]) else ""
            sign: dict[str, Any] = json.loads(text) if text else _sign(STAGES[0])
            if text != last:
                self._seen[rank] = (text, now)
            elif sign["state"] != STAGES[-1] and now - heard_at > PATIENCE:
                self._lose(f"nothing was heard of rank {rank} for {PATIENCE:.0f} s")
            if sign["state"] == "failed":
                self._lose(f"rank {rank} failed: {sign['reason']}")
            self._signs[rank] = sign
            total += sign["tokens"] if sign["run"] == self._run else 0
        self.total = total

    def _lose(self, reason: str) -> None:
        if self.lost is None:
            self.lost = f"rank {self._place.rank}: {reason}. Ended; {RESUME}"

    def _see_to_the_end(self) -> None:
        """End the process if it does not end by itself: it may be in a wait that nothing else ends."""
        if not self.heard.wait(GRACE) and not self._stopped.is_set():
            print(f"fastheads: {self.lost}", file=sys.stderr, flush=True)
            os._exit(1)


def _sign(state: str, *, run: int = 0, tokens: int = 0, meeting: int = 0, reason: str = "") -> dict[str, Any]:
    return {
        "time": time.time(),
        "state": state,
        "run": run,
        "tokens": tokens,
        "meeting": meeting,
        "reason": reason,
    }


def _connection() -> tuple[Any, bool]:
    """A connection to the store of the process group, and whether the store is in this process: torchrun has it elsewhere."""
    import torch.distributed as dist

    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if address is None or not port.isdecimal():
        raise OptionError(
            "several processes need MASTER_ADDR and MASTER_PORT in the environment: use torchrun"
        )
    own = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and os.environ.get("RANK") == "0"
    if own:
        # The process group would make this store itself; `multi_tenant` lets it share the one made here.
        store = dist.TCPStore(address, int(port), is_master=True, wait_for_workers=False, multi_tenant=True)
        return store, True
    return dist.TCPStore(address, int(port), is_master=False, wait_for_workers=False), False
