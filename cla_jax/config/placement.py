"""The fields that say where and how a run computes."""

import dataclasses
import functools
from typing import Literal

from cla_jax import names
from cla_jax.config.checks import check_fields, positive
from cla_jax.messages import shown
from cla_jax.typed_numbers import is_digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, which takes the devices that are left."""

    # Choose data, fsdp and model from the chip's communication rooflines, and print the reason.
    auto: bool = False
    # TPU slices, connected by the data-centre network. Each has all parameters and its own rows of the batch.
    slice: int = 1
    # Data parallelism: copies of the parameters within a slice, each with its own rows of the batch.
    data: int = 1
    # FSDP: parameters are sharded over this many devices, each with its own rows of the batch. -1: all that
    # are left.
    fsdp: int = -1
    # Tensor parallelism: heads, MLP width and vocabulary are sharded over this many devices.
    model: int = 1

    def __post_init__(self):
        check_fields(self, "placement.mesh.")
        sizes = {axis: getattr(self, axis) for axis in ("slice", "data", "fsdp", "model")}
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"placement.mesh.{axis} = {size} must be positive, or -1")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"placement.mesh: only one axis may be -1, not all of {sizes}")
        if self.slice == -1:
            raise ValueError("placement.mesh.slice = -1 must be the number of slices")
        if self.auto and (self.data, self.fsdp, self.model) != (1, -1, 1):
            raise ValueError(
                f"placement.mesh.auto chooses data, fsdp and model: do not set them as well ({sizes})"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how a run computes. Changes here do not change the run's identity."""

    # Devices along each axis.
    mesh: MeshConfig = MeshConfig()
    # Microbatches per step (gradient accumulation, in float32).
    accumulate: int = 1
    # Rematerialisation. The backward pass recomputes nothing (none), each block (block), each block except
    # attention (attention), or each block except its matrix products (dots).
    remat: Literal["none", "block", "attention", "dots"] = "none"
    # Run equal layers in a scan, so that compile time does not grow with depth. Unrolled layers (off) are
    # faster in shallow models.
    scan_layers: bool = True
    # Attention kernel; auto chooses the fastest one that supports the model and the hardware.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    # XLA compiler options for the training step: name=value, separated by commas.
    compiler_options: str = ""
    # Positions per chunk of the loss: logits exist for one chunk at a time, to save memory.
    loss_chunk: int = 256
    # Steps between log lines on the console, in TensorBoard and wandb; metrics.jsonl has every step.
    log_every: int = 10
    # Steps between checkpoints; the last step is always saved.
    save_every: int = 100
    # Number of checkpoints to keep; at least 2.
    keep: int = 2
    # Steps between evaluations on the held-out split; 0: only at the end.
    eval_every: int = 0
    # STEP:COUNT writes an xprof trace of COUNT steps, beginning at STEP, to the run's profile/; empty: none.
    profile: str = ""
    # The most sequences per evaluation batch, rounded up to a multiple of the devices that share the batch.
    eval_batch_size: int = 32
    # Also write TensorBoard files (extra `tensorboard`).
    tensorboard: bool = False
    # Weights & Biases project to log to; empty for none (extra `wandb`).
    wandb: str = ""
    # Directory of all run directories; local or gs://.
    runs: str = "runs"
    # Directory of prepared (tokenised) data.
    data_dir: str = "data"

    def __post_init__(self):
        check_fields(self, "placement.")
        for field in ("accumulate", "loss_chunk", "log_every", "save_every", "eval_batch_size"):
            positive(f"placement.{field}", getattr(self, field))
        if self.keep < 2:
            raise ValueError(
                f"placement.keep = {self.keep} must be at least 2: if the newest checkpoint is damaged, the "
                "one before it is needed"
            )
        if self.eval_every < 0:
            raise ValueError(f"placement.eval_every = {self.eval_every} must not be negative")
        for option in self.compiler_options.split(",") if self.compiler_options else ():
            if not all(option.partition("=")):
                raise ValueError(f"placement.compiler_options: {shown(option)} must be name=value")
        for field in ("runs", "data_dir"):
            names.check_path(f"placement.{field}", getattr(self, field))
        self.profiled_steps  # noqa: B018  raises for what is not STEP:COUNT

    @functools.cached_property
    def profiled_steps(self) -> range:
        """`profile` as the steps to trace, counted from 1."""
        if not self.profile:
            return range(0)
        step, _, count = self.profile.partition(":")
        if not (is_digits(step) and is_digits(count) and int(step) > 0 and int(count) > 0):
            raise ValueError(
                f"placement.profile = {shown(self.profile)} must be STEP:COUNT, two positive numbers"
            )
        return range(int(step), int(step) + int(count))
