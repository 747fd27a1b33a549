"""Which chunks of a pool hold the keys and values of which requests, equal beginnings once.

The prefix-aware KV cache of ChunkAttention (2402.15220, section 3.1), on the host. A node of the tree is a
chunk: up to `chunk` tokens, and a page of a pool that has their keys and values in every KV layer. The path
from the root to a leaf is one request. Requests with equal beginnings share the nodes of that beginning.

    tree = PrefixTree(chunk=64, pages=1000)
    first = tree.insert(prompt, new_tokens=100)     # first.matched tokens need no prefill
    tree.append(first, token)                       # in page first.leaf.page
    tree.remove(first)

Rules that the paper leaves to its code:

- A prompt is matched by whole chunks, so no node is ever split.
- A leaf belongs to one request, which writes to it. Only full chunks are shared, and nobody changes them,
  so there is no copy on write. A leaf is never full: a chunk that becomes full gets an empty child.
- The last token of a prompt is never matched: its hidden state gives the first new token.
- `fork` copies the leaf alone.

A request reserves the pages that its longest continuation may need when it is inserted. So it never waits for
a page while it decodes, and requests cannot block one another.

Rows of a batch are numbered depth first (`rows`). So the requests that read a node are neighbours.
"""

import dataclasses
import heapq
import itertools
from collections.abc import Iterator, Sequence


class PoolFull(Exception):
    """There is no room for a request now. There will be when others have ended."""


@dataclasses.dataclass(eq=False, slots=True)
class Node:
    """A chunk."""

    tokens: list[int]
    page: int
    parent: "Node | None"
    readers: int = 0  # live requests whose path passes through
    used: int = 0  # when a request last came or went
    children: list["Node"] = dataclasses.field(default_factory=list)  # oldest first
    full: dict[tuple[int, ...], "Node"] = dataclasses.field(default_factory=dict)  # by tokens


@dataclasses.dataclass(eq=False, slots=True)
class Path:
    """A request in the tree."""

    leaf: Node
    matched: int  # tokens of the prompt that were in the pool before
    length: int  # tokens
    reserved: int  # pages that it may still take
    # Pages that it has taken for tokens to come, in order.
    ahead: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A chunk that several neighbouring rows read: `first` to `end`, the end not included."""

    page: int
    position: int  # of its first token
    first: int
    end: int


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What a step of decoding reads."""

    rows: tuple[Path, ...]  # the request of each row
    shared: tuple[Run, ...]
    private: tuple[
        tuple[int, ...], ...
    ]  # pages that only this row reads, in order; those ahead too
    starts: tuple[int, ...]  # position of the first token in them


class PrefixTree:
    """The tree, and which pages of its pool are free.

    Args:
      chunk: tokens in a chunk.
      pages: chunks in the pool.
      retain: full chunks of requests that have ended stay until their pages are needed, so many at most; the
        least recently used go first.
    """

    def __init__(self, *, chunk: int, pages: int, retain: int = 0):
        for name, value in (("chunk", chunk), ("pages", pages)):
            if value < 1:
                raise ValueError(f"prefix tree: {name} = {value} must be positive")
        if retain < 0:
            raise ValueError(f"prefix tree: retain = {retain} must not be negative")
        self.chunk, self.pages, self.retain = chunk, pages, retain
        self.version = 0  # changes whenever `layout` does
        # Pages that requests have taken, and that still hold what other requests left in them. Whoever clears
        # the pages empties the list.
        self.unclear: list[int] = []
        self._root = Node([], -1, None)
        self._free = list(reversed(range(pages)))
        self._next = 0  # the first page that no request has had; so have all after it
        self._paths: dict[Node, Path] = {}  # live requests by their leaves
        self._reserved = 0
        self._idle = 0  # chunks that no live request reads
        # Idle chunks without children: (used, number, chunk). Some are outdated, see `_is_current`.
        self._evictable: list[tuple[int, int, Node]] = []
        self._clock = itertools.count(1)

    # ------------------------------------------------------------------------------- requests

    def insert(self, prompt: Sequence[int], *, new_tokens: int) -> Path:
        """Adds a request: its prompt, and room for `new_tokens` more.

        The keys and values of the tokens from `matched` on are not in the pool yet.

        Raises:
          PoolFull: there is no room now. Nothing has changed.
          ValueError: an empty prompt, or more tokens than the whole pool has room for.
        """
        if not len(prompt):
            raise ValueError("prefix tree: an empty prompt")
        total = self.chunks(len(prompt) + new_tokens)
        if total > self.pages:
            raise ValueError(
                f"a request of {len(prompt)} tokens and {new_tokens} new tokens needs {total} chunks of "
                f"{self.chunk} tokens, but the pool has only {self.pages}"
            )
        node, matched = self._match(prompt)
        shared = matched // self.chunk
        idle, above = 0, node
        while above.parent is not None and not above.readers:
            idle, above = idle + 1, above.parent
        self._check_room(total - shared, but=idle)
        now = self.chunks(len(prompt)) - shared
        path = Path(node, matched, len(prompt), 0)
        self._pass_through(node, +1)
        for start in range(matched, matched + now * self.chunk, self.chunk):
            node = self._grow(node, list(prompt[start : start + self.chunk]))
        self._reserve(path, total - shared - now)
        return self._put(path, node)

    def append(self, path: Path, token: int) -> None:
        """Adds a token to a request, in its leaf. A leaf that becomes full gets an empty child."""
        leaf = path.leaf
        assert self._paths.get(leaf) is path
        assert len(leaf.tokens) < self.chunk
        leaf.tokens.append(token)
        path.length += 1
        if len(leaf.tokens) == self.chunk:
            assert leaf.parent is not None
            leaf.parent.full.setdefault(tuple(leaf.tokens), leaf)
            if path.ahead:  # the layout has had it already
                del self._paths[leaf]
                path.leaf = self._add(leaf, [], path.ahead.pop(0))
                self._paths[path.leaf] = path
                return
            assert path.reserved, "a request takes more tokens than it was inserted with"
            del self._paths[leaf]
            self._reserve(path, path.reserved - 1)
            self._put(path, self._grow(leaf, []))

    def prepare(self, path: Path, tokens: int) -> None:
        """Takes the pages for so many more tokens of a request, in advance.

        A loop on the device can then write them all before the host looks again. Appending them changes the
        tree, but not its layout.
        """
        assert self._paths.get(path.leaf) is path
        more = self.chunks(path.length + tokens) - self.chunks(path.length) - len(path.ahead)
        if more <= 0:
            return
        assert path.reserved >= more, "a request takes more tokens than it was inserted with"
        self._reserve(path, path.reserved - more)
        path.ahead += [self._take() for _ in range(more)]
        self.version += 1

    def fork(self, path: Path, *, new_tokens: int) -> Path:
        """Adds a request that goes on from where another one is, with room for `new_tokens` more.

        Full chunks are shared. The keys and values in the leaf of `path` are to be copied to the fork's leaf.
        Raises PoolFull, before anything has changed.
        """
        leaf = path.leaf
        assert self._paths.get(leaf) is path
        assert leaf.parent is not None
        future = self.chunks(path.length + new_tokens) - self.chunks(path.length)
        self._check_room(1 + future)
        twin = Path(leaf, path.length - len(leaf.tokens), path.length, 0)
        self._pass_through(leaf.parent, +1)
        self._reserve(twin, future)
        return self._put(twin, self._grow(leaf.parent, list(leaf.tokens)))

    def remove(self, path: Path) -> None:
        """Ends a request. Its pages are free, or idle if they are retained."""
        assert self._paths.pop(path.leaf) is path
        self._reserve(path, 0)
        self._free += reversed(path.ahead)
        path.ahead = []
        self._pass_through(path.leaf, -1)
        node = path.leaf
        while node.parent is not None and not node.readers:
            above = node.parent
            if not (self.retain and len(node.tokens) == self.chunk):
                self._idle -= 1
                self._drop(node)
            elif not node.children:
                heapq.heappush(self._evictable, (node.used, node.page, node))
            node = above
        # While nothing is evicted, more and more are outdated.
        if len(self._evictable) > 2 * self.pages:
            self._evictable = list(filter(_is_current, self._evictable))
            heapq.heapify(self._evictable)
        while self._idle > self.retain:
            self._evict()
        self.version += 1

    # ------------------------------------------------------------------------------ questions

    @property
    def room(self) -> int:
        """Pages that a new request could take: those that are free or idle, and reserved by nobody."""
        return len(self._free) + self._idle - self._reserved

    @property
    def live_pages(self) -> int:
        """Pages that live requests read."""
        return self.pages - len(self._free) - self._idle

    def chunks(self, tokens: int) -> int:
        """Chunks of a path with so many tokens: the last one is not full."""
        return tokens // self.chunk + 1

    def nodes(self) -> Iterator[Node]:
        """All chunks, depth first."""
        waiting = list(reversed(self._root.children))
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)

    def path(self, path: Path) -> list[Node]:
        """The chunks of a request, from the first token on."""
        nodes, node = [], path.leaf
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        return nodes[::-1]

    def tokens(self, path: Path) -> list[int]:
        return [token for node in self.path(path) for token in node.tokens]

    def layout(self) -> Layout:
        """The rows depth first, the chunks that neighbours share, and those that a row has alone."""
        rows, shared = [], []
        positions = {self._root: 0}
        for node in self.nodes():
            if not node.readers:
                continue
            assert node.parent is not None
            positions[node] = positions[node.parent] + len(node.parent.tokens)
            if node.readers > 1:
                end = len(rows) + node.readers
                shared.append(Run(node.page, positions[node], len(rows), end))
            if node in self._paths:
                rows.append(self._paths[node])
        alone = [[node for node in self.path(row) if node.readers == 1] for row in rows]
        pages = [
            (*(node.page for node in nodes), *row.ahead)
            for row, nodes in zip(rows, alone, strict=True)
        ]
        return Layout(
            rows=tuple(rows),
            shared=tuple(shared),
            private=tuple(pages),
            starts=tuple(positions[nodes[0]] for nodes in alone),  # a leaf is read by one
        )

    # ------------------------------------------------------------------------------- in between

    def _match(self, prompt: Sequence[int]) -> tuple[Node, int]:
        """The deepest chunk that holds a beginning of the prompt, and the tokens up to its end."""
        node, matched = self._root, 0
        while matched + self.chunk < len(prompt):
            child = node.full.get(tuple(prompt[matched : matched + self.chunk]))
            if child is None:
                break
            node, matched = child, matched + self.chunk
        return node, matched

    def _check_room(self, wanted: int, but: int = 0) -> None:
        if wanted > self.room - but:
            raise PoolFull(f"{wanted} chunks are needed, {self.room - but} are free")

    def _pass_through(self, node: Node, change: int) -> None:
        """One reader more or less, from a chunk up to the root."""
        now = next(self._clock)
        while node.parent is not None:
            before = node.readers
            node.readers, node.used = before + change, now
            self._idle += (node.readers == 0) - (before == 0)
            node = node.parent

    def _grow(self, parent: Node, tokens: list[int]) -> Node:
        """A new chunk with one reader."""
        return self._add(parent, tokens, self._take())

    def _take(self) -> int:
        """A free page; there is one, or an idle one."""
        if not self._free:
            self._evict()
        page = self._free.pop()
        if page < self._next:
            self.unclear.append(page)
        self._next = max(self._next, page + 1)
        return page

    def _add(self, parent: Node, tokens: list[int], page: int) -> Node:
        node = Node(tokens, page, parent, readers=1, used=next(self._clock))
        parent.children.append(node)
        if len(tokens) == self.chunk:
            parent.full.setdefault(tuple(tokens), node)
        return node

    def _put(self, path: Path, leaf: Node) -> Path:
        """A request at its leaf."""
        path.leaf = leaf
        self._paths[leaf] = path
        self.version += 1
        return path

    def _reserve(self, path: Path, pages: int) -> None:
        """Pages that a request may still take."""
        self._reserved += pages - path.reserved
        path.reserved = pages

    def _evict(self) -> None:
        """Frees the idle chunk without children that was used least recently."""
        while True:  # there is one: whoever takes a page has made sure of it
            entry = heapq.heappop(self._evictable)
            if _is_current(entry):
                break
        node = entry[-1]
        parent = node.parent
        assert parent is not None
        self._idle -= 1
        self._drop(node)
        if parent.parent is not None and not parent.readers and not parent.children:
            heapq.heappush(self._evictable, (parent.used, parent.page, parent))

    def _drop(self, node: Node) -> None:
        """Takes a chunk out of the tree; its page is free."""
        assert node.parent is not None
        assert not node.children
        parent, key = node.parent, tuple(node.tokens)
        parent.children.remove(node)
        if parent.full.get(key) is node:
            del parent.full[key]
            for other in parent.children:  # another request may have written the same tokens
                if other.tokens == node.tokens:
                    parent.full[key] = other
                    break
        self._free.append(node.page)
        node.parent = None


def _is_current(evictable: tuple[int, int, Node]) -> bool:
    """Whether a chunk is still in the tree, idle, without children, and was not used again."""
    used, _, node = evictable
    unchanged = node.used == used and not node.readers and not node.children
    return unchanged and node.parent is not None
