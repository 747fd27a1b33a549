"""Documents to windows of tokens on disk, once for each source, tokenizer and window length.

The documents of a split are one stream: an end token, then each document with an end token after it. So every
token of the text is a target exactly once. Preparing again finds what was prepared.
"""

import contextlib
import dataclasses
import fcntl
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cla_jax import files, machine, seals
from cla_jax.config import DataConfig
from cla_jax.data import manifest, shards, sources, tokenizers
from cla_jax.data.workers import Workers
from cla_jax.files import is_a
from cla_jax.messages import printable

if TYPE_CHECKING:
    from cla_jax.data.records import Windows

SPLITS = ("train", "held_out")
# Part of the fingerprint: raise it when the content of prepared data changes.
_FORMAT = 1
# Documents are tokenised together up to this many characters, and so many batches by this process
# before it starts others.
_BATCH_CHARACTERS = 1 << 20
_ALONE = 8
# Beside the windows: what each held-out document has of tokens and of bytes.
_DOCUMENTS = "held_out.json"
_DOCUMENTS_BYTES = 1 << 28
# Earlier data is looked for among so many directories of a name, and so many combinations of them.
_ALIKE, _COMBINATIONS = 100, 10_000

Progress = Callable[[int], None]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Prepared data: complete, and equal to what was written."""

    # Its directory.
    path: Path
    # The tokenizer that made the tokens.
    tokenizer: tokenizers.Tokenizer
    # For each split: documents, tokens (targets: those of the text and an end token a document),
    # bytes (UTF-8, of the text) and windows. The windows of the training split leave out the tokens
    # after the last whole one.
    totals: dict[str, dict[str, int]]

    def split(self, name: str) -> "Windows":
        """Random access to the windows of `train` or `held_out`."""
        assert name in SPLITS, name
        from cla_jax.data import records

        return records.read(self.path, name)

    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, the end token included, and UTF-8 bytes of each held-out document; int64 [D] each.

        Data that an older version prepared has no list of them. Then documents are what lies between end
        tokens, and their bytes are those of the decoded text. Raises ValueError where these do not add up to
        the bytes of the split, because the tokenizer changes the text.
        """
        totals = self.totals["held_out"]
        file = self.path / _DOCUMENTS
        if file.exists():
            listed = files.read_object(file, _DOCUMENTS_BYTES)
            columns = [files.field(listed, key, list, file) for key in ("tokens", "bytes")]
            if not all(is_a(number, int) for column in columns for number in column):
                raise ValueError(f"{file}: not every size of a document is a whole number")
            tokens, n_bytes = (np.array(column, np.int64) for column in columns)
        else:
            tokens, n_bytes = self._found_documents()
        if (tokens.sum(), n_bytes.sum()) != (totals["tokens"], totals["bytes"]):
            raise ValueError(
                f"{self.path}: its documents have {n_bytes.sum():,} bytes and {tokens.sum():,} tokens, but "
                f"the held-out split has {totals['bytes']:,} and {totals['tokens']:,}; delete the directory "
                "to prepare it again"
            )
        return tokens, n_bytes

    def _found_documents(self) -> tuple[np.ndarray, np.ndarray]:
        split = self.split("held_out")
        windows = split.take(range(len(split)))
        targets = [window["tokens"][1 : 1 + int(window["n_targets"])] for window in windows]
        ids = np.concatenate(targets)
        ends = np.flatnonzero(ids == self.tokenizer.end) + 1
        texts = [self.tokenizer.decode(part[:-1]) for part in np.split(ids, ends)[:-1]]
        n_bytes = [len(text.encode()) for text in texts]
        return np.diff(ends, prepend=0), np.array(n_bytes, np.int64)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The prepared data of a run: of one source, or of the components of a mixture."""

    # By the names of the components; of one source, under the empty name.
    parts: dict[str, Prepared]

    @property
    def fingerprint(self) -> str:
        """Says what the data are: a readable name and a digest of their sources and tokenizer."""
        return _fingerprint({name: part.path for name, part in self.parts.items()})

    @property
    def tokenizer(self) -> tokenizers.Tokenizer:
        return next(iter(self.parts.values())).tokenizer

    @property
    def totals(self) -> dict[str, dict[str, int]]:
        """Those of all parts together."""
        totals = [part.totals for part in self.parts.values()]
        return {
            split: {key: sum(each[split][key] for each in totals) for key in totals[0][split]}
            for split in SPLITS
        }


def prepare(
    config: DataConfig,
    data_dir: str | os.PathLike[str],
    *,
    tokenizer_json: str | None = None,
    progress: Progress | None = None,
    processes: int | None = None,
) -> Prepared:
    """The prepared data of a config with one source, made if they are not there yet.

    Args:
      config: what to prepare.
      data_dir: local directory of all prepared data; processes may share it.
      tokenizer_json: the tokenizer, where its file need not be at hand: a run directory has a copy.
      progress: called with the number of documents done; by default a line on a terminal.
      processes: that tokenise and write, if there is much to do; by default one a core. What they
        make does not depend on their number.

    Raises:
      ValueError: the source or the tokenizer is wrong or changes while it is read, a split would be empty, or
        the prepared data was damaged.
      ChildProcessError: one of the processes was killed.
    """
    assert not config.mixture, config.mixture
    path = prepared_path(config, data_dir, tokenizer_json)

    def make(partial: Path) -> None:
        # First: while it loads tfds, an import in the thread that draws progress would fail.
        from cla_jax.data import records  # noqa: F401

        shown = _terminal() if progress is None else contextlib.nullcontext(progress)
        with shown as report, Workers(processes or machine.cores()) as workers:
            _make(config, path, partial, report, tokenizer_json, workers)

    _made(path, make)
    return open_prepared(path)


def corpus(
    config: DataConfig, data_dir: str | os.PathLike[str], *, tokenizer_json: str | None = None
) -> Corpus:
    """The prepared data of a config with one source or a mixture; arguments and errors as of `prepare`.

    A component is prepared as it would be for a run of its source alone, and shared with such runs.
    """
    if config.mixture and config.tokenizer.startswith("bpe:") and tokenizer_json is None:
        tokenizer_json = _learned(config, data_dir)
    parts = _parts(config).items()
    return Corpus(
        {name: prepare(part, data_dir, tokenizer_json=tokenizer_json) for name, part in parts}
    )


def fingerprint(
    config: DataConfig, data_dir: str | os.PathLike[str], tokenizer_json: str | None = None
) -> str:
    """The fingerprint that the data of a config have or would have; nothing is prepared.

    Only a tokenizer that a mixture learns is made, unless it is given.
    """
    if config.mixture and config.tokenizer.startswith("bpe:") and tokenizer_json is None:
        tokenizer_json = _learned(config, data_dir)
    parts = _parts(config)
    return _fingerprint(
        {name: prepared_path(part, data_dir, tokenizer_json) for name, part in parts.items()}
    )


def changes(
    config: DataConfig,
    data_dir: str | os.PathLike[str],
    earlier: str,
    tokenizer_json: str | None = None,
) -> list[str]:
    """Which files changed since data was prepared, each as a few words; empty if that is unknown.

    It is known if the earlier data is still there.

    Args:
      config: what the data is prepared from.
      data_dir: the directory of all prepared data.
      earlier: the fingerprint of the earlier data.
      tokenizer_json: the tokenizer, if its file need not be there.
    """
    parts = _parts(config)
    now = {name: prepared_path(part, data_dir, tokenizer_json) for name, part in parts.items()}
    stems = [path.name.rpartition("-")[0] for path in now.values()]
    alike = [
        [path for path in Path(data_dir).glob("*") if path.name.rpartition("-")[0] == stem][:_ALIKE]
        for stem in stems
    ]
    for combination in itertools.islice(itertools.product(*alike), _COMBINATIONS):
        before = dict(zip(now, combination, strict=True))
        if _fingerprint(before) == earlier:
            pairs = (
                (before[name], parts[name].source) for name in now if before[name] != now[name]
            )
            return [words for path, source in pairs for words in _changed_files(path, source)]
    return []


def _changed_files(directory: Path, source: str) -> list[str]:
    """Which files of a source changed since a directory was prepared."""
    try:
        then, now = manifest.described(directory).get("inputs"), sources.inputs(source)
        if then is None or now is None:
            return []
        before, after = (files.field(listed, "files", dict, directory) for listed in (then, now))
    except ValueError:  # the earlier data was altered
        return []
    same = then.get("hashed_whole") == now["hashed_whole"]
    changed = [name for name in after if name in before and after[name] != before[name] and same]
    changes = [(name, "changed") for name in changed]
    changes += [(name, "is missing") for name in before if name not in after]
    changes += [(name, "is new") for name in after if name not in before]
    return [f"{printable(name)} {what}" for name, what in changes]


def _fingerprint(paths: Mapping[str, Path]) -> str:
    if "" in paths:
        return paths[""].name
    return f"mixture-{seals.digest({name: path.name for name, path in paths.items()})[:12]}"


def _parts(config: DataConfig) -> dict[str, DataConfig]:
    """What to prepare for each component: the same as for a run of that source alone."""
    if not config.mixture:
        return {"": config}
    tokenizer = config.tokenizer
    if tokenizer.startswith("bpe:"):  # learned from all of them: to each of them it is a given one
        tokenizer = f"bpe-{tokenizer.removeprefix('bpe:')}.json"
    return {
        component.name: dataclasses.replace(
            config, source=component.source, mixture=(), stages=(), tokenizer=tokenizer
        )
        for component in config.mixture
    }


def _learned(config: DataConfig, data_dir: str | os.PathLike[str]) -> str:
    """The tokenizer that is learned from the components of a mixture, kept like prepared data."""
    _check_directory(data_dir)
    identity = {
        "format": _FORMAT,
        "tokenizer": config.tokenizer,
        "end_token": config.end_token,
        "held_out": config.held_out,
    }
    content = [sources.fingerprint(source) for source in config.sources]
    named = identity | {"sources": list(config.sources), "content": content}
    name = f"tokenizer-{config.tokenizer.replace(':', '-')}-{seals.digest(named)[:12]}"

    def make(partial: Path) -> None:
        before = [sources.stamp(source) for source in config.sources]
        tokenizer = tokenizers.make_tokenizer(config)
        (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        manifest.write(partial, identity)
        if [sources.stamp(source) for source in config.sources] != before:
            raise _changed(config)

    path = Path(data_dir) / name
    _made(path, make)
    manifest.read(path)
    return (path / "tokenizer.json").read_text(encoding="utf-8")


def prepared_path(
    config: DataConfig, data_dir: str | os.PathLike[str], tokenizer_json: str | None = None
) -> Path:
    """The directory of the prepared data of a config: a readable name and a fingerprint.

    The fingerprint covers the content of the source and of a tokenizer file, so changed inputs are
    prepared anew. What counts of a file is the tokenizer in it: a run's own copy has its fingerprint.
    """
    _check_directory(data_dir)
    identity = _identity(config) | {"source": sources.fingerprint(config.source)}
    if config.tokenizer.endswith(".json"):
        tokenizer = tokenizers.make_tokenizer(config, tokenizer_json)
        identity["tokenizer"] = seals.digest({"json": tokenizer.to_json()})
    kind, _, argument = config.source.partition(":")
    words = (kind, Path(argument).name, Path(config.tokenizer).stem, config.seq_len)
    name = re.sub("[^A-Za-z0-9.]+", "-", "-".join(str(word) for word in words if word))
    return Path(data_dir) / f"{name[:80].strip('-.')}-{seals.digest(identity)[:12]}"


def _check_directory(data_dir: str | os.PathLike[str]) -> None:
    if "://" in os.fspath(data_dir):
        raise ValueError(
            f"placement.data_dir = {os.fspath(data_dir)!r} must be a local directory, because prepared "
            "data needs random access"
        )
    if Path(data_dir).exists() and not Path(data_dir).is_dir():
        raise ValueError(
            f"placement.data_dir = {os.fspath(data_dir)!r} is a file: give a directory"
        )


def _identity(config: DataConfig) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "source": config.source,
        "tokenizer": config.tokenizer,
        "end_token": config.end_token,
        "seq_len": config.seq_len,
        "held_out": config.held_out,
    }


def open_prepared(path: Path) -> Prepared:
    """Opens prepared data after comparing every file with the manifest.

    Raises:
      ValueError: a file is missing, truncated or altered; names it. Nothing is changed.
    """
    content = manifest.read(path)
    with files.about(path):
        text = files.read_text(path / "tokenizer.json", files.TOKENIZER_BYTES)
        tokenizer = tokenizers.load(text, files.field(content, "end_token", str, path))
        totals = files.field(content, "totals", dict, path)
        for split in totals:
            for count in files.field(totals, split, dict, path):
                files.field(totals, f"{split}.{count}", int, path)
        return Prepared(path, tokenizer, totals)


# -------------------------------------------------------------------------------------- making


class _Part(NamedTuple):
    """Some documents of a split, each followed by an end token."""

    ids: np.ndarray
    n_bytes: np.ndarray  # of each id
    documents: dict[str, list[int]]  # tokens, the end token included, and bytes of each


@dataclasses.dataclass(frozen=True)
class _Encoder:
    """What a worker does with a batch of texts."""

    tokenizer: tokenizers.Tokenizer
    held_out: float

    def __call__(self, texts: list[str]) -> tuple[int, dict[str, _Part]]:
        """How many texts those were, and what each split gets of them."""
        encoded = self.tokenizer.encode_batch_with_bytes(texts)
        by_split: dict[str, list[tokenizers.Encoded]] = {name: [] for name in SPLITS}
        for text, document in zip(texts, encoded, strict=True):
            if len(document[0]):  # a normalizer may leave nothing of white space
                split = "held_out" if sources.is_held_out(text, self.held_out) else "train"
                by_split[split].append(document)
        return len(texts), {
            name: self._joined(encodings) for name, encodings in by_split.items() if encodings
        }

    def _joined(self, documents: list[tokenizers.Encoded]) -> _Part:
        end = np.array([self.tokenizer.end], np.int32), np.zeros(1, np.int32)
        ids, n_bytes = map(
            np.concatenate, zip(*(p for d in documents for p in (d, end)), strict=True)
        )
        small = np.min_scalar_type(int(n_bytes.max()))  # on its way between processes
        sizes = {
            "tokens": [len(ids) + 1 for ids, _ in documents],
            "bytes": [int(counts.sum(dtype=np.int64)) for _, counts in documents],
        }
        return _Part(ids.astype(_dtype(self.tokenizer.size)), n_bytes.astype(small), sizes)


class _Stream:
    """The tokens of one split, on their way to windows, in plain files."""

    def __init__(self, directory: Path, name: str, tokenizer: tokenizers.Tokenizer, seq_len: int):
        self._tokens, self._n_bytes = (directory / f"{name}.{what}" for what in ("tokens", "bytes"))
        self._dtype, self._seq_len = _dtype(tokenizer.size), seq_len
        self._unfinished = 0  # bytes of a window that is not full yet
        self.totals = {"documents": 0, "tokens": 0, "bytes": 0}
        # Of each document; those of the training split are too many to be held.
        self.documents: dict[str, list[int]] | None = None
        if name == "held_out":
            self.documents = {"tokens": [], "bytes": []}
        self._tokens.write_bytes(np.array(tokenizer.end, self._dtype).tobytes())
        self._n_bytes.touch()

    def append(self, part: _Part) -> None:
        """Adds documents and counts them."""
        first = self._seq_len - self.totals["tokens"] % self._seq_len - 1  # that fills a window
        so_far = self._unfinished + np.cumsum(part.n_bytes, dtype=np.int64)
        full = so_far[first :: self._seq_len]
        self._unfinished = int(so_far[-1] - (full[-1] if len(full) else 0))
        with self._tokens.open("ab") as tokens, self._n_bytes.open("ab") as n_bytes:
            tokens.write(part.ids.tobytes())
            n_bytes.write(np.diff(full, prepend=0).tobytes())
        self.totals["documents"] += len(part.documents["tokens"])
        for key, sizes in part.documents.items():
            self.totals[key] += sum(sizes)
            if self.documents is not None:
                self.documents[key] += sizes

    def finished(self, padding: int | None) -> shards.Stream:
        """The whole stream, its last window padded or left out."""
        with self._n_bytes.open("ab") as n_bytes:
            n_bytes.write(np.int64(self._unfinished).tobytes())
        return shards.Stream(
            tokens=self._tokens,
            n_bytes=self._n_bytes,
            dtype=self._dtype.str,
            targets=self.totals["tokens"],
            seq_len=self._seq_len,
            padding=padding,
        )

    def remove(self) -> None:
        self._tokens.unlink()
        self._n_bytes.unlink()


def _dtype(size: int) -> np.dtype:
    """Of the ids of a vocabulary."""
    return np.dtype(np.uint16 if size <= 1 << 16 else np.int32)


def _made(path: Path, make: Callable[[Path], None]) -> None:
    """Makes a directory whole or not at all, unless it is there; one process at a time.

    `make` is given another directory, which is renamed when it returns.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _lock(path.with_name(f".{path.name}.lock")):
        if path.exists():  # another process may have made it while we waited
            return
        partial = path.with_name(f".{path.name}.partial")
        if partial.exists():  # of a process that was killed: we hold the lock
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            make(partial)
            partial.rename(path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _make(
    config: DataConfig,
    path: Path,
    partial: Path,
    progress: Progress,
    tokenizer_json: str | None,
    workers: Workers,
) -> None:
    """Prepares what belongs at a path into a directory of another name."""
    tokenizer = tokenizers.make_tokenizer(config, tokenizer_json)
    before = sources.stamp(config.source)
    streams = _tokenise(config, tokenizer, partial, progress, workers)
    totals = _write_records(tokenizer, streams, partial, workers)
    (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    documents = json.dumps(streams["held_out"].documents, separators=(",", ":"))
    (partial / _DOCUMENTS).write_text(documents, encoding="utf-8")
    content = {"totals": totals, "inputs": sources.inputs(config.source)}
    manifest.write(partial, _identity(config) | content)
    now = prepared_path(config, path.parent, tokenizer_json)
    if now != path or sources.stamp(config.source) != before:
        raise _changed(config)


def _changed(config: DataConfig) -> ValueError:
    return ValueError(
        f"the source {', '.join(config.sources)} or the file of data.tokenizer changed while the text "
        "was prepared: start again when it is complete"
    )


def _tokenise(
    config: DataConfig,
    tokenizer: tokenizers.Tokenizer,
    directory: Path,
    progress: Progress,
    workers: Workers,
) -> dict[str, _Stream]:
    streams = {name: _Stream(directory, name, tokenizer, config.seq_len) for name in SPLITS}
    encode = _Encoder(tokenizer, config.held_out)
    batches = _batches(sources.documents(config.source))
    done = 0
    for texts, parts in workers.map(encode, batches, alone=_ALONE):
        for name, part in parts.items():
            streams[name].append(part)
        done += texts
        progress(done)
    _check_splits(config, streams)
    return streams


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in documents:
        batch.append(text)
        characters += len(text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


_ENOUGH = 1000  # documents that are read again for a message


def _check_splits(config: DataConfig, streams: dict[str, _Stream]) -> None:
    train, held_out = (streams[name].totals for name in SPLITS)
    documents = train["documents"] + held_out["documents"]
    if not held_out["documents"]:
        first = itertools.islice(sources.documents(config.source), _ENOUGH)
        enough = f"use --data.held-out {sources.least_held_out(first):g} or "
        raise ValueError(
            f"data.held_out = {config.held_out} holds out no document of the source "
            f"{config.source!r}, which has {documents}; {enough if documents > 1 else ''}use more "
            "documents (the split is by document: cut a long file into several, as with split -a 4 -l 100)"
        )
    if train["tokens"] < config.seq_len:
        raise ValueError(
            f"the training split of the source {config.source!r} has {train['tokens']} tokens "
            f"in {train['documents']} of {documents} documents, less than one window of "
            f"data.seq_len = {config.seq_len}; lower data.seq_len or data.held_out, or use "
            "more documents"
        )


def _write_records(
    tokenizer: tokenizers.Tokenizer, streams: dict[str, _Stream], directory: Path, workers: Workers
) -> dict[str, dict[str, int]]:
    from cla_jax.data import records

    windows = {
        name: stream.finished(tokenizer.end if name == "held_out" else None)
        for name, stream in streams.items()
    }
    records.write(directory, windows, workers)
    for stream in streams.values():
        stream.remove()
    return {name: streams[name].totals | {"windows": len(windows[name])} for name in SPLITS}


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Lets one process at a time prepare; ends with the process, however that ends."""
    with path.open("w") as file:
        files.lock(file, fcntl.LOCK_EX, "placement.data-dir")
        yield


@contextlib.contextmanager
def _terminal() -> Iterator[Progress]:
    """Shows the documents done, if standard error is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from rich.console import Console

    with Console(stderr=True).status("preparing data") as status:
        yield lambda done: status.update(f"preparing data: {done:,} documents")
