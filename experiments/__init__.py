"""Experiments by name: `study.row`, one function each, returning a complete config.

To add one, write a function that returns a `Config` (usually `dataclasses.replace` of another row) and
list it in its module's ROWS. `python -m launch.train NAME` then knows it, and its resolved config
becomes a golden file under tests/golden (`make golden`).

A sweep is a generator of (name, config), listed in its module's SWEEPS (see experiments/sweeping.py), for
`python -m launch.sweep NAME`. A study is a sweep too: of its rows.

A study that is declared before it is run (see cla_jax/study.py) stands in its module's STUDIES, under the
name of the sweep that runs it: `python -m launch.compare --study small.main`.

Every module in this directory that has ROWS or SWEEPS is a study. A file anywhere else is one too:
`path/to/mine.py` names its rows, `path/to/mine.py:row` one row or sweep of it.
"""

import dataclasses
import functools
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from cla_jax.config import Config
from cla_jax.messages import near_choice
from cla_jax.study import Declared
from experiments.sweeping import Trials


def rows() -> dict[str, Callable[[], Config]]:
    """Every experiment of this directory, by its name."""
    return _members(_studies(), "ROWS")


def find(name: str) -> list[Config]:
    """The config of a row, or of every row of a study. Raises ValueError with the nearest names."""
    short, studies, known = _known(name, "ROWS")
    if short in studies:
        return [_config(full, row) for full, row in known.items()]
    near_choice("experiment", short, [*studies, *known])
    return [_config(short, known[short])]


def find_row(name: str) -> Config:
    """The config of a row. Raises ValueError with the nearest names, or a row of the study that it names."""
    config, *others = find(name)
    if others:
        raise ValueError(f"{name!r} is a study: give one of its rows, such as {config.name}")
    return config


def sweeps() -> dict[str, Callable[..., Trials]]:
    """Every sweep, by its name; those that take an argument are given a directory for files of their own."""
    studies = _studies()
    return _members(studies, "SWEEPS") | _whole(studies)


def find_sweep(name: str) -> Callable[..., Trials]:
    """Raises ValueError with the nearest names."""
    short, studies, known = _known(name, "SWEEPS")
    known |= _whole(studies)
    near_choice("sweep", short, known)
    return known[short]


def find_study(name: str) -> Declared:
    """A declared study, `small.main`, with the run that each row should have with each seed.

    Raises ValueError with the nearest names.
    """
    short, studies, _ = _known(name, "SWEEPS", empty=True)
    known = {
        f"{study}.{key}": (module, key)
        for study, module in studies.items()
        for key in getattr(module, "STUDIES", ())
    }
    near_choice("declared study", short, known)
    module, key = known[short]
    study, sweep = module.STUDIES[key], getattr(module, key)
    trials = {}
    for trial, config in sweep():
        row, _, seed = trial.rpartition(".seed-")
        directory = short.replace(".", "/")
        trials[row, int(seed)] = dataclasses.replace(config, name=f"{directory}/{trial}")
    wanted = {(row, seed) for row, count in study.rows.items() for seed in range(count)}
    if set(trials) != wanted:
        raise ValueError(f"the sweep {short} does not yield the rows and seeds that its study has")
    return Declared(name=short, study=study, trials=trials)


def is_declared(name: str) -> bool:
    """Whether a sweep runs a declared study, which has its name."""
    try:
        find_study(name)
    except ValueError:
        return False
    return True


def short_name(name: str) -> str:
    """The name of a row, sweep or study without the directory of its file: `mine.row` of `a/mine.py:row`."""
    file, row = _split(name)
    return name if file is None else ".".join(filter(None, (file.stem, row)))


def names_a_file(name: str) -> bool:
    """Whether a name is of a file of experiments, not of this directory's."""
    return _split(name)[0] is not None


def summary(function: Callable[..., Any]) -> str:
    """The first line of what a row or sweep says about itself; empty if it says nothing."""
    return _first_line(function.__doc__)


# ------------------------------------------------------------------------------------- studies


def _studies() -> dict[str, ModuleType]:
    """The modules of this directory that have rows or sweeps, by their names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = {name: importlib.import_module(f"{__name__}.{name}") for name in names}
    return {name: module for name, module in modules.items() if _is_study(module)}


def _known(
    name: str, kind: str, *, empty: bool = False
) -> tuple[str, dict[str, ModuleType], dict[str, Any]]:
    """The name in short, the studies that it may be of, and their rows or sweeps."""
    file, function = _split(name)
    if file is None:
        studies = _studies()
        if name in studies:
            studies = {name: studies[name]}
        return name, studies, _members(studies, kind)
    module = _load(file.resolve())
    known = _members({file.stem: module}, kind)
    if function and callable(row := getattr(module, function, None)):
        known.setdefault(f"{file.stem}.{function}", row)  # one that is named need not be listed
    if not known and not function and not empty:
        raise ValueError(f"{file} lists nothing in {kind}: name a function of it, {file}:NAME")
    return short_name(name), {file.stem: module}, known


def _split(name: str) -> tuple[Path | None, str]:
    """(file, row) of `path/to/file.py:row`; no file for a name of this directory."""
    file, _, row = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    return (Path(file), row) if file.endswith(".py") else (None, name)


@functools.cache
def _load(file: Path) -> ModuleType:
    """The module in a file. Raises ValueError if there is no such file."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist: give path/to/file.py or path/to/file.py:row")
    spec = importlib.util.spec_from_file_location(str(file), file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _is_study(module: ModuleType) -> bool:
    return hasattr(module, "ROWS") or hasattr(module, "SWEEPS")


def _members(studies: dict[str, ModuleType], kind: str) -> dict[str, Any]:
    """The functions that the studies list in ROWS or SWEEPS, by their names."""
    return {
        f"{study}.{function.__name__}": function
        for study, module in studies.items()
        for function in getattr(module, kind, ())
    }


def _config(name: str, row: Callable[[], Config]) -> Config:
    """Raises ValueError for a function that is no row, a sweep say."""
    config = row()
    if not isinstance(config, Config):
        raise ValueError(
            f"{name} is no experiment: it returns {type(config).__name__}; a sweep is launched with "
            "`python -m launch.sweep`"
        )
    return config


def _whole(studies: dict[str, ModuleType]) -> dict[str, Callable[..., Trials]]:
    """A study as the sweep of its rows."""
    return {
        study: _all_rows(module) for study, module in studies.items() if hasattr(module, "ROWS")
    }


def _all_rows(study: ModuleType) -> Callable[[], Trials]:
    def every_row() -> Iterator[tuple[str, Config]]:
        for row in study.ROWS:
            yield row.__name__, row()

    every_row.__doc__ = f"All rows of the study. {_first_line(study.__doc__)}"
    return every_row  # type: ignore  # a generator that takes no results


def _first_line(text: str | None) -> str:
    return next(iter((text or "").strip().splitlines()), "")
