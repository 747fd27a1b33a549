"""Converts a config to and from its record in a run's files. Records of earlier versions are read too."""

import dataclasses
import functools
from typing import Any

from cla_jax.config import AdamW, Config, Cosine, HeadsKV, RopeScaling, Scratch, SwiGLU
from cla_jax.fields import from_dict, variants
from cla_jax.messages import shown
from cla_jax.typed_numbers import number

# Fields added after some runs were made, with the values that those runs used. An identity leaves out fields
# with these values, so the identities of those runs do not change. A union is compared as a whole, so it
# comes before its own fields.
_LEFT_OUT: dict[str, Any] = {
    "model.kv": dataclasses.asdict(HeadsKV()),
    "model.kv.norm": True,
    "model.mlp": dataclasses.asdict(SwiGLU()),
    "model.qk_norm": False,
    "data.mixture": (),
    "data.stages": (),
    "start": dataclasses.asdict(Scratch()),
}


def run_identity(config: Config) -> dict[str, Any]:
    """The fields of the config that define which run it is, as nested dicts."""
    fields = dataclasses.asdict(config)
    for name, value in _LEFT_OUT.items():
        *outer, field = name.split(".")
        inner = functools.reduce(lambda record, key: record.get(key, {}), outer, fields)
        if inner.get(field) == value:
            del inner[field]
    return {key: fields[key] for key in fields if key not in ("name", "placement")}


def to_record(config: Config) -> dict[str, Any]:
    """A config as the files of a run hold it: name, identity and placement."""
    placement = dataclasses.asdict(config.placement)
    return {"name": config.name, "identity": run_identity(config), "placement": placement}


def from_record(record: dict[str, Any]) -> Config:
    """The inverse of `to_record`; other keys are left alone. Raises ValueError for what is no config."""
    try:
        fields = {"name": record["name"], "placement": record["placement"]}
        if not isinstance(record["identity"], dict):
            raise ValueError(f"identity = {shown(record['identity'])} is not a record of fields")
        return from_dict(Config, fields | _upgraded(record["identity"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a run's config: {error}") from None


def _upgraded(identity: dict[str, Any]) -> dict[str, Any]:
    """The identity in the form of this version: what is a union now may have had another form."""
    upgraded = dict(identity)
    if isinstance(model := identity.get("model"), dict):
        upgraded["model"] = _model(model)
    if isinstance(optimizer := identity.get("optimizer"), dict):
        upgraded["optimizer"] = _optimizer(optimizer)
    return upgraded


def _model(fields: dict[str, Any]) -> dict[str, Any]:
    """Upgrades a record in which RoPE scaling is text such as `linear:4`: a kind, then its numbers."""
    if not isinstance(text := fields.get("rope_scaling"), str):
        return fields
    kind, *numbers = text.split(":")
    try:
        own = [field for field in dataclasses.fields(variants(RopeScaling)[kind]) if field.init]
        values = {field.name: number(text) for field, text in zip(own, numbers, strict=True)}
    except (KeyError, ValueError):
        return fields  # refused as any other text
    whole = {field.name for field in own if field.type is int}
    values = {key: int(x) if key in whole and x.is_integer() else x for key, x in values.items()}
    return fields | {"rope_scaling": {"kind": kind} | values}


def _optimizer(fields: dict[str, Any]) -> dict[str, Any]:
    """Upgrades a record that stored the fields of AdamW, or of the cosine too, in the optimizer itself."""
    fields = dict(fields)
    for union, first in (("schedule", Cosine()), ("rule", AdamW())):
        its_fields = {field.name for field in dataclasses.fields(first) if field.init}
        if union not in fields and its_fields & fields.keys():
            own = {name: fields.pop(name) for name in its_fields & fields.keys()}
            fields[union] = {"kind": first.kind} | own
    return fields
