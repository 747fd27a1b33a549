"""A KV cache whose rows share the chunks of a common prefix, and attention over it in two phases.

ChunkAttention (2402.15220): chunks of tokens lie in one pool for each KV layer, and requests with a common
prefix read the same chunks (section 3.1). `PrefixTree` says on the host who reads what. Attention first
takes the chunks that several rows read, each once for all of its rows, and then what a row has alone
(section 3.2). Both are parts of one softmax.

    tree = PrefixTree(chunk=64, pages=1000)
    spec = prefix_spec(config, "dense", batch=32, page=64, pages=1000, capacity=4096)
    cache = spec.allocate()
    cache = dataclasses.replace(cache, extra=spec.tables({0: first, 5: second}, tree))

Rows need no order: a work item of the first phase names its rows. Tables are int32 arrays whose shapes never
change, so nothing is compiled when requests come and go. They change only when `tree.version` does.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, CacheFormat, CacheSpec, cache_spec, make_format
from cla_jax.cache.pages import GroupPages, Leaf, TokenPages, make_pages, page_refusal
from cla_jax.cache.per_token import LayerCache, PerToken
from cla_jax.config import ModelConfig
from cla_jax.mesh import AxisRules, row_shards
from cla_jax.model import decode_kernels
from cla_jax.model.attention import (
    EMPTY,
    KV,
    PagedKV,
    Partial,
    Segment,
    StepPositions,
    empty_part,
    grouped_queries,
    merge,
    normalized,
    partial_attention,
)
from cla_jax.model.decode_kernels import Kernel
from cla_jax.model.platform import entries_at_once, rows_at_once
from cla_jax.prefix_tree import Path, PrefixTree, Run

BLOCK = 256  # shared tokens that are read at once, if pages are not larger
# Tokens of a row alone that are read at once, likewise: the first number while there are as many.
PRIVATE_BLOCKS = (512, 64)
TILE = 16  # rows of a work item
NO_ROW = 1 << 29  # past every batch


class PageTables(NamedTuple):
    """Which pages of the pool hold the tokens of each row. An index of the pool's size or more means
    no page; an index of the batch size or more means no row.
    """

    private_BC: Any  # that a row alone reads, in the order of their tokens
    starts_B: Any  # position of the first token in them
    shared_NM: Any  # blocks of M pages that several rows read
    positions_N: Any  # position of the first token of a block
    rows_IR: Any  # the rows of each work item
    blocks_I2: Any  # its blocks: from, to
    items: Any  # work items, a scalar
    rows_B: (
        Any  # the row of the cache that each row is: another number if it is taken out of a batch
    )


class _Reader(NamedTuple):
    """A row of the batch that reads from a pool."""

    row: int
    end: int  # up to this position it reads what is shared


class _Span(NamedTuple):
    """Consecutive chunks that the same rows read."""

    pages: tuple[int, ...]
    position: int
    rows: tuple[int, ...]


def _spans(shared: Sequence[tuple[int, int, tuple[int, ...]]]) -> list[_Span]:
    """Chunks (page, position, rows) that follow one another and have the same readers are one span."""
    spans: list[_Span] = []
    for page, position, rows in shared:
        if not rows:
            continue
        if spans and rows == spans[-1].rows:
            spans[-1] = spans[-1]._replace(pages=(*spans[-1].pages, page))
        else:
            spans.append(_Span((page,), position, rows))
    return spans


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixSpec(CacheSpec):
    """Everything static about a prefix-shared cache. Make it with `prefix_spec`, which checks it."""

    page: int  # tokens
    pages: int  # of the pool
    # What only the host acts on: programs do not differ by it.
    # Pages of requests that have ended, kept for others with the same beginning.
    retain: int = dataclasses.field(compare=False)
    # The prefill leaves out what is in the cache already.
    skip_matched: bool = dataclasses.field(compare=False)

    @property
    def pages_of_row(self) -> int:
        """The most pages of a row: the last one is never full."""
        return self.capacity // self.page + 1

    @property
    def pages_at_once(self) -> int:
        return max(1, BLOCK // self.page)

    def layer_pages(self, p: int) -> TokenPages | GroupPages:
        """How the pages of KV layer p keep their tokens."""
        return make_pages(self.formats[p], self.page, self.chunk)

    def shapes(self, p: int) -> Any:
        """The pool of KV layer p, and what its rows keep beside it."""
        return self.layer_pages(p).shapes(self.stored_config, self.pages, self.batch, self.holds[p])

    def allocate(self) -> Cache:
        """An empty pool for each KV layer, and tables in which no row has a page."""
        return dataclasses.replace(super().allocate(), extra=self.upload(self.empty()))

    def upload(self, tables: PageTables) -> PageTables:
        """Tables as arrays of the device, or of each device."""
        whole = lambda a: self.rules.spec(*[None] * np.ndim(a))
        return jax.tree.map(lambda a: jax.device_put(jnp.asarray(a), whole(a)), tables)

    @functools.cached_property
    def token_bytes(self) -> tuple[dict[str, tuple[float, float]], ...]:
        """Bytes of the keys and the values of a token in each KV layer: in a full page, and among the newest
        tokens of a row."""
        return tuple(
            {half: self.layer_pages(p).bytes_per_token(self.stored_config, half) for half in holds}
            for p, holds in enumerate(self.holds)
        )

    @functools.cached_property
    def page_bytes(self) -> int:
        """Bytes of a page, over all KV layers."""
        return int(
            self.page * sum(full for layer in self.token_bytes for full, _ in layer.values())
        )

    @functools.cached_property
    def row_bytes(self) -> int:
        """Bytes that a row has beside its pages, over all KV layers."""
        of_layer = [sum(newest for _, newest in layer.values()) for layer in self.token_bytes]
        return int(sum(self.layer_pages(p).ring * each for p, each in enumerate(of_layer)))

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all pools and rows."""
        return self.pages * self.page_bytes + self.batch * self.row_bytes

    # ------------------------------------------------------------------------------- tables

    def empty(self) -> PageTables:
        tiles = -(-self.batch // TILE)
        full = lambda *shape, value: np.full(shape, value, np.int32)
        return PageTables(
            private_BC=full(self.batch, self.pages_of_row, value=self.pages),
            starts_B=full(self.batch, value=self.capacity),  # nothing, whatever its length is
            shared_NM=full(self.pages, self.pages_at_once, value=self.pages),
            positions_N=full(self.pages, value=0),
            rows_IR=full(self.pages * tiles, min(TILE, self.batch), value=self.batch),
            blocks_I2=full(self.pages * tiles, 2, value=0),
            items=np.int32(0),
            rows_B=np.arange(self.batch, dtype=np.int32),
        )

    def tables(
        self, rows: Mapping[int, Path], tree: PrefixTree, writing: Collection[int] = ()
    ) -> PageTables:
        """The tables of the requests in these rows of the batch.

        A row writes to its private pages only. For a row that is `writing` its prompt, these are all pages
        after the part that it matched. Other rows may wait to read them.
        """
        assert (tree.chunk, tree.pages) == (self.page, self.pages)
        tables = self.empty()
        layout = tree.layout()
        row_of = {path.leaf: row for row, path in rows.items()}
        readers: list[_Reader | None] = []
        for path, start in zip(layout.rows, layout.starts, strict=True):
            row = row_of.get(path.leaf)
            if row is None:
                readers.append(None)
                continue
            end = min(path.matched, start) if row in writing else start
            readers.append(_Reader(row, end))
            private = [*(node.page for node in tree.path(path)[end // self.page :]), *path.ahead]
            tables.private_BC[row, : len(private)] = private
            tables.starts_B[row] = end

        def rows_of(run: Run) -> tuple[int, ...]:
            reading = (r for r in readers[run.first : run.end] if r is not None)
            return tuple(r.row for r in reading if run.position < r.end)

        spans = _spans([(run.page, run.position, rows_of(run)) for run in layout.shared])
        return self._share(tables, spans)

    def _share(self, tables: PageTables, spans: Sequence[_Span]) -> PageTables:
        """The tables with the blocks of these spans, and the work items that read them."""
        blocks = items = 0
        for span in spans:
            first = blocks
            for i in range(0, len(span.pages), self.pages_at_once):
                pages = span.pages[i : i + self.pages_at_once]
                tables.shared_NM[blocks, : len(pages)] = pages
                tables.positions_N[blocks] = span.position + i * self.page
                blocks += 1
            for i in range(0, len(span.rows), TILE):
                rows = span.rows[i : i + TILE]
                tables.rows_IR[items, : len(rows)] = rows
                tables.blocks_I2[items] = first, blocks
                items += 1
        return tables._replace(items=np.int32(items))

    def cleared(
        self,
        p: int,
        layer: LayerCache,
        rows_B: jax.Array,
        lengths_B: jax.Array,  # noqa: ARG002
        tables: PageTables,
    ) -> LayerCache:
        """Pages belong to no row: see `clear_pages`. A row that begins with shared pages has nothing else."""
        rows_B = jnp.where(rows_B, tables.rows_B, NO_ROW)
        return self.layer_pages(p).clear_rows(layer, rows_B)

    def clear_pages(self, cache: Cache, pages: Sequence[int]) -> Cache:
        """Zeros in these pages, before others write to them; see `reset`. The KV layers are donated."""
        layers = cache.kv_layers
        for i in range(0, len(pages), self.pages_of_row):
            some = pages[i : i + self.pages_of_row]
            pages_C = np.full(self.pages_of_row, self.pages, np.int32)
            pages_C[: len(some)] = some
            layers = self._clear(layers, pages_C)
        return dataclasses.replace(cache, kv_layers=layers)

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="layers")
    def _clear(self, layers: tuple[LayerCache, ...], pages_C: jax.Array) -> tuple[LayerCache, ...]:
        return tuple(
            self.on_devices(self.layer_pages(p).clear_pages, layer, pages_C)
            for p, layer in enumerate(layers)
        )

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def copy_leaf(self, cache: Cache, source: Leaf, target: Leaf) -> Cache:
        """The newest tokens of one request for its fork, in every KV layer. The cache is donated."""
        layers = tuple(
            self.on_devices(self.layer_pages(p).copy, layer, source, target)
            for p, layer in enumerate(cache.kv_layers)
        )
        return dataclasses.replace(cache, kv_layers=layers)

    # ------------------------------------------------------------------------------- a step

    def write_here(self, p: int, layer: LayerCache, kv: KV, step: StepPositions) -> LayerCache:
        """The new tokens of a row go into its own pages."""
        tables: PageTables = step.extra

        def page_of(positions_BT: jax.Array) -> jax.Array:
            offset_BT = positions_BT - tables.starts_B[:, None]
            index_BT = jnp.clip(offset_BT // self.page, 0, self.pages_of_row - 1)
            page_BT = jnp.take_along_axis(tables.private_BC, index_BT, axis=1)
            return jnp.where((positions_BT >= 0) & (offset_BT >= 0), page_BT, self.pages)

        return self.layer_pages(p).write(layer, kv.each(self._padded), step, page_of, tables.rows_B)

    def attend_here(
        self, p: int, layer: LayerCache, q_BTKGH: jax.Array, step: StepPositions
    ) -> jax.Array:
        """Attention of the new tokens of a step over the pages of their rows. [B, T, K, G, H]"""
        kernel = self.kernel_for(q_BTKGH)
        scaled_BTKGH = self._padded(q_BTKGH * q_BTKGH.shape[-1] ** -0.5)
        q_BKNH, over, restore = grouped_queries(scaled_BTKGH)
        positions_BN, starts_BN = over(step.positions_BT), over(step.starts_BT)
        last_BN = self.layer_pages(p).last_in_pages(positions_BN)
        part = self._shared(p, layer, step.extra, q_BKNH, positions_BN, starts_BN, kernel)
        if kernel is None:
            part = self._private(p, layer, step, q_BKNH, last_BN, starts_BN, part)
        else:
            alone = step.extra.private_BC, step.extra.starts_B, step.lengths_B
            kept = self._for_kernel(p, layer, *alone)
            part = merge(part, kernel.attend(q_BKNH, kept, last_BN, starts_BN))
        newest = self.layer_pages(p).newest(layer, step.extra.rows_B, step.lengths_B)
        if newest is not None:
            starts_BN = jnp.maximum(starts_BN, last_BN + 1)
            part = merge(part, self._alone(q_BKNH, [newest], positions_BN, starts_BN))
        o_BTKGH = restore(normalized(part)).astype(q_BTKGH.dtype)
        return o_BTKGH[..., : self.config.read_widths[1]]

    def _for_kernel(
        self,
        p: int,
        layer: LayerCache,
        pages_BC: jax.Array,
        starts_B: jax.Array,
        ends_B: jax.Array,
    ) -> PagedKV:
        """Pages that hold consecutive positions, from `starts_B` to before `ends_B`, as kernels read them."""
        format = self.formats[p]
        assert isinstance(format, PerToken)  # kernels refuse others
        at_BE = starts_B[:, None] + jnp.arange(pages_BC.shape[1] * self.page)
        # A kernel copies a page even for a row that has none.
        pages_BC = jnp.minimum(self._own(pages_BC), self.pages - 1)
        return format.for_kernel(layer, jnp.where(at_BE < ends_B[:, None], at_BE, EMPTY), pages_BC)

    def _alone(
        self,
        q_BKNH: jax.Array,
        segments: Sequence[Segment],
        positions_BN: jax.Array,
        starts_BN: jax.Array,
        before: Partial | None = None,
    ) -> Partial:
        """Attention of each row to what it reads alone, and to what it has read before."""
        return partial_attention(
            q_BKNH,
            segments,
            before=before,
            positions_B1N1=positions_BN[:, None, :, None],
            starts_B1N1=starts_BN[:, None, :, None],
            width=self.stored_config.read_widths[1],
        )

    def _private(
        self,
        p: int,
        layer: LayerCache,
        step: StepPositions,
        q_BKNH: jax.Array,
        last_BN: jax.Array,
        starts_BN: jax.Array,
        shared: Partial,
    ) -> Partial:
        """`shared`, and what rows read alone: some rows after the other, up to the longest of them."""
        B, K, N, _ = q_BKNH.shape
        tokens = min(PRIVATE_BLOCKS[0], self.pages_of_row * self.page)
        tiles = -(-B // rows_at_once(B, tokens))
        R = -(-B // tiles)
        tokens = entries_at_once(tokens, N, R * K * max(self.stored_config.kept_widths))
        tables: PageTables = step.extra
        # Padding sees nothing.
        offset_BN = jnp.where(last_BN >= 0, starts_BN - tables.starts_B[:, None], self.capacity)
        private_BC = self._own(tables.private_BC)

        def tile(i: Any, parts: Partial) -> Partial:
            first = jnp.minimum(i * R, B - R)  # the last tile begins early enough to be whole
            of = lambda a: jax.lax.dynamic_slice_in_dim(a, first, R)
            rows = _Rows(of(private_BC), of(tables.starts_B), of(step.lengths_B))
            segments = self._blocks(p, layer, rows, jnp.min(of(offset_BN)), tokens)
            before = Partial(*map(of, shared))
            part = self._alone(of(q_BKNH), segments, of(last_BN), of(starts_BN), before)
            put = lambda a, new: jax.lax.dynamic_update_slice_in_dim(a, new, first, 0)
            return Partial(*map(put, parts, part))

        return jax.lax.fori_loop(0, tiles, tile, shared)

    def _blocks(
        self, p: int, layer: LayerCache, rows: "_Rows", offset: jax.Array, longest: int
    ) -> list[Segment]:
        """What some rows read alone: blocks of `longest` tokens, and short ones for the rest.

        They begin `offset` tokens after the first: with a sliding window, all rows may see only later ones.
        """
        held_R = self.layer_pages(p).last_in_pages(rows.lengths_R - 1) + 1 - rows.starts_R
        end = jnp.maximum(-(-jnp.max(held_R) // self.page), 0)
        begin = jnp.clip(offset // self.page, 0, end)
        sizes = [
            min(max(1, tokens // self.page), self.pages_of_row)
            for tokens in (longest, min(longest, PRIVATE_BLOCKS[1]))
        ]
        segments = []
        for M in dict.fromkeys(sizes):  # the two sizes may be equal
            count = -(-(end - begin) // M) if sizes[-1] == M else (end - begin) // M
            segments.append(self._segment(p, layer, rows, begin, count, M))
            begin += count * M
        return segments

    def _segment(
        self, p: int, layer: LayerCache, rows: "_Rows", begin: jax.Array, count: jax.Array, M: int
    ) -> Segment:
        """`count` blocks of M pages of each row, from page `begin` on."""
        # The last block begins early enough to be whole; what the one before had is empty then.
        first = lambda i: jnp.minimum(begin + i * M, self.pages_of_row - M)

        def read(i: Any) -> KV:
            pages_RM = jax.lax.dynamic_slice_in_dim(rows.pages_RC, first(i), M, axis=1)
            # A block of all pages does not depend on i. Outside the loop, it would be read even with
            # zero iterations.
            pages_RM, _ = jax.lax.optimization_barrier((pages_RM, i))
            return self.layer_pages(p).read(layer, pages_RM)

        def positions(i: Any) -> jax.Array:
            offset_S = first(i) * self.page + jnp.arange(M * self.page)
            at_RS = rows.starts_R[:, None] + offset_S
            is_new_S = offset_S >= (begin + i * M) * self.page
            return jnp.where((at_RS < rows.lengths_R[:, None]) & is_new_S, at_RS, EMPTY)

        return Segment(read, positions, 0, count, tuple(jax.tree.leaves(layer)))

    def _shared(
        self,
        p: int,
        layer: LayerCache,
        tables: PageTables,
        q_BKNH: jax.Array,
        positions_BN: jax.Array,
        starts_BN: jax.Array,
        kernel: Kernel | None,
    ) -> Partial:
        """What several rows read: each block of pages is one matrix product for all rows of an item.

        A kernel takes as many of them at once as it has room for.
        """
        _, K, N, _ = q_BKNH.shape
        width = self.stored_config.read_widths[1]
        R, S = tables.rows_IR.shape[1], self.pages_at_once * self.page
        most = R * N if kernel is None else kernel.queries
        tile = next(rows for rows in range(R, 0, -1) if R % rows == 0 and rows * N <= most)
        tiles = R // tile

        def read(i: Any) -> KV:
            return self.layer_pages(p).read(layer, self._own(tables.shared_NM[i][None]))

        def positions(i: Any) -> jax.Array:
            at_MS = tables.positions_N[i] + jnp.arange(S).reshape(-1, self.page)
            held_M1 = tables.shared_NM[i][:, None] < self.pages
            return jnp.where(held_M1, at_MS, EMPTY).reshape(1, S)

        def attend(i: Any, q: jax.Array, positions_BN: jax.Array, starts_BN: jax.Array) -> Partial:
            """Attention of tiles of queries to what item i reads."""
            if kernel is not None:
                paged = self._item_for_kernel(p, layer, tables, i, tiles)
                return kernel.attend(q, paged, positions_BN, starts_BN)
            segment = Segment(read, positions, tables.blocks_I2[i, 0], tables.blocks_I2[i, 1], ())
            return self._alone(q, [segment], positions_BN, starts_BN)

        def body(i: Any, parts: Partial) -> Partial:
            rows_R = tables.rows_IR[i]
            # No row: a query at position -1, which sees nothing.
            of = lambda a, fill: a.at[rows_R].get(mode="fill", fill_value=fill)
            in_tiles = lambda a, *axes: a.reshape(tiles, *axes, -1)
            together = lambda a_RKNX: in_tiles(
                in_tiles(a_RKNX, tile, K, N).swapaxes(1, 2), K, tile * N
            )
            apart = lambda a: in_tiles(a, K, tile, N).swapaxes(1, 2).reshape(R, K, N, -1)
            part = attend(
                i,
                together(of(q_BKNH, 0)),
                of(positions_BN, -1).reshape(tiles, -1),
                of(starts_BN, 0).reshape(tiles, -1),
            )
            before = Partial(*(of(a, 0) for a in parts))
            after = merge(before, Partial(*map(apart, part)))
            return Partial(
                *(a.at[rows_R].set(new, mode="drop") for a, new in zip(parts, after, strict=True))
            )

        none = empty_part(q_BKNH, positions_BN[:, None, :, None], width)
        return jax.lax.fori_loop(0, tables.items, body, none)

    def _item_for_kernel(
        self, p: int, layer: LayerCache, tables: PageTables, i: Any, tiles: int
    ) -> PagedKV:
        """What work item i reads, as kernels read it, for each tile of its queries."""
        M, C = self.pages_at_once, self.pages_of_row
        first, end = tables.blocks_I2[i]
        numbers = jnp.pad(tables.shared_NM.reshape(-1), (0, C), constant_values=self.pages)
        pages_C = jax.lax.dynamic_slice_in_dim(numbers, first * M, C)
        count = jnp.sum((pages_C < self.pages) & (jnp.arange(C) < (end - first) * M))
        start = tables.positions_N[first]
        item = pages_C, start, start + count * self.page
        return self._for_kernel(p, layer, *(jnp.broadcast_to(a, (tiles, *a.shape)) for a in item))

    def _own(self, pages_BM: jax.Array) -> jax.Array:
        """What a row may read instead of no page: it is never seen, but it must be the row's own."""
        return jnp.where(pages_BM < self.pages, pages_BM, pages_BM[:, :1])


class _Rows(NamedTuple):
    """What some rows have alone."""

    pages_RC: jax.Array
    starts_R: jax.Array  # position of the first token in them
    lengths_R: jax.Array  # tokens of the whole row


def refusal(config: ModelConfig, format: str | CacheFormat, page: int) -> str | None:
    """Why no prefix-shared cache can be made; None if it can."""
    made = make_format(format, config.compute_dtype) if isinstance(format, str) else format
    return page_refusal(made, page)


def prefix_spec(
    config: ModelConfig,
    format: str | CacheFormat = "dense",
    *,
    batch: int,
    page: int,
    pages: int,
    capacity: int,
    chunk: int = 1,
    retain: int = 0,
    skip_matched: bool = True,
    rules: AxisRules = AxisRules(),
    attention: str = decode_kernels.XLA,
) -> PrefixSpec:
    """The spec of a prefix-shared cache.

    Args:
      format: how tokens are kept. KIVI quantises a page when it is full.
      batch: rows that decode at once.
      page: tokens of a page, the chunk of the tree.
      pages: pages of the pool, of each KV layer.
      capacity: tokens of a row at most.
      chunk: tokens that a step writes at most.
      retain: pages of requests that have ended that are kept, at most, until others need them.
      skip_matched: whether the prefill leaves out what is in the cache already.
      rules: layout on the mesh, which must be set. They may split heads over devices, but neither rows nor
        entries, because every row may read every page.
      attention: `xla`, or a kernel of `cla_jax.model.decode_kernels`, which reads the pages in steps of few
        tokens.

    Raises:
      ValueError: sizes that are not positive, a page that the format cannot quantise, or a mesh that splits
        rows or entries. Or the kernel does not support the model, the format or the page.
    """
    for name, value in (("page", page), ("pages", pages)):
        if value < 1:
            raise ValueError(f"prefix-shared cache: {name} = {value} must be a positive integer")
    if not 0 <= retain <= pages:
        raise ValueError(f"prefix-shared cache: retain = {retain} must lie in 0 to pages = {pages}")
    if words := refusal(config, format, page):
        raise ValueError(words)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and (rows := row_shards(mesh)) > 1:
        raise ValueError(
            "a prefix-shared cache cannot split its rows over devices, because they share pages: "
            f"slice x data x fsdp = {rows} of the mesh must be 1"
        )
    if rules.cache_entries is not None:
        raise ValueError(
            "a prefix-shared cache cannot split the entries of a KV layer over devices"
        )
    spec = cache_spec(config, format, batch=batch, capacity=capacity, chunk=chunk, rules=rules)
    decode_kernels.check(attention, config, tuple(one.name for one in spec.formats), page)
    fields = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    fields["attention"] = attention
    return PrefixSpec(**fields, page=page, pages=pages, retain=retain, skip_matched=skip_matched)
