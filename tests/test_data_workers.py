"""Work dealt out to processes: in order, with the errors of one process, and without orphans."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cla_jax.data import workers
from cla_jax.data.workers import Workers

ROOT = Path(workers.__file__).parents[2]


def test_results_come_in_the_order_of_the_tasks_and_errors_where_they_belong():
    tasks = ["1", *map(str, range(30)), "no number", "3"]
    with Workers(2) as some:
        found = some.map(int, tasks, alone=1)
        assert [next(found) for _ in range(31)] == [1, *range(30)]
        with pytest.raises(ValueError, match="no number"):
            next(found)
        processes = some._processes
        assert len(processes) == 2
        assert list(some.map(abs, [-1, -2])) == [1, 2]  # by the same processes
        assert some._processes is processes
    assert all(process.poll() is not None for process in processes)


def test_little_work_starts_no_process():
    for some, tasks in ((Workers(2), "12"), (Workers(1), "123456")):
        with some:
            assert list(some.map(int, tasks, alone=2)) == list(map(int, tasks))
            assert not some._processes


def test_a_process_that_is_killed_is_told():
    with Workers(2) as some, pytest.raises(ChildProcessError, match="code -9"):
        list(some.map(_killed, range(4)))


def _killed(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_their_parent():
    code = """
import os, signal, time
from cla_jax.data.workers import Workers
with Workers(2) as some:
    list(some.map(abs, [1, 2, 3]))
    print(*(process.pid for process in some._processes), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    deadline = time.monotonic() + 60
    for pid in found.stdout.split():
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not Path(f"/proc/{pid}").exists()
