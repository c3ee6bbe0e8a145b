"""The progress of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """What is done so far. `all_tokens` counts those of all ranks, the rest is this rank's."""

    tokens: int = 0  # valid ones
    all_tokens: int = 0
    total: int | None = None  # of `all_tokens`, where that is known
    expected: int | None = None  # the same, by what was read of the corpus so far
    padding: float = 0.0  # share of the tokens run that were padding
    overhead: float | None = (
        None  # what profiling adds to a forward, as a share of it, on the batches that were sampled
    )
