"""A trace of requests through the engine: a prefix-shared cache beside a row for each request.

    python -m benchmarks.serving
    python -m benchmarks.serving --made.shared 2048 --made.requests 64 --rounds 5
    python -m benchmarks.serving --model runs/smollm2-135m --only unshared shared torch-reuse

Contestants, all on one trace of which all requests come at once:

    unshared         every request has a cache row of its own
    whole-prefill    the prefix-shared cache, but every prompt goes through the model whole
    shared           the prefix-shared cache
    torch            Hugging Face's `generate` under torch, all requests in one batch
    torch-reuse      the same; the common prefix goes through the model once

The model has random weights, or is a run. The torch rows have a model of the same shape with random weights,
and need one common prefix and requests of equal length. Rounds take turns. The table has medians of tokens
per second, and bytes of the live cache arrays beside the closed form.
"""
# ruff: noqa: E402 - the allocator is set up before jax is imported

from launch import allocator

allocator.set_up()

import dataclasses
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.common import (
    HERE,
    SHAPES,
    CommonOptions,
    machine,
    random_model,
    rotations,
    save,
    start,
)
from cla_jax import costs, traces
from cla_jax.cache import CacheSpec, cache_spec, ledger
from cla_jax.cache.prefix_shared import prefix_spec
from cla_jax.config import CacheAttention, DecodingMatmul, ModelConfig
from cla_jax.engine import Engine
from cla_jax.mesh import AxisRules
from launch.serve_trace import ServedModel, open_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(CommonOptions):
    # The trace: see `launch.serve_trace`.
    kind: str = "shared-prompt"
    # The requests of the trace.
    made: traces.Shape = dataclasses.field(default_factory=lambda: traces.Shape(requests=32))
    # Requests that decode at once.
    rows: int = 32
    # Tokens of a page.
    page: int = 64
    # A run, instead of a model with random weights.
    model: Path | None = None
    # Otherwise: query heads, KV heads and head size of the model, whose width is their product.
    heads: tuple[int, int, int] = (4, 4, 64)
    # Layers of the model.
    layers: int = 8
    # Sharing map of the model.
    kv_map: str = "identity"
    # What reads the caches: see `launch.generate --attention`.
    attention: CacheAttention = "xla"
    # What multiplies tokens with weights: see `launch.generate --matmul`.
    matmul: DecodingMatmul = "xla"
    # Alternating rounds.
    rounds: int = 3
    # Contestants to run; `unshared` is what the others are compared with.
    only: tuple[str, ...] = ("unshared", "whole-prefill", "shared")
    # Where the JSON goes, raw rounds included.
    output: Path = HERE / "results" / "serving.json"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    if options.model is not None:
        model = open_model(os.fspath(options.model), options.matmul)
    else:
        config, weights = random_model(
            options.heads, options.layers, options.kv_map, options.matmul
        )
        model = ServedModel(config=config, weights=weights, rules=AxisRules())
    with model.on_mesh():
        run(options, model)


def run(options: Options, model: ServedModel) -> None:
    config, lines = model.config, traces.make_trace(options.kind, options.made)
    specs = contestants(config, options, model.rules)
    peers = {
        name: start(torch_spec(config, options, lines, name == "torch-reuse"), options)
        for name in options.only
        if name not in specs
    }
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in options.only}
    about: dict[str, dict[str, Any]] = {name: child.about for name, child in peers.items()}
    for order in rotations(options.only, options.rounds):
        for name in order:
            if name in peers:
                rounds[name].append(peers[name].run(1))
                continue
            engine = Engine(model.weights, specs[name], every=16)
            traces.warm_up(engine)
            rounds[name].append(traces.replay(engine, lines).summary())
            about[name] = dataclasses.asdict(engine.places.counts) | {
                "allocated": ledger.nbytes(engine.cache.kv_layers)
            }
    for child in peers.values():
        child.close()
    forms = closed_form(config, options)
    show(rounds, about, forms)
    record = {
        "options": dataclasses.asdict(options) | {"output": "", "peer_python": ""},
        "parameters": costs.parameters(config).total,
        "machine": machine(options.threads),
        "rounds": rounds,
        "about": about,
        "closed_form": forms,
    }
    save(record, options.output)


def torch_spec(
    config: ModelConfig, options: Options, lines: Sequence[traces.Line], reuse: bool
) -> dict[str, Any]:
    """What the torch rows need: a Llama of this shape, and the requests."""
    if options.kind != "shared-prompt" or options.made.mixes != 1:
        raise SystemExit("the torch rows need one common prefix: --kind shared-prompt")
    return {
        "script": "serving_torch.py",
        "shape": {name: getattr(config, name) for name in SHAPES["7m"]},
        "prompts": [line.prompt for line in lines],
        "new_tokens": options.made.new_tokens,
        "shared": options.made.shared,
        "reuse": reuse,
    }


def tokens_of(options: Options) -> int:
    return options.made.shared + options.made.own + options.made.new_tokens


def pages_of(options: Options) -> int:
    """Pages for all rows at once, the full pages of the prefix once."""
    full = options.made.shared // options.page if options.kind == "shared-prompt" else 0
    return full * options.made.mixes + options.rows * (
        tokens_of(options) // options.page + 1 - full
    )


def contestants(config: ModelConfig, options: Options, rules: AxisRules) -> dict[str, CacheSpec]:
    sizes: Any = {"batch": options.rows, "capacity": tokens_of(options), "chunk": 256}
    sizes |= {"rules": rules, "attention": options.attention}
    pool: Any = {"page": options.page, "pages": pages_of(options)}
    return {
        "unshared": cache_spec(config, **sizes),
        "whole-prefill": prefix_spec(config, **sizes, **pool, skip_matched=False),
        "shared": prefix_spec(config, **sizes, **pool),
    }


def closed_form(config: ModelConfig, options: Options) -> dict[str, float]:
    """Bytes of the keys and values of all rows at their ends, from the sizes alone."""
    token = costs.kv_bytes(config, 1, bytes_per_element=4).resident
    length, full = tokens_of(options) - 1, options.made.shared // options.page * options.page
    return {
        "unshared": options.rows * length * token,
        "shared": (full * options.made.mixes + options.rows * (length - full)) * token,
    }


def show(rounds: dict[str, Any], about: dict[str, Any], forms: dict[str, float]) -> None:
    table = Table(
        *("", "tokens/s", "of unshared in a round", "first token p50, s"),
        *("allocated", "resident, peak"),
    )
    median = lambda name, key: statistics.median(one[key] for one in rounds[name])
    for name in rounds:
        speeds, base = ([one["tokens_per_second"] for one in rounds[k]] for k in (name, "unshared"))
        ratios = [a / b for a, b in zip(speeds, base, strict=True)]
        extremes = f"({min(ratios):.2f} to {max(ratios):.2f})"
        cells = [f"{statistics.median(speeds):.1f}", f"{statistics.median(ratios):.2f}x {extremes}"]
        if name.startswith("torch"):
            cells += ["", "", f"{median(name, 'kv_bytes'):,.0f} B"]
        else:
            cells += [f"{median(name, 'first_token_p50'):.2f}", f"{about[name]['allocated']:,} B"]
            cells += [f"{median(name, 'resident_peak_bytes'):,.0f} B"]
        table.add_row(name, *cells)
    Console(width=120).print(table)
    Console(width=120).print(
        f"closed form: {forms['unshared']:,} B unshared, {forms['shared']:,} B shared"
    )


if __name__ == "__main__":
    main()
