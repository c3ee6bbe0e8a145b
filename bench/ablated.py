"""Losses of a language model while some of its attention heads are silent, computed from the first layer concerned on.

A head of layer l leaves what enters the layers up to l as it was. The hidden states at the entry of each layer are kept from the
intact run; the layers before l are skipped, and layer l is given its entry.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastheads
from fastheads.models.sites import decoder_of

Heads = Iterable[tuple[int, int]]  # (row of a site, head)
Array = np.ndarray[Any, np.dtype[np.float64]]

LOGITS = 2**29  # numbers in the logits of one forward, at most
SAME = 1e-4  # largest difference of a loss that is computed from a layer on


class AblatedLosses:
    """Losses of `model` on token ids `[sequences, tokens]` with heads silenced.

    Args:
        model: a decoder whose layers are called in order with the hidden states as the first argument.
        ids: `[sequences, tokens]`.
        skip: leave out the predictions of the first `skip` tokens (the first one follows the first token).
        kl: keep the intact model's log-probabilities, which `kl` needs: `[sequences, tokens, vocabulary]`, float32.
    """

    def __init__(self, model: Any, ids: Tensor, *, skip: int = 0, kl: bool = False) -> None:
        self.model, self.skip = model, skip
        self.sites = fastheads.find_sites(model)
        self.layers: list[Any] = list(decoder_of(model).layers)  # type: ignore[arg-type]
        device = next(model.parameters()).device
        rows = max(1, LOGITS // (ids.shape[1] * model.config.get_text_config().vocab_size))
        self.chunks = [chunk.to(device) for chunk in ids.long().split(rows)]
        self.entries: list[list[Tensor]] = []  # by chunk and layer
        self.tuples = False  # True: layers return tuples
        self._intact: list[Tensor] = []
        losses = []
        for chunk in self.chunks:
            entries: list[Tensor] = []
            with self._recorded(entries), torch.inference_mode():
                logits = self._logits(chunk)
            self.entries.append(entries)
            losses.append(_cross_entropy(logits, chunk, skip))
            if kl:
                self._intact.append(torch.log_softmax(logits[:, skip:-1], -1))
        self.intact: Array = torch.cat(losses).double().cpu().numpy()  # [sequences]
        resumed, _ = self.measure([(len(self.sites) // 2, 0)], keep=True)
        if np.abs(resumed - self.intact).max() > SAME:
            raise RuntimeError(f"{type(model).__name__} cannot be run from a layer on: the losses differ")

    def measure(
        self, heads: Heads, *, means: Tensor | None = None, kl: bool = False, keep: bool = False
    ) -> tuple[Array, Array]:
        """Return the cross-entropy and the KL divergence from the intact model, nats per token: each `[sequences]`.

        The second is 0 unless `kl`.

        Args:
            heads: the heads to silence.
            means: what takes their place: `[rows, heads, head_dim]`; None: zero.
            kl: compute the KL divergence.
            keep: silence nothing, and only start at the layer (a check).
        """
        by_row: dict[int, list[int]] = {}
        for row, head in heads:
            by_row.setdefault(row, []).append(head)
        first = min(self.sites[row].layer for row in by_row)
        losses, divergences = [], []
        with torch.inference_mode(), ExitStack() as stack:
            for row, of_row in by_row.items() if not keep else ():
                stack.enter_context(_silenced(self.sites[row], of_row, None if means is None else means[row]))
            for number, chunk in enumerate(self.chunks):
                with self._resumed(first, self.entries[number][first]):
                    logits = self._logits(chunk)
                if kl:
                    found, expected = torch.log_softmax(logits[:, self.skip : -1], -1), self._intact[number]
                    labels = chunk[:, self.skip + 1 :, None]
                    losses.append(-found.gather(-1, labels).squeeze(-1).mean(1))
                    divergences.append(((expected - found) * expected.exp()).sum(-1).mean(1))
                else:
                    losses.append(_cross_entropy(logits, chunk, self.skip))
                    divergences.append(torch.zeros(len(chunk)))
        return tuple(torch.cat(parts).double().cpu().numpy() for parts in (losses, divergences))  # type: ignore[return-value]

    def _logits(self, chunk: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=chunk, use_cache=False).logits.float()
        return logits

    @contextmanager
    def _recorded(self, entries: list[Tensor]) -> Iterator[None]:
        """Append what enters each layer."""

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entries.append(args[0] if args else kwargs["hidden_states"])

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self.tuples = isinstance(output, tuple)

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            yield

    @contextmanager
    def _resumed(self, first: int, entry: Tensor) -> Iterator[None]:
        """Skip the layers before `first`, and let `entry` enter that one."""
        skipped = self.layers[:first]

        def passed(hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return (hidden_states,) if self.tuples else hidden_states

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (entry, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": entry}

        handle = self.layers[first].register_forward_pre_hook(before, with_kwargs=True)
        try:
            for layer in skipped:
                layer.forward = passed
            yield
        finally:
            handle.remove()
            for layer in skipped:
                vars(layer).pop("forward", None)


@contextmanager
def _silenced(site: fastheads.HeadSite, heads: Sequence[int], means: Tensor | None) -> Iterator[None]:
    """Replace the heads' part of the projection's input by zero, or by `means[head]`."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        z = args[0].clone().unflatten(-1, (site.num_heads, site.head_dim))
        z[..., heads, :] = 0.0 if means is None else means[heads].to(z)
        return (z.flatten(-2), *args[1:])

    handle = site.module.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def _cross_entropy(logits: Tensor, ids: Tensor, skip: int) -> Tensor:
    """Return the mean loss of each sequence: `[sequences]`."""
    logits, labels = logits[:, skip:-1], ids[:, skip + 1 :, None]
    return (logits.logsumexp(-1) - logits.gather(-1, labels).squeeze(-1)).mean(1)


@torch.no_grad()
def mean_outputs(model: Any, batches: Iterable[Tensor]) -> Tensor:
    """Return the mean output of each head over all tokens: float64 `[rows, heads, head_dim]`, on the model's device."""
    sites = fastheads.find_sites(model)
    sums = torch.zeros(
        len(sites), sites[0].num_heads, sites[0].head_dim, dtype=torch.float64, device=model.device
    )
    tokens = 0
    with ExitStack() as stack:
        for row, site in enumerate(sites):

            def add(_: nn.Module, args: tuple[Any, ...], row: int = row) -> None:
                sums[row] += args[0].double().flatten(0, -2).sum(0).view_as(sums[row])

            stack.callback(site.module.register_forward_pre_hook(add).remove)
        for ids in batches:
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            tokens += ids.numel()
    return sums / tokens
