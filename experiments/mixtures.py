"""Which mixture of two sources is best for a model? On two CPU cores.

Speeches are the embedded corpus, prose is English Wikipedia. The rows differ in the weights alone; the last
one changes them when four fifths of the steps are done. Every source has held-out text of its own, and
`launch.compare` shows the bits per byte of each in a column.

    python -m launch.data fetch enwik8
    python -m launch.sweep mixtures.weights --local.workers 2
    python -m launch.compare runs/mixtures/weights
"""

from cla_jax.config import Component, Config, Stage
from cla_jax.fields import replaced
from experiments.small import CORPUS, h16_mqa_cla2
from experiments.sweeping import Trials


def _mixture(name: str, speeches: float, prose: float, *stages: Stage) -> Config:
    parts = (
        Component(name="speeches", source="sotu", weight=speeches),
        Component(name="prose", source=CORPUS, weight=prose),
    )
    changes = {"name": f"mixtures/{name}", "data.mixture": parts, "data.stages": stages}
    return replaced(h16_mqa_cla2(), changes | {"steps": 500})


def even() -> Config:
    """Half speeches, half prose."""
    return _mixture("even", 0.5, 0.5)


def mostly_speeches() -> Config:
    """90 % speeches, 10 % prose."""
    return _mixture("mostly_speeches", 0.9, 0.1)


def mostly_prose() -> Config:
    """10 % speeches, 90 % prose."""
    return _mixture("mostly_prose", 0.1, 0.9)


def speeches_last() -> Config:
    """Mostly prose; only speeches in the last fifth of the steps."""
    return _mixture("speeches_last", 0.1, 0.9, Stage(step=400, weights=(("speeches", 1.0),)))


ROWS = (even, mostly_speeches, mostly_prose, speeches_last)


def weights() -> Trials:
    """Three seeds of each row."""
    for row in ROWS:
        for seed in range(3):
            yield f"{row.__name__}.seed-{seed}", replaced(row(), {"seed": seed})


SWEEPS = (weights,)
