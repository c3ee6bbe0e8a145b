"""Decide when the ranking of heads has settled: the rule of `--until-stable`.

It is evaluated repeatedly while samples come in, and a run ends when it first holds. So its error rate must hold for all looks
together: an interval of mean ± 2 standard errors, looked at often enough, misses eventually.

**The rule.** Each head gets a confidence sequence: an interval around its mean that covers the true mean at all sample sizes at
once, except with probability `alpha` / heads. By Bonferroni all heads' intervals [L, U] hold together, at every look, except
with probability `alpha`, however the heads depend on each other (those of one model see the same sequences). A ranking is
*settled* if, for every head a ranked below a head b,

    U_a - L_b <= tolerance * (the average head's mean).

Then, except with probability `alpha`, no two heads that differ by more than the tolerance are in the wrong order. Heads that
differ by less are ties, and a tie settles too, once the intervals are narrower than half the tolerance. With `lowest`, only
pairs of one head in the lowest part and one outside are compared: enough to choose heads to prune, and settled sooner.

**The intervals.** For n samples with the mean m and the unbiased standard deviation s, with k = 1 + n rho² and nu = n - 1,

    A = (√k / alpha_head)^(2/n),    |mean - m| <= s/√n · √(nu (A - 1) / (1 - A/k)),    infinite where A >= k.

It inverts, by Ville's inequality, the mixture of the t statistic over normal effect sizes of standard deviation rho under the
right Haar prior of the variance, which is a martingale at the true mean: T. L. Lai, "On confidence sequences", Annals of
Statistics 4 (1976), with the normal mixture of H. Wang and A. Ramdas, "Anytime-valid t-tests and confidence sequences for
Gaussian means with unknown variance" (arXiv:2310.03722). For large n it is Robbins' normal mixture. rho only sets where it is
narrowest: at about `NARROWEST_AT` samples.

**Assumptions.** Sequences are independent draws from one distribution, in the order in which they are measured:

- Not tokens of a text, which are correlated: token_agg "token" is refused. Blocks of one long text, and pieces of one document,
  are correlated too, more weakly; the intervals are then too narrow. A corpus sorted by topic settles on its first topic.
- Looks only when what was measured is representative of the corpus. Sequences are sorted by length within a window, so that
  is at a window's end.
- Normal samples, for the error rate to be exact at every n. For others it holds asymptotically, by the central limit theorem;
  hence `min_samples` before the first look. A long right tail costs coverage (means are too low until its rare large samples
  occur). `tests/stats/test_stable.py` measures it: an interval at alpha 5 %, looked at after each of the samples 100 to 4,000,
  misses the mean at some time in 2.9 % of the runs for normal samples, in 3 % for lognormal ones of sigma 0.5 (skewness 1.8)
  and in 7.5 % for sigma 1 (skewness 6.2). A wrong verdict takes two intervals that miss in opposite directions, and did not
  occur there. Heavier tails (a head that is active once in 1,000 sequences) defeat any rule that uses moments alone.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastheads.errors import OptionError
from fastheads.stats.moments import Moments

ALPHA = 0.05
TOLERANCE = 0.05
MIN_SAMPLES = 100
NARROWEST_AT = 1_000

_MAX_GROWTH = 2.0**40  # of the number of samples; beyond it the ranking counts as never settling


@dataclass(frozen=True)
class StableRule:
    """When to stop. Raises OptionError for numbers out of range.

    alpha: probability that a verdict of "settled" is wrong, over all looks and heads.
    tolerance: heads whose means differ by less than this fraction of the average head's mean are ties. 0: no ties, so that equal
        heads never settle.
    lowest: settle only which heads are in this lowest fraction. None: the whole ranking.
    min_samples: samples that every head needs before the first verdict.
    """

    alpha: float = ALPHA
    tolerance: float = TOLERANCE
    lowest: float | None = None
    min_samples: int = MIN_SAMPLES

    def __post_init__(self) -> None:
        if not 0 < self.alpha < 1:
            raise OptionError(f"alpha must be between 0 and 1, not {self.alpha}")
        if not 0 <= self.tolerance < math.inf:
            raise OptionError(f"tolerance must be a number, 0 or more, not {self.tolerance}")
        if self.lowest is not None and not 0 < self.lowest < 1:
            raise OptionError(f"lowest must be a fraction between 0 and 1, not {self.lowest}")
        if self.min_samples < 2:
            raise OptionError(f"min_samples must be at least 2, not {self.min_samples}")


@dataclass(frozen=True)
class Verdict:
    """The result of `judge`.

    settled: True if the ranking, or the choice of the lowest heads, will not change by more than the tolerance.
    heads: number of heads ranked: all with samples.
    undecided: number of heads that may still change places with another.
    samples: samples of the head with the fewest.
    needed: estimate of how many more samples would settle it, at the present means and spreads; None if no number would, or
        there are too few samples for an estimate.
    """

    settled: bool
    heads: int
    undecided: int
    samples: int
    needed: int | None

    def __str__(self) -> str:
        if self.settled:
            return f"settled: {self.heads:,} heads, {self.samples:,} samples"
        more = "" if self.needed is None else f", about {_rounded(self.needed):,} more samples needed"
        return f"{self.undecided:,} of {self.heads:,} heads undecided{more}"


def check_token_agg(token_agg: str) -> None:
    """Raise OptionError for "token"."""
    if token_agg == "token":
        raise OptionError(
            "until_stable cannot be used with token_agg 'token': the tokens of a text are correlated, and standard errors over "
            "them too small; use 'all' or 'last'"
        )


def judge(moments: Moments, rule: StableRule) -> Verdict:
    """Judge by `rule` whether the ranking by `moments` (of any shape) has settled. Heads without samples are not ranked.

    Changes nothing. Raises OptionError if `rule.lowest` of the heads rounds to none or all of them.
    """
    ranked = moments.count > 0
    count, mean = moments.count[ranked].double(), moments.mean[ranked]
    heads = len(count)
    if heads == 0:
        return Verdict(settled=False, heads=0, undecided=0, samples=0, needed=None)
    number_of_lowest(heads, rule)  # raises early
    samples = int(count.min())
    if samples < 2:
        return Verdict(settled=False, heads=heads, undecided=heads, samples=samples, needed=None)
    std = moments.var()[ranked].sqrt()
    enough = max(1.0, rule.min_samples / samples)
    number = int(undecided(mean, std, count, rule).sum()) if enough == 1.0 else heads
    if number == 0:
        return Verdict(settled=True, heads=heads, undecided=0, samples=samples, needed=0)
    growth = _least(lambda growth: not undecided(mean, std, count * growth, rule).any(), enough)
    needed = None if growth is None else max(1, math.ceil((growth - 1) * float(count.max())))
    return Verdict(settled=False, heads=heads, undecided=number, samples=samples, needed=needed)


def number_of_lowest(heads: int, rule: StableRule) -> int | None:
    """Count the heads in the lowest fraction, as `HeadProfile.lowest` does. Raises OptionError if that is none or all."""
    if rule.lowest is None:
        return None
    number = round(rule.lowest * heads)
    if number in (0, heads):
        raise OptionError(
            f"lowest {rule.lowest} of {heads} heads is {'none' if number == 0 else 'all'} of them"
        )
    return number


def undecided(mean: Tensor, std: Tensor, count: Tensor, rule: StableRule) -> Tensor:
    """Mark the heads that may be in the wrong order with another by more than the tolerance; bool `[..., heads]`.

    `mean`, `std` (unbiased) and `count` (at least 2) are float64 `[..., heads]`; leading dimensions are separate rankings.
    """
    heads = mean.shape[-1]
    half = half_width(std, count, rule.alpha / heads)
    mean, order = mean.sort(dim=-1, stable=True)
    half = half.gather(-1, order)
    margin = rule.tolerance * mean.mean(dim=-1, keepdim=True).abs()
    lower, upper = mean - half, mean + half
    # For each head: the largest upper bound of the heads ranked below it, and the smallest lower bound of those above.
    below = torch.full_like(upper, -torch.inf)
    above = torch.full_like(lower, torch.inf)
    boundary = number_of_lowest(heads, rule)
    if boundary is None:
        below[..., 1:] = upper.cummax(dim=-1).values[..., :-1]
        above[..., :-1] = lower.flip(-1).cummin(dim=-1).values.flip(-1)[..., 1:]
    else:
        below[..., boundary:] = upper[..., :boundary].amax(dim=-1, keepdim=True)
        above[..., :boundary] = lower[..., boundary:].amin(dim=-1, keepdim=True)
    found = (upper - above > margin) | (below - lower > margin)
    return torch.zeros_like(found).scatter(-1, order, found)


def half_width(std: Tensor, count: Tensor, alpha: float) -> Tensor:
    """Half the width of an interval that covers the true mean at all counts at once, except with probability `alpha`.

    `std` (unbiased) and `count` (at least 2) are float64 of one shape. Infinite where there are too few samples.
    """
    effect = 2 * math.log(1 / alpha)
    k = 1 + count * ((effect + math.log1p(effect)) / NARROWEST_AT)
    power = (k.log() - 2 * math.log(alpha)) / count  # log A
    room = -torch.expm1(power - k.log())  # 1 - A/k
    t = ((count - 1) * torch.expm1(power) / room).sqrt()
    return torch.where(room > 0, std / count.sqrt() * t, torch.inf)


def _least(holds: Any, start: float) -> float | None:
    """Find the least number from `start` on for which `holds`, to a per cent; None above `_MAX_GROWTH`."""
    low, high = start, start
    while not holds(high):
        low, high = high, 2 * high
        if high > _MAX_GROWTH:
            return None
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rounded(number: int) -> int:
    """Round to two digits, since it is an estimate."""
    return number if number < 100 else int(float(f"{number:.1e}"))
