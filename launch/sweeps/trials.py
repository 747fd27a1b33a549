"""The launch plan: a sweep as data that every engine can render, made without any engine."""

import collections
import contextlib
import dataclasses
import inspect
import operator
import shlex
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath

import experiments
from cla_jax import chips, directories, extras, fields, files, names, runs
from cla_jax.config import Config
from cla_jax.messages import near_choice
from experiments.sweeping import Pending, Result
from launch.cli import read_config, refuse_unused, unused_flags
from launch.sweeps import records, tpus
from launch.sweeps.records import Record
from launch.sweeps.retry import Retry

_NAME_AT = 4  # in the command of a trial: python -m launch.trial SWEEP NAME
RESERVED = ("lock", "sweep.json", "jobs", "optuna.log")  # beside the records of trials


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resources:
    """What a trial runs on. Without a topology: what the engine gives it."""

    topology: str = ""  # of one slice, v5e:16x16 or h100:16x8
    slices: int = 1
    hosts: int = 1  # of all slices together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a sweep, and how to start it."""

    name: str
    config: Config
    directory: str  # of the run
    command: tuple[str, ...]
    environment: Mapping[str, str]
    resources: Resources
    priority: str
    retry: Retry

    def job(self, number: int = 1) -> str:
        """A name that every engine accepts, the same for the same trial and submission: a-z, 0-9 and -."""
        return f"t-{names.word(self.name, key=f'{self.directory} {number}')}"

    @property
    def settings(self) -> tuple[str, ...]:
        """Words before the command, in a script, that set the variables for it and for nothing else there."""
        values = (f"{name}={value}" for name, value in self.environment.items())
        return ("env", *values) if self.environment else ()

    def around_name(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The command before and after the trial's name: by position, for another word may equal the name."""
        assert self.command[_NAME_AT] == self.name
        return self.command[:_NAME_AT], self.command[_NAME_AT + 1 :]

    def shell(self) -> str:
        """The command as a line for a shell."""
        return shlex.join(self.command)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """Trials that can be started now, and what the sweep waits for beyond them."""

    sweep: str
    directory: epath.Path
    trials: tuple[Trial, ...]
    waits_for: str = ""  # empty: there will be no more trials
    found: Any = None  # what the sweep returned, once it has ended
    unread: str = ""  # why a dry run could not read how the trials fare


def sweep_name(sweep: str) -> str:
    """`demo.learning_rate`, or `path/to/demo.py:learning_rate`, is the study `demo/learning_rate`."""
    return experiments.short_name(sweep).replace(".", "/")


def make(
    sweep: str,
    *,
    overrides: Sequence[str] = (),
    result: Callable[[Config], Result] | None = None,
    resources: Resources = Resources(),
    environment: Mapping[str, str] | None = None,
    priority: str = "",
    retry: Retry = Retry(),
    python: str = sys.executable,
    dry: bool = False,
) -> LaunchPlan:
    """The plan of a sweep, from its function and the results so far.

    Args:
      sweep: its name.
      overrides: fields for every trial, as launch.train takes them.
      result: what has become of a trial; by default nothing has.
      environment: variables for the trials.
      priority: the engine's word for it.
      python: the interpreter where the trials run.
      dry: leave the sweep's own files alone, working on a copy.

    Raises:
      ValueError: for an unknown sweep or field, a flag without an effect on any trial, a name that is given
        twice or cannot be a directory.
    """
    function = experiments.find_sweep(sweep)
    trials: dict[str, Trial] = {}
    change = _changes(overrides)
    directory, unread = None, ""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = []
        if inspect.signature(function).parameters:
            # Where the sweep's runs are is known from a config alone; the files of a sweep lie beside them.
            first = change(next(iter(experiments.rows().values()))())
            own = _directory(first, sweep) / ".sweep"
            unread = _unreadable(own) if dry else ""
            arguments = [(Path(scratch) if unread else _copy(own, Path(scratch))) if dry else own]
        generator = function(*arguments)
        if not isinstance(generator, Generator):
            raise ValueError(
                f"{sweep} yields no trials: a sweep is a generator. An experiment is started by "
                f"`python -m launch.train {sweep}`"
            )
        waits_for, returned, answer = "", None, None
        unused: dict[str, str] | None = None  # flags without an effect on any trial so far
        while True:
            try:
                name, config = generator.send(answer)  # type: ignore  # None the first time
            except Pending as waits:
                waits_for = str(waits)
                break
            except StopIteration as end:
                returned = end.value
                break
            _check_name(name, trials)
            changed = change(config)
            found = unused_flags(config, changed, overrides)
            unused = {flag: why for flag, why in found.items() if unused is None or flag in unused}
            config = dataclasses.replace(changed, name=f"{sweep_name(sweep)}/{name}")
            here = _directory(config, sweep)
            if directory not in (None, here):
                raise ValueError(
                    f"trial {name!r} has placement.runs = {config.placement.runs!r}, but all trials of a "
                    "sweep need the same"
                )
            directory = here
            config = _sliced(config, resources.slices)
            trials[name] = _trial(
                *(name, config, here, python, resources, environment or {}, priority, retry)
            )
            unread = unread or (_unreadable(here) if dry else "")
            unknown = Result(name=name, config=config)
            answer = unknown if result is None or unread else result(config)
    refuse_unused(unused or {})
    if directory is None:
        raise ValueError(f"{sweep} has no trial to launch{waits_for and f': {waits_for}'}")
    return LaunchPlan(
        sweep=experiments.short_name(sweep),
        directory=directory,
        trials=tuple(trials.values()),
        waits_for=waits_for,
        found=returned,
        unread=unread,
    )


def _trial(
    name: str,
    config: Config,
    sweep: epath.Path,
    python: str,
    resources: Resources,
    environment: Mapping[str, str],
    priority: str,
    retry: Retry,
) -> Trial:
    options = {
        "--failures": (retry.failures, Retry.failures),
        "--preemptions": (retry.preemptions, Retry.preemptions),
        "--delay": (retry.delay, Retry.delay),
        "--hosts": (resources.hosts, 1),
    }
    flags = [str(x) for flag, (v, usual) in options.items() if v != usual for x in (flag, v)]
    return Trial(
        name=name,
        config=config,
        directory=str(sweep / name),
        command=(python, "-m", "launch.trial", str(sweep), name, *flags),
        environment=dict(environment),
        resources=resources,
        priority=priority,
        retry=retry,
    )


def _directory(config: Config, sweep: str) -> epath.Path:
    return epath.Path(config.placement.runs) / sweep_name(sweep)


def _unreadable(directory: epath.Path) -> str:
    """Why nothing can be read there from here; empty if it can."""
    if directories.is_local(directory) or extras.there("gcs"):
        return ""
    return f"{directory} is not read without the extra `gcs`: {extras.how('gcs')}"


def _check_name(name: str, others: Iterable[str]) -> None:
    names.check_trial(name)
    if name in RESERVED:
        raise ValueError(f"trial {name!r}: sweeps have a file with this name; choose another")
    if name in others:
        raise ValueError(f"two trials are called {name!r}: each needs a run directory of its own")


def _sliced(config: Config, slices: int) -> Config:
    return config if slices == 1 else fields.replaced(config, {"placement.mesh.slice": slices})


def _copy(own: epath.Path, scratch: Path) -> Path:
    """What a sweep keeps for itself: the plain files of its directory."""
    for file in directories.listed(own, ".log"):
        content = files.read_bytes(file, files.LINES_BYTES, links=False)
        (scratch / file.name).write_bytes(content)
    return scratch


def _changes(overrides: Sequence[str]) -> Callable[[Config], Config]:
    """Puts a command line's fields into a config. tyro reads the values once, for two hundred trials."""
    if not overrides:
        return lambda config: config
    given: dict[str, Any] = {}

    def change(config: Config) -> Config:
        if not given:
            usage = "python -m launch.sweep NAME [FLAGS] --"
            parsed = read_config(config, overrides, check_effects=False, prog=usage)
            flags = [
                flag[2:].partition("=")[0].replace("-", "_")
                for flag in overrides
                if flag[:2] == "--"
            ]
            for flag in flags:
                head, _, last = flag.rpartition(".")
                positive = f"{head}.{last.removeprefix('no_')}".lstrip(".")
                for field in (flag, positive):
                    with contextlib.suppress(AttributeError):
                        given[field] = operator.attrgetter(field)(parsed)
        return fields.replaced(config, given)

    return change


# ------------------------------------------------------------------------------ how trials fare


class Results:
    """Looks results up in run directories, each only until there is one."""

    def __init__(self):
        self.known: dict[str, Result] = {}

    def __call__(self, config: Config) -> Result:
        if config.name not in self.known:
            record = record_of(config)
            unknown = Result(name=record.name, config=config)
            if misplaced(config, record):
                return unknown
            metrics, state = records.result(record.run, config.steps), record.state()
            given_up = state.status == "failed"
            result = dataclasses.replace(
                unknown, metrics=metrics, diverged=state.diverged, failed=given_up
            )
            if not result.known:
                return result
            self.known[config.name] = result
        return self.known[config.name]


def record_of(config: Config) -> Record:
    """The record of a trial, whose config is named SWEEP/TRIAL."""
    sweep, _, name = config.name.rpartition("/")
    return Record(epath.Path(config.placement.runs) / sweep, name)


def misplaced(config: Config, record: Record) -> str:
    """Why a trial cannot have its run directory and its record; empty if it can."""
    try:
        for read in (record.state, record.submission, lambda: records.last_records(record.run)):
            read()  # damaged, they are this trial's trouble alone
        if (record.run.path / "config.json").exists():
            runs.check_identity(record.run, config)
    except ValueError as error:
        return str(error)
    return ""


def count(statuses: Iterable[str]) -> str:
    """`3 done, 1 failed`."""
    return ", ".join(f"{n} {status}" for status, n in collections.Counter(statuses).items())


def resources(topology: str, slices: int, vms: bool = False) -> Resources:
    """What a trial gets: GPU nodes, or TPUs on GKE or in Cloud TPU VMs.

    Raises ValueError for a topology that does not exist.
    """
    if not topology:
        if slices != 1:
            raise ValueError(f"--slices {slices} needs a --topology")
        return Resources()
    near_choice("kind of accelerator", topology.partition(":")[0], chips.TOPOLOGIES)
    if chips.is_gpu(topology):
        hosts, _ = chips.gpu_shape(topology)
        return Resources(topology=topology, slices=slices, hosts=hosts * slices)
    slice_ = tpus.find(topology)
    hosts = slice_.vms if vms else slice_.hosts
    return Resources(topology=topology, slices=slices, hosts=hosts * slices)
