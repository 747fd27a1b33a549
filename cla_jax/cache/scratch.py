"""A cache for prompts alone, which sums up their attention for a policy.

An evicting cache is filled in two steps. The prompts go through a scratch cache in one chunk, and what is
kept of them is copied. Attention is computed for blocks of queries. So weights exist for one block at a time:
memory grows with S · block. The prefill itself sums the attention that each position receives. A second pass
computes what candidates would lose, and for it the queries are remembered.
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
)
from cla_jax.model.cpu_matmul import scores

QUERIES = 64  # positions whose attention exists at once
SPANS = 8  # how many different numbers of keys are compiled, for blocks of queries


class Reader(NamedTuple):
    """What is remembered of one reader layer; a field is None unless the policy needs it."""

    # The attention that each position received, of all queries and of the last ones: [B, K, S].
    received_BKS: jax.Array | None
    observed_BKS: jax.Array | None
    # Its queries, scaled, and the log-sum-exp of their scores.
    q_BKNH: jax.Array | None
    log_sum_BKN1: jax.Array | None


class Notes(NamedTuple):
    """What a scratch cache remembers of its only step."""

    readers: tuple[tuple[Reader, ...], ...]  # of each KV layer
    positions_BT: jax.Array
    starts_BT: jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScratchSpec(CacheSpec):
    """Made of a spec whose formats keep every token by itself, without windows, on one device."""

    sums: bool = False  # whether received attention is summed
    observation: int = 0  # the number of last queries that are also summed alone
    queries: bool = False  # whether queries are remembered, for `lost`

    def observed(
        self, p: int, layer: LayerCache, q_BTKGH: jax.Array, step: StepPositions
    ) -> tuple[jax.Array, Reader]:
        q_BKNH, _, restore = grouped_queries(q_BTKGH * q_BTKGH.shape[-1] ** -0.5)
        positions_BT, starts_BT = step.positions_BT, step.starts_BT
        B, K, N, _ = q_BKNH.shape
        T = positions_BT.shape[1]
        in_observation = lambda at_BN: at_BN >= (step.lengths_B - self.observation)[:, None]

        def block(i: Any, carry: tuple, S: int) -> tuple:
            o_BKNH, log_sum_BKN1, sums = carry
            s_BKNS, at_BN, v_BSKH = self._scores(p, layer, q_BKNH, positions_BT, starts_BT, i, S)
            peak_BKN1 = s_BKNS.max(-1, keepdims=True)
            saw_none = peak_BKN1 <= MASKED
            p_BKNS = jnp.exp(s_BKNS - peak_BKN1)
            total_BKN1 = p_BKNS.sum(-1, keepdims=True)
            part_BKNH = jnp.einsum(
                "BKNS,BSKH->BKNH",
                p_BKNS.astype(v_BSKH.dtype),
                v_BSKH,
                preferred_element_type=jnp.float32,
            )
            # Padding sees no key, so it adds nothing to the sums.
            share_BKN1 = jnp.where(saw_none, 0, 1 / total_BKN1)
            log_sum = jnp.where(saw_none, 0, peak_BKN1 + jnp.log(total_BKN1))
            of_last_BKN1 = jnp.where(in_observation(at_BN)[:, None, :, None], share_BKN1, 0)
            shares = (share_BKN1, of_last_BKN1)[: len(sums)]
            new = [jnp.einsum("BKN,BKNS->BKS", of[..., 0], p_BKNS) for of in shares]
            put = lambda a, part: jax.lax.dynamic_update_slice_in_dim(a, part, i * part.shape[2], 2)
            return (
                put(o_BKNH, part_BKNH * share_BKN1),
                put(log_sum_BKN1, log_sum),
                tuple(a.at[..., :S].add(one) for a, one in zip(sums, new, strict=True)),
            )

        carry = (
            jnp.zeros(q_BKNH.shape, jnp.float32),
            jnp.zeros((B, K, N, 1), jnp.float32),
            (jnp.zeros((B, K, T)),) * (self.sums + (self.sums and self.observation > 0)),
        )
        o_BKNH, log_sum_BKN1, sums = self._over_blocks(T, block, carry)
        received, observed = (*sums, None, None)[:2]
        queries = (q_BKNH, log_sum_BKN1) if self.queries else (None, None)
        return restore(o_BKNH).astype(q_BTKGH.dtype), Reader(received, observed, *queries)

    def settled(self, cache: Cache, notes: Sequence[Sequence[Any]], step: StepPositions) -> Cache:
        readers = tuple(map(tuple, notes))
        return dataclasses.replace(cache, extra=Notes(readers, step.positions_BT, step.starts_BT))

    # ------------------------------------------------------------------- what candidates would lose

    def lost(
        self,
        p: int,
        layer: LayerCache,
        readers: Sequence[Reader],
        notes: Any,
        dropped_CBKS: np.ndarray,
        bands_CB: np.ndarray,
    ) -> tuple[np.ndarray, ...]:
        """What candidates would lose of the attention of each reader and query head: [C, R, B, K, G].

        The mean over the positions of the prompt, the most at one of them, and the mean over the last ones.
        A candidate drops positions, except those among the newest `band` of a query.
        """
        # Candidates with the same band share a mask.
        bands_UB, band_of = np.unique(bands_CB, axis=0, return_inverse=True)
        dropped = tuple(dropped_CBKS[band_of == u] for u in range(len(bands_UB)))
        losses = self._lost(p, layer, readers, notes, dropped, bands_UB)
        in_order = np.argsort(np.argsort(band_of, kind="stable"))
        return tuple(np.asarray(each)[in_order] for each in losses)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def _lost(self, p, layer, readers, notes, dropped, bands_UB) -> tuple[jax.Array, ...]:
        """The same with candidates by band: of each, [C, B, K, S]."""
        positions_BT, starts_BT = notes
        T = positions_BT.shape[1]
        lengths_B1 = positions_BT.max(axis=1, keepdims=True) + 1

        def block(i: Any, sums: tuple, S: int, reader: Reader) -> tuple:
            total, worst, last = sums
            p_BKNS, at_BN = self._attention(p, layer, reader, positions_BT, starts_BT, i, S)
            old, mixed = [], []
            for dropped_CBKS, band_B in zip(dropped, bands_UB, strict=True):
                dropped_CBKS = dropped_CBKS[..., :S]
                # Keys before this one are older than the band of all queries of the block.
                first_B = i * self.queries_at_once(T) - band_B + 1
                old.append(dropped_CBKS & (jnp.arange(S) < first_B[:, None])[:, None])
                mixed.append(self._lost_in_part(p_BKNS, at_BN, dropped_CBKS, band_B, first_B, T))
            lost_CBKN = jnp.concatenate(mixed) + jnp.einsum(
                "CBKS,BKNS->CBKN", jnp.concatenate(old).astype(jnp.float32), p_BKNS
            )
            lost_CBKTG = lost_CBKN.reshape(*total.shape[:3], -1, total.shape[3])
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

        C, (B, K, N, _) = sum(map(len, dropped)), readers[0].log_sum_BKN1.shape
        zeros = jnp.zeros((C, B, K, N // T))
        losses = []
        for reader in readers:
            body = functools.partial(block, reader=reader)
            total, worst, last = self._over_blocks(T, body, (zeros,) * 3)
            lengths_B11 = jnp.maximum(lengths_B1, 1)[:, :, None]
            losses.append((total / lengths_B11, worst, last / jnp.minimum(lengths_B11, LAST)))
        mean, worst, last = (jnp.stack(each, axis=1) for each in zip(*losses, strict=True))
        return mean, worst, last

    def _lost_in_part(
        self, p_BKNS: jax.Array, at_BN: jax.Array, dropped_CBKS: jax.Array, band_B, first_B, T: int
    ) -> jax.Array:
        """What queries of a block lose of the keys from `first` on: some queries have these in their band.

        These are fewer keys than the block has positions, so no mask of the size of all weights is needed.
        """
        size = self.queries_at_once(T)
        from_B = jnp.maximum(first_B, 0)
        of_row = lambda a, start: jax.lax.dynamic_slice_in_dim(a, start, size, axis=a.ndim - 1)
        p_BKNM = jax.vmap(of_row)(p_BKNS, from_B)
        dropped_BCKM = jax.vmap(of_row)(dropped_CBKS.swapaxes(0, 1), from_B)
        keys_B1M = (from_B[:, None] + jnp.arange(size))[:, None]
        is_old_BNM = at_BN[:, :, None] - keys_B1M >= band_B[:, None, None]
        old_BKNM = jnp.where(is_old_BNM[:, None], p_BKNM, 0)
        return jnp.einsum("BCKM,BKNM->CBKN", dropped_BCKM.astype(jnp.float32), old_BKNM)

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
        self, p: int, layer: LayerCache, reader: Reader, positions_BT, starts_BT, i: Any, S: int
    ) -> tuple[jax.Array, jax.Array]:
        """The weights of query block i for the first S keys, [B, K, N, S]; the queries' positions, [B, N]."""
        assert reader.q_BKNH is not None
        assert reader.log_sum_BKN1 is not None
        s_BKNS, at_BN, _ = self._scores(p, layer, reader.q_BKNH, positions_BT, starts_BT, i, S)
        N = s_BKNS.shape[2]
        log_sum_BKN1 = jax.lax.dynamic_slice_in_dim(reader.log_sum_BKN1, i * N, N, 2)
        # Scores that are masked are so low that their weight is 0.
        return jnp.exp(s_BKNS - log_sum_BKN1), at_BN

    def _scores(
        self, p: int, layer: LayerCache, q_BKNH: jax.Array, positions_BT, starts_BT, i: Any, S: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The scores of query block i for the first S keys, [B, K, N, S], MASKED where unseen.

        Also the positions of the queries, [B, N], and the first S values. N is positions and query heads,
        positions first: see `grouped_queries`.
        """
        format = self.formats[p]
        assert isinstance(format, PerToken)
        T = positions_BT.shape[1]
        G = q_BKNH.shape[2] // T
        size = self.queries_at_once(T)
        kv = format.decode(jax.tree.map(lambda held: held[:, :S], layer))
        cut = lambda a, axis, n: jax.lax.dynamic_slice_in_dim(a, i * n, n, axis)
        at_BN, from_BN = (jnp.repeat(cut(a, 1, size), G, axis=1) for a in (positions_BT, starts_BT))
        keys = jnp.arange(S)
        seen_BNS = (keys <= at_BN[:, :, None]) & (keys >= from_BN[:, :, None])
        s_BKNS = scores(cut(q_BKNH, 2, size * G), kv.k_BSKH)
        return jnp.where(seen_BNS[:, None], s_BKNS, MASKED), at_BN, kv.v_BSKH

    @staticmethod
    def queries_at_once(T: int) -> int:
        return math.gcd(T, QUERIES)
