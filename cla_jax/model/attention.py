"""Attention over shared keys and values, one function for every head layout and kv_map.

Query heads are two axes, (K, G): MHA is G = 1, MQA is K = 1, and nothing is repeated or branched on.
What a query may see is a half-open question of two integers: keys `starts_BT <= s <= position`.
`starts` is 0 for plain causal attention, and the first position of a document (or of a row's text,
after its padding) where attention must not reach further back.
"""

import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cla_jax.config import ModelConfig
from cla_jax.mesh import AxisRules
from cla_jax.model import splash
from cla_jax.model.layers import axes
from cla_jax.model.streamed import scores

ATTENTION_OUTPUT = splash.OUTPUT
MASKED = -1e30  # a finite minus infinity: rows that see nothing stay free of NaN

log = logging.getLogger(__name__)


class KV(NamedTuple):
    """Keys (rotated once, by their producer) and values, shared by the layers of a group."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array


def visible(queries_BT: jax.Array, keys_BS: jax.Array, starts_BT: jax.Array | None) -> jax.Array:
    """Which keys a query sees, by their positions: [B or 1, 1, T, S]."""
    seen_BTS = keys_BS[:, None, :] <= queries_BT[:, :, None]
    if starts_BT is not None:
        seen_BTS = seen_BTS & (keys_BS[:, None, :] >= starts_BT[:, :, None])
    return seen_BTS[:, None]


class Forks(NamedTuple):
    """Texts that begin alike, packed into rows so that what they share is computed once.

    A row holds families one after the other. A family is a trunk, from which all its texts begin, and
    then the branches, each the rest of one text. A token sees its own branch and the trunk. Padding has
    a trunk of -1 and sees padding.
    """

    positions_BT: jax.Array  # in the text, which rotates the keys and bounds a window
    trunks_BT: jax.Array  # the column where the token's family begins
    branches_BT: jax.Array  # the column where its branch begins; its trunk, if it has none

    def visible(self, window: jax.Array | None) -> jax.Array:
        """Which keys of its row a query sees, [B, T, S]."""
        of = lambda a_BT: (a_BT[:, :, None], a_BT[:, None, :])  # a query's, a key's
        position_q, position_s = of(self.positions_BT)
        trunk_q, trunk_s = of(self.trunks_BT)
        branch_q, branch_s = of(self.branches_BT)
        seen_BTS = (position_s <= position_q) & (trunk_s == trunk_q)
        seen_BTS &= (branch_s == branch_q) | (branch_s == trunk_s)
        if window is not None:
            seen_BTS &= (window == 0) | (position_s > position_q - window)
        return seen_BTS


def window_starts(
    positions_BT: jax.Array, window: jax.Array | int, starts_BT: jax.Array
) -> jax.Array:
    """`starts_BT`, no earlier than a sliding window lets a query see; a window of 0 hides nothing."""
    if isinstance(window, int) and window == 0:
        return starts_BT
    from_BT = jnp.where(jnp.asarray(window) > 0, positions_BT - window + 1, 0)
    return jnp.maximum(from_BT, starts_BT)


def attend(
    q_BTKGH: jax.Array,
    kv: KV,
    *,
    starts_BT: jax.Array | None = None,
    seen_BTS: jax.Array | None = None,
    backend: str = "xla",
    rules: AxisRules | None = None,
) -> jax.Array:
    """Causal attention of T queries over the same T positions; softmax in float32. [B, T, K, G, H]

    `seen_BTS`, if given, says instead which keys a query sees; only XLA takes it.
    """
    if backend != "xla":
        return _attend_kernel(backend, q_BTKGH, kv, starts_BT, rules or AxisRules())
    T, H = q_BTKGH.shape[1], q_BTKGH.shape[-1]
    positions = jnp.arange(T)[None]
    q_BKNH, over_queries, restore = _merged(q_BTKGH * H**-0.5)
    starts_BN = None if starts_BT is None else over_queries(starts_BT)
    if seen_BTS is None:
        seen_B1NS = visible(over_queries(positions), positions, starts_BN)
    else:
        seen_B1NS = over_queries(seen_BTS)[:, None]
    s_BKNS = jnp.einsum("BKNH,BSKH->BKNS", q_BKNH, kv.k_BSKH, preferred_element_type=jnp.float32)
    s_BKNS = jnp.where(seen_B1NS, s_BKNS, MASKED)
    # The sum divides the output, which is smaller than the weights; the peak has no gradient.
    peak_BKN1 = jax.lax.stop_gradient(s_BKNS.max(axis=-1, keepdims=True))
    p_BKNS = jnp.exp(s_BKNS - peak_BKN1)
    total_BKN1 = p_BKNS.sum(axis=-1, keepdims=True)
    p_BKNS = p_BKNS.astype(kv.v_BSKH.dtype)
    o_BKNH = jnp.einsum("BKNS,BSKH->BKNH", p_BKNS, kv.v_BSKH, preferred_element_type=jnp.float32)
    # Its gradient needs the scores again, whatever is kept.
    return checkpoint_name(restore(o_BKNH / total_BKN1).astype(q_BTKGH.dtype), ATTENTION_OUTPUT)


def _merged(q_BTKGH: jax.Array) -> tuple[jax.Array, Callable, Callable]:
    """The T positions and G query heads of a KV head as one axis N: two plain matrix products follow.

    Contracting over two axes, as the gradients of keys and values do, XLA would transpose the weights
    of attention in memory. Positions come first, which for MQA is how queries and outputs lie in memory
    already; heads do where they are split over devices.

    Returns q_BKNH, a function that says [B, T, ...] for N, and one that brings [B, K, N, H] back.
    """
    B, T, K, G, H = q_BTKGH.shape
    heads_first = jax.typeof(q_BTKGH).sharding.spec[3] is not None
    order, sizes = ("BKGTH", (G, T)) if heads_first else ("BKTGH", (T, G))

    def over_queries(a_BT: jax.Array) -> jax.Array:
        return jnp.concatenate([a_BT] * G, axis=1) if heads_first else jnp.repeat(a_BT, G, axis=1)

    def restore(o_BKNH: jax.Array) -> jax.Array:
        return jnp.einsum(f"{order}->BTKGH", o_BKNH.reshape(B, K, *sizes, H))

    return jnp.einsum(f"BTKGH->{order}", q_BTKGH).reshape(B, K, T * G, H), over_queries, restore


def _attend_kernel(
    backend: str, q_BTKGH: jax.Array, kv: KV, starts_BT: jax.Array | None, rules: AxisRules
) -> jax.Array:
    """A kernel on each device's rows and heads; the kernel itself knows no mesh."""

    def local(q_BTKGH: jax.Array, k: jax.Array, v: jax.Array, *starts: jax.Array) -> jax.Array:
        return _KERNELS[backend](q_BTKGH, k, v, starts[0] if starts else None)

    starts = () if starts_BT is None else (starts_BT,)
    if rules.spec("batch") is None:
        return local(q_BTKGH, *kv, *starts)
    sharded = jax.shard_map(local, out_specs=rules.partition(*axes("BTKGH")), check_vma=False)
    return sharded(q_BTKGH, *kv, *starts)


def _cudnn(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, starts_BT: jax.Array | None
) -> jax.Array:
    B, T, K, G, H = q_BTKGH.shape
    positions = jnp.arange(T)[None]
    o_BTNH = jax.nn.dot_product_attention(
        q_BTKGH.reshape(B, T, K * G, H),
        k_BSKH,
        v_BSKH,
        mask=None if starts_BT is None else visible(positions, positions, starts_BT),
        is_causal=True,
        implementation="cudnn",
    )
    return o_BTNH.reshape(B, T, K, G, H)


_KERNELS = {"cudnn": _cudnn, "splash": splash.attend}


# --------------------------------------------------------------------------------- through a cache

EMPTY = 1 << 30  # the position of an entry that holds no token: later than any query


class Segment(NamedTuple):
    """A part of a KV cache, as attention reads it."""

    read: Callable[[Any], KV]  # KV of block i, [B, S, K, H]
    positions: Callable[[Any], jax.Array]  # of the entries of block i, [B, S]; EMPTY where none is
    first: Any  # the blocks to read: first to end, the end not included
    end: Any  # known only when the program runs: see `attend_segments`
    arrays: tuple[jax.Array, ...]  # what it is read from, [B, entries, ...]
    tokens: int = 1  # in an entry of those arrays


def attend_segments(
    q_BTKGH: jax.Array,
    segments: Sequence[Segment],
    *,
    positions_BT: jax.Array,
    starts_BT: jax.Array,
    axis: str | None = None,
) -> jax.Array:
    """Attention of T queries over a cache that is read block by block. [B, T, K, G, H]

    A query sees the keys at positions `starts_BT <= s <= positions_BT`, its own among them: they have
    been written already. Softmax is accumulated online in float32, so neither the scores nor a copy of
    the cache ever exist whole. A query that sees no key (padding) gives zeros. With `axis`, a mesh axis
    of a surrounding shard_map, the devices along it hold parts of one cache.
    """

    B, T, K, G, H = q_BTKGH.shape
    q_BKNH, over_queries, restore = _merged(q_BTKGH * H**-0.5)
    over_heads = lambda a_BT: over_queries(a_BT)[:, None, :, None]  # [B, 1, N, 1]
    positions, starts = over_heads(positions_BT), over_heads(starts_BT)

    def step(segment: Segment, i, carry):
        peak_BKN1, total_BKN1, sum_BKNH = carry
        # A segment of one block does not depend on i: its scores would be taken out of the loop.
        queries_BKNH, peak_BKN1 = jax.lax.optimization_barrier((q_BKNH, peak_BKN1))
        kv, keys = segment.read(i), segment.positions(i)[:, None, None, :]
        s_BKNS = scores(queries_BKNH, kv.k_BSKH)
        s_BKNS = jnp.where((keys <= positions) & (keys >= starts), s_BKNS, MASKED)
        # What a query sums up before its first visible key shrinks to nothing when that key comes.
        new_peak = jnp.maximum(peak_BKN1, s_BKNS.max(-1, keepdims=True))
        p_BKNS = jnp.exp(s_BKNS - new_peak)
        shrink_BKN1 = jnp.exp(peak_BKN1 - new_peak)
        values_BKNH = jnp.einsum(
            "BKNS,BSKH->BKNH",
            p_BKNS.astype(kv.v_BSKH.dtype),
            kv.v_BSKH,
            preferred_element_type=jnp.float32,
        )
        total_BKN1 = total_BKN1 * shrink_BKN1 + p_BKNS.sum(-1, keepdims=True)
        return new_peak, total_BKN1, sum_BKNH * shrink_BKN1 + values_BKNH

    zeros_BKN1 = jnp.zeros((B, K, G * T, 1))
    # Zeros that hang on the queries (no position is less than -1): plain ones XLA's CPU compiler would
    # make for all layers of a step at its begin, and hold until their turn.
    sum_BKNH = jnp.where(positions < -1, q_BKNH, 0).astype(jnp.float32)
    carry = (zeros_BKN1 + MASKED, zeros_BKN1, sum_BKNH)
    for segment in segments:
        # A loop even where one block is all: outside of one, XLA fuses the write of a slot into its
        # readers, and then copies the slot.
        body = functools.partial(step, segment)
        carry = jax.lax.fori_loop(segment.first, segment.end, body, carry)
    peak_BKN1, total_BKN1, sum_BKNH = carry
    if axis is not None:
        highest_BKN1 = jax.lax.pmax(peak_BKN1, axis)
        shrink_BKN1 = jnp.exp(peak_BKN1 - highest_BKN1)
        total_BKN1 = jax.lax.psum(total_BKN1 * shrink_BKN1, axis)
        sum_BKNH = jax.lax.psum(sum_BKNH * shrink_BKN1, axis)
        peak_BKN1 = highest_BKN1
    saw_none = peak_BKN1 <= MASKED
    o_BKNH = jnp.where(saw_none, 0, sum_BKNH / jnp.where(saw_none, 1, total_BKN1))
    return restore(o_BKNH).astype(q_BTKGH.dtype)


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


def choose_backend(asked: str, config: ModelConfig, seq_len: int, device: Any) -> str:
    """Resolves `auto` for a device; warns, once, of a backend slower than the best for the hardware.

    Raises ValueError if a kernel was asked for by name and cannot serve the model.
    """
    platform = "gpu" if device.platform in ("gpu", "cuda") else device.platform
    # "9.0" on NVIDIA; AMD has names such as "gfx90a", and no cuDNN.
    version = str(getattr(device, "compute_capability", ""))
    capability = float(version) if version.replace(".", "").isdigit() else 0.0
    no_splash = f"there is no splash kernel on {platform}"
    refusals = {
        "cudnn": cudnn_refusal(config, platform, capability),
        "splash": splash.refusal(config, seq_len) if platform == "tpu" else no_splash,
    }
    if asked in refusals:
        if refusals[asked]:
            raise ValueError(f"placement.attention = {asked!r} cannot be used: {refusals[asked]}")
        return asked
    best = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla")
    if refusal := refusals.get(best):
        _warn_once(f"SLOW ATTENTION: the XLA backend is used instead of {best}, because {refusal}")
    elif asked == "xla" and best != "xla":
        _warn_once(f"SLOW ATTENTION: placement.attention = 'xla' where {best} would serve")
    return best if asked == "auto" and not refusal else "xla"


@functools.cache
def _warn_once(message: str) -> None:
    log.warning(message)
