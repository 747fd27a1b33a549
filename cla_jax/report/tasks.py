"""Scores of downstream tasks, as a table: a line for a run, and for each cache it was scored through."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from cla_jax.evaluation import TaskScore
from cla_jax.messages import printable
from cla_jax.report.rows import Row

Scores = Mapping[str, TaskScore]  # by task

# The first of them that a task has is what is compared.
METRICS = ("acc_norm", "acc", "exact_match", "f1", "bits_per_byte", "perplexity")
CAPTION = (
    "Scores of the lm-evaluation-harness, ± standard error, by a full forward pass unless the row names "
    "a cache."
)


def scores(rows: Sequence[Row]) -> list[tuple[str, Scores]]:
    """(label, scores) of each eval/tasks-*.json of the runs."""
    results = []
    for row in rows:
        if row.cache:  # the run's own row has the files of all caches
            continue
        for cache, scored in sorted(row.tasks.items()):
            label = row.name if cache == "full" else f"{row.name}, {cache}"
            if scored.step < row.config.steps and "origin" not in row.record:
                label += f"  step {scored.step:,}/{row.config.steps:,}"
            results.append((label, scored.tasks))
    return results


def lines(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headings, and the cells of each line below them; no line where no run was scored."""
    scored = scores(rows)
    metrics = {
        task: next((name for name in METRICS if name in score.metrics), "")
        for _, tasks in scored
        for task, score in tasks.items()
    }
    shown = {task: metric for task, metric in sorted(metrics.items()) if metric}
    headings = [
        "run",
        *(f"{printable(task)}\n{metric}" for task, metric in shown.items()),
    ]
    return headings, [
        [
            printable(label),
            *(_cell(tasks.get(task), metric) for task, metric in shown.items()),
        ]
        for label, tasks in scored
    ]


def _cell(score: TaskScore | None, metric: str) -> str:
    if score is None or metric not in score.metrics:
        return "—"
    error = score.metrics.get(f"{metric}_stderr")
    return f"{score.metrics[metric]:.4f}" + (f" ± {error:.4f}" if error else "")


def table(rows: Sequence[Row]) -> Table | None:
    """The scores for a terminal; None where no run was scored."""
    headings, body = lines(rows)
    if not body:
        return None
    made = Table(caption=Text(CAPTION), caption_justify="left")
    for i, heading in enumerate(headings):
        made.add_column(Text(heading), justify="right" if i else "left", overflow="fold")
    for cells in body:
        made.add_row(*map(Text, cells))
    return made


def notes(rows: Sequence[Row]) -> list[str]:
    """Tasks whose scores are not of the same questions, asked alike."""
    asked: dict[str, set[Any]] = {}
    for _, tasks in scores(rows):
        for task, score in tasks.items():
            how = (score.n, score.split, score.shots, score.version)
            asked.setdefault(task, set()).add(how)
    return [
        f"{task}: the scores are not comparable, because (examples, split, shots, version) differ: "
        + " and ".join(map(str, sorted(ways, key=str)))
        for task, ways in asked.items()
        if len(ways) > 1
    ]
