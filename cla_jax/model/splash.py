"""Splash attention on TPU: jax's Pallas kernel, forward and backward, one KV head at a time.

The kernel works on whole tiles of 128 lanes. So a head of 46 or 90 costs as much as one of 128. It is padded
with zeros, which is exact.
"""

import jax
import jax.numpy as jnp

from cla_jax.config import LatentKV, ModelConfig

LANES = 128
OUTPUT = (
    "attention_output"  # the name under which rematerialisation may keep what the kernel returns
)
_BLOCK = 512  # of queries and of keys; the shorter of this and the sequence
_TESTED_HEAD = 64  # the kernel's own tests have multiples of it


def refusal(config: ModelConfig, seq_len: int) -> str | None:
    """Why the splash kernel cannot serve this model and window; None if it can."""
    if seq_len % LANES or seq_len % min(_BLOCK, seq_len):
        return (
            f"it needs data.seq_len to be a multiple of {LANES}, and of {_BLOCK} above that, "
            f"not {seq_len}"
        )
    if isinstance(config.kv, LatentKV):
        return "it does not support model.kv.kind = latent"
    if any(config.resolved_windows):
        return "it does not support sliding windows yet: model.windows must be 0"
    return None


def attend(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    starts_BT: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention on one device; [B, T, K, G, H].

    `starts_BT` must be the first positions of documents: queries and keys of one document share them.
    `interpret` runs the kernel in Python, on any hardware.
    """
    H = q_BTKGH.shape[-1]
    q_BKGTH = jnp.einsum("BTKGH->BKGTH", _padded(q_BTKGH * H**-0.5))
    k_BKSH, v_BKSH = (jnp.einsum("BSKH->BKSH", _padded(a)) for a in (k_BSKH, v_BSKH))
    G, T = q_BKGTH.shape[2:4]
    kernel = _kernel(G, T, interpret)
    over_heads = jax.vmap(kernel, in_axes=(0, 0, 0, None))  # the KV heads of one sequence
    if starts_BT is None:
        segments, axis = None, None
    else:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        segments, axis = SegmentIds(q=starts_BT, kv=starts_BT), 0
    o_BKGTH = jax.vmap(over_heads, in_axes=(0, 0, 0, axis))(q_BKGTH, k_BKSH, v_BKSH, segments)
    return jnp.einsum("BKGTH->BTKGH", o_BKGTH)[..., :H].astype(q_BTKGH.dtype)


def _padded(a: jax.Array) -> jax.Array:
    missing = -a.shape[-1] % _TESTED_HEAD
    return jnp.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)]) if missing else a


def _kernel(n_heads: int, seq_len: int, interpret: bool):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    block = min(_BLOCK, seq_len)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    mask = splash.MultiHeadMask([splash.CausalMask((seq_len, seq_len))] * n_heads)
    return splash.make_splash_mqa_single_device(
        mask=mask, block_sizes=sizes, residual_checkpoint_name=OUTPUT, interpret=interpret
    )
