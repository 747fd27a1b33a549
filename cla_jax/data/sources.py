"""Documents from their textual name: the embedded corpus, text files, JSON lines, tfds.

A document is a non-empty string. Sources stream: memory holds one document (or one line) at a time.
"""

import contextlib
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
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from cla_jax.config import near_choice

SOTU_DOCUMENTS = 233
# Inputs up to this many bytes together are fingerprinted by their whole content.
_HASHED_WHOLE = 1 << 26
_HASHED_END = 1 << 20
# The standard library's module from Python 3.14 on; before, it is a package.
_ZSTD = ("compression.zstd", "backports.zstd")


def documents(source: str) -> Iterator[str]:
    """The non-empty documents of a source, in a fixed order.

    Args:
      source: `sotu` or `sotu:N` (the embedded corpus or its first N addresses); `text:GLOB`, a file
        is a document; `jsonl:GLOB`, a line is an object with the field `text`; `tfds:NAME[/CONFIG]`
        or `tfds:DIRECTORY` (of a prepared dataset), the feature `text` of the split `train`. Files
        come in the order of their paths and may be .gz, .xz or .zst.

    Raises:
      ValueError: no file matches, or a file is damaged, is not UTF-8, or has a line that is not an
        object with a text; names the file and the line. Raised when the document is reached.
    """
    kind, argument = _parse(source)
    if kind == "sotu":
        return _sotu(source, argument)
    if kind == "tfds":
        return _tfds(source, argument)
    read = _text_file if kind == "text" else _jsonl_file
    return (text for path in _files(source, argument) for text in read(path) if text)


def fingerprint(source: str) -> str:
    """A short hexadecimal identity of what a source would read; cheap for large sources.

    Files count by name, size and content; when they exceed 64 MiB together, by name, size
    and both ends. A tfds dataset counts by its version and shard lengths.
    """
    kind, argument = _parse(source)
    identity: list[Any] = [kind]
    if kind == "sotu":
        identity += [_sotu_limit(source, argument), hashlib.sha256(_sotu_bytes()).hexdigest()]
    elif kind == "tfds":
        builder = _tfds_builder(source, argument)
        splits = builder.info.splits
        lengths = list(splits["train"].shard_lengths) if "train" in splits else []
        identity += [builder.info.full_name, str(builder.info.dataset_size), lengths]
    else:
        paths = _files(source, argument)
        whole = sum(path.stat().st_size for path in paths) <= _HASHED_WHOLE
        identity += [_file_identity(path, whole) for path in paths]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def is_held_out(text: str, share: float) -> bool:
    """Whether a document belongs to the held-out split: a fixed function of its text alone.

    Equal documents always fall on the same side, whatever their order or source.
    """
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


# --------------------------------------------------------------------------------------- files


def _parse(source: str) -> tuple[str, str]:
    kind, _, argument = source.partition(":")
    near_choice("data.source", kind, ("sotu", "text", "jsonl", "tfds"))
    return kind, argument


def _files(source: str, pattern: str) -> list[Path]:
    found = glob.glob(os.path.expanduser(pattern), recursive=True)
    paths = [Path(name) for name in sorted(found) if os.path.isfile(name)]
    if not paths:
        raise ValueError(f"data.source = {source!r}: no file matches {pattern!r}")
    return paths


def _file_identity(path: Path, whole: bool) -> list[Any]:
    stat = path.stat()
    with path.open("rb") as file:
        if whole:
            return [path.name, stat.st_size, hashlib.file_digest(file, "sha256").hexdigest()]
        ends = hashlib.sha256(file.read(_HASHED_END))
        file.seek(max(0, stat.st_size - _HASHED_END))
        ends.update(file.read(_HASHED_END))
    return [path.name, stat.st_size, ends.hexdigest()]


def _open(path: Path) -> Any:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    if path.suffix == ".zst":
        return _zstd(path).open(path, "rb")
    return path.open("rb")


def _zstd(path: Path) -> Any:
    for name in _ZSTD:
        with contextlib.suppress(ImportError):
            return importlib.import_module(name)
    raise ValueError(f"{path}: to read .zst, pip install 'cla_jax[zstd]'")


def _damage() -> tuple[type[Exception], ...]:
    """What is raised for damaged or truncated packed files; a module that is not loaded raised nothing."""
    zstd = (module.ZstdError for name in _ZSTD if (module := sys.modules.get(name)))
    return (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, *zstd)


def _text_file(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            content = file.read()
    except _damage() as error:
        raise ValueError(f"{path} is damaged or truncated: {error}") from error
    yield _decode(content, str(path), 1)


def _jsonl_file(path: Path) -> Iterator[str]:
    with _open(path) as file:
        yield from _jsonl(file, str(path))


def _jsonl(file: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in _lines(file, name):
        if not line.strip():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(_decode(line, name, number))
        except json.JSONDecodeError as error:
            raise ValueError(f"{where} is not valid JSON: {error}") from error
        match record:
            case {"text": str(text)}:
                yield _checked(text, where)
            case _:
                raise ValueError(f"{where} is not an object with a field 'text' that is a string")


def _lines(file: Iterable[bytes], name: str) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        for line in file:
            number += 1
            yield number, line
    except _damage() as error:
        raise ValueError(f"{name} is damaged or truncated after line {number}: {error}") from error


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
    if not argument.isdigit() or not 0 < int(argument) <= SOTU_DOCUMENTS:
        raise ValueError(
            f"data.source = {source!r}: sotu:N takes N from 2 to {SOTU_DOCUMENTS}, the documents "
            "of the embedded corpus"
        )
    return int(argument)


def _sotu(source: str, argument: str) -> Iterator[str]:
    limit = _sotu_limit(source, argument)
    resource = importlib.resources.files("cla_jax.data").joinpath("corpus/sotu.jsonl.xz")
    with resource.open("rb") as packed, lzma.open(packed, "rb") as file:
        for _, text in zip(range(limit), _jsonl(file, "sotu.jsonl.xz"), strict=False):
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
        near_choice(f"tfds dataset in data.source = {source!r}:", name.split("/")[0], known)
        raise ValueError(f"data.source = {source!r}: tfds cannot find it: {error}") from error
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


def _tfds(source: str, name: str) -> Iterator[str]:
    builder = _tfds_builder(source, name)
    if "text" not in builder.info.features:
        known = ", ".join(builder.info.features)
        raise ValueError(f"data.source = {source!r} has no feature 'text', only {known}")
    for index, example in enumerate(builder.as_data_source(split="train")):
        text, where = example["text"], f"{source}, example {index}"
        # Datasets on disk give bytes; tfds.testing.mock_data gives str.
        text = _decode(text, where, 1) if isinstance(text, bytes) else _checked(str(text), where)
        if text:
            yield text
