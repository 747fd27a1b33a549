"""The kernels for CPUs: C++ with the vector instructions of the machine that runs it.

They are compiled when one is first asked for, which takes some seconds, and kept in the user's cache
directory. This needs a C++ compiler: GCC 12, Clang 14, or newer.
"""

import contextlib
import ctypes
import functools
import hashlib
import platform as python_platform
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jaxlib

_TARGETS = ("cla_jax_attend", "cla_jax_multiply")
_LOCK = threading.Lock()
_COMPILERS = ("c++", "g++", "clang++")  # the first that there is
_DIRECTORY = Path(__file__).parent
_SOURCES = tuple(_DIRECTORY / name for name in ("attention.cc", "matmul.cc"))
# When GCC tunes for some processors, it keeps integers in vector registers. The products then lack registers.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mtune=generic",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
)


def load() -> str | None:
    """Makes the kernels known to XLA. Returns why that cannot be, or None."""
    with _LOCK:
        return _loaded()


@functools.cache
def _loaded() -> str | None:
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        return f"it needs a C++ compiler, and none of {', '.join(_COMPILERS)} is on the PATH"
    try:
        library = load_library(compiler)
    except subprocess.CalledProcessError as error:
        return f"{compiler} cannot compile it: {_said(error)}"
    except OSError as error:
        return f"it cannot be compiled or loaded: {error}"
    for target in _TARGETS:
        handler = jax.ffi.pycapsule(getattr(library, target))
        jax.ffi.register_ffi_target(target, handler, platform="cpu")
    return None


def load_library(compiler: str) -> ctypes.CDLL:
    """The library for this processor, from the user's cache directory or compiled.

    Raises CalledProcessError if it cannot be compiled, OSError if it cannot be loaded.
    """
    kept = _kept(compiler)
    if kept is not None and kept.exists():
        try:
            return ctypes.CDLL(str(kept))
        except OSError:  # not whole: it is made again
            pass
    with tempfile.TemporaryDirectory(prefix="cla_jax-") as directory:
        made = Path(directory) / "native.so"
        include = f"-I{jax.ffi.include_dir()}"
        _output(compiler, *_FLAGS, include, *map(str, _SOURCES), "-o", str(made))
        library = ctypes.CDLL(str(made))
        if kept is not None:
            # Without a directory that can be written, the next process compiles again.
            with contextlib.suppress(OSError):
                kept.parent.mkdir(parents=True, exist_ok=True)
                # Under its name it is always whole: other processes may be making it too.
                with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as copy:
                    copy.write(made.read_bytes())
                Path(copy.name).replace(kept)
        return library


def _kept(compiler: str) -> Path | None:
    """Where the library for these sources, compiler and processor is kept; None without a home directory."""
    sources = [path.read_text() for path in (*_SOURCES, *sorted(_DIRECTORY.glob("*.h")))]
    parts = (_output(compiler, "--version"), jaxlib.__version__, _processor(), compiler, *_FLAGS)
    digest = hashlib.sha256("\0".join([*sources, *parts]).encode()).hexdigest()[:16]
    try:
        return Path.home() / ".cache" / "cla_jax" / f"native-{digest}.so"
    except RuntimeError:
        return None


def _output(*command: str) -> str:
    # In English: `_said` looks for the word "error".
    in_english = ("env", "LC_ALL=C", *command)
    return subprocess.run(in_english, check=True, capture_output=True, text=True).stdout


def _said(error: subprocess.CalledProcessError) -> str:
    """The line of a compiler's messages that says what is wrong."""
    lines = [line for line in error.stderr.splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith("collect2")]
    status = f"exit status {error.returncode}, and no message"
    return next((line for line in causes if "error" in line), (causes or [status])[-1])


def _processor() -> str:
    """Which instructions there are: a home directory may be that of several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    kinds = ("flags", "Features", "model name", "CPU part")
    return python_platform.machine() + "".join(
        sorted({line for line in lines if line.startswith(kinds)})
    )
