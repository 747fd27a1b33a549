"""Writes the metrics, checkpoints and evaluations of a run as it trains, and finds what is there."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cla_jax import checkpoint, goodput, runs
from cla_jax.config import Config
from cla_jax.logger import StepLogger, log_time
from cla_jax.model.transformer import Transformer
from cla_jax.runs import Run
from cla_jax.session import Session
from cla_jax.state import State
from cla_jax.writers import CompositeWriter, make_writer

log = logging.getLogger(__name__)

# Held-out metrics of a model, as a flat dict of numbers, `held_out_loss` among them. What stands under
# `record` is kept as eval/training.json beside them.
Evaluator = Callable[[Session, Transformer], dict[str, Any]]


class Recorder:
    """Writes the metrics, checkpoint and evaluation of a step, in that order."""

    def __init__(
        self,
        session: Session,
        run: Run,
        start_step: int,
        evaluator: Evaluator,
        writer: CompositeWriter,
        clock: goodput.Clock,
    ):
        config = session.config
        self.session, self.run, self.evaluator, self.writer = session, run, evaluator, writer
        self.saved = start_step
        self.saver = checkpoint.Checkpointer(
            run.checkpoints, config.placement.keep, run.owner, writer.note_saved
        )
        self.logger = StepLogger(config, writer, start_step, clock, session.epochs)

    def log(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Hands in the metrics of a step; they are written when the next one is under way."""
        self.logger.record(step, metrics)

    def save(self, step: int, state: State) -> None:
        """Saves the state after a step, unless it is saved. Raises Diverged if the step was not finite."""
        if step > self.saved:
            self.logger.flush()
            with self.logger.timed("checkpoint"):
                self.saver.save(state)
            self.saved = step

    def evaluate(self, step: int, model: Transformer) -> None:
        """Evaluates the model after a step, and writes its record and its metrics."""
        with self.logger.timed("evaluation"):
            metrics = self.evaluator(self.session, model)
            record = metrics.pop("record", None)
            # First: a run whose metrics say that it was evaluated has the record.
            if record and jax.process_index() == 0:
                self.run.write_eval(runs.TRAINING, record | {"step": step})
                metrics[runs.RECORDED] = step
            self.writer.write(step, metrics)


@contextlib.contextmanager
def recording(
    session: Session, run: Run, start_step: int, evaluator: Evaluator, clock: goodput.Clock
) -> Iterator[Recorder]:
    """Records a run that goes on from `start_step`; at the end it waits until all is written."""
    clock.carry_on(goodput.earlier(earlier_records(run), start_step))
    with contextlib.ExitStack() as stack:
        stack.callback(log_time, clock)  # after the writer is closed, and its progress bar gone
        process = jax.process_index()
        writer = make_writer(run, session.config, process_index=process, start_step=start_step)
        stack.callback(writer.close)
        recorder = Recorder(session, run, start_step, evaluator, writer, clock)
        stack.callback(recorder.logger.timed("checkpoint")(recorder.saver.close))
        writer.note_saved(start_step)  # later checkpoints may have been set aside
        recorder.logger.write_time_summary()
        yield recorder


def newest_checkpoint(config: Config) -> int | None:
    """The step from which a run would go on: hosts whose directories are not one file system differ."""
    steps = checkpoint.steps(runs.run_path(config) / "checkpoints")
    return steps[-1] if steps else None


def earlier_records(run: Run) -> list[dict[str, Any]]:
    """The metrics so far. Warnings name altered lines, and a last line that is not complete."""
    problems: list[str] = []
    torn_end: list[str] = []
    records = list(run.read_records(problems, torn_end))
    for words in torn_end:
        log.warning("%s", words)
    for problem in problems[:5]:
        log.warning("%s", problem)
    if len(problems) > 5:
        log.warning("%s: and %d more such problems", run.metrics, len(problems) - 5)
    return records


def is_complete(run: Run, config: Config) -> bool:
    """Whether there is nothing left to do: known without compiling, or reading, the state."""
    newest = newest_checkpoint(config)
    if newest is None or newest < config.steps or not is_evaluated(run, config.steps):
        return False
    return checkpoint.verify(run.checkpoints / f"{newest:08d}", owner=run.owner) is None


def evaluated_steps(run: Run) -> list[int]:
    """The steps that were evaluated, with their file: the hosts have to agree on what is missing."""
    lost = run.missing_records().evaluation
    return [
        record["step"]
        for record in run.read_metrics()
        if "held_out_loss" in record and record["step"] != lost
    ]


def evaluation_is_missing(run: Run, config: Config, step: int) -> bool:
    """Whether a process was killed between the checkpoint of a step and its evaluation."""
    due = 0 < step < config.steps and is_due(step, config.placement.eval_every)
    return due and not is_evaluated(run, step)


def is_evaluated(run: Run, step: int) -> bool:
    """Whether the metrics hold an evaluation of this step: a kill may have come between."""
    return step in evaluated_steps(run)


def is_due(step: int, every: int) -> bool:
    """Whether what is done every so many steps, or never for 0, is done after this one."""
    return every > 0 and step % every == 0
