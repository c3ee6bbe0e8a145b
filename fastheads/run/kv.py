"""The job of `fastheads kv`: from a model and long texts to a map of its KV groups, and what the map costs on other texts."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.backends.streaming_attention import Window
from fastheads.corpus.windows import Corpus
from fastheads.errors import DataError, OptionError
from fastheads.intervene.kv_map import By, KvMap, kv_map
from fastheads.intervene.streaming import AttentionMass
from fastheads.intervene.streaming_loss import Cost, Evaluator, Interval, interval, matched_draws, trials_of
from fastheads.results.head_profile import HeadProfile
from fastheads.run.api import profile
from fastheads.stats.names import STREAMING_METRICS

SHARES = (0.75, 0.5, 0.25, 0.1)  # of KV groups that keep the full cache, of a curve

SEGMENT = 64  # tokens

Say = Callable[[str], None]


def long_sequences(corpus: Corpus, count: int) -> Tensor:
    """Return the first `count` sequences of the corpus that have its full length, `[count, seq_len]`. Raises DataError if there
    are fewer.
    """
    found: list[Tensor] = []
    windows = corpus.windows()
    try:
        for window in windows:
            found += [ids.long() for ids in window.sequences if len(ids) == corpus.seq_len]
            if len(found) >= count:
                return torch.stack(found[:count])
    finally:
        windows.close()
    raise DataError(
        f"{corpus.source.name} has {len(found)} sequences of {corpus.seq_len} tokens, and {count} are needed: use longer texts, "
        "a smaller --seq-len, or fewer sequences"
    )


def check_length(seq_len: int, *, sink: int, window: int) -> None:
    """Raise OptionError if sequences of `seq_len` tokens have none beyond sink + window."""
    if seq_len <= sink + window:
        raise OptionError(
            f"sequences of {seq_len} tokens end within sink + window, {sink} + {window}: use longer ones"
        )


def profile_streaming(
    model: nn.Module, sequences: Tensor, *, sink: int, window: int, **options: Any
) -> HeadProfile:
    """Measure the streaming errors on sequences `[n, seq]`; `options` and errors are those of `profile()`."""
    check_length(sequences.shape[1], sink=sink, window=window)
    batches = [{"input_ids": row[None]} for row in sequences]
    return profile(
        model, batches, token_agg="all", streaming=(sink, window), metrics=STREAMING_METRICS, **options
    )


@dataclass(frozen=True)
class Evaluation:
    """What maps cost on held-out texts: the map's, at other shares, by attention mass, and draws matched by layer."""

    base: dict[str, Interval]
    sequences: int
    tokens: int  # of each sequence
    costs: list[Cost]
    draws: list[Cost]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "base": {name: vars(value) for name, value in self.base.items()},
            "sequences": self.sequences,
            "tokens": self.tokens,
            "costs": [cost.summary() for cost in self.costs],
            "draws": [cost.summary() for cost in self.draws],
        }


def evaluate(
    model: nn.Module,
    found: KvMap,
    held_out: Tensor,
    *,
    ranked_by: Tensor | None = None,
    draws: int = 20,
    shares: Iterable[float] = (),
    segment: int | None = None,
    say: Say = lambda line: None,
) -> Evaluation:
    """Let the map's groups stream in the model's forward, on texts `[n, seq]` that it was not made of.

    Args:
        model: the one that the map is of.
        found: the map.
        held_out: the texts; a random segment is put into each, and again at its end.
        ranked_by: the texts that the map was made of: the attention mass is measured there too, and as many groups stream that
            have the lowest. None: that is left out.
        draws: sets of as many groups of each layer, at random, to compare with.
        shares: other shares of KV groups that keep the full cache.
        segment: its number of tokens. None: 64, or an eighth of the texts' if that is less.
        say: is told of each step.

    Raises OptionError if the texts are too short.
    """
    vocab = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    segment = min(SEGMENT, held_out.shape[1] // 8) if segment is None else segment
    trials = trials_of(held_out, segment, vocab, sink=found.sink, window=found.window)
    was_training = model.training
    model.eval()
    try:
        evaluator = Evaluator(model, trials, sink=found.sink, window=found.window)
        say("the model as it is")
        chosen: list[tuple[str, list[tuple[int, int]]]] = [("streaming error", found.streaming)]
        for share in shares:
            name = f"streaming error, {share:.0%} keep the full cache"
            chosen.append((name, found.with_share(share).streaming))
        if ranked_by is not None:
            with AttentionMass(model, Window(found.sink, found.window)) as mass, torch.inference_mode():
                for row in ranked_by:
                    model(row[None].to(next(model.parameters()).device), use_cache=False, logits_to_keep=1)
            by_mass = mass.of_kv_groups()
            lowest = sorted(found.known, key=lambda pair: by_mass[pair])[: len(found.streaming)]
            chosen.append(("attention mass", lowest))
        chosen.append(("all groups", found.known))
        costs = []
        for name, groups in chosen:
            costs.append(evaluator.cost(name, groups))
            say(name)
        drawn = []
        for number, groups in enumerate(matched_draws(found.streaming, found.known, draws), 1):
            drawn.append(evaluator.cost(f"draw {number}", groups))
            say(f"draw {number} of {draws}")
    finally:
        model.train(was_training)
    base = {name: interval(values) for name, values in evaluator.base.items()}
    return Evaluation(base, held_out.shape[0], held_out.shape[1], costs, drawn)


def map_of(
    found: HeadProfile, *, keep: float | None, bound: float | None, by: By, sink: int, window: int
) -> KvMap:
    """Return the map of a profile. Raises OptionError if the profile has another window than `sink` and `window`."""
    result = kv_map(found, keep=keep, bound=bound, by=by)
    if (result.sink, result.window) != (sink, window):
        raise OptionError(
            f"the profile has sink {result.sink} and window {result.window}, not {sink} and {window}: leave these out, or "
            "profile again"
        )
    return result
