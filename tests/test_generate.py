import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax import cache as caches
from cla_jax.config import MeshConfig
from cla_jax.generate import Sampling, decode, decoding_weights, generate, sample
from cla_jax.mesh import AxisRules, axis_rules, make_mesh
from cla_jax.model.transformer import Execution, document_starts, project
from cla_jax.state import layout
from tests import reference
from tests.conftest import MODEL, replace

RULES, RUN = AxisRules(), Execution()
T = 150  # more than one block of the cache
TOKENS = jax.random.randint(jax.random.key(1), (3, T), 0, 260)
FORMAT = caches.make_format("dense", "float32")

make = functools.cache(reference.randomised)


def cached_logits(model, tokens, chunk, *, end=None, rules=RULES):
    """Scores of every position, decoded through a cache in steps of `chunk` tokens."""
    config = model.config
    weights = decoding_weights(model, rules)
    batch, length = tokens.shape
    cache = caches.allocate(FORMAT, config, batch=batch, capacity=length, rules=rules)
    starts = jnp.zeros_like(tokens) if end is None else document_starts(tokens, end)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(cache, tokens_BT, starts_BT, index):
        positions = jnp.zeros_like(tokens_BT) + index + jnp.arange(tokens_BT.shape[1])
        x, cache = decode(
            weights,
            config,
            FORMAT,
            cache,
            tokens_BT=tokens_BT,
            positions_BT=positions,
            starts_BT=starts_BT,
            index=index,
            rules=rules,
        )
        return project(x, weights.head, rules), cache

    logits = []
    for i in range(0, length, chunk):
        part = slice(i, i + chunk)
        scores, cache = step(cache, tokens[:, part], starts[:, part], i)
        logits.append(scores)
    return jnp.concatenate(logits, axis=1)


@functools.partial(jax.jit, static_argnames="run")
def full_logits(model, tokens=TOKENS, starts=None, run=RUN):
    return model.logits(tokens, run, starts)


def assert_close(a, b):
    """Within 1e-5 of the logits' scale."""
    assert jnp.abs(a - b).max() <= 1e-5 * jnp.abs(b).max()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("kv_map", ["identity", "cla:2", "cla:3", "0,0,2,0,0", "0,1,2,1,2"])
def test_cached_decoding_equals_the_full_forward(kv_map, heads):
    n_heads, n_kv_heads = heads
    config = replace(
        MODEL, n_layers=5, kv_map=kv_map, n_heads=n_heads, n_kv_heads=n_kv_heads, d_head=6
    )
    model = make(config)
    expected = full_logits(model)
    for chunk in (1, 50, T):  # step by step, chunked prefill, prefill in one pass
        assert_close(cached_logits(model, TOKENS, chunk), expected)


def test_documents_stay_apart_in_the_cache_too():
    model = make(MODEL)
    tokens = TOKENS.at[:, 40].set(7).at[1, 90].set(7)
    starts = document_starts(tokens, 7)
    expected = full_logits(model, tokens, starts)
    assert_close(cached_logits(model, tokens, 10, end=7), expected)
    assert jnp.abs(expected - full_logits(model, tokens)).max() > 1e-2


def test_a_slot_for_each_producer_and_none_for_consumers():
    """Bytes of the live cache: CLA2 holds exactly half of MQA's."""
    live = {}
    for kv_map in ("identity", "cla:2", "0,0,2,2"):
        config = replace(MODEL, kv_map=kv_map)
        cache = caches.allocate(FORMAT, config, batch=2, capacity=100, rules=RULES)
        assert len(cache) == config.n_slots
        live[kv_map] = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert live["identity"] == 4 * 2 * 128 * 2 * 8 * 4  # L, B, capacity in blocks, K and V, H, f32
    assert live["cla:2"] == live["0,0,2,2"] == live["identity"] // 2


PROMPTS = [[1, 2, 3], [4] * 40, [5, 6], [7, 8, 9, 10]]
LIMITS = {"new_tokens": 12, "end": 256, "n_ids": 257}
GREEDY = Sampling(temperature=0)


def test_greedy_generation_is_the_argmax_of_the_full_forward():
    model = make(MODEL)
    text = list(PROMPTS[0])
    for _ in range(LIMITS["new_tokens"]):
        scores = full_logits(model, jnp.array([text + [0] * (20 - len(text))]))
        token = int(scores[0, len(text) - 1, :257].argmax())
        if token == 256:
            break
        text.append(token)
    (generated,) = generate(model, PROMPTS[:1], sampling=GREEDY, **LIMITS)
    assert generated == text[3:]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(seed=3, top_k=20, top_p=0.9)])
def test_a_row_of_a_batch_is_the_row_alone(sampling):
    model = make(MODEL)
    together = generate(model, PROMPTS, sampling=sampling, **LIMITS)
    assert any(together)
    if sampling.temperature == 0:
        for prompt, expected in zip(PROMPTS, together, strict=True):
            assert generate(model, [prompt], sampling=sampling, **LIMITS) == [expected]
    else:  # row i draws with the key of row i: row 0 is the one that can stand alone
        assert generate(model, PROMPTS[:1], sampling=sampling, **LIMITS) == together[:1]


def test_generation_on_a_mesh_gives_the_same_tokens():
    config = replace(MODEL, kv_map="0,0,2,0")
    model = make(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    rules = axis_rules(config, mesh)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, layout(model, rules, mesh))
        for sampling in (GREEDY, Sampling(seed=1)):
            ours = generate(sharded, PROMPTS, sampling=sampling, rules=rules, **LIMITS)
            assert ours == generate(model, PROMPTS, sampling=sampling, **LIMITS)


def test_generation_stops_at_the_end_token():
    model = make(MODEL)
    (free,) = generate(model, PROMPTS[:1], sampling=GREEDY, **LIMITS)
    end = free[4]
    stopped = generate(model, PROMPTS[:1], sampling=GREEDY, new_tokens=12, end=end, n_ids=257)
    assert stopped == [free[: free.index(end)]]


def test_seeds_differ_and_repeat():
    model = make(MODEL)
    runs = [generate(model, PROMPTS, sampling=Sampling(seed=s), **LIMITS) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    same = generate(model, [PROMPTS[0]] * 3, sampling=Sampling(seed=1), **LIMITS)
    assert len({tuple(row) for row in same}) == 3  # rows draw independently


def test_sampling_draws_from_the_distribution():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    draws = 4000

    def frequencies(**options):
        keys = jax.random.split(jax.random.key(0), draws)
        tokens = sample(jnp.tile(logits, (draws, 1)), keys, Sampling(**options))
        return np.bincount(tokens, minlength=4) / draws

    np.testing.assert_allclose(frequencies(), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    np.testing.assert_allclose(frequencies(top_k=2), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.7), [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_allclose(frequencies(top_p=0.1), [1, 0, 0, 0])
    np.testing.assert_allclose(frequencies(temperature=0), [1, 0, 0, 0])
    squared = np.array([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), squared / squared.sum(), atol=0.03)
    # Top-k first: of the two left, the first has 0.625 and is enough.
    np.testing.assert_allclose(frequencies(top_k=2, top_p=0.6), [1, 0, 0, 0])


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 257]], {}, "prompt 0 has a token outside the vocabulary of 257"),
        ([[-1]], {}, "outside the vocabulary"),
        ([[1]], {"new_tokens": 0}, "new_tokens = 0"),
        ([], {}, "no prompt"),
    ],
)
def test_bad_prompts_are_refused(prompts, options, words):
    with pytest.raises(ValueError, match=words):
        generate(make(MODEL), prompts, **(LIMITS | options))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"seed": 2**40},
    ],
)
def test_bad_sampling_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Sampling(**options)


def test_unknown_format_and_empty_cache_are_refused():
    with pytest.raises(ValueError, match=r"'dens'.*dense"):
        caches.make_format("dens", "float32")
    with pytest.raises(ValueError, match="0 tokens"):
        caches.allocate(FORMAT, MODEL, batch=1, capacity=0, rules=RULES)


def test_decoding_copies_no_cache_and_no_stacked_weights():
    """Temporaries of a compiled step stay far below the cache and the weights."""
    config = replace(MODEL, d_model=128, d_ff=256, n_layers=8)
    model = make(config)
    weights = decoding_weights(model, RULES)
    cache = caches.allocate(FORMAT, config, batch=4, capacity=4096, rules=RULES)
    zeros = jnp.zeros((4, 1), jnp.int32)

    def step(weights, cache, index):
        return decode(
            weights,
            config,
            FORMAT,
            cache,
            tokens_BT=zeros,
            positions_BT=zeros + index,
            starts_BT=zeros,
            index=index,
            rules=RULES,
        )

    def loop(weights, cache):
        body = lambda i, cache: step(weights, cache, i)[1]
        return jax.lax.fori_loop(0, 100, body, cache)

    compiled = jax.jit(loop, donate_argnums=1).lower(weights, cache).compile()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert compiled.memory_analysis().temp_size_in_bytes < 0.05 * held
