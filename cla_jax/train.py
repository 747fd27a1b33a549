"""The training loop: a pure step, a logger that reads its metrics one step late, checkpoints."""

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cla_jax import (
    budget,
    checkpoint,
    chips,
    costs,
    goodput,
    machine,
    profiler,
    runs,
    start,
    uptrain,
)
from cla_jax import mesh as meshes
from cla_jax.config import Config, FromRun, ModelConfig, OptimizerConfig, check_vocabulary
from cla_jax.data import mixture
from cla_jax.data.loader import PREFETCH, Batches
from cla_jax.data.prepare import Corpus, corpus
from cla_jax.loss import Distill, Taught, cross_entropy
from cla_jax.mesh import AxisRules
from cla_jax.messages import printable
from cla_jax.model.attention import choose_backend
from cla_jax.model.transformer import ForwardOptions, Transformer, document_starts, inputs_of
from cla_jax.optimizer import make_optimizer, schedule
from cla_jax.runs import Run
from cla_jax.state import State, abstract_state, initial_state, with_layout
from cla_jax.writers import CompositeWriter, make_writer

log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The loss or a gradient of a step was not finite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The run that teaches another one, on the same devices."""

    model: ModelConfig
    options: ForwardOptions
    distill: Distill


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """What a config becomes on given devices: enough to compile its step, for devices not at hand too."""

    config: Config
    mesh: Mesh
    options: ForwardOptions
    # The token that attention must not cross, if documents are kept apart.
    end: int | None
    # (end, begin): the model reads the second for the first, if texts have a begin token.
    begins: tuple[int, int] | None

    @property
    def rules(self) -> AxisRules:
        return self.options.rules

    @property
    def training(self) -> ForwardOptions:
        """How the step of training runs the model: where blocks are recomputed, what enters them is split."""
        # Under other policies, little that is kept is the residual stream.
        if self.options.remat not in ("block", "attention"):
            return self.options
        rules = meshes.sequence_parallel(self.rules, self.mesh, self.config.data.seq_len)
        return dataclasses.replace(self.options, rules=rules)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.config.optimizer, self.config.steps)

    @functools.cached_property
    def state(self) -> State:
        """Shapes, dtypes and layouts of the run's state."""
        return abstract_state(self.config, self.optimizer, self.rules, self.mesh)

    @functools.cached_property
    def teacher(self) -> Teacher | None:
        """How the run's teacher computes; None without one. Reads the config of that run."""
        given = self.config.start
        if not isinstance(given, FromRun) or not given.distill_weight:
            return None
        model = start.source(given).config().model
        rules = meshes.axis_rules(model, self.mesh)
        device = self.mesh.devices.flat[0]
        attention = choose_backend(
            self.config.placement.attention, model, self.config.data.seq_len, device
        )
        options = ForwardOptions(
            rules=rules, scan_layers=self.options.scan_layers, attention=attention
        )
        distill = Distill(given.distill_weight, given.distill_temperature)
        return Teacher(model=model, options=options, distill=distill)

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What a step is given, in shapes, dtypes and layouts: state, batch, and the teacher's model."""
        if self.teacher is None:
            return self.state, self.batch
        config = self.teacher.model
        shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
        return self.state, self.batch, with_layout(shapes, self.teacher.options.rules, self.mesh)

    @property
    def batch(self) -> jax.ShapeDtypeStruct:
        """Shape and layout of the batch of an update: int32 [A, B, T + 1]."""
        A = self.config.placement.accumulate
        shape = (A, self.config.batch_size // A, self.config.data.seq_len + 1)
        spec = PartitionSpec(None, *self.rules.partition("batch", None))
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=NamedSharding(self.mesh, spec))

    @property
    def eval_batch(self) -> int:
        """Rows evaluated at once: as many as asked for, or as the devices can share evenly."""
        shards = meshes.row_shards(self.mesh)
        return -(-self.config.placement.eval_batch_size // shards) * shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session(Layout):
    """A layout on the devices at hand, and the data."""

    prepared: Corpus

    @functools.cached_property
    def schedule(self) -> mixture.Schedule:
        """Which component of the data each training row comes from."""
        return mixture.schedule(self.config)

    def epochs(self, step: int) -> dict[str, float]:
        """How often the training windows of each component were seen after so many steps."""
        rows = self.schedule.counts(step * self.config.batch_size)
        windows = [part.totals["train"]["windows"] for part in self.prepared.parts.values()]
        return {
            name: seen / held
            for name, seen, held in zip(self.prepared.parts, rows, windows, strict=True)
        }


def plan_layout(config: Config, devices: Sequence[Any] | None = None) -> Layout:
    """Checks a config against devices, by default those at hand, before any array exists.

    Only the tokenizer knows the end and begin tokens: here they are 0, which compiles to the same program
    but for those constants. Raises ValueError where the mesh, the batch or a backend does not fit them.
    """
    placement, devices = config.placement, jax.devices() if devices is None else devices
    mesh_config = placement.mesh
    if mesh_config.auto:
        mesh_config, why = meshes.choose_mesh(config, devices)
        log.info("placement.mesh.auto: %s", why)
    mesh = meshes.make_mesh(mesh_config, devices)
    rules = meshes.axis_rules(config.model, mesh)
    meshes.check_batch(config, mesh)
    attention = choose_backend(placement.attention, config.model, config.data.seq_len, devices[0])
    options = ForwardOptions(
        rules=rules,
        remat=placement.remat,
        scan_layers=placement.scan_layers,
        attention=attention,
    )
    end = None if config.data.attend_across_documents else 0
    begins = (0, 0) if config.data.begin_token else None
    return Layout(config=config, mesh=mesh, options=options, end=end, begins=begins)


def prepare_session(config: Config, tokenizer_json: str | None = None) -> Session:
    """Checks the config against devices and data; prepares the data if need be.

    `tokenizer_json`, if given, stands for the file that `data.tokenizer` names.
    """
    layout = plan_layout(config)  # before the data, which take long
    prepared = corpus(config.data, config.placement.data_dir, tokenizer_json=tokenizer_json)
    check_vocabulary(prepared.tokenizer.size, config.model, config.data.tokenizer)
    tokenizer = prepared.tokenizer
    end = None if layout.end is None else tokenizer.end
    begins = layout.begins and (tokenizer.end, tokenizer.begin(config.data.begin_token))
    return Session(
        config=config,
        mesh=layout.mesh,
        options=layout.options,
        end=end,
        begins=begins,
        prepared=prepared,
    )


# ----------------------------------------------------------------------------------------- step


def loss_sum(
    model: Transformer,
    tokens_BT1: jax.Array,
    weights_BT: jax.Array,
    *,
    options: ForwardOptions,
    end: int | None,
    begins: tuple[int, int] | None = None,
    loss_chunk: int,
    teaching: Transformer | None = None,
    teacher: Teacher | None = None,
) -> jax.Array:
    """Summed negative log-likelihood in nats of the targets of windows of T + 1 tokens.

    With the model of a teacher, `teaching`, it is a mean of that and of the distance to the teacher.
    """
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    starts_BT = None if end is None else document_starts(inputs_BT, end)
    read_BT = inputs_of(inputs_BT, begins)
    x_BTD = model(read_BT, options, starts_BT)
    chunk = min(loss_chunk, inputs_BT.shape[1])
    taught = None
    if teaching is not None and teacher is not None:
        with jax.named_scope("teacher"):
            taught = Taught(teaching(read_BT, teacher.options, starts_BT), teaching.head_VD)
    distill = teacher.distill if teacher else None
    with jax.named_scope("loss"):
        return cross_entropy(
            x_BTD, model.head_VD, targets_BT, weights_BT, chunk, options.rules, taught, distill
        )


def train_step(
    state: State,
    tokens_ABT1: jax.Array,
    teaching: Transformer | None = None,
    *,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    options: ForwardOptions,
    end: int | None,
    begins: tuple[int, int] | None = None,
    loss_chunk: int,
    teacher: Teacher | None = None,
) -> tuple[State, dict[str, jax.Array]]:
    """One update from A microbatches of B windows; a pure function of (state, batch).

    Gradients are accumulated in float32; their norm is taken before clipping.
    """
    A, B, T1 = tokens_ABT1.shape

    def mean_loss(model: Transformer, tokens_BT1: jax.Array) -> jax.Array:
        weights_BT = jnp.ones_like(tokens_BT1[:, 1:], jnp.float32)
        total = loss_sum(
            model,
            tokens_BT1,
            weights_BT,
            options=options,
            end=end,
            begins=begins,
            loss_chunk=loss_chunk,
            teaching=teaching,
            teacher=teacher,
        )
        return total / (A * B * (T1 - 1))

    def accumulate(carry, tokens_BT1):
        loss, gradients = jax.value_and_grad(mean_loss)(state.model, tokens_BT1)
        return jax.tree.map(jnp.add, carry, (loss, gradients)), None

    # The first microbatch starts the sums: adding to zeros would cost a run of one microbatch, which is
    # most runs, a pass over all gradients (a seventh of the step of a small model on the CPU).
    first = jax.value_and_grad(mean_loss)(state.model, tokens_ABT1[0])
    # One after another: else, to fill its pipelines, XLA holds the activations of two microbatches.
    first, others = jax.lax.optimization_barrier((first, tokens_ABT1[1:]))
    (loss, gradients), _ = jax.lax.scan(accumulate, first, others)
    parameters: Any = state.model  # to optax, any pytree
    with jax.named_scope("optimizer"):
        updates, moments = optimizer.update(gradients, state.moments, parameters)
    metrics = {
        "loss": loss,
        "grad_norm": optax.tree.norm(gradients),
        "lr": rate(state.step),
        "tokens_hash": tokens_hash(tokens_ABT1),
    }
    model: Any = optax.apply_updates(parameters, updates)
    return State(step=state.step + 1, model=model, moments=moments), metrics


def tokens_hash(tokens_ABT1: jax.Array) -> jax.Array:
    """A hash of a global batch, uint32: the same on every mesh, another if two tokens change places."""
    A, B, T1 = tokens_ABT1.shape
    row = jnp.arange(A * B, dtype=jnp.uint32).reshape(A, B, 1)
    place = row * jnp.uint32(T1) + jnp.arange(T1, dtype=jnp.uint32)
    mixed = (tokens_ABT1.astype(jnp.uint32) + 1) * (place * jnp.uint32(0x9E3779B1) | 1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)  # wraps; integer sums have no order


# -------------------------------------------------------------------------------------- logger


class StepLogger:
    """Writes each step's metrics once the next step is under way, so the device never waits.

    The seconds of a step are those that the clock books under it and under its batch. Raises Diverged,
    with the number of the step, when a loss or gradient norm is not finite.
    """

    def __init__(
        self,
        config: Config,
        writer: CompositeWriter,
        first_step: int,
        clock: goodput.Clock,
        epochs: Callable[[int], dict[str, float]] = lambda step: {},
    ):
        self.config, self.writer, self.clock = config, writer, clock
        self.epochs = epochs
        self.flops = costs.train_flops_per_token(config.model, config.data.seq_len)
        chip = chips.find(jax.devices()[0].device_kind)
        self.peak = chip.flops if chip else None  # unknown: no MFU is printed
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.first_step = self.written = first_step
        self.before = self._training_seconds()  # when the step before was written
        self.started: float | None = None  # set when the first step is over

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Hands in the metrics of update `step` (counted from 1); writes those of the one before."""
        previous, self.pending = self.pending, (step, metrics)
        self._write(previous)

    def flush(self) -> None:
        """Waits for the last step handed in and writes it: afterwards it is known to be finite."""
        previous, self.pending = self.pending, None
        self._write(previous)
        self.writer.flush()

    @contextlib.contextmanager
    def timed(self, bucket: goodput.Bucket) -> Iterator[None]:
        """Counts the time of what happens inside under `bucket`, and writes the run's time so far.

        Then only steps lie between two such records, and a killed process is known to its last step.
        """
        with self.clock.timed(bucket):
            yield
        self.write_time_summary()

    def write_time_summary(self) -> None:
        """Writes how the time of the run was spent so far."""
        self.writer.write(self.written, goodput.time_summary(self.clock.seconds()))

    def _training_seconds(self) -> float:
        seconds = self.clock.seconds()
        return seconds["data_wait"] + seconds["step"]

    def _write(self, handed_in: tuple[int, dict[str, jax.Array]] | None) -> None:
        if handed_in is None:
            return
        step, metrics = handed_in
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise Diverged(f"step {step}: {name} is {values[name]}; this step was not saved")
        now = self._training_seconds()
        seconds, self.before = now - self.before, now
        speed: dict[str, float] = {"seconds": round(seconds, 4)}
        if self.started is None:
            self.started = now
        else:  # the first step waits for the first batches: its time is no speed
            tokens_per_s = self.config.tokens_per_step / max(seconds, 1e-9)
            speed["tokens_per_s"] = round(tokens_per_s, 1)
            if self.peak:
                speed["mfu"] = self.flops * tokens_per_s / (self.peak * jax.device_count())
            done = step - self.first_step - 1
            per_step = (now - self.started) / max(done, 1)
            speed["eta_s"] = round(per_step * (self.config.steps - step), 1)
        tokens = step * self.config.tokens_per_step
        epochs = {of_component("epochs", name): seen for name, seen in self.epochs(step).items()}
        self.writer.write(step, {**values, "tokens": tokens, **epochs, **speed})
        self.written = step


def of_component(metric: str, component: str) -> str:
    """The name of a metric of one component of a mixture; of one source alone, its own."""
    return f"{metric}/{component}" if component else metric


# ----------------------------------------------------------------------------------------- loop

# Held-out metrics of a model, as a flat dict of numbers, `held_out_loss` among them. What stands under
# `record` is kept as eval/training.json beside them.
Evaluator = Callable[[Session, Transformer], dict[str, Any]]


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
      clock: books the time of this process; by default one that starts now.
      agree: told, before the hosts compute together, what must be the same on all of them; raises
        ValueError on all of them if it is not.

    Returns:
      Whether the run is complete; False if it was stopped, after saving.

    Raises:
      ValueError: the config, data, run directory or checkpoints do not allow it.
      Diverged: a loss or gradient was not finite.
    """
    _check_teacher(config)
    clock = clock or goodput.Clock()
    agree({"config": shared_fields(config)})  # before devices: their layout is a part of it
    session = prepare_session(config, own_tokenizer(config))
    agree(
        {
            "data": data_record(session.prepared),
            "newest checkpoint": newest_checkpoint(config),
            "evaluated steps": evaluated_steps(Run(runs.run_path(config))),
        }
    )
    with opened(session) as run, jax.set_mesh(session.mesh), memory_errors(config):
        if is_complete(run, config):
            log.info("%s is already complete, at step %d", run.path, config.steps)
            return True
        # Reading a checkpoint, or making a first state, takes as long as compiling: both at once.
        threads = ThreadPoolExecutor(1, thread_name_prefix=machine.COMPILER)
        compiling = threads.submit(compile_step, session)
        threads.shutdown(wait=False)  # an error here is told before the compiler ends
        state = restore_or_init(session, run)
        first_step = int(state.step)
        log_start(session, run, first_step)
        log_data(session)
        teaching = load_teacher(session)
        with clock.timed("compile"):
            compiled = compiling.result()
            step_fn = lambda state, batch: compiled(state, batch, *teaching)
            # Hosts compile for different times, but gloo waits only 30 s at the first collective.
            agree({"first step": first_step})
        batches = batch_stream(session, first_step, stop_waiting)
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(batches))
            clock.carry_on(goodput.earlier(earlier_records(run), first_step))
            stack.callback(log_time, clock)  # after the writer is closed, and its progress bar gone
            writer = make_writer(
                run, config, process_index=jax.process_index(), first_step=first_step
            )
            stack.callback(writer.close)
            saver = checkpoint.Checkpointer(
                run.checkpoints, config.placement.keep, run.owner, writer.note_saved
            )
            logger = StepLogger(config, writer, first_step, clock, session.epochs)

            def evaluated(step: int, state: State) -> None:
                metrics = evaluate(session, state.model)
                record = metrics.pop("record", None)
                # First: a run whose metrics say that it was evaluated has the record.
                if record and jax.process_index() == 0:
                    run.write_eval(runs.TRAINING, record | {"step": step})
                    metrics[runs.RECORDED] = step
                writer.write(step, metrics)

            stack.callback(logger.timed("checkpoint")(saver.close))
            steps = config.placement.profiled_steps
            traced = profiler.traced(step_fn, steps, first_step, config.steps, run.profile)
            step_fn = stack.enter_context(traced)
            writer.note_saved(first_step)  # later checkpoints may have been set aside
            logger.write_time_summary()
            if evaluation_is_missing(run, config, first_step):
                log.info("step %d was saved but not evaluated; evaluating it now", first_step)
                with logger.timed("evaluation"):
                    evaluated(first_step, state)
            clock.switch("step")

            saved = first_step
            for step in range(first_step + 1, config.steps + 1):
                with clock.timed("data_wait"):
                    batch = next(batches, None)
                if batch is None:  # asked to stop while it was read
                    if step - 1 > saved:
                        logger.flush()
                        with logger.timed("checkpoint"):
                            saver.save(state)
                    log.warning("stopped on request; the run can be resumed from step %d", step - 1)
                    return False
                state, metrics = step_fn(state, batch)
                logger.record(step, metrics)
                last, stop = step == config.steps, should_stop(step)
                evaluation_due = not last and _due(step, config.placement.eval_every)
                # Before an evaluation too: one that fails must not lose training.
                if last or stop or evaluation_due or _due(step, config.placement.save_every):
                    logger.flush()
                    with logger.timed("checkpoint"):
                        saver.save(state)
                    saved = step
                if stop and not last:
                    log.warning(
                        "stopped on request; step %d is saved and the run can be resumed", step
                    )
                    return False
                if evaluation_due:
                    with logger.timed("evaluation"):
                        evaluated(step, state)
            with logger.timed("evaluation"):
                evaluated(config.steps, state)
    return True


def shared_fields(config: Config) -> dict[str, Any]:
    """The fields that must be the same on every host: all but the place of the prepared data."""
    fields = dataclasses.asdict(config)
    del fields["placement"]["data_dir"]  # a local directory; what is in it is compared
    return fields


def data_record(prepared: Corpus) -> dict[str, Any]:
    """What two hosts' prepared data have in common if they are the same."""
    tokenizer = hashlib.sha256(prepared.tokenizer.to_json().encode()).hexdigest()
    return {"fingerprint": prepared.fingerprint, "tokenizer": tokenizer, **prepared.totals}


def newest_checkpoint(config: Config) -> int | None:
    """The step from which a run would go on: hosts whose directories are not one file system differ."""
    steps = checkpoint.steps(runs.run_path(config) / "checkpoints")
    return steps[-1] if steps else None


def earlier_records(run: Run) -> list[dict[str, Any]]:
    """The metrics so far; what was altered in them is told."""
    problems: list[str] = []
    records = list(run.read_records(problems))
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
    lost = run.losses().evaluation
    return [
        record["step"]
        for record in run.read_metrics()
        if "held_out_loss" in record and record["step"] != lost
    ]


def evaluation_is_missing(run: Run, config: Config, step: int) -> bool:
    """Whether a process was killed between the checkpoint of a step and its evaluation."""
    due = 0 < step < config.steps and _due(step, config.placement.eval_every)
    return due and not is_evaluated(run, step)


def is_evaluated(run: Run, step: int) -> bool:
    """Whether the metrics hold an evaluation of this step: a kill may have come between."""
    return step in evaluated_steps(run)


StepFn = Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]


def compile_step(layout: Layout) -> StepFn:
    """The step of a run, compiled ahead for the shapes and layouts it will meet; the state is donated."""
    with jax.set_mesh(layout.mesh):  # a property of the thread
        step = make_step(layout).lower(*layout.inputs)
        with option_errors(layout.config.placement.compiler_options):
            compiled = step.compile()
    check_memory(layout, compiled)
    return compiled


@contextlib.contextmanager
def option_errors(options: str) -> Iterator[None]:
    """Makes the compiler's refusal of an option an error that names the field."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if options and "INVALID_ARGUMENT" in str(error):
            raise ValueError(f"placement.compiler_options = {options!r}: {error}") from None
        raise


def make_step(layout: Layout) -> Any:
    """The step of a run under `jax.jit`; the state is donated."""
    config, placement = layout.config, layout.config.placement
    return _step(
        config.optimizer,
        config.steps,
        placement.compiler_options,
        options=layout.training,
        end=layout.end,
        begins=layout.begins,
        loss_chunk=placement.loss_chunk,
        teacher=layout.teacher,
    )


@functools.lru_cache(maxsize=4)  # a process may train many runs, and each keeps its program
def _step(optimizer: OptimizerConfig, steps: int, compiler: str, **static: Any) -> Any:
    """One function for all equal runs of a process: to jax, another function is another program."""
    step = functools.partial(
        train_step,
        optimizer=make_optimizer(optimizer, steps),
        rate=schedule(optimizer, steps),
        **static,
    )
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(compiler))


def compiler_options(text: str) -> dict[str, bool | int | str]:
    """Options of XLA from name=value,...; a flag is true or false, a count a number."""

    def value(text: str) -> bool | int | str:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        return int(text) if text.removeprefix("-").isdecimal() else text

    options = [option.partition("=") for option in text.split(",") if option]
    return {name.strip(): value(given.strip()) for name, _, given in options}


def batch_stream(
    session: Session, first_step: int, stop: Callable[[], bool] = lambda: False
) -> Any:
    """The batches from update `first_step` on, on their devices: int32 [A, B, T + 1].

    It ends when a batch is waited for and `stop()` is true.
    """
    config, parts = session.config, session.prepared.parts.items()
    batches = Batches(
        {name: part.split("train") for name, part in parts},
        batch_size=config.batch_size,
        seed=config.seed,
        accumulate=config.placement.accumulate,
        schedule=session.schedule,
    )
    return batches.stream(first_step, session.batch.sharding, stop=stop)


def restore_or_init(session: Session, run: Run) -> State:
    checkpoint.set_losses_aside(run)
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
    """Raises ValueError for a teacher that could be another one at the next start."""
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


def log_start(session: Session, run: Run, first_step: int) -> None:
    config, count = session.config, costs.parameters(session.config.model)
    log.info(
        "%s: %s parameters (%s without embeddings), kv_map %s, %s KV bytes per token at 16 bits",
        run.path,
        f"{count.total:,}",
        f"{count.non_embedding:,}",
        config.model.kv_map,
        f"{costs.kv_bytes(config.model, config.data.seq_len).resident:,.10g}",
    )
    log.info(
        "%d devices (%s) as %s, attention by %s, from step %d of %d, %s tokens per step",
        jax.device_count(),
        jax.devices()[0].device_kind,
        " x ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items()),
        session.options.attention,
        first_step,
        config.steps,
        f"{config.tokens_per_step:,}",
    )
    flops = costs.train_flops_per_token(config.model, config.data.seq_len)
    log.info("training FLOPs: %.4g per token", flops)


# Up to four epochs, tokens seen again are worth nearly as much as new ones (2305.16264).
_MANY_EPOCHS = 4


def log_data(session: Session) -> None:
    """Says how much of each source the whole run will see."""
    config, epochs = session.config, session.epochs(session.config.steps)
    tokens = session.schedule.counts(config.steps * config.batch_size)
    log.info("training tokens: %s in total", f"{config.steps * config.tokens_per_step:,}")
    for (name, part), rows in zip(session.prepared.parts.items(), tokens, strict=True):
        log.info(
            "  %s: %s tokens = %s epochs of its %s tokens",
            name or config.data.source,
            f"{rows * config.data.seq_len:,}",
            _three_digits(epochs[name]),
            f"{part.totals['train']['windows'] * config.data.seq_len:,}",
        )
        if epochs[name] > _MANY_EPOCHS:
            log.warning(
                "%s is seen %s times: more than about %d epochs help little; lower steps or batch_size, or "
                "use more text",
                name or config.data.source,
                _three_digits(epochs[name]),
                _MANY_EPOCHS,
            )


def _three_digits(number: float) -> str:
    """0.168, 4.1, 83,800: three significant digits, without an exponent."""
    if number >= 100:
        return f"{float(f'{number:.2e}'):,.0f}"
    return f"{number:.3g}" if number >= 1e-4 else "under 0.0001"


def check_memory(layout: Layout, step: Any) -> None:
    """Raises ValueError if the compiled step needs more memory than there is."""
    batch = layout.batch.sharding.shard_shape(layout.batch.shape)
    ahead = PREFETCH * math.prod(batch) * layout.batch.dtype.itemsize
    budget.check(step, ahead, remedy(layout.config))


@contextlib.contextmanager
def memory_errors(config: Config) -> Iterator[None]:
    """Makes a device's refusal of memory an error that names the fields."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        first = str(error).splitlines()[0]
        raise ValueError(
            f"the device has run out of memory ({printable(first)}): {remedy(config)}; if an evaluation "
            f"failed, lower placement.eval_batch_size = {config.placement.eval_batch_size}"
        ) from None


def remedy(config: Config) -> str:
    """What to change where a step needs more memory than there is."""
    return (
        f"raise placement.accumulate = {config.placement.accumulate}, lower batch_size = "
        f"{config.batch_size}, or use more devices (placement.mesh)"
    )


def log_time(clock: goodput.Clock) -> None:
    if jax.process_index() == 0:
        log.info(goodput.summary(clock.seconds()))


@contextlib.contextmanager
def opened(session: Session) -> Iterator[Run]:
    """The run's directory, kept from other processes; the log is copied into it."""
    # One process holds the lock for all hosts, and it alone writes; before that, nothing is written.
    path, writes = runs.run_path(session.config), jax.process_index() == 0
    with runs.locked(path) if writes else contextlib.nullcontext():
        run = runs.open_run(
            session.config,
            write=writes,
            data_fingerprint=session.prepared.fingerprint,
            tokenizer_json=session.prepared.tokenizer.to_json(),
        )
        try:
            with logging_to(run):
                yield run
        except Diverged:
            raise  # that is a result
        except BaseException:
            if writes:  # what ends before its first step does not keep the name
                runs.forget_unless_begun(run)
            raise


@contextlib.contextmanager
def logging_to(run: Run) -> Iterator[None]:
    """Copies the log into the run's log.txt. A remote run directory gets none: it cannot be appended to."""
    if not run.is_local or jax.process_index() != 0:
        yield
        return
    handler = logging.StreamHandler(runs.open_plain(run.log, "a", encoding="utf-8"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("cla_jax")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.stream.close()


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
