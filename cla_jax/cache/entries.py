"""Which entry of a slot holds which position."""

import dataclasses

import jax
import jax.numpy as jnp

from cla_jax.model.attention import EMPTY


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a slot, as one device sees them.

    On several devices that hold parts of one slot, blocks of entries are dealt to them in turn, so that
    all have as much to read at any length. A ring starts over at its first entry when it is full, and
    so holds the newest tokens only.
    """

    capacity: int  # on this device; a multiple of `block`
    block: int
    ring: bool
    shards: int = 1
    shard: jax.Array | int = 0  # which device this is

    @property
    def total(self) -> int:
        """Entries on all devices."""
        return self.capacity * self.shards

    def of(self, positions: jax.Array) -> jax.Array:
        """The entry for each position. One past the end, where a write is dropped, if there is none:
        for a position that is negative (padding), beyond the capacity, or on another device."""
        place = positions % self.total
        block = place // self.block
        entry = (block // self.shards) * self.block + place % self.block
        here = (positions >= 0) & (block % self.shards == self.shard)
        if not self.ring:
            here &= positions < self.total
        return jnp.where(here, entry, self.capacity)

    def positions(self, entries: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """The position that each entry holds, [B, entries], of rows with so many tokens; or EMPTY."""
        block = entries // self.block
        place = (block * self.shards + self.shard) * self.block + entries % self.block
        newest_B1 = lengths_B[:, None] - 1
        held = place
        if self.ring:
            held = place + (newest_B1 - place) // self.total * self.total
        return jnp.where(place <= newest_B1, held, EMPTY)

    def blocks(self, first: jax.Array, newest: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The blocks to read (from, to) for positions first to newest, over all rows."""
        end = jnp.minimum(newest // self.block // self.shards + 1, self.capacity // self.block)
        if self.ring:
            return jnp.zeros_like(end), end
        return first // self.block // self.shards, end
