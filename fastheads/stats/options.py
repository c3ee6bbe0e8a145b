"""The options of a measurement: validated once, handed down whole."""

from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Self

from fastheads.errors import OptionError
from fastheads.stats.metric import KV_GROUP, STREAMING, Metric, metrics_of
from fastheads.stats.names import PRECISIONS, TOKEN_AGGS

GROUP_BYTES = 64 * 2**20


@dataclass(frozen=True)
class MeasureOptions:
    """What a HookManager was asked for; its docstring says what each option means.

    Raises OptionError for a value that is none of its option. Whether a backend exists, and what `layers` and `include` name, is
    seen where the model is at hand.
    """

    token_agg: str = "last"
    layers: tuple[int, ...] | None = None  # in order, each once
    backend: str = "auto"
    precision: str = "exact"
    skip_first: int = 0
    group_bytes: int = GROUP_BYTES
    allow_skipped: bool = False
    kv_groups: bool = False
    include: tuple[str, ...] = ()
    verify: bool = False
    metrics: tuple[str, ...] | None = None  # those in the results; None: all that are not optional
    vectors: bool = False
    streaming: tuple[int, int] | None = None  # (sink, window)

    def __post_init__(self) -> None:
        if self.token_agg not in TOKEN_AGGS:
            raise OptionError(f"unknown token_agg {self.token_agg!r}: choose one of {', '.join(TOKEN_AGGS)}")
        if self.precision not in PRECISIONS:
            raise OptionError(f"unknown precision {self.precision!r}: choose one of {', '.join(PRECISIONS)}")
        for name in ("skip_first", "group_bytes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OptionError(f"{name} must be a whole number, 0 or more, not {value!r}")
        object.__setattr__(self, "layers", _checked_layers(self.layers))
        object.__setattr__(self, "include", checked_names("include", self.include))
        for name in ("allow_skipped", "kv_groups", "verify", "vectors"):
            check_flag(name, getattr(self, name))
        if self.metrics is not None:
            names = checked_names("metrics", self.metrics)
            if not names:
                raise OptionError("metrics is empty: name some, or leave it out")
            object.__setattr__(self, "metrics", tuple(metric.name for metric in metrics_of(names)))
        if self.streaming is not None:
            object.__setattr__(self, "streaming", _checked_window(self.streaming))
        named = [metric.name for metric in STREAMING if metric.name in (self.metrics or ())]
        if named and self.streaming is None:
            raise OptionError(f"{named[0]} needs streaming=(sink, window)")
        if self.streaming is not None and self.metrics is not None and not named:
            raise OptionError(f"streaming is for {STREAMING[0].name} and its kin, which metrics leaves out")

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Return the options from arguments as a user gives them: any iterables for `layers`, `include` and `metrics`."""
        return cls(**given)

    def measures(self, metric: Metric) -> bool:
        """True if the metric is to be in the results."""
        if self.metrics is not None and metric.name in self.metrics:
            return True
        if metric is KV_GROUP:
            return self.kv_groups
        if metric in STREAMING:
            return self.metrics is None and self.streaming is not None
        return self.metrics is None and metric.source != "function"

    def registered(self) -> tuple[Metric, ...]:
        """The metrics that a function gives."""
        return tuple(m for m in metrics_of(self.metrics or ()) if m.source == "function")

    def configuration(self) -> dict[str, Any]:
        """The options on which a result depends, as JSON and as arguments of HookManager: a checkpoint's must be equal."""
        return {
            "token_agg": self.token_agg,
            "backend": self.backend,
            "precision": self.precision,
            "skip_first": self.skip_first,
            "allow_skipped": self.allow_skipped,
            "kv_groups": self.kv_groups,
            "layers": self.layer_list(),
            "include": list(self.include),
            **({} if self.metrics is None else {"metrics": list(self.metrics)}),
            **({"vectors": True} if self.vectors else {}),
            **({} if self.streaming is None else {"streaming": list(self.streaming)}),
        }

    def agreed(self) -> dict[str, Any]:
        """The options on which the ranks of a tensor-parallel model must agree."""
        return {
            "token_agg": self.token_agg,
            "skip_first": self.skip_first,
            "layers": self.layer_list(),
            "metrics": self.metrics,
            "vectors": self.vectors,
            "streaming": self.streaming,
        }

    def metadata(self, backend: str) -> dict[str, Any]:
        """The options as a profile's metadata hold them (JSON), with the backend that really served."""
        return {
            "token_agg": self.token_agg,
            "skip_first": self.skip_first,
            "backend": backend,
            "precision": self.precision,
            "layers": self.layer_list(),
            **(
                {}
                if self.streaming is None
                else {"streaming": dict(zip(("sink", "window"), self.streaming, strict=True))}
            ),
        }

    def layer_list(self) -> list[int] | None:
        """`layers` as JSON has it."""
        return None if self.layers is None else list(self.layers)


def check_whole(name: str, value: Any) -> None:
    """Raise OptionError unless `value` is a whole number."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise OptionError(f"{name} must be a whole number, not {value!r:.100}")


def check_flag(name: str, value: Any) -> None:
    """Raise OptionError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, not {value!r:.100}")


def checked_names(name: str, value: Any) -> tuple[str, ...]:
    """Return the names that an option gives, one or several. Raises OptionError for anything else."""
    names = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (None,)
    if not all(isinstance(each, str) for each in names):
        raise OptionError(f"{name} must be a name or a list of names, not {value!r:.100}")
    return names


def _checked_layers(layers: Any) -> tuple[int, ...] | None:
    if layers is None:
        return None
    chosen: list[Any] = list(layers) if isinstance(layers, Iterable) else [None]
    if any(isinstance(n, bool) or not isinstance(n, int) for n in chosen):
        raise OptionError(f"layers must be whole numbers in a list, not {layers!r}")
    return tuple(sorted(set(chosen)))


def _checked_window(streaming: Any) -> tuple[int, int]:
    try:
        sink, window = streaming
    except (TypeError, ValueError):
        raise OptionError(
            f"streaming must be two numbers of tokens, (sink, window), not {streaming!r}"
        ) from None
    for name, value, least in (("sink", sink, 0), ("window", window, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name} must be a whole number of tokens, {least} or more, not {value!r}")
    return sink, window
