"""One contestant of a benchmark: a process that works when asked and is idle otherwise.

Two frameworks in one process fight over its threads, so each lives in its own. Parent and child talk
in lines of JSON over stdin and stdout: the child reads its specification, answers with a description
of itself once it has compiled, and then answers each `{"steps": n}` with the seconds it took.

Standard library only: the child may run in an environment that has one framework and not the other.
"""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Contestant:
    """What a child offers: n more steps, which return once their results exist, and who it is."""

    run: Callable[[int], float]  # number of steps -> loss of the last one
    about: dict[str, Any]


def serve(make: Callable[[dict[str, Any]], Contestant]) -> None:
    """The child's side: makes the contestant asked for and runs its steps until stdin closes."""
    # Libraries print to stdout; from here on that is stderr, and the answers have a pipe of their own.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = json.loads(sys.stdin.readline())
    # Both frameworks look at the affinity when they size their thread pools.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: spec["threads"]])
    contestant = make(spec)
    print(json.dumps(contestant.about), file=answers)
    for line in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        loss = contestant.run(json.loads(line)["steps"])
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        answer = {"seconds": seconds, "cpu_seconds": cpu_seconds, "loss": loss}
        print(json.dumps(answer), file=answers)


class Child:
    """The parent's side of one contestant."""

    def __init__(self, python: str, script: Path, spec: dict[str, Any], huge_pages: bool = False):
        threads = str(spec["threads"])
        # NPROC sizes XLA's thread pools, OMP_NUM_THREADS those of torch.
        environment = os.environ | {"NPROC": threads, "OMP_NUM_THREADS": threads}
        if huge_pages:
            environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        self.process = subprocess.Popen(
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env=environment,
        )
        self.about = self._ask(spec)

    def run(self, steps: int) -> dict[str, float]:
        return self._ask({"steps": steps})

    def close(self) -> None:
        """Ends the child by closing its stdin."""
        assert self.process.stdin is not None
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
            raise SystemExit(
                f"a contestant of the benchmark ended with status {self.process.wait()}; its own "
                "words are above"
            )
        return json.loads(answer)
