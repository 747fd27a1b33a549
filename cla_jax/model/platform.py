"""The platform that a program is traced for, and what programs for a CPU do differently.

A program for a TPU is often compiled on a machine that has none, so the devices at hand do not decide.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec


def on_cpu() -> bool:
    """Whether the program is for a CPU: the mesh says so, or without a mesh the devices at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (jax.default_backend() if device is None else device.platform) == "cpu"


def per_token(
    equation: str, x: jax.Array, weight: jax.Array, spec: Callable[[str], PartitionSpec | None]
) -> jax.Array:
    """The einsum of an activation [B, T, ...] and a weight; `spec` gives the layout for axis letters.

    On a CPU, B and T become one axis of tokens, N. With two, XLA transposes whole activations in memory
    for the gradient of the weight, a tenth of the step. On a TPU the one axis costs more than it saves:
    where a width is no multiple of 128, each reshape to or from it copies the activation.
    """
    outputs = equation.split("->")[1]
    if not on_cpu():
        return jnp.einsum(equation, x, weight, out_sharding=spec(outputs))
    x_N = x.reshape(-1, *x.shape[2:])
    flat = equation.replace("BT", "N")
    y_N = jnp.einsum(flat, x_N, weight, out_sharding=spec(outputs.replace("BT", "N")))
    return y_N.reshape(*x.shape[:2], *y_N.shape[1:], out_sharding=spec(outputs))
