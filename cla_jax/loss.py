"""Cross-entropy that never holds the logits of the whole sequence.

The logits of a few positions exist at once. Where gradients are wanted, they are taken in the same
pass, while those logits are at hand: the loss is a scalar, so its gradients need only be scaled later.
Compared with recomputing the logits in the backward pass this saves one of four matrix products;
compared with keeping them it saves B * T * V floats.
"""

import functools

import jax
import jax.numpy as jnp

from cla_jax.mesh import AxisRules
from cla_jax.model.layers import axes
from cla_jax.model.transformer import project


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    rules: AxisRules,
) -> jax.Array:
    """Weighted sum over all tokens of the negative log-likelihood, in nats; a float32 scalar.

    `x_BTD` are final hidden states in the compute dtype, `head_VD` the float32 output head,
    `weights_BT` float32 (0 leaves a token out). `chunk` positions are handled at once; it divides T.
    """

    def step(total, inputs):
        loss, _ = _chunk_loss(inputs, head_VD, rules)
        return total + loss, None

    return jax.lax.scan(step, jnp.zeros(()), _chunks(chunk, x_BTD, targets_BT, weights_BT))[0]


def _forward(x_BTD, head_VD, targets_BT, weights_BT, chunk, rules):
    def step(carry, inputs):
        total, d_head_VD = carry
        x_BtD = inputs[0]
        loss, d_logits_BtV = _chunk_loss(inputs, head_VD, rules, gradient=True)
        d_x_BtD = jnp.einsum(
            "BTV,VD->BTD",
            d_logits_BtV,
            _whole(head_VD.astype(x_BtD.dtype), rules),
            out_sharding=rules.gathered().spec(*axes("BTD")),
        )
        d_head_VD += jnp.einsum(
            "BTV,BTD->VD",
            d_logits_BtV,
            x_BtD,
            preferred_element_type=jnp.float32,
            out_sharding=rules.spec(*axes("VD")),
        )
        return (total + loss, d_head_VD), d_x_BtD

    zeros = (jnp.zeros(()), jnp.zeros_like(head_VD))
    (loss, d_head_VD), d_x = jax.lax.scan(
        step, zeros, _chunks(chunk, x_BTD, targets_BT, weights_BT)
    )
    return loss, (jnp.moveaxis(d_x, 0, 1).reshape(x_BTD.shape), d_head_VD)


def _backward(_chunk, _rules, residuals, d_loss):
    d_x_BTD, d_head_VD = residuals
    return (d_loss.astype(d_x_BTD.dtype) * d_x_BTD, d_loss * d_head_VD, None, None)


cross_entropy.defvjp(_forward, _backward)


def _chunks(chunk: int, *arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts [B, T, ...] into [T / chunk, B, chunk, ...]."""

    def cut(a: jax.Array) -> jax.Array:
        B, T, *rest = a.shape
        return jnp.moveaxis(a.reshape(B, T // chunk, chunk, *rest), 1, 0)

    return tuple(map(cut, arrays_BT))


def _chunk_loss(inputs, head_VD, rules, *, gradient=False):
    """The chunk's weighted loss and, if asked for, its gradient with respect to the logits."""
    x_BtD, targets_Bt, weights_Bt = inputs
    logits_BtV = project(x_BtD, head_VD, rules)
    log_total_Bt = jax.nn.logsumexp(logits_BtV, axis=-1)
    # A comparison, not take_along_axis: it works on a vocabulary that is split over devices.
    is_target_BtV = jnp.arange(logits_BtV.shape[-1]) == targets_Bt[..., None]
    target_Bt = jnp.sum(jnp.where(is_target_BtV, logits_BtV, 0), axis=-1)
    loss = jnp.sum(weights_Bt * (log_total_Bt - target_Bt))
    if not gradient:
        return loss, None
    d_logits_BtV = jnp.exp(logits_BtV - log_total_Bt[..., None]) - is_target_BtV
    return loss, (weights_Bt[..., None] * d_logits_BtV).astype(x_BtD.dtype)


def _whole(head_VD: jax.Array, rules: AxisRules) -> jax.Array:
    spec = rules.gathered().spec(*axes("VD"))
    return head_VD if spec is None else jax.reshard(head_VD, spec)
