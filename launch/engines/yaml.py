"""Writes YAML: nested dicts and lists of strings, numbers and booleans, in their order."""

import json
import re
from typing import Any

_WORDS = ("true", "false", "yes", "no", "on", "off", "y", "n", "null")  # to YAML 1.1 no strings


def dump(value: Any, indent: int = 0) -> str:
    """A document, or the part of one that stands `indent` blanks in; it ends with a newline."""
    pad = " " * indent
    if isinstance(value, dict) and value:
        return "".join(f"{pad}{_key(key)}:{_after(inner, indent)}" for key, inner in value.items())
    if isinstance(value, list) and value:
        return "".join(f"{pad}-{_item(inner, indent)}" for inner in value)
    return f"{pad}{_scalar(value)}\n"


def _after(value: Any, indent: int) -> str:
    """What follows a key."""
    if isinstance(value, (dict, list)) and value:
        return "\n" + dump(value, indent + 2)
    if isinstance(value, str) and "\n" in value and value == value.strip(" \n") + "\n":
        pad = " " * (indent + 2)
        return " |\n" + "".join(f"{pad}{line}\n" if line else "\n" for line in value.splitlines())
    return f" {_scalar(value)}\n"


def _item(value: Any, indent: int) -> str:
    if isinstance(value, (dict, list)) and value:
        return " " + dump(value, indent + 2).lstrip(" ")
    return f" {_scalar(value)}\n"


def _key(key: str) -> str:
    plain = re.fullmatch(r"[A-Za-z][\w.-]*", key, re.ASCII) and key.lower() not in _WORDS
    return key if plain else json.dumps(key)


def _scalar(value: Any) -> str:
    """JSON, which is YAML too."""
    return json.dumps(value, ensure_ascii=False)
