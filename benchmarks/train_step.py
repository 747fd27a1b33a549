"""Training tokens per second of this repository beside Hugging Face's Llama under torch, on CPU.

Both train the same decoder: MQA, SwiGLU, RoPE, tied embeddings, float32. Equal parameter counts are asserted.
The recipe (AdamW, clipping to a global norm, a schedule) and the number of threads are the same too. Every
contestant is a process of its own that is idle until asked. In a round, each in turn makes a few steps, in an
order that rotates. So if a machine is slow for a while, it is slow for all of them. Believe the ratios; the
tokens per second belong to the machine.

The machine must be quiet. torch's threads wait for each other after every parallel region. So another busy
process slows torch more than it slows us, which makes our ratio too good. The column `cores`
tells: on a quiet machine it is near --threads for every row.

    python -m benchmarks.train_step                          both shapes, ours both ways and torch
    python -m benchmarks.train_step --shape 7m --rounds 9
    python -m benchmarks.train_step --only ours              no torch needed
    python -m benchmarks.train_step --only ours ours-cla2 torch torch-compile
    python -m benchmarks.train_step --only ours matmul --threads 1     the share of the products

Rows:
    ours            make_step with the identity map, the default placement
    ours-unrolled   the same, layers unrolled instead of scanned (scan_layers off)
    ours-scanned    the same, layers scanned (scan_layers on)
    ours-cla2       kv_map cla:2: every second layer reads the keys and values of the one before
    torch           LlamaForCausalLM, eager, sdpa, fused AdamW
    torch-compile   the same under torch.compile (needs a C++ compiler)
    matmul          the matrix products of a step and nothing else
"""

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    HERE,
    SHAPES,
    CommonOptions,
    contestants,
    cores,
    interleave,
    machine,
    ratio,
    save,
)

BATCH = {"batch_size": 4, "seq_len": 256}
BURST = {"7m": 8, "100m": 2}  # steps of a contestant that make a few seconds on two cores

OPTIMIZER = {
    "peak_lr": 3e-4,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}

OURS: dict[str, Any] = {"script": "train_ours.py", "kv_map": "identity", "placement": {}}
TORCH: dict[str, Any] = {"script": "train_torch.py", "compile": False}
ROWS: dict[str, dict[str, Any]] = {
    "ours": OURS,
    "ours-unrolled": OURS | {"placement": {"scan_layers": False}},
    "ours-scanned": OURS | {"placement": {"scan_layers": True}},
    "ours-cla2": OURS | {"kv_map": "cla:2"},
    "torch": TORCH,
    "torch-compile": TORCH | {"compile": True},
    "matmul": {"script": "train_matmul.py"},
}

Row = Literal[
    "ours", "ours-unrolled", "ours-scanned", "ours-cla2", "torch", "torch-compile", "matmul"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    # Shapes to measure.
    shape: tuple[Literal["7m", "100m"], ...] = ("7m", "100m")
    # Rows to measure; see above.
    only: tuple[Row, ...] = ("ours", "ours-unrolled", "torch")
    # Bursts of every contestant; the table shows their medians.
    rounds: int = 7
    # Steps a burst; 0 takes the shape's own.
    burst: int = 0
    # Where the JSON goes, raw rounds included.
    output: Path = HERE / "results" / "train_step.json"


def measure(name: str, options: Options) -> dict[str, Any]:
    """Starts the contestants of one shape and asks them in turn; raw seconds of every burst."""
    burst = options.burst or BURST[name]
    spec = {
        "shape": SHAPES[name],
        **BATCH,
        "optimizer": OPTIMIZER,
        "batches": 8,
        "total_steps": 1 + (options.rounds + 1) * burst,
    }
    with contestants({row: spec | ROWS[row] for row in options.only}, options) as children:
        for child in children.values():
            child.run(1)  # the first step after compilation still pays for page faults
        answers = interleave(children, options.rounds, burst)
    tokens = BATCH["batch_size"] * BATCH["seq_len"] * burst
    return {
        "shape": SHAPES[name] | BATCH | {"burst": burst},
        "rows": {
            row: {
                "parameters": children[row].about["parameters"],
                "versions": children[row].about["versions"],
                "first_loss": children[row].about["loss"],
                "last_loss": given[-1]["loss"],
                "seconds_per_burst": [a["seconds"] for a in given],
                "cpu_seconds_per_burst": [a["cpu_seconds"] for a in given],
                "tokens_per_s": [tokens / a["seconds"] for a in given],
            }
            for row, given in answers.items()
        },
    }


def table(name: str, result: dict[str, Any], bases: list[str]) -> Table:
    rows = result["rows"]
    parameters = max(row["parameters"] for row in rows.values())
    title = f"{name}: {parameters:,} parameters, float32, batch 4 x 256"
    shown = Table(title=title, caption="cores: CPU time / time. x: ratio of medians (range)")
    shown.add_column("row")
    shown.add_column("tokens/s", justify="right")
    shown.add_column("cores", justify="right")
    for base in bases:
        shown.add_column(f"x {base}", justify="right")
    for row, values in rows.items():
        cells = [f"{statistics.median(values['tokens_per_s']):,.0f}", f"{cores(values):.2f}"]
        for base in bases:
            r = values["ratio_to"][base]
            cells.append(f"{r['median']:.2f} ({r['min']:.2f} to {r['max']:.2f})")
        shown.add_row(row, *cells)
    return shown


def main(options: Options) -> None:
    console = Console()
    results: dict[str, Any] = {}
    for name in options.shape:
        results[name] = measure(name, options)
        rows = results[name]["rows"]
        bases = [base for base in ("torch", "torch-compile", "matmul", "ours") if base in rows]
        for values in rows.values():
            speeds = values["tokens_per_s"]
            values["ratio_to"] = {base: ratio(speeds, rows[base]["tokens_per_s"]) for base in bases}
        console.print(table(name, results[name], bases))
    report = {
        "what": "training tokens per second, bursts of all rows interleaved",
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(options.threads),
        "optimizer": OPTIMIZER,
        "huge_pages": options.huge_pages,
        "shapes": results,
    }
    save(report, options.output)
    console.print(f"wrote {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
