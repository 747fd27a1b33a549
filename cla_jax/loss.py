"""Cross-entropy that never holds the logits of the whole sequence.

The logits of a few positions exist at once. Where gradients are wanted, they are taken in the same pass,
while those logits are at hand: the loss is a scalar, so its gradients need only be scaled later. Recomputing
the logits in the backward pass would need four matrix products; this needs three. Storing them would need B *
T * V floats.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from cla_jax.mesh import AxisRules
from cla_jax.model.layers import axes
from cla_jax.model.transformer import project


class Distillation(NamedTuple):
    """How much a teacher counts, and at what temperature."""

    weight: float
    temperature: float


class TeacherOutput(NamedTuple):
    """What a teacher says of the same tokens."""

    x_BTD: jax.Array  # its final hidden states
    head_VD: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 7))
def cross_entropy(
    x_BTD: jax.Array,
    head_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    rules: AxisRules,
    taught: TeacherOutput | None = None,
    distill: Distillation | None = None,
) -> jax.Array:
    """Weighted sum over all tokens of the negative log-likelihood, in nats; a float32 scalar.

    With a teacher, a token's loss is (1 - w) of that plus w T^2 of KL(teacher || student). Logits of both are
    divided by T (1503.02531). No gradient reaches the teacher.

    `x_BTD` are final hidden states in the compute dtype, `head_VD` the float32 output head,
    `weights_BT` float32 (0 leaves a token out). `chunk` positions are handled at once; it divides T.
    """
    whole_VD = _whole(head_VD.astype(x_BTD.dtype), rules)
    teach = _teacher_logits(taught, chunk, rules)

    def step(total, start):
        tokens = _chunk(start, chunk, x_BTD, targets_BT, weights_BT)
        loss, _ = _chunk_loss(tokens, whole_VD, rules, teach(start), distill)
        return total + loss, None

    return jax.lax.scan(step, jnp.zeros(()), jnp.arange(0, x_BTD.shape[1], chunk))[0]


def token_losses(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, chunk: int, rules: AxisRules
) -> jax.Array:
    """The negative log-likelihood of every token in nats, float32 [B, T]: what `cross_entropy` sums."""
    whole_VD = _whole(head_VD.astype(x_BTD.dtype), rules)

    B, T = targets_BT.shape

    def step(_, start):
        x_ND, targets_N = _chunk(start, chunk, x_BTD, targets_BT)
        return None, losses(_logits(x_ND, whole_VD, rules), targets_N)[0]

    _, nll = jax.lax.scan(step, None, jnp.arange(0, T, chunk))
    spec = rules.spec(None, "batch", None)
    nll = nll.reshape(T // chunk, B, chunk, out_sharding=spec)
    return jnp.moveaxis(nll, 0, 1).reshape(B, T)


def _forward(x_BTD, head_VD, targets_BT, weights_BT, chunk, rules, taught=None, distill=None):
    # Before the loop, which would gather it once a chunk.
    whole_VD = _whole(head_VD.astype(x_BTD.dtype), rules)
    teach = _teacher_logits(taught, chunk, rules)
    B, T, D = x_BTD.shape
    spec = rules.gathered().spec(*axes("BTD"))

    def step(carry, start):
        total, d_head_DV, d_x_BTD = carry
        tokens = _chunk(start, chunk, x_BTD, targets_BT, weights_BT)
        loss, d_logits_NV = _chunk_loss(
            tokens, whole_VD, rules, teach(start), distill, gradient=True
        )
        d_x_ND = jnp.einsum(
            "NV,VD->ND",
            d_logits_NV,
            whole_VD,
            out_sharding=rules.gathered().spec(*axes("ND")),
        )
        # Each device's own sum: the sums of all devices are added once, not once a chunk.
        d_head_DV += jnp.einsum(
            "NV,ND->DV",
            d_logits_NV,
            tokens[0],
            preferred_element_type=jnp.float32,
            out_sharding=own_sums,
        )
        d_chunk = d_x_ND.reshape(B, chunk, D, out_sharding=spec)
        d_x_BTD = jax.lax.dynamic_update_slice_in_dim(d_x_BTD, d_chunk, start, axis=1)
        return (total + loss, d_head_DV, d_x_BTD), None

    # [D, V], as TPUs keep the head: it has few of its D entries on each device.
    own_sums = rules.own_sums(*axes("DV"))
    d_head_DV = jnp.zeros(head_VD.shape[::-1], head_VD.dtype, out_sharding=own_sums)
    # Not before the hidden states are there: XLA would hold these zeros during the forward pass.
    x_BTD, d_head_DV = jax.lax.optimization_barrier((x_BTD, d_head_DV))
    carry = (jnp.zeros(()), d_head_DV, jnp.zeros_like(x_BTD, out_sharding=spec))
    (loss, d_head_DV, d_x_BTD), _ = jax.lax.scan(step, carry, jnp.arange(0, T, chunk))
    if own_sums is not None:  # between devices in the compute dtype, as all gradients of weights
        own_DV = d_head_DV.astype(x_BTD.dtype)
        d_head_DV = jax.reshard(own_DV, rules.spec(*axes("DV"))).astype(head_VD.dtype)
    # A device's own sum, as large as the head, is given up before the backward pass of the blocks begins.
    return loss, jax.lax.optimization_barrier((d_x_BTD, d_head_DV.T))


def _backward(_chunk, _rules, _distill, residuals, d_loss):
    d_x_BTD, d_head_VD = residuals
    # The cotangent, 1 / tokens, would be rounded in the compute dtype: scaled in float32 it is not.
    scaled_BTD = (d_loss * d_x_BTD.astype(jnp.float32)).astype(d_x_BTD.dtype)
    return (scaled_BTD, d_loss * d_head_VD, None, None, None)


cross_entropy.defvjp(_forward, _backward)


def _chunk(start: jax.Array, size: int, *arrays_BT: jax.Array) -> tuple[jax.Array, ...]:
    """Positions of [B, T, ...] from `start` on as [B * size, ...], one axis of tokens."""

    def cut(a: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)
        return part.reshape(-1, *a.shape[2:])

    return tuple(map(cut, arrays_BT))


def _teacher_logits(taught: TeacherOutput | None, chunk: int, rules: AxisRules):
    """From where a chunk begins to the teacher's logits of it; None without a teacher."""
    if taught is None:
        return lambda start: None
    whole_VD = _whole(taught.head_VD.astype(taught.x_BTD.dtype), rules)
    return lambda start: _logits(_chunk(start, chunk, taught.x_BTD)[0], whole_VD, rules)


def _chunk_loss(inputs, head_VD, rules, teacher_NV=None, distill=None, *, gradient=False):
    """The chunk's weighted loss and, if asked for, its gradient with respect to the logits."""
    x_ND, targets_N, weights_N = inputs
    logits_NV = _logits(x_ND, head_VD, rules)
    losses_N, log_total_N, is_target_NV = losses(logits_NV, targets_N)
    w, T = distill or Distillation(0.0, 1.0)
    if teacher_NV is not None:
        student_NV, teacher_NV = (jax.nn.log_softmax(a / T) for a in (logits_NV, teacher_NV))
        kl_N = jnp.sum(jnp.exp(teacher_NV) * (teacher_NV - student_NV), axis=-1)
        losses_N = (1 - w) * losses_N + w * T**2 * kl_N
    loss = jnp.sum(weights_N * losses_N)
    if not gradient:
        return loss, None
    d_logits_NV = jnp.exp(logits_NV - log_total_N[..., None]) - is_target_NV
    if teacher_NV is not None:
        apart_NV = jax.nn.softmax(logits_NV / T) - jnp.exp(teacher_NV)
        d_logits_NV = (1 - w) * d_logits_NV + w * T * apart_NV
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
