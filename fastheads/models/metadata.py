"""The metadata of a profile: where it comes from."""

import platform
from typing import Any

import torch
import transformers
from torch import nn

from fastheads._version import __version__
from fastheads.models.sites import HeadSite


def describe(model: nn.Module, sites: list[HeadSite], **options: Any) -> dict[str, Any]:
    """Return the model, its sites, the run's options and the versions, as JSON values."""
    config = getattr(model, "config", None)
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "model_class": type(model).__name__,
        "sites": [
            {"name": s.name, "layer": s.layer, "num_heads": s.num_heads, "head_dim": s.head_dim}
            for s in sites
        ],
        **options,
        "versions": {
            "fastheads": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
