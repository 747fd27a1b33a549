"""How compile time grows with depth: the scanned training step, and the unrolled decode loop.

    python -m benchmarks.compile_time

Prints the seconds to trace, lower and compile each at two depths, without a cache of compiled programs. They
are medians of several rounds that take the depths in turn.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import jax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import SHAPES
from cla_jax.cache import cache_spec
from cla_jax.config import Config, DataConfig, ModelConfig
from cla_jax.memory import lowered
from cla_jax.session import plan_layout
from cla_jax.step import compile_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # The two depths.
    layers: tuple[int, int] = (8, 32)
    # Compilations of each.
    rounds: int = 3


def model(n_layers: int) -> ModelConfig:
    fields = SHAPES["7m"] | {"n_layers": n_layers}
    return ModelConfig(**fields, kv_map="cla:2", compute_dtype="float32")


def compile_training(n_layers: int) -> None:
    config = Config(
        name="benchmark",
        model=model(n_layers),
        data=DataConfig(seq_len=256),
        batch_size=4,
        steps=10,
    )
    compile_step(plan_layout(config))


def compile_decoding(n_layers: int) -> None:
    spec = cache_spec(model(n_layers), batch=1, capacity=1024)
    lowered(spec)["decode"].compile()


def main(options: Options) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    table = Table(title="seconds to compile, median (all rounds)")
    for column in ("", *(f"{n} layers" for n in options.layers), "ratio"):
        table.add_column(column, justify="right" if column else "left")
    phases: dict[str, Callable[[int], None]] = {
        "training step, scanned": compile_training,
        "decode loop, unrolled": compile_decoding,
    }
    for name, compile_ in phases.items():
        seconds: dict[int, list[float]] = {n: [] for n in options.layers}
        for _ in range(options.rounds):
            for n in options.layers:
                jax.clear_caches()
                start = time.perf_counter()
                compile_(n)
                seconds[n].append(time.perf_counter() - start)
        medians = [statistics.median(times) for times in seconds.values()]
        cells = [
            f"{median:.2f} ({', '.join(f'{s:.2f}' for s in times)})"
            for median, times in zip(medians, seconds.values(), strict=True)
        ]
        table.add_row(name, *cells, f"{medians[1] / medians[0]:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
