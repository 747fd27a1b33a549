"""What the benchmarks share: shapes, options, interleaving, ratios, and a description of the machine."""

import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.child import Child

HERE = Path(__file__).parent

# Architectures, named as in `cla_jax.config.ModelConfig`: MQA with tied embeddings, always float32.
SHAPES: dict[str, dict[str, int]] = {
    "7m": {
        "vocab_size": 4096,
        "n_layers": 8,
        "d_model": 256,
        "d_ff": 688,
        "n_heads": 4,
        "n_kv_heads": 1,
        "d_head": 64,
    },
    "100m": {
        "vocab_size": 32_000,
        "n_layers": 12,
        "d_model": 768,
        "d_ff": 2048,
        "n_heads": 12,
        "n_kv_heads": 1,
        "d_head": 64,
    },
}


def shape_of(heads: tuple[int, int, int], layers: int) -> dict[str, int]:
    """The fields of a model as wide as its query heads; `heads` are query heads, KV heads and head size."""
    n_heads, n_kv_heads, d_head = heads
    d_model = n_heads * d_head
    return {
        "vocab_size": 4096,
        "n_layers": layers,
        "d_model": d_model,
        "d_ff": d_model * 8 // 3,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "d_head": d_head,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every benchmark is asked."""

    # Threads of each contestant.
    threads: int = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2
    # Let malloc ask Linux for huge pages, for every contestant alike (GLIBC_TUNABLES).
    huge_pages: bool = False
    # Interpreter of the torch rows, if torch lives in another environment.
    peer_python: str = sys.executable


def start(row: str, spec: dict[str, Any], options: CommonOptions) -> Child:
    """The contestant of a row. Its script is `spec["script"]`; torch rows may have their own Python."""
    python = options.peer_python if row.startswith("torch") else sys.executable
    spec = spec | {"threads": options.threads}
    return Child(python, HERE / spec["script"], spec, options.huge_pages)


def check_same_model(children: dict[str, Child]) -> None:
    """Every row is the same model, except cla:2, which has fewer projections by design."""
    counts = {r: c.about["parameters"] for r, c in children.items() if r != "ours-cla2"}
    assert len(set(counts.values())) <= 1, f"not the same model: {counts}"


def interleave(
    children: dict[str, Child], rounds: int, burst: int, seconds: float = float("inf")
) -> dict[str, list[dict[str, Any]]]:
    """The answers of every contestant to one burst a round.

    The order rotates, so that no row always follows the same other one. No round begins after
    `seconds`.
    """
    answers: dict[str, list[dict[str, Any]]] = {row: [] for row in children}
    order = list(children)
    begin = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - begin > seconds:
            break
        for row in order:
            answers[row].append(children[row].run(burst))
        order = order[1:] + order[:1]
    return answers


def available_memory() -> dict[str, int]:
    """`{"memory": bytes}` that a contestant may take, as part of its specification; {} if unknown."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return {}
    lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return {"memory": int(0.9 * 1024 * int(lines["MemAvailable"].removesuffix("kB")))}


def first_and_rest(
    call: Callable[[int], tuple[float, float]], context: int, new_tokens: int
) -> dict[str, float]:
    """Seconds to the first token, and of all that follow.

    `call(n)` generates n tokens: the seconds until it handed over the first, and until it returned.
    """
    handed_over, whole = call(new_tokens)
    if context > new_tokens:
        # The difference of two long prefills would be more noise than signal.
        return {"first_token_seconds": handed_over, "decode_seconds": whole - handed_over}
    # Ours returns the first token while the next steps run already. All cores are busy then, so it is seen a
    # few milliseconds late. That would matter after a short prompt.
    _, first = call(1)
    return {"first_token_seconds": first, "decode_seconds": whole - first}


def ratio(speeds: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Speeds as a multiple of a base's: of the medians, and the extremes over the rounds."""
    each = [x / y for x, y in zip(speeds, base, strict=True)]
    median = statistics.median(speeds) / statistics.median(base)
    return {"median": median, "min": min(each), "max": max(each)}


def cores(values: dict[str, Any]) -> float:
    """CPU time over time of a row's bursts: near the number of threads on a quiet machine."""
    pairs = zip(values["cpu_seconds_per_burst"], values["seconds_per_burst"], strict=True)
    return statistics.median(cpu / seconds for cpu, seconds in pairs)


def machine(threads: int) -> dict[str, Any]:
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
        cpu = models[0].partition(":")[2].strip() if models else cpu
    return {
        "cpu": cpu,
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load_average": os.getloadavg(),
        "python": platform.python_version(),
    }
