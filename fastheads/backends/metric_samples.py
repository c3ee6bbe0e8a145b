"""Samples of metrics that are registered: a function of each token, aggregated as the norms are."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastheads.backends.accumulator import Accumulator
from fastheads.errors import BackendError
from fastheads.models.sites import HeadSite
from fastheads.stats.metric import Metric
from fastheads.stats.metrics import token_samples
from fastheads.stats.moments import RunningMoments
from fastheads.stats.token_layout import TokenLayout


class MetricAccumulator(Accumulator):
    """Takes inputs to one registered metric."""

    def __init__(self, sites: dict[int, HeadSite], metric: Metric, token_agg: str) -> None:
        """`sites` by row. Raises UnsupportedWeightError where a dense weight cannot be had."""
        super().__init__(sites, "einsum", "exact", token_agg)
        self._metric = metric
        assert metric.function is not None
        self._function = metric.function

    def record(
        self,
        rows: Sequence[int],
        inputs: Sequence[Tensor],
        layout: TokenLayout,
        moments: RunningMoments,
        *,
        scale: Tensor | None = None,
        ratio: Tensor | None = None,
    ) -> bool:
        """Merge the samples of inputs `[B, S, H·D]` of sites of one geometry; returns False. Raises BackendError for a function
        whose values are not `[B, S, H]`.
        """
        self.used.add(self._metric.name)
        for row, x in zip(rows, inputs, strict=True):
            site = self._sites[row]
            z = x.detach().unflatten(-1, (site.num_heads, site.head_dim))
            weight = None
            if self._metric.needs_weight:
                weight = self._weight(row).to(x.device).unflatten(-1, (site.num_heads, site.head_dim))
            with torch.no_grad():
                values = self._function(z, weight)
            if not isinstance(values, Tensor) or values.shape != z.shape[:3]:
                given = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise BackendError(
                    f"metric {self._metric.name!r} must give values {list(z.shape[:3])} [batch, seq, heads], not {given}"
                )
            samples, present = token_samples(values.double(), layout, self.token_agg)
            moments.update([row], samples[:, None, None], present)
        return False
