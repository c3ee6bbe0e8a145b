"""What merging and plots need of a profile."""

from collections.abc import Mapping
from typing import Any, Protocol

from fastheads.stats.arrays import Array, MomentArrays


class Profile(Protocol):
    """A `HeadProfile`, as those see it that build it and must not import it."""

    metadata: dict[str, Any]

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
        """Rows and heads."""

    def ranked_cells(self, metric: str = ..., *, descending: bool = ...) -> list[tuple[int, int]]:
        """Rows and heads, lowest first."""

    def statistics(self, metric: str = ...) -> dict[str, Array]:
        """Arrays `[rows, heads]` by name."""
