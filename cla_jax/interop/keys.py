"""The keys of a foreign config.json: every one is used, checked, known to say nothing, or named."""

import math
from collections.abc import Mapping
from typing import Any

from cla_jax.messages import shown

# Keys that say nothing about what is computed from given tokens.
_SILENT = {
    *("_name_or_path", "_commit_hash", "_attn_implementation", "architectures", "auto_map"),
    *("decoder_start_token_id", "pad_token_id", "sep_token_id", "unk_token_id"),
    *("attention_dropout", "gradient_checkpointing", "initializer_range", "pretraining_tp"),
    *("dtype", "torch_dtype", "torchscript", "transformers_version", "use_bfloat16", "use_cache"),
    *("id2label", "label2id", "language", "problem_type", "task_specific_params"),
    *("is_decoder", "is_encoder_decoder", "chunk_size_feed_forward", "model_type"),
    *("output_attentions", "output_hidden_states", "return_dict"),
}
_REQUIRED = object()
_NONE: Mapping[str, Any] = {}


class Keys:
    """A config.json that knows which of its keys were asked for.

    A key that is absent has the value that the format's own config class gives it, from `defaults`. A key
    that is null has no value: that is another thing where the class has a default.
    """

    def __init__(
        self, values: dict[str, Any], where: str = "", defaults: Mapping[str, Any] = _NONE
    ):
        known = {**defaults, **values}
        self._values = {key: value for key, value in known.items() if value is not None}
        self._given = values.keys()
        self._asked: set[str] = set()
        self._inner: list[Keys] = []
        self._where = where

    def is_given(self, key: str) -> bool:
        """Whether the file itself has the key."""
        return key in self._given

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def take(self, key: str, default: Any = _REQUIRED, kind: type | None = None) -> Any:
        """The value of a key. Raises ValueError if it is missing, or not a `kind`."""
        self._asked.add(key)
        if key not in self._values:
            if default is _REQUIRED:
                raise ValueError(f"key {self._where}{key} is missing")
            return default
        value = self._values[key]
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)
        accepted = (int, float) if kind is float else kind
        is_odd = isinstance(value, bool) and kind is not bool  # True is an int to Python
        if kind and accepted and (not isinstance(value, accepted) or is_odd):
            raise ValueError(
                f"key {self._where}{key} = {shown(value)} is not of type {kind.__name__}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"key {self._where}{key} = {value} is not finite")
        return float(value) if kind is float else value

    def only(self, key: str, *values: Any) -> None:
        """Raises ValueError unless the key is absent or has one of the values that can be expressed."""
        given = self.take(key, values[0])
        if given not in values:
            raise ValueError(
                f"key {self._where}{key} = {shown(given)} is not supported, only "
                + " or ".join(map(repr, values))
            )

    def inner(self, key: str) -> "Keys":
        """The object under a key; empty if there is none."""
        made = Keys(self.take(key, {}, dict), f"{self._where}{key}.")
        self._inner.append(made)
        return made

    def unknown(self) -> list[str]:
        """The keys that nobody asked for and that may mean something."""
        unasked = (self._values.keys() & self._given) - self._asked - _SILENT
        here = [self._where + key for key in sorted(unasked)]
        return here + [key for inner in self._inner for key in inner.unknown()]
