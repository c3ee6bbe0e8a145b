"""profile(): from a model and data to a HeadProfile, in one call. It prepares a `run.loop.Run` and starts it."""

import functools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, ParamSpec

from torch import nn

from fastheads.capture.manager import HookManager
from fastheads.corpus import in_memory, opening, sources
from fastheads.corpus.sources import Cut, Source
from fastheads.corpus.windows import Corpus
from fastheads.errors import DataError, OptionError
from fastheads.models.batch_sharing import grows_with_length
from fastheads.models.sites import unwrapped
from fastheads.results.files import check_writable, target_of
from fastheads.results.head_profile import HeadProfile
from fastheads.results.locks import locked
from fastheads.run import loading
from fastheads.run.checkpoint import Checkpoint
from fastheads.run.early_exit import EarlyExit
from fastheads.run.job import Job, RankInfo
from fastheads.run.loop import Run, Settings
from fastheads.run.progress import Status
from fastheads.run.stability import check_ranked, deciding_metric
from fastheads.stats.confidence import StableRule, check_token_agg, judge
from fastheads.stats.options import MeasureOptions, check_flag, check_whole

SEQ_LEN = 512
CHECKPOINT_EVERY = 30.0  # seconds

# Called with the number of valid tokens done and the total, or None if that is unknown.
Progress = Callable[[int, int | None], None]
P = ParamSpec("P")


def _with_files_locked(function: Callable[P, HeadProfile]) -> Callable[P, HeadProfile]:
    """Check, before anything else, that a run can write its output and checkpoint, and lock both while it runs."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> HeadProfile:
        with ExitStack() as locks:
            job: Any = kwargs.get("job")
            for option in ("output", "checkpoint"):
                path: Any = kwargs.get(option)
                if path is None:
                    continue
                if not isinstance(path, str | os.PathLike):
                    raise OptionError(f"{option} must be the name of a file, not {path!r:.100}")
                target_of(path)
                if job is None or job.place.rank == 0:
                    if option == "output":
                        check_writable(path)
                    locks.enter_context(locked(path, required=option == "output"))
            return function(*args, **kwargs)

    return run


@_with_files_locked
def profile(
    model: nn.Module | str | os.PathLike[str],
    data: Any = None,
    *,
    tokenizer: Any = None,
    token_agg: Literal["last", "all", "token"] = "all",
    seq_len: int | None = None,
    cut: Cut | None = None,
    batch_size: int | None = None,
    batch_tokens: int | None = None,
    max_tokens: int | None = None,
    layers: Iterable[int] | None = None,
    backend: str = "auto",
    precision: str = "exact",
    skip_first: int = 0,
    allow_skipped: bool = False,
    kv_groups: bool = False,
    vectors: bool = False,
    streaming: tuple[int, int] | None = None,
    metrics: Iterable[str] | None = None,
    include: str | Iterable[str] = (),
    field: str | None = None,
    progress: bool | Progress = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    compile: bool = False,
    output: str | os.PathLike[str] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = CHECKPOINT_EVERY,
    resume: bool = False,
    until_stable: StableRule | bool = False,
    shard: tuple[int, int] | None = None,
    job: Job | None = None,
    name: str | None = None,
) -> HeadProfile:
    """Run `model` over `data` and measure every attention head.

    The model's decoder runs in evaluation and inference mode, without a cache; the LM head and everything after the last
    profiled projection are skipped. The model's state is restored afterwards.

    Texts are run in batches of sequences of about equal length, padded on the right. If attention is causal in every layer, the
    padding needs no mask. A sequence's numbers do not depend on the others in its batch: if the model's rotary table or quantized
    layers depend on all rows, only rows for which that makes no difference share a batch (`models.batch_sharing`). Your own token
    batches are run as they are, so there, and under a HookManager, that is up to you.

    Args:
        model: a transformers model; or the name of one, which is loaded with its tokenizer: a local folder, a GGUF file or a
            Hub id.
        data: what to run over:

            - a `str` or path: a file. Text is one stream, cut into contiguous blocks of `seq_len` tokens; JSON lines, CSV and
              Parquet are documents (`corpus.open_source`). A `str` such as owner/name that is no file: a data set of
              the Hub. (To profile a text itself, pass it in a list: `[text]`.)
            - a glob pattern ("data/*.jsonl"), a folder, or an iterable of `pathlib.Path`: the files in order, texts with the
              tokenizer's EOS token between them. "-": standard input.
            - an iterable of `str`: documents. It is consumed before the model runs; so are iterables of dicts, whose `field`
              holds the document, and of chats (lists of messages). Strings that name files are refused as ambiguous.
            - a table of pandas, polars or pyarrow, or a dict of columns: the documents in the column `field`.
            - a tensor of token ids `[rows, tokens]`, a mapping with `input_ids` and optionally `attention_mask`
              (all entries are passed to the model), or an iterable of these: token batches, run as they are. So are lists of
              token ids, each a sequence, and numpy arrays.
            - None: the English text that comes with CPython (`pydoc_data.topics`).
            - a source that `corpus.open_source` returned.
            - a `fastheads.corpus.Corpus`, with its own tokenizer, cut, seq_len and max_tokens. If it has no shard, `shard` and
              `job` apply; else its shard must be the one that they give this process.
        tokenizer: required for texts if `model` is a module.
        token_agg: what one sample is: "last", the value at a sequence's last valid token; "all", the mean
            over its valid tokens; "token", the value at each valid token.
        seq_len: maximum tokens in a sequence. None: 512, or the model's limit if that is less.
        cut: how texts become sequences, "documents" or "stream" (`Corpus`); None: by the type of data.
        batch_size: maximum sequences in a forward.
        batch_tokens: maximum tokens in a forward, padding included (a single sequence may have more). None: an estimate of what
            fits a GPU's memory, up to 32,768; on the CPU 2,048, or `batch_size` whole sequences. If memory runs out, batches are
            halved from there on, and every sample still counts once.
        max_tokens: stop after exactly this many valid tokens: the last sequence is truncated. None: use all data.
        layers: profile only these layers (None: all).
        backend: "auto", "loop", "einsum", "factored", "triton", or one that `register_backend` was given.
        precision: "exact" or "fast".
        skip_first: leave out the first valid tokens of each sequence (1: the attention sink).
        allow_skipped: accept sites that do not run in every forward (cross-attention layers without an image, say).
        kv_groups: also measure the contributions of KV groups (`HookManager`).
        vectors: also measure the mean vectors (`HookManager`).
        streaming: (sink, window): also measure streaming errors (`HookManager`), of sequences longer than these. Not with
            `compile`.
        metrics: names of the metrics to measure (`HookManager`).
        include: patterns for names of attention modules to profile that are left out by default (`find_sites`).
        field: the field or column that holds the documents. None: `text`, else `messages` or `conversations`.
        progress: True shows a bar; or a function that is called with the tokens done and the total, or None.
        dtype: for a model that is loaded: "auto", "float32", "bfloat16" or "float16".
        device: for a model that is loaded: "auto" or a torch device.
        trust_remote_code: for a model that is loaded: run code that comes with it.
        compile: run the decoder through `torch.compile`.
        output: write the profile to this file; if there are several processes, the first does.
        checkpoint: the file for the state of the run. It is written every `checkpoint_every` seconds and when SIGINT or SIGTERM
            stops the run (in the main thread), and deleted at the end, after `output` is written. If it cannot be written, one
            warning on stderr says so, and the run continues. None: no checkpoints.
        checkpoint_every: seconds between checkpoints.
        resume: continue from `checkpoint` if the file exists. On the CPU the result is the same, bit for bit, as without the
            interruption. If it does not exist, start from the beginning, unless `output` exists.
        until_stable: stop once the ranking of heads by `head_residual_ratio` (if that is not measured, by
            `relative_head_residual_contribution_norm`) has settled, by the rule given or, if True, the default one
            (`stats.confidence` has its assumptions). The metadata say by which metric. It is checked after each window of texts
            or token batch; with several processes, when each has done one more window. If the data or `max_tokens` end first, a
            warning says so.
        shard: (i, n): run every n-th window of the texts (`Corpus`) from the i-th on. n runs with different i cover all data, and
            `HeadProfile.merge` merges them. None: all windows; for a `Corpus` with a shard, in a single process, that shard.
        job: the processes that split the data between them, each making this call; all get the profile of all data. Token batches
            are not split: pass each process its own.
        name: the model's name in the profile. None: that of `model`.

    Raises:
        DataError: the data cannot be read, hold no tokens, or skip_first leaves none of them.
        LoadError: the model or its tokenizer cannot be loaded.
        NoSitesError: the model has nothing to profile.
        OptionError: an option is out of range or unknown, or the processes of the job have different models, data or options.
        CheckpointError: with `resume`, the checkpoint is damaged or was made with another model, data or options; the message
            says which.
        FileInUseError: another run is writing `output` or `checkpoint`.
        OSError: `output` cannot be written, or one of the two is no regular file; seen before the run where that can be.
        RankLostError: another process of the job died or failed. The checkpoint is kept.
        ProfileInterrupted: Ctrl-C, or SIGTERM if there are checkpoints; its `profile` has the results of the finished batches.
    """
    sources.check_lengths(SEQ_LEN if seq_len is None else seq_len, max_tokens)
    check_options(batch_size, batch_tokens, checkpoint_every, shard)
    if until_stable is not False:
        if until_stable is not True and not isinstance(until_stable, StableRule):
            raise OptionError(f"until_stable must be True, False or a StableRule, not {until_stable!r:.100}")
        check_token_agg(token_agg)
    check_flag("compile", compile)
    check_flag("resume", resume)
    job = Job(place=RankInfo()) if job is None else job  # a single process, also under torchrun
    job.check_entered()
    job.begin()
    if isinstance(data, Corpus):
        given = {
            "tokenizer": tokenizer,
            "seq_len": seq_len,
            "cut": cut,
            "max_tokens": max_tokens,
            "field": field,
        }
        _check_not_given(given)
        shard, data = _with_rank_shard(data, shard, job.place)
    source = data if isinstance(data, Corpus) else _as_source(data, field)
    if shard is not None and not isinstance(source, Corpus | Source):
        raise OptionError("shard= is for texts: pass each run its own token batches")
    _check_once(source, checkpoint is not None or resume, job.place)
    shard = (0, 1) if shard is None else shard
    is_text = isinstance(source, Source)

    if not isinstance(model, str | os.PathLike):
        module = unwrapped(model)
    else:
        found = loading.find_model(os.fspath(model))
        name = found.name if name is None else name
        module, own_tokenizer = loading.load(
            found,
            with_tokenizer=is_text and tokenizer is None,
            dtype=dtype,
            device=device if job.place.world == 1 else job.device,
            trust_remote_code=trust_remote_code,
            mesh=job.mesh,
        )
        tokenizer = own_tokenizer if tokenizer is None else tokenizer
    if is_text and tokenizer is None:
        raise OptionError("texts need tokenizer=... if the model is a module")
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise OptionError(
            f"profile() runs only decoders, and {type(module).__name__} has an encoder: run it yourself under a HookManager"
        )
    corpus: Corpus | Iterable[dict[str, Any]]
    if isinstance(source, Source):
        corpus = Corpus(
            source,
            tokenizer,
            cut=cut,
            seq_len=_fitting_seq_len(module, seq_len),
            max_tokens=max_tokens,
            shard=_part_of(shard, job.place),
        )
    else:
        if isinstance(source, Corpus):
            _fitting_seq_len(module, source.seq_len)
            max_tokens = source.max_tokens
        corpus = source

    early_exit = EarlyExit(module, allowed=not compile)
    options = MeasureOptions.of(
        token_agg=token_agg,
        backend=backend,
        precision=precision,
        skip_first=skip_first,
        allow_skipped=allow_skipped,
        kv_groups=kv_groups,
        vectors=vectors,
        streaming=streaming,
        layers=layers,
        include=include,
        metrics=metrics,
    )
    if until_stable is not False:
        check_ranked(options)
    if streaming is not None and compile:
        raise OptionError("streaming errors cannot be measured in compiled code: leave out compile")
    with HookManager(module, **options.configuration()) as hooks, _progress(progress, job) as (report, say):
        early_exit.follow(hooks)
        settings = Settings(
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            compile=compile,
            every=checkpoint_every,
            until_stable=StableRule() if until_stable is True else until_stable or None,
            shard=shard,
            options=options.configuration(),
            name=name,
        )
        file = None if checkpoint is None else Checkpoint(checkpoint, job.place.rank, job.place.world)
        run = Run(
            module,
            hooks,
            corpus,
            settings,
            job=job,
            checkpoint=file,
            early_exit=early_exit,
            report=report,
            say=say,
        )
        try:
            run.check_together()
            if file is not None:
                run.prepare(resume, output)
            measured = run.whole()
            _check_measured(measured, skip_first)
        finally:
            run.close()
    if run.settings.until_stable is not None and job.place.rank == 0:
        metric = deciding_metric(measured.moments)
        verdict = judge(measured.moments[metric], run.settings.until_stable)
        if run.stability.settled:
            say(f"the ranking has {verdict} (by {metric})")
        else:
            why = "the end of the data" if run.complete else f"max_tokens={max_tokens}"
            message = f"the ranking has not settled by {why}: {verdict} (by {metric})"
            warnings.warn(message, RuntimeWarning, stacklevel=3)
    if output is not None and job.place.rank == 0:
        measured.save(output)
    if file is not None:
        job.finish("saved")  # if the first process fails to write, the others' files are still needed
        file.remove()
    return measured


def check_options(
    batch_size: int | None, batch_tokens: int | None, checkpoint_every: float, shard: tuple[int, int] | None
) -> None:
    """Raise OptionError for options of `profile()` that are out of range."""
    for name, value in {"batch_size": batch_size, "batch_tokens": batch_tokens}.items():
        if value is not None:
            check_whole(name, value)
    if isinstance(checkpoint_every, bool) or not isinstance(checkpoint_every, int | float):
        raise OptionError(f"checkpoint_every must be a number of seconds, not {checkpoint_every!r:.100}")
    if shard is not None and not (
        isinstance(shard, tuple | list) and len(shard) == 2 and all(isinstance(n, int) for n in shard)
    ):
        raise OptionError(f"shard must be (i, n), two whole numbers, not {shard!r:.100}")
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size must be at least 1 sequence, not {batch_size}")
    if batch_tokens is not None and batch_tokens < 1:
        raise OptionError(f"batch_tokens must be at least 1 token, not {batch_tokens}")
    if not checkpoint_every > 0:
        raise OptionError(f"checkpoint_every must be more than 0 seconds, not {checkpoint_every}")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise OptionError(f"shard must be (i, n) with i from 0 to n - 1, not {tuple(shard)}")


def _check_not_given(given: dict[str, Any]) -> None:
    """Raise OptionError for options that belong to the Corpus, and would have no effect."""
    for option, value in given.items():
        if value is not None:
            raise OptionError(f"{option} belongs to the Corpus: pass it to Corpus(...) instead of profile()")


def _check_once(source: Any, checkpoints: bool, place: RankInfo) -> None:
    """Raise OptionError if data that can be read only once would be read again."""
    if not getattr(getattr(source, "source", source), "once", False):
        return
    if checkpoints:
        raise OptionError(
            "standard input cannot be resumed: save it to a file, or leave out checkpoint= and resume="
        )
    if place.world > 1:
        raise OptionError("several processes cannot share standard input: save it to a file")


def _part_of(shard: tuple[int, int], place: RankInfo) -> tuple[int, int]:
    """Return this rank's part of the `shard` of all ranks together."""
    part, parts = place.shard
    return shard[0] + shard[1] * part, shard[1] * parts


def _with_rank_shard(
    corpus: Corpus, shard: tuple[int, int] | None, place: RankInfo
) -> tuple[tuple[int, int], Corpus]:
    """Return the shard of all ranks together, and the corpus with this rank's; raise OptionError if it has another."""
    if shard is None:
        shard = corpus.shard if place.shard[1] == 1 else (0, 1)
    expected = _part_of(shard, place)
    if corpus.shard == expected:
        return shard, corpus
    if corpus.shard == (0, 1):
        return shard, corpus.with_shard(expected)
    which = f"shard={shard}" + (f" and part {place.shard} of the job" if place.shard[1] > 1 else "")
    raise OptionError(
        f"the Corpus has shard {corpus.shard}, but {which} make {expected}: pass Corpus(...) that shard, or none"
    )


def _check_measured(measured: HeadProfile, skip_first: int) -> None:
    if not any(m.count.any() or m.nonfinite.any() for m in measured.moments.values()):
        data = measured.metadata["data"]
        raise DataError(
            f"nothing was measured: skip_first={skip_first} leaves none of the {data['tokens']:,} tokens "
            f"in {data['sequences']:,} sequences"
        )


def _as_source(data: Any, field: str | None) -> Source | Iterator[dict[str, Any]]:
    """Open `data` as a source of texts, or as an iterator over token batches."""
    source = opening.named_source(data, field=field)
    return in_memory.in_memory(data, field, "auto") if source is None else source


def _fitting_seq_len(model: nn.Module, seq_len: int | None) -> int:
    """Return `seq_len`, or its default; raise OptionError if the model does not have as many positions."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if seq_len is None:
        return min(SEQ_LEN, limit) if limit else SEQ_LEN
    if limit and seq_len > limit and not grows_with_length(model):
        raise OptionError(f"seq_len {seq_len} is more than the model's max_position_embeddings, {limit}")
    return seq_len


@contextmanager
def _progress(
    progress: bool | Progress, job: Job
) -> Iterator[tuple[Callable[[Status], None], Callable[[str], None]]]:
    """Yield a function for the status of the run, and one that prints lines to the user."""
    if callable(progress):
        yield lambda status: progress(status.all_tokens, status.total), lambda line: None
        return
    if not progress or job.place.rank:
        yield lambda status: None, lambda line: None
        return
    from fastheads.run.terminal import progress_bar

    with progress_bar() as report:
        yield report, lambda line: print(f"fastheads: {line}", file=sys.stderr, flush=True)
