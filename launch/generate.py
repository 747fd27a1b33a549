"""Continue a prompt with the model of a run.

    python -m launch.generate runs/demo/seeds/h16_mqa_cla2.seed-0 --prompt "Fellow citizens" --temperature 0.8

The model, tokenizer and config are read from the run directory.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro

from cla_jax.config import Sampling, check_new_tokens
from launch import allocator
from launch.cli import CACHES, Attention, Matmul, log_to_stderr, read, user_errors, utf8

if TYPE_CHECKING:
    from cla_jax.data.tokenizers import Tokenizer
    from cla_jax.decoder import Options
    from cla_jax.runs import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # The run directory.
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Text to continue; repeat the flag for a batch. An empty prompt starts a new document.
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Maximum number of new tokens; generation stops earlier at an end token.
    new_tokens: int = 100
    # 0 always takes the most likely token; 1 samples the model's distribution.
    temperature: float = 1.0
    # Sample from the k most likely tokens only; 0 for all.
    top_k: int = 0
    # Sample from the smallest set of tokens whose total probability is at least this.
    top_p: float = 1.0
    # Random seed; each prompt uses a seed derived from this one and the prompt's position.
    seed: int = 0
    cache: Annotated[str, tyro.conf.arg(help=f"KV cache format to decode through: {CACHES}.")] = (
        "dense"
    )
    # Prompt tokens per prefill step.
    chunk: int = 256
    attention: Attention = "xla"
    matmul: Matmul = "xla"
    # Print the text as it comes; for one prompt.
    stream: bool = False


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = read(Arguments, args=argv, prog="python -m launch.generate", description=__doc__)
    log_to_stderr()
    run = _run(arguments)
    allocator.set_up()
    # After the checks: a mistake should not wait for jax.
    from cla_jax.decoder import Decoder
    from launch import compilation_cache

    compilation_cache.enable()
    texts = [utf8(text) for text in arguments.prompt or ("",)]
    decoder = Decoder.open(
        run,
        cache=arguments.cache,
        chunk=arguments.chunk,
        attention=arguments.attention,
        matmul=arguments.matmul,
    )
    options: Options = {
        "new_tokens": arguments.new_tokens,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
    if arguments.stream:
        printer = _Printer(decoder.tokens(texts[0]), decoder.tokenizer)
        decoder.complete(texts, **{**options, "on_tokens": printer})
        printer.finish()
        return
    for text in decoder.generate(texts, **options):
        print(text)


def _run(arguments: Arguments) -> "Run":
    """The run, if it and the arguments are such that it can be decoded."""
    from cla_jax.runs import find_decodable

    run = find_decodable(arguments.run, arguments.cache, arguments.chunk)
    check_new_tokens(arguments.new_tokens)
    Sampling(temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p)
    if arguments.stream and len(arguments.prompt) > 1:
        raise ValueError(f"stream: {len(arguments.prompt)} prompts cannot be printed at once")
    return run


class _Printer:
    """Prints a text as its tokens come."""

    def __init__(self, prompt: Sequence[int], tokenizer: "Tokenizer"):
        self.stream = tokenizer.stream()
        self.waiting = self.stream.add(prompt)  # printed with the first token, after all checks

    def __call__(self, _row: int, tokens: list[int]) -> None:
        self._write(self.stream.add(tokens))

    def finish(self) -> None:
        self._write(self.stream.finish() + "\n")

    def _write(self, text: str) -> None:
        sys.stdout.write(self.waiting + text)
        sys.stdout.flush()
        self.waiting = ""


if __name__ == "__main__":
    main()
