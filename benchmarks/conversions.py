"""The loss of a trained model at step 0 after each conversion, before any training.

    python -m benchmarks.conversions runs/demo/seeds/h16_mqa.seed-0 --kv-map cla:2 cla:4 random:4 damage:4
    python -m benchmarks.conversions runs/smollm2-135m --kv-map identity cla:2 --kv-heads 1 3

Rows are kv_maps and numbers of KV heads, columns the ways to make one head of several (`start.init`). Numbers
are nats per token on held-out text; what a conversion looks at is training text. All is float32.
"""
# ruff: noqa: E402 - the allocator is set up before jax is imported

from launch import allocator

allocator.set_up()

import dataclasses
import json
import logging
import os
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, machine
from cla_jax import layerwise, runs, start, uptrain
from cla_jax.config import INITS, FromRun
from cla_jax.evaluate import open_session
from cla_jax.fields import replaced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # The run to convert.
    run: Annotated[str, tyro.conf.Positional]
    # kv_maps, random:PRODUCERS[:SEED] or damage:PRODUCERS.
    kv_map: tuple[str, ...] = ("cla:2",)
    # Numbers of KV heads; by default the model's own.
    kv_heads: tuple[int, ...] = ()
    init: tuple[str, ...] = INITS
    # Windows of held-out text that are scored.
    windows: int = 8
    # Windows of training text that aligned, least_squares and damage look at.
    calibration_windows: int = 16
    # Where prepared data is, if not where the run says.
    data_dir: str | None = None
    # Name of the result, below benchmarks/results/; by default nothing is written.
    save: str = ""


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    logging.basicConfig(level=logging.WARNING)
    run = runs.find_run(options.run)
    session = open_session(run, options.data_dir)
    text = uptrain.Text(session.prepared, session.end, session.begins)
    parts = uptrain.load_here(FromRun(run=options.run))
    model = parts.config
    held_out = text.windows(options.windows, "held_out")
    inputs = uptrain.streams(parts, text, options.calibration_windows)
    found = {"source": layerwise.mean_loss(parts, *held_out)}
    print(f"source: {found['source']:.4f}  {model.kv_map}", flush=True)
    table = Table(title=f"{run.path}, {held_out[1].size:,} held-out tokens: nats per token")
    for column in ("kv_map", "KV heads", *options.init):
        table.add_column(column)
    table.add_row(model.kv_map, str(model.n_kv_heads), f"{found['source']:.4f} (source)")
    for form in options.kv_map:
        for heads in options.kv_heads or (model.n_kv_heads,):
            row = []
            for init in options.init:
                kv_map = form
                if asked := start.resolved_map(form, model):
                    kv_map = start.random_map(model, *asked[1:])
                    if asked[0] == "damage":
                        measured = uptrain.damages(
                            parts, text, init, options.calibration_windows, lambda *_: None
                        )
                        kv_map = start.least_damaged(model, measured, asked[1])
                target = replaced(model, {"kv_map": kv_map, "n_kv_heads": heads})
                made = uptrain.converted(parts, target, init, inputs)
                loss = layerwise.mean_loss(made, *held_out)
                found[f"{form} {heads} {init}"] = loss
                row.append(f"{loss:.4f}")
                print(f"{form} {heads} {init}: {loss:.4f}  {kv_map}", flush=True)
            table.add_row(form, str(heads), *row)
    Console().print(table)
    if options.save:
        record = dataclasses.asdict(options) | {
            "nats": found,
            "machine": machine(len(os.sched_getaffinity(0))),
        }
        (HERE / "results" / f"{options.save}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
