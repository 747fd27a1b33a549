"""A decode step of a latent beside one of MQA, at equal bytes of cache.

    python -m benchmarks.latent                      # 8 layers of width 256, 128 elements a token and layer
    python -m benchmarks.latent --batch 1 --context 4096 --rounds 15
    python -m benchmarks.latent --equal-parameters   # the latent's MLP is narrower
    python -m benchmarks.latent --shape 100m --layers 12

Models have random weights and caches of zeros, all in float32. They take turns; the table has medians and
the ratio of each to MQA.
"""
# ruff: noqa: E402 - the allocator is set up before jax is imported

from launch import allocator

allocator.set_up()

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, SHAPES, machine, save
from cla_jax import costs
from cla_jax.cache import cache_spec, ledger
from cla_jax.config import CacheAttention, DecodingMatmul, LatentKV, ModelConfig
from cla_jax.decode import decode, random_weights
from experiments.sweeping import width_of_cost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # Sequences that decode at once.
    batch: tuple[int, ...] = (1, 8)
    # Tokens in the cache.
    context: tuple[int, ...] = (512, 2048)
    # Widths, heads and vocabulary of the model.
    shape: Literal["7m", "100m"] = "7m"
    # Layers of the model.
    layers: int = 8
    # Narrow the MLP of the latent's model, so that both models have equally many parameters.
    equal_parameters: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    # Each is a pair of columns.
    kv_map: tuple[str, ...] = ("identity", "cla:2")
    # Width of the rotated key; the latent has the rest of the bytes of MQA's keys and values.
    rope_dims: int = 32
    # What reads the caches: see `launch.generate --attention`.
    attention: CacheAttention = "xla"
    # What multiplies tokens with weights: see `launch.generate --matmul`.
    matmul: DecodingMatmul = "xla"
    # Alternating rounds.
    rounds: int = 9
    # Steps of a round.
    steps: int = 10
    # Name of the result, below benchmarks/results/; by default nothing is written.
    save: str = ""


def models(options: Options) -> dict[str, ModelConfig]:
    configs = {}
    for kv_map in options.kv_map:
        shape = SHAPES[options.shape] | {"n_layers": options.layers}
        mqa = ModelConfig(**shape, kv_map=kv_map, compute_dtype="float32")
        rank = 2 * mqa.d_head - options.rope_dims
        configs[f"MQA, {kv_map}"] = mqa
        latent = dataclasses.replace(mqa, kv=LatentKV(rank=rank, rope_dims=options.rope_dims))
        if options.equal_parameters:
            latent = narrowed(latent, mqa)
        configs[f"latent, {kv_map}"] = latent
    return configs


def narrowed(config: ModelConfig, base: ModelConfig) -> ModelConfig:
    """The model with the MLP width that makes its parameters as many as those of `base`, or nearly so.

    The width is a multiple of 16. A product with one token is cut into equal parts for the cores, and an odd
    width has none.
    """
    wide = lambda width: dataclasses.replace(config, d_ff=width)
    parameters = lambda config: costs.parameters(config).total
    width = width_of_cost(lambda width: parameters(wide(width)), parameters(base))
    return wide(16 * round(width / 16))


def contestant(
    config: ModelConfig, batch: int, context: int, options: Options
) -> Callable[[], float]:
    """A function that runs some steps at a context, and gives the seconds of one."""
    spec = cache_spec(config, batch=batch, capacity=context + 1, attention=options.attention)
    weights = random_weights(config, matmul=options.matmul)
    tokens, counts = jnp.ones((batch, 1), jnp.int32), jnp.ones(batch, jnp.int32)
    step = jax.jit(
        lambda weights, cache: decode(weights, spec, cache, tokens, counts), donate_argnums=1
    )
    at_context = lambda cache: dataclasses.replace(
        cache, lengths_B=jnp.full(batch, context, jnp.int32)
    )
    cache = at_context(spec.allocate())

    def run() -> float:
        nonlocal cache
        begin = time.monotonic()
        for _ in range(options.steps):
            x, cache = step(weights, cache)
            cache = at_context(cache)
        jax.block_until_ready((x, cache))
        return (time.monotonic() - begin) / options.steps

    run()
    return run


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    table = Table(title="milliseconds of a decode step, median; times MQA with the same map")
    for column in ("batch", "context", *models(options)):
        table.add_column(column)
    rows = []
    for batch in options.batch:
        for context in options.context:
            configs = models(options)
            runs = {
                name: contestant(config, batch, context, options)
                for name, config in configs.items()
            }
            times: dict[str, list[float]] = {name: [] for name in runs}
            for _ in range(options.rounds):
                for name, run in runs.items():
                    times[name].append(run())
            medians = {name: statistics.median(each) for name, each in times.items()}
            peers = {name: name.replace("latent", "MQA") for name in runs}
            ratios = {name: medians[name] / medians[peers[name]] for name in runs}
            cells = [f"{medians[name] * 1e3:.2f} ({ratios[name]:.2f})" for name in runs]
            table.add_row(str(batch), str(context), *cells)
            bytes_of = {
                name: ledger.predicted(
                    cache_spec(config, batch=1, capacity=context + 1), context
                ).resident
                for name, config in configs.items()
            }
            rows.append(
                {"batch": batch, "context": context, "seconds": times, "resident": bytes_of}
            )
    Console(width=110).print(table)
    if options.save:
        record = dataclasses.asdict(options) | {"rows": rows, "machine": machine()}
        save(record, HERE / "results" / f"{options.save}.json")


if __name__ == "__main__":
    main()
