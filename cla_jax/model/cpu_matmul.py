"""Matrix products for few tokens on a CPU, in forms that read their weights fast.

There, XLA runs [out, in] times [in, tokens] up to twice as fast as `Linear`'s [tokens, in] times [in, out].
It packs the weights of the latter again in every step. The same is true for a few queries and many keys.
Weights can also be packed once, for a kernel of our own (`native.matmul`). On other backends nothing here is
used.
"""

import dataclasses
import functools
import itertools
import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from cla_jax import machine
from cla_jax.mesh import AxisRules
from cla_jax.messages import near_choice
from cla_jax.model.layers import Linear, axes
from cla_jax.model.native import library
from cla_jax.model.native.matmul import Packed, multiply
from cla_jax.model.platform import on_cpu

T = TypeVar("T")

XLA, NATIVE = "xla", "native"
NAMES = (XLA, NATIVE)  # what multiplies tokens with weights
SMALLEST_PART = 1 << 18  # bytes of a matrix that are worth waking another thread


def enabled() -> bool:
    """Whether weights are kept in such forms: on one device, in a program for a CPU."""
    mesh = jax.sharding.get_abstract_mesh()
    return on_cpu() and (mesh.empty or mesh.size == 1)


def check(name: str, mesh: Mesh | AbstractMesh | None = None) -> None:
    """Raises ValueError for a way to multiply that does not exist, or cannot be used on this mesh."""
    near_choice("matmul", name, NAMES)
    if name == XLA:
        return
    if not on_cpu():
        reason = f"the native kernel is for CPUs, and the device is a {jax.default_backend()}"
    elif mesh is not None and mesh.size > 1:
        split = ", ".join(f"{axis} = {size}" for axis, size in mesh.shape.items() if size > 1)
        reason = f"the native kernel runs on one device, and the mesh has {split}"
    else:
        reason = library.load()
    if reason is not None:
        raise ValueError(f"matmul = {name!r} cannot be used for decoding: {reason}; use {XLA!r}")


def matmul(
    x_NI: jax.Array, weight_OI: jax.Array | Packed, dtype: jnp.dtype | None = None
) -> jax.Array:
    """x times the transposed matrix: [tokens, out], in `dtype` or that of the operands."""
    if isinstance(weight_OI, Packed):
        return multiply(x_NI[None], weight_OI)[0].astype(dtype or x_NI.dtype)
    N, (out, _) = len(x_NI), weight_OI.shape
    # XLA gives a matrix times a vector to one thread, even if it is large. Of a batch of them, each thread
    # takes its own, and finds it in the cache of its core at the next step. Several tokens it spreads itself.
    P = _parts(weight_OI) if N == 1 else 1
    weight_POI = weight_OI.reshape(P, out // P, -1)
    # The barriers keep XLA from folding the transposes into the product, which is the slow form again.
    x_PIN = jnp.broadcast_to(jax.lax.optimization_barrier(x_NI.T), (P, x_NI.shape[1], N))
    y_PON = _product("POI,PIN->PON", weight_POI, x_PIN, dtype)
    return jax.lax.optimization_barrier(y_PON.reshape(out, N)).T.astype(dtype or x_NI.dtype)


def _product(equation: str, weights: jax.Array, x: jax.Array, dtype: jnp.dtype | None) -> jax.Array:
    """The product with tokens along the last axis of x, in `dtype` or, for several tokens, in float32.

    XLA multiplies bfloat16 as it is if the result is float32. For another result it makes float32 copies of
    all weights, and keeps them for a whole loop. With one token the copies are faster nevertheless.
    """
    wanted = jnp.dtype(jnp.float32) if x.shape[-1] > 1 else dtype
    return jnp.einsum(equation, weights, x, preferred_element_type=wanted)


def _parts(weight_OI: jax.Array) -> int:
    """Into how many equal parts a product with one token is cut: one a core, unless they get too small."""
    most = min(machine.cores(), weight_OI.size * weight_OI.dtype.itemsize // SMALLEST_PART)
    return next(n for n in range(max(most, 1), 0, -1) if weight_OI.shape[0] % n == 0)


def matmul_heads(x_BTGI: jax.Array, weight_GOI: jax.Array | Packed) -> jax.Array:
    """The same with a matrix for each head, [B, T, G, O]."""
    B, T, G, _ = x_BTGI.shape
    if isinstance(weight_GOI, Packed):
        x_GNI = jnp.einsum("BTGI->GBTI", x_BTGI).reshape(G, B * T, -1)
        y_GNO = multiply(x_GNI, weight_GOI).reshape(G, B, T, -1)
        return jnp.einsum("GBTO->BTGO", y_GNO).astype(x_BTGI.dtype)
    x_GIN = jax.lax.optimization_barrier(jnp.einsum("BTGI->GIBT", x_BTGI)).reshape(G, -1, B * T)
    y_GON = jax.lax.optimization_barrier(_product("GOI,GIN->GON", weight_GOI, x_GIN, None))
    return jnp.einsum("GOBT->BTGO", y_GON.reshape(G, -1, B, T)).astype(x_BTGI.dtype)


def logits(x_BTD: jax.Array, head_VD: jax.Array | Packed, rules: AxisRules) -> jax.Array:
    """Scores of the next token in float32, [B, T, V]."""
    B, T, D = x_BTD.shape
    x_ND = unsplit(x_BTD).reshape(B * T, D)
    logits_NV = matmul(x_ND, unsplit(head_VD), jnp.dtype("float32"))
    return logits_NV.reshape(B, T, -1, out_sharding=rules.gathered().spec(*axes("BTV")))


def scores(q_BKNH: jax.Array, *parts_BSKH: jax.Array) -> jax.Array:
    """Dot products of N queries with S keys in float32, [B, K, N, S]. Keys may be given in parts.

    For few queries on a CPU the keys come first in the product. If they came second, they would be transposed
    in memory, which costs more than the product.
    """
    ends = list(itertools.accumulate(part.shape[-1] for part in parts_BSKH))[:-1]
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    if not on_cpu() or 8 * q_BKNH.shape[2] > parts_BSKH[0].shape[1]:
        pairs = zip(jnp.split(q_BKNH, ends, axis=3), parts_BSKH, strict=True)
        return functools.reduce(jnp.add, [product("BKNH,BSKH->BKNS", q, k) for q, k in pairs])
    q_BKHN = jax.lax.optimization_barrier(q_BKNH.swapaxes(2, 3))
    pairs = zip(jnp.split(q_BKHN, ends, axis=2), parts_BSKH, strict=True)
    s_BKSN = functools.reduce(jnp.add, [product("BSKH,BKHN->BKSN", k, q) for q, k in pairs])
    # One sum before the transpose: each part would be transposed otherwise.
    return jax.lax.optimization_barrier(s_BKSN).swapaxes(2, 3)


def unsplit(x: T) -> T:
    """Arrays without the names of mesh axes, all of which have one device."""
    return x if jax.sharding.get_abstract_mesh().empty else jax.reshard(x, PartitionSpec())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CpuLinear:
    """What a `Linear` computes, from its weight transposed."""

    weight_OI: jax.Array | Packed
    bias: jax.Array | None
    outputs: str = dataclasses.field(metadata={"static": True})  # as in `Linear`
    # Of the outputs, after B and T.
    sizes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(cls, linear: Linear) -> "CpuLinear":
        inputs, outputs = linear.equation.split("->")
        x, weight = (letters.removeprefix("BT") for letters in inputs.split(","))
        out = outputs.removeprefix("BT")
        matrix = jnp.einsum(f"{weight}->{out}{x}", unsplit(linear.weight[...]))
        sizes = matrix.shape[: len(out)]
        bias = None if linear.bias is None else linear.bias[...]
        return cls(matrix.reshape(math.prod(sizes), -1), bias, outputs, sizes)

    def packed(self) -> "CpuLinear":
        """The same for the native kernel."""
        assert not isinstance(self.weight_OI, Packed)
        return dataclasses.replace(self, weight_OI=Packed.of(self.weight_OI[None]))

    def __call__(self, x: jax.Array, rules: AxisRules) -> jax.Array:
        B, T = x.shape[:2]
        y_NO = matmul(unsplit(x).reshape(B * T, -1), self.weight_OI)
        spec = rules.gathered().spec(*axes(self.outputs))
        y = y_NO.reshape(B, T, *self.sizes, out_sharding=spec)
        return y if self.bias is None else y + self.bias.astype(y.dtype)
