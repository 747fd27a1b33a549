"""The cached decoder: prefill, decode steps, sampling.

Decoding uses the parameters of each layer apart, taken out of their stacks once, and an unrolled
step; slicing stacked weights inside the loop would copy them for every token. The cache is a tuple of
slots, donated, read block by block up to the current length.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax import cache as caches
from cla_jax import kv_map as kv_maps
from cla_jax.cache import Cache, CacheFormat
from cla_jax.config import ModelConfig
from cla_jax.mesh import AxisRules
from cla_jax.model.attention import attend_blocks
from cla_jax.model.layers import RMSNorm, Rope, axes, gather
from cla_jax.model.transformer import Execution, Group, Transformer, project


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's parameters as decoding wants them: in the compute dtype, layer by layer."""

    embedding: jax.Array
    groups: tuple[Group, ...]
    norm: RMSNorm
    head: jax.Array


@functools.partial(jax.jit, static_argnames="rules")
def decoding_weights(model: Transformer, rules: AxisRules) -> Weights:
    dtype = jnp.dtype(model.config.compute_dtype)
    return Weights(
        embedding=gather(model.embedding, rules, dtype)[...],
        groups=model.unstacked(Execution(rules=rules)),
        norm=model.norm,
        head=model.head_VD.astype(dtype),
    )


def decode(
    weights: Weights,
    config: ModelConfig,
    format: CacheFormat,
    cache: Cache,
    *,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    starts_BT: jax.Array,
    index: jax.Array,
    rules: AxisRules,
) -> tuple[jax.Array, Cache]:
    """One step of T tokens (1 in decoding, more in prefill): hidden states [B, T, D] and the new cache.

    The tokens go to cache entries index to index + T and see the entries from starts_BT up to their
    own. `positions_BT` are the rotary positions, an input of their own: where a consumer's query
    stands cannot depend on what its producer did to a cache.
    """
    rope = Rope(positions_BT, config)

    def attend(q_BTKGH: jax.Array, slot: Any) -> jax.Array:
        read = functools.partial(format.read, slot)
        return attend_blocks(q_BTKGH, read, format.block, first_query=index, starts_BT=starts_BT)

    run = Execution(rules=rules)
    slot_of = {layer: p for p, layer in enumerate(kv_maps.slots(config.resolved_kv_map))}
    slots = list(cache)
    spec = rules.gathered().spec(*axes("BTD"))
    x_BTD = weights.embedding.at[tokens_BT].get(out_sharding=spec)
    for group, blocks in zip(kv_maps.groups(config.resolved_kv_map), weights.groups, strict=True):
        slot = slot_of[group.source]
        if group.owns:
            kv = blocks.keys_and_values(x_BTD, rope, rules, config)
            slots[slot] = format.write(slots[slot], kv, index)
        x_BTD = blocks(x_BTD, slots[slot], rope, attend, run, config)
    return weights.norm(x_BTD), tuple(slots)


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
    # Seeds the draws; row i of a batch draws as if it were alone with seed and i.
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:  # NaN too
            raise ValueError(f"temperature = {self.temperature} must not be negative")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} must lie in 0 to 2**32 - 1")
        if self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1]")


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
    """One token a row. Temperature first, then top-k, then top-p of what is left."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV / sampling.temperature
    descending_BV = -jnp.sort(-logits_BV, axis=-1)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        least_B1 = descending_BV[:, sampling.top_k - 1, None]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
        descending_BV = jnp.where(descending_BV < least_B1, -jnp.inf, descending_BV)
    if sampling.top_p < 1:
        probabilities_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        kept_BV = before_BV < sampling.top_p
        least_B1 = jnp.min(jnp.where(kept_BV, descending_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32)


# ----------------------------------------------------------------------------------- generation


@functools.partial(
    jax.jit,
    static_argnames=("config", "format", "sampling", "new_tokens", "n_ids", "end", "rules"),
    donate_argnames="cache",
)
def _generate(
    weights, cache, tokens_BT, pads_B, *, config, format, sampling, new_tokens, n_ids, end, rules
):
    """Prefill and all decode steps in one program: [B, new_tokens], the lengths, and the cache."""
    B, T = tokens_BT.shape
    step = functools.partial(decode, weights, config, format, rules=rules)
    rows = jnp.arange(B, out_sharding=rules.spec("batch"))
    row_keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(sampling.seed)))(rows)
    starts_B1 = pads_B[:, None]

    def next_logits(x_BTD: jax.Array) -> jax.Array:
        logits_BV = project(x_BTD[:, -1:], weights.head, rules)[:, 0]
        if (spec := rules.spec("batch", None)) is not None:
            logits_BV = jax.reshard(logits_BV, spec)  # sorting wants the vocabulary whole
        # Rows of the vocabulary that no token has (padding) are never drawn.
        return jnp.where(jnp.arange(config.vocab_size) < n_ids, logits_BV, -jnp.inf)

    x_BTD, cache = step(
        cache,
        tokens_BT=tokens_BT,
        positions_BT=jnp.arange(T)[None] - starts_B1,
        starts_BT=jnp.broadcast_to(starts_B1, (B, T)),
        index=jnp.int32(0),
    )
    out_BN = jnp.full((B, new_tokens), end, jnp.int32, out_sharding=rules.spec("batch", None))
    zeros_B = jnp.zeros_like(pads_B)
    carry = (jnp.int32(0), cache, next_logits(x_BTD), out_BN, zeros_B, zeros_B == 1)

    def going(carry):
        i, _, _, _, _, done_B = carry
        return (i < new_tokens) & ~jnp.all(done_B)

    def body(carry):
        i, cache, logits_BV, out_BN, lengths_B, done_B = carry
        keys_B = jax.vmap(lambda key: jax.random.fold_in(key, i))(row_keys)
        token_B = jnp.where(done_B, end, sample(logits_BV, keys_B, sampling))
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, token_B[:, None], i, axis=1)
        done_B = done_B | (token_B == end)
        lengths_B = jnp.where(done_B, lengths_B, i + 1)
        x_BTD, cache = step(
            cache,
            tokens_BT=token_B[:, None],
            positions_BT=T + i - starts_B1,
            starts_BT=starts_B1,
            index=T + i,
        )
        return i + 1, cache, next_logits(x_BTD), out_BN, lengths_B, done_B

    _, cache, _, out_BN, lengths_B, _ = jax.lax.while_loop(going, body, carry)
    return out_BN, lengths_B, cache


def generate(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    end: int,
    n_ids: int,
    sampling: Sampling = Sampling(),
    format: CacheFormat | None = None,
    rules: AxisRules = AxisRules(),
) -> list[list[int]]:
    """Continues every prompt (token ids) by up to `new_tokens`, or to the `end` token, not included.

    Ids from `n_ids` on are rows of padding and are never drawn. Prompts may differ in length without
    seeing each other: greedily, each row's result is that of the row alone; sampling, row i draws with
    a key of its own. Raises ValueError for an empty prompt or an id that the
    model has no row for.
    """
    config = model.config
    format = format or caches.make_format("dense", config.compute_dtype)
    if new_tokens < 1:
        raise ValueError(f"new_tokens = {new_tokens} must be positive")
    if not prompts:
        raise ValueError("there is no prompt to continue")
    for row, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {row} is empty: give it at least the end token, {end}")
        if not 0 <= min(prompt) <= max(prompt) < n_ids:
            raise ValueError(f"prompt {row} has a token outside the vocabulary of {n_ids} ids")
    # Whole blocks, so that prompts of similar lengths share a compiled program.
    length = caches.round_up(max(map(len, prompts)), 32)
    tokens_BT = np.full((len(prompts), length), end, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, length - len(prompt) :] = prompt
    pads_B = np.array([length - len(prompt) for prompt in prompts], np.int32)
    cache = caches.allocate(
        format, config, batch=len(prompts), capacity=length + new_tokens, rules=rules
    )
    batch = rules.spec("batch")
    out_BN, lengths_B, _ = _generate(
        decoding_weights(model, rules),
        cache,
        jnp.asarray(tokens_BT) if batch is None else jax.device_put(tokens_BT, batch),
        jnp.asarray(pads_B) if batch is None else jax.device_put(pads_B, batch),
        config=config,
        format=format,
        sampling=sampling,
        new_tokens=new_tokens,
        n_ids=n_ids,
        end=end,
        rules=rules,
    )
    rows = zip(np.asarray(out_BN).tolist(), np.asarray(lengths_B).tolist(), strict=True)
    return [tokens[:n] for tokens, n in rows]
