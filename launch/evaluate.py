"""Evaluate runs on their held-out text: by full forward, and through a KV cache.

    python -m launch.evaluate runs/demo                # every run of a study
    python -m launch.evaluate runs/demo/h32_mqa --chunk 16 --windows 64
    python -m launch.evaluate runs/demo --cache int8 --cache kivi4 --cache kivi2

Prints perplexity, bits per byte, how far cached decoding is from the full forward, and the KV ledger
(predicted from the config, counted from the live arrays), and writes eval/*.json into each run
directory; `launch.compare` then shows every format as a point of its own. The held-out text is
prepared again where it is missing.
"""

import dataclasses
import functools
import logging
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from cla_jax.config import MeshConfig
from launch import allocator
from launch.cli import user_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # Run directories, or study directories holding some.
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # KV cache format to decode through; give it several times: dense (the model's dtype), float32,
    # bfloat16, int8, fp8, kivi4, kivi2.
    cache: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Tokens a cached decoding step; 1 decodes as generation does, more is faster.
    chunk: int = 1
    # Score only this many windows of the held-out split; printed, not recorded.
    windows: int | None = None
    # Measure also what the error of each cache slot does by itself.
    per_slot: bool = False
    # Windows evaluated at once; 0 for what the run was trained with.
    batch_size: int = 0
    # Devices along each axis; by default the batch is spread over all of them.
    mesh: MeshConfig = MeshConfig()
    # Deal the entries of the cache out over mesh.model (for MQA) instead of copying it there.
    split_cache: bool = False
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
    from launch import programs

    console = Console()
    runs = find_runs(arguments.runs)
    programs.remember(runs[0].path.parent)
    for run in runs:
        console.print(f"[bold]{run.path}")
        with Progress(transient=True, console=Console(file=sys.stderr)) as bar:

            def progress(name: str, bar: Progress = bar) -> Any:
                task = bar.add_task(name, total=None)
                return lambda done, total: bar.update(task, completed=done, total=total)

            records = evaluate(
                run,
                formats=arguments.cache or ("dense",),
                chunk=arguments.chunk,
                windows=arguments.windows,
                per_slot=arguments.per_slot,
                data_dir=arguments.data_dir,
                mesh=arguments.mesh,
                split_cache=arguments.split_cache,
                batch_size=arguments.batch_size or None,
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
                say = functools.partial(console.print, highlight=False, soft_wrap=True)
                if close := record.get("agreement"):
                    say(
                        f"  {'':16s}beside the full forward: logits differ by "
                        f"{close['mean_logit_difference']:.2g} (at most "
                        f"{close['max_logit_difference']:.2g}), top-1 agrees "
                        f"{close['top1_agreement']:.2%}, KL {close['kl']:.2g} nats a token"
                    )
                for kind, count in record.get("kv_bytes", {}).items():
                    say(
                        f"  {'':16s}KV bytes {kind:9s}{count['predicted']:>11,.10g} predicted "
                        f"{count['counted']:>11,.10g} counted   per token at {record['context']:,}"
                    )
                for slot in record.get("per_slot", []):
                    say(
                        f"  {'':16s}slot {slot['slot']:3d} of layer {slot['layer']:3d}, read by "
                        f"{slot['readers']} layers: alone in this format, KL {slot['kl']:.2g}"
                    )


if __name__ == "__main__":
    main()
