"""What every entry point does alike."""

import functools
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_ROOT = Path(__file__).parents[1]
_OURS = tuple(f"{_ROOT / name}/" for name in ("cla_jax", "experiments", "launch"))


def user_errors(main: Callable[P, T]) -> Callable[P, T]:
    """Makes a `ValueError` of this project, which is how it reports a user's mistake, an exit.

    Its message goes to stderr after `error: `, without a traceback, and the exit code is 2; so does that
    of a `ChildProcessError`, a process of ours that was killed, and of a path that is not what it was
    given for (a file for a directory, one that may not be read). Every other exception, a library's
    ValueError included, is a bug of ours and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            if error.filename is None:
                raise
            print(f"error: {error.strerror}: {error.filename}", file=sys.stderr)
            sys.exit(2)
        except (ValueError, ChildProcessError) as error:
            *_, (frame, _) = traceback.walk_tb(error.__traceback__)
            if not frame.f_code.co_filename.startswith(_OURS):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
