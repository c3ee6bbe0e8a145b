"""Write a pruned model to a folder that transformers loads, load it again, and compare it with the model before.

The folder appears whole or not at all: it is written beside its place, loaded from there, compared number for number with what
was to be written and by its logits with the model whose heads are ablated, and only then renamed.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastheads.corpus.sources import Source
from fastheads.corpus.windows import Corpus
from fastheads.errors import DataError, OptionError, PruningError, one_line
from fastheads.intervene.ablation import ablate
from fastheads.intervene.plan import PruningPlan
from fastheads.intervene.pruning import pruned_copy
from fastheads.results.files import check_writable
from fastheads.results.head_profile import HeadProfile

PLAN_FILE = "pruning_plan.json"
CHECKED_TOKENS = 24  # random ones, on which logits are compared
# Largest difference of logits, relative to the largest logit: rounding of sums in another order, by the dtype's precision.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.03}
FORWARD_TOKENS = 2048  # in a forward that measures losses


def check_folder(folder: str | os.PathLike[str], *, force: bool = False, source: str | None = None) -> Path:
    """Return the folder to write. Raise if it cannot be written, or holds something that must not be replaced.

    Args:
        folder: new or empty; with `force` also one with a model in it, which is replaced.
        force: replace it.
        source: the folder of the model that is pruned, which is never replaced.

    Raises:
        OptionError: it is not empty, and `force` is not given or it holds no model.
        OSError: it cannot be written.
    """
    folder = Path(folder).absolute()
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; name a folder")
    if source is not None and folder.exists() and Path(source).exists() and os.path.samefile(folder, source):
        raise OptionError(f"{folder} is the model to prune: name another folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not force:
            raise OptionError(
                f"the folder {folder} is not empty: name another one, or replace it with --force (force=True)"
            )
        if not (folder / "config.json").is_file():
            raise OptionError(f"the folder {folder} holds no model: it is not replaced, name another one")
    check_writable(folder / PLAN_FILE if not folder.exists() else folder.parent / PLAN_FILE)
    return folder


def write_pruned(
    model: nn.Module,
    plan: PruningPlan,
    folder: str | os.PathLike[str],
    *,
    profile: HeadProfile | None = None,
    tokenizer: Any = None,
    stored_dtype: torch.dtype | None = None,
    force: bool = False,
) -> Any:
    """Write `model` without the heads of `plan` to `folder`, and return it as transformers loads it from there.

    The folder holds the weights, the configuration, the tokenizer if it is given, and the plan (`pruning_plan.json`).

    Args:
        model: of transformers, whole and on one device. It is not changed.
        plan: of this model.
        folder: new or empty; with `force` also one with a model in it.
        profile: for mode "mean", the profile with the heads' mean vectors.
        tokenizer: of transformers.
        stored_dtype: of the weights in the folder, if that loses nothing but the rounding of added biases. None, or if it does:
            as they are in memory.
        force: replace a folder that is not empty.

    Raises:
        PruningError: the model cannot be pruned so, or what transformers loads from the folder is something else.
        OptionError: the folder must not be replaced; also as `pruned_copy`, with its other errors.
        OSError: the folder cannot be written.
    """
    folder = check_folder(folder, force=force)
    pruned = pruned_copy(model, plan, profile=profile)
    _cast(
        pruned,
        stored_dtype,
        {f"{site.name}.bias" for site in plan.sites_of(model).values()} if plan.mode == "mean" else set(),
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".tmp"))
    try:
        with _silent():
            pruned.save_pretrained(temporary)
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
        plan.save(temporary / PLAN_FILE)
        reloaded = _reloaded(temporary, model)
        _check_weights(reloaded, pruned, folder)
        _check_logits(model, reloaded, plan, profile, folder)
        _open_to_all(temporary)
        _put(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return reloaded


def _cast(pruned: Any, dtype: torch.dtype | None, rounded: set[str]) -> None:
    """Convert the weights to `dtype` in place, unless that would lose something of others than `rounded`."""
    if dtype is None or not dtype.is_floating_point or dtype == pruned.dtype:
        return
    for name, tensor in pruned.state_dict().items():
        if (
            tensor.is_floating_point()
            and name not in rounded
            and not torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)
        ):
            return
    pruned.to(dtype)


def _reloaded(folder: Path, model: Any) -> Any:
    """Load the folder as a user of transformers does, in the dtype and on the device of `model`."""
    from transformers import AutoModelForCausalLM

    try:
        with _silent():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=model.dtype,
                local_files_only=True,
                output_loading_info=True,
                attn_implementation=model.config._attn_implementation,
            )
    except Exception as error:
        raise PruningError(
            f"transformers cannot load the pruned {type(model).__name__}: {one_line(error, 300)}"
        ) from error
    reloaded, found = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(what):
            raise PruningError(
                f"reloaded, the pruned {type(model).__name__} has {what.replace('_', ' ')}: {sorted(map(str, found[what]))[:3]}"
            )
    return reloaded.to(model.device).eval()


def _check_weights(reloaded: Any, written: Any, folder: Path) -> None:
    """Raise PruningError unless the weights that were loaded are those that were written."""
    expected, found = written.state_dict(), reloaded.state_dict()
    different = sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or not _equal(found[name], expected[name])
    )
    if different:
        raise PruningError(
            f"{folder} is not written: transformers loads other weights than were saved, such as {different[0]}"
        )


def _equal(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.equal(one, two.to(one.device, one.dtype))


@torch.inference_mode()
def _check_logits(
    model: Any, reloaded: Any, plan: PruningPlan, profile: HeadProfile | None, folder: Path
) -> None:
    """Raise PruningError unless the reloaded model computes what `model` does with the plan's heads ablated."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(0, vocabulary, (1, CHECKED_TOKENS), generator=generator).to(model.device)
    with ablate(model, plan.heads, plan.mode, means=profile if plan.mode == "mean" else None):
        expected = model(input_ids=ids, use_cache=False).logits.double()
    found = reloaded(input_ids=ids, use_cache=False).logits.double()
    # Of most tokens: rounding may send one to another expert.
    errors = (found - expected).abs().amax(-1) / expected.abs().amax()
    error, allowed = float(errors.flatten().quantile(0.75)), TOLERANCE[model.dtype]
    if not error <= allowed:
        raise PruningError(
            f"{folder} is not written: the pruned {type(model).__name__} computes something else than the model without these "
            f"heads (its logits differ by {error:.2g} of the largest, where {allowed:g} is rounding)"
        )


def _put(temporary: Path, folder: Path) -> None:
    """Rename `temporary` to `folder`; what is there is put aside before, put back if that fails, and deleted after."""
    if not folder.exists():
        temporary.rename(folder)
        return
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".old"))
    folder.rename(aside / "old")
    try:
        temporary.rename(folder)
    except BaseException:
        (aside / "old").rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open_to_all(folder: Path) -> None:
    """Give the folder and its files the modes of new ones: temporary files are the owner's alone."""
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)
    folder.chmod(0o777 & ~umask)


@contextmanager
def _silent() -> Iterator[None]:
    """Silence transformers' progress bars and messages."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


# ---------------------------------------------------------------- before and after


@dataclass(frozen=True)
class Comparison:
    """The model before and after: numbers of parameters, mean losses in nats per token, tokens per second.

    `rise` is the mean over sequences of the difference of their losses, `rise_sem` its standard error (NaN for one sequence).
    `speed_ratio` is the median over pairs of forwards, one of each model, of the speed after over that before.
    """

    parameters: tuple[int, int]
    loss: tuple[float, float]
    rise: float
    rise_sem: float
    sequences: int
    tokens_per_second: tuple[float, float]
    speed_ratio: float
    speed_ratios: tuple[float, ...]


def compare_models(before: Any, after: Any, sequences: list[Tensor], *, rounds: int = 5) -> Comparison:
    """Measure two models on the same sequences `[tokens]`, of one length: their losses, and their speed in turns (A B A B ...).

    The speed is that of forwards over whole sequences (prefill), without a cache.
    """
    batch = torch.stack(sequences).long().to(before.device)
    losses = np.array([_losses(model, batch) for model in (before, after)])
    rises = losses[1] - losses[0]
    rows = batch[: max(1, FORWARD_TOKENS // batch.shape[1])]
    seconds = _in_turns(
        [lambda: _forward(before, rows), lambda: _forward(after, rows)], rounds, before.device
    )
    ratios = seconds[:, 0] / seconds[:, 1]
    speeds = rows.numel() / np.median(seconds, axis=0)
    return Comparison(
        parameters=(_parameters(before), _parameters(after)),
        loss=(float(losses[0].mean()), float(losses[1].mean())),
        rise=float(rises.mean()),
        rise_sem=float(rises.std(ddof=1) / np.sqrt(len(rises))) if len(rises) > 1 else float("nan"),
        sequences=len(rises),
        tokens_per_second=(float(speeds[0]), float(speeds[1])),
        speed_ratio=float(np.median(ratios)),
        speed_ratios=tuple(map(float, ratios)),
    )


def text_sequences(source: Source, tokenizer: Any, *, number: int, seq_len: int) -> list[Tensor]:
    """Return the first `number` blocks of `seq_len` tokens of the text; fewer if it is shorter.

    Raises:
        DataError: the text cannot be read, or is shorter than one block.
        OptionError: a number is out of range.
    """
    if number < 1 or seq_len < 2:
        raise OptionError(f"at least 1 sequence of 2 tokens is needed, not {number} of {seq_len}")
    found: list[Tensor] = []
    corpus = Corpus(source, tokenizer, cut="stream", seq_len=seq_len, workers=0)
    with closing(corpus.windows()) as windows:
        for window in windows:
            found += [ids for ids in window.sequences if len(ids) == seq_len]
            if len(found) >= number:
                break
    if not found:
        raise DataError(f"{source.name} has fewer than {seq_len} tokens, one sequence")
    return found[:number]


@torch.inference_mode()
def _losses(model: Any, batch: Tensor) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the mean loss of each sequence of `[sequences, tokens]`, in nats per token."""
    losses = []
    for rows in batch.split(max(1, FORWARD_TOKENS // batch.shape[1])):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].float()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        losses.append(loss.view(len(rows), -1).double().mean(1).cpu())
    found: np.ndarray[Any, np.dtype[np.float64]] = torch.cat(losses).numpy()
    return found


@torch.inference_mode()
def _forward(model: Any, rows: Tensor) -> None:
    model(input_ids=rows, use_cache=False)


def _in_turns(
    calls: list[Callable[[], None]], rounds: int, device: torch.device
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Time the calls in turn, after one round that does not count: seconds `[rounds, calls]`."""
    seconds = np.empty((rounds + 1, len(calls)))
    for turn in range(rounds + 1):
        for number, call in enumerate(calls):
            _wait(device)
            start = time.perf_counter()
            call()
            _wait(device)
            seconds[turn, number] = time.perf_counter() - start
    return seconds[1:]


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
