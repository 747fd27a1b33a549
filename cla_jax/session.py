"""What a config becomes on given devices: layouts, how the model runs, and the prepared data.

Training has a `Session`, evaluation an `EvaluationSession`.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cla_jax import mesh as meshes
from cla_jax import start
from cla_jax.config import (
    Config,
    DataConfig,
    FromRun,
    MeshConfig,
    ModelConfig,
    check_vocabulary,
)
from cla_jax.data import mixture
from cla_jax.data.loader import Batches
from cla_jax.data.prepare import Corpus, corpus
from cla_jax.data.tokenizers import Tokenizer
from cla_jax.loss import Distillation
from cla_jax.mesh import AxisRules
from cla_jax.model.attention import choose_backend
from cla_jax.model.transformer import ForwardOptions, Transformer
from cla_jax.optimizer import make_optimizer
from cla_jax.state import State, abstract_state, with_layout

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """The run that teaches another one, on the same devices."""

    model: ModelConfig
    options: ForwardOptions
    distill: Distillation


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
    def training_options(self) -> ForwardOptions:
        """How the step of training runs the model: where blocks are recomputed, what enters them is split."""
        # Other policies save little of the residual stream, so splitting it does not help.
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
        distill = Distillation(given.distill_weight, given.distill_temperature)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationSession:
    """What the evaluation of a model needs besides its weights: the text, and how the model runs here."""

    model: ModelConfig
    data: DataConfig
    prepared: Corpus
    mesh: Mesh
    options: ForwardOptions
    # Windows that are scored at once, at least.
    batch_size: int
    # Tokens of a window whose logits exist at once.
    loss_chunk: int

    @property
    def rules(self) -> AxisRules:
        return self.options.rules

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prepared.tokenizer

    @property
    def end(self) -> int | None:
        """As in `Layout`."""
        return _end(self.data, self.tokenizer)

    @property
    def begins(self) -> tuple[int, int] | None:
        """As in `Layout`."""
        return _begins(self.data, self.tokenizer)

    @property
    def rows(self) -> int:
        """Windows that are scored at once: as many as asked for, or as the devices can share evenly."""
        shards = meshes.row_shards(self.mesh)
        return -(-self.batch_size // shards) * shards


@dataclasses.dataclass(frozen=True, kw_only=True)
class Session(Layout):
    """A layout on the devices at hand, and the data."""

    prepared: Corpus

    @property
    def evaluation(self) -> EvaluationSession:
        """How the model is evaluated while it is trained."""
        placement = self.config.placement
        return EvaluationSession(
            model=self.config.model,
            data=self.config.data,
            prepared=self.prepared,
            mesh=self.mesh,
            options=self.options,
            batch_size=placement.eval_batch_size,
            loss_chunk=placement.loss_chunk,
        )

    @functools.cached_property
    def schedule(self) -> mixture.Schedule:
        """Which component of the data each training row comes from."""
        return mixture.schedule(self.config)

    def epochs(self, step: int) -> dict[str, float]:
        """How often the training windows of each component were seen after so many steps."""
        rows = self.schedule.counts(step * self.config.batch_size)
        windows = [part.totals["train"]["windows"] for part in self.prepared.parts.values()]
        return {
            name: seen / whole
            for name, seen, whole in zip(self.prepared.parts, rows, windows, strict=True)
        }


def plan_layout(config: Config, devices: Sequence[Any] | None = None) -> Layout:
    """Checks a config against devices, by default those at hand, before any array exists.

    Only the tokenizer knows the end and begin tokens. Here they are 0: only these constants of the program
    differ. Raises ValueError where the mesh, the batch or a backend does not fit them.
    """
    placement, devices = config.placement, jax.devices() if devices is None else devices
    rows, seq_len = config.batch_size // placement.accumulate, config.data.seq_len
    mesh = _mesh(placement.mesh, config.model, rows, seq_len, devices)
    rules = meshes.axis_rules(config.model, mesh)
    meshes.check_batch(config, mesh)
    options = ForwardOptions(
        rules=rules,
        remat=placement.remat,
        scan_layers=placement.scan_layers,
        attention=choose_backend(placement.attention, config.model, seq_len, devices[0]),
    )
    end = None if config.data.attend_across_documents else 0
    begins = (0, 0) if config.data.begin_token else None
    return Layout(config=config, mesh=mesh, options=options, end=end, begins=begins)


def prepare_session(config: Config, tokenizer_json: str | None = None) -> Session:
    """Checks the config against devices and data; prepares the data if need be.

    `tokenizer_json`, if given, stands for the file that `data.tokenizer` names.
    """
    layout = plan_layout(config)  # before the data is prepared, which is slow
    prepared = _corpus(config.model, config.data, config.placement.data_dir, tokenizer_json)
    return Session(
        config=config,
        mesh=layout.mesh,
        options=layout.options,
        end=_end(config.data, prepared.tokenizer),
        begins=_begins(config.data, prepared.tokenizer),
        prepared=prepared,
    )


def prepare_evaluation(
    model: ModelConfig,
    data: DataConfig,
    *,
    data_dir: str,
    mesh: MeshConfig,
    scan_layers: bool,
    remat: str,
    batch_size: int,
    loss_chunk: int,
    tokenizer_json: str | None = None,
) -> EvaluationSession:
    """Checks a model against the devices at hand and the data; prepares the data if need be.

    `tokenizer_json`, if given, stands for the file that `data.tokenizer` names. Evaluation needs no `remat`;
    with that of training, both compile to the same program, if training has `placement.attention=auto`.
    """
    devices = jax.devices()
    device_mesh = _mesh(mesh, model, len(devices), data.seq_len, devices)
    options = ForwardOptions(
        rules=meshes.axis_rules(model, device_mesh),
        remat=remat,
        scan_layers=scan_layers,
        attention=choose_backend("auto", model, data.seq_len, devices[0]),
    )
    return EvaluationSession(
        model=model,
        data=data,
        prepared=_corpus(model, data, data_dir, tokenizer_json),
        mesh=device_mesh,
        options=options,
        batch_size=batch_size,
        loss_chunk=loss_chunk,
    )


def _mesh(
    asked: MeshConfig, model: ModelConfig, rows: int, seq_len: int, devices: Sequence[Any]
) -> Mesh:
    if asked.auto:
        asked, why = meshes.choose_mesh(asked, model, rows, seq_len, devices)
        log.info("placement.mesh.auto: %s", why)
    return meshes.make_mesh(asked, devices)


def _corpus(
    model: ModelConfig, data: DataConfig, data_dir: str, tokenizer_json: str | None
) -> Corpus:
    prepared = corpus(data, data_dir, tokenizer_json=tokenizer_json)
    check_vocabulary(prepared.tokenizer.size, model, data.tokenizer)
    return prepared


def _end(data: DataConfig, tokenizer: Tokenizer) -> int | None:
    return None if data.attend_across_documents else tokenizer.end


def _begins(data: DataConfig, tokenizer: Tokenizer) -> tuple[int, int] | None:
    return (tokenizer.end, tokenizer.begin(data.begin_token)) if data.begin_token else None


def batch_stream(
    session: Session, start_step: int, stop: Callable[[], bool] = lambda: False
) -> Any:
    """The batches from update `start_step` on, on their devices: int32 [A, B, T + 1].

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
    return batches.stream(start_step, session.batch.sharding, stop=stop)
