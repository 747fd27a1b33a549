"""Attention through a cache on a CPU: C++ with the vector instructions of the machine that runs it.

XLA's products for few queries and many keys pack the keys in memory again at every step. This kernel reads
them where they are, once, and computes scores, softmax and weighted sums of a block before the next block. It
returns a `Partial`.

`native.cc` is compiled when the kernel is first asked for, which takes some seconds, and kept in the user's
cache directory. It needs a C++ compiler: GCC 12, Clang 12, or newer.
"""

import ctypes
import functools
import hashlib
import os
import platform as python_platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from cla_jax.config import ModelConfig
from cla_jax.model.attention import PagedKV, Partial

QUERIES = 1 << 30  # of a KV head: any number
FORMATS = ("dense", "float32", "bfloat16", "int8", "fp8")
_TARGET = "cla_jax_attend"
_SOURCE = Path(__file__).with_name("native.cc")
# GCC tunes for some processors by keeping integers in vector registers, which the products then lack.
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mtune=generic",
    "-fno-math-errno",
    "-fPIC",
    "-shared",
)


def kept_width(d_head: int) -> int:
    """How wide a cache keeps heads for this kernel: as they are."""
    return d_head


def refusal(
    config: ModelConfig,  # noqa: ARG001
    format: str,
    platform: str,
    compute_capability: float,  # noqa: ARG001
    page: int | None,  # noqa: ARG001
) -> str | None:
    """Why the kernel cannot serve this model and cache; None if it can."""
    if platform != "cpu":
        return f"the native kernel is not available on {platform}"
    if format not in FORMATS:
        return f"it supports {', '.join(FORMATS)}, not cache format {format}"
    return _load()


def attend(
    q_BKNH: jax.Array, kept: PagedKV, positions_BN: jax.Array, starts_BN: jax.Array
) -> Partial:
    """Attention of scaled queries of each KV head to the entries that each sees.

    Queries that are wider than the keys are those of a latent: their beginning meets the values.
    """
    reason = _load()
    assert reason is None, reason
    B, K, N, _ = q_BKNH.shape
    shapes = [(B, K, N, kept.v.shape[-1]), (B, K, N, 1), (B, K, N, 1)]
    no_scales = jnp.zeros(0, jnp.uint16)
    part = jax.ffi.ffi_call(_TARGET, [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes])(
        q_BKNH.astype(jnp.float32),
        kept.k,
        kept.v,
        no_scales if kept.k_scales is None else kept.k_scales,
        no_scales if kept.v_scales is None else kept.v_scales,
        kept.pages_BC,
        kept.positions_BE,
        positions_BN,
        starts_BN,
        heads_first=kept.heads_first,
    )
    return Partial(*part)


@functools.cache
def _load() -> str | None:
    """Makes the kernel known to XLA. Returns why that cannot be, or None."""
    named = shlex.split(os.environ.get("CXX", "c++"))
    if not named or (compiler := shutil.which(named[0])) is None:
        return f"it needs a C++ compiler, and there is no {' '.join(named) or 'CXX'}"
    try:
        library = _compiled((compiler, *named[1:]))
    except subprocess.CalledProcessError as error:
        words = (error.stderr or "").strip().splitlines()
        said = next(
            (line for line in words if "error" in line), words[-1] if words else "no message"
        )
        return f"{compiler} cannot compile it: {said}"
    except OSError as error:
        return f"it cannot be compiled: {error}"
    handler = getattr(ctypes.CDLL(str(library)), _TARGET)
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    return None


def _compiled(compiler: tuple[str, ...]) -> Path:
    """The library for this processor, compiled unless the cache has it.

    Raises CalledProcessError or OSError.
    """
    version = _output(*compiler, "--version")
    parts = (_SOURCE.read_text(), version, jax.__version__, _processor(), *compiler, *_FLAGS)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cla_jax"
    library = cache / f"native-{digest}.so"
    if library.exists():
        return library
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # it need not last longer than the process
        library = Path(tempfile.mkdtemp(prefix="cla_jax-")) / library.name
    # Under its name it is always whole: other processes may be compiling it too.
    own = library.with_name(f"{library.name}.{os.getpid()}")
    _output(*compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(own))
    own.replace(library)
    return library


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


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
