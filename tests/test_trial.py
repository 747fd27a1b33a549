"""The runner of a trial and its record: what ends a trial, what starts it again, what counts as what."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from cla_jax import files
from experiments import smoke
from launch import cancel, status, trial
from launch.sweeps import records, retry, runner
from launch.sweeps.records import Record, State

# Stands in for launch.train: does what the next line of the file `script` says, step by step.
TRAIN = """
import json, os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1]).parents[2]
script = here / "script"
first, _, rest = script.read_text().partition("\\n")
script.write_text(rest)
run = here / "one"
for order in first.split():
    what, _, value = order.partition(":")
    if what == "save":
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        (run / "checkpoints" / f"{int(value):08d}.json").write_text("{}")
    elif what == "finish":
        run.mkdir(parents=True, exist_ok=True)
        line = {"step": 40, "perplexity": 7.5, "held_out_loss": 2.0}
        (run / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
    elif what == "say":
        print(value.replace("_", " "), flush=True)
    elif what == "exit":
        sys.exit(int(value))
    elif what == "kill":
        os.kill(os.getpid(), int(value))
    elif what == "raise":
        raise RuntimeError(value)
    elif what == "wait":  # for SIGTERM, as training does: it saves, and exits with 42
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(42))
        print("waiting", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def record(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.setattr(runner, "_TRAIN", (sys.executable, str(tmp_path / "train.py")))
    made = Record(epath.Path(tmp_path), "one")
    made.write_trial(smoke.tiny(), {})
    return made


def attempt(record, *script, **flags):
    """Runs a trial whose training does what the lines of the script say; the exit code."""
    (record.sweep / "script").write_text("\n".join(script))
    argv = [f"--{name}={value}" for name, value in {"delay": 0, **flags}.items()]
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as stop:
            trial.main([str(record.sweep), record.name, *argv])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return stop.value.code


def left(record):
    return (record.sweep / "script").read_text()


def counts(record):
    state = record.state()
    return state.status, state.attempts, state.preemptions, state.failures


def test_a_trial_that_completes_is_done_and_not_trained_again(record):
    assert attempt(record, "finish") == retry.COMPLETE
    assert counts(record) == ("done", 1, 0, 0)
    assert attempt(record, "exit:1") == retry.COMPLETE
    assert left(record) == "exit:1"
    assert status.line(record)["perplexity"] == 7.5


def test_a_failure_is_tried_again_and_ends_the_trial_at_its_limit(record, capfd):
    assert attempt(record, "raise:odd", "exit:3", "say:last_words exit:4", "finish") == retry.FAILED
    assert counts(record) == ("failed", 3, 0, 3)
    assert record.state().error == "exit code 4; the last line was: last words"
    assert left(record) == "finish"
    assert "will be started again: RuntimeError: odd" in capfd.readouterr().out
    assert attempt(record, "finish") == retry.FAILED  # as before: nothing is started
    record.clear_failure()
    assert attempt(record, "finish") == retry.COMPLETE
    assert counts(record) == ("done", 4, 0, 3)


def test_failures_with_progress_between_them_do_not_add_up(record):
    script = [f"save:{step} kill:9" for step in (10, 20, 30, 35)]
    assert attempt(record, *script, "finish", failures=2) == retry.COMPLETE
    assert counts(record) == ("done", 5, 0, 4)
    assert "killed by SIGKILL" in record.state().error


def test_without_progress_kills_end_a_trial_too(record):
    assert attempt(record, "save:10 kill:9", "kill:9", "kill:9", failures=2) == retry.FAILED
    assert counts(record)[3] == 2


@pytest.mark.parametrize(
    ("counts", "end", "expected"),
    # Preemptions and failures in a row before and after; of four and three allowed.
    [
        ((0, 0), {"code": 5}, (0, 1, "stopped")),
        ((0, 1), {"code": 5}, (0, 2, "stopped")),
        ((0, 2), {"code": 5}, (0, 3, "failed")),
        ((0, 2), {"code": 5, "progress": 11}, (0, 1, "stopped")),  # it came further
        ((3, 0), {"code": 5, "progress": 11}, (0, 1, "stopped")),
        ((0, 0), {"code": 2}, (0, 1, "failed")),  # a mistake of the user's
        ((0, 0), {"code": 1, "error": "diverged: step 3"}, (0, 1, "failed")),
        ((0, 0), {"code": 42}, (1, 0, "stopped")),
        ((2, 2), {"code": 42}, (3, 2, "stopped")),  # no failure: those stay as they are
        ((3, 2), {"code": 42}, (4, 2, "failed")),
        ((3, 2), {"code": 42, "progress": 11}, (1, 0, "stopped")),
        ((0, 0), {"code": -9, "stopped": True}, (1, 0, "stopped")),  # asked to stop, then killed
        ((0, 0), {"code": 2, "stopped": True}, (1, 0, "stopped")),
        ((0, 0), {"code": -6}, (0, 1, "stopped")),  # alone it has crashed
        ((0, 0), {"code": -6, "several": True}, (1, 0, "stopped")),  # another host is dead
        ((0, 0), {"code": 134, "several": True}, (1, 0, "stopped")),
        ((0, 0), {"code": 1, "several": True}, (0, 1, "stopped")),
    ],
)
def test_a_bad_end_is_counted_and_judged(counts, end, expected):
    before = State(
        status="running",
        preemptions=7,
        failures=7,
        preempted_in_a_row=counts[0],
        failed_in_a_row=counts[1],
        progress=10,
        error="before",
        diverged=True,
    )
    end = retry.BadEnd(**{"error": "an error", **end})
    after = retry.judge(before, end, failures=3, preemptions=4)
    assert (after.preempted_in_a_row, after.failed_in_a_row, after.status) == expected
    assert (after.preemptions, after.failures) == ((8, 7) if end.preempted else (7, 8))
    assert after.progress == max(10, end.progress)
    assert after.diverged == end.error.startswith("diverged")
    if not end.preempted:
        assert after.error == end.error
    elif after.status == "failed":
        assert after.error == "preempted 4 times without a new checkpoint; before"
    else:
        assert after.error == "before"
    assert before.progress == 10  # nothing is changed in place


def test_a_failed_trial_waits_longer_each_time_and_at_most_a_minute():
    waits = [retry.seconds_before_restart(State(failed_in_a_row=n), 5.0) for n in range(1, 7)]
    assert waits == [5, 10, 20, 40, 60, 60]
    assert retry.seconds_before_restart(State(failed_in_a_row=3), 90.0) == 90


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("say:error:_steps_=_0_must_be_positive exit:2", "error: steps = 0 must be positive"),
        ("say:diverged:_step_3 exit:1", "diverged: step 3"),
    ],
)
def test_what_another_start_would_repeat_ends_a_trial_at_once(record, script, error):
    assert attempt(record, script, "finish") == retry.FAILED
    assert counts(record) == ("failed", 1, 0, 1)
    assert record.state().error == error
    assert record.state().diverged == error.startswith("diverged")


def test_a_stop_is_no_failure(record):
    for _ in range(4):
        assert attempt(record, "exit:42", failures=1) == retry.AGAIN
    assert counts(record) == ("stopped", 4, 4, 0)
    assert attempt(record, "finish") == retry.COMPLETE


def test_preemptions_without_any_progress_have_a_limit_of_their_own(record):
    assert [attempt(record, "exit:42", preemptions=2) for _ in range(2)] == [42, retry.FAILED]
    assert "preempted 2 times without a new checkpoint" in record.state().error


def test_a_dead_peer_is_a_preemption_where_there_are_peers(record):
    assert attempt(record, "kill:6", hosts=4) == retry.AGAIN
    assert counts(record) == ("stopped", 1, 1, 0)
    assert attempt(record, "exit:5", hosts=4) == retry.AGAIN  # all hosts are started again
    assert counts(record) == ("stopped", 2, 1, 1)
    assert attempt(record, "kill:6", "finish") == retry.COMPLETE  # alone it has crashed
    assert counts(record) == ("done", 4, 1, 2)


def test_other_hosts_keep_no_record(record):
    assert attempt(record, "exit:42", hosts=2, host=1) == retry.AGAIN
    assert record.state() == State()
    assert (record.path / "log-1.txt").exists()


def test_an_attempt_that_died_without_a_word_was_a_preemption(record):
    record.write_state(State(status="running", attempts=1))
    assert attempt(record, "finish") == retry.COMPLETE
    assert counts(record) == ("done", 2, 1, 0)


def test_a_cancelled_trial_is_not_started(record):
    record.cancel()
    assert attempt(record, "finish") == retry.FAILED
    assert left(record) == "finish"
    assert status.line(record)["state"] == "cancelled"
    record.clear_failure()
    assert attempt(record, "finish") == retry.COMPLETE


@contextlib.contextmanager
def running(record, script):
    """A runner as a process of its own, once its training waits."""
    (record.sweep / "script").write_text(script)
    code = (
        f"from launch import trial\nfrom launch.sweeps import runner\nrunner._TRAIN = {runner._TRAIN!r}\n"
        f"runner.records.HEARTBEAT_S = 0.2\ntrial.main(['{record.sweep}', 'one'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 60
        while not (record.log.exists() and "waiting" in record.log.read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_runner_passes_a_stop_on_and_waits_for_the_save(record):
    with running(record, "wait") as process:
        assert record.is_locked
        assert status.line(record)["state"] == "running"
        process.terminate()
        out, _ = process.communicate(timeout=30)
    assert process.returncode == retry.AGAIN
    assert "one is stopped" in out
    assert counts(record) == ("stopped", 1, 1, 0)
    assert not record.is_locked


def test_a_running_trial_is_left_alone(record, capfd):
    with running(record, "wait"):
        assert attempt(record, "finish") == retry.COMPLETE
        assert left(record) == "finish"
    assert "one is being trained by another process" in capfd.readouterr().out


def test_training_that_outlives_its_runner_keeps_the_lock(record):
    with running(record, "wait") as process:
        process.kill()
        process.wait()
        (record.path / "lock").unlink()  # that frees nobody
        assert record.is_locked
        assert attempt(record, "finish") == retry.COMPLETE
        assert left(record) == "finish"
    deadline = time.monotonic() + 30
    while record.is_locked:  # now the training is killed as well
        assert time.monotonic() < deadline
    assert status.line(record)["state"] == "dead"
    assert attempt(record, "finish") == retry.COMPLETE
    assert counts(record) == ("done", 2, 1, 0)


def test_a_cancellation_reaches_a_running_trial(record, capsys):
    with running(record, "wait") as process:
        cancel.main([str(record.sweep)])
        process.communicate(timeout=30)
    assert process.returncode == retry.FAILED
    assert status.line(record)["state"] == "cancelled"
    assert "one  cancelled" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cancel.main([str(record.sweep), "on"])
    assert "unknown trial 'on'; did you mean one" in capsys.readouterr().err


def test_a_full_disk_for_the_record_does_not_end_training(record, monkeypatch, capfd):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write", full)
    assert attempt(record, "exit:5", "finish") == retry.COMPLETE
    assert (
        "the state cannot be written: [Errno 28] No space left on device" in capfd.readouterr().err
    )


def test_a_full_disk_that_swallowed_the_message_is_named(record, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    assert attempt(record, "exit:5", "finish", failures=1) == retry.FAILED
    assert record.state().error == "exit code 5"  # the disk is not accused
    record.clear_failure()
    with monkeypatch.context() as patch:
        patch.setattr(files, "_flush", full)
        assert attempt(record, "exit:5", "finish", failures=1) == retry.FAILED
    fault = f"{record.path} is not writable: No space left on device"
    assert record.state().error == f"exit code 5; {fault}"


@pytest.mark.parametrize(
    ("lines", "code", "error"),
    [
        (["step 3", "ValueError: x", "", "tail"], 1, "ValueError: x\n\ntail"),
        (["jaxlib._jax.XlaRuntimeError: no"], 1, "jaxlib._jax.XlaRuntimeError: no"),
        (["error: a", "  b: 1 there, 2 asked for"], 2, "error: a\n  b: 1 there, 2 asked for"),
        (["ValueError: long ago", "step 4"], -11, "killed by SIGSEGV; the last line was: step 4"),
        ([], 7, "exit code 7"),
    ],
)
def test_the_last_error_is_what_was_said_last(lines, code, error):
    assert runner.last_error(lines, code) == error


# ---------------------------------------------------------------------------------- status


def test_status_reads_the_end_of_long_metrics(record, capsys):
    record.run.path.mkdir()
    step = {"loss": 3.25, "tokens_per_s": 1000.0, "eta_s": 3661.0}
    with open(record.run.metrics, "w") as file:
        for number in range(1, 3000):
            file.write(json.dumps({"step": number, **step}) + "\n")
        file.write(json.dumps({"step": 2999, "goodput": 0.5}) + "\n" + '{"step": 3000, "lo')
    assert len(records.last_records(record.run)) < 2000
    now = time.time()
    record.write_state(State(status="running", attempts=2, failures=1, error="a\nb", updated=now))
    with record.locked():
        line = status.line(record)
        assert (line["step"], line["loss"], line["eta_s"]) == (2999, 3.25, 3661.0)
        status.main([str(record.sweep), "--once"])
        table = capsys.readouterr().out
        for words in ("1 running", "2,999/40", "3.2500", "1:01:01", "1,000"):
            assert words in table
    status.main([str(record.sweep), "--json"])
    (shown,) = json.loads(capsys.readouterr().out)
    assert shown["state"] == "dead"  # no lock: nobody is at it


def test_a_silent_runner_is_dead_where_there_are_no_locks(record, monkeypatch):
    monkeypatch.setattr(Record, "is_local", property(lambda self: False))
    now = time.time()
    state = State(status="running", updated=now)
    record.write_state(state)
    assert status.line(record)["state"] == "running"
    record.write_state(dataclasses.replace(state, updated=now - records.SILENT_S - 5))
    assert status.line(record)["state"] == "dead"


def test_what_a_trial_says_cannot_steer_the_terminal(record, capsys):
    hostile = "\x1b[2J[bold]x[/nothing]\r\x9bc"
    record.write_state(State(status="failed", error=hostile))
    named = record.sweep / ".sweep" / hostile.replace("/", "")
    named.mkdir()
    (named / "trial.json").write_text("{")  # unreadable
    status.main([str(record.sweep), "--once"])
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\r\x9b")
    assert "[2J[bold]x[/nothing]" in shown
    assert "[2J[bold]x[nothing]" in shown


@pytest.mark.parametrize(
    ("file", "content"),
    [
        (".sweep/one/state.json", '{"attempts": "many"}'),
        (".sweep/one/state.json", '{"status": ["running"]}'),
        (".sweep/one/state.json", '{"status": "flying"}'),
        (".sweep/one/state.json", '{"error": 7}'),
        (".sweep/one/state.json", '{"updated": 1e999}'),
        (".sweep/one/state.json", "[" * 10**5),
        (".sweep/one/state.json", "/dev/zero"),
        (".sweep/one/state.json", None),
        (".sweep/one/submission.json", '{"engine": 1, "job": "a"}'),
        (".sweep/one/submission.json", None),
        (".sweep/one/trial.json", '{"name": []}'),
        (".sweep/one/trial.json", "9" * 5000),
        (".sweep/one/trial.json", "/dev/zero"),
        ("one/metrics.jsonl", "/dev/zero"),
        ("one/metrics.jsonl", None),
    ],
    ids=lambda value: str(value)[-30:],
)
def test_a_damaged_record_is_one_line_among_others(record, capsys, file, content):
    Record(record.sweep, "two").write_trial(smoke.tiny(), {})
    path = record.sweep / file
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if content is None:
        os.mkfifo(path)
    elif content.startswith("/"):
        os.symlink(content, path)
    else:
        path.write_text(content)
    status.main([str(record.sweep), "--once"])
    shown = capsys.readouterr().out
    assert "unreadable" in shown
    assert "1 unreadable, 1 waiting" in shown
    assert path.name in shown


@pytest.mark.parametrize(
    "line",
    [
        {"step": "3", "loss": 1.0},
        {"step": 3, "loss": "low"},
        {"step": 10**300, "loss": 1.0},
        {"step": 3, "loss": 1.0, "tokens_per_s": [], "eta_s": {}},
        {"step": 4, "perplexity": "good"},
        {"step": True, "loss": 2.0},
        [1, 2],
    ],
    ids=str,
)
def test_a_line_of_the_metrics_that_is_no_record_of_numbers_is_passed_over(record, capsys, line):
    whole = {"step": 2, "loss": 0.5, "eta_s": float("inf"), "tokens_per_s": float("nan")}
    record.run.path.mkdir()
    record.run.metrics.write_text(json.dumps(whole) + "\n" + json.dumps(line) + "\n{torn")
    record.write_state(State(status="running", updated=time.time()))
    with record.locked():
        status.main([str(record.sweep), "--once"])
    out = capsys.readouterr().out
    assert "2/40" in out
    assert "nan" not in out  # a speed that is not known yet
    assert [each["step"] for each in record.run.read_metrics()] == [2]


@pytest.mark.parametrize(
    ("name", "words"),
    [("smoke.girdd", "did you mean smoke.grid"), ("smoke.grid", "was not launched from here")],
)
def test_a_sweep_that_is_not_there_is_named(tmp_path, capsys, name, words):
    with pytest.raises(SystemExit):
        status.main([name, "--runs", str(tmp_path)])
    assert words in capsys.readouterr().err


def test_one_launcher_a_sweep(tmp_path):
    with records.launching(epath.Path(tmp_path)):
        (tmp_path / ".sweep" / "lock").unlink()
        again = records.launching(epath.Path(tmp_path))
        with pytest.raises(ValueError, match="is being launched by another process"):
            again.__enter__()


@pytest.mark.parametrize("name", ["lock", "log.txt"])
def test_a_trial_writes_through_no_link(record, tmp_path, capfd, name):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (record.path / name).unlink(missing_ok=True)
    os.symlink(precious, record.path / name)
    assert attempt(record, "finish") != retry.COMPLETE
    assert f"{record.path / name} is a symbolic link or a pipe: remove it" in capfd.readouterr().err
    assert precious.read_text() == "kept"


def test_cancelling_goes_on_beside_a_damaged_trial(record, capsys):
    two = Record(record.sweep, "two")
    two.write_trial(smoke.tiny(), {})
    (record.path / "submission.json").write_text("[")
    with pytest.raises(SystemExit):
        cancel.main([str(record.sweep)])
    assert record.is_cancelled
    assert two.is_cancelled
    shown = capsys.readouterr()
    assert "two  cancelled" in shown.out
    assert "submission.json" in shown.err
