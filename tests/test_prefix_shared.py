"""Attention over shared chunks in two phases: every request gets what it gets alone."""

import dataclasses
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.cache import make_format, pages, prefix_shared
from cla_jax.cache.kivi import Kivi
from cla_jax.cache.pages import Leaf
from cla_jax.cache.per_token import Shape
from cla_jax.cache.prefix_shared import _spans, prefix_spec
from cla_jax.config import LatentKV
from cla_jax.decode import decode, decoding_weights
from cla_jax.model.attention import KV, StepPositions
from cla_jax.model.transformer import ForwardOptions, Transformer
from cla_jax.prefix_tree import PrefixTree
from tests.conftest import MODEL, replace

PAGE, PAGES, BATCH, CAPACITY, CHUNK = 4, 64, 5, 44, 8
LATENT = {"n_kv_heads": 1, "kv": LatentKV(rank=12, rope_dims=4)}
PREFIXES = [[7] * 3, list(range(10, 19)), list(range(10, 30))]  # the second begins the third


class Requests:
    """Requests in the rows of one prefix-shared cache, and their tokens, to be computed alone."""

    def __init__(self, config, format, page=PAGE, pages=PAGES, capacity=CAPACITY, chunk=CHUNK):
        self.model = Transformer(jax.random.key(1), config)
        self.weights = decoding_weights(self.model)
        self.spec = prefix_spec(
            config, format, batch=BATCH, page=page, pages=pages, capacity=capacity, chunk=chunk
        )
        self.tree = PrefixTree(chunk=page, pages=pages)
        self.cache = self.spec.allocate()
        self.rows, self.texts, self.version, self.uploads = {}, {}, -1, 0
        # A function of its own, so that its programs can be counted.
        self.decode = jax.jit(lambda *arrays: decode(self.weights, self.spec, *arrays))
        self.forward = jax.jit(lambda tokens: self.model.logits(tokens, ForwardOptions()))

    def upload(self):
        if self.version != self.tree.version:
            pages = jax.tree.map(jnp.asarray, self.spec.tables(self.rows, self.tree))
            self.cache = dataclasses.replace(self.cache, extra=pages)
            self.version, self.uploads = self.tree.version, self.uploads + 1

    def feed(self, tokens):
        """Tokens to their rows; the logits after the last one of each."""
        self.upload()
        T = self.spec.chunk if max(map(len, tokens.values())) > 1 else 1  # two programs
        fed, counts = np.zeros((BATCH, T), np.int32), np.zeros(BATCH, np.int32)
        for row, some in tokens.items():
            fed[row, : len(some)], counts[row] = some, len(some)
        x, self.cache = self.decode(self.cache, fed, counts)
        logits = self.weights.logits(x, self.spec.rules)
        return {row: logits[row, len(some) - 1] for row, some in tokens.items()}

    def insert(self, row, prompt, new_tokens):
        path = self.tree.insert(prompt, new_tokens=new_tokens)
        self.rows[row], self.texts[row] = path, list(prompt)
        lengths = self.cache.lengths_B.at[row].set(path.matched)
        self.cache = dataclasses.replace(self.cache, lengths_B=lengths)
        for start in range(path.matched, len(prompt), self.spec.chunk):
            found = self.feed({row: prompt[start : start + self.spec.chunk]})
        self.check(found)
        self.last = found[row]  # logits after the prompt
        return path.matched

    def append(self, tokens):
        found = self.feed({row: [token] for row, token in tokens.items()})
        for row, token in tokens.items():
            self.tree.append(self.rows[row], token)
            self.texts[row].append(token)
        self.check(found)

    def fork(self, row, to, new_tokens):
        path = self.rows[row]
        twin = self.tree.fork(path, new_tokens=new_tokens)
        source, target = Leaf(path.leaf.page, row), Leaf(twin.leaf.page, to)
        self.cache = self.spec.copy_leaf(self.cache, source, target)
        lengths = self.cache.lengths_B.at[to].set(path.length)
        self.cache = dataclasses.replace(self.cache, lengths_B=lengths)
        self.rows[to], self.texts[to] = twin, list(self.texts[row])

    def remove(self, row):
        self.tree.remove(self.rows.pop(row))
        del self.texts[row]
        lengths = self.cache.lengths_B.at[row].set(0)
        self.cache = dataclasses.replace(self.cache, lengths_B=lengths)

    def check(self, found, tolerance=1e-5):
        for row, logits in found.items():
            text = self.texts[row]
            padded = jnp.array([text + [0] * (CAPACITY - len(text))])
            alone = self.forward(padded)[0, len(text) - 1]
            scale = jnp.abs(alone).max()
            assert jnp.abs(logits - alone).max() < tolerance * scale, (row, len(text))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "seed", "tile", "block"),
    [
        ({"n_kv_heads": 2, "n_heads": 2, "kv_map": "identity", "n_layers": 2}, 0, 8, 256),  # MHA
        ({"n_kv_heads": 2, "n_heads": 4, "kv_map": "cla:2"}, 1, 2, 8),  # GQA; blocks of two pages
        ({"n_kv_heads": 1, "kv_map": "cla:3"}, 2, 2, 1),  # MQA; blocks of one page
        ({"n_kv_heads": 1, "kv_map": "k=0,1,0,1;v=0,0,2,0"}, 3, 3, 12),
        (LATENT | {"kv_map": "cla:2"}, 4, 2, 8),
        ({"n_kv_heads": 1, "kv_map": "cla:2", "windows": "7,7,0,0"}, 5, 2, 8),
    ],
)
def test_requests_that_share_chunks_get_what_they_get_alone(
    changes, seed, tile, block, monkeypatch
):
    """Requests come, grow, fork and go at random. Nothing is compiled for them."""
    monkeypatch.setattr(prefix_shared, "TILE", tile)
    monkeypatch.setattr(prefix_shared, "BLOCK", block)
    monkeypatch.setattr(prefix_shared, "PRIVATE_BLOCKS", (3 * PAGE, PAGE))
    monkeypatch.setattr(prefix_shared, "rows_at_once", lambda *_: 2)  # the last two overlap
    config = replace(MODEL, vocab_size=64, **changes)
    requests, draw = Requests(config, "dense"), random.Random(seed)
    requests.insert(0, [*PREFIXES[2], 1, 2], 12)
    assert requests.insert(1, [*PREFIXES[2], 3], 12) == 20  # the common prefix is skipped
    for _ in range(22):
        free = [row for row in range(BATCH) if row not in requests.rows]
        growing = [r for r, text in requests.texts.items() if len(text) < 30]
        what = draw.choice(["insert", "insert", "append", "append", "fork", "remove"])
        if what == "insert" and free:
            prompt = [
                *draw.choice(PREFIXES),
                *(draw.randrange(64) for _ in range(draw.randint(1, 6))),
            ]
            requests.insert(draw.choice(free), prompt, CAPACITY - len(prompt) - 1)
        elif what == "append" and growing:
            some = draw.sample(growing, draw.randint(1, len(growing)))
            requests.append({row: draw.randrange(64) for row in some})
        elif what == "fork" and free and growing:
            row = draw.choice(growing)
            requests.fork(row, draw.choice(free), CAPACITY - len(requests.texts[row]) - 1)
        elif what == "remove" and requests.rows:
            requests.remove(draw.choice(list(requests.rows)))
    assert requests.decode._cache_size() == 2


class Unshared:
    """The same requests, each alone in a cache like theirs, in steps of another length."""

    def __init__(self, config, format, **sizes):
        self.requests = Requests(config, format, **sizes)
        self.requests.check = lambda _: None

    def logits(self, text):
        assert self.requests.insert(0, text, 1) == 0  # nothing is left of the one before
        self.requests.remove(0)
        return self.requests.last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("format", "page", "kv_map", "error"),
    [
        ("int8", 4, "cla:2", None),
        ("fp8", 4, "identity", None),
        (Kivi(bits=8, dtype="float32", name="kivi8"), 32, "cla:2", 0.02),
        ("kivi2", 64, "k=0,0;v=0,1", None),
    ],
)
def test_shared_chunks_may_be_quantised(format, page, kv_map, error):
    """Sharing changes nothing, nor does the length of a step: what is kept depends on positions alone."""
    config = replace(MODEL, n_layers=2, n_kv_heads=2, n_heads=4, vocab_size=64, kv_map=kv_map)
    sizes = {"page": page, "pages": 800 // page, "capacity": 150}
    shared = Requests(config, format, chunk=24, **sizes)
    unshared = Unshared(config, format, chunk=100, **sizes)

    def check(found):
        for row, logits in found.items():
            alone = unshared.logits(shared.texts[row])
            assert jnp.abs(logits - alone).max() < 1e-5 * jnp.abs(alone).max(), row

    shared.check = check
    prefix = [7 * i % 64 for i in range(65)]
    for row in range(3):
        matched = shared.insert(row, [*prefix, *range(row, 26)], 40)
        assert matched == (64 if row else 0)
    shared.fork(2, 4, 40)
    shared.check = lambda _: None
    for token in range(38):  # every row fills a page
        shared.append({row: (token + row) % 64 for row in (0, 1, 2, 4)})
    shared.check = check
    shared.append({row: row for row in (0, 1, 2, 4)})
    # It reads what another has written while decoding.
    assert shared.insert(3, [*shared.texts[1], 9], 10) == 128
    if error is not None:
        exact = Unshared(config, "dense", chunk=100, **sizes).logits(shared.texts[3])
        assert 1e-4 < jnp.abs(shared.last - exact).max() / jnp.abs(exact).max() < error


@pytest.mark.parametrize(
    ("blocks", "most"),
    [((3 * PAGE, PAGE), 512), ((12 * PAGE, 8 * PAGE), 512), ((12 * PAGE, 8 * PAGE), 2 * PAGE)],
)
def test_what_rows_have_alone_may_be_read_in_any_blocks(blocks, most, monkeypatch):
    """Rows of different lengths, one of them empty, in tiles of which the last two overlap."""
    monkeypatch.setattr(prefix_shared, "PRIVATE_BLOCKS", blocks)
    monkeypatch.setattr(prefix_shared, "entries_at_once", lambda entries, *_: min(entries, most))
    monkeypatch.setattr(prefix_shared, "rows_at_once", lambda *_: 2)
    config = replace(MODEL, n_layers=2, n_kv_heads=1, vocab_size=64)
    spec = prefix_spec(config, batch=BATCH, page=PAGE, pages=PAGES, capacity=CAPACITY)
    tree = PrefixTree(chunk=PAGE, pages=PAGES)
    lengths = [30, 3, 0, 43, 42]
    common = [16, 0, 0, 16, 0]  # four pages
    prompts = [[*range(c), *[99 - n] * (n - c)] for n, c in zip(lengths, common, strict=True)]
    rows = {r: tree.insert(prompts[r], new_tokens=0) for r in range(BATCH) if lengths[r]}
    draw = np.random.default_rng(0)
    cache = spec.allocate()
    pool = jax.tree.map(
        lambda a: jnp.asarray(draw.normal(size=a.shape), a.dtype), cache.kv_layers[0]
    )
    q_BTKGH = jnp.asarray(
        draw.normal(size=(BATCH, 1, 1, config.n_heads, config.d_head)), jnp.float32
    )
    lengths_B = jnp.array(lengths)
    starts_B = jnp.array([0, 0, 0, 9, 2])  # as with windows
    step = StepPositions(
        positions_BT=lengths_B[:, None] - 1,
        starts_BT=starts_B[:, None],
        lengths_B=lengths_B,
        extra=jax.tree.map(jnp.asarray, spec.tables(rows, tree)),
    )
    outputs = jax.jit(lambda *args: spec.attend(0, *args))(pool, q_BTKGH, step)[:, 0, 0]
    assert (outputs[2] == 0).all()
    for row, path in rows.items():
        pages = np.array([node.page for node in tree.path(path)])
        first, end = starts_B[row], lengths[row]
        k, v = (np.asarray(a)[pages, 0].reshape(-1, config.d_head)[first:end] for a in pool)
        scores = np.asarray(q_BTKGH[row, 0, 0]) @ k.T * config.d_head**-0.5
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights @ v / weights.sum(-1, keepdims=True)
        assert np.abs(outputs[row] - expected).max() < 1e-5 * np.abs(expected).max(), row


def test_tokens_are_written_alike_on_every_platform(monkeypatch):
    """Two rows, with padding that has no page."""
    made = pages.TokenPages(make_format("int8", "float32"), page=4)
    config = replace(MODEL, n_kv_heads=2)
    shapes = made.shapes(config, 5, 2, "kv")
    is_shape = lambda x: isinstance(x, Shape)
    layer = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes, is_leaf=is_shape)
    new = (2, 3, 2, config.d_head)
    kv = KV(*(jax.random.normal(jax.random.key(i), new) for i in range(2)))
    positions_BT = jnp.array([[3, 4, 5], [8, -1, -1]])
    step = StepPositions(positions_BT, 0 * positions_BT, jnp.array([6, 9]))
    page_of = lambda at: jnp.where(at >= 0, at // 4 + jnp.array([[2], [-2]]), 5)
    found = []
    for on_cpu in (True, False):
        monkeypatch.setattr(pages, "on_cpu", lambda on_cpu=on_cpu: on_cpu)
        found.append(made.write(layer, kv, step, page_of, jnp.arange(2)))
    written = [np.argwhere(np.asarray(a.k_BSKH.scales[:, 0])).tolist() for a in found]
    assert written[0] == [[0, 0], [2, 3], [3, 0], [3, 1]]
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_a_block_that_all_rows_read_is_one_item_a_tile():
    config = replace(MODEL, n_layers=2, n_kv_heads=1, vocab_size=64)
    requests = Requests(config, "dense")
    for row in range(3):
        requests.insert(row, [*PREFIXES[2], row], 5)
    tables = requests.spec.tables(requests.rows, requests.tree)
    assert tables.items == 1
    assert sorted(tables.rows_IR[0][:3].tolist()) == [0, 1, 2]
    assert (tables.rows_IR[0][3:] == BATCH).all()
    before = requests.uploads
    requests.append({row: row for row in range(3)})
    assert requests.uploads == before  # the tree has not changed
    requests.remove(0)
    requests.remove(1)
    assert requests.spec.tables(requests.rows, requests.tree).items == 0  # nobody shares


def test_spans_join_chunks_with_equal_readers():
    runs = [(5, 0, (3, 1, 2)), (6, 4, (3, 1, 2)), (2, 8, (3, 1)), (7, 12, ()), (9, 8, (2,))]
    assert [tuple(span) for span in _spans(runs)] == [
        ((5, 6), 0, (3, 1, 2)),
        ((2,), 8, (3, 1)),
        ((9,), 8, (2,)),
    ]


@pytest.mark.parametrize(
    ("changes", "format", "sizes", "words"),
    [
        ({}, "kivi4", {"page": 48}, "page = 48 must be a multiple of 32"),
        (LATENT, "kivi4", {"page": 32}, "does not support latents"),
        ({}, "dense", {"page": 0}, "page = 0 must be a positive integer"),
        ({}, "dense", {"batch": 0}, "batch = 0 must be a positive integer"),
    ],
)
def test_what_cannot_be_shared_is_refused(changes, format, sizes, words):
    config = replace(MODEL, n_layers=4, **changes)
    sizes = {"batch": 2, "page": 4, "pages": 9, "capacity": 16} | sizes
    with pytest.raises(ValueError, match=words):
        prefix_spec(config, format, **sizes)
