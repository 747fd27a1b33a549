import contextlib
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cla_jax.profiler import traced

ROOT = Path(__file__).parents[1]


@pytest.fixture
def calls(monkeypatch) -> list:
    """What is asked of jax's profiler, in order, and the steps between."""
    seen = []

    @contextlib.contextmanager
    def trace(directory):
        seen.append(f"start {directory}")
        try:
            yield
        finally:
            seen.append("stop")

    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(jax, "block_until_ready", lambda waited: seen.append(f"wait {waited}"))
    return seen


def run(calls: list, steps: range, start_step: int = 0, stop: int = 6) -> list:
    """A run of six steps that is stopped after `stop`; its state is the step that is done."""

    def step(state, batch):
        calls.append(state + 1)
        return state + 1, batch

    with traced(step, steps, start_step, 6, Path("profile")) as step_fn:
        state = start_step
        for _ in range(start_step, stop):
            state, _ = step_fn(state, "batch")
        calls.append("run is over")
    return calls


def test_what_came_before_is_over_when_it_begins_and_its_own_steps_when_it_ends(calls):
    wait = "wait (4, 'batch')"
    expected = [1, 2, "wait 2", "start profile", 3, 4, wait, "stop", 5, 6, "run is over"]
    assert run(calls, range(3, 5)) == expected


def test_the_last_steps_of_a_run_are_traced_without_what_follows(calls):
    assert run(calls, range(6, 7))[-4:] == [6, "wait (6, 'batch')", "stop", "run is over"]


def test_a_range_is_cut_short_by_the_end(calls):
    assert run(calls, range(5, 99))[-4:] == [6, "wait (6, 'batch')", "stop", "run is over"]


def test_a_stop_closes_the_trace(calls):
    assert run(calls, range(2, 5), stop=3)[-4:] == [2, 3, "run is over", "stop"]


def test_a_run_that_goes_on_within_the_range_traces_the_rest(calls):
    assert run(calls, range(2, 6), start_step=3)[:4] == ["wait 3", "start profile", 4, 5]


@pytest.mark.parametrize(
    ("steps", "start_step", "stop"), [(range(0), 0, 6), (range(2, 4), 3, 6), (range(5, 7), 0, 4)]
)
def test_otherwise_nothing_is_traced_or_waited_for(calls, steps, start_step, stop):
    steps_done = list(range(start_step + 1, stop + 1))
    assert run(calls, steps, start_step, stop) == [*steps_done, "run is over"]


def test_only_process_0_traces(calls, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert run(calls, range(2, 4)) == [1, 2, 3, 4, 5, 6, "run is over"]


def test_an_error_closes_the_trace(calls):
    def failing(*_):
        raise MemoryError

    with (
        pytest.raises(MemoryError),
        traced(failing, range(1, 3), 0, 6, Path("profile")) as step_fn,
    ):
        step_fn(0, "batch")
    assert calls == ["wait 0", "start profile", "stop"]


@pytest.mark.slow
def test_a_run_leaves_a_trace_of_the_steps_asked_for(tmp_path):
    """A process of its own, for the CPU: a libtpu that is loaded is traced too, and one of another
    version than jax wants ends the process."""
    flags = {"runs": tmp_path / "runs", "data-dir": tmp_path / "data", "profile": "3:2"}
    # With the steps of `smoke`, other tests may have compiled the program already.
    command = [sys.executable, "-m", "launch.train", "smoke", "--name", "traced"]
    for flag, value in flags.items():
        command += [f"--placement.{flag}", str(value)]
    environment = {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | environment)
    (file,) = (tmp_path / "runs/traced/profile").glob("plugins/profile/*/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(file)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    steps = [dict(event.stats)["step_num"] for event in events if event.name == "train"]
    assert sorted(steps) == [3, 4]
    assert any("dot" in event.name for event in events)  # of the compiled step
