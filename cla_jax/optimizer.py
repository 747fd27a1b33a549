"""AdamW with clipping, and its learning rate, from their config."""

import functools
from collections.abc import Callable

import jax.numpy as jnp
import optax

from cla_jax.config import WSD, Cosine, OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Learning rate of update `step`, counted from 0: linear warm-up, then as the schedule's config says.

    The first update already moves, at 1/warmup of the peak; the last one of a schedule that falls uses the
    floor.
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
            case WSD(final_fraction=final):
                # The last step of the peak; the steps after it decay.
                first = max(steps - 1 - round(chosen.decay_fraction * steps), warmup)
                return fall(step, first, final, lambda x: 1 - x)
        return peak

    def rate(step):
        rising = peak * (step + 1) / max(warmup, 1)
        return jnp.where(step < warmup, rising, after_warmup(step))

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
