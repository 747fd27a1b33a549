"""Experiments by name: `study.row`, one function each, returning a complete config.

To add one, write a function that returns a `Config` (usually `dataclasses.replace` of another row) and
list it in its module's ROWS. `python -m launch.train NAME` then knows it, and its resolved config
becomes a golden file under tests/golden (`make golden`).
"""

from collections.abc import Callable

from cla_jax.config import Config, near_choice
from experiments import cla_1b, cla_1b_tuned, cla_3b, demo, smoke

STUDIES = {
    "demo": demo,
    "smoke": smoke,
    "cla_1b": cla_1b,
    "cla_1b_tuned": cla_1b_tuned,
    "cla_3b": cla_3b,
}


def rows() -> dict[str, Callable[[], Config]]:
    """Every experiment, by its name."""
    return {
        f"{study}.{row.__name__}": row for study, module in STUDIES.items() for row in module.ROWS
    }


def find(name: str) -> list[Config]:
    """The config of a row, or of every row of a study. Raises ValueError with the nearest names."""
    known = rows()
    if name in STUDIES:
        return [row() for full, row in known.items() if full.startswith(f"{name}.")]
    near_choice("experiment", name, [*STUDIES, *known])
    return [known[name]()]
