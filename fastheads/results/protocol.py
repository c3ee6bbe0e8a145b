"""The interface of a profile that merging and plots need."""

from collections.abc import Mapping
from typing import Any, Protocol

from fastheads.results.mean_vectors import MeanVectors
from fastheads.stats.arrays import Array, MomentArrays


class Profile(Protocol):
    """A `HeadProfile`, for modules that it imports and that cannot import it."""

    metadata: dict[str, Any]
    vectors: MeanVectors | None

    @property
    def arrays(self) -> Mapping[str, MomentArrays]:
        """The moments by metric."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names of the metrics."""

    @property
    def layers(self) -> list[int]:
        """The layer of each row."""

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of rows and heads."""

    def ranked_cells(self, metric: str = ..., *, descending: bool = ...) -> list[tuple[int, int]]:
        """(row, head) pairs, lowest mean first."""

    def statistics(self, metric: str = ...) -> dict[str, Array]:
        """Arrays `[rows, heads]` by statistic."""
