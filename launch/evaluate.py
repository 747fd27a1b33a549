"""Evaluate runs on their held-out text: by full forward, and through a KV cache.

    python -m launch.evaluate runs/demo                # every run of a study
    python -m launch.evaluate runs/demo/h32_mqa --chunk 16 --windows 64

Prints perplexity, bits per byte and the KV ledger (predicted from the config, counted from the live
arrays), and writes eval/*.json into each run directory. The held-out text is prepared again where it
is missing.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from launch import allocator
from launch.cli import user_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # Run directories, or study directories holding some.
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # KV cache formats to decode through.
    cache: tuple[str, ...] = ("dense",)
    # Tokens a cached decoding step; 1 decodes as generation does, more is faster.
    chunk: int = 1
    # Score only this many windows of the held-out split; printed, not recorded.
    windows: int | None = None
    # Where prepared data is, if not where the run was trained; missing data is prepared there.
    data_dir: str | None = None


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = tyro.cli(
        Arguments, args=argv, prog="python -m launch.evaluate", description=__doc__
    )
    logging.basicConfig(format="%(message)s", stream=sys.stderr)

    allocator.keep_freed_memory()
    from rich.console import Console
    from rich.progress import Progress

    from cla_jax.evaluate import evaluate
    from cla_jax.runs import find_runs

    console = Console()
    for run in find_runs(arguments.runs):
        console.print(f"[bold]{run.path}")
        with Progress(transient=True, console=Console(file=sys.stderr)) as bar:

            def progress(name: str, bar: Progress = bar) -> Any:
                task = bar.add_task(name, total=None)
                return lambda done, total: bar.update(task, completed=done, total=total)

            records = evaluate(
                run,
                formats=arguments.cache,
                chunk=arguments.chunk,
                windows=arguments.windows,
                data_dir=arguments.data_dir,
                progress=progress,
            )
            for name, record in records:
                console.print(
                    f"  {name:16s}perplexity {record['perplexity']:.4f}   "
                    f"{record['bits_per_byte']:.4f} bits/byte   "
                    f"{record['tokens']:,} tokens at {record['tokens_per_s']:,.0f}/s",
                    highlight=False,
                    soft_wrap=True,
                )
                for kind, count in record.get("kv_bytes", {}).items():
                    console.print(
                        f"  {'':16s}KV bytes {kind:9s}{count['predicted']:>9,} predicted "
                        f"{count['counted']:>9,} counted   per token, {record['cache_dtype']}",
                        highlight=False,
                        soft_wrap=True,
                    )


if __name__ == "__main__":
    main()
