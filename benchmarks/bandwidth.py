"""How fast cached decoding is, and how fast the memory that it reads: what two benchmarks measure."""

import statistics
import time
from collections.abc import Callable
from typing import Any

# isort: off
from benchmarks.decode_ours import timed  # sets the allocator up, before jax is imported

# isort: on
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import first_and_rest
from cla_jax import memory
from cla_jax.cache import CacheSpec, cache_spec, ledger
from cla_jax.config import ModelConfig
from cla_jax.decode import Weights, random_weights


def probes(size: int) -> dict[str, Callable[[], float]]:
    """Bytes a second of reading, and of reading and writing, an array of `size` bytes."""
    x_N = jnp.ones(size // 4)
    read = jax.jit(jnp.sum)
    copy = jax.jit(jnp.negative, donate_argnums=0)  # in place

    def timed(program: Callable, moved: int) -> Callable[[], float]:
        def measure() -> float:
            nonlocal x_N
            begin = time.perf_counter()
            result = jax.block_until_ready(program(x_N))
            seconds = time.perf_counter() - begin
            x_N = x_N if program is read else result
            return moved / seconds

        measure()  # compiles
        return measure

    return {"read": timed(read, x_N.nbytes), "copy": timed(copy, 2 * x_N.nbytes)}


def step_bytes(weights: Weights, spec: CacheSpec, options: Any) -> dict[str, int]:
    """Bytes that a decode step must read, half way through the new tokens."""
    held = ledger.nbytes(weights)
    if weights.own_head is not None:  # of the embedding, then, only the rows of the tokens
        held -= weights.embedding.nbytes * (1 - spec.batch / len(weights.embedding))
    context = options.context + options.new_tokens // 2
    return {
        "weights": int(held),
        "cache": int(spec.batch * ledger.predicted(spec, context).read),
    }


def decoder(weights: Weights, spec: CacheSpec, options: Any) -> Callable[[], dict[str, float]]:
    """Seconds to the first token and of a decode step, of one call."""
    shape = (spec.batch, options.context)
    ids = np.random.default_rng(0).integers(0, spec.config.vocab_size, shape)
    call = timed(weights, spec, ids.tolist())

    def measure() -> dict[str, float]:
        times = first_and_rest(call, options.context, options.new_tokens)
        step = times["decode_seconds"] / (options.new_tokens - 1)
        if step <= 0:
            raise ValueError(f"new_tokens = {options.new_tokens} are over too soon to be timed")
        return {"first_token_seconds": times["first_token_seconds"], "step_seconds": step}

    measure()  # compiles
    return measure


def measure(config: ModelConfig, options: Any, probe: int) -> dict[str, Any]:
    """Bandwidths and steps, in turn; raw figures of every round.

    `options` has the fields of `benchmarks.decode_bandwidth.Options`; `probe` is the bytes of the array that
    is read to measure the bandwidth.
    """
    specs = {
        batch: cache_spec(
            config,
            options.cache,
            batch=batch,
            capacity=options.context + options.new_tokens,
            chunk=min(options.chunk, options.context),
            attention=options.attention,
        )
        for batch in options.batch
    }
    probed = probes(probe)
    weights = random_weights(config)
    decoders, peaks = {}, {}
    for batch, spec in sorted(specs.items()):  # an allocator tells the highest peak so far
        decoders[batch] = decoder(weights, spec, options)
        peaks[batch] = memory.allocator_peak()
    rounds: dict[str, list[float]] = {name: [] for name in probed}
    steps: dict[int, list[dict[str, float]]] = {batch: [] for batch in decoders}
    for _ in range(options.rounds):
        for name, probe in probed.items():
            rounds[name].append(probe())
        for batch, call in decoders.items():
            steps[batch].append(call())
    bandwidth = max(statistics.median(values) for values in rounds.values())
    rows = []
    for batch, spec in specs.items():
        needed = step_bytes(weights, spec, options)
        step = statistics.median(values["step_seconds"] for values in steps[batch])
        reached = sum(needed.values()) / step
        rows.append(
            {
                "batch": batch,
                "bytes": needed,
                "device_peak_bytes": peaks[batch],
                "tokens_per_s": batch / step,
                "bytes_per_s": reached,
                "fraction": reached / bandwidth,
                "rounds": steps[batch],
            }
        )
    return {"bandwidth": bandwidth, "probe_rounds": rounds, "rows": rows}
