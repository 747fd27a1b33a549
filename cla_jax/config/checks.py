"""What the fields of several dataclasses are checked for."""

import dataclasses
import functools
import typing
from typing import Any

from cla_jax.fields import variants
from cla_jax.messages import choice, shown


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


_hints = functools.cache(typing.get_type_hints)


def check_choices(config: Any, prefix: str = "") -> None:
    """Raises ValueError for a field that has none of the values, or of the dataclasses, of its type."""
    for name, hint in _hints(type(config)).items():
        value, kinds = getattr(config, name), tuple(variants(hint).values())
        if typing.get_origin(hint) is typing.Literal:
            choice(f"{prefix}{name}", value, typing.get_args(hint))
        elif kinds and not isinstance(value, kinds):
            known = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{prefix}{name} = {shown(value)} must be one of {known}")
