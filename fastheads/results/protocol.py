"""What merging and plots need of a profile."""

from typing import Any, Protocol

from fastheads.stats.moments import Moments


class Profile(Protocol):
    """A `HeadProfile`, as those see it that build it and must not import it."""

    moments: dict[str, Moments]
    metadata: dict[str, Any]

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

    def results(self) -> dict[str, dict[str, Any]]:
        """As `HookManager.get_results()`."""
