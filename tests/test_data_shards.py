"""Records that are put together here are those that tfds would write and read."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cla_jax.data import shards


@pytest.mark.parametrize(
    ("dtype", "most"), [(np.uint16, 100), (np.uint16, 65535), (np.int32, 1 << 24)]
)
def test_tfds_reads_the_windows_that_were_written(dtype, most):
    random = np.random.default_rng(0)
    tokens_NT = random.integers(0, most, (50, 9), dtype=dtype)
    tokens_NT[0, :8] = [0, 1, 127, 128, 16383, 16384, 65535, most] if most > 128 else 0
    n_targets_N = random.integers(0, 9, 50)
    n_bytes_N = random.integers(0, 1 << 40, 50)
    n_bytes_N[:3] = 0, 127, 128
    features = tfds.features.FeaturesDict(
        {
            "tokens": tfds.features.Tensor(shape=(9,), dtype=dtype),
            "n_targets": np.int32,
            "n_bytes": np.int64,
        }
    )
    found = list(shards.records(tokens_NT, n_targets_N, n_bytes_N))
    assert len(found) == 50
    for i, record in enumerate(found):
        example = features.deserialize_example_np(record)
        np.testing.assert_array_equal(example["tokens"], tokens_NT[i])
        assert example["tokens"].dtype == dtype
        assert (example["n_targets"], example["n_bytes"]) == (n_targets_N[i], n_bytes_N[i])
        whole = features.serialize_example(dict(example))
        assert len(record) == len(whole)  # the order of the fields is free
