"""Evaluate runs on their held-out text: with a full forward pass, and through a KV cache.

    python -m launch.evaluate runs/demo/seeds          # every run of a study
    python -m launch.evaluate runs/demo/seeds/h16_mqa.seed-0 --chunk 16 --windows 64
    python -m launch.evaluate runs/demo/seeds --cache int8 --cache kivi4 --cache kivi2

    python -m launch.tasks fetch data/tasks            # once; otherwise the hub is used
    python -m launch.evaluate runs/demo/seeds --tasks hellaswag,piqa,sciq --task-data data/tasks
    python -m launch.evaluate runs/demo/seeds --tasks sciq --task-data data/tasks --cache int8 --limit 200

Prints perplexity, bits per byte, the difference between cached decoding and the full forward pass, and KV
bytes per token (all counts with --ledger). Writes eval/*.json into each run directory; `launch.compare`
shows each cache format as one point. Missing held-out text is prepared again. If a result of the same
checkpoint and the same options is already recorded, it is shown and not computed again, unless --again is
given. So an interrupted evaluation continues where it stopped.

With --tasks, scores downstream tasks of the lm-evaluation-harness instead (extra `interop`), with a full
forward pass or through the formats of --cache. Writes eval/tasks-*.json.
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cla_jax.config import MeshConfig
from cla_jax.eviction import check_cache, is_policy, parse, refusal
from cla_jax.formats import FORMATS
from cla_jax.messages import printable
from launch import allocator
from launch.cli import (
    CACHES,
    Attention,
    Matmul,
    check_picture,
    collected,
    log_to_stderr,
    read,
    refuse,
    user_errors,
)

if TYPE_CHECKING:
    from cla_jax.evaluation import (
        CachedScores,
        Evaluation,
        EvictingScores,
        LayerProfile,
        TaskScore,
    )

_MARGIN = " " * 12  # below the result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # Run directories, or directories of runs.
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN ...")] = ()
    cache: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(
            help=f"KV cache format: {CACHES}. Repeat the flag for several formats. With --tasks, the "
            "default is `full`: no cache."
        ),
    ] = ()
    # Tokens per decoding step. Generation has 1; more is faster. Default: 1, and 16 with --tasks.
    chunk: int | None = None
    attention: Attention = "xla"
    matmul: Matmul = "xla"
    # Fraction of each window that is the prompt, for caches that evict tokens.
    prompt: float = 0.5
    # Plot what the eviction policies keep for each head, to this file (png, svg or pdf); for one run only.
    plot: str = ""
    # Score only this many windows of the held-out split. The result is printed and not recorded.
    windows: int | None = None
    # Also measure the error of each KV layer alone: the others are then stored exactly.
    per_kv_layer: bool = False
    # Print all KV byte counts: predicted from the config, and counted from the live arrays.
    ledger: bool = False
    # Evaluate again even if a result of this checkpoint and these options is recorded.
    again: bool = False
    # Windows per batch; 0 for the run's placement.eval_batch_size.
    batch_size: int = 0
    # Devices along each axis; by default the batch is split over all devices.
    mesh: MeshConfig = MeshConfig()
    # Split the entries of the cache over mesh.model instead of copying the cache to each device (for MQA).
    split_cache: bool = False
    # Directory of prepared data, if it has moved since training; missing data is prepared there.
    data_dir: str | None = None
    # A text source of the run that lies outside the current directory. Such a source is read only if you
    # name it here. Repeat the flag for several.
    data_source: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Tasks of the lm-evaluation-harness to score instead, separated by commas.
    tasks: str = ""
    # Directory of the tasks' data (see python -m launch.tasks --help). Default: load them from the hub.
    task_data: str | None = None
    # Score only this many examples of each task. The result is printed and not recorded.
    limit: int | None = None
    # Few-shot examples before each question. Default: the task's own number, usually 0.
    shots: int | None = None
    # Maximum context length in tokens. Default: the run's data.seq_len.
    context: int | None = None


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(Arguments, args=argv, prog="python -m launch.evaluate", description=__doc__)
    log_to_stderr()
    if arguments.batch_size < 0:
        raise ValueError(
            f"batch_size = {arguments.batch_size} must be positive, or 0 for that of the run"
        )
    allocator.set_up()
    if arguments.tasks:
        _tasks(arguments)
    else:
        _held_out(arguments)


def _held_out(arguments: Arguments) -> None:
    for name in ("task_data", "limit", "shots", "context"):
        if getattr(arguments, name) is not None:
            raise ValueError(
                f"{name} = {getattr(arguments, name)!r} applies only to tasks: add --tasks, or remove it"
            )
    if arguments.windows is not None and arguments.windows < 1:
        raise ValueError(f"windows = {arguments.windows} must be positive")
    if arguments.plot:
        check_picture(arguments.plot)
    from cla_jax.runs import check_paths

    formats = arguments.cache or ("dense",)
    chunk = 1 if arguments.chunk is None else arguments.chunk
    ready: list[Any] = []
    refused: list[str] = []
    runs = _runs(arguments)
    if arguments.plot and (len(runs) > 1 or not any(map(is_policy, formats))):
        raise ValueError(
            "--plot needs one run and a policy that evicts tokens, such as --cache fastgen:T=0.95"
        )
    profiles: dict[str, Any] = {}
    for run in runs:
        with collected(refused):
            run.check_decodable(formats, chunk, arguments.prompt)
            check_paths(run, arguments.data_dir, arguments.data_source)
            ready.append(run)
    if ready:
        # Not before: mistakes should not wait for jax.
        from cla_jax import progress
        from cla_jax.evaluate import evaluate
        from launch import compilation_cache

        compilation_cache.enable()
        for run in ready:
            print(printable(run.path))
            with collected(refused), progress.shown() as bar:
                for name, evaluated in evaluate(
                    run,
                    formats=formats,
                    chunk=chunk,
                    attention=arguments.attention,
                    matmul=arguments.matmul,
                    prompt=arguments.prompt,
                    windows=arguments.windows,
                    per_kv_layer=arguments.per_kv_layer,
                    again=arguments.again,
                    progress=bar,
                    **_options(arguments),
                ):
                    print("\n".join(_scored(name, evaluated, ledger=arguments.ledger)))
                    if profile := getattr(evaluated.scores, "profile", ()):
                        profiles[name.removeprefix("cached-")] = profile
    if arguments.plot and profiles:
        from cla_jax.report import eviction_map

        eviction_map.draw(profiles, arguments.plot)
    refuse(refused)


def _scored(name: str, evaluated: "Evaluation", *, ledger: bool) -> list[str]:
    """What to print of an evaluation: its result, and below it the cost of the cache and of its error."""
    from cla_jax.evaluation import CachedScores, EvictingScores

    scores = evaluated.scores
    lines = [
        f"  {name.removeprefix('cached-'):9s} perplexity {scores.perplexity:,.4f}   "
        f"{scores.bits_per_byte:.4f} bits/byte   "
        f"{scores.tokens:,} tokens, step {evaluated.step:,}"
    ]
    for part, scored in scores.components.items():
        lines.append(
            f"{_MARGIN}{part}: perplexity {scored.perplexity:,.4f}   "
            f"{scored.bits_per_byte:.4f} bits/byte   {scored.tokens:,} tokens"
        )
    if isinstance(scores, CachedScores):
        lines += [_MARGIN + line for line in _cost_and_error(scores)]
    if isinstance(scores, EvictingScores):
        lines += [_MARGIN + line for line in _evicted(scores)]
    if isinstance(scores, CachedScores):
        lines += [_MARGIN + line for line in _byte_counts(scores, every=ledger)]
    if ledger and (peak := evaluated.device_peak_bytes):
        lines.append(
            f"{_MARGIN}peak device memory in use: {peak:,} bytes, reported by the allocator"
        )
    for layer in getattr(scores, "per_kv_layer", None) or ():
        lines.append(
            f"{_MARGIN}KV layer {layer.kv_layer:3d} of layer {layer.layer:3d}, read by "
            f"{layer.readers} layer{'s' * (layer.readers != 1)}: only this one in the format, "
            f"KL {max(layer.kl, 0):.2g} nats per token"
        )
    return lines


def _cost_and_error(scores: "CachedScores") -> list[str]:
    from cla_jax.report.rows import per_token

    lines = []
    if close := scores.agreement:
        lines.append(
            f"against the full forward pass: same top token {close.top1_agreement:.2%}, KL "
            f"{max(close.kl, 0):.1e} nats per token, largest logit difference "
            f"{close.max_logit_difference:.1e}"
        )
    if scores.kv_bytes:
        by = f", read by the kernel {scores.attention}" if scores.attention else ""
        by += f", weights multiplied by the kernel {scores.matmul}" if scores.matmul else ""
        lines.append(
            f"{per_token(scores.kv_bytes['resident'].counted)} resident KV bytes per token at "
            f"{scores.context:,} tokens; unquantised parts are {scores.cache_dtype}{by}"
        )
    return lines


def _byte_counts(scores: "CachedScores", *, every: bool) -> list[str]:
    """The counts that differ from what was predicted, or all of them."""
    from cla_jax.report.rows import per_token

    return [
        f"KV bytes {kind:9s}{per_token(count.predicted):>12s} predicted "
        f"{per_token(count.counted):>12s} counted"
        for kind, count in scores.kv_bytes.items()
        if every or count.counted != count.predicted
    ]


def _evicted(scores: "EvictingScores") -> list[str]:
    lines = []
    if after := scores.after_prompt:
        lines += [
            f"after prompts of {scores.prompt:.0%} of a window: perplexity {after.perplexity:,.4f}, "
            f"with a full forward pass {after.perplexity_by_full_forward:,.4f}",
            f"{scores.kept_share:.1%} of all tokens are kept at the end of a window",
        ]
    if classes := scores.token_classes:
        marks = printable(" ".join(classes.marks), 200)
        lines.append(
            f"special tokens: {classes.special}; punctuation tokens: {classes.punctuation}, {marks}"
        )
    return lines + [_chosen(layer) for layer in scores.profile]


def _chosen(layer: "LayerProfile") -> str:
    """What the policy has chosen for the heads of a KV layer: a line of the profile."""
    mean = lambda numbers: sum(numbers) / len(numbers)
    text = f"KV layer {layer.kv_layer:3d}: {mean(layer.kept):4.0%} of the prompt is kept"
    if layer.policies:
        shares = {name: mean(one.share) for name, one in layer.policies.items()}
        recovery = layer.recovery
        text += f"; {', '.join(f'{name} {share:.0%}' for name, share in shares.items() if share)}"
        text += (
            f"; attention kept {mean(recovery['min']):.3f} (at one position "
            f"{mean(recovery['worst']):.3f})"
        )
    return text


def _tasks(arguments: Arguments) -> None:
    if (
        arguments.windows is not None
        or arguments.per_kv_layer
        or arguments.ledger
        or arguments.plot
        or arguments.prompt != Arguments.prompt
    ):
        raise ValueError(
            "--windows, --prompt, --per-kv-layer, --ledger and --plot do not apply to tasks: remove them, or "
            "--tasks"
        )
    # The harness has bars of its own, which would run into ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    names = [name.strip() for name in arguments.tasks.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--tasks {arguments.tasks!r} names no task")
    for name in arguments.cache:
        check_cache(name, ("full", *FORMATS))
    refused: list[str] = []
    runs = _scorable(arguments, refused)
    if not runs:
        refuse(refused)
    from cla_jax import progress
    from cla_jax.interop import lm_eval, task_data
    from launch import compilation_cache

    compilation_cache.enable()
    with progress.shown() as bar:
        bar("loading tasks")(0, len(names))
        tasks = task_data.Tasks(names, data=arguments.task_data, shots=arguments.shots)
    for run in runs:
        print(printable(run.path))
        with collected(refused), progress.shown() as bar:
            for way, task, score in lm_eval.evaluate(
                run,
                tasks,
                ways=arguments.cache or (lm_eval.FULL,),
                chunk=lm_eval.CHUNK if arguments.chunk is None else arguments.chunk,
                attention=arguments.attention,
                matmul=arguments.matmul,
                limit=arguments.limit,
                context=arguments.context,
                again=arguments.again,
                progress=bar,
                **_options(arguments),
            ):
                _print_task(task, way, score)
    refuse(refused)


def _scorable(arguments: Arguments, refused: list[str]) -> list[Any]:
    """The runs that can be scored as asked; `refused` is told why others cannot."""
    from cla_jax.runs import check_paths

    runs = []
    for run in _runs(arguments):
        with collected(refused):
            check_paths(run, arguments.data_dir, arguments.data_source)
            for policy in map(parse, filter(is_policy, arguments.cache)):
                config = run.config()
                reach = arguments.context or config.data.seq_len
                if words := refusal(config.model, policy, reach):
                    raise ValueError(f"{run.path}: {words}")
            runs.append(run)
    return runs


def _print_task(task: str, way: str, score: "TaskScore") -> None:
    values = score.metrics
    errors = {name: values.get(f"{name}_stderr") for name in values}
    shown = "   ".join(
        f"{name} {value:.4f}" + (f" ± {errors[name]:.4f}" if errors[name] else "")
        for name, value in values.items()
        if not name.endswith("_stderr")
    )
    examples = "" if score.n is None else f"   {_examples(score.n)} of {score.split}"
    seconds = "" if score.seconds is None else f", {score.seconds:,.0f} s"
    kept = "" if score.kept_of_prompt is None else f", {score.kept_of_prompt:.0%} of contexts kept"
    print(f"  {task:15s} {way:8s} {shown}{examples}{kept}{seconds}")
    for depth, part in score.depths.items():
        values = "   ".join(f"{name} {value:.4f}" for name, value in part.metrics.items())
        print(f"  {'':16s}answer at depth {depth}   {values}   {_examples(part.n)}")


def _examples(n: int) -> str:
    return f"{n:,} example{'s' * (n != 1)}"


def _runs(arguments: Arguments) -> list[Any]:
    from cla_jax.runs import find_runs

    if not arguments.runs:
        raise ValueError("give at least one run or study: python -m launch.evaluate runs/NAME")
    return find_runs(arguments.runs)


def _options(arguments: Arguments) -> dict[str, Any]:
    """How a run is opened."""
    return {
        "data_dir": arguments.data_dir,
        "data_sources": arguments.data_source,
        "mesh": arguments.mesh,
        "split_cache": arguments.split_cache,
        "batch_size": arguments.batch_size or None,
    }


if __name__ == "__main__":
    main()
