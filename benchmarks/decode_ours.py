"""Cached decoding of this repository, as one contestant of `benchmarks.decode`."""
# ruff: noqa: E402 - the allocator is set up before jax is imported

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch import allocator

allocator.set_up()

import jax
import numpy as np

from benchmarks.child import Contestant, serve, versions
from benchmarks.common import first_and_rest
from cla_jax.cache import CacheSpec, cache_spec
from cla_jax.config import ModelConfig, Sampling
from cla_jax.decode import Weights, decoding_weights
from cla_jax.engine import LOOP
from cla_jax.generate import generate
from cla_jax.model.transformer import Transformer


def timed(
    weights: Weights, cache: CacheSpec, prompts: list[list[int]]
) -> Callable[[int], tuple[float, float]]:
    """Generates so many tokens, greedily: seconds until the first was handed over, and until the end."""

    def call(new_tokens: int) -> tuple[float, float]:
        stamps: list[float] = []
        begin = time.perf_counter()
        completions = generate(
            weights,
            cache,
            prompts,
            new_tokens=new_tokens,
            sampling=Sampling(temperature=0),
            on_tokens=lambda *_: stamps.append(time.perf_counter()),
            every=LOOP,  # the program that runs when nobody listens
        )
        end = time.perf_counter()
        assert all(len(completion.tokens) == new_tokens for completion in completions)
        return stamps[0] - begin, end - begin

    return call


def contestant(spec: dict[str, Any]) -> Contestant:
    compiled = 0

    def count(event: str, *_: Any, **__: Any) -> None:
        nonlocal compiled
        compiled += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(count)
    config = ModelConfig(
        **spec["shape"],
        kv_map=spec["kv_map"],
        kv_norm="block",  # with the identity map: an ordinary Llama
        compute_dtype=spec["dtype"],
    )
    batch, context = spec["batch"], spec["context"]
    cache = cache_spec(
        config,
        spec["cache"],
        batch=batch,
        capacity=context + spec["new_tokens"],
        chunk=min(spec["chunk"], context),  # the last chunk of a prompt is padded to a whole one
        attention=spec["attention"],
    )
    model = jax.jit(Transformer, static_argnums=1)(jax.random.key(0), config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model))
    weights = decoding_weights(model, matmul=spec["matmul"])
    del model
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, context))
    prompts = ids.tolist()  # lists, as a tokenizer gives them

    call = timed(weights, cache, prompts)

    def burst(new_tokens: int) -> dict[str, Any]:
        before = compiled
        times = first_and_rest(call, context, new_tokens)
        return {**times, "compiled": compiled - before}

    call(spec["new_tokens"])  # compiles
    kv_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.allocate().kv_layers))
    about = {"parameters": parameters, "versions": versions("jax", "jaxlib", "flax")}
    return Contestant(burst, about | {"kv_bytes": kv_bytes})


if __name__ == "__main__":
    serve(contestant)
