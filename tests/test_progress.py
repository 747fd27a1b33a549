import builtins
import io
import logging
import sys

from rich.console import Console

from cla_jax import progress
from launch import cli


def terminal(out, monkeypatch):
    """A terminal that a program has as its standard error."""
    monkeypatch.setattr(sys, "stderr", out)
    return Console(file=out, force_terminal=True, width=100)


def test_a_pipe_gets_a_line_at_once_and_then_from_time_to_time():
    out, clock = io.StringIO(), iter(range(0, 1000, 4))
    with progress.shown(Console(file=out), now=lambda: next(clock)) as bar:
        report = bar("full forward, windows")
        for done in range(6):
            report(done, 1500)
    lines = out.getvalue().splitlines()
    assert lines[0] == "full forward, windows: 0 of 1,500"
    assert 2 <= len(lines) < 5


def test_messages_appear_above_the_bar(monkeypatch):
    """Also those of the log, whose handler was made before the bar."""
    out = io.StringIO()
    console = terminal(out, monkeypatch)
    logger = logging.Logger("apart")
    logger.addHandler(cli._Stderr())
    with progress.shown(console) as bar:
        report = bar("evaluating")
        report(1, 4)
        before = out.getvalue()
        logger.warning("it was the log")
        print("and this a print", file=sys.stderr)
    after = out.getvalue().removeprefix(before)
    for said in ("it was the log", "and this a print"):
        # The line of the bar is erased first, and then the message stands alone on its line.
        (line,) = [line for line in after.split("\n") if said in line]
        assert line.split("\x1b[2K")[-1].strip() == said
    assert sys.stderr is out


def test_nothing_is_shown_before_there_is_work(monkeypatch):
    out = io.StringIO()
    with progress.shown(terminal(out, monkeypatch)):
        pass
    assert out.getvalue() == ""


def test_bars_show_names_as_they_are_and_import_nothing_while_they_draw(monkeypatch):
    """Loaders of other libraries replace `__import__`, and refuse a relative import meanwhile."""
    out = io.StringIO()
    real = builtins.__import__

    def absolute_only(name, globals=None, locals=None, fromlist=(), level=0):
        assert level == 0, f"relative import of {name}"
        return real(name, globals, locals, fromlist, level)

    bar = progress.make_bar(Console(file=out, force_terminal=True, width=100))
    bar.add_task("[red]a[/red]", total=4, line="loss [1]", completed=1)
    bar.console.print(bar.get_renderable())  # what is imported once, is by the first drawing
    out.truncate(0)
    with monkeypatch.context() as patched:
        patched.setattr(builtins, "__import__", absolute_only)
        bar.console.print(bar.get_renderable())
    assert "[red]a[/red]" in out.getvalue()
    assert "loss [1]" in out.getvalue()
    assert "1/4" in out.getvalue()


def test_a_bar_is_one_line_in_a_narrow_terminal():
    out = io.StringIO()
    bar = progress.make_bar(Console(file=out, force_terminal=True, width=60))
    bar.add_task(
        "dense cache compared with full forward, windows",
        total=10,
        line="loss 3.4386  11,377 tok/s",
    )
    bar.console.print(bar.get_renderable())
    (line,) = out.getvalue().splitlines()
    assert "dense cache" in line
    assert "0/10" in line
