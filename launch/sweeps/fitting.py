"""Whether the trials of a plan fit what they are to run on, before anything is paid for."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

from etils import epath

from cla_jax import files
from cla_jax.config import Config, FromRun, OptimizerConfig, Placement, Scratch
from cla_jax.directories import write_atomically
from cla_jax.fields import replaced
from launch import compilation_cache
from launch.sweeps.trials import LaunchPlan

COMPILERS = ("libtpu", "jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12")
_LIBRARY = Path(__file__).parents[2] / "cla_jax"
# What of the placement does not change what a step needs.
_BESIDE = (
    "log_every",
    "save_every",
    "keep",
    "eval_every",
    "profile",
    "eval_batch_size",
    "tensorboard",
    "wandb",
    "runs",
    "data_dir",
)


def shape(config: Config) -> Config:
    """The config with everything put aside that does not change what its step needs.

    Two hundred trials that differ in learning rate, seed and text have one shape, and it is compiled once.
    """
    usual = Placement()
    taught = isinstance(config.start, FromRun) and config.start.distill_weight > 0
    return replaced(
        config,
        {
            "name": "shape",
            "steps": 1000,
            "seed": 0,
            "optimizer": OptimizerConfig(),
            "start": config.start if taught else Scratch(),
            "data.source": "sotu",
            "data.mixture": (),
            "data.stages": (),
            "data.tokenizer": "tokenizer.json",
            "data.end_token": "",
            "data.held_out": 0.5,
            **{f"placement.{field}": getattr(usual, field) for field in _BESIDE},
        },
    )


def check(plan: LaunchPlan, progress: Callable[[str], None] = lambda said: None) -> dict[str, str]:
    """The trials that cannot run on the plan's topology, each with the reason.

    A shape is compiled once for a topology. The result is stored next to the compiled programs, under the
    shape, the compiler's version and the library's own text. Raises ValueError for a topology that the
    planner does not know, and if its compiler is missing.
    """
    shapes: dict[Config, list[str]] = {}
    for trial in plan.trials:
        shapes.setdefault(shape(trial.config), []).append(trial.name)
    resources = plan.trials[0].resources
    if not resources.topology:
        return {}
    library, place = _library(), _place()
    reasons = {}
    for number, (config, names) in enumerate(shapes.items(), 1):
        key = json.dumps([dataclasses.asdict(config), dataclasses.asdict(resources), library])
        file = place / f"fits-{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        reason = None
        if file.exists():
            with contextlib.suppress(ValueError):  # a damaged file costs another compilation
                reason = files.field(files.read_object(file), "reason", str, file)
        if reason is None:
            progress(
                f"compiling shape {number} of {len(shapes)} for {resources.topology}: {names[0]}"
            )
            reason = _ask(config, resources.topology, resources.slices, Path(place))
            write_atomically(file, json.dumps({"reason": reason}) + "\n")
        reasons |= dict.fromkeys(names, reason) if reason else {}
    return reasons


def _ask(config: Config, topology: str, slices: int, cache: Path) -> str:
    """Why a config does not fit, by the planner; empty if it does."""
    from launch.plan import compiling_elsewhere, planner

    with compiling_elsewhere():
        planning = planner()
        devices = planning.topologies.topology(topology, slices)
        try:
            plan = planning.plan(config, devices, cache)
        except ValueError as error:  # the mesh or the batch does not fit the devices
            return str(error)
    if plan.fits:
        return ""
    gib = lambda size: f"{size / 2**30:.1f} GiB"
    of = f" of {gib(plan.memory)}" if plan.memory else ""
    return f"does not fit {devices}: needs {gib(plan.peak)}{of} per device. To make it fit: {plan.advice}"


def _place() -> epath.Path:
    """Where verdicts are kept, beside the compiled programs."""
    place = compilation_cache.directory()
    if place is None:
        raise ValueError(
            "no private cache directory for the planner's results: set XDG_CACHE_HOME to a directory that "
            "only you can write to"
        )
    return epath.Path(place) / "plans"


def _library() -> str:
    """What decides a step besides its config: our own text, and the compilers."""
    digest = hashlib.sha256()
    for file in sorted(_LIBRARY.rglob("*.py")):
        digest.update(file.read_bytes())
    for name in ("jax", "jaxlib", *COMPILERS, "flax", "optax"):
        for distribution in importlib.metadata.distributions(name=name):
            digest.update(f"{name} {distribution.version}".encode())
    return digest.hexdigest()
