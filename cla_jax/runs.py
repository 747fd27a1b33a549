"""The run directory: the contract between training and everything that comes after it.

    runs/NAME/
        config.json      identity and placement apart, versions, fingerprint of the data; the origin of
                         a model that was imported
        tokenizer.json
        metrics.jsonl    one record a line; on a remote path metrics/FIRST.jsonl, in segments
        checkpoints/     see cla_jax.checkpoint
        profile/         traces that placement.profile asked for
        eval/*.json      one file an evaluation
        log.txt

Training or an import writes it; evaluation, generation, export and reports read only it. Paths are local or gs://.
"""

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
import re
import uuid
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import IO, Any

from etils import epath

from cla_jax import config as configs
from cla_jax import files, goodput
from cla_jax.config import Config
from cla_jax.files import is_a

log = logging.getLogger(__name__)

_VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "cla_jax")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory."""

    path: epath.Path

    @property
    def checkpoints(self) -> epath.Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> epath.Path:
        return self.path / "log.txt"

    @property
    def metrics(self) -> epath.Path:
        return self.path / "metrics.jsonl"

    @property
    def profile(self) -> epath.Path:
        return self.path / "profile"

    @property
    def is_local(self) -> bool:
        return is_local(self.path)

    def record(self) -> dict[str, Any]:
        """config.json as it stands. Raises ValueError naming a missing or broken file."""
        return _read_json(self.path / "config.json")

    def config(self) -> Config:
        """The config that the run was last started with. Raises ValueError naming a broken file."""
        return read_config(self.path / "config.json")

    def check_data(self, fingerprint: str, tokenizer_json: str) -> None:
        """Raises ValueError unless data and tokenizer are those that the run was trained with."""
        theirs = self.record().get("data_fingerprint")
        if theirs != fingerprint:
            raise ValueError(f"{self.path} was trained on data {theirs!r}, here is {fingerprint!r}")
        if self.tokenizer_json() != tokenizer_json:
            raise ValueError(
                f"{self.path / 'tokenizer.json'} is not the tokenizer that the data was prepared "
                "with; restore it, or give the run a directory of its own with --name"
            )

    def origin(self) -> dict[str, Any]:
        """Where an imported model is from; empty for one that was trained here."""
        return self.record().get("origin") or {}

    def end_ids(self, end: int, size: int) -> list[int]:
        """The ids that end a text: `end`, and those below `size` that an imported model has besides."""
        others = self.origin().get("end_ids") or []
        return list(dict.fromkeys([end, *(i for i in others if is_a(i, int) and 0 <= i < size)]))

    def tokenizer_json(self) -> str:
        file = self.path / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file} is missing: the run has not started training, or was altered")
        text = files.read_text(file, files.TOKENIZER_BYTES, links=False)
        files.parse_json(text, f"the tokenizer {file}", duplicates=True)
        return text

    def write_eval(self, name: str, record: dict[str, Any]) -> None:
        """Keeps an evaluation, unless there is one of a later step: its checkpoint may be damaged by now."""
        file = self.path / "eval" / f"{name}.json"
        known, step = self.eval(name).get("step"), record.get("step", 0)
        if isinstance(known, int) and known > step:
            log.warning(
                "%s is of step %d and kept; this evaluation is of step %d", file, known, step
            )
            return
        write_atomically(file, _dump(record))

    def eval(self, name: str) -> dict[str, Any]:
        """One evaluation; {} if there is none yet, or a damaged one."""
        with contextlib.suppress(ValueError):
            return _read_json(self.path / "eval" / f"{name}.json")
        return {}

    def evals(self) -> dict[str, dict[str, Any]]:
        """All evaluations by name: the name is the file's, the record as it was written."""
        return {file.stem: _read_json(file) for file in listed(self.path / "eval", ".json")}

    def read_records(self) -> Iterator[dict[str, Any]]:
        """Every whole line of the metrics, in the order of writing; see `metrics_record`.

        Raises ValueError if a file of them is none that can be read.
        """
        segments = [self.metrics] if self.metrics.exists() else []
        for segment in segments + listed(self.path / "metrics", ".jsonl"):
            for line in files.read_lines(segment, links=False):
                if (record := metrics_record(line)) is not None:
                    yield record

    def read_metrics(self) -> list[dict[str, Any]]:
        """The records by step: of a step that stands there twice, the last whole one counts.

        Those of the run's time are left out: they are of no step. See cla_jax.goodput.
        """
        records: dict[int, dict[str, Any]] = {}
        for record in self.read_records():
            if not goodput.is_account(record):
                # Training and evaluation of one step are two records with different keys.
                records[record["step"]] = records.get(record["step"], {}) | record
        return [records[step] for step in sorted(records)]


def metrics_record(line: bytes) -> dict[str, Any] | None:
    """A line of the metrics; None for one that a crash has torn, or that is no record of numbers."""
    try:
        record = files.parse_json(line, "a line of the metrics", finite=False)
    except ValueError:
        return None
    if not isinstance(record, dict) or not files.is_a(step := record.get("step"), int):
        return None
    numbers = {key: value for key, value in record.items() if value is not None}
    whole = all(files.is_a(value, float) for value in numbers.values())
    return numbers if whole and 0 <= step < 2**53 else None


def run_path(config: Config) -> epath.Path:
    """Where a run lives."""
    return epath.Path(config.placement.runs) / config.name


def open_run(
    config: Config, *, data_fingerprint: str, tokenizer_json: str, write: bool = True
) -> Run:
    """The directory for a config: made if new, continued if the same run; `write` off only checks.

    Raises ValueError, showing the difference, if the directory belongs to a run with another identity,
    other data or another tokenizer, or if nothing says whose its checkpoints are. A different placement
    just continues.
    """
    run = Run(run_path(config))
    record = _record(config, data_fingerprint)
    if (run.path / "config.json").exists():
        check_identity(run, config, {"data_fingerprint": data_fingerprint})
        if (run.path / "tokenizer.json").exists():
            run.check_data(data_fingerprint, tokenizer_json)
    elif saved_steps(run.checkpoints):
        raise ValueError(
            f"{run.path / 'config.json'} is missing, and with it what run the checkpoints beside it are "
            "of: restore it, or give this run a directory of its own with --name"
        )
    if write:
        write_atomically(run.path / "config.json", _dump(record))
        write_atomically(run.path / "tokenizer.json", tokenizer_json)
    return run


def _record(config: Config, data_fingerprint: str) -> dict[str, Any]:
    further = {"data_fingerprint": data_fingerprint, "versions": versions()}
    return configs.to_record(config) | further


@contextlib.contextmanager
def new_run(
    config: Config, *, data_fingerprint: str, tokenizer_json: str, origin: dict[str, Any]
) -> Iterator[Run]:
    """Makes a run directory whole or not at all, for a model that was not trained here.

    Yields it under another name, for checkpoints to be written; it gets its own when the block ends, and
    is removed if that raises. `origin` says where the model is from. Raises ValueError if there is
    something in its place.
    """
    path = run_path(config)
    if not is_local(path):
        raise ValueError(f"{path}: a run is imported to a local path; copy it from there")
    if path.exists():
        raise ValueError(f"{path} exists already: remove it, or choose another directory")
    partial = path.parent / f".{path.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    with open(partial / ".lock", "w") as lock:
        if not try_lock(lock):
            raise ValueError(f"{path} is being written by another process")
        for left in partial.iterdir():  # of a process that was killed
            if left.name != ".lock":
                left.rmtree() if left.is_dir() else left.unlink()
        try:
            yield Run(partial)
            write_atomically(partial / "tokenizer.json", tokenizer_json)
            record = _record(config, data_fingerprint) | {"origin": origin}
            write_atomically(partial / "config.json", _dump(record))
            (partial / ".lock").unlink()
            os.rename(partial, path)
        except BaseException:
            partial.rmtree()
            raise


def check_identity(run: Run, config: Config, further: Mapping[str, Any]) -> None:
    """Raises ValueError, showing the difference, if a run directory belongs to another run.

    `further`: what else of its config.json must be the same.
    """
    record = run.record()
    # By way of a Config: a field that is younger than the run has its default there.
    theirs = configs.identity(run.config()) | {key: record.get(key) for key in further}
    difference = configs.difference(configs.identity(config) | dict(further), theirs)
    if difference:
        lines = [f"  {key}: {b!r} there, {a!r} asked for" for key, (a, b) in difference.items()]
        raise ValueError(
            f"{run.path} holds another run:\n"
            + "\n".join(lines)
            + "\nGive this one a directory of its own with --name, or remove that one."
        )


@contextlib.contextmanager
def locked(path: epath.Path) -> Iterator[None]:
    """Keeps a second process of this machine from training the run at a path; a crash frees it.

    Raises ValueError if one does. A remote run directory cannot be locked.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: remove it, or use another --name")
    for place in path.parents if is_local(path) else ():
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file: --placement.runs or --name has to lead elsewhere")
    if not is_local(path):
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    with open(path / ".lock", "w") as file:
        if not try_lock(file):
            raise ValueError(f"{path} is being trained by another process")
        yield


def try_lock(file: IO, *, shared: bool = False) -> bool:
    """Locks an open file until it is closed, here and in child processes that inherit it; False if it is.

    A shared lock is one of many, for those who only look whether a process holds a lock of its own.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def saved_steps(checkpoints: epath.Path) -> list[int]:
    """The steps of the complete checkpoints, ascending: those with a manifest."""
    return sorted(
        int(file.stem)
        for file in listed(checkpoints, ".json")
        if re.fullmatch(r"\d{8,18}", file.stem, re.ASCII)
    )


def listed(directory: epath.Path, suffix: str) -> list[epath.Path]:
    """What a directory has with a suffix, sorted; nothing if it is none.

    Not by a glob: that takes a bracket anywhere in the path for a pattern.
    """
    found = directory.iterdir() if directory.is_dir() else ()
    return sorted(file for file in found if file.suffix == suffix)


def find_runs(paths: Iterable[str | os.PathLike]) -> list[Run]:
    """The runs at or below the paths: run directories, or study directories holding them.

    Raises ValueError if a path holds none.
    """
    runs: list[Run] = []
    for path in map(epath.Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist")
        found = _runs_below(path)
        if not found:
            raise ValueError(f"{path} is neither a run directory nor holds any (no config.json)")
        runs += [run for run in found if run not in runs]
    return runs


def _runs_below(directory: epath.Path) -> list[Run]:
    if (directory / "config.json").exists():
        return [Run(directory)]
    children = sorted(
        child for child in directory.iterdir() if child.is_dir() and child.name[0] != "."
    )
    return [run for child in children for run in _runs_below(child)]


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


def write_atomically(file: epath.Path, text: str) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if not is_local(file):
        file.write_text(text)  # object stores replace whole objects
        return
    temporary = file.parent / f".{file.name}.{uuid.uuid4().hex}"
    try:
        with open(temporary, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(out.fileno())
        os.replace(temporary, file)
    except OSError as error:  # a full disk, say
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, os.fspath(file)) from error


def read_config(file: epath.Path) -> Config:
    """The config in a file that holds one: a run's config.json. Raises ValueError naming the file."""
    record = _read_json(file)
    with files.about(file):
        return configs.from_record(record)


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


def _read_json(file: epath.Path) -> dict[str, Any]:
    # An evaluation of a model that diverged may hold infinite numbers; a config refuses them itself.
    return files.read_object(file, links=False, finite=False)


def versions() -> dict[str, str]:
    """The versions here of the packages that decide what a run computes."""
    return {name: _version(name) for name in _VERSIONED}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
