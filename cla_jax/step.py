"""The step of training: a pure function of state and batch, compiled ahead of time."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cla_jax import budget
from cla_jax.config import Config, OptimizerConfig
from cla_jax.data.loader import PREFETCH
from cla_jax.loss import TeacherOutput, cross_entropy
from cla_jax.messages import printable
from cla_jax.model.platform import first_microbatch_apart
from cla_jax.model.transformer import ForwardOptions, Transformer, document_starts, inputs_of
from cla_jax.optimizer import make_optimizer, schedule
from cla_jax.session import Layout, Teacher
from cla_jax.state import State
from cla_jax.typed_numbers import is_digits

StepFn = Callable[[State, jax.Array], tuple[State, dict[str, jax.Array]]]


def loss_sum(
    model: Transformer,
    tokens_BT1: jax.Array,
    weights_BT: jax.Array,
    *,
    options: ForwardOptions,
    end: int | None,
    begins: tuple[int, int] | None = None,
    loss_chunk: int,
    teacher_model: Transformer | None = None,
    teacher: Teacher | None = None,
) -> jax.Array:
    """Summed negative log-likelihood in nats of the targets of windows of T + 1 tokens.

    With the model of a teacher, `teacher_model`, it is a mean of that and of the distance to the teacher.
    """
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    starts_BT = None if end is None else document_starts(inputs_BT, end)
    read_BT = inputs_of(inputs_BT, begins)
    x_BTD = model(read_BT, options, starts_BT)
    chunk = min(loss_chunk, inputs_BT.shape[1])
    taught = None
    if teacher_model is not None and teacher is not None:
        with jax.named_scope("teacher"):
            taught = TeacherOutput(
                teacher_model(read_BT, teacher.options, starts_BT), teacher_model.head_VD
            )
    distill = teacher.distill if teacher else None
    with jax.named_scope("loss"):
        return cross_entropy(
            x_BTD, model.head_VD, targets_BT, weights_BT, chunk, options.rules, taught, distill
        )


def train_step(
    state: State,
    tokens_ABT1: jax.Array,
    teacher_model: Transformer | None = None,
    *,
    optimizer: optax.GradientTransformation,
    rate: optax.Schedule,
    **of_loss: Any,
) -> tuple[State, dict[str, jax.Array]]:
    """One update from A microbatches of B windows; a pure function of (state, batch).

    Gradients are accumulated in float32; their norm is taken before clipping. `of_loss` are the other
    arguments of `loss_sum`.
    """
    A, B, T1 = tokens_ABT1.shape

    def mean_loss(model: Transformer, tokens_BT1: jax.Array) -> jax.Array:
        weights_BT = jnp.ones_like(tokens_BT1[:, 1:], jnp.float32)
        total = loss_sum(model, tokens_BT1, weights_BT, teacher_model=teacher_model, **of_loss)
        return total / (A * B * (T1 - 1))

    def accumulate(carry, tokens_BT1):
        loss, gradients = jax.value_and_grad(mean_loss)(state.model, tokens_BT1)
        return jax.tree.map(jnp.add, carry, (loss, gradients)), None

    if A == 1 or first_microbatch_apart():
        first = jax.value_and_grad(mean_loss)(state.model, tokens_ABT1[0])
        # One after another. Otherwise, to fill its pipelines, XLA holds the activations of two microbatches.
        first, others = jax.lax.optimization_barrier((first, tokens_ABT1[1:]))
    else:
        first = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.model)
        others = tokens_ABT1
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
    """A hash of a global batch, uint32: the same on every mesh; it changes if two tokens are swapped."""
    A, B, T1 = tokens_ABT1.shape
    row = jnp.arange(A * B, dtype=jnp.uint32).reshape(A, B, 1)
    place = row * jnp.uint32(T1) + jnp.arange(T1, dtype=jnp.uint32)
    mixed = (tokens_ABT1.astype(jnp.uint32) + 1) * (place * jnp.uint32(0x9E3779B1) | 1)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    return jnp.sum(mixed ^ (mixed >> 13), dtype=jnp.uint32)  # wraps; integer sums have no order


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
        options=layout.training_options,
        end=layout.end,
        begins=layout.begins,
        loss_chunk=placement.loss_chunk,
        teacher=layout.teacher,
    )


@functools.lru_cache(maxsize=4)  # a process may train many runs, and each keeps its program
def _step(optimizer: OptimizerConfig, steps: int, options_text: str, **static: Any) -> Any:
    """One function for all equal runs of a process: jax caches programs by the identity of a function."""
    step = functools.partial(
        train_step,
        optimizer=make_optimizer(optimizer, steps),
        rate=schedule(optimizer, steps),
        **static,
    )
    return jax.jit(step, donate_argnums=0, compiler_options=compiler_options(options_text))


def compiler_options(text: str) -> dict[str, bool | int | str]:
    """Options of XLA from name=value,...; a flag is true or false, a count a number."""

    def value(text: str) -> bool | int | str:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        return int(text) if is_digits(text.removeprefix("-")) else text

    options = [option.partition("=") for option in text.split(",") if option]
    return {name.strip(): value(given.strip()) for name, _, given in options}


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
