"""Keys and values as they are, in float32 or bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp

from cla_jax.cache.bits import carrier, restored, stored
from cla_jax.cache.per_token import PerToken, Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense(PerToken):
    """An array [B, E, K, H] of keys, one of values; those of a latent have widths of their own."""

    cache_dtype: str = ""  # empty: that of attention

    def __post_init__(self):
        object.__setattr__(self, "cache_dtype", self.cache_dtype or self.dtype)

    def half_shapes(self, heads: tuple[int, ...], width: int) -> Shape:
        return Shape("BEKH", (*heads, width), carrier(self.cache_dtype))

    def encode_half(self, x_BTKH: jax.Array) -> jax.Array:
        return stored(x_BTKH, self.cache_dtype)

    def decode_half(self, half: jax.Array) -> jax.Array:
        return restored(half, self.cache_dtype).astype(self.dtype)

    def half_for_kernel(self, half: jax.Array) -> tuple[jax.Array, None]:
        return half, None

    def head_bytes(self, width: int) -> int:
        return width * jnp.dtype(self.cache_dtype).itemsize
