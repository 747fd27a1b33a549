"""An xprof trace of some steps, for `xprof` or TensorBoard.

Only process 0 traces: jax asks for no more, every process runs the same program, and processes of one
machine would write the same file. A slower host shows as time that process 0 waits in a collective.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax

StepFn = Callable[[Any, Any], tuple[Any, Any]]


@contextlib.contextmanager
def traced(
    step_fn: StepFn, steps: range, start_step: int, last_step: int, directory: os.PathLike[str]
) -> Iterator[StepFn]:
    """Gives the step of a run, with its calls for `steps` traced, each marked as a step.

    The trace begins when the steps before are over and ends when its own are, or with the context.

    Args:
      step_fn: (state, batch) to (state, metrics).
      steps: the updates to trace, counted from 1; those that the run does not do are left out.
      start_step: updates done before the first call.
      last_step: the last update of the run.
      directory: where the trace goes; what is not local must be known to jax's profiler.
    """
    steps = range(max(steps.start, start_step + 1), min(steps.stop, last_step + 1))
    if not steps or jax.process_index() != 0:
        yield step_fn
        return
    numbers = itertools.count(start_step + 1)
    running = contextlib.ExitStack()

    def step(state: Any, batch: Any) -> tuple[Any, Any]:
        number = next(numbers)
        if number not in steps:
            return step_fn(state, batch)
        if number == steps[0]:
            jax.block_until_ready(state)
            running.enter_context(jax.profiler.trace(os.fspath(directory)))
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            done = step_fn(state, batch)
        if number == steps[-1]:
            jax.block_until_ready(done)
            running.close()
        return done

    with running:
        yield step
