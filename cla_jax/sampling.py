"""How the next token is drawn from the scores of a model."""

import jax
import jax.numpy as jnp

from cla_jax.config import Sampling


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
    most = min(sampling.top_k or vocabulary, vocabulary)
    kept_BV = jnp.broadcast_to(jnp.arange(vocabulary) < most, logits_BV.shape)
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
