"""What every engine starts for a trial: attempts until it is complete, stopped or given up."""

import collections
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO, Annotated, Any

import tyro
from etils import epath

from cla_jax import files
from cla_jax.directories import open_plain
from cla_jax.runs import saved_steps
from launch.sweeps import records
from launch.sweeps.records import Record
from launch.sweeps.retry import AGAIN, COMPLETE, FAILED, BadEnd, judge, seconds_before_restart

_TRAIN = (sys.executable, "-m", "launch.train")
# Where engines say which host of a trial this is.
_HOST_NUMBERS = (
    "SLURM_PROCID",
    "JOB_COMPLETION_INDEX",
    "TPU_WORKER_ID",
    "MEGASCALE_SLICE_ID",
    "SKYPILOT_NODE_RANK",
    "OMPI_COMM_WORLD_RANK",
    "JAX_PROCESS_ID",
)
_ERROR_LINE = re.compile(r"(error: |diverged: |[A-Za-z_][\w.]*(Error|Exception|Interrupt)\b)")
_ERROR_LINES = 12


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # The sweep's directory and the trial's name.
    trial: Annotated[
        tuple[str, str], tyro.conf.Positional, tyro.conf.arg(metavar="RUNS/SWEEP TRIAL")
    ]
    # Give up after this many failures in a row without a new checkpoint.
    failures: int = 3
    # Give up after this many preemptions in a row without a new checkpoint.
    preemptions: int = 100
    # Seconds until a failed trial is started again; doubled after each further failure, up to a minute.
    delay: float = 5.0
    # Number of hosts of the trial.
    hosts: int = 1
    # Number of this host, from 0, if no environment variable has it.
    host: int = 0
    # CPU cores to use, such as 0,1,2; empty for all that are allowed.
    cores: str = ""


class Runner:
    """One process's work on a trial: attempts until it is complete, stopped or given up."""

    def __init__(self, arguments: Arguments):
        self.arguments = arguments
        self.record = Record(epath.Path(arguments.trial[0]), arguments.trial[1])
        self.config = self.record.config()
        numbers = [arguments.host, *(int(os.environ.get(name) or 0) for name in _HOST_NUMBERS)]
        # A trial of one host may run on any host of something larger.
        self.number = next((n for n in numbers if n), 0) if arguments.hosts > 1 else 0
        self.leader = self.number == 0
        self.state = self.record.state()
        self.child: subprocess.Popen | None = None
        self.stopping = False

    @property
    def complete(self) -> bool:
        return records.result(self.record.run, self.config.steps) is not None

    @property
    def progress(self) -> int:
        return max(saved_steps(self.record.run.checkpoints), default=0)

    def stop(self, *_: object) -> None:
        """Asks training to save and to end; it may have been asked itself, which does no harm."""
        self.stopping = True
        if self.child is not None and self.child.poll() is None:
            self.child.terminate()

    def run(self, lock: Sequence[int]) -> int:
        """Attempts; returns the exit code. The lock is held until training has ended too."""
        if self.state.status == "running":
            self._count(AGAIN)  # the runner died without a word: a preemption
        while True:
            if self.record.is_cancelled:
                return self._end("stopped", FAILED, "is cancelled")
            if self.complete:
                return self._end("done", COMPLETE, "is complete")
            if self.state.status == "failed":
                return self._end("failed", FAILED, f"failed before: {self.state.error}")
            if self.stopping:
                return self._end("stopped", AGAIN, "is stopped")
            code, error = self._attempt(lock)
            if code == 0 and self.complete:
                continue
            again = self._judge(code, error)
            if again is not None:
                return again
            # Not while it could be told to stop.
            until = time.monotonic() + seconds_before_restart(self.state, self.arguments.delay)
            while time.monotonic() < until and not self.stopping:
                time.sleep(0.1)

    def _attempt(self, lock: Sequence[int]) -> tuple[int, str]:
        """Trains; the exit code and the last error."""
        self._save(status="running", attempts=self.state.attempts + 1)
        command = [*_TRAIN, os.fspath(self.record.trial)]
        with self._output() as (out, tail):
            self.child = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, pass_fds=lock
            )
            if self.stopping:
                self.child.terminate()
            reader = _Reader(self.child.stdout) if self.child.stdout else None
            while True:
                try:
                    code = self.child.wait(timeout=records.HEARTBEAT_S)
                    break
                except subprocess.TimeoutExpired:
                    self._save()
                    if self.record.is_cancelled:
                        self.stop()
            lines = reader.lines() if reader else tail()
        error = last_error(lines, code)
        fault = files.write_fault(self.record.path) if code and self.record.is_local else ""
        return code, f"{error}; {fault}" if fault else error

    @contextlib.contextmanager
    def _output(self) -> Iterator[tuple[Any, Any]]:
        """Where training prints to, and its last lines; a remote directory cannot be appended to."""
        if not self.record.is_local:
            yield subprocess.PIPE, list
            return
        log = self.record.log if self.leader else self.record.path / f"log-{self.number}.txt"
        with open_plain(log, "ab") as out:
            start = out.tell()

            def tail() -> list[str]:
                with files.opened(log, links=False) as written:
                    written.seek(max(start, written.seek(0, os.SEEK_END) - (1 << 16)))
                    return written.read(1 << 17).decode(errors="replace").splitlines()

            yield out, tail

    def _judge(self, code: int, error: str) -> int | None:
        """Counts a bad end; the exit code, or None to try again here."""
        end = self._count(code, error)
        if end.preempted and self.record.is_cancelled:
            return self._end("stopped", FAILED, "is cancelled")
        if self.state.status == "failed":
            return self._end("failed", FAILED, f"failed: {self.state.error}")
        if end.preempted:
            return self._end("stopped", AGAIN, "is stopped")
        print(f"{self.record.name} failed and will be started again: {error}", flush=True)
        return AGAIN if end.several else None

    def _count(self, code: int, error: str = "") -> BadEnd:
        """One more preemption or failure, in the trial's record."""
        arguments = self.arguments
        end = BadEnd(
            code=code,
            error=error,
            several=arguments.hosts > 1,
            stopped=self.stopping,
            progress=self.progress,
        )
        limits = {"failures": arguments.failures, "preemptions": arguments.preemptions}
        self.state = judge(self.state, end, **limits)
        self._save()
        return end

    def _save(self, **changes: Any) -> None:
        here = {"host": socket.gethostname(), "pid": os.getpid(), "updated": time.time()}
        self.state = dataclasses.replace(self.state, **here, **changes)
        if not self.leader:
            return
        try:
            self.record.write_state(self.state)
        except OSError as error:  # a full disk must not end training, which may find room again
            print(
                f"{self.record.path}: the state cannot be written: {error}",
                file=sys.stderr,
                flush=True,
            )

    def _end(self, status: records.Status, code: int, words: str) -> int:
        self._save(status=status)
        print(f"{self.record.name} {words}", flush=True)
        return code


class _Reader:
    """Passes on what a child prints, and keeps its last lines."""

    def __init__(self, stream: IO[bytes]):
        import threading

        self.kept: collections.deque[str] = collections.deque(maxlen=200)
        self.thread = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self.thread.start()

    def _read(self, stream: IO[bytes]) -> None:
        for line in stream:
            text = line.decode(errors="replace").rstrip("\n")
            print(text, flush=True)
            self.kept.append(text)

    def lines(self) -> list[str]:
        self.thread.join(timeout=10)
        return list(self.kept)


def last_error(lines: Sequence[str], code: int) -> str:
    """What went wrong, from the last lines that were printed and the exit code."""
    signals = {-number: name for name, number in signal.Signals.__members__.items()}
    how = f"killed by {signals[code]}" if code in signals else f"exit code {code}"
    if code == -signal.SIGKILL:
        how += " (the system kills processes when memory runs out)"
    starts = [i for i, line in enumerate(lines) if _ERROR_LINE.match(line)]
    if code > 0 and starts:
        return "\n".join(lines[starts[-1] :][:_ERROR_LINES]).strip()
    said = [line for line in lines if line.strip()]
    return f"{how}; the last line was: {said[-1].strip()}" if said else how
