"""One contestant of a benchmark: a process that works when asked and is idle otherwise.

Two frameworks in one process fight over its threads, so each lives in its own. Parent and child talk in lines
of JSON over stdin and stdout. The child reads its specification, and describes itself once it has compiled.
Then it answers each `{"burst": n}` with the seconds it took and what else it has to say. An exception is an
answer too, the last one: `{"error": words}`.

Standard library only: the child may run in an environment that has one framework and not the other.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What a child offers: bursts of work, which return once their results exist, and who it is."""

    # How much, training steps or new tokens -> more to answer.
    run: Callable[[int], dict[str, Any]]
    about: dict[str, Any]


class ContestantEnded(SystemExit):
    """A contestant failed. Who does not care to go on without it need not catch this."""


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages, for `Contestant.about`."""
    return {name: importlib.metadata.version(name) for name in packages}


def serve(make: Callable[[dict[str, Any]], Contestant]) -> None:
    """The child's side: makes the contestant asked for and runs its bursts until stdin closes."""
    # Libraries print to stdout; from here on that is stderr, and the answers have a pipe of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = json.loads(sys.stdin.readline())
    # Both frameworks look at the affinity when they size their thread pools.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    if "memory" in spec:  # an allocation beyond it fails here, before the system kills somebody
        resource.setrlimit(resource.RLIMIT_DATA, (spec["memory"], resource.RLIM_INFINITY))
    try:
        contestant = make(spec)
        print(json.dumps(contestant.about), file=answers)
        for line in sys.stdin:
            start, start_cpu = time.perf_counter(), time.process_time()
            more = contestant.run(json.loads(line)["burst"])
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
            answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, **more}
            print(json.dumps(answer), file=answers)
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())
        print(json.dumps({"error": words[:400]}), file=answers)
        raise


class Child:
    """The parent's side of one contestant. Its methods raise ContestantEnded if that fails."""

    def __init__(self, python: str, script: Path, spec: dict[str, Any], huge_pages: bool = False):
        threads = str(spec["threads"])
        # NPROC sizes XLA's thread pools, OMP_NUM_THREADS those of torch.
        environment = os.environ | {"NPROC": threads, "OMP_NUM_THREADS": threads}
        if huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        self.script = script
        self.process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        self.about = self._ask(spec)

    def run(self, burst: int) -> dict[str, Any]:
        return self._ask({"burst": burst})

    def close(self) -> None:
        """Ends the child by closing its stdin."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it may have ended by itself
            self.process.stdin.close()
        self.process.wait()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(json.dumps(question), file=self.process.stdin)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            raise ContestantEnded(
                f"{self.script.name} ended with status {self.process.wait()}; its own words are "
                "above"
            )
        reply = json.loads(answer)
        if "error" in reply:
            self.process.wait()
            raise ContestantEnded(reply["error"])
        return reply
