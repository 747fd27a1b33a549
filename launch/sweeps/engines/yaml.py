"""Writes YAML by PyYAML: keys in their order, lines of text as a block that people can read."""

from typing import Any

import yaml


class _Dumper(yaml.SafeDumper):
    """Without anchors: equal parts of a document are written out."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML's plain and block styles lose some characters, U+0085 say; in double quotes they are escapes.
    printable = all(line.isprintable() for line in text.split("\n"))
    style = ("|" if "\n" in text else None) if printable else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def dump(value: Any) -> str:
    """A document of nested dicts and lists of strings, numbers, booleans and None."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=float("inf"))
