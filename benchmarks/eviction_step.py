"""Time and memory of a decode step through caches that evict tokens, beside a dense cache.

    python -m benchmarks.eviction_step --context 8192 --policy window:keep=0.5 h2o:keep=0.5

Weights are random: only sizes matter. Rounds go through all caches in turn. Printed are medians, the ratio to
the dense cache in each round, and what the compiled step needs: arguments (weights and cache) and
temporaries.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import shape_of
from cla_jax.cache import cache_spec, ledger
from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Compressor
from cla_jax.config import ModelConfig
from cla_jax.decode import decode, prefill, random_weights
from cla_jax.eviction import parse
from cla_jax.eviction.rule import PUNCTUATION, SPECIAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    context: int = 8192
    policy: tuple[str, ...] = ()
    layers: int = 4
    heads: int = 8
    kv_heads: int = 1
    width: int = 64  # of a head
    kv_map: str = "identity"
    steps: int = 16
    rounds: int = 7


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def step(weights, cache, token_B1, *, spec):
    x_B1D, cache = decode(weights, spec, cache, token_B1, jnp.ones_like(cache.lengths_B))
    return weights.logits(x_B1D, spec.rules).argmax(-1).astype(jnp.int32), cache


def main(argv: Sequence[str] | None = None) -> None:
    import tyro  # not where `benchmarks.accelerator` runs

    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    shape = shape_of((arguments.heads, arguments.kv_heads, arguments.width), arguments.layers)
    shape |= {"vocab_size": 512, "d_ff": 2 * shape["d_model"]}  # less to read beside the cache
    config = ModelConfig(**shape, kv_map=arguments.kv_map, compute_dtype="float32")
    for measured in measure(
        config, arguments.context, arguments.policy, steps=arguments.steps, rounds=arguments.rounds
    ):
        print(json.dumps(measured), flush=True)


def measure(
    config: ModelConfig, context: int, policies: Sequence[str], *, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """What a step takes with a dense cache, and with those of the policies."""
    weights = random_weights(config)
    more = steps * (rounds + 1)
    prompt = np.random.default_rng(0).integers(0, config.vocab_size, context).tolist()
    sizes = {"batch": 1, "capacity": context + more}
    chunked = cache_spec(config, "dense", chunk=512, **sizes)
    _, cache = prefill(weights, chunked, chunked.allocate(), [prompt])
    caches: dict[str, Any] = {"dense": (dataclasses.replace(chunked, chunk=1), cache)}
    held = {"dense": ledger.nbytes(cache.kv_layers)}
    classes = bytes([SPECIAL, PUNCTUATION])
    for name in policies:
        spec = evicting_spec(config, parse(name), classes=classes, **sizes)
        compressor = Compressor(weights, spec)
        _, cache = compressor.fill(spec.allocate(), {0: prompt}, more)
        caches[name] = compressor.spec, cache
        counted = ledger.counted_evicting(compressor.spec, cache)
        held[name] = counted.allocated + counted.tables
    token = np.zeros((1, 1), np.int32)
    needs = {}
    for name, (spec, cache) in caches.items():
        memory = step.lower(weights, cache, token, spec=spec).compile().memory_analysis()
        needs[name] = memory.argument_size_in_bytes, memory.temp_size_in_bytes
    seconds: dict[str, list[float]] = {name: [] for name in caches}
    for _ in range(rounds + 1):  # the first one compiles
        for name in caches:
            spec, cache = caches[name]
            clock = time.perf_counter()
            for _ in range(steps):
                drawn, cache = step(weights, cache, token, spec=spec)
            jax.block_until_ready(drawn)
            seconds[name].append((time.perf_counter() - clock) / steps)
            caches[name] = spec, cache
    measured = []
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(times[1:], seconds["dense"][1:], strict=True)]
        measured.append(
            {
                "cache": name,
                "context": context,
                "cache_bytes": held[name],
                "arguments": needs[name][0],
                "temporaries": needs[name][1],
                "ms": round(1e3 * statistics.median(times[1:]), 3),
                "of_dense": round(statistics.median(ratios), 3),
                "ratios": [round(ratio, 2) for ratio in sorted(ratios)],
            }
        )
    return measured


if __name__ == "__main__":
    main()
