"""The loss of a trained model at step 0 after each conversion, before any training.

    python -m benchmarks.conversions runs/demo/seeds/h16_mqa.seed-0 --kv-map cla:2 cla:4 random:4 damage:4
    python -m benchmarks.conversions runs/smollm2-135m --kv-map identity cla:2 cla:3 --kv-heads 1 3
    python -m benchmarks.conversions runs/smollm2-135m --kv-map identity cla:2 --latents 96:32 160:32

Rows are kv_maps and numbers of KV heads, or sizes of latents. Columns are the ways to make one head of
several, or a latent of heads (`start.init`). Numbers are nats per token on held-out text. Conversions look at
training text only. All is float32.
"""
# ruff: noqa: E402 - the allocator is set up before jax is imported

from launch import allocator

allocator.set_up()

import dataclasses
import logging
from collections.abc import Iterator
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import HERE, machine, save
from cla_jax import layerwise, runs, start, uptrain
from cla_jax.config import HEAD_INITS, INITS, LATENT_INITS, FromRun, LatentKV, ModelConfig
from cla_jax.evaluate import open_session
from cla_jax.fields import replaced


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # The run to convert.
    run: Annotated[str, tyro.conf.Positional]
    # kv_maps, random:PRODUCERS[:SEED] or damage:PRODUCERS.
    kv_map: tuple[str, ...] = ("cla:2",)
    # Numbers of KV heads; by default the model's own, unless latents are given.
    kv_heads: tuple[int, ...] = ()
    # Latents instead of heads, as RANK:ROPE_DIMS.
    latents: tuple[str, ...] = ()
    # Give latents a norm, as DeepSeek-V2 does.
    latent_norm: bool = False
    # Ways to start; those that do not make what is asked for are left out.
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
    nats = {"source": layerwise.mean_loss(parts, *held_out)}
    print(f"source: {nats['source']:.4f}  {model.kv_map}", flush=True)
    table = Table(title=f"{run.path}, {held_out[1].size:,} held-out tokens: nats per token")
    for column in ("kv_map", "keys and values", "elements", *options.init):
        table.add_column(column)
    table.add_row(
        model.kv_map,
        _name(model),
        str(model.kv_elements),
        f"{nats['source']:.4f} (source)",
    )
    for form in options.kv_map:
        for changes in _kinds(options, model):
            row, elements = [], set()
            for init in options.init:
                if init not in (LATENT_INITS if "kv" in changes else HEAD_INITS):
                    row.append("")
                    continue
                kv_map = form
                if asked := start.resolved_map(form, model):
                    kv_map = start.random_map(model, *asked[1:])
                    if asked[0] == "damage":
                        measured = uptrain.damages(
                            parts, text, init, options.calibration_windows, lambda *_: None
                        )
                        kv_map = start.least_damaged(model, measured, asked[1])
                target = replaced(model, {"kv_map": kv_map} | changes)
                made = uptrain.converted(parts, target, init, inputs)
                loss = layerwise.mean_loss(made, *held_out)
                nats[f"{form} {_name(target)} {init}"] = loss
                row.append(f"{loss:.4f}")
                elements.add(str(target.kv_elements))
                print(f"{form} {_name(target)} {init}: {loss:.4f}  {kv_map}", flush=True)
            table.add_row(form, _name(replaced(model, changes)), "/".join(sorted(elements)), *row)
    Console().print(table)
    if options.save:
        record = dataclasses.asdict(options) | {"nats": nats, "machine": machine()}
        save(record, HERE / "results" / f"{options.save}.json")


def _kinds(options: Options, model: ModelConfig) -> Iterator[dict[str, Any]]:
    """What keys and values are made of, as changes of the model."""
    for heads in options.kv_heads or (() if options.latents else (model.n_kv_heads,)):
        yield {"n_kv_heads": heads}
    for sizes in options.latents:
        rank, rope_dims = map(int, sizes.split(":"))
        kv = LatentKV(rank=rank, rope_dims=rope_dims, norm=options.latent_norm)
        yield {"kv": kv, "n_kv_heads": 1}


def _name(model: ModelConfig) -> str:
    if isinstance(model.kv, LatentKV):
        return f"latent {model.kv.rank}:{model.kv.rope_dims}"
    return f"{model.n_kv_heads} KV head{'s' * (model.n_kv_heads != 1)}"


if __name__ == "__main__":
    main()
