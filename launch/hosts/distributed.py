"""Several hosts, one process each: joining them, holding them to one config, ending them together.

If a process dies or hangs, the others end with a message, in one of three ways. P is `--peer-timeout`
(default 100 s), S is `--step-timeout` (default 1 h):

- A collective fails, because the connections of the dead process are closed. The process prints a traceback
  and exits with code 1, within P + 10 s, usually within 10 s.
- Process 0 counts heartbeats and reports a dead or stopped process, or process 0 itself does not respond. The
  others print "Terminating process because the JAX distributed service detected fatal errors", within P + 10
  s. They end by SIGABRT (-6 in Python, 134 in a shell). A stopped process that resumes too late ends in the
  same way.
- A step takes longer than S, because a process is alive but makes no progress: "Timeout", the stack of every
  thread, and exit code 1. The others end in the same way, or because this process ended.

Before the run, each process prints which processes it waits for. If they do not connect within 300 s, it ends
with exit code 134. At the end of the run, jax waits up to 600 s for all processes to end.

After each of these ends, and after exit code 42, a launcher should start the run again. It should not after
exit code 2 (a user error), or after exit code 1 with "diverged" (the loss is not finite). If all processes
fail with the same error, each exits with that code. A process that fails alone exits after 10 s, and the
others end as after a death.
"""

import contextlib
import ctypes
import errno
import faulthandler
import itertools
import json
import logging
import os
import signal
import sys
import termios
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

import jax
from jax._src import clusters, distributed  # the coordinator's store has no public name

from cla_jax.fields import flatten
from cla_jax.messages import shown
from launch.cli import leave
from launch.hosts import Hosts

log = logging.getLogger("cla_jax.launch")

STOPPED = 42  # exit code of a run that was asked to stop and has saved
_STOPPING = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)

# At the end of a run process 0 is the last, when it has read back the last checkpoint for its checksums.
_SHUTDOWN_S = 600
# How long a process that fails waits for others that fail alike, so that each can say why.
_FAILING_S = 10
# How long processes may take to come, and the exit code of one that was left alone: as when a peer dies.
_JOINING_S = 300
_NOT_JOINED = 134
# Between two lines that tell what is waited for.
_WAITING_S = 60

_calls = itertools.count()
_stepping = threading.Event()  # the loop of the run has begun: it saves before it stops


def wanted() -> bool:
    """Whether the environment describes more than one process, as jax itself reads it.

    Raises ValueError for an Open MPI that this jax cannot read.
    """
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        return True
    kinds = [kind for kind in clusters.ClusterEnv._cluster_types if not kind.opt_in_only_method]
    if "JOB_COMPLETION_INDEX" not in os.environ:
        kinds.remove(clusters.K8sCluster)  # a pod that is no part of an indexed job
    cluster = next((kind for kind in kinds if kind.is_env_present()), None)
    if cluster is None:
        size = os.environ.get("OMPI_COMM_WORLD_SIZE", "1")
        if size != "1":
            raise ValueError(
                f"OMPI_COMM_WORLD_SIZE = {size}, but this version of jax does not support that version of "
                "Open MPI: give --coordinator, --processes and --process-id"
            )
        return False
    if cluster is clusters.GkeTpuCluster and "MEGASCALE_NUM_SLICES" not in os.environ:
        # jax would ask Google's metadata server for slices, which a single TPU host may not have.
        return len(cluster._get_worker_list_in_slice()) > 1
    return cluster.get_process_count() > 1


def initialize(hosts: Hosts) -> None:
    """Joins the other processes, if flags or environment name any; before the first use of a device."""
    number = lambda name: int(os.environ[name]) if name in os.environ else None
    if hosts.coordinator is not None:
        address, count, own = hosts.coordinator, hosts.processes, hosts.process_id
        # A cluster around it must not add to what is said: SLURM, for one, gives a process one device.
        detection = "deactivate"
    elif wanted():
        address, count = os.environ.get("JAX_COORDINATOR_ADDRESS"), number("JAX_NUM_PROCESSES")
        own, detection = number("JAX_PROCESS_ID"), None
    else:
        return
    local = None
    if detection is None:  # as jax would, but before it waits: so that it can be said for whom
        address, count, own, local = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            address, count, own, None, None, _JOINING_S
        )
        if "JAX_LOCAL_DEVICE_IDS" in os.environ:
            local = None  # jax reads it
    with _waiting(address, count, own, "the flags" if hosts.coordinator else _announced()):
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=count,
            process_id=own,
            local_device_ids=local,
            cluster_detection_method="deactivate",
            initialization_timeout=_JOINING_S,
            heartbeat_timeout_seconds=hosts.peer_timeout,
            shutdown_timeout_seconds=_SHUTDOWN_S,
        )
    # Not jax.process_index(): that meets the other processes' devices, whatever their versions are.
    state = distributed.global_state
    log.info(
        "process %d of %d joined; if one does not respond for %d s, all end",
        *(state.process_id, state.num_processes, hosts.peer_timeout),
    )


def leads() -> bool:
    """Whether this process writes what all have in common; no device is asked."""
    return not distributed.global_state.process_id


def has_peers() -> bool:
    """Whether this process has joined others."""
    return distributed.global_state.client is not None


def _announced() -> str:
    """What speaks of several processes, with its number."""
    for name in (
        "JAX_NUM_PROCESSES",
        "SLURM_NTASKS",
        "OMPI_COMM_WORLD_SIZE",
        "TPU_WORKER_HOSTNAMES",
    ):
        if value := os.environ.get(name):
            return f"{name}={shown(value)}"
    return "the environment"


@contextlib.contextmanager
def _waiting(address: Any, count: Any, own: Any, source: str) -> Iterator[None]:
    """Tells who is waited for, and where, at once and once a minute; ends a process that nobody joins.

    jax itself waits in silence and then aborts with a stack trace.
    """
    if own == 0:
        last = f" to {count - 1}" if count and count > 2 else ""
        missing = f"process 1{last} to connect to {address}"
    else:
        missing = f"process 0 at {address}"
    log.info("process %s of %s (from %s); waiting for %s", own, count, source, missing)
    joined, begin = threading.Event(), time.monotonic()

    def remind() -> None:
        while not joined.wait(_WAITING_S):
            log.warning("still waiting for %s, after %.0f s", missing, time.monotonic() - begin)

    def give_up() -> None:
        print(
            f"error: no connection within {_JOINING_S} s: waited for {missing}. Start each of the {count} "
            f"processes (with SLURM: srun), or change the number of processes in {source}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(_NOT_JOINED)

    ending = threading.Timer(_JOINING_S - 2, give_up)  # before jax does
    ending.daemon = True
    ending.start()
    threading.Thread(target=remind, daemon=True).start()
    try:
        yield
    finally:
        joined.set()
        ending.cancel()


class joined:
    """`initialize` for the length of a with statement; a process that fails in it does not linger.

    jax waits at the end of a process for all others. Where they fail alike, that is right. One that fails
    alone would wait for processes that wait for it: it leaves with its exit code, and they end as after a
    death.
    """

    def __init__(self, hosts: Hosts):
        self.hosts = hosts

    def __enter__(self) -> None:
        initialize(self.hosts)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        client = distributed.global_state.client
        code = error.code if isinstance(error, SystemExit) else 1
        if error is None or client is None or code in (None, 0, STOPPED):
            return
        try:
            client.wait_at_barrier("failing", _FAILING_S * 1000)
        except jax.errors.JaxRuntimeError:
            if isinstance(code, str):
                print(code, file=sys.stderr)
            elif not isinstance(error, SystemExit):
                traceback.print_exception(kind, error, trace)
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code if isinstance(code, int) else 1)


def agree(facts: Mapping[str, Any]) -> None:
    """Returns when every process has said the same; all must ask equally often.

    It goes through the coordinator, not through devices: processes that differ may be unable to compute
    together, and a collective would wait for ever. Waiting is told, once a minute.

    Args:
      facts: nested dicts of what JSON can hold.

    Raises:
      ValueError: on every process, naming what differs and on which of them.
    """
    state, call = distributed.global_state, next(_calls)
    if state.client is None:
        return
    key = lambda name: f"agree/{call}/{name}"
    state.client.key_value_set(key(state.process_id), json.dumps(facts))
    if state.process_id == 0:
        said = [json.loads(_wait_for(key(i), i)) for i in range(state.num_processes)]
        state.client.key_value_set(key("verdict"), "\n".join(_differences(said)))
    if verdict := _wait_for(key("verdict"), 0):
        raise ValueError(f"the processes do not agree:\n{verdict}")


def _wait_for(key: str, process: int) -> str:
    client = distributed.global_state.client
    assert client is not None
    while True:
        try:
            return client.blocking_key_value_get(key, _WAITING_S * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            log.warning(
                "waiting for process %d: it is alive but has not reached this point", process
            )


def _differences(said: list[dict[str, Any]]) -> list[str]:
    """One line for each fact that is not the same for all: `name: value on process 0; value on ...`."""
    flat = [flatten(facts) for facts in said]
    lines = []
    for name in dict.fromkeys(name for facts in flat for name in facts):
        holders: dict[str, list[int]] = {}
        for process, facts in enumerate(flat):
            holders.setdefault(repr(facts.get(name)), []).append(process)
        if len(holders) > 1:
            each = [f"{value} on {_processes(those)}" for value, those in holders.items()]
            lines.append(f"  {name}: {'; '.join(each)}")
    return lines


def _processes(numbers: list[int]) -> str:
    first = ", ".join(map(str, numbers[:8]))
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"process{'es' if len(numbers) > 1 else ''} {first}{more}"


def stop_on_signal() -> Callable[[int], bool]:
    """A `should_stop(step)` that turns true, on every host at the same step, after a SIGTERM or a SIGHUP.

    A SIGHUP says that the terminal was closed; nohup, which has it ignored, is left alone. With one process
    Ctrl-C does the same, once. All hosts must ask equally often.

    A process that was not asked yet, since its run began (`watched`), has nothing to save: it ends at once.
    If there are others, they end as after a death.
    """
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _hung_up)
    _stepping.clear()
    if jax.process_count() > 1:
        # jax.distributed has a SIGTERM handler of its own that agrees on a count to stop at. It must
        # never run backwards, as the steps of one row after another do.
        from jax.experimental import multihost_utils

        asked_before = itertools.count()
        _end_start_up_on_signal(_taken_over(signal.SIGTERM))

        def reached(_: int) -> bool:
            _stepping.set()
            return multihost_utils.reached_preemption_sync_point(next(asked_before))

        return reached
    asked = threading.Event()

    def stop(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means now

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    _end_start_up_on_signal(lambda: None)

    def should_stop(_: int) -> bool:
        _stepping.set()
        return asked.is_set()

    return should_stop


def _taken_over(number: int) -> Callable[[], None]:
    """Puts a handler of Python's in the place of one in C; returns what calls the one in C."""
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    address = libc.signal(number, None)
    signal.signal(number, lambda *_: None)
    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(address)
    return lambda: handler(number)


_watching: list[threading.Thread] = []


def _end_start_up_on_signal(terminate: Callable[[], None]) -> None:
    """Starts, once, the thread that ends the process when a signal comes before the first step.

    A handler of Python's would wait for the main thread, which may be in native code that never returns.

    Args:
      terminate: called for a SIGTERM that comes later.
    """
    if _watching:
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)

    def end() -> None:
        while received := os.read(read_end, 1):
            if received[0] in _STOPPING and not _stepping.is_set():
                log.warning("stopped during start-up or an evaluation; nothing new to save")
                leave(STOPPED)
            if received[0] == signal.SIGTERM:
                terminate()

    _watching.append(threading.Thread(target=end, daemon=True, name="signals"))
    _watching[0].start()


def _hung_up(*_: object) -> None:
    """Stops like a SIGTERM; what would be written to a terminal that is gone goes nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        try:
            termios.tcgetattr(stream)
        except termios.error as error:
            if error.args[0] == errno.EIO:  # of a terminal that was closed
                os.dup2(nowhere, stream)
    os.close(nowhere)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def watched(
    should_stop: Callable[[int], bool], step_timeout: float
) -> Iterator[Callable[[int], bool]]:
    """`should_stop`, and the end of one of several processes that stops asking it.

    Heartbeats do not see a process whose Python waits for ever, say for storage; then all others wait for it,
    alive too. This counts from the first step until the with statement is left. If a process has not asked
    for `step_timeout` seconds, it prints the stacks of its threads and exits with code 1.
    """
    _stepping.clear()  # another run of the same process starts up too
    if jax.process_count() == 1:
        yield should_stop
        return

    def ask(step: int) -> bool:
        faulthandler.dump_traceback_later(step_timeout, exit=True)  # replaces the one before
        return should_stop(step)

    try:
        yield ask
    finally:
        faulthandler.cancel_dump_traceback_later()
