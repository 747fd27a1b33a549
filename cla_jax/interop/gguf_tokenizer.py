"""The tokenizer that a GGUF file describes, as a tokenizer.json.

Byte-level BPE only. How text is cut before the merges (tokenizer.ggml.pre) is a name in the file whose
meaning is in llama.cpp's code; those known here are below.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

_SPECIAL, _USER = 3, 4  # in tokenizer.ggml.token_type

# Words with a sign before them, up to three digits, signs with line ends after them, white space.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizers() -> dict[str, list[Any]]:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    split = pre_tokenizers.Split(tokenizers.Regex(_LLAMA3), "isolated")
    only_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return {
        "gpt-2": [byte_level],
        "smollm": [pre_tokenizers.Digits(individual_digits=True), byte_level],
        "llama-bpe": [split, only_bytes],
    }


def build(metadata: dict[str, Any], file: Path) -> str:
    """The tokenizer.json. Raises ValueError naming the key that is missing or not understood."""
    keys = ("model", "pre", "tokens", "merges", "token_type")
    missing = [key for key in keys if f"tokenizer.ggml.{key}" not in metadata]
    values = {key: metadata.get(f"tokenizer.ggml.{key}") for key in keys}
    known = _pre_tokenizers()
    advice = "give a tokenizer.json with --tokenizer"
    if values["model"] != "gpt2":
        raise ValueError(
            f"{file}: tokenizer.ggml.model = {values['model']!r}; only gpt2 is readable: {advice}"
        )
    if missing:
        raise ValueError(f"{file}: key tokenizer.ggml.{missing[0]} is missing: {advice}")
    if values["pre"] not in known:
        raise ValueError(
            f"{file}: tokenizer.ggml.pre = {values['pre']!r}; readable are {', '.join(known)}: {advice}"
        )
    tokens, types = values["tokens"], values["token_type"]
    merges = [tuple(merge.split(" ")) for merge in values["merges"]]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise ValueError(f"{file}: tokenizer.ggml.tokens has duplicates, or not a type for each")
    unknown = [
        part for merge in merges for part in (*merge, "".join(merge)) if part not in vocabulary
    ]
    if unknown or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{file}: tokenizer.ggml.merges has what is no token: {unknown[:3]}")
    # Llama 3 takes a word that is a token whole, whatever the merges say.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=values["pre"] == "llama-bpe")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Sequence(known[values["pre"]])
    inner.decoder = decoders.ByteLevel()
    for kind, add in ((_SPECIAL, inner.add_special_tokens), (_USER, inner.add_tokens)):
        add(
            [
                tokenizers.AddedToken(token, special=kind == _SPECIAL, normalized=False)
                for token, type_ in zip(tokens, types, strict=True)
                if type_ == kind
            ]
        )
    return inner.to_str()
