"""What streaming KV groups cost: the loss on held-out texts, and on a random segment that comes again beyond the window."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastheads.errors import OptionError
from fastheads.intervene.streaming import KvGroups, Streamer
from fastheads.stats.arrays import Array

TEXT, REPEATED = "text", "repeated segment"
RESAMPLES = 2000


@dataclass(frozen=True)
class Trials:
    """Sequences of tokens `[n, seq]`; by name the tokens whose loss counts, given all before them, bool `[n, seq]`."""

    ids: Tensor
    counted: dict[str, Tensor]


def trials_of(ids: Tensor, length: int, vocab: int, *, sink: int, window: int, seed: int = 0) -> Trials:
    """Put into each of the texts `[n, seq]` a random segment of `length` tokens (of `vocab` ids) near its start, and again at its
    end. Two sets of tokens count: those of the text beyond sink + window, and those of the repetition but its first, which a
    model can predict if it looks back over the window.

    Raises OptionError if the texts are too short for the first segment to be out of the window.
    """
    n, seq = ids.shape
    start = max(sink, 8)
    text = max(sink + window, start + length) + 1  # after a token of the text
    if seq - length <= start + length + window or text >= seq - length:
        least = max(start + 2 * length + window + 1, text + length + 1)
        raise OptionError(
            f"sequences of {seq} tokens are too short to see beyond {sink} + {window}: {least} are needed"
        )
    segment = torch.randint(0, vocab, (n, length), generator=torch.Generator().manual_seed(seed)).to(ids)
    ids = ids.clone()
    ids[:, start : start + length] = segment
    ids[:, -length:] = segment
    of_text, of_segment = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(2))
    of_text[:, text:-length] = True
    of_segment[:, 1 - length :] = True
    return Trials(ids, {TEXT: of_text, REPEATED: of_segment})


def losses(model: nn.Module, trials: Trials) -> dict[str, Array]:
    """Return, by name, the mean cross-entropy (nats) of the tokens that count, of each sequence: float64 `[n]`."""
    device = next(model.parameters()).device
    found: dict[str, list[float]] = {name: [] for name in trials.counted}
    with torch.inference_mode():
        for number, ids in enumerate(trials.ids):
            of_any = torch.stack([counted[number] for counted in trials.counted.values()]).any(0)
            where = (of_any.nonzero().flatten() - 1).to(device)  # the token before predicts
            row = ids.long()[None].to(device)
            logits = model(row, use_cache=False, logits_to_keep=where).logits[0].float()
            loss = torch.nn.functional.cross_entropy(logits, row[0, where + 1], reduction="none").cpu()
            for name, counted in trials.counted.items():
                found[name].append(float(loss[counted[number][of_any]].double().mean()))
    return {name: np.array(values) for name, values in found.items()}


@dataclass(frozen=True)
class Interval:
    """A mean over sequences, with the limits that hold 95 % of its bootstrap resamples."""

    mean: float
    low: float
    high: float


def interval(values: Array, seed: int = 0) -> Interval:
    """Resample the sequences to find the interval of their mean."""
    picks = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(axis=1), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


@dataclass(frozen=True)
class Cost:
    """The rise in loss of each sequence, by the kind of its tokens, with some KV groups streaming."""

    name: str
    kv_groups: list[tuple[int, int]]
    rise: dict[str, Array]

    def summary(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "chosen by": self.name,
            "streaming": len(self.kv_groups),
            "rise": {name: vars(interval(values)) for name, values in self.rise.items()},
        }


class Evaluator:
    """Measures costs on the same trials, against the model as it is."""

    def __init__(self, model: nn.Module, trials: Trials, *, sink: int, window: int) -> None:
        self._model, self._trials, self._sizes = model, trials, {"sink": sink, "window": window}
        self._streamer = Streamer(model)
        self.base = losses(model, trials)

    def cost(self, name: str, kv_groups: KvGroups) -> Cost:
        """Return what it costs that these KV groups see only sink and window."""
        chosen = list(kv_groups)
        with self._streamer.streaming(chosen, **self._sizes):
            found = losses(self._model, self._trials)
        return Cost(name, chosen, {each: values - self.base[each] for each, values in found.items()})


def matched_draws(
    chosen: Iterable[tuple[int, int]], known: Iterable[tuple[int, int]], count: int, seed: int = 0
) -> list[list[tuple[int, int]]]:
    """Draw sets of KV groups at random, each with as many groups of every layer as `chosen`, among the `known` ones."""
    generator, chosen = np.random.default_rng(seed), list(chosen)
    by_layer: dict[int, list[int]] = {}
    for layer, group in known:
        by_layer.setdefault(layer, []).append(group)
    number = {layer: sum(1 for other, _ in chosen if other == layer) for layer in by_layer}
    return [
        [
            (layer, int(group))
            for layer, groups in by_layer.items()
            for group in sorted(generator.choice(groups, number[layer], replace=False))
        ]
        for _ in range(count)
    ]
