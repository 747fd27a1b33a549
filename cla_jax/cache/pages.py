"""How the pages of a prefix-shared cache keep their tokens.

Formats that keep every token by itself write it into its page (`TokenPages`). Formats that quantise tokens in
groups keep the newest tokens of each row in full precision, and quantise a page when it is full
(`GroupPages`). Either way, what a query reads depends on positions alone. It depends neither on who shares a
page, nor on how many tokens a step has.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cla_jax.cache import CacheFormat
from cla_jax.cache.bits import carrier, restored, stored
from cla_jax.cache.entries import Entries
from cla_jax.cache.kivi import GROUP, Half, Kivi
from cla_jax.cache.per_token import PerToken, Shape
from cla_jax.config import ModelConfig
from cla_jax.model.attention import KV, Segment, StepPositions
from cla_jax.model.platform import on_cpu

# The page that a row writes a position to, [B, T] of [B, T]; past the pool where there is none.
PageOf = Callable[[jax.Array], jax.Array]


class Leaf(NamedTuple):
    """Where the newest tokens of a request are: its last page, and its row."""

    page: Any
    row: Any


@dataclasses.dataclass(frozen=True)
class TokenPages:
    """A KV layer is a pool: a `KV` of pytrees of arrays [pages, K, page, ...].

    Heads come before tokens. So attention reads a page as it lies: no product transposes keys or values.
    """

    format: PerToken
    page: int  # tokens
    ring: ClassVar[int] = 0  # entries that a row has beside its pages

    def shapes(self, config: ModelConfig, pages: int, rows: int, holds: str) -> Any:  # noqa: ARG002
        """A pool of so many pages, for so many rows."""
        return _heads_first(self.format.shapes(config, pages, self.page, holds))

    def bytes_per_token(self, config: ModelConfig, half: str) -> tuple[float, float]:
        """Bytes of the keys, or the values, of a token: in a full page, and among the newest of a row."""
        each = self.format.bytes_per_token(config, half)
        return each, each

    def write(
        self,
        layer: Any,
        kv: KV,
        step: StepPositions,
        page_of: PageOf,
        rows_B: jax.Array,  # noqa: ARG002
    ) -> Any:
        """The KV layer with the new tokens of each row. `rows_B` are the rows of the cache."""
        page_BT, entry_BT = page_of(step.positions_BT), step.positions_BT % self.page

        def put(held: jax.Array, new: jax.Array) -> jax.Array:
            if on_cpu():  # a loop over tokens
                return held.at[page_BT, :, entry_BT].set(new, mode="drop")
            # A TPU would copy a pool of int8 to write all heads of a token at once.
            heads_K = jnp.arange(held.shape[1])
            return held.at[page_BT[..., None], heads_K, entry_BT[..., None]].set(new, mode="drop")

        return jax.tree.map(put, layer, self.format.encode(kv))

    def clear_pages(self, layer: Any, pages_C: jax.Array) -> Any:
        """The KV layer with zeros in these pages; a page past the pool is none."""
        return jax.tree.map(lambda held: held.at[pages_C].set(0, mode="drop"), layer)

    def clear_rows(self, layer: Any, rows_B: jax.Array) -> Any:  # noqa: ARG002
        """The KV layer with zeros in what these rows keep beside their pages: nothing."""
        return layer

    def copy(self, layer: Any, source: Leaf, target: Leaf) -> Any:
        """The KV layer with the newest tokens of one request given to another."""
        return jax.tree.map(lambda held: held.at[target.page].set(held[source.page]), layer)

    def read(self, layer: Any, pages_BM: jax.Array) -> KV:
        """The tokens of M pages a row, one after the other: [B, M * page, K, H]."""
        B, M = pages_BM.shape

        def gathered(held: jax.Array) -> jax.Array:
            _, K, page, *H = held.shape
            # XLA's CPU compiler computes a place for each number, faster the fewer axes there are. On a TPU,
            # another shape would copy the pool.
            of_pages = held.reshape(*held.shape[:2], -1) if on_cpu() else held
            numbers = jax.lax.GatherDimensionNumbers(
                offset_dims=(1, *range(3, of_pages.ndim + 1)),  # B, K, M, page, H
                collapsed_slice_dims=(0,),
                start_index_map=(0,),
            )
            taken = jax.lax.gather(
                of_pages,
                pages_BM[..., None],
                numbers,
                slice_sizes=(1, *of_pages.shape[1:]),
                mode="clip",
            )
            return taken.reshape(B, K, M * page, *H)

        kv = self.format.decode(jax.tree.map(gathered, layer))
        return kv.each(lambda x: x.swapaxes(1, 2))

    def last_in_pages(self, positions: jax.Array) -> jax.Array:
        """The last position that a query at each position may read from a page."""
        return positions

    def newest(self, layer: Any, rows_B: jax.Array, lengths_B: jax.Array) -> Segment | None:  # noqa: ARG002
        """What rows keep beside their pages: nothing."""
        return None


@dataclasses.dataclass(frozen=True)
class GroupPages:
    """A query reads its own page in full precision, from the newest tokens, and earlier pages quantised.

    A KV layer is a `KV` of `Half`: packed groups [pages, groups of a page, ...], and the newest tokens
    [rows, K, ring, H]; position p is in entry p % ring.
    """

    format: Kivi
    page: int  # tokens
    chunk: int  # tokens that a step writes at most

    @property
    def ring(self) -> int:
        """Entries that hold what a step writes, and the page that its first token is in: whole pages."""
        return -(-(self.page - 1 + self.chunk) // self.page) * self.page

    def shapes(self, config: ModelConfig, pages: int, rows: int, holds: str) -> KV:
        packed = self.format.packed_shapes(config, pages, self.page // GROUP)
        heads = (rows, config.n_kv_heads, self.ring, config.d_head)
        newest = Shape("BKRH", heads, carrier(self.format.dtype))
        return packed.only(holds).each(lambda half: Half(half, newest))

    def bytes_per_token(self, config: ModelConfig, half: str) -> tuple[float, float]:
        return self.format.packed_bytes(config, half), self.format.full_bytes(config, half)

    def write(
        self, layer: KV, kv: KV, step: StepPositions, page_of: PageOf, rows_B: jax.Array
    ) -> KV:
        newest = self._with_new(layer, kv, step.positions_BT, rows_B)
        before_B = step.lengths_B - jnp.sum(step.positions_BT >= 0, axis=1)

        def fill(pages: KV, i: jax.Array) -> tuple[KV, None]:
            """Quantises one page of each row, if the step has filled it."""
            index_B = before_B // self.page + i
            full_B = (index_B + 1) * self.page <= step.lengths_B
            first_B1 = jnp.where(full_B, index_B * self.page, -1)[:, None]
            place_B = index_B % (self.ring // self.page)
            quantized = lambda newest: self._quantized(newest, rows_B, place_B)
            nothing = lambda newest: jax.tree.map(jnp.zeros_like, jax.eval_shape(quantized, newest))
            # Most steps of decoding fill no page.
            new = jax.lax.cond(jnp.any(full_B), quantized, nothing, newest)
            page_B = page_of(first_B1)[:, 0]
            into_pages = lambda held, new: held.at[page_B].set(new, mode="drop")
            return jax.tree.map(into_pages, pages, new), None

        most = -(-step.positions_BT.shape[1] // self.page)
        pages, _ = jax.lax.scan(fill, layer.each(lambda half: half.packed), jnp.arange(most))
        return pages.each(Half, newest)

    def _with_new(self, layer: KV, kv: KV, positions_BT: jax.Array, rows_B: jax.Array) -> KV:
        """The newest tokens of all rows, with the new ones of these rows."""
        entry_BT = jnp.where(positions_BT >= 0, positions_BT % self.ring, self.ring)

        def put(half: Half, new: jax.Array) -> jax.Array:
            bits = stored(new, self.format.dtype)
            return half.newest.at[rows_B[:, None], :, entry_BT].set(bits, mode="drop")

        return layer.each(put, kv)

    def _quantized(self, newest: KV, rows_B: jax.Array, place_B: jax.Array) -> KV:
        """One page of the newest tokens of each row: the one at `place_B` of its ring."""

        def of_page(held: jax.Array) -> jax.Array:
            _, K, _, H = held.shape
            by_page = held.reshape(held.shape[0], K, -1, self.page, H)
            page_BKTH = by_page[rows_B, :, place_B]
            return restored(page_BKTH, self.format.dtype).swapaxes(1, 2)

        return self.format.packed(newest.each(of_page))

    def clear_pages(self, layer: KV, pages_C: jax.Array) -> KV:
        zeros = lambda held: held.at[pages_C].set(0, mode="drop")
        return layer.each(lambda half: half._replace(packed=jax.tree.map(zeros, half.packed)))

    def clear_rows(self, layer: KV, rows_B: jax.Array) -> KV:
        zeros = lambda half: half.newest.at[rows_B].set(0, mode="drop")
        return layer.each(lambda half: half._replace(newest=zeros(half)))

    def copy(self, layer: KV, source: Leaf, target: Leaf) -> KV:
        def copied(half: Half) -> Half:
            return half._replace(newest=half.newest.at[target.row].set(half.newest[source.row]))

        return layer.each(copied)

    def read(self, layer: KV, pages_BM: jax.Array) -> KV:
        taken = lambda held: held.at[pages_BM].get(mode="clip")  # [B, M, groups, ...]
        joined = lambda held: held.reshape(held.shape[0], -1, *held.shape[3:])
        packed = layer.each(lambda half: jax.tree.map(lambda a: joined(taken(a)), half.packed))
        return self.format.unpacked(packed, layer.v_BSKH.newest.shape[-1])

    def last_in_pages(self, positions: jax.Array) -> jax.Array:
        return positions // self.page * self.page - 1

    def newest(self, layer: KV, rows_B: jax.Array, lengths_B: jax.Array) -> Segment:
        ring = Entries(self.ring, ring=True, block=self.ring)

        def read(_: Any) -> KV:
            of_rows = lambda half: restored(half.newest[rows_B], self.format.dtype)
            return layer.each(lambda half: of_rows(half).swapaxes(1, 2))

        def positions(_: Any) -> jax.Array:
            return ring.positions(jnp.arange(self.ring), lengths_B)

        any_token = jnp.minimum(jnp.max(lengths_B), 1)
        return Segment(read, positions, 0, any_token, (layer.v_BSKH.newest,))


def make_pages(format: CacheFormat, page: int, chunk: int) -> TokenPages | GroupPages:
    """How pages of so many tokens are kept in this format. `page_refusal` says if they cannot be."""
    if isinstance(format, PerToken):
        return TokenPages(format, page)
    assert isinstance(format, Kivi), format
    return GroupPages(format, page, chunk)


def page_refusal(format: CacheFormat, page: int) -> str | None:
    """Why a format cannot have pages of so many tokens; None if it can."""
    if isinstance(format, Kivi) and page % GROUP:
        return (
            f"prefix-shared cache: format {format.name} quantises groups of {GROUP} tokens, so page = {page} "
            f"must be a multiple of {GROUP}"
        )
    return None


def _heads_first(shapes: Any) -> Any:
    swapped = lambda a: (a[0], a[2], a[1], *a[3:])
    change = lambda s: Shape("".join(swapped(s.letters)), swapped(s.shape), s.dtype)
    return jax.tree.map(change, shapes, is_leaf=lambda x: isinstance(x, Shape))
