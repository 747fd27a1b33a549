import contextlib
import io
import math

import pytest

from cla_jax import goodput
from cla_jax.goodput import BUCKETS, Clock, earlier, process_start, summary, time_summary


class Time:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


def seconds(**booked: float) -> dict:
    return dict.fromkeys(BUCKETS, 0.0) | booked


def written(at_step: int, **booked: float) -> dict:
    """A time summary in the metrics."""
    return {"step": at_step, **time_summary(seconds(**booked))}


def steps(*numbers: int, each: float = 1.0) -> list[dict]:
    """The records of steps in the metrics."""
    return [{"step": step, "loss": 2.0, "seconds": each} for step in numbers]


def test_a_clock_is_always_in_one_bucket():
    time = Time()
    clock = Clock(started=990.0, now=time)
    time.advance(1)
    with clock.timed("compile"):
        time.advance(2)
    time.advance(4)  # startup again
    clock.switch("step")
    time.advance(8)
    with clock.timed("evaluation"):
        time.advance(16)
        with clock.timed("data_wait"):
            time.advance(32)
        time.advance(64)
    with contextlib.suppress(KeyError), clock.timed("checkpoint"):
        time.advance(128)
        raise KeyError
    time.advance(256)
    expected = seconds(startup=15, compile=2, step=264, evaluation=80, data_wait=32, checkpoint=128)
    assert clock.seconds() == clock.seconds() == expected
    assert sum(expected.values()) == time.now - 990
    time.advance(512)
    assert clock.seconds() == expected | {"step": 776}


def test_a_new_run_has_no_past():
    assert earlier([], 0) == seconds()


def test_what_is_saved_is_not_lost():
    lines = [
        *(written(0, startup=9), *steps(1, 2)),
        written(2, startup=9, step=1.5, data_wait=0.5, checkpoint=3),
    ]
    assert earlier(lines, 2) == seconds(startup=9, step=1.5, data_wait=0.5, checkpoint=3)


def test_a_killed_process_is_known_to_its_last_step_and_loses_what_was_not_saved():
    lines = [
        *(written(0, startup=9), *steps(1, 2, each=7)),
        *(written(2, startup=9, step=12, data_wait=2, checkpoint=3), *steps(3, 4, 5, each=2)),
    ]
    assert earlier(lines, 2) == seconds(startup=9, step=12, data_wait=2, checkpoint=3, lost=6)
    # Killed before anything was saved.
    assert earlier(lines[:3], 0) == seconds(startup=9, lost=14)
    # Saved, and killed before that was written down.
    assert earlier(lines, 4) == seconds(startup=9, step=16, data_wait=2, checkpoint=3, lost=2)


def test_losses_of_several_restarts_add_up():
    first = [written(0, startup=9), *steps(1, 2, 3), written(3, startup=9, step=3), *steps(4, 5)]
    assert earlier(first, 3) == seconds(startup=9, step=3, lost=2)
    # The second process dies at step 4; what it spent on starting is not lost with its step.
    second = [*first, written(3, startup=15, step=3, lost=2), *steps(4)]
    assert earlier(second, 3) == seconds(startup=15, step=3, lost=3)
    # The third goes back behind all that: its checkpoint was damaged.
    back = earlier(second, 2)
    assert back == seconds(startup=15, step=2, lost=4)
    assert sum(back.values()) == 15 + 3 + 2 + 1
    # And the fourth knows of a step 3 that both passed: the newer one counts.
    third = [*second, written(2, startup=20, step=2, lost=4), *steps(3, each=10)]
    third += [written(3, startup=20, step=12, lost=4), *steps(4, each=10)]
    assert earlier(third, 3) == seconds(startup=20, step=12, lost=14)


def test_batches_of_lost_steps_are_lost_but_checkpoints_and_evaluations_are_not():
    lines = [written(2, step=2), written(4, step=4, data_wait=8, checkpoint=16, evaluation=32)]
    assert earlier(lines, 2) == seconds(step=2, checkpoint=16, evaluation=32, lost=10)


def test_steps_from_before_there_were_accounts_count():
    assert earlier([*steps(1, 2, 3), {"step": 3, "held_out_loss": 1.0}], 2) == seconds(
        step=2, lost=1
    )


def test_a_run_sums_over_its_processes():
    """Three processes, stopped after saving: nothing is lost and no second is counted twice."""
    lines, wall = [], 0.0
    for process in range(3):
        time = Time()
        clock = Clock(now=time)
        with clock.timed("compile"):
            time.advance(5)
        clock.carry_on(earlier(lines, 2 * process))
        clock.switch("step")
        lines.append({"step": 2 * process, **time_summary(clock.seconds())})
        time.advance(10 + process)
        lines += steps(2 * process + 1, 2 * process + 2, each=5 + process / 2)
        with clock.timed("checkpoint"):
            time.advance(3)
        lines.append({"step": 2 * process + 2, **time_summary(clock.seconds())})
        wall += time.now - 1000
    assert clock.seconds() == seconds(compile=15, step=33, checkpoint=9)
    assert sum(clock.seconds().values()) == wall == 57
    assert lines[-1]["goodput"] == pytest.approx(33 / 57, abs=1e-6)


def test_accounts_and_their_line():
    spent = seconds(startup=1, step=6, data_wait=0.5, lost=2.5)
    assert time_summary(spent) == {
        "goodput": 0.6,
        "startup_s": 1,
        "compile_s": 0,
        "data_wait_s": 0.5,
        "step_s": 6,
        "checkpoint_s": 0,
        "evaluation_s": 0,
        "lost_s": 2.5,
    }
    line = summary(spent)
    assert line.startswith("goodput 60.0 % of 10.0 s: startup 1.0 s (10.0 %), ")
    assert "data wait 0.5 s (5.0 %), step 6.0 s (60.0 %)" in line
    assert line.endswith("lost 2.5 s (25.0 %)")
    assert time_summary(seconds())["goodput"] == 0
    assert "goodput 0.0 % of 0.0 s" in summary(seconds())


def test_the_start_of_the_process_comes_from_the_kernel(monkeypatch):
    """Started 1200.5 s after boot, now 1210; the monotonic clock stands at 3."""
    ticks = math.floor(1200.5 * goodput.os.sysconf("SC_CLK_TCK"))
    stat = f"7 (a (b) c) {' '.join(['S', *'1' * 18, str(ticks), *'2' * 9])}\n"
    monkeypatch.setattr(goodput, "open", lambda _: io.StringIO(stat), raising=False)
    monkeypatch.setattr(goodput.time, "clock_gettime", lambda _: 1210.0)
    monkeypatch.setattr(goodput.time, "monotonic", lambda: 3.0)
    assert process_start() == pytest.approx(-6.5)


def test_elsewhere_a_process_starts_when_this_is_imported(monkeypatch):
    def missing(_):
        raise FileNotFoundError

    assert process_start() <= goodput._IMPORTED
    monkeypatch.setattr(goodput, "open", missing, raising=False)
    assert process_start() == goodput._IMPORTED
