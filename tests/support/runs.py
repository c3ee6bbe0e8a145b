"""Real processes that profile, are killed and go on, for tests/run/test_resume.py and tests/run/test_data_parallel.py.

`python runs.py FOLDER`: FOLDER holds a checkpoint `tiny` and a text `text.jsonl`. Each line on stdin names a scenario, which
leaves NAME.json with what happened, and profiles, and then a line on stdout with its name. Every run is a process of its own,
forked from this one so that torch is imported once.
"""

import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import tiny_disk
import torch

import fastheads
from fastheads.corpus.sources import text_file
from fastheads.corpus.windows import Corpus
from fastheads.results import files
from fastheads.run import job as distributed
from fastheads.run.loading import find_model, load_model, load_tokenizer
from fastheads.stats.confidence import StableRule

EVERY = 0.1  # seconds between checkpoints
KILLS = 10


class Runs:
    """The scenarios."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def profile(self, name, job=None, seen=None, **options):
        """A run like all others, to FOLDER/NAME.safetensors; `seen(tokens)` after each batch."""
        place = distributed.RankInfo() if job is None else job.place
        os.chdir(self.folder)  # so that the data have one name
        corpus = Corpus(
            text_file("text.jsonl"),
            load_tokenizer(find_model("tiny")),
            seq_len=48,
            shard=place.shard,
            window_characters=20_000,
            workers=0,
        )
        return fastheads.profile(
            "tiny",
            corpus,
            device="cpu",
            batch_tokens=options.pop("batch_tokens", 192),
            output=f"{name}.safetensors",
            checkpoint=options.pop("checkpoint", f"{name}.checkpoint"),
            checkpoint_every=EVERY,
            progress=(lambda done, total: seen(done)) if seen is not None else False,
            job=job,
            vectors=True,
            **options,
        )

    def fork(self, name, function, *arguments):
        """A process that calls the function, its output in FOLDER/NAME.log."""
        child = os.fork()
        if child:
            return child
        code = 1
        try:
            log = os.open(self.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            function(*arguments)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, child):
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    def alone(self, name, run=None, **options):
        """A run from start to end."""
        run = run or (lambda: self.profile(name, **options))
        assert self.wait(self.fork(name, run)) == 0, self.said(name)

    def said(self, name):
        return (self.folder / f"{name}.log").read_text()

    def watched(self, name, **options):
        """A run whose times and tokens go to a file that outlives it."""
        track = os.open(self.folder / f"{name}.track", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        self.profile(
            name, seen=lambda tokens: os.write(track, b"%f %d\n" % (time.monotonic(), tokens)), **options
        )

    def track(self, name):
        path = self.folder / f"{name}.track"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(float(at), int(tokens)) for at, tokens in map(str.split, lines)]

    def until(self, condition, seconds=60.0):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not happen"
            time.sleep(0.005)

    def one(self):
        """What all others are compared with: one process, not interrupted."""
        if not (self.folder / "one.safetensors").exists():
            self.alone("one")

    # ---------------------------------------------------------------- one process

    def killed(self):
        """SIGKILL at random moments, and on from there each time."""
        self.one()
        moments = random.Random(0)
        kills, tracks = 0, []
        while True:
            child = self.fork("killed", lambda: self.watched("killed", resume=True))
            running = time.monotonic()
            self.until(lambda: self.track("killed") or time.monotonic() - running > 20)
            if kills == KILLS:
                assert self.wait(child) == 0, self.said("killed")
                tracks.append(self.track("killed"))
                break
            time.sleep(moments.uniform(0, 3.5 * EVERY))
            os.kill(child, signal.SIGKILL)
            if self.wait(child) == 0:
                break  # it was done
            tracks.append(self.track("killed"))
            kills += 1
        return {"kills": kills, "tracks": tracks, "every": EVERY}

    def full_disk(self):
        """From some moment on no file can be written; then SIGKILL."""
        self.one()

        def run():
            written = self.folder / "full.checkpoint"

            def seen(tokens):
                if written.exists() and resource.getrlimit(resource.RLIMIT_FSIZE)[0] < 0:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (512, -1))
                    (self.folder / "full.began").touch()
                time.sleep(0.002)

            self.profile("full", seen=seen)

        child = self.fork("full", run)
        self.until((self.folder / "full.began").exists)
        before = (self.folder / "full.checkpoint").read_bytes()
        time.sleep(5 * EVERY)
        os.kill(child, signal.SIGKILL)
        code = self.wait(child)
        kept = (self.folder / "full.checkpoint").read_bytes() == before
        said = self.said("full")
        self.alone("full", resume=True)
        return {"code": code, "kept": kept, "said": said}

    def tiny_disk(self):
        """The output and the checkpoints go to a tmpfs; something fills it, and it stays full to the end of the run; later there
        is room again.
        """
        self.one()
        disk, written = self.folder / "disk", self.folder / "disk/tiny.checkpoint"
        disk.mkdir(exist_ok=True)
        found = {}

        def run():
            def seen(tokens):
                if written.exists() and not (disk / "filler").exists():
                    found["before"] = written.read_bytes()
                    tiny_disk.fill(disk)
                time.sleep(0.002)

            try:
                self.profile("disk/tiny", seen=seen)
            except OSError as error:
                print(json.dumps([error.errno, error.filename]))
            kept = written.read_bytes() == found["before"]
            print(json.dumps([kept, sorted(os.listdir(disk))]))

        def supervise():
            try:
                tiny_disk.mount(disk, 64 * 1024)
            except tiny_disk.NoMounts as no:
                (self.folder / "no-mounts").write_text(str(no))
                return
            self.alone("full-tiny", run)
            (disk / "filler").unlink()
            self.alone("more-tiny", lambda: self.profile("disk/tiny", resume=True))
            (self.folder / "left-tiny").write_text(json.dumps(os.listdir(disk)))
            shutil.copy(disk / "tiny.safetensors", self.folder / "tiny.safetensors")

        code = self.wait(self.fork("supervise-tiny", supervise))
        if (self.folder / "no-mounts").exists():
            return {"no": (self.folder / "no-mounts").read_text()}
        assert code == 0, self.said("supervise-tiny")
        left = json.loads((self.folder / "left-tiny").read_text())
        return {"said": self.said("full-tiny"), "later": self.said("more-tiny"), "left": left}

    def ended(self):
        """SIGTERM, and on from there."""
        self.one()

        def run():
            def seen(tokens):
                if tokens > 20_000:
                    os.kill(os.getpid(), signal.SIGTERM)

            try:
                self.profile("ended", seen=seen)
            except fastheads.errors.ProfileInterrupted as stopped:
                print(json.dumps([stopped.number, stopped.profile.metadata["data"]["tokens"]]))
                os._exit(43)

        code = self.wait(self.fork("ended", run))
        said = self.said("ended")
        self.alone("ended", resume=True)
        return {"code": code, "said": said}

    # ---------------------------------------------------------------- two processes

    def ranks(self, name, function, world=2, **options):
        """Processes with the environment that torchrun gives them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def run(rank):
            os.environ |= {
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank)},
            }
            function(name, **options)

        return [self.fork(f"{name}.{rank}", run, rank) for rank in range(world)]

    def shared(self, name, tp=1, **options):
        with distributed.Job(tp) as job:
            rank = job.place.rank
            track = os.open(
                self.folder / f"{name}.{rank}.track", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
            )

            def seen(tokens):
                os.write(track, b"%f %d\n" % (time.monotonic(), tokens))
                time.sleep(0.002)

            found = self.profile(name, job, seen=seen, **options)
        found.save(self.folder / f"{name}.{rank}.safetensors")

    def two(self):
        """Two processes, and one."""
        self.one()
        codes = [self.wait(child) for child in self.ranks("two", self.shared)]
        return {"codes": codes, "said": [self.said(f"two.{rank}") for rank in range(2)]}

    def stable(self):
        """Until the ranking has settled: one process, two, and two of which one is killed on the way."""
        self.one()
        stable = {
            "until_stable": StableRule(tolerance=0.03),
            "metrics": ["relative_head_residual_contribution_norm"],  # which settles before the data end
        }
        self.alone("one-stable", **stable)
        codes = [self.wait(child) for child in self.ranks("stable", self.shared, **stable)]
        children = self.ranks("stable-lost", self.shared, **stable)
        # Just before and at the end of its first window, where what is saved and what was looked at could part.
        self.until(lambda: len(self.track("stable-lost.0")) > 100)
        os.kill(children[0], signal.SIGKILL)
        for child in children:
            self.wait(child)
        again = self.ranks("stable-lost", self.shared, **stable, resume=True)
        return {"codes": codes, "again": [self.wait(child) for child in again]}

    def lost(self):
        """One of two is killed."""
        children = self.ranks("lost", self.shared)
        self.until(lambda: len(self.track("lost.1")) > 20)
        os.kill(children[1], signal.SIGKILL)
        codes = [self.wait(child) for child in children]
        said = [self.said(f"lost.{rank}") for rank in range(2)]
        left = sorted(path.name for path in self.folder.glob("lost.checkpoint*"))
        again = [self.wait(child) for child in self.ranks("lost", self.shared, resume=True)]
        rests = sorted(path.name for path in self.folder.glob("*lost.checkpoint*"))
        at_last = [self.said(f"lost.{rank}") for rank in range(2)]
        return {
            **{"codes": codes, "said": said, "left": left},
            **{"again": again, "rests": rests, "at_last": at_last},
        }

    def failed(self):
        """One of two has an error."""

        def run(name):
            if os.environ["RANK"] == "1":
                files.os.fsync = None  # the first checkpoint fails with a bug
            self.shared(name)

        codes = [self.wait(child) for child in self.ranks("failed", run)]
        return {"codes": codes, "said": [self.said(f"failed.{rank}") for rank in range(2)]}

    def tensor_parallel(self):
        """Two processes hold one model between them; stopped once."""
        self.one()

        def run(name, resume=False):
            with distributed.Job(2, "cpu") as job:

                def seen(tokens):
                    if tokens > 20_000 and not resume and job.place.rank == 1:
                        os.kill(os.getpid(), signal.SIGTERM)

                try:
                    found = self.profile(name, job, seen=seen, resume=resume, batch_tokens=960)
                except fastheads.errors.ProfileInterrupted as stopped:
                    print(stopped.profile.metadata["data"]["tokens"])
                    os._exit(43)
                found.save(self.folder / f"{name}.{job.place.rank}.safetensors")

        codes = [self.wait(child) for child in self.ranks("tensor", run)]
        said = [self.said(f"tensor.{rank}") for rank in range(2)]
        again = [self.wait(child) for child in self.ranks("tensor", run, resume=True)]
        at_last = [self.said(f"tensor.{rank}") for rank in range(2)]
        return {"codes": codes, "said": said, "again": again, "at_last": at_last}


def main():
    torch.set_num_threads(1)
    distributed.HEARTBEAT_TIMEOUT, distributed.GRACE = 2.0, 2.0
    (folder,) = sys.argv[1:]
    load_model(
        find_model(str(Path(folder, "tiny"))), device="cpu"
    )  # what is imported here, no run has to import
    runs = Runs(Path(folder))
    for name in map(str.strip, sys.stdin):
        try:
            found = getattr(runs, name)()
        except Exception:
            found = {"error": traceback.format_exc()}
        Path(folder, f"{name}.json").write_text(json.dumps(found))
        print(name, flush=True)


if __name__ == "__main__":
    main()
