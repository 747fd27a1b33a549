"""Experiments by name: `study.row`, one function each, returning a complete config.

To add one, write a function that returns a `Config` (usually `dataclasses.replace` of another row) and
list it in its module's ROWS. `python -m launch.train NAME` then knows it, and its resolved config
becomes a golden file under tests/golden (`make golden`).

A sweep is a generator of (name, config), listed in its module's SWEEPS (see experiments/sweeping.py), for
`python -m launch.sweep NAME`. A study is a sweep too: of its rows.
"""

from collections.abc import Callable, Iterator

from cla_jax.config import Config, near_choice
from experiments import cla_1b, cla_1b_tuned, cla_3b, demo, small, smoke
from experiments.sweeping import Trials

STUDIES = {
    "demo": demo,
    "small": small,
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


def sweeps() -> dict[str, Callable[..., Trials]]:
    """Every sweep, by its name; those that take an argument are given a directory for files of their own."""
    listed = {
        f"{study}.{sweep.__name__}": sweep
        for study, module in STUDIES.items()
        for sweep in getattr(module, "SWEEPS", ())
    }
    return listed | {study: _all_rows(study) for study in STUDIES}


def _all_rows(study: str) -> Callable[[], Trials]:
    def every_row() -> Iterator[tuple[str, Config]]:
        for row in STUDIES[study].ROWS:
            yield row.__name__, row()

    every_row.__doc__ = f"Every row of the study: {(STUDIES[study].__doc__ or '').splitlines()[0]}"
    return every_row  # type: ignore  # a generator that takes no results


def find_sweep(name: str) -> Callable[..., Trials]:
    """Raises ValueError with the nearest names."""
    known = sweeps()
    near_choice("sweep", name, known)
    return known[name]
