"""Where the requests of a running batch are in its cache: who has room, and what is there already.

    places = make_places(spec)
    if places.join(row, prompt, new_tokens):    # the request has this row now
        held = places.held(row)                 # so many tokens of its prompt need no prefill
    places.leave(row)

`Engine` asks the same questions of every cache. In most of them each row has room of its own, so a free row
is all that a request needs. In a prefix-shared cache requests take pages of one pool, and a tree says which.
"""

import dataclasses
import functools
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, CacheSpec, ledger
from cla_jax.cache.evicting import EvictingSpec
from cla_jax.cache.pages import Leaf
from cla_jax.cache.prefix_shared import PageTables, PrefixSpec
from cla_jax.compressor import Compressor
from cla_jax.decode import Weights, prefill
from cla_jax.mesh import row_shards
from cla_jax.prefix_tree import Node, Path, PoolFull, PrefixTree

log = logging.getLogger(__name__)

# Prompts for at most this part of the rows go through the model one by one, instead of with all rows.
APART = 1 / 4


@dataclasses.dataclass(kw_only=True)
class Counts:
    """What has happened so far."""

    prompted: int = 0  # tokens of the prompts of all requests that have joined
    matched: int = 0  # of these, tokens that were in the cache before
    copied: int = 0  # pages that were copied for a second sample of a prompt
    uploads: int = 0  # of tables to the device
    uploaded_bytes: int = 0
    peak_pages: int = 0  # that live requests held at once


class Places:
    """Rows that have room of their own."""

    def __init__(self, spec: CacheSpec):
        self.spec, self.counts = spec, Counts()
        self._one: Cache | None = None  # the cache of one row, kept for the next prompt
        self._lengths: dict[int, int] = {}  # tokens of the requests in the cache
        self._prompts: dict[int, int] = {}  # tokens of their prompts

    def check(self, prompt: int, new_tokens: int, name: str) -> None:
        """Raises ValueError for a request that can never fit, by its numbers of tokens."""

    def join(self, row: int, prompt: Sequence[int], new_tokens: int) -> bool:  # noqa: ARG002
        """Gives a request this free row; False if there is no room for it now."""
        self.counts.prompted += len(prompt)
        self._lengths[row] = self._prompts[row] = len(prompt)
        return True

    def leave(self, row: int) -> None:
        """The row is free again."""
        del self._lengths[row], self._prompts[row]

    def held(self, row: int) -> int:  # noqa: ARG002
        """Tokens of the row's prompt that are in the cache before its prefill."""
        return 0

    def twin(self, row: int) -> int | None:  # noqa: ARG002
        """The row whose prompt this row gets a copy of, instead of a prefill."""
        return None

    def prefill_order(self, rows: Sequence[int]) -> list[list[int]]:
        """Rows that are prefilled together, list after list: who reads a page comes after who writes it."""
        return [list(rows)]

    def prepare(self, row: int, length: int) -> None:
        """Makes room for the row to grow to so many tokens."""

    def grew(self, row: int, tokens: Sequence[int]) -> None:
        """Tells all new tokens of a row so far. The newest is not in the cache yet."""
        self._lengths[row] = self._prompts[row] + max(len(tokens) - 1, 0)

    def bytes(self) -> tuple[int, int]:
        """Bytes that the requests use of the cache, and what they would use without sharing."""
        alone = sum(
            ledger.predicted(self.spec, length).resident for length in self._lengths.values()
        )
        return int(alone), int(alone)

    def placed(self, cache: Cache, writing: Collection[int] = ()) -> Cache:  # noqa: ARG002
        """The cache with the tables of the requests as they are now, while these rows get their prompts."""
        return cache

    def copy(self, cache: Cache, source: int, target: int) -> Cache:
        """The prompt of one row for another."""
        raise NotImplementedError  # never called: `twin` is None for rows that have room of their own

    def fill(
        self,
        weights: Weights,
        cache: Cache,
        last_BD: jax.Array,
        prompts: Mapping[int, Sequence[int]],
    ) -> tuple[jax.Array, Cache]:
        """Puts prompts into rows: the hidden states of their last tokens, and the cache. Both are donated.

        A few prompts are prefilled one by one, because a step for all rows costs the whole batch.
        """
        held = {row: self.held(row) for row in prompts}
        mesh = jax.sharding.get_abstract_mesh()
        # One row cannot be taken from rows that are split over devices.
        splits = not mesh.empty and row_shards(mesh) > 1
        if splits or len(prompts) > APART * self.spec.batch:
            cache = self.placed(cache, prompts)
            rows = [prompts.get(row) for row in range(self.spec.batch)]
            return prefill(weights, self.spec, cache, rows, last_BD, held)
        for row, prompt in prompts.items():
            one = self.take_row(cache, row)
            last_1D, one = prefill(weights, self.one_spec, one, [prompt], held={0: held[row]})
            cache = self.put_row(cache, one, row)
            last_BD = put_row(last_BD, last_1D, row)
        return last_BD, cache

    # One row of the cache, to put a prompt in, and the cache with that row in it again.

    def take_row(self, cache: Cache, row: int) -> Cache:  # noqa: ARG002
        return self.one_spec.allocate() if self._one is None else self._one

    def put_row(self, cache: Cache, one: Cache, row: int) -> Cache:
        self._one = one
        return put_row(cache, one, row)

    @functools.cached_property
    def one_spec(self) -> CacheSpec:
        return dataclasses.replace(self.spec, batch=1)


class SharedPlaces(Places):
    """Rows that take pages of one pool; those of a common prefix once."""

    spec: PrefixSpec

    def __init__(self, spec: PrefixSpec):
        super().__init__(spec)
        self.tree = PrefixTree(chunk=spec.page, pages=spec.pages, retain=spec.retain)
        self._paths: dict[int, Path] = {}
        self._twins: dict[int, int] = {}
        # Of the rows that have joined since the last prefill: their prompts, which of the lists of
        # `prefill_order` each of them is in, and in which of these its new chunks are written.
        self._joining: dict[tuple[int, ...], int] = {}
        self._order: dict[int, int] = {}
        self._written: dict[Node, int] = {}
        self._sent: Any = None  # the version of the tables on the device
        self._waited = False

    def check(self, prompt: int, new_tokens: int, name: str) -> None:
        wanted = self.tree.chunks(prompt + new_tokens)
        if wanted > self.spec.pages:
            raise ValueError(
                f"{name}, with its new tokens, needs {wanted} pages of {self.spec.page} tokens, but the pool "
                f"has only pages = {self.spec.pages}"
            )

    def join(self, row: int, prompt: Sequence[int], new_tokens: int) -> bool:
        twin = self._joining.get(tuple(prompt)) if self.spec.skip_matched else None
        try:
            if twin is None:
                path = self.tree.insert(prompt, new_tokens=new_tokens)
            else:
                path = self.tree.fork(self._paths[twin], new_tokens=new_tokens)
        except PoolFull as error:
            if not self._waited:
                log.warning("the page pool is full: requests wait until others end (%s)", error)
            self._waited = True
            return False
        self._paths[row] = path
        if twin is None:
            nodes, matched = self.tree.path(path), path.matched // self.spec.page
            # What one list writes, the next one can read.
            order = max((self._written.get(node, -1) + 1 for node in nodes[:matched]), default=0)
            self._written |= dict.fromkeys(nodes[matched:], order)
            self._joining[tuple(prompt)] = row
        else:
            order = self._order[twin]
            self._twins[row] = twin
            self.counts.copied += 1
        self._order[row] = order
        self.counts.matched += path.matched
        self._note_peak()
        return super().join(row, prompt, new_tokens)

    def leave(self, row: int) -> None:
        self.tree.remove(self._paths.pop(row))
        super().leave(row)

    def held(self, row: int) -> int:
        return self._paths[row].matched if self.spec.skip_matched else 0

    def twin(self, row: int) -> int | None:
        return self._twins.pop(row, None)

    def prefill_order(self, rows: Sequence[int]) -> list[list[int]]:
        rows_by_order: dict[int, list[int]] = {}
        for row in rows:
            rows_by_order.setdefault(self._order[row], []).append(row)
        self._order, self._joining, self._written = {}, {}, {}
        return [rows_by_order[order] for order in sorted(rows_by_order)]

    def prepare(self, row: int, length: int) -> None:
        path = self._paths[row]
        self.tree.prepare(path, length - path.length)
        self._note_peak()

    def grew(self, row: int, tokens: Sequence[int]) -> None:
        path = self._paths[row]
        for token in tokens[path.length - self._prompts[row] : -1]:
            self.tree.append(path, token)

    def bytes(self) -> tuple[int, int]:
        predicted = ledger.predicted_shared(self.spec, self.tree)
        return predicted.resident, predicted.unshared

    def placed(self, cache: Cache, writing: Collection[int] = ()) -> Cache:
        cache = self._cleared(cache)
        awaited = [row for row in writing if self._is_awaited(self._paths[row])]
        if self._sent == (wanted := (self.tree.version, awaited)):
            return cache
        tables = self.spec.tables(self._paths, self.tree, awaited)
        self._sent = wanted
        return dataclasses.replace(cache, extra=self._uploaded(tables))

    def copy(self, cache: Cache, source: int, target: int) -> Cache:
        leaf = lambda row: Leaf(self._paths[row].leaf.page, row)
        cache = self.spec.copy_leaf(self._cleared(cache), leaf(source), leaf(target))
        length_B = np.array([self._prompts[target]], np.int32)
        length_B = jax.device_put(length_B, self.spec.rules.spec("batch"))
        lengths_B = put_row(cache.lengths_B, length_B, target)
        return dataclasses.replace(cache, lengths_B=lengths_B)

    def take_row(self, cache: Cache, row: int) -> Cache:
        one = dataclasses.replace(self.spec, batch=1)
        tables = one.tables({0: self._paths[row]}, self.tree, writing=[0])
        tables = tables._replace(rows_B=np.array([row], np.int32))
        none_B = jnp.zeros(1, jnp.int32, out_sharding=self.spec.rules.spec("batch"))
        return Cache(self._cleared(cache).kv_layers, none_B, self._uploaded(tables))

    def put_row(self, cache: Cache, one: Cache, row: int) -> Cache:
        return Cache(one.kv_layers, put_row(cache.lengths_B, one.lengths_B, row), cache.extra)

    def _cleared(self, cache: Cache) -> Cache:
        """The cache without what others have left in pages that requests have taken since."""
        cache = self.spec.clear_pages(cache, self.tree.unclear)
        self.tree.unclear.clear()
        return cache

    def _uploaded(self, tables: PageTables) -> PageTables:
        self.counts.uploads += 1
        self.counts.uploaded_bytes += sum(table.nbytes for table in tables)
        return self.spec.upload(tables)

    def _is_awaited(self, path: Path) -> bool:
        """Whether others read what this request is about to write."""
        return any(n.readers > 1 for n in self.tree.path(path)[path.matched // self.spec.page :])

    def _note_peak(self) -> None:
        self.counts.peak_pages = max(self.counts.peak_pages, self.tree.live_pages)


class EvictingPlaces(Places):
    """Rows whose heads take pages of pools, as many as they keep of their prompts and may need after."""

    spec: EvictingSpec

    def __init__(self, spec: EvictingSpec):
        super().__init__(spec)
        self.compressor: Compressor | None = None  # made for the first prompts
        self._new_tokens: dict[int, int] = {}

    def check(self, prompt: int, new_tokens: int, name: str) -> None:  # noqa: ARG002
        try:
            self.spec.policy.check([prompt])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def join(self, row: int, prompt: Sequence[int], new_tokens: int) -> bool:
        self._new_tokens[row] = new_tokens
        return super().join(row, prompt, new_tokens)

    def leave(self, row: int) -> None:
        assert self.compressor is not None  # whoever leaves had joined
        self.compressor.release(row)
        del self._new_tokens[row]
        super().leave(row)

    def bytes(self) -> tuple[int, int]:
        """Bytes of the pages that the requests have."""
        pages = [] if self.compressor is None else self.compressor.pages_in_use()
        sizes = [self.spec.page * sum(self.spec.entry_bytes(p)) for p in range(len(pages))]
        used = sum(n * size for n, size in zip(pages, sizes, strict=True))
        return used, used

    def fill(
        self,
        weights: Weights,
        cache: Cache,
        last_BD: jax.Array,
        prompts: Mapping[int, Sequence[int]],
    ) -> tuple[jax.Array, Cache]:
        if not prompts:
            return last_BD, cache
        if self.compressor is None:
            self.compressor = Compressor(weights, self.spec)
        x_BTD, cache = self.compressor.fill(cache, prompts, self._new_tokens)
        self.spec = self.compressor.spec
        for i, (row, prompt) in enumerate(prompts.items()):
            last_BD = put_row(last_BD, x_BTD[i : i + 1, len(prompt) - 1], row)
        return last_BD, cache


def make_places(spec: CacheSpec) -> Places:
    if isinstance(spec, EvictingSpec):
        return EvictingPlaces(spec)
    return SharedPlaces(spec) if isinstance(spec, PrefixSpec) else Places(spec)


@functools.partial(jax.jit, donate_argnames="whole")
def put_row(whole: Any, one: Any, row: jax.Array | int) -> Any:
    """Writes arrays of one row into arrays of many rows, which are donated."""

    def put(whole: jax.Array, part: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, row, axis=0)

    return jax.tree.map(put, whole, one)


@functools.partial(jax.jit, donate_argnames="whole")
def copy_row(whole: jax.Array, source: jax.Array | int, target: jax.Array | int) -> jax.Array:
    """An array of rows in which one row has become equal to another. The array is donated."""
    part = jax.lax.dynamic_slice_in_dim(whole, source, 1, axis=0)
    return jax.lax.dynamic_update_slice_in_dim(whole, part, target, axis=0)
