"""fastheads: profile every attention head of a transformer while it runs.

The public names are imported when they are first used (PEP 562), so that `fastheads --help` need not wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastheads._version import __version__

if TYPE_CHECKING:
    from fastheads.backends.registry import register_backend
    from fastheads.capture.manager import HookManager
    from fastheads.corpus.sources import held_texts
    from fastheads.errors import (
        FastheadsError,
        NoSitesError,
        OptionError,
        ProfileInterrupted,
        ResultsError,
        StaleFactorError,
        UnsupportedWeightError,
    )
    from fastheads.intervene.ablation import ablate
    from fastheads.models.families import Family, register_family
    from fastheads.models.sites import HeadSite, find_sites
    from fastheads.results.head_profile import HeadProfile
    from fastheads.run.api import profile
    from fastheads.run.job import Job
    from fastheads.stats.confidence import StableRule
    from fastheads.stats.metric import register_metric

__all__ = [
    "Family",
    "FastheadsError",
    "HeadProfile",
    "HeadSite",
    "HookManager",
    "Job",
    "NoSitesError",
    "OptionError",
    "ProfileInterrupted",
    "ResultsError",
    "StableRule",
    "StaleFactorError",
    "UnsupportedWeightError",
    "__version__",
    "ablate",
    "find_sites",
    "held_texts",
    "profile",
    "register_backend",
    "register_family",
    "register_metric",
]

_HOMES = {
    "Family": "models.families",
    "FastheadsError": "errors",
    "HeadProfile": "results.head_profile",
    "HeadSite": "models.sites",
    "HookManager": "capture.manager",
    "Job": "run.job",
    "NoSitesError": "errors",
    "OptionError": "errors",
    "ProfileInterrupted": "errors",
    "ResultsError": "errors",
    "StableRule": "stats.confidence",
    "StaleFactorError": "errors",
    "UnsupportedWeightError": "errors",
    "ablate": "intervene.ablation",
    "find_sites": "models.sites",
    "held_texts": "corpus.sources",
    "profile": "run.api",
    "register_backend": "backends.registry",
    "register_family": "models.families",
    "register_metric": "stats.metric",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastheads' has no attribute {name!r}")
    value = getattr(import_module(f"fastheads.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
