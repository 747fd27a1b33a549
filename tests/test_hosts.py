"""Several hosts, as real processes on this machine: the state, the tokens and the losses of one."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

ROOT = Path(__file__).parents[1]
STEPS = 60  # enough that a signal comes in time

# What each host restores from a run's newest checkpoint, against the arrays as one process reads them.
RESTORE = """
import sys
import jax, numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp
from cla_jax.runs import Run
from cla_jax.state import named
from cla_jax.train import restore_or_init, set_up
from launch import distributed

distributed.initialize()
run = Run(epath.Path(sys.argv[1]))
setup = set_up(run.config())
assert jax.process_count() == setup.mesh.size == 2
with jax.set_mesh(setup.mesh):
    state = restore_or_init(setup, run)
saved = np.load(sys.argv[2])
shards = 0
for name, leaf in named(state).items():
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), saved[name][shard.index], err_msg=name)
        shards += leaf.size > shard.data.size
assert shards > 0, "nothing was split over the hosts"
print("restored", int(state.step))
"""


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nobody_is_left_behind():
    """Hosts that wait for one another would, after a failure, wait for ever."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(tmp_path, hosts: int, *command: str) -> list[subprocess.Popen]:
    """The command on so many hosts, one CPU device each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    together = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(hosts)}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=environment | (together | {"JAX_PROCESS_ID": str(i)} if hosts > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(hosts)
    ]
    STARTED.extend(processes)
    return processes


def train(tmp_path, name: str, hosts: int) -> list[subprocess.Popen]:
    return start(
        *(tmp_path, hosts, "-m", "launch.train", "smoke", "--name", name, "--steps", str(STEPS)),
        *("--placement.runs", str(tmp_path / "runs")),
        *("--placement.data-dir", str(tmp_path / "data")),
    )


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    logs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), logs
    return logs


def metrics(tmp_path, name: str) -> list[dict]:
    file = tmp_path / "runs" / name / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [record for record in map(json.loads, lines) if "loss" in record]


def stop_after(tmp_path, name: str, step: int, processes: list[subprocess.Popen]) -> int:
    """SIGTERM to the last host once the run has passed a step; where all of them stopped."""
    deadline = time.monotonic() + 120
    while len(metrics(tmp_path, name)) < step and processes[0].poll() is None:
        assert time.monotonic() < deadline, f"{name} did not reach step {step}"
        time.sleep(0.01)
    processes[-1].terminate()
    finish(processes, code=42)
    manifests = (tmp_path / "runs" / name / "checkpoints").glob("*.json")
    newest = max(int(file.stem) for file in manifests)
    assert step <= newest == metrics(tmp_path, name)[-1]["step"] < STEPS
    return newest


def save_arrays(tmp_path, name: str, step: int) -> str:
    """The arrays of a checkpoint as one process reads them."""
    parts = ocp.load_checkpointables(tmp_path / f"runs/{name}/checkpoints/{step:08d}")
    arrays = {f"model.{name}": array for name, array in parts["model"].items()}
    np.savez(tmp_path / "saved.npz", **arrays, **parts["training"])
    return str(tmp_path / "saved.npz")


@pytest.mark.slow
def test_a_run_moves_from_two_hosts_to_one_and_back_as_if_it_had_never_moved(tmp_path):
    finish(train(tmp_path, "steady", 1))
    stop_after(tmp_path, "moved", 3, train(tmp_path, "moved", 2))
    second = len(metrics(tmp_path, "moved"))
    newest = stop_after(tmp_path, "moved", second + 3, train(tmp_path, "moved", 1))
    # What one host saved, two restore bit for bit, each its own part.
    saved, run = save_arrays(tmp_path, "moved", newest), str(tmp_path / "runs/moved")
    for log in finish(start(tmp_path, 2, "-c", RESTORE, run, saved)):
        assert f"restored {newest}" in log
    finish(train(tmp_path, "moved", 2))
    for ours, theirs in zip(metrics(tmp_path, "steady"), metrics(tmp_path, "moved"), strict=True):
        assert (ours["step"], ours["tokens_hash"]) == (theirs["step"], theirs["tokens_hash"])
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-6)
