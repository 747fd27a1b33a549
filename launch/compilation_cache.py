"""Compiled programs, kept on disk: a second start, or the next row of a sweep, does not compile again.

A program is code that this process will run. So programs are stored in the user's own cache, never in a
directory that came with somebody's runs. Each has a checksum of its key and its content. So a damaged file,
or one under another program's name, only costs the time of compiling it.
"""

import hashlib
import logging
import os
import stat
from pathlib import Path
from typing import Any

_MAX_BYTES = 8 << 30  # the least recently used go first
_DIGEST_BYTES = 32

log = logging.getLogger("cla_jax.launch")


def directory() -> Path | None:
    """Where programs, and what the planner found out, are kept: `~/.cache/cla_jax`, or in XDG_CACHE_HOME.

    None if there is no such place that only this user can write to.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        path = (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "cla_jax"
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
    except (OSError, RuntimeError):  # no home directory, or none that can be written to
        return None
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        log.warning("%s is not used: somebody else can write to it", path)
        return None
    return path if os.access(path, os.W_OK) else None


def enable() -> None:
    """Keeps compiled programs in `programs` of `directory`.

    They are found again by their content, the compiler's version and the kind of device. So runs share them,
    and they may be deleted at any time. JAX_COMPILATION_CACHE_DIR in the environment names another place; an
    empty one turns this off.
    """
    import jax  # launching, which asks only where programs are, should not wait for it

    _check_contents()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or (place := directory()) is None:
        return
    jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", os.fspath(place / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _check_contents() -> None:
    """Makes jax take no program from disk whose checksum does not match."""
    from jax._src import compilation_cache  # has no public way to put another cache in
    from jax._src.compilation_cache_interface import CacheInterface

    class Checked(CacheInterface):
        """A cache whose values begin with a checksum of the key and the content."""

        def __init__(self, cache: Any):
            self.cache, self._path = cache, cache._path

        def get(self, key: str) -> bytes | None:
            kept = self.cache.get(_name(key))
            if kept is None:
                return None
            content = kept[_DIGEST_BYTES:]
            if kept[:_DIGEST_BYTES] == _digest(key, content):
                return content
            log.warning("a stored program is damaged; it is compiled again: %s", key)
            (self._path / f"{_name(key)}-cache").unlink(missing_ok=True)  # else it would stay
            return None

        def put(self, key: str, value: bytes) -> None:
            self.cache.put(_name(key), _digest(key, value) + value)

    made = compilation_cache.get_file_cache
    if made.__name__ == "checked":
        return

    def checked(path: str) -> tuple[CacheInterface, str] | None:
        entry = made(path)
        return None if entry is None else (Checked(entry[0]), entry[1])

    compilation_cache.get_file_cache = checked


def _name(key: str) -> str:
    """Of the file: not that of a program that jax keeps without a checksum."""
    return f"{key}-checked"


def _digest(key: str, content: bytes) -> bytes:
    return hashlib.sha256(key.encode() + b"\n" + content).digest()
