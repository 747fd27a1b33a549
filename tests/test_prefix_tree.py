import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cla_jax.prefix_tree import PoolFull, PrefixTree, Run

ALPHABET = 2  # tokens: few, so that texts often begin alike


class Model:
    """The same requests as plain lists, and what must hold of the tree."""

    def __init__(self, chunk: int, pages: int, retain: int):
        self.tree = PrefixTree(chunk=chunk, pages=pages, retain=retain)
        self.texts: dict = {}  # path -> tokens
        self.left: dict = {}  # path -> tokens that it may still add

    def insert(self, prompt, new):
        tree = self.tree
        try:
            path = tree.insert(prompt, new_tokens=new)
        except PoolFull:
            # Only if the pages that live requests have or may need are too many.
            needed = {path: self.needs(path) for path in self.texts}
            assert self.live_chunks() + sum(needed.values()) + self.chunks(prompt, new) > tree.pages
            return
        assert path.matched % tree.chunk == 0
        assert path.matched < len(prompt)
        self.texts[path], self.left[path] = list(prompt), new

    def chunks(self, prompt, new):
        return (len(prompt) + new) // self.tree.chunk + 1

    def needs(self, path):
        have = len(self.texts[path])
        total = (have + self.left[path]) // self.tree.chunk - have // self.tree.chunk
        return total - len(path.ahead)

    def live_chunks(self):
        return self.tree.live_pages

    def append(self, path, token):
        if self.left[path]:
            self.tree.append(path, token)
            self.texts[path].append(token)
            self.left[path] -= 1

    def prepare(self, path, tokens):
        tokens = min(tokens, self.left[path])
        self.tree.prepare(path, tokens)
        layout = self.tree.layout()
        row = layout.rows.index(path)
        room = len(layout.private[row]) * self.tree.chunk + layout.starts[row] - path.length
        assert room > tokens  # a leaf is never full

    def fork(self, path, new):
        try:
            twin = self.tree.fork(path, new_tokens=new)
        except PoolFull:
            return
        self.texts[twin], self.left[twin] = list(self.texts[path]), new

    def remove(self, path):
        self.tree.remove(path)
        del self.texts[path], self.left[path]

    def check(self):
        tree, chunk = self.tree, self.tree.chunk
        nodes = list(tree.nodes())
        # Every page is free or has one chunk; none is lost.
        pages = [node.page for node in nodes]
        ahead = [page for path in self.texts for page in path.ahead]
        pages += ahead
        assert len(set(pages)) == len(pages)
        assert set(pages) <= set(range(tree.pages))
        assert len(pages) == tree.live_pages + tree._idle
        assert tree.live_pages == sum(node.readers > 0 for node in nodes) + len(ahead)
        assert tree._idle <= tree.retain
        promised = sum(self.needs(path) for path in self.texts)
        assert tree.room == tree.pages - tree.live_pages - promised >= 0
        readers = dict.fromkeys(nodes, 0)
        for path, text in self.texts.items():
            assert tree.tokens(path) == text
            assert path.length == len(text)
            *full, leaf = way = tree.path(path)
            assert all(len(node.tokens) == chunk for node in full)
            assert len(leaf.tokens) < chunk
            assert not leaf.children
            assert leaf.readers == 1
            for node in way:
                readers[node] += 1
        for node in nodes:
            assert node.readers == readers[node]
            for child in node.children:
                assert child.parent is node
                assert child.readers <= node.readers
            if not node.readers:
                assert len(node.tokens) == chunk  # what is retained can be matched
        self.check_layout({node.page: node for node in nodes})

    def check_layout(self, by_page):
        layout = self.tree.layout()
        assert set(layout.rows) == set(self.texts)
        assert len(layout.rows) == len(self.texts)
        for row, path in enumerate(layout.rows):
            read = [run for run in layout.shared if run.first <= row < run.end]
            read = sorted(read, key=lambda run: run.position)
            position = 0
            text = []
            for run in read:
                assert run.position == position
                assert run.end - run.first == by_page[run.page].readers > 1
                text += by_page[run.page].tokens
                position = len(text)
            assert layout.starts[row] == position
            own = layout.private[row][: len(layout.private[row]) - len(path.ahead)]
            assert [*own, *path.ahead] == list(layout.private[row])
            for page in own:
                assert by_page[page].readers == 1
                text += by_page[page].tokens
            assert text == self.texts[path]


texts = st.lists(st.integers(0, ALPHABET - 1), min_size=1, max_size=14)
which = st.integers(0, 30)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), texts, st.integers(0, 6)),
        st.tuples(st.just("append"), which, st.integers(0, ALPHABET - 1)),
        st.tuples(st.just("append"), which, st.integers(0, ALPHABET - 1)),
        st.tuples(st.just("prepare"), which, st.integers(0, 9)),
        st.tuples(st.just("fork"), which, st.integers(0, 6)),
        st.tuples(st.just("remove"), which),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(operations, st.integers(1, 4), st.integers(16, 24), st.sampled_from([0, 3, 24]))
def test_the_tree_holds_what_lists_hold(operations, chunk, pages, retain):
    model = Model(chunk, pages, retain)
    for what, *values in operations:
        if what == "insert":
            if model.chunks(*values) <= pages:
                model.insert(*values)
        elif model.texts:
            paths = list(model.texts)
            getattr(model, what)(paths[values[0] % len(paths)], *values[1:])
        model.check()


def test_what_is_remembered_of_retained_chunks_does_not_grow_with_the_requests():
    tree = PrefixTree(chunk=4, pages=8, retain=8)
    for _ in range(100):
        tree.remove(tree.insert([1, 2, 3, 4, 5], new_tokens=0))
    assert len(tree._evictable) <= 2 * 8
    # The one chunk that is retained still gives way to a request of the whole pool.
    assert (tree._idle, tree.room) == (1, 8)
    tree.insert(list(range(10, 41)), new_tokens=0)
    assert (tree._idle, tree.room) == (0, 0)


@pytest.mark.parametrize("retain", [0, 60])
def test_no_page_is_lost_in_ten_thousand_operations(retain):
    draw, model = random.Random(0), Model(chunk=4, pages=60, retain=retain)
    bases = [[draw.randrange(50) for _ in range(24)] for _ in range(3)]
    kinds = ("insert", "append", "append", "append", "prepare", "fork", "remove")
    done = dict.fromkeys(kinds, 0)
    for i in range(10_000):
        paths = list(model.texts)
        what = draw.choice(kinds)
        if what == "insert" or not paths:
            what, base = "insert", draw.choice(bases)
            rest = [draw.randrange(50) for _ in range(draw.randrange(1, 9))]
            model.insert(base[: draw.randrange(25)] + rest, draw.randrange(20))
        else:
            largest = {"append": 50, "prepare": 9, "fork": 10}
            values = [draw.randrange(largest[what])] if what in largest else []
            getattr(model, what)(draw.choice(paths), *values)
        done[what] += 1
        if i % 50 == 0:
            model.check()
    assert min(done.values()) > 1000
    for path in list(model.texts):
        model.remove(path)
    model.check()
    assert model.tree.live_pages == 0
    assert model.tree.room == 60
    assert (model.tree._idle > 0) == bool(retain)
    model.insert(list(range(100, 239)), 100)  # idle chunks give way to a request of the whole pool
    model.check()
    assert (model.tree.room == 0 and model.tree._idle == 0) or retain


def test_equal_beginnings_are_matched_by_whole_chunks_but_for_the_last_token():
    tree = PrefixTree(chunk=4, pages=20)
    tree.insert(range(8), new_tokens=0)
    for prompt, matched in (
        (range(8), 4),  # its last token's hidden state is wanted
        (range(9), 8),
        (range(7), 4),
        ([0, 1, 2, 3, 4, 5, 6, 99, 8], 4),  # half a chunk is none
        ([99, *range(8)], 0),
        (range(4), 0),
    ):
        path = tree.insert(list(prompt), new_tokens=0)
        assert path.matched == matched
        tree.remove(path)


def test_a_leaf_is_never_shared_and_never_full():
    tree = PrefixTree(chunk=4, pages=20)
    a = tree.insert([1, 2, 3], new_tokens=9)
    b = tree.insert([1, 2, 3], new_tokens=9)
    assert (a.matched, b.matched) == (0, 0)
    assert a.leaf is not b.leaf
    tree.append(a, 4)
    assert a.leaf.tokens == []
    assert len(tree.path(a)) == 2
    c = tree.insert([1, 2, 3, 4, 5], new_tokens=0)
    assert c.matched == 4
    assert tree.path(c)[0] is tree.path(a)[0]
    tree.append(b, 4)  # the same tokens, written by another: both stay
    assert tree.path(b)[0] is not tree.path(a)[0]
    tree.remove(a)
    tree.remove(c)
    assert tree.insert([1, 2, 3, 4, 5], new_tokens=0).matched == 4  # of b


def test_a_fork_copies_the_leaf_alone():
    tree = PrefixTree(chunk=4, pages=20)
    path = tree.insert(range(10), new_tokens=0)
    twin = tree.fork(path, new_tokens=5)
    assert tree.path(twin)[:2] == tree.path(path)[:2]
    assert twin.leaf is not path.leaf
    assert twin.leaf.tokens == path.leaf.tokens == [8, 9]
    assert tree.live_pages == 4
    tree.append(twin, 99)
    assert tree.tokens(path) == list(range(10))


def test_rows_that_share_are_neighbours_whatever_the_order_they_come_in():
    tree = PrefixTree(chunk=2, pages=40)
    x = [tree.insert([0, 0, 1, 1, i], new_tokens=0) for i in range(2)]
    y = tree.insert([5, 5, 5], new_tokens=0)
    x.append(tree.insert([0, 0, 2], new_tokens=0))
    layout = tree.layout()
    assert layout.rows == (*x, y)
    (first, second) = layout.shared
    assert (first.position, first.first, first.end) == (0, 0, 3)
    assert isinstance(second, Run)
    assert (second.position, second.first, second.end) == (2, 0, 2)
    assert layout.starts == (4, 4, 2, 0)


def test_a_request_waits_for_the_pages_of_its_longest_continuation():
    tree = PrefixTree(chunk=4, pages=6)
    a = tree.insert(range(6), new_tokens=8)  # 2 chunks now, 4 in the end
    before = tree.layout()
    with pytest.raises(PoolFull, match="3 chunks are needed, 2 are free"):
        tree.insert([9] * 10, new_tokens=1)
    assert tree.layout() == before
    b = tree.insert([9] * 4, new_tokens=3)
    for token in range(8):
        tree.append(a, token)  # never waits
    tree.remove(b)
    tree.remove(a)
    assert tree.room == 6


def test_idle_chunks_go_least_recently_used_first_and_children_before_parents():
    tree = PrefixTree(chunk=2, pages=6, retain=6)
    for prompt in ([1, 1, 2, 2, 0], [3, 3, 0]):
        tree.remove(tree.insert(prompt, new_tokens=0))
    assert tree._idle == 3
    tree.remove(tree.insert([1, 1, 2, 2, 0], new_tokens=0))  # used again
    kept = lambda: [node.tokens for node in tree.nodes() if not node.readers]
    for prompt, expected in (
        ([7] * 6, [[1, 1], [2, 2]]),
        ([8], [[1, 1]]),
    ):
        tree.insert(prompt, new_tokens=0)
        assert kept() == expected
    with pytest.raises(PoolFull):
        tree.insert([1, 1, 0, 0], new_tokens=0)


@pytest.mark.parametrize("name", ["chunk", "pages"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} = 0 must be positive"):
        PrefixTree(chunk=4 * (name != "chunk"), pages=4 * (name != "pages"))


def test_a_request_that_never_fits_is_refused_and_not_kept_waiting():
    tree = PrefixTree(chunk=4, pages=3)
    with pytest.raises(
        ValueError, match=r"10 tokens and 2 new tokens needs 4 chunks .* the pool has only 3"
    ):
        tree.insert(range(10), new_tokens=2)
    with pytest.raises(ValueError, match="empty prompt"):
        tree.insert([], new_tokens=2)


def test_pages_taken_in_advance_keep_the_layout_while_tokens_come():
    tree = PrefixTree(chunk=4, pages=20)
    path = tree.insert([1, 2, 3], new_tokens=12)
    tree.prepare(path, 9)  # 12 tokens: three full chunks and an empty leaf
    version, layout = tree.version, tree.layout()
    assert len(layout.private[0]) == 4
    for token in range(9):
        tree.append(path, token)
    assert tree.version == version
    assert tree.layout().private == layout.private
    assert tree.insert([1, 2, 3, 0, 9], new_tokens=0).matched == 4  # as if appended one by one
    tree.prepare(path, 3)
    tree.remove(path)
    assert tree.live_pages == 2
