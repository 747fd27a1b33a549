"""Streams of tokens in plain files, cut into windows and written as the records of one shard.

A record is a tf.Example, as tfds writes and reads it. It is put together here, many windows at a time:
tfds takes about 0.1 ms for each.
"""

import dataclasses
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Windows that are cut and put together at once: about a million tokens.
_BLOCK_TOKENS = 1 << 20
# Fields and wire types of protocol buffers, as they stand in tf.Example.
_FEATURES = _ENTRY = _KEY = _INT64S = b"\x0a"
_VALUE, _INT64_LIST = b"\x12", b"\x1a"


@dataclasses.dataclass(frozen=True)
class Stream:
    """Windows of seq_len targets, each starting at the last target of the one before.

    The tokens of the stream, which starts with an end token, and the UTF-8 bytes of each window's targets
    (int64) lie in files.
    """

    tokens: Path
    n_bytes: Path
    dtype: str
    targets: int  # tokens after the first
    seq_len: int
    padding: int | None  # fills a last partial window, which is otherwise dropped

    def __len__(self) -> int:
        return (
            self.targets // self.seq_len
            if self.padding is None
            else -(-self.targets // self.seq_len)
        )

    @property
    def record_bytes(self) -> int:
        """Of the tokens of a window."""
        return (self.seq_len + 1) * np.dtype(self.dtype).itemsize

    def windows(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [N, seq_len + 1], numbers of targets [N] and of bytes [N] of some windows."""
        T, size, n = self.seq_len, np.dtype(self.dtype).itemsize, last - first
        # Read, not mapped: mapped pages would count as memory of the process.
        flat = np.fromfile(self.tokens, self.dtype, n * T + 1, offset=first * T * size)
        n_bytes = np.fromfile(self.n_bytes, np.int64, n, offset=first * 8)
        n_targets = np.minimum(self.targets - T * np.arange(first, last), T)
        if missing := n * T + 1 - len(flat):
            assert self.padding is not None
            flat = np.pad(flat, (0, missing), constant_values=self.padding)
        tokens = np.lib.stride_tricks.sliding_window_view(flat, T + 1)[::T]
        return tokens, n_targets, n_bytes


@dataclasses.dataclass(frozen=True)
class Shard:
    """A part of a stream, and the file that it is written to."""

    path: Path
    stream: Stream
    first: int
    last: int


def write(shard: Shard) -> int:
    """Writes a shard; the size of its file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(os.fspath(shard.path), "group_size:1")
    at_once = max(_BLOCK_TOKENS // shard.stream.seq_len, 1)
    for first in range(shard.first, shard.last, at_once):
        windows = shard.stream.windows(first, min(first + at_once, shard.last))
        for record in records(*windows):
            writer.write(record)
    writer.close()
    return shard.path.stat().st_size


def records(
    tokens_NT: np.ndarray, n_targets_N: np.ndarray, n_bytes_N: np.ndarray
) -> Iterator[bytes]:
    """The tf.Examples of some windows, in bytes."""
    varints, ends = _varints(tokens_NT.ravel())
    ends = ends[tokens_NT.shape[1] - 1 :: tokens_NT.shape[1]].tolist()
    start = 0
    for end, n_targets, n_bytes in zip(ends, n_targets_N.tolist(), n_bytes_N.tolist(), strict=True):
        after = _small(b"n_bytes", n_bytes)
        yield _before(end - start, n_targets, len(after)) + varints[start:end] + after
        start = end


# Most windows are as long as others before them, and so are their bytes.
@functools.lru_cache(1 << 14)
def _before(size: int, n_targets: int, after: int) -> bytes:
    """What stands in a record before the `size` bytes of its tokens, which `after` others follow."""
    begin = _small(b"n_targets", n_targets) + _feature(b"tokens", bytes(size))
    return (_FEATURES + _sized(begin + bytes(after)))[: -(size + after)]


@functools.lru_cache(1 << 14)
def _small(name: bytes, number: int) -> bytes:
    return _feature(name, _varint(number))


def _feature(name: bytes, varints: bytes) -> bytes:
    value = _INT64_LIST + _sized(_INT64S + _sized(varints))
    return _ENTRY + _sized(_KEY + _sized(name) + _VALUE + _sized(value))


def _sized(content: bytes) -> bytes:
    return _varint(len(content)) + content


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def _varints(numbers: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Numbers from 0 on, seven bits a byte, the lowest first; and where each of them ends."""
    lengths = np.ones(len(numbers), np.int64)
    limit = 1 << 7
    while limit <= int(numbers.max(initial=0)):
        lengths += numbers >= limit
        limit <<= 7
    ends = np.cumsum(lengths)
    starts = ends - lengths
    out = np.empty(int(ends[-1]) if len(ends) else 0, np.uint8)
    chosen: np.ndarray | slice = slice(None)
    for place in range(int(lengths.max(initial=1))):
        if place:
            chosen = np.flatnonzero(lengths > place)
        byte = (numbers[chosen] >> (7 * place)) & 127
        out[starts[chosen] + place] = byte | ((lengths[chosen] > place + 1) << 7)
    return out.tobytes(), ends
