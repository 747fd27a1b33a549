"""What every entry point does alike."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def user_errors(main: Callable[P, T]) -> Callable[P, T]:
    """Makes a `ValueError`, which is how the library reports a user's mistake, an exit.

    Its message goes to stderr after `error: `, without a traceback, and the exit code is 2. Every
    other exception is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return main(*args, **kwargs)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return wrapped
