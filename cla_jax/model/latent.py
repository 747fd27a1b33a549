"""Latent keys and values (MLA; 2405.04434, section 2.1): one small vector per token instead of heads.

A cache holds the latent and one rotated key. Expanded, the keys and values of every head are computed from
the latent: less work where there are many queries. Absorbed, their matrices are multiplied into queries and
outputs instead, so the latent is read as the only head of MQA.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from cla_jax import kv_map as kv_maps
from cla_jax.config import LatentKV, ModelConfig
from cla_jax.mesh import AxisRules
from cla_jax.model import cpu_matmul
from cla_jax.model.attention import KV, Attend
from cla_jax.model.layers import (
    Linear,
    LinearMap,
    RMSNorm,
    Rope,
    axes,
    gather_sequence,
    normal_param,
)
from cla_jax.model.native.matmul import Packed


class LatentProjection(nnx.Module):
    """A latent and a rotated key for a group, from the residual stream that enters it.

    They are kept as the values and keys of one head.
    """

    def __init__(self, key: jax.Array, config: ModelConfig, projects: kv_maps.KVHalves):
        assert projects == "kv"  # both are made of one latent
        self.norm = RMSNorm(config) if config.kv_norm == "own" else None
        self.down: LinearMap = Linear(key, "BTD,DJ->BTJ", config)
        assert isinstance(config.kv, LatentKV)
        self.rank = config.kv.rank
        self.latent_norm = RMSNorm(config, "R") if config.kv.norm else None

    def __call__(self, x_BTD: jax.Array, block_norm: RMSNorm, rope: Rope, rules: AxisRules) -> KV:
        norm = block_norm if self.norm is None else self.norm
        with jax.named_scope("kv_projection"):
            joint_BTJ = self.down(gather_sequence(norm(x_BTD), rules), rules)
            latent_BTR, key_BTH = joint_BTJ[..., : self.rank], joint_BTJ[..., self.rank :]
            if self.latent_norm is not None:
                latent_BTR = self.latent_norm(latent_BTR)
            return KV(k_BSKH=rope(key_BTH[:, :, None]), v_BSKH=latent_BTR[:, :, None])


class LatentHeads(nnx.Module):
    """The keys and values that a layer's heads make of a latent; they share the rotated part of the key."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        keys, values = jax.random.split(key)
        self.keys = normal_param(keys, "RGH", config)
        self.values = normal_param(values, "RGH", config)

    def __call__(
        self, q_BTKGW: jax.Array, kv: KV, rope: Rope, attend: Attend, rules: AxisRules
    ) -> jax.Array:
        """Attention of heads, [B, T, K, G, H]; K is 1."""
        H = self.keys.shape[-1]
        q_BTKGH, rotated = q_BTKGW[..., :H], rope(q_BTKGW[..., H:])
        latent_BSR = kv.v_BSKH[:, :, 0]
        spec = rules.gathered().spec(*axes("BTGH"))

        def made(weight_RGH: jax.Array) -> jax.Array:
            return jnp.einsum("BSR,RGH->BSGH", latent_BSR, weight_RGH, out_sharding=spec)

        k_BSGH = made(self.keys[...])
        rotated_BSGH = jnp.broadcast_to(
            kv.k_BSKH, (*k_BSGH.shape[:3], kv.k_BSKH.shape[-1]), out_sharding=spec
        )
        keys = jnp.concatenate([k_BSGH, rotated_BSGH], axis=-1)
        # To attention, each is a KV head with one query head.
        q_BTGKW = jnp.concatenate([q_BTKGH, rotated], axis=-1).swapaxes(2, 3)
        return attend(q_BTGKW, KV(keys, made(self.values[...]))).swapaxes(2, 3)

    def absorbed(self) -> "AbsorbedHeads":
        """The same attention, which reads the latent."""
        by_head = lambda weight, order: jnp.einsum(f"RGH->{order}", weight[...])
        return AbsorbedHeads(by_head(self.keys, "GRH"), by_head(self.values, "GHR"))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AbsorbedHeads:
    """What `LatentHeads` computes, with its matrices multiplied into queries and outputs.

    Nothing is computed for every token of the context.
    """

    keys_GRH: jax.Array | Packed
    values_GHR: jax.Array | Packed

    def packed(self) -> "AbsorbedHeads":
        """The same for the native kernel."""
        pack = lambda weight_GOI: Packed.of(cpu_matmul.unsplit(weight_GOI))
        return AbsorbedHeads(pack(self.keys_GRH), pack(self.values_GHR))

    def __call__(
        self, q_BTKGW: jax.Array, kv: Any, rope: Rope, attend: Attend, rules: AxisRules
    ) -> jax.Array:
        """Attention of heads, [B, T, K, G, H]; K is 1. `attend` gives what it reads of values: latents."""
        H = self.keys_GRH.shape[-1]
        rotated = rope(q_BTKGW[..., H:])
        q_BTKGR = _by_head(q_BTKGW[..., :H], self.keys_GRH, rules)
        q = jnp.concatenate([q_BTKGR, rotated], axis=-1)
        # Attention divides by the root of the width that it sees; it should be that of a head.
        o_BTKGR = attend(q * (q.shape[-1] / q_BTKGW.shape[-1]) ** 0.5, kv)
        return _by_head(o_BTKGR, self.values_GHR, rules)


def _by_head(x_BTKGI: jax.Array, weight_GOI: jax.Array | Packed, rules: AxisRules) -> jax.Array:
    """Each head's product with its own matrix, [B, T, K, G, O]; K is 1."""
    spec = rules.gathered().spec(*axes("BTKGH"))
    if not cpu_matmul.enabled():
        return jnp.einsum("BTKGI,GOI->BTKGO", x_BTKGI, weight_GOI, out_sharding=spec)
    x_BTGI = cpu_matmul.unsplit(x_BTKGI)[:, :, 0]
    y_BTGO = cpu_matmul.matmul_heads(x_BTGI, cpu_matmul.unsplit(weight_GOI))
    return y_BTGO.reshape(*x_BTKGI.shape[:-1], -1, out_sharding=spec)
