"""What the formats have in common that keep every token by itself."""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cla_jax.cache.entries import Entries, put
from cla_jax.config import ModelConfig
from cla_jax.model.attention import KV, Segment

Slot = Any


class Shape(NamedTuple):
    """An array of a slot: its axes by letter (see model.layers), its shape over all devices, its dtype."""

    letters: str
    shape: tuple[int, ...]
    dtype: jnp.dtype


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerToken(abc.ABC):
    """A slot is a pytree of arrays [batch, entries, ...]; a token is encoded and decoded alone."""

    dtype: str
    name: str
    longest_block: int = 512
    in_full: ClassVar[int] = 0

    @abc.abstractmethod
    def encode(self, kv: KV) -> Slot:
        """What is kept of tokens: [B, T, ...] arrays."""

    @abc.abstractmethod
    def decode(self, kept: Slot) -> KV:
        """The inverse, in `dtype`, up to the error of the format."""

    @abc.abstractmethod
    def bytes_per_token(self, config: ModelConfig) -> int:
        """Of keys and values, scales included."""

    def entries(self, tokens: int) -> int:
        return tokens

    def write(self, slot: Slot, kv: KV, positions_BT: jax.Array, entries: Entries) -> Slot:
        entries_BT = entries.of(positions_BT)
        return jax.tree.map(lambda held, new: put(held, entries_BT, new), slot, self.encode(kv))

    def segments(
        self, slot: Slot, lengths_B: jax.Array, first: jax.Array, entries: Entries
    ) -> Sequence[Segment]:
        def read(i: jax.Array) -> KV:
            start, size = entries.start(i), entries.block
            cut = lambda held: jax.lax.dynamic_slice_in_dim(held, start, size, 1)
            return self.decode(slot if size == entries.capacity else jax.tree.map(cut, slot))

        def positions(i: jax.Array) -> jax.Array:
            return entries.block_positions(i, lengths_B)

        begin, end = entries.blocks(first, jnp.max(lengths_B) - 1)
        return [Segment(read, positions, begin, end, tuple(jax.tree.leaves(slot)))]

    def slot_bytes(self, config: ModelConfig, entries: int) -> int:
        return entries * self.bytes_per_token(config)

    def held_bytes(self, config: ModelConfig, first: int, tokens: int) -> int:
        return (tokens - first) * self.bytes_per_token(config)

    def written_bytes(self, config: ModelConfig, entries: int) -> float:  # noqa: ARG002
        return self.bytes_per_token(config)
