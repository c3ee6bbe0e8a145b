"""Run a model over data: forwards, counts, checkpoints, and the profile at the end. `run.api.profile()` prepares it."""

import os
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.capture.collect import load_state, state
from fastheads.capture.manager import HookManager, recorder_of, weights_of
from fastheads.corpus.windows import Corpus
from fastheads.errors import (
    CheckpointError,
    DataError,
    ForwardError,
    OptionError,
    ProfileInterrupted,
    RankLostError,
)
from fastheads.models.batch_sharing import RotaryState, Sharing, sharing_of
from fastheads.models.fingerprint import fingerprint
from fastheads.results.head_profile import HeadProfile
from fastheads.run.batches import Batch, Feed, GivenFeed, WindowFeed, automatic_budget, padding_id
from fastheads.run.checkpoint import Checkpoint, check_state, devices_of, names_of
from fastheads.run.early_exit import EarlyExit
from fastheads.run.job import Job
from fastheads.run.model_state import (
    config_digest,
    evaluation_mode,
    input_device,
    input_embedding,
    is_causal,
    takes_argument,
)
from fastheads.run.overhead import Overhead
from fastheads.run.progress import Status
from fastheads.run.ranks import check_same, merge_profiles
from fastheads.run.signals import SignalHandler, Stopped
from fastheads.run.stability import StabilityChecks, deciding_metric
from fastheads.stats.confidence import StableRule


@dataclass(frozen=True)
class Settings:
    """The options of `profile()` that a run needs."""

    batch_size: int | None
    batch_tokens: int | None
    max_tokens: int | None
    compile: bool
    every: float
    until_stable: StableRule | None
    shard: tuple[int, int]  # the shard of all processes together
    options: dict[str, Any]  # for the HookManager
    name: str | None


class Run:
    """The run of one process."""

    def __init__(
        self,
        model: nn.Module,
        hooks: HookManager,
        corpus: Corpus | Iterable[dict[str, Any]],
        settings: Settings,
        *,
        job: Job,
        checkpoint: Checkpoint | None,
        early_exit: EarlyExit,
        report: Callable[[Status], None],
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.model, self.hooks, self.corpus, self.settings = model, hooks, corpus, settings
        self.job, self.checkpoint, self.early_exit, self.report = job, checkpoint, early_exit, report
        self.say = say  # prints a line to the user
        self.device = input_device(model)
        self.tokens = self.sequences = self.area = self.batches = 0
        self.seconds = 0.0  # including the runs that this one resumes
        self.ended = False
        self.complete = False  # True: ended with all of the data
        self.stability = StabilityChecks(settings.until_stable, job, hooks)
        self.feed: Feed | None = None
        self.sharing = _sharing(model, corpus)
        self.rotary = RotaryState(model)
        self.overhead = Overhead(self.device)
        self.signals = SignalHandler(patient=job.place.tp > 1)
        # Before the first forward, in which some quantized layers repack their weights; only once, since it reads all weights.
        needed = checkpoint is not None or job.place.shard[1] > 1
        self._weights = (weights_of(hooks) or fingerprint(model))["sha256"] if needed else ""
        self._config_digest = config_digest(model) if needed else ""
        self._takes_cache = takes_argument(early_exit.decoder, "use_cache")
        self._due = 0.0
        # The mask must be an argument of the compiled function, else its shape would be assumed constant.
        # None without compilation: a reference cycle would keep the run and its data until garbage collection.
        self._compiled: Any = torch.compile(self._call, dynamic=True) if settings.compile else None

    def check_together(self) -> None:
        """Raise OptionError, on all ranks, unless they have the same model, data and options. Collective."""
        own = self.configuration | {
            "shard": list(self.settings.shard),
            "checkpoints": self.checkpoint is not None,
        }
        check_same(self.job, own)

    # ------------------------------------------------------------------ position

    def prepare(self, resume: bool, output: str | os.PathLike[str] | None = None) -> None:
        """Resume from the checkpoint, if `resume` and there is one, and say so.

        Raises:
            CheckpointError: it cannot be resumed; or there is none, and the output exists.
        """
        assert self.checkpoint is not None
        self.checkpoint.tidy()
        if not resume:
            return
        loaded = self.checkpoint.load()
        self._load(loaded)
        states = self.job.all_gather_object(
            [loaded is not None, self.tokens, output is not None and Path(output).exists()]
        )
        if any(found for found, _, _ in states):
            self.say(
                f"resuming from {self.checkpoint.path} at {sum(tokens for _, tokens, _ in states):,} tokens"
            )
        elif any(finished for _, _, finished in states):
            raise CheckpointError(
                f"nothing to resume: there is no checkpoint {self.checkpoint.path}, and {output} is a finished profile. Leave "
                "out --resume to replace it"
            )
        else:
            self.say(
                f"nothing to resume: there is no checkpoint {self.checkpoint.path}, so the run starts from the beginning"
            )

    def _load(self, loaded: tuple[dict[str, Tensor], dict[str, Any]] | None) -> None:
        """Restore the state that the checkpoint holds."""
        assert self.checkpoint is not None
        if self.job.place.tp > 1:  # ranks that share a model must be at the same batch
            step = -1 if loaded is None else loaded[1].get("batches", -1)
            if self.job.all_reduce_max(step) != step or self.job.all_reduce_max(-step) != -step:
                raise CheckpointError(
                    "cannot resume: the checkpoints of the processes that share a model are at different batches. "
                    "Leave out --resume to start from the beginning"
                )
        if loaded is None:
            return
        tensors, document = loaded
        self.checkpoint.check(document.get("configuration"), self.configuration)
        counts = [document.get(key) for key in ("tokens", "sequences", "area", "batches", "looks")]
        seconds, position, notes = (document.get(key) for key in ("seconds", "position", "notes"))
        sound = all(type(n) is int and n >= 0 for n in counts)
        if not (
            sound and isinstance(seconds, float) and isinstance(position, dict) and isinstance(notes, dict)
        ):
            raise CheckpointError(
                f"{self.checkpoint.path} is not a checkpoint: its counts or its position are missing"
            )
        devices = devices_of(self.checkpoint.path, tensors)
        check_state(self.checkpoint.path, devices, notes)
        try:
            load_state(recorder_of(self.hooks), devices, notes)
        except ValueError as error:
            raise CheckpointError(f"cannot resume from {self.checkpoint.path}: {error}") from error
        self.tokens, self.sequences, self.area, self.batches, self.stability.checks = counts  # type: ignore[assignment]
        self.seconds = seconds
        self.ended, self.stability.settled, self.complete = (
            document.get(key) is True for key in ("ended", "settled", "complete")
        )
        self.feed = self._make_feed(position)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """Everything that the result depends on, as JSON values: as the run began."""
        settings, place = self.settings, self.job.place
        rule = self.sharing.described()
        if isinstance(self.corpus, Corpus):
            data = {f"data {key}": value for key, value in self.corpus.identity.items()}
        else:
            data = {"data source": "token batches", "max_tokens": settings.max_tokens}
        return {
            "model weights": self._weights,
            "model configuration": self._config_digest,
            **data,
            **settings.options,
            "batch_size": settings.batch_size,
            "batch_tokens": settings.batch_tokens,
            "compile": settings.compile,
            **({} if rule is None else {"rows_of_a_batch": rule}),
            "until_stable": None if settings.until_stable is None else asdict(settings.until_stable),
            "process": [place.rank, place.world, place.tp],
        }

    def save(self) -> bool:
        """Write the checkpoint; False if there is none or writing failed."""
        if self.checkpoint is None or self.feed is None:
            return False
        devices, notes = state(recorder_of(self.hooks))
        document = {
            "configuration": self.configuration,
            "position": self.feed.position(),
            "notes": notes,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "area": self.area,
            "batches": self.batches,
            "looks": self.stability.checks,
            "seconds": self.seconds,
            "ended": self.ended,
            "settled": self.stability.settled,
            "complete": self.complete,
        }
        written = self.checkpoint.save(names_of(devices), document)
        self._due = time.monotonic() + self.settings.every
        return written

    def _make_feed(self, position: dict[str, Any] | None) -> Feed:
        settings = self.settings
        if not isinstance(self.corpus, Corpus):
            return GivenFeed(
                self.corpus,
                max_tokens=settings.max_tokens,
                digested=self.checkpoint is not None,
                sharing=self.sharing,
                position=position,
            )
        seq_len = self.corpus.seq_len
        budget = settings.batch_tokens
        if budget is None:
            config: Any = getattr(self.model, "config", None)
            dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
            budget = automatic_budget(
                config.get_text_config() if hasattr(config, "get_text_config") else config,
                self.device,
                dtype,
                seq_len,
            )
            budget = -self.job.all_reduce_max(-budget)
            if self.device.type != "cuda" and settings.batch_size is not None:
                budget = settings.batch_size * seq_len
        embeddings = getattr(input_embedding(self.model), "num_embeddings", None)
        return WindowFeed(
            self.corpus,
            budget=budget,
            max_rows=settings.batch_size,
            pad_token_id=padding_id(self.corpus.tokenizer, embeddings),
            with_mask=not is_causal(self.model, self.hooks.sites),
            pinned=self.device.type == "cuda",
            embeddings=embeddings,
            each_window=settings.until_stable is not None,  # a check follows each window
            sharing=self.sharing,
            position=position,
        )

    # ------------------------------------------------------------------ forwards

    def whole(self) -> HeadProfile:
        """Run all batches, and return the profile of all ranks."""
        handled = self.signals.handling() if self.checkpoint is not None else nullcontext()
        with handled:
            try:
                self.stability.share_known(ended=self.ended)
                if not self.ended:
                    self._run_batches()
                if self.job.place.world > 1:
                    self.save()  # other processes may still fail
                    self.job.finish("measured")
            except KeyboardInterrupt as interrupt:
                number = interrupt.number if isinstance(interrupt, Stopped) else None
                with self.signals.ignore_signals():
                    raise self._interrupted(number) from interrupt
            except RankLostError:
                with self.signals.ignore_signals():
                    self.save()
                raise
        return self._merged()

    def _interrupted(self, number: int | None) -> ProfileInterrupted:
        # If a batch was interrupted, it is unknown whether it counted: keep the previous checkpoint.
        written = number is not None and self.save()
        exists = self.checkpoint is not None and (written or self.checkpoint.path.exists())
        path = self.checkpoint.path if exists and self.checkpoint is not None else None
        return ProfileInterrupted(
            self.part(complete=False), signal.SIGINT if number is None else number, path
        )

    def _run_batches(self) -> None:
        """Run the model over the remaining batches."""
        before, start = self.seconds, time.monotonic()
        self._due = start + self.settings.every
        with evaluation_mode(self.model), torch.inference_mode():
            if self.feed is None:
                self.feed = self._make_feed(None)
            first = True
            while (
                not self.stability.catch_up(self.feed.stretches) and (batch := self.feed.next()) is not None
            ):
                if first:
                    self._report()
                    first = False
                with self.signals.guarded():
                    fitted = self._forward(batch)
                    if fitted:
                        self.feed.done()
                        self._count(batch)
                        self.seconds = before + time.monotonic() - start
                if not fitted:
                    self._halve(batch)
                    continue
                self._report()
                self.job.check()
                self._stop_or_save()
            self.stability.finish()
        if self.device.type == "cuda":  # the last batches may still be running
            torch.cuda.synchronize(self.device)
        self.seconds = before + time.monotonic() - start
        self.ended, self.complete = True, self.feed.exhausted

    def _stop_or_save(self) -> None:
        """Between two batches, stop or write a checkpoint if it is time to; ranks that share a model act together."""
        action = 2 if self.signals.number is not None else 0
        if self.checkpoint is not None and time.monotonic() >= self._due:
            action = max(action, 1)
        action = self.job.all_reduce_max(action)
        if action == 2:
            raise Stopped(self.signals.number or signal.SIGTERM)
        if action == 1:
            self.save()

    def _forward(self, batch: Batch) -> bool:
        """Run one batch; False if memory ran out, in which case nothing is counted."""
        self.rotary.reset()
        try:
            arguments = {key: _to(value, self.device) for key, value in batch.arguments.items()}
            valid = None if batch.valid is None else _to(batch.valid, self.device) != 0
            if self._takes_cache:
                arguments["use_cache"] = False
            if self.settings.compile:
                if valid is None and "attention_mask" not in arguments:
                    # Always with a mask, else there would be two graphs.
                    valid = torch.ones_like(arguments["input_ids"], dtype=torch.bool)
                self._compiled(valid, arguments)
            else:
                with self.hooks.token_mask(valid) if valid is not None else nullcontext():
                    self.overhead.run(lambda: self.early_exit.call(arguments), self.hooks)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.job.place.tp > 1:
                raise ForwardError(
                    f"out of memory with {batch.area:,} tokens in a batch: lower --batch-tokens (batch_tokens=)"
                ) from error
        else:
            return True
        return False

    def _call(self, valid: Tensor | None, arguments: dict[str, Any]) -> None:
        with self.hooks.token_mask(valid) if valid is not None else nullcontext():
            self.early_exit.decoder(**arguments)

    def _halve(self, batch: Batch) -> None:
        assert self.feed is not None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        if not self.feed.halve():
            if len(batch.lengths) > 1:
                raise ForwardError(
                    f"out of memory with a batch of {len(batch.lengths):,} rows, which cannot be halved, since in this model the "
                    "rows of a batch affect each other: use smaller batches"
                )
            raise ForwardError(
                f"out of memory with one sequence of {batch.width:,} tokens: use a smaller seq_len"
            )

    def _count(self, batch: Batch) -> None:
        self.tokens += batch.tokens
        self.sequences += batch.sequences
        self.area += batch.area
        self.batches += 1

    def _report(self) -> None:
        assert self.feed is not None
        self.job.report(self.tokens)
        everywhere, parts = self.job.tokens, self.job.place.shard[1] * self.settings.shard[1]
        total, expected = self.feed.total, self.feed.expected
        most = self.settings.max_tokens
        if most is not None and expected is not None:
            expected = min(expected, most // parts)
        expected = total if total is not None else expected
        if everywhere is not None:
            total = None  # the other ranks' totals are unknown
            expected = None if expected is None else expected * self.job.place.shard[1]
        self.report(
            Status(
                tokens=self.tokens,
                all_tokens=self.tokens if everywhere is None else max(everywhere, self.tokens),
                total=total,
                expected=expected,
                padding=1 - self.tokens / self.area if self.area else 0.0,
                overhead=self.overhead.share,
            )
        )

    def close(self) -> None:
        self._compiled = None
        self.early_exit.remove()
        self.rotary.restore()
        if self.feed is not None:
            self.feed.close()

    # ------------------------------------------------------------------ results

    def part(self, *, complete: bool) -> HeadProfile:
        """Return the profile of the finished batches of this rank."""
        found = self.hooks.to_profile()
        if self.settings.name is not None:
            found.metadata["model"] = self.settings.name
        if isinstance(self.corpus, Corpus):
            about = dict(self.corpus.identity)
            if self.settings.batch_size is not None:
                about["batch_size"] = self.settings.batch_size
        else:
            about = {"source": "token batches", "sha256": None, "max_tokens": self.settings.max_tokens}
        found.metadata["data"] = about | {
            "tokens": self.tokens,
            "sequences": self.sequences,
            "seconds": round(self.seconds, 3),
            "padding": round(1 - self.tokens / self.area, 6) if self.area else 0.0,
            "complete": complete,
        }
        if self.settings.until_stable is not None:
            rule = asdict(self.settings.until_stable)
            found.metadata["data"]["until_stable"] = rule | {
                "metric": deciding_metric(found.moments),
                "settled": self.stability.settled,
            }
        share = self.overhead.share
        if share is not None:
            found.metadata["data"]["overhead"] = round(share, 5)
        return found

    def _merged(self) -> HeadProfile:
        """Return the profile of all parts of the data, the same on every rank."""
        found = self.part(complete=self.complete)
        merge_profiles(self.job, found, self.settings.shard)
        if self.settings.until_stable is not None:
            found.metadata["data"]["until_stable"]["metric"] = deciding_metric(found.moments)
        if not found.metadata["data"]["tokens"]:
            raise DataError("no tokens in the data")
        return found


def _sharing(model: nn.Module, corpus: Any) -> Sharing:
    """Return the rule for rows that may share a batch; the caller's own batches are never refused."""
    try:
        return sharing_of(model)
    except OptionError:
        if isinstance(corpus, Corpus):
            raise
        return Sharing(alone="earlier batches matter")


def _is_out_of_memory(error: Exception) -> bool:
    # On the CPU torch raises a plain RuntimeError.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


def _to(value: Any, device: torch.device) -> Any:
    # From pinned memory the copy overlaps with computation.
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
