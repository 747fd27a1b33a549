"""Checksums that the records of a run carry, so that damage and edits are seen.

A sealed record has a `checksum` of its content and of what it belongs to. So a file that was moved to another
run does not match. They detect accidents, not deliberate forgery. A record without a checksum is accepted
only where the run may be older than checksums: its config.json says so (see cla_jax.runs).
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

from cla_jax import files

_BEGINNING = b'{"'  # of every record
_MARK = ', "seal": "'
_DIGITS = 16  # of the checksum of a line


class Altered(ValueError):
    """A record is not as it was written."""


def digest(content: Any) -> str:
    """The sha256 of what JSON can hold, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(record: dict[str, Any], *belongs: str) -> dict[str, Any]:
    """The record with its checksum, which also covers what the record belongs to."""
    record = json.loads(json.dumps(record))  # as a reader will see it: lists for tuples
    return record | {"checksum": digest([record, *belongs])}


def unseal(record: dict[str, Any], *belongs: str, required: bool = False) -> dict[str, Any] | None:
    """The record without its checksum; None if the two do not match, or if a required one is missing."""
    if "checksum" not in record:
        return None if required else record
    content = {key: value for key, value in record.items() if key != "checksum"}
    return content if record["checksum"] == digest([content, *belongs]) else None


def seal_line(record: dict[str, Any], number: int, run: str) -> str:
    """A line of a log: one JSON object with its number in the log and a checksum."""
    text = json.dumps(record | {"line": number})[:-1]
    return f'{text}{_MARK}{_line_digest(text, run)}"}}\n'


def read_lines(
    lines: Iterable[bytes],
    run: str,
    problems: list[str] | None = None,
    *,
    torn_end: list[str] | None = None,
    last: int | None = 0,
    required: bool = False,
) -> Iterator[dict[str, Any]]:
    """The whole records of a log in the order of writing, without numbers and checksums.

    What is left out: lines that a crash tore, and those that are damaged, altered, repeated or moved.
    `problems` gets a line for each that a crash did not tear, and for each gap. `torn_end` gets one
    if a crash tore the last line.

    Args:
      lines: of the log, without the ends of lines.
      run: what `seal_line` was given.
      last: the number of the line before the first; None if `lines` is only the end of a log.
      required: whether every line must have a checksum; else those before the first that has one need none.
    """
    problems = [] if problems is None else problems
    sealed, altered, torn, cut, i = required, 0, 0, 0, 0
    for i, line in enumerate(lines, 1):
        try:
            record = files.as_object(files.parse_json(line, "a line", finite=False), "a line")
        except ValueError:  # torn by a crash, or damaged: then there is a gap
            if torn and torn == i - 1:  # a crash tears only one
                problems.append(f"line {i} is damaged, like the line before")
            elif not line.startswith(_BEGINNING[: len(line)]):
                problems.append(f"line {i} is damaged: it is not the beginning of a record")
            else:
                cut = i
            torn = i
            continue
        text, mark, end = line.decode().rpartition(_MARK)
        if not mark:
            if sealed:
                problems.append(f"line {i} was altered: it has no checksum")
            else:
                yield record
            continue
        sealed = True
        number = record.pop("line", None)
        if end != f'{_line_digest(text, run)}"}}' or type(number) is not int:
            problems.append(f"line {i} was altered: its checksum does not match")
            altered += 1
            continue
        if last is not None and number <= last:
            problems.append(f"line {i} is a duplicate or out of order, so it is not used")
            continue
        if last is not None and number - last - 1 > altered:
            count = number - last - 1 - altered
            what, are = ("1 line", "is") if count == 1 else (f"{count} lines", "are")
            problems.append(f"{what} before line {i} {are} missing")
        last, altered = number, 0
        del record["seal"]
        yield record
    if torn_end is not None and 0 < cut == i:
        torn_end.append(
            f"line {i}, the last, is not whole, so it is not used: the run was stopped while it wrote"
        )


def last_record(lines: Iterable[bytes], run: str, key: str = "line") -> dict[str, Any]:
    """The last record with a key that is as it was written, its number in `line`; {} if there is none."""
    for line in reversed(list(lines)):
        if f'"{key}"'.encode() not in line:  # far sooner known than what the line says
            continue
        text, mark, end = line.decode(errors="replace").rpartition(_MARK)
        if mark and end == f'{_line_digest(text, run)}"}}':
            return json.loads(text + "}")
    return {}


def _line_digest(text: str, run: str) -> str:
    return hashlib.sha256(f"{run}\n{text}".encode()).hexdigest()[:_DIGITS]
