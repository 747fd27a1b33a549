"""Eight bits an element: int8 and fp8 (e4m3), with a scale for each token and head.

A scale belongs to one token, so nothing is requantised as the cache grows, and a ring may overwrite
entries in any order. Scales are bfloat16, rounded up so that no element is clipped.
"""

import abc
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from cla_jax.cache.bits import restored, stored
from cla_jax.cache.per_token import PerToken, Shape

SCALE_BYTES = 2


class Scaled(NamedTuple):
    """Keys, or values. Arrays, or their shapes."""

    codes: Any  # [B, E, K, H]
    scales: Any  # [B, E, K]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _EightBit(PerToken):
    codes: str  # dtype of the codes' carrier
    largest: float  # the largest value that a code stands for

    @abc.abstractmethod
    def _codes(self, x: jax.Array) -> jax.Array:
        """Numbers up to `largest`, rounded and as they are kept."""

    @abc.abstractmethod
    def _values(self, codes: jax.Array) -> jax.Array:
        """What the codes stand for, float32."""

    def half_shapes(self, heads: tuple[int, ...], width: int) -> Scaled:
        codes = Shape("BEKH", (*heads, width), jnp.dtype(self.codes))
        return Scaled(codes, Shape("BEK", heads, jnp.dtype("uint16")))

    def encode_half(self, x_BTKH: jax.Array) -> Scaled:
        x = x_BTKH.astype(jnp.float32)
        scale = jnp.max(jnp.abs(x), axis=-1) / self.largest
        # All that shares the scale reads back as NaN. The scale alone does not show it: XLA's CPU compiler
        # takes the maximum of NaN and 1 for 1.
        scale = jnp.where(jnp.all(jnp.isfinite(x), axis=-1), scale, jnp.nan)
        bits = stored(scale * (1 + 2.0**-8), "bfloat16")
        scale = restored(bits, "bfloat16").astype(jnp.float32)
        # A head of zeros has scale 0 and codes 0; so has one without a scale.
        has_scale = (scale > 0)[..., None]
        x = jnp.where(has_scale, x / jnp.where(scale > 0, scale, 1)[..., None], 0)
        return Scaled(self._codes(x), bits)

    def decode_half(self, half: Scaled) -> jax.Array:
        scale = restored(half.scales, "bfloat16").astype(jnp.float32)[..., None]
        return (self._values(half.codes) * scale).astype(self.dtype)

    def half_for_kernel(self, half: Scaled) -> tuple[jax.Array, jax.Array]:
        return half.codes, half.scales

    def head_bytes(self, width: int) -> int:
        return width + SCALE_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8(_EightBit):
    """Integers of -127 to 127; an error of at most half a scale."""

    codes: str = "int8"
    largest: float = 127.0

    def _codes(self, x: jax.Array) -> jax.Array:
        return jnp.round(x).astype(jnp.int8)

    def _values(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fp8(_EightBit):
    """e4m3 floats; a relative error of at most 1/16, down to 1/28,672 of the largest element."""

    codes: str = "uint8"
    largest: float = 448.0

    def _codes(self, x: jax.Array) -> jax.Array:
        return stored(x, "float8_e4m3fn")

    def _values(self, codes: jax.Array) -> jax.Array:
        return restored(codes, "float8_e4m3fn").astype(jnp.float32)
