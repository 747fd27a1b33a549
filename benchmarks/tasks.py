"""Scoring task options beside the lm-evaluation-harness's own Hugging Face backend, on CPU.

Both are asked for the same log-likelihoods, those of the first examples of each task, of the same float32
weights with the same number of threads: ours from a run directory, theirs from an export of it. Every
contestant is a process of its own that is idle until asked. Task by task, a round asks each in turn, in an
order that rotates. Times are of `loglikelihood` of the harness's model class:
tokenisation included, loading, prompts and compilation not (ours compiles in a round that does not
count).

Then it compares the answers, example by example: which option is the likeliest, and how far the
log-likelihoods are apart.

    python -m launch.convert fetch smollm2-135m
    python -m launch.convert export runs/smollm2-135m exported/smollm2-135m
    python -m launch.tasks fetch data/tasks
    python -m benchmarks.tasks runs/smollm2-135m exported/smollm2-135m

Rows:
    ours            full forward, options of a question packed beside their context
    ours-dense      cached decoding from copies of the context's cache
    torch           the harness's backend `hf`, with --peer-batch requests at once
"""

import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, CommonOptions, contestants, machine, ratio, rotations

Row = Literal["ours", "ours-dense", "torch"]
ROWS: dict[str, dict[str, Any]] = {
    "ours": {"script": "tasks_ours.py", "way": "full"},
    "ours-dense": {"script": "tasks_ours.py", "way": "dense"},
    "torch": {"script": "tasks_torch.py"},
}
CLOSE = 1e-3  # two options whose log-likelihoods are no further apart may be chosen either way


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    # The run directory.
    run: Annotated[str, tyro.conf.Positional]
    # Its export.
    exported: Annotated[str, tyro.conf.Positional]
    # Tasks, of several options each.
    tasks: tuple[str, ...] = (
        "hellaswag",
        "piqa",
        "winogrande",
        "sciq",
        "arc_easy",
        "boolq",
        "openbookqa",
    )
    # The first examples of each.
    examples: int = 200
    # Directory of the tasks' data.
    task_data: str = "data/tasks"
    # Where the run's prepared text is, if not where it was made.
    data_dir: str | None = None
    # Tokens of a text that the models read at most.
    context: int = 1024
    # Requests that theirs takes at once.
    peer_batch: int = 8
    # With 1, nothing is run beforehand: for the answers, not for the times.
    rounds: int = 3
    # Rows to measure.
    only: tuple[Row, ...] = ("ours", "torch")
    # Where the JSON goes.
    output: Path = HERE / "results" / "tasks.json"


def measure(options: Options) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """After each task: its name, what is known of each row so far, and the answers of each row to it."""
    spec = {
        "run": options.run,
        "exported": options.exported,
        "tasks": list(options.tasks),
        "examples": options.examples,
        "task_data": options.task_data,
        "data_dir": options.data_dir,
        "context": options.context,
        "batch": options.peer_batch,
    }
    with contestants({row: spec | ROWS[row] for row in options.only}, options) as children:
        rows = {row: child.about | {"seconds": {}} for row, child in children.items()}
        orders = rotations(options.only, len(options.tasks) * options.rounds)
        for i, task in enumerate(options.tasks):
            for row in options.only:
                if row.startswith("ours") and options.rounds > 1:
                    children[row].run(i)  # compiles
                rows[row]["seconds"][task] = []
            answers = {}
            for order in itertools.islice(orders, options.rounds):
                for row in order:
                    given = children[row].run(i)
                    rows[row]["seconds"][task].append(given["seconds"])
                    answers[row] = given["answers"]
            yield task, rows, answers


def questions(options: Options) -> dict[str, list[int]]:
    """How many options each example of each task has."""
    from benchmarks.tasks_common import requests

    asked = requests(dataclasses.asdict(options))
    return {
        task: [len(list(alike)) for _, alike in itertools.groupby(group, lambda each: each.doc_id)]
        for task, group in asked.items()
    }


def agreement(scored: list, reference: list, sizes: list[int]) -> dict[str, Any]:
    """How two lists of answers agree, of questions with so many options each."""
    differing, begin = [], 0
    for example, size in enumerate(sizes):
        a, b = (
            [answer[0] for answer in answers[begin : begin + size]]
            for answers in (scored, reference)
        )
        begin += size
        if a.index(max(a)) != b.index(max(b)):
            best, second, *_ = sorted(b, reverse=True)
            differing.append({"example": example, "apart": best - second})
    assert begin == len(scored) == len(reference)
    return {
        "examples": len(sizes),
        "options": len(scored),
        "choices_differ": differing,
        "choices_differ_not_close": sum(each["apart"] > CLOSE for each in differing),
        "greedy_differs": sum(a[1] != b[1] for a, b in zip(scored, reference, strict=True)),
        "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(scored, reference, strict=True)),
    }


def table(rows: dict[str, Any], agreed: dict[str, Any]) -> Table:
    tasks = list(next(iter(rows.values()))["seconds"])
    shown = Table(caption="seconds: medians. x: times as fast as torch, ratio of medians (range)")
    shown.add_column("task")
    for row in rows:
        shown.add_column(f"{row}, s", justify="right")
        if row != "torch" and "torch" in rows:
            shown.add_column("x torch", justify="right")
            shown.add_column("other choice\n(close / not)", justify="right")
            shown.add_column("largest\ndifference", justify="right")
    for task in (*tasks, "all"):
        seconds = {
            row: values["seconds"].get(task)
            or [sum(each) for each in zip(*values["seconds"].values(), strict=True)]
            for row, values in rows.items()
        }
        cells = [task]
        for row in rows:
            cells.append(f"{statistics.median(seconds[row]):.1f}")
            if row != "torch" and "torch" in rows:
                x = ratio([1 / s for s in seconds[row]], [1 / s for s in seconds["torch"]])
                cells.append(f"{x['median']:.2f} ({x['min']:.2f}-{x['max']:.2f})")
                chosen = [agreed[row][t] for t in (tasks if task == "all" else (task,))]
                other = sum(len(each["choices_differ"]) for each in chosen)
                far = sum(each["choices_differ_not_close"] for each in chosen)
                cells += [
                    f"{other - far} / {far}",
                    f"{max(e['largest_difference'] for e in chosen):.1e}",
                ]
        shown.add_row(*cells)
    return shown


def main(options: Options) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    report: dict[str, Any] = {
        "what": "log-likelihoods of the options of tasks, all contestants interleaved",
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(options.threads),
        "examples": options.examples,
        "peer_batch": options.peer_batch,
        "agreement": (agreed := {row: {} for row in options.only if row != "torch"}),
    }
    sizes = questions(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for task, rows, answers in measure(options):
        if "torch" in answers:
            for row, agreements in agreed.items():
                agreements[task] = agreement(answers[row], answers["torch"], sizes[task])
        # After every task: all of them take a while.
        options.output.write_text(json.dumps(report | {"rows": rows}, indent=1) + "\n")
        console.print(table(rows, agreed))
    console.print(f"wrote {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
