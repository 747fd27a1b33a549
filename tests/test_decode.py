"""Prefill = chunked prefill = step by step = no cache at all; and the bugs that others had."""

import dataclasses
import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from cla_jax.cache import CacheSpec, cache_spec
from cla_jax.config import ModelConfig, SquaredReLU, SwiGLU
from cla_jax.decode import _group, decode, decoding_weights, prefill
from cla_jax.model.transformer import ForwardOptions, document_starts, project
from cla_jax.scoring import _cached_nll
from tests import reference
from tests.conftest import MODEL, replace
from tests.test_kv_map import map_pairs, together

OPTIONS = ForwardOptions()
T = 150  # more than one block of the cache
TOKENS = np.random.default_rng(1).integers(0, 260, (3, T))

make = functools.cache(reference.randomised)


@functools.partial(jax.jit, static_argnames=("spec", "sized", "tag"), donate_argnames="cache")
def step(weights, cache, tokens, counts, starts, *, spec, sized, tag=None):  # noqa: ARG001
    x, cache = decode(weights, spec, cache, tokens, counts, starts if sized else None)
    return project(x, weights.head, spec.rules), cache


def cached_logits(model, tokens, chunk, *, lengths=None, starts=None, format="dense", tag=None):
    """Scores of every position, decoded through a cache in steps of up to `chunk` tokens per row."""
    rows, T = tokens.shape
    lengths = np.full(rows, T) if lengths is None else np.array(lengths)
    weights = decoding_weights(model)
    spec = cache_spec(model.config, format, batch=rows, capacity=T, chunk=chunk)
    cache = spec.allocate()
    padded = np.pad(tokens, [(0, 0), (0, -T % chunk)])
    from_ = np.zeros_like(padded) if starts is None else np.pad(starts, [(0, 0), (0, -T % chunk)])
    logits = []
    for i in range(0, T, chunk):
        part = slice(i, i + chunk)
        counts = np.clip(lengths - i, 0, chunk)
        scores, cache = step(
            weights,
            cache,
            padded[:, part],
            counts,
            from_[:, part],
            spec=spec,
            sized=starts is not None,
            tag=tag,
        )
        logits.append(scores)
    assert (np.asarray(cache.lengths_B) == lengths).all()
    return jnp.concatenate(logits, axis=1)[:, :T]


@jax.jit
def full_logits(model, tokens, starts=None):
    return model.logits(tokens, OPTIONS, starts)


def assert_close(a, b):
    """Within 1e-5 of the logits' scale."""
    assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()


MAPS = {
    "identity": "0",
    "cla:2": "0",
    "cla:3": "20,20,50,50,50",
    "0,0,2,0,0": "0,0,33,0,0",
    "0,1,2,1,2": "0",
}


@pytest.mark.parametrize(
    # Chunks: step by step, chunked with the last one padded, in one pass.
    ("kv_map", "n_kv_heads", "chunks"),
    [
        (kv_map, n_kv_heads, (1, 47, T))
        for kv_map, n_kv_heads in zip(MAPS, (4, 2, 1, 1, 2), strict=True)
    ],
)
def test_cached_decoding_equals_the_full_forward(kv_map, n_kv_heads, chunks):
    config = replace(
        MODEL,
        n_layers=5,
        kv_map=kv_map,
        windows=MAPS[kv_map],
        n_kv_heads=n_kv_heads,
        d_head=6,
    )
    model = make(config)
    expected = full_logits(model, TOKENS)
    for chunk in chunks:
        assert_close(cached_logits(model, TOKENS, chunk), expected)


@st.composite
def models(draw):
    k_map, v_map, text = draw(map_pairs(4))
    kv_heads = draw(st.sampled_from([1, 2]))
    alike = together(k_map, v_map)
    window = {layer: draw(st.sampled_from([0, 0, 1, 7, 40])) for layer in set(alike)}
    return ModelConfig(
        vocab_size=61,
        n_layers=len(k_map),
        d_model=8,
        d_ff=12,
        n_heads=kv_heads * draw(st.sampled_from([1, 3])),
        n_kv_heads=kv_heads,
        d_head=draw(st.sampled_from([2, 6])),
        kv_map=text,
        windows=",".join(str(window[layer]) for layer in alike),
        kv_norm=draw(st.sampled_from(["own", "block"])),
        mlp=draw(st.sampled_from([SwiGLU(), SquaredReLU()])),
        compute_dtype="float32",
    )


@pytest.mark.slow
@settings(max_examples=6, deadline=None)
@given(
    config=models(),
    chunk=st.sampled_from([3, 32, 140]),
    lengths=st.lists(st.integers(1, 140), min_size=3, max_size=3),
)
def test_any_model_any_chunk_any_lengths(config, chunk, lengths):
    """Prompts of a batch, chunk by chunk, then token by token: as if there were no cache."""
    model = reference.randomised(config)
    tokens = np.random.default_rng(0).integers(0, 61, (3, 160))
    expected = full_logits(model, tokens)
    weights = decoding_weights(model)
    spec = cache_spec(config, batch=3, capacity=160, chunk=chunk)
    prompts = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    empty = spec.allocate()
    last, cache = prefill(weights, spec, empty, prompts)
    assert all(array.is_deleted() for array in jax.tree.leaves(empty.kv_layers))  # filled in place
    rows, at = np.arange(3), np.array(lengths)
    assert_close(project(last[:, None], weights.head, spec.rules)[:, 0], expected[rows, at - 1])
    for i in range(20):
        scores, cache = step(
            weights,
            cache,
            tokens[rows, at + i][:, None],
            np.ones(3, np.int32),
            np.zeros((3, 1), np.int32),
            spec=spec,
            sized=False,
        )
        assert_close(scores[:, 0], expected[rows, at + i])


@pytest.mark.parametrize("windows", ["0", "25"])
def test_documents_stay_apart_in_the_cache_too(windows):
    model = make(replace(MODEL, windows=windows))
    tokens = TOKENS.copy()
    tokens[:, 40] = tokens[1, 90] = 7
    starts = np.asarray(document_starts(jnp.array(tokens), 7))
    expected = full_logits(model, tokens, starts)
    for chunk in (1, 10):
        assert_close(cached_logits(model, tokens, chunk, starts=starts), expected)
    assert jnp.abs(expected - full_logits(model, tokens)).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("format", ["dense", "int8", "kivi4"])
def test_a_ring_is_as_good_as_a_whole_kv_layer(format):
    """Long enough that groups in the ring are written over; a window and a step take more than a unit."""
    model = make(replace(MODEL, windows="100"))
    tokens = np.random.default_rng(2).integers(0, 260, (1, 700))
    weights = decoding_weights(model)
    last = []
    for capacity in (200, 700):  # the first is made for steps of 70, the second never wraps
        spec = cache_spec(
            model.config, format, batch=1, capacity=700, chunk=70 if capacity == 200 else 699
        )
        assert spec.is_ring(0) == (capacity == 200)
        cache = spec.allocate()
        for i in range(0, 700, 70):
            x, cache = step(
                weights,
                cache,
                tokens[:, i : i + 70],
                np.array([70]),
                np.zeros((1, 70), np.int32),
                spec=spec,
                sized=False,
            )
        last.append(x)
    assert jnp.abs(last[0] - last[1]).max() <= 1e-3 * jnp.abs(last[1]).max()


def test_rows_of_a_batch_may_grow_by_different_numbers_of_tokens():
    model = make(replace(MODEL, windows="30"))
    lengths = [T, 61, 7]
    scores, expected = cached_logits(model, TOKENS, 13, lengths=lengths), full_logits(model, TOKENS)
    for row, n in enumerate(lengths):
        assert_close(scores[row, :n], expected[row, :n])


def test_tokens_beyond_the_capacity_are_padding():
    """They were once seen by nobody and counted all the same."""
    model = make(MODEL)
    weights, spec = decoding_weights(model), cache_spec(MODEL, batch=1, capacity=100, chunk=60)
    cache = spec.allocate()
    for _ in range(3):
        _, cache = decode(weights, spec, cache, TOKENS[:1, :60], np.array([60]))
    assert cache.lengths_B.tolist() == [100]


def test_no_more_tokens_are_counted_than_a_step_has():
    weights, spec = decoding_weights(make(MODEL)), cache_spec(MODEL, batch=2, capacity=100, chunk=8)
    _, cache = decode(weights, spec, spec.allocate(), TOKENS[:2, :8], np.array([3, 50]))
    assert cache.lengths_B.tolist() == [3, 8]


def test_a_cache_that_was_reset_is_as_new():
    """Nothing of its former rows is seen, in rings and quantised KV layers too."""
    config = replace(MODEL, n_layers=4, kv_map="cla:2", windows="0,0,20,20")
    weights = decoding_weights(make(config))
    for format in ("dense", "kivi4"):
        spec = cache_spec(config, format, batch=1, capacity=200, chunk=16)
        fresh, cache = prefill(weights, spec, spec.allocate(), [[3] * 21])
        _, cache = prefill(weights, spec, cache, [TOKENS[0].tolist()])
        again, _ = prefill(weights, spec, cache, [[3] * 21])
        assert (fresh == again).all()


def test_what_a_row_holds_of_a_prompt_is_not_computed_again():
    weights, prompt = decoding_weights(make(MODEL)), TOKENS[0, :30].tolist()
    spec = cache_spec(MODEL, batch=1, capacity=100, chunk=8)
    expected, cache = prefill(weights, spec, spec.allocate(), [prompt])
    found, cache = prefill(weights, spec, cache, [prompt], held={0: 16})
    assert_close(found, expected)
    assert cache.lengths_B.tolist() == [30]
    # The hidden state of the last token is the result: it must be computed.
    for held in ({0: 30}, {0: -1}, {1: 1}):
        with pytest.raises(ValueError, match="cannot hold"):
            prefill(weights, spec, cache, [prompt], held=held)


def test_what_is_not_finite_does_not_reach_the_next_window_of_an_evaluation():
    weights = decoding_weights(make(MODEL))
    broken = dataclasses.replace(
        weights, embedding=weights.embedding.at[200].set(np.nan), own_head=weights.head
    )
    spec = cache_spec(MODEL, batch=1, capacity=40, chunk=8)

    def nll(cache, window):
        of_window = functools.partial(_cached_nll, spec=spec, end=None, begins=None)
        return of_window(broken, cache, window[None])

    good = TOKENS[0, :41] % 200
    expected, _ = nll(spec.allocate(), good)
    bad, cache = nll(spec.allocate(), np.full(41, 200))
    assert np.isnan(bad).all()
    assert (nll(cache, good)[0] == expected).all()


# --------------------------------------------------------------- bugs that other implementations had


def test_sharing_is_not_lost_without_a_cache():
    """transformers#45242, mlx-lm#1674: without a cache object, consumers computed keys of their own.

    Here they have nothing to compute them with; and the model without a cache is the reference's.
    """
    config = replace(MODEL, kv_map="0,0,2,2")
    model = make(config)
    expected = reference.logits(model, config, TOKENS[0])
    assert_close(model.logits(TOKENS[:1], OPTIONS)[0], jnp.array(expected, jnp.float32))
    assert_close(cached_logits(model, TOKENS[:1], 1)[0], jnp.array(expected, jnp.float32))
    assert all(group.projection is not None for group in model.stacks)
    keys = [leaf.shape for leaf in jax.tree.leaves([group.projection for group in model.stacks])]
    assert all(shape[0] == 2 for shape in keys)  # two producers, no consumer


def test_a_consumers_query_stands_where_its_producers_did():
    """mlx-lm#1384, #1396: shared layers read the RoPE offset after the producer had advanced it."""
    config = replace(MODEL, n_layers=2, kv_map="0,0")
    model = make(config)
    expected = full_logits(model, TOKENS)
    # An offset that is one too far is wrong from the first step of each chunk on.
    for chunk in (1, 2, 75):
        assert_close(cached_logits(model, TOKENS, chunk), expected)


def test_a_consumer_one_position_off_would_be_noticed(monkeypatch):
    """The test above sees the bug it is for."""
    config = replace(MODEL, n_layers=2, kv_map="0,0")
    model = make(config)
    attend, calls = CacheSpec.attend, []

    def advanced(self, p, layer, q_BTKGH, step):
        calls.append(1)
        late = step.positions_BT + 1 - len(calls) % 2  # the second layer of the two
        return attend(self, p, layer, q_BTKGH, step._replace(positions_BT=late))

    _group.clear_cache()
    monkeypatch.setattr(CacheSpec, "attend", advanced)
    ours = cached_logits(model, TOKENS, 75, tag="advanced")
    _group.clear_cache()
    assert jnp.abs(ours - full_logits(model, TOKENS)).max() > 1e-2


def test_no_kv_layer_is_allocated_or_written_for_a_consumer(monkeypatch):
    """transformers#39764, gemma.cpp#1012: consumers called update and wasted what they should save."""
    config = replace(MODEL, kv_map="0,0,2,0")
    model = make(config)
    weights = decoding_weights(model)
    spec = cache_spec(config, batch=3, capacity=T, chunk=T)
    assert len(spec.allocate().kv_layers) == 2
    written = []
    write = type(spec.formats[0]).write
    recorded = lambda self, *args: written.append(1) or write(self, *args)
    monkeypatch.setattr(type(spec.formats[0]), "write", recorded)
    jax.eval_shape(
        lambda cache: decode(weights, spec, cache, TOKENS, np.full(3, T)), spec.allocate()
    )
    assert len(written) == 2


def test_equal_groups_are_traced_once():
    """By the format and window of their KV layer, and their own shape."""
    config = replace(MODEL, n_layers=8, kv_map="0,0,2,2,4,4,6,7", windows="0,0,0,0,9,9,0,0")
    weights = decoding_weights(make(config))
    spec = cache_spec(config, batch=3, capacity=T, chunk=T)
    assert [spec.representative(p) for p in range(5)] == [0, 0, 2, 0, 0]
    rows = (spec.allocate(), TOKENS, np.full(3, T), TOKENS)
    text = step.lower(weights, *rows, spec=spec, sized=False).as_text()
    assert text.count("call @_group") == 5
    assert text.count("func.func private @_group") == 3


@pytest.mark.parametrize("kv_map", ["0,0,2,2", "0,0,2,0", "0,1,0,1"])
def test_kv_layers_are_found_by_their_producer_not_by_counting_layers(kv_map):
    """kvcached#417 and others: the map 0,0,2,2 has KV layers 0 and 1 for producers 0 and 2."""
    model = make(replace(MODEL, kv_map=kv_map))
    assert_close(cached_logits(model, TOKENS, 50), full_logits(model, TOKENS))


def test_a_shared_cache_holds_half_the_bytes():
    live = {}
    for kv_map in ("identity", "cla:2", "0,0,2,2"):
        config = replace(MODEL, kv_map=kv_map)
        cache = cache_spec(config, batch=2, capacity=100).allocate()
        live[kv_map] = sum(leaf.nbytes for leaf in jax.tree.leaves(cache.kv_layers))
    assert live["identity"] == 4 * 2 * 128 * 2 * 8 * 4  # L, B, capacity in blocks, K and V, H, f32
    assert live["cla:2"] == live["0,0,2,2"] == live["identity"] // 2
