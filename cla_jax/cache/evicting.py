"""A KV cache in which each KV head of each row keeps only the tokens that its rule selects.

Every (row, KV layer, KV head) is a separate sequence. Its entries are in pages of one pool for each KV layer,
with a table of pages. Softmax does not care about the order of keys, and cached keys are rotated already. So
an entry that is evicted is marked empty, and a later token takes its place. An entry knows its position, its
class and, where the policy ranks by attention, the attention that it has received.

Where layers read the keys of one KV layer and the values of another, these KV layers keep the same tokens in
the same entries: their readers are counted together.

A step writes its tokens, lets all layers read, adds up what each entry received, and evicts last. So all
readers of a step see the same entries, and a token always sees itself.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, CacheSpec, cache_spec, make_format
from cla_jax.cache.per_token import PerToken, Shape
from cla_jax.config import ModelConfig
from cla_jax.eviction import Policy, refusal
from cla_jax.eviction import rule as rules_of
from cla_jax.eviction.rule import (
    PUNCTUATION,
    SPECIAL,
    Rule,
    hitters_of,
    keeps_all,
    kept_whatever_its_score,
)
from cla_jax.model.attention import (
    EMPTY,
    KV,
    Segment,
    StepPositions,
    attention_received,
    grouped_queries,
    normalized,
    partial_attention,
)
from cla_jax.model.platform import on_cpu

assert EMPTY == rules_of.EMPTY

BLOCK = 512  # entries of a head that are read at once
SMALLEST_PAGE, LARGEST_PAGE = 16, 256  # entries
MOST_SLICES = 32  # pages that are read one by one, of all heads together
NO_PAGE = 1 << 29  # in a table: larger than any page number of any pool


class Pool(NamedTuple):
    """The entries of one KV layer, and what each head of each row has of them.

    Keys and values are in pages. What is known of an entry is in arrays by head, [B, K, entries], which a
    step reads and changes as a whole. They have room for the head with most pages.
    """

    kept: (
        Any  # keys and values in the cache's format, [pages, page, ...]: each entry of one KV head
    )
    positions: Any  # int32; EMPTY where there is no token
    classes: Any  # uint8
    scores: Any  # float32; None where nothing is ranked
    table: Any  # [B, K, C]: the pages of each head, or NO_PAGE
    room: Any  # [B, K]: entries that a head may use
    rule: Rule  # what each head keeps


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictingSpec(CacheSpec):
    """Everything static about an evicting cache. Make it with `evicting_spec`, which checks it."""

    reads_tokens = True

    # The part of the policy that compiled programs depend on; thresholds and budgets are data.
    policy: Policy = dataclasses.field(compare=False)
    programs: tuple[Any, ...]
    # Of each token of the vocabulary, a byte each. Programs take them as data.
    classes: bytes = dataclasses.field(compare=False)
    page: int  # entries
    pages: tuple[int, ...]  # of the pool of each KV layer
    widths: tuple[int, ...]  # pages of a head at most, in each KV layer

    @property
    def one_head(self) -> ModelConfig:
        """The model as if it had one KV head: what an entry holds."""
        return dataclasses.replace(self.config, n_kv_heads=1)

    @property
    def together(self) -> tuple[int, ...]:
        return self.config.sharing.together

    @property
    def ranks(self) -> bool:
        return self.policy.scoring != "none"

    def half_bytes(self, p: int, half: str) -> int:
        """Bytes of the keys, `k`, or the values, `v`, of an entry."""
        return self._format(p).bytes_per_token(self.one_head, half)

    def entry_bytes(self, p: int) -> tuple[int, int]:
        """Bytes of an entry: keys and values; position, class and score."""
        return self.half_bytes(p, self.holds[p]), 5 + 4 * self.ranks

    def representative(self, p: int) -> int:
        size = lambda layer: (self.pages[layer], self.widths[layer])
        return next(layer for layer in range(p + 1) if size(layer) == size(p))

    def shapes(self, p: int) -> Pool:
        kept = self.formats[p].shapes(self.one_head, self.pages[p], self.page, self.holds[p])
        heads = self.batch, self.config.n_kv_heads
        of = lambda dtype: Shape("BKE", (*heads, self.widths[p] * self.page), jnp.dtype(dtype))
        count = Shape("BK", heads, jnp.dtype("int32"))
        return Pool(
            kept=kept,
            positions=of("int32"),
            classes=of("uint8"),
            scores=of("float32") if self.ranks else None,
            table=Shape("BKE", (*heads, self.widths[p]), jnp.dtype("int32")),
            room=count,
            rule=Rule(*(count,) * len(Rule._fields)),
        )

    def allocate(self) -> Cache:
        """Empty pools; heads without pages."""
        return dataclasses.replace(self._empty(), extra=jnp.asarray(self.classes_V))

    @functools.cached_property
    def classes_V(self) -> np.ndarray:
        return np.frombuffer(self.classes, np.uint8)

    @functools.partial(jax.jit, static_argnums=0)
    def _empty(self) -> Cache:

        def empty(p: int) -> Pool:
            zeros = lambda shape: jnp.zeros(shape.shape, shape.dtype)
            pool = jax.tree.map(zeros, self.shapes(p), is_leaf=lambda x: isinstance(x, Shape))
            return pool._replace(
                positions=jnp.full_like(pool.positions, EMPTY),
                table=jnp.full_like(pool.table, NO_PAGE),
            )

        layers = tuple(empty(p) for p in range(len(self.pages)))
        return Cache(layers, jnp.zeros(self.batch, jnp.int32))

    # ------------------------------------------------------------------------------- a step

    def source(self, layers: Sequence[Pool], k: int, v: int) -> Pool:
        """The entries of layers that read these keys and values, which lie in the same entries."""
        return layers[k]._replace(kept=super().source([layer.kept for layer in layers], k, v))

    def write(self, p: int, layer: Pool, kv: KV, step: StepPositions) -> Pool:
        """The new tokens of a row take the first empty entries of each head."""
        T, table, classes_V = step.positions_BT.shape[1], layer.table, step.extra
        assert self.chunk >= T, f"{T} tokens in a step of a cache made for {self.chunk}"
        E = layer.positions.shape[-1]
        is_free_BKE = (layer.positions == EMPTY) & (jnp.arange(E) < layer.room[..., None])
        free_BKE = jnp.where(is_free_BKE, jnp.arange(E), E)

        def next_free(last_BK1: jax.Array, _: Any) -> tuple[jax.Array, jax.Array]:
            entry_BK1 = jnp.where(free_BKE > last_BK1, free_BKE, E).min(-1, keepdims=True)
            return entry_BK1, entry_BK1[..., 0]

        # Text comes before padding in a step, so the t-th token takes the t-th free entry.
        first = jnp.full_like(layer.room, -1)[..., None]
        entry_BKT = jnp.moveaxis(jax.lax.scan(next_free, first, length=T)[1], 0, -1)
        is_put_BKT = (entry_BKT < E) & (step.positions_BT >= 0)[:, None]
        index_BKT = jnp.minimum(entry_BKT // self.page, self.widths[p] - 1)
        page_BKT = jnp.take_along_axis(table, index_BKT, axis=2)
        page_BKT = jnp.where(is_put_BKT, page_BKT, NO_PAGE)
        at = page_BKT, entry_BKT % self.page

        def put(held: jax.Array, new_BKT: jax.Array) -> jax.Array:
            new_BKT = jnp.broadcast_to(new_BKT, (*at[0].shape, *new_BKT.shape[3:]))
            return held.at[at].set(new_BKT.astype(held.dtype), mode="drop")

        row_B1, head_1K = jnp.indices(layer.room.shape, sparse=True)
        noted = row_B1[..., None], head_1K[..., None], jnp.where(is_put_BKT, entry_BKT, E)

        def note(held: jax.Array, new_BKT: jax.Array) -> jax.Array:
            new_BKT = jnp.broadcast_to(new_BKT, entry_BKT.shape).astype(held.dtype)
            return held.at[noted].set(new_BKT, mode="drop")

        encoded = self._format(p).encode(kv)
        each = lambda held, new: put(held, jnp.expand_dims(new.swapaxes(1, 2), 3))
        classes_BT = classes_V.at[step.tokens_BT].get(mode="clip")
        return layer._replace(
            kept=jax.tree.map(each, layer.kept, encoded),
            positions=note(layer.positions, step.positions_BT[:, None]),
            classes=note(layer.classes, classes_BT[:, None]),
            scores=note(layer.scores, self._first_scores(self.together[p], step))
            if self.ranks
            else None,
        )

    def _first_scores(self, p: int, step: StepPositions) -> jax.Array:
        """Of new tokens, in a shape that broadcasts to [B, K, T]."""
        positions_B1T, tokens_B1T = (
            a_BT.astype(jnp.uint32)[:, None] for a_BT in (step.positions_BT, step.tokens_BT)
        )
        heads_K1 = jnp.arange(self.config.n_kv_heads, dtype=jnp.uint32)[:, None]
        return jnp.asarray(self.policy.first_scores(positions_B1T, tokens_B1T, heads_K1, p))

    def attend(self, p: int, layer: Pool, q_BTKGH: jax.Array, step: StepPositions) -> jax.Array:
        """Attention of the new tokens of a step over what their heads keep. [B, T, K, G, H]"""
        return self.observed(p, layer, q_BTKGH, step)[0]

    def observed(
        self, p: int, layer: Pool, q_BTKGH: jax.Array, step: StepPositions
    ) -> tuple[jax.Array, jax.Array | None]:
        """The same, and the attention that each entry received of it, [B, K, E]."""
        B, _, K, _, H = q_BTKGH.shape
        q_BKNH, over, restore = grouped_queries(q_BTKGH * H**-0.5)
        # To attention a KV head of a row is a row of one KV head.
        apart = lambda a_BKX: a_BKX.reshape(B * K, 1, *a_BKX.shape[2:])
        over_heads = lambda a_BT: jnp.repeat(over(a_BT), K, axis=0)[:, None, :, None]
        segment = self._segment(p, layer)
        sees: dict[str, Any] = {
            "positions_B1N1": over_heads(step.positions_BT),
            "starts_B1N1": over_heads(step.starts_BT),
        }
        if self.policy.scoring != "attention":
            part, received_BKE = partial_attention(apart(q_BKNH), [segment], **sees), None
        else:
            blocks = layer.table.shape[-1] // pages_at_once(self.page, layer.table.shape[-1])
            part, received = attention_received(apart(q_BKNH), segment, blocks=blocks, **sees)
            received_BKE = received.reshape(B, K, -1)
        o_BTKGH = restore(normalized(part).reshape(q_BKNH.shape)).astype(q_BTKGH.dtype)
        return o_BTKGH, received_BKE

    def settled(self, cache: Cache, notes: Sequence[Sequence[Any]], step: StepPositions) -> Cache:
        """The cache after the last reader of a step: scores are added up, and heads evict."""
        layers = []
        for p, layer in enumerate(cache.kv_layers):
            if self.policy.scoring == "attention":
                readers = (of for q, of in enumerate(notes) if self.together[q] == self.together[p])
                received = sum(itertools.chain.from_iterable(readers))
                layer = layer._replace(scores=layer.scores + received)
            positions_BKE = jax.lax.cond(
                jnp.all(keeps_all(layer.rule, self.policy.sinks)),
                lambda layer=layer: layer.positions,
                lambda layer=layer: self._kept_positions(layer, step.lengths_B),
            )
            layers.append(layer._replace(positions=positions_BKE))
        return dataclasses.replace(cache, kv_layers=tuple(layers))

    def _kept_positions(self, layer: Pool, lengths_B: jax.Array) -> jax.Array:
        """What the rules keep, by position. A step of T tokens makes at most T entries superfluous."""
        rule, before_BKE = layer.rule, layer.positions
        lengths_BK = jnp.broadcast_to(lengths_B[:, None], rule.since.shape)
        always_BKE = kept_whatever_its_score(
            rule, before_BKE, layer.classes, lengths_BK, self.policy.sinks, self.policy.recent
        )
        may_go_BKE = (before_BKE != EMPTY) & ~always_BKE
        allowed_BK = hitters_of(rule, lengths_BK, self.policy.recent)

        def evict_one(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            positions_BKE, too_many_BK = state
            among_BKE = may_go_BKE & (positions_BKE != EMPTY)
            if self.ranks:
                scores_BKE = jnp.where(among_BKE, layer.scores, jnp.inf)
                among_BKE &= scores_BKE <= scores_BKE.min(-1, keepdims=True)
            oldest_BK1 = jnp.where(among_BKE, positions_BKE, EMPTY).min(-1, keepdims=True)
            goes_BKE = among_BKE & (positions_BKE == oldest_BK1) & (too_many_BK > 0)[..., None]
            return jnp.where(goes_BKE, EMPTY, positions_BKE), too_many_BK - 1

        # Usually no head has too many, or each has one.
        state = before_BKE, may_go_BKE.sum(-1) - allowed_BK
        positions_BKE, _ = jax.lax.while_loop(lambda s: jnp.any(s[1] > 0), evict_one, state)
        return positions_BKE

    # ------------------------------------------------------------------------------- pages

    def _segment(self, p: int, layer: Pool) -> Segment:
        B, K, C = layer.table.shape
        M = pages_at_once(self.page, C)
        positions_NE = layer.positions.reshape(B * K, -1)
        S = M * self.page

        def read(i: Any) -> KV:
            of_block = jax.lax.dynamic_slice_in_dim(layer.table, i * M, M, axis=2)
            pages_NM = of_block.reshape(B * K, M)
            by_head = lambda held: held.reshape(B * K, S, *held.shape[2:])
            return self._format(p).decode(jax.tree.map(by_head, taken(layer.kept, pages_NM)))

        def positions(i: Any) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(positions_NE, i * S, S, axis=1)

        used = jnp.where(positions_NE != EMPTY, jnp.arange(positions_NE.shape[1]) + 1, 0).max()
        return Segment(read, positions, 0, -(-used // S), tuple(jax.tree.leaves(layer.kept)))

    def _format(self, p: int) -> PerToken:
        format = self.formats[p]
        assert isinstance(format, PerToken)
        return format


def taken(kept: Any, pages_NM: jax.Array) -> Any:
    """These pages of the arrays of a pool, one after the other; zeros where a head has no page.

    Entries without a page are masked, but another sequence may have left NaN there: see `CacheSpec.reset`.

    On a CPU, a gather computes the place of each number, and takes up to twice as long as slices. If the
    pages of every head lie side by side, one slice for each head has them. A slice may end with pages of
    other heads, which become zeros.
    """
    N, M = pages_NM.shape
    missing_NM = pages_NM == NO_PAGE
    pool = len(jax.tree.leaves(kept)[0])

    def own(pages: Any) -> Any:
        of_page = lambda a: missing_NM.reshape(-1, *[1] * (a.ndim - 1))
        return jax.tree.map(lambda a: jnp.where(of_page(a), 0, a), pages)

    gathered = lambda: own(
        jax.tree.map(lambda held: held.at[pages_NM.reshape(-1)].get(mode="clip"), kept)
    )
    if not on_cpu() or N > MOST_SLICES:
        return gathered()

    cut = jax.lax.dynamic_slice_in_dim

    def slices(firsts: jax.Array, pages: int) -> Any:
        return jax.tree.map(
            lambda held: jnp.concatenate([cut(held, i, pages) for i in firsts]), kept
        )

    # A head without a page in the block takes those from page 0 on, which become zeros.
    first_N = jnp.where(missing_NM[:, 0], 0, pages_NM[:, 0])
    as_if_NM = first_N[:, None] + jnp.arange(M)
    side_by_side = jnp.all((pages_NM == as_if_NM) | missing_NM)

    def beginnings() -> Any:
        """The pages of each head, in the first places of M; the pool may end before the M-th."""

        def beginning(held: jax.Array, first: jax.Array) -> jax.Array:
            last = jnp.minimum(first, pool - M)
            longer = jnp.pad(cut(held, last, M), [(0, M)] + [(0, 0)] * (held.ndim - 1))
            return cut(longer, first - last, M)

        each_head = lambda held: jnp.concatenate([beginning(held, first) for first in first_N])
        return own(jax.tree.map(each_head, kept))

    one_by_one = lambda: own(slices(pages_NM.reshape(-1), 1))
    otherwise = gathered if N * M > MOST_SLICES else one_by_one
    return jax.lax.switch(
        jnp.where(side_by_side, jnp.any(missing_NM).astype(jnp.int32), 2),
        [lambda: slices(first_N, M), beginnings, otherwise],
    )


def pages_at_once(page: int, width: int) -> int:
    """Pages that are read at once, of heads of so many: all widths are multiples of it, see `rounded`."""
    return min(width, max(1, BLOCK // page))


def rounded(width: int, page: int) -> int:
    """The width of a table for heads of so many pages: whole blocks."""
    block = max(1, BLOCK // page)
    return width if width <= block else -(-width // block) * block


def page_size(capacity: int) -> int:
    """Entries of a page for rows of so many tokens: about 1/64 of a row, a power of two.

    A head leaves half a page unused on average. On a CPU, each page that a gather reads costs about a
    microsecond besides the time to copy it, so small pages are slow.
    """
    return min(max(1 << (capacity // 64).bit_length() >> 1, SMALLEST_PAGE), LARGEST_PAGE)


def evicting_spec(
    config: ModelConfig,
    policy: Policy,
    *,
    classes: bytes,
    batch: int,
    capacity: int,
    chunk: int = 1,
    page: int | None = None,
) -> EvictingSpec:
    """The spec of an evicting cache on one device, with pools that hold nothing yet.

    Args:
      policy: from `eviction.parse`.
      classes: the class of each token of the vocabulary, a byte each, from `eviction.classes`.
      batch: rows that decode at once.
      capacity: tokens of a row at most, its prompt included.
      chunk: tokens that a decode step writes at most.
      page: entries of a page; by default as `page_size` chooses.

    Raises:
      ValueError: sizes that are not positive, sliding windows, rows that are too long, or a policy that needs
        classes that no token has.
    """
    page = page_size(capacity) if page is None else page
    if page < 1:
        raise ValueError(f"evicting cache: page = {page} must be a positive integer")
    if words := refusal(config, policy, capacity):
        raise ValueError(words)
    for name, bit in (("special", SPECIAL), ("punctuation", PUNCTUATION)):
        if policy.needs_classes and not any(bit & one for one in classes):
            raise ValueError(f"{policy.name}: the tokenizer has no {name} tokens")
    format = make_format(policy.format, config.compute_dtype)
    spec = cache_spec(config, format, batch=batch, capacity=capacity, chunk=chunk)
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    ones = (1,) * config.n_kv_layers
    classes = classes.ljust(config.vocab_size, b"\0")  # ids beyond the tokenizer's are never drawn
    return EvictingSpec(
        **fields,
        policy=policy,
        programs=policy.programs,
        classes=classes,
        page=page,
        pages=ones,
        widths=ones,
    )
