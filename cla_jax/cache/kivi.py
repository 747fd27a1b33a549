"""KIVI-style 4 and 2 bits (2402.02750, section 3): keys by channel, values by token.

Keys have channels that are large in every token. So each channel of a group of 32 tokens has its own scale
and zero. Values have no such channels, so each token has a scale and a zero for every 32 channels. A group of
keys must be whole before it can be quantised. So the newest tokens, at least 128 and at most 159, stay in
full precision until the oldest 32 of them are due. Scales and zeros are float16: a group whose range they
cannot hold (numbers that are not finite, or beyond 65,504) reads back as NaN.

A step reads what it has written, back from the cache. So a step of one token, as in decoding, finds the
newest 128 in full precision. In a step of many tokens, later tokens of the step count among the newest. So
the first tokens of the step find fewer earlier tokens in full precision. If the step is longer than 128, even
their own keys are quantised. That is worse than the paper's prefill, which attends in full precision; chunks
of up to 32 tokens stay close to single steps.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from cla_jax.cache.bits import carrier, restored, stored
from cla_jax.cache.entries import Entries, put
from cla_jax.cache.per_token import Shape
from cla_jax.config import ModelConfig
from cla_jax.model.attention import EMPTY, KV, Segment

GROUP = 32  # tokens of a key group, channels of a value group
NEWEST = 128  # tokens that are never quantised
# Entries that keep them and up to 31 more. One group beyond that, so that what a step makes due can be read
# after the step is written. If it were read before, XLA would copy the ring.
#   tokens     128    159    160    191    192
#   quantised  none   none   0-31   0-31   0-63
RING = NEWEST + 2 * GROUP
META_BYTES = 4  # a float16 scale and zero


class Packed(NamedTuple):
    """Groups of keys, or of values: arrays, or their shapes. E counts groups of 32 tokens."""

    codes: Any  # keys: [B, E, 32 * bits / 8, K, H]; values: [B, E, 32, K, ceil(H * bits / 8)]
    scale: Any  # keys: [B, E, K, H]; values: [B, E, 32, K, ceil(H / 32)]
    zero: Any  # the same


class Half(NamedTuple):
    """The keys, or the values, of a KV layer."""

    packed: Packed
    newest: Any  # [B, RING, K, H]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kivi:
    bits: int  # 4 or 2
    dtype: str
    name: str
    longest_block: int = 256
    in_full: ClassVar[int] = RING

    @property
    def per_byte(self) -> int:
        return 8 // self.bits

    def shapes(self, config: ModelConfig, batch: int, entries: int, holds: str = "kv") -> KV:
        heads = (batch, RING, config.n_kv_heads, config.d_head)
        newest = Shape("BRKH", heads, carrier(self.dtype))
        packed = self.packed_shapes(config, batch, entries // GROUP)
        return packed.only(holds).each(lambda half: Half(half, newest))

    def packed_shapes(self, config: ModelConfig, batch: int, groups: int) -> KV:
        """The shapes of `Packed` keys and values: so many groups in each of `batch` rows."""
        K, H = config.n_kv_heads, config.d_head
        head_bytes, head_groups = -(-H // self.per_byte), -(-H // GROUP)
        codes, meta = jnp.dtype("uint8"), jnp.dtype("uint16")
        k_meta = Shape("BEKH", (batch, groups, K, H), meta)
        v_meta = Shape("BETKH", (batch, groups, GROUP, K, head_groups), meta)
        k_codes = Shape("BETKH", (batch, groups, GROUP // self.per_byte, K, H), codes)
        v_codes = Shape("BETKH", (batch, groups, GROUP, K, head_bytes), codes)
        return KV(Packed(k_codes, k_meta, k_meta), Packed(v_codes, v_meta, v_meta))

    # ------------------------------------------------------------------------ writing and reading

    def write(self, layer: KV, kv: KV, positions_BT: jax.Array, entries: Entries) -> KV:
        B, T = positions_BT.shape
        if T <= GROUP:  # at most one group becomes due
            return self._write(layer, kv, positions_BT, entries)
        padding = -T % GROUP

        def steps(a: jax.Array, fill: int) -> jax.Array:
            widths = [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2)
            a = jnp.pad(a, widths, constant_values=fill)
            return jnp.moveaxis(a.reshape(B, -1, GROUP, *a.shape[2:]), 1, 0)

        def step(layer: KV, inputs: tuple[KV, jax.Array]) -> tuple[KV, None]:
            return self._write(layer, *inputs, entries), None

        xs = (kv.each(lambda a: steps(a, 0)), steps(positions_BT, -1))
        return jax.lax.scan(step, layer, xs)[0]

    def _write(self, layer: KV, kv: KV, positions_BT: jax.Array, entries: Entries) -> KV:
        """Writes up to 32 tokens per row; first quantises the group that they make due, if they do."""
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        place_BT = jnp.where(positions_BT >= 0, positions_BT % RING, RING)
        newest = layer.each(
            lambda half, new: put(half.newest, place_BT, stored(new, self.dtype)), kv
        )
        if entries.capacity == 0:  # too short for anything to be quantised
            return layer.each(lambda half, ring: half._replace(newest=ring), newest)
        count_B = jnp.sum(positions_BT >= 0, axis=1)
        length_B = jnp.max(positions_BT, axis=1) + 1  # 0 for a row without new tokens
        oldest_B = quantized_tokens(length_B - count_B)
        due_B = quantized_tokens(length_B) > oldest_B
        ring_BT = (oldest_B[:, None] + jnp.arange(GROUP)) % RING
        group_B1 = entries.of(jnp.where(due_B, oldest_B, -1))[:, None] // GROUP

        def quantize(newest: KV) -> KV:
            return self.packed(newest.each(lambda a: restored(a[rows_B1, ring_BT], self.dtype)))

        def nothing(newest: KV) -> KV:
            return jax.tree.map(jnp.zeros_like, jax.eval_shape(quantize, newest))

        # Once in 32 tokens; and in a program of its own, or XLA would write a second ring for it to read.
        packed = jax.lax.cond(jnp.any(due_B), quantize, nothing, newest)

        def with_group(half: Half, new: Packed, newest: jax.Array) -> Half:
            groups = (put(a, group_B1, b) for a, b in zip(half.packed, new, strict=True))
            return Half(Packed(*groups), newest)

        return layer.each(with_group, packed, newest)

    def segments(
        self, layer: KV, lengths_B: jax.Array, first: jax.Array, entries: Entries
    ) -> Sequence[Segment]:
        quantized_B = quantized_tokens(lengths_B)

        def read(i: jax.Array) -> KV:
            start, size = entries.start(i) // GROUP, entries.block // GROUP
            cut = lambda held: jax.lax.dynamic_slice_in_dim(held, start, size, 1)
            packed = jax.tree.map(cut, layer.each(lambda half: half.packed))
            return self.unpacked(packed, layer.v_BSKH.newest.shape[-1])

        def positions(i: jax.Array) -> jax.Array:
            return entries.block_positions(i, quantized_B)

        def read_newest(_: jax.Array) -> KV:
            return layer.each(lambda half: restored(half.newest, self.dtype))

        def positions_newest(_: jax.Array) -> jax.Array:
            ring = Entries(RING, ring=True, block=RING)
            positions = ring.positions(jnp.arange(RING), lengths_B)
            # Every device has the newest tokens; of a KV layer in parts, only shard 0 reports them.
            return jnp.where(
                (positions >= quantized_B[:, None]) & (entries.shard == 0), positions, EMPTY
            )

        any_token = jnp.minimum(jnp.max(lengths_B), 1)
        arrays = jax.tree.leaves(layer.each(lambda half: half.newest))
        newest = Segment(read_newest, positions_newest, 0, any_token, tuple(arrays))
        if entries.capacity == 0:
            return [newest]
        begin, end = entries.blocks(first, jnp.max(quantized_B) - 1)
        arrays = jax.tree.leaves(layer.each(lambda half: half.packed))
        quantized = Segment(read, positions, begin, end, tuple(arrays), tokens=GROUP)
        return [quantized, newest]

    # ---------------------------------------------------------------------------- codes of a group

    def packed(self, kv: KV) -> KV:
        """`Packed` keys and values of whole groups of tokens, [B, 32 * E, K, H]."""

        def by_group(
            pack: Callable[[jax.Array], Packed], x_BTKH: jax.Array | None
        ) -> Packed | None:
            if x_BTKH is None:
                return None
            B = x_BTKH.shape[0]
            packed = pack(x_BTKH.reshape(-1, GROUP, *x_BTKH.shape[2:]))
            return jax.tree.map(lambda a: a.reshape(B, -1, *a.shape[1:]), packed)

        return KV(by_group(self._pack_keys, kv.k_BSKH), by_group(self._pack_values, kv.v_BSKH))

    def unpacked(self, packed: KV, width: int) -> KV:
        """The inverse, up to the error of the format. Values are `width` wide."""
        k = self._unpack_keys(packed.k_BSKH)
        v = self._unpack_values(packed.v_BSKH, width)
        return KV(*(a.reshape(a.shape[0], -1, *a.shape[3:]) for a in (k, v)))

    def _pack_keys(self, k_BTKH: jax.Array) -> Packed:
        codes, scale, zero = self._codes(k_BTKH, axis=1)
        B, T, K, H = codes.shape
        codes = codes.reshape(B, T // self.per_byte, self.per_byte, K, H)
        return Packed(self._packed(codes, axis=2), scale[:, 0], zero[:, 0])

    def _unpack_keys(self, packed: Packed) -> jax.Array:
        """[B, E, 32, K, H]"""
        B, E, T, K, H = packed.codes.shape
        values = self._unpacked(packed.codes, axis=3).reshape(B, E, T * self.per_byte, K, H)
        return self._restored(values, packed.scale[:, :, None], packed.zero[:, :, None])

    def _pack_values(self, v_BTKH: jax.Array) -> Packed:
        B, T, K, H = v_BTKH.shape
        # The last channel group is filled up with its own last channel, which changes no range.
        v_BTKH = jnp.pad(v_BTKH, [(0, 0)] * 3 + [(0, -H % GROUP)], mode="edge")
        codes, scale, zero = self._codes(v_BTKH.reshape(B, T, K, -1, GROUP), axis=-1)
        codes = codes.reshape(B, T, K, -1)[..., : H + -H % self.per_byte]
        codes = codes.reshape(B, T, K, -1, self.per_byte)
        return Packed(self._packed(codes, axis=4), scale[..., 0], zero[..., 0])

    def _unpack_values(self, packed: Packed, H: int) -> jax.Array:
        """[B, E, 32, K, H]"""
        values = self._unpacked(packed.codes, axis=5)
        values = values.reshape(*packed.codes.shape[:4], -1)[..., :H]
        spread = lambda meta: jnp.repeat(meta, GROUP, axis=-1)[..., :H]
        return self._restored(values, spread(packed.scale), spread(packed.zero))

    def _codes(self, x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Codes of x, and the bits of its scales and zeros along an axis."""
        x = x.astype(jnp.float32)
        low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
        # Through their bits: XLA may leave out a rounding that is undone at once.
        scale, zero = (stored(a, "float16") for a in ((high - low) / (2**self.bits - 1), low))
        step, start = (restored(a, "float16").astype(jnp.float32) for a in (scale, zero))
        # The numbers themselves too: XLA's CPU compiler takes the maximum of NaN and 1 for 1.
        finite = jnp.all(jnp.isfinite(x), axis, keepdims=True)
        finite &= jnp.isfinite(step) & jnp.isfinite(start)
        codes = jnp.where(finite, jnp.round((x - start) / jnp.where(step > 0, step, 1)), 0)
        codes = jnp.clip(codes, 0, 2**self.bits - 1).astype(jnp.uint8)
        nan = stored(jnp.full_like(step, jnp.nan), "float16")
        return codes, jnp.where(finite, scale, nan), jnp.where(finite, zero, 0)

    def _restored(self, codes: jax.Array, scale: jax.Array, zero: jax.Array) -> jax.Array:
        scale, zero = (restored(a, "float16").astype(jnp.float32) for a in (scale, zero))
        return (codes.astype(jnp.float32) * scale + zero).astype(self.dtype)

    def _packed(self, codes: jax.Array, axis: int) -> jax.Array:
        """Sums codes along an axis of `per_byte`, each shifted to its place in the byte."""
        return jnp.sum(codes << self._shifts(codes.ndim - axis - 1), axis=axis, dtype=jnp.uint8)

    def _unpacked(self, codes: jax.Array, axis: int) -> jax.Array:
        """The inverse: a new axis of `per_byte`."""
        codes = jnp.expand_dims(codes, axis)
        return (codes >> self._shifts(codes.ndim - axis - 1)) & jnp.uint8(2**self.bits - 1)

    def _shifts(self, trailing: int) -> jax.Array:
        shifts = self.bits * jnp.arange(self.per_byte, dtype=jnp.uint8)
        return shifts.reshape(-1, *[1] * trailing)

    # -------------------------------------------------------------------------------------- bytes

    def entries(self, tokens: int) -> int:
        return max(tokens - NEWEST, 0)

    def kv_layer_bytes(self, config: ModelConfig, entries: int, holds: str = "kv") -> float:
        packed, full = self.packed_bytes(config, holds), self.full_bytes(config, holds)
        return entries * packed + RING * full

    def held_bytes(self, config: ModelConfig, first: int, tokens: int, holds: str = "kv") -> float:
        quantized = max(tokens - NEWEST, 0) // GROUP * GROUP
        packed = max(quantized - first, 0) * self.packed_bytes(config, holds)
        return packed + (tokens - max(quantized, first)) * self.full_bytes(config, holds)

    def written_bytes(self, config: ModelConfig, entries: int, holds: str = "kv") -> float:
        """Twice: in full, and again when its group is due."""
        packed = self.packed_bytes(config, holds) if entries else 0
        return self.full_bytes(config, holds) + packed

    def packed_bytes(self, config: ModelConfig, holds: str) -> float:
        """Of a quantised token, its share of its group's scales and zeros included."""
        H = config.d_head
        of = {
            "k": H * self.bits / 8 + H * META_BYTES / GROUP,
            "v": -(-H // self.per_byte) + -(-H // GROUP) * META_BYTES,
        }
        return config.n_kv_heads * sum(of[half] for half in holds)

    def full_bytes(self, config: ModelConfig, holds: str) -> int:
        return len(holds) * config.n_kv_heads * config.d_head * jnp.dtype(self.dtype).itemsize


def quantized_tokens(length: jax.Array) -> jax.Array:
    """How many tokens of a row are quantised: the oldest ones, in whole groups."""
    return jnp.maximum(length - NEWEST, 0) // GROUP * GROUP
