"""Our results compared with those that a paper prints, row by row, and difference by difference."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from cla_jax.report import seeds
from cla_jax.report.rows import Row

Table = tuple[str, Sequence[str], Sequence[Sequence[str]], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What a paper prints of a row."""

    kv_bytes: float
    perplexity: float | None
    # By (task, metric), as evaluations name them: a perplexity, or an accuracy as a fraction.
    scores: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
    """A difference in perplexity that a paper states: `row - other`."""

    row: str
    other: str
    value: float
    # (task, metric) of a score; None: the perplexity of the held-out text.
    score: tuple[str, str] | None = None


def tables(
    rows: Sequence[Row], printed: Mapping[str, Line], stated: Sequence[Stated]
) -> list[Table]:
    """Tables of the rows that are the paper's, known by the name in their config; none if there are none."""
    by_name = {}
    for row in seeds.merged(rows):
        name = seeds.common_name([row.record.get("name", "")]).replace("/", ".")
        if not row.cache and name in printed:
            by_name[name] = row
    if not by_name:
        return []
    measured = {
        name: row.scores.perplexity
        for name, row in by_name.items()
        if row.scores and not (seeds.excuse(row) and not row.seeds)
    }
    number = lambda value, form="{:.2f}": "missing" if value is None else form.format(value)
    lines = []
    for name, line in printed.items():
        if name not in by_name:
            continue
        row, in_paper = by_name[name], line.perplexity
        apart = None if in_paper is None or name not in measured else measured[name] - in_paper
        lines.append(
            [
                name,
                f"{row.kv_bytes:,.0f}",
                f"{line.kv_bytes:,.0f}",
                number(measured.get(name)),
                "not printed" if in_paper is None else number(in_paper),
                number(apart, "{:+.2f}"),
            ]
        )
    scored = {name: _scores(row) for name, row in by_name.items()}
    differences = []
    for one in stated:
        if one.row in by_name and one.other in by_name:
            score = one.score
            known = (
                measured
                if score is None
                else {n: s[score] for n, s in scored.items() if score in s}
            )
            both = one.row in known and one.other in known
            here = known[one.row] - known[one.other] if both else None
            apart = None if here is None else here - one.value
            of = "" if score is None else f", {score[0]}"
            cells = [f"{one.row} - {one.other}{of}", number(here, "{:+.2f}"), f"{one.value:+.2f}"]
            differences.append([*cells, number(apart, "{:+.2f}")])
    headings = ["row", "KV bytes, ours", "the paper's", "perplexity, ours", "the paper's"]
    headings.append("ours minus the paper's")
    below = (
        "The paper's perplexities are of its own validation text: compare differences, not values."
    )
    made: list[Table] = [("Compared with the paper", headings, lines, below)]
    if differences:
        headings = ["difference in perplexity", "ours", "the paper's", "ours minus the paper's"]
        made.append(("Differences compared with the paper's", headings, differences, below))
    if tasks := _task_lines(printed, scored):
        headings = ["row", "task", "metric", "ours", "the paper's", "ours minus the paper's"]
        below = "Accuracies are fractions. The means are over the seeds that were scored."
        made.append(("Tasks compared with the paper", headings, tasks, below))
    return made


def _scores(row: Row) -> dict[tuple[str, str], float]:
    """Mean over seeds of each task's metrics, by full forward of the last checkpoint."""
    values_of: dict[tuple[str, str], list[float]] = {}
    for seed in row.seeds or (row,):
        scored = seed.tasks.get("full")
        if scored is None or seed.altered or scored.step < seed.config.steps:
            continue
        for task, score in scored.tasks.items():
            for metric, value in score.metrics.items():
                values_of.setdefault((task, metric), []).append(value)
    return {key: math.fsum(values) / len(values) for key, values in values_of.items()}


def _task_lines(
    printed: Mapping[str, Line], scored: Mapping[str, Mapping[tuple[str, str], float]]
) -> list[list[str]]:
    """A line for each score that a paper prints of a row that was scored on tasks."""
    made = []
    for name, line in printed.items():
        if not scored.get(name):
            continue
        for (task, metric), in_paper in line.scores.items():
            digits = 2 if "perplexity" in metric else 4
            here = scored[name].get((task, metric))
            measured = "missing" if here is None else f"{here:.{digits}f}"
            apart = "missing" if here is None else f"{here - in_paper:+.{digits}f}"
            made.append([name, task, metric, measured, f"{in_paper:.{digits}f}", apart])
    return made
