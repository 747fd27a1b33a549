"""Which tokens of a vocabulary are special, and which are punctuation."""

import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from cla_jax.eviction.rule import PUNCTUATION, SPECIAL


def classes_of_tokenizer(tokenizer: Any, begin_token: str = "") -> bytes:
    """The class of each id, a byte each. Special are the tokenizer's special tokens and the begin token.

    A token may have no text of its own and yet not be special: some tokenizers strip the first space.
    """
    texts = [tokenizer.decode([i]) for i in range(tokenizer.size)]
    special = {*tokenizer.special_ids(), tokenizer.begin(begin_token)}
    return token_classes(texts, special).tobytes()


def described(tokenizer: Any, classes: bytes) -> dict[str, Any]:
    """How many tokens are special and how many punctuation, and the first marks of punctuation."""
    classes_V = np.frombuffer(classes, np.uint8)
    marks = np.flatnonzero(classes_V == PUNCTUATION)
    return {
        "special": int((classes_V == SPECIAL).sum()),
        "punctuation": len(marks),
        "marks": tuple(tokenizer.decode([int(i)]) for i in marks[:40]),
    }


def token_classes(texts: Sequence[str], special: Collection[int]) -> np.ndarray:
    """The class of each id, [V] of uint8.

    Args:
      texts: what each id stands for.
      special: ids of the tokens that are no text, such as the end token.

    Punctuation is a token of punctuation characters (Unicode's category P), spaces around them left out.
    """
    classes_V = np.array([PUNCTUATION * _is_punctuation(text) for text in texts], np.uint8)
    classes_V[list(special)] = SPECIAL
    return classes_V


def _is_punctuation(text: str) -> bool:
    text = text.strip()
    return bool(text) and all(unicodedata.category(character)[0] == "P" for character in text)
