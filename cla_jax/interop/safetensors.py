"""Files in the safetensors format: a JSON header with names, dtypes, shapes and places, then the bytes.

8 bytes            length of the header, little-endian
header             {"name": {"dtype": "F32", "shape": [...], "data_offsets": [from, to]}, ...}
data               little-endian, row-major; offsets count from here
"""

import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cla_jax import files
from cla_jax.interop import names
from cla_jax.interop.names import Tensor
from cla_jax.messages import printable, shown

_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(jnp.bfloat16)}
_READABLE = _DTYPES | {"F64": np.dtype("<f8")}  # rounded to float32
# Of other dtypes, which only constants may have, the bytes of an element.
_SIZES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8}
_LONGEST_HEADER = 100_000_000  # what the format allows
_DIMENSIONS = 8


def read(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, read when asked for. Raises ValueError if it is damaged or not of the format."""
    with files.about(file):
        return _read(file)


def _read(file: Path) -> dict[str, Tensor]:
    header, start, size = _header(file)
    tensors, spans = {}, []
    for name, entry in header.items():
        match entry:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(lo), int(hi)]} if (
                len(shape) <= _DIMENSIONS and all(map(_is_size, (*shape, lo, hi)))
            ):
                pass
            case _:
                raise ValueError(f"{file}: the header does not describe {name}: {shown(entry)}")
        refusal = (
            f"{file}: {name} has dtype {printable(dtype, 40)}; readable are {', '.join(_READABLE)}"
        )
        if dtype not in _READABLE and dtype not in _SIZES:
            raise ValueError(refusal)
        itemsize = _READABLE[dtype].itemsize if dtype in _READABLE else _SIZES[dtype]
        wanted = itemsize * math.prod(shape)
        if hi - lo != wanted or lo < 0:
            raise ValueError(
                f"{file}: {name}, {dtype} {shape}, needs {wanted} bytes, not the {hi - lo} of its header"
            )
        if hi > size:
            raise ValueError(
                f"{file} is truncated: {name} ends at byte {start + hi:,} of {start + size:,}"
            )
        if dtype in _READABLE:
            tensors[name] = _tensor(file, start + lo, _READABLE[dtype], tuple(shape))
        else:
            tensors[name] = _refused(tuple(shape), refusal)
        spans.append((lo, hi, name))
    names.check_apart(file, spans)
    return tensors


def _is_size(value: Any) -> bool:
    return files.is_a(value, int) and 0 <= value < 2**63


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """The entries, where the data begin, and how many bytes of them there are."""
    with files.opened(file) as stream:
        size = os.fstat(stream.fileno()).st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > _LONGEST_HEADER:
            raise ValueError(f"{file} is not a safetensors file")
        if 8 + length > size:
            raise ValueError(f"{file} is truncated: its header alone has {length:,} bytes")
        text = stream.read(length)
    try:
        header = files.as_object(files.parse_json(text, "its header"), "its header")
    except ValueError as error:
        raise ValueError(f"{file} is not a safetensors file: {error}") from None
    header.pop("__metadata__", None)
    return header, 8 + length, size - 8 - length


def _tensor(file: Path, offset: int, dtype: np.dtype, shape: tuple[int, ...]) -> Tensor:
    def read() -> np.ndarray:
        count = int(np.prod(shape, dtype=np.int64))
        values = np.fromfile(file, np.uint8, count * dtype.itemsize, offset=offset)
        return values.view(dtype).reshape(shape).astype(np.float32)

    return Tensor(shape, read)


def _refused(shape: tuple[int, ...], refusal: str) -> Tensor:
    def read() -> np.ndarray:
        raise ValueError(refusal)

    return Tensor(shape, read, refusal)


def write(
    file: Path,
    tensors: Mapping[str, Tensor],
    dtype: str,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Writes tensors, converted to `dtype` (F32, F16 or BF16), one in memory at a time."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = _DTYPES[dtype].itemsize * int(np.prod(tensor.shape, dtype=np.int64))
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data are aligned
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for done, tensor in enumerate(tensors.values()):
            out.write(tensor.read().astype(_DTYPES[dtype]).tobytes())
            progress(done + 1, len(tensors))
        out.flush()
        os.fsync(out.fileno())
