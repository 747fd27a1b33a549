"""The cached decoder: prompts in, tokens out.

    weights = decoding_weights(model)
    spec = cache_spec(model.config, "int8", batch=8, capacity=2048, chunk=256)
    completions = generate(weights, spec, prompts, new_tokens=100, stop=[end])

Any number of prompts goes through the rows of one cache: `Engine` gives a row that is free to the next
prompt. Requests that come one by one are submitted to an `Engine` directly.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cla_jax.cache import CacheSpec
from cla_jax.config import Sampling
from cla_jax.decode import Weights, is_integer
from cla_jax.engine import LOOP, Completion, Engine


def generate(
    weights: Weights,
    spec: CacheSpec,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int | Sequence[int],
    stop: Sequence[int] = (),
    n_ids: int | None = None,
    sampling: Sampling = Sampling(),
    seeds: int | Sequence[int] = 0,
    on_tokens: Callable[[int, list[int]], bool | None] | None = None,
    every: int = 8,
) -> list[Completion]:
    """Continues every prompt; the result of each is what it would be alone, with its seed.

    Args:
      weights: from `decoding_weights`.
      spec: from `cache_spec`. Its batch is the number of prompts at a time; its capacity bounds a prompt with
        its new tokens.
      prompts: token ids, of any lengths.
      new_tokens: tokens to generate at most; one number, or one for each prompt.
      stop: ids that end a text; they are not returned.
      n_ids: ids from here on are padding of the vocabulary and never drawn.
      sampling: how tokens are drawn.
      seeds: one for each prompt; or one number, from which each prompt derives its own.
      on_tokens: called with the number of a prompt and its new tokens, as they come; True ends it, and these
        are its last tokens.
      every: decode steps between two such calls.

    Raises:
      ValueError: no prompt, an empty one, an id outside the vocabulary, more tokens than a row of the cache
        holds.
    """
    if not len(prompts):
        raise ValueError("no prompt was given")
    limits = _for_each(new_tokens, "new_tokens", prompts)
    given = _for_each(seeds, "seeds", prompts)
    if not is_integer(every) or every < 1:
        raise ValueError(f"every = {every} must be a positive integer")
    steps = LOOP if on_tokens is None else every
    engine = Engine(weights, spec, stop=stop, n_ids=n_ids, sampling=sampling, every=steps)

    def listener(i: int) -> Callable[[list[int]], bool | None] | None:
        if on_tokens is None:
            return None
        return functools.partial(on_tokens, i)

    requests = [
        engine.submit(
            prompt,
            new_tokens=limits[i],
            seed=(given[i], i) if np.ndim(seeds) == 0 else given[i],
            listener=listener(i),
            name=f"prompt {i}",
        )
        for i, prompt in enumerate(prompts)
    ]
    engine.run()
    return [request.completion for request in requests]


def _for_each(value: Any, name: str, prompts: Sequence) -> list[int]:
    values = [value] * len(prompts) if np.ndim(value) == 0 else list(value)
    if not all(map(is_integer, values)):
        raise ValueError(f"{name} = {value} must be an integer, or one for each prompt")
    if len(values) != len(prompts):
        raise ValueError(f"{len(values)} {name} for {len(prompts)} prompts")
    return values
