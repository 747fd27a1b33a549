"""Texts with a common prefix, grouped so that the prefix is computed once.

The options of a question are such texts. A prefix group is the prefix, and for each text its suffix: the
rest of the text. Rows of equal length hold whole groups side by side.
"""

import bisect
from collections.abc import Sequence
from typing import NamedTuple


class Text(NamedTuple):
    """What the model reads, and what it should predict from the last `len(targets)` tokens of it."""

    tokens: tuple[int, ...]
    targets: tuple[int, ...]

    @property
    def given(self) -> int:
        """Tokens before the first from which a target is predicted: the most a prefix can be."""
        return len(self.tokens) - len(self.targets)


class PrefixGroup(NamedTuple):
    prefix: int  # tokens; if there are none, the group has one member
    members: tuple[int, ...]  # indices of texts


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
    groups: list[tuple[int, list[int]]] = []
    prefix: tuple[int, ...] = ()
    for i in sorted(range(len(texts)), key=lambda i: texts[i].tokens):
        mine = texts[i].tokens[: texts[i].given]
        shared = _common(prefix, mine)
        # A shorter prefix is computed anew in each member: does the group still save tokens with one
        # more? Half a prefix is not worth it, for the next text may well share more with this one.
        members = groups[-1][1] if groups else []
        n = len(members)
        if shared * n > len(prefix) * (n - 1) and 2 * shared >= len(prefix):
            prefix = prefix[:shared]
            members.append(i)
            groups[-1] = (shared, members)
        else:
            prefix = mine
            groups.append((len(mine), [i]))
    return [PrefixGroup(length, tuple(members)) for length, members in groups]


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
        length = doubled(shortest, max(len(texts[i].tokens) for i in group.members))
        pieces.setdefault(length, []).extend(_cut(texts, group, length))
    return {length: _fitted(texts, same, length) for length, same in sorted(pieces.items())}


def _cut(texts: Sequence[Text], group: PrefixGroup, length: int) -> list[PrefixGroup]:
    """The group as several that fit a row of this length, each with the prefix."""
    parts: list[list[int]] = []
    room = 0
    for i in group.members:
        room -= len(texts[i].tokens) - group.prefix
        if room < 0:
            parts.append([])
            room = length - len(texts[i].tokens)
        parts[-1].append(i)
    return [PrefixGroup(group.prefix, tuple(part)) for part in parts]


def _fitted(
    texts: Sequence[Text], groups: list[PrefixGroup], length: int
) -> list[list[PrefixGroup]]:
    """The groups in rows: the largest first, each where the least room would be left."""
    size = {f: f.prefix + sum(len(texts[i].tokens) - f.prefix for i in f.members) for f in groups}
    rows: list[list[PrefixGroup]] = []
    room: list[tuple[int, int]] = []  # (columns left, row), ascending
    for group in sorted(groups, key=lambda f: -size[f]):
        at = bisect.bisect_left(room, (size[group], 0))
        left, r = room.pop(at) if at < len(room) else (length, len(rows))
        if r == len(rows):
            rows.append([])
        rows[r].append(group)
        bisect.insort(room, (left - size[group], r))
    return rows


def doubled(size: int, least: int) -> int:
    """The size, doubled until it is at least so much: few sizes are few programs to compile."""
    while size < least:
        size *= 2
    return size
