"""Compiled programs, kept on disk: a second start, or the next row of a sweep, does not compile again."""

import os

from etils import epath

from cla_jax.runs import is_local

_MAX_BYTES = 8 << 30  # the least recently used go first


def directory(runs: str | os.PathLike[str]) -> epath.Path | None:
    """Where programs are kept; None if the runs are someone else's, to be read only."""
    path = epath.Path(runs)
    if is_local(path):
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if not os.access(existing, os.W_OK):
            return None
    return path / ".programs"


def remember(runs: str | os.PathLike[str]) -> None:
    """Keeps compiled programs in `.programs` of the directory that holds run directories.

    They are found again by their content, the compiler's version and the kind of device, so runs may
    share them and they may be deleted at any time. JAX_COMPILATION_CACHE_DIR in the environment names
    another place; an empty one turns this off.
    """
    import jax  # launching, which asks only where programs are, should not wait for it

    place = directory(runs)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or place is None:
        return
    if is_local(place):
        jax.config.update("jax_compilation_cache_max_size", _MAX_BYTES)
    jax.config.update("jax_compilation_cache_dir", os.fspath(place))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
