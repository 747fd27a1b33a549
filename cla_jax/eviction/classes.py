"""Which tokens of a vocabulary are special, and which are punctuation."""

import logging
import unicodedata
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from cla_jax.eviction.rule import PUNCTUATION, SPECIAL
from cla_jax.messages import shown

log = logging.getLogger(__name__)


def classes_of_tokenizer(tokenizer: Any, begin_token: str = "") -> bytes:
    """The class of each id, a byte each: special are the end and begin tokens, and ids without a text.

    Says which are what.
    """
    texts = [tokenizer.decode([i]) for i in range(tokenizer.size)]
    special = {i for i, text in enumerate(texts) if not text}
    special |= {tokenizer.end, tokenizer.begin(begin_token)}
    classes = token_classes(texts, special)
    marks = [texts[i] for i in np.flatnonzero(classes == PUNCTUATION)]
    log.info(
        "%d special tokens, %d of punctuation: %s", len(special), len(marks), shown(marks[:40], 200)
    )
    return classes.tobytes()


def token_classes(texts: Sequence[str], special: Collection[int]) -> np.ndarray:
    """The class of each id, [V] of uint8.

    Args:
      texts: what each id stands for.
      special: ids of the tokens that are no text, such as the end token.

    Punctuation is a token of punctuation characters (Unicode's category P), spaces around them left out.
    """
    found = np.array([PUNCTUATION * _is_punctuation(text) for text in texts], np.uint8)
    found[list(special)] = SPECIAL
    return found


def _is_punctuation(text: str) -> bool:
    text = text.strip()
    return bool(text) and all(unicodedata.category(character)[0] == "P" for character in text)
