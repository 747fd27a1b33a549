"""A study that is declared before it is run: its rows, its seeds, its claims, and how they are decided.

    STUDY = Study(
        rows={"mqa": 8, "cla2": 8},
        claims=(Claim("cla2", "mqa", margin=0.01),),
    )

A declaration is data. Its digest stands in every report that is made from it, so a claim that was changed
after the runs is seen. `decide` turns held-out scores into one of four verdicts for each claim.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from cla_jax import statistics
from cla_jax.config import Config
from cla_jax.messages import near_choice
from cla_jax.statistics import Alternative

Status = Literal["supported", "contradicted", "inconclusive", "not tested"]
Test = Literal["sign-flip", "t"]
Metric = Literal["bits_per_byte", "perplexity", "held_out_loss"]
Control = Literal["", "parameters", "flops"]


@dataclasses.dataclass(frozen=True)
class Claim:
    """A row is better than another one, or no worse by more than a margin.

    The claim is about the mean difference `row - other` of the study's metric, over paired seeds.
    """

    row: str
    other: str
    # 0: `row` is better. Above 0: `row` is no worse than `other` by more than that, in units of the metric.
    margin: float = 0.0
    # The seeds that decide it; None: all that both rows have.
    seeds: tuple[int, ...] | None = None

    def __str__(self) -> str:
        if not self.margin:
            return f"{self.row} is better than {self.other}"
        return f"{self.row} is no worse than {self.other} by more than {self.margin:g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
    """What a family of rows is worth in bytes of another family: see `statistics.byte_gain`."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' and '.join(self.ours)}, in bytes of {' and '.join(self.theirs)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Study:
    """What is run and what is decided from it; less of the metric is better.

    Raises ValueError for a claim about a row, a metric or a seed that is not there, and for fewer seeds than
    the test needs.
    """

    # Seeds of each row: n stands for seeds 0 to n - 1.
    rows: Mapping[str, int]
    claims: tuple[Claim, ...]
    # A held-out metric of training.
    metric: Metric = "bits_per_byte"
    # One-sided level of the study, for support and for contradiction each: p values are adjusted for the
    # number of claims by Holm's method.
    alpha: float = 0.05
    test: Test = "sign-flip"
    # Metrics that are reported beside each verdict and decide nothing. Of a component of a mixture:
    # `bits_per_byte/NAME`.
    guardrails: tuple[str, ...] = ()
    # Families of rows whose horizontal distance is reported.
    gains: tuple[Gain, ...] = ()
    # A control: every row has an MLP as wide as makes its parameters, or its FLOPs per token, those of
    # `base`.
    control: Control = ""
    base: str = ""

    def __post_init__(self):
        near_choice("metric", self.metric, get_args(Metric))
        near_choice("test", self.test, get_args(Test))
        near_choice("control", self.control, get_args(Control))
        for guardrail in self.guardrails:
            near_choice("guardrail", guardrail.partition("/")[0], get_args(Metric))
        if bool(self.control) != bool(self.base):
            raise ValueError(
                f"control = {self.control!r} and base = {self.base!r}: give both or none"
            )
        if self.base:
            near_choice("row in base:", self.base, self.rows)
        for row, seeds in self.rows.items():
            if seeds < 1:
                raise ValueError(f"the row {row} has {seeds} seeds, but needs at least one")
        for gain in self.gains:
            for name in (*gain.ours, *gain.theirs):
                near_choice("row in a gain:", name, self.rows)
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha = {self.alpha} must lie between 0 and 1")
        for claim in self.claims:
            for name in (claim.row, claim.other):
                near_choice(f"row in the claim {str(claim)!r}:", name, self.rows)
            most = min(self.rows[claim.row], self.rows[claim.other])
            for seed in claim.seeds or ():
                if not 0 <= seed < most:
                    raise ValueError(
                        f"the claim {str(claim)!r} names seed {seed}: both rows have seeds 0 to {most - 1}"
                    )
            if len(set(claim.seeds or ())) < len(claim.seeds or ()):
                raise ValueError(f"the claim {str(claim)!r} names a seed twice: {claim.seeds}")
            if claim.row == claim.other:
                raise ValueError(f"the claim {str(claim)!r} compares a row with itself")
            if not 0 <= claim.margin < math.inf:
                raise ValueError(
                    f"the margin of the claim {str(claim)!r} must be 0 or a positive number"
                )
            n, most = self.pairs(claim), statistics.EXACT_PAIRS
            if self.test == "sign-flip" and n > most:
                raise ValueError(
                    f"{n} seeds: the sign-flip test supports at most {most}; for more, use test='t'"
                )
            if n < self.needed:
                raise ValueError(
                    f"the claim {str(claim)!r} has {n} paired seeds; the {self.test} test needs "
                    f"{self.needed} to decide {len(self.claims)} claim{'s' * (len(self.claims) > 1)} at "
                    f"level {self.alpha:g}"
                )

    def seeds(self, claim: Claim) -> Sequence[int]:
        """The seeds that decide a claim."""
        if claim.seeds is not None:
            return claim.seeds
        return range(min(self.rows[claim.row], self.rows[claim.other]))

    def pairs(self, claim: Claim) -> int:
        """How many seeds decide a claim."""
        return len(self.seeds(claim))

    @property
    def needed(self) -> int:
        """The fewest pairs with which a claim can be supported, whatever the effect."""
        if self.test == "t":
            return 2
        return statistics.pairs_needed(len(self.claims), self.alpha)

    @property
    def digest(self) -> str:
        """Names the declaration: another word, seed or margin gives another digest."""
        fields = dataclasses.asdict(self) | {"rows": sorted(self.rows.items())}
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Declared:
    """A study, and the run that each of its rows should have with each seed."""

    name: str
    study: Study
    trials: Mapping[tuple[str, int], Config]

    def config(self, row: str) -> Config:
        return self.trials[row, 0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the runs say of a claim; differences are `row - other`, in units of the metric."""

    claim: Claim
    status: Status
    reason: str = ""  # why it was not tested, or not decided
    n: int = 0  # pairs used
    mean: float = math.nan
    # Ends of the two-sided t interval of level 1 - alpha; it is not adjusted for the number of claims.
    low: float = math.nan
    high: float = math.nan
    # Of the claim and of its opposite, one-sided, each adjusted for the number of claims.
    p: float = math.nan
    opposite_p: float = math.nan
    excluded: tuple[int, ...] = ()  # seeds of which a score was not finite


def decide(study: Study, scores: Mapping[tuple[str, int], float]) -> list[Verdict]:
    """The verdict on every claim of a study.

    Args:
      study: as it was declared.
      scores: the metric by (row, seed). A score that is not finite is of a run that diverged. A missing score
        is of a run that is not there: the claim is not tested.

    Pairs in which a run diverged are left out and named, but they never help the row that diverged. If `row`
    diverged more often than `other`, the claim is not supported. In the opposite case it is not contradicted.
    A claim is supported if the one-sided test says so, and contradicted if the test of the opposite says so.
    Both are at the level of the study after Holm's adjustment. Otherwise the claim is inconclusive.
    """
    verdicts: list[Verdict | None] = []
    tested: list[_Tested] = []
    for claim in study.claims:
        seeds = study.seeds(claim)
        missing = [
            f"{row} seed {seed}"
            for row in (claim.row, claim.other)
            for seed in seeds
            if (row, seed) not in scores
        ]
        pairs = {s: (scores.get((claim.row, s)), scores.get((claim.other, s))) for s in seeds}
        whole = {s: (a, b) for s, (a, b) in pairs.items() if a is not None and b is not None}
        finite = {s: a - b for s, (a, b) in whole.items() if math.isfinite(a - b)}
        excluded = tuple(s for s in whole if s not in finite)
        if missing:
            shown = ", ".join(missing[:3]) + (" and others" if len(missing) > 3 else "")
            reason = f"{len(missing)} of {2 * len(seeds)} runs are missing: {shown}"
        elif len(finite) < study.needed:
            reason = f"only {len(finite)} pairs have finite scores; the test needs {study.needed}"
        else:
            verdicts.append(None)
            diverged = {
                row: sum(not math.isfinite(pair[side]) for pair in whole.values())
                for side, row in enumerate((claim.row, claim.other))
            }
            tested.append((claim, excluded, list(finite.values()), diverged))
            continue
        verdicts.append(Verdict(claim=claim, status="not tested", reason=reason, excluded=excluded))
    decided = iter(_decided(study, tested))
    return [verdict or next(decided) for verdict in verdicts]


# A claim, the seeds left out, the differences, and with how many seeds each of its rows diverged.
_Tested = tuple[Claim, tuple[int, ...], list[float], dict[str, int]]


def _decided(study: Study, tested: list[_Tested]) -> list[Verdict]:
    # Claims that could not be tested still count: their number was declared.
    padding = [1.0] * (len(study.claims) - len(tested))
    adjusted = {}
    for side in ("less", "greater"):
        raw = [_p(study.test, d, side, claim.margin) for claim, _, d, _ in tested]
        adjusted[side] = statistics.holm([*raw, *padding])[: len(tested)]
    verdicts = []
    for i, (claim, excluded, differences, diverged) in enumerate(tested):
        summary = statistics.paired(differences, level=1 - study.alpha)
        supports, contradicts = adjusted["less"][i], adjusted["greater"][i]
        status: Status = "inconclusive"
        reason, winner = "", ""
        if supports <= study.alpha:
            status, winner, loser = "supported", claim.row, claim.other
        elif contradicts <= study.alpha:
            status, winner, loser = "contradicted", claim.other, claim.row
        if winner and diverged[winner] > diverged[loser]:
            status = "inconclusive"
            reason = (
                f"{winner} diverged with {diverged[winner]} seeds, {loser} with {diverged[loser]}"
            )
        verdicts.append(
            Verdict(
                claim=claim,
                status=status,
                reason=reason,
                n=summary.n,
                mean=summary.mean,
                low=summary.low,
                high=summary.high,
                p=supports,
                opposite_p=contradicts,
                excluded=excluded,
            )
        )
    return verdicts


def _p(test: Test, differences: list[float], side: Alternative, margin: float) -> float:
    result = statistics.paired(differences, alternative=side, shift=margin)
    return result.p_sign_flip if test == "sign-flip" else result.p_t
