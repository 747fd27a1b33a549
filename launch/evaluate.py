"""Evaluate runs on their held-out text: by full forward, and through a KV cache.

    python -m launch.evaluate runs/demo                # every run of a study
    python -m launch.evaluate runs/demo/h32_mqa --chunk 16 --windows 64
    python -m launch.evaluate runs/demo --cache int8 --cache kivi4 --cache kivi2

    python -m launch.tasks fetch data/tasks            # once; without it, tasks come from the hub
    python -m launch.evaluate runs/demo --tasks hellaswag,piqa,sciq --task-data data/tasks
    python -m launch.evaluate runs/demo --tasks sciq --task-data data/tasks --cache int8 --limit 200

Prints perplexity, bits per byte, how far cached decoding is from the full forward, and the KV ledger
(predicted from the config, counted from the live arrays), and writes eval/*.json into each run
directory; `launch.compare` then shows every format as a point of its own. The held-out text is
prepared again where it is missing. Launched again it goes on: what is recorded of the same checkpoint,
evaluated in the same way, is shown and not evaluated again (--again).

With --tasks it scores downstream tasks instead, those of the lm-evaluation-harness (the extra
`interop`), by full forward or, with --cache, through those formats: eval/tasks-*.json. They go on alike.
"""

import contextlib
import dataclasses
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
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
    # bfloat16, int8, fp8, kivi4, kivi2. Of tasks also `full`, no cache, which is their default.
    cache: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Tokens a cached decoding step; 1 decodes as generation does, more is faster. By default 1, of tasks 16.
    chunk: int | None = None
    # Score only this many windows of the held-out split; printed, not recorded.
    windows: int | None = None
    # Measure also what the error of each cache slot does by itself.
    per_slot: bool = False
    # Evaluate also what is recorded already, of this checkpoint and with these options.
    again: bool = False
    # Windows evaluated at once; 0 for what the run was trained with.
    batch_size: int = 0
    # Devices along each axis; by default the batch is spread over all of them.
    mesh: MeshConfig = MeshConfig()
    # Deal the entries of the cache out over mesh.model (for MQA) instead of copying it there.
    split_cache: bool = False
    # Where prepared data is, if not where the run was trained; missing data is prepared there.
    data_dir: str | None = None
    # Tasks of the lm-evaluation-harness to score instead, separated by commas.
    tasks: str = ""
    # Directory of the tasks' data (python -m launch.tasks --help); by default they come from the hub.
    task_data: str | None = None
    # Score only so many examples of each task; printed, not recorded.
    limit: int | None = None
    # Examples of a task shown before each question; by default what the task says, mostly none.
    shots: int | None = None
    # Tokens of a task's text that the model reads at most; by default what it was trained with.
    context: int | None = None


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = tyro.cli(
        Arguments, args=argv, prog="python -m launch.evaluate", description=__doc__
    )
    logging.basicConfig(format="%(message)s", stream=sys.stderr)

    allocator.set_up()
    if arguments.tasks:
        _tasks(arguments)
    else:
        _held_out(arguments)


def _held_out(arguments: Arguments) -> None:
    for name in ("task_data", "limit", "shots", "context"):
        if getattr(arguments, name) is not None:
            raise ValueError(
                f"{name} = {getattr(arguments, name)!r} is of tasks: name some with --tasks"
            )
    from rich.console import Console

    from cla_jax.evaluate import check, evaluate

    say = functools.partial(Console().print, highlight=False, soft_wrap=True)
    formats = arguments.cache or ("dense",)
    chunk = 1 if arguments.chunk is None else arguments.chunk
    ready, refused = [], []
    for run in _runs(arguments):
        try:
            check(run, formats=formats, chunk=chunk)
            ready.append(run)
        except ValueError as error:
            refused.append(str(error))
    for run in ready:
        say(f"[bold]{run.path}")
        with _bars() as progress:
            for name, record in evaluate(
                run,
                formats=formats,
                chunk=chunk,
                windows=arguments.windows,
                per_slot=arguments.per_slot,
                again=arguments.again,
                progress=progress,
                **_options(arguments),
            ):
                _say_scored(say, name, record)
    if refused:
        raise ValueError("; ".join(dict.fromkeys(refused)))


def _say_scored(say: Callable[[str], None], name: str, record: dict[str, Any]) -> None:
    from cla_jax.report.rows import per_token

    say(
        f"  {name:16s}perplexity {record['perplexity']:.4f}   "
        f"{record['bits_per_byte']:.4f} bits/byte   "
        f"{record['tokens']:,} tokens at {record['tokens_per_s']:,.0f}/s, step {record['step']:,}"
    )
    if close := record.get("agreement"):
        say(
            f"  {'':16s}beside the full forward: logits differ by "
            f"{close['mean_logit_difference']:.2g} (at most "
            f"{close['max_logit_difference']:.2g}), top-1 agrees "
            f"{close['top1_agreement']:.2%}, KL {close['kl']:.2g} nats a token"
        )
    for kind, count in record.get("kv_bytes", {}).items():
        say(
            f"  {'':16s}KV bytes {kind:9s}{per_token(count['predicted']):>12s} predicted "
            f"{per_token(count['counted']):>12s} counted   per token at {record['context']:,}"
        )
    if peak := record.get("device_peak_bytes"):
        say(f"  {'':16s}device memory in use at most: {peak:,} bytes, by its allocator")
    for slot in record.get("per_slot", []):
        say(
            f"  {'':16s}slot {slot['slot']:3d} of layer {slot['layer']:3d}, read by "
            f"{slot['readers']} layers: alone in this format, KL {slot['kl']:.2g}"
        )


def _tasks(arguments: Arguments) -> None:
    if arguments.windows is not None or arguments.per_slot:
        raise ValueError(
            "windows and per_slot are of the held-out text: leave them out, or --tasks"
        )
    # The harness has bars of its own, which would run into ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    from rich.console import Console

    from cla_jax.interop import lm_eval, task_data

    say = functools.partial(Console().print, highlight=False, soft_wrap=True)
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--tasks {arguments.tasks!r} names no task")
    runs = _runs(arguments)
    with _bars() as progress:
        progress("loading tasks")
        tasks = task_data.Tasks(names, data=arguments.task_data, shots=arguments.shots)
    for run in runs:
        say(f"[bold]{run.path}")
        with _bars() as progress:
            for way, task, record in lm_eval.evaluate(
                run,
                tasks,
                ways=arguments.cache or (lm_eval.FULL,),
                chunk=lm_eval.CHUNK if arguments.chunk is None else arguments.chunk,
                limit=arguments.limit,
                context=arguments.context,
                again=arguments.again,
                progress=progress,
                **_options(arguments),
            ):
                values = record["metrics"]
                errors = {name: values.get(f"{name}_stderr") for name in values}
                shown = "   ".join(
                    f"{name} {value:.4f}" + (f" ± {errors[name]:.4f}" if errors[name] else "")
                    for name, value in values.items()
                    if not name.endswith("_stderr")
                )
                examples = (
                    f"   {record['n']:,} examples of {record['split']}" if "n" in record else ""
                )
                say(f"  {task:16s}{way:9s}{shown}{examples}, {record['seconds']:,.0f} s")


def _runs(arguments: Arguments) -> list[Any]:
    from cla_jax.runs import find_runs
    from launch import programs

    if not arguments.runs:
        raise ValueError("give at least one run or study: python -m launch.evaluate runs/NAME")
    runs = find_runs(arguments.runs)
    programs.remember(runs[0].path.parent)
    return runs


def _options(arguments: Arguments) -> dict[str, Any]:
    """How a run is opened."""
    return {
        "data_dir": arguments.data_dir,
        "mesh": arguments.mesh,
        "split_cache": arguments.split_cache,
        "batch_size": arguments.batch_size or None,
    }


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str], Any]]:
    """Progress bars, one for each name that is asked for."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(file=sys.stderr)) as bars:

        def bar(name: str) -> Callable[[int, int], None]:
            task = bars.add_task(name, total=None)
            return lambda done, total: bars.update(task, completed=done, total=total)

        yield bar


if __name__ == "__main__":
    main()
