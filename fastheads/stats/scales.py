"""The scale of each metric: whether its numbers may be compared across layers. Does not import torch."""

from dataclasses import dataclass
from fnmatch import fnmatchcase


@dataclass(frozen=True)
class Scale:
    """Tell how the numbers of a metric compare between heads.

    comparable: True if heads of different layers may be ranked by it.
    centre: the value of an average head, if that is known.
    note: what to tell beside the numbers.
    ratio: True if it is a share of something, so that zero is a natural end of the scale.
    """

    comparable: bool
    centre: float | None = None
    note: str = ""
    ratio: bool = False


RESIDUAL = Scale(True, note="relative to the residual stream", ratio=True)
LAYER = Scale(True, centre=1.0, note="1 is the layer's average")
# The residual stream grows with depth, and the size of what a head must write to matter grows with it.
RAW = Scale(False, note="grows with depth: compare heads within a layer only")
UNKNOWN = Scale(True)  # of a metric that others register

# The first pattern that fits a metric's name gives its scale.
SCALES = (
    ("head_residual_ratio*", RESIDUAL),
    ("*_streaming_error*", RESIDUAL),
    ("relative_*", LAYER),
    ("*_norm", RAW),
    ("*_power", RAW),
)


def scale_of(metric: str) -> Scale:
    """Return the scale of the metric of this name."""
    return next((scale for pattern, scale in SCALES if fnmatchcase(metric, pattern)), UNKNOWN)
