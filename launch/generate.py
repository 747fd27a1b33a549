"""Continue a prompt with a trained run.

    python -m launch.generate runs/demo/h32_mqa_cla2 --prompt "Fellow citizens" --temperature 0.8

The model, tokenizer and config are read from the run directory.
"""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from launch.cli import user_errors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # The run directory.
    run: Annotated[str, tyro.conf.Positional]
    # Text to continue; give it several times for a batch. Empty starts a new document.
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Tokens to add at most; generation stops earlier at an end token.
    new_tokens: int = 100
    # 0 takes the likeliest token every time; 1 samples the model's distribution.
    temperature: float = 1.0
    # Draw from the k likeliest tokens only; 0 for all.
    top_k: int = 0
    # Draw from the smallest set of tokens with this much probability.
    top_p: float = 1.0
    # Seeds the draws.
    seed: int = 0


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    arguments = tyro.cli(
        Arguments, args=argv, prog="python -m launch.generate", description=__doc__
    )
    logging.basicConfig(format="%(message)s", stream=sys.stderr)

    import jax

    from cla_jax import checkpoint
    from cla_jax import mesh as meshes
    from cla_jax.config import MeshConfig
    from cla_jax.data import tokenizers
    from cla_jax.generate import Sampling, generate
    from cla_jax.runs import find_runs

    sampling = Sampling(
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
    )
    run, *others = find_runs([arguments.run])
    if others:
        raise ValueError(f"{arguments.run} holds several runs; name one of them, {run.path} say")
    config = run.config()
    tokenizer = tokenizers.load(run.tokenizer_json(), config.data.end_token)
    texts = arguments.prompt or ("",)
    # Training saw every document begin after an end token.
    prompts = [[tokenizer.end, *tokenizer.encode(text).tolist()] for text in texts]
    # One device: a handful of rows gains nothing from more.
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    rules = meshes.axis_rules(config.model, mesh)
    with jax.set_mesh(mesh):
        _, model = checkpoint.load_model(run, rules, mesh)
        continuations = generate(
            model,
            prompts,
            new_tokens=arguments.new_tokens,
            end=tokenizer.end,
            n_ids=tokenizer.size,
            sampling=sampling,
            rules=rules,
        )
    for prompt, tokens in zip(prompts, continuations, strict=True):
        print(tokenizer.decode([*prompt, *tokens]))  # together: some tokenizers join words


if __name__ == "__main__":
    main()
