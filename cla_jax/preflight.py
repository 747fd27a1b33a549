"""What can be known to be wrong with a run before anything is made, prepared or compiled."""

import errno
import os
import tempfile
from pathlib import Path

from cla_jax import directories, extras, names, runs, start
from cla_jax.config import Config, FromRun

_WANDB = "/\\#?%:"  # what the name of a project there may not hold


def check(config: Config, *, leads: bool = True) -> None:
    """Raises ValueError for a missing package, a directory that cannot be used, or another run's name.

    `leads`: whether this process writes the metrics, and so needs the packages for them.
    """
    if leads:
        check_trackers(config)
    placement = config.placement
    for field, source in config.data.named_sources:
        if source.lower().endswith(".zst"):
            extras.require("zstd", f"{field} = {source!r}")
    for field in ("runs", "data_dir"):
        check_directory(f"placement.{field}", getattr(placement, field))
    run = runs.Run(runs.run_path(config))
    if directories.is_local(run.path):
        _check_parents(f"name = {config.name!r}", Path(run.path))
        _check_neighbours(config, Path(run.path))
    begun = (run.path / "config.json").exists() and run.has_begun
    if begun:
        runs.check_identity(run, config)
    # A run that has begun no longer needs the other one, unless that teaches it.
    if isinstance(config.start, FromRun) and (config.start.distill_weight or not begun):
        start.check_start(config)


def _check_neighbours(config: Config, path: Path) -> None:
    """Raises ValueError for a run inside another run, above other runs, or in the place of prepared data.

    Commands that take a directory of runs look no further below a run.
    """
    root, data = Path(config.placement.runs).absolute(), config.placement.data_dir
    place = path.absolute()
    if "://" not in data and place == Path(data).absolute():
        raise ValueError(
            f"name = {config.name!r}: {path} is placement.data_dir; choose another name"
        )
    for above in place.parents:
        if above.is_relative_to(root) and (above / "config.json").exists():
            if above == root:
                raise ValueError(
                    f"placement.runs = {config.placement.runs} is a run, so no run can be made in it"
                )
            name = above.relative_to(root)
            raise ValueError(
                f"name = {config.name!r} lies inside another run, {name}: choose another name"
            )
    if place.is_dir() and not (place / "config.json").exists():
        configs = (file for depth in ("*", "*/*") for file in place.glob(f"{depth}/config.json"))
        if below := next(configs, None):
            name = below.parent.relative_to(root)
            raise ValueError(
                f"name = {config.name!r} is a directory of runs, such as {name}: choose another name"
            )


def check_trackers(config: Config) -> None:
    """Raises ValueError if what the metrics are sent to is not installed, or takes no such project."""
    placement = config.placement
    if placement.tensorboard:
        extras.require("tensorboard", "placement.tensorboard")
    if placement.wandb:
        extras.require("wandb", "placement.wandb")
        if odd := set(placement.wandb) & set(_WANDB):
            raise ValueError(
                f"placement.wandb = {placement.wandb!r}: a project name may not contain {min(odd)!r}"
            )


def check_directory(field: str, path: str) -> None:
    """Raises ValueError, which begins with the field, for a place where nothing can be written."""
    if "://" in path:
        extras.require("gcs", f"{field} = {path!r}")
        return
    absolute = os.path.abspath(path)
    names.check_path(field, absolute)  # the directory in which we are called is a part of it
    _check_parents(f"{field} = {path!r}", Path(absolute))


def _check_parents(what: str, path: Path) -> None:
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not existing.is_dir():
        kind = "a broken link" if not existing.exists() else "a file"
        raise ValueError(f"{what}: {existing} is {kind}, not a directory")
    if existing == path:
        return
    try:
        # Its permissions do not tell: root may do everything, and still nothing can be made in /proc.
        os.rmdir(tempfile.mkdtemp(prefix=".cla_jax-", dir=existing))
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        words = f"{what}: {existing} may not be written to: {error.strerror}"
        raise ValueError(words) from None
