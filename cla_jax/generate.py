"""The cached decoder: prompts in, tokens out.

    weights = decoding_weights(model)
    spec = cache_spec(model.config, "int8", batch=8, capacity=2048, chunk=256)
    completions = generate(weights, spec, prompts, new_tokens=100, stop=[end])

Three programs are compiled, once for a spec and a way of sampling: a chunk of prefill, the first token,
and a loop of decode steps that stays on the device. Prompts of any lengths, numbers of new tokens, seeds
and stop tokens go through them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, CacheSpec
from cla_jax.decode import Weights, check_prompts, check_weights, decode, prefill

LOOP = 64  # decode steps between two looks of the host, if nobody listens


def _is_integer(value: Any) -> TypeGuard[int]:
    """numpy's integers too."""
    return isinstance(value, Integral)


# ------------------------------------------------------------------------------------- sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    # 0 takes the likeliest token; 1 samples the model's distribution.
    temperature: float = 1.0
    # Draw from the k likeliest tokens only; 0 for all.
    top_k: int = 0
    # Draw from the smallest set of tokens with this much probability.
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:  # NaN too
            raise ValueError(
                f"temperature = {self.temperature} must be 0 (the likeliest token), or finite and at "
                "least 1e-6"
            )
        if not _is_integer(self.top_k) or self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be an integer, and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1]")


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token a row. Temperature first, then top-k, then top-p of what is left.

    Tokens are in the order of their logits, the largest first, and of equal ones the smallest id first. Of
    this order a beginning is kept: `top_k` tokens, and no more of them than are needed for `top_p`.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    # From the peak down: a small temperature overflows nothing that could be drawn.
    peak_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    logits_BV = (logits_BV - peak_B1) / sampling.temperature
    logits_BV = _cut(logits_BV, sampling)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


def _cut(logits_BV: jax.Array, sampling: Sampling) -> jax.Array:
    """Minus infinity for the logits that top-k and top-p leave out."""
    vocabulary = logits_BV.shape[-1]
    if not 0 < sampling.top_k < vocabulary and sampling.top_p == 1:
        return logits_BV
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    kept_BV = jnp.broadcast_to(
        jnp.arange(vocabulary) < (sampling.top_k or vocabulary), logits_BV.shape
    )
    if sampling.top_p < 1:
        probabilities_BV = jax.nn.softmax(jnp.where(kept_BV, descending_BV, -jnp.inf), axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_BV &= (before_BV < sampling.top_p) | (jnp.arange(vocabulary) == 0)
    count_B1 = jnp.sum(kept_BV, axis=-1, keepdims=True)
    least_B1 = jnp.min(jnp.where(kept_BV, descending_BV, jnp.inf), axis=-1, keepdims=True)
    # Ranks of the ids alone would take a slower sort: only ties at the cut need them.
    above_BV, tied_BV = logits_BV > least_B1, logits_BV == least_B1
    room_B1 = count_B1 - jnp.sum(above_BV, axis=-1, keepdims=True)
    first_BV = tied_BV & (jnp.cumsum(tied_BV, axis=-1) <= room_B1)
    return jnp.where(above_BV | first_BV, logits_BV, -jnp.inf)


# ----------------------------------------------------------------------------------- generation


@dataclasses.dataclass(kw_only=True)
class Completion:
    """What was generated for one prompt."""

    tokens: list[int] = dataclasses.field(default_factory=list)  # without the stop token
    # Natural log of each token's probability under the model, whatever the sampling made of it.
    logprobs: list[float] = dataclasses.field(default_factory=list)
    finish: Literal["stop", "length"] = "length"


class _Rows(NamedTuple):
    """Where the rows of a batch stand."""

    token_B: jax.Array  # drawn last; not in the cache yet
    count_B: jax.Array  # tokens generated
    done_B: jax.Array
    stopped_B: jax.Array  # by a stop token


class _Choice(NamedTuple):
    """What decides the tokens, apart from the model: arrays, so that a change compiles nothing."""

    keys_B: jax.Array
    limits_B: jax.Array  # tokens to generate at most
    allowed_V: jax.Array  # ids that may be drawn
    stops_V: jax.Array  # ids that end a row


def _emit(
    weights: Weights, spec: CacheSpec, sampling: Sampling, choice: _Choice, x_BD, rows: _Rows
) -> tuple[_Rows, jax.Array, jax.Array]:
    """Draws a token a row from its last hidden state. The tokens (-1: none) and their log-probabilities."""
    logits_BV = weights.logits(x_BD[:, None], spec.rules)[:, 0]
    if (whole := spec.rules.spec("batch", None)) is not None:
        logits_BV = jax.reshard(logits_BV, whole)  # sorting wants the vocabulary whole
    # By the row's own count: a row of a batch draws as it would alone.
    keys_B = jax.vmap(jax.random.fold_in)(choice.keys_B, rows.count_B)
    allowed_BV = jnp.where(choice.allowed_V, logits_BV, -jnp.inf)
    token_B = sample(allowed_BV, keys_B, sampling)
    is_token_BV = jnp.arange(logits_BV.shape[-1]) == token_B[:, None]
    chosen_B = jnp.sum(jnp.where(is_token_BV, logits_BV, 0), axis=-1)
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    is_stop_B = jnp.any(is_token_BV & choice.stops_V, axis=-1)
    kept_B = ~rows.done_B & ~is_stop_B
    count_B = rows.count_B + kept_B
    stopped_B = rows.stopped_B | (~rows.done_B & is_stop_B)
    rows = _Rows(token_B, count_B, stopped_B | (count_B >= choice.limits_B), stopped_B)
    return rows, jnp.where(kept_B, token_B, -1), logprob_B


@functools.partial(jax.jit, static_argnames=("spec", "sampling"))
def _first(weights, x_BD, rows: _Rows, choice: _Choice, *, spec, sampling):
    rows, token_B, logprob_B = _emit(weights, spec, sampling, choice, x_BD, rows)
    return rows, token_B[:, None], logprob_B[:, None]


@functools.partial(
    jax.jit, static_argnames=("spec", "sampling", "steps"), donate_argnames=("cache", "rows")
)
def _loop(weights, cache: Cache, rows: _Rows, choice: _Choice, *, spec, sampling, steps):
    """Up to `steps` decode steps: the cache, the rows, and the tokens and log-probabilities [B, steps]."""
    split = spec.rules.spec("batch", None)
    tokens_BN = jnp.full((spec.batch, steps), -1, jnp.int32, out_sharding=split)
    logprobs_BN = jnp.zeros((spec.batch, steps), out_sharding=split)

    def going(carry):
        i, _, rows, _, _ = carry
        return (i < steps) & ~jnp.all(rows.done_B)

    def body(carry):
        i, cache, rows, tokens_BN, logprobs_BN = carry
        counts_B = (~rows.done_B).astype(jnp.int32)
        x_B1D, cache = decode(weights, spec, cache, rows.token_B[:, None], counts_B)
        rows, token_B, logprob_B = _emit(weights, spec, sampling, choice, x_B1D[:, 0], rows)
        put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=i, axis=1)
        return (
            i + 1,
            cache,
            rows,
            put(tokens_BN, token_B[:, None]),
            put(logprobs_BN, logprob_B[:, None]),
        )

    carry = (jnp.int32(0), cache, rows, tokens_BN, logprobs_BN)
    _, cache, rows, tokens_BN, logprobs_BN = jax.lax.while_loop(going, body, carry)
    return cache, rows, tokens_BN, logprobs_BN


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
    """Continues every prompt, all in one batch; each row's result is that of the row alone, with its seed.

    Args:
      weights: from `decoding_weights`.
      spec: from `cache_spec`; its batch and capacity bound the prompts.
      prompts: token ids, of any lengths.
      new_tokens: tokens to generate at most; one number, or one for each prompt.
      stop: ids that end a row; they are not returned.
      n_ids: ids from here on are padding of the vocabulary and never drawn.
      sampling: how tokens are drawn.
      seeds: one for each prompt; or one number, from which each row derives its own.
      on_tokens: called with a row's number and its new tokens, as they come; True ends the row, whose
        last tokens those are.
      every: decode steps between two such calls.

    Raises:
      ValueError: no prompt, an empty one, an id outside the vocabulary, more tokens than the cache holds.
    """
    limits = _for_each(new_tokens, "new_tokens", prompts)
    if limits and min(limits) < 1:
        raise ValueError(f"new_tokens = {min(limits)} must be positive")
    if limits and max(limits) >= 1 << 31:
        raise ValueError(f"new_tokens = {max(limits)} is more than positions can count")
    if not _is_integer(every) or every < 1:
        raise ValueError(f"every = {every} must be a positive integer")
    check_weights(weights, spec)
    check_prompts(prompts, spec, limits)
    vocabulary = spec.config.vocab_size
    n_ids = vocabulary if n_ids is None else n_ids
    for name, ids in (("stop", stop), ("n_ids - 1", [n_ids - 1])):
        if not all(_is_integer(i) and 0 <= i < vocabulary for i in ids):
            raise ValueError(f"{name} = {ids} lies outside the vocabulary of {vocabulary} ids")

    missing = spec.batch - len(prompts)
    ids = np.arange(vocabulary)
    split, rules = spec.rules.spec("batch"), spec.rules
    choice = _Choice(
        keys_B=_keys(seeds, prompts, spec),
        limits_B=jax.device_put(np.array([*limits, *[0] * missing], np.int32), split),
        allowed_V=jax.device_put(ids < n_ids, rules.spec(None)),
        stops_V=jax.device_put(np.isin(ids, list(stop)), rules.spec(None)),
    )
    x_BD, cache = prefill(weights, spec, spec.allocate(), prompts)
    zeros_B = jnp.zeros(spec.batch, jnp.int32, out_sharding=split)
    rows = _Rows(zeros_B, zeros_B, choice.limits_B == 0, zeros_B == 1)
    options = {"spec": spec, "sampling": sampling}
    rows, *emitted = _first(weights, x_BD, rows, choice, **options)
    results = [Completion() for _ in prompts]
    ended = np.zeros(spec.batch, bool)  # by whoever listens
    steps = LOOP if on_tokens is None else every
    for begin in range(1, max(limits) + steps, steps):
        # The next steps are under way before the host looks at the last ones.
        before, done_B = emitted, rows.done_B
        if begin < max(limits):
            done_B = jnp.copy(done_B)  # the loop is given the original
            if ended.any():
                rows = rows._replace(done_B=rows.done_B | jax.device_put(ended, split))
            cache, rows, *emitted = _loop(weights, cache, rows, choice, steps=steps, **options)
        _collect(results, on_tokens, ended, *before)
        if np.all(ended | np.asarray(done_B)):
            break
    for result, stopped in zip(results, ended | np.asarray(rows.stopped_B), strict=False):
        result.finish = "stop" if stopped else "length"
    return results


def _collect(results: list[Completion], on_tokens, ended, tokens_BN, logprobs_BN) -> None:
    found = zip(results, np.asarray(tokens_BN), np.asarray(logprobs_BN), strict=False)
    for row, (result, tokens_N, logprobs_N) in enumerate(found):
        if ended[row]:
            continue
        new = tokens_N[tokens_N >= 0].tolist()
        result.tokens += new
        result.logprobs += logprobs_N[tokens_N >= 0].tolist()
        if new and on_tokens is not None:
            ended[row] = bool(on_tokens(row, new))


def _for_each(value: Any, name: str, prompts: Sequence) -> list[int]:
    values = [value] * len(prompts) if np.ndim(value) == 0 else list(value)
    if not all(map(_is_integer, values)):
        raise ValueError(f"{name} = {value} must be an integer, or one for each prompt")
    if len(values) != len(prompts):
        raise ValueError(f"{len(values)} {name} for {len(prompts)} prompts")
    return values


def _keys(seeds: int | Sequence[int], prompts: Sequence, spec: CacheSpec) -> jax.Array:
    """A random key for each row."""
    given = _for_each(seeds, "seeds", prompts)
    for seed in given:
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed = {seed} must lie in 0 to 2**32 - 1")
    if _is_integer(seeds):
        return _derived_keys(np.uint32(seeds), spec=spec)
    given += [0] * (spec.batch - len(prompts))
    given_B = jax.device_put(np.array(given, np.uint32), spec.rules.spec("batch"))
    return jax.vmap(jax.random.key)(given_B)


@functools.partial(jax.jit, static_argnames="spec")
def _derived_keys(seed: jax.Array, *, spec: CacheSpec) -> jax.Array:
    rows_B = jnp.arange(spec.batch, out_sharding=spec.rules.spec("batch"))
    return jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(rows_B)
