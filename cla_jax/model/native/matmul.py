"""Products of tokens with weights on a CPU, from weights in the order in which the kernel reads them.

The weights of a task are one piece of memory, which is read in one direction. So up to about eight tokens
take as long as reading the weights. XLA reads several rows of weights at once, which is slower. It multiplies
bfloat16 weights with one token in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cla_jax.model.native import library

_TARGET = "cla_jax_multiply"
_OUTPUTS = 16  # of a tile, as in matmul.cc


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """Matrices in tiles of 16 outputs, each input by input; bfloat16 has two inputs side by side.

    What is missing in the last tile, or beside the last input, is zero.
    """

    tiles: jax.Array  # [G, outputs / 16, I, 16], or [G, outputs / 16, I / 2, 16, 2]
    shape: tuple[int, int, int] = dataclasses.field(metadata={"static": True})  # [G, O, I]

    @classmethod
    def of(cls, weight_GOI: jax.Array) -> "Packed":
        heads, outputs, inputs = weight_GOI.shape
        beside = 2 if weight_GOI.dtype == jnp.bfloat16 else 1
        padded = jnp.pad(weight_GOI, [(0, 0), (0, -outputs % _OUTPUTS), (0, -inputs % beside)])
        tiles = padded.reshape(heads, -1, _OUTPUTS, padded.shape[2] // beside, beside)
        tiles = tiles.swapaxes(2, 3)
        return cls(tiles if beside > 1 else tiles[..., 0], (heads, outputs, inputs))


def multiply(x_GNI: jax.Array, weights: Packed) -> jax.Array:
    """Each matrix times its own tokens, [G, N, O] in float32.

    Raises TypeError if x has another dtype than the weights.
    """
    assert library.load() is None
    heads, tokens, inputs = x_GNI.shape
    if x_GNI.dtype != weights.tiles.dtype:
        raise TypeError(f"tokens are {x_GNI.dtype}, weights {weights.tiles.dtype}")
    # The kernel trusts its arguments.
    assert x_GNI.dtype in (jnp.float32, jnp.bfloat16), x_GNI.dtype
    assert weights.shape[::2] == (heads, inputs), (weights.shape, x_GNI.shape)
    shape = jax.ShapeDtypeStruct((heads, tokens, weights.shape[1]), jnp.float32)
    return jax.ffi.ffi_call(_TARGET, shape)(x_GNI, weights.tiles)
