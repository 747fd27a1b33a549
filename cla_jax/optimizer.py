"""Clipping, AdamW or Muon, and the learning rate, from their config."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from cla_jax.config import WSD, Constant, Cosine, Muon, OptimizerConfig
from cla_jax.model.layers import is_param


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update `step`, counted from 0: linear warm-up, then as the schedule's config says.

    The number of steps of a fraction is rounded. A decay has at least one, unless the warm-up takes all. The
    first update has a nonzero rate, 1/warmup of the peak. The last one of a schedule that falls uses the
    floor, if a step is left.
    """
    chosen, peak = config.schedule, config.peak_lr
    warmup = round(chosen.warmup_fraction * steps)

    def fall(step, first: int, final_fraction: float, shape: Callable):
        """From the peak at step `first` to the floor at the last one, along `shape`, from 1 to 0."""
        progress = jnp.clip((step - first) / max(steps - 1 - first, 1), 0, 1)
        floor = peak * final_fraction
        return floor + (peak - floor) * shape(progress)

    def after_warmup(step):
        match chosen:
            case Cosine(final_fraction=final):
                return fall(step, warmup, final, lambda x: 0.5 * (1 + jnp.cos(jnp.pi * x)))
            case WSD(decay_fraction=decay, final_fraction=final):
                # The last step of the peak; the steps after it decay.
                first = max(steps - 1 - round(decay * steps), warmup)
                first = min(first, max(steps - 2, 0)) if decay else first
                return fall(step, first, final, lambda x: 1 - x)
            case Constant():
                return peak

    def rate(step):
        rising = peak * (step + 1) / max(warmup, 1)
        return jnp.where(step < warmup, rising, after_warmup(step))

    return rate


@functools.cache  # jax knows a function it has traced by identity
def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    rule, rate = config.rule, schedule(config, steps)
    update = optax.adamw(rate, b1=rule.b1, b2=rule.b2, eps=rule.eps, weight_decay=rule.weight_decay)
    if isinstance(rule, Muon):
        orthogonal = optax.chain(
            optax.trace(rule.momentum, nesterov=True),
            optax.stateless(lambda updates, _: _orthogonal(updates, rule.iterations)),
            optax.add_decayed_weights(rule.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        update = optax.partition({True: orthogonal, False: update}, _matrices)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), update)


def _matrices(parameters: Any) -> Any:
    """Which parameters are matrices of blocks that read or write the residual stream.

    The head matrices of a latent do neither: they have no axis `embed`.
    """

    def is_matrix(parameter: Any) -> bool:
        axes = getattr(parameter, "axes", ())
        return len(axes) > 1 and "embed" in axes and "vocab" not in axes

    return jax.tree.map(is_matrix, parameters, is_leaf=is_param)


def _orthogonal(updates: Any, iterations: int) -> Any:
    """Every matrix made nearly orthogonal, with the root mean square 0.2 (2502.16982, equation 4).

    Its singular values are near 1 before scaling, not exactly 1. A parameter is one matrix, so the keys and
    values of one projection are made orthogonal together. On a mesh each device gathers the whole matrix.
    """

    def of_parameter(parameter: Any) -> Any:
        if not is_param(parameter):
            return parameter
        value = parameter[...]
        axes = parameter.axes
        stack = value.ndim - len(axes)
        spec = jax.typeof(value).sharding.spec
        whole = jax.reshard(value, PartitionSpec()) if any(spec) else value
        # The residual stream is the first or last axis of a weight; the other axes are one side together.
        behind = axes[-1] == "embed"
        D = value.shape[-1 if behind else stack]
        shape = (-1, math.prod(value.shape[stack:]) // D, D)
        if not behind:
            shape = (-1, D, shape[1])
        made = _newton_schulz(whole.reshape(shape), iterations) * 0.2 * max(shape[1:]) ** 0.5
        made = made.reshape(value.shape)
        return parameter.replace(jax.reshard(made, spec) if any(spec) else made)

    return jax.tree.map(of_parameter, updates, is_leaf=is_param)


def _newton_schulz(x_NIO: jax.Array, iterations: int) -> jax.Array:
    """Matrices whose singular values are near 1, with the singular vectors of the given ones.

    The quintic iteration of Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon), in float32.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    if tall := x_NIO.shape[1] > x_NIO.shape[2]:  # `x @ x.mT` is then the smaller product
        x_NIO = x_NIO.mT
    x = x_NIO / (jnp.linalg.norm(x_NIO, axis=(1, 2), keepdims=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
