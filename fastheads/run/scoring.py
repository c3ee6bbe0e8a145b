"""Score what ablations change: the loss, and the KL divergence to the intact model, by sequence.

Sequences are scored in chunks. A chunk's forward through the intact model is made once, its logits are held, and each set of
heads is compared to it. Where a chunk is small, several sets go through one forward, as rows that are gated one by one.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from fastheads.errors import ForwardError
from fastheads.intervene.ablation import Ablator, Heads
from fastheads.models.batch_sharing import RotaryState, sharing_of
from fastheads.run.model_state import evaluation_mode, input_device, takes_argument

# Logits of a forward, in elements: a few tensors of that size are held at a time.
MOST_LOGITS = {"cpu": 2**27, "cuda": 2**29}
MOST_TOKENS = {"cpu": 2_048, "cuda": 16_384}

# A sequence's rise in loss and KL divergence, both nats per token.
Effect = tuple[float, float]


class Scorer:
    """Scores sets of heads on sequences of equal length. A context manager: the model is in evaluation mode meanwhile."""

    def __init__(
        self,
        model: nn.Module,
        ids: Tensor,
        ablator: Ablator,
        *,
        batch_tokens: int | None = None,
    ) -> None:
        """`ids`: int64 `[sequences, tokens]`, without padding. `batch_tokens`: the most in a forward; None: by the device."""
        self._model, self._ids, self._ablator = model, ids, ablator
        self._device = input_device(model)
        length = ids.shape[1]
        if batch_tokens is None:
            kind = "cuda" if self._device.type == "cuda" else "cpu"
            vocabulary = _vocabulary(model)
            batch_tokens = min(MOST_TOKENS[kind], MOST_LOGITS[kind] // max(vocabulary, 1))
        self._rows = max(1, batch_tokens // length)  # in a forward
        alone = sharing_of(model).alone is not None
        self._rotary = RotaryState(model)
        # As few chunks as may be, of about equal size.
        size = 1 if alone else -(-len(ids) // -(-len(ids) // self._rows))
        self.chunks = [range(first, min(first + size, len(ids))) for first in range(0, len(ids), size)]
        # Sets in a forward.
        self.group = 1 if alone or not ablator.takes_rows else max(1, self._rows // size)
        self._options = {"use_cache": False} if takes_argument(model, "use_cache") else {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(evaluation_mode(self._model))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._rotary.restore()

    @torch.inference_mode()
    def intact(self, chunk: range) -> "Intact":
        """Run the chunk's sequences through the intact model."""
        ids = self._ids[chunk.start : chunk.stop]
        parts = []
        for rows in self._batches(len(ids)):
            parts.append(self._logits(ids[rows.start : rows.stop]))
        logits = torch.cat(parts) if len(parts) > 1 else parts[0]
        losses = torch.stack([_loss(row, own) for row, own in zip(logits, ids, strict=True)])
        return Intact(chunk, logits, _checked(losses, "the intact model").tolist())

    @torch.inference_mode()
    def effects(self, intact: "Intact", sets: Sequence[Heads]) -> list[list[Effect]]:
        """Return by set the effect on each sequence of the chunk."""
        sequences = list(intact.chunk)
        found: list[list[Effect]] = []
        if len(sets) > 1 and self.group > 1:
            rows = [(n, m) for n in range(len(sets)) for m in range(len(sequences))]
            for some in self._batches(len(rows)):
                part = rows[some.start : some.stop]
                with self._ablator.ablate_rows([sets[n] for n, _ in part]):
                    logits = self._logits(self._ids[[sequences[m] for _, m in part]])
                found.append(self._compared(intact, logits, [m for _, m in part]))
            flat = [effect for part_of in found for effect in part_of]
            return [flat[n * len(sequences) : (n + 1) * len(sequences)] for n in range(len(sets))]
        for heads in sets:
            effects: list[Effect] = []
            with self._ablator.ablate(heads):
                for some in self._batches(len(sequences)):
                    logits = self._logits(self._ids[sequences[some.start] : sequences[some.stop - 1] + 1])
                    effects += self._compared(intact, logits, list(some))
            found.append(effects)
        return found

    def _compared(self, intact: "Intact", logits: Tensor, members: list[int]) -> list[Effect]:
        """Compare the rows of `logits` to those of the chunk's `members`."""
        found = []
        for row, m in zip(logits, members, strict=True):
            ids = self._ids[intact.chunk[m]]
            found.append(torch.stack([_loss(row, ids), _divergence(intact.logits[m], row)]))
        values = _checked(torch.stack(found), "the model with heads ablated").tolist()
        return [(loss - intact.losses[m], kl) for (loss, kl), m in zip(values, members, strict=True)]

    def _batches(self, rows: int) -> Iterator[range]:
        """Yield ranges of rows, each as long as a forward may be by then."""
        first = 0
        while first < rows:
            yield range(first, min(first + self._rows, rows))
            first += self._rows

    def _logits(self, ids: Tensor) -> Tensor:
        """Return the logits `[rows, tokens, vocabulary]`."""
        self._rotary.reset()
        try:
            output: Any = self._model(input_ids=ids.to(self._device), **self._options)
        except (RuntimeError, MemoryError) as error:
            if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(
                error
            ):
                raise ForwardError(
                    f"out of memory with {ids.numel():,} tokens in a forward: lower --batch-tokens (batch_tokens=)"
                ) from error
            raise
        logits: Tensor = output.logits
        return logits


class Intact:
    """What the intact model gives for a chunk: logits `[sequences, tokens, vocabulary]`, and each sequence's loss."""

    def __init__(self, chunk: range, logits: Tensor, losses: list[float]) -> None:
        self.chunk, self.logits, self.losses = chunk, logits, losses


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy of the next token, a float64 scalar. logits: `[tokens, vocabulary]`; ids: `[tokens]`."""
    predicting = logits[:-1].float()
    following = ids[1:].to(logits.device).unsqueeze(-1)
    return (predicting.logsumexp(-1) - predicting.gather(-1, following).squeeze(-1)).double().mean()


def _divergence(intact: Tensor, ablated: Tensor) -> Tensor:
    """Return the mean KL(intact ‖ ablated) of the next token, a float64 scalar; over the tokens that `_loss` takes.

    As Σ p (z - z') - (lse(z) - lse(z')) of logits z, z': differences, which are small where the effect is.
    """
    z, other = intact[:-1].float(), ablated[:-1].float()
    lse = z.logsumexp(-1, keepdim=True)
    p = (z - lse).exp()
    difference = torch.where(p > 0, p * (z - other), 0.0)  # tokens that a mask leaves out: 0 · (-inf + inf)
    return (difference.sum(-1) - lse.squeeze(-1) + other.logsumexp(-1)).double().mean()


def _checked(values: Tensor, what: str) -> Tensor:
    values = values.cpu()
    if not bool(values.isfinite().all()):
        raise ForwardError(
            f"{what} has a loss that is NaN or infinite: load it in another dtype, such as float32 (--dtype)"
        )
    return values


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else 1
