"""AdamW with clipping under warm-up and cosine decay, from its config."""

import functools

import jax.numpy as jnp
import optax

from cla_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update `step` (counted from 0): linear warm-up, then cosine to the floor.

    The first update already moves, at 1/warmup of the peak; the last one uses the floor.
    """
    warmup = round(config.warmup_fraction * steps)
    floor = config.peak_lr * config.final_fraction

    def rate(step):
        rising = config.peak_lr * (step + 1) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(steps - 1 - warmup, 1), 0, 1)
        falling = floor + (config.peak_lr - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup, rising, falling)

    return rate


@functools.cache  # jax knows a function it has traced by identity
def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )
