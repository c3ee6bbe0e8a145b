"""Which query heads share keys and values, as far as a profile tells."""

from fastheads.results.protocol import Profile
from fastheads.stats.names import KV_METRIC


def kv_heads(profile: Profile) -> list[int | None]:
    """Return the number of KV heads of each row; None where it is unknown.

    It is in the metadata (`kv_heads`, a number for each row), else that of the KV heads that were measured.
    """
    sites = profile.metadata["sites"]
    given = profile.metadata.get("kv_heads")
    if not isinstance(given, list) or len(given) != len(sites):
        given = [None] * len(sites)
    measured = profile.arrays.get(KV_METRIC)
    found: list[int | None] = []
    for row, site in enumerate(sites):
        number = given[row]
        if number is None and measured is not None:
            number = int((measured.count[row] + measured.nonfinite[row] > 0).sum())
        fits = type(number) is int and number > 0 and site["num_heads"] % number == 0
        found.append(number if fits else None)
    return found
