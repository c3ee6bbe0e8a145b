"""profile(): the whole job, from a model and data to a HeadProfile."""

import inspect
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastheads import data as sources
from fastheads import loading
from fastheads.corpus import Corpus
from fastheads.data import Source
from fastheads.errors import DataError, ProfileInterrupted
from fastheads.manager import HookManager
from fastheads.results import HeadProfile
from fastheads.sites import decoder_of, unwrapped

SEQ_LEN = 512
BATCH_SIZE = 4

# Called with the real tokens done and, where it is known, their number in all.
Progress = Callable[[int, int | None], None]


def profile(
    model: nn.Module | str | os.PathLike[str],
    data: Any = None,
    *,
    tokenizer: Any = None,
    token_agg: Literal["last", "all", "token"] = "all",
    seq_len: int | None = None,
    batch_size: int = BATCH_SIZE,
    max_tokens: int | None = None,
    layers: Iterable[int] | None = None,
    backend: str = "auto",
    precision: str = "exact",
    skip_first: int = 0,
    allow_skipped: bool = False,
    kv_groups: bool = False,
    include: str | Iterable[str] = (),
    field: str = "text",
    progress: bool | Progress = False,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
) -> HeadProfile:
    """Run `model` over `data` and measure every attention head.

    The model's decoder runs, in evaluation and inference mode and without a cache; its head does not, for nobody
    needs the logits. The model is left as it was.

    Args:
        model: a transformers model; or a name, which is loaded with its tokenizer: a local folder, a GGUF file
            or a Hub id.
        data: what to run over:

            - a `str` or path: a file. Text is one stream, cut to contiguous blocks of `seq_len` tokens; .jsonl,
              .ndjson and .json are JSON lines, each a document of its own with its text in `field`.
              (To profile a text that is at hand, pass it in a list: `[text]`.)
            - an iterable of `str`: documents. Read to its end before the model runs.
            - a tensor of token ids `[rows, tokens]`, a mapping with `input_ids` and perhaps `attention_mask`
              (all of it goes to the model), or an iterable of these: token batches, run as they are.
            - None: the English text that every CPython carries (`pydoc_data.topics`).
            - what `fastheads.data.text_file` and its kin return.
        tokenizer: needed for texts where `model` is a module.
        token_agg: what one sample is: "last", the value at a sequence's last real token; "all", the mean
            over its real tokens; "token", each real token.
        seq_len: tokens in a sequence, at most. None: 512, or the model's limit where that is less.
        batch_size: sequences in a forward.
        max_tokens: stop after this many real tokens, exactly: the last sequence is cut. None: use all data.
        layers: profile these only (None: all).
        backend: "auto", "loop", "einsum", "factored" or "triton".
        precision: "exact" or "fast".
        skip_first: leave the first real tokens of each sequence out (1: the attention sink).
        allow_skipped: accept sites that do not run in every forward (cross-attention layers without an image, say).
        kv_groups: measure the contributions of KV groups too (`HookManager`).
        include: names of attention modules, as patterns, that are profiled though they are left out by default (`find_sites`).
        field: of a JSON line, the one with the text.
        progress: True shows a bar; or a function that is called with the tokens done and those in all, or None.
        dtype: of a model that is loaded: "auto", "float32", "bfloat16" or "float16".
        device: for a model that is loaded: "auto" or a torch device.
        trust_remote_code: let a model that is loaded bring its own code.

    Raises:
        DataError: the data cannot be read, hold no tokens, or skip_first leaves none of them.
        LoadError: the model or its tokenizer cannot be loaded.
        NoSitesError: the model has nothing to profile.
        ValueError: an option is out of range or unknown.
        ProfileInterrupted: Ctrl-C; its `profile` is what was measured in the batches that were finished.
    """
    sources.check_lengths(SEQ_LEN if seq_len is None else seq_len, max_tokens)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 sequence, not {batch_size}")
    source = _as_source(data, field)
    is_text = isinstance(source, Source)

    name = None
    if isinstance(model, nn.Module):
        module = unwrapped(model)
    else:
        found = loading.find_model(os.fspath(model))
        name = found.name
        if is_text and tokenizer is None:
            tokenizer = loading.load_tokenizer(found, trust_remote_code=trust_remote_code)
        module = loading.load_model(found, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    if is_text and tokenizer is None:
        raise ValueError("data of text need tokenizer=... where the model is a module")

    about: dict[str, Any] = {"source": "token batches", "sha256": None}
    total = max_tokens
    batches: Iterable[dict[str, Any]]
    if isinstance(source, Source):
        seq_len = _fitting_seq_len(module, seq_len)
        corpus = Corpus(source, tokenizer, seq_len=seq_len, max_tokens=max_tokens)
        sequences = [ids for window in corpus.windows() for ids in window.sequences]
        _check_vocabulary(module, sequences)
        total = sum(map(len, sequences))
        batches = sources.batches(sequences, batch_size, getattr(tokenizer, "pad_token_id", None) or 0)
        about = {"source": source.name, "sha256": source.sha256, "seq_len": seq_len, "batch_size": batch_size}
    else:
        batches = _limited(source, max_tokens)

    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"profile() runs decoders alone, and {type(module).__name__} has an encoder: run it yourself under a HookManager"
        )
    hooks = HookManager(
        module,
        token_agg,
        layers=layers,
        backend=backend,
        precision=precision,
        skip_first=skip_first,
        allow_skipped=allow_skipped,
        kv_groups=kv_groups,
        include=include,
    )
    with hooks, _progress(progress) as report:
        run = _Run(hooks, about | {"max_tokens": max_tokens}, name)
        try:
            run.over(module, batches, lambda done: report(done, total))
        except KeyboardInterrupt as interrupt:
            raise ProfileInterrupted(run.result(complete=False)) from interrupt
        measured = run.result(complete=True)
        if not any(m.count.any() or m.nonfinite.any() for m in measured.moments.values()):
            raise DataError(
                f"nothing was measured: skip_first={skip_first} leaves none of the {run.tokens:,} tokens "
                f"in {run.sequences:,} sequences"
            )
        return measured


class _Run:
    """The forwards, and the count of what they finished."""

    def __init__(self, hooks: HookManager, about: dict[str, Any], name: str | None) -> None:
        self.hooks, self.about, self.name = hooks, about, name
        self.tokens = self.sequences = 0
        self.seconds = 0.0

    def over(
        self, model: nn.Module, batches: Iterable[dict[str, Any]], report: Callable[[int], None]
    ) -> None:
        """Run `model` over `batches`; raises DataError if they hold no tokens."""
        decoder = decoder_of(model)
        device = _input_device(model)
        extra = {"use_cache": False} if _takes(decoder, "use_cache") else {}
        report(0)
        with _evaluation(model), torch.inference_mode():
            start = time.monotonic()
            for batch in batches:
                lengths = sources.tokens_by_row(batch)
                if not int(lengths.sum()):
                    continue
                decoder(**{key: _to(value, device) for key, value in batch.items()}, **extra)
                self.tokens += int(lengths.sum())
                self.sequences += int((lengths > 0).sum())
                self.seconds = time.monotonic() - start
                report(self.tokens)
        if not self.tokens:
            raise DataError("no tokens in the data")

    def result(self, *, complete: bool) -> HeadProfile:
        """What the finished batches gave."""
        found = self.hooks.to_profile()
        if self.name is not None:
            found.metadata["model"] = self.name
        found.metadata["data"] = self.about | {
            "tokens": self.tokens,
            "sequences": self.sequences,
            "seconds": round(self.seconds, 3),
            "complete": complete,
        }
        return found


def _as_source(data: Any, field: str) -> Source | Iterator[dict[str, Any]]:
    """Texts, or token batches."""
    if isinstance(data, Source):
        return data
    if data is None:
        return sources.default_text()
    if isinstance(data, str | os.PathLike):
        if isinstance(data, str) and ("\n" in data or not Path(data).exists()):
            raise DataError(f"no data file {data[:80]!r}; to profile a text itself, pass it in a list")
        return sources.text_file(data, field)
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise DataError(f"data must be a path, texts or token batches, not {type(data).__name__}")
    items = iter(data)
    first = next(items, None)
    if first is None:
        raise DataError("no data: nothing to iterate over")
    together = itertools.chain([first], items)
    return sources.held_texts(together) if isinstance(first, str) else map(sources.as_batch, together)


def _limited(batches: Iterable[dict[str, Any]], max_tokens: int | None) -> Iterator[dict[str, Any]]:
    """`batches` up to exactly `max_tokens` real tokens."""
    left = max_tokens
    for batch in batches:
        if left is None:
            yield batch
            continue
        tokens = int(sources.tokens_by_row(batch).sum())
        yield batch if tokens <= left else sources.cut(batch, left)
        left -= tokens
        if left <= 0:
            return


def _fitting_seq_len(model: nn.Module, seq_len: int | None) -> int:
    """`seq_len`, or its default, if the model has positions for it; else ValueError."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if seq_len is None:
        return min(SEQ_LEN, limit) if limit else SEQ_LEN
    if limit and seq_len > limit:
        raise ValueError(f"seq_len {seq_len} is more than the model's max_position_embeddings, {limit}")
    return seq_len


def _check_vocabulary(model: nn.Module, sequences: list[Tensor]) -> None:
    """Raise ValueError for ids that the embedding does not have: on a GPU they would end the whole process."""
    rows = getattr(_embedding(model), "num_embeddings", None)
    largest = max(int(ids.max()) for ids in sequences)
    if rows is not None and largest >= rows:
        raise ValueError(f"the tokenizer is not the model's: it gave token {largest}, the model has {rows}")


def _embedding(model: nn.Module) -> nn.Module | None:
    get_input_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_input_embeddings() if callable(get_input_embeddings) else None
    return embedding if isinstance(embedding, nn.Module) else None


def _input_device(model: nn.Module) -> torch.device:
    parameter = next((_embedding(model) or model).parameters(), None)
    if parameter is None or parameter.device.type == "meta":  # offloaded: its own hooks move the inputs
        return torch.device("cpu")
    return parameter.device


def _takes(module: nn.Module, argument: str) -> bool:
    parameters = inspect.signature(module.forward).parameters
    return argument in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _progress(progress: bool | Progress) -> Iterator[Progress]:
    if callable(progress):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from fastheads.terminal import progress_bar

    with progress_bar() as report:
        yield report
