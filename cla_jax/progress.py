"""Long work shown while it runs: a bar in a terminal, lines elsewhere.

Bars take no markup: names are shown as they are. Nor may rich parse any beside the work, in the thread
that draws: it would import a module at every look, while other libraries load theirs.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

Report = Callable[[int, int], None]  # (done, in all)

_NARROW = 110  # characters
EVERY = 10.0  # seconds between two lines of a pipe or a file


class _Words(ProgressColumn):
    """A text of a task, read by a function, as it is."""

    def __init__(self, read: Callable[[Task], str], style: str = ""):
        self.read, self.style = read, style
        super().__init__(_whole())

    def render(self, task: Task) -> Text:
        return Text(self.read(task), style=self.style)


def _whole() -> Column:
    """A column of one line: to break or to align lines, rich would import."""
    return Column(no_wrap=True, overflow="ignore")


def make_bar(console: Console, *, transient: bool = False) -> Progress:
    """A bar whose tasks have a field `line`: what to say of the work beside how far it is.

    While it is shown, what is written to sys.stderr, and in a terminal to sys.stdout, appears above it.
    """
    narrow = console.width < _NARROW
    # Numbers of the work are never cut; words are, and the bar has what they leave.
    name, line = (console.width // 4, console.width // 3) if narrow else (None, None)
    bar = min(40, console.width - 68)
    further = () if narrow else (TimeElapsedColumn(table_column=_whole()), _Words(lambda _: "ETA"))
    return Progress(
        _Words(lambda task: task.description[:name], "bold"),
        *((BarColumn(bar),) if bar >= 8 else ()),
        MofNCompleteColumn(table_column=_whole()),
        _Words(lambda task: task.fields.get("line", "")[:line]),
        *further,
        TimeRemainingColumn(table_column=_whole()),
        console=console,
        transient=transient,
        redirect_stdout=sys.stdout.isatty(),  # else it would not arrive where it was sent
    )


@contextlib.contextmanager
def shown(
    console: Console | None = None, now: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[str], Report]]:
    """Yields what makes a bar, by its name, for each work of several."""
    console = console or Console(file=sys.stderr)
    if not console.is_terminal:
        yield lambda name: _lines(console, name, now)
        return
    bars = make_bar(console, transient=True)

    def bar(name: str) -> Report:
        bars.start()  # not before: what is refused first is refused on a clean line
        for earlier in [task.id for task in bars.tasks if task.finished]:
            bars.remove_task(earlier)
        task = bars.add_task(name, total=None)
        return lambda done, total: bars.update(task, completed=done, total=total)

    try:
        yield bar
    finally:
        bars.stop()


def _lines(console: Console, name: str, now: Callable[[], float]) -> Report:
    """Says at once what begins, and from time to time how far it is."""
    said: float | None = None

    def report(done: int, total: int) -> None:
        nonlocal said
        if said is None or now() - said >= EVERY:
            said = now()
            print(f"{name}: {done:,} of {total:,}", file=console.file, flush=True)

    return report
