"""What a run is: frozen dataclasses, checked when made, without jax.

A `Config` has two halves. Its *identity* (model, data, optimizer, batch_size, steps, seed, start) says which
numbers the run computes; two runs with one identity are the same run. Its *placement* says where and
how: mesh, microbatches, rematerialisation, backends, logging, paths. Resuming compares the identity
only, so a run may move to half the chips.
"""

import dataclasses

from cla_jax import names
from cla_jax.config.checks import check_fields, positive
from cla_jax.config.data import Component, DataConfig, Stage
from cla_jax.config.decoding import (
    CacheAttention,
    DecodingMatmul,
    Sampling,
    check_chunk,
    check_new_tokens,
)
from cla_jax.config.model import (
    HeadsKV,
    LatentKV,
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    NoScaling,
    RopeScaling,
    SquaredReLU,
    SwiGLU,
    YarnScaling,
)
from cla_jax.config.placement import MeshConfig, Placement
from cla_jax.config.training import (
    CALIBRATED_INITS,
    HEAD_INITS,
    INITS,
    LATENT_INITS,
    WSD,
    AdamW,
    Constant,
    Cosine,
    FromRun,
    Init,
    Muon,
    OptimizerConfig,
    Scratch,
)
from cla_jax.messages import shown

__all__ = [
    "CALIBRATED_INITS",
    "HEAD_INITS",
    "INITS",
    "LATENT_INITS",
    "WSD",
    "AdamW",
    "CacheAttention",
    "Component",
    "Config",
    "Constant",
    "Cosine",
    "DataConfig",
    "DecodingMatmul",
    "FromRun",
    "HeadsKV",
    "Init",
    "LatentKV",
    "LinearScaling",
    "Llama3Scaling",
    "MeshConfig",
    "ModelConfig",
    "Muon",
    "NoScaling",
    "OptimizerConfig",
    "Placement",
    "RopeScaling",
    "Sampling",
    "Scratch",
    "SquaredReLU",
    "Stage",
    "SwiGLU",
    "YarnScaling",
    "check_chunk",
    "check_new_tokens",
    "check_vocabulary",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything about one training run.

    All fields except `name` and `placement` are the run's identity: with other values it is another run.
    Raises ValueError, naming the field and its value, if the fields do not fit together.
    """

    # The run directory below placement.runs, such as `study/row`.
    name: str
    # The model.
    model: ModelConfig
    # The text and its tokens.
    data: DataConfig
    # The optimizer and its schedule.
    optimizer: OptimizerConfig = OptimizerConfig()
    # Sequences per step, over all devices.
    batch_size: int
    # Optimizer steps.
    steps: int
    # Random seed of the initial weights and of the data order.
    seed: int = 0
    # Where the initial weights come from.
    start: Scratch | FromRun = Scratch()
    # Where and how the run computes. It may change at every restart.
    placement: Placement = Placement()

    def __post_init__(self):
        check_fields(self)
        positive("batch_size", self.batch_size)
        positive("steps", self.steps)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} must lie in 0 to 2**32 - 1")
        names.check("name", self.name)
        check_vocabulary(self.data.known_vocabulary, self.model, self.data.tokenizer)
        if self.batch_size % self.placement.accumulate:
            raise ValueError(
                f"batch_size = {self.batch_size} is not divisible by "
                f"placement.accumulate = {self.placement.accumulate}"
            )
        if self.data.seq_len % min(self.placement.loss_chunk, self.data.seq_len):
            raise ValueError(
                f"data.seq_len = {self.data.seq_len} is not divisible by "
                f"placement.loss_chunk = {self.placement.loss_chunk}"
            )
        if self.data.stages and self.data.stages[-1].step >= self.steps:
            raise ValueError(
                f"data.stages: {self.data.stages[-1]} begins after the last step: steps = {self.steps}"
            )
        if self.placement.profiled_steps.start > self.steps:
            raise ValueError(
                f"placement.profile = {self.placement.profile!r} begins after the last step: "
                f"steps = {self.steps}"
            )

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of one optimizer step, over all devices."""
        return self.batch_size * self.data.seq_len


def check_vocabulary(ids: int, model: ModelConfig, tokenizer: str) -> None:
    """Raises ValueError if the tokenizer makes ids that the model has no rows for."""
    if ids > model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {model.vocab_size} must be at least {ids}, the number of ids of "
            f"data.tokenizer = {shown(tokenizer)}"
        )
