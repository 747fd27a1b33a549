"""Paired statistics beside scipy and statsmodels, and studies with known effects."""

import itertools
import math

import numpy as np
import pytest
from scipy import special, stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from cla_jax import statistics

SIDES = ("two-sided", "less", "greater")


def close(ours, theirs):
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_distributions_equal_scipys():
    draw = np.random.default_rng(0)
    for _ in range(300):
        x, a, b = draw.uniform(0, 1), *np.exp(draw.uniform(-2, 5, 2))
        close(statistics.incomplete_beta(x, a, b), special.betainc(a, b, x))
        t, df = draw.normal() * 5, int(draw.integers(1, 60))
        close(statistics.t_cdf(t, df), stats.t.cdf(t, df))
        p = draw.uniform(1e-4, 1 - 1e-4)
        assert statistics.t_quantile(p, df) == pytest.approx(stats.t.ppf(p, df), rel=1e-9, abs=1e-9)
    assert statistics.t_cdf(math.inf, 3) == 1
    with pytest.raises(ValueError, match="between 0 and 1"):
        statistics.t_quantile(1.0, 3)


@pytest.mark.parametrize("side", SIDES)
def test_paired_differences_equal_scipys(side):
    draw = np.random.default_rng(1)
    for _ in range(20):
        n, shift = int(draw.integers(2, 12)), draw.normal()
        d = draw.normal(draw.normal(), draw.uniform(0.1, 3), n)
        ours = statistics.paired(d, alternative=side, level=0.9, shift=shift)
        close(ours.p_t, stats.ttest_1samp(d, shift, alternative=side).pvalue)
        interval = stats.ttest_1samp(d, 0).confidence_interval(0.9)
        close((ours.low, ours.high), (interval.low, interval.high))
        close((ours.n, ours.mean, ours.sd), (n, d.mean(), d.std(ddof=1)))
        flipped = stats.permutation_test(
            (d - shift,),
            np.mean,
            permutation_type="samples",
            alternative=side,
            n_resamples=np.inf,
        )
        close(ours.p_sign_flip, flipped.pvalue)


def test_the_least_p_of_the_sign_flip_test_is_reached():
    for n, side in itertools.product(range(2, 10), SIDES):
        d = np.arange(1.0, n + 1) * (-1 if side == "less" else 1)
        assert statistics.sign_flip(d, alternative=side) == 2.0 ** ((side == "two-sided") - n)
    # Equal differences are as extreme as themselves whatever the rounding of their sums.
    assert statistics.sign_flip([0.1, 0.2, 0.3], alternative="greater") == 1 / 8


def test_what_cannot_be_tested_is_refused():
    for d, message in (
        ([1.0], "1 paired differences"),
        ([1.0, math.nan], "not finite"),
        ([1.0, math.inf], "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            statistics.paired(d)
    with pytest.raises(ValueError, match="at most 20"):
        statistics.sign_flip(np.ones(21))
    same = statistics.paired([0.5, 0.5, 0.5])
    assert (same.p_t, same.low, same.high) == (0, 0.5, 0.5)
    assert statistics.paired([0.0, 0.0]).p_t == 1


def test_holm_equals_statsmodels():
    draw = np.random.default_rng(2)
    for n in range(1, 9):
        p = draw.uniform(0, 1, n) ** 3
        close(statistics.holm(p), multipletests(p, method="holm")[1])


@pytest.mark.parametrize("side", ["two-sided", "greater"])
def test_power_equals_statsmodels(side):
    theirs = TTestPower()
    names = {"two-sided": "two-sided", "greater": "larger"}
    for effect, n, alpha in itertools.product((0.0, 0.3, 1.0, 2.5), (3, 5, 8, 20), (0.05, 0.0125)):
        expected = theirs.power(effect, n, alpha, alternative=names[side])
        if math.isnan(expected):  # scipy gives up where the power is 1 to all digits
            expected = 1.0
        ours = statistics.power(effect, n, alpha=alpha, alternative=side)
        assert ours == pytest.approx(expected, abs=1e-9)
        lower = statistics.power(-effect, n, alpha=alpha, alternative="less")
        assert lower == statistics.power(effect, n, alpha=alpha, alternative="greater")
    for n in (3, 8):
        effect = statistics.detectable(2.0, n, alpha=0.01, wanted=0.7, alternative=side) / 2
        found = theirs.power(effect, n, 0.01, alternative=names[side])
        assert found == pytest.approx(0.7, abs=1e-9)


def test_simulated_studies_have_the_nominal_errors_and_power():
    """Eight paired seeds, as a study has: no effect, and one of 1.5 standard deviations."""
    draw = np.random.default_rng(3)
    trials, n = 1500, 8
    noise = draw.normal(size=(trials, n))
    for effect in (0.0, 1.5):
        found = [statistics.paired(d + effect, alternative="greater") for d in noise]
        expected = statistics.power(effect, n, alternative="greater") if effect else 0.05
        rate = np.mean([x.p_t < 0.05 for x in found])
        assert rate == pytest.approx(
            expected, abs=3.5 * math.sqrt(0.25 / trials if effect else 0.05 * 0.95 / trials)
        )
        flip = np.mean([x.p_sign_flip <= 0.05 for x in found])
        # 12 of 256 patterns: the largest attainable level not above 0.05.
        low, high = (12 / 256, 12 / 256) if not effect else (0.9, 1.0)
        assert low - 0.02 < flip < high + 0.02
        covered = np.mean([x.low <= effect <= x.high for x in found])
        assert covered == pytest.approx(0.95, abs=0.02)


def test_a_family_of_claims_is_wrong_no_more_often_than_its_level():
    draw = np.random.default_rng(4)
    wrong = [
        min(statistics.holm([statistics.paired(d).p_t for d in draw.normal(size=(4, 8))])) < 0.05
        for _ in range(400)
    ]
    assert 0.02 < np.mean(wrong) < 0.08


def test_the_crossed_bootstrap_covers_seeds_and_documents():
    """Over simulated studies, the interval holds the true difference about as often as it says."""
    draw = np.random.default_rng(5)
    S, D, covered, truth = 8, 40, [], -0.01
    for _ in range(80):
        sizes = draw.integers(500, 5000, D).astype(float)
        bits = truth + draw.normal(0, 0.01, (S, 1)) + draw.normal(0, 0.03, (1, D))
        low, high = statistics.crossed_bootstrap(
            bits * sizes * math.log(2), sizes, samples=400, seed=1
        )
        covered.append(low <= truth <= high)
    # A percentile interval over eight seeds is a little short.
    assert 0.84 < np.mean(covered) < 0.99
    with pytest.raises(ValueError, match="40 documents have scores, 39 have bytes"):
        statistics.crossed_bootstrap(bits, sizes[:39])


def test_the_best_rate_is_the_vertex_of_the_parabola():
    rates = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
    losses = [2 + 0.1 * (math.log(r) - math.log(5e-3)) ** 2 for r in rates]
    best = statistics.best_rate(rates, losses)
    assert (best.rate, best.loss) == (pytest.approx(5e-3), pytest.approx(2))
    assert best.edge == ""
    shuffled = statistics.best_rate(rates[::-1], losses[::-1])
    assert shuffled == best
    assert statistics.best_rate(rates[:3], losses[:3]).edge == "high"
    assert statistics.best_rate([*rates[3:], 3.2e-2], [*losses[3:], 9.0]).edge == "low"
    assert (
        statistics.best_rate(rates[:4], [4, 3, 2, math.inf]).edge == ""
    )  # what is higher diverges
    diverged = statistics.best_rate([*rates, 1.0], [*losses, math.inf])
    assert diverged == best
    with pytest.raises(ValueError, match="2 finite losses"):
        statistics.best_rate([1, 2, 3], [1, math.nan, 2])


def test_the_interval_of_the_byte_gain_counts_every_resample():
    """An interval of 2,000 drawn resamples moved by a tenth of itself with the seed of the drawing."""
    draw = np.random.default_rng(4)
    make = lambda *points: [(b, list(loss + draw.normal(0, 0.02, 4))) for b, loss in points]
    family, other = make((256, 2.2), (512, 2.1)), make((256, 2.25), (512, 2.15))
    gains = []
    for chosen in itertools.product(range(4), repeat=4):
        mean = lambda family, chosen=chosen: [
            (b, float(np.mean([losses[i] for i in chosen]))) for b, losses in family
        ]
        try:
            gains.append(statistics.byte_gain(mean(family), mean(other)))
        except ValueError:
            gains.append(math.inf)
    for level in (0.9, 0.95):
        low, high = statistics.byte_gain_interval(family, other, level=level)
        tail = (1 - level) / 2
        expected = np.quantile(gains, [tail, 1 - tail], method="inverted_cdf")
        assert (low, high) == pytest.approx(tuple(expected), rel=1e-9)
    for n in (1, 3, 8, 11):
        shares, chances = statistics._resamples(n)
        assert chances.sum() == pytest.approx(1)
        assert shares.sum(1) == pytest.approx(1)
        assert chances @ shares == pytest.approx(np.full(n, 1 / n), abs=2e-3)


def test_the_byte_gain_is_the_horizontal_distance():
    other = [(256, 2.3), (512, 2.2), (1024, 2.1)]
    family = [(b / 1.7, loss) for b, loss in other]
    assert statistics.byte_gain(family, other) == pytest.approx(1.7)
    assert statistics.byte_gain(other, other) == pytest.approx(1)
    with pytest.raises(ValueError, match="the family has only one size"):
        statistics.byte_gain(family[:1], other)
    with pytest.raises(ValueError, match="other family does not decrease"):
        statistics.byte_gain(family, [(256, 2.1), (512, 2.2)])
    draw = np.random.default_rng(6)
    seeds = lambda points: [(b, loss + draw.normal(0, 0.005, 8)) for b, loss in points]
    low, high = statistics.byte_gain_interval(seeds(family), seeds(other))
    assert 1.5 < low < 1.7 < high < 1.9
    with pytest.raises(ValueError, match="other family does not decrease"):
        statistics.byte_gain_interval(seeds(family), [*seeds(other)[::-1][:1], (2048, [3.0] * 8)])
    with pytest.raises(ValueError, match="wanted power"):
        statistics.detectable(1.0, 8, wanted=1.1)
    with pytest.raises(ValueError, match="same seeds"):
        statistics.byte_gain_interval([(1, [1.0]), (2, [0.5])], seeds(other))
