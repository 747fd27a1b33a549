"""A cache for prompts alone, which remembers their queries, so that their attention can be summed up.

An evicting cache is filled in two steps. The prompts go through a scratch cache in one chunk, and what is
kept of them is copied. The sums compute attention again, in blocks of queries. So weights exist for one block
at a time: memory grows with S · block, beside the queries themselves.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cla_jax.cache import Cache, CacheSpec
from cla_jax.cache.per_token import LayerCache, PerToken
from cla_jax.eviction.policy import LAST
from cla_jax.model.attention import (
    MASKED,
    StepPositions,
    grouped_queries,
    normalized,
    partial_attention,
)
from cla_jax.model.cpu_matmul import scores

QUERIES = 128  # positions whose attention exists at once


class Queries(NamedTuple):
    """Of one reader layer: its queries, scaled, and the log-sum-exp of their scores."""

    q_BKNH: jax.Array
    log_sum_BKN1: jax.Array


class Notes(NamedTuple):
    """What a scratch cache remembers of its only step."""

    queries: tuple[tuple[Queries, ...], ...]  # of each KV layer, of each reader
    positions_BT: jax.Array
    starts_BT: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchSpec(CacheSpec):
    """Made of a spec whose formats keep every token by itself, without windows, on one device."""

    def observed(
        self, p: int, layer: LayerCache, q_BTKGH: jax.Array, step: StepPositions
    ) -> tuple[jax.Array, Queries]:
        q_BKNH, over, restore = grouped_queries(q_BTKGH * q_BTKGH.shape[-1] ** -0.5)
        over_heads = lambda a_BT: over(a_BT)[:, None, :, None]
        segments = self.formats[p].segments(layer, step.lengths_B, jnp.int32(0), self.part(p))
        part = partial_attention(
            q_BKNH,
            segments,
            positions_B1N1=over_heads(step.positions_BT),
            starts_B1N1=over_heads(step.starts_BT),
        )
        saw_none = part.peak_BKN1 <= MASKED
        log_sum_BKN1 = jnp.where(saw_none, 0, part.peak_BKN1 + jnp.log(part.total_BKN1))
        o_BTKGH = restore(normalized(part)).astype(q_BTKGH.dtype)
        return o_BTKGH, Queries(q_BKNH, log_sum_BKN1)

    def settled(self, cache: Cache, notes: Sequence[Sequence[Any]], step: StepPositions) -> Cache:
        queries = tuple(map(tuple, notes))
        return dataclasses.replace(cache, pages=Notes(queries, step.positions_BT, step.starts_BT))

    # ------------------------------------------------------------------------ sums over a prompt

    @functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="observation")
    def received(
        self, p: int, layer: LayerCache, queries: Sequence[Queries], notes: Any, *, observation: int
    ) -> tuple[jax.Array, jax.Array]:
        """The attention that each position received, of all queries and of the last `observation`: [B, K, S].

        Summed over the readers and their query heads. `notes` are positions and starts, [B, T].
        """
        positions_BT, starts_BT = notes
        lengths_B1 = positions_BT.max(axis=1, keepdims=True) + 1

        def block(i: Any, sums: jax.Array, reader: Queries) -> jax.Array:
            p_BKGTS, at_BT = self._attention(p, layer, reader, positions_BT, starts_BT, i)
            last_BT = at_BT >= lengths_B1 - observation
            weights_2BT = jnp.stack([at_BT >= 0, last_BT & (at_BT >= 0)]).astype(jnp.float32)
            return sums + jnp.einsum("BKGTS,NBT->NBKS", p_BKGTS, weights_2BT)

        T = positions_BT.shape[1]
        shape = positions_BT.shape[0], self.config.n_kv_heads, T
        sums = jnp.zeros((2, *shape))
        for reader in queries:
            body = functools.partial(block, reader=reader)
            sums = jax.lax.fori_loop(0, T // self.queries_at_once(T), body, sums)
        return sums[0], sums[1]

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def lost(
        self,
        p: int,
        layer: LayerCache,
        queries: Sequence[Queries],
        notes: Any,
        dropped_CBKS,
        bands_CB,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What candidates would lose of the attention of each reader and query head: [C, R, B, K, G].

        The mean over the positions of the prompt, the most at one of them, and the mean over the last ones.
        A candidate drops positions, except those among the newest `band` of a query.
        """
        positions_BT, starts_BT = notes
        T = positions_BT.shape[1]
        size = self.queries_at_once(T)
        lengths_B1 = positions_BT.max(axis=1, keepdims=True) + 1

        def block(i: Any, sums: tuple, reader: Queries) -> tuple:
            total, worst, last = sums
            p_BKGTS, at_BT = self._attention(p, layer, reader, positions_BT, starts_BT, i)
            age_BTS = at_BT[:, :, None] - jnp.arange(T)
            # A product for all candidates at once: one each would go through the weights again.
            old_CBTS = age_BTS >= bands_CB[:, :, None, None]
            gone_CBKTS = old_CBTS[:, :, None] & dropped_CBKS[:, :, :, None]
            lost_CBKGT = jnp.einsum("BKGTS,CBKTS->CBKGT", p_BKGTS, gone_CBKTS.astype(jnp.float32))
            is_last_BT = (at_BT >= lengths_B1 - LAST) & (at_BT >= 0)
            over = lambda which_BT: jnp.einsum(
                "CBKGT,BT->CBKG", lost_CBKGT, which_BT.astype(jnp.float32)
            )
            return (
                total + over(at_BT >= 0),
                jnp.maximum(worst, lost_CBKGT.max(-1)),
                last + over(is_last_BT),
            )

        C, (B, K, N, _) = dropped_CBKS.shape[0], queries[0].q_BKNH.shape
        zeros = jnp.zeros((C, B, K, N // T))
        losses = []
        for reader in queries:
            body = functools.partial(block, reader=reader)
            total, worst, last = jax.lax.fori_loop(0, T // size, body, (zeros,) * 3)
            lengths_B11 = jnp.maximum(lengths_B1, 1)[:, :, None]
            losses.append((total / lengths_B11, worst, last / jnp.minimum(lengths_B11, LAST)))
        mean, worst, last = (jnp.stack(each, axis=1) for each in zip(*losses, strict=True))
        return mean, worst, last

    def _attention(
        self, p: int, layer: LayerCache, reader: Queries, positions_BT, starts_BT, i: Any
    ) -> tuple[jax.Array, jax.Array]:
        """The weights of block i of the queries, [B, K, G, t, S], and their positions, [B, t]."""
        format = self.formats[p]
        assert isinstance(format, PerToken)
        B, T = positions_BT.shape
        size = self.queries_at_once(T)
        keys_BSKH = format.decode(jax.tree.map(lambda held: held[:, :T], layer)).k_BSKH
        K, N = reader.q_BKNH.shape[1:3]
        cut = lambda a, axis, n: jax.lax.dynamic_slice_in_dim(a, i * n, n, axis)
        # Positions come first among the queries of a KV head: see `grouped_queries`.
        q_BKnH, log_sum_BKn1 = (cut(a, 2, size * (N // T)) for a in reader)
        at_BT, from_BT = cut(positions_BT, 1, size), cut(starts_BT, 1, size)
        weights_BKnS = jnp.exp(scores(q_BKnH, keys_BSKH) - log_sum_BKn1)
        keys = jnp.arange(T)
        seen_BTS = (keys <= at_BT[:, :, None]) & (keys >= from_BT[:, :, None])
        weights_BKTGS = weights_BKnS.reshape(B, K, size, N // T, T)
        weights_BKTGS = jnp.where(seen_BTS[:, None, :, None], weights_BKTGS, 0)
        return weights_BKTGS.swapaxes(2, 3), at_BT

    @staticmethod
    def queries_at_once(T: int) -> int:
        return math.gcd(T, QUERIES)
