"""How much of a device's measured memory bandwidth cached decoding reaches.

A decode step reads every weight once and, for every sequence, what each layer sees of its slot of the
cache. Those bytes (the ledger's `read`, and the weights as decoding holds them) over the time of a token
are the bandwidth reached. What the device can do is measured in the same rounds: an array is read and
summed, and another one read and written; the faster of the two counts. The tokens are sampled greedily
from random prompts, the weights are random; nothing is read from disk.

    python -m benchmarks.decode_bandwidth                        the paper's 1B model; a GPU or TPU
    python -m benchmarks.decode_bandwidth demo.h16_mqa_cla2 --batch 1 8 --context 256 --probe 256MiB

A model that fits into a CPU's caches can reach more than its memory's bandwidth.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

# isort: off
from benchmarks.decode_ours import timed  # sets the allocator up, before jax is imported

# isort: on
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, first_and_rest, machine
from cla_jax import memory
from cla_jax.cache import CacheSpec, cache_spec, ledger
from cla_jax.config import ModelConfig
from cla_jax.decode import Weights, decoding_weights
from cla_jax.model.transformer import Transformer
from launch.cli import user_errors
from launch.memory import models, parse_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # An experiment, or the directory of a run, whose shape it is.
    name: Annotated[str, tyro.conf.Positional] = "cla_1b.h128_mqa_cla2"
    # Sequences decoded at once; each gets a row.
    batch: tuple[int, ...] = (1, 64)
    # Tokens of every prompt.
    context: int = 1024
    # Tokens generated after it.
    new_tokens: int = 257
    # KV cache format.
    cache: str = "dense"
    # Prompt tokens per step of prefill.
    chunk: int = 256
    # Bytes of the array whose reading is timed; several times what caches hold.
    probe: str = "2GiB"
    # Calls of each; the table shows their medians.
    rounds: int = 7
    # Where the JSON goes, raw rounds included.
    output: Path = HERE / "results" / "decode_bandwidth.json"


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


def step_bytes(weights: Weights, spec: CacheSpec, options: Options) -> dict[str, int]:
    """Bytes that a decode step must read, half way through the new tokens."""
    held = ledger.nbytes(weights)
    if weights.own_head is not None:  # of the embedding, then, only the rows of the tokens
        held -= weights.embedding.nbytes * (1 - spec.batch / len(weights.embedding))
    context = options.context + options.new_tokens // 2
    return {
        "weights": int(held),
        "cache": int(spec.batch * ledger.predicted(spec, context).read),
    }


def decoder(weights: Weights, spec: CacheSpec, options: Options) -> Callable[[], dict[str, float]]:
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


def measure(config: ModelConfig, options: Options) -> dict[str, Any]:
    """Bandwidths and steps, in turn; raw figures of every round."""
    specs = {
        batch: cache_spec(
            config,
            options.cache,
            batch=batch,
            capacity=options.context + options.new_tokens,
            chunk=min(options.chunk, options.context),
        )
        for batch in options.batch
    }
    probed = probes(parse_bytes(options.probe, "probe"))
    model = jax.jit(Transformer, static_argnums=1)(jax.random.key(0), config)
    weights = decoding_weights(model)
    del model
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
    bandwidth = max(statistics.median(found) for found in rounds.values())
    rows = []
    for batch, spec in specs.items():
        needed = step_bytes(weights, spec, options)
        step = statistics.median(found["step_seconds"] for found in steps[batch])
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


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"{result['name']}, {result['device']}, context {result['context']}, {result['cache']}",
        caption=f"measured memory bandwidth: {result['bandwidth'] / 1e9:,.0f} GB/s",
    )
    for column in ("batch", "tokens/s", "first token", "weights", "cache", "GB/s", "of measured"):
        shown.add_column(column, justify="right")
    for row in result["rows"]:
        first = statistics.median(found["first_token_seconds"] for found in row["rounds"])
        shown.add_row(
            str(row["batch"]),
            f"{row['tokens_per_s']:,.0f}",
            f"{1e3 * first:,.1f} ms",
            *(f"{row['bytes'][part] / 1e6:,.1f} MB" for part in ("weights", "cache")),
            f"{row['bytes_per_s'] / 1e9:,.0f}",
            f"{row['fraction']:.0%}",
        )
    return shown


@user_errors
def main(options: Options) -> None:
    found = models([options.name])
    if len(found) != 1:
        raise ValueError(f"name = {options.name!r} names {len(found)} models; one is measured")
    ((name, config),) = found.items()
    for field, least in (("context", 1), ("new_tokens", 2), ("rounds", 1)):
        if (given := getattr(options, field)) < least:
            raise ValueError(f"{field} = {given} must be at least {least}")
    if not options.batch:
        raise ValueError("batch: give at least one")
    if parse_bytes(options.probe, "probe") < 1 << 20:
        raise ValueError(f"probe = {options.probe!r} must be at least 1MiB")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    is_new = not options.output.exists()
    options.output.open("a").close()  # before minutes are spent on what goes there
    if is_new:
        options.output.unlink()
    result = {
        "what": "bytes a decode step must read over its time, beside the bandwidth measured",
        "when": time.strftime("%Y-%m-%d"),
        "name": name,
        "device": jax.devices()[0].device_kind,
        "machine": machine(os.cpu_count() or 1),
        "jax": jax.__version__,
        "cache": options.cache,
        "context": options.context,
        "new_tokens": options.new_tokens,
        **measure(config, options),
    }
    Console().print(table(result))
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
