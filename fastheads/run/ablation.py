"""The ablation job: from a model and its profile to an AblationResult, over data that the profile did not see."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastheads.corpus.windows import Corpus
from fastheads.errors import (
    AblationFileError,
    AblationInterrupted,
    CheckpointError,
    DataError,
    RankLostError,
)
from fastheads.intervene.ablation import Ablator, Mode
from fastheads.models.sites import unwrapped
from fastheads.results.ablation import AblationResult, Curve, Draws, EachHead, numbers, parsed
from fastheads.results.files import UnreadableError, read_once, write_atomic
from fastheads.results.head_profile import HeadProfile
from fastheads.results.vectors import sites_of
from fastheads.run.ablation_inputs import (
    check_options,
    check_weights,
    rankings,
    seen_by,
    sequences_of,
    source_of,
)
from fastheads.run.checkpoint import shown
from fastheads.run.head_sets import HeadSets, head_sets
from fastheads.run.job import RESUME, Job, RankInfo
from fastheads.run.model_state import config_digest
from fastheads.run.ranks import check_same
from fastheads.run.scoring import Scorer
from fastheads.run.signals import SignalHandler, Stopped

SEQUENCES, SEQ_LEN = 64, 128
FRACTIONS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
DRAWS = 20
EVERY = 10.0  # seconds between checkpoints
CHECKPOINT_FORMAT, CHECKPOINT_VERSION = "fastheads.ablation.checkpoint", 1
LARGEST = 2**28  # bytes of a checkpoint

# Called with the number of sets scored, each on a chunk of the sequences, and the total.
Progress = Callable[[int, int], None]


def ablation(
    model: nn.Module,
    profile: HeadProfile,
    data: Any = None,
    *,
    tokenizer: Any,
    metrics: Sequence[str] | None = None,
    fractions: Sequence[float] = FRACTIONS,
    mode: Mode = "zero",
    draws: int = DRAWS,
    seed: int = 0,
    matched: bool = True,
    sequences: int = SEQUENCES,
    seq_len: int = SEQ_LEN,
    each_head: bool = False,
    allow_seen: bool = False,
    field: str | None = None,
    batch_tokens: int | None = None,
    output: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    job: Job | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
    name: str | None = None,
) -> AblationResult:
    """Ablate the lowest heads of a profile's rankings, and random heads, and score what the model loses.

    Args:
        model: the model that was profiled.
        profile: its profile; for mode "mean" with mean vectors.
        data: as for `profile()`, texts only; blocks of tokens are cut from them in order. None: docstrings of Python's standard
            library, which are not among the default data of `profile()`.
        tokenizer: of the model.
        metrics: the rankings, each a metric of the profile or `mean_ablation_error_ratio`. None: for mode "zero"
            `head_residual_ratio`; for "mean" `mean_ablation_error_ratio`, or the ratio where that is unknown.
        fractions: of the heads.
        mode: "zero" or "mean".
        draws: random draws of as many heads, over the whole model.
        seed: of the draws.
        matched: score as many draws again that take as many heads of each layer as the ranking does.
        sequences: number of sequences to score.
        seq_len: tokens of each; there is no padding.
        each_head: score each head alone, too.
        allow_seen: accept data that the profile has seen, or may have.
        field: the field or column of the documents.
        batch_tokens: the most tokens in a forward. None: by the device and the vocabulary.
        output: the file for the result, which is written after each chunk of the sequences, by a single process.
        checkpoint: the file for the state of the run, from which the same call continues. It is removed at the end. None: none.
        job: the processes that split the head sets between them, each making this call; all return the whole result.
        progress: called as it goes.
        say: called with lines for the user.
        name: the model's name in the result.

    Raises:
        OptionError: an option is out of range or unknown, or the processes of the job have different ones.
        DataError: the data cannot be read, have too few tokens, or may have been seen by the profile.
        ResultsError: the profile is of another model or other weights, or lacks what the ranking or the mode needs.
        CheckpointError: the checkpoint is damaged, or of another run.
        ForwardError: a loss is NaN or infinite, or memory runs out.
        RankLostError: another process of the job died or failed.
        AblationInterrupted: Ctrl-C, or SIGTERM.
    """
    job = Job(place=RankInfo()) if job is None else job
    job.check_entered()
    job.begin()
    check_options(
        fractions=fractions,
        draws=draws,
        seed=seed,
        sequences=sequences,
        seq_len=seq_len,
        batch_tokens=batch_tokens,
    )
    model = unwrapped(model)
    weights = check_weights(profile, model)
    ablator = Ablator(
        model,
        mode,
        profile if mode == "mean" else None,
        include=[site.name for site in sites_of(profile, model)],
    )
    sets = head_sets(
        rankings(profile, model, mode, metrics),
        fractions,
        draws=draws,
        seed=seed,
        matched=matched,
        each_head=each_head,
    )
    corpus = Corpus(source_of(data, field), tokenizer, cut="stream", seq_len=seq_len)
    seen = seen_by(profile, corpus.identity)
    if seen is not None and not allow_seen:
        raise DataError(
            f"{seen}: name other data, or allow data that was seen (--allow-seen, allow_seen=True)"
        )
    ids = sequences_of(corpus, sequences)
    about = {
        "model": profile.metadata.get("model") if name is None else name,
        "weights": weights,
        "data": {**corpus.identity, "sequences": sequences, "seen": seen is not None},
        "num_heads": sets.num_heads,
        "seed": seed,
        "draws": draws,
    }
    with Scorer(model, ids, ablator, batch_tokens=batch_tokens) as scorer:
        run = _Run(
            scorer,
            sets,
            mode,
            about,
            job=job,
            output=output,
            checkpoint=checkpoint,
            progress=progress,
            say=say,
        )
        run.configure(model, profile)
        return run.whole()


# ---------------------------------------------------------------- the run


class _Run:
    """Scores the sets of one process, chunk after chunk of the sequences."""

    def __init__(
        self,
        scorer: Scorer,
        sets: HeadSets,
        mode: str,
        about: dict[str, Any],
        *,
        job: Job,
        output: str | os.PathLike[str] | None,
        checkpoint: str | os.PathLike[str] | None,
        progress: Progress | None,
        say: Callable[[str], None],
    ) -> None:
        self.scorer, self.sets, self.mode, self.about, self.job = scorer, sets, mode, about, job
        self.output, self.progress, self.say = output, progress, say
        part, parts = job.place.shard
        self.own = range(part, len(sets.sets), parts)
        self.base: list[float] = []
        self.scores: dict[int, list[tuple[float, float]]] = {n: [] for n in self.own}
        place = job.place
        path = None if checkpoint is None else Path(checkpoint)
        if path is not None and place.world > 1:
            path = path.with_name(f"{path.name}-{place.rank + 1}-of-{place.world}")
        self.path = path
        self.signals = SignalHandler()
        self._warned = False
        self.configuration: dict[str, Any] = {}

    def configure(self, model: nn.Module, profile: HeadProfile) -> None:
        """Note all that the result depends on, and resume from the checkpoint if there is one. Collective."""
        means = None
        if self.mode == "mean" and profile.vectors is not None:
            means = hashlib.sha256(np.ascontiguousarray(profile.vectors.mean).tobytes()).hexdigest()
        data = {key: value for key, value in self.about["data"].items() if key != "source"}
        self.configuration = {
            "model weights": self.about["weights"],
            "model configuration": config_digest(model),
            "mode": self.mode,
            "means": means,
            "metrics": list(self.sets.curves),
            "fractions": self.sets.fractions,
            "draws": self.about["draws"],
            "seed": self.about["seed"],
            "matched": bool(self.sets.matched),
            "each head": bool(self.sets.each_head),
            "heads": hashlib.sha256(json.dumps(self.sets.sets).encode()).hexdigest(),
            **{f"data {key}": value for key, value in data.items()},
            "sequences of a chunk": len(self.scorer.chunks[0]),
            "process": [self.job.place.rank, self.job.place.world],
        }
        self.configuration = json.loads(json.dumps(self.configuration))
        check_same(self.job, self.configuration)
        if self.path is not None and self.path.exists():
            self._load()
            self.say(
                f"continuing from {self.path}: {self._done():,} of {self._total():,} evaluations are done"
            )

    def whole(self) -> AblationResult:
        """Score all sets on all sequences, and return the result of all ranks."""
        handled = (
            self.signals.handling() if self.path is not None or self.output is not None else nullcontext()
        )
        with handled:
            try:
                self._run()
                if self.job.place.world > 1:
                    self._save()  # other processes may still fail
                    self.job.finish("measured")
            except KeyboardInterrupt as interrupt:
                number = interrupt.number if isinstance(interrupt, Stopped) else signal.SIGINT
                with self.signals.ignore_signals():
                    raise self._interrupted(number) from interrupt
            except RankLostError as lost:
                with self.signals.ignore_signals():
                    self._save()
                raise RankLostError(
                    str(lost).replace(RESUME, "run the same command again to continue")
                ) from lost
        everyone = self.job.all_gather_object([[n, scores] for n, scores in self.scores.items()])
        scores = {n: some for part in everyone for n, some in part}
        base = self.job.all_gather_object(self.base)[0]
        result = self._result(base, scores, complete=True)
        if self.output is not None and self.job.place.rank == 0:
            result.save(self.output)
        if self.path is not None:
            self.job.finish(
                "saved"
            )  # if the first process fails to write, the others' files are still needed
            self.path.unlink(missing_ok=True)
        return result

    def _run(self) -> None:
        due = time.monotonic() + EVERY
        self._report()
        for chunk in self.scorer.chunks:
            left = [n for n in self.own if len(self.scores[n]) == chunk.start]
            if not left and len(self.base) >= chunk.stop:
                continue
            with self.signals.guarded():
                intact = self.scorer.intact(chunk)
                if len(self.base) == chunk.start:
                    self.base += intact.losses
            for first in range(0, len(left), self.scorer.group):
                some = left[first : first + self.scorer.group]
                with self.signals.guarded():
                    effects = self.scorer.effects(intact, [self.sets.sets[n] for n in some])
                    for n, of_set in zip(some, effects, strict=True):
                        self.scores[n] += of_set
                self._report()
                self.job.check()
                if time.monotonic() >= due:
                    self._save()
                    due = time.monotonic() + EVERY
            del intact
            if self.output is not None and self.job.place.world == 1 and chunk is not self.scorer.chunks[-1]:
                self._result(self.base, self.scores, complete=False).save(self.output)

    def _interrupted(self, number: int) -> AblationInterrupted:
        written = self._save()
        result = None
        if self.job.place.world == 1 and self._scored():
            result = self._result(self.base, self.scores, complete=False)
            if self.output is not None:
                result.save(self.output)
        return AblationInterrupted(result, number, self.path if written else None)

    def _scored(self) -> int:
        """Return the number of sequences on which every set is scored."""
        return min(len(self.base), *map(len, self.scores.values()))

    def _done(self) -> int:
        return sum(map(len, self.scores.values()))

    def _total(self) -> int:
        return len(self.own) * self.scorer.chunks[-1].stop

    def _report(self) -> None:
        if self.progress is not None:
            self.progress(self._done(), self._total())

    # ------------------------------------------------------------ checkpoint

    def _save(self) -> bool:
        """Write the checkpoint; False if there is none."""
        if self.path is None:
            return False
        document = {
            "format": CHECKPOINT_FORMAT,
            "version": CHECKPOINT_VERSION,
            "configuration": self.configuration,
            "base": self.base,
            "scores": [[n, [rise for rise, _ in s], [kl for _, kl in s]] for n, s in self.scores.items()],
        }
        try:
            write_atomic(self.path, json.dumps(document, allow_nan=False).encode())
        except OSError as error:
            if not self._warned:
                self._warned = True
                self.say(
                    f"warning: cannot write the checkpoint {self.path}: {error.strerror or error}; the run continues"
                )
            return False
        return True

    def _load(self) -> None:
        assert self.path is not None
        try:
            document = parsed(read_once(self.path, LARGEST))
            if (document.get("format"), document.get("version")) != (CHECKPOINT_FORMAT, CHECKPOINT_VERSION):
                raise AblationFileError("its format is another")
            then = document.get("configuration")
            if not isinstance(then, dict):
                raise AblationFileError("it has no configuration")
            for key in dict.fromkeys((*self.configuration, *then)):
                if then.get(key) != self.configuration.get(key):
                    difference = f"{shown(then.get(key))} then and {shown(self.configuration.get(key))} now"
                    raise CheckpointError(
                        f"cannot continue from {self.path}: {key.replace('_', ' ')} is not what it was: {difference}. Delete the "
                        "file to start from the beginning, or name another output"
                    )
            base = numbers(document.get("base"), "base", None).tolist()
            scores = self._checked_scores(document.get("scores"), len(base))
        except (AblationFileError, UnreadableError) as error:
            raise CheckpointError(
                f"{self.path} is not a checkpoint: {error}. Delete it to start from the beginning"
            ) from error
        self.base, self.scores = base, scores

    def _checked_scores(self, entries: Any, base: int) -> dict[int, list[tuple[float, float]]]:
        """Raises AblationFileError for scores that no run has."""
        ends = {0, *(chunk.stop for chunk in self.scorer.chunks)}
        if not isinstance(entries, list) or base not in ends:
            raise AblationFileError("its scores are damaged")
        found: dict[int, list[tuple[float, float]]] = {}
        for entry in entries:
            if not isinstance(entry, list) or len(entry) != 3 or type(entry[0]) is not int:
                raise AblationFileError("its scores are damaged")
            rise = numbers(entry[1], "rise", None)
            kl = numbers(entry[2], "kl", len(rise))
            if len(rise) not in ends or len(rise) > base:
                raise AblationFileError("its scores are not of whole chunks")
            found[entry[0]] = list(zip(rise.tolist(), kl.tolist(), strict=True))
        if set(found) != set(self.own) or len(entries) != len(found):
            raise AblationFileError("its scores are of other heads")
        return found

    # ------------------------------------------------------------ result

    def _result(self, base: Sequence[float], scores: dict[int, Any], *, complete: bool) -> AblationResult:
        """Make the result of the sequences on which every set is scored."""
        n = min(len(base), *map(len, scores.values()))
        values = {
            index: np.array(some[:n], dtype=np.float64).reshape(n, 2).T for index, some in scores.items()
        }
        heads = [list(some) for some in self.sets.sets]

        def stacked(indices: Any, part: int) -> Any:
            return np.stack([stacked(i, part) if isinstance(i, list) else values[i][part] for i in indices])

        def draws(metric: str | None, indices: list[list[int]]) -> Draws:
            of_sets = [[heads[i] for i in row] for row in indices]
            return Draws(metric, self.sets.fractions, of_sets, stacked(indices, 0), stacked(indices, 1))

        sets = self.sets
        each = sets.each_head
        return AblationResult(
            mode=self.mode,
            base=np.array(base[:n], dtype=np.float64),
            curves=[
                Curve(
                    metric,
                    sets.fractions,
                    [heads[i] for i in indices],
                    stacked(indices, 0),
                    stacked(indices, 1),
                )
                for metric, indices in sets.curves.items()
            ],
            random=draws(None, sets.random) if sets.random else None,
            matched=[draws(metric, indices) for metric, indices in sets.matched.items()],
            each_head=EachHead([heads[i][0] for i in each], stacked(each, 0), stacked(each, 1))
            if each
            else None,
            about=self.about,
            complete=complete,
        )
