"""Show how many sequences fit in memory: weights, KV cache and workspace, for each cache format.

    python -m launch.memory cla_1b.h128_mqa cla_1b.h128_mqa_cla2 --budget 80GB --context 32768
    python -m launch.memory cla_1b --cache dense --cache int8 --context 8192
    python -m launch.memory runs/demo/seeds --budget 1GiB --context 128 --compile

    python -m launch.memory cla_1b.h128_mqa cla_1b.h128_mqa_cla2 --context 2048 --ledger
    python -m launch.memory cla_1b.h128_mha --context 2048 --shared 1024

Nothing is allocated: all bytes are computed from the config. --compile adds the compiler's figures for this
machine's backend. They are for one prefill chunk and the decode loop, at the batch size that fits. --ledger
shows bytes per token instead: resident, written and read. (CLA reduces the first two, not the third.)
--shared N adds how many sequences fit if all begin with the same N tokens. A prefix-shared cache stores these
once.
"""

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

import experiments
from cla_jax import eviction
from cla_jax.config import LatentKV, ModelConfig
from cla_jax.formats import FORMATS
from cla_jax.messages import printable, shown
from launch.cli import collected, read, refuse, user_errors

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

UNITS = {"": 1, "B": 1, "kB": 1000} | {
    f"{prefix}{unit}": base ** (i + 1)
    for unit, base in (("B", 1000), ("iB", 1024))
    for i, prefix in enumerate("KMGT")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # Experiments, studies, run directories or directories of runs.
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME ...")] = ()
    # Memory of one device: 80GB is 80e9 bytes, 80GiB is 80 * 2^30.
    budget: str = "80GB"
    # Tokens of a sequence, prompt and continuation together.
    context: int = 32_768
    cache: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(
            help=f"KV cache format: {', '.join(FORMATS)}; repeat the flag for several. Default: all "
            "except float32 and bfloat16."
        ),
    ] = ()
    # Prompt tokens per prefill step.
    chunk: int = 256
    # Show resident, written and read bytes per token at this context, instead of sequences that fit.
    ledger: bool = False
    # Common tokens at the beginning of all sequences, for a prefix-shared cache; 0 for none.
    shared: int = 0
    # Tokens per page of the prefix-shared cache.
    page: int = 64
    # Also compile the decoder (takes seconds per line).
    compile: bool = False
    # Print JSON instead of a table.
    json: bool = False


def parse_bytes(text: str, field: str = "budget") -> int:
    """80GB, 1.5GiB, 1000. Raises ValueError, which names the field, for anything else."""
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    try:
        assert match is not None
        return round(float(match[1]) * UNITS[match[2]])
    except (AssertionError, KeyError, ValueError, OverflowError):
        raise ValueError(
            f"{field} = {text!r}: write it as 80GB (10^9), 80GiB (2^30) or bytes"
        ) from None


def models(names: Sequence[str], refused: list[str] | None = None) -> dict[str, ModelConfig]:
    """Model configs by the name of their experiment or run.

    Raises ValueError for a run whose config cannot be read, unless `refused` is there to be told of it.
    """
    from cla_jax.runs import find_runs

    configs: dict[str, ModelConfig] = {}
    for name in names:
        if experiments.names_a_file(name):
            configs |= {config.name: config.model for config in experiments.find(name)}
        elif "/" in name or (name and Path(name).exists()):
            for run in find_runs([name]):
                with contextlib.nullcontext() if refused is None else collected(refused):
                    configs[str(run.path)] = run.config().model
        else:
            configs |= {config.name: config.model for config in experiments.find(name)}
    return configs


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(Arguments, args=argv, prog="python -m launch.memory", description=__doc__)
    budget = parse_bytes(arguments.budget)
    for field in ("context", "chunk", "page"):
        if getattr(arguments, field) < 1:
            raise ValueError(f"{field} = {getattr(arguments, field)} must be positive")
    if not 0 <= arguments.shared < arguments.context:
        raise ValueError(
            f"shared = {arguments.shared} must lie in 0 to context - 1 = {arguments.context - 1}"
        )
    if arguments.ledger and arguments.shared:
        raise ValueError("--ledger counts one sequence, which shares nothing: remove --shared")
    if arguments.ledger and arguments.compile:
        raise ValueError("--ledger compiles nothing: remove --ledger or --compile")
    for name in arguments.cache:
        if eviction.is_policy(name):
            raise ValueError(
                f"--cache {shown(name)}: launch.memory does not support eviction policies: what they keep "
                "depends on the text"
            )
        eviction.check_cache(name, FORMATS)
    if not arguments.names:
        raise ValueError(
            "give at least one experiment, study or run: python -m launch.memory cla_1b"
        )
    refused: list[str] = []
    configs = models(arguments.names, refused)
    if not configs:
        refuse(refused)
    lines = _ledger(configs, arguments) if arguments.ledger else _fits(configs, arguments, budget)
    if arguments.json:
        json.dump(
            {"budget": budget, "context": arguments.context, "lines": lines}, sys.stdout, indent=1
        )
        print()
    elif arguments.ledger:
        _print_ledger(lines, arguments)
    else:
        _print(lines, arguments, budget)
    refuse(refused)


def _formats(config: ModelConfig, arguments: Arguments) -> tuple[str, ...]:
    """The formats that the command names; by default all that the model can have."""
    # In the model's own dtype `dense` says it all.
    possible = tuple(
        name
        for name, entry in FORMATS.items()
        if name not in ("float32", "bfloat16")
        and (entry.per_token or not isinstance(config.kv, LatentKV))
    )
    return tuple(dict.fromkeys(arguments.cache)) or possible


def _ledger(configs: dict[str, ModelConfig], arguments: Arguments) -> list[dict[str, Any]]:
    from cla_jax.cache import cache_spec, ledger

    context = arguments.context
    lines = []
    for name, config in configs.items():
        for format in _formats(config, arguments):
            # As in decoding: a step writes one token.
            spec = cache_spec(config, format, batch=1, capacity=context)
            lines.append(
                {"name": name, "cache": format} | ledger.predicted(spec, context).per_token(context)
            )
    return lines


def _fits(
    configs: dict[str, ModelConfig], arguments: Arguments, budget: int
) -> list[dict[str, Any]]:
    """A line for each model and format. Raises ValueError if nothing fits anywhere."""
    from cla_jax import memory
    from cla_jax.cache import cache_spec

    lines: list[dict[str, Any]] = []
    errors: list[str] = []
    for name, config in configs.items():
        for format in _formats(config, arguments):
            line: dict[str, Any] = {"name": name, "cache": format}
            options = {"context": arguments.context, "chunk": arguments.chunk}
            try:
                fit = memory.fit(config, format, budget=budget, **options)
            except memory.TooSmall as error:
                errors.append(f"{name}: {error}")
                lines.append(line | {"sequences": 0})
                continue
            line |= dataclasses.asdict(fit)
            if arguments.shared:
                line["sharing"] = _sharing(config, format, budget, arguments)
            if arguments.compile:
                spec = cache_spec(
                    config,
                    format,
                    batch=fit.sequences,
                    capacity=arguments.context,
                    chunk=arguments.chunk,
                )
                peaks = memory.compiled(spec)
                line["compiled"] = {k: dataclasses.asdict(peak) for k, peak in peaks.items()}
            lines.append(line)
    if not any(line["sequences"] for line in lines):
        is_number = re.fullmatch("[0-9.]+", arguments.budget.strip())
        unit = ". A number alone is bytes: add a unit, such as 80GB" if is_number else ""
        raise ValueError(errors[0] + unit)
    return lines


def _sharing(
    config: ModelConfig, format: str, budget: int, arguments: Arguments
) -> dict[str, Any] | None:
    """The same with a common prefix; None for a cache that cannot be shared."""
    from cla_jax import memory
    from cla_jax.cache.prefix_shared import refusal

    if refusal(config, format, arguments.page):
        return None
    sizes = {name: getattr(arguments, name) for name in ("context", "chunk", "shared", "page")}
    try:
        return dataclasses.asdict(memory.fit(config, format, budget=budget, **sizes))
    except memory.TooSmall:
        return {"sequences": 0}


def _print_ledger(lines: list[dict[str, Any]], arguments: Arguments) -> None:
    columns = ("allocated", "resident", "written", "read")
    table = _table(
        f"KV bytes of a sequence, per token, at {arguments.context:,} tokens",
        "written: for a new token. The others: per token of context; read: by one decode step.",
        columns,
    )
    for line in lines:
        table.add_row(_name(line), line["cache"], *(f"{line[key]:,.0f}" for key in columns))
    _show(table)


def _table(title: str, caption: str, columns: Sequence[str]) -> "Table":
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, caption=caption)
    table.add_column("model", no_wrap=True)
    table.add_column("cache")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _name(line: dict[str, Any]) -> "Text":
    """The name of a model as a cell of a table: it may be that of any directory."""
    from rich.text import Text

    return Text(printable(line["name"]))


def _show(table: "Table") -> None:
    from rich.console import Console

    console = Console()
    # Cut names help nobody: where the terminal is narrow, lines wrap.
    wide = console.options.update(width=10_000)
    console.width = max(console.width, console.measure(table, options=wide).maximum)
    console.print(table)


def _shared_cell(shared: dict[str, Any] | None) -> str:
    return "cannot share" if shared is None else f"{shared['sequences']:,}"


def _print(lines: list[dict[str, Any]], arguments: Arguments, budget: int) -> None:
    from cla_jax.report.rows import human

    human_bytes = lambda count: f"{human(count)}B".replace("BB", "GB").replace("KB", "kB")
    compiled = ("prefill compiled", "decode compiled") if arguments.compile else ()
    sharing = ("fit, sharing",) if arguments.shared else ()
    table = _table(
        f"Sequences of {arguments.context:,} tokens in {human_bytes(budget)}",
        "Bytes are closed forms. KV: a sequence's row of the cache, as allocated. Work: its share of the "
        f"workspace of a prefill step with {min(arguments.chunk, arguments.context):,} tokens.",
        ("weights", "KV", "work", "fit", *sharing, *compiled, "limited by"),
    )
    for line in lines:
        if not line["sequences"]:
            table.add_row(
                *(_name(line), line["cache"], *[""] * 3, "0"),
                *[""] * len(sharing + compiled),
                "budget",
            )
            continue
        peaks = [human_bytes(peak["total"]) for peak in line.get("compiled", {}).values()]
        table.add_row(
            _name(line),
            line["cache"],
            *(human_bytes(line[key]) for key in ("weights", "kv", "workspace")),
            f"{line['sequences']:,}",
            *(_shared_cell(line["sharing"]) for _ in sharing),
            *peaks,
            line["binds"],
        )
    _show(table)


if __name__ == "__main__":
    main()
