"""What can be measured of a head: each metric as an object, and the metrics that others register."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from fastheads.errors import OptionError
from fastheads.stats.names import (
    KV_METRIC,
    METRICS,
    RATIO_METRIC,
    RATIO_SQUARE_METRIC,
    STREAMING_METRICS,
    UPDATE_METRIC,
)

Source = Literal["output", "contribution", "update", "ratio", "kv_group", "streaming", "function"]


@dataclass(frozen=True)
class Metric:
    """One number of every token and head, and where it comes from.

    `source`: "output", the norm of z_h; "contribution", of W_h z_h; "update", of what the layer adds for the head; "ratio", that
    over the norm of the residual stream; "kv_group", of the summed contributions of a KV group; "streaming", of what is lost with
    a small window, over the norm of the residual stream; "function", the number that `function` gives.
    """

    name: str
    source: Source
    relative_to: str | None = (
        None  # a sample is divided by the mean over the layer's heads of that metric's sample
    )
    # (z [batch, seq, heads, head_dim], weight [hidden, heads, head_dim] or None) -> values [batch, seq, heads]
    function: Callable[[Any, Any], Any] | None = None
    needs_weight: bool = False  # `function` is given the weight, which is then read at each input

    @property
    def needs_factor(self) -> bool:
        """True if a factor of the weight gives it: all norms but that of the output."""
        return self.source not in ("output", "function")


# In the order of the planes that the kernel and the torch paths fill.
HEAD_METRICS = (
    Metric(METRICS[0], "output"),
    Metric(METRICS[1], "contribution"),
    Metric(METRICS[2], "output", relative_to=METRICS[0]),
    Metric(METRICS[3], "contribution", relative_to=METRICS[1]),
)
# As many norms are measured; the others are these divided by their means over the layer's heads, in the same order.
NUM_NORMS = sum(metric.relative_to is None for metric in HEAD_METRICS)
UPDATE = Metric(UPDATE_METRIC, "update")
KV_GROUP = Metric(KV_METRIC, "kv_group")
# They come from one read, in planes behind those of HEAD_METRICS.
RATIOS = (Metric(RATIO_METRIC, "ratio"), Metric(RATIO_SQUARE_METRIC, "ratio"))

STREAMING = tuple(Metric(name, "streaming") for name in STREAMING_METRICS)

_registered: dict[str, Metric] = {
    metric.name: metric for metric in (*HEAD_METRICS, UPDATE, *RATIOS, KV_GROUP, *STREAMING)
}


def register_metric(name: str, function: Callable[[Any, Any], Any], *, needs_weight: bool = False) -> Metric:
    """Let `HookManager(..., metrics=[..., name])` measure a number of your own.

    Which tokens are valid, how a sample is made of them (`token_agg`), running moments, files and merging are the library's.
    Each such metric reads the input once more; with one on, forwards do not wait to be measured together.

    Args:
        name: a Python identifier. A name that ends in "_norm", "_ratio" or "_square" is of numbers that are never negative.
        function: called with z `[batch, seq, heads, head_dim]`, the input of the output projection in its own dtype, and with
            the weight `[hidden, heads, head_dim]`, or None. Returns the value of every token, padding included, `[batch, seq,
            heads]` on the same device. It runs without gradients, must not change its arguments and must not wait for the device.
        needs_weight: give `function` the weight. It is then read at each input.

    Raises:
        OptionError: the name is taken, or is no identifier.
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise OptionError(f"a metric's name must be a Python identifier, not {name!r}")
    if not callable(function):
        raise OptionError(f"the function of metric {name!r} cannot be called")
    metric = Metric(name, "function", function=function, needs_weight=needs_weight)
    if _registered.get(name, metric) != metric:
        raise OptionError(f"metric {name!r} is there already: choose another name")
    return _registered.setdefault(name, metric)


def metrics_of(names: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of these names, each once. Raises OptionError for a name that nobody registered."""
    names = list(dict.fromkeys(names))
    unknown = [name for name in names if name not in _registered]
    if unknown:
        raise OptionError(f"unknown metric {unknown[0]!r}: choose among {', '.join(_registered)}")
    return tuple(_registered[name] for name in names)


def _contribution_power(z: Any, weight: Any) -> Any:
    """‖W_h z_h‖² in float64."""
    import torch

    return torch.einsum("bshd,ohd->bsho", z.double(), weight.double()).square().sum(dim=-1)


register_metric("head_residual_contribution_power", _contribution_power, needs_weight=True)
