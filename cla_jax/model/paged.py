"""Attention through a cache on TPU: the paged kernel that comes with jax, over a cache of one KV head.

The entries of a row are contiguous, so they can be viewed as pages without a copy. The kernel works on whole
tiles of 128 lanes, so the cache keeps heads as wide as that: one of 46 or 64 takes the room of 128.
"""

from typing import Any

import jax
import jax.numpy as jnp

from cla_jax.config import ModelConfig
from cla_jax.model.attention import MASKED, Kept, Partial

_LANES = 128
_PAGE = 128  # entries; caches are allocated in units of as many
_TOGETHER = 4  # pages that the kernel copies and multiplies at once


def kept_width(d_head: int) -> int:
    """How wide a cache keeps heads for this kernel."""
    return -(-d_head // _LANES) * _LANES


def refusal(
    config: ModelConfig,
    format: str,
    platform: str,
    compute_capability: float,  # noqa: ARG001
) -> str | None:
    """Why the kernel cannot serve this model and cache; None if it can."""
    if platform != "tpu":
        return f"the paged kernel is not available on {platform}"
    if config.n_kv_heads != 1:
        return (
            f"it supports one KV head; the cache of {config.n_kv_heads} KV heads would be copied at each "
            "step"
        )
    if any(config.resolved_windows):
        return "it does not support sliding windows: model.windows must be 0"
    if format not in ("dense", "bfloat16"):
        return f"it supports bfloat16, not cache format {format}"
    return None


def attend(
    q_BKNH: jax.Array,
    kept: Kept,
    positions_BN: jax.Array,
    starts_BN: jax.Array,  # noqa: ARG001
) -> Partial:
    """Attention of the newest token of each row to all entries up to its own.

    It sees the row from its beginning. Outputs are normalised already, so they cannot be merged with those of
    other parts.
    """
    from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention

    B, K, N, H = q_BKNH.shape
    E = kept.k_BEKH.shape[1]
    assert K == 1, K
    assert kept_width(H) == H, H
    pages = E // _PAGE
    together = next(n for n in range(min(_TOGETHER, pages), 0, -1) if pages % n == 0)
    as_pages: Any = lambda a_BEKH: a_BEKH.reshape(1, B * pages, _PAGE, H)
    lengths_B = positions_BN[:, 0] + 1
    o_BNH = paged_attention(
        q_BKNH[:, 0].astype(jnp.bfloat16),
        as_pages(kept.k_BEKH),
        as_pages(kept.v_BEKH),
        lengths_B.astype(jnp.int32),
        jnp.arange(B * pages, dtype=jnp.int32).reshape(B, pages),
        pages_per_compute_block=together,
    )
    saw_none = (lengths_B <= 0)[:, None, None, None]
    peak = jnp.where(saw_none, jnp.float32(MASKED), 0) + jnp.zeros((B, K, N, 1))
    return Partial(o_BNH[:, None].astype(jnp.float32), jnp.ones_like(peak), peak)
