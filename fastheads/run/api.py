"""profile(): the whole job, from a model and data to a HeadProfile. It prepares a `run.loop.Run` and starts it."""

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from fastheads.capture.manager import HookManager
from fastheads.corpus import in_memory, opening, sources
from fastheads.corpus.sources import Cut, Source
from fastheads.corpus.windows import Corpus
from fastheads.errors import DataError, OptionError
from fastheads.models.batch_sharing import grows_with_length
from fastheads.models.sites import unwrapped
from fastheads.results.head_profile import RANKING_METRIC, HeadProfile
from fastheads.run import loading
from fastheads.run.checkpoint import Checkpoint
from fastheads.run.early_exit import EarlyExit
from fastheads.run.job import Job, RankInfo
from fastheads.run.loop import Run, Settings
from fastheads.run.progress import Status
from fastheads.stats.confidence import StableRule, check_token_agg, judge

SEQ_LEN = 512
CHECKPOINT_EVERY = 30.0  # seconds

# Called with the valid tokens done and, where it is known, their number in all.
Progress = Callable[[int, int | None], None]


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

    The model's decoder runs, in evaluation and inference mode and without a cache; its head does not, nor what follows the
    last projection that is profiled, for nobody needs them. The model is left as it was.

    Texts are run in batches of sequences of about equal length, padded on the right. Where attention is causal in every layer
    the padding needs no mask: no valid token attends to it. What a sequence gives does not depend on those that share its
    batch: where a model's rotary table, or its quantized layers, look at all rows (`models.batch_sharing`), only those share
    one that may. Token batches that you make yourself are run as you made them: there, and under a HookManager, which rows
    share one is up to you.

    Args:
        model: a transformers model; or a name, which is loaded with its tokenizer: a local folder, a GGUF file
            or a Hub id.
        data: what to run over:

            - a `str` or path: a file. Text is one stream, cut to contiguous blocks of `seq_len` tokens; JSON lines, CSV and
              Parquet are documents (`corpus.open_source`). A `str` such as owner/name that is no file: a data set of
              the Hub. (To profile a text that is at hand, pass it in a list: `[text]`.)
            - a pattern for files ("data/*.jsonl"), a folder, or an iterable of `pathlib.Path`: the files in turn, texts
              with the tokenizer's EOS token between them. "-": standard input.
            - an iterable of `str`: documents. Read to its end before the model runs; so are iterables of dicts, whose `field`
              holds the document, and of chats (lists of messages). Strings that name files are refused: they may be meant so.
            - a table of pandas, polars or pyarrow, or a dict of columns: the documents in the column `field`.
            - a tensor of token ids `[rows, tokens]`, a mapping with `input_ids` and perhaps `attention_mask`
              (all of it goes to the model), or an iterable of these: token batches, run as they are. So are lists of token ids,
              each a sequence, and numpy arrays.
            - None: the English text that every CPython carries (`pydoc_data.topics`).
            - what `corpus.open_source` returns.
            - a `fastheads.corpus.Corpus`, which brings its tokenizer, cut, seq_len and max_tokens. One without a shard is shared
              out as `shard` and `job` say; else its shard must be the one that this process has by them.
        tokenizer: needed for texts where `model` is a module.
        token_agg: what one sample is: "last", the value at a sequence's last valid token; "all", the mean
            over its valid tokens; "token", each valid token.
        seq_len: tokens in a sequence, at most. None: 512, or the model's limit where that is less.
        cut: how texts become sequences, "documents" or "stream" (`Corpus`); None: as the data are.
        batch_size: sequences in a forward, at most.
        batch_tokens: tokens in a forward with its padding, at most (one sequence may have more). None: what a GPU is likely to
            have memory for, up to 32,768; on the CPU 2,048, or `batch_size` whole sequences. Where memory runs out all the
            same, batches are halved from there on, and every sample still counts once.
        max_tokens: stop after this many valid tokens, exactly: the last sequence is cut. None: use all data.
        layers: profile these only (None: all).
        backend: "auto", "loop", "einsum", "factored" or "triton".
        precision: "exact" or "fast".
        skip_first: leave the first valid tokens of each sequence out (1: the attention sink).
        allow_skipped: accept sites that do not run in every forward (cross-attention layers without an image, say).
        kv_groups: measure the contributions of KV groups too (`HookManager`).
        include: names of attention modules, as patterns, that are profiled though they are left out by default (`find_sites`).
        field: the field or column that holds the documents. None: `text`, else `messages` or `conversations`.
        progress: True shows a bar; or a function that is called with the tokens done and those in all, or None.
        dtype: of a model that is loaded: "auto", "float32", "bfloat16" or "float16".
        device: for a model that is loaded: "auto" or a torch device.
        trust_remote_code: let a model that is loaded bring its own code.
        compile: run the decoder through `torch.compile`.
        output: write the profile to this file; of several processes the first does.
        checkpoint: a file that holds where the run stands. It is written every `checkpoint_every` seconds and when SIGINT or
            SIGTERM stops the run (if this is the main thread), and deleted at the end, after `output` is written. Where it cannot
            be written, a warning on stderr says so once, and the run goes on. None: no checkpoints.
        checkpoint_every: seconds between checkpoints.
        resume: go on from `checkpoint`, if the file is there. On the CPU the end is the same, bit for bit, as without the stop.
            Where it is not there, start afresh, unless `output` is there.
        until_stable: end as soon as the ranking of heads by `RANKING_METRIC` has settled, by the rule given or, if True, the
            default one (`stats.confidence`, which says what it takes for granted). It is asked after each window of texts and
            after each token batch; of several processes, when each has done one more window. A warning says where the data, or
            `max_tokens`, ended before it had.
        shard: (i, n): of the windows that texts are cut into (`Corpus`), run every n-th from the i-th on. n runs with another i
            each do all, and `HeadProfile.merge` puts them together. None: all windows; of a `Corpus` that has a shard, where one
            process runs alone, that one.
        job: the processes that share the data out between them, each with this call. The profile of all is returned on all.
            Token batches are not shared out: every process is given its own.
        name: what the profile calls the model. None: the name that `model` is or has.

    Raises:
        DataError: the data cannot be read, hold no tokens, or skip_first leaves none of them.
        LoadError: the model or its tokenizer cannot be loaded.
        NoSitesError: the model has nothing to profile.
        OptionError: an option is out of range or unknown.
        CheckpointError: `resume`, and the checkpoint is damaged or was made with another model, other data or other options; the
            message says which.
        OptionError: the processes of the job were given different models, data or options.
        RankLostError: another process of the job died or failed. The checkpoint is kept.
        ProfileInterrupted: Ctrl-C, or SIGTERM where there are checkpoints; its `profile` is what was measured in the batches
            that were finished.
    """
    sources.check_lengths(SEQ_LEN if seq_len is None else seq_len, max_tokens)
    check_options(batch_size, batch_tokens, checkpoint_every, shard)
    if until_stable is not False:
        check_token_agg(token_agg)
    job = Job(place=RankInfo()) if job is None else job  # alone, whatever else runs beside this process
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
        _check_left_out(given)
        shard, data = _shared_out(data, shard, job.place)
    source = data if isinstance(data, Corpus) else _as_source(data, field)
    if shard is not None and not isinstance(source, Corpus | Source):
        raise OptionError("shard= is for texts: of token batches, give each run its own")
    _check_once(source, checkpoint is not None or resume, job.place)
    shard = (0, 1) if shard is None else shard
    is_text = isinstance(source, Source)

    if isinstance(model, nn.Module):
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
        raise OptionError("data of text need tokenizer=... where the model is a module")
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise OptionError(
            f"profile() runs decoders alone, and {type(module).__name__} has an encoder: run it yourself under a HookManager"
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
    options: dict[str, Any] = {"token_agg": token_agg, "backend": backend, "precision": precision}
    options |= {"skip_first": skip_first, "allow_skipped": allow_skipped, "kv_groups": kv_groups}
    options |= {
        "layers": None if layers is None else list(layers),
        "include": [include] if isinstance(include, str) else list(include),
    }
    with HookManager(module, **options) as hooks, _progress(progress, job) as (report, say):
        early_exit.follow(hooks)
        settings = Settings(
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            max_tokens=max_tokens,
            compile=compile,
            every=checkpoint_every,
            until_stable=StableRule() if until_stable is True else until_stable or None,
            shard=shard,
            options=options,
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
    if run.settings.until_stable is not None and not run.stability.settled and job.place.rank == 0:
        verdict = judge(measured.moments[RANKING_METRIC], run.settings.until_stable)
        why = "the end of the data" if run.complete else f"max_tokens={max_tokens}"
        warnings.warn(f"the ranking has not settled by {why}: {verdict}", RuntimeWarning, stacklevel=2)
    if output is not None and job.place.rank == 0:
        measured.save(output)
    if file is not None:
        job.finish("saved")  # the first process may fail to write: the others' files are needed then
        file.remove()
    return measured


def check_options(
    batch_size: int | None, batch_tokens: int | None, checkpoint_every: float, shard: tuple[int, int] | None
) -> None:
    """Raise OptionError for options of `profile()` that are out of range."""
    if batch_size is not None and batch_size < 1:
        raise OptionError(f"batch_size must be at least 1 sequence, not {batch_size}")
    if batch_tokens is not None and batch_tokens < 1:
        raise OptionError(f"batch_tokens must be at least 1 token, not {batch_tokens}")
    if not checkpoint_every > 0:
        raise OptionError(f"checkpoint_every must be more than 0 seconds, not {checkpoint_every}")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise OptionError(f"shard must be (i, n) with i from 0 to n - 1, not {tuple(shard)}")


def _check_left_out(given: dict[str, Any]) -> None:
    """Raise OptionError for options that a Corpus already has, and that would have no effect."""
    for option, value in given.items():
        if value is not None:
            raise OptionError(f"{option} belongs to the Corpus: give it to Corpus(...) instead of profile()")


def _check_once(source: Any, checkpoints: bool, place: RankInfo) -> None:
    """Raise OptionError if data that can be read only once would be read again."""
    if not getattr(getattr(source, "source", source), "once", False):
        return
    if checkpoints:
        raise OptionError(
            "standard input cannot be resumed: save it to a file, or leave checkpoint= and resume= out"
        )
    if place.world > 1:
        raise OptionError("several processes cannot share standard input: save it to a file")


def _part_of(shard: tuple[int, int], place: RankInfo) -> tuple[int, int]:
    """Return the shard of this rank, where all ranks together have `shard`."""
    part, parts = place.shard
    return shard[0] + shard[1] * part, shard[1] * parts


def _shared_out(
    corpus: Corpus, shard: tuple[int, int] | None, place: RankInfo
) -> tuple[tuple[int, int], Corpus]:
    """Return the shard of all ranks together, and the corpus with this rank's windows; OptionError if it has others."""
    if shard is None:
        shard = corpus.shard if place.shard[1] == 1 else (0, 1)
    expected = _part_of(shard, place)
    if corpus.shard == expected:
        return shard, corpus
    if corpus.shard == (0, 1):
        return shard, corpus.with_shard(expected)
    which = f"shard={shard}" + (f" and part {place.shard} of the job" if place.shard[1] > 1 else "")
    raise OptionError(
        f"the Corpus has shard {corpus.shard}, and {which} make {expected}: give Corpus(...) that shard, or none"
    )


def _check_measured(measured: HeadProfile, skip_first: int) -> None:
    if not any(m.count.any() or m.nonfinite.any() for m in measured.moments.values()):
        data = measured.metadata["data"]
        raise DataError(
            f"nothing was measured: skip_first={skip_first} leaves none of the {data['tokens']:,} tokens "
            f"in {data['sequences']:,} sequences"
        )


def _as_source(data: Any, field: str | None) -> Source | Iterator[dict[str, Any]]:
    """Return the source of texts, or the token batches, that `data` stands for."""
    source = opening.named_source(data, field=field)
    return in_memory.in_memory(data, field, "auto") if source is None else source


def _fitting_seq_len(model: nn.Module, seq_len: int | None) -> int:
    """`seq_len`, or its default, if the model has positions for it; else OptionError."""
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
    """Give a function for the status of the run, and one for lines to the user."""
    if callable(progress):
        yield lambda status: progress(status.all_tokens, status.total), lambda line: None
        return
    if not progress or job.place.rank:
        yield lambda status: None, lambda line: None
        return
    from fastheads.run.terminal import progress_bar

    with progress_bar() as report:
        yield report, lambda line: print(f"fastheads: {line}", file=sys.stderr, flush=True)
