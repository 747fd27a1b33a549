"""Batches as a pure function of (seed, step), and the windows of an evaluation in order.

Row r of the batch of a step is element `step * batch_size + r` of an endless sequence. In it, every epoch is
a new permutation of the windows. In a mixture every component is such a sequence, and a schedule
(`mixture.py`) says which component an element comes from. Any number of hosts and any restart point give the
same tokens; the only state is the step.
"""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, cast

import jax
import numpy as np

from cla_jax.data import mixture

if TYPE_CHECKING:
    from cla_jax.data.records import Windows


# Batches read ahead of the one that is asked for.
PREFETCH = 2
# Seconds between two questions whether to stop while a batch is waited for.
_ASK_S = 0.2
# Rows read between two looks whether anybody still waits for them.
_ROWS_AT_ONCE = 64


class Closed(Exception):
    """The stream that a batch was read for is closed."""


class Batches:
    """The training batches of a seed.

    Args:
      windows: the training split, `Prepared.split("train")`; of a mixture those of its components by
        name, in the order of the schedule.
      batch_size: sequences a step, over all hosts; may exceed the number of windows.
      seed: orders the windows; 0 to 2**32 - 1.
      accumulate: microbatches a step.
      schedule: which component a row comes from.

    Raises:
      ValueError: accumulate does not divide batch_size.
    """

    def __init__(
        self,
        windows: "Windows | Mapping[str, Windows]",
        *,
        batch_size: int,
        seed: int,
        accumulate: int = 1,
        schedule: mixture.Schedule = mixture.ONE_SOURCE,
    ):
        import grain

        if batch_size % accumulate:
            raise ValueError(
                f"batch_size = {batch_size} is not divisible by placement.accumulate = {accumulate}"
            )
        parts = windows if isinstance(windows, Mapping) else {"": windows}
        self._windows = list(parts.values())
        self._batch_size = batch_size
        self._accumulate = accumulate
        self._schedule = schedule
        self._width = len(self._windows[0][0]["tokens"])
        self._closed = threading.Event()
        # Only the order comes from grain: records are then read together instead of one by one.
        self._orders = [
            grain.MapDataset.range(len(part)).seed(mixture.seed_of(seed, name)).shuffle().repeat()
            for name, part in parts.items()
        ]

    def places(self, step: int, lo: int, hi: int) -> list[tuple[int, int]]:
        """The components, and the windows in them, that are rows lo to hi (exclusive) of a step."""
        assert 0 <= lo <= hi <= self._batch_size, (lo, hi, self._batch_size)
        first = step * self._batch_size
        rows = map(self._schedule.place, range(first + lo, first + hi))
        return [(part, cast(int, self._orders[part][index])) for part, index in rows]

    def rows(self, step: int, lo: int, hi: int) -> np.ndarray:
        """Rows lo to hi (exclusive) of the global batch of a step: int32 [hi - lo, seq_len + 1]."""
        tokens = np.empty((hi - lo, self._width), np.int32)
        for first in range(lo, hi, _ROWS_AT_ONCE):
            if self._closed.is_set():
                raise Closed
            places = self.places(step, first, min(first + _ROWS_AT_ONCE, hi))
            for part, windows in enumerate(self._windows):
                rows = [row for row, place in enumerate(places, first - lo) if place[0] == part]
                examples = windows.take([places[row - (first - lo)][1] for row in rows])
                for row, example in zip(rows, examples, strict=True):
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
        self,
        start_step: int,
        sharding: jax.sharding.Sharding,
        *,
        prefetch: int = PREFETCH,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[jax.Array]:
        """The batches from `start_step` on, without end.

        A thread reads `prefetch` batches ahead, from the first `next` until the iterator is closed
        or collected; then it ends within a few rows. What goes wrong in it is raised by the `next`
        that asks for that batch. The iterator ends when a batch is waited for and `stop()` is true.
        One stream of an object at a time.
        """
        closed = self._closed = threading.Event()
        threads = ThreadPoolExecutor(1, thread_name_prefix="batches")
        ahead: deque[Future[jax.Array]] = deque()
        try:
            for step in itertools.count(start_step):
                ahead.append(threads.submit(self.place, step, sharding))
                if len(ahead) > prefetch:
                    batch = ahead.popleft()
                    while not batch.done():
                        if stop():
                            return
                        wait([batch], _ASK_S)
                    yield batch.result()
        finally:
            closed.set()
            threads.shutdown(wait=False, cancel_futures=True)


def windows(split: "Windows", batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All windows of a split in order, in batches of one size B for evaluation.

    Yields dicts of `tokens` int32 [B, seq_len + 1], `n_targets` int32 [B] and `n_bytes` int64 [B]. The last
    batch is filled up with rows of zeros, which have no targets.
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
