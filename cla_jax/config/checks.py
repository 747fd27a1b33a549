"""What the fields of several dataclasses are checked for."""

import dataclasses
import functools
import typing
from typing import Any

from cla_jax.fields import variants
from cla_jax.messages import shown


def positive(name: str, value: float) -> None:
    if not value < float("inf"):  # NaN is not
        raise ValueError(f"{name} = {shown(value)} must be finite")
    if value <= 0:
        raise ValueError(f"{name} = {shown(value)} must be positive")


# What numbers may be at most: far above any model, and below what would take hours only to count.
_MOST = {
    "n_layers": 10_000,
    **dict.fromkeys(("n_heads", "n_kv_heads", "d_head"), 2**20),
    **dict.fromkeys(("d_model", "d_ff"), 2**24),
    **dict.fromkeys(("vocab_size", "seq_len", "batch_size", "eval_batch_size"), 2**31 - 1),
    **dict.fromkeys(("accumulate", "loss_chunk", "keep"), 2**31 - 1),
    "original_max_position_embeddings": 2**31 - 1,
    **dict.fromkeys(("steps", "log_every", "save_every", "eval_every"), 2**40),
}


def bounded(config: Any, prefix: str = "") -> None:
    """Raises ValueError for a field above the limit that it has."""
    for name in _MOST.keys() & {field.name for field in dataclasses.fields(config)}:
        if (value := getattr(config, name)) > _MOST[name]:
            raise ValueError(f"{prefix}{name} = {shown(value)} must be at most {_MOST[name]:,}")


def check_unions(config: Any, prefix: str = "") -> None:
    """Raises ValueError for a union of dataclasses that has another value, such as a text."""
    for name, kinds in _unions(type(config)).items():
        if not isinstance(value := getattr(config, name), kinds):
            known = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{prefix}{name} = {shown(value)} must be one of {known}")


@functools.cache
def _unions(cls: type) -> dict[str, tuple[type, ...]]:
    hints = typing.get_type_hints(cls)
    return {name: tuple(kinds.values()) for name in hints if (kinds := variants(hints[name]))}


def is_digits(text: str, most: int = 18) -> bool:
    """Whether a text is a plain number of at most so many digits."""
    return text.isascii() and text.isdecimal() and len(text) <= most
