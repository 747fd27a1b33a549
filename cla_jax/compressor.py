"""Prompts into an evicting cache: encoded, shown to a policy, and copied as far as it keeps them.

    compressor = Compressor(weights, evicting_spec(config, policy, classes=classes, batch=8, capacity=2048))
    cache = compressor.spec.allocate()
    x, cache = compressor.fill(cache, {0: prompt}, new_tokens=100)
    x, cache = decode(weights, compressor.spec, cache, tokens_BT, counts_B)

Shapes are static, sizes are data. The host learns what each head keeps and takes pages of the pools for it.
If a pool is too small, it grows to the next of a few sizes. Programs are compiled once a size.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, cache_spec, make_format
from cla_jax.cache.evicting import NO_PAGE, EvictingSpec, Pool, rounded
from cla_jax.cache.scratch import Notes, ScratchSpec
from cla_jax.config import ModelConfig
from cla_jax.decode import Weights, decode
from cla_jax.eviction import Policy
from cla_jax.eviction.policy import Choice, Lost, Seen
from cla_jax.eviction.rule import CHOSEN, EMPTY, Rule, kept, most_kept

GROWTH = 1.25  # from one size of a pool to the next
SHORTEST = 16  # tokens that prompts are padded to
NO_ROW = 1 << 29  # past every scratch cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """What a policy has chosen for the prompts of one `fill`, for one KV layer."""

    choice: Choice
    kept_BKS: np.ndarray
    lengths_B: np.ndarray

    def of_rows(self, rows_N: np.ndarray) -> "Chosen":
        """What was chosen for these prompts alone."""
        of_rows = lambda tree: jax.tree.map(lambda array: array[rows_N], tree)
        choice = Choice(**of_rows(vars(self.choice)))
        return Chosen(
            choice=choice, kept_BKS=self.kept_BKS[rows_N], lengths_B=self.lengths_B[rows_N]
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Profiled:
    """Prompts that are encoded, and what the policy has chosen for them."""

    x_BTD: jax.Array  # hidden states of their tokens
    encoded: Cache  # the scratch cache
    chosen: tuple[Chosen, ...]  # for each KV layer
    classes_BS: np.ndarray


@dataclasses.dataclass(kw_only=True)
class Seconds:
    """Where the time of prefills went."""

    prefill: float = 0.0
    profile: float = 0.0
    compact: float = 0.0


class Compressor:
    """Fills rows of an evicting cache on one device. `spec` changes when the pools grow.

    Args:
      weights: from `decoding_weights`, on one device.
      spec: from `evicting_spec`.
    """

    def __init__(self, weights: Weights, spec: EvictingSpec):
        self.weights, self.spec = weights, spec
        # Of each KV layer: the pages of each row, and the free ones. KV layers that are read together have
        # the same pages of their pools, and here the same objects.
        taken: list[dict[int, list[int]]] = [{} for _ in spec.pages]
        free = [list(range(n)) for n in spec.pages]
        self._taken = [taken[first] for first in spec.together]
        self._free = [free[first] for first in spec.together]
        self._left: set[int] = set()  # rows whose tables still name pages that are free
        self.chosen: tuple[Chosen, ...] = ()  # by the last fill, for each KV layer
        self.seconds = Seconds()

    def fill(
        self,
        cache: Cache,
        prompts: Mapping[int, Sequence[int]],
        new_tokens: int | Mapping[int, int],
        starts: np.ndarray | None = None,
    ) -> tuple[jax.Array, Cache]:
        """Puts prompts into rows, each with room for so many new tokens; what the rows held is forgotten.

        `starts`, if given, is the first position that each token sees, [prompts, tokens]. Returns the
        hidden states of the prompts' tokens, [prompts, T, D] with T rounded up. The cache is donated. Raises
        ValueError for prompts that the policy does not take.
        """
        profiled = self.profiled(prompts, starts)
        clock = time.monotonic()
        cache = self._compacted(cache, list(prompts), profiled, new_tokens)
        jax.block_until_ready(cache.lengths_B)
        self.seconds.compact += time.monotonic() - clock
        self.chosen = profiled.chosen
        return profiled.x_BTD, cache

    def profiled(
        self, prompts: Mapping[int, Sequence[int]], starts: np.ndarray | None = None
    ) -> "Profiled":
        """What the policy chooses for these prompts. Arguments and errors are those of `fill`."""
        self.spec.policy.check([len(prompt) for prompt in prompts.values()])
        scratch, tokens_BT, counts_B = self.padded(prompts)
        starts_BT = np.zeros_like(tokens_BT)
        if starts is not None:
            starts_BT[: starts.shape[0], : starts.shape[1]] = starts
        clock = time.monotonic()
        x_BTD, encoded = _encoded(
            self.weights, scratch.allocate(), tokens_BT, counts_B, starts_BT, spec=scratch
        )
        jax.block_until_ready(x_BTD)
        self.seconds.prefill += time.monotonic() - clock
        clock = time.monotonic()
        classes_BS = np.where(
            np.arange(tokens_BT.shape[1]) < counts_B[:, None], self.spec.classes_V[tokens_BT], 0
        ).astype(np.uint8)
        together = self.spec.together
        of_first = {
            p: self._choose(scratch, p, encoded, tokens_BT, counts_B, classes_BS)
            for p in sorted(set(together))
        }
        chosen = tuple(of_first[first] for first in together)
        self.seconds.profile += time.monotonic() - clock
        return Profiled(x_BTD=x_BTD, encoded=encoded, chosen=chosen, classes_BS=classes_BS)

    def kept_of_prompts(self) -> list[float]:
        """The share of each prompt of the last fill that is kept, over all KV layers and heads."""
        shares_PB = [one.kept_BKS.sum(-1).mean(1) / one.lengths_B for one in self.chosen]
        return np.mean(shares_PB, axis=0).tolist()

    def release(self, row: int) -> None:
        """The row's pages are free for others. The next fill empties its table before it gives them away."""
        self._left.add(row)
        for p, taken in enumerate(self._taken):
            self._free[p] += taken.pop(row, [])

    def pages_in_use(self) -> list[int]:
        """Of each KV layer."""
        return [sum(map(len, taken.values())) for taken in self._taken]

    def padded(
        self, prompts: Mapping[int, Sequence[int]]
    ) -> tuple[ScratchSpec, np.ndarray, np.ndarray]:
        """A scratch cache for the prompts, and the prompts as it takes them."""
        longest = max(map(len, prompts.values()))
        unit = max(SHORTEST, 2 ** math.ceil(math.log2(longest)) // 8)
        T, B = -(-longest // unit) * unit, len(prompts)
        tokens_BT, counts_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32)
        for i, prompt in enumerate(prompts.values()):
            tokens_BT[i, : len(prompt)], counts_B[i] = prompt, len(prompt)
        return (
            scratch_spec(self.spec.config, self.spec.policy, batch=B, tokens=T),
            tokens_BT,
            counts_B,
        )

    def _choose(
        self, scratch: ScratchSpec, p: int, encoded: Cache,
        tokens_BS: np.ndarray, counts_B: np.ndarray, classes_BS: np.ndarray,
    ) -> Chosen:  # fmt: skip
        """For the KV layers that are read together, of which p is the first."""
        notes: Notes = encoded.extra
        # Of each that is read for its keys.
        readers = [
            (scratch.representative(q), encoded.kv_layers[q], notes.readers[q], notes[1:])
            for q, first in enumerate(self.spec.together)
            if first == p and notes.readers[q]
        ]
        K, each = self.spec.config.n_kv_heads, [reader for of in readers for reader in of[2]]
        none_BKS = np.zeros((len(counts_B), K, classes_BS.shape[1]), np.float32)
        received_BKS, observed_BKS = (
            functools.reduce(np.add, [np.asarray(one) for one in sums if one is not None], none_BKS)
            for sums in list(zip(*each, strict=True))[:2]
        )

        def lost(dropped_CBKS: np.ndarray, bands_CB: np.ndarray) -> Lost:
            assert scratch.queries, f"{type(self.spec.policy).__name__}.needs_losses must be true"
            losses = [scratch.lost(*of, dropped_CBKS, bands_CB) for of in readers]
            return Lost(*(np.concatenate(each, axis=1) for each in zip(*losses, strict=True)))

        seen = Seen(
            layer=p,
            lengths_B=counts_B,
            tokens_BS=tokens_BS,
            classes_BS=classes_BS,
            received_BKS=received_BKS,
            observed_BKS=observed_BKS,
            lost=lost,
        )
        return self.chosen_of(seen)

    def chosen_of(self, seen: Seen) -> Chosen:
        """What the policy chooses for one KV layer."""
        choice = self.spec.policy.choose(seen)
        kept_BKS = kept(
            choice.rule,
            classes_of(choice, seen.classes_BS),
            choice.scores_BKS,
            seen.lengths_B,
            self.spec.policy.sinks,
            self.spec.policy.recent,
        )
        return Chosen(choice=choice, kept_BKS=kept_BKS, lengths_B=seen.lengths_B)

    # ----------------------------------------------------------------------------------- compaction

    def _compacted(
        self,
        cache: Cache,
        rows: list[int],
        profiled: "Profiled",
        new_tokens: int | Mapping[int, int],
    ) -> Cache:
        """The cache with what the rows' heads keep of their prompts."""
        encoded, chosen, classes_BS = profiled.encoded, profiled.chosen, profiled.classes_BS
        new_B = np.array(
            [new_tokens if isinstance(new_tokens, int) else new_tokens[row] for row in rows]
        )
        for row in rows:
            self.release(row)
        policy, spec = self.spec.policy, self.spec
        rooms = [
            most_kept(
                one.choice.rule, one.kept_BKS.sum(-1), one.lengths_B, new_B,
                sinks=policy.sinks, recent=policy.recent, chunk=spec.chunk,
            )
            for one in chosen
        ]  # fmt: skip
        cache = self._grown(cache, [-(-room // spec.page) for room in rooms])
        layers = []
        B, K = spec.batch, spec.config.n_kv_heads
        left = [row for row in self._left if row not in rows]
        rows_B = np.full(B, B, np.int32)  # past the batch: none
        rows_B[: len(rows) + len(left)] = rows + left
        taken = {
            p: self._take(p, rows, -(-rooms[p] // spec.page))
            for p in sorted(set(self.spec.together))
        }
        for p, (layer, one, room_BK) in enumerate(zip(cache.kv_layers, chosen, rooms, strict=True)):
            tables = np.full((B, K, self.spec.widths[p]), NO_PAGE, np.int32)
            tables[: len(rows)] = taken[self.spec.together[p]]
            plan = _plan(self.spec, p, one, tables[: len(rows)], classes_of(one.choice, classes_BS))
            of_rows = lambda a_BK: np.concatenate([a_BK, np.zeros((B - len(a_BK), K))]).astype(
                np.int32
            )
            numbers = of_rows(room_BK), Rule(*map(of_rows, one.choice.rule))
            layers.append(_put(layer, encoded.kv_layers[p], plan, rows_B, tables, *numbers))
        self._left.clear()
        lengths_B = cache.lengths_B.at[np.array(rows)].set(chosen[0].lengths_B)
        return Cache(tuple(layers), lengths_B, jnp.asarray(self.spec.classes_V))

    def _take(self, p: int, rows: list[int], pages_BK: np.ndarray) -> np.ndarray:
        """Pages of pool p for each head of the rows, [rows, K, C]."""
        tables = np.full((*pages_BK.shape, self.spec.widths[p]), NO_PAGE, np.int32)
        # The lowest ones first, in order: attention copies pages that lie side by side in one slice.
        self._free[p].sort(reverse=True)
        for i, row in enumerate(rows):
            for k, n in enumerate(pages_BK[i]):
                tables[i, k, :n] = got = [self._free[p].pop() for _ in range(n)]
                self._taken[p].setdefault(row, []).extend(got)
        return tables

    def _grown(self, cache: Cache, pages: Sequence[np.ndarray]) -> Cache:
        """The cache with pools and tables large enough for so many pages more, of each head."""
        spec = self.spec
        sizes, widths = list(spec.pages), list(spec.widths)
        for p in set(spec.together):
            pages_BK = pages[p]
            missing = int(pages_BK.sum()) - len(self._free[p])
            if missing > 0:
                sizes[p] = size_of(spec.pages[p] + missing)
                self._free[p] += range(spec.pages[p], sizes[p])
            if pages_BK.max() > widths[p]:
                widths[p] = rounded(size_of(int(pages_BK.max())), spec.page)
        sizes, widths = ([of[first] for first in spec.together] for of in (sizes, widths))
        if (tuple(sizes), tuple(widths)) == (spec.pages, spec.widths):
            return cache
        self.spec = dataclasses.replace(spec, pages=tuple(sizes), widths=tuple(widths))
        layers = [
            _padded_pool(layer, self.spec.pages[p], self.spec.widths[p])
            for p, layer in enumerate(cache.kv_layers)
        ]
        return dataclasses.replace(cache, kv_layers=tuple(layers))


def scratch_spec(config: ModelConfig, policy: Policy, *, batch: int, tokens: int) -> ScratchSpec:
    """A scratch cache for prompts of up to so many tokens, in the format of the policy."""
    format = make_format(policy.format, config.compute_dtype)
    spec = cache_spec(config, format, batch=batch, capacity=tokens, chunk=tokens)
    return ScratchSpec(
        **{field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)},
        sums=policy.profiles,
        observation=policy.observation,
        queries=policy.needs_losses,
    )


def classes_of(choice: Choice, classes_BS: np.ndarray) -> np.ndarray:
    """The class of each position for each head, [B, K, S]."""
    B, K, S = choice.scores_BKS.shape
    classes_BKS = np.broadcast_to(classes_BS[:, None], (B, K, S))
    if choice.chosen_BKS is None:
        return classes_BKS
    return classes_BKS | (CHOSEN * choice.chosen_BKS).astype(np.uint8)


def size_of(pages: int) -> int:
    """The least of the sizes that a pool may have that has so many pages."""
    size = 1
    while size < pages:
        size = math.ceil(size * GROWTH)
    return size


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def _encoded(weights: Weights, cache: Cache, tokens_BT, counts_B, starts_BT, *, spec: ScratchSpec):
    return decode(weights, spec, cache, tokens_BT, counts_B, starts_BT)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What goes into the new pages of a pool, and what is known of the entries of the rows' heads.

    `source` is of each entry of the pages, [pages of the pool, page]; pages past the pool are none.
    Positions, classes and scores are [B, K, entries].
    """

    pages_N: np.ndarray
    # Row, position and head in the scratch cache. A row past it is none: the entry is zero, since a NaN of
    # another prompt would reach attention even with a weight of 0.
    source: tuple[np.ndarray, np.ndarray, np.ndarray]
    positions: np.ndarray
    classes: np.ndarray
    scores: np.ndarray


def _plan(
    spec: EvictingSpec, p: int, one: Chosen, tables: np.ndarray, classes_BKS: np.ndarray
) -> _Plan:
    pages = tables[tables != NO_PAGE]
    N, page = spec.pages[p], spec.page
    pages_N = np.full(N, NO_PAGE, np.int32)
    pages_N[: len(pages)] = pages
    place = np.full(N, -1)  # of a page in pages_N
    place[pages] = np.arange(len(pages))
    b, k, s = np.nonzero(one.kept_BKS)
    entry = (np.cumsum(one.kept_BKS, axis=-1) - 1)[b, k, s]
    at = place[tables[b, k, entry // page]], entry % page
    heads = spec.batch, tables.shape[1], spec.widths[p] * page
    none = lambda: np.full((N, page), NO_ROW, np.int32)
    plan = _Plan(
        pages_N=pages_N,
        source=(none(), none(), none()),
        positions=np.full(heads, EMPTY, np.int32),
        classes=np.zeros(heads, np.uint8),
        scores=np.zeros(heads, np.float32),
    )
    for array, index in zip(plan.source, (b, s, k), strict=True):
        array[at] = index
    plan.positions[b, k, entry] = s
    plan.classes[b, k, entry] = classes_BKS[b, k, s]
    plan.scores[b, k, entry] = one.choice.scores_BKS[b, k, s]
    return plan


jax.tree_util.register_dataclass(
    _Plan, [field.name for field in dataclasses.fields(_Plan)], meta_fields=[]
)


@functools.partial(jax.jit, donate_argnums=0)
def _put(pool: Pool, scratch: Any, plan: _Plan, rows, tables, rooms, rule) -> Pool:
    """The pool with the planned entries copied from the KV layer of a scratch cache; the pool is donated."""
    put = lambda held, new: held.at[plan.pages_N].set(new, mode="drop")
    of_rows = lambda held, new: held.at[rows].set(new, mode="drop")
    taken = lambda full: full.at[plan.source].get(mode="fill", fill_value=0)
    return Pool(
        kept=jax.tree.map(
            lambda held, full: put(held, jnp.expand_dims(taken(full), 2)),
            pool.kept,
            scratch,
        ),
        positions=of_rows(pool.positions, plan.positions),
        classes=of_rows(pool.classes, plan.classes),
        scores=None if pool.scores is None else of_rows(pool.scores, plan.scores),
        table=of_rows(pool.table, tables),
        room=of_rows(pool.room, rooms),
        rule=jax.tree.map(of_rows, pool.rule, rule),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _padded_pool(pool: Pool, pages: int, width: int) -> Pool:
    def more(a: jax.Array, size: int, axis: int, fill: Any) -> jax.Array:
        pads = [(0, size - a.shape[i] if i == axis else 0) for i in range(a.ndim)]
        return jnp.pad(a, pads, constant_values=fill)

    page = pool.positions.shape[2] // pool.table.shape[2]
    longer = functools.partial(more, size=width * page, axis=2, fill=0)
    return pool._replace(
        kept=jax.tree.map(functools.partial(more, size=pages, axis=0, fill=0), pool.kept),
        positions=more(pool.positions, width * page, 2, EMPTY),
        classes=longer(pool.classes),
        scores=None if pool.scores is None else longer(pool.scores),
        table=more(pool.table, width, 2, NO_PAGE),
    )
