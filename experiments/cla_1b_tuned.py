"""The paper's 1B models at their best learning rates (2405.12981, tables 3 and 4).

The rates are the printed ones; the grid they stand on is 3e-4 times powers of 1.5, rounded.
"""

import dataclasses

from cla_jax.config import Config
from experiments import cla_1b, sweeping
from experiments.sweeping import Trials


def _tuned(row: Config, peak_lr: float) -> Config:
    return dataclasses.replace(
        row,
        name=row.name.replace("cla_1b/", "cla_1b_tuned/"),
        optimizer=dataclasses.replace(row.optimizer, peak_lr=peak_lr),
    )


def h128_mqa() -> Config:
    """MQA, head size 128, learning rate 1.5e-3: 10,240 B."""
    return _tuned(cla_1b.h128_mqa(), 1.5e-3)


def h128_mqa_cla2() -> Config:
    """MQA and CLA2, head size 128, learning rate 2.25e-3: 5,120 B."""
    return _tuned(cla_1b.h128_mqa_cla2(), 2.25e-3)


def h64_mqa() -> Config:
    """MQA, head size 64, learning rate 2.25e-3: 5,120 B."""
    return _tuned(cla_1b.h64_mqa(), 2.25e-3)


ROWS = (h128_mqa, h128_mqa_cla2, h64_mqa)


def learning_rate() -> Trials:
    """The paper's learning-rate search for the three models: from 3e-4, by factors of 1.5."""
    models = (cla_1b.h128_mqa, cla_1b.h128_mqa_cla2, cla_1b.h64_mqa)
    return sweeping.together(
        *(sweeping.learning_rates(model(), f"{model.__name__}.lr") for model in models)
    )


SWEEPS = (learning_rate,)
