"""`cla-jax COMMAND` is `python -m launch.COMMAND`."""

import importlib
from pathlib import Path

import pytest

from launch import __main__ as commands

LAUNCH = Path(commands.__file__).parent


def test_every_entry_point_is_a_command():
    entry_points = {
        file.stem for file in LAUNCH.glob("*.py") if '__name__ == "__main__"' in file.read_text()
    }
    assert set(commands.COMMANDS) == entry_points - {"__main__"}


@pytest.mark.parametrize("word", ["serve_trace", "serve-trace"])
def test_a_command_gets_the_arguments_behind_it(word, monkeypatch):
    seen = []
    module = importlib.import_module("launch.serve_trace")
    monkeypatch.setattr(module, "main", seen.append)
    commands.main([word, "runs/x", "--rate", "3"])
    assert seen == [["runs/x", "--rate", "3"]]


def test_an_unknown_command_ends_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        commands.main(["evalute", "runs/x"])
    assert end.value.code == 2
    assert "unknown command 'evalute'; did you mean evaluate" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_every_command(argv, capsys):
    commands.main(argv)
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in commands.COMMANDS)


@pytest.mark.parametrize(
    "command", [["evaluate", "nowhere"], ["serve-trace", "nowhere", "--model", "demo"]]
)
@pytest.mark.parametrize(
    ("plot", "words"),
    [
        ("x.foo", "unknown ending of --plot 'foo'; known: png, svg, pdf"),
        ("x", "unknown ending of --plot ''"),
        ("missing/x.png", "plot = 'missing/x.png': the directory 'missing' does not exist"),
        ("taken.png", "plot = 'taken.png' cannot be written"),
    ],
)
def test_a_plot_that_cannot_be_written_is_refused_first(
    command, plot, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(SystemExit) as end:
        commands.main([*command, "--plot", plot])
    assert end.value.code == 2
    assert words in capsys.readouterr().err
