"""The common part of all formats that store each token separately."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cla_jax.cache.entries import UNIT, Entries, put
from cla_jax.config import ModelConfig
from cla_jax.model.attention import KV, PagedKV, Segment

LayerCache = Any  # the stored arrays of one KV layer: a pytree that its format chooses


class Shape(NamedTuple):
    """An array of a KV layer: axes by letter (see model.layers), shape over all devices, dtype."""

    letters: str
    shape: tuple[int, ...]
    dtype: jnp.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerToken(abc.ABC):
    """A format that encodes each token separately. To add one, define the four abstract methods.

    A KV layer is stored as a `KV` of pytrees of arrays [batch, entries, heads, ...]. Keys and values are
    stored in the same way; the abstract methods work on one of the two, a half.
    """

    dtype: str
    name: str
    longest_block: int = 512
    in_full: ClassVar[int] = 0

    @abc.abstractmethod
    def encode_half(self, x_BTKH: jax.Array) -> Any:
        """The stored form of keys, or of values, [B, T, K, H]: a pytree of [B, T, K, ...] arrays."""

    @abc.abstractmethod
    def decode_half(self, half: Any) -> jax.Array:
        """The inverse of `encode_half`, in `dtype`, up to the error of the format: [B, T, K, H]."""

    @abc.abstractmethod
    def half_shapes(self, heads: tuple[int, ...], width: int) -> Any:
        """The shapes of what `encode_half` returns: a pytree of `Shape`.

        Args:
          heads: batch, entries and KV heads.
          width: elements of a head.
        """

    @abc.abstractmethod
    def head_bytes(self, width: int) -> int:
        """Bytes of one head of one token, keys or values, including scales."""

    def half_for_kernel(self, half: Any) -> tuple[jax.Array, jax.Array | None]:  # noqa: ARG002
        """The elements and the scales of keys, or of values, as they are stored.

        Raises ValueError if no decoding kernel reads the format.
        """
        raise ValueError(f"no decoding kernel reads cache format {self.name}")

    def for_kernel(
        self, layer: KV, positions_BE: jax.Array, pages_BC: jax.Array | None = None
    ) -> PagedKV:
        """A KV layer in the form that decoding kernels read.

        `layer` is a pool of pages in which heads come before tokens, and `pages_BC` are those of each row. If
        `pages_BC` is None, it has the entries of each row, which is the same as pages one after the other.
        """
        heads_first = True
        if pages_BC is None:
            B, E = positions_BE.shape
            pages_BC = jnp.arange(B * E // UNIT, dtype=jnp.int32).reshape(B, -1)
            layer = jax.tree.map(lambda a: a.reshape(-1, UNIT, *a.shape[2:]), layer)
            if heads_first := jax.tree.leaves(layer)[0].shape[2] == 1:
                layer = jax.tree.map(lambda a: a.reshape(-1, 1, UNIT, *a.shape[3:]), layer)
        (k, k_scales), (v, v_scales) = map(self.half_for_kernel, layer)
        return PagedKV(
            k=k,
            v=v,
            pages_BC=pages_BC,
            positions_BE=positions_BE,
            k_scales=k_scales,
            v_scales=v_scales,
            heads_first=heads_first,
        )

    def encode(self, kv: KV) -> KV:
        return kv.each(self.encode_half)

    def decode(self, kept: KV) -> KV:
        return kept.each(self.decode_half)

    def shapes(self, config: ModelConfig, batch: int, entries: int, holds: str = "kv") -> KV:
        heads = (batch, entries, config.n_kv_heads)
        widths = KV(*config.kept_widths).only(holds)
        return widths.each(lambda width: self.half_shapes(heads, width))

    def bytes_per_token(self, config: ModelConfig, holds: str = "kv") -> int:
        """Bytes of one token of one KV layer: its keys, its values, or both."""
        widths = KV(*config.kept_widths).only(holds)
        return config.n_kv_heads * sum(self.head_bytes(w) for w in widths if w is not None)

    def entries(self, tokens: int) -> int:
        return tokens

    def write(
        self, layer: LayerCache, kv: KV, positions_BT: jax.Array, entries: Entries
    ) -> LayerCache:
        entries_BT = entries.of(positions_BT)
        return jax.tree.map(lambda held, new: put(held, entries_BT, new), layer, self.encode(kv))

    def segments(
        self, layer: LayerCache, lengths_B: jax.Array, first: jax.Array, entries: Entries
    ) -> Sequence[Segment]:
        def read(i: jax.Array) -> KV:
            start, size = entries.start(i), entries.block
            cut = lambda held: jax.lax.dynamic_slice_in_dim(held, start, size, 1)
            return self.decode(layer if size == entries.capacity else jax.tree.map(cut, layer))

        def positions(i: jax.Array) -> jax.Array:
            return entries.block_positions(i, lengths_B)

        begin, end = entries.blocks(first, jnp.max(lengths_B) - 1)
        return [Segment(read, positions, begin, end, tuple(jax.tree.leaves(layer)))]

    def kv_layer_bytes(self, config: ModelConfig, entries: int, holds: str = "kv") -> float:
        return entries * self.bytes_per_token(config, holds)

    def held_bytes(self, config: ModelConfig, first: int, tokens: int, holds: str = "kv") -> float:
        return (tokens - first) * self.bytes_per_token(config, holds)

    def written_bytes(self, config: ModelConfig, entries: int, holds: str = "kv") -> float:  # noqa: ARG002
        return self.bytes_per_token(config, holds)
