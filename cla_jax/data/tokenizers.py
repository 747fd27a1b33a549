"""Text to ids and back: bytes, byte-level BPE learned from the training split, or a tokenizer.json.

Every tokenizer, the byte one included, is a `tokenizers.Tokenizer` and stored as its JSON.
"""

import base64
import contextlib
import dataclasses
import difflib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from cla_jax import files
from cla_jax.config import DataConfig
from cla_jax.data import sources
from cla_jax.messages import near_choice, printable, shown

# BPE is learned from the first bytes of the training split: more text changes few merges.
_BPE_SAMPLE_BYTES = 1 << 28
_MOST_IDS = 1 << 24
# Settings of a tokenizer's model that make it choose at random: of BPE, and of Unigram.
_RANDOM = ("dropout", "alpha", "nbest_size")

Encoded = tuple[np.ndarray, np.ndarray]

# A text is cut before each single space between two characters that are no white space. What Python takes
# for white space includes all that Unicode does.
_WORD = re.compile(r"(?s:.)[^ ]*(?:(?: (?!\S)|(?<=\s) )[^ ]*)*")
# Ids of remembered words: some megabytes.
_REMEMBERED_IDS = 1 << 20


class Tokenizer:
    """Ids of a text and back.

    Special tokens are never made from text: a document that spells the end token goes on.

    Args:
      inner: the tokenizer; truncation, padding, added special tokens and random choices (dropout)
        are switched off, so that equal texts always have equal ids.
      end_token: the token that ends a document.

    Raises:
      ValueError: the end token does not exist, or text can make it.
    """

    def __init__(self, inner: tokenizers.Tokenizer, end_token: str):
        vocabulary = inner.get_vocab(with_added_tokens=True)
        _check_token(inner, vocabulary, end_token, "data.end_token")
        # Marks it as special where it was an ordinary token; its id stays.
        inner.add_special_tokens([tokenizers.AddedToken(end_token, special=True, normalized=False)])
        inner.encode_special_tokens = True
        inner.no_truncation()
        inner.no_padding()
        for setting in _RANDOM:
            if getattr(inner.model, setting, None) is not None:
                setattr(inner.model, setting, None)
        self._inner = inner
        self.end_token = end_token
        self.end: int = vocabulary[end_token]
        self.size: int = max(vocabulary.values()) + 1  # ids, unused ones below the last included
        self._is_byte = inner.to_str() == _byte_level(end_token).to_str()
        self._words = _Words(inner) if _is_by_words(inner) else None
        if self.end in self.encode(f"{end_token} {end_token}"):
            raise ValueError(
                f"data.end_token = {end_token!r}: this tokenizer can make it from the text of a document; "
                "choose a special token"
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tokenizer):
            return NotImplemented
        return (self.to_json(), self.end_token) == (other.to_json(), other.end_token)

    def __hash__(self) -> int:
        return hash((self.to_json(), self.end_token))

    def __reduce__(self) -> tuple:
        return load, (self.to_json(), self.end_token)

    def begin(self, token: str) -> int:
        """The id that a text begins behind, of data.begin_token. Raises ValueError if there is none."""
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        _check_token(self._inner, vocabulary, token or self.end_token, "data.begin_token")
        return vocabulary[token or self.end_token]

    def special_ids(self) -> set[int]:
        """The ids that stand for no text: special tokens, and ids that have no token."""
        added = self._inner.get_added_tokens_decoder()
        token_of = self._inner.id_to_token
        return {
            i for i in range(self.size)
            if (added[i].special if i in added else token_of(i) is None)
        }  # fmt: skip

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32, without an end token."""
        if self._is_byte:
            return np.frombuffer(text.encode(), np.uint8).astype(np.int32)
        with _guarded("the tokenizer fails on a text"):
            return np.array(self._inner.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_with_bytes(self, text: str) -> Encoded:
        """The ids of a text and the UTF-8 bytes each stands for, both int32 and of one length.

        The bytes are those of the text as given and sum to `len(text.encode())`, whatever the normalizer does
        to it. Text between tokens belongs to the later one, and text after the last token to the last one. A
        character that is cut into several tokens belongs to the first of them. A text that becomes no tokens
        at all (a normalizer that strips white space) has no bytes either.
        """
        return self.encode_batch_with_bytes([text])[0]

    def encode_batch_with_bytes(self, texts: Sequence[str]) -> list[Encoded]:
        """`encode_with_bytes` of several texts, in parallel."""
        if self._is_byte:
            ids = [self.encode(text) for text in texts]
            return [(each, np.ones_like(each)) for each in ids]
        return self._words.encode(texts) if self._words else _encoded(self._inner, texts)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD.

        End tokens and ids the tokenizer does not have (rows that pad an embedding table) are
        dropped.
        """
        kept = self._kept(ids)
        if self._is_byte:
            return bytes(kept).decode(errors="replace")
        with _guarded("the tokenizer fails to decode"):
            return self._inner.decode(kept, skip_special_tokens=True)

    def _kept(self, ids: Iterable[int]) -> list[int]:
        """The ids that stand for text, as far as their numbers tell."""
        return [int(i) for i in ids if 0 <= i < self.size and i != self.end]

    def stream(self) -> "TextStream":
        """Decodes ids as they come; the pieces together are what `decode` makes of all ids."""
        return TextStream(self, _streamable(self._inner))

    def to_json(self) -> str:
        """The content of a tokenizer.json from which `load` makes an equal tokenizer."""
        return self._inner.to_str(pretty=False)


def _encoded(inner: tokenizers.Tokenizer, texts: Sequence[str]) -> list[Encoded]:
    with _guarded("the tokenizer fails on a text"):
        encodings = inner.encode_batch(list(texts), add_special_tokens=False)
    return [
        (np.array(encoding.ids, np.int32), _byte_counts(text, encoding.offsets))
        for text, encoding in zip(texts, encodings, strict=True)
    ]


class _Numbers(dict[str, int]):
    """Numbers words in the order in which they come."""

    def __missing__(self, word: str) -> int:
        self[word] = len(self)
        return len(self) - 1


class _Words:
    """Encodes texts word by word and remembers the words: a text repeats most of them.

    The library takes some hundred nanoseconds for a byte of text, a word that is known a few.
    """

    def __init__(self, inner: tokenizers.Tokenizer):
        self._inner = inner
        vocabulary = inner.get_vocab(with_added_tokens=False)
        # Bytes that have a token. A byte without one becomes no id, and counts with the token after it: that
        # may be in the next word, so such a text is encoded as a whole.
        self._covered = bytes(byte for byte, name in _names_of_bytes() if name in vocabulary)
        self._forget()

    def _forget(self) -> None:
        self._numbers = _Numbers()
        # The ids of all words one after the other, the bytes of each, and where each word's end.
        self._ids, self._bytes = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self._ends = np.zeros(0, np.int64)

    def encode(self, texts: Sequence[str]) -> list[Encoded]:
        uncovered = lambda text: text.encode(errors="surrogatepass").translate(None, self._covered)
        odd = [len(self._covered) < 256 and bool(uncovered(text)) for text in texts]
        if any(odd):
            whole = iter(_encoded(self._inner, list(itertools.compress(texts, odd))))
            rest = iter(
                self.encode([text for text, is_odd in zip(texts, odd, strict=True) if not is_odd])
            )
            return [next(whole if is_odd else rest) for is_odd in odd]
        if len(self._ids) > _REMEMBERED_IDS:
            self._forget()
        words = list(map(_WORD.findall, texts))
        known = len(self._numbers)
        number = self._numbers.__getitem__
        numbers = np.array(list(map(number, itertools.chain.from_iterable(words))), np.int64)
        if new := list(itertools.islice(self._numbers, known, None)):
            self._learn(new)
        starts = np.concatenate([[0], self._ends])[numbers]
        lengths = self._ends[numbers] - starts
        ends = np.cumsum(lengths, dtype=np.int64)
        at = np.arange(lengths.sum()) + np.repeat(starts - ends + lengths, lengths)
        after = np.cumsum([0, *map(len, words)])  # words of each text and those before it
        cuts = np.concatenate([[0], ends])[after]
        ids, n_bytes = self._ids[at], self._bytes[at]
        return [(ids[i:j], n_bytes[i:j]) for i, j in itertools.pairwise(cuts.tolist())]

    def _learn(self, words: list[str]) -> None:
        with _guarded("the tokenizer fails on a text"):
            encodings = self._inner.encode_batch(words, add_special_tokens=False)
        ids = [encoding.ids for encoding in encodings]
        # The words side by side are a text: the bytes of all tokens are counted at once.
        starts = itertools.accumulate(map(len, words), initial=0)
        offsets = [
            (start + first, start + last)
            for start, encoding in zip(starts, encodings, strict=False)
            for first, last in encoding.offsets
        ]
        n_bytes = _byte_counts("".join(words), offsets)
        ends = len(self._ids) + np.cumsum([len(each) for each in ids])
        flat = np.fromiter(itertools.chain.from_iterable(ids), np.int32)
        self._ids = np.concatenate([self._ids, flat])
        self._bytes = np.concatenate([self._bytes, n_bytes])
        self._ends = np.concatenate([self._ends, ends])


def _names_of_bytes() -> list[tuple[int, str]]:
    """The character that stands for each byte in GPT-2's vocabulary: itself, if it can be printed."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [(byte, chr(byte)) for byte in printable] + [
        (b, chr(256 + i)) for i, b in enumerate(others)
    ]


def _is_by_words(inner: tokenizers.Tokenizer) -> bool:
    """Whether the ids of a text are those of its words (`_WORD`), one after the other.

    They are if only the pre-tokenizer of GPT-2 and BPE see the text. The pre-tokenizer always begins a new
    piece before such a space, and BPE stays within a piece. Digits may be cut off before it, as in SmolLM2: a
    cut at a digit depends on no other character.
    """
    state = inner.pre_tokenizer and json.loads(inner.pre_tokenizer.__getstate__())
    pieces = state.get("pretokenizers", [state]) if state else []
    kinds = [piece["type"] for piece in pieces]
    expected = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    return (
        isinstance(inner.model, models.BPE)
        and not (inner.model.end_of_word_suffix or inner.model.continuing_subword_prefix)
        and kinds in (["ByteLevel"], ["Digits", "ByteLevel"])
        and {key: pieces[-1].get(key) for key in expected} == expected
        and inner.normalizer is None
        and inner.post_processor is None
        and all(token.special for token in inner.get_added_tokens_decoder().values())
    )


@dataclasses.dataclass(frozen=True)
class _Streamable:
    """How much of a text is final while more ids may follow."""

    final: bool  # False: nothing is known before the last id
    pending: frozenset[int] = (
        frozenset()
    )  # a run of these ids at the end may still change as a whole


class TextStream:
    """The text of ids, piece by piece. A piece is given out when no later id can change it.

    Half a character waits for its other half. With byte fallback, single bytes are tokens. Then several in a
    row wait for their end, because one bad byte changes how all of them are decoded. For a decoder whose
    rules are not known here, the whole text comes at the end.
    """

    def __init__(self, tokenizer: Tokenizer, rule: _Streamable):
        self._tokenizer, self._rule = tokenizer, rule
        self._ids: list[int] = []
        self._given = ""

    def add(self, ids: Iterable[int]) -> str:
        """The text that is final now and was not before."""
        self._ids += self._tokenizer._kept(ids)
        if not self._rule.final:
            return ""
        end = len(self._ids)
        while end and self._ids[end - 1] in self._rule.pending:
            end -= 1
        return self._give(self._tokenizer.decode(self._ids[:end]).rstrip("\ufffd"))

    def finish(self) -> str:
        """The rest of the text."""
        return self._give(self._tokenizer.decode(self._ids))

    def _give(self, text: str) -> str:
        if len(text) <= len(self._given):  # what was held back is held back still
            return ""
        piece, self._given = text[len(self._given) :], text
        return piece


# Decoders that decide about a token by itself, or from those before it.
_BY_TOKEN = {"Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip", "CTC"}
_JOINING = ("Fuse", "ByteLevel")


def _streamable(inner: tokenizers.Tokenizer) -> _Streamable:
    """What the decoder of a tokenizer allows."""
    if inner.decoder is None:
        return _Streamable(final=True)
    decoder = json.loads(inner.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [step["type"] for step in steps]
    joined = next((i for i, kind in enumerate(kinds) if kind in _JOINING), len(kinds))
    # Once tokens are joined, a replacement could see two of them as one.
    after = all(
        step["type"] == "Fuse" or (step["type"] == "Strip" and step["stop"] == 0)
        for step in steps[joined + 1 :]
    )
    if not after or not set(kinds[:joined]) <= _BY_TOKEN:
        return _Streamable(final=False)
    if "ByteFallback" not in kinds:
        return _Streamable(final=True)
    for step in steps[: kinds.index("ByteFallback")]:
        if step["type"] != "Replace" or step["pattern"] != {"String": "▁"}:
            return _Streamable(final=False)  # it could make a byte of another token
    # Special tokens are left out of a text, so bytes before and after one stand side by side.
    added = inner.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special}
    tokens = inner.get_vocab(with_added_tokens=True)
    is_byte = lambda token: len(token) == 6 and token[:3] == "<0x" and token[-1] == ">"
    return _Streamable(
        final=True, pending=frozenset(special | {i for t, i in tokens.items() if is_byte(t)})
    )


def load(json_text: str, end_token: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json.

    Raises:
      ValueError: the text is not that of a tokenizer, or `end_token` does not fit it.
    """
    return Tokenizer(_parse(json_text), end_token)


def _parse(json_text: str) -> tokenizers.Tokenizer:
    fields = _fields(json_text)
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict):
        raise ValueError(
            "the JSON is not a tokenizer: it has no object 'model' (a tokenizer.json of the tokenizers "
            "library is needed, not a tokenizer_config.json)"
        )
    # What follows would end the process: the library allocates what these say before it looks further.
    vocabulary, added = model.get("vocab"), fields.get("added_tokens") or []
    if not all(isinstance(token, dict) for token in added):
        raise ValueError("the JSON is not a tokenizer: added_tokens is not a list of objects")
    for i in (
        *(vocabulary.values() if isinstance(vocabulary, dict) else ()),
        *(token.get("id") for token in added),
    ):
        if not files.is_a(i, int) or not 0 <= i < _MOST_IDS:
            raise ValueError(f"the tokenizer has an id {shown(i)}: ids are 0 to {_MOST_IDS - 1:,}")
    _check_charsmaps(fields.get("normalizer"))
    with _guarded("the JSON is not that of a tokenizer"):
        inner = tokenizers.Tokenizer.from_str(json_text)
    inner.no_truncation()
    inner.no_padding()
    with contextlib.suppress(_NotForThisText), _guarded("the tokenizer fails", _NotForThisText):
        ids = inner.encode("a b\n1 é漢", add_special_tokens=False).ids
        inner.decode(ids)
    return inner


def _fields(json_text: str) -> Any:
    return files.parse_json(json_text, "the tokenizer", duplicates=True)


class _NotForThisText(ValueError):
    """A tokenizer has no ids for a text."""


@contextlib.contextmanager
def _guarded(what: str, otherwise: type[ValueError] = ValueError) -> Iterator[None]:
    """Makes the exceptions of the tokenizers library, which raises no narrower ones, a ValueError.

    A part of a tokenizer that makes no sense ends in a panic of Rust, which is no Exception to Python.
    `otherwise` is raised for what is no panic.
    """
    try:
        yield
    except BaseException as error:
        panicked = type(error).__name__ == "PanicException"
        if not panicked and not isinstance(error, Exception):
            raise
        raise (ValueError if panicked else otherwise)(f"{what}: {printable(error)}") from None


def _check_charsmaps(normalizer: Any) -> None:
    """Raises ValueError for a Precompiled normalizer whose table is longer than what there is of it."""
    if not isinstance(normalizer, dict):
        return
    parts = normalizer.get("normalizers")
    for part in parts if isinstance(parts, list) else ():
        _check_charsmaps(part)
    text = normalizer.get("precompiled_charsmap")
    if not isinstance(text, str):
        return
    try:
        table = base64.b64decode(text, validate=True)
    except ValueError:
        raise ValueError("the tokenizer has a precompiled_charsmap that is not base64") from None
    length = int.from_bytes(table[:4], "little")
    if length % 4 or length + 4 > len(table):
        raise ValueError("the tokenizer has a damaged precompiled_charsmap")


def token(json_text: str, i: int) -> str | None:
    """The token of an id in a tokenizer.json, None if there is none. Raises ValueError as `load` does."""
    return _parse(json_text).id_to_token(i)


def is_special(json_text: str, i: int) -> bool:
    """Whether an id is that of a special token."""
    token = _parse(json_text).get_added_tokens_decoder().get(i)
    return token is not None and token.special


def without_added(json_text: str, size: int) -> tuple[str, list[str]]:
    """A tokenizer.json without the added tokens whose ids are `size` or more, and those tokens."""
    fields = _fields(json_text)
    added = list(fields.get("added_tokens") or [])
    fields["added_tokens"] = [token for token in added if token["id"] < size]
    dropped = [token["content"] for token in added if token["id"] >= size]
    return json.dumps(fields, ensure_ascii=False) if dropped else json_text, dropped


def token_id(json_text: str, token: str) -> int | None:
    """The inverse of `token`."""
    return _parse(json_text).token_to_id(token)


def added_tokens(json_text: str) -> tuple[list[str], list[str]]:
    """The special tokens that the tokenizer of a tokenizer.json, left alone, puts before and after a text."""
    inner = _parse(json_text)
    with _guarded("the tokenizer fails"):
        encoding = inner.encode("a")
    plain = [i for i, special in enumerate(encoding.special_tokens_mask) if not special]
    first, last = (plain[0], plain[-1]) if plain else (0, -1)
    return encoding.tokens[:first], encoding.tokens[last + 1 :]


def byte_tokenizer(end_token: str = "<|endoftext|>") -> Tokenizer:
    """Ids 0 to 255 are the bytes of UTF-8, 256 is the end token."""
    return Tokenizer(_byte_level(end_token), end_token)


def train_bpe(texts: Iterable[str], size: int, end_token: str = "<|endoftext|>") -> Tokenizer:
    """Byte-level BPE learned from texts: id 0 is the end token, 1 to 256 are the bytes.

    Equal texts in equal order give equal tokenizers. Few texts may give fewer than `size` ids.
    """
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return Tokenizer(inner, end_token)


def make_tokenizer(config: DataConfig, json_text: str | None = None) -> Tokenizer:
    """The tokenizer a config names; `bpe:SIZE` reads the training split, at most 256 MiB of it.

    Of a mixture it reads the training documents of every component, whatever its weight: mixtures of
    the same sources have the same tokenizer. Each of n sources gives at most 256 MiB / n.

    `json_text`, if given, is the content of the file it names, which is then not read.

    Raises:
      ValueError: the file is missing or is not a tokenizer, or data.end_token does not fit it.
    """
    if config.tokenizer == "byte":
        return byte_tokenizer(config.end_token)
    if config.tokenizer.startswith("bpe:"):
        size = int(config.tokenizer.removeprefix("bpe:"))
        return train_bpe(_sample(config), size, config.end_token)
    path = tokenizer_file(config) if json_text is None else None
    try:
        text = files.read_text(path, files.TOKENIZER_BYTES) if path else json_text
        return load(text or "", config.end_token)
    except ValueError as error:
        where = f"data.tokenizer = {shown(config.tokenizer)}"
        raise ValueError(f"{where}: {printable(error)}") from None


def tokenizer_file(config: DataConfig) -> Path:
    """The file of `data.tokenizer`. Raises ValueError if there is none."""
    path = Path(config.tokenizer).expanduser()
    if not files.exists(path):
        raise ValueError(f"data.tokenizer = {shown(config.tokenizer)}: no such file")
    return path


def _sample(config: DataConfig) -> Iterator[str]:
    """Documents of the training split: of a mixture as many bytes of each source, in their sorted order."""
    for source in config.sources:
        taken = 0
        for text in sources.documents(source):
            if sources.is_held_out(text, config.held_out):
                continue
            yield text
            taken += len(text.encode())
            if taken >= _BPE_SAMPLE_BYTES // len(config.sources):
                break


def _byte_level(end_token: str) -> tokenizers.Tokenizer:
    vocabulary = {name: byte for byte, name in sorted(_names_of_bytes())}
    inner = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([tokenizers.AddedToken(end_token, special=True, normalized=False)])
    return inner


def _check_token(
    inner: tokenizers.Tokenizer, vocabulary: dict[str, int], token: str, field: str
) -> None:
    if token in vocabulary:
        return
    special = [added.content for added in inner.get_added_tokens_decoder().values()]
    near_choice(field, token, special or difflib.get_close_matches(token, vocabulary))


def _byte_counts(text: str, offsets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bytes of each token, from its [start, end) in characters."""
    utf8 = np.frombuffer(text.encode(), np.uint8)
    if not offsets:
        return np.zeros(0, np.int32)
    ends = np.maximum.accumulate(np.array([end for _, end in offsets], np.int64))
    if len(utf8) != len(text):
        starts = np.flatnonzero((utf8 & 0xC0) != 0x80)  # every byte that does not continue one
        ends = np.append(starts, len(utf8))[ends]
    ends[-1] = len(utf8)
    return np.diff(ends, prepend=0).astype(np.int32)
