"""What seeds can show: paired differences, their intervals and p values, and which effects are visible.

Two rows of a study that share a seed share the order of the data and the initial values of common tensors.
So they are compared seed by seed: most of this module is about the differences d_1 ... d_n of n pairs. All
of it is Python and numpy in float64. The tests compare it with scipy and statsmodels.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Alternative = Literal["two-sided", "less", "greater"]
# Above this many pairs, all sign patterns are too many to count.
EXACT_PAIRS = 20


# --------------------------------------------------------------------------------- distributions


def t_cdf(t: float, df: float) -> float:
    """P(T <= t) for Student's t with `df` degrees of freedom."""
    if math.isinf(t):
        return 1.0 if t > 0 else 0.0
    tail = 0.5 * incomplete_beta(df / (df + t * t), df / 2, 0.5)
    return 1 - tail if t > 0 else tail


@functools.lru_cache(maxsize=256)
def t_quantile(p: float, df: float) -> float:
    """The t with P(T <= t) = p. Raises ValueError unless 0 < p < 1."""
    if not 0 < p < 1:
        raise ValueError(f"a quantile needs a probability between 0 and 1, not {p}")
    if p < 0.5:
        return -t_quantile(1 - p, df)
    high = 1.0
    while t_cdf(high, df) < p:
        high *= 2
    return _root(lambda t: t_cdf(t, df) - p, 0.0, high)


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), for 0 <= x <= 1.

    The continued fraction of Numerical Recipes, section 6.4, by Lentz's method.
    """
    if not 0 <= x <= 1:
        raise ValueError(f"the incomplete beta function is defined for 0 <= x <= 1, not {x}")
    if x in (0, 1):
        return float(x)
    if x > (a + 1) / (a + b + 2):  # there the fraction converges faster for the complement
        return 1 - incomplete_beta(1 - x, b, a)
    log_front = (
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 1000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for term in (even, odd):
            d = 1 / (1 + term * d or tiny)
            c = 1 + term / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-16:
            break
    return math.exp(log_front) * fraction / a


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function is zero, by bisection to the last bit."""
    while True:
        middle = (low + high) / 2
        if middle in (low, high):
            return middle
        if f(middle) < 0:
            low = middle
        else:
            high = middle


# ------------------------------------------------------------------------------ paired differences


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paired:
    """The mean of n paired differences and what can be said of it."""

    n: int
    mean: float
    sd: float  # of the differences, n - 1 in the denominator
    low: float  # ends of the two-sided t interval
    high: float
    level: float  # of the interval
    p_t: float  # of the paired t test
    p_sign_flip: float  # of the exact sign-flip test; NaN above 20 pairs


def paired(
    differences: Sequence[float],
    *,
    alternative: Alternative = "two-sided",
    level: float = 0.95,
    shift: float = 0.0,
) -> Paired:
    """Tests whether paired differences have the mean `shift`.

    Args:
      differences: one a pair, in the units of the metric.
      alternative: `less` is the claim that the mean is below `shift`, `greater` that it is above.
      level: of the two-sided interval for the mean.
      shift: the mean under the null hypothesis: 0, or the margin of a claim of non-inferiority.

    Raises ValueError for fewer than two differences or one that is not finite.
    """
    d = np.asarray(differences, np.float64)
    if d.ndim != 1 or len(d) < 2:
        raise ValueError(f"{d.size} paired differences: a test needs at least two")
    if not np.isfinite(d).all():
        raise ValueError("a paired difference is not finite")
    n, mean, sd = len(d), float(d.mean()), float(d.std(ddof=1))
    error = sd / math.sqrt(n)
    half = t_quantile((1 + level) / 2, n - 1) * error
    distance = mean - shift
    t = distance / error if error else math.inf * distance if distance else 0.0
    below = t_cdf(t, n - 1)
    p = {"less": below, "greater": t_cdf(-t, n - 1), "two-sided": 2 * t_cdf(-abs(t), n - 1)}
    return Paired(
        n=n,
        mean=mean,
        sd=sd,
        low=mean - half,
        high=mean + half,
        level=level,
        p_t=min(p[alternative], 1.0),
        p_sign_flip=sign_flip(d - shift, alternative=alternative) if n <= EXACT_PAIRS else math.nan,
    )


def sign_flip(
    differences: Sequence[float] | np.ndarray, *, alternative: Alternative = "two-sided"
) -> float:
    """The exact p value of the sign-flip test: the share of the 2^n sign patterns at least as extreme.

    If a pair's order is arbitrary, every pattern of signs is equally likely. With n pairs no p is below
    2^-n, or 2^(1 - n) for two sides. Raises ValueError above 20 pairs.
    """
    d = np.asarray(differences, np.float64)
    if len(d) > EXACT_PAIRS:
        raise ValueError(
            f"{len(d)} pairs are too many to count sign patterns: at most {EXACT_PAIRS}"
        )
    sums = np.zeros(1)
    for value in d:
        sums = np.concatenate([sums + value, sums - value])
    # Sums of the same numbers in another order differ in the last bits.
    slack = 1e-12 * np.abs(d).sum()
    seen = d.sum()
    if alternative == "two-sided":
        extreme = np.abs(sums) >= abs(seen) - slack
    elif alternative == "less":
        extreme = sums <= seen + slack
    else:
        extreme = sums >= seen - slack
    return float(extreme.mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number by Holm's method: compare each with the study's level."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def pairs_needed(claims: int = 1, alpha: float = 0.05) -> int:
    """The fewest pairs with which the one-sided sign-flip test can support one of several claims."""
    return math.ceil(math.log2(max(claims, 1) / alpha))


# ------------------------------------------------------------------------------------------ power


def power(
    effect: float, n: int, *, alpha: float = 0.05, alternative: Alternative = "two-sided"
) -> float:
    """The chance that a paired t test with n pairs finds an effect.

    Args:
      effect: mean difference over the standard deviation of the differences.
      n: pairs.
      alpha: the level of the test.
      alternative: two-sided, or the side of the effect.
    """
    df, shift = n - 1, effect * math.sqrt(n)
    if alternative == "two-sided":
        critical = t_quantile(1 - alpha / 2, df)
        return _noncentral_above(critical, df, shift) + _noncentral_above(critical, df, -shift)
    critical = t_quantile(1 - alpha, df)
    return _noncentral_above(critical, df, shift if alternative == "greater" else -shift)


@functools.cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(400)


def _noncentral_above(t: float, df: int, shift: float) -> float:
    """P(T > t) for the noncentral t: the mean of Phi(shift - t s) over s = sqrt(chi2 / df)."""
    # Gauss-Legendre over s, where the density of s is not negligible.
    high = 1 + 14 / math.sqrt(2 * df)
    nodes, weights = _nodes()
    s, weights = (nodes + 1) * high / 2, weights * high / 2
    log_density = (
        math.log(2)
        + (df / 2) * math.log(df / 2)
        - math.lgamma(df / 2)
        + (df - 1) * np.log(s)
        - df * s * s / 2
    )
    normal = np.array([0.5 * math.erfc((t * x - shift) / math.sqrt(2)) for x in s])
    return min(float(np.sum(weights * np.exp(log_density) * normal)), 1.0)


def detectable(
    sd: float,
    n: int,
    *,
    alpha: float = 0.05,
    wanted: float = 0.8,
    alternative: Alternative = "two-sided",
) -> float:
    """The smallest mean difference that a paired t test with n pairs finds with the `wanted` chance.

    `sd` is the standard deviation of the differences, which a noise pilot measures; the result has its unit.
    """
    if n < 2:
        raise ValueError(f"{n} pairs: a test needs at least two")
    if not alpha < wanted < 1:
        raise ValueError(f"the wanted power {wanted} must lie between the level {alpha} and 1")
    side: Alternative = "two-sided" if alternative == "two-sided" else "greater"
    high = 1.0
    while power(high, n, alpha=alpha, alternative=side) < wanted:
        high *= 2
    missing = lambda effect: power(effect, n, alpha=alpha, alternative=side) - wanted
    return sd * _root(missing, 0.0, high)


# -------------------------------------------------------------------------------------- bootstrap


def crossed_bootstrap(
    nll_SD: np.ndarray,
    bytes_D: np.ndarray,
    *,
    level: float = 0.95,
    samples: int = 4000,
    seed: int = 0,
) -> tuple[float, float]:
    """An interval for a mean difference in bits per byte that resamples seeds and documents together.

    Args:
      nll_SD: differences of summed NLL in nats, one row a seed, one column a held-out document.
      bytes_D: UTF-8 bytes of each document.
      level: of the percentile interval.
      samples: bootstrap samples.
      seed: of the resampling.

    Documents alone would only say how large the held-out split is, seeds alone how noisy training is.
    """
    S, D = nll_SD.shape
    if bytes_D.shape != (D,):
        raise ValueError(f"{D} documents have scores, {bytes_D.size} have bytes")
    draw = np.random.default_rng(seed)
    seeds = draw.multinomial(S, np.full(S, 1 / S), size=samples)
    documents = draw.multinomial(D, np.full(D, 1 / D), size=samples)
    totals = np.einsum("ns,sd,nd->n", seeds, nll_SD, documents, optimize=True) / S
    values = totals / (documents @ bytes_D) / math.log(2)
    tail = (1 - level) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------- fits


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimum:
    """The best learning rate of a curve, by a parabola in its logarithm."""

    rate: float
    loss: float  # at that rate, by the parabola
    edge: Literal["", "low", "high"]  # at which end further rates have to be tried


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> Optimum:
    """Where a parabola in log(rate), fitted by least squares, has its minimum.

    Only the best point and its neighbours are fitted, two on each side at most: far from the optimum a curve
    is no parabola. A best point at an end of the rates is returned as it is, and `edge` says so. Losses that
    are not finite (runs that diverged) are left out. Raises ValueError for fewer than three that are.
    """
    points = sorted((r, y) for r, y in zip(rates, losses, strict=True) if math.isfinite(y))
    if len(points) < 3:
        raise ValueError(f"{len(points)} finite losses: finding the best rate needs at least three")
    best = min(range(len(points)), key=lambda i: points[i][1])
    rate, loss = points[best]
    if best == 0:
        return Optimum(rate=rate, loss=loss, edge="low")
    if best == len(points) - 1:
        beyond = any(r > rate for r in rates)  # these diverged: there is nothing to try
        return Optimum(rate=rate, loss=loss, edge="" if beyond else "high")
    near = points[max(best - 2, 0) : best + 3]
    x = np.log([r for r, _ in near])
    origin = x.mean()
    a, b, c = np.polyfit(x - origin, [y for _, y in near], 2)
    if a > 0:
        middle = -b / (2 * a)
        inside = points[best - 1][0] <= math.exp(origin + middle) <= points[best + 1][0]
        if inside:
            rate, loss = math.exp(origin + middle), float(c - b * b / (4 * a))
    return Optimum(rate=rate, loss=loss, edge="")


def byte_gain(family: Sequence[tuple[float, float]], other: Sequence[tuple[float, float]]) -> float:
    """How many times the bytes `other` needs for the loss of `family`: 1.7 is "worth 1.7 times the bytes".

    Each family is (bytes, loss) points, fitted by a line of loss over log2(bytes). The distance is
    horizontal, from the middle of the points of `family` to the line of `other`. Raises ValueError for a
    family without two sizes, and where the loss of `other` does not fall with its bytes.
    """
    sizes = lambda points: np.array([b for b, _ in points], np.float64)
    losses = lambda points: np.array([[loss] for _, loss in points], np.float64)
    for name, points in (("family", family), ("other family", other)):
        if len(set(sizes(points))) < 2:
            raise ValueError(f"the {name} has only one size: a fit needs two")
    (gain,) = _byte_gains(sizes(family), losses(family), sizes(other), losses(other))
    if math.isinf(gain):
        raise ValueError("the loss of the other family does not decrease with its bytes")
    return float(gain)


def _byte_gains(
    bytes_N: np.ndarray, losses_NR: np.ndarray, other_M: np.ndarray, losses_MR: np.ndarray
) -> np.ndarray:
    """`byte_gain` for R sets of losses; infinite if the other family's loss does not fall with its bytes."""
    x = np.log2(bytes_N)
    middle = (x.min() + x.max()) / 2
    slope_R, intercept_R = np.polyfit(x, losses_NR, 1)
    loss_R = slope_R * middle + intercept_R
    slope_R, intercept_R = np.polyfit(np.log2(other_M), losses_MR, 1)
    falls_R = slope_R < 0
    gain_R = 2 ** ((loss_R - intercept_R) / np.where(falls_R, slope_R, -1) - middle)
    return np.where(falls_R, gain_R, np.inf)


def byte_gain_interval(
    family: Sequence[tuple[float, Sequence[float]]],
    other: Sequence[tuple[float, Sequence[float]]],
    *,
    level: float = 0.95,
) -> tuple[float, float]:
    """A bootstrap interval for `byte_gain` over seeds: (bytes, losses by seed) points, the same seeds in all.

    If the line of `other` does not fall with its bytes in a resample, no number of bytes reaches that loss.
    The gain of that resample is then infinite. Raises ValueError as `byte_gain` does, for the means over all
    seeds.
    """
    counts = {len(losses) for _, losses in itertools.chain(family, other)}
    if len(counts) != 1:
        raise ValueError(
            f"rows have {sorted(counts)} seeds: paired tests need the same seeds in each row"
        )
    (n,) = counts
    mean = lambda points: [(b, float(np.mean(losses))) for b, losses in points]
    byte_gain(mean(family), mean(other))
    share_RS, chance_R = _resamples(n)
    sizes = lambda points: np.array([b for b, _ in points], np.float64)
    means = lambda points: np.array([losses for _, losses in points]) @ share_RS.T
    gain_R = _byte_gains(sizes(family), means(family), sizes(other), means(other))
    order = np.argsort(gain_R)
    below = np.cumsum(chance_R[order])
    tail = (1 - level) / 2
    low, high = (gain_R[order[np.searchsorted(below, q - 1e-12)]] for q in (tail, 1 - tail))
    return float(low), float(high)


@functools.cache
def _resamples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """What share each of n seeds has in a bootstrap resample, [R, S], and the chance of the resample.

    All resamples of up to 10 seeds, so that an interval has no noise of its own; 100,000 drawn ones of more.
    """
    if n > 10:
        drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=100_000)
        return drawn / n, np.full(len(drawn), 1 / len(drawn))
    chosen = np.array(list(itertools.combinations_with_replacement(range(n), n)))
    times_RS = (chosen[:, :, None] == np.arange(n)).sum(1)
    factorial = np.array([math.factorial(k) for k in range(n + 1)], np.float64)
    return times_RS / n, factorial[n] / factorial[times_RS].prod(1) / float(n) ** n
