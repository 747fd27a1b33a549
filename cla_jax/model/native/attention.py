"""Attention through a cache on a CPU.

XLA's products for few queries and many keys pack the keys in memory again at every step. This kernel reads
them where they are, once, and computes scores, softmax and weighted sums of a block before the next block. It
returns a `Partial`.
"""

import jax
import jax.numpy as jnp

from cla_jax.config import ModelConfig
from cla_jax.model.attention import PagedKV, Partial
from cla_jax.model.native import library

QUERIES = 1 << 30  # the most queries of a KV head: no limit
_TARGET = "cla_jax_attend"
FORMATS = ("dense", "float32", "bfloat16", "int8", "fp8")


def kept_width(d_head: int) -> int:
    """How wide a cache keeps heads for this kernel: as they are."""
    return d_head


def refusal(
    config: ModelConfig,  # noqa: ARG001
    format: str,
    platform: str,
    compute_capability: float,  # noqa: ARG001
    page: int | None,  # noqa: ARG001
) -> str | None:
    """Why the kernel cannot serve this model and cache; None if it can."""
    if platform != "cpu":
        return f"the native kernel is not available on {platform}"
    if format not in FORMATS:
        return f"it supports {', '.join(FORMATS)}, not cache format {format}"
    return library.load()


def attend(
    q_BKNH: jax.Array, kept: PagedKV, positions_BN: jax.Array, starts_BN: jax.Array
) -> Partial:
    """Attention of scaled queries of each KV head to the entries that each sees.

    Queries that are wider than the keys are those of a latent: their beginning meets the values.
    """
    reason = library.load()
    assert reason is None, reason
    B, K, N, H = q_BKNH.shape
    # The kernel trusts its arguments.
    assert kept.k.shape[:3] == kept.v.shape[:3], (kept.k.shape, kept.v.shape)
    assert kept.k.shape[1 if kept.heads_first else 2] == K, kept.k.shape
    assert H in (kept.k.shape[3], kept.k.shape[3] + kept.v.shape[3]), (H, kept.k.shape)
    assert kept.pages_BC.shape[1] * kept.page >= kept.positions_BE.shape[1], kept.pages_BC.shape
    assert len(kept.pages_BC) == len(kept.positions_BE) == B, kept.pages_BC.shape
    assert positions_BN.shape == starts_BN.shape == (B, N), positions_BN.shape
    shapes = [(B, K, N, kept.v.shape[-1]), (B, K, N, 1), (B, K, N, 1)]
    no_scales = jnp.zeros(0, jnp.uint16)
    part = jax.ffi.ffi_call(_TARGET, [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])(
        q_BKNH.astype(jnp.float32),
        kept.k,
        kept.v,
        no_scales if kept.k_scales is None else kept.k_scales,
        no_scales if kept.v_scales is None else kept.v_scales,
        kept.pages_BC,
        kept.positions_BE,
        positions_BN,
        starts_BN,
        heads_first=kept.heads_first,
    )
    return Partial(*part)
