"""Every byte of a KV cache counted twice: in closed form, and from what the decoder really does.

All numbers are for one sequence of `context` tokens:

    allocated   of its row of the cache, for the capacity that was asked for
    resident    that its tokens use; a sliding window's older tokens do not count
    written     for one new token, on average
    read        by one decode step: every layer reads what it sees of its KV layer, consumers too

CLA divides allocated, resident and written bytes, not read bytes. Requests that share a prefix are counted
together (`SharedLedger`).
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, CacheSpec, cache_spec
from cla_jax.cache.evicting import NO_PAGE, EvictingSpec
from cla_jax.cache.prefix_shared import TILE, PrefixSpec
from cla_jax.config import ModelConfig
from cla_jax.eviction.rule import Rule
from cla_jax.model.attention import EMPTY, Segment
from cla_jax.prefix_tree import Node, PrefixTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
    """Bytes of one sequence."""

    allocated: float
    resident: float
    written: float
    read: float

    def per_token(self, context: int) -> dict[str, float]:
        """Per token of context; `written` is per new token as it is."""
        numbers = dataclasses.asdict(self)
        return {k: v if k == "written" else v / context for k, v in numbers.items()}


def predicted(spec: CacheSpec, context: int) -> Ledger:
    """From the config alone. Raises ValueError for more context than the cache is made for."""
    if not 1 <= context <= spec.capacity:
        raise ValueError(f"context = {context} must lie in 1 to the capacity of {spec.capacity}")
    config = spec.stored_config

    def resident(p: int, halves: str) -> float:
        first = max(context - spec.windows[p], 0) if spec.windows[p] else 0
        return spec.formats[p].held_bytes(config, first, context, halves)

    layers = [(p, format, spec.entries(p), spec.holds[p]) for p, format in enumerate(spec.formats)]
    return Ledger(
        allocated=sum(format.kv_layer_bytes(config, n, holds) for _, format, n, holds in layers),
        resident=sum(resident(p, holds) for p, _, _, holds in layers),
        written=sum(format.written_bytes(config, n, holds) for _, format, n, holds in layers),
        read=sum(
            resident(p, half) * readers
            for p, of_halves in enumerate(spec.readers_of)
            for half, readers in of_halves.items()
        ),
    )


def resident_at_16_bits(config: ModelConfig, format: str, context: int) -> float:
    """Bytes per token of context, if what the format does not quantise has 16 bits: for comparisons.

    A model may compute in another dtype than it would be served in. Otherwise formats that quantise less
    would look worse for a float32 model.
    """
    config = dataclasses.replace(config, compute_dtype="bfloat16")
    spec = cache_spec(config, format, batch=1, capacity=context)
    return predicted(spec, context).resident / context


def counted(spec: CacheSpec, cache: Cache, step: Any) -> Ledger:
    """From a live cache whose rows are all equally long, and from a decode step through it.

    Bytes are those of the arrays. The entries in use are those that the attention of the newest token would
    find. `step(spec, cache)` is traced, not run, to see which KV layers are written and read.
    """
    lengths = np.asarray(jax.device_get(cache.lengths_B))
    assert (lengths == lengths[0]).all()
    seen = _Seen(spec)
    jax.eval_shape(lambda cache: step(seen, cache), cache)
    used = [
        {half: _used(spec, p, layer.only(half), lengths) for half in spec.holds[p]}
        for p, layer in enumerate(cache.kv_layers)
    ]
    return Ledger(
        allocated=nbytes(cache.kv_layers) / spec.batch,
        resident=sum(sum(halves.values()) for halves in used),
        written=sum(
            _entry_bytes(segment)
            for p in seen.written
            for segment in _segments(spec, p, cache.kv_layers[p], lengths, 0)
        ),
        read=sum(used[k]["k"] + used[v]["v"] for k, v in seen.read),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedLedger:
    """Bytes of all requests in a prefix-shared cache together."""

    allocated: int  # of the pools
    resident: int  # that their tokens use
    unshared: int  # that the same tokens would use without sharing
    read: int  # by one decode step: a shared page once for each tile of its readers
    unshared_read: int  # without sharing


class Tokens(NamedTuple):
    """Numbers of tokens in full pages, and of the newest tokens of rows."""

    in_pages: int
    newest: int


def predicted_shared(spec: PrefixSpec, tree: PrefixTree) -> SharedLedger:
    """From the requests in the tree alone."""

    def tokens(times: Callable[[Node], int]) -> Tokens:
        """Those of all chunks that requests read, each chunk counted so often."""
        counts = [0, 0]
        for node in tree.nodes():
            counts[len(node.tokens) < spec.page] += len(node.tokens) * times(node)
        return Tokens(*counts)

    return shared_ledger(
        spec,
        spec.allocated_bytes,
        spec.token_bytes,
        stored=tokens(lambda node: min(node.readers, 1)),
        all_tokens=tokens(lambda node: node.readers),
        read=tokens(lambda node: -(-node.readers // TILE)),
    )


def shared_ledger(
    spec: PrefixSpec,
    allocated: int,
    token_bytes: Sequence[dict[str, tuple[float, float]]],
    stored: Tokens,
    all_tokens: Tokens,
    read: Tokens,
) -> SharedLedger:
    """From numbers of tokens, and the bytes of the keys and the values of a token in each KV layer."""

    def total(tokens: Tokens, times: Sequence[dict[str, int]]) -> int:
        return int(
            sum(
                times[p][half] * count * size
                for p, halves in enumerate(token_bytes)
                for half, sizes in halves.items()
                for count, size in zip(tokens, sizes, strict=True)
            )
        )

    once = [dict.fromkeys(halves, 1) for halves in token_bytes]
    return SharedLedger(
        allocated=allocated,
        resident=total(stored, once),
        unshared=total(all_tokens, once),
        read=total(read, spec.readers_of),
        unshared_read=total(all_tokens, spec.readers_of),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictingLedger:
    """Bytes of all rows of an evicting cache together, and of what its heads hold now."""

    allocated: int  # of the pools, and of positions, classes and scores
    pages: int  # keys and values of the pages that heads have been given
    tables: int  # of tables of pages, and rules
    resident: int  # keys and values of the tokens that are kept
    notes: int  # their positions, classes and scores
    read: int  # by one decode step: keys and values, by every layer that reads them
    entries: tuple[int, ...]  # tokens that are kept, over rows and heads, in each KV layer


def predicted_evicting(spec: EvictingSpec, entries: Sequence[int]) -> EvictingLedger:
    """In closed form, from how many entries of each KV layer are in use. No page is counted as given."""
    B, K = spec.batch, spec.config.n_kv_heads
    layers = range(len(spec.pages))
    sizes = [spec.entry_bytes(p) for p in layers]
    numbers = [width + 1 + len(Rule._fields) for width in spec.widths]  # table, room, rule
    return EvictingLedger(
        allocated=spec.page
        * sum(spec.pages[p] * sizes[p][0] + B * K * spec.widths[p] * sizes[p][1] for p in layers),
        pages=0,
        tables=4 * B * K * sum(numbers),
        resident=sum(entries[p] * sizes[p][0] for p in layers),
        notes=sum(entries[p] * sizes[p][1] for p in layers),
        read=sum(
            entries[p] * spec.half_bytes(p, half) * readers
            for p in layers
            for half, readers in spec.readers_of[p].items()
        ),
        entries=tuple(entries),
    )


def counted_evicting(spec: EvictingSpec, cache: Cache, rows: Any = None) -> EvictingLedger:
    """From the live arrays; what heads hold is that of these rows, by default all."""
    those = slice(None) if rows is None else np.asarray(rows, int)
    pages = resident = notes = read = 0
    entries = []
    for p, pool in enumerate(cache.kv_layers):
        table, positions = np.asarray(pool.table)[those], np.asarray(pool.positions)[those]
        kept, room = int((positions != EMPTY).sum()), spec.pages[p] * spec.page
        each = nbytes(pool.kept) // room
        noted = nbytes((pool.positions, pool.classes, pool.scores)) // pool.positions.size
        pages += int((table != NO_PAGE).sum()) * spec.page * each
        resident, notes = resident + kept * each, notes + kept * noted
        read += kept * sum(
            nbytes(pool.kept.only(half)) // room * readers
            for half, readers in spec.readers_of[p].items()
        )
        entries.append(kept)
    arrays = [(pool.kept, pool.positions, pool.classes, pool.scores) for pool in cache.kv_layers]
    return EvictingLedger(
        allocated=nbytes(arrays),
        pages=pages,
        tables=nbytes([(pool.table, pool.room, pool.rule) for pool in cache.kv_layers]),
        resident=resident,
        notes=notes,
        read=read,
        entries=tuple(entries),
    )


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _segments(
    spec: CacheSpec, p: int, layer: Any, lengths: np.ndarray, shard: int
) -> Sequence[Segment]:
    first = jnp.int32(max(lengths[0] - spec.windows[p], 0) if spec.windows[p] else 0)
    return spec.formats[p].segments(layer, jnp.array(lengths), first, spec.part(p, shard))


def _entry_bytes(segment: Segment) -> float:
    """Bytes of one token of one row."""
    rows, entries = segment.arrays[0].shape[:2]
    return nbytes(segment.arrays) / (rows * entries * segment.tokens)


def _used(spec: CacheSpec, p: int, layer: Any, lengths: np.ndarray) -> float:
    """Bytes of the entries of a KV layer that the newest token of a row sees."""
    total = 0.0
    first = max(lengths[0] - spec.windows[p], 0) if spec.windows[p] else 0
    for shard in range(spec.shards):
        for segment in _segments(spec, p, layer, lengths, shard):
            for i in range(int(segment.first), int(segment.end)):
                positions = np.asarray(segment.positions(i))[0]
                visible = (positions != EMPTY) & (positions >= first) & (positions < lengths[0])
                heads = (
                    visible.size // visible.shape[-1]
                )  # 1 where all KV heads hold the same tokens
                total += visible.sum() / heads * _entry_bytes(segment)
    return total


class _Apart(int):
    """A KV layer unlike any other, even of its number: jax traces anew what it knows of equal groups."""

    __eq__ = object.__eq__
    __hash__ = object.__hash__


class _Seen:
    """A spec that notes which KV layers pass through it."""

    def __init__(self, spec: CacheSpec):
        self.spec = spec
        self.written: list[int] = []
        self.read: list[tuple[int, int]] = []
        self._source = (0, 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.spec, name)

    def representative(self, p: int) -> int:
        return _Apart(p)

    def write(self, p: int, *args: Any) -> Any:
        self.written.append(p)
        return self.spec.write(p, *args)

    def source(self, layers: Sequence[Any], k: int, v: int) -> Any:
        self._source = (k, v)  # the layers that attend next read these
        return self.spec.source(layers, k, v)

    def observed(self, p: int, *args: Any) -> Any:
        self.read.append(self._source)
        return self.spec.observed(p, *args)
