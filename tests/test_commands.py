"""`cla-jax COMMAND` is `python -m launch.COMMAND`."""

import importlib
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cla_jax.evaluate
from cla_jax.formats import FORMATS
from cla_jax.runs import Run
from launch import __main__ as commands
from launch import cli, compilation_cache
from tests.test_publish import trained

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


@pytest.mark.parametrize("command", ["evaluate", "generate", "memory", "serve_trace"])
def test_help_lists_every_cache_format(command):
    """One that was just added too: the list is not typed by hand."""
    code = (
        "from cla_jax import formats\nformats.FORMATS['zz9'] = formats.Entry('zz9', 'Zz9')\n"
        f"from launch.{command} import main\nmain(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ", ".join([*FORMATS, "zz9"]) in " ".join(done.stdout.replace("│", " ").split())


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


@pytest.mark.parametrize(
    "command", [["memory"], ["memory", "--ledger"], ["publish", "copies"], ["evaluate"]]
)
def test_a_directory_of_any_name_is_a_name_and_no_command_to_the_terminal(
    command, tmp_path, capsys, monkeypatch
):
    """Names of runs are checked when we make them, but others may rename a directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Run, "check_decodable", lambda *_, **__: None)
    monkeypatch.setattr(cla_jax.evaluate, "evaluate", lambda *_, **__: [])
    monkeypatch.setattr(compilation_cache, "enable", lambda: None)
    odd = ("[/red]x", "[bold]a\x1b[2Jb")
    for i, name in enumerate(odd):
        run = trained(tmp_path / "made", f"run-{i}")
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        Path(run.path).rename(tmp_path / "r" / name)
    name, *rest = command
    commands.main([name, "r", *rest])
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown
    for name in odd:
        assert re.search(re.escape(name.rpartition("/")[2].replace("\x1b", r"\x1b")), shown)


def test_a_log_message_is_no_command_to_the_terminal(capsys, monkeypatch):
    monkeypatch.setattr(logging.root, "handlers", [])
    cli.log_to_stderr()
    logging.getLogger("x").warning("removing %s\nand then %s", "runs/\x1b[2J", "b" * 9000)
    first, second = capsys.readouterr().err.splitlines()
    assert first == r"removing runs/\x1b[2J"
    assert second.startswith("and then bbb")
    assert len(second) < 5000
