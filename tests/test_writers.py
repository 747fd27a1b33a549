import errno
import io
import json
import os
import re
import sys
import types
from unittest.mock import Mock

import pytest
from etils import epath
from rich.console import Console

from cla_jax import extras
from cla_jax.runs import Run
from cla_jax.writers import ConsoleWriter, JsonlWriter, make_writer


@pytest.fixture
def run(tmp_path):
    return Run(epath.Path(tmp_path / "run"))


def test_jsonl_is_appended_and_a_torn_line_closed(run):
    writer = JsonlWriter(run)
    writer.write(1, {"loss": 2.0})
    writer.close()
    with open(run.metrics, "a") as file:
        file.write('{"step": 2, "lo')  # a crash
    writer = JsonlWriter(run)
    writer.write(2, {"loss": 1.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in run.read_metrics()] == [(1, 2.0), (2, 1.0)]


def test_lines_are_on_disk_when_written(run):
    writer = JsonlWriter(run)
    writer.write(1, {"loss": 2.0})
    assert len(run.read_metrics()) == 1  # before any flush or close
    writer.close()


def test_a_remote_run_gets_segments(run, monkeypatch):
    """Nothing appends to an object store: each flush writes a file of its own."""
    monkeypatch.setattr(Run, "is_local", property(lambda _: False))
    (run.path / "metrics").mkdir(parents=True)
    writer = JsonlWriter(run)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
        if step != 2:
            writer.flush()
    writer.close()
    assert not run.metrics.exists()
    assert len(list((run.path / "metrics").iterdir())) == 2
    assert [r["step"] for r in run.read_metrics()] == [1, 2, 3]


def test_a_full_disk_names_the_file(run, monkeypatch):
    """The system names a file only where it is given a path."""
    writer = JsonlWriter(run)
    fault = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=fault))
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        writer.flush()
    writer.file.close()
    writer.file = Mock(write=Mock(side_effect=fault))
    with pytest.raises(OSError, match=r"No space left on device: .*metrics\.jsonl"):
        writer.write(1, {"loss": 2.0})


def test_console_prints_plain_lines_without_a_terminal(run):
    out = io.StringIO()
    writer = ConsoleWriter(run, 10, Console(file=out))
    writer.write(3, {"loss": 2.34567, "tokens_per_s": 12345.6, "eta_s": 90.0})
    writer.write(10, {"held_out_loss": 1.5, "perplexity": 4.48, "bits_per_byte": 1.25})
    writer.close()
    first, second = out.getvalue().splitlines()
    assert first == "run  step 3/10  loss 2.3457  12,346 tok/s  ETA 1.5 min"
    assert second == "run  step 10/10  held-out loss 1.5000  perplexity 4.480  1.2500 bits/byte"


def test_console_leaves_out_the_time_of_a_run(run):
    out = io.StringIO()
    writer = ConsoleWriter(run, 10, Console(file=out))
    writer.write(3, {"goodput": 0.5, "step_s": 2.0})
    writer.close()
    assert out.getvalue() == ""


def test_console_draws_a_bar_on_a_terminal(run):
    out = io.StringIO()
    writer = ConsoleWriter(run, 10, Console(file=out, force_terminal=True, width=120))
    writer.write(4, {"loss": 2.5, "mfu": 0.41})
    writer.write(4, {"perplexity": 12.0})
    writer.close()
    assert "4/10" in out.getvalue()
    assert "MFU 41.0%" in out.getvalue()
    assert "perplexity 12.000" in out.getvalue()


def test_the_bar_moves_with_every_step(run, tiny, monkeypatch):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    monkeypatch.setattr("cla_jax.writers.Console", lambda **_: console)
    writer = make_writer(run, tiny(steps=7, **{"placement.log_every": 3}), process_index=0)
    (bar,) = [one.progress for one in writer.writers if isinstance(one, ConsoleWriter)]
    for step in range(1, 6):
        writer.write(step, {"loss": 1.0 + step})
        assert bar.tasks[0].completed == step
        assert f"loss {1 + step}" in bar.tasks[0].fields["line"]
    writer.close()


def test_lines_come_for_slow_steps_too(run):
    """However far apart the steps that are asked for are."""
    out, seconds = io.StringIO(), iter(range(0, 10_000, 10))
    writer = ConsoleWriter(run, 100, Console(file=out), every=50, now=lambda: next(seconds))
    for step in range(1, 20):
        writer.write(step, {"loss": 1.0})
    assert 3 < len(out.getvalue().splitlines()) < 19


def test_console_is_thinned_and_the_file_is_not(run, tiny, capsys):
    config = tiny(steps=7, **{"placement.log_every": 3})
    writer = make_writer(run, config, process_index=0)
    for step in range(1, 8):
        writer.write(step, {"loss": 1.0})
    writer.write(7, {"perplexity": 2.0})
    writer.close()
    shown = [line.split()[2] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["1/7", "3/7", "6/7", "7/7", "7/7"]
    assert len(run.metrics.read_text().splitlines()) == 8


def test_other_processes_write_nothing(run, tiny):
    make_writer(run, tiny(), process_index=1).write(1, {"loss": 1.0})
    assert not run.path.exists()


def test_tensorboard_by_config(run, tiny):
    writer = make_writer(run, tiny(**{"placement.tensorboard": True}), process_index=0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    (events,) = (run.path / "tensorboard").iterdir()
    assert b"loss" in events.read_bytes()


def test_after_a_restart_no_step_stands_twice_in_tensorboard(run, tiny):
    """The first process came to step 5, and the checkpoint that the second goes on from is of step 3."""
    from tensorboardX.proto import event_pb2

    config = tiny(steps=8, **{"placement.tensorboard": True, "placement.log_every": 1})
    for first, last in ((0, 5), (3, 8)):
        writer = make_writer(run, config, process_index=0, start_step=first)
        for step in range(first + 1, last + 1):
            writer.write(step, {"loss": float(step)})
        writer.close()
        (file,) = (run.path / "tensorboard").glob("events*")
        file.rename(file.parent / f"{first}-{file.name}")  # names have whole seconds
    steps: list[int] = []
    for file in sorted((run.path / "tensorboard").iterdir()):
        content, at = file.read_bytes(), 0
        while at < len(content):  # records: length, its checksum, the event, its checksum
            length = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            if event.HasField(
                "session_log"
            ):  # TensorBoard drops what an earlier session wrote from there on
                steps = [step for step in steps if step < event.step]
            steps += [event.step for value in event.summary.value if value.tag == "loss"]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_wandb_by_config(run, tiny, monkeypatch):
    """The real package logs in to a server; a stand-in records what it is given."""
    logged = []
    session = types.SimpleNamespace(
        log=lambda metrics, step: logged.append((step, metrics)), finish=lambda: None
    )

    def init(**options):
        logged.append(options)
        return session

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setattr(extras, "there", lambda _: True)
    writer = make_writer(run, tiny(name="a/b", **{"placement.wandb": "memory"}), process_index=0)
    writer.write(1, {"loss": 1.0})
    writer.close()
    options, record = logged
    assert (options["project"], options["name"], options["resume"]) == ("memory", "a/b", "allow")
    assert re.fullmatch("a-b-[0-9a-f]{8}", options["id"])  # of its own: a-b is another run
    assert json.loads(json.dumps(options["config"]))["batch_size"] == 8
    assert record == (1, {"loss": 1.0})


@pytest.mark.parametrize(
    ("package", "field", "value"),
    [("tensorboardX", "tensorboard", True), ("wandb", "wandb", "project")],
)
def test_a_missing_extra_says_how_to_install_it(run, tiny, monkeypatch, package, field, value):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"placement\.{field} needs the extra `{field}`: `pip install -e "
    ):
        make_writer(run, tiny(**{f"placement.{field}": value}), process_index=0)
