"""Floats kept as their bits.

XLA converts a whole narrow array ahead of the loop that reads it block by block. Kept as unsigned
integers and cast back inside the block, only the block is ever wide.
"""

import jax
import jax.numpy as jnp


def carrier(dtype: str) -> jnp.dtype:
    """The dtype in which a dtype is kept: itself if it is 32 bits wide, else unsigned integers."""
    width = jnp.dtype(dtype).itemsize
    return jnp.dtype(dtype) if width == 4 else jnp.dtype(f"uint{8 * width}")


def stored(x: jax.Array, dtype: str) -> jax.Array:
    """x rounded to dtype, as its carrier."""
    return jax.lax.bitcast_convert_type(x.astype(dtype), carrier(dtype))


def restored(bits: jax.Array, dtype: str) -> jax.Array:
    """The inverse of `stored`."""
    return jax.lax.bitcast_convert_type(bits, dtype)
