"""The platform that a program is traced for, and what programs for a CPU do differently.

A program for a TPU is often compiled on a machine that has none, so the devices at hand do not decide.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import PartitionSpec

log = logging.getLogger(__name__)


def _platform() -> str:
    """What the program is for: the mesh says so, or without a mesh the devices at hand."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def on_cpu() -> bool:
    """Whether the program is for a CPU."""
    return _platform() == "cpu"


def on_tpu() -> bool:
    """Whether the program is for a TPU."""
    return _platform() == "tpu"


def token_major(x_BTD: jax.Array) -> jax.Array:
    """The array [B, T, ...] with the numbers of a token side by side in a TPU's memory; else unchanged.

    For what one loop saves and another reads. XLA chooses the layout of the first loop by what writes there,
    often with positions as the fastest axis. The second loop then copies every array that it reads.
    """
    if not on_tpu():
        return x_BTD
    lay_out = lambda a: with_layout_constraint(a, Layout(tuple(range(a.ndim))))
    sharding = jax.typeof(x_BTD).sharding
    if sharding.mesh.empty:
        return lay_out(x_BTD)
    # The compiler cannot partition the constraint, so each device sets its own.
    return jax.shard_map(lay_out, out_specs=sharding.spec, check_vma=False)(x_BTD)


def describe(device: Any) -> tuple[str, float]:
    """The platform of a device, `gpu` for every maker, and its compute capability; 0 if it has none."""
    platform = "gpu" if device.platform in ("gpu", "cuda") else device.platform
    # "9.0" on NVIDIA; AMD has names such as "gfx90a".
    version = str(getattr(device, "compute_capability", ""))
    return platform, float(version) if version.replace(".", "").isdigit() else 0.0


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, unless it was logged before."""
    log.warning(message)


def per_token(
    equation: str, x: jax.Array, weight: jax.Array, spec: Callable[[str], PartitionSpec | None]
) -> jax.Array:
    """The einsum of an activation [B, T, ...] and a weight; `spec` gives the layout for axis letters.

    On a CPU, B and T become one axis of tokens, N. With two, XLA transposes whole activations in memory for
    the gradient of the weight, a tenth of the step. On a TPU the one axis costs more than it saves. If a
    width is not a multiple of 128, each reshape to or from it copies the activation.
    """
    outputs = equation.split("->")[1]
    if not on_cpu():
        return jnp.einsum(equation, x, weight, out_sharding=spec(outputs))
    x_N = x.reshape(-1, *x.shape[2:])
    flat = equation.replace("BT", "N")
    y_N = jnp.einsum(flat, x_N, weight, out_sharding=spec(outputs.replace("BT", "N")))
    return y_N.reshape(*x.shape[:2], *y_N.shape[1:], out_sharding=spec(outputs))


def query_block(queries: int) -> int:
    """How many consecutive queries of causal attention share one product with the keys.

    On a CPU, at most eight blocks, of 64 queries or more. A block leaves out the keys after it, which is
    nearly half of the work. Its scores stay in the processor's cache. Each block adds to the time of
    compilation.
    """
    return max(64, -(-queries // 8)) if on_cpu() else queries


def first_microbatch_apart() -> bool:
    """Whether the first of several microbatches is computed before the loop over the others.

    Not on a TPU: the model would be in the program twice, which takes twice as long to compile. On a CPU,
    adding it to zeros would cost a pass over all gradients, a seventh of the step of a small model. On GPUs,
    what layers save begins as copies of zeros in a loop, up to 5 % of the traffic.
    """
    return not on_tpu()


def rows_at_once(rows: int, tokens: int) -> int:
    """How many rows of a paged cache attention reads together, in blocks of up to `tokens` tokens.

    On a CPU, at most 16, or 8,192 tokens: then the pages that are gathered for a product stay in the
    processor's cache. Fewer turns have less fixed cost.
    """
    return min(rows, max(16, 8192 // tokens)) if on_cpu() else rows


def entries_at_once(entries: int, queries: int, width: int) -> int:
    """How many entries of a cache attention reads together: `entries`, or a smaller power of two.

    On a CPU, the keys of a block take at most 4 MiB in float32, if each KV head has few queries. Larger
    blocks leave the processor's cache before the product reads them. If there are many queries, more blocks
    cost more than they save: the weighted sums of all queries are read and written again for every block. A
    block has at least 32 entries, which KIVI quantises together.

    Args:
      entries: of the longest block.
      queries: queries of a row for each KV head.
      width: elements of the keys of one entry, in all rows and heads that are read together.
    """
    if not on_cpu() or queries > 16:
        return entries
    largest_power_of_two = 1 << ((1 << 20) // width).bit_length() >> 1
    return min(entries, max(32, largest_power_of_two))


@jax.custom_vjp
def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns the pairs (i, i + H/2) of the last axis of x by angles [..., H/2]; in float32.

    On a TPU, halves of the last axis are moved by a product with a matrix of zeros and ones. It is exact, and
    is fused with what reads it. Split and joined, each half is an array in float32 in memory.
    """
    if not on_tpu():
        a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    ones, zeros = np.eye(cos.shape[-1]), np.zeros(2 * cos.shape[-1:])
    turned = jnp.einsum(  # (-b, a)
        "...H,HI->...I",
        x,
        jnp.asarray(np.block([[zeros, ones], [-ones, zeros]]), x.dtype),
        precision=jax.lax.Precision.HIGHEST,  # otherwise float32 would be rounded
        preferred_element_type=jnp.float32,
    )
    cos, sin = (jnp.concatenate([angles, angles], axis=-1) for angles in (cos, sin))
    return (x.astype(jnp.float32) * cos + turned * sin).astype(x.dtype)


def _rotate_forward(x: jax.Array, cos: jax.Array, sin: jax.Array):
    return rotate(x, cos, sin), (cos, sin)


def _rotate_backward(angles: tuple[jax.Array, jax.Array], d_x: jax.Array):
    cos, sin = angles
    return rotate(d_x, cos, -sin), None, None  # angles are not trained


rotate.defvjp(_rotate_forward, _rotate_backward)
