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
from jax import lax

from cla_jax.config import ModelConfig
from cla_jax.model.attention import MASKED, Kept, Partial, merge

ROWS = 64  # of a tile of wgmma: the queries of a KV head are padded to it
_CORES = 132  # of an H100; with fewer thread blocks than this, some are idle
_LEAST = 128  # entries that are worth a thread block


def kept_width(d_head: int) -> int:
    """How wide a cache keeps heads for this kernel: it copies and multiplies tiles of 32 columns."""
    unit = 32 if d_head <= 256 else 64
    return -(-d_head // unit) * unit


def refusal(
    config: ModelConfig, format: str, platform: str, compute_capability: float
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
    # Compiling wider int8 heads did not finish in two minutes.
    widest = 256 if format == "int8" else 512
    if config.d_head > widest:
        return (
            f"it supports model.d_head up to {widest} in cache format {format}, not {config.d_head}"
        )
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
    kept: Kept,
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


def _blocks_to_read(
    kept_BE: jax.Array, positions_BN: jax.Array, starts_BN: jax.Array, block: int
) -> jax.Array:
    """The first block that a query of each row sees something of, and the end of such blocks: [B, 2]."""
    is_text_BN = positions_BN >= 0
    newest_B1 = positions_BN.max(axis=1, keepdims=True)
    oldest_B1 = jnp.where(is_text_BN, starts_BN, newest_B1 + 1).min(axis=1, keepdims=True)
    seen_BE = (kept_BE <= newest_B1) & (kept_BE >= oldest_B1)
    entries_E = jnp.arange(kept_BE.shape[1], dtype=jnp.int32)
    end_B = jnp.where(seen_BE, entries_E + 1, 0).max(axis=1)
    first_B = jnp.where(seen_BE, entries_E, end_B[:, None]).min(axis=1)
    return jnp.stack([first_B // block, -(-end_B // block)], axis=1).astype(jnp.int32)


def _splits(rows: int, entries: int) -> int:
    """Thread blocks for each row and KV head: enough for the whole GPU, a power of two."""
    wanted = max(1, min(-(-_CORES // rows), entries // _LEAST))
    return 1 << (wanted.bit_length() - 1)


def _parts(
    q_BKRH: jax.Array, kept: Kept, positions_BR: jax.Array, starts_BR: jax.Array, interpret: Any
) -> Partial:
    """Attention to the entries of each thread block, [B, K, splits, ROWS, ...]."""
    import jax.experimental.pallas as pl
    import jax.experimental.pallas.mosaic_gpu as gpu

    B, K, _, H = q_BKRH.shape
    E = kept.k_BEKH.shape[1]
    cut = Tiling.of(H)
    eight_bit = kept.k_scales_BKE is not None
    splits = _splits(B * K, E)
    mine = H // cut.groups  # columns of the values of a warpgroup
    assert E % cut.block == 0, (E, cut.block)

    def swizzled(shape: tuple[int, ...]) -> Any:
        transforms = (gpu.TilingTransform((8, cut.tile)), gpu.SwizzleTransform(2 * cut.tile))
        return gpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    def held() -> Any:
        shape = (cut.stages, cut.block, H)
        return gpu.SMEM(shape, jnp.int8) if eight_bit else swizzled(shape)

    def kernel(*refs: Any) -> None:
        scratch: dict[str, Any] = {
            "q": swizzled((ROWS, H)),
            "positions": gpu.SMEM((ROWS,), jnp.int32),
            "starts": gpu.SMEM((ROWS,), jnp.int32),
            "k": held(),
            "v": held(),
            "keys": gpu.SMEM((cut.stages, cut.block), jnp.int32),
            "weights": swizzled((cut.groups, 2, ROWS, cut.block)),
            "asked": gpu.Barrier(num_arrivals=3),
            "arrived": gpu.Barrier(num_arrivals=5 if eight_bit else 3, num_barriers=cut.stages),
            "done": gpu.Barrier(num_arrivals=cut.groups),
        }
        if eight_bit:
            scratch |= {
                "k_scales": gpu.SMEM((cut.stages, cut.block), jnp.bfloat16),
                "v_scales": gpu.SMEM((cut.stages, cut.block), jnp.bfloat16),
                "k_wide": swizzled((cut.block, H)),
                "v_wide": swizzled((cut.block, H)),
                "widened": gpu.Barrier(num_arrivals=cut.groups),
            }
        pl.run_scoped(lambda **scratch: body(refs, scratch), collective_axes="group", **scratch)

    def body(refs: tuple[Any, ...], here: dict[str, Any]) -> None:
        q_ref, positions_ref, starts_ref, blocks_ref, keys_ref, k_ref, v_ref, *scales, o, t, p = (
            refs
        )
        b, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        group = lax.axis_index("group")
        own = pl.ds(group * mine, mine)
        first, end = blocks_ref[b, 0], blocks_ref[b, 1]
        share = lax.div(end - first + (splits - 1), jnp.int32(splits))
        first = first + split * share
        count = jnp.maximum(jnp.minimum(share, end - first), 0)

        def load(i: jax.Array) -> None:
            stage = lax.rem(i, jnp.int32(cut.stages))
            entries = pl.ds((first + i) * cut.block, cut.block)
            sources = [k_ref.at[b, entries, head], v_ref.at[b, entries, head]]
            sources += [keys_ref.at[b, entries]] + [a.at[b, head, entries] for a in scales]
            names = ["k", "v", "keys", *(["k_scales", "v_scales"] if eight_bit else [])]
            for source, name in zip(sources, names, strict=True):
                gpu.copy_gmem_to_smem(source, here[name].at[stage], here["arrived"].at[stage])

        @pl.when(group == 0)
        def _ask() -> None:
            gpu.copy_gmem_to_smem(q_ref.at[b, head], here["q"], here["asked"])
            gpu.copy_gmem_to_smem(positions_ref.at[b], here["positions"], here["asked"])
            gpu.copy_gmem_to_smem(starts_ref.at[b], here["starts"], here["asked"])
            for i in range(cut.stages):
                pl.when(i < count)(lambda i=i: load(jnp.int32(i)))

        gpu.barrier_wait(here["asked"])
        over_columns = lambda a: lax.broadcast_in_dim(a, (ROWS, cut.block), [0])
        over_rows = lambda a: lax.broadcast_in_dim(a, (ROWS, cut.block), [1])
        positions, starts = here["positions"][...], here["starts"][...]

        def step(i: jax.Array, carry: Any) -> Any:
            sums, total, peak = carry
            stage = lax.rem(i, jnp.int32(cut.stages))
            gpu.barrier_wait(here["arrived"].at[stage])
            k, v = here["k"].at[stage], here["v"].at[stage]
            # Codes are exact in bfloat16. Scales belong to entries, so to columns of scores.
            if eight_bit:
                here["k_wide"].at[:, own][...] = k[:, own].astype(jnp.bfloat16)
                here["v_wide"].at[:, own][...] = v[:, own].astype(jnp.bfloat16)
                gpu.commit_smem()
                gpu.barrier_arrive(here["widened"])
                gpu.barrier_wait(here["widened"])
                k, v = here["k_wide"], here["v_wide"]
            scores = product(here["q"], k, transposed=True)
            if eight_bit:
                scores = scores * over_rows(here["k_scales"][stage].astype(jnp.float32))
            keys = over_rows(here["keys"][stage])
            seen = (keys <= over_columns(positions)) & (keys >= over_columns(starts))
            scores = lax.select(seen, scores, lax.full_like(scores, MASKED))
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            weights = jnp.exp(scores - over_columns(new_peak))
            shrink = jnp.exp(peak - new_peak)
            total = total * shrink + weights.sum(axis=1)
            if eight_bit:
                weights = weights * over_rows(here["v_scales"][stage].astype(jnp.float32))
                weights = lax.select(seen, weights, lax.full_like(weights, 0))
            # One bfloat16 number would cost up to 0.2 % of a weight; two are as good as float32 here.
            high = weights.astype(jnp.bfloat16)
            low = (weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
            here["weights"].at[group, 0][...] = high
            here["weights"].at[group, 1][...] = low
            gpu.commit_smem()
            factor = lax.broadcast_in_dim(shrink, (ROWS, cut.columns), [0])
            new_sums = []
            for j, so_far in enumerate(sums):
                v_part = v.at[:, pl.ds(group * mine + j * cut.columns, cut.columns)]
                pair = [here["weights"].at[group, n] for n in (0, 1)]
                new_sums.append(so_far * factor + product(pair, v_part))
            # All warpgroups have read the block, so the next one may take its place.
            gpu.barrier_arrive(here["done"])
            gpu.barrier_wait(here["done"])
            pl.when((group == 0) & (i + cut.stages < count))(lambda: load(i + cut.stages))
            return tuple(new_sums), total, new_peak

        def product(left: Any, right: Any, transposed: bool = False) -> jax.Array:
            lefts: list[Any] = left if isinstance(left, list) else [left]
            columns = right.shape[0] if transposed else right.shape[1]
            if interpret and transposed:  # jax's interpreter does not know of transposed operands
                both_last = (((1,), (1,)), ((), ()))
                return lax.dot_general(
                    lefts[0][...], right[...], both_last, preferred_element_type=jnp.float32
                )

            def run(accumulator: Any) -> jax.Array:
                for a in lefts:
                    b = gpu.transpose_ref(right, (1, 0)) if transposed else right
                    gpu.wgmma(accumulator, a, b)
                return accumulator[...]

            return pl.run_scoped(run, gpu.ACC((ROWS, columns), jnp.float32))

        zeros = tuple(
            jnp.zeros((ROWS, cut.columns), jnp.float32) for _ in range(mine // cut.columns)
        )
        nothing = zeros, jnp.zeros(ROWS, jnp.float32), jnp.full(ROWS, MASKED, jnp.float32)
        sums, total, peak = lax.fori_loop(0, count, step, nothing)
        for j, found in enumerate(sums):
            columns = pl.ds(group * mine + j * cut.columns, cut.columns)
            o.at[b, head, split, :, columns][...] = found

        @pl.when(group == 0)
        def _put() -> None:
            t.at[b, head, split][...] = total
            p.at[b, head, split][...] = peak

    sizes = (B, K, splits, ROWS)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*sizes, H), sizes, sizes)]
    call = gpu.kernel(
        kernel,
        out_type=tuple(shapes),
        grid=(splits, K, B),
        grid_names=("split", "head", "row"),
        num_threads=cut.groups,
        thread_name="group",
        compiler_params=gpu.CompilerParams(
            approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )
    blocks_B2 = _blocks_to_read(kept.positions_BE, positions_BR, starts_BR, cut.block)
    arrays = [q_BKRH, positions_BR, starts_BR, blocks_B2, kept.positions_BE, *kept[:2]]
    if eight_bit:
        arrays += [kept.k_scales_BKE, kept.v_scales_BKE]
    sum_, total, peak = call(*arrays)
    return Partial(sum_, total[..., None], peak[..., None])
