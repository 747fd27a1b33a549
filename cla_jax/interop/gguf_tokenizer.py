"""The tokenizer that a GGUF file describes, as a tokenizer.json.

Byte-level BPE only. How text is cut before the merges (tokenizer.ggml.pre) is a name in the file whose
meaning is in llama.cpp's code; those known here are below.
"""

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from cla_jax.messages import shown

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
    advice = "give a tokenizer.json with --tokenizer"

    def take(key: str, *readable: str) -> Any:
        name = f"tokenizer.ggml.{key}"
        if name not in metadata:
            raise ValueError(f"{file}: key {name} is missing: {advice}")
        if readable and metadata[name] not in readable:
            known = " or ".join(readable)
            raise ValueError(
                f"{file}: {name} = {shown(metadata[name])}; only {known} is supported: {advice}"
            )
        if not readable and not isinstance(metadata[name], list):
            raise ValueError(f"{file}: {name} = {shown(metadata[name])} is not a list")
        return metadata[name]

    cuts = _pre_tokenizers()
    take("model", "gpt2")
    cut = take("pre", *cuts)
    tokens, types = take("tokens"), take("token_type")
    merges = take("merges")
    if not all(isinstance(text, str) for text in (*tokens, *merges)):
        raise ValueError(f"{file}: tokenizer.ggml.tokens and merges must be strings")
    merges = [tuple(merge.split(" ")) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise ValueError(
            f"{file}: tokenizer.ggml.tokens has duplicates, or does not have one type per token"
        )
    unknown = [
        part for merge in merges for part in (*merge, "".join(merge)) if part not in vocabulary
    ]
    if unknown or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{file}: tokenizer.ggml.merges contains unknown tokens: {shown(unknown)}")
    # Llama 3 takes a word that is a token whole, whatever the merges say.
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Sequence(cuts[cut])
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
