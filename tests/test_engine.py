import dataclasses
import functools
import random

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import given, settings

from cla_jax import batch as batches
from cla_jax import decode as decoding
from cla_jax import eviction, places
from cla_jax.cache import cache_spec, ledger
from cla_jax.cache.evicting import evicting_spec
from cla_jax.cache.prefix_shared import prefix_spec
from cla_jax.config import MeshConfig
from cla_jax.decode import decoding_weights
from cla_jax.engine import Engine
from cla_jax.mesh import AxisRules, axis_rules, make_mesh, split_cache
from cla_jax.state import layout
from tests import reference
from tests.conftest import MODEL, replace

CONFIG = replace(
    MODEL, windows="9,9,0,0"
)  # two rings, which a request leaves full for the next one
PROMPTS = [[1, 2, 3], [4] * 37, [5, 6], [7, 8, 9, 10], list(range(20)), [11]]
MOST = 14  # new tokens
STOP = 30  # ids below it end a text: about one token in nine
OPTIONS = {"stop": range(STOP), "n_ids": 257, "every": 3}
PROGRAMS = (decoding._prefill_chunk, batches._first, batches._loop, places.put_row)


@functools.cache
def weights(config=CONFIG):
    return decoding_weights(reference.randomised(config))


def spec(batch, format="dense", config=CONFIG):
    return cache_spec(config, format, batch=batch, capacity=64, chunk=16)


@functools.cache
def alone(i, seed, format="dense"):
    """What prompt i gets in a batch of its own."""
    engine = Engine(weights(), spec(1, format), **OPTIONS)
    request = engine.submit(PROMPTS[i], new_tokens=MOST, seed=seed)
    engine.run()
    return request.completion


def assert_as_alone(request, i, seed, limit, format="dense"):
    expected, found = alone(i, seed, format), request.completion
    assert found.tokens == expected.tokens[:limit]
    stopped = expected.finish == "stop" and len(expected.tokens) < limit
    assert found.finish == ("stop" if stopped else "length")
    assert found.logprobs == pytest.approx(expected.logprobs[:limit], abs=1e-4)


# A request, some steps of the engine, or the end of one of the requests so far.
operations = st.lists(
    st.one_of(
        st.tuples(st.just("submit"), st.integers(0, 5), st.integers(0, 1), st.integers(1, MOST)),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
    ),
    max_size=14,
)


@pytest.mark.parametrize("batch", [1, 4])
@settings(max_examples=15, deadline=None)
@given(operations=operations)
def test_who_joins_and_leaves_a_running_batch_gets_what_it_gets_alone(batch, operations):
    engine = Engine(weights(), spec(batch), **OPTIONS)
    asked = []
    for what, *values in operations:
        if what == "submit":
            i, seed, limit = values
            asked.append((engine.submit(PROMPTS[i], new_tokens=limit, seed=seed), values))
        elif what == "step":
            for _ in range(values[0]):
                engine.step()
        elif asked:
            engine.cancel(asked[values[0] % len(asked)][0])
    engine.run()
    assert engine.idle
    for request, values in asked:
        if request.completion.finish == "cancelled":
            tokens = request.completion.tokens
            assert tokens == alone(*values[:2]).tokens[: len(tokens)]
            assert len(request.completion.logprobs) == len(tokens) <= values[2]
        else:
            assert_as_alone(request, *values)


@pytest.mark.parametrize("format", ["kivi4", pytest.param("int8", marks=pytest.mark.slow)])
def test_a_row_that_served_others_is_as_new_in_every_format(format):
    engine = Engine(weights(), spec(1, format), **OPTIONS)
    asked = [(i, i % 2, MOST - i) for i in (*range(6), *range(6))]
    requests = [engine.submit(PROMPTS[i], new_tokens=n, seed=seed) for i, seed, n in asked]
    engine.run()
    for request, (i, seed, limit) in zip(requests, asked, strict=True):
        expected = alone(i, seed, format).tokens[:limit]
        assert request.completion.tokens == expected


def test_nothing_is_compiled_for_who_comes_later():
    engine = Engine(weights(), spec(4), **OPTIONS)
    for prompts in (PROMPTS[:3], PROMPTS[:1]):  # one alone goes through a batch of one
        for prompt in prompts:
            engine.submit(prompt, new_tokens=5)
        engine.run()
    before = [program._cache_size() for program in PROGRAMS]
    assert all(before)
    for i, prompt in enumerate(PROMPTS * 2):
        request = engine.submit(prompt, new_tokens=1 + i, seed=(i, i + 1))
        if i % 5 == 4:
            engine.step()
            engine.cancel(request)
    engine.run()
    assert [program._cache_size() for program in PROGRAMS] == before


def test_a_cancelled_row_stays_as_it_is():
    """It writes nothing more, and the others need not wait for it."""
    engine = Engine(weights(), spec(2), n_ids=257, every=2)
    first = engine.submit(PROMPTS[0], new_tokens=30)
    second = engine.submit(PROMPTS[2], new_tokens=30)
    engine.step()
    engine.cancel(first)
    engine.step()
    before = int(engine._batch.cache.lengths_B[0])
    for _ in range(3):
        engine.step()
    assert int(engine._batch.cache.lengths_B[0]) == before
    assert engine._batch.rows.done_B.tolist() == [True, False]
    assert len(second.completion.tokens) > 4


def test_a_listener_hears_every_token_once_and_may_end_a_request():
    heard = {"all": [], "two": []}
    engine = Engine(weights(), spec(1), every=3, n_ids=257)

    def listener(name, enough):
        def listen(new):
            heard[name] += new
            return np.bool_(len(heard[name]) >= enough)

        return listen

    whole = engine.submit(PROMPTS[0], new_tokens=9, listener=listener("all", 99))
    ended = engine.submit(PROMPTS[3], new_tokens=9, listener=listener("two", 2))
    after = engine.submit(PROMPTS[3], new_tokens=9)
    engine.run()
    assert heard["all"] == whole.completion.tokens
    assert heard["two"] == ended.completion.tokens == after.completion.tokens[: len(heard["two"])]
    found = [request.completion.finish for request in (whole, ended, after)]
    assert found == ["length", "stop", "length"]


def test_a_listener_that_raises_takes_nothing_from_others():
    engine = Engine(weights(), spec(2), **OPTIONS)

    def listener(_):
        raise RuntimeError("no")

    first = engine.submit(PROMPTS[0], new_tokens=MOST, seed=1, listener=listener)
    second = engine.submit(PROMPTS[1], new_tokens=MOST, seed=2)
    raised = 0
    for _ in range(100):
        try:
            if not engine.step():
                break
        except RuntimeError:
            raised += 1
    assert raised
    assert_as_alone(first, 0, 1, MOST)
    assert_as_alone(second, 1, 2, MOST)


def test_a_request_of_another_engine_is_not_cancelled():
    one, two = (Engine(weights(), spec(1), **OPTIONS) for _ in range(2))
    request = one.submit(PROMPTS[0], new_tokens=MOST, seed=1)
    one.step()
    with pytest.raises(ValueError, match="another engine"):
        two.cancel(request)
    one.run()
    assert_as_alone(request, 0, 1, MOST)


def test_a_listener_may_submit_and_cancel():
    """As a server would: the next request comes when an answer has come."""
    engine = Engine(weights(), spec(1), **OPTIONS)
    later = []

    def listen(_new):
        if not later:
            later.append(engine.submit(PROMPTS[2], new_tokens=MOST, seed=1))
            engine.cancel(first)

    first = engine.submit(PROMPTS[0], new_tokens=MOST, listener=listen)
    engine.run()
    assert first.completion.finish == "cancelled"
    assert_as_alone(later[0], 2, 1, MOST)


def test_a_row_that_ends_is_given_on_at_once():
    """While others wait, the loop of decode steps ends with a row, however many steps it may take."""
    engine = Engine(weights(), spec(4), n_ids=257, every=64)
    requests = [engine.submit(PROMPTS[0], new_tokens=limit) for limit in (40, 3, 9, 9, 3, 3, 9)]
    lengths = []
    while not requests[-2].ended:
        engine.step()
        lengths.append(len(requests[0].completion.tokens))
    assert lengths == [3, 5, 7]  # not 40 at once


def test_a_request_waits_in_the_order_of_submission():
    engine = Engine(weights(), spec(1), every=3, n_ids=257)
    ends = []
    for name in "abc":
        count = [0]

        def listen(new, name=name, count=count):
            count[0] += len(new)
            if count[0] == 6:
                ends.append(name)

        engine.submit(PROMPTS[0], new_tokens=6, listener=listen)
    engine.run()
    assert ends == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [1] * 60, "new_tokens": 5}, "the prompt has 60 tokens; with 5 new tokens"),
        ({"new_tokens": 0}, "new_tokens = 0 must be positive"),
        ({"new_tokens": 1 << 31}, r"new_tokens = 2147483648 must be below 2\*\*31"),
        ({"seed": -1}, "seed = -1 must lie in 0"),
        ({"seed": (1, 2**32)}, "seed = 4294967296 must lie in 0"),
        ({"seed": "a"}, "seed = a must be an integer"),
        ({"seed": (0, 1, 2)}, r"seed = \(0, 1, 2\) must be an integer or two"),
    ],
)
def test_bad_requests_are_refused_and_leave_no_trace(options, words):
    engine = Engine(weights(), spec(1), **OPTIONS)
    with pytest.raises(ValueError, match=words):
        engine.submit(**({"prompt": [1], "new_tokens": 3} | options))
    assert engine.idle


def test_a_spec_is_data_of_the_engine_alone():
    """Two engines over equal specs do not share a cache."""
    one, two = (Engine(weights(), spec(1), **OPTIONS) for _ in range(2))
    a = one.submit(PROMPTS[0], new_tokens=MOST, seed=0)
    one.step()
    b = two.submit(PROMPTS[1], new_tokens=MOST, seed=1)
    two.run()
    one.run()
    assert_as_alone(a, 0, 0, MOST)
    assert_as_alone(b, 1, 1, MOST)


# ------------------------------------------------------------------------- requests that share chunks

SHARED = replace(MODEL, n_layers=2, n_kv_heads=2, n_heads=4, kv_map="cla:2")


@functools.cache
def made_for(format):
    """A cache of four rows."""
    if format == "h2o":
        sizes = {"batch": 4, "capacity": 64, "page": 16}
        return evicting_spec(SHARED, eviction.parse("h2o:tokens=32"), classes=bytes(257), **sizes)
    if not format.endswith("pages"):
        return spec(4, format)
    name = format.removesuffix("pages").strip() or "dense"
    sizes = {"batch": 4, "page": 32, "pages": 14, "capacity": 64, "chunk": 16}
    return prefix_spec(SHARED, name, **sizes)


@pytest.mark.parametrize("bad", [[200] * 37, [1] * 36 + [200]], ids=["all", "last"])
@pytest.mark.parametrize("format", ["dense", "int8", "kivi2", "pages", "kivi2 pages", "h2o"])
def test_what_is_not_finite_stays_with_its_request(format, bad, caplog):
    """Later requests get the row, or the pages, whose unused entries could still hold NaN."""
    made, good = made_for(format), PROMPTS[0]
    own = weights(made.config)
    broken = dataclasses.replace(
        own, embedding=own.embedding.at[200].set(np.nan), own_head=own.head
    )

    def served(weights, *batches):
        engine = Engine(weights, made, n_ids=200, every=3)  # the broken id is not drawn
        for prompts in batches:
            requests = [engine.submit(prompt, new_tokens=MOST, seed=1) for prompt in prompts]
            engine.run()
            yield requests[prompts.index(good)].completion.tokens if good in prompts else None

    (expected,) = served(own, [good])
    assert len(set(expected)) > 1
    assert "not finite" not in caplog.text
    _, *found = served(broken, [bad], [good], [bad, good], [good, bad])
    assert found == [expected] * 3
    assert caplog.text.count("numbers of the model are not finite for a request with") == 3


PREFIX = list(range(40, 61))  # five pages of four tokens, and one token: more than a chunk


def shared_engine(pages=24, **options):
    sizes = {"batch": 4, "page": 4, "pages": pages, "capacity": 64, "chunk": 16}
    return Engine(weights(SHARED), prefix_spec(SHARED, **sizes, **options), **OPTIONS)


@functools.cache
def alone_unshared(prompt, seed):
    engine = Engine(weights(SHARED), spec(1, config=SHARED), **OPTIONS)
    request = engine.submit(prompt, new_tokens=MOST, seed=seed)
    engine.run()
    return request.completion


def assert_as_unshared(request, seed):
    expected = alone_unshared(tuple(request.prompt), seed)
    found, limit = request.completion, request.new_tokens
    assert found.tokens == expected.tokens[:limit]
    assert found.logprobs == pytest.approx(expected.logprobs[:limit], abs=1e-4)


def assert_nothing_is_left(engine):
    assert engine.idle
    tree = engine.places.tree
    assert tree.live_pages == 0
    assert tree.room == tree.pages


@pytest.mark.slow
def test_requests_that_share_chunks_get_what_they_get_alone():
    """They come while others decode, wait for the pool, are cancelled, and are samples of one prompt."""
    draw = random.Random(0)
    engine = shared_engine(retain=8)
    asked = []
    for _ in range(40):
        what = draw.choice(["submit", "submit", "step", "cancel"])
        if what == "submit":
            prompt = PREFIX[: draw.choice([9, 21])] + [draw.randrange(3)] * draw.randint(1, 3)
            for seed in range(draw.randint(1, 2)):
                limit = draw.randint(1, MOST)
                asked.append((engine.submit(prompt, new_tokens=limit, seed=seed), seed))
        elif what == "step":
            engine.step()
        elif asked:
            engine.cancel(draw.choice(asked[-4:])[0])
    engine.run()
    assert_nothing_is_left(engine)
    counts = engine.places.counts
    assert counts.matched > 0
    assert counts.copied > 0
    assert counts.peak_pages <= 24
    finished = [pair for pair in asked if pair[0].completion.finish != "cancelled"]
    assert len(finished) > 10
    for request, seed in finished:
        assert_as_unshared(request, seed)


def in_pages(rows, config, format, **options):
    """An engine whose requests share pages of 32 tokens."""
    sizes = {"page": 32, "pages": 14, "capacity": 96, "chunk": 40}
    return Engine(
        weights(config), prefix_spec(config, format, batch=rows, **sizes, **options), **OPTIONS
    )


@functools.cache
def alone_in_pages(config, format, prompt, seed):
    engine = in_pages(1, config, format)
    request = engine.submit(prompt, new_tokens=MOST, seed=seed)
    engine.run()
    return request.completion


# Samples of a prompt (a common prefix, and tokens of its own), steps, or the end of a request so far.
shared_operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("submit"), st.sampled_from([33, 61]), st.integers(1, 3), st.integers(1, 2)
        ),
        st.tuples(st.just("step"), st.integers(1, 3)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
    ),
    max_size=14,
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "kv_map"),
    [("kivi4", "cla:2"), ("kivi4", "k=0,0;v=0,1"), ("int8", "k=0,0;v=0,1")],
)
@settings(max_examples=8, deadline=None)
@given(operations=shared_operations, retain=st.sampled_from([0, 6]))
def test_requests_that_share_quantised_pages_get_what_they_get_alone(
    format, kv_map, operations, retain
):
    """They join, are forked, wait, are cancelled and leave; while they decode, pages become full."""
    config = replace(SHARED, kv_map=kv_map)
    engine = in_pages(4, config, format, retain=retain)
    asked = []
    for what, *values in operations:
        if what == "submit":
            prefix, own, samples = values
            prompt = (PREFIX * 3)[:prefix] + [own] * own
            asked += [(engine.submit(prompt, new_tokens=MOST, seed=i), i) for i in range(samples)]
        elif what == "step":
            for _ in range(values[0]):
                engine.step()
        elif asked:
            engine.cancel(asked[values[0] % len(asked)][0])
    engine.run()
    assert_nothing_is_left(engine)
    for request, seed in asked:
        found = request.completion
        if found.finish != "cancelled":
            expected = alone_in_pages(config, format, tuple(request.prompt), seed)
            assert found.tokens == expected.tokens
            assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize("skip", [True, False])
def test_what_the_cache_holds_already_is_prefilled_once(skip, monkeypatch):
    """The first request writes the common prefix; those that join with it read it."""
    fed = []
    real = places.prefill

    def counted(weights, spec, cache, prompts, last=None, held={}):  # noqa: B006
        fed.extend(len(p) - held.get(i, 0) for i, p in enumerate(prompts) if p is not None)
        return real(weights, spec, cache, prompts, last, held)

    monkeypatch.setattr(places, "prefill", counted)
    engine = shared_engine(skip_matched=skip)
    prompts = [[*PREFIX, 1], [9, *PREFIX], [*PREFIX, 3], [*PREFIX, 1]]
    requests = [engine.submit(prompt, new_tokens=5) for prompt in prompts]
    engine.run()
    # 20 of 22 tokens are shared; the last request is a second sample of the first prompt.
    assert sorted(fed) == ([2, 22, 22] if skip else [22] * 4)
    assert engine.places.counts.matched == 2 * 20
    assert engine.places.counts.copied == int(skip)
    for request in requests:
        assert_as_unshared(request, 0)
    assert_nothing_is_left(engine)


def counted_shared(spec, cache):
    """From the live arrays: the pools, the tables, and how long each row is."""
    pages = jax.device_get(cache.extra)
    lengths_B = np.asarray(jax.device_get(cache.lengths_B))
    used = {}  # tokens in each page
    all_tokens = read = 0
    for row, (private, start) in enumerate(zip(pages.private_BC, pages.starts_B, strict=True)):
        alone = max(int(lengths_B[row]) - int(start), 0)
        for i, page in enumerate(private[: -(-alone // spec.page)]):
            used[int(page)] = min(spec.page, alone - i * spec.page)
        all_tokens, read = all_tokens + alone, read + alone
    for rows_R, (first, end) in zip(
        pages.rows_IR[: pages.items], pages.blocks_I2[: pages.items], strict=True
    ):
        blocks = pages.shared_NM[first:end]
        shared = blocks[blocks < spec.pages].tolist()
        used |= dict.fromkeys(shared, spec.page)
        all_tokens += len(shared) * spec.page * int((rows_R < spec.batch).sum())
        read += len(shared) * spec.page
    tokens = spec.pages * spec.page
    of_token = [
        {half: (ledger.nbytes(layer.only(half)) // tokens,) * 2 for half in holds}
        for layer, holds in zip(cache.kv_layers, spec.holds, strict=True)
    ]
    # Every token is kept by itself: it has the same bytes wherever it is.
    counts = [ledger.Tokens(n, 0) for n in (sum(used.values()), all_tokens, read)]
    return ledger.shared_ledger(spec, ledger.nbytes(cache.kv_layers), of_token, *counts)


def test_bytes_of_shared_chunks_from_the_tree_and_from_live_arrays():
    engine = shared_engine()
    for i in range(3):
        engine.submit([*PREFIX, i], new_tokens=MOST, seed=4)
    engine.step()
    engine._collect()  # the tree knows what the device has written
    predicted = ledger.predicted_shared(engine.spec, engine.places.tree)
    assert counted_shared(engine.spec, engine._batch.cache) == predicted
    token = (
        2 * 2 * SHARED.d_head * 4
    )  # one KV layer for both: keys and values of two heads, float32
    alone = sum(22 + len(r.completion.tokens) - 1 - 20 for r in engine._requests if r)
    assert predicted.allocated == 24 * 4 * token
    assert predicted.resident == (20 + alone) * token
    assert predicted.unshared == (3 * 20 + alone) * token
    assert predicted.read == 2 * predicted.resident
    assert predicted.unshared_read == 2 * predicted.unshared


def test_tables_are_sent_only_when_the_tree_has_changed():
    engine = shared_engine()
    request = engine.submit(PREFIX, new_tokens=MOST, seed=4)
    steps = 0
    while engine.step():
        steps += 1
    assert len(request.completion.tokens) == MOST
    # For its prompt, for the first steps, and for each later page that it grows into.
    assert engine.places.counts.uploads <= 1 + (21 + MOST) // 4 - 21 // 4 < steps


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_heads", "format", "page"), [(2, "dense", 4), (1, "dense", 4), (2, "kivi4", 32)]
)
def test_heads_of_shared_chunks_may_be_split_over_devices(kv_heads, format, page):
    config = replace(SHARED, n_kv_heads=kv_heads)
    model = reference.randomised(config)
    sizes = {"batch": 12, "page": page, "pages": 60, "capacity": 64, "chunk": 16}
    prompts = [[*PREFIX, *PREFIX, i % 3] for i in range(5)]  # two pairs of equal ones

    def replies(weights, rules=AxisRules()):
        engine = Engine(weights, prefix_spec(config, format, **sizes, rules=rules), **OPTIONS)
        requests = [engine.submit(prompt, new_tokens=MOST, seed=2) for prompt in prompts]
        engine.run()
        assert_nothing_is_left(engine)
        return engine, [request.completion for request in requests]

    _, expected = replies(decoding_weights(model))
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, model=2), jax.devices()[:2])
    rules = axis_rules(config, mesh)
    with jax.set_mesh(mesh):
        weights = decoding_weights(jax.device_put(model, layout(model, rules, mesh)), rules)
        engine, found = replies(weights, rules)
        pool = jax.tree.leaves(engine.cache.kv_layers[0])[0]
        assert pool.sharding.is_fully_replicated == (kv_heads == 1)
        assert engine.places.counts.matched > 0
        assert engine.places.counts.copied == 2
    for a, b in zip(expected, found, strict=True):
        assert a.tokens == b.tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


def test_rows_and_entries_of_shared_chunks_are_not_split():
    sizes = {"batch": 4, "page": 4, "pages": 24, "capacity": 64}
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, model=2), jax.devices()[:4])
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="x fsdp = 2 of the mesh must be 1"):
        prefix_spec(SHARED, **sizes)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, model=2), jax.devices()[:2])
    rules = split_cache(axis_rules(replace(SHARED, n_kv_heads=1), mesh), mesh)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="cannot split the entries"):
        prefix_spec(replace(SHARED, n_kv_heads=1), **sizes, rules=rules)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["dense", "int8", "kivi4"])
def test_bytes_of_pages_and_rows_are_those_of_the_arrays(format):
    """So they are whatever is kept in pages, and beside them; and so are those of a tree."""
    page = 32
    sizes = {"batch": 12, "page": page, "pages": 30, "capacity": 100, "chunk": 40}
    cached = prefix_spec(SHARED, format, **sizes)
    assert ledger.nbytes(cached.allocate().kv_layers) == cached.allocated_bytes
    engine = Engine(weights(SHARED), cached, **OPTIONS)
    prompt = [7 * i % 64 for i in range(70)]
    requests = [engine.submit([*prompt, i], new_tokens=MOST, seed=0) for i in range(3)]
    same = engine.submit([*prompt, 0], new_tokens=MOST, seed=0)
    engine.step()
    engine._collect()
    assert engine.places.counts.copied == 1
    full = cached.page_bytes // page
    ring = 96  # entries that hold 40 tokens and the page before them
    newest = cached.row_bytes // ring if format == "kivi4" else full
    alone = sum(71 + len(r.completion.tokens) - 1 - 64 for r in (*requests, same))
    predicted = ledger.predicted_shared(cached, engine.places.tree)
    assert predicted.resident == 64 * full + alone * newest
    engine.run()
    assert same.completion.tokens == requests[0].completion.tokens
    for request in requests:  # alone in a cache like theirs
        one = Engine(weights(SHARED), cached, **OPTIONS)
        expected = one.submit(request.prompt, new_tokens=MOST, seed=0)
        one.run()
        assert request.completion.tokens == expected.completion.tokens
        assert request.completion.logprobs == pytest.approx(expected.completion.logprobs, abs=1e-4)
    assert_nothing_is_left(engine)


def test_requests_wait_for_a_full_pool_and_that_is_said_once(caplog):
    engine = shared_engine()  # one request of 21 + 14 tokens takes nine pages
    requests = [engine.submit([i, *PREFIX[1:]], new_tokens=MOST, seed=2) for i in range(4)]
    engine.run()
    assert caplog.text.count("the page pool is full") == 1
    assert engine.places.counts.peak_pages <= 24
    for request in requests:
        assert_as_unshared(request, 2)
    assert_nothing_is_left(engine)


def test_a_request_longer_than_the_pool_is_refused_before_anything_is_compiled():
    engine = shared_engine(pages=5)
    with pytest.raises(
        ValueError, match=r"the prompt, .* needs 9 pages of 4 tokens, but the pool has"
    ):
        engine.submit(PREFIX, new_tokens=MOST)
    assert engine.idle
    assert engine._batch is None


def test_prefixes_of_requests_that_have_ended_are_found_again_up_to_a_limit():
    for retain, matched in ((0, 0), (2, 8), (24, 20)):
        engine = shared_engine(retain=retain)
        for _ in range(2):
            request = engine.submit([*PREFIX, 1], new_tokens=3)
            engine.run()
            assert_as_unshared(request, 0)
        assert engine.places.counts.matched == matched
        assert_nothing_is_left(engine)
