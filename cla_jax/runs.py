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

What is recorded names the run that it belongs to, and has a checksum (see cla_jax.seals). That of config.json
leaves out the placement, which may be edited. config.json has the checksum of tokenizer.json too. What was
altered is named and not used, and it is never deleted. A run directory must not hold links: what is written
there stays there.

The `format` in config.json says what a run has had from its beginning. Without it, or with 1: its first
records may have no checksum. With 2: every record has one, and metrics, checkpoints and the last evaluation
tell of each other what is missing at their ends (see `Run.missing_records`).
"""

import contextlib
import dataclasses
import difflib
import errno
import hashlib
import json
import logging
import os
import re
import shlex
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from typing import Any

from etils import epath

from cla_jax import eviction, fields, files, goodput, seals
from cla_jax.config import Config, check_chunk
from cla_jax.config.record import from_record, run_identity, to_record
from cla_jax.directories import (
    check_links,
    is_local,
    listed,
    lock,
    open_plain,
    remove_partial,
    set_aside,
    try_lock,
    write_atomically,
)
from cla_jax.files import is_a
from cla_jax.formats import FORMATS
from cla_jax.seals import Altered

log = logging.getLogger(__name__)

_LONGER = (
    " The learning rate is planned over all steps, so a run cannot be made longer: with another --name it "
    "is trained from the beginning."
)
_RESTORE = "Undo the change, or restore the file from a copy: until then the run is not used"
# Notes in the metrics, each a step. SAVED is the newest checkpoint that is known to be complete. RECORDED is
# the newest evaluation of training that is a file too.
SAVED, RECORDED = "saved", "recorded"
TRAINING = "training"  # the name of that file, and the method of its evaluation
# Fields of evaluations that had other names: what they were, and what they are.
_RENAMED = {
    "per_slot": "per_kv_layer",
    "readers_per_slot": "readers_per_kv_layer",
    "slot": "kv_layer",
}
_MOST_NAMED = 5  # changed files that a message names
_FORMAT = 2  # of the runs that are begun here
_VERSIONED = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "cla_jax")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run directory: its files, checked when they are read. Find one with `find_run` or `find_runs`."""

    path: epath.Path

    @property
    def checkpoints(self) -> epath.Path:
        """The directory of the checkpoints; a published copy has none."""
        return self.path / "checkpoints"

    @property
    def log(self) -> epath.Path:
        """The log of training, a text; a remote run has none."""
        return self.path / "log.txt"

    @property
    def metrics(self) -> epath.Path:
        """The metrics of a local run, in lines of JSON; read them with `read_metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def profile(self) -> epath.Path:
        """The directory of traces (`placement.profile`)."""
        return self.path / "profile"

    @property
    def is_local(self) -> bool:
        """Whether the run is in the file system of this machine, not at gs://."""
        return is_local(self.path)

    @property
    def has_begun(self) -> bool:
        """Whether there is more of the run than its start: a step, a checkpoint, an evaluation, an import.

        What has not begun holds no name: another run may take its place.
        """
        if any(
            files.exists(path) and (not path.is_dir() or any(path.iterdir()))
            for path in (self.checkpoints, self.path / "eval")
        ):
            return True
        if "origin" in self._own():
            return True
        problems: list[str] = []
        lines = self.read_records(problems)
        return any(not _is_of_no_step(line) for line in lines) or bool(problems)

    def record(self) -> dict[str, Any]:
        """config.json, without its checksum.

        Raises ValueError naming a missing or broken file, and Altered if it is not as it was written.
        """
        check_links(self.path)
        record = read_json(self.path / "config.json")
        if not _is_intact(record):
            raise Altered(self._altered_config(record))
        return {key: value for key, value in record.items() if key != "checksum"}

    def config(self) -> Config:
        """The config that the run was last started with. Raises ValueError like `record`."""
        return _as_config(self.record(), self.path / "config.json")

    @property
    def id(self) -> str:
        """The number that all records of the run carry; empty if it is older than that."""
        number = self._own().get("run")
        return number if isinstance(number, str) else ""

    @property
    def is_recorded(self) -> bool:
        """Whether there is a config.json that a run wrote."""
        return {"identity", "placement"} <= self._own().keys()

    @property
    def is_sealed(self) -> bool:
        """Whether every record of the run must have a checksum."""
        return _is_sealed(self._own())

    def _own(self) -> dict[str, Any]:
        """config.json as it stands there; empty if it cannot be read."""
        with contextlib.suppress(ValueError):
            return read_json(self.path / "config.json")
        return {}

    @property
    def owner(self) -> "Owner | None":
        """The run that its checkpoints must belong to; None if there is no config.json yet."""
        if not files.exists(self.path / "config.json"):
            return None
        record = self.record()
        return Owner(record.get("run", ""), record["identity"], _is_sealed(record))

    def _altered_config(self, record: dict[str, Any]) -> str:
        """What to say of a config.json whose checksum does not match."""
        file = self.path / "config.json"
        for step in reversed(saved_steps(self.checkpoints)):
            with contextlib.suppress(ValueError, KeyError):
                saved = read_json(self.checkpoints / f"{step:08d}.json")
                if difference := Owner(record.get("run", ""), record["identity"]).difference(saved):
                    return f"{file} was altered: {difference}. {_RESTORE}"
        return f"{file} was altered: its checksum does not match. {_RESTORE}"

    def check_data(
        self,
        fingerprint: str,
        tokenizer_json: str,
        changes: Callable[[str], Sequence[str]] = lambda earlier: (),
    ) -> None:
        """Raises ValueError unless data and tokenizer are those that the run was trained with.

        `changes` says which files changed since the data of a fingerprint was prepared.
        """
        trained_on = self.record().get("data_fingerprint")
        if trained_on != fingerprint:
            changed = changes(trained_on) if isinstance(trained_on, str) else ()
            raise ValueError(self._other_data(f"{trained_on!r}", f"{fingerprint!r}", changed))
        if self.tokenizer_json() != tokenizer_json:
            raise ValueError(
                f"{self.path / 'tokenizer.json'} is not the tokenizer that the data was prepared "
                "with; restore the file from a copy, or choose another run directory with --name"
            )

    def _other_data(self, before: str, now: str, changes: Sequence[str]) -> str:
        """What to say if the run was trained on the data `before`, but there is the data `now`."""
        data = self.config().data
        names = f"{self.path} was trained on data {before}, but the data here is {now}"
        inputs = [source for source in data.sources if not source.startswith("sotu")]
        inputs += [data.tokenizer] if data.tokenizer.endswith(".json") else []
        if not inputs:
            return f"{names}: choose another run directory with --name"
        first = [*changes[:_MOST_NAMED]]
        first += [f"{n} more"] if (n := len(changes) - _MOST_NAMED) > 0 else []
        which = f" ({', '.join(first)})" if first else ""
        return (
            f"files of {', '.join(inputs)} changed after {self.path} was trained on them{which}. Restore "
            f"them, or train on the new text as another run, with --name. {names}"
        )

    def origin(self) -> dict[str, Any]:
        """Where an imported model is from; empty for one that was trained here."""
        return self.record().get("origin") or {}

    def end_ids(self, end: int, size: int) -> list[int]:
        """The ids that end a text: `end`, and those below `size` that an imported model has besides."""
        others = self.origin().get("end_ids") or []
        return list(dict.fromkeys([end, *(i for i in others if is_a(i, int) and 0 <= i < size)]))

    def is_finished(self) -> bool:
        """Whether the metrics have the evaluation after the last step, which follows its checkpoint."""
        steps = self.config().steps
        records = self.read_records([])
        return any(record["step"] >= steps and "held_out_loss" in record for record in records)

    def check_saved(self) -> None:
        """Raises ValueError for a run without checkpoints, and tells of one that it had."""
        if not saved_steps(self.checkpoints):
            if (missing := self.missing_records()).checkpoint is not None:
                raise ValueError("; ".join(missing.problems))
            if self.is_finished():
                raise ValueError(
                    f"{self.path} is finished, but has no checkpoints: it is a published copy, or they were "
                    "removed. Use the run that it is a copy of, or train it again with another --name"
                )
            raise ValueError(f"{self.path} has no checkpoint yet: train it first")

    def check_decodable(
        self, formats: Iterable[str], chunk: int, prompt: float | None = None
    ) -> None:
        """Raises ValueError where the run cannot be evaluated through these caches; needs no jax.

        With `prompt`, the share of a window that is its prompt, also where that does not fit a policy.
        """
        for name in formats:
            eviction.check_cache(name, FORMATS)
            if not eviction.is_policy(name):
                continue
            policy, seq_len = eviction.parse(name), self.config().data.seq_len
            if words := eviction.refusal(self.config().model, policy, seq_len):
                raise ValueError(f"{self.path}: {words}")
            if prompt is not None:
                policy.check([eviction.prompt_tokens(prompt, seq_len, chunk)])
        try:
            check_chunk(chunk, self.config().data.seq_len)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        self.check_saved()

    def tokenizer_json(self) -> str:
        """tokenizer.json. Raises ValueError if it is missing or damaged, or not the run's."""
        file = self.path / "tokenizer.json"
        if not file.exists():
            raise ValueError(f"{file} is missing: the run has not started training, or was altered")
        text = files.read_text(file, files.TOKENIZER_BYTES, links=False)
        files.parse_json(text, f"the tokenizer {file}", duplicates=True)
        expected = self.record().get("tokenizer")
        if expected not in (None, _text_digest(text)):
            raise Altered(
                f"{file} was altered: its checksum is not the one in config.json. {_RESTORE}"
            )
        return text

    def check_recordable(self) -> None:
        """Raises ValueError if an evaluation could not be written; call it before one is computed.

        If the disk is full, raises its OSError: another start may succeed.
        """
        directory = self.path / "eval"
        if not self.is_local:
            return
        try:
            files.try_writing(directory if files.exists(directory) else self.path)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ValueError(
                f"an evaluation cannot be written to {error.filename}: {error.strerror}. Copy the run, or "
                "use --windows N (of tasks --limit N): such a result is printed and not recorded"
            ) from None

    def write_eval(self, name: str, record: dict[str, Any]) -> None:
        """Keeps an evaluation, unless there is one of a later step: its checkpoint may be damaged by now.

        An altered or damaged one is kept too, under another name.
        """
        file = self.path / "eval" / f"{name}.json"
        check_links(self.path)
        check_links(file.parent)
        known, step = self.eval(name), record.get("step", 0)
        usable = bool(known) and isinstance(known.get("step", 0), int)
        if not usable and file.exists():
            log.warning("%s is damaged; renamed to %s", file, set_aside(file, "altered").name)
        known = known.get("step")
        if isinstance(known, int) and known > step:
            log.warning(
                "%s has a later step, %d, and is kept; this evaluation of step %d is not written",
                *(file, known, step),
            )
            return
        write_atomically(file, _dump(seals.seal(record | {"run": self.id}, name)))

    def eval(self, name: str) -> dict[str, Any]:
        """One evaluation; {} if there is none yet, or one that is damaged or altered."""
        with contextlib.suppress(ValueError):
            return self._read_eval(self.path / "eval" / f"{name}.json")
        return {}

    def evals(self, problems: list[str] | None = None) -> dict[str, dict[str, Any]]:
        """All evaluations by name: the name is the file's, the record as it was written, with today's fields.

        Raises ValueError for one that is damaged or altered; or it is left out, if `problems` is there to be
        told about it.
        """
        records = {}
        try:
            present = listed(self.path / "eval", ".json")
        except ValueError as error:  # a link among them
            if problems is None:
                raise
            problems.append(str(error))
            return records
        for file in present:
            try:
                records[file.stem] = self._read_eval(file)
            except ValueError as error:
                if problems is None:
                    raise
                problems.append(str(error))
        return records

    def _read_eval(self, file: epath.Path) -> dict[str, Any]:
        check_links(self.path)
        record = seals.unseal(read_json(file), file.stem, required=self.is_sealed)
        if record is None:
            raise Altered(f"{file} was altered, so it is not used")
        recorded, own = record.pop("run", ""), self.id
        if recorded and own and recorded != own:
            raise Altered(f"{file} belongs to another run, so it is not used")
        record = _with_todays_names(record)
        for name in ("per_kv_layer", "profile"):
            if name in record:
                record[name] = _with_todays_names(record[name])
        return record

    def read_records(
        self, problems: list[str] | None = None, torn_end: list[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Every whole line of the metrics, in the order of writing.

        Altered lines are left out; `problems` is told about them. `torn_end` is told if a crash tore the last
        line, which is no alteration.
        """
        check_links(self.path)
        altered: list[str] = []
        cut: list[str] = []
        lines = seals.read_lines(
            self.metric_lines(), self.id, altered, torn_end=cut, required=self.is_sealed
        )
        for line in lines:
            if (record := metrics_record(line)) is not None:
                yield record
        if problems is not None:
            problems += [f"{self._metrics_place}: {problem}" for problem in altered]
        if torn_end is not None:
            torn_end += [f"{self._metrics_place}: {words}" for words in cut]

    def metric_lines(self) -> Iterator[bytes]:
        """The lines of the metrics as they stand there."""
        segments = [self.metrics] if self.metrics.exists() else []
        for segment in segments + listed(self.path / "metrics", ".jsonl"):
            yield from files.read_lines(segment, links=False)

    def read_metrics(
        self, problems: list[str] | None = None, torn_end: list[str] | None = None
    ) -> list[dict[str, Any]]:
        """The records by step: of a step that stands there twice, the last whole one counts.

        Notes, and records of the run's time, are left out: they are of no step. See cla_jax.goodput.
        """
        records: dict[int, dict[str, Any]] = {}
        for record in self.read_records(problems, torn_end):
            if not _is_of_no_step(record):
                # Training and evaluation of one step are two records with different keys.
                records[record["step"]] = records.get(record["step"], {}) | record
        return [records[step] for step in sorted(records)]

    def missing_records(self) -> "MissingRecords":
        """What metrics, checkpoints and the evaluation of training say of each other that is no longer there.

        The metrics of a step are written before its checkpoint. A note follows as soon as the checkpoint is
        whole. Of an evaluation the file is written first, then its line in the metrics.
        """
        if not self.is_sealed or "origin" in self._own():
            return MissingRecords()
        # The metrics in the middle: while the run trains, neither seems to be behind the other.
        before = max(saved_steps(self.checkpoints), default=0)
        noted = self._training_evaluation()
        lines, number = list(self.metric_lines()), self.id
        last, saved, evaluated, recorded = (
            seals.last_record(lines, number, key).get(value, 0)
            for key, value in (
                ("loss", "step"),
                (SAVED, SAVED),
                ("held_out_loss", "step"),
                (RECORDED, RECORDED),
            )
        )
        newest = max(saved_steps(self.checkpoints), default=0)
        in_file, file = self._training_evaluation(), self.path / "eval" / f"{TRAINING}.json"
        problems = []
        if last < before:
            problems.append(
                f"{self._metrics_place}: the end is missing: its last step is {last:,}, but there is a "
                f"checkpoint of step {before:,}"
            )
        if newest < saved:
            problems.append(
                f"{self.checkpoints / f'{saved:08d}.json'} is missing: that checkpoint was saved; "
                + (f"the newest checkpoint left is step {newest:,}" if newest else "none is left")
            )
        if evaluated < noted:
            problems.append(
                f"{self._metrics_place}: the end is missing: it has no evaluation of step {noted:,}, but "
                f"{file} is of that step; start the run again to repair it"
            )
        if in_file < recorded:
            problems.append(
                f"{file} of step {recorded:,} is missing, but the metrics have that evaluation; start the "
                "run again to repair it"
            )
        return MissingRecords(
            tuple(problems),
            metrics=last < before,
            checkpoint=saved if newest < saved else None,
            evaluation=recorded if in_file < recorded else None,
        )

    def _training_evaluation(self) -> int:
        """The step of the evaluation of training that is a file; 0 if there is none."""
        step = self.eval(TRAINING).get("step", 0)
        return step if is_a(step, int) else 0

    @property
    def _metrics_place(self) -> epath.Path:
        return self.metrics if self.metrics.exists() else self.path / "metrics"


@dataclasses.dataclass(frozen=True)
class MissingRecords:
    """Records that a run had and no longer has."""

    problems: tuple[str, ...] = ()  # in words, naming the files
    metrics: bool = False  # whether the end of the metrics is missing
    checkpoint: int | None = None  # the step of the one whose manifest is missing
    evaluation: int | None = None  # the step of the one of training whose file is missing


def _with_todays_names(value: Any) -> Any:
    """A record, or a list of some, with the names that its fields have today."""
    if isinstance(value, list):
        return [_with_todays_names(one) for one in value]
    return {_RENAMED.get(k, k): v for k, v in value.items()} if isinstance(value, dict) else value


def _is_of_no_step(record: dict[str, Any]) -> bool:
    """Whether a line of the metrics is about the run's time, or a note of what lies beside them."""
    return goodput.is_time_summary(record) or set(record) <= {"step", "time", SAVED}


def metrics_record(record: dict[str, Any]) -> dict[str, Any] | None:
    """What a line of the metrics says; None if it is no record of numbers."""
    numbers = {key: value for key, value in record.items() if value is not None}
    whole = all(is_a(value, float) for value in numbers.values())
    step: Any = numbers.get("step")
    return numbers if whole and is_a(step, int) and 0 <= step < 2**53 else None


@dataclasses.dataclass(frozen=True)
class Owner:
    """Whose a checkpoint is: the number of the run, and the part of its config that decides what it is."""

    run: str
    identity: dict[str, Any]
    sealed: bool = False  # whether all that it saved names it

    def difference(self, saved: dict[str, Any]) -> str:
        """Why what was saved belongs to another run; empty if it does not, or does not say.

        Args:
          saved: a record with `run` and `identity`, such as the manifest of a checkpoint.
        """
        if not saved.get("run"):
            return "it does not name its run" if self.sealed else ""
        if self.run and saved["run"] != self.run:
            return f"it belongs to run {saved['run']}, not to {self.run}"
        as_config = lambda identity: from_record(
            {"name": "saved", "identity": identity, "placement": {}}
        )
        # By way of a Config: a field that is younger than a record has its default there.
        expected, recorded = (
            run_identity(as_config(i)) for i in (self.identity, saved["identity"])
        )
        return "; ".join(
            f"{key} is {a!r}, and what was saved has {b!r}"
            for key, (a, b) in fields.difference(expected, recorded).items()
        )


def run_path(config: Config) -> epath.Path:
    """Where a run lives."""
    return epath.Path(config.placement.runs) / config.name


def open_run(
    config: Config,
    *,
    data_fingerprint: str,
    tokenizer_json: str,
    write: bool = True,
    changes: Callable[[str], Sequence[str]] = lambda earlier: (),
) -> Run:
    """The directory for a config: made if new, continued if the same run; `write` off only checks.

    Raises ValueError, showing the difference, if the directory belongs to a run with another identity, other
    data or another tokenizer. Also if nothing says to which run its checkpoints belong. A different placement
    just continues. A run that was stopped before its first step is begun anew, whatever it was.
    """
    run = Run(run_path(config))
    if write:
        forget_unless_begun(run)
    if (run.path / "config.json").exists() and run.has_begun:
        check_identity(run, config)
        file = run.path / "tokenizer.json"
        if file.exists():
            run.check_data(data_fingerprint, tokenizer_json, changes)
        elif run.record().get("tokenizer") not in (None, _text_digest(tokenizer_json)):
            raise ValueError(
                f"{file} is missing, and the data was prepared with another tokenizer; restore the "
                "file from a copy, or choose another run directory with --name"
            )
        elif write:
            log.warning("%s was missing; it is written again from the prepared data", file)
    elif saved_steps(run.checkpoints):
        raise ValueError(
            f"{run.path / 'config.json'} is missing, so the run of the checkpoints in this directory is "
            "unknown: restore the file from a copy, or choose another run directory with --name"
        )
    if write:
        _check_foreign(run, tokenizer_json)
        remove_partial(run.path)
        number = run.id or _saved_id(run)
        is_new = not (run.path / "config.json").exists()
        further: dict[str, Any] = {"format": _FORMAT if is_new or run.is_sealed else 1}
        if not is_new and (origin := run.origin()):
            further["origin"] = origin
        record = _record(config, data_fingerprint, tokenizer_json, number, **further)
        write_atomically(run.path / "config.json", _dump(record))
        write_atomically(run.path / "tokenizer.json", tokenizer_json)
    return run


def forget_unless_begun(run: Run) -> None:
    """Takes back what `open_run` made, if no step of the run was made: its name is free again.

    Without a run's config.json, which goes last, nothing here is known to be of a run.
    """
    if run.is_recorded and not run.has_begun:
        for file in (run.metrics, *listed(run.path / "metrics", ".jsonl")):
            file.unlink(missing_ok=True)
        for name in ("tokenizer.json", "config.json"):
            (run.path / name).unlink(missing_ok=True)


def _check_foreign(run: Run, tokenizer_json: str) -> None:
    """Raises ValueError if a file that is not of a run has the name of one that a run writes."""
    if run.is_recorded:
        return
    config, tokenizer = run.path / "config.json", run.path / "tokenizer.json"
    is_other = tokenizer.exists() and tokenizer.read_bytes() != tokenizer_json.encode()
    metrics = [
        file for file in (run.metrics, *listed(run.path / "metrics", ".jsonl")) if file.exists()
    ]
    for file in [config] * config.exists() + [tokenizer] * is_other + metrics:
        raise ValueError(
            f"{files.name(file)} belongs to no run that is here, and is not overwritten: move it, or choose "
            "another run directory with --name"
        )


def _record(
    config: Config, data_fingerprint: str, tokenizer_json: str, run: str = "", **further: Any
) -> dict[str, Any]:
    """config.json of a run, new unless its number is given."""
    record = to_record(config) | {
        "data_fingerprint": data_fingerprint,
        "tokenizer": _text_digest(tokenizer_json),
        "versions": versions(),
        "run": run or uuid.uuid4().hex,
        **further,
    }
    return record | {"checksum": seals.digest(_without_placement(record))}


def _is_sealed(record: dict[str, Any]) -> bool:
    """Whether a config.json says that all records of its run have a checksum."""
    return record.get("format") == _FORMAT


def _is_intact(record: dict[str, Any]) -> bool:
    """Whether a config.json is as it was written, or was written before there were checksums."""
    if "checksum" not in record:
        return "run" not in record  # the two came together
    return record["checksum"] == seals.digest(_without_placement(record))


def _without_placement(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("placement", "checksum")}


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _saved_id(run: Run) -> str:
    """The number in the checkpoints, where config.json was last written by a version without numbers."""
    for step in reversed(saved_steps(run.checkpoints)):
        with contextlib.suppress(ValueError):
            if number := read_json(run.checkpoints / f"{step:08d}.json").get("run"):
                return number
    return ""


@contextlib.contextmanager
def new_run(
    config: Config, *, data_fingerprint: str, tokenizer_json: str, origin: dict[str, Any]
) -> Iterator[Run]:
    """Makes a run directory whole or not at all, for a model that was not trained here.

    Yields it under another name, with its config, so that checkpoints can be written. It gets its own name
    when the block ends, and is removed if the block raises. `origin` says where the model is from. Raises
    ValueError if there is something in its place.
    """
    path = run_path(config)
    if not is_local(path):
        raise ValueError(f"{path}: a run is imported to a local path; copy it from there")
    if path.exists():
        raise ValueError(f"{path} exists already: remove it, or choose another directory")
    partial = path.parent / f".{path.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    with open_plain(partial / ".lock", "a") as file:
        if not try_lock(file):
            raise ValueError(f"{path} is being written by another process")
        for left in partial.iterdir():  # of a process that was killed
            if left.name != ".lock":
                left.rmtree() if left.is_dir() else left.unlink()
        try:
            record = _record(
                config,
                data_fingerprint,
                tokenizer_json,
                "",
                format=_FORMAT,
                **({"origin": origin} if origin else {}),
            )
            write_atomically(partial / "config.json", _dump(record))
            write_atomically(partial / "tokenizer.json", tokenizer_json)
            yield Run(partial)
            (partial / ".lock").unlink()
            os.rename(partial, path)
        except BaseException:
            partial.rmtree()
            raise


def check_identity(run: Run, config: Config) -> None:
    """Raises ValueError, showing the difference, if a run directory belongs to another run."""
    # By way of a Config: a field that is younger than the run has its default there.
    difference = fields.difference(run_identity(config), run_identity(run.config()))
    if difference:
        lines = [f"  {key}: {b!r} there, {a!r} asked for" for key, (a, b) in difference.items()]
        raise ValueError(
            f"{run.path} contains another run:\n"
            + "\n".join(lines)
            + "\nChoose another directory with --name, or remove the other run."
            + (_LONGER if set(difference) == {"steps"} else "")
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
            raise ValueError(f"{place} is a file: choose another --placement.runs or --name")
    if not is_local(path):
        yield
        return
    path.mkdir(parents=True, exist_ok=True)
    check_links(path)
    with lock(path / ".lock") as held:
        if not held:
            raise ValueError(f"{path} is being trained by another process")
        yield


def check_paths(run: Run, data_dir: str | None, sources: Sequence[str]) -> None:
    """Raises ValueError if evaluating a run would use a place that only its config.json names.

    A run may be somebody else's. What it names is used if the user named it too, or if it lies below the
    current directory.

    Args:
      data_dir: where the user said that prepared data is.
      sources: the sources of text that the user named.
    """
    config = run.config()
    stated = config.placement.data_dir
    if data_dir is None and _leads_away(stated, run):
        raise ValueError(
            f"{run.path} has its prepared data in {stated!r}, outside the current directory: confirm it with "
            f"--data-dir {stated}, or give another directory"
        )
    name = run.record().get("data_fingerprint")
    prepared = (
        name
        and os.path.basename(name) == name
        and os.path.isdir(os.path.join(data_dir or stated, name))
    )
    if prepared:
        return
    for source in config.data.sources:
        kind, _, place = source.partition(":")
        local = kind.partition(".")[0] in ("text", "jsonl", "tfds")
        if local and _leads_away(place, run) and source not in sources:
            raise ValueError(
                f"{run.path} was trained on {source!r}, outside the current directory, and its held-out text "
                f"is not prepared: to allow reading it, give --data-source {shlex.quote(source)}"
            )


def _leads_away(path: str, run: Run) -> bool:
    """Whether a path that a run names may lead out of the current directory."""
    place = os.path.normpath(os.path.join(os.getcwd(), path))
    if _is_below(place, os.path.abspath(run.path)):  # links in it are somebody else's too
        place = os.path.realpath(place)
    return path.startswith("~") or not _is_below(place, os.getcwd())


def _is_below(path: str, directory: str) -> bool:
    return os.path.join(path, "").startswith(os.path.join(directory, ""))


def saved_steps(checkpoints: epath.Path) -> list[int]:
    """The steps of the complete checkpoints, ascending: those with a manifest."""
    return sorted(
        int(file.stem)
        for file in listed(checkpoints, ".json")
        if re.fullmatch(r"\d{8,18}", file.stem, re.ASCII)
    )


def find_runs(paths: Iterable[str | os.PathLike], problems: list[str] | None = None) -> list[Run]:
    """The runs at or below the paths, each once. A path is a run directory or a directory of runs.

    A directory with checkpoints or metrics but no config.json is left out. `problems` is told about it, or a
    warning says so. Raises ValueError if a path does not exist or contains no run.
    """
    runs: list[Run] = []
    broken: list[epath.Path] = []
    for path in map(epath.Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist{_neighbours(path)}")
        below = _runs_below(path, broken)
        if not below:
            if broken:
                raise ValueError(_without_config(broken[0]))
            raise ValueError(
                f"{path} is not a run directory and contains none: there is no config.json"
            )
        known = {real_path(run.path) for run in runs}
        runs += [run for run in below if real_path(run.path) not in known]
    for path in dict.fromkeys(broken):
        words = f"{_without_config(path)}; it is left out"
        log.warning("%s", words) if problems is None else problems.append(words)
    return runs


def _neighbours(path: epath.Path) -> str:
    """A question about directories beside a path that is not there, with names like its own."""
    beside: list[str] = []
    if is_local(path):
        with contextlib.suppress(OSError):
            beside = [child.name for child in path.parent.iterdir() if child.is_dir()]
    near = difflib.get_close_matches(path.name, beside, n=1, cutoff=0.6)
    return f"; did you mean {path.parent / near[0]}?" if near else ""


def _without_config(path: epath.Path) -> str:
    return f"{path} has checkpoints or metrics, but no config.json: restore it from a copy"


def find_run(path: str | os.PathLike) -> Run:
    """The run in a directory. Raises ValueError if it contains no run, or several."""
    run, *others = find_runs([path])
    if others:
        raise ValueError(f"{path} contains several runs: give one of them, such as {run.path}")
    return run


def find_decodable(run: "str | os.PathLike | Run", cache: str, chunk: int) -> Run:
    """A run, or the one in a directory, that text can be generated with; needs no jax.

    Args:
      cache: the format of the KV cache.
      chunk: tokens of a prompt that go through the model at once.

    Raises:
      ValueError: there is no such run or format, it has no checkpoint, or no such chunk is possible.
    """
    if chunk < 1:
        raise ValueError(f"chunk = {chunk} must be positive")
    run = run if isinstance(run, Run) else find_run(run)
    run.check_decodable([cache], chunk=1)  # a long chunk is cut at the end of a prompt
    return run


def _runs_below(directory: epath.Path, broken: list[epath.Path]) -> list[Run]:
    """Each run once. A link counts if it leads to a run; what is below a link is not searched.

    `broken` gets the run directories without a config.json.
    """
    runs: dict[str, Run] = {}
    ahead = [directory]
    while ahead:
        path = ahead.pop()
        if (path / "config.json").exists():
            runs.setdefault(real_path(path), Run(path))
        elif (path / "checkpoints").exists() or (path / "metrics.jsonl").exists():
            broken.append(path)
        elif path == directory or not _is_link(path):
            children = sorted(child for child in path.iterdir() if child.name[0] != ".")
            ahead += reversed([child for child in children if child.is_dir()])
    return list(runs.values())


def real_path(path: str | os.PathLike) -> str:
    """The absolute path without symbolic links, if it is on this machine."""
    path = epath.Path(path)
    return os.path.realpath(path) if is_local(path) else os.fspath(path)


def _is_link(path: epath.Path) -> bool:
    return is_local(path) and os.path.islink(path)


def read_config(file: epath.Path) -> Config:
    """The config in a file like a run's config.json, which may have been edited: then a warning says so.

    Raises ValueError naming the file.
    """
    record = read_json(file)
    if not _is_intact(record):
        log.warning("%s was edited after its run wrote it; the edited values are used", file)
    return _as_config(record, file)


def _as_config(record: dict[str, Any], file: epath.Path) -> Config:
    with files.about(file):
        return from_record(record)


def _dump(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=2) + "\n"


def read_json(file: epath.Path) -> dict[str, Any]:
    """The record in a file. Raises ValueError naming a file that is missing or holds none."""
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
