"""Evicting caches: real storage equals a mask over everything, T = 1 equals dense, bytes are what is kept."""

import dataclasses
import functools
import itertools

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from cla_jax.cache import cache_spec, ledger
from cla_jax.cache.evicting import (
    BLOCK,
    MOST_SLICES,
    NO_PAGE,
    evicting_spec,
    page_size,
    taken,
)
from cla_jax.compressor import Compressor, _encoded, scratch_spec, size_of
from cla_jax.config import LatentKV
from cla_jax.decode import decode, decoding_weights
from cla_jax.eviction import parse
from cla_jax.eviction.rule import EMPTY, PUNCTUATION, SPECIAL
from tests import reference
from tests.conftest import MODEL, replace
from tests.masked import masked_cache

CLASSES = np.zeros(260, np.uint8)
CLASSES[[0]] = SPECIAL
CLASSES[[40, 41, 42, 43, 44]] = PUNCTUATION
DRAW = np.random.default_rng(3)
TOKENS = DRAW.choice([0, 40, 41, 42, *range(50, 120)], (3, 96)).astype(np.int32)

make = functools.cache(reference.randomised)


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="cache")
def step(weights, cache, tokens, counts, *, spec):
    x, cache = decode(weights, spec, cache, tokens, counts)
    return weights.logits(x, spec.rules), cache


def filled(config, policy, prompts, *, capacity=96, chunk=1, page=4):
    sizes = {"batch": len(prompts), "capacity": capacity, "chunk": chunk, "page": page}
    spec = evicting_spec(config, parse(policy), classes=CLASSES.tobytes(), **sizes)
    compressor = Compressor(decoding_weights(make(config)), spec)
    x, cache = compressor.fill(
        compressor.spec.allocate(), dict(enumerate(prompts)), capacity - max(map(len, prompts))
    )
    return compressor, x, cache


def continued(weights, spec, cache, tokens, counts):
    """Logits of further tokens, [steps, B, T, V], and the cache."""
    found = []
    for tokens_BT, counts_B in zip(tokens, counts, strict=True):
        logits, cache = step(weights, cache, tokens_BT, counts_B, spec=spec)
        found.append(
            np.where((np.arange(tokens_BT.shape[1]) < counts_B[:, None])[..., None], logits, 0)
        )
    return np.array(found), cache


@pytest.mark.parametrize("heads", [1, 3, MOST_SLICES // 2, MOST_SLICES - 1, MOST_SLICES + 1])
def test_pages_are_taken_wherever_they_lie(heads):
    """Side by side, where one slice has them all, also at the end of the pool; and anywhere else."""
    pages = 2 * MOST_SLICES + 2
    pool = {
        "codes": DRAW.integers(-9, 9, (pages, 4, 1, 2)),
        "scales": DRAW.normal(size=(pages, 4, 1)),
    }
    beside = 2 * np.arange(heads)[:, None] + np.arange(2)
    beside[-1] = pages - 2, pages - 1
    apart = beside.copy()
    apart[heads // 2] = apart[heads // 2, ::-1]  # of one head only
    one_each = np.stack(
        [beside[:, 1], np.full(heads, NO_PAGE)], axis=1
    )  # one is the last of the pool
    none = one_each.copy()
    none[0] = NO_PAGE
    hole = apart.copy()
    hole[-1, 0] = NO_PAGE
    for pages_NM in (beside, apart, apart[:, ::-1], beside[:, :1], one_each, none, hole):
        found = jax.jit(taken)(jax.tree.map(jax.numpy.asarray, pool), pages_NM)
        for name, array in pool.items():
            expected = np.float32(array[np.where(pages_NM == NO_PAGE, 0, pages_NM)])
            expected[pages_NM == NO_PAGE] = 0
            np.testing.assert_array_equal(found[name], expected.reshape(-1, *array.shape[1:]))


def test_what_others_left_after_the_last_page_of_a_head_is_not_taken():
    pool = np.full((6, 4, 1, 2), np.nan, np.float32)
    pool[2] = 1
    found = jax.jit(taken)(pool, np.array([[2, NO_PAGE, NO_PAGE]]))
    assert (found[0] == 1).all()
    assert (found[1:] == 0).all()


def test_pages_that_lie_side_by_side_are_taken_in_one_slice_per_head():
    pages_NM = np.arange(6).reshape(2, 3)
    program = jax.jit(taken).lower(np.zeros((8, 4, 1, 2), np.float32), pages_NM).as_text()
    assert "tensor<3x4x1x2xf32>" in program


def test_a_head_gets_pages_that_lie_side_by_side():
    """Also after rows have left, in whatever order: the lowest free pages come first."""
    compressor, _, cache = filled(MODEL, "window:keep=1", TOKENS, capacity=128)
    for row in (2, 0):
        compressor.release(row)
    _, cache = compressor.fill(cache, {0: TOKENS[0], 2: TOKENS[2]}, 32)
    for pool in cache.kv_layers:
        for table in np.asarray(pool.table).reshape(-1, pool.table.shape[-1]):
            held = table[table < compressor.spec.pages[0]]
            assert len(held) > 2
            assert (np.diff(held) == 1).all()


def kept_of(cache):
    """The positions in each head's entries, of each KV layer."""
    found = []
    for pool in cache.kv_layers:
        positions = np.asarray(pool.positions)
        found.append([[sorted(head[head < EMPTY].tolist()) for head in row] for row in positions])
    return found


def scores_of(pool, shape):
    """The score of each position that a head holds, [B, K, positions]; NaN elsewhere."""
    found = np.full(shape, np.nan)
    positions, scores = np.asarray(pool.positions), np.asarray(pool.scores)
    b, k, e = np.nonzero(positions < EMPTY)
    found[b, k, positions[b, k, e]] = scores[b, k, e]
    return found


POLICIES = (
    "fastgen:T=0.6,r_l=0.2,r_f=0.1,sinks=1,recent=2",
    "window:tokens=9,sinks=2,recent=3",
    "h2o:keep=0.3,sinks=2,recent=3",
    "snapkv:tokens=14,window=6,sinks=2,recent=2,pool=3",
    "adakv:keep=0.5,window=6,sinks=2,recent=2,floor=0.2",
    "random:tokens=11,sinks=1,recent=4,seed=7",
)
# The keys of layer 1 are read with the values of layer 0; layer 3 reads only its own.
SPLIT = "k=0,1,1,3;v=0,0,0,3"
MAPS = ((2, "0,1"), (2, "0,0"), (3, "0,1,0"), (4, SPLIT), (4, "fused-lite"), (3, "k=0,1,1;v=0,0,2"))
SHARED = replace(MODEL, n_layers=2, n_kv_heads=2)  # one KV layer


@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(st.data())
def test_real_storage_equals_a_mask(data):
    n_layers, kv_map = data.draw(st.sampled_from(MAPS))
    config = replace(
        MODEL,
        n_layers=n_layers,
        kv_map=kv_map,
        n_kv_heads=data.draw(st.sampled_from([1, 2, 4])),
    )
    lengths = data.draw(st.lists(st.integers(30, 48), min_size=2, max_size=2))
    policy, chunk = data.draw(st.sampled_from(POLICIES)), data.draw(st.sampled_from([1, 3]))
    assert_storage_equals_mask(config, policy, lengths, chunk)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_on_shared_layers_and_ragged_rows(policy):
    assert_storage_equals_mask(SHARED, policy, [45, 33], 1)


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[4], POLICIES[5]])
def test_keys_and_values_of_different_layers_are_kept_together(policy):
    config = replace(MODEL, n_layers=4, kv_map=SPLIT, n_kv_heads=2)
    cache = assert_storage_equals_mask(config, policy, [45, 33], 1)
    first, second, third = kept_of(cache)
    assert first == second != third
    assert cache.kv_layers[1].kept.v_BSKH is None  # made by no layer, and stored by none


def test_bytes_of_keys_and_values_of_different_layers():
    config = replace(MODEL, n_layers=4, kv_map=SPLIT, n_kv_heads=2)
    prompts = [TOKENS[0, :45].tolist(), TOKENS[1, :33].tolist()]
    compressor, _, cache = filled(config, "h2o:keep=0.4,sinks=2,recent=3", prompts, capacity=64)
    entries = [int(one.kept_BKS.sum()) for one in compressor.chosen]
    predicted = ledger.predicted_evicting(compressor.spec, entries)
    counted = ledger.counted_evicting(compressor.spec, cache)
    assert dataclasses.replace(counted, pages=0) == predicted
    kept, half = (
        2 * 18 + 2 * 14,
        8 * 4,
    )  # 0.4 of 45 and of 33, rounded up; bytes of a head in float32
    assert entries == [kept] * 3
    assert counted.resident == kept * half * (2 + 1 + 2)
    # Keys of layers 0, 1 and 3 have 1, 2 and 1 readers; values of layers 0 and 3 have 3 and 1.
    assert counted.read == kept * half * (1 + 2 + 1 + 3 + 1)


def assert_storage_equals_mask(config, policy, lengths, chunk):
    prompts = [TOKENS[row, :n].tolist() for row, n in enumerate(lengths)]
    compressor, _, cache = filled(config, policy, prompts, capacity=72, chunk=chunk)
    spec, masked = masked_cache(compressor, prompts, 72)
    more = np.array([TOKENS[row, n : n + 24] for row, n in enumerate(lengths)])
    tokens = [more[:, i : i + chunk] for i in range(0, 24, chunk)]
    # In one step a row is idle.
    counts = [np.array([chunk, 0 if i == 2 else chunk]) for i in range(len(tokens))]
    ours, cache = continued(compressor.weights, compressor.spec, cache, tokens, counts)
    theirs, masked = continued(compressor.weights, spec, masked, tokens, counts)
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    expected = [
        [[np.flatnonzero(head).tolist() for head in row] for row in np.asarray(layer.kept_BKE)]
        for layer in masked.kv_layers
    ]
    assert kept_of(cache) == expected
    if compressor.spec.ranks:
        for pool, layer in zip(cache.kv_layers, masked.kv_layers, strict=True):
            scores = scores_of(pool, layer.scores_BKE.shape)
            np.testing.assert_allclose(
                scores[layer.kept_BKE], layer.scores_BKE[layer.kept_BKE], rtol=1e-4
            )
    total = sum(len(head) for layer in expected for row in layer for head in row)
    everything = sum(lengths) + 48 - chunk
    assert total < everything * config.n_kv_heads * config.n_kv_layers  # something was evicted
    return cache


def test_full_keeps_everything_and_gives_the_tokens_of_a_dense_cache():
    prompts = [TOKENS[0, :45].tolist(), TOKENS[1, :33].tolist()]
    compressor, x, cache = filled(SHARED, "fastgen:T=1", prompts, capacity=61)
    dense = cache_spec(SHARED, "dense", batch=2, capacity=61, chunk=48)
    weights, counts = compressor.weights, np.array([45, 33], np.int32)
    tokens = np.zeros((2, 48), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    logits, plain = step(weights, dense.allocate(), tokens, counts, spec=dense)
    last = weights.logits(x, dense.rules)
    one = np.ones(2, np.int32)
    for _ in range(16):
        rows = np.arange(2), counts - 1
        np.testing.assert_allclose(last[rows], logits[rows], atol=1e-5 * np.abs(logits).max())
        drawn = np.asarray(logits[rows].argmax(-1), np.int32)
        np.testing.assert_array_equal(drawn, last[rows].argmax(-1))
        last, cache = step(weights, cache, drawn[:, None], one, spec=compressor.spec)
        logits, plain = step(weights, plain, drawn[:, None], one, spec=dense)
        counts = one
    assert kept_of(cache) == [[[list(range(61))] * 2, [list(range(49))] * 2]]


@pytest.mark.parametrize("format", ["dense", "int8"])
def test_bytes_are_those_of_what_is_kept(format):
    prompts = [TOKENS[0, :45].tolist(), TOKENS[1, :33].tolist()]
    policy = f"h2o:keep=0.4,sinks=2,recent=3,format={format}"
    compressor, _, cache = filled(SHARED, policy, prompts, capacity=64)
    entries = [int(one.kept_BKS.sum()) for one in compressor.chosen]
    assert entries == [2 * 18 + 2 * 14]  # 0.4 of 45 and of 33, rounded up
    predicted = ledger.predicted_evicting(compressor.spec, entries)
    counted = ledger.counted_evicting(compressor.spec, cache)
    assert dataclasses.replace(counted, pages=0) == predicted
    of_entry = {"dense": 2 * 8 * 4, "int8": 2 * (8 + 2)}[format]
    assert counted.resident == entries[0] * of_entry
    assert counted.notes == entries[0] * 9
    assert counted.read == 2 * counted.resident  # two layers read the one KV layer
    # Pools hold the pages that heads were given, and no more than the next size of a pool.
    assert counted.pages <= counted.allocated
    assert compressor.spec.pages[0] == size_of(counted.pages // (4 * of_entry))
    whole = 2 * 64 * 2 * of_entry  # without positions, classes and scores
    assert counted.allocated < 0.7 * whole


@pytest.mark.slow
def test_a_row_is_filled_again_while_others_go_on():
    first, second = TOKENS[0, :45].tolist(), TOKENS[1, :33].tolist()
    compressor, _, cache = filled(SHARED, POLICIES[0], [first, second], capacity=64)
    alone, _, expected = filled(SHARED, POLICIES[0], [second, second], capacity=64)
    more = [TOKENS[:2, 50 + i : 51 + i] for i in range(6)]
    _, cache = continued(compressor.weights, compressor.spec, cache, more, np.ones((6, 2), int))
    compressor.release(0)
    _, cache = compressor.fill(cache, {0: second}, 31)
    same = [np.repeat(tokens[1:], 2, axis=0) for tokens in more]
    ours, cache = continued(compressor.weights, compressor.spec, cache, same, np.ones((6, 2), int))
    theirs, expected = continued(alone.weights, alone.spec, expected, same, np.ones((6, 2), int))
    np.testing.assert_allclose(ours[:, 0], theirs[:, 0], atol=1e-5 * np.abs(theirs).max())
    assert kept_of(cache)[0][0] == kept_of(expected)[0][0]


def test_the_profile_is_that_of_whole_attention():
    """Received and lost attention, beside sums over matrices of S x S."""
    lengths = np.array([40, 29], np.int32)
    compressor, _, _ = filled(
        SHARED, "fastgen:T=0.5", [TOKENS[r, :n].tolist() for r, n in enumerate(lengths)]
    )
    scratch = scratch_spec(SHARED, compressor.spec.policy, batch=2, tokens=48)
    scratch = dataclasses.replace(scratch, observation=5)
    tokens = np.where(np.arange(48) < lengths[:, None], TOKENS[:2, :48], 0)
    _, encoded = _encoded(
        compressor.weights, scratch.allocate(), tokens, lengths, np.zeros_like(tokens), spec=scratch
    )
    (readers,), notes = encoded.extra.readers, encoded.extra[1:]
    keys = np.asarray(encoded.kv_layers[0].k_BSKH, np.float64)[:, :48]
    S, at = 48, np.arange(48)
    seen = (at[None, :] <= at[:, None]) & (at < lengths[:, None])[:, :, None]
    weights = []
    for reader in readers:
        q = np.asarray(reader.q_BKNH, np.float64).reshape(2, 2, S, 2, 8)
        s = np.where(seen[:, None, :, None], np.einsum("bktgh,bskh->bktgs", q, keys), -np.inf)
        with np.errstate(invalid="ignore"):
            p = np.exp(s - s.max(-1, keepdims=True))
            weights.append(np.nan_to_num(p / p.sum(-1, keepdims=True)))
    received = sum(reader.received_BKS for reader in readers)
    observed = sum(reader.observed_BKS for reader in readers)
    np.testing.assert_allclose(received, sum(p.sum((2, 3)) for p in weights), atol=1e-4)
    last = (at >= lengths[:, None] - 5) & (at < lengths[:, None])
    expected = sum(np.einsum("bktgs,bt->bks", p, last) for p in weights)
    np.testing.assert_allclose(observed, expected, atol=1e-4)
    dropped = np.random.default_rng(0).random((3, 2, 2, S)) < 0.5
    bands = np.array([[1, 1], [7, 9], [3, 40]], np.int32)
    mean, worst, late = scratch.lost(0, encoded.kv_layers[0], readers, notes, dropped, bands)
    for c, r in itertools.product(range(3), range(2)):
        far = (at[:, None] - at[None, :]) >= bands[c][:, None, None]
        gone = np.einsum("bktgs,bks,bts->bkgt", weights[r], dropped[c], far)
        np.testing.assert_allclose(mean[c, r], gone.sum(-1) / lengths[:, None, None], atol=1e-5)
        np.testing.assert_allclose(worst[c, r], gone.max(-1), atol=1e-5)
        np.testing.assert_allclose(late[c, r], gone.sum(-1) / lengths[:, None, None], atol=1e-5)


@pytest.mark.parametrize(
    ("policy", "changes", "words"),
    [
        ("window:keep=0.5", {"windows": "8"}, "not support sliding windows"),
        (
            "window:keep=0.5",
            {"kv": LatentKV(rank=8, rope_dims=4)},
            "does not support model.kv.kind = latent",
        ),
        ("fastgen", {}, "no punctuation tokens"),
    ],
)
def test_models_that_do_not_fit_are_refused(policy, changes, words):
    config = replace(MODEL, **changes)
    with pytest.raises(ValueError, match=words):
        evicting_spec(config, parse(policy), classes=bytes([SPECIAL]), batch=1, capacity=64)


@pytest.mark.parametrize(
    ("capacity", "entries"), [(1, 16), (1500, 16), (4096, 64), (8200, 128), (1 << 20, 256)]
)
def test_long_rows_have_large_pages(capacity, entries):
    """A block that is read at once is whole pages, and a page is at most 1/64 of a long row."""
    assert page_size(capacity) == entries
    assert BLOCK % entries == 0


def test_a_head_that_keeps_everything_does_not_hide_one_that_evicts():
    """One head of a layer keeps all, the other a window: the layer is still searched."""
    config = replace(MODEL, n_kv_heads=2)
    compressor, _, cache = filled(config, "window:keep=0.5", TOKENS, capacity=160)
    widest = [pool._replace(rule=_all_of_first_head(pool.rule)) for pool in cache.kv_layers]
    before = [np.asarray(pool.positions) for pool in widest]
    spec, cache = compressor.spec, dataclasses.replace(cache, kv_layers=tuple(widest))
    ones, weights = np.ones(len(TOKENS), np.int32), decoding_weights(make(config))
    for token in range(4):
        _, cache = step(weights, cache, TOKENS[:, token : token + 1], ones, spec=spec)
    for old, pool in zip(before, cache.kv_layers, strict=True):
        new = np.asarray(pool.positions)
        count = lambda positions: (positions != EMPTY).sum(-1)
        assert (count(new)[:, 0] == count(old)[:, 0] + 4).all()
        assert (count(new)[:, 1] <= count(old)[:, 1] + 2).all()  # half of the new tokens


def _all_of_first_head(rule):
    return rule._replace(since=rule.since.at[:, 0].set(0))
