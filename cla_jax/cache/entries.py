"""Which entry of a KV layer holds which position."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax.model.attention import EMPTY

UNIT = 128  # entries are allocated, and distributed over devices, in units


@dataclasses.dataclass(frozen=True)
class Entries:
    """The entries of a KV layer, as one device sees them.

    If several devices hold parts of one KV layer, units of entries are distributed in turn. So all devices
    read about the same number of entries at any length. With 2 devices and units of 4 entries:

        position         0-3  4-7  8-11  12-15
        device (shard)    0    1     0     1
        entry there      0-3  0-3   4-7   4-7

    A ring starts over at its first entry when it is full, and so holds the newest tokens only.
    """

    capacity: int  # on this device
    ring: bool
    block: int  # entries that are read at once
    shards: int = 1
    shard: jax.Array | int = 0  # which device this is
    unit: int = UNIT

    @property
    def total(self) -> int:
        """Entries on all devices."""
        return self.capacity * self.shards

    def of(self, positions: jax.Array) -> jax.Array:
        """The entry for each position.

        A position has no entry if it is negative (padding), beyond the capacity, or on another device. Then
        the result is one past the end, where a write is dropped.
        """
        place = positions % self.total
        unit = place // self.unit
        entry = (unit // self.shards) * self.unit + place % self.unit
        here = (positions >= 0) & (unit % self.shards == self.shard)
        if not self.ring:
            here &= positions < self.total
        return jnp.where(here, entry, self.capacity)

    def positions(self, entries: jax.Array, lengths_B: jax.Array) -> jax.Array:
        """The position that each entry holds, [B, entries], of rows with so many tokens; or EMPTY."""
        place = entries
        if self.shards > 1:
            unit = entries // self.unit
            place = (unit * self.shards + self.shard) * self.unit + entries % self.unit
        newest_B1 = lengths_B[:, None] - 1
        position = place
        if self.ring:
            position = place + (newest_B1 - place) // self.total * self.total
        return jnp.where(place <= newest_B1, position, EMPTY)

    # ------------------------------------------------------------------------------ block by block

    def start(self, i: Any) -> Any:
        """The first entry of block i. The last block begins early enough to be whole."""
        return jnp.minimum(i * self.block, self.capacity - self.block)

    def block_positions(self, i: Any, lengths_B: jax.Array) -> jax.Array:
        """The positions of the entries of block i, [B, block]; those of the block before it are EMPTY."""
        entries = self.start(i) + jnp.arange(self.block)
        positions = self.positions(entries, lengths_B)
        if self.capacity % self.block == 0:
            return positions
        return jnp.where(entries >= i * self.block, positions, EMPTY)

    def blocks(self, first: jax.Array, newest: jax.Array) -> tuple[Any, Any]:
        """The blocks to read (from, to) for positions first to newest, over all rows."""
        last = newest + 1
        # Every device reads up to the end of the newest unit that one of them has.
        if self.shards > 1:
            last = (newest // self.unit // self.shards + 1) * self.unit
        end = -(-jnp.minimum(last, self.capacity) // self.block)
        if self.ring:
            return jnp.zeros_like(end), end
        return first // self.unit // self.shards * self.unit // self.block, end


def put(held: jax.Array, entries_BT: jax.Array, new: jax.Array) -> jax.Array:
    """`held` [B, E, ...] with `new` [B, T, ...] at the entries; what lies outside of it is dropped."""
    rows_B1 = jnp.arange(entries_BT.shape[0])[:, None]
    return held.at[rows_B1, entries_BT].set(new, mode="drop")
