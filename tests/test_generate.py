import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax import batch as batches
from cla_jax import cache as caches
from cla_jax import decode as decoding
from cla_jax.cache import cache_spec
from cla_jax.config import MeshConfig, Sampling
from cla_jax.decode import decoding_weights
from cla_jax.engine import Engine
from cla_jax.formats import FORMATS
from cla_jax.generate import generate
from cla_jax.mesh import axis_rules, make_mesh, split_cache
from cla_jax.model.transformer import ForwardOptions
from cla_jax.sampling import _cut, sample
from cla_jax.state import layout
from tests import reference
from tests.conftest import MODEL, replace

make = functools.cache(reference.randomised)

PROMPTS = [[1, 2, 3], [4] * 40, [5, 6], [7, 8, 9, 10]]
OPTIONS = {"new_tokens": 12, "stop": [256], "n_ids": 257}
GREEDY = Sampling(temperature=0)


def run(model, prompts, *, format="dense", chunk=16, capacity=64, batch=None, **options):
    weights = decoding_weights(model)
    batch = batch or len(prompts)
    spec = cache_spec(model.config, format, batch=batch, capacity=capacity, chunk=chunk)
    return generate(weights, spec, prompts, **(OPTIONS | options))


def tokens(completions):
    return [completion.tokens for completion in completions]


@jax.jit
def scores(model, tokens):
    return model.logits(tokens, ForwardOptions())


def by_full_forward(model, prompt, new_tokens):
    """Greedy continuation and its log-probabilities, without any cache."""
    text, logprobs = list(prompt), []
    for _ in range(new_tokens):
        padded = jnp.array([text + [0] * (64 - len(text))])
        row = scores(model, padded)[0, len(text) - 1]
        text.append(int(row[:257].argmax()))
        logprobs.append(float(jax.nn.log_softmax(row)[text[-1]]))
    return text[len(prompt) :], logprobs


def test_greedy_generation_is_the_argmax_of_the_full_forward():
    model = make(replace(MODEL, windows="5,5,0,0"))
    completions = run(model, PROMPTS, sampling=GREEDY, stop=[])
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        expected, logprobs = by_full_forward(model, prompt, OPTIONS["new_tokens"])
        assert completion.tokens == expected
        assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert completion.finish == "length"


@pytest.mark.parametrize(
    ("format", "sampling"),
    [
        *((format, GREEDY) for format in ("dense", "int8", "kivi4")),
        ("dense", Sampling(top_k=20, top_p=0.9)),
    ],
)
def test_a_row_of_a_batch_is_the_row_alone(format, sampling):
    """Lengths, seeds and limits of its own, and rows of the batch left empty."""
    prompts = [[1, 2, 3], list(range(150)), [5, 6], list(range(7, 40))]
    model = make(replace(MODEL, windows="90"))
    common = {"sampling": sampling, "format": format, "capacity": 250, "chunk": 32}
    limits, seeds = [60, 40, 3, 50], [5, 6, 7, 8]
    together = run(model, prompts, batch=6, new_tokens=limits, seeds=seeds, **common)
    for i, prompt in enumerate(prompts):
        one = {"new_tokens": [limits[i]], "seeds": [seeds[i]]}
        (alone,) = run(model, [prompt], **one, **common)
        assert (alone.tokens, alone.finish) == (together[i].tokens, together[i].finish)
        # Products of another number of rows are summed in another order; a code may round the other way.
        tolerance = 1e-4 if format == "dense" else 2e-2
        assert alone.logprobs == pytest.approx(together[i].logprobs, abs=tolerance)


@pytest.mark.parametrize("way", ["heads", "replicated", "split"])
def test_generation_on_a_mesh_gives_the_same_tokens(way):
    config = replace(MODEL, kv_map="0,0,2,0", n_kv_heads=2 if way == "heads" else 1)
    model = make(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, model=2))
    rules = axis_rules(config, mesh)
    rules = split_cache(rules, mesh) if way == "split" else rules
    # One of them longer than a block, and one more than the rows.
    prompts = [*PROMPTS[:3], list(range(140)), PROMPTS[3]]
    alone = run(model, prompts, capacity=300, seeds=1)
    with jax.set_mesh(mesh):
        weights = decoding_weights(jax.device_put(model, layout(model, rules, mesh)), rules)
        spec = cache_spec(config, batch=4, capacity=300, chunk=16, rules=rules)
        assert tokens(generate(weights, spec, prompts, seeds=1, **OPTIONS)) == tokens(alone)
        cache = spec.allocate()
        held = cache.kv_layers[0].k_BSKH
        expected = {
            "heads": (("slice", "data", "fsdp"), None, "model", None),
            "replicated": (("slice", "data", "fsdp"), None, None, None),
            "split": (("slice", "data", "fsdp"), "model", None, None),
        }
        assert tuple(jax.typeof(held).sharding.spec) == expected[way]


@pytest.mark.slow
@pytest.mark.parametrize("format", [name for name in FORMATS if name != "dense"])
def test_every_format_can_be_split_over_devices(format, monkeypatch):
    """On the devices attention reads blocks of 32 entries."""
    config = replace(MODEL, n_layers=2)
    model = make(config)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, model=2), jax.devices()[:4])
    rules = split_cache(axis_rules(config, mesh), mesh)
    prompts = [list(range(n)) for n in (210, 7, 180, 150)]  # KIVI's next groups fill up after some
    options = {"capacity": 600, "sampling": GREEDY, "new_tokens": 20, "stop": []}
    alone = run(model, prompts, format=format, **options)
    monkeypatch.setattr(caches, "entries_at_once", lambda *_: 32)
    with jax.set_mesh(mesh):
        weights = decoding_weights(jax.device_put(model, layout(model, rules, mesh)), rules)
        spec = cache_spec(config, format, batch=4, capacity=600, chunk=16, rules=rules)
        options.pop("capacity")
        spread = generate(weights, spec, prompts, n_ids=257, **options)
    for a, b in zip(alone, spread, strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-2)


def test_generation_stops_at_any_of_the_stop_tokens_and_says_so():
    model = make(MODEL)
    (free,) = run(model, PROMPTS[:1], sampling=GREEDY, stop=[])
    stops = [free.tokens[7], free.tokens[4]]
    (stopped,) = run(model, PROMPTS[:1], sampling=GREEDY, stop=stops)
    first = min(free.tokens.index(stop) for stop in stops)
    assert stopped.tokens == free.tokens[:first]
    assert stopped.logprobs == pytest.approx(free.logprobs[:first], abs=1e-6)
    assert (free.finish, stopped.finish) == ("length", "stop")


def test_a_row_that_is_done_meets_no_stop_token():
    """It goes on drawing while others are at work; nothing of that counts."""
    model, options = make(MODEL), {"new_tokens": [2, 12]}
    expected = run(model, PROMPTS[:2], stop=[], **options)
    drawn = {token for completion in expected for token in completion.tokens}
    completions = run(model, PROMPTS[:2], stop=sorted(set(range(257)) - drawn), **options)
    assert completions == expected
    assert [completion.finish for completion in completions] == ["length", "length"]


def test_tokens_are_streamed_as_they_come():
    model = make(MODEL)
    calls = []
    streamed = run(
        model,
        PROMPTS,
        new_tokens=[12, 3, 9, 1],
        stop=[],
        on_tokens=lambda row, new: calls.append((row, new)),
        every=4,
    )
    for row, completion in enumerate(streamed):
        assert [token for r, new in calls if r == row for token in new] == completion.tokens
    assert [len(new) for r, new in calls if r == 0] == [1, 4, 4, 3]
    assert tokens(streamed) == tokens(run(model, PROMPTS, new_tokens=[12, 3, 9, 1], stop=[]))


def test_who_listens_may_end_a_row():
    """Its last tokens are those it was ended with; the other rows are as they were."""
    model = make(replace(MODEL))
    alone = run(model, PROMPTS, new_tokens=12, stop=[])
    ends = {0: 5, 2: 1}  # rows, and how many tokens are enough
    heard = dict.fromkeys(range(len(PROMPTS)), 0)

    def listen(row, new):
        heard[row] += len(new)
        return np.bool_(heard[row] >= ends.get(row, 99))

    ended = run(model, PROMPTS, new_tokens=12, stop=[], on_tokens=listen, every=2)
    for row, (whole, part) in enumerate(zip(alone, ended, strict=True)):
        assert part.tokens == whole.tokens[: {0: 5, 2: 1}.get(row, 12)]
        assert part.finish == ("stop" if row in ends else "length")
        assert len(part.logprobs) == len(part.tokens) == heard[row]


def test_nothing_is_compiled_after_the_first_token_of_each_phase():
    """Other prompts, lengths, limits, seeds and stop tokens run through the same three programs."""
    model = make(replace(MODEL, d_ff=52))  # a shape of its own: nothing is in the cache of programs
    functions = (decoding._prefill_chunk, batches._first, batches._loop)
    before = [f._cache_size() for f in functions]
    run(model, PROMPTS, batch=4)
    counts = [f._cache_size() for f in functions]
    assert [b - a for a, b in zip(before, counts, strict=True)] == [1, 1, 1]
    run(model, [[1], [3] * 33], batch=4, new_tokens=[30, 2], seeds=[7, 8], stop=[4, 5], n_ids=99)
    assert [f._cache_size() for f in functions] == counts


def test_seeds_differ_and_repeat():
    model = make(MODEL)
    runs = [tokens(run(model, PROMPTS, seeds=s)) for s in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    same = tokens(run(model, [PROMPTS[0]] * 3, seeds=1))
    assert len({tuple(row) for row in same}) == 3  # rows draw independently
    same = tokens(run(model, [PROMPTS[0]] * 3, seeds=[4, 4, 5]))
    assert same[0] == same[1] != same[2]


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
    np.testing.assert_allclose(frequencies(temperature=1e-6), [1, 0, 0, 0])
    # Top-k first: of the two left, the first has 0.625 and is enough.
    np.testing.assert_allclose(frequencies(top_k=2, top_p=0.6), [1, 0, 0, 0])


def kept_by_reference(logits, top_k, top_p):
    """Which tokens may be drawn, one after the other, in float64."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))[: top_k or None]
    weights = np.exp(np.array([logits[i] for i in order], np.float64) - max(logits))
    kept, total = [], 0.0
    for i, share in zip(order, weights / weights.sum(), strict=True):
        kept.append(i)
        total += share
        if total >= top_p - 1e-7:
            break
    return sorted(kept)


def test_the_cut_of_top_k_and_top_p_is_exact_with_ties_by_id():
    draw = np.random.default_rng(0)
    cases = [
        ([1, 0, 0, 0, 0], 0, 0.5),
        ([0, 1, 2], 10**12, 0.5),
        ([0, 0, 0, 0], 0, 0.5),
        ([0, 2, 2, 1], 1, 1.0),
    ]
    for _ in range(60):
        logits = draw.integers(0, 4, 12) if draw.integers(2) else draw.normal(size=12) * 3
        cases.append(
            (logits, int(draw.integers(0, 14)), float(draw.choice([0.05, 0.33, 0.71, 1.0])))
        )
    for logits, top_k, top_p in cases:
        logits = np.array(logits, np.float32)
        forbidden = draw.integers(len(logits)) if len(logits) == 12 else None
        if forbidden is not None:
            logits[forbidden] = -np.inf
        sampling = Sampling(top_k=top_k, top_p=top_p)
        found = _cut(jnp.array(logits)[None], sampling)[0]
        expected = kept_by_reference(logits, top_k, top_p)
        expected = [i for i in expected if np.isfinite(logits[i])]
        assert np.flatnonzero(np.isfinite(found)).tolist() == expected, (logits, top_k, top_p)
        np.testing.assert_array_equal(np.asarray(found)[expected], logits[expected])


def test_every_step_draws_anew():
    """Of a model that knows nothing; with one draw for all steps it would say one word for ever."""
    model = jax.tree.map(jnp.zeros_like, make(MODEL))
    (completion,) = run(model, PROMPTS[:1], new_tokens=40, stop=[])
    assert len(set(completion.tokens)) > 30  # of 40, from 257


def test_log_probabilities_are_the_models_whatever_the_sampling():
    model = make(MODEL)
    (completion,) = run(model, PROMPTS[:1], sampling=Sampling(temperature=2.0, top_k=3), stop=[])
    text = PROMPTS[0] + completion.tokens
    scores = jax.nn.log_softmax(model.logits(jnp.array([text]), ForwardOptions())[0])
    expected = [float(scores[i + 2, token]) for i, token in enumerate(completion.tokens)]
    assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "options", "words"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 260]], {}, "prompt 0 has a token outside the vocabulary: ids are 0 to 259"),
        ([[-1]], {}, "outside the vocabulary"),
        ([[1]], {"new_tokens": 0}, "new_tokens = 0"),
        ([[1]], {"new_tokens": [3, 4]}, "2 new_tokens for 1 prompts"),
        ([], {"batch": 1}, "no prompt"),
        (
            [[1], [1] * 60],
            {"new_tokens": 5},
            "prompt 1 has 60 tokens; with 5 new tokens.* 64 tokens",
        ),
        ([[1]], {"seeds": -1}, "seed = -1"),
        ([[1]], {"stop": [300]}, "stop"),
        ([[1]], {"n_ids": 300}, "n_ids"),
        ([[1]], {"every": 0}, "every = 0"),
        ([[1]], {"every": 1.5}, "every = 1.5"),
        ([[1.5]], {}, "prompt 0 is not a sequence of token ids"),
        ([[[1]]], {}, "prompt 0 is not a sequence of token ids"),
        ([["a"]], {}, "prompt 0 is not a sequence of token ids"),
        ([[1]], {"new_tokens": 2.5}, "new_tokens = 2.5 must be an integer"),
        ([[1]], {"new_tokens": None}, "new_tokens = None must be an integer"),
        ([[1]], {"seeds": 1.5}, "seeds = 1.5 must be an integer"),
        ([[1]], {"stop": [1.5]}, "stop"),
    ],
)
def test_bad_prompts_are_refused_before_compiling(prompts, options, words, monkeypatch):
    model = make(MODEL)
    monkeypatch.setattr(Engine, "step", None)  # would be called first
    with pytest.raises(ValueError, match=words):
        run(model, prompts, **options)


def test_weights_of_another_model_are_refused():
    spec = cache_spec(MODEL, batch=1, capacity=8)
    for other in ({"kv_map": "identity"}, {"vocab_size": 300}):
        weights = decoding_weights(make(replace(MODEL, **other)))
        with pytest.raises(ValueError, match="the weights do not belong to the cache's model"):
            generate(weights, spec, [[1]], new_tokens=1)


def test_ids_may_be_arrays():
    prompts = np.array([[1, 2, 3], [4, 5, 6]])
    assert tokens(run(make(MODEL), prompts)) == tokens(run(make(MODEL), prompts.tolist()))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e-40},
        {"top_k": -1},
        {"top_k": 1.5},
        {"top_p": 0.0},
    ],
)
def test_bad_sampling_is_refused(options):
    (name,) = options
    with pytest.raises(ValueError, match=name):
        Sampling(**options)
