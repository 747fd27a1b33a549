"""Names of runs and trials: which are allowed, and what they become for other systems.

A name becomes a directory, a label, an argument of a command and an identifier of other systems. Each of
them has rules of its own, so the rules for a name are here and nowhere else.
"""

import hashlib
import re

from cla_jax.messages import shown

# A file system takes 255 bytes for a part of a path; temporary files beside it need some of them.
MOST_BYTES = 200
_TRIAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,=+-]*")


def check(field: str, name: str) -> None:
    """Raises ValueError, which begins with the field, unless a run may have this name."""
    check_path(field, name)
    for part in name.split("/"):
        if part in ("", ".", ".."):
            raise ValueError(
                f"{field} = {shown(name)} must be a relative path without empty, . or .. parts"
            )
        if part.startswith("."):
            raise ValueError(
                f"{field} = {shown(name)}: {shown(part)} begins with a dot, which would hide the run"
            )


def check_trial(name: str) -> None:
    """Raises ValueError unless a trial may have this name: it is also a word of a command line."""
    if not _TRIAL.fullmatch(name):
        raise ValueError(
            f"trial {shown(name)}: a name may contain only letters, digits and . _ , = + -, and must begin "
            "with a letter or a digit"
        )
    check("trial", name)


def check_path(field: str, path: str) -> None:
    """Raises ValueError, which begins with the field, for a path that a library would misread."""
    if "\\" in path:
        raise ValueError(
            f"{field} = {shown(path)} has a backslash, which some libraries read as a directory "
            "separator: remove it"
        )
    if not path.isprintable():  # control characters, bytes that are not UTF-8, invisible characters
        odd = next(character for character in path if not character.isprintable())
        raise ValueError(f"{field} = {shown(path)} has the unprintable character {odd!r}")
    for part in path.split("/"):
        if (size := len(part.encode())) > MOST_BYTES:
            raise ValueError(
                f"{field} = {shown(path)}: a part of it has {size} bytes; the limit is {MOST_BYTES}"
            )


def word(name: str, *, key: str = "", most: int = 24) -> str:
    """A word of a-z, 0-9 and - that other systems accept as an identifier, different for different names.

    Args:
      name: what the word reads like, as far as its characters allow.
      key: what must tell words apart; by default the name.
      most: characters of the name that are kept.
    """
    digest = hashlib.sha256((key or name).encode(errors="surrogateescape")).hexdigest()[:8]
    readable = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")[:most].strip("-")
    return f"{readable}-{digest}" if readable else digest
