"""Windows of tokens on disk: tfds `array_record` files, written and read without TensorFlow.

Imported only where it is needed: importing tensorflow_datasets takes a good part of a second.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from cla_jax import machine
from cla_jax.data import shards
from cla_jax.data.workers import Workers

Example = dict[str, Any]

_NAME, _VERSION = "token_windows", "1.0.0"
# A reader keeps every shard open: shards of 32 MiB, but not more than 512 of them.
_SHARD_BYTES = 1 << 25
_MOST_SHARDS = 512
# The first reader of a process starts this many threads, and waits for ever if it may not.
_READER_THREADS = 64


class Windows(Sequence[Example]):
    """Random access to windows: `[i]` is `tokens`, `n_targets`, `n_bytes` as numpy values.

    `tokens` has shape [seq_len + 1]; token j+1 is the target of token j for j < `n_targets`.
    `n_bytes` is the UTF-8 bytes of the text of these targets; an end token has none.
    """

    def __init__(self, source: Any):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Example:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        check_reader_threads()
        return self._source[index]

    def take(self, indices: Sequence[int]) -> list[Example]:
        """Several windows, read together."""
        check_reader_threads()
        return list(self._source.__getitems__(list(indices)))


def write(directory: Path, streams: Mapping[str, shards.Stream], workers: Workers) -> None:
    """Writes the windows of each split below `directory`."""
    directory = directory / _NAME / _VERSION
    directory.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        data_dir=epath.Path(directory), dataset_name=_NAME, filetype_suffix="array_record"
    )
    cut = {name: _shards(directory, name, stream) for name, stream in streams.items()}
    sizes = workers.map(shards.write, [shard for parts in cut.values() for shard in parts], alone=1)
    splits = [
        tfds.core.SplitInfo(
            name=name,
            shard_lengths=[shard.last - shard.first for shard in parts],
            num_bytes=sum(next(sizes) for _ in parts),
            filename_template=template.replace(split=name),
        )
        for name, parts in cut.items()
    ]
    first = next(iter(streams.values()))
    tokens = tfds.features.Tensor(shape=(first.seq_len + 1,), dtype=np.dtype(first.dtype))
    tfds.folder_dataset.write_metadata(
        data_dir=directory,
        features={"tokens": tokens, "n_targets": np.int32, "n_bytes": np.int64},
        split_infos=splits,
        filename_template=template,
        check_data=False,  # it would need TensorFlow
        description="Windows of tokens with their targets and bytes.",
        disable_shuffling=True,
    )


def read(directory: Path, split: str) -> Windows:
    """The windows of a split written by `write` to the same directory."""
    builder: Any = tfds.builder_from_directory(directory / _NAME / _VERSION)
    return Windows(builder.as_data_source(split=split))


@functools.cache  # an error is not kept
def check_reader_threads() -> None:
    """Raises RuntimeError if a reader of array_record files may not start its threads; once a process."""
    machine.check_threads(_READER_THREADS)


def _shards(directory: Path, split: str, stream: shards.Stream) -> list[shards.Shard]:
    size = max(_SHARD_BYTES // stream.record_bytes, -(-len(stream) // _MOST_SHARDS), 1)
    firsts = range(0, len(stream), size)
    return [
        shards.Shard(
            directory / f"{_NAME}-{split}.array_record-{i:05d}-of-{len(firsts):05d}",
            stream,
            first,
            min(first + size, len(stream)),
        )
        for i, first in enumerate(firsts)
    ]
