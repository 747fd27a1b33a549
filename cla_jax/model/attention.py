"""Attention over shared keys and values, one function for every head layout and kv_map.

Query heads are two axes, (K, G): MHA is G = 1, MQA is K = 1, and nothing is repeated or branched on. What a
query may see is a range of positions: keys `starts_BT <= s <= position`. `starts` is 0 for plain causal
attention. Where attention must not reach further back, it is the first position of a document, or of a row's
text after its padding.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from cla_jax.config import LatentKV, ModelConfig
from cla_jax.mesh import AxisRules
from cla_jax.model import splash
from cla_jax.model.cpu_matmul import scores
from cla_jax.model.layers import axes
from cla_jax.model.platform import describe, query_block, warn_once

ATTENTION_OUTPUT = splash.OUTPUT
MASKED = -1e30  # a finite stand-in for minus infinity, so rows that see nothing give no NaN


class KV(NamedTuple):
    """Keys (rotated once, by their producer) and values, shared by the layers of a group.

    None for one that a layer does not make. In a cache, each is whatever the format makes of it.
    """

    k_BSKH: Any
    v_BSKH: Any

    def only(self, halves: str) -> "KV":
        """The keys, the values, or both: "k", "v" or "kv"."""
        return KV(self.k_BSKH if "k" in halves else None, self.v_BSKH if "v" in halves else None)

    def or_else(self, other: "KV") -> "KV":
        """This KV, with a missing half taken from `other`."""
        return KV(*(b if a is None else a for a, b in zip(self, other, strict=True)))

    def each(self, change: Callable[..., Any], *others: "KV") -> "KV":
        """What `change` makes of the keys and of the values, or of several each; None stays None."""
        parts = zip(self, *others, strict=True)
        return KV(*(None if part[0] is None else change(*part) for part in parts))


# (q_BTKGH, kv) -> o_BTKGH. What `kv` is, arrays or a part of a cache, only this function knows.
Attend = Callable[[jax.Array, Any], jax.Array]


def visible(queries_BT: jax.Array, keys_BS: jax.Array, starts_BT: jax.Array | None) -> jax.Array:
    """Which keys a query sees, by their positions: [B or 1, T, S]."""
    seen_BTS = keys_BS[:, None, :] <= queries_BT[:, :, None]
    if starts_BT is not None:
        seen_BTS = seen_BTS & (keys_BS[:, None, :] >= starts_BT[:, :, None])
    return seen_BTS


class PrefixMask(NamedTuple):
    """Which tokens see which, in rows where texts with a common prefix share it.

    A row holds prefix groups one after the other: a prefix, then the group's members. A member is the suffix
    of a text, or a nested group. A token sees the prefixes of the groups that it is in, and its own
    suffix. A row with the prefix `a b` and two suffixes, `c d` and `e`, then padding:

        column    0  1  2  3  4  5
        token     a  b  c  d  e  -
        position  0  1  2  3  2  0
        part      0  0  2  2  4 -1
        end       5  5  4  4  5  0

    So `e` sees `a` and `b`, which end at column 5, but not `c` and `d`, which end at column 4.
    """

    positions_BT: jax.Array  # in the text: they rotate the keys and bound a window
    # A part is a prefix or a suffix. Padding is a part from column -1 to 0.
    parts_BT: jax.Array  # the column where the token's part begins
    ends_BT: jax.Array  # the first column after the part that can no longer see it

    def visible(self, window: jax.Array | None) -> jax.Array:
        """Which keys of its row a query sees, [B, T, S]."""
        of_queries_and_keys = lambda a_BT: (a_BT[:, :, None], a_BT[:, None, :])
        position_q, position_s = of_queries_and_keys(self.positions_BT)
        part_q, part_s = of_queries_and_keys(self.parts_BT)
        seen_BTS = (position_s <= position_q) & (part_s <= part_q)
        seen_BTS &= part_q < self.ends_BT[:, None, :]
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


def causal_attention(
    q_BTKGH: jax.Array,
    kv: KV,
    *,
    starts_BT: jax.Array | None = None,
    seen_BTS: jax.Array | None = None,
    backend: str = "xla",
    rules: AxisRules | None = None,
) -> jax.Array:
    """Causal attention of T queries over the same T positions; softmax in float32. [B, T, K, G, H]

    `seen_BTS`, if given, says instead which keys a query sees, none of them later; only XLA takes it.
    """
    if backend != "xla":
        return _attend_kernel(backend, q_BTKGH, kv, starts_BT, rules or AxisRules())
    T = q_BTKGH.shape[1]
    if seen_BTS is None:
        positions = jnp.arange(T)[None]
        seen_BTS = visible(positions, positions, starts_BT)
    size = query_block(T)
    parts = [
        _attend_to_seen(
            q_BTKGH[:, first : first + size],
            KV(*(a_BSKH[:, : first + size] for a_BSKH in kv)),
            seen_BTS[:, first : first + size, : first + size],
        )
        for first in range(0, T, size)
    ]
    output_BTKGH = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
    # Its gradient needs the scores again, whatever is kept.
    return checkpoint_name(output_BTKGH, ATTENTION_OUTPUT)


def _attend_to_seen(q_BTKGH: jax.Array, kv: KV, seen_BTS: jax.Array) -> jax.Array:
    """Attention of T queries to those of S keys that each sees."""
    q_BKNH, over_queries, restore = grouped_queries(q_BTKGH * q_BTKGH.shape[-1] ** -0.5)
    s_BKNS = jnp.einsum("BKNH,BSKH->BKNS", q_BKNH, kv.k_BSKH, preferred_element_type=jnp.float32)
    s_BKNS = jnp.where(over_queries(seen_BTS)[:, None], s_BKNS, MASKED)
    # The sum divides the output, which is smaller than the weights; the peak has no gradient.
    peak_BKN1 = jax.lax.stop_gradient(s_BKNS.max(axis=-1, keepdims=True))
    p_BKNS = jnp.exp(s_BKNS - peak_BKN1)
    total_BKN1 = p_BKNS.sum(axis=-1, keepdims=True)
    p_BKNS = p_BKNS.astype(kv.v_BSKH.dtype)
    o_BKNH = jnp.einsum("BKNS,BSKH->BKNH", p_BKNS, kv.v_BSKH, preferred_element_type=jnp.float32)
    return restore(o_BKNH / total_BKN1).astype(q_BTKGH.dtype)


def grouped_queries(q_BTKGH: jax.Array) -> tuple[jax.Array, Callable, Callable]:
    """The T positions and G query heads of a KV head as one axis N: two plain matrix products follow.

    If one product contracted over two axes, as for the gradients of keys and values, XLA would transpose
    the attention weights in memory. Positions come first: for MQA, queries and outputs have this layout in
    memory already. Heads come first where they are split over devices.

    Returns q_BKNH, a function that says [B, T, ...] for N, and one that brings [B, K, N, H] back.
    """
    B, T, K, G, H = q_BTKGH.shape
    heads_first = jax.typeof(q_BTKGH).sharding.spec[3] is not None
    order, sizes = ("BKGTH", (G, T)) if heads_first else ("BKTGH", (T, G))

    def over_queries(a_BT: jax.Array) -> jax.Array:
        return jnp.concatenate([a_BT] * G, axis=1) if heads_first else jnp.repeat(a_BT, G, axis=1)

    def restore(o_BKNH: jax.Array) -> jax.Array:
        return jnp.einsum(f"{order}->BTKGH", o_BKNH.reshape(B, K, *sizes, o_BKNH.shape[-1]))

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


_CUDNN_MULTIPLE = 8  # cuDNN takes heads whose width is a multiple of this


def _cudnn(
    q_BTKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, starts_BT: jax.Array | None
) -> jax.Array:
    B, T, K, G, H = q_BTKGH.shape
    positions = jnp.arange(T)[None]
    # Heads are padded with zeros, which change no score.
    widened = lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, -H % _CUDNN_MULTIPLE)])
    o_BTNH = jax.nn.dot_product_attention(
        *map(widened, (q_BTKGH.reshape(B, T, K * G, H), k_BSKH, v_BSKH)),
        scale=H**-0.5,
        mask=None if starts_BT is None else visible(positions, positions, starts_BT)[:, None],
        is_causal=True,
        implementation="cudnn",
    )
    return o_BTNH[..., :H].reshape(B, T, K, G, H)


_KERNELS = {"cudnn": _cudnn, "splash": splash.attend}


# --------------------------------------------------------------------------------- through a cache

EMPTY = 1 << 30  # the position of an entry that holds no token: later than any query


class StepPositions(NamedTuple):
    """Positions of the new tokens of a decode step, and what they see: computed once, for all layers."""

    positions_BT: jax.Array  # of the new tokens; -1 is padding, which sees nothing
    starts_BT: jax.Array  # the first position that each may see
    lengths_B: jax.Array  # tokens of each row, the new ones included
    # What only some caches need. `PrefixSpec`: its tables of the pages of each row. `EvictingSpec`: the class
    # of each token of the vocabulary. `ScratchSpec`: nothing here; its `Cache.extra` has `Notes` of the step.
    extra: Any = None
    tokens_BT: Any = None  # the new tokens, for caches that keep some kinds of them

    def within(self, window: int) -> "StepPositions":
        """The same for layers with a sliding window; 0 is none."""
        starts_BT = window_starts(self.positions_BT, window, self.starts_BT)
        return self._replace(starts_BT=starts_BT)


class Segment(NamedTuple):
    """A part of a KV cache, as attention reads it: in blocks of S entries.

    Entries may hold the tokens of a row in any order. The KV heads of a row may hold different tokens.
    """

    read: Callable[[Any], KV]  # keys and values of block i, [B, S, K, H]
    # Of the entries of block i: [B, S], or [B, K, S] if they differ by KV head; EMPTY where none is.
    positions: Callable[[Any], jax.Array]
    first: Any  # the blocks to read: first to end, the end not included
    end: Any  # known only when the program runs
    arrays: tuple[jax.Array, ...]  # what it is read from, [B, entries, ...]
    tokens: int = 1  # in an entry of those arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class PagedKV:
    """A KV layer on one device, as it is stored: what a kernel reads instead of segments.

    Entries lie in pages of a pool, S in each. Arrays are [pages, K, S, ...] if heads come first, otherwise
    [pages, S, K, ...].
    """

    k: jax.Array  # float32, the bits of bfloat16, or codes of int8 or fp8
    v: jax.Array
    pages_BC: jax.Array  # the pages of each row, in the order of its entries
    positions_BE: jax.Array  # of these entries; EMPTY where no token is
    k_scales: jax.Array | None = None  # of codes, the bits of bfloat16
    v_scales: jax.Array | None = None
    heads_first: bool = dataclasses.field(metadata={"static": True})

    @property
    def page(self) -> int:
        """Entries of a page."""
        return self.k.shape[2 if self.heads_first else 1]

    def blocks(self, positions_BN: jax.Array, starts_BN: jax.Array, block: int) -> jax.Array:
        """The first block of entries that a query of each row sees something of, and the end of such blocks:
        [B, 2]."""
        is_text_BN = positions_BN >= 0
        newest_B1 = positions_BN.max(axis=1, keepdims=True)
        oldest_B1 = jnp.where(is_text_BN, starts_BN, newest_B1 + 1).min(axis=1, keepdims=True)
        seen_BE = (self.positions_BE <= newest_B1) & (self.positions_BE >= oldest_B1)
        entries_E = jnp.arange(seen_BE.shape[1], dtype=jnp.int32)
        end_B = jnp.where(seen_BE, entries_E + 1, 0).max(axis=1)
        first_B = jnp.where(seen_BE, entries_E, end_B[:, None]).min(axis=1)
        return jnp.stack([first_B // block, -(-end_B // block)], axis=1).astype(jnp.int32)


class Partial(NamedTuple):
    """Attention to a part of the keys that queries see. `merge` joins parts in any order.

    All in float32. Exponentials have base e; the log-sum-exp of the scores is peak + log(total). A query
    that has seen no key has a peak of MASKED.
    """

    sum_BKNH: jax.Array  # of values, each times exp(score - peak)
    total_BKN1: jax.Array  # of exp(score - peak)
    peak_BKN1: jax.Array  # no score is higher


def merge(a: Partial, b: Partial) -> Partial:
    """Attention to the keys of both parts. Associative and commutative, up to rounding."""
    _check_float32(a, b)
    peak_BKN1 = jnp.maximum(a.peak_BKN1, b.peak_BKN1)
    scaled = [
        (part.sum_BKNH * shrink, part.total_BKN1 * shrink)
        for part in (a, b)
        for shrink in [jnp.exp(part.peak_BKN1 - peak_BKN1)]
    ]
    (sum_a, total_a), (sum_b, total_b) = scaled
    return Partial(sum_a + sum_b, total_a + total_b, peak_BKN1)


def merge_over_devices(part: Partial, axis: str) -> Partial:
    """The same over the devices along a mesh axis of a surrounding shard_map: each gets the whole."""
    _check_float32(part)
    peak_BKN1 = jax.lax.pmax(part.peak_BKN1, axis)
    shrink_BKN1 = jnp.exp(part.peak_BKN1 - peak_BKN1)
    total_BKN1 = jax.lax.psum(part.total_BKN1 * shrink_BKN1, axis)
    sum_BKNH = jax.lax.psum(part.sum_BKNH * shrink_BKN1, axis)
    return Partial(sum_BKNH, total_BKN1, peak_BKN1)


def normalized(part: Partial) -> jax.Array:
    """The output of attention, [B, K, N, H]; zeros for a query that has seen no key."""
    saw_none = part.peak_BKN1 <= MASKED
    return jnp.where(saw_none, 0, part.sum_BKNH / jnp.where(saw_none, 1, part.total_BKN1))


def _check_float32(*parts: Partial) -> None:
    """A log-sum-exp in bfloat16 would cost up to 0.9 % of the output."""
    for part in parts:
        assert all(a.dtype == jnp.float32 for a in part), [a.dtype for a in part]


def _scores(q_BKNH: jax.Array, kv: KV) -> jax.Array:
    """Scores of queries and keys, [B, K, N, S].

    Queries that are wider than the keys are those of a latent: their beginning meets the values.
    """
    of_latent = q_BKNH.shape[-1] > kv.k_BSKH.shape[-1]
    return scores(q_BKNH, *((kv.v_BSKH, kv.k_BSKH) if of_latent else (kv.k_BSKH,)))


def partial_attention(
    q_BKNH: jax.Array,
    segments: Sequence[Segment],
    *,
    positions_B1N1: jax.Array,
    starts_B1N1: jax.Array,
    width: int | None = None,
    before: Partial | None = None,
) -> Partial:
    """Attention of N queries per KV head to segments of a cache that are read block by block.

    It is added to that of `before`, if given. Values are as wide as the queries, or `width` if that is less.
    A query sees the keys at positions `starts <= s <= positions`. Queries are scaled already. The softmax is
    accumulated online, so neither the scores nor a copy of the cache ever exist whole.
    """
    part = empty_part(q_BKNH, positions_B1N1, width) if before is None else before
    sees = positions_B1N1, starts_B1N1
    for segment in segments:
        # A loop even if there is only one block. Outside a loop, XLA fuses the write to a KV layer into its
        # readers, and then copies the KV layer.
        def body(i: Any, part: Partial, segment: Segment = segment) -> Partial:
            return _with_block(q_BKNH, segment, i, part, *sees)[0]

        part = jax.lax.fori_loop(segment.first, segment.end, body, part)
    return part


def attention_received(
    q_BKNH: jax.Array,
    segment: Segment,
    *,
    blocks: int,
    positions_B1N1: jax.Array,
    starts_B1N1: jax.Array,
) -> tuple[Partial, jax.Array]:
    """Partial attention to one segment, and the attention that each entry received: [B, K, entries].

    The latter is the sum, over all N queries, of the softmax weight of each entry. The segment has `blocks`
    blocks of equal size, which do not overlap. Entries of blocks that are not read received nothing.

    The weights of all entries are kept, each relative to the peak when its block was read. So keys are read
    once, and there is one exponential for each weight. This takes N / H of the size of the keys.
    """

    def body(i: Any, carry: tuple[Partial, jax.Array, jax.Array]) -> tuple:
        part, p_BKCNS, peak_BKCN = carry
        part, p_BKNS = _with_block(q_BKNH, segment, i, part, positions_B1N1, starts_B1N1)
        put = lambda a, of_block: jax.lax.dynamic_update_slice_in_dim(a, of_block[:, :, None], i, 2)
        return part, put(p_BKCNS, p_BKNS), put(peak_BKCN, part.peak_BKN1[..., 0])

    part = empty_part(q_BKNH, positions_B1N1, None)
    B, K, N, _ = q_BKNH.shape
    S = jax.eval_shape(segment.positions, 0).shape[-1]
    # As in an empty part: zeros that depend on the queries.
    none_BKCNS = jnp.broadcast_to(part.sum_BKNH[:, :, None, :, :1], (B, K, blocks, N, S))
    carry = part, none_BKCNS, jnp.full((B, K, blocks, N), MASKED)
    part, p_BKCNS, peak_BKCN = jax.lax.fori_loop(segment.first, segment.end, body, carry)
    log_sum_BKN1 = jnp.where(part.peak_BKN1 <= MASKED, 0, part.peak_BKN1 + jnp.log(part.total_BKN1))
    shrink_BKCN = jnp.exp(peak_BKCN - log_sum_BKN1[:, :, None, :, 0])
    return part, jnp.einsum("BKCNS,BKCN->BKCS", p_BKCNS, shrink_BKCN).reshape(B, K, -1)


def empty_part(q_BKNH: jax.Array, positions_B1N1: jax.Array, width: int | None) -> Partial:
    """The attention of queries that have seen no key."""
    zeros_BKN1 = jnp.zeros((*q_BKNH.shape[:3], 1))
    # Zeros that depend on the queries (no position is less than -1). XLA's CPU compiler would make constant
    # zeros for all layers at the start of a step, and hold them until they are used.
    sum_BKNH = jnp.where(positions_B1N1 < -1, q_BKNH[..., :width], 0).astype(jnp.float32)
    return Partial(sum_BKNH, zeros_BKN1, zeros_BKN1 + MASKED)


def _with_block(
    q_BKNH: jax.Array,
    segment: Segment,
    i: Any,
    part: Partial,
    positions_B1N1: jax.Array,
    starts_B1N1: jax.Array,
) -> tuple[Partial, jax.Array]:
    """The attention with block i of a segment, and the weights of the block relative to the new peak."""
    # A segment of one block does not depend on i: its scores would be taken out of the loop.
    queries_BKNH, peak_BKN1 = jax.lax.optimization_barrier((q_BKNH, part.peak_BKN1))
    kv, keys = segment.read(i), segment.positions(i)
    keys = keys[:, None, None, :] if keys.ndim == 2 else keys[:, :, None, :]
    s_BKNS = _scores(queries_BKNH, kv)
    s_BKNS = jnp.where((keys <= positions_B1N1) & (keys >= starts_B1N1), s_BKNS, MASKED)
    # What a query sums before its first visible key is multiplied by exp(-large) = 0 when that key comes.
    new_peak = jnp.maximum(peak_BKN1, s_BKNS.max(-1, keepdims=True))
    p_BKNS = jnp.exp(s_BKNS - new_peak)
    shrink_BKN1 = jnp.exp(peak_BKN1 - new_peak)
    values_BKNH = jnp.einsum(
        "BKNS,BSKH->BKNH",
        p_BKNS.astype(kv.v_BSKH.dtype),
        kv.v_BSKH,
        preferred_element_type=jnp.float32,
    )
    total_BKN1 = part.total_BKN1 * shrink_BKN1 + p_BKNS.sum(-1, keepdims=True)
    return Partial(part.sum_BKNH * shrink_BKN1 + values_BKNH, total_BKN1, new_peak), p_BKNS


def attend_segments(
    q_BTKGH: jax.Array,
    segments: Sequence[Segment],
    step: StepPositions,
    axis: str | None = None,
    width: int | None = None,
    *,
    scale: float | None = None,
    kernel: Callable[[jax.Array, jax.Array, jax.Array], Partial] | None = None,
) -> jax.Array:
    """Attention of T queries per row over a cache, their own keys among it. [B, T, K, G, H]

    Values are as wide as the queries, or `width` if that is less. Scores are scaled by `scale`, by default
    for the width of the queries. A `kernel`, if given, reads the cache instead of the segments. It is called
    with the queries, their positions, and the first positions that they see.

    With `axis`, a mesh axis of a surrounding shard_map, the devices along it hold parts of one cache.
    """
    scaled_BTKGH = q_BTKGH * (q_BTKGH.shape[-1] ** -0.5 if scale is None else scale)
    q_BKNH, over_queries, restore = grouped_queries(scaled_BTKGH)
    over_heads = lambda a_BT: over_queries(a_BT)[:, None, :, None]  # [B, 1, N, 1]
    if kernel is not None:
        part = kernel(q_BKNH, over_queries(step.positions_BT), over_queries(step.starts_BT))
    else:
        part = partial_attention(
            q_BKNH,
            segments,
            positions_B1N1=over_heads(step.positions_BT),
            starts_B1N1=over_heads(step.starts_BT),
            width=width,
        )
    if axis is not None:
        part = merge_over_devices(part, axis)
    return restore(normalized(part)).astype(q_BTKGH.dtype)


# ----------------------------------------------------------------------------- choice of backend


def cudnn_refusal(config: ModelConfig, platform: str, compute_capability: float) -> str | None:
    """Why cuDNN's attention cannot serve this model on this hardware; None if it can.

    cuDNN takes bfloat16 heads up to 128 wide, and up to 256 from Hopper on. Ours are padded to a multiple
    of 8, the widths that it takes.
    """
    widest = 256 if compute_capability >= 9.0 else 128
    if platform != "gpu":
        return f"cuDNN is not available on {platform}"
    if compute_capability < 8.0:
        return f"it needs compute capability 8.0, but this GPU has {compute_capability}"
    if config.compute_dtype != "bfloat16":
        return f"it needs model.compute_dtype = bfloat16, not {config.compute_dtype}"
    if isinstance(config.kv, LatentKV):
        return "it does not support model.kv.kind = latent"
    if config.d_head > widest:
        return f"it supports model.d_head up to {widest} on this GPU, not {config.d_head}"
    return None


def choose_backend(asked: str, config: ModelConfig, seq_len: int, device: Any) -> str:
    """Resolves `auto` for a device; warns, once, of a backend slower than the best for the hardware.

    Raises ValueError if a kernel was asked for by name and cannot serve the model.
    """
    platform, capability = describe(device)
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
        warn_once(f"SLOW ATTENTION: the XLA backend is used instead of {best}, because {refusal}")
    elif asked == "xla" and best != "xla":
        warn_once(f"SLOW ATTENTION: placement.attention = 'xla', although {best} is available")
    return best if asked == "auto" and not refusal else "xla"
