"""A cache for prompts alone, which remembers their queries, so that their attention can be summed up.

An evicting cache is filled in two steps. The prompts go through a scratch cache in one chunk, and what is
kept of them is copied. The sums compute attention again, in blocks of queries. So weights exist for one block
at a time: memory grows with S · block, beside the queries themselves.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
SPANS = 8  # numbers of keys that blocks of queries are given


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

        def block(i: Any, sums: jax.Array, S: int, reader: Queries) -> jax.Array:
            p_BKNS, at_BN = self._attention(p, layer, reader, positions_BT, starts_BT, i, S)
            is_text_BN = at_BN >= 0
            counted = [is_text_BN, is_text_BN & (at_BN >= lengths_B1 - observation)][: len(sums)]
            # On a CPU, sums are faster here than a product of two rows with the weights.
            each = [jnp.where(is_BN[:, None, :, None], p_BKNS, 0).sum(axis=2) for is_BN in counted]
            return sums.at[..., :S].add(jnp.stack(each))

        T = positions_BT.shape[1]
        shape = positions_BT.shape[0], self.config.n_kv_heads, T
        sums = jnp.zeros((2 if observation else 1, *shape))
        for reader in queries:
            sums = self._over_blocks(T, functools.partial(block, reader=reader), sums)
        return sums[0], sums[1] if observation else jnp.zeros(shape)

    def lost(
        self,
        p: int,
        layer: LayerCache,
        queries: Sequence[Queries],
        notes: Any,
        dropped_CBKS: np.ndarray,
        bands_CB: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """What candidates would lose of the attention of each reader and query head: [C, R, B, K, G].

        The mean over the positions of the prompt, the most at one of them, and the mean over the last ones.
        A candidate drops positions, except those among the newest `band` of a query.
        """
        # Candidates with the same band share a product with the weights.
        bands_UB, band_of = np.unique(bands_CB, axis=0, return_inverse=True)
        dropped = tuple(dropped_CBKS[band_of == u] for u in range(len(bands_UB)))
        losses = self._lost(p, layer, queries, notes, dropped, bands_UB)
        in_order = np.argsort(np.argsort(band_of, kind="stable"))
        return tuple(np.asarray(each)[in_order] for each in losses)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _lost(self, p, layer, queries, notes, dropped, bands_UB) -> tuple[jax.Array, ...]:
        """The same with candidates by band: of each, [C, B, K, S]."""
        positions_BT, starts_BT = notes
        T = positions_BT.shape[1]
        lengths_B1 = positions_BT.max(axis=1, keepdims=True) + 1

        def block(i: Any, sums: tuple, S: int, reader: Queries) -> tuple:
            total, worst, last = sums
            p_BKNS, at_BN = self._attention(p, layer, reader, positions_BT, starts_BT, i, S)
            age_BNS = at_BN[:, :, None] - jnp.arange(S)
            parts = []
            for dropped_CBKS, band_B in zip(dropped, bands_UB, strict=True):
                is_old_BNS = age_BNS >= band_B[:, None, None]
                old_BKNS = jnp.where(is_old_BNS[:, None], p_BKNS, 0)
                gone_CBKS = dropped_CBKS[..., :S].astype(jnp.float32)
                parts.append(jnp.einsum("CBKS,BKNS->CBKN", gone_CBKS, old_BKNS))
            lost_CBKTG = jnp.concatenate(parts).reshape(*total.shape[:3], -1, total.shape[3])
            at_BT = at_BN[:, :: total.shape[3]]
            is_text_BT = at_BT >= 0
            over = lambda which_BT: jnp.einsum(
                "CBKTG,BT->CBKG", lost_CBKTG, which_BT.astype(jnp.float32)
            )
            return (
                total + over(is_text_BT),
                jnp.maximum(worst, lost_CBKTG.max(-2)),
                last + over(is_text_BT & (at_BT >= lengths_B1 - LAST)),
            )

        C, (B, K, N, _) = sum(map(len, dropped)), queries[0].q_BKNH.shape
        zeros = jnp.zeros((C, B, K, N // T))
        losses = []
        for reader in queries:
            body = functools.partial(block, reader=reader)
            total, worst, last = self._over_blocks(T, body, (zeros,) * 3)
            lengths_B11 = jnp.maximum(lengths_B1, 1)[:, :, None]
            losses.append((total / lengths_B11, worst, last / jnp.minimum(lengths_B11, LAST)))
        mean, worst, last = (jnp.stack(each, axis=1) for each in zip(*losses, strict=True))
        return mean, worst, last

    def _over_blocks(self, T: int, body: Callable[..., Any], carry: Any) -> Any:
        """Applies `body(i, carry, S)` to all blocks i of queries, which see none but the first S keys.

        S is a size of arrays, so there is a loop for each of a few sizes. With eight, at most a
        ninth of the scores are of keys that come after all queries of their block.
        """
        size = self.queries_at_once(T)
        blocks = T // size
        ends = sorted({blocks * (n + 1) // SPANS for n in range(SPANS)} - {0})
        for first, end in itertools.pairwise([0, *ends]):
            carry = jax.lax.fori_loop(first, end, functools.partial(body, S=end * size), carry)
        return carry

    def _attention(
        self, p: int, layer: LayerCache, reader: Queries, positions_BT, starts_BT, i: Any, S: int
    ) -> tuple[jax.Array, jax.Array]:
        """The weights of block i of the queries for the first S keys, [B, K, N, S]; their positions, [B, N].

        N is positions and query heads, positions first: see `grouped_queries`.
        """
        format = self.formats[p]
        assert isinstance(format, PerToken)
        T = positions_BT.shape[1]
        G = reader.q_BKNH.shape[2] // T
        size = self.queries_at_once(T)
        keys_BSKH = format.decode(jax.tree.map(lambda held: held[:, :S], layer)).k_BSKH
        cut = lambda a, axis, n: jax.lax.dynamic_slice_in_dim(a, i * n, n, axis)
        q_BKNH, log_sum_BKN1 = (cut(a, 2, size * G) for a in reader)
        at_BN, from_BN = (jnp.repeat(cut(a, 1, size), G, axis=1) for a in (positions_BT, starts_BT))
        weights_BKNS = jnp.exp(scores(q_BKNH, keys_BSKH) - log_sum_BKN1)
        keys = jnp.arange(S)
        seen_BNS = (keys <= at_BN[:, :, None]) & (keys >= from_BN[:, :, None])
        return jnp.where(seen_BNS[:, None], weights_BKNS, 0), at_BN

    @staticmethod
    def queries_at_once(T: int) -> int:
        return math.gcd(T, QUERIES)
