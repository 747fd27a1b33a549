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
    """A slot is a KV of [B, E, K, H]; keys and values of a latent have widths of their own."""

    held: str  # the dtype of the cache

    def shapes(self, config: ModelConfig, batch: int, entries: int) -> Slot:
        heads = (batch, entries, config.n_kv_heads)
        halves: Any = (
            Shape("BEKH", (*heads, width), carrier(self.held)) for width in config.kept_widths
        )
        return KV(*halves)

    def encode(self, kv: KV) -> KV:
        return KV(*(kept(x, self.held) for x in kv))

    def decode(self, kept: KV) -> KV:
        return KV(*(restored(bits, self.held).astype(self.dtype) for bits in kept))

    def bytes_per_token(self, config: ModelConfig) -> int:
        return config.n_kv_heads * sum(config.kept_widths) * jnp.dtype(self.held).itemsize
