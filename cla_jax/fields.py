"""Nested dataclasses as dicts and back, and changes to them by dotted names."""

import dataclasses
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from cla_jax.messages import choice, near_choice, shown


def replaced(config: Any, changes: Mapping[str, Any]) -> Any:
    """`dataclasses.replace` by dotted names: `replaced(config, {"optimizer.peak_lr": 1e-3, "seed": 1})`.

    All changes are made at once, so you can change two fields that are valid only together. If a field is
    one of several dataclasses, its `kind` chooses another one; fields that both have keep their values:
    `replaced(config, {"optimizer.schedule.kind": "wsd"})`.

    Raises:
      ValueError: an unknown field (the message has the nearest names), a value of the wrong type, or a config
        that is not valid.
    """
    return _replaced(config, changes, "")


def _replaced(config: Any, changes: Mapping[str, Any], prefix: str) -> Any:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"{prefix[:-1]} = {shown(config)} has no fields")
    here: dict[str, Any] = {}
    below: dict[str, dict[str, Any]] = {}
    hints = typing.get_type_hints(type(config))
    for path, value in changes.items():
        field, _, rest = path.partition(".")
        what = f"field of {prefix[:-1]}" if prefix else "field"
        near_choice(what, field, [known.name for known in dataclasses.fields(config)])
        if rest:
            below.setdefault(field, {})[rest] = value
        else:
            here[field] = _value(prefix + field, value, hints[field])
    for field, inner in below.items():
        value = here.get(field, getattr(config, field))
        if "kind" in inner and (kinds := variants(hints[field])):
            kind = inner.pop("kind")
            choice(f"{prefix}{field}.kind", kind, kinds)
            value = _as_kind(value, kinds[kind])
        here[field] = _replaced(value, inner, f"{prefix}{field}.")
    return dataclasses.replace(config, **here)


def with_kind(config: Any, path: str, kind: str, prefix: str = "") -> Any:
    """A copy of a config in which a field is another of several dataclasses. The copy is not checked.

    Other fields may have to change with the kind before the config is valid. So this is only a beginning for
    who sets those.

    Raises:
      ValueError: an unknown kind; `prefix` is before the name of the field.
    """
    field, _, rest = path.partition(".")
    value = getattr(config, field)
    if rest:
        value = with_kind(value, rest, kind, f"{prefix}{field}.")
    else:
        kinds = variants(typing.get_type_hints(type(config))[field])
        choice(f"{prefix}{path}.kind", kind, kinds)
        value = _as_kind(value, kinds[kind])
    made = object.__new__(type(config))  # without __init__, which checks
    for one in dataclasses.fields(config):
        object.__setattr__(
            made, one.name, value if one.name == field else getattr(config, one.name)
        )
    return made


def _as_kind(value: Any, kind: type) -> Any:
    """Another dataclass, with the values of the fields that both have."""
    shared = {f.name for f in dataclasses.fields(kind) if f.init} & {
        f.name for f in dataclasses.fields(value)
    }
    return kind(**{name: getattr(value, name) for name in shared})


def variants(hint: Any) -> dict[str, Any]:
    """The dataclasses of a union, by their `kind`. Empty for any other type."""
    members: tuple[Any, ...] = typing.get_args(hint) if isinstance(hint, types.UnionType) else ()
    return {member.kind: member for member in members if hasattr(member, "kind")}


def unions(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a dataclass, and of those in it, whose type is a union of dataclasses: name and type."""
    for name, hint in typing.get_type_hints(cls).items():
        if variants(hint):
            yield prefix + name, hint
        elif dataclasses.is_dataclass(hint):
            yield from unions(typing.cast(type, hint), f"{prefix}{name}.")


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys: `{"model.d_head": 64}`.

    Dicts in a list are known by their name, or by their place in it: `data.mixture.web.weight`.
    """
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list | tuple) and value and all(isinstance(x, dict) for x in value):
            value = {str(inner.get("name", place)): inner for place, inner in enumerate(value)}
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def difference(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The leaves in which two nested dicts differ, with both values (None where absent)."""
    a, b = flatten(first), flatten(second)
    keys = [*a, *(key for key in b if key not in a)]
    return {key: (a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)}


def from_dict(cls: type, fields: dict[str, Any], prefix: str = "", kind: str = "") -> Any:
    """The inverse of `dataclasses.asdict`. Raises ValueError for an unknown or missing field.

    Args:
      prefix: before the names of fields in messages, with a dot at its end.
      kind: which one of a union this is.
    """
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init}
    whole = f"{prefix[:-1] or 'the config'}{f' ({kind})' if kind else ''}"
    for key in fields:
        near_choice(f"field of {whole}", key, tuple(known))
    for key, field in known.items():
        required = field.default is dataclasses.MISSING
        if required and field.default_factory is dataclasses.MISSING and key not in fields:
            raise ValueError(f"{prefix}{key} is missing")
    return cls(**{key: _value(prefix + key, value, hints[key]) for key, value in fields.items()})


def _value(name: str, value: Any, hint: Any) -> Any:
    if kinds := variants(hint):
        if isinstance(value, tuple(kinds.values())):
            return value
        if not isinstance(value, dict):
            raise ValueError(
                f"{name} = {shown(value)} must be a dict of fields, with a kind of {', '.join(kinds)}"
            )
        if "kind" not in value:
            raise ValueError(f"{name}.kind is missing: give one of {', '.join(kinds)}")
        choice(f"{name}.kind", value["kind"], kinds)
        rest = {key: inner for key, inner in value.items() if key != "kind"}
        return from_dict(kinds[value["kind"]], rest, f"{name}.", value["kind"])
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type, hint), value, f"{name}.")
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        inner = _members(hint, len(value))
        if len(inner) == len(value):  # JSON knows only lists
            value = tuple(_value(name, *pair) for pair in zip(value, inner, strict=True))
    check_type(name, value, hint)
    return value


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError unless a field's value has its type. An int is also a float, a bool is neither."""
    if typing.get_origin(hint) is Literal:
        choice(name, value, typing.get_args(hint))
        return
    if typing.get_origin(hint) is tuple:
        inner = _members(hint, len(value)) if isinstance(value, tuple) else None
        if inner is None or len(inner) != len(value):
            raise ValueError(f"{name} = {shown(value)} is not of type {hint}")
        for pair in zip(value, inner, strict=True):
            check_type(name, *pair)
        return
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in accepted:
        accepted += (int,)
    if not isinstance(value, accepted) or (bool not in accepted and isinstance(value, bool)):
        known = ", ".join(kind.__name__ for kind in variants(hint).values())
        wanted = f"must be one of {known}" if known else f"is not of type {_type_name(hint)}"
        raise ValueError(f"{name} = {shown(value)} {wanted}")


def _members(hint: Any, count: int) -> tuple[Any, ...]:
    """The types of the elements of a tuple with so many elements."""
    inner = typing.get_args(hint)
    return inner[:1] * count if inner[-1] is ... else inner


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint))
