"""Every byte of a KV cache counted twice: in closed form, and from what the decoder really does."""

from collections.abc import Callable
from typing import Any

import jax

from cla_jax.cache import Cache, CacheFormat, Slot
from cla_jax.config import ModelConfig
from cla_jax.costs import KvBytes


def predicted(config: ModelConfig, format: CacheFormat) -> KvBytes:
    """Bytes per token of one row, from the config alone: slots hold and write, layers read."""
    slot = format.bytes_per_token(config)
    return KvBytes(
        resident=config.n_slots * slot, written=config.n_slots * slot, read=config.n_layers * slot
    )


def counted(format: CacheFormat, cache: Cache, step: Callable[[Any, Cache], Any]) -> KvBytes:
    """The same from a live cache and a decode step: `step(format, cache)` is traced, not run.

    Resident bytes are those of the live arrays. A write counts the slot that it goes to, and a read,
    of which every attending layer does one inside its loop over blocks, the slot that it comes from.
    """
    batch, capacity = jax.tree.leaves(cache[0])[0].shape[:2]
    per_token = lambda slot: nbytes(slot) // (batch * capacity)
    counting = _Counting(format, per_token)
    jax.eval_shape(lambda cache: step(counting, cache), cache)
    return KvBytes(
        resident=nbytes(cache) // (batch * capacity),
        written=counting.bytes_written,
        read=counting.bytes_read,
    )


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a pytree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


class _Counting:
    """A format that counts what passes through it."""

    def __init__(self, format: CacheFormat, per_token: Callable[[Slot], int]):
        self.format, self.per_token = format, per_token
        self.block = format.block
        self.bytes_written = self.bytes_read = 0

    def write(self, slot: Slot, kv: Any, index: Any) -> Slot:
        self.bytes_written += self.per_token(slot)
        return self.format.write(slot, kv, index)

    def read(self, slot: Slot, i: Any) -> Any:
        self.bytes_read += self.per_token(slot)
        return self.format.read(slot, i)
