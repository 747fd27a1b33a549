"""How values that others wrote appear in messages: on one line, printable, and of bounded length."""

import difflib
import reprlib
import unicodedata
from collections.abc import Iterable
from typing import Any

LONGEST = 300  # characters of a message that are somebody else's words
_VALUE = 80
# Names whose ratios of equal characters differ by less are about as near.
_AS_NEAR = 0.2


def printable(text: object, longest: int = LONGEST) -> str:
    """The text on one line: control characters are escaped, and the middle of a long text is left out.

    No terminal obeys it: escape sequences, line ends and marks that change the direction of writing are
    spelled `\\x1b`, `\\n` and `\\u202e`.
    """
    text = str(text)
    if len(text) > longest:  # before the loop below: it may be a gigabyte
        half = (longest - 3) // 2
        text = f"{text[:half]}...{text[-half:]}"
    if text.isascii() and text.isprintable():
        return text
    escaped = "".join(map(_character, text))
    return escaped if len(escaped) <= 2 * longest else escaped[: 2 * longest] + "..."


def printable_lines(text: str, longest: int = 2000) -> str:
    """Like `printable`, for a message whose lines are to stay lines; each of them may be this long."""
    return "\n".join(printable(line, longest) for line in text.split("\n"))


def shown(value: Any, longest: int = _VALUE) -> str:
    """The repr of a value as `printable` has it; of a long or deep one, the beginning."""
    return printable(_Short(longest).repr(value), longest)


def _character(character: str) -> str:
    # Everything of the categories C (control, format, surrogate, private) and the two line ends of Unicode.
    if unicodedata.category(character)[0] != "C" and character not in "\u2028\u2029":
        return character
    return character.encode("unicode_escape").decode("ascii")


class _Short(reprlib.Repr):
    """Of every part no more than a message has room for."""

    def __init__(self, longest: int):
        super().__init__()
        self.maxlevel, self.maxlist, self.maxdict, self.maxtuple, self.maxset = 3, 8, 4, 8, 8
        self.maxstring = self.maxlong = self.maxother = longest

    def repr_int(self, x: int, level: int) -> str:
        del level
        # Python itself writes no integer of more than 4,300 digits.
        return f"an integer of {x.bit_length()} bits" if x.bit_length() > 4096 else repr(x)


def near_choice(what: str, value: str, choices: Iterable[str]) -> None:
    """Raises ValueError with the nearest names unless `value` is one of `choices`."""
    choices = tuple(choices)
    if value in choices:
        return
    names = {one.casefold(): one for one in choices}
    word = value[:100].casefold()
    folded = difflib.get_close_matches(word, names, n=3, cutoff=0.4)
    likeness = {name: difflib.SequenceMatcher(None, name, word).ratio() for name in folded}
    # Of the nearest names, those that are about as near as the first.
    near = [names[name] for name in folded if likeness[name] > likeness[folded[0]] - _AS_NEAR]
    known = (shown(one) if "," in one else one for one in choices)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    raise ValueError(f"unknown {what} {shown(value)}; {hint}")


def choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError with all the choices unless `value` is one of them."""
    choices = tuple(choices)
    if value not in choices:
        raise ValueError(f"{name} = {shown(value)} must be one of {', '.join(map(str, choices))}")
