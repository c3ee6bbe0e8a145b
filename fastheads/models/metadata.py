"""The metadata of a profile: where it comes from."""

import platform
from typing import Any

import torch
import transformers
from torch import nn

from fastheads._version import __version__
from fastheads.models.sites import HeadSite, num_kv_heads


def describe(
    model: nn.Module, sites: list[HeadSite], kv_heads: list[int | None], **options: Any
) -> dict[str, Any]:
    """Return the model, its sites with their KV heads (`kv_heads_of`), the run's options and the versions, as JSON values."""
    config = getattr(model, "config", None)
    return {
        "model": str(getattr(config, "_name_or_path", "") or type(model).__name__),
        "model_class": type(model).__name__,
        "sites": [
            {"name": s.name, "layer": s.layer, "num_heads": s.num_heads, "head_dim": s.head_dim}
            for s in sites
        ],
        "kv_heads": kv_heads,
        **options,
        "versions": {
            "fastheads": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def kv_heads_of(model: nn.Module, sites: list[HeadSite]) -> list[int | None]:
    """Return the numbers of KV heads of the attentions; None where it is unknown or contradictory. To be asked for when hooks are
    attached: the model may be taken apart later.
    """
    return [_kv_heads(model, site) for site in sites]


def _kv_heads(model: nn.Module, site: HeadSite) -> int | None:
    try:
        return num_kv_heads(model, site)
    except ValueError:
        return None
