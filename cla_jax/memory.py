"""What decoding needs, before anything is allocated, and how many sequences that lets fit.

The closed forms hold for any device. The compiler's own figures (`compiled`) are those of the backend at
hand: on a CPU they say little about an accelerator, since bfloat16 weights are widened there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax import budget
from cla_jax.batch import _Choice, _loop, _Rows
from cla_jax.cache import CacheSpec, cache_spec, ledger
from cla_jax.cache.prefix_shared import prefix_spec
from cla_jax.config import ModelConfig, Sampling
from cla_jax.decode import _prefill_chunk, decoding_weights
from cla_jax.engine import LOOP
from cla_jax.model.transformer import Transformer


class TooSmall(ValueError):
    """The budget does not hold the weights and one sequence."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fit:
    """Bytes, and how many sequences of `context` tokens they leave room for."""

    context: int
    weights: int
    kv: int  # of one sequence: its row of the cache
    workspace: int  # of one sequence, while its prompt goes through
    sequences: int
    binds: str  # what most of the bytes of a further sequence would go to
    prefix: int = 0  # of a common beginning, held once for all


def weights_bytes(config: ModelConfig) -> int:
    """Of the weights as decoding keeps them: matrices in the compute dtype, norms in float32."""
    return ledger.nbytes(jax.eval_shape(lambda: decoding_weights(_abstract(config))))


def workspace_bytes(spec: CacheSpec, tokens: int) -> int:
    """About what a step of `tokens` tokens per row needs beside weights and cache, for one row.

    The sum has four parts. The first is the keys and values of the longest block of the cache, as attention
    reads them. The second is the larger of an attention and an MLP. An attention has queries, output, old and
    new sums, and the scores, masked scores and weights of one block. An MLP has the products of its matrices
    of d_ff columns, and one array that it makes of them. The third is the residual stream and a norm of it.
    The fourth is the logits of one token, with what sampling makes of them.
    """
    config, width = spec.config, jnp.dtype(spec.config.compute_dtype).itemsize
    heads, (keys, values) = config.n_heads, config.read_widths
    block = max(max(spec.block(p), format.in_full) for p, format in enumerate(spec.formats))
    attention = heads * ((keys + values) * width + 3 * block * 4 + 2 * values * 4)
    mlp = config.mlp.n_matrices * config.d_ff * width
    decoded = block * config.n_kv_heads * (keys + values) * width
    per_token = 2 * config.d_model * width + max(attention, mlp)
    return decoded + tokens * per_token + 4 * config.vocab_size * 4


def fit(
    config: ModelConfig,
    format: str,
    *,
    context: int,
    budget: int,
    chunk: int = 256,
    shared: int | None = None,
    page: int = 64,
) -> Fit:
    """How many sequences of `context` tokens a device with `budget` bytes can hold.

    With `shared`, they begin with so many common tokens, and a prefix-shared cache holds the full pages of
    `page` tokens of these once. Without, each has a row of its own.

    Raises:
      TooSmall: a ValueError; it cannot hold the weights and one sequence.
      ValueError: more shared tokens than there are, or a cache that cannot be shared.
    """
    spec = cache_spec(config, format, batch=1, capacity=context, chunk=chunk)
    weights, prefix = weights_bytes(config), 0
    if shared is None:
        kv = int(ledger.predicted(spec, context).allocated)
    else:
        if not 0 <= shared < context:
            raise ValueError(f"shared = {shared} must lie in 0 to context - 1 = {context - 1}")
        full = shared // page
        alone = context // page + 1 - full  # the last page is never full
        paged = prefix_spec(
            config, format, batch=1, page=page, pages=alone, capacity=context, chunk=chunk
        )
        prefix, kv = full * paged.page_bytes, paged.allocated_bytes
    workspace = workspace_bytes(spec, spec.chunk)
    sequences = max(budget - weights - prefix, 0) // (kv + workspace)
    if sequences < 1:
        raise TooSmall(
            f"budget = {budget:,} B is smaller than the weights ({weights:,} B), the KV cache of one "
            f"sequence of {context:,} tokens ({prefix + kv:,} B, {format}) and its workspace "
            f"({workspace:,} B)"
        )
    return Fit(
        context=context,
        weights=weights,
        kv=kv,
        workspace=workspace,
        sequences=sequences,
        binds="KV cache" if kv >= workspace else "workspace",
        prefix=prefix,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of one compiled phase on the backend at hand."""

    arguments: int  # weights, cache and what the step is given
    temporaries: int
    total: int  # arguments, temporaries, and outputs that are not written over arguments


def compiled(spec: CacheSpec) -> dict[str, Peak]:
    """The compiler's figures for a chunk of `prefill` and for the `decode` loop; nothing is allocated."""
    return {name: _peak(phase.compile()) for name, phase in lowered(spec).items()}


def lowered(spec: CacheSpec) -> dict[str, Any]:
    """Both phases, ready to compile for abstract arrays."""
    config, B = spec.config, spec.batch
    weights = jax.eval_shape(lambda: decoding_weights(_abstract(config)))
    cache = jax.eval_shape(spec.allocate)
    ints: Any = jax.ShapeDtypeStruct((B,), jnp.int32)
    flags: Any = jax.ShapeDtypeStruct((B,), bool)
    ids: Any = jax.ShapeDtypeStruct((config.vocab_size,), bool)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), B))
    last = jax.ShapeDtypeStruct((B, config.d_model), config.compute_dtype)
    prompt = jax.ShapeDtypeStruct((B, spec.chunk), jnp.int32)
    return {
        "prefill": _prefill_chunk.lower(weights, cache, last, prompt, ints, spec=spec),
        "decode": _loop.lower(
            weights,
            cache,
            _Rows(ints, ints, flags, flags),
            _Choice(keys, ints, ids, ids),
            True,  # stop_early
            spec=spec,
            sampling=Sampling(),
            steps=LOOP,
        ),
    }


def allocator_peak() -> int | None:
    """The most bytes that this process has had in use at once on the first device, since it started.

    None where the backend does not say, as on CPUs.
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use")


def _peak(compiled: Any) -> Peak:
    analysis, total = compiled.memory_analysis(), budget.program_bytes(compiled)
    assert total is not None  # every backend that decodes says it
    return Peak(
        arguments=analysis.argument_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        total=total,
    )


def _abstract(config: ModelConfig) -> Transformer:
    return Transformer(jax.random.key(0), config)
