"""Cached decoding of this repository beside Hugging Face's `generate` under torch and llama.cpp, on CPU.

All continue the same number of random prompts by the same number of tokens, greedily, with the same number
of threads. No token ends a row. The models are the same decoder (MQA, SwiGLU, RoPE, tied embeddings; equal
parameter counts are asserted). They are in float32 where the row says nothing else. Every contestant is a
process of its own that is idle until asked. In a round, each in turn makes whole calls of `generate`, in an
order that rotates. So if a machine is slow for a while, it is slow for all of them. Believe the ratios; the
tokens per second belong to the machine.

The time to the first token ends when `generate` returns that token: ours to `on_tokens`, Hugging Face's to
its streamer. Decoding is what the same call does after it: batch * (new tokens - 1) / (time of the call -
time to the first token). If the prompt is not longer than what is generated, the time to the first token is
measured by a separate call for one token. `first_and_rest` in common.py says why. All times include moving
tokens to the host, making the cache, and the Python around it. The prompts are lists of ids for ours and a
tensor for theirs.

The machine must be quiet. torch's threads wait for each other after every parallel region. So another busy
process slows torch more than it slows us, which makes our ratio too good. The column `cores`
tells: on a quiet machine it is near --threads for torch. With --threads 1 nobody waits for anybody, and
the ratios hold on a machine with a core to spare.

    python -m benchmarks.decode                        the cells of HEADLINE; some minutes
    python -m benchmarks.decode --rounds 9 --shape 7m
    python -m benchmarks.decode --batch 8 32 --context 1024 --only ours ours-int8 torch
    python -m benchmarks.decode --only ours ours-cla2  no torch needed
    python -m benchmarks.decode --all                  batches 1, 8, 32 x contexts 64, 1k, 8k; hours

Rows:
    ours            the identity map, a cache in the model's dtype
    ours-cla2       kv_map cla:2: every second layer reads the keys and values of the one before
    ours-int8       the identity map, an int8 cache
    ours-kivi4      the identity map, KIVI's cache of 4 bits
    ours-bfloat16   the identity map, weights and cache in bfloat16
    ours-native     the identity map, float32; native kernels multiply with weights and read the cache
    ours-native-attention  a native kernel only reads the cache
    ours-native-matmul     a native kernel only multiplies with weights
    ours-int8-native       both native kernels, an int8 cache
    ours-bfloat16-native   both native kernels, weights and cache in bfloat16
    torch           LlamaForCausalLM.generate, eager, sdpa, the default dynamic cache
    torch-static    the same with cache_implementation="static"
    torch-compile   the same with the decode step compiled by `generate` (needs a C++ compiler)
    llama.cpp       float32 weights and cache; decode_llama_cpp.py says how to install it
    llama.cpp-bf16  bfloat16 weights, a float16 cache
    llama.cpp-q8_0  weights of 8 bits, a float16 cache

A row that fails (memory, no compiler, no torch) is named with its reason, and the others go on.
"""

import dataclasses
import itertools
import json
import statistics
import time
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.child import Child, ContestantEnded
from benchmarks.common import (
    HERE,
    SHAPES,
    CommonOptions,
    available_memory,
    check_same_model,
    cores,
    interleave,
    machine,
    ratio,
    start,
)

OURS: dict[str, Any] = {
    "script": "decode_ours.py",
    "kv_map": "identity",
    "cache": "dense",
    "dtype": "float32",
    "attention": "xla",
    "matmul": "xla",
}
NATIVE = {"attention": "native", "matmul": "native"}
TORCH: dict[str, Any] = {"script": "decode_torch.py", "static": False, "compile": False}
LLAMA_CPP: dict[str, Any] = {"script": "decode_llama_cpp.py", "weights": "F32"}
ROWS: dict[str, dict[str, Any]] = {
    "ours": OURS,
    "ours-cla2": OURS | {"kv_map": "cla:2"},
    "ours-int8": OURS | {"cache": "int8"},
    "ours-kivi4": OURS | {"cache": "kivi4"},
    "ours-bfloat16": OURS | {"dtype": "bfloat16"},
    "ours-native": OURS | NATIVE,
    "ours-native-attention": OURS | {"attention": "native"},
    "ours-native-matmul": OURS | {"matmul": "native"},
    "ours-int8-native": OURS | NATIVE | {"cache": "int8"},
    "ours-bfloat16-native": OURS | NATIVE | {"dtype": "bfloat16"},
    "torch": TORCH,
    "torch-static": TORCH | {"static": True},
    "torch-compile": TORCH | {"static": True, "compile": True},
    "llama.cpp": LLAMA_CPP,
    "llama.cpp-bf16": LLAMA_CPP | {"weights": "BF16"},
    "llama.cpp-q8_0": LLAMA_CPP | {"weights": "Q8_0"},
}

Row = Literal[
    "ours",
    "ours-cla2",
    "ours-int8",
    "ours-kivi4",
    "ours-bfloat16",
    "ours-native",
    "ours-native-attention",
    "ours-native-matmul",
    "ours-int8-native",
    "ours-bfloat16-native",
    "torch",
    "torch-static",
    "torch-compile",
    "llama.cpp",
    "llama.cpp-bf16",
    "llama.cpp-q8_0",
]
Shape = Literal["7m", "100m"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """What is measured at once: its rows alternate."""

    shape: Shape
    batch: int
    context: int
    rows: tuple[Row, ...] = ("ours", "ours-cla2", "torch", "torch-static", "torch-compile")

    @property
    def name(self) -> str:
        return f"{self.shape}, batch {self.batch}, context {self.context}"

    def prompt_tflop(self) -> float:
        """Work of filling the cache: two operations a weight and token, and causal attention."""
        shape = SHAPES[self.shape]
        heads, kv_heads = (shape[n] * shape["d_head"] for n in ("n_heads", "n_kv_heads"))
        weights = shape["d_model"] * (2 * heads + 2 * kv_heads + 3 * shape["d_ff"])
        attention = 2 * heads * self.context / 2
        tokens = self.batch * self.context
        return 2 * tokens * shape["n_layers"] * (weights + attention) / 1e12


# Beside the peer at a short context, and where the cache is what decoding reads: MQA beside MQA-CLA2.
HEADLINE = (
    Cell("7m", 1, 64),
    Cell("7m", 8, 64),
    Cell("100m", 1, 64),
    Cell("100m", 8, 64),
    Cell("7m", 1, 8192, ("ours", "ours-cla2")),
)
NEW_TOKENS = {"7m": 128, "100m": 64}  # a call's, a second or a few of decoding on two cores
LONG = 4096  # contexts from here on take so long to prefill that fewer new tokens will do
BATCHES, CONTEXTS = (1, 8, 32), (64, 1024, 8192)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    # Shapes to measure.
    shape: tuple[Shape, ...] = ("7m", "100m")
    # Batches of a grid; with neither these nor contexts, the cells of HEADLINE are measured.
    batch: tuple[int, ...] = ()
    # Contexts of a grid: tokens of every prompt.
    context: tuple[int, ...] = ()
    # The whole grid.
    all: bool = False
    # Rows to measure instead of the cell's own; see above.
    only: tuple[Row, ...] = ()
    # Calls of every contestant; the table shows their medians.
    rounds: int = 5
    # A cell's rounds end early once they have taken so many seconds.
    cell_seconds: float = 180
    # Cells whose prompts cost more are left out.
    tflop: float = 30
    # Tokens a call; 0 takes the shape's own, or 32 at long contexts.
    new_tokens: int = 0
    # Prompt tokens per step of our prefill.
    chunk: int = 256
    # Where the JSON goes, raw rounds included.
    output: Path = HERE / "results" / "decode.json"


def cells(options: Options) -> list[Cell]:
    chosen = list(HEADLINE)
    if options.all or options.batch or options.context:
        contexts, batches = options.context or CONTEXTS, options.batch or BATCHES
        chosen = [Cell(*at) for at in itertools.product(options.shape, batches, contexts)]
    chosen = [cell for cell in chosen if cell.shape in options.shape]
    return [dataclasses.replace(cell, rows=options.only or cell.rows) for cell in chosen]


def measure(cell: Cell, options: Options) -> dict[str, Any]:
    """Starts the contestants of one cell and asks them in turn; raw seconds of every call."""
    new_tokens = options.new_tokens or (NEW_TOKENS[cell.shape] if cell.context < LONG else 32)
    result: dict[str, Any] = {
        "shape": cell.shape,
        "model": SHAPES[cell.shape],
        "batch": cell.batch,
        "context": cell.context,
        "new_tokens": new_tokens,
        "rows": {},
        "failed": {},
    }
    if (tflop := cell.prompt_tflop()) > options.tflop:
        reason = f"its prompts cost {tflop:.0f} TFLOP, more than --tflop {options.tflop:g}"
        return result | {"skipped": reason}
    spec = {
        "shape": SHAPES[cell.shape],
        "batch": cell.batch,
        "context": cell.context,
        "new_tokens": new_tokens,
        "chunk": options.chunk,
    }
    children: dict[str, Child] = {}
    try:
        for row in cell.rows:
            try:
                children[row] = start(spec | ROWS[row] | available_memory(), options)
            except ContestantEnded as ended:
                result["failed"][row] = str(ended)
        check_same_model(children)
        answers = interleave(children, options.rounds, new_tokens, options.cell_seconds)
    except ContestantEnded as ended:
        return result | {"skipped": str(ended)}
    finally:
        for child in children.values():
            child.close()
    tokens = cell.batch * (new_tokens - 1)
    for row, given in answers.items():
        result["rows"][row] = {
            **children[row].about,
            "compiled_while_measured": sum(a["compiled"] for a in given),
            "seconds_per_burst": [a["seconds"] for a in given],
            "cpu_seconds_per_burst": [a["cpu_seconds"] for a in given],
            "first_token_seconds": [a["first_token_seconds"] for a in given],
            "tokens_per_s": [tokens / a["decode_seconds"] for a in given],
        }
    compare(result["rows"])
    return result


def compare(rows: dict[str, Any]) -> None:
    """Adds to every row its speeds as multiples of those of the bases that are there."""
    peers = ("torch", "torch-static", "torch-compile", "llama.cpp")
    bases = [base for base in (*peers, "ours") if base in rows]
    for values in rows.values():
        values["ratio_to"] = {
            base: {
                "decode": ratio(values["tokens_per_s"], rows[base]["tokens_per_s"]),
                # Of speeds: twice as fast is half the time.
                "first_token": ratio(
                    [1 / seconds for seconds in values["first_token_seconds"]],
                    [1 / seconds for seconds in rows[base]["first_token_seconds"]],
                ),
            }
            for base in bases
        }


def table(cell: Cell, result: dict[str, Any]) -> Table:
    rows = result["rows"]
    parameters = max((row["parameters"] for row in rows.values()), default=0)
    captions = ["x: how many times as fast, ratio of medians (range). cores: CPU time / time"]
    captions += [f"{row}: {reason}" for row, reason in result["failed"].items()]
    if recompiled := [row for row, values in rows.items() if values["compiled_while_measured"]]:
        captions.append(f"compiled while measured, do not believe: {', '.join(recompiled)}")
    shown = Table(
        title=f"{cell.name}: {parameters:,} parameters, {result['new_tokens']} new tokens",
        caption="\n".join(captions),
        caption_justify="left",
    )
    shown.add_column("row", no_wrap=True)
    shown.add_column("tokens/s", justify="right")
    bases = [base for base in ("torch", "torch-compile", "llama.cpp", "ours") if base in rows]
    for base in bases:
        shown.add_column(f"x {base}", justify="right")
    shown.add_column("1st token", justify="right")
    prefills = [base for base in bases if base != "torch-compile"]  # which prefills as torch does
    for base in prefills:
        shown.add_column(f"x {base}", justify="right")
    shown.add_column("KV MiB", justify="right")
    shown.add_column("cores", justify="right")
    for row, values in rows.items():
        cells = [f"{statistics.median(values['tokens_per_s']):,.0f}"]
        for base in bases:
            r = values["ratio_to"][base]["decode"]
            cells.append(f"{r['median']:.2f} ({r['min']:.2f}-{r['max']:.2f})")
        cells.append(f"{statistics.median(values['first_token_seconds']):.3f} s")
        cells += [f"{values['ratio_to'][base]['first_token']['median']:.2f}" for base in prefills]
        cells += [f"{values['kv_bytes'] / 2**20:.2f}", f"{cores(values):.2f}"]
        shown.add_row(row, *cells)
    for row in result["failed"]:
        shown.add_row(row, "failed")
    return shown


def main(options: Options) -> None:
    console = Console()
    console = console if console.is_terminal else Console(width=140)
    report: dict[str, Any] = {
        "what": "cached greedy decoding: whole calls of generate, all rows of a cell interleaved",
        "when": time.strftime("%Y-%m-%d"),
        "machine": machine(options.threads),
        "huge_pages": options.huge_pages,
        "chunk": options.chunk,
        "cells": [],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for cell in cells(options):
        result = measure(cell, options)
        if "skipped" in result:
            console.print(f"{cell.name}: skipped: {result['skipped']}")
        else:
            console.print(table(cell, result))
        # After every cell: the whole grid takes hours.
        report["cells"].append(result)
        options.output.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"wrote {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
