"""A decode step of requests with a common prefix: shared pages in two phases, beside no sharing.

    python -m benchmarks.prefix                                   # attention alone, then the whole step
    python -m benchmarks.prefix --batch 1 8 32 --shared 0 256 1024 --rounds 9

Rows, all of one model with random weights and random caches:

    dense        every request has a cache row of its own (`cla_jax.cache.dense`)
    paged        pages of the prefix are stored once, and every request reads them for itself: what the paper
                 calls Paged* (2402.15220, table 3)
    two-phase    pages of the prefix are stored once and read once for all requests

Contestants take turns; the table has medians and, as multiples of dense, their ratios. The last columns are
about keys and values. `bytes, dense / two-phase` is a ratio of closed forms: what a step must read. `program`
is what the compiled program reads in two phases, as a multiple of the closed form. It is the sum over the
instructions that read the pool, times how often each ran, by a trace of a run. It is empty if a kernel reads
the caches, because a trace does not say what a kernel reads.
"""
# ruff: noqa: E402 - the allocator is set up before jax is imported

from launch import allocator

allocator.set_up()

import dataclasses
import functools
import itertools
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, machine, random_model, rotations, save
from cla_jax import hlo
from cla_jax.cache import Cache, CacheSpec, cache_spec
from cla_jax.cache.bits import stored
from cla_jax.cache.prefix_shared import TILE, prefix_spec
from cla_jax.config import CacheAttention, DecodingMatmul, ModelConfig
from cla_jax.decode import decode
from cla_jax.model.attention import StepPositions
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
    # Layers of the model.
    layers: int = 4
    # Sharing map of the model.
    kv_map: str = "identity"
    # Tokens of a page.
    page: int = 64
    # What reads the caches: see `launch.generate --attention`.
    attention: CacheAttention = "xla"
    # What multiplies tokens with weights: see `launch.generate --matmul`.
    matmul: DecodingMatmul = "xla"
    # Alternating rounds.
    rounds: int = 9
    # Where the JSON goes, raw rounds included.
    output: Path = HERE / "results" / "prefix.json"


def main() -> None:
    import tyro  # not where `benchmarks.accelerator` runs

    options = tyro.cli(Options, description=__doc__)
    config, weights = random_model(options.heads, options.layers, options.kv_map, options.matmul)
    results = []
    for batch in options.batch:
        for shared in options.shared:
            caches = contestants(config, batch, shared, options)
            counted = ("dense", "two-phase") if options.attention == "xla" else ()
            program = {name: program_reads(*caches[name]) for name in counted}
            for what in ("attention", "step"):
                calls = {
                    name: (attention if what == "attention" else step)(weights, spec, cache)
                    for name, (spec, cache) in caches.items()
                }
                seconds = interleaved(calls, options.rounds)
                results.append(
                    {"what": what, "batch": batch, "shared": shared, "seconds": seconds}
                    | {"bytes": read_bytes(config, batch, shared, options.alone)}
                    | {"program": program}
                )
    show(results)
    record = {"options": vars(options) | {"output": ""}, "machine": machine(0), "results": results}
    save(record, options.output)


def contestants(
    config: ModelConfig, batch: int, shared: int, options: Any
) -> dict[str, tuple[CacheSpec, Cache]]:
    """The caches of requests with a common prefix, filled with noise.

    `options` has the fields `alone`, `attention` and `page` of `Options`.
    """
    length = shared + options.alone
    capacity = length + options.page
    sizes = {"batch": batch, "capacity": capacity, "attention": options.attention}
    dense = cache_spec(config, **sizes)
    pages = shared // options.page + batch * (capacity // options.page + 2)
    paged = prefix_spec(config, page=options.page, pages=pages, **sizes)
    tree = PrefixTree(chunk=options.page, pages=pages)
    prompts = [[*range(shared), *[10_000 + row] * options.alone] for row in range(batch)]
    paths = {row: tree.insert(prompt, new_tokens=1) for row, prompt in enumerate(prompts)}
    two_phase = paged.tables(paths, tree)
    alone = paged.empty()
    alone.starts_B[:] = 0
    for row, path in paths.items():
        private = [node.page for node in tree.path(path)]
        alone.private_BC[row, : len(private)] = private
    return {
        "dense": (dense, noise(dense.allocate(), length)),
        "paged": (paged, with_pages(noise(paged.allocate(), length), alone)),
        "two-phase": (paged, with_pages(noise(paged.allocate(), length), two_phase)),
    }


def noise(cache: Cache, length: int) -> Cache:
    keys = itertools.count()

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        x = jax.random.normal(key, shape)
        return x if dtype == jnp.float32 else stored(x, "bfloat16")  # kept as its bits

    filled = lambda a: draw(jax.random.key(next(keys)), a.shape, a.dtype)
    return dataclasses.replace(
        cache,
        kv_layers=jax.tree.map(filled, cache.kv_layers),
        lengths_B=jnp.full_like(cache.lengths_B, length),
    )


def with_pages(cache: Cache, pages: Any) -> Cache:
    return dataclasses.replace(cache, extra=jax.tree.map(jnp.asarray, pages))


def attention(_weights: Any, spec: CacheSpec, cache: Cache) -> Callable[[], Any]:
    """Attention of one layer for the newest token of every row."""
    call, q_BTKGH = attention_program(spec)
    return lambda: jax.block_until_ready(call(cache, q_BTKGH))


def attention_program(spec: CacheSpec) -> tuple[Any, jax.Array]:
    """The same as a function of a cache and of queries, and such queries."""
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
            extra=cache.extra,
        )
        return spec.attend(0, cache.kv_layers[0], q_BTKGH, here)

    return call, q_BTKGH


def program_reads(spec: CacheSpec, cache: Cache) -> int:
    """Bytes of keys and values that the compiled attention of one layer reads from its cache, on a CPU."""
    call, q_BTKGH = attention_program(spec)
    program = call.lower(cache, q_BTKGH).compile()
    each = hlo.reads(program.as_text(), "cache.kv_layers[0]")
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(program(cache, q_BTKGH))
        (found,) = Path(folder).rglob("*.xplane.pb")
        planes = jax.profiler.ProfileData.from_file(str(found)).planes
        ran = Counter(event.name for p in planes for line in p.lines for event in line.events)
    return sum(times * each[name] for name, times in ran.items() if name in each)


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
    for order in rotations(calls, rounds):
        for name in order:
            repeats = 5
            begin = time.perf_counter()
            for _ in range(repeats):
                calls[name]()
            seconds[name].append((time.perf_counter() - begin) / repeats)
    return seconds


def read_bytes(config: ModelConfig, batch: int, shared: int, alone: int) -> dict[str, int]:
    """Keys and values that one layer must read: without sharing, and in two phases."""
    token = 2 * config.n_kv_heads * config.d_head * jnp.dtype(config.compute_dtype).itemsize
    tiles = -(-batch // TILE)
    return {
        "dense": batch * (shared + alone) * token,
        "two-phase": (tiles * shared + batch * alone) * token,
    }


def show(results: list[dict[str, Any]]) -> None:
    table = Table(
        *("what", "batch", "shared", "dense, ms", "paged", "two-phase"),
        *("bytes, dense / two-phase", "program"),
    )
    for row in results:
        median = {name: statistics.median(values) for name, values in row["seconds"].items()}
        program = row["program"].get("two-phase")
        table.add_row(
            row["what"],
            str(row["batch"]),
            f"{row['shared']:,}",
            f"{1e3 * median['dense']:.2f}",
            *(f"{median['dense'] / median[name]:.2f}x" for name in ("paged", "two-phase")),
            f"{row['bytes']['dense'] / row['bytes']['two-phase']:.1f}x",
            f"{program / row['bytes']['two-phase']:.3f}" if program else "",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
