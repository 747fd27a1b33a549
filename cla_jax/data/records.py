"""Windows of tokens on disk: tfds `array_record` files, written and read without TensorFlow.

Imported only where it is needed: importing tensorflow_datasets takes a good part of a second.
"""

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import registered

Example = dict[str, Any]

# tfds holds the examples of one shard in memory while it writes it, and a reader keeps every shard
# open: shards of 32 MiB, but not more than 512 of them.
_SHARD_BYTES = 1 << 25
_MOST_SHARDS = 512


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
        return self._source[index]

    def take(self, indices: Sequence[int]) -> list[Example]:
        """Several windows, read together."""
        return list(self._source.__getitems__(list(indices)))


class WindowReader:
    """Cuts a stream of tokens into windows of seq_len targets, each starting at the last target
    of the one before.

    Args:
      tokens: the stream [n], starting with an end token.
      n_bytes: the UTF-8 bytes of each token [n].
      seq_len: targets a window.
      padding: fills a last partial window, which is otherwise dropped (None).
    """

    def __init__(self, tokens: np.ndarray, n_bytes: np.ndarray, seq_len: int, padding: int | None):
        self._tokens, self._n_bytes = tokens, n_bytes
        self._seq_len, self._padding = seq_len, padding
        targets = max(0, len(tokens) - 1)
        self._count = targets // seq_len if padding is None else -(-targets // seq_len)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Example:
        start = index * self._seq_len
        tokens = np.asarray(self._tokens[start : start + self._seq_len + 1])
        n_targets = len(tokens) - 1
        if n_targets < self._seq_len:
            missing = self._seq_len - n_targets
            tokens = np.pad(tokens, (0, missing), constant_values=self._padding or 0)
        n_bytes = self._n_bytes[start + 1 : start + 1 + n_targets].sum(dtype=np.int64)
        return {"tokens": tokens, "n_targets": np.int32(n_targets), "n_bytes": np.int64(n_bytes)}


# Kept out of the global registry of data sets, where its name could meet another.
with registered.skip_registration():
    # The ordinary builder needs TensorFlow above 1,000 MiB a split; this one never does.
    class TokenWindows(tfds.core.ShardBasedBuilder):
        """The windows of each split, in the order of the stream."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, splits: Mapping[str, WindowReader], dtype: Any, width: int, **kwargs):
            self._splits, self._dtype, self._width = splits, dtype, width
            super().__init__(file_format="array_record", **kwargs)

        def _info(self) -> tfds.core.DatasetInfo:
            return tfds.core.DatasetInfo(
                builder=self,
                description="Windows of tokens with their targets and bytes.",
                features=tfds.features.FeaturesDict(
                    {
                        "tokens": tfds.features.Tensor(shape=(self._width,), dtype=self._dtype),
                        "n_targets": np.int32,
                        "n_bytes": np.int64,
                    }
                ),
                disable_shuffling=True,
            )

        def _shard_iterators_per_split(self, dl_manager) -> dict[str, list[Callable]]:
            del dl_manager
            record_bytes = self._width * np.dtype(self._dtype).itemsize
            return {name: _shards(reader, record_bytes) for name, reader in self._splits.items()}

        # tfds announces a download on standard output; there is none.
        def _log_download_bytes(self) -> None:
            pass

        def _log_download_done(self) -> None:
            pass


def write(directory: Path, splits: Mapping[str, WindowReader], dtype: Any, width: int) -> None:
    """Writes the windows of each split below `directory`, `width` tokens of `dtype` each."""
    builder = TokenWindows(splits=splits, dtype=dtype, width=width, data_dir=str(directory))
    builder.download_and_prepare()
    shutil.rmtree(directory / "downloads")


def read(directory: Path, split: str) -> Windows:
    """The windows of a split written by `write` to the same directory."""
    builder: Any = tfds.builder_from_directory(
        directory / TokenWindows.name / str(TokenWindows.VERSION)
    )
    return Windows(builder.as_data_source(split=split))


def _shards(reader: WindowReader, record_bytes: int) -> list[Callable]:
    size = max(_SHARD_BYTES // record_bytes, -(-len(reader) // _MOST_SHARDS), 1)

    def shard(first: int) -> Callable[[], Iterator[tuple[int, Example]]]:
        last = min(first + size, len(reader))
        return lambda: ((index, reader[index]) for index in range(first, last))

    return [shard(first) for first in range(0, len(reader), size)]
