"""The progress of a run."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Status:
    """The work done so far; `all_tokens` is for all ranks, the rest for this rank."""

    tokens: int = 0  # valid tokens
    all_tokens: int = 0
    total: int | None = None  # final value of `all_tokens`; None if unknown
    expected: int | None = None  # estimate of the same, from what was read of the corpus so far
    padding: float = 0.0  # share of padding in the tokens run
    overhead: float | None = None  # time that profiling adds, as a share of a forward, on the sampled batches
