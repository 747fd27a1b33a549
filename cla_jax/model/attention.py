"""Attention over shared keys and values, one function for every head layout and kv_map.

Query heads are two axes, (K, G): MHA is G = 1, MQA is K = 1, and nothing is repeated or branched on.
What a query may see is a half-open question of two integers: keys `starts_BT <= s <= position`.
`starts` is 0 for plain causal attention, and the first position of a document (or of a row's text,
after its padding) where attention must not reach further back.
"""

import functools
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cla_jax.config import ModelConfig
from cla_jax.mesh import AxisRules
from cla_jax.model.layers import axes

MASKED = -1e30  # a finite minus infinity: rows that see nothing stay free of NaN

log = logging.getLogger(__name__)


class KV(NamedTuple):
    """Keys (rotated once, by their producer) and values, shared by the layers of a group."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


def scores(q_BTKGH: jax.Array, k_BSKH: jax.Array) -> jax.Array:
    """Scaled dot products in float32, [B, K, T, G, S]: the order a batched product leaves them in."""
    q_BTKGH = q_BTKGH * q_BTKGH.shape[-1] ** -0.5
    return jnp.einsum("BTKGH,BSKH->BKTGS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32)


def visible(queries_T: jax.Array, keys_S: jax.Array, starts_BT: jax.Array | None) -> jax.Array:
    """Which keys a query sees, [B or 1, 1, T, 1, S], to be laid over `scores`."""
    seen_BTS = (keys_S[None, :] <= queries_T[:, None])[None]
    if starts_BT is not None:
        seen_BTS = seen_BTS & (keys_S[None, None, :] >= starts_BT[:, :, None])
    return seen_BTS[:, None, :, None, :]


def attend(
    q_BTKGH: jax.Array,
    kv: KV,
    *,
    starts_BT: jax.Array | None = None,
    backend: str = "xla",
    rules: AxisRules | None = None,
) -> jax.Array:
    """Causal attention of T queries over the same T positions; softmax in float32. [B, T, K, G, H]"""
    if backend == "cudnn":
        return _attend_cudnn(q_BTKGH, kv, starts_BT, rules or AxisRules())
    B, T, K, G, H = q_BTKGH.shape
    positions = jnp.arange(T)
    # Heads before positions, merged to one axis N = G * T around the two products: contracting over
    # two axes, as the gradients of keys and values do, XLA would transpose the weights in memory.
    q_BKNH = jnp.einsum("BTKGH->BKGTH", q_BTKGH * H**-0.5).reshape(B, K, G * T, H)
    s_BKNS = jnp.einsum("BKNH,BSKH->BKNS", q_BKNH, kv.k_BSKH, preferred_element_type=jnp.float32)
    seen_B11TS = visible(positions, positions, starts_BT).swapaxes(2, 3)
    s_BKGTS = jnp.where(seen_B11TS, s_BKNS.reshape(B, K, G, T, T), MASKED)
    # The sum divides the output, which is smaller than the weights; the peak has no gradient.
    peak_BKGT1 = jax.lax.stop_gradient(s_BKGTS.max(axis=-1, keepdims=True))
    p_BKGTS = jnp.exp(s_BKGTS - peak_BKGT1)
    total_BKGT1 = p_BKGTS.sum(axis=-1, keepdims=True)
    p_BKNS = p_BKGTS.reshape(B, K, G * T, T).astype(kv.v_BSKH.dtype)
    o_BKNH = jnp.einsum("BKNS,BSKH->BKNH", p_BKNS, kv.v_BSKH, preferred_element_type=jnp.float32)
    o_BKGTH = o_BKNH.reshape(B, K, G, T, H) / total_BKGT1
    return jnp.einsum("BKGTH->BTKGH", o_BKGTH).astype(q_BTKGH.dtype)


def _attend_cudnn(
    q_BTKGH: jax.Array, kv: KV, starts_BT: jax.Array | None, rules: AxisRules
) -> jax.Array:
    """cuDNN flash attention on each device's rows and heads; the kernel itself knows no mesh."""

    def local(q_BTKGH: jax.Array, k: jax.Array, v: jax.Array, *starts: jax.Array) -> jax.Array:
        B, T, K, G, H = q_BTKGH.shape
        positions = jnp.arange(T)
        mask = visible(positions, positions, starts[0])[:, :, :, 0] if starts else None
        o_BTNH = jax.nn.dot_product_attention(
            q_BTKGH.reshape(B, T, K * G, H),
            k,
            v,
            mask=mask,
            is_causal=True,
            implementation="cudnn",
        )
        return o_BTNH.reshape(B, T, K, G, H)

    starts = () if starts_BT is None else (starts_BT,)
    if rules.spec("batch") is None:
        return local(q_BTKGH, *kv, *starts)
    sharded = jax.shard_map(local, out_specs=rules.partition(*axes("BTKGH")), check_vma=False)
    return sharded(q_BTKGH, *kv, *starts)


def attend_blocks(
    q_BTKGH: jax.Array,
    read_block,
    block: int,
    *,
    first_query: jax.Array,
    starts_BT: jax.Array,
) -> jax.Array:
    """Attention of T new queries over a cache that is read block by block, up to the last query.

    `read_block(i)` returns the KV of cache entries i * block to (i + 1) * block. The queries stand at
    cache entries first_query to first_query + T; their own keys have been written already. Softmax is
    accumulated online in float32, so neither the scores nor a copy of the cache ever exist whole.
    A query that sees no key (padding) gives zeros.
    """
    T = q_BTKGH.shape[1]
    queries_T = first_query + jnp.arange(T)

    def step(i, carry):
        peak_BKTG, total_BKTG, sum_BKTGH = carry
        kv = read_block(i)
        seen = visible(queries_T, i * block + jnp.arange(block), starts_BT)
        s_BKTGS = jnp.where(seen, scores(q_BTKGH, kv.k_BSKH), MASKED)
        new_peak = jnp.maximum(peak_BKTG, s_BKTGS.max(-1))
        p_BKTGS = jnp.where(seen, jnp.exp(s_BKTGS - new_peak[..., None]), 0)
        shrink_BKTG = jnp.exp(peak_BKTG - new_peak)
        values = jnp.einsum(
            "BKTGS,BSKH->BKTGH",
            p_BKTGS.astype(kv.v_BSKH.dtype),
            kv.v_BSKH,
            preferred_element_type=jnp.float32,
        )
        return (
            new_peak,
            total_BKTG * shrink_BKTG + p_BKTGS.sum(-1),
            sum_BKTGH * shrink_BKTG[..., None] + values,
        )

    # Zeros made from the queries, so that they carry the queries' layout.
    zero_BKTGH = jnp.einsum("BTKGH->BKTGH", q_BTKGH).astype(jnp.float32) * 0
    zero_BKTG = zero_BKTGH[..., 0]
    carry = (zero_BKTG + MASKED, zero_BKTG, zero_BKTGH)
    blocks = (first_query + T - 1) // block + 1
    _, total_BKTG, sum_BKTGH = jax.lax.fori_loop(jnp.min(starts_BT) // block, blocks, step, carry)
    o_BKTGH = sum_BKTGH / jnp.maximum(total_BKTG, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.einsum("BKTGH->BTKGH", o_BKTGH).astype(q_BTKGH.dtype)


# ----------------------------------------------------------------------------- choice of backend


def cudnn_refusal(config: ModelConfig, platform: str, compute_capability: float) -> str | None:
    """Why cuDNN's attention cannot serve this model on this hardware; None if it can.

    cuDNN takes bfloat16 heads of a multiple of 8, up to 128 wide, and up to 256 from Hopper on.
    """
    widest = 256 if compute_capability >= 9.0 else 128
    if platform != "gpu":
        return f"there is no cuDNN on {platform}"
    if compute_capability < 8.0:
        return f"it needs compute capability 8.0, this GPU has {compute_capability}"
    if config.compute_dtype != "bfloat16":
        return f"it needs model.compute_dtype = bfloat16, not {config.compute_dtype}"
    if config.d_head % 8:
        return f"it needs model.d_head to be a multiple of 8, not {config.d_head}"
    if config.d_head > widest:
        return f"it takes model.d_head up to {widest} on this GPU, not {config.d_head}"
    return None


def choose_backend(asked: str, config: ModelConfig) -> str:
    """Resolves `auto`; warns, once, of a backend slower than the best for the hardware.

    Raises ValueError if `cudnn` was asked for by name and cannot serve the model.
    """
    device = jax.devices()[0]
    platform = "gpu" if device.platform in ("gpu", "cuda") else device.platform
    # "9.0" on NVIDIA; AMD has names such as "gfx90a", and no cuDNN.
    version = str(getattr(device, "compute_capability", ""))
    capability = float(version) if version.replace(".", "").isdigit() else 0.0
    refusal = cudnn_refusal(config, platform, capability)
    if asked == "cudnn" and refusal:
        raise ValueError(f"placement.attention = 'cudnn' cannot be used: {refusal}")
    if asked == "xla" and refusal is None:
        _warn_once("placement.attention = 'xla' on a GPU where cuDNN would serve: SLOW ATTENTION")
    if platform == "gpu" and refusal:
        _warn_once(f"SLOW ATTENTION: the XLA backend is used instead of cuDNN's, because {refusal}")
    if platform == "tpu":
        _warn_once(
            "SLOW ATTENTION: the XLA backend is used; the splash kernel is not supported yet"
        )
    return "cudnn" if refusal is None and asked == "auto" else asked.replace("auto", "xla")


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
