"""The one way to open files and to read JSON that others wrote, or that may be damaged.

What is not an ordinary file, too large, or not what it should be raises ValueError. The message is one line
that names the file, with at most a short piece of its content. It takes seconds and bounded memory, whatever
the file holds. What is not the file's fault (no descriptors left, a disk that fails) stays an OSError.

    record = files.read_object(run / "config.json", links=False)
    steps = files.field(record, "identity.steps", int, run / "config.json")

Paths are local or remote (gs://).
"""

import contextlib
import errno
import fcntl
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from typing import IO, Any, TypeVar, cast, overload

from etils import epath

from cla_jax.messages import printable, shown

T = TypeVar("T")
PathLike = str | os.PathLike[str]

# Limits, far above what such files have and far below what would fill the memory.
JSON_BYTES = 16 << 20
TOKENIZER_BYTES = 64 << 20  # the largest in public use have 33 MiB
LINE_BYTES = 1 << 20  # of a record in JSON lines
LINES_BYTES = 1 << 30  # of a file of such records
_DEPTH = 64  # objects and arrays within each other
_CONTAINERS = 2_000_000  # objects and arrays of one text: in memory they take 20 times their length
_MESSAGE = 400  # characters
_DIGITS = 308  # of an integer: what a float can hold
_PROBE_BYTES = 1 << 16  # what `try_writing` tries to write

# Errors of open and read that are about the path, not about the machine.
_OF_THE_PATH = {
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ELOOP,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENXIO,
}


# --------------------------------------------------------------------------------------- files


def opened(file: PathLike, *, links: bool = True) -> IO[bytes]:
    """An ordinary file, opened for reading.

    Args:
      links: whether the file may be a symbolic link. A link in the path before it is always followed.

    Raises:
      ValueError: there is no such file, or it may not be read. Or it is a directory, a pipe, a device, or a
        link that is not allowed. A pipe or a device is not opened.
    """
    path = os.fspath(file)
    try:
        if "://" in path:
            return cast(IO[bytes], epath.Path(path).open("rb"))
        return _open_ordinary(path, links)
    except FileNotFoundError:
        dangling = "://" not in path and os.path.islink(path)
        what = "is a link to a file that does not exist" if dangling else "is missing"
        raise ValueError(f"{name(file)} {what}") from None
    except OSError as error:
        if error.errno not in _OF_THE_PATH:
            raise
        raise ValueError(f"{name(file)} cannot be read: {error.strerror}") from None


def _open_ordinary(path: str, links: bool) -> IO[bytes]:
    if "\0" in path:
        raise ValueError(f"{name(path)} is not a valid path: it contains a NUL character")
    _check_ordinary(path, (os.stat if links else os.lstat)(path).st_mode)
    # A pipe without a writer would block, if one took the file's place in between.
    further = os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    stream = open(path, "rb", opener=lambda path, flags: os.open(path, flags | further))  # noqa: SIM115
    try:
        _check_ordinary(path, os.fstat(stream.fileno()).st_mode)
    except ValueError:
        stream.close()
        raise
    return stream


def _check_ordinary(file: PathLike, mode: int) -> None:
    if stat.S_ISREG(mode):
        return
    kinds: dict[str, Callable[[int], bool]] = {
        "a directory": stat.S_ISDIR,
        "a symbolic link": stat.S_ISLNK,
        "a pipe": stat.S_ISFIFO,
        "a socket": stat.S_ISSOCK,
        "a device": lambda mode: stat.S_ISCHR(mode) or stat.S_ISBLK(mode),
    }
    kind = next((kind for kind, is_one in kinds.items() if is_one(mode)), "something else")
    raise ValueError(f"{name(file)} is {kind}, not an ordinary file")


def read_bytes(file: PathLike, limit: int, *, links: bool = True) -> bytes:
    """The content of a file. Raises ValueError if it has more than `limit` bytes, or as `opened` does."""
    with opened(file, links=links) as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"{name(file)} is too large: the limit is {limit:,} bytes")
    return content


def read_text(file: PathLike, limit: int = JSON_BYTES, *, links: bool = True) -> str:
    """The content of a file in UTF-8, without a byte order mark. Raises ValueError as `read_bytes` does."""
    return decoded(read_bytes(file, limit, links=links), name(file))


def decoded(content: bytes, where: str) -> str:
    """UTF-8 as text, without a byte order mark. Raises ValueError naming `where` for what is not UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not text in UTF-8: byte {error.start:,} is not") from None


def read_lines(
    file: PathLike, *, limit: int = LINES_BYTES, longest: int = LINE_BYTES, links: bool = True
) -> Iterator[bytes]:
    """The lines of a file without their ends; one of more than `longest` bytes is left out.

    Raises ValueError if the file has more than `limit` bytes, or as `opened` does.
    """
    with opened(file, links=links) as stream:
        size, whole = 0, True
        if "://" not in os.fspath(file) and os.fstat(stream.fileno()).st_size > limit:
            raise ValueError(f"{name(file)} is too large: more than {limit:,} bytes")
        while line := stream.readline(longest + 1):
            if (size := size + len(line)) > limit:
                raise ValueError(f"{name(file)} is too large: more than {limit:,} bytes")
            ends = line.endswith(b"\n")
            if whole and len(line) <= longest:
                yield line.rstrip(b"\r\n")
            whole = ends


@contextlib.contextmanager
def about(file: PathLike) -> Iterator[None]:
    """A ValueError about the content of a file names the file, on one line of bounded length."""
    try:
        yield
    except ValueError as error:
        words = printable(error, _MESSAGE)
        raise ValueError(words if name(file) in words else f"{name(file)}: {words}") from None


@contextlib.contextmanager
def naming(file: PathLike) -> Iterator[None]:
    """An OSError of an open file names the file: the system names it only where a path is given."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(file)) from error


def write_fault(directory: PathLike) -> str:
    """Why nothing can be written into a local directory; empty if something can.

    A full disk often swallows the message of the process that failed on it. This asks again.
    """
    try:
        try_writing(directory)
    except OSError as error:
        return f"{name(directory)} is not writable: {error.strerror}"
    return ""


def try_writing(directory: PathLike) -> None:
    """Raises the OSError that would end a write into a local directory. Leaves nothing there."""
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            file.write(bytes(_PROBE_BYTES))
            _flush(file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, os.fspath(directory)) from error


def lock(file: IO | int, operation: int, directory: str) -> None:
    """Takes a lock of an open file: `operation` is that of `fcntl.flock`.

    Raises ValueError where the file system has no locks. `directory` names the field that says where the
    file lies. Raises BlockingIOError as flock does.
    """
    try:
        fcntl.flock(file, operation)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            raise
        where = "a directory" if isinstance(file, int) else file.name
        raise ValueError(
            f"{where} cannot be locked ({error.strerror}): its file system must support flock; choose "
            f"another directory with --{directory}"
        ) from None


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())  # a remote file system may find room only now


def exists(file: PathLike) -> bool:
    """Whether there is something under a path, be it a link to nothing or to itself."""
    path = os.fspath(file)
    return epath.Path(path).exists() if "://" in path else os.path.lexists(path)


def name(file: PathLike) -> str:
    """A path as messages have it."""
    return printable(os.fspath(file))


# ---------------------------------------------------------------------------------------- JSON


def read_json(
    file: PathLike, limit: int = JSON_BYTES, *, links: bool = True, finite: bool = True
) -> Any:
    """What a JSON file holds. Raises ValueError as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(file, limit, links=links), name(file), finite=finite)


def read_object(
    file: PathLike, limit: int = JSON_BYTES, *, links: bool = True, finite: bool = True
) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ValueError as `read_json` does, and for anything else."""
    return as_object(read_json(file, limit, links=links, finite=finite), name(file))


def as_object(value: Any, where: str) -> dict[str, Any]:
    """A value that should be a JSON object. Raises ValueError naming `where` if it is not."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not a JSON object, but {_kind_of(value)}")
    return value


def parse_json(
    text: str | bytes, where: str, *, finite: bool = True, duplicates: bool = False
) -> Any:
    """What a text in JSON says.

    Args:
      where: what the text is, for messages: a file, or a file and a line.
      finite: refuses NaN, Infinity, and numbers beyond what a float can hold.
      duplicates: whether a key may stand twice in an object; the last one counts.

    Raises:
      ValueError: it is not JSON in UTF-8, is nested too deeply, or has numbers, keys or half characters
        that are refused.
    """
    if isinstance(text, bytes):
        text = decoded(text, where)
    if text.count("{") + text.count("[") > _CONTAINERS:
        raise ValueError(f"{where} has more than {_CONTAINERS:,} JSON objects and arrays")
    try:
        value = _DECODERS[finite, duplicates].decode(text)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{where} is not valid JSON: {error.msg} ({place})") from None
    except RecursionError:
        raise ValueError(f"{where} is nested too deeply for JSON: over {_DEPTH} levels") from None
    except _Refused as error:
        raise ValueError(f"{where} is not usable JSON: {error}") from None
    _check_depth(value, where)
    if _HALF.search(text):
        _check_strings(value, where)
    return value


class _Refused(Exception):
    """Valid JSON that is not accepted here."""


def _int(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise _Refused(f"an integer of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise _Refused(f"the number {shown(digits)[1:-1]} is too large")
    return value


def _no_constant(word: str) -> float:
    raise _Refused(f"{word} is not a number")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(f"the key {shown(key)} occurs twice")
            seen.add(key)
    return made


_DECODERS = {
    (finite, duplicates): json.JSONDecoder(
        parse_int=_int,
        parse_float=_finite if finite else None,
        parse_constant=_no_constant if finite else None,
        object_pairs_hook=None if duplicates else _no_duplicates,
    )
    for finite in (True, False)
    for duplicates in (True, False)
}
# What JSON spells half of a surrogate pair with; whole pairs are spelled so too.
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def _check_depth(value: Any, where: str) -> None:
    level, depth = [value], 0
    while level := [each for each in level if isinstance(each, dict | list)]:
        if (depth := depth + 1) > _DEPTH:
            raise ValueError(f"{where} is nested too deeply for JSON: over {_DEPTH} levels")
        level = [
            inner for each in level for inner in (each.values() if isinstance(each, dict) else each)
        ]


def _check_strings(value: Any, where: str) -> None:
    level = [value]
    while level:
        for text in level:
            if isinstance(text, str) and any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"{where} has a lone surrogate, which is not valid Unicode")
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in ([*each, *each.values()] if isinstance(each, dict) else each)
        ]


# -------------------------------------------------------------------------------------- fields

_REQUIRED: Any = object()
_KINDS: dict[type, str] = {
    int: "an integer",
    float: "a number",
    str: "a text",
    bool: "true or false",
    dict: "an object",
    list: "an array",
}


@overload
def field(record: dict[str, Any], path: str, kind: type[T], where: PathLike) -> T: ...
@overload
def field(
    record: dict[str, Any], path: str, kind: type[T], where: PathLike, default: T | None
) -> T | None: ...
def field(
    record: dict[str, Any], path: str, kind: type[T], where: PathLike, default: Any = _REQUIRED
) -> Any:
    """A field of a JSON object, of one type: int, float (any number), str, bool, dict or list.

    Args:
      path: the name of the field; `a.b` is the field b of the object a.
      where: the file, for messages.
      default: for a field that is absent or null. Without one, that raises.

    Raises:
      ValueError: "FILE: field a.b: expected an integer, found 'x'".
    """
    value: Any = record
    for step in path.split("."):
        value = checked(value, path, dict, where).get(step)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{name(where)}: field {path} is missing")
            return default
    return checked(value, path, kind, where)


def checked(value: Any, path: str, kind: type[T], where: PathLike) -> T:
    """A value of JSON that has a type. Raises ValueError like `field`."""
    if not is_a(value, kind):
        raise ValueError(
            f"{name(where)}: field {path}: expected {_KINDS[kind]}, found {shown(value)}"
        )
    return value


def is_a(value: Any, kind: type) -> bool:
    """Whether a value of JSON has a type: true is no number here, an integer is a number."""
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, int | float if kind is float else kind)


def _kind_of(value: Any) -> str:
    return next((words for kind, words in _KINDS.items() if is_a(value, kind)), "null")
