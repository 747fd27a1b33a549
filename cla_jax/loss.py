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

    whole_VD = _whole(head_VD.astype(x_BTD.dtype), rules)

    def step(total, inputs):
        loss, _ = _chunk_loss(inputs, whole_VD, rules)
        return total + loss, None

    return jax.lax.scan(step, jnp.zeros(()), _chunks(chunk, x_BTD, targets_BT, weights_BT))[0]


def token_losses(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, chunk: int, rules: AxisRules
) -> jax.Array:
    """The negative log-likelihood of every token in nats, float32 [B, T]: what `cross_entropy` sums."""
    whole_VD = _whole(head_VD.astype(x_BTD.dtype), rules)

    def step(_, inputs):
        x_ND, targets_N = inputs
        return None, losses(_logits(x_ND, whole_VD, rules), targets_N)[0]

    _, found = jax.lax.scan(step, None, _chunks(chunk, x_BTD, targets_BT))
    B, T = targets_BT.shape
    spec = rules.spec(None, "batch", None)
    found = found.reshape(T // chunk, B, chunk, out_sharding=spec)
    return jnp.moveaxis(found, 0, 1).reshape(B, T)


def _forward(x_BTD, head_VD, targets_BT, weights_BT, chunk, rules):
    # Before the loop, which would gather it once a chunk.
    whole_VD = _whole(head_VD.astype(x_BTD.dtype), rules)

    def step(carry, inputs):
        total, d_head_VD = carry
        x_ND = inputs[0]
        loss, d_logits_NV = _chunk_loss(inputs, whole_VD, rules, gradient=True)
        d_x_ND = jnp.einsum(
            "NV,VD->ND",
            d_logits_NV,
            whole_VD,
            out_sharding=rules.gathered().spec(*axes("ND")),
        )
        # Each device's own sum: the sums of all devices are added once, not once a chunk.
        d_head_VD += jnp.einsum(
            "NV,ND->VD",
            d_logits_NV,
            x_ND,
            preferred_element_type=jnp.float32,
            out_sharding=own_sums,
        )
        return (total + loss, d_head_VD), d_x_ND

    own_sums = rules.own_sums(*axes("VD"))
    zeros = (jnp.zeros(()), jnp.zeros_like(head_VD, out_sharding=own_sums))
    (loss, d_head_VD), d_x = jax.lax.scan(
        step, zeros, _chunks(chunk, x_BTD, targets_BT, weights_BT)
    )
    if own_sums is not None:  # between devices in the compute dtype, as all gradients of weights
        own_VD = d_head_VD.astype(x_BTD.dtype)
        d_head_VD = jax.reshard(own_VD, rules.spec(*axes("VD"))).astype(head_VD.dtype)
    B, T, D = x_BTD.shape
    spec = rules.gathered().spec(None, *axes("BTD"))
    d_x = d_x.reshape(T // chunk, B, chunk, D, out_sharding=spec)
    return loss, (jnp.moveaxis(d_x, 0, 1).reshape(B, T, D), d_head_VD)


def _backward(_chunk, _rules, residuals, d_loss):
    d_x_BTD, d_head_VD = residuals
    # The cotangent, 1 / tokens, would be rounded in the compute dtype: scaled in float32 it is not.
    scaled_BTD = (d_loss * d_x_BTD.astype(jnp.float32)).astype(d_x_BTD.dtype)
    return (scaled_BTD, d_loss * d_head_VD, None, None)


cross_entropy.defvjp(_forward, _backward)


def _chunks(chunk: int, *arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Cuts [B, T, ...] into [T / chunk, B * chunk, ...]: one axis of tokens, as in `Linear`."""

    def cut(a: jax.Array) -> jax.Array:
        B, T, *rest = a.shape
        chunks = jnp.moveaxis(a.reshape(B, T // chunk, chunk, *rest), 1, 0)
        return chunks.reshape(T // chunk, B * chunk, *rest)

    return tuple(map(cut, arrays_BT))


def _chunk_loss(inputs, head_VD, rules, *, gradient=False):
    """The chunk's weighted loss and, if asked for, its gradient with respect to the logits."""
    x_ND, targets_N, weights_N = inputs
    logits_NV = _logits(x_ND, head_VD, rules)
    losses_N, log_total_N, is_target_NV = losses(logits_NV, targets_N)
    loss = jnp.sum(weights_N * losses_N)
    if not gradient:
        return loss, None
    d_logits_NV = jnp.exp(logits_NV - log_total_N[..., None]) - is_target_NV
    return loss, (weights_N[..., None] * d_logits_NV).astype(x_ND.dtype)


def losses(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Each token's loss by its logits [..., V], and what the gradient of it is made of."""
    log_total = jax.nn.logsumexp(logits, axis=-1)
    # A comparison, not take_along_axis: it works on a vocabulary that is split over devices.
    is_target = jnp.arange(logits.shape[-1]) == targets[..., None]
    target = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return log_total - target, log_total, is_target


def _logits(x_ND: jax.Array, head_VD: jax.Array, rules: AxisRules) -> jax.Array:
    return project(x_ND[:, None], head_VD, rules)[:, 0]


def _whole(head_VD: jax.Array, rules: AxisRules) -> jax.Array:
    spec = rules.gathered().spec(*axes("VD"))
    return head_VD if spec is None else jax.reshard(head_VD, spec)
