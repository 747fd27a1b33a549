"""Several hosts, as real processes on this machine: the state, the tokens and the losses of one."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from launch.hosts.distributed import STOPPED

ROOT = Path(__file__).parents[1]
STEPS = 100  # enough that a signal comes in time
# Seconds for what takes half a minute on an idle machine. It only ends tests that would wait for ever.
PATIENCE = 600
# Seconds of silence after which a host counts as dead. A busy machine must not look like a dead host.
PEER_TIMEOUT = "12"

# What each host restores from a run's newest checkpoint, against the arrays as one process reads them.
RESTORE = """
import sys
import jax, numpy as np
from etils import epath
from cla_jax.runs import Run
from cla_jax.state import named
from cla_jax.train import restore_or_init, prepare_session
from launch.hosts import distributed
from launch.hosts import Hosts

distributed.initialize(Hosts())
run = Run(epath.Path(sys.argv[1]))
session = prepare_session(run.config())
assert jax.process_count() == session.mesh.size == 2
with jax.set_mesh(session.mesh):
    state = restore_or_init(session, run)
saved = np.load(sys.argv[2])
shards = 0
for name, leaf in named(state).items():
    for shard in leaf.addressable_shards:
        np.testing.assert_array_equal(np.asarray(shard.data), saved[name][shard.index], err_msg=name)
        shards += leaf.size > shard.data.size
assert shards > 0, "nothing was split over the hosts"
print("restored", int(state.step))
"""

# launch.train, with every shard kept as it is saved and held against those once it is restored; all hosts
# wait after the step PAUSE to be killed. The first argument is a directory, the second PAUSE.
WITNESSED = """
import pickle, sys, time
from pathlib import Path
import jax, numpy as np
import cla_jax.evaluate
from cla_jax import checkpoint, train
from cla_jax.state import named
from launch.hosts import distributed
from launch import train as launch_train

kept, pause, *argv = sys.argv[1:]
save, restore = checkpoint.Checkpointer.save, train.restore_or_init

def save_and_keep(saver, state, *more, **options):
    shards = [
        (name, shard.index, np.asarray(shard.data))
        for name, leaf in named(state).items()
        for shard in leaf.addressable_shards
    ]
    file = Path(kept) / f"{int(state.step)}-{jax.process_index()}.pickle"
    file.write_bytes(pickle.dumps(shards))
    save(saver, state, *more, **options)

def restore_and_compare(*given, **options):
    state = restore(*given, **options)
    leaves, step = named(state), int(state.step)
    saved = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
    known = {name: np.zeros(leaf.shape, bool) for name, leaf in leaves.items()}
    for file in Path(kept).glob(f"{step}-*.pickle"):
        for name, index, shard in pickle.loads(file.read_bytes()):
            saved[name][index], known[name][index] = shard, True
    compared = split = 0
    for name, leaf in leaves.items() if step else ():
        assert known[name].all(), name
        for shard in leaf.addressable_shards:
            assert np.asarray(shard.data).tobytes() == saved[name][shard.index].tobytes(), name
            compared, split = compared + 1, split + (shard.data.size < leaf.size)
    print(f"restored step {step}, {compared} shards alike, {split} of them parts", flush=True)
    return state

def should_stop(step):
    while step == int(pause) > 0:  # 0 for none; it is asked about step 0 while the first batch is read
        time.sleep(1)
    return False

checkpoint.Checkpointer.save, train.restore_or_init = save_and_keep, restore_and_compare
distributed.stop_on_signal = lambda *_: should_stop
cla_jax.evaluate.during_training = lambda *_: {"held_out_loss": 0.0}
launch_train.main(argv)
"""

# launch.train on a host whose data stop coming: alive, but not coming forward.
STALLED = """
import sys, time
from cla_jax import train
from launch import train as launch_train

stream = train.batch_stream

def stalling(*given, **named):
    batches = stream(*given, **named)
    for _ in range(3):
        yield next(batches)
    time.sleep(10_000)

train.batch_stream = stalling
launch_train.main(sys.argv[1:])
"""

# launch.train with another version of a package.
OTHER_VERSION = """
import sys
from importlib import metadata
from launch import train as launch_train

version = metadata.version
metadata.version = lambda name: "0.0.1" if name == "jaxlib" else version(name)
launch_train.main(sys.argv[1:])
"""


STARTED: list[subprocess.Popen] = []


@pytest.fixture(autouse=True)
def nobody_is_left_behind():
    """Hosts that wait for one another would, after a failure, wait for ever."""
    yield
    while STARTED:
        STARTED.pop().kill()


def start(tmp_path, hosts: int, *command: str, devices: int = 1) -> list[subprocess.Popen]:
    """The command on so many hosts, each with so many CPU devices."""
    together = {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}",
        "JAX_NUM_PROCESSES": str(hosts),
    }
    return [
        start_one(
            tmp_path,
            *command,
            devices=devices,
            environment=together | {"JAX_PROCESS_ID": str(i)} if hosts > 1 else {},
        )
        for i in range(hosts)
    ]


def start_one(
    directory: Path, *command: str, devices: int = 1, environment: dict[str, str] | None = None
) -> subprocess.Popen:
    flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    STARTED.append(
        subprocess.Popen(
            [sys.executable, *command],
            cwd=directory,
            env=os.environ | flags | {"PYTHONPATH": str(ROOT)} | (environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    )
    return STARTED[-1]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def flags_of_two(i: int) -> tuple[str, ...]:
    """Host i of two, as flags; to be followed by a free port."""
    return ("--processes", "2", "--process-id", str(i), "--coordinator")


def arguments(tmp_path, name: str, steps: int = STEPS) -> tuple[str, ...]:
    return (
        *("smoke", "--name", name, "--steps", str(steps)),
        *("--placement.runs", str(tmp_path / "runs")),
        *("--placement.data-dir", str(tmp_path / "data")),
    )


# Two sources, and other weights from step 14 on.
MIXTURE = ("--data.mixture", "a=0.7:sotu:20", "b=0.3:sotu:30", "--data.stages", "14:b=1")


def train(tmp_path, name: str, hosts: int) -> list[subprocess.Popen]:
    return start(tmp_path, hosts, "-m", "launch.train", *arguments(tmp_path, name))


def finish(processes: list[subprocess.Popen], code: int = 0) -> list[str]:
    logs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [code] * len(processes), "\n".join(logs)
    return logs


def metrics(tmp_path, name: str) -> list[dict]:
    file = tmp_path / "runs" / name / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    whole = []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):  # torn by a kill
            whole.append(json.loads(line))
    return [record for record in whole if "loss" in record]


def wait_for(condition, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        ended = [process for process in processes if process.poll() is not None]
        assert not ended, ended[0].communicate()[0]
        assert time.monotonic() < deadline, "the run does not come as far"
        time.sleep(0.01)


def stop_after(tmp_path, name: str, step: int, processes: list[subprocess.Popen]) -> int:
    """SIGTERM to the last host once the run has passed a step; where all of them stopped."""
    wait_for(lambda: len(metrics(tmp_path, name)) >= step, processes)
    processes[-1].terminate()
    logs = finish(processes, code=STOPPED)
    manifests = (tmp_path / "runs" / name / "checkpoints").glob("*.json")
    newest = max(int(file.stem) for file in manifests)
    assert step <= newest == metrics(tmp_path, name)[-1]["step"] < STEPS
    for log in logs:
        assert f"step {newest} is saved" in log
    return newest


def save_arrays(tmp_path, name: str, step: int) -> str:
    """The arrays of a checkpoint as one process reads them."""
    parts = ocp.load_checkpointables(tmp_path / f"runs/{name}/checkpoints/{step:08d}")
    arrays = {f"model.{name}": array for name, array in parts["model"].items()}
    np.savez(tmp_path / "saved.npz", **arrays, **parts["training"])
    return str(tmp_path / "saved.npz")


@pytest.mark.hosts
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


def witnessed(tmp_path, name: str, hosts: int, pause: int = 0) -> list[subprocess.Popen]:
    kept = tmp_path / f"{name}-kept"
    kept.mkdir(exist_ok=True)
    return start(
        *(tmp_path, hosts, "-c", WITNESSED, str(kept), str(pause)),
        *(*arguments(tmp_path, name, steps=24), "--placement.save-every", "5", *MIXTURE),
        devices=2,
    )


def kill_at(tmp_path, name: str, hosts: int, pause: int, saved: int) -> list[str]:
    """Trains up to a step and kills every host there; a checkpoint before it is whole by then."""
    processes = witnessed(tmp_path, name, hosts, pause)
    manifest = tmp_path / "runs" / name / "checkpoints" / f"{saved:08d}.json"
    # Metrics are written one step late.
    last = lambda: max((record["step"] for record in metrics(tmp_path, name)), default=0)
    wait_for(lambda: manifest.exists() and last() == pause - 1, processes)
    for process in processes:
        process.kill()
    return finish(processes, code=-signal.SIGKILL)


def restored(log: str) -> int:
    """The step from which a host went on, having found every shard to be as it was saved."""
    step, shards, parts = map(
        int, re.findall(r"restored step (\d+), (\d+) shards alike, (\d+) ", log)[0]
    )
    assert step == 0 or shards > parts > 0
    return step


@pytest.mark.hosts
def test_killed_on_four_hosts_then_on_two_a_run_ends_on_one_as_if_never_killed(tmp_path):
    finish([*witnessed(tmp_path, "one", 1), *witnessed(tmp_path, "two", 2)])
    for log in kill_at(tmp_path, "killed", 4, pause=13, saved=10):
        assert restored(log) == 0
    assert len(metrics(tmp_path, "killed")) == 12
    for log in kill_at(tmp_path, "killed", 2, pause=18, saved=15):
        assert restored(log) == 10
    (log,) = finish(witnessed(tmp_path, "killed", 1))
    assert restored(log) == 15
    steady = {record["step"]: record for record in metrics(tmp_path, "one")}
    for name, steps in (
        ("two", [*range(1, 25)]),
        # What a kill lost is done again, with the same tokens.
        ("killed", [*range(1, 13), *range(11, 18), *range(16, 25)]),
    ):
        records = metrics(tmp_path, name)
        assert [record["step"] for record in records] == steps
        for record in records:
            expected = steady[record["step"]]
            assert record["tokens_hash"] == expected["tokens_hash"]
            assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)


@pytest.mark.hosts
@pytest.mark.parametrize("way", ["SIGKILL", "SIGSTOP", "stalled"])
def test_a_dead_or_hung_host_ends_the_others(tmp_path, way):
    """By themselves: nothing but the end of the test would end them otherwise."""
    port = f"localhost:{free_port()}"
    command = [
        ["-c", STALLED] if way == "stalled" and i == 0 else ["-m", "launch.train"] for i in range(2)
    ]
    # One limit only: the other must not be what ends a host.
    limit = ("--step-timeout", "10") if way == "stalled" else ("--peer-timeout", PEER_TIMEOUT)
    processes = [
        start_one(
            tmp_path,
            *command[i],
            *arguments(tmp_path, "endless", steps=10**6),
            *(*flags_of_two(i), port, *limit),
        )
        for i in range(2)
    ]
    if way == "stalled":
        logs = [process.communicate(timeout=PATIENCE)[0] for process in processes]
        # The time of both is up; the first to end may end the other.
        for process in processes:
            assert process.returncode in (1, -signal.SIGABRT), "\n".join(logs)
        ended = [log for log in logs if "Timeout (0:00:10)!" in log]
        assert ended, "\n".join(logs)
        for log in ended:  # who waits for what
            assert "in stalling" in log or "in record" in log, log
        return
    wait_for(lambda: len(metrics(tmp_path, "endless")) >= 2, processes)
    coordinator, other = processes
    dead, survivor = (other, coordinator) if way == "SIGKILL" else (coordinator, other)
    dead.send_signal(signal.Signals[way])
    log = survivor.communicate(timeout=PATIENCE)[0]
    if way == "SIGKILL":  # a failed collective, or jax's word before it is reported
        assert survivor.returncode in (1, -signal.SIGABRT), log
        assert "Gloo" in log or "Terminating process" in log
    else:
        assert survivor.returncode == -signal.SIGABRT, log
        assert "Terminating process because the JAX distributed service" in log
        # Awake again, it must not go on by itself.
        dead.send_signal(signal.SIGCONT)
        assert dead.wait(timeout=PATIENCE) == -signal.SIGABRT


@pytest.mark.hosts
def test_a_host_that_fails_alone_says_why_and_leaves(tmp_path):
    """Without waiting, at its end, for one that waits for it; that one ends as after a death."""
    port, processes = f"localhost:{free_port()}", []
    for i in range(2):
        own = tmp_path / str(i)
        own.mkdir()
        for book in range(9 if i == 0 else 0):
            (own / f"{book}.txt").write_text(f"word {book} " * 100)
        flags = (
            *flags_of_two(i),
            port,
            "--peer-timeout",
            PEER_TIMEOUT,
            "--data.source",
            "text:*.txt",
        )
        command = ("-m", "launch.train", *arguments(tmp_path, "alone"))
        processes.append(start_one(own, *command, "--data.held-out", "0.4", *flags))
    left, failed = (process.communicate(timeout=PATIENCE)[0] for process in processes)
    assert "error: the source 'text:*.txt'" in failed
    assert "Terminating process because the JAX distributed service" in left
    assert [process.returncode for process in processes] == [-signal.SIGABRT, 2]


@pytest.mark.hosts
@pytest.mark.parametrize("what", ["config", "data", "versions"])
def test_hosts_that_differ_are_all_refused_with_the_difference(tmp_path, what):
    # The mesh is impossible besides, on this host only.
    change = ("--optimizer.peak-lr", "0.1", "--placement.mesh.fsdp", "3")
    said = {
        "config": (
            r"config\.optimizer\.peak_lr: 0\.003 on process 0; 0\.1 on process 1\n"
            r"  config\.placement\.mesh\.fsdp: -1 on process 0; 3 on process 1\n$"
        ),
        "data": r"data\.fingerprint: 'text-.*' on process 0; 'text-.*' on process 1\n",
        "versions": r"versions\.jaxlib: '.*' on process 0; '0\.0\.1' on process 1\n$",
    }
    port = f"localhost:{free_port()}"
    processes = []
    for i in range(2):
        # The same relative paths, in directories of their own; that data lie elsewhere is no difference.
        own = tmp_path / str(i)
        own.mkdir()
        for book in range(9):
            content = f"word {book} of host {i}" if what == "data" else f"word {book}"
            (own / f"{book}.txt").write_text(content * 100)
        program = ["-c", OTHER_VERSION] if what == "versions" and i == 1 else ["-m", "launch.train"]
        processes.append(
            start_one(
                *(own, *program, *arguments(tmp_path, what, steps=2)),
                *("--data.source", "text:*.txt", "--data.held-out", "0.4"),
                *("--placement.data-dir", str(own / "data")),
                *(change if what == "config" and i == 1 else ()),
                *(*flags_of_two(i), port),
            )
        )
    for log in finish(processes, code=2):
        assert "error: the processes do not agree:" in log
        assert re.search(said[what], log), log
    assert not (tmp_path / "runs" / what).exists()  # nothing was begun


@pytest.mark.hosts
def test_a_loss_that_is_not_finite_ends_all_hosts_at_the_same_step(tmp_path):
    command = ("-m", "launch.train", *arguments(tmp_path, "wild"), "--optimizer.peak-lr", "1e30")
    logs = finish(start(tmp_path, 2, *command), code=1)
    said = [re.findall(r"diverged: step (\d+): \w+ is \w+", log) for log in logs]
    assert said[0] == said[1] != []


# launch.train whose compiler never ends.
COMPILING = """
import sys, time
from cla_jax import train
from launch import train as launch_train

train.compile_step = lambda layout: time.sleep(10_000)
launch_train.main(sys.argv[1:])
"""


@pytest.mark.hosts
def test_hosts_that_are_told_to_stop_in_start_up_stop_at_once(tmp_path):
    hosts = start(tmp_path, 2, "-c", COMPILING, *arguments(tmp_path, "early"))
    log = tmp_path / "runs" / "early" / "log.txt"
    wait_for(lambda: log.exists() and "training tokens" in log.read_text(), hosts)
    for host in hosts:
        host.terminate()
    for said in finish(hosts, code=STOPPED):
        assert "stopped during start-up" in said
    # It made no step, so another run may have its name.
    finish(
        start(tmp_path, 1, "-m", "launch.train", *arguments(tmp_path, "early", 1), "--seed", "1")
    )
