"""What a config becomes on given devices: layouts, how the model runs, and the prepared data."""

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
from cla_jax.config import Config, FromRun, ModelConfig, check_vocabulary
from cla_jax.data import mixture
from cla_jax.data.loader import Batches
from cla_jax.data.prepare import Corpus, corpus
from cla_jax.loss import Distill
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
