"""The program of the kernel in `mosaic.py`: what a warpgroup does. Importing it loads Mosaic GPU."""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as gpu
import jax.numpy as jnp
from jax import lax

from cla_jax.model.attention import MASKED, PagedKV
from cla_jax.model.mosaic import ROWS, Tiling

# Sums of values (a part for each product), total weight and maximum, so far.
Carry = tuple[tuple[jax.Array, ...], jax.Array, jax.Array]


def attention(
    q_BKRH: jax.Array,
    positions_BR: jax.Array,
    starts_BR: jax.Array,
    blocks_B2: jax.Array,
    kept: PagedKV,
    *,
    tiling: Tiling,
    splits: int,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The outputs [B, K, splits, ROWS, H], totals and maxima [B, K, splits, ROWS] of all thread blocks.

    There are ROWS queries of each KV head. `blocks_B2` are the blocks of entries to read.
    """
    arrays = [q_BKRH, positions_BR, starts_BR, blocks_B2, kept.pages_BC, kept.positions_BE]
    eight_bit = kept.k_scales is not None
    if eight_bit:
        # TMA copies the scales of a head as they lie.
        by_head = lambda a: _bfloat16(a if kept.heads_first else a.swapaxes(1, 2))
        arrays += [kept.k, kept.v, by_head(kept.k_scales), by_head(kept.v_scales)]
    else:
        arrays += [_bfloat16(kept.k), _bfloat16(kept.v)]
    B, K = q_BKRH.shape[:2]
    sizes = (B, K, splits, ROWS)
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((*sizes, tiling.width), sizes, sizes)]

    def kernel(*refs: Any) -> None:
        def run(**memory: Any) -> None:
            pages = kept.page, kept.heads_first
            Warpgroup(tiling, splits, *pages, eight_bit, interpret, refs, memory).run()

        pl.run_scoped(run, collective_axes="group", **_memory(tiling, eight_bit))

    call = gpu.kernel(
        kernel,
        out_type=tuple(shapes),
        grid=(splits, K, B),
        grid_names=("split", "head", "row"),
        num_threads=tiling.groups,
        thread_name="group",
        compiler_params=gpu.CompilerParams(
            approx_math=True, lowering_semantics=gpu.LoweringSemantics.Warpgroup
        ),
        interpret=interpret,
    )
    return call(*arrays)


def _bfloat16(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def _memory(tiling: Tiling, eight_bit: bool) -> dict[str, Any]:
    """The shared memory and the barriers of a thread block."""
    block, stages, H = tiling.block, tiling.stages, tiling.width

    def swizzled(*shape: int) -> Any:
        transforms = (gpu.TilingTransform((8, tiling.tile)), gpu.SwizzleTransform(2 * tiling.tile))
        return gpu.SMEM(shape, jnp.bfloat16, transforms=transforms)

    def staged() -> Any:
        return gpu.SMEM((stages, block, H), jnp.int8) if eight_bit else swizzled(stages, block, H)

    memory: dict[str, Any] = {
        "q": swizzled(ROWS, H),
        "positions": gpu.SMEM((ROWS,), jnp.int32),
        "starts": gpu.SMEM((ROWS,), jnp.int32),
        "k": staged(),
        "v": staged(),
        "keys": gpu.SMEM((stages, block), jnp.int32),
        "weights": swizzled(tiling.groups, 2, ROWS, block),
        "asked": gpu.Barrier(num_arrivals=3),
        "arrived": gpu.Barrier(num_arrivals=5 if eight_bit else 3, num_barriers=stages),
        "done": gpu.Barrier(num_arrivals=tiling.groups),
    }
    if eight_bit:
        memory |= {
            "k_scales": gpu.SMEM((stages, block), jnp.bfloat16),
            "v_scales": gpu.SMEM((stages, block), jnp.bfloat16),
            "k_wide": swizzled(block, H),
            "v_wide": swizzled(block, H),
            "widened": gpu.Barrier(num_arrivals=tiling.groups),
        }
    return memory


class Warpgroup:
    """One warpgroup of a thread block: it computes all scores, and its own columns of the output."""

    def __init__(
        self,
        tiling: Tiling,
        splits: int,
        page: int,
        heads_first: bool,
        eight_bit: bool,
        interpret: Any,
        refs: tuple[Any, ...],
        memory: dict[str, Any],
    ):
        *inputs, self.sum_ref, self.total_ref, self.peak_ref = refs
        q_ref, positions_ref, starts_ref, blocks_ref, self.pages_ref, *inputs = inputs
        keys_ref, k_ref, v_ref, *scales = inputs
        self.tiling, self.memory = tiling, memory
        self.eight_bit, self.interpret = eight_bit, interpret
        b, head, split = (lax.axis_index(name) for name in ("row", "head", "split"))
        self.group = lax.axis_index("group")
        self.width = tiling.width // tiling.groups  # columns of the values that are its own
        self.columns = pl.ds(self.group * self.width, self.width)
        first, end = blocks_ref[b, 0], blocks_ref[b, 1]
        share = lax.div(end - first + (splits - 1), jnp.int32(splits))
        self.row = b
        self.blocks_of_page = page // tiling.block
        self.first = first + split * share  # of the blocks that this thread block reads
        self.count = jnp.maximum(jnp.minimum(share, end - self.first), 0)
        self.output = b, head, split
        self.queries = {
            "q": q_ref.at[b, head],
            "positions": positions_ref.at[b],
            "starts": starts_ref.at[b],
        }
        self.keys = lambda entries: keys_ref.at[b, entries]

        def of_head(ref: Any, first: bool) -> Callable[[Any, Any], Any]:
            """What a block reads of a page of a pool."""
            if first:
                return lambda page, entries: ref.at[page, head, entries]
            return lambda page, entries: ref.at[page, entries, head]

        self.pools = {"k": of_head(k_ref, heads_first), "v": of_head(v_ref, heads_first)}
        for name, ref in zip(("k_scales", "v_scales"), scales, strict=False):
            self.pools[name] = of_head(ref, True)

    def run(self) -> None:
        pl.when(self.group == 0)(self.request)
        gpu.barrier_wait(self.memory["asked"])
        self.positions, self.starts = self.memory["positions"][...], self.memory["starts"][...]
        zeros = tuple(
            jnp.zeros((ROWS, self.tiling.columns), jnp.float32)
            for _ in range(self.width // self.tiling.columns)
        )
        nothing = zeros, jnp.zeros(ROWS, jnp.float32), jnp.full(ROWS, MASKED, jnp.float32)
        sums, total, peak = lax.fori_loop(0, self.count, self.step, nothing)
        for j, sum_ in enumerate(sums):
            self.sum_ref.at[*self.output, :, self.part(j)][...] = sum_

        @pl.when(self.group == 0)
        def _put() -> None:
            self.total_ref.at[self.output][...] = total
            self.peak_ref.at[self.output][...] = peak

    def request(self) -> None:
        """Asks for the queries and the first blocks."""
        for name, source in self.queries.items():
            gpu.copy_gmem_to_smem(source, self.memory[name], self.memory["asked"])
        for i in range(self.tiling.stages):
            pl.when(i < self.count)(lambda i=i: self.load(jnp.int32(i)))

    def load(self, i: jax.Array) -> None:
        """Asks for block i."""
        stage = lax.rem(i, jnp.int32(self.tiling.stages))
        block, size = self.first + i, self.tiling.block
        page = self.pages_ref[self.row, lax.div(block, jnp.int32(self.blocks_of_page))]
        of_page = pl.ds(lax.rem(block, jnp.int32(self.blocks_of_page)) * size, size)
        sources = {name: of_head(page, of_page) for name, of_head in self.pools.items()}
        sources["keys"] = self.keys(pl.ds(block * size, size))
        for name, source in sources.items():
            arrived = self.memory["arrived"].at[stage]
            gpu.copy_gmem_to_smem(source, self.memory[name].at[stage], arrived)

    def step(self, i: jax.Array, carry: Carry) -> Carry:
        """Attention to block i."""
        sums, total, peak = carry
        stage = lax.rem(i, jnp.int32(self.tiling.stages))
        gpu.barrier_wait(self.memory["arrived"].at[stage])
        k, v = self.block(stage)
        scores, seen = self.scores(k, stage)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weights = jnp.exp(scores - self.over_columns(new_peak))
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(axis=1)
        self.put(weights, seen, stage)
        new_sums = self.weighted(v, sums, shrink)
        # All warpgroups have read the block, so the next one may take its place.
        gpu.barrier_arrive(self.memory["done"])
        gpu.barrier_wait(self.memory["done"])
        stages = self.tiling.stages
        pl.when((self.group == 0) & (i + stages < self.count))(lambda: self.load(i + stages))
        return new_sums, total, new_peak

    def block(self, stage: jax.Array) -> tuple[Any, Any]:
        """Keys and values of a block that has arrived, in bfloat16. Codes are exact in it."""
        k, v = self.memory["k"].at[stage], self.memory["v"].at[stage]
        if not self.eight_bit:
            return k, v
        wide = self.memory["k_wide"], self.memory["v_wide"]
        for to, codes in zip(wide, (k, v), strict=True):
            to.at[:, self.columns][...] = codes[:, self.columns].astype(jnp.bfloat16)
        gpu.commit_smem()
        gpu.barrier_arrive(self.memory["widened"])
        gpu.barrier_wait(self.memory["widened"])
        return wide

    def scores(self, k: Any, stage: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The scores of the entries of a block, and whether a query sees an entry: [ROWS, block]."""
        scores = self.product(self.memory["q"], k, transposed=True)
        if self.eight_bit:  # scales belong to entries, so to columns of scores
            scores = scores * self.scales("k_scales", stage)
        keys = self.over_rows(self.memory["keys"][stage])
        seen = (keys <= self.over_columns(self.positions)) & (
            keys >= self.over_columns(self.starts)
        )
        return lax.select(seen, scores, lax.full_like(scores, MASKED)), seen

    def put(self, weights: jax.Array, seen: jax.Array, stage: jax.Array) -> None:
        """Weights into shared memory, each as the sum of two bfloat16 numbers.

        One number would cost up to 0.2 % of a weight; two are as good as float32 here.
        """
        if self.eight_bit:
            weights = weights * self.scales("v_scales", stage)
            weights = lax.select(seen, weights, lax.full_like(weights, 0))
        high = weights.astype(jnp.bfloat16)
        low = (weights - high.astype(jnp.float32)).astype(jnp.bfloat16)
        self.memory["weights"].at[self.group, 0][...] = high
        self.memory["weights"].at[self.group, 1][...] = low
        gpu.commit_smem()

    def weighted(
        self, v: Any, sums: tuple[jax.Array, ...], shrink: jax.Array
    ) -> tuple[jax.Array, ...]:
        """The sums of values so far, with those of a block."""
        factor = lax.broadcast_in_dim(shrink, (ROWS, self.tiling.columns), [0])
        new_sums = []
        for j, sum_ in enumerate(sums):
            v_part = v.at[:, self.part(j)]
            pair = [self.memory["weights"].at[self.group, n] for n in (0, 1)]
            new_sums.append(sum_ * factor + self.product(pair, v_part))
        return tuple(new_sums)

    def product(self, left: Any, right: Any, transposed: bool = False) -> jax.Array:
        """The product of arrays in shared memory, or the sum of those of several on the left."""
        lefts: list[Any] = left if isinstance(left, list) else [left]
        columns = right.shape[0] if transposed else right.shape[1]
        if self.interpret and transposed:  # jax's interpreter does not know transposed operands
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

    def part(self, j: int) -> Any:
        """The columns of the values that product j of this warpgroup makes."""
        return pl.ds(self.group * self.width + j * self.tiling.columns, self.tiling.columns)

    def scales(self, name: str, stage: jax.Array) -> jax.Array:
        return self.over_rows(self.memory[name][stage].astype(jnp.float32))

    def over_columns(self, of_rows: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(of_rows, (ROWS, self.tiling.block), [0])

    def over_rows(self, of_entries: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(of_entries, (ROWS, self.tiling.block), [1])
