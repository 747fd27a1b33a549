"""A declared study beside its runs: which of them count, the verdicts, and what goes with them."""

import collections
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from cla_jax import costs, fields, statistics
from cla_jax.config import Config
from cla_jax.config.record import run_identity
from cla_jax.documents import Documents
from cla_jax.messages import printable
from cla_jax.report import seeds
from cla_jax.report.rows import Row, components, human
from cla_jax.runs import TRAINING
from cla_jax.study import Declared, Gain, Study, Verdict, decide

METRICS = {
    "bits_per_byte": "bits per byte",
    "perplexity": "perplexity",
    "held_out_loss": "nats per token",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the runs say of a study."""

    declared: Declared
    runs: Mapping[tuple[str, int], Row]  # that count
    verdicts: tuple[Verdict, ...]
    # Of each verdict: the crossed bootstrap over seeds and documents; None where it cannot be made.
    crossed: tuple[tuple[float, float] | None, ...]
    # Of each verdict: the mean difference of each guardrail; NaN where a run lacks it.
    guardrails: tuple[Mapping[str, float], ...]
    gains: tuple[tuple[Gain, str], ...]  # with its value and interval, or why there is none
    notes: tuple[str, ...]  # runs that do not count, and why
    diverged: frozenset[tuple[str, int]]

    def scores(self, row: str) -> list[float]:
        """The metric of a row with each seed that counts."""
        metric = self.declared.study.metric
        return [score(run, metric) for (name, _), run in sorted(self.runs.items()) if name == row]

    def state(self, row: str) -> str:
        """How far a row is: `8 of 8 seeds`, `missing`."""
        wanted, there = self.declared.study.rows[row], len(self.scores(row))
        lost = sum(name == row for name, _ in self.diverged)
        diverged = f", {lost} diverged" if lost else ""
        return f"{there} of {wanted} seeds{diverged}" if there or lost else "missing"


def examine(
    declared: Declared,
    rows: Sequence[Row],
    *,
    diverged: frozenset[str] = frozenset(),
    failed: Mapping[str, str] | None = None,
) -> Outcome:
    """Decides the claims of a study from what its runs say.

    Args:
      rows: of all run directories at hand; those of other studies are left alone.
      diverged: paths of runs that ended in a loss that is not finite.
      failed: by path, why a run failed.

    A run counts if it is finished, as it was written, and of the identity that the study declares. All runs
    must have the same data, tokenizer and held-out text: those that differ from the most are left out.
    """
    study, notes = declared.study, []
    places = {place(config.name): key for key, config in declared.trials.items()}
    runs: dict[tuple[str, int], Row] = {}
    lost: set[tuple[str, int]] = set()
    for row in rows:
        key = places.get(place(row.path))
        if key is None or row.cache:
            continue
        if row.path in diverged:
            lost.add(key)
            notes.append(f"{row.name} diverged")
        elif why := _excuse(row, declared.trials[key]) or (failed or {}).get(row.path, ""):
            notes.append(f"{row.name} does not count: {printable(why)}")
        else:
            runs[key] = row
    notes += _of_other_data(runs)
    notes += _unknown_guardrails(study, runs)
    metric = study.metric
    scores = {key: score(row, metric) for key, row in runs.items()} | dict.fromkeys(lost, math.inf)
    verdicts = decide(study, scores)
    return Outcome(
        declared=declared,
        runs=runs,
        verdicts=tuple(verdicts),
        crossed=tuple(_crossed(study, verdict, runs) for verdict in verdicts),
        guardrails=tuple(_guardrails(study, verdict, runs) for verdict in verdicts),
        gains=tuple((gain, _gain(declared, gain, scores)) for gain in study.gains),
        notes=tuple(notes),
        diverged=frozenset(lost),
    )


def counting(outcome: Outcome | None) -> frozenset[str] | None:
    """Paths of the runs that count in a study; None without a study."""
    return None if outcome is None else frozenset(row.path for row in outcome.runs.values())


def score(row: Row, metric: str) -> float:
    """A held-out metric of an evaluated run, `METRIC/NAME` that of a component; NaN where it has none."""
    metric, _, component = metric.partition("/")
    scores = row.scores
    if scores and component:
        scores = scores.components.get(component)
    if scores is None:
        return math.nan
    if metric == "held_out_loss":
        return math.log(scores.perplexity) if scores.perplexity else math.nan
    return getattr(scores, metric)


def place(path: str) -> tuple[str, ...]:
    """The sweep and the trial, by which a run is known wherever its directory was copied to."""
    return PurePosixPath(path).parts[-2:]


def _excuse(row: Row, declared: Config) -> str:
    """Why a run does not count; empty for one that does."""
    if row.altered:
        return row.altered[0]
    of_run, of_study = run_identity(row.config), run_identity(declared)
    if apart := fields.difference(of_run, of_study):
        differing = [f"its {key} is {a!r}, the study has {b!r}" for key, (a, b) in apart.items()]
        return "; ".join(differing[:3]) + ("; and others" if len(differing) > 3 else "")
    return seeds.excuse(row)


def _of_other_data(rows: dict[tuple[str, int], Row]) -> list[str]:
    """Takes out the runs whose data are not those of the most; says which, with the numbers."""
    notes = []
    for what, value in {
        "data": lambda row: row.record.get("data_fingerprint"),
        "tokenizer": lambda row: row.tokenizer[:12],
        "held-out tokens": lambda row: row.scores and row.scores.tokens,
        "held-out bytes": lambda row: row.scores and row.scores.bytes,
    }.items():
        # Older runs do not say how many tokens and bytes were scored.
        counts = collections.Counter(v for row in rows.values() if (v := value(row)) is not None)
        if len(counts) < 2:
            continue
        (usual, most), (_, second) = counts.most_common(2)
        for key in list(rows):
            here = value(rows[key])
            if here is None or (here == usual and most > second):
                continue
            others = " and ".join(f"{v} ({n} runs)" for v, n in counts.items() if v != here)
            notes.append(
                f"{rows.pop(key).name} does not count: its {what} are {here}, others have {others}"
            )
    return notes


def _unknown_guardrails(study: Study, rows: Mapping[tuple[str, int], Row]) -> list[str]:
    """The guardrails of components that no run was scored on."""
    known = components(list(rows.values()))
    return [
        f"the guardrail {name} is in no evaluation: the runs were scored on "
        f"{printable(', '.join(known)) if known else 'no components'}"
        for name in study.guardrails
        if (part := name.partition("/")[2]) and part not in known and rows
    ]


def _pairs(study: Study, verdict: Verdict, rows: Mapping[tuple[str, int], Row]):
    """The runs of each pair that a verdict is made of."""
    claim = verdict.claim
    keys = [((claim.row, s), (claim.other, s)) for s in study.seeds(claim)]
    return [(rows[a], rows[b]) for a, b in keys if a in rows and b in rows]


def _crossed(
    study: Study, verdict: Verdict, rows: Mapping[tuple[str, int], Row]
) -> tuple[float, float] | None:
    pairs = _pairs(study, verdict, rows)
    if study.metric != "bits_per_byte" or verdict.status == "not tested" or len(pairs) < 2:
        return None
    scored = [(documents_of(a), documents_of(b)) for a, b in pairs]
    if any(a is None or b is None for a, b in scored):
        return None
    (n_bytes, *others) = [one.bytes for pair in scored for one in pair if one]
    if any(not np.array_equal(n_bytes, other) for other in others):
        return None
    nll_SD = np.stack([a.nll - b.nll for a, b in scored if a and b])
    if not np.isfinite(nll_SD).all():
        return None
    return statistics.crossed_bootstrap(nll_SD, n_bytes, level=1 - study.alpha)


def documents_of(row: Row) -> Documents | None:
    """The scores of a run's held-out documents, of the evaluation that is compared; None without them."""
    evaluation = row.evaluation
    if evaluation and row.from_training:
        step, evaluation = evaluation.step, row.evaluations.get(TRAINING)
        if evaluation is None or evaluation.step != step:
            return None
    return evaluation and evaluation.scores.all_documents


def _guardrails(
    study: Study, verdict: Verdict, rows: Mapping[tuple[str, int], Row]
) -> dict[str, float]:
    pairs = _pairs(study, verdict, rows)
    return {
        name: math.fsum(score(a, name) - score(b, name) for a, b in pairs) / len(pairs)
        if pairs
        else math.nan
        for name in study.guardrails
    }


def _gain(declared: Declared, gain: Gain, scores: Mapping[tuple[str, int], float]) -> str:
    """The byte-equivalent gain and its interval, in words, or why there is none."""
    names = dict.fromkeys((*gain.ours, *gain.theirs))
    count = min(declared.study.rows[name] for name in names)
    wanted = [(name, seed) for name in names for seed in range(count)]
    missing = [key for key in wanted if not math.isfinite(scores.get(key, math.nan))]
    if missing:
        return f"not tested: {len(missing)} of {len(wanted)} runs have no finite score"
    points = lambda family: [
        (kv_bytes(declared.config(name)), [scores[name, seed] for seed in range(count)])
        for name in family
    ]
    try:
        first, other = points(gain.ours), points(gain.theirs)
        means = [[(b, float(np.mean(losses))) for b, losses in family] for family in (first, other)]
        value = statistics.byte_gain(*means)
        low, high = statistics.byte_gain_interval(first, other, level=1 - declared.study.alpha)
    except ValueError as error:
        return f"not tested: {error}"
    level = f"{1 - declared.study.alpha:.0%}"
    return f"worth {value:.2f} times the bytes ({level} interval {low:.2f} to {high:.2f}, {count} seeds)"


def kv_bytes(config: Config) -> float:
    return costs.kv_bytes(config.model, config.data.seq_len).resident


def scale(declared: Declared) -> str:
    """How large the models of a study are and how long they were trained."""
    rows = [declared.config(row) for row in declared.study.rows]
    sizes = sorted({costs.parameters(config.model).total for config in rows})
    tokens = sorted({config.steps * config.tokens_per_step for config in rows})
    span = lambda values: " to ".join(dict.fromkeys(human(v) for v in (values[0], values[-1])))
    return f"{span(sizes)} parameters and {span(tokens)} training tokens"


def sentence(outcome: Outcome, number: int) -> str:
    """A claim with its verdict, the numbers, and the scale at which it holds."""
    study, verdict = outcome.declared.study, outcome.verdicts[number]
    unit, level = METRICS[study.metric], f"{1 - study.alpha:.0%}"
    where = f"at {scale(outcome.declared)}"
    if verdict.status == "not tested":
        return f"Not tested {where}: {verdict.claim}; {verdict.reason}."
    parts = [
        f"{verdict.claim}: {verdict.status} {where}.",
        f"The mean difference over {verdict.n} paired seeds is {verdict.mean:+.4f} {unit}, {level} interval "
        f"{verdict.low:+.4f} to {verdict.high:+.4f}.",
        f"The {study.test} test gives p = {verdict.p:.4f} for the claim and {verdict.opposite_p:.4f} for its "
        f"opposite, by Holm's method over {_claims(study)}.",
    ]
    if crossed := outcome.crossed[number]:
        low, high = crossed
        parts.append(
            f"Over seeds and documents together, the interval is {low:+.4f} to {high:+.4f}."
        )
    if verdict.reason:
        parts.append(f"{verdict.reason}.")
    if verdict.excluded:
        seeds_out = ", ".join(map(str, verdict.excluded))
        parts.append(f"Seeds left out because a loss was not finite: {seeds_out}.")
    return " ".join(parts)


def _claims(study: Study) -> str:
    n = len(study.claims)
    return f"{n} claim{'s' * (n != 1)}"


HEADINGS = (
    "claim",
    "verdict",
    "difference",
    "interval",
    "seeds and documents",
    "p",
    "p of opposite",
    "pairs",
)


def lines(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of each claim."""
    guardrails = outcome.declared.study.guardrails
    made = []
    for verdict, crossed, others in zip(
        outcome.verdicts, outcome.crossed, outcome.guardrails, strict=True
    ):
        tested = verdict.status != "not tested"
        made.append(
            [
                str(verdict.claim),
                verdict.status,
                f"{verdict.mean:+.4f}" if tested else "—",
                f"{verdict.low:+.4f} to {verdict.high:+.4f}" if tested else "—",
                f"{crossed[0]:+.4f} to {crossed[1]:+.4f}" if crossed else "—",
                f"{verdict.p:.4f}" if tested else "—",
                f"{verdict.opposite_p:.4f}" if tested else "—",
                f"{verdict.n} of {outcome.declared.study.pairs(verdict.claim)}",
                *(f"{value:+.4f}" if math.isfinite(value) else "—" for value in others.values()),
            ]
        )
    return [*HEADINGS, *guardrails], made


def row_lines(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """A line for each declared row, whether it has runs or not."""
    study = outcome.declared.study
    headings = ["row", "KV bytes per token", "parameters", "learning rate", METRICS[study.metric]]
    headings += ["sd over seeds", "state"]
    made = []
    for row in study.rows:
        config, scores = outcome.declared.config(row), outcome.scores(row)
        made.append(
            [
                row,
                f"{kv_bytes(config):,.0f}",
                human(costs.parameters(config.model).total),
                # Of a row without runs, the rate may still be that of its function.
                f"{config.optimizer.peak_lr:.3g}" if scores else "—",
                f"{np.mean(scores):.4f}" if scores else "missing",
                f"{np.std(scores, ddof=1):.4f}" if len(scores) > 1 else "—",
                outcome.state(row),
            ]
        )
    return headings, made


def noise(rows: Sequence[Row], study: Study) -> list[str]:
    """What rows with three seeds or more say about the differences that this study can see, in a note."""
    n = max((study.pairs(claim) for claim in study.claims), default=0)
    seen = []
    for row in seeds.merged(rows):
        if len(row.seeds) >= 3 and n >= 2:
            sd = float(np.std([score(one, study.metric) for one in row.seeds], ddof=1))
            name = re.sub(r" \(\d+ seeds?\)$", "", row.name)
            seen.append((sd, f"{sd:.4f} ({name}, {len(row.seeds)} seeds)"))
    if not seen:
        return []
    # Without pairs in common: an upper bound for those that have them.
    detected = [
        statistics.detectable(math.sqrt(2) * sd, n, alpha=study.alpha, alternative="less")
        for sd, _ in (min(seen), max(seen))
    ]
    span = lambda *ends: " to ".join(dict.fromkeys(ends))
    return [
        f"The standard deviation over seeds, in {METRICS[study.metric]}, is "
        f"{span(min(seen)[1], max(seen)[1])}. If the two runs of a pair were independent, {n} pairs would "
        f"detect a difference of {span(*(f'{least:.4f}' for least in detected))} with a probability of 80 % "
        f"(one claim, one-sided, level {study.alpha:g})."
    ]


TABLES = ("claims", "rows", "gains")  # names of the files that `tables` are written to


def tables(outcome: Outcome) -> list[tuple[str, list[str], list[list[str]], str]]:
    """The claims and the declared rows: a title, headings, lines, and a sentence below each."""
    study, declared = outcome.declared.study, outcome.declared
    control = "none; models differ in their parameters and FLOPs"
    if study.control:
        control = (
            f"each MLP has the width that makes the {study.control} equal to those of {study.base}"
        )
    below = (
        f"Differences are in {METRICS[study.metric]}; lower is better. Scale: {scale(declared)}. The "
        f"{1 - study.alpha:.0%} intervals are a t interval over paired seeds, and a bootstrap over seeds and "
        f"documents together. Test: {study.test}, one-sided, level {study.alpha:g} for the claims together "
        f"and for their opposites together, by Holm's method over {_claims(study)}, which adjusts both p. "
        f"Control: {control}. A run is left out only if its loss is not finite. Declaration {study.digest}."
    )
    headings, claims = lines(outcome)
    rows_headings, rows = row_lines(outcome)
    made = [(f"Claims of {declared.name}", headings, claims, below)]
    made.append(
        (f"Rows of {declared.name}", rows_headings, rows, "KV bytes are resident, at 16 bits.")
    )
    if outcome.gains:
        gains = [[str(gain), told] for gain, told in outcome.gains]
        explained = (
            "How many times the bytes the second family needs for the score that the first family has in the "
            "middle of its sizes. A line is fitted to the scores of each family over log2 of the bytes. "
            "Intervals are bootstrap intervals over seeds."
        )
        made.append(("Byte-equivalent gain", ["family", "gain"], gains, explained))
    return made
