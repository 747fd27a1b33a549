"""Policies that say which tokens a KV cache keeps: one file per policy, chosen by a text.

    fastgen:T=0.95      window:keep=0.25      h2o:tokens=64,format=int8

A policy is pure Python and numpy. It gets the attention of the prompts (`Seen`) and returns a `Rule` for each
KV head.
`cla_jax/cache/evicting.py` applies the rule after the prefill and at each decode step.
"""

import dataclasses
import math
import typing
from collections.abc import Callable, Iterable
from typing import Any

from cla_jax.eviction.fastgen import FastGen
from cla_jax.eviction.h2o import H2O
from cla_jax.eviction.policy import Policy
from cla_jax.eviction.random_keep import Random
from cla_jax.eviction.rule import LONGEST
from cla_jax.eviction.snapkv import AdaKV, SnapKV
from cla_jax.eviction.window import Window
from cla_jax.formats import FORMATS
from cla_jax.messages import near_choice, shown
from cla_jax.typed_numbers import is_digits, number, whole_number

_BUDGETS = ("keep", "tokens")
POLICIES: dict[str, type[Policy]] = {
    policy.kind: policy for policy in (FastGen, Window, H2O, SnapKV, AdaKV, Random)
}


def is_policy(name: str) -> bool:
    """Whether a cache is named by a policy, not by a format."""
    return name.partition(":")[0] in POLICIES


def parse(text: str) -> Policy:
    """The policy for a text such as `h2o:keep=0.5`. Raises ValueError, naming the setting that is wrong."""
    kind, _, rest = text.partition(":")
    near_choice("eviction policy", kind, POLICIES)
    cls = POLICIES[kind]
    types = {name: t for name, t in typing.get_type_hints(cls).items() if _is_field(cls, name)}
    read: dict[Any, Callable[[str], object]] = {int: whole_number, float: number}
    settings: dict[str, object] = {}
    for item in filter(None, rest.split(",")):
        name, equals, value = (part.strip() for part in item.partition("="))
        if name in _BUDGETS and name not in types:
            raise ValueError(f"{kind} has no budget: remove {name}")
        if not equals and is_digits(name):
            raise ValueError(
                f"{kind}: {shown(rest)}: a comma begins another setting, so decimals need a point: keep=0.5"
            )
        near_choice(f"setting of {kind}", name, types)
        if name in settings or not equals:
            raise ValueError(
                f"{kind}: {shown(item)} must have the form {name}=VALUE and occur once"
            )
        try:
            settings[name] = read.get(types[name], str)(value)
        except ValueError as error:
            raise ValueError(f"{kind}: {name} = {error}") from None
    policy = cls(**settings)  # type: ignore[arg-type]
    near_choice("format of evicting caches", policy.format, FORMATS)
    if not FORMATS[policy.format].per_token:
        raise ValueError(
            f"{kind}: format = {policy.format} quantises tokens in groups, so single tokens cannot be "
            f"replaced; use one of {', '.join(name for name in FORMATS if FORMATS[name].per_token)}"
        )
    return policy


def refusal(model: typing.Any, policy: Policy, capacity: int) -> str | None:
    """Why a model, given by its config, cannot have an evicting cache; None if it can."""
    if any(model.resolved_windows):
        return f"{policy.name}: an evicting cache does not support sliding windows: model.windows must be 0"
    if model.kv.kind == "latent":
        return f"{policy.name}: an evicting cache does not support model.kv.kind = latent"
    if capacity > LONGEST:
        return f"{policy.name}: an evicting cache has at most {LONGEST:,} tokens per row, not {capacity:,}"
    return None


def prompt_tokens(share: float, seq_len: int, chunk: int) -> int:
    """Number of prompt tokens in a window. Raises ValueError unless `chunk` divides the rest."""
    if not 0 < share < 1:
        raise ValueError(
            f"prompt = {share} must lie between 0 and 1: it is a fraction of the window"
        )
    # Rounded, because in floating point 0.55 of 200 is a little more than 110.
    tokens = max(1, math.ceil(round(share * seq_len, 6)))
    if tokens >= seq_len or (seq_len - tokens) % chunk:
        raise ValueError(
            f"prompt = {share} leaves {seq_len - tokens} of {seq_len} tokens after the prompt; this must be "
            f"a positive multiple of chunk = {chunk}"
        )
    return tokens


def canonical(name: str) -> str:
    """The name of a cache. For a policy: its settings in order, without those that have their default."""
    return parse(name).name if is_policy(name) else name


def check_cache(name: str, formats: Iterable[str]) -> None:
    """Raises ValueError unless it is one of the formats, or a policy with its settings."""
    if is_policy(name):
        parse(name)
    else:
        formats = tuple(formats)
        kind, colon, _ = name.partition(":")
        if kind == "full" and kind not in formats:
            raise ValueError(
                "cache format full, which means no cache, applies only to tasks: add --tasks, or remove it"
            )
        near_choice("cache format", kind, (*formats, *POLICIES))
        if colon:
            raise ValueError(
                f"{shown(name)}: a cache format has no settings. A policy that evicts tokens has some, such "
                "as h2o:keep=0.5,format=int8"
            )


def _is_field(cls: type[Policy], name: str) -> bool:
    return any(field.name == name for field in dataclasses.fields(cls))
