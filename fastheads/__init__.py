"""fastheads: profile every attention head of a transformer while it runs."""

from fastheads._version import __version__
from fastheads.factors import StaleFactorError
from fastheads.manager import HookManager
from fastheads.results import HeadProfile
from fastheads.sites import HeadSite, NoSitesError, find_sites
from fastheads.weights import UnsupportedWeightError

__all__ = [
    "HeadProfile",
    "HeadSite",
    "HookManager",
    "NoSitesError",
    "StaleFactorError",
    "UnsupportedWeightError",
    "__version__",
    "find_sites",
]
