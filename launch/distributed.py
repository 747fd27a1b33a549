"""Several hosts: starting jax.distributed, and stopping all of them at the same step."""

import itertools
import logging
import os
import signal
import threading
from collections.abc import Callable, Mapping

import jax

log = logging.getLogger("cla_jax.launch")

STOPPED = 42  # exit code of a run that was asked to stop and has saved


def wanted(environment: Mapping[str, str]) -> bool:
    """Whether the environment describes more than one process."""
    several = lambda name: (
        environment.get(name, "1").isdigit() and int(environment.get(name, "1")) > 1
    )
    return (
        "JAX_COORDINATOR_ADDRESS" in environment
        or (several("SLURM_NTASKS") and "SLURM_PROCID" in environment)
        or several("OMPI_COMM_WORLD_SIZE")
        or len(environment.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1
    )


def initialize() -> None:
    """Joins the other processes, if the environment names any; before the first use of a device.

    SLURM, Open MPI and Cloud TPU are recognised by jax itself; otherwise set JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID.
    """
    if not wanted(os.environ):
        return
    count, own = os.environ.get("JAX_NUM_PROCESSES"), os.environ.get("JAX_PROCESS_ID")
    jax.distributed.initialize(
        coordinator_address=os.environ.get("JAX_COORDINATOR_ADDRESS"),
        num_processes=None if count is None else int(count),
        process_id=None if own is None else int(own),
    )
    log.info("process %d of %d", jax.process_index(), jax.process_count())


def stop_on_signal() -> Callable[[int], bool]:
    """A `should_stop(step)` that turns true, on every host at the same step, after a SIGTERM.

    With one process Ctrl-C does the same, once. All hosts must ask equally often.
    """
    if jax.process_count() > 1:
        # jax.distributed has a SIGTERM handler of its own that agrees on a count to stop at. It must
        # never run backwards, as the steps of one row after another do.
        from jax.experimental import multihost_utils

        asked_before = itertools.count()
        return lambda step: multihost_utils.reached_preemption_sync_point(next(asked_before))
    asked = threading.Event()

    def stop(*_: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C means now

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    return lambda step: asked.is_set()
