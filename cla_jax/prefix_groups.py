"""Texts with a common prefix, grouped so that the prefix is computed once.

The options of a question are such texts. A prefix group is the prefix, and for each text its suffix: the
rest of the text. Some texts of a group may have more in common: questions that begin with the same examples
have options. They form a nested group. Rows of equal length hold whole groups side by side.
"""

import bisect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

# Tokens that a nested group must save. Through a cache, each has steps of its own.
LEAST_SAVED = 16
# Levels of nested groups at most: examples, a passage, a question. Through a cache, each level holds a cache.
LEVELS = 3


class Text(NamedTuple):
    """What the model reads, and what it should predict from the last `len(targets)` tokens of it."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def given(self) -> int:
        """Tokens before the first from which a target is predicted: the most a prefix can be."""
        return len(self.tokens) - len(self.targets)


class PrefixGroup(NamedTuple):
    prefix: int  # tokens of its texts that are equal; if there are none, the group has one member
    members: tuple["int | PrefixGroup", ...]  # indices of texts; groups with more in common

    @property
    def texts(self) -> Iterator[int]:
        """The indices of its texts, those of the groups in it included."""
        for member in self.members:
            if isinstance(member, PrefixGroup):
                yield from member.texts
            else:
                yield member

    @property
    def levels(self) -> int:
        inner = [member.levels for member in self.members if isinstance(member, PrefixGroup)]
        return 1 + max(inner, default=0)


def text(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Text:
    """A continuation of a context of at least one token; what is too long loses its beginning.

    Raises ValueError for a continuation of no token, or of more than the model reads.
    """
    assert context, "begin with the end token"
    if not 0 < len(continuation) <= max_length:
        raise ValueError(
            f"a continuation has {len(continuation)} tokens, but must have 1 to {max_length}"
        )
    whole = (*context, *continuation)[-(max_length + 1) :]
    return Text(whole[:-1], tuple(continuation))


def prefix_groups(texts: Sequence[Text]) -> list[PrefixGroup]:
    """Groups of the texts, chosen so that few tokens are computed. Each text is in one group."""
    given = [each.tokens[: each.given] for each in texts]
    together: list[list[int]] = []
    prefix = longest = 0  # of the last of them: tokens that are equal, tokens that could be
    for i in sorted(range(len(texts)), key=lambda i: (given[i], texts[i].tokens)):
        if together:
            prefix = min(prefix, _common(given[together[-1][-1]], given[i]))
            longest = max(longest, len(given[i]))
        # A short beginning, such as "Question:", would tie texts of all lengths to one another.
        if prefix and 4 * prefix >= longest:
            together[-1].append(i)
        else:
            together.append([i])
            prefix = longest = len(given[i])
    return [_nested(given, members) for members in together]


def _nested(given: Sequence[Sequence[int]], texts: Sequence[int]) -> PrefixGroup:
    """A group of sorted texts, with the groups in it: the tree of their common prefixes."""
    # The nodes from the root to the last text: tokens, and members. A node that is done becomes a group of
    # its parent if that saves enough; otherwise its members become the parent's.
    path: list[tuple[int, list[int | PrefixGroup]]] = []
    path.append((_common(given[texts[0]], given[texts[-1]]), [texts[0]]))

    def close(shared: int) -> None:
        """Ends the nodes whose prefix is longer than what the next text shares."""
        while path[-1][0] > shared:
            prefix, members = path.pop()
            if path[-1][0] < shared:
                path.append((shared, []))
            node = PrefixGroup(prefix, tuple(members))
            saved = (prefix - path[-1][0]) * (len(members) - 1)
            kept = saved >= LEAST_SAVED and node.levels < LEVELS
            path[-1][1].extend([node] if kept else members)

    for before, i in itertools.pairwise(texts):
        shared = _common(given[before], given[i])
        if shared > path[-1][0]:
            path[-1][1].pop()
            path.append((shared, [before]))
        close(shared)
        path[-1][1].append(i)
    close(path[0][0])
    return PrefixGroup(path[0][0], tuple(path[0][1]))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix, in tokens."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


Rows = dict[int, list[list[PrefixGroup]]]  # by their length in tokens


def pack(texts: Sequence[Text], groups: Sequence[PrefixGroup], shortest: int) -> Rows:
    """Rows by their length, each a list of groups; those too large for a row are cut into several.

    Lengths are `shortest`, and doublings of it for texts that need them.
    """
    pieces: dict[int, list[PrefixGroup]] = {}
    for group in groups:
        length = doubled(shortest, max(len(texts[i].tokens) for i in group.texts))
        pieces.setdefault(length, []).extend(_cut(texts, group, 0, length))
    columns = lambda group: computed(texts, group)
    return {length: _fitted(same, columns, length) for length, same in sorted(pieces.items())}


def computed(texts: Sequence[Text], member: int | PrefixGroup, start: int = 0) -> int:
    """The tokens of a text or a group that are computed, if the first `start` are there already."""
    if isinstance(member, int):
        return len(texts[member].tokens) - start
    inner = sum(computed(texts, each, member.prefix) for each in member.members)
    return member.prefix - start + inner


def _cut(texts: Sequence[Text], group: PrefixGroup, start: int, room: int) -> list[PrefixGroup]:
    """The group as several with the same prefix, each of which computes at most `room` tokens."""
    room -= group.prefix - start
    columns = lambda member: computed(texts, member, group.prefix)
    parts: list[int | PrefixGroup] = []
    for member in group.members:
        if isinstance(member, int) or columns(member) <= room:
            parts.append(member)
        else:
            parts += _cut(texts, member, group.prefix, room)
    return [PrefixGroup(group.prefix, tuple(part)) for part in _fitted(parts, columns, room)]


T = TypeVar("T")


def _fitted(parts: Sequence[T], columns: Callable[[T], int], length: int) -> list[list[T]]:
    """The parts in rows: the largest first, each where the least room would be left."""
    rows: list[list[T]] = []
    room: list[tuple[int, int]] = []  # (columns left, row), ascending
    for size, part in sorted(((columns(part), part) for part in parts), key=lambda p: -p[0]):
        at = bisect.bisect_left(room, (size, 0))
        left, r = room.pop(at) if at < len(room) else (length, len(rows))
        if r == len(rows):
            rows.append([])
        rows[r].append(part)
        bisect.insort(room, (left - size, r))
    return rows


def doubled(size: int, least: int) -> int:
    """The size, doubled until it is at least so much: few sizes are few programs to compile."""
    while size < least:
        size *= 2
    return size
