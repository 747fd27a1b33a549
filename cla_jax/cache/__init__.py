"""KV caches: one file a format, behind one small protocol.

A cache is a tuple of slots, one for each producer of the kv_map and none for consumers. A slot is
whatever pytree its format likes; the model hands it from the producer's write to the readers of the
group and never looks inside.

Entries of a slot are counted from 0 for every row of the batch alike. A row that is shorter than the
batch's longest prompt starts later: its first entries are padding, which `starts` keeps out of sight.
"""

from typing import Any, Protocol

from cla_jax.cache.dense import Dense
from cla_jax.config import ModelConfig, near_choice
from cla_jax.mesh import AxisRules
from cla_jax.model.attention import KV

Slot = Any
Cache = tuple[Slot, ...]


class CacheFormat(Protocol):
    """How keys and values of one producer are kept."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str:
        """What `read` returns and the attention computes in."""
        ...

    @property
    def block(self) -> int:
        """Entries that `read` returns."""
        ...

    def allocate(self, config: ModelConfig, batch: int, capacity: int, rules: AxisRules) -> Slot:
        """An empty slot for `capacity` entries, a multiple of `block`."""
        ...

    def write(self, slot: Slot, kv: KV, index: Any) -> Slot:
        """Puts the KV of T new tokens at entries index to index + T; the caller keeps that in range."""
        ...

    def read(self, slot: Slot, i: Any) -> KV:
        """Entries i * block to (i + 1) * block."""
        ...

    def bytes_per_token(self, config: ModelConfig) -> int:
        """Closed form: bytes that a slot holds for a token of context of one row."""
        ...


FORMATS = ("dense",)


def make_format(name: str, dtype: str) -> CacheFormat:
    """A format by its name, computing in `dtype`."""
    near_choice("cache format", name, FORMATS)
    return Dense(dtype=dtype)


def round_up(entries: int, block: int) -> int:
    """The capacity that holds this many entries: whole blocks."""
    return -(-entries // block) * block


def allocate(
    format: CacheFormat, config: ModelConfig, *, batch: int, capacity: int, rules: AxisRules
) -> Cache:
    """An empty cache: one slot a producer. Raises ValueError unless there is room for something."""
    if batch < 1 or capacity < 1:
        raise ValueError(f"a cache for {batch} rows of {capacity} tokens holds nothing")
    capacity = round_up(capacity, format.block)
    return tuple(format.allocate(config, batch, capacity, rules) for _ in range(config.n_slots))
