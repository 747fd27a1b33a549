"""Attention through a cache on TPU: a Pallas kernel over pages, compiled by Mosaic.

A step of the kernel multiplies several pages of a row, for all KV heads; meanwhile Pallas copies those of the
next step. Pages of int8 are widened inside the kernel. The kernel returns a `Partial`.

No existing kernel reads these pools. The ragged paged attention of tokamax and that of jax keep keys and
values in one array, interleaved by head. Here, a layer may read keys and values of different KV layers, and
joining them would copy both pools at every step. jax's paged attention returns neither maxima nor totals, so
its results cannot be merged.

The kernel was compiled for v5e, v5p and v6e, and run in jax's interpreter. It was never run on a TPU.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax.config import ModelConfig
from cla_jax.model.attention import EMPTY, MASKED, PagedKV, Partial

QUERIES = 128  # of a KV head: their scores and sums have room in the vector memory
_LANES = 128
_SUBLANES = 16, 32  # of a tile of bfloat16, and of int8
_TOKENS = 512  # of a step
_BYTES = 2**21  # of a step, if there are many KV heads


def kept_width(d_head: int) -> int:
    """How wide a cache keeps heads for this kernel: whole tiles of 128 lanes."""
    return -(-d_head // _LANES) * _LANES


def refusal(
    config: ModelConfig,
    format: str,
    platform: str,
    compute_capability: float,  # noqa: ARG001
    page: int | None,
) -> str | None:
    """Why the kernel cannot serve this model and cache; None if it can."""
    width = kept_width(config.d_head)
    if platform != "tpu":
        return f"the paged kernel is not available on {platform}"
    if format not in ("dense", "bfloat16", "int8"):
        return f"it supports bfloat16 and int8, not cache format {format}"
    if page is None and config.n_kv_heads != 1:
        return (
            "without pages it supports one KV head; the rows of a cache of "
            f"{config.n_kv_heads} KV heads would be copied at each step"
        )
    sublanes = _SUBLANES[format == "int8"]
    if page is not None and page % sublanes:
        return f"it needs pages of a multiple of {sublanes} tokens, not {page}"
    if page is not None and page > (most := _BYTES // _token_bytes(config.n_kv_heads, width)):
        return f"it supports pages of up to {most // sublanes * sublanes} tokens of this model, not {page}"
    return None


def _token_bytes(K: int, H: int) -> int:
    """Bytes of the keys and the values of a token in bfloat16, which int8 becomes in the kernel."""
    return 4 * K * H


def attend(
    q_BKNH: jax.Array, kept: PagedKV, positions_BN: jax.Array, starts_BN: jax.Array
) -> Partial:
    """Attention of up to 128 scaled queries of each KV head to the entries that each sees.

    Heads are as wide as `kept_width` says, and come before the entries of a page.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    B, K, N, H = q_BKNH.shape
    S, C = kept.page, kept.pages_BC.shape[1]
    assert kept.heads_first, kept.k.shape
    assert N <= QUERIES, N
    assert kept_width(H) == H, H
    M = max(1, min(_TOKENS // S, _BYTES // (S * _token_bytes(K, H)), C))  # pages of a step
    steps = -(-C // M)
    # A row's last step may have pages that it does not see. They must be its own: nothing times NaN is NaN.
    own_BC = jnp.concatenate([kept.pages_BC, *[kept.pages_BC[:, :1]] * (steps * M - C)], axis=1)
    keys_BE = jnp.pad(kept.positions_BE, ((0, 0), (0, (steps * M - C) * S)), constant_values=EMPTY)
    missing = (0, -N % _SUBLANES[0])  # queries that see nothing
    N += missing[1]
    q_BKNH = jnp.pad(q_BKNH.astype(jnp.bfloat16), ((0, 0), (0, 0), missing, (0, 0)))
    positions_BN = jnp.pad(positions_BN, ((0, 0), missing), constant_values=-1)
    starts_BN = jnp.pad(starts_BN, ((0, 0), missing))
    read_B2 = kept.blocks(positions_BN, starts_BN, M * S)

    def step(b: Any, c: Any, read_ref: Any) -> Any:
        """The step that is copied for step c: nothing new where a row sees nothing."""
        return jnp.maximum(jnp.minimum(c, read_ref[2 * b + 1] - 1), read_ref[2 * b])

    def pages(pool: jax.Array) -> list[pl.BlockSpec]:
        """Those of a step; a block has one."""

        def page(j: int) -> pl.BlockSpec:
            def index(b: Any, c: Any, pages_ref: Any, read_ref: Any) -> Any:
                number = pages_ref[b * steps * M + step(b, c, read_ref) * M + j]
                return number, *[0] * (pool.ndim - 1)

            return pl.BlockSpec((1, *pool.shape[1:]), index)

        return [page(j) for j in range(M)]

    def of_row(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, *shape), lambda b, *_: (b, *[0] * len(shape)))

    of_step = pl.BlockSpec(
        (1, 1, 1, M * S), lambda b, c, _, read_ref: (b, step(b, c, read_ref), 0, 0)
    )
    pools = [pool for pool in (kept.k, kept.v, kept.k_scales, kept.v_scales) if pool is not None]
    outputs = [(K, N, H), (K, N, 1), (K, N, 1)]
    part = pl.pallas_call(
        functools.partial(_kernel, M),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, steps),
            in_specs=[
                of_row(K, N, H),
                of_row(N, 1),
                of_row(N, 1),
                of_step,
                *[spec for pool in pools for spec in pages(pool)],
            ],
            out_specs=[of_row(*shape) for shape in outputs],
        ),
        out_shape=[jax.ShapeDtypeStruct((B, *shape), jnp.float32) for shape in outputs],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
    )(
        own_BC.reshape(-1),
        read_B2.reshape(-1),
        q_BKNH,
        positions_BN[..., None],
        starts_BN[..., None],
        keys_BE.reshape(B, steps, 1, M * S),
        *[pool for pool in pools for _ in range(M)],
    )
    return Partial(*(a[:, :, : N - missing[1]] for a in part))


def _kernel(M: int, _pages_ref: Any, read_ref: Any, *refs: Any) -> None:
    """Step c of row b: attention to M pages, added to that of the steps before."""
    from jax.experimental import pallas as pl

    q_ref, positions_ref, starts_ref, keys_ref = refs[:4]
    pools = [refs[i : i + M] for i in range(4, len(refs) - 3, M)]
    sum_ref, total_ref, peak_ref = refs[-3:]
    b, c = pl.program_id(0), pl.program_id(1)

    @pl.when(c == 0)
    def _nothing() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)
        peak_ref[...] = jnp.full_like(peak_ref, MASKED)

    @pl.when((c >= read_ref[2 * b]) & (c < read_ref[2 * b + 1]))
    def _add() -> None:
        k_KSH, v_KSH, *scales = (
            jnp.concatenate([_bfloat16(ref[0]) for ref in pages], axis=1) for pages in pools
        )
        # A scale belongs to a token, so to a column of scores and of weights.
        scales_K1S = [a.astype(jnp.float32)[:, None] for a in scales]
        s_KNS = _product("KNH,KSH->KNS", q_ref[0], k_KSH)
        if scales:
            s_KNS *= scales_K1S[0]
        seen_NS = (keys_ref[0, 0] <= positions_ref[0]) & (keys_ref[0, 0] >= starts_ref[0])
        s_KNS = jnp.where(seen_NS[None], s_KNS, MASKED)
        peak_KN1 = jnp.maximum(peak_ref[0], s_KNS.max(axis=-1, keepdims=True))
        shrink_KN1 = jnp.exp(peak_ref[0] - peak_KN1)
        p_KNS = jnp.exp(s_KNS - peak_KN1)
        total_ref[0] = total_ref[0] * shrink_KN1 + p_KNS.sum(axis=-1, keepdims=True)
        if scales:
            p_KNS *= scales_K1S[1]
        # Weights are sums of two bfloat16 numbers, one below the other: one alone would cost up to 0.2 %.
        high_KNS = p_KNS.astype(jnp.bfloat16)
        low_KNS = (p_KNS - high_KNS.astype(jnp.float32)).astype(jnp.bfloat16)
        both = _product("KNS,KSH->KNH", jnp.concatenate([high_KNS, low_KNS], axis=1), v_KSH)
        N = p_KNS.shape[1]
        sum_ref[0] = sum_ref[0] * shrink_KN1 + both[:, :N] + both[:, N:]
        peak_ref[0] = peak_KN1


def _bfloat16(kept: jax.Array) -> jax.Array:
    """The elements of which these are the bits, or codes of int8, which are exact in bfloat16."""
    if kept.dtype == jnp.int8:
        return kept.astype(jnp.float32).astype(jnp.bfloat16)
    return jax.lax.bitcast_convert_type(kept, jnp.bfloat16)


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)
