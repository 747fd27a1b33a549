"""Attention through a cache on a CPU: C++ with the vector instructions of the machine that runs it.

XLA's products for few queries and many keys pack the keys in memory again at every step. This kernel reads
them where they are, once, and computes scores, softmax and weighted sums of a block before the next block. It
returns a `Partial`.

`native.cc` is compiled when the kernel is first asked for, which takes some seconds, and kept in the user's
cache directory. It needs a C++ compiler: GCC 12, Clang 14, or newer.
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
import jax.numpy as jnp
import jaxlib

from cla_jax.config import ModelConfig
from cla_jax.model.attention import PagedKV, Partial

QUERIES = 1 << 30  # the most queries of a KV head: no limit
FORMATS = ("dense", "float32", "bfloat16", "int8", "fp8")
_TARGET = "cla_jax_attend"
_LOCK = threading.Lock()
_COMPILERS = ("c++", "g++", "clang++")  # the first that there is
_SOURCE = Path(__file__).with_name("native.cc")
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
    B, K, N, H = q_BKNH.shape
    # The kernel trusts its arguments.
    assert kept.k.shape[:3] == kept.v.shape[:3], (kept.k.shape, kept.v.shape)
    assert kept.k.shape[1 if kept.heads_first else 2] == K, kept.k.shape
    assert H in (kept.k.shape[3], kept.k.shape[3] + kept.v.shape[3]), (H, kept.k.shape)
    assert kept.pages_BC.shape[1] * kept.page >= kept.positions_BE.shape[1], kept.pages_BC.shape
    assert len(kept.pages_BC) == len(kept.positions_BE) == B, kept.pages_BC.shape
    assert positions_BN.shape == starts_BN.shape == (B, N), positions_BN.shape
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


def _load() -> str | None:
    """Makes the kernel known to XLA. Returns why that cannot be, or None."""
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
    handler = getattr(library, _TARGET)
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(handler), platform="cpu")
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
        _output(compiler, *_FLAGS, f"-I{jax.ffi.include_dir()}", str(_SOURCE), "-o", str(made))
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
    """Where the library for this source, compiler and processor is kept; None without a home directory."""
    parts = (_SOURCE.read_text(), _output(compiler, "--version"), jaxlib.__version__, _processor())
    digest = hashlib.sha256("\0".join([*parts, compiler, *_FLAGS]).encode()).hexdigest()[:16]
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
