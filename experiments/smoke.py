"""Smoke test: every part of a training run, in seconds."""

import os
from typing import TYPE_CHECKING

from cla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, Placement
from cla_jax.fields import replaced
from experiments import sweeping
from experiments.sweeping import Trials

if TYPE_CHECKING:
    import optuna


def tiny() -> Config:
    """Two layers that share keys and values, trained for 40 steps on bytes."""
    return Config(
        name="smoke/tiny",
        model=ModelConfig(
            vocab_size=260,
            n_layers=2,
            d_model=64,
            d_ff=128,
            n_heads=4,
            n_kv_heads=1,
            d_head=16,
            kv_map="cla:2",
            init_std=0.05,
            compute_dtype="float32",
        ),
        data=DataConfig(source="sotu:20", tokenizer="byte", seq_len=128, held_out=0.1),
        optimizer=OptimizerConfig(peak_lr=3e-3),
        batch_size=8,
        steps=40,
        # Compiles longer than it runs: as fast as can be, few layers one by one, unoptimised.
        placement=Placement(
            log_every=10,
            save_every=20,
            loss_chunk=128,
            scan_layers=False,
            compiler_options="xla_backend_optimization_level=0",
        ),
    )


ROWS = (tiny,)


def grid() -> Trials:
    """Two learning rates with three seeds each: six runs, a few seconds each."""
    return sweeping.grid(tiny(), {"optimizer.peak_lr": (1e-3, 3e-3), "seed": range(3)})


def seeds() -> Trials:
    """Twelve seeds of the same run."""
    return sweeping.grid(tiny(), {"seed": range(12)})


def learning_rate() -> Trials:
    """The paper's learning-rate search from a high rate: a few short runs."""
    return sweeping.learning_rates(tiny(), start=1e-2)


def search(directory: str | os.PathLike[str]) -> Trials:
    """A search for learning rate and warm-up with Optuna: six runs, two at a time."""

    def make(trial: "optuna.Trial") -> Config:
        return replaced(
            tiny(),
            {
                "optimizer.peak_lr": trial.suggest_float("peak_lr", 1e-3, 1e-1, log=True),
                "optimizer.schedule.warmup_fraction": trial.suggest_float("warmup", 0.0, 0.5),
            },
        )

    return sweeping.searched(directory, make, trials=6, parallel=2)


SWEEPS = (grid, seeds, learning_rate, search)
