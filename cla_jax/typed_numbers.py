"""Numbers in text that people type: ASCII digits, without the underscores that Python also accepts.

Python reads digits of other scripts as numbers, and `1_0_0` as 100. Both are more often a slip than meant.
"""

from cla_jax.messages import shown


def whole_number(text: str) -> int:
    """Raises ValueError, which shows the text, for what is not a whole number."""
    try:
        return int(_plain(text))
    except ValueError:
        raise ValueError(f"{shown(text)} is not a whole number") from None


def number(text: str) -> float:
    """Raises ValueError, which shows the text, for what is not a number; `inf` and `nan` are read."""
    try:
        return float(_plain(text))
    except ValueError:
        raise ValueError(f"{shown(text)} is not a number") from None


def is_digits(text: str, most: int = 18) -> bool:
    """Whether a text is a whole number of at most so many digits, without a sign."""
    return text.isascii() and text.isdecimal() and len(text) <= most


def _plain(text: str) -> str:
    if not text.isascii() or "_" in text:
        raise ValueError
    return text
