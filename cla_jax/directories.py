"""Files in directories that several processes may use: locks, whole writes, no links."""

import contextlib
import errno
import fcntl
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from typing import IO, Any

from etils import epath

from cla_jax import files


def is_local(path: epath.Path) -> bool:
    return "://" not in os.fspath(path)


@contextlib.contextmanager
def lock(file: epath.Path, *, patience: float = 0.0) -> Iterator[tuple[int, ...]]:
    """Locks a file, and the directory that it is in: a file can be removed, and then a second process
    would lock a new one.

    Yields the descriptors that hold the lock, for child processes to inherit; none if another process has
    held it for `patience` seconds. Raises ValueError if the file is no plain file.
    """
    directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with open_plain(file, "a") as opened:
            until = time.monotonic() + patience
            # A network file system may not be able to lock a directory.
            while not (held := try_lock(opened) and try_lock(directory, required=False)):
                if time.monotonic() >= until:
                    break
                time.sleep(0.05)
            yield (opened.fileno(), directory) if held else ()
    finally:
        os.close(directory)


def is_locked(file: epath.Path) -> bool:
    """Whether a process of this machine holds the lock of a file, also if the file was removed since."""
    with contextlib.suppress(FileNotFoundError):
        directory = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not try_lock(directory, shared=True, required=False):
                return True
        finally:
            os.close(directory)
    if not files.exists(file):
        return False
    with files.opened(file, links=False) as opened:
        return not try_lock(opened, shared=True)


def try_lock(file: IO | int, *, shared: bool = False, required: bool = True) -> bool:
    """Locks an open file until it is closed, here and in child processes that inherit it.

    Returns False if another process holds the lock.

    A shared lock is one of many, for those who only look whether a process holds a lock of its own. Where
    it is not `required`, a file system that cannot lock it will do.
    """
    try:
        files.lock(
            file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB, "placement.runs"
        )
    except BlockingIOError:
        return False
    except (OSError, ValueError):
        if required:
            raise
    return True


def open_plain(file: epath.Path, mode: str, **options: Any) -> IO:
    """Opens a file to write to it in its own place: not through a link, and not a pipe or a device.

    Raises ValueError if it is one of these.
    """
    flags = os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe without a reader would wait for one
    opener = lambda name, asked: os.open(name, asked | flags, 0o666)
    try:
        opened = open(file, mode, opener=opener, **options)  # noqa: SIM115  the caller's to close
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise ValueError(f"{file} is a symbolic link or a pipe: remove it") from None
        raise
    if not stat.S_ISREG(os.fstat(opened.fileno()).st_mode):
        opened.close()
        raise ValueError(f"{file} is not a plain file: remove it")
    return opened


def check_links(directory: epath.Path) -> None:
    """Raises ValueError if a run directory has links in it, which may lead anywhere."""
    if not is_local(directory) or not directory.is_dir():
        return
    with os.scandir(directory) as entries:
        links = sorted(entry.name for entry in entries if entry.is_symlink())
    if links:
        raise ValueError(
            f"{directory / links[0]} is a symbolic link, which a run directory may not contain: replace it "
            "by its target"
        )


def set_aside(path: epath.Path, why: str) -> epath.Path:
    """Renames what cannot be trusted to NAME.`why`, with a number if there is one; returns the new path."""
    number, aside = 1, path.parent / f"{path.name}.{why}"
    while os.path.lexists(aside) if is_local(aside) else aside.exists():
        number += 1
        aside = path.parent / f"{path.name}.{why}-{number}"
    path.rename(aside)
    return aside


def listed(directory: epath.Path, suffix: str) -> list[epath.Path]:
    """What a directory has with a suffix, sorted; nothing if it is none.

    Not by a glob: that takes a bracket anywhere in the path for a pattern. Raises ValueError if there are
    links in it.
    """
    check_links(directory)
    entries = directory.iterdir() if directory.is_dir() else ()
    return sorted(file for file in entries if file.suffix == suffix)


def write_atomically(file: epath.Path, content: str | bytes) -> None:
    """Writes a file so that a reader, or a crash, sees the old content or the new, never a part."""
    write_all_atomically({file: content})


def write_all_atomically(contents: Mapping[epath.Path, str | bytes]) -> None:
    """Writes files so that each has its old content or its new; what fails before the end changes none.

    A link is replaced by the file, what it leads to is not touched.
    """
    written: dict[epath.Path, epath.Path] = {}
    file = None
    try:
        for file, content in contents.items():
            data = content.encode() if isinstance(content, str) else content
            file.parent.mkdir(parents=True, exist_ok=True)
            if not is_local(file):
                file.write_bytes(data)  # object stores replace whole objects
                continue
            written[file] = file.parent / f".{file.name}.{uuid.uuid4().hex}"
            with open(written[file], "xb") as out:
                out.write(data)
                out.flush()
                os.fsync(out.fileno())
        for file, temporary in written.items():
            os.replace(temporary, file)
    except OSError as error:  # a full disk, say
        for temporary in written.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, os.fspath(file or "")) from error


def remove_partial(directory: epath.Path) -> None:
    """Removes what a kill left of `write_atomically`; only for who alone writes to a directory."""
    if is_local(directory) and directory.exists():
        for file in directory.iterdir():
            if re.fullmatch(r"\..+\.[0-9a-f]{32}", file.name) and not file.is_dir():
                file.unlink()
