"""Documents from their textual name: the embedded corpus, text files, JSON lines, tfds.

A document is a non-empty string. Sources stream: memory holds one document (or one line) at a time.
"""

import bz2
import contextlib
import functools
import glob
import gzip
import hashlib
import importlib
import importlib.resources
import json
import lzma
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cla_jax import extras, files
from cla_jax.config.data import split_source
from cla_jax.messages import near_choice, shown
from cla_jax.typed_numbers import is_digits

SOTU_DOCUMENTS = 233
# Inputs up to this many bytes together are fingerprinted by their whole content.
_HASHED_WHOLE = 1 << 26
_HASHED_END = 1 << 20
_MOST_LISTED = 1000  # files of a source that are listed one by one
# Bytes of a document, unpacked: the memory holds one at a time.
_LONGEST_LINE, _LONGEST_TEXT = 1 << 26, 1 << 30
# The standard library's module from Python 3.14 on; before, it is a package.
_ZSTD = ("compression.zstd", "backports.zstd")
_BOM = b"\xef\xbb\xbf"  # a byte order mark: some editors begin UTF-8 with it


def documents(source: str) -> Iterator[str]:
    """The non-empty documents of a source, in a fixed order.

    Args:
      source: `sotu` is the embedded corpus, `sotu:N` its first N addresses. `text:GLOB`: each file is a
        document. `jsonl:GLOB`: each line is an object with the field `text`. `tfds:NAME[/CONFIG]`, or
        `tfds:DIRECTORY` of a prepared dataset: the feature `text` of the split `train`. `jsonl.FIELD:` and
        `tfds.FIELD:` read another field. Files come in the order of their paths and may be .gz, .xz, .bz2 or
        .zst.

    Raises:
      ValueError: no file matches, or a file is damaged, is not UTF-8, or has a line that is not an object
        with a text. The message names the file and the line. Raised when the document is reached.
    """
    kind, field, argument = split_source(source)
    if kind == "sotu":
        return _sotu(source, argument)
    if kind == "tfds":
        return _tfds(source, argument, field)
    read = _text_file if kind == "text" else functools.partial(_jsonl_file, field=field)
    return (text for path in _files(source, argument) for text in read(path) if text)


def fingerprint(source: str) -> str:
    """A short hexadecimal identity of what a source would read; cheap for large sources.

    Files count by name, size and content; when they exceed 64 MiB together, by name, size
    and both ends. A tfds dataset counts by its version and shard lengths.
    """
    kind, field, argument = split_source(source)
    identity: list[Any] = [kind if field in ("", "text") else f"{kind}.{field}"]
    if kind == "sotu":
        identity += [_sotu_limit(source, argument), hashlib.sha256(_sotu_bytes()).hexdigest()]
    elif kind == "tfds":
        builder = _tfds_builder(source, argument)
        splits = builder.info.splits
        lengths = list(splits["train"].shard_lengths) if "train" in splits else []
        identity += [builder.info.full_name, str(builder.info.dataset_size), lengths]
    else:
        paths = _files(source, argument)
        whole = _hashed_whole(paths)
        for path in paths:
            identity.append(_file_identity(path, whole))
            if kind == "text" and _begins_with_mark(path):
                identity.append("without its byte order mark")
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def inputs(source: str) -> dict[str, Any] | None:
    """The digest of each file of a source by its path; None for other sources, and for too many files."""
    kind, _, argument = split_source(source)
    paths = _files(source, argument) if kind in ("text", "jsonl") else []
    if not 0 < len(paths) <= _MOST_LISTED:
        return None
    root, whole = os.path.commonpath([path.parent for path in paths]), _hashed_whole(paths)
    digests = {os.path.relpath(path, root): _file_identity(path, whole)[1:] for path in paths}
    return {"hashed_whole": whole, "files": digests}


def stamp(source: str) -> list[tuple[str, int, int, int]]:
    """What changes when a file of a source is written to, as soon as it is written to.

    For large files the fingerprint does not see all of the content. Empty for other sources.
    """
    kind, _, argument = split_source(source)
    if kind not in ("text", "jsonl"):
        return []
    stats = ((path, path.stat()) for path in _files(source, argument))
    return [(str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: a fixed function of its text alone.

    Equal documents always fall on the same side, whatever their order or source.
    """
    return _place(text) < share * 2**64


def _place(text: str) -> int:
    """Where a document lies between 0 and 2**64, by its text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def least_held_out(texts: Iterable[str]) -> float:
    """The least share, in thousandths, that holds out one of these documents."""
    return (1000 * min(map(_place, texts)) // 2**64 + 1) / 1000


# --------------------------------------------------------------------------------------- files


def _files(source: str, pattern: str) -> list[Path]:
    matches = _matching(source, os.path.expanduser(pattern))
    paths = []
    for name in map(Path, sorted(matches)):
        if name.is_file():
            paths.append(name)
        elif not name.is_dir():  # a link to nothing, a pipe
            what = "is a link to a file that does not exist" if name.is_symlink() else "is no file"
            raise ValueError(f"the source {source!r}: {files.name(name)} {what}")
    if not paths:
        if len(matches) == 1:
            kind = source.partition(":")[0]
            hint = f"give the files in it, as in {kind}:'{files.name(matches[0])}/*'"
            raise ValueError(
                f"the source {source!r}: {files.name(matches[0])} is a directory: {hint}"
            )
        raise ValueError(f"the source {source!r}: no file matches {pattern!r}")
    return paths


def _matching(source: str, pattern: str) -> list[str]:
    """The paths that match a pattern, in which [...] is one of some characters or stands for itself."""
    as_choice = glob.glob(pattern, recursive=True)
    if "[" not in pattern:
        return as_choice
    as_written = glob.glob(pattern.replace("[", "[[]"), recursive=True)
    if as_choice and as_written and as_choice != as_written:
        raise ValueError(
            f"the source {source!r} matches {files.name(as_choice[0])} as a pattern, and "
            f"{files.name(as_written[0])} as a plain name: write [[] for a bracket in the name"
        )
    return as_choice or as_written


def _hashed_whole(paths: list[Path]) -> bool:
    return sum(path.stat().st_size for path in paths) <= _HASHED_WHOLE


def _file_identity(path: Path, whole: bool) -> list[Any]:
    stat = path.stat()
    with path.open("rb") as file:
        if whole:
            return [path.name, stat.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
        ends = hashlib.sha256(file.read(_HASHED_END))
        file.seek(max(0, stat.st_size - _HASHED_END))
        ends.update(file.read(_HASHED_END))
    return [path.name, stat.st_size, ends.hexdigest()]


def _begins_with_mark(path: Path) -> bool:
    with _reading(path), _open(path) as file:
        return file.read(len(_BOM)) == _BOM


def _open(path: Path) -> Any:
    match path.suffix.lower():
        case ".gz":
            return gzip.open(path, "rb")
        case ".xz":
            return lzma.open(path, "rb")
        case ".bz2":
            return bz2.open(path, "rb")
        case ".zst":
            return _zstd(path).open(path, "rb")
    return path.open("rb")


def _zstd(path: Path) -> Any:
    for name in _ZSTD:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise ValueError(f"{path}: to read .zst needs the extra `zstd`: {extras.how('zstd')}")


@contextlib.contextmanager
def _reading(path: Path, where: Callable[[], str] = lambda: "") -> Iterator[None]:
    """Makes what is raised for damaged or truncated packed files a ValueError that names the file."""
    # A module that is not loaded raised nothing.
    zstd = (module.ZstdError for name in _ZSTD if (module := sys.modules.get(name)))
    try:
        yield
    except (EOFError, lzma.LZMAError, zlib.error, OSError, *zstd) as error:
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # of the disk, not of the content
            raise
        raise ValueError(f"{files.name(path)} is damaged or truncated{where()}: {error}") from error


def _text_file(path: Path) -> Iterator[str]:
    with _reading(path), _open(path) as file:
        content = file.read(_LONGEST_TEXT + 1)
    if len(content) > _LONGEST_TEXT:
        raise ValueError(
            f"{files.name(path)} is a document of more than {_LONGEST_TEXT:,} bytes: cut it into several"
        )
    yield _decode(content.removeprefix(_BOM), files.name(path), 1)


def _jsonl_file(path: Path, field: str = "text") -> Iterator[str]:
    with _open(path) as file:
        yield from _jsonl(file, path, field)


def _jsonl(file: Any, path: Path, field: str = "text") -> Iterator[str]:
    for number, line in _lines(file, path):
        if not line.strip():
            continue
        where = f"{files.name(path)}, line {number}"
        # Beside the text may stand what JSON has no name for: only the text is used.
        record = files.parse_json(
            _decode(line.removeprefix(_BOM), files.name(path), number),
            where,
            finite=False,
            duplicates=True,
        )
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(_no_text(record, field, where))
        yield _checked(text, where)


def _no_text(record: Any, field: str, where: str) -> str:
    message = f"{where} is not an object with a field {field!r} that is a string"
    fields = record.items() if isinstance(record, dict) else ()
    texts = [key for key, value in fields if isinstance(value, str)]
    if not texts:
        return message
    return f"{message}; to read another field: data.source = jsonl.FIELD:..., a FIELD of {shown(texts)}"


def _lines(file: Any, path: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    with _reading(path, lambda: f" after line {number}"):
        while line := file.readline(_LONGEST_LINE + 1):
            number += 1
            if len(line) > _LONGEST_LINE:
                raise ValueError(
                    f"{files.name(path)}, line {number} is longer than {_LONGEST_LINE:,} bytes"
                )
            yield number, line


def _decode(content: bytes, name: str, first_line: int) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise ValueError(f"{name}, line {line} is not valid UTF-8: {error.reason}") from error


def _checked(text: str, where: str) -> str:
    # JSON can spell half of a surrogate pair ("\ud83d"), which no UTF-8 text contains.
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has a lone surrogate, which is not valid Unicode") from error
    return text


# ---------------------------------------------------------------------------------------- sotu


def _sotu_bytes() -> bytes:
    return importlib.resources.files("cla_jax.data").joinpath("corpus/sotu.jsonl.xz").read_bytes()


def _sotu_limit(source: str, argument: str) -> int:
    if not argument:
        return SOTU_DOCUMENTS
    if not is_digits(argument) or not 0 < int(argument) <= SOTU_DOCUMENTS:
        raise ValueError(
            f"the source {source!r}: N in sotu:N must be 2 to {SOTU_DOCUMENTS}, the number of documents "
            "in the built-in corpus"
        )
    return int(argument)


def _sotu(source: str, argument: str) -> Iterator[str]:
    limit = _sotu_limit(source, argument)
    resource = importlib.resources.files("cla_jax.data").joinpath("corpus/sotu.jsonl.xz")
    with resource.open("rb") as packed, lzma.open(packed, "rb") as file:
        for _, text in zip(range(limit), _jsonl(file, Path("sotu.jsonl.xz")), strict=False):
            yield text


# ---------------------------------------------------------------------------------------- tfds


def _tfds_builder(source: str, name: str) -> Any:
    import tensorflow_datasets as tfds

    if Path(name).expanduser().is_dir():
        return tfds.builder_from_directory(Path(name).expanduser())
    try:
        builder = _tfds_by_name(name)
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near_choice(f"tfds dataset in the source {source!r}:", name.split("/")[0], known)
        raise ValueError(f"the source {source!r}: tfds cannot find it: {error}") from error
    # Does nothing for a dataset that is prepared. array_record is the format that needs no
    # TensorFlow to be written or read.
    builder.download_and_prepare()
    return builder


def _tfds_by_name(name: str) -> Any:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder(name, file_format="array_record")
    except tfds.core.DatasetNotFoundError:
        # tfds registers most of its text datasets only when this module is imported.
        importlib.import_module("tensorflow_datasets.text")
        return tfds.builder(name, file_format="array_record")


def _tfds(source: str, name: str, field: str) -> Iterator[str]:
    builder = _tfds_builder(source, name)
    if field not in builder.info.features:
        known = ", ".join(builder.info.features)
        raise ValueError(f"the source {source!r} has no feature {field!r}, only {known}")
    from cla_jax.data import records

    records.check_reader_threads()
    for index, example in enumerate(builder.as_data_source(split="train")):
        text, where = example[field], f"{source}, example {index}"
        # Datasets on disk give bytes; tfds.testing.mock_data gives str.
        text = _decode(text, where, 1) if isinstance(text, bytes) else _checked(str(text), where)
        if text:
            yield text
