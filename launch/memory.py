"""How many sequences fit: weights, KV cache and workspace of experiments or runs, for each cache format.

    python -m launch.memory cla_1b.h128_mqa cla_1b.h128_mqa_cla2 --budget 80GB --context 32768
    python -m launch.memory cla_1b --cache dense --cache int8 --context 8192
    python -m launch.memory runs/demo --budget 1GiB --context 128 --compile

Nothing is allocated. All bytes are closed forms; --compile adds what the compiler of the backend at hand
says of a chunk of prefill and of the decode loop, at the batch that fits.
"""

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

import experiments
from cla_jax.config import ModelConfig
from launch.cli import user_errors

UNITS = {"": 1, "B": 1} | {
    f"{prefix}{unit}": base ** (i + 1)
    for unit, base in (("B", 1000), ("iB", 1024))
    for i, prefix in enumerate("KMGT")
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # Experiments, studies, or directories of runs.
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
    # Memory of one device: 80GB is 80e9 bytes, 80GiB is 80 * 2^30.
    budget: str = "80GB"
    # Tokens of a sequence, prompt and continuation together.
    context: int = 32_768
    # KV cache format; give it several times. Unless told otherwise dense, int8, fp8, kivi4 and kivi2.
    cache: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Tokens of a prompt that go through the model at once.
    chunk: int = 256
    # Ask the compiler too (seconds a line).
    compile: bool = False
    # Print JSON instead of a table.
    json: bool = False


def parse_bytes(text: str) -> int:
    """80GB, 1.5GiB, 1000. Raises ValueError for anything else."""
    match = re.fullmatch(r"([0-9.]+)\s*([A-Za-z]*)", text.strip())
    try:
        assert match is not None
        return round(float(match[1]) * UNITS[match[2]])
    except (AssertionError, KeyError, ValueError):
        raise ValueError(
            f"budget = {text!r}: write it as 80GB (10^9), 80GiB (2^30) or bytes"
        ) from None


def models(names: Sequence[str]) -> dict[str, ModelConfig]:
    """Model configs by the name of their experiment or run."""
    from cla_jax.runs import find_runs

    found: dict[str, ModelConfig] = {}
    for name in names:
        if Path(name).exists():
            found |= {str(run.path): run.config().model for run in find_runs([name])}
        else:
            found |= {config.name: config.model for config in experiments.find(name)}
    return found


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=argv, prog="python -m launch.memory", description=__doc__)
    budget = parse_bytes(arguments.budget)
    from cla_jax import memory
    from cla_jax.cache import FORMATS, cache_spec

    # In the model's own dtype `dense` says it all.
    formats = arguments.cache or tuple(n for n in FORMATS if n not in ("float32", "bfloat16"))
    lines: list[dict[str, Any]] = []
    errors: list[str] = []
    for name, config in models(arguments.names).items():
        for format in formats:
            line: dict[str, Any] = {"name": name, "cache": format}
            options = {"context": arguments.context, "chunk": arguments.chunk}
            try:
                found = memory.fit(config, format, budget=budget, **options)
            except ValueError as error:
                if "budget" not in str(error):
                    raise
                errors.append(f"{name}: {error}")
                lines.append(line | {"sequences": 0})
                continue
            line |= dataclasses.asdict(found)
            if arguments.compile:
                spec = cache_spec(
                    config,
                    format,
                    batch=found.sequences,
                    capacity=arguments.context,
                    chunk=arguments.chunk,
                )
                peaks = memory.compiled(spec)
                line["compiled"] = {k: dataclasses.asdict(peak) for k, peak in peaks.items()}
            lines.append(line)
    if not any(line["sequences"] for line in lines):
        raise ValueError(errors[0])
    if arguments.json:
        json.dump({"budget": budget, "lines": lines}, sys.stdout, indent=1)
        print()
        return
    _print(lines, arguments, budget)


def _print(lines: list[dict[str, Any]], arguments: Arguments, budget: int) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from cla_jax.report.rows import human

    human_bytes = lambda count: f"{human(count)}B".replace("BB", "GB").replace("KB", "kB")

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"Sequences of {arguments.context:,} tokens in {human_bytes(budget)}",
        caption="Bytes are closed forms. KV: a sequence's row of the cache, as allocated. Work: a "
        f"sequence's share while {arguments.chunk:,} tokens of its prompt go through.",
    )
    compiled = ["prefill\ncompiled", "decode\ncompiled"] if arguments.compile else []
    table.add_column("model", no_wrap=True)
    table.add_column("cache")
    for column in ("weights", "KV", "work", "fit", *compiled):
        table.add_column(column, justify="right")
    table.add_column("binds")
    for line in lines:
        if not line["sequences"]:
            table.add_row(
                line["name"], line["cache"], *[""] * 3, "0", *compiled and ["", ""], "budget"
            )
            continue
        peaks = [human_bytes(peak["total"]) for peak in line.get("compiled", {}).values()]
        table.add_row(
            line["name"],
            line["cache"],
            *(human_bytes(line[key]) for key in ("weights", "kv", "workspace")),
            f"{line['sequences']:,}",
            *peaks,
            line["binds"],
        )
    Console().print(table)


if __name__ == "__main__":
    main()
