"""Keys and values as they are, in float32 or bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp

from cla_jax.config import ModelConfig
from cla_jax.mesh import AxisRules
from cla_jax.model.attention import KV
from cla_jax.model.layers import axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dense:
    """A slot is a KV of [batch, capacity, K, H] arrays."""

    dtype: str
    block: int = 128
    name: str = "dense"

    def allocate(self, config: ModelConfig, batch: int, capacity: int, rules: AxisRules) -> KV:
        shape = (batch, capacity, config.n_kv_heads, config.d_head)
        spec = rules.spec(*axes("BSKH"))
        return KV(*(jnp.zeros(shape, self.dtype, out_sharding=spec) for _ in KV._fields))

    def write(self, slot: KV, kv: KV, index: jax.Array) -> KV:
        # An index out of range would be clamped without a word: the engine checks lengths before.
        return KV(
            *(
                jax.lax.dynamic_update_slice_in_dim(held, new.astype(held.dtype), index, axis=1)
                for held, new in zip(slot, kv, strict=True)
            )
        )

    def read(self, slot: KV, i: jax.Array) -> KV:
        return KV(
            *(
                jax.lax.dynamic_slice_in_dim(held, i * self.block, self.block, axis=1)
                for held in slot
            )
        )

    def bytes_per_token(self, config: ModelConfig) -> int:
        return 2 * config.n_kv_heads * config.d_head * jnp.dtype(self.dtype).itemsize
