"""What the benchmarks share: shapes, options, interleaving, ratios, and a description of the machine."""

import contextlib
import dataclasses
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.child import Child

if TYPE_CHECKING:
    from cla_jax.config import ModelConfig
    from cla_jax.decode import Weights

HERE = Path(__file__).parent
THREADS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2

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


def random_model(
    heads: tuple[int, int, int], layers: int, kv_map: str, matmul: str = "xla"
) -> tuple["ModelConfig", "Weights"]:
    """A model of this shape in float32, with random weights; it has query heads, KV heads and head size."""
    # Contestants under torch have no jax.
    from cla_jax.config import ModelConfig
    from cla_jax.decode import random_weights

    config = ModelConfig(**shape_of(heads, layers), kv_map=kv_map, compute_dtype="float32")
    return config, random_weights(config, matmul=matmul)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """What every benchmark is asked."""

    # Threads of each contestant.
    threads: int = THREADS
    # Let malloc ask Linux for huge pages, for every contestant alike (GLIBC_TUNABLES).
    huge_pages: bool = False
    # Interpreter of the peers' rows, if they live in another environment.
    peer_python: str = sys.executable


def start(spec: dict[str, Any], options: CommonOptions) -> Child:
    """The contestant whose script is `spec["script"]`; peers may have their own Python."""
    is_ours = spec["script"].endswith("_ours.py")
    python = sys.executable if is_ours else options.peer_python
    spec = spec | {"threads": options.threads}
    return Child(python, HERE / spec["script"], spec, options.huge_pages)


@contextlib.contextmanager
def contestants(
    specs: dict[str, dict[str, Any]], options: CommonOptions
) -> Iterator[dict[str, Child]]:
    """Starts a contestant for each row, all of them with the same model, and ends them."""
    children: dict[str, Child] = {}
    try:
        for row, spec in specs.items():
            children[row] = start(spec, options)
        check_same_model(children)
        yield children
    finally:
        for child in children.values():
            child.close()


def check_same_model(children: dict[str, Child]) -> None:
    """Every row is the same model, except cla:2, which has fewer projections by design."""
    counts = {r: c.about["parameters"] for r, c in children.items() if r != "ours-cla2"}
    assert len(set(counts.values())) <= 1, f"not the same model: {counts}"


def interleave(
    children: dict[str, Child], rounds: int, burst: int, seconds: float = float("inf")
) -> dict[str, list[dict[str, Any]]]:
    """The answers of every contestant to one burst a round. No round begins after `seconds`."""
    answers: dict[str, list[dict[str, Any]]] = {row: [] for row in children}
    begin = time.perf_counter()
    for done, order in enumerate(rotations(children, rounds)):
        if done and time.perf_counter() - begin > seconds:
            break
        for row in order:
            answers[row].append(children[row].run(burst))
    return answers


def rotations(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: it rotates, so that no name always follows the same other one."""
    order = list(names)
    for _ in range(rounds):
        yield order
        order = order[1:] + order[:1]


def save(record: dict[str, Any], file: Path) -> None:
    """Writes a result as JSON; what JSON does not know, as text."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=1, default=str) + "\n")


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


def machine(threads: int = THREADS) -> dict[str, Any]:
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
