"""When the ranking of heads has settled: the rule of `--until-stable`.

It is asked again and again while samples come in, and a run ends as soon as it says yes. So it must hold at every look at once:
an ordinary interval of mean ± 2 standard errors, looked at often enough, misses at some time or other.

**The rule.** Each head gets a confidence sequence: an interval around its mean that covers the true mean at all sample sizes at
once, except with probability `alpha` / heads. By Bonferroni all heads' intervals [L, U] hold together, at every look, except
with probability `alpha`, however the heads depend on each other (those of one model see the same sequences). A ranking is
*settled* where, for every head a that stands below a head b,

    U_a - L_b <= tolerance * (the average head's mean).

Then no two heads stand in the wrong order that differ by more than the tolerance: an error rate of `alpha` at most. Heads that
differ by less are ties, and a tie settles too: once the intervals are narrower than half the tolerance. With `lowest`, only
pairs of one head within the lowest part and one outside are looked at: what a choice of heads to prune needs, and sooner known.

**The intervals.** For n samples with the mean m and the unbiased standard deviation s, with k = 1 + n rho² and nu = n - 1,

    A = (√k / alpha_head)^(2/n),    |mean - m| <= s/√n · √(nu (A - 1) / (1 - A/k)),    infinite where A >= k.

It inverts, by Ville's inequality, the mixture of the t statistic over normal effect sizes of standard deviation rho under the
right Haar prior of the variance, which is a martingale at the true mean: T. L. Lai, "On confidence sequences", Annals of
Statistics 4 (1976), with the normal mixture of H. Wang and A. Ramdas, "Anytime-valid t-tests and confidence sequences for
Gaussian means with unknown variance" (arXiv:2310.03722). For large n it is Robbins' normal mixture. rho only says where it is
narrowest: at about `NARROWEST_AT` samples.

**What it takes for granted.** Sequences that are independent draws of one distribution, in the order in which they are looked at:

- Not tokens of a text, which are correlated: token_agg "token" is refused. Blocks of one long text, and pieces of one document,
  are correlated too, more weakly; the intervals are then too narrow. A corpus sorted by topic settles on its first topic.
- Looks only where what was measured is a fair part of the corpus. Sequences that are sorted by length within a window of the
  corpus are one at the window's end, and not before.
- Normal samples, for the error rate to be exact at every n. For others it holds as n grows, as the central limit theorem does:
  hence `min_samples` before the first look. A long right tail costs coverage (means are too low while its rare large
  samples are not there yet). `test_stable.py` measures it: one interval at alpha 5 %, looked at after each of the samples
  100 to 4,000, misses the mean at some time in 2.9 % of the runs for normal samples, in 3 % for lognormal ones of sigma 0.5
  (skewness 1.8) and in 7.5 % for sigma 1 (skewness 6.2). A wrong verdict takes two intervals that miss in opposite ways, and was
  not seen there. Worse tails (a head that speaks once in 1,000 sequences) are beyond any rule that looks at moments.
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

_FOREVER = 2.0**40  # times the samples that there are


@dataclass(frozen=True)
class StableRule:
    """When to stop. Raises OptionError for numbers out of range.

    alpha: the probability with which a verdict of "settled" may be wrong, over all looks and heads.
    tolerance: heads whose means differ by less than this part of the average head's are ties. 0: no ties; equal heads then never
        settle.
    lowest: a fraction of the heads: only which heads are the lowest must be settled. None: the whole ranking.
    min_samples: of every head, before there is a verdict.
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
    """What `judge` found.

    settled: the ranking, or the choice of the lowest heads, will not change by more than the tolerance.
    heads: those that were ranked: all that got a sample.
    undecided: those of them that may still change places with another.
    samples: of the head that has the fewest.
    needed: about how many more samples would settle it, if means and spreads stay as they are; None where no number would, or
        nothing can be said yet.
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
    """Whether the ranking by `moments`, planes of any shape, has settled by `rule`. Heads without a sample are not ranked.

    A pure function, that can be asked at any time and any number of times. Raises OptionError where `rule.lowest` of the heads is
    none of them, or all.
    """
    ranked = moments.count > 0
    count, mean = moments.count[ranked].double(), moments.mean[ranked]
    heads = len(count)
    if heads == 0:
        return Verdict(settled=False, heads=0, undecided=0, samples=0, needed=None)
    number_of_lowest(heads, rule)  # before anything else is said
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
    """How many of so many heads the lowest ones are, as `HeadProfile.lowest` counts. Raises OptionError for none, or all."""
    if rule.lowest is None:
        return None
    number = round(rule.lowest * heads)
    if number in (0, heads):
        raise OptionError(
            f"lowest {rule.lowest} of {heads} heads is {'none' if number == 0 else 'all'} of them"
        )
    return number


def undecided(mean: Tensor, std: Tensor, count: Tensor, rule: StableRule) -> Tensor:
    """Which heads may stand in the wrong order with another by more than the tolerance; bool `[..., heads]`.

    `mean`, `std` (unbiased) and `count` (at least 2), float64 `[..., heads]`; the leading dimensions are rankings of their own.
    """
    heads = mean.shape[-1]
    half = half_width(std, count, rule.alpha / heads)
    mean, order = mean.sort(dim=-1, stable=True)
    half = half.gather(-1, order)
    margin = rule.tolerance * mean.mean(dim=-1, keepdim=True).abs()
    lower, upper = mean - half, mean + half
    # The highest end of an interval among the heads that must stand below each one, and the lowest among those above.
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
    """Of the interval around each mean that covers the true one at all counts at once, except with probability `alpha`.

    `std`, unbiased, and `count`, at least 2: float64 of one shape. Infinite where there are too few samples to say anything.
    """
    effect = 2 * math.log(1 / alpha)
    k = 1 + count * ((effect + math.log1p(effect)) / NARROWEST_AT)
    power = (k.log() - 2 * math.log(alpha)) / count  # log A
    room = -torch.expm1(power - k.log())  # 1 - A/k
    t = ((count - 1) * torch.expm1(power) / room).sqrt()
    return torch.where(room > 0, std / count.sqrt() * t, torch.inf)


def _least(holds: Any, start: float) -> float | None:
    """The least number from `start` on for which `holds`, to a per cent; None where that is beyond all use."""
    low, high = start, start
    while not holds(high):
        low, high = high, 2 * high
        if high > _FOREVER:
            return None
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _rounded(number: int) -> int:
    """To two digits: it is an estimate."""
    return number if number < 100 else int(float(f"{number:.1e}"))
