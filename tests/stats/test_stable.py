"""The rule of --until-stable: its error rate on synthetic data with known means, and that it does come to an end."""

import math

import pytest
import torch

from fastheads.stats.confidence import (
    MIN_SAMPLES,
    StableRule,
    Verdict,
    check_token_agg,
    half_width,
    judge,
    undecided,
)
from fastheads.stats.moments import Moments


def at_most(rate: float, runs: int) -> float:
    """What an observed rate exceeds once in a thousand times where the true one is `rate`: by the binomial's normal limit."""
    return rate + 3.1 * math.sqrt(rate * (1 - rate) / runs)


def lognormal(sigma):
    def draw(generator, shape):
        mean = math.exp(sigma**2 / 2)
        return torch.randn(shape, generator=generator, dtype=torch.float64).mul(sigma).exp() / mean - 1

    return draw


def normal(generator, shape):
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def opposed(generator, shape):
    """Two heads of a layer whose relative samples always sum to 2: nothing is between the bound on a pair and the truth."""
    one = torch.randn(shape[:-1], generator=generator, dtype=torch.float64)
    return torch.stack([one, -one], dim=-1)


def through_common_sequences(generator, shape):
    """Heads that are correlated, as those of one model are."""
    shared = normal(generator, (*shape[:-1], 1))
    return 0.8 * shared + 0.6 * normal(generator, shape)


def missed(draw, *, alpha, first, runs=1000, samples=2000, seed=1, width=half_width):
    """The share of runs in which the interval misses the true mean, 0, at some sample size from `first` on."""
    x = draw(torch.Generator().manual_seed(seed), (runs, samples))
    n = torch.arange(1, samples + 1, dtype=torch.float64).expand_as(x)
    mean = x.cumsum(1) / n
    std = ((x.square().cumsum(1) - n * mean.square()) / (n - 1).clamp(min=1)).clamp(min=0).sqrt()
    half = width(std[:, first - 1 :], n[:, first - 1 :], alpha)
    return float((mean[:, first - 1 :].abs() > half).any(dim=1).double().mean())


def test_one_interval_holds_at_all_sample_sizes_at_once():
    for alpha in (0.2, 0.05, 0.005):
        rate = missed(normal, alpha=alpha, first=2)
        assert alpha / 10 <= rate <= at_most(alpha, 1000), rate


def test_an_ordinary_interval_does_not():
    def ordinary(std, count, alpha):
        return 1.96 * std / count.sqrt()

    assert missed(normal, alpha=0.05, first=100, width=ordinary) > 0.2


@pytest.mark.parametrize(("sigma", "bound"), [(0.5, 0.05), (1.0, 0.1)])
def test_long_tails_cost_what_the_documentation_says(sigma, bound):
    assert missed(lognormal(sigma), alpha=0.05, first=MIN_SAMPLES) <= at_most(bound, 1000)


def simulate(means, noise, rule, *, runs, looks, step=50, judged=undecided, seed=0):
    """Runs that look every `step` samples until they have settled: which verdicts were wrong, and where each stopped (or 0)."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.tensor(means, dtype=torch.float64)
    heads = len(means)
    first = torch.zeros(runs, heads, dtype=torch.float64)
    second = first.clone()
    stopped, wrong = torch.zeros(runs, dtype=torch.long), torch.zeros(runs, dtype=torch.bool)
    lowest = None if rule.lowest is None else round(rule.lowest * heads)
    for n in range(step, looks * step + 1, step):
        away = means * noise(generator, (runs, step, heads))
        first += away.sum(1)
        second += away.square().sum(1)
        if n < rule.min_samples:
            continue
        mean, count = means + first / n, torch.full_like(first, n)
        std = ((second - first.square() / n) / (n - 1)).sqrt()
        now = ~judged(mean, std, count, rule).any(-1) & (stopped == 0)
        stopped[now] = n
        true = means[mean.argsort(-1)]
        by = (
            (true.cummax(-1).values - true).amax(-1)
            if lowest is None
            else true[:, :lowest].amax(-1) - true[:, lowest:].amin(-1)
        )
        wrong |= now & (by > rule.tolerance * means.mean())
        if (stopped > 0).all():
            break
    return wrong, stopped


RAMP = [0.4 + 0.04 * head for head in range(30)]
TIES = [0.5] * 6 + [1.0] * 12 + [1.5] * 6
JUST_BEYOND = [0.97] * 12 + [1.03] * 12  # 6 % apart, where 5 % is a tie
NOISES = {
    "normal": lambda g, shape: 0.25 * normal(g, shape),
    "correlated": lambda g, shape: 0.25 * through_common_sequences(g, shape),
    "lognormal": lognormal(0.25),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("lowest", [None, 0.5])
@pytest.mark.parametrize("means", [RAMP, TIES, JUST_BEYOND], ids=["ramp", "ties", "just beyond"])
def test_wrong_verdicts_are_as_rare_as_stated_and_every_run_ends(means, lowest, noise):
    rule = StableRule(lowest=lowest)
    wrong, stopped = simulate(means, NOISES[noise], rule, runs=300, looks=90)
    assert wrong.double().mean() <= at_most(rule.alpha, 300)
    assert (stopped > 0).all()  # ties too
    assert stopped.min() >= MIN_SAMPLES


def test_where_nothing_makes_the_rule_careful_its_error_rate_holds_still():
    """Two heads, no tolerance, and a difference that only billions of samples would show: what settles is a toss of a coin."""
    means, rule = [1 - 1e-5, 1 + 1e-5], StableRule(alpha=0.2, tolerance=0)
    wrong, stopped = simulate(means, opposed, rule, runs=1000, looks=60)
    assert 0 < wrong.double().mean() <= at_most(rule.alpha, 1000)
    assert (stopped > 0).double().mean() <= at_most(rule.alpha, 1000)

    def by_two_standard_errors(mean, std, count, rule):
        sem = (std / count.sqrt()).pow(2).sum(-1, keepdim=True).sqrt()
        return (mean.diff(dim=-1).abs() <= 1.96 * sem).expand_as(mean)

    wrong, _ = simulate(means, opposed, rule, runs=1000, looks=60, judged=by_two_standard_errors)
    assert wrong.double().mean() > at_most(rule.alpha, 1000)  # what the rule is for


def test_clear_gaps_settle_at_the_first_look_and_the_lowest_sooner_than_the_ranking():
    _, stopped = simulate([0.2, 0.6, 1.2, 2.0], NOISES["normal"], StableRule(), runs=300, looks=10)
    assert (stopped == MIN_SAMPLES).double().mean() > 0.99
    _, ranking = simulate(RAMP, NOISES["normal"], StableRule(), runs=300, looks=90)
    _, lowest = simulate(RAMP, NOISES["normal"], StableRule(lowest=0.1), runs=300, looks=90)
    assert lowest.median() * 2 < ranking.median() <= 2_000


def moments(means, std, n, shape=None):
    """Moments of n samples with these means, and m2 for this standard deviation."""
    mean = torch.tensor(means, dtype=torch.float64)
    mean = mean.view(shape) if shape else mean
    count = torch.full_like(mean, n, dtype=torch.int64)
    m2 = torch.full_like(mean, std**2 * (n - 1))
    return Moments(count, torch.zeros_like(count), mean, m2, mean - std, mean + std)


def test_judge_is_the_same_rule_on_planes_of_layers_and_heads():
    flat, planes = moments(RAMP, 0.25, 300), moments(RAMP, 0.25, 300, (5, 6))
    verdict = judge(planes, StableRule())
    assert verdict == judge(flat, StableRule())
    full = [torch.full((30,), value, dtype=torch.float64) for value in (0.25, 300)]
    assert verdict.undecided == int(undecided(flat.mean, *full, StableRule()).sum()) == 30
    assert (verdict.settled, verdict.heads, verdict.samples) == (False, 30, 300)


def test_the_estimate_of_what_is_needed_is_enough_and_not_much_too_much():
    for rule in (StableRule(), StableRule(lowest=0.2), StableRule(tolerance=0.02, alpha=0.2)):
        for n in (30, 120, 500):
            verdict = judge(moments(RAMP, 0.25, n), rule)
            if verdict.settled:
                continue
            assert judge(moments(RAMP, 0.25, n + verdict.needed), rule).settled
            fewer = int(0.98 * (n + verdict.needed))
            assert fewer < MIN_SAMPLES or not judge(moments(RAMP, 0.25, fewer), rule).settled


def test_only_the_heads_in_question_are_undecided():
    close = [0.2, 0.5, 1.0, 1.01, 1.5, 1.79]
    verdict = judge(moments(close, 0.2, 400), StableRule(tolerance=0))
    assert (verdict.settled, verdict.undecided) == (False, 2)
    assert judge(moments(close, 0.2, 400), StableRule(tolerance=0, lowest=1 / 3)).settled
    assert judge(moments(close, 0.2, 400), StableRule(tolerance=0, lowest=0.5)).undecided == 2
    assert judge(moments(close, 0.2, 400), StableRule(tolerance=0.2)).settled


def test_the_margin_is_a_part_of_the_average_head():
    for scale in (1e-6, 1e6):
        values = [scale * mean for mean in RAMP]
        assert judge(moments(values, 0.25 * scale, 900), StableRule()) == judge(
            moments(RAMP, 0.25, 900), StableRule()
        )


def test_equal_heads_without_a_tolerance_never_settle():
    verdict = judge(moments([1.0, 1.0], 0.1, 1000), StableRule(tolerance=0))
    assert verdict == Verdict(settled=False, heads=2, undecided=2, samples=1000, needed=None)
    assert str(verdict) == "2 of 2 heads undecided"


def test_heads_without_samples_are_not_ranked_and_one_with_few_is_waited_for():
    some = moments([0.5, 1.0, 1.5, 0.0], 0.01, 500)
    some.count[3] = 0
    assert judge(some, StableRule()) == Verdict(settled=True, heads=3, undecided=0, samples=500, needed=0)
    some.count[2] = 50
    verdict = judge(some, StableRule())
    assert (verdict.settled, verdict.undecided, verdict.samples, verdict.needed) == (False, 3, 50, 500)
    for few in (0, 1):
        some.count[:] = few
        verdict = judge(some, StableRule())
        assert (verdict.settled, verdict.needed, verdict.heads) == (False, None, 4 * few)


def test_heads_that_never_vary_are_known():
    assert judge(moments([0.0, 1.0, 1.0, 2.0], 0.0, 100), StableRule()).settled


def test_what_cannot_be_asked_is_refused():
    for options, says in (
        ({"alpha": 0}, "alpha"),
        ({"alpha": 1}, "alpha"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"tolerance": math.nan}, "tolerance"),
        ({"lowest": 0}, "lowest"),
        ({"lowest": 1.0}, "lowest"),
        ({"min_samples": 1}, "min_samples"),
    ):
        with pytest.raises(ValueError, match=f"{says} must be"):
            StableRule(**options)
    with pytest.raises(ValueError, match=r"lowest 0.01 of 30 heads is none of them"):
        judge(moments(RAMP, 0.1, 500), StableRule(lowest=0.01))
    with pytest.raises(ValueError, match=r"'token': the tokens of a text are correlated"):
        check_token_agg("token")
    check_token_agg("all")
    check_token_agg("last")


def test_the_verdict_says_how_far_it_is():
    assert str(judge(moments(RAMP, 0.25, 300), StableRule())).startswith("30 of 30 heads undecided, about ")
    assert str(Verdict(True, 270, 0, 1200, 0)) == "settled: 270 heads, 1,200 samples"
    assert (
        str(Verdict(False, 270, 12, 400, 3456))
        == "12 of 270 heads undecided, about 3,500 more samples needed"
    )
