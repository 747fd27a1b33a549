"""Replay a trace of requests through the engine, and report throughput, latency and memory.

    python -m launch.serve_trace trace.jsonl --model heads.mha --make shared-prompt
    python -m launch.serve_trace trace.jsonl --model heads.mha --cache dense --unshared
    python -m launch.serve_trace trace.jsonl --model runs/demo/seeds/h16_mqa_cla2.seed-0 --cache int8

The cache is prefix-shared (docs/prefix.md): a common prefix of several requests is stored and read once. The
model is a run, or an experiment with random weights. A trace has one request per line:

    {"arrival": 0.5, "prompt": [1, 2, 3], "new_tokens": 100, "group": "a"}

--make writes a trace first: shared-prompt, few-shot, parallel-sampling or no-sharing.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import experiments
from cla_jax import eviction, traces
from cla_jax.formats import FORMATS
from cla_jax.messages import near_choice, shown
from launch import allocator
from launch.cli import Attention, Matmul, check_picture, log_to_stderr, read, user_errors
from launch.memory import parse_bytes

if TYPE_CHECKING:
    import jax

    from cla_jax.config import ModelConfig
    from cla_jax.decode import Weights
    from cla_jax.engine import Engine
    from cla_jax.mesh import AxisRules


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # The trace, a file of JSON lines.
    trace: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TRACE")]
    # A run directory, or an experiment (with random weights).
    model: str
    # Write a trace of this kind first: shared-prompt, few-shot, parallel-sampling, no-sharing.
    make: str = ""
    # The trace that --make writes.
    made: traces.Shape = dataclasses.field(default_factory=traces.Shape)
    cache: Annotated[str, tyro.conf.arg(help=f"KV cache format: {', '.join(FORMATS)}.")] = "dense"
    attention: Attention = "xla"
    matmul: Matmul = "xla"
    # Use an ordinary cache, with one row per request and no sharing.
    unshared: bool = False
    # Maximum number of requests that decode at the same time.
    rows: int = 32
    # Pages in the pool; 0: enough for --rows requests of the longest length without sharing.
    pages: int = 0
    # Tokens per page.
    page: int = 64
    # Keep pages of finished requests for later ones, up to this size, such as 100MB.
    retain: str = "0"
    # Also prefill tokens that are already in the cache, to measure the gain of skipping them.
    whole_prefill: bool = False
    # Prompt tokens per prefill step.
    chunk: int = 256
    # Decode steps between two checks for new requests.
    every: int = 16
    # Print JSON, including the memory over time.
    json: bool = False
    # Plot KV bytes over time and the time to the first token, to this file (png, svg or pdf).
    plot: str = ""


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(Arguments, args=argv, prog="python -m launch.serve_trace", description=__doc__)
    log_to_stderr()
    if eviction.is_policy(arguments.cache):
        raise ValueError(
            f"cache = {shown(arguments.cache)} is a policy that evicts tokens, which serve_trace does not "
            f"support: give one of {', '.join(FORMATS)}"
        )
    eviction.check_cache(arguments.cache, FORMATS)
    if arguments.plot:
        check_picture(arguments.plot)
    for name in ("rows", "page", "chunk", "every"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} = {getattr(arguments, name)} must be positive")
    if arguments.pages < 0:
        raise ValueError(f"pages = {arguments.pages} must be positive, or 0 for enough pages")
    if arguments.make:
        near_choice("kind of trace", arguments.make, traces.MAKERS)
        _check_replaced(arguments.trace)
        traces.make_trace(arguments.make, arguments.made)
    else:
        traces.read_trace(arguments.trace, _any_token)
    parse_bytes(arguments.retain, "retain")
    if not Path(arguments.model).exists():
        experiments.find_row(arguments.model)
    _check_flags(arguments)
    allocator.set_up()
    # After the checks: a mistake should not wait for jax.
    from launch import compilation_cache

    compilation_cache.enable()
    model = open_model(arguments.model, arguments.matmul)
    if arguments.make:
        ids = min(model.config.vocab_size, arguments.made.vocabulary)
        shape = dataclasses.replace(arguments.made, vocabulary=ids)
        traces.write_trace(arguments.trace, traces.make_trace(arguments.make, shape))
    lines = traces.read_trace(arguments.trace, model.encode)
    with model.on_mesh():
        engine = _engine(arguments, model, lines)
        traces.check(engine, lines, arguments.trace)
        traces.warm_up(engine)
        _show(engine, lines, traces.replay(engine, lines), arguments)


def _any_token(_: str) -> list[int]:
    """Stands for a tokenizer where only the form of a trace is checked."""
    return [0]


def _check_replaced(trace: str) -> None:
    """Raises ValueError if --make would overwrite something else than a trace."""
    if Path(trace).exists():
        try:
            traces.read_trace(trace, _any_token)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"--make does not overwrite {shown(trace)}, which is not a trace ({error}): choose another "
                "file"
            ) from None


def _check_flags(arguments: Arguments) -> None:
    """Raises ValueError for flags that would change nothing."""
    default = Arguments(trace="", model="")
    changed = lambda name: getattr(arguments, name) != getattr(default, name)
    if not arguments.make and changed("made"):
        raise ValueError(
            "--made describes the trace that --make writes: add --make, or remove --made"
        )
    for name in ("pages", "page", "retain", "whole_prefill") if arguments.unshared else ():
        if changed(name):
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} applies only to a prefix-shared cache: remove --unshared or --{flag}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServedModel:
    """What serves a trace."""

    config: "ModelConfig"
    weights: "Weights"
    rules: "AxisRules"
    mesh: "jax.sharding.Mesh | None" = None  # None: arrays of one device, which know of no mesh
    # Makes token ids of a text; None without a tokenizer.
    encode: Callable[[str], list[int]] | None = None

    def on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Sets the mesh of the weights, if they have one."""
        import jax

        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)


def open_model(name: str, matmul: str) -> ServedModel:
    """A row of an experiment with random weights, or a run. `matmul` is as in `decoding_weights`."""
    from cla_jax.decode import random_weights
    from cla_jax.decoder import Decoder
    from cla_jax.mesh import AxisRules

    if not Path(name).exists():
        config = experiments.find_row(name)
        weights = random_weights(config.model, matmul=matmul)
        return ServedModel(config=config.model, weights=weights, rules=AxisRules())
    decoder = Decoder.open(name, matmul=matmul)
    return ServedModel(
        config=decoder.run.config().model,
        weights=decoder.weights,
        rules=decoder.rules,
        mesh=decoder.mesh,
        encode=decoder.tokens,
    )


def _engine(arguments: Arguments, model: ServedModel, lines: Sequence[traces.Line]) -> "Engine":
    from cla_jax.cache import cache_spec
    from cla_jax.cache.prefix_shared import prefix_spec
    from cla_jax.engine import Engine

    longest = max(len(line.prompt) + line.new_tokens for line in lines)
    sizes: Any = {"batch": arguments.rows, "capacity": longest, "chunk": arguments.chunk}
    sizes |= {"rules": model.rules, "attention": arguments.attention}
    if arguments.unshared:
        spec = cache_spec(model.config, arguments.cache, **sizes)
    else:
        page = arguments.page
        pages = arguments.pages or arguments.rows * (longest // page + 1)
        sizes |= {"page": page, "pages": pages, "skip_matched": not arguments.whole_prefill}
        spec = prefix_spec(model.config, arguments.cache, **sizes)
        retain = parse_bytes(arguments.retain, "retain") // spec.page_bytes
        spec = dataclasses.replace(spec, retain=min(retain, pages))
    return Engine(model.weights, spec, every=arguments.every)


def _show(
    engine: "Engine", lines: Sequence[traces.Line], replay: traces.Replay, arguments: Arguments
) -> None:
    from cla_jax.cache.ledger import nbytes

    counts = engine.places.counts
    summary = replay.summary() | {
        "requests": len(lines),
        "hit_rate": counts.matched / counts.prompted,
        "allocated_bytes": nbytes(engine.cache.kv_layers),
        "uploads": counts.uploads,
        "uploaded_bytes": counts.uploaded_bytes,
    }
    if arguments.plot:
        _plot(replay, arguments.plot)
    if arguments.json:
        moments = [dataclasses.asdict(moment) for moment in replay.moments]
        json.dump(summary | {"moments": moments}, sys.stdout, indent=1)
        print()
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    for name, value in summary.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"
        in_seconds = name.startswith(("first_token", "latency"))
        table.add_row(name.replace("_", " "), f"{shown} s" if in_seconds else shown)
    Console().print(table)


def _plot(replay: traces.Replay, path: str) -> None:
    """KV bytes over time, with and without sharing, and how late first tokens were."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    memory, latency = figure.subplots(2)
    at = [moment.at for moment in replay.moments]
    for name in ("resident", "unshared"):
        memory.step(at, [getattr(moment, name) for moment in replay.moments], label=name)
    memory.set(xlabel="seconds", ylabel="KV bytes")
    memory.legend()
    latency.plot(replay.first_token, ".")
    latency.set(xlabel="request", ylabel="seconds to the first token")
    figure.savefig(path)


if __name__ == "__main__":
    main()
