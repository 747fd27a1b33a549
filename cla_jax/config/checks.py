"""Field checks that several config classes share."""

import dataclasses
import functools
import typing
from typing import Any

from cla_jax.fields import check_type
from cla_jax.messages import shown


def positive(name: str, value: float) -> None:
    if not value < float("inf"):  # NaN is not
        raise ValueError(f"{name} = {shown(value)} must be finite")
    if value <= 0:
        raise ValueError(f"{name} = {shown(value)} must be positive")


# Upper limits of numbers: far above any model, but low enough that a config is built quickly.
_MOST = {
    "n_layers": 10_000,
    **dict.fromkeys(("n_heads", "n_kv_heads", "d_head"), 2**20),
    **dict.fromkeys(("d_model", "d_ff"), 2**24),
    **dict.fromkeys(("vocab_size", "seq_len", "batch_size", "eval_batch_size"), 2**31 - 1),
    **dict.fromkeys(("accumulate", "loss_chunk", "keep"), 2**31 - 1),
    "original_max_position_embeddings": 2**31 - 1,
    **dict.fromkeys(("steps", "log_every", "save_every", "eval_every"), 2**40),
}


_hints = functools.cache(typing.get_type_hints)


def check_fields(config: Any, prefix: str = "") -> None:
    """Raises ValueError for a field whose value is not of its type, or above the field's limit.

    All configs call it before they compare their fields with anything.
    """
    for field in dataclasses.fields(config):
        name, value = f"{prefix}{field.name}", getattr(config, field.name)
        check_type(name, value, _hints(type(config))[field.name])
        if field.name in _MOST and value > _MOST[field.name]:
            raise ValueError(f"{name} = {shown(value)} must be at most {_MOST[field.name]:,}")
