"""Texts that begin alike, so that what they have in common is computed once.

The options of a question are such texts. They are a family: a trunk, with which all of them begin, and
a branch each, the rest of the text. Rows of equal length hold whole families side by side.
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
        """Tokens before the first from which a target is predicted: the most a trunk can be."""
        return len(self.tokens) - len(self.targets)


class Family(NamedTuple):
    trunk: int  # tokens; if there are none, the family has one member
    members: tuple[int, ...]  # indices of texts


def text(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Text:
    """A continuation of a context of at least one token; what is too long loses its beginning.

    Raises ValueError for a continuation of no token, or of more than the model reads.
    """
    assert context, "begin with the end token"
    if not 0 < len(continuation) <= max_length:
        raise ValueError(
            f"a continuation has {len(continuation)} tokens: 1 to {max_length} can be scored"
        )
    whole = (*context, *continuation)[-(max_length + 1) :]
    return Text(whole[:-1], tuple(continuation))


def families(texts: Sequence[Text]) -> list[Family]:
    """The texts in families, such that little is computed; each text in one."""
    found: list[tuple[int, list[int]]] = []
    trunk: tuple[int, ...] = ()
    for i in sorted(range(len(texts)), key=lambda i: texts[i].tokens):
        mine = texts[i].tokens[: texts[i].given]
        shared = _common(trunk, mine)
        # A shorter trunk is computed anew in each member: does the family still save tokens with one
        # more? Half a trunk is not worth it, for the next text may well share more with this one.
        members = found[-1][1] if found else []
        n = len(members)
        if shared * n > len(trunk) * (n - 1) and 2 * shared >= len(trunk):
            trunk = trunk[:shared]
            members.append(i)
            found[-1] = (shared, members)
        else:
            trunk = mine
            found.append((len(mine), [i]))
    return [Family(length, tuple(members)) for length, members in found]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts begin with alike."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


Rows = dict[int, list[list[Family]]]  # by their length in tokens


def pack(texts: Sequence[Text], found: Sequence[Family], shortest: int) -> Rows:
    """Rows by their length, each a list of families; those too large for a row are cut into several.

    Lengths are `shortest`, and doublings of it for texts that need them.
    """
    pieces: dict[int, list[Family]] = {}
    for family in found:
        length = doubled(shortest, max(len(texts[i].tokens) for i in family.members))
        pieces.setdefault(length, []).extend(_cut(texts, family, length))
    return {length: _fitted(texts, some, length) for length, some in sorted(pieces.items())}


def _cut(texts: Sequence[Text], family: Family, length: int) -> list[Family]:
    """The family as several that fit a row of this length, each with the trunk."""
    parts: list[list[int]] = []
    room = 0
    for i in family.members:
        room -= len(texts[i].tokens) - family.trunk
        if room < 0:
            parts.append([])
            room = length - len(texts[i].tokens)
        parts[-1].append(i)
    return [Family(family.trunk, tuple(part)) for part in parts]


def _fitted(texts: Sequence[Text], found: list[Family], length: int) -> list[list[Family]]:
    """The families in rows: the largest first, each where the least room would be left."""
    size = {f: f.trunk + sum(len(texts[i].tokens) - f.trunk for i in f.members) for f in found}
    rows: list[list[Family]] = []
    room: list[tuple[int, int]] = []  # (columns left, row), ascending
    for family in sorted(found, key=lambda f: -size[f]):
        at = bisect.bisect_left(room, (size[family], 0))
        left, r = room.pop(at) if at < len(room) else (length, len(rows))
        if r == len(rows):
            rows.append([])
        rows[r].append(family)
        bisect.insort(room, (left - size[family], r))
    return rows


def doubled(size: int, least: int) -> int:
    """The size, doubled until it is at least so much: few sizes are few programs to compile."""
    while size < least:
        size *= 2
    return size
