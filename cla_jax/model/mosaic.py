"""Attention through a cache on NVIDIA Hopper: a Pallas kernel, compiled by Mosaic GPU.

It is for decoding: few queries read the keys and values of one KV head. Blocks of entries arrive through
TMA, and wgmma multiplies them. Blocks of int8 are widened inside the kernel. The entries that a row may see
are divided over several thread blocks. Each returns a `Partial`, and `merge` joins them.

The kernel was compiled for H100 and run in jax's interpreter. It was never run on a GPU.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax.config import ModelConfig
from cla_jax.model.attention import PagedKV, Partial, merge

ROWS = 64  # of a tile of wgmma: the queries of a KV head are padded to it
_CORES = 132  # of an H100; with fewer thread blocks than this, some are idle
_LEAST = 128  # entries that are worth a thread block


def kept_width(d_head: int) -> int:
    """How wide a cache keeps heads for this kernel: it copies and multiplies tiles of 32 columns."""
    unit = 32 if d_head <= 256 else 64
    return -(-d_head // unit) * unit


def refusal(
    config: ModelConfig, format: str, platform: str, compute_capability: float, page: int | None
) -> str | None:
    """Why the kernel cannot serve this model and cache on this hardware; None if it can."""
    if platform != "gpu":
        return f"Mosaic GPU is not available on {platform}"
    if int(compute_capability) != 9:
        return (
            f"it needs a Hopper GPU (compute capability 9.0), but this GPU has {compute_capability}"
        )
    if format not in ("dense", "bfloat16", "int8"):
        return f"it supports bfloat16 and int8, not cache format {format}"
    if config.q_groups > ROWS:
        return f"it supports up to {ROWS} query heads per KV head, not {config.q_groups}"
    # Compiling wider int8 heads did not finish in two minutes.
    widest = 256 if format == "int8" else 512
    if config.d_head > widest:
        return (
            f"it supports model.d_head up to {widest} in cache format {format}, not {config.d_head}"
        )
    block = Tiling.of(kept_width(config.d_head)).block
    if page is not None and page % block:
        return f"it needs pages of a multiple of {block} tokens, not {page}"
    return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tiling:
    """How the work of one thread block is cut."""

    width: int  # of a head
    block: int  # entries that are read at once
    groups: int  # warpgroups; each has some columns of the values, for which its registers suffice
    columns: int  # of the values, that one product makes
    tile: int  # columns of a swizzled tile of shared memory
    stages: int  # blocks in shared memory

    @classmethod
    def of(cls, width: int) -> "Tiling":
        groups = 2 if width >= 256 else 1
        block = 32 if width > 256 else 64
        columns = 64 if width // groups % 64 == 0 else 32
        # Both operands of a product are swizzled alike, the weights [rows, block] included.
        tile = 64 if width % 64 == 0 and block == 64 else 32
        stages = 2 if width > 128 else 3
        return cls(
            width=width, block=block, groups=groups, columns=columns, tile=tile, stages=stages
        )

    def shared_bytes(self, eight_bit: bool) -> int:
        """Shared memory of a thread block, without barriers."""
        wide = 2 * self.block * self.width * 2  # keys and values of a block in bfloat16
        held = self.stages * (wide // 2 + 4 * self.block if eight_bit else wide)
        queries = ROWS * (2 * self.width + 8)
        weights = self.groups * 2 * ROWS * self.block * 2
        return queries + held + eight_bit * wide + weights + self.stages * 4 * self.block


def attend(
    q_BKNH: jax.Array,
    kept: PagedKV,
    positions_BN: jax.Array,
    starts_BN: jax.Array,
    *,
    interpret: Any = False,
) -> Partial:
    """Attention of up to 64 scaled queries of each KV head to the entries that each sees.

    Heads are as wide as `kept_width` says. `interpret` takes the parameters of jax's interpreter for
    kernels of this kind.
    """
    N, H = q_BKNH.shape[2:]
    assert N <= ROWS, N
    assert kept_width(H) == H, H
    missing = (0, ROWS - N)  # queries that see nothing
    positions_BN = jnp.pad(positions_BN, ((0, 0), missing), constant_values=-1)
    starts_BN = jnp.pad(starts_BN, ((0, 0), missing))
    q_BKNH = jnp.pad(q_BKNH.astype(jnp.bfloat16), ((0, 0), (0, 0), missing, (0, 0)))
    part = _parts(q_BKNH, kept, positions_BN, starts_BN, interpret)
    while (splits := part.sum_BKNH.shape[2]) > 1:
        first, second = (
            Partial(*(a[:, :, half] for a in part))
            for half in (slice(splits // 2), slice(splits // 2, None))
        )
        part = merge(first, second)
    return Partial(*(a[:, :, 0, :N] for a in part))


def _splits(heads: int, entries: int) -> int:
    """Thread blocks for each of so many KV heads, of all rows: enough for the whole GPU, a power of two."""
    wanted = max(1, min(-(-_CORES // heads), entries // _LEAST))
    return 1 << (wanted.bit_length() - 1)


def _parts(
    q_BKRH: jax.Array, kept: PagedKV, positions_BR: jax.Array, starts_BR: jax.Array, interpret: Any
) -> Partial:
    """Attention to the entries of each thread block, [B, K, splits, ROWS, ...]."""
    from cla_jax.model.mosaic_kernel import attention

    B, K, _, H = q_BKRH.shape
    tiling = Tiling.of(H)
    assert kept.page % tiling.block == 0, (kept.page, tiling.block)
    blocks_B2 = kept.blocks(positions_BR, starts_BR, tiling.block)
    sum_, total, peak = attention(
        q_BKRH,
        positions_BR,
        starts_BR,
        blocks_B2,
        kept,
        tiling=tiling,
        splits=_splits(B * K, kept.positions_BE.shape[1]),
        interpret=interpret,
    )
    return Partial(sum_, total[..., None], peak[..., None])
