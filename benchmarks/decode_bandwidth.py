"""How much of a device's measured memory bandwidth cached decoding reaches.

A decode step reads every weight once and, for every sequence, what each layer sees in the cache. Those bytes
(the ledger's `read`, and the weights as decoding holds them) over the time of a token are the bandwidth
reached. The bandwidth of the device is measured in the same rounds. An array is read and summed, and another
one is read and written. The faster of the two counts. The tokens are sampled greedily from random prompts,
the weights are random; nothing is read from disk.

    python -m benchmarks.decode_bandwidth                        the paper's 1B model; a GPU or TPU
    python -m benchmarks.decode_bandwidth demo.h16_mqa_cla2 --batch 1 8 --context 256 --probe 256MiB

A model that fits into a CPU's caches can reach more than its memory's bandwidth.
"""

import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

# isort: off
from benchmarks.bandwidth import measure  # sets the allocator up, before jax is imported

# isort: on
import jax
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, machine
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
    # What reads the cache when a token is decoded: xla, or a kernel (`launch.generate --help`).
    attention: str = "xla"
    # Prompt tokens per step of prefill.
    chunk: int = 256
    # Bytes of the array whose reading is timed; several times what caches hold.
    probe: str = "2GiB"
    # Calls of each; the table shows their medians.
    rounds: int = 7
    # Where the JSON goes, raw rounds included.
    output: Path = HERE / "results" / "decode_bandwidth.json"


def table(result: dict[str, Any]) -> Table:
    shown = Table(
        title=f"{result['name']}, {result['device']}, context {result['context']}, {result['cache']}",
        caption=f"measured memory bandwidth: {result['bandwidth'] / 1e9:,.0f} GB/s",
    )
    for column in ("batch", "tokens/s", "first token", "weights", "cache", "GB/s", "of measured"):
        shown.add_column(column, justify="right")
    for row in result["rows"]:
        first = statistics.median(measured["first_token_seconds"] for measured in row["rounds"])
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
    configs = models([options.name])
    if len(configs) != 1:
        raise ValueError(f"name = {options.name!r} names {len(configs)} models; one is measured")
    ((name, config),) = configs.items()
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
        "attention": options.attention,
        "context": options.context,
        "new_tokens": options.new_tokens,
        **measure(config, options, parse_bytes(options.probe, "probe")),
    }
    Console().print(table(result))
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
