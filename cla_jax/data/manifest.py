"""A directory's list of its files with sizes and checksums, and what else is worth keeping."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

from cla_jax import files
from cla_jax.messages import printable, shown
from cla_jax.seals import digest

_NAME = "manifest.json"


def write(directory: Path, content: dict[str, Any]) -> None:
    """Writes manifest.json: `content`, all files below the directory, and its own checksum."""
    present = sorted(file for file in directory.rglob("*") if file.is_file())
    listed = {
        file.relative_to(directory).as_posix(): {
            "size": file.stat().st_size,
            "sha256": sha256(file),
        }
        for file in present
    }
    content = content | {"files": listed}
    text = json.dumps(content | {"checksum": digest(content)}, indent=1)
    (directory / _NAME).write_text(text, encoding="utf-8")


def read(directory: Path) -> dict[str, Any]:
    """The manifest of a directory, after comparing every file with it.

    Raises:
      ValueError: a file or the manifest is missing, truncated or altered; names it. Files that the
        manifest does not list are ignored.
    """
    content = described(directory)
    with ThreadPoolExecutor() as threads:
        list(threads.map(lambda item: _verify(directory, *item), content["files"].items()))
    return content


def sha256(file: Path) -> str:
    """The sha256 of a file's content."""
    with files.opened(file) as opened:
        return hashlib.file_digest(cast(Any, opened), "sha256").hexdigest()


def described(directory: Path) -> dict[str, Any]:
    """The manifest of a directory; its files are not compared. Raises ValueError as `read` does."""
    file = directory / _NAME
    if not file.is_file():
        raise _damaged(directory, file, "is missing")
    try:
        content = files.read_object(file)
    except ValueError as error:
        raise _damaged(directory, file, f"cannot be read ({printable(error)})") from error
    if content.pop("checksum", None) != digest(content):
        raise _damaged(directory, file, "was altered")
    with files.about(file):
        for name, listed in files.field(content, "files", dict, file).items():
            listed = files.as_object(listed, f"the entry of {shown(name)}")
            files.field(listed, "size", int, file)
            files.field(listed, "sha256", str, file)
            if os.path.isabs(name) or ".." in name.split("/"):
                raise ValueError(f"a file outside the directory, {shown(name)}")
    return content


def _verify(directory: Path, name: str, expected: dict[str, Any]) -> None:
    file = directory / name
    if not os.path.isfile(file):
        raise _damaged(directory, file, "is missing")
    size = file.stat().st_size
    if size != expected["size"]:
        raise _damaged(directory, file, f"has {size} bytes instead of {expected['size']}")
    if sha256(file) != expected["sha256"]:
        raise _damaged(directory, file, "was altered (its sha256 differs from the manifest's)")


def _damaged(directory: Path, file: Path, what: str) -> ValueError:
    where = printable(file)
    return ValueError(f"prepared data: {where} {what}; delete {directory} to prepare it again")
