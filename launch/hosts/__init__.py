"""Flags that say which of several processes this one is; nothing here waits for jax."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import NoReturn

from cla_jax.typed_numbers import is_digits, whole_number

# Variables of those who start several processes.
_SEVERAL = (
    *("JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "OMPI_COMM_WORLD_SIZE", "JOB_COMPLETION_INDEX"),
    *("TPU_WORKER_HOSTNAMES", "TPU_WORKER_ID", "MEGASCALE_NUM_SLICES"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hosts:
    """The processes of a run, one a host. Without a coordinator the environment is asked for them."""

    # host:port of process 0, which coordinates.
    coordinator: str | None = None
    processes: int | None = None
    # Which of them this is, from 0.
    process_id: int | None = None
    # Seconds without a sign of life after which a process counts as dead and ends the others.
    peer_timeout: int = 100
    # Seconds that a step may take, with the evaluation and checkpoint beside it.
    step_timeout: int = 3600

    def __post_init__(self):
        together = {
            "--coordinator": self.coordinator,
            "--processes": self.processes,
            "--process-id": self.process_id,
        }
        missing = [flag for flag, value in together.items() if value is None]
        if 0 < len(missing) < len(together):
            raise ValueError(
                f"give all of {', '.join(together)}, or none: {' and '.join(missing)} missing"
            )
        if self.coordinator is not None:
            host, _, port = self.coordinator.rpartition(":")
            if not host or not is_digits(port):
                raise ValueError(f"--coordinator {self.coordinator!r} must be HOST:PORT")
        if self.processes is not None and self.processes < 1:
            raise ValueError(f"--processes {self.processes} must be positive")
        if self.process_id is not None and not 0 <= self.process_id < (self.processes or 0):
            raise ValueError(
                f"--process-id {self.process_id} must lie in 0 to --processes - 1 = "
                f"{(self.processes or 0) - 1}"
            )
        for flag, seconds in (
            ("--peer-timeout", self.peer_timeout),
            ("--step-timeout", self.step_timeout),
        ):
            if seconds < 1:
                raise ValueError(f"{flag} {seconds} must be at least 1 second")


def parse(argv: Sequence[str]) -> tuple[Hosts, list[str]]:
    """The processes that the flags of a command line describe, and the rest of the command line.

    Raises ValueError for flags that do not fit together.
    """
    flags, rest = _parser().parse_known_args(argv)
    return Hosts(**vars(flags)), rest


def alone(hosts: Hosts) -> bool:
    """Whether neither flags nor the environment speak of further processes; jax is not asked."""
    return hosts.coordinator is None and not any(name in os.environ for name in _SEVERAL)


def flags() -> list[str]:
    """The flags that `parse` takes out of a command line."""
    return [f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Hosts)]


def usage() -> str:
    """What --help says about these flags."""
    return _parser().format_help().partition("\n\n")[2]  # without its own usage line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("argument ")
        raise ValueError(words.replace(": expected one argument", " needs a value"))


def _whole(text: str) -> int:
    try:
        return whole_number(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    flags = parser.add_argument_group(
        "Several processes",
        "Give all of the first three flags, or none. Without them, the processes are found through SLURM, "
        "Open MPI, Cloud TPU, Kubernetes, or the variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
        "JAX_PROCESS_ID.",
    )
    flags.add_argument(
        "--coordinator", metavar="HOST:PORT", help="the host of process 0, and any free port on it"
    )
    flags.add_argument("--processes", type=_whole, metavar="N", help="number of processes")
    flags.add_argument(
        "--process-id", type=_whole, metavar="I", help="number of this process, from 0"
    )
    flags.add_argument(
        "--peer-timeout",
        type=_whole,
        metavar="SECONDS",
        default=Hosts.peer_timeout,
        help="end all processes when one has not responded for this long (default: %(default)s)",
    )
    flags.add_argument(
        "--step-timeout",
        type=_whole,
        metavar="SECONDS",
        default=Hosts.step_timeout,
        help="end a process whose step takes longer than this, including its evaluation and checkpoint "
        "(default: %(default)s)",
    )
    return parser
