"""Keys and values as they are, in float32 or bfloat16."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from cla_jax.cache.bits import carrier, kept, restored
from cla_jax.cache.per_token import PerToken, Shape, Slot
from cla_jax.config import ModelConfig
from cla_jax.model.attention import KV


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(PerToken):
    """A slot is a KV of [B, E, K, H]."""

    held: str  # the dtype of the cache

    def shapes(self, config: ModelConfig, batch: int, entries: int) -> Slot:
        shape = (batch, entries, config.n_kv_heads, config.d_head)
        half: Any = Shape("BEKH", shape, carrier(self.held))
        return KV(half, half)

    def encode(self, kv: KV) -> KV:
        return KV(*(kept(x, self.held) for x in kv))

    def decode(self, kept: KV) -> KV:
        return KV(*(restored(bits, self.held).astype(self.dtype) for bits in kept))

    def bytes_per_token(self, config: ModelConfig) -> int:
        return 2 * config.n_kv_heads * config.d_head * jnp.dtype(self.held).itemsize
