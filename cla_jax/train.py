"""The loop of training: restore, step, log, save and evaluate, until the end of the run or a stop."""

import contextlib
import dataclasses
import hashlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from cla_jax import checkpoint, goodput, machine, profiler, runs, start, uptrain
from cla_jax.config import Config, FromRun
from cla_jax.data.prepare import Corpus, changes
from cla_jax.logger import Diverged, log_data, log_start, logging_to
from cla_jax.model.transformer import Transformer
from cla_jax.recorder import (
    Evaluator,
    evaluated_steps,
    evaluation_is_missing,
    is_complete,
    is_due,
    newest_checkpoint,
    recording,
)
from cla_jax.runs import Run
from cla_jax.session import Session, batch_stream, prepare_session
from cla_jax.state import State, initial_state
from cla_jax.step import StepFn, compile_step, memory_errors

log = logging.getLogger(__name__)


def train(
    config: Config,
    *,
    evaluate: Evaluator,
    should_stop: Callable[[int], bool] = lambda step: False,
    stop_waiting: Callable[[], bool] = lambda: False,
    clock: goodput.Clock | None = None,
    agree: Callable[[Mapping[str, Any]], None] = lambda facts: None,
) -> bool:
    """Trains a run to its end, from its newest checkpoint if it has one.

    Args:
      config: the run.
      evaluate: called every `placement.eval_every` steps and at the end.
      should_stop: asked after every step with its number; on all hosts it must answer alike.
      stop_waiting: asked while a batch is waited for; true only if no other host waits for this one.
      clock: records where the time of this process goes; by default one that starts now.
      agree: called before the hosts compute together, with what must be the same on all of them. It raises
        ValueError on all of them if it is not.

    Returns:
      Whether the run is complete; False if it was stopped, after saving.

    Raises:
      ValueError: the config, data, run directory or checkpoints do not allow it.
      Diverged: a loss or gradient was not finite.
    """
    clock = clock or goodput.Clock()
    session = prepare_together(config, agree)
    with opened(session) as run, jax.set_mesh(session.mesh), memory_errors(config):
        if is_complete(run, config):
            log.info("%s is already complete, at step %d", run.path, config.steps)
            return True
        state, compiled = restore_and_compile(session, run, clock, agree)
        start_step, profiled = int(state.step), config.placement.profiled_steps
        with (
            contextlib.closing(batch_stream(session, start_step, stop_waiting)) as batches,
            recording(session, run, start_step, evaluate, clock) as recorder,
            profiler.traced(compiled, profiled, start_step, config.steps, run.profile) as step_fn,
        ):
            if evaluation_is_missing(run, config, start_step):
                log.info("step %d was saved but not evaluated; evaluating it now", start_step)
                recorder.evaluate(start_step, state.model)
            clock.switch("step")
            for step in range(start_step + 1, config.steps + 1):
                with clock.timed("data_wait"):
                    batch = next(batches, None)
                if batch is None:  # asked to stop while it was read
                    recorder.save(step - 1, state)
                    log.warning("stopped on request; the run can be resumed from step %d", step - 1)
                    return False
                state, metrics = step_fn(state, batch)
                recorder.log(step, metrics)
                last, stop = step == config.steps, should_stop(step)
                evaluation_due = not last and is_due(step, config.placement.eval_every)
                # Before an evaluation too: one that fails must not lose training.
                if last or stop or evaluation_due or is_due(step, config.placement.save_every):
                    recorder.save(step, state)
                if stop and not last:
                    log.warning(
                        "stopped on request; step %d is saved and the run can be resumed", step
                    )
                    return False
                if evaluation_due:
                    recorder.evaluate(step, state.model)
            recorder.evaluate(config.steps, state.model)
    return True


def prepare_together(config: Config, agree: Callable[[Mapping[str, Any]], None]) -> Session:
    """The session of a run, once all hosts agree on its config, its data and where it goes on."""
    _check_teacher(config)
    agree({"config": shared_fields(config)})  # before devices are used: the mesh is a part
    session = prepare_session(config, own_tokenizer(config))
    agree(
        {
            "data": data_record(session.prepared),
            "newest checkpoint": newest_checkpoint(config),
            "evaluated steps": evaluated_steps(Run(runs.run_path(config))),
        }
    )
    return session


def restore_and_compile(
    session: Session, run: Run, clock: goodput.Clock, agree: Callable[[Mapping[str, Any]], None]
) -> tuple[State, StepFn]:
    """The state that a run goes on from, and its step, compiled while the state is read or made."""
    threads = ThreadPoolExecutor(1, thread_name_prefix=machine.COMPILER)
    compiling = threads.submit(compile_step, session)
    threads.shutdown(wait=False)  # an error below is raised at once, not after the compilation
    state = restore_or_init(session, run)
    start_step = int(state.step)
    log_start(session, run, start_step)
    log_data(session)
    teaching = load_teacher(session)
    with clock.timed("compile"):
        compiled = compiling.result()
        # Hosts compile for different times, but gloo waits only 30 s at the first collective.
        agree({"start step": start_step})
    return state, lambda state, batch: compiled(state, batch, *teaching)


def shared_fields(config: Config) -> dict[str, Any]:
    """The fields that must be the same on every host: all but the place of the prepared data."""
    fields = dataclasses.asdict(config)
    del fields["placement"]["data_dir"]  # a local directory; what is in it is compared
    return fields


def data_record(prepared: Corpus) -> dict[str, Any]:
    """What two hosts' prepared data have in common if they are the same."""
    tokenizer = hashlib.sha256(prepared.tokenizer.to_json().encode()).hexdigest()
    return {"fingerprint": prepared.fingerprint, "tokenizer": tokenizer, **prepared.totals}


def restore_or_init(session: Session, run: Run) -> State:
    """The state of the newest checkpoint, or a first one; a model alone gets fresh moments."""
    checkpoint.report_missing_records(run)
    state = checkpoint.restore_latest(run.checkpoints, session.state, run.owner)
    if state is not None and state.moments:
        return state
    model = state and state.model
    if model is None and isinstance(session.config.start, FromRun):
        text = uptrain.Text(session.prepared, session.end, session.begins)
        layouts = jax.tree.map(lambda leaf: leaf.sharding, session.state.model)
        model = jax.device_put(uptrain.first_model(session.config, text), layouts)
    fresh = initial_state(session.config, session.optimizer, session.state)
    return fresh if model is None else dataclasses.replace(fresh, model=model)


def _check_teacher(config: Config) -> None:
    """Raises ValueError for a teacher that might change until the next start."""
    given = config.start
    if isinstance(given, FromRun) and given.distill_weight and not given.checkpoint:
        raise ValueError(
            "start.checkpoint is empty, but start.distill_weight needs the same teacher at every start: make "
            "the run with `python -m launch.convert uptrain`, which sets start.checkpoint"
        )


def load_teacher(session: Session) -> tuple[Transformer, ...]:
    """The model of the run's teacher, if it has one."""
    if session.teacher is None:
        return ()
    given = session.config.start
    assert isinstance(given, FromRun)
    uptrain.check_tokenizers(start.source(given), session.prepared)
    return (uptrain.load(given, session.teacher.options.rules, session.mesh),)


def own_tokenizer(config: Config) -> str | None:
    """The run's copy of a tokenizer that was a file and is not there; None where there is no such copy."""
    named, run = config.data.tokenizer, Run(runs.run_path(config))
    is_missing = named.endswith(".json") and not os.path.exists(named)
    return run.tokenizer_json() if is_missing and run.has_begun else None


@contextlib.contextmanager
def opened(session: Session) -> Iterator[Run]:
    """The run's directory, kept from other processes; the log is copied into it."""
    # One process holds the lock for all hosts, and it alone writes; before that, nothing is written.
    path, writes = runs.run_path(session.config), jax.process_index() == 0
    data, data_dir = session.config.data, session.config.placement.data_dir
    tokenizer_json = session.prepared.tokenizer.to_json()
    with runs.locked(path) if writes else contextlib.nullcontext():
        run = runs.open_run(
            session.config,
            write=writes,
            data_fingerprint=session.prepared.fingerprint,
            tokenizer_json=tokenizer_json,
            changes=lambda earlier: changes(data, data_dir, earlier, tokenizer_json),
        )
        try:
            with logging_to(run):
                yield run
        except Diverged:
            raise  # divergence is a result: the run keeps its directory
        except BaseException:
            if writes:  # frees the name if no step was made
                runs.forget_unless_begun(run)
            raise
