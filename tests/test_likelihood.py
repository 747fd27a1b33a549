"""Likelihoods against full forward passes of each text alone, and how texts are grouped by prefix."""

import dataclasses

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given

from cla_jax import eviction, likelihood
from cla_jax import mesh as meshes
from cla_jax import prefix_groups as prefix_groups_module
from cla_jax.cache import cache_spec
from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Compressor
from cla_jax.config import MeshConfig
from cla_jax.decode import decode, decoding_weights
from cla_jax.formats import FORMATS
from cla_jax.model.transformer import ForwardOptions, project
from cla_jax.prefix_groups import PrefixGroup, computed, pack, prefix_groups, text
from cla_jax.state import layout
from tests import reference
from tests.conftest import MODEL
from tests.test_evicting import CLASSES

LOSSLESS = ("dense", "float32")
LONGEST = 40  # tokens that the model is given


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch):
    """So that few texts fill rows, and several batches, of every kind."""
    for name, value in {"ROWS": (32, 48), "STEP": 64, "CACHED": 512, "SLICE": 8}.items():
        monkeypatch.setattr(likelihood, name, value)


def questions(seed: int = 0) -> list:
    """Contexts with options, some alike, of one token, repeated; texts alone, and ones too long."""
    draw = np.random.default_rng(seed)
    some = lambda low, high: draw.integers(0, 256, draw.integers(low, high)).tolist()
    pairs = []
    for _ in range(6):
        context, ending = some(1, 30), some(1, 5)
        pairs += [(context, some(1, 9)) for _ in range(4)]  # options of a question
        pairs += [([*context, *some(1, 4)], ending) for _ in range(2)]  # contexts that differ late
        pairs += [(context, [3]), (context, [4]), (context, [3])]  # no and yes, and no again
        pairs += [([256], some(1, 12)), (some(1, 60), some(1, 12)), (some(60, 90), some(5, 40))]
        pairs += [([], some(2, 9))]
    return [text(context or [256], ending, LONGEST) for context, ending in pairs]


def few_shot(seed: int = 0, shots: int = 9, questions: int = 3, length: int = 9) -> list:
    """Questions that begin with the same examples, each with three options."""
    draw = np.random.default_rng(seed)
    some = lambda n: draw.integers(0, 256, n).tolist()
    examples = some(shots)
    contexts = [[*examples, question, *some(length - 1)] for question in range(questions)]
    return [text(context, [option, *some(3)], 2048) for context in contexts for option in (7, 8, 9)]


def by_itself(model, texts):
    """Each text alone, through the plain reference, in float64."""
    found = []
    for tokens, targets in texts:
        logits = reference.logits(model, model.config, np.array(tokens))
        logits = logits[len(tokens) - len(targets) :]
        top = logits.max(-1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        logprob = log_p[np.arange(len(targets)), list(targets)].sum()
        found.append((logprob, bool((logits.argmax(-1) == targets).all())))
    return found


def assert_same(found, expected, tolerance=1e-4):
    assert [f.is_greedy for f in found] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([f.logprob for f in found], [p for p, _ in expected], atol=tolerance)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kv_map": "0,0,2,0", "windows": "0"},
        {"kv_map": "identity", "windows": "6,0", "n_kv_heads": 2},
    ],
)
def test_packed_rows_give_what_each_text_gives_alone(changes):
    model = reference.randomised(dataclasses.replace(MODEL, **changes))
    texts = [*questions(), *few_shot()]
    # Make some of them what the model would say.
    for i in range(0, len(texts), 3):
        tokens, targets = texts[i]
        for t in range(len(targets)):
            at = len(tokens) - len(targets) + t
            best = int(reference.logits(model, model.config, np.array(tokens))[at].argmax())
            targets = (*targets[:t], best, *targets[t + 1 :])
            tokens = (*tokens[: at + 1], best, *tokens[at + 2 :])[: len(tokens)]
        texts[i] = texts[i]._replace(tokens=tokens, targets=targets)
    expected = by_itself(model, texts)
    assert 0.2 < np.mean([greedy for _, greedy in expected]) < 0.8
    seen = []
    found = likelihood.by_forward(
        model, ForwardOptions(), texts, progress=lambda done, total: seen.append((done, total))
    )
    assert_same(found, expected)
    assert seen == sorted(seen)
    assert seen[-1] == (len(texts), len(texts))
    weights = decoding_weights(model)
    for format in LOSSLESS:
        found = likelihood.through_cache(weights, model.config, format, texts, chunk=5)
        assert_same(found, expected)


@pytest.mark.parametrize("format", sorted(set(FORMATS) - set(LOSSLESS)))
def test_a_lossy_cache_gives_what_decoding_each_text_through_it_gives(format):
    """The copies of a prefix are the prefix, bit for bit; only KIVI's steps must begin alike for that."""
    model = reference.randomised(MODEL)
    weights = decoding_weights(model)
    texts = [*questions()[:8], *few_shot()]
    found = likelihood.through_cache(weights, MODEL, format, texts, chunk=1)
    spec = cache_spec(MODEL, format, batch=1, capacity=128, chunk=1)
    step = jax.jit(lambda cache, token: decode(weights, spec, cache, token, np.array([1])))
    scores = jax.jit(lambda x: project(x, weights.head, spec.rules))
    expected = []
    for tokens, targets in texts:
        cache, x = spec.allocate(), []
        for token in tokens:
            x_B1D, cache = step(cache, np.array([[token]]))
            x.append(scores(x_B1D)[0, 0])
        logits = np.asarray(x[len(tokens) - len(targets) :], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        logprob = log_p[np.arange(len(targets)), list(targets)].sum()
        expected.append((logprob, bool((logits.argmax(-1) == targets).all())))
    # Batches of other sizes round otherwise, and now and then a number then gets the next code.
    assert_same(found, expected, tolerance=5e-3)
    errors = [abs(f.logprob - p) for f, (p, _) in zip(found, expected, strict=True)]
    assert np.median(errors) < 5e-4


@pytest.mark.slow
def test_a_cache_that_quantises_old_tokens_is_copied_whole():
    """KIVI beyond its newest tokens: prefixes of more than 128 tokens, suffixes that make groups due."""
    model = reference.randomised(MODEL)
    weights = decoding_weights(model)
    draw = np.random.default_rng(1)
    prefix = draw.integers(0, 256, 161).tolist()
    texts = [text(prefix, draw.integers(0, 256, n).tolist(), 512) for n in (2, 31, 40, 64)]
    assert prefix_groups(texts) == [PrefixGroup(160, tuple(prefix_groups(texts)[0].members))]
    found = likelihood.through_cache(weights, MODEL, "kivi2", texts, chunk=1)
    alone = [
        likelihood.through_cache(weights, MODEL, "kivi2", [each], chunk=1)[0] for each in texts
    ]
    assert_same(found, alone, tolerance=1e-5)
    exact = by_itself(model, texts)
    assert max(abs(f.logprob - p) for f, (p, _) in zip(found, exact, strict=True)) > 1e-2


@pytest.mark.parametrize("policy", ["fastgen:T=1", "window:keep=1"])
def test_a_policy_that_keeps_everything_gives_what_a_dense_cache_gives(policy):
    model = reference.randomised(MODEL)
    weights, texts = decoding_weights(model), questions()
    found, kept = likelihood.through_policy(
        weights, MODEL, eviction.parse(policy), CLASSES.tobytes(), texts, chunk=5
    )
    assert set(kept) == {1.0}
    dense = likelihood.through_cache(weights, MODEL, "dense", texts, chunk=5)
    assert_same(found, dense, tolerance=1e-5)


@pytest.mark.parametrize("policy", ["window:tokens=8,sinks=2,recent=3", "h2o:tokens=9,recent=4"])
def test_a_policy_answers_as_each_text_alone_does(policy):
    """The context without its last token is the prompt, and all that follows is decoded."""
    policy = eviction.parse(policy)
    model = reference.randomised(MODEL)
    weights = decoding_weights(model)
    texts = questions()[:14]
    found, shares = likelihood.through_policy(
        weights, MODEL, policy, CLASSES.tobytes(), texts, chunk=1
    )
    expected, kept = [], []
    for tokens, targets in texts:
        prompt = tokens[: max(len(tokens) - len(targets), 1)]
        spec = evicting_spec(MODEL, policy, classes=CLASSES.tobytes(), batch=1, capacity=128)
        compressor = Compressor(weights, spec)
        x, cache = compressor.fill(spec.allocate(), {0: prompt}, len(tokens) - len(prompt))
        shares_P = [one.kept_BKS.mean(1).sum() / len(prompt) for one in compressor.chosen]
        kept.append(sum(shares_P) / len(shares_P))
        hidden = [x[:, len(prompt) - 1]]
        for token in tokens[len(prompt) :]:
            x, cache = decode(weights, compressor.spec, cache, np.array([[token]]), np.array([1]))
            hidden.append(x[:, 0])
        scored = np.concatenate(hidden)[-len(targets) :]
        logits = np.asarray(project(scored[None], weights.head, spec.rules)[0], np.float64)
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        logprob = log_p[np.arange(len(targets)), list(targets)].sum()
        expected.append((logprob, bool((logits.argmax(-1) == targets).all())))
    assert min(kept) < 0.6  # something was evicted
    # A prompt of several texts counts once.
    assert sorted({round(share, 6) for share in shares}) == sorted({round(k, 6) for k in kept})
    assert len(shares) < len(kept)
    assert_same(found, expected, tolerance=1e-4)


@pytest.mark.parametrize("mesh", [MeshConfig(data=4, fsdp=1, model=2), MeshConfig(fsdp=8)])
def test_on_several_devices(mesh, devices):
    devices(8)
    made = meshes.make_mesh(mesh)
    rules = meshes.axis_rules(MODEL, made)
    model = reference.randomised(MODEL)
    texts = [*questions()[:21], *few_shot()]
    expected = by_itself(model, texts)
    with jax.set_mesh(made):
        model = jax.device_put(model, layout(model, rules, made))
        assert_same(likelihood.by_forward(model, ForwardOptions(rules=rules), texts), expected)
        weights = decoding_weights(model, rules)
        found = likelihood.through_cache(weights, MODEL, "dense", texts, chunk=8, rules=rules)
    assert_same(found, expected)


# -------------------------------------------------------------------------------------- prefix groups


def test_options_are_a_family_and_questions_are_not():
    """Texts whose common prefix is too short to be worth it stay apart."""
    opening = [1, 2]  # "Question:"
    texts = [
        text([*opening, *range(10 * q, 10 * q + 20)], [option, 7], 100)
        for q in range(3)
        for option in (91, 92, 93)
    ]
    found = prefix_groups(texts)
    assert sorted(group.members for group in found) == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    # The last token of a context predicts: it is the suffix's.
    assert {group.prefix for group in found} == {21}


def test_questions_with_the_same_examples_are_groups_in_a_group(monkeypatch):
    """The examples are computed once, and each question once for all its options."""
    texts = few_shot(shots=600, questions=100, length=100)
    (group,) = prefix_groups(texts)
    assert (group.prefix, group.levels, len(group.members)) == (600, 2, 100)
    assert {member.prefix for member in group.members} == {699}
    assert sorted(group.texts) == list(range(300))
    # An option has the last token of the question, which predicts, and its own without the last.
    assert computed(texts, group) == 600 + 100 * (99 + 3 * 4)
    monkeypatch.setattr(prefix_groups_module, "LEVELS", 1)
    (flat,) = prefix_groups(texts)
    assert computed(texts, flat) == 600 + 300 * 103


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=60), min_size=1, max_size=30))
def test_every_text_of_a_group_begins_with_its_prefix(contexts):
    texts = [text(context, [i % 3] * (1 + i % 4), 64) for i, context in enumerate(contexts)]
    groups = prefix_groups(texts)
    rows = pack(texts, groups, shortest=16)

    def check(group):
        assert group.levels <= prefix_groups_module.LEVELS
        found = {texts[i].tokens[: group.prefix] for i in group.texts}
        assert len(found) == 1
        assert all(group.prefix <= texts[i].given for i in group.texts)
        for member in group.members:
            if isinstance(member, PrefixGroup):
                assert member.prefix > group.prefix
                check(member)

    for made in (groups, [group for same in rows.values() for row in same for group in row]):
        assert sorted(i for group in made for i in group.texts) == list(range(len(texts)))
        for group in made:
            check(group)
    for length, same in rows.items():
        assert all(sum(computed(texts, group) for group in row) <= length for row in same)


def test_each_token_goes_through_the_model_once(monkeypatch):
    """Those of a cache and those of packed rows are as many as the groups say."""
    model = reference.randomised(MODEL)
    texts = few_shot(questions=4)
    (group,) = prefix_groups(texts)
    assert computed(texts, group) == 9 + 4 * (8 + 3 * 4)
    chunk, counted = likelihood._chunk, []

    def counting(weights, cache, tokens_BT, counts_B, *, spec):
        counted.append(int(counts_B.sum()))
        return chunk(weights, cache, tokens_BT, counts_B, spec=spec)

    monkeypatch.setattr(likelihood, "_chunk", counting)
    weights = decoding_weights(model)
    found = likelihood.through_cache(weights, MODEL, "dense", texts, chunk=4)
    assert sum(counted) == computed(texts, group)
    counted.clear()
    monkeypatch.setattr(prefix_groups_module, "LEVELS", 1)
    flat = likelihood.through_cache(weights, MODEL, "dense", texts, chunk=4)
    assert sum(counted) == 9 + 12 * 12
    assert_same(found, flat, tolerance=1e-5)


def test_a_family_too_large_for_a_row_is_cut():
    texts = [text(range(20), [90 + i] * 5, 100) for i in range(6)]
    ((length, rows),) = pack(texts, prefix_groups(texts), shortest=32).items()
    assert length == 32
    assert [[len(group.members) for group in row] for row in rows] == [[2], [2], [2]]
    assert sorted(i for row in rows for group in row for i in group.members) == list(range(6))
    long = [text(range(100, 170), [1], 200), *texts]
    lengths = pack(long, prefix_groups(long), shortest=32)
    assert [(length, len(rows)) for length, rows in lengths.items()] == [(32, 3), (128, 1)]


def test_rows_are_of_the_length_that_costs_least():
    """Two groups of 20 tokens leave 24 of twice 32 unused, or 8 of 48; four of 8 fill one of 32."""
    two = [text([i] * 20, [1], 100) for i in (1, 2)]
    four = [text([i] * 8, [1], 100) for i in range(4)]
    assert [list(likelihood._packed(texts, 100)) for texts in (two, four)] == [[48], [32]]


def test_what_is_too_long_loses_its_beginning():
    assert text([1, 2, 3, 4], [5, 6], 3) == ((3, 4, 5), (5, 6))
    with pytest.raises(ValueError, match="a continuation has 4 tokens, but must have 1 to 3"):
        text([1], [2, 3, 4, 5], 3)
    with pytest.raises(ValueError, match="a continuation has 0 tokens"):
        text([1], [], 3)
