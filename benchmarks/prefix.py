"""A decode step of requests with a common prefix: shared pages in two phases, beside no sharing.

    python -m benchmarks.prefix                                   # attention alone, then the whole step
    python -m benchmarks.prefix --batch 1 8 32 --shared 0 256 1024 --rounds 9

Rows, all of one model with random weights and random caches:

    dense        every request has a cache row of its own (`cla_jax.cache.dense`)
    paged        pages of the prefix are stored once, and every request reads them for itself: what the paper
                 calls Paged* (2402.15220, table 3)
    two-phase    pages of the prefix are stored once and read once for all requests

Contestants take turns; the table has medians and, as multiples of dense, their ratios. The bytes are those
that keys and values take in closed form: what a step must read.
"""
# ruff: noqa: E402 - the allocator is set up before jax is imported

from launch import allocator

allocator.set_up()

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, machine, shape_of
from cla_jax.cache import Cache, CacheSpec, cache_spec
from cla_jax.cache.prefix_shared import prefix_spec
from cla_jax.config import ModelConfig
from cla_jax.decode import decode, decoding_weights
from cla_jax.model.attention import StepPositions
from cla_jax.model.transformer import Transformer
from cla_jax.prefix_tree import PrefixTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # Requests that decode at once.
    batch: tuple[int, ...] = (8, 32)
    # Tokens of the common prefix.
    shared: tuple[int, ...] = (0, 512, 1024)
    # Tokens that a request has alone.
    alone: int = 64
    # Query heads, KV heads and head size of the model, whose width is their product.
    heads: tuple[int, int, int] = (8, 8, 64)
    layers: int = 4
    kv_map: str = "identity"
    page: int = 64
    rounds: int = 9
    # Where the JSON goes, raw rounds included.
    output: Path = HERE / "results" / "prefix.json"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    config = ModelConfig(
        **shape_of(options.heads, options.layers), kv_map=options.kv_map, compute_dtype="float32"
    )
    weights = decoding_weights(Transformer(jax.random.key(0), config))
    results = []
    for batch in options.batch:
        for shared in options.shared:
            caches = contestants(config, batch, shared, options)
            for what in ("attention", "step"):
                calls = {
                    name: (attention if what == "attention" else step)(weights, spec, cache)
                    for name, (spec, cache) in caches.items()
                }
                seconds = interleaved(calls, options.rounds)
                results.append(
                    {"what": what, "batch": batch, "shared": shared, "seconds": seconds}
                    | {"bytes": read_bytes(config, batch, shared, options.alone)}
                )
    show(results)
    record = {"options": vars(options) | {"output": ""}, "machine": machine(0), "results": results}
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1, default=str) + "\n")


def contestants(
    config: ModelConfig, batch: int, shared: int, options: Options
) -> dict[str, tuple[CacheSpec, Cache]]:
    """The caches of requests with a common prefix, filled with noise."""
    length = shared + options.alone
    capacity = length + options.page
    dense = cache_spec(config, batch=batch, capacity=capacity)
    pages = shared // options.page + batch * (capacity // options.page + 2)
    paged = prefix_spec(config, batch=batch, page=options.page, pages=pages, capacity=capacity)
    tree = PrefixTree(chunk=options.page, pages=pages)
    prompts = [[*range(shared), *[10_000 + row] * options.alone] for row in range(batch)]
    paths = {row: tree.insert(prompt, new_tokens=1) for row, prompt in enumerate(prompts)}
    two_phase = paged.tables(paths, tree)
    alone = paged.empty()
    for row, path in paths.items():
        private = [node.page for node in tree.path(path)]
        alone.private_BC[row, : len(private)] = private
    return {
        "dense": (dense, noise(dense.allocate(), length)),
        "paged": (paged, with_pages(noise(paged.allocate(), length), alone)),
        "two-phase": (paged, with_pages(noise(paged.allocate(), length), two_phase)),
    }


def noise(cache: Cache, length: int) -> Cache:
    draw = np.random.default_rng(0)
    filled = lambda a: jnp.asarray(draw.normal(size=a.shape), a.dtype)
    return dataclasses.replace(
        cache,
        kv_layers=jax.tree.map(filled, cache.kv_layers),
        lengths_B=jnp.full_like(cache.lengths_B, length),
    )


def with_pages(cache: Cache, pages: Any) -> Cache:
    return dataclasses.replace(cache, pages=jax.tree.map(jnp.asarray, pages))


def attention(_weights: Any, spec: CacheSpec, cache: Cache) -> Callable[[], Any]:
    """Attention of one layer for the newest token of every row."""
    config = spec.config
    shape = (spec.batch, 1, config.n_kv_heads, config.q_groups, config.d_head)
    q_BTKGH = jax.random.normal(jax.random.key(1), shape)

    @jax.jit
    def call(cache: Cache, q_BTKGH: jax.Array) -> jax.Array:
        newest_BT = cache.lengths_B[:, None] - 1
        here = StepPositions(
            positions_BT=newest_BT,
            starts_BT=jnp.zeros_like(newest_BT),
            lengths_B=cache.lengths_B,
            pages=cache.pages,
        )
        return spec.attend(0, cache.kv_layers[0], q_BTKGH, here)

    return lambda: jax.block_until_ready(call(cache, q_BTKGH))


def step(weights: Any, spec: CacheSpec, cache: Cache) -> Callable[[], Any]:
    """A decode step of the whole model, logits included. The newest token is written again each time."""
    tokens_BT = jnp.ones((spec.batch, 1), jnp.int32)
    counts_B = jnp.ones(spec.batch, jnp.int32)
    held = {"cache": cache}

    def run(cache: Cache) -> tuple[jax.Array, Cache]:
        lengths_B = cache.lengths_B
        before = dataclasses.replace(cache, lengths_B=lengths_B - 1)
        x_BTD, after = decode(weights, spec, before, tokens_BT, counts_B)
        return weights.logits(x_BTD, spec.rules), dataclasses.replace(after, lengths_B=lengths_B)

    program = jax.jit(run, donate_argnums=0)
    held["cache"] = jax.tree.map(jnp.copy, cache)

    def call() -> None:
        logits, held["cache"] = program(held["cache"])
        jax.block_until_ready(logits)

    return call


def interleaved(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; the order rotates."""
    for call in calls.values():
        call()  # compiles
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    for _ in range(rounds):
        for name in order:
            repeats = 5
            begin = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            seconds[name].append((time.perf_counter() - begin) / repeats)
        order = order[1:] + order[:1]
    return seconds


def read_bytes(config: ModelConfig, batch: int, shared: int, alone: int) -> dict[str, int]:
    """Keys and values that one layer must read, float32: without sharing, and in two phases."""
    token = 2 * config.n_kv_heads * config.d_head * 4
    return {
        "dense": batch * (shared + alone) * token,
        "two-phase": (shared + batch * alone) * token,
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        "what", "batch", "shared", "dense, ms", "paged", "two-phase", "bytes, dense / two-phase"
    )
    for row in results:
        median = {name: statistics.median(values) for name, values in row["seconds"].items()}
        table.add_row(
            row["what"],
            str(row["batch"]),
            f"{row['shared']:,}",
            f"{1e3 * median['dense']:.2f}",
            *(f"{median['dense'] / median[name]:.2f}x" for name in ("paged", "two-phase")),
            f"{row['bytes']['dense'] / row['bytes']['two-phase']:.1f}x",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
