"""Batches as a pure function of (seed, step), and the windows of an evaluation in order.

Row r of the batch of a step is element `step * batch_size + r` of an endless sequence in which
every epoch is a fresh permutation of the windows. Any number of hosts and any restart point give
the same tokens; the only state is the step.
"""

import itertools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, cast

import jax
import numpy as np

if TYPE_CHECKING:
    from cla_jax.data.records import Windows


class Batches:
    """The training batches of a seed.

    Args:
      windows: the training split, `Prepared.split("train")`.
      batch_size: sequences a step, over all hosts; may exceed the number of windows.
      seed: orders the windows; 0 to 2**32 - 1.
      accumulate: microbatches a step.

    Raises:
      ValueError: accumulate does not divide batch_size.
    """

    def __init__(self, windows: "Windows", *, batch_size: int, seed: int, accumulate: int = 1):
        import grain

        if batch_size % accumulate:
            raise ValueError(
                f"batch_size = {batch_size} is not divisible by placement.accumulate = {accumulate}"
            )
        self._windows = windows
        self._batch_size = batch_size
        self._accumulate = accumulate
        self._width = len(windows[0]["tokens"])
        # Only the order comes from grain: records are then read together instead of one by one.
        self._order = grain.MapDataset.range(len(windows)).seed(seed).shuffle().repeat()

    def indices(self, step: int, lo: int, hi: int) -> list[int]:
        """The windows that are rows lo to hi (exclusive) of the global batch of a step."""
        assert 0 <= lo <= hi <= self._batch_size, (lo, hi, self._batch_size)
        first = step * self._batch_size
        return [cast(int, self._order[i]) for i in range(first + lo, first + hi)]

    def rows(self, step: int, lo: int, hi: int) -> np.ndarray:
        """Rows lo to hi (exclusive) of the global batch of a step: int32 [hi - lo, seq_len + 1]."""
        tokens = np.empty((hi - lo, self._width), np.int32)
        for row, example in enumerate(self._windows.take(self.indices(step, lo, hi))):
            tokens[row] = example["tokens"]
        return tokens

    def place(self, step: int, sharding: jax.sharding.Sharding) -> jax.Array:
        """The batch of a step: int32 [accumulate, batch_size // accumulate, seq_len + 1].

        Row r of microbatch a is global row a * (batch_size // accumulate) + r. A host reads only
        the rows of its own devices, each once.
        """
        micro = self._batch_size // self._accumulate
        shape = (self._accumulate, micro, self._width)
        # Devices that differ along another mesh axis hold the same rows.
        blocks: dict[tuple[int, int], np.ndarray] = {}

        def block(a: int, lo: int, hi: int) -> np.ndarray:
            key = (a * micro + lo, a * micro + hi)
            if key not in blocks:
                blocks[key] = self.rows(step, *key)
            return blocks[key]

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # only for arrays without axes
            microbatches = range(*index[0].indices(shape[0]))
            lo, hi, _ = index[1].indices(shape[1])
            return np.stack([block(a, lo, hi) for a in microbatches])[..., index[2]]

        return jax.make_array_from_callback(shape, sharding, shard)

    def stream(
        self, start_step: int, sharding: jax.sharding.Sharding, *, prefetch: int = 2
    ) -> Iterator[jax.Array]:
        """The batches from `start_step` on, without end.

        A thread reads `prefetch` batches ahead, from the first `next` until the iterator is closed
        or collected. What goes wrong in it is raised by the `next` that asks for that batch.
        """
        threads = ThreadPoolExecutor(1, thread_name_prefix="batches")
        ahead: deque[Future[jax.Array]] = deque()
        try:
            for step in itertools.count(start_step):
                ahead.append(threads.submit(self.place, step, sharding))
                if len(ahead) > prefetch:
                    yield ahead.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def windows(split: "Windows", batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All windows of a split in order, in batches of one size B for evaluation.

    Yields dicts of `tokens` int32 [B, seq_len + 1], `n_targets` int32 [B] and `n_bytes` int64 [B];
    the last batch is filled up with rows of zeros, which have no targets.
    """
    for first in range(0, len(split), batch_size):
        examples = split.take(range(first, min(first + batch_size, len(split))))
        batch = {
            "tokens": np.zeros((batch_size, len(examples[0]["tokens"])), np.int32),
            "n_targets": np.zeros(batch_size, np.int32),
            "n_bytes": np.zeros(batch_size, np.int64),
        }
        for row, example in enumerate(examples):
            for name, values in batch.items():
                values[row] = example[name]
        yield batch
