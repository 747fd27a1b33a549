"""A batch of rows that decode together: the programs, and the arrays that they change.

A row is in use or done; a row that is done costs time and writes nothing. Prompts go into some rows while
the others stay as they are, and every row draws by its own seed and count. So what a row gets does not
depend on the other rows. `Engine` decides which request has which row.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, CacheSpec
from cla_jax.config import Sampling
from cla_jax.decode import Weights, decode, no_states
from cla_jax.places import Places, copy_row
from cla_jax.sampling import sample

# A seed, or a seed with a number: the seed's independent sequence of draws with that number.
Seed = int | tuple[int, int]


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


class Emitted(NamedTuple):
    """What N steps gave. Row by row, a token of -1 is none."""

    tokens_BN: jax.Array
    logprobs_BN: jax.Array
    done_B: jax.Array  # after these steps
    stopped_B: jax.Array


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
    # A row that the host has ended has reached neither a stop token nor its limit.
    done_B = rows.done_B | stopped_B | (count_B >= choice.limits_B)
    rows = _Rows(token_B, count_B, done_B, stopped_B)
    return rows, jnp.where(kept_B, token_B, -1), logprob_B


@functools.partial(jax.jit, static_argnames=("spec", "sampling"), donate_argnames="rows")
def _first(weights, x_BD, rows: _Rows, choice: _Choice, joins_B, *, spec, sampling):
    """The first token of the rows that join, from the last hidden states of their prompts."""
    zeros_B = jnp.zeros_like(rows.count_B)
    fresh = _Rows(zeros_B, zeros_B, ~joins_B, zeros_B == 1)
    drawn, token_B, logprob_B = _emit(weights, spec, sampling, choice, x_BD, fresh)
    rows = jax.tree.map(lambda new, old: jnp.where(joins_B, new, old), drawn, rows)
    emitted = Emitted(token_B[:, None], logprob_B[:, None], rows.done_B, rows.stopped_B)
    return rows, emitted


@functools.partial(
    jax.jit, static_argnames=("spec", "sampling", "steps"), donate_argnames=("cache", "rows")
)
def _loop(
    weights, cache: Cache, rows: _Rows, choice: _Choice, stop_early, *, spec, sampling, steps
):
    """Up to `steps` decode steps. With `stop_early`, none after the step at which a row ends."""
    split_BN = spec.rules.spec("batch", None)
    tokens_BN = jnp.full((spec.batch, steps), -1, jnp.int32, out_sharding=split_BN)
    logprobs_BN = jnp.zeros((spec.batch, steps), out_sharding=split_BN)
    before_B = rows.done_B

    def going(carry):
        i, _, rows, _, _ = carry
        ended = stop_early & jnp.any(rows.done_B & ~before_B)
        return (i < steps) & ~jnp.all(rows.done_B) & ~ended

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
    return cache, rows, Emitted(tokens_BN, logprobs_BN, rows.done_B, rows.stopped_B)


@jax.jit
def _keys(seeds_B, numbers_B, derived_B) -> jax.Array:
    """A random key per row: of its seed, or derived from the seed by a number."""

    def one(seed, number, derived):
        key = jax.random.key(seed)
        return jnp.where(derived, jax.random.fold_in(key, number), key)

    return jax.vmap(one)(seeds_B, numbers_B, derived_B)


class Batch:
    """The rows of a cache, and what decides their tokens; arrays that the programs above change."""

    def __init__(
        self,
        weights: Weights,
        spec: CacheSpec,
        sampling: Sampling,
        allowed_V: np.ndarray,
        stops_V: np.ndarray,
        places: Places,
    ):
        self.weights, self.spec, self.places = weights, spec, places
        self.sampling, rules = sampling, spec.rules
        self.split_B = rules.spec("batch")
        zeros_B = jnp.zeros(self.spec.batch, jnp.int32, out_sharding=self.split_B)
        self.rows = _Rows(zeros_B, jnp.copy(zeros_B), zeros_B == 0, zeros_B == 1)
        self.cache = self.spec.allocate()
        self.last_BD = no_states(spec)
        masks = allowed_V, stops_V
        self.masks = tuple(jax.device_put(mask_V, rules.spec(None)) for mask_V in masks)

    @property
    def options(self) -> Any:
        """What the programs are made for. An evicting cache grows, so its spec changes."""
        return {"spec": self.places.spec, "sampling": self.sampling}

    def end(self, ended: np.ndarray) -> None:
        """Ends rows that the host has ended, and clears the marks."""
        if ended.any():
            ended_B = jax.device_put(ended.copy(), self.split_B)
            self.rows = self.rows._replace(done_B=self.rows.done_B | ended_B)
            ended[:] = False

    def choose(self, limits: dict[int, int], seeds: dict[int, Seed]) -> None:
        """Tokens to generate at most, and seeds, of the rows that are in use."""
        limits_B, seeds_B, numbers_B, derived_B = (
            np.zeros(self.spec.batch, np.uint32) for _ in range(4)
        )
        for row, seed in seeds.items():
            limits_B[row] = limits[row]
            seeds_B[row], numbers_B[row] = seed if isinstance(seed, tuple) else (seed, 0)
            derived_B[row] = isinstance(seed, tuple)
        given = seeds_B, numbers_B, derived_B.astype(bool), limits_B.astype(np.int32)
        *given, limits_B = jax.device_put(given, (self.split_B,) * 4)
        self.choice = _Choice(_keys(*given), limits_B, *self.masks)

    def fill(self, prompts: dict[int, Sequence[int]]) -> None:
        """Puts prompts into rows of the cache, as far as they are not there already."""
        for rows in self.places.prefill_order(list(prompts)):
            twins = {row: twin for row in rows if (twin := self.places.twin(row)) is not None}
            alone = {row: prompts[row] for row in rows if row not in twins}
            self.last_BD, self.cache = self.places.fill(
                self.weights, self.cache, self.last_BD, alone
            )
            for row, twin in twins.items():
                self.cache = self.places.copy(self.cache, twin, row)
                self.last_BD = copy_row(self.last_BD, twin, row)

    def first(self, rows: Sequence[int]) -> Emitted:
        joins_B = jax.device_put(np.isin(np.arange(self.spec.batch), rows), self.split_B)
        self.rows, emitted = _first(
            self.weights, self.last_BD, self.rows, self.choice, joins_B, **self.options
        )
        return emitted

    def decode(self, steps: int, stop_early: bool) -> Emitted:
        self.cache = self.places.placed(self.cache)
        self.cache, self.rows, emitted = _loop(
            *(self.weights, self.cache, self.rows, self.choice, stop_early),
            steps=steps,
            **self.options,
        )
        return emitted
