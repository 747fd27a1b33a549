"""The fields of the optimizer, and of the weights that a run starts from."""

import dataclasses
from typing import Any, Literal, get_args

from cla_jax import names
from cla_jax.config.checks import check_fields, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to the floor (2405.12981, section 3.1)."""

    kind: Literal["cosine"] = dataclasses.field(default="cosine", init=False)
    # Fraction of the steps that warm up.
    warmup_fraction: float = 0.05
    # Learning rate at the last step, as a fraction of peak_lr.
    final_fraction: float = 0.1

    def __post_init__(self):
        _check_fractions(self, "optimizer.schedule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD:
    """Warmup-stable-decay: linear warm-up, the peak, linear decay to the floor (2404.06395, section 4)."""

    kind: Literal["wsd"] = dataclasses.field(default="wsd", init=False)
    # Fraction of the steps that warm up.
    warmup_fraction: float = 0.05
    # Fraction of the steps, at the end, in which the learning rate decays.
    decay_fraction: float = 0.1
    # Learning rate at the last step, as a fraction of peak_lr.
    final_fraction: float = 0.1

    def __post_init__(self):
        _check_fractions(self, "optimizer.schedule")
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"optimizer.schedule: warmup_fraction = {self.warmup_fraction} and decay_fraction = "
                f"{self.decay_fraction} must add up to at most 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then the peak to the end."""

    kind: Literal["constant"] = dataclasses.field(default="constant", init=False)
    # Fraction of the steps that warm up.
    warmup_fraction: float = 0.05

    def __post_init__(self):
        _check_fractions(self, "optimizer.schedule")


def _check_fractions(config: Any, name: str) -> None:
    """Raises ValueError unless every field that is a fraction lies in 0 to 1."""
    check_fields(config, f"{name}.")
    for field in dataclasses.fields(config):
        if field.name.endswith("_fraction") and not 0 <= getattr(config, field.name) <= 1:
            raise ValueError(
                f"{name}.{field.name} = {getattr(config, field.name)} must lie in 0 to 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (1711.05101).

    Weight decay applies to every parameter, including norms and embeddings, as in the CLA authors' public
    code. Their paper does not say.
    """

    kind: Literal["adamw"] = dataclasses.field(default="adamw", init=False)
    # Decay of the first moment.
    b1: float = 0.9
    # Decay of the second moment.
    b2: float = 0.95
    # Added to the square root of the second moment.
    eps: float = 1e-8
    # Decoupled weight decay.
    weight_decay: float = 0.1

    def __post_init__(self):
        _check_rule(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for the matrices of blocks; AdamW for the other parameters.

    The others are the embedding, the output head, norms, biases and the head matrices of a latent. The keys
    and values of one projection are one matrix. An update has the same root mean square as AdamW's, so
    learning rate and weight decay have the same scale (Moonlight, 2502.16982, section 2.2).
    """

    kind: Literal["muon"] = dataclasses.field(default="muon", init=False)
    # Momentum decay for matrices.
    momentum: float = 0.95
    # Newton-Schulz iterations for each matrix.
    iterations: int = 5
    # Decay of AdamW's first moment, for the other parameters.
    b1: float = 0.9
    # Decay of AdamW's second moment, for the other parameters.
    b2: float = 0.95
    # Added to the square root of AdamW's second moment.
    eps: float = 1e-8
    # Decoupled weight decay, for all parameters.
    weight_decay: float = 0.1

    def __post_init__(self):
        _check_rule(self)
        if not 1 <= self.iterations <= 100:
            raise ValueError(f"optimizer.rule.iterations = {self.iterations} must lie in 1 to 100")


def _check_rule(rule: AdamW | Muon) -> None:
    check_fields(rule, "optimizer.rule.")
    positive("optimizer.rule.eps", rule.eps)
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if field.name in ("b1", "b2", "momentum") and not 0 <= value < 1:
            raise ValueError(f"optimizer.rule.{field.name} = {value} must lie in [0, 1)")
    if not 0 <= rule.weight_decay < float("inf"):
        raise ValueError(
            f"optimizer.rule.weight_decay = {rule.weight_decay} must be finite and not negative"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Gradient clipping, then an update rule with a scheduled learning rate."""

    # The highest learning rate in the schedule.
    peak_lr: float = 3e-4
    # How the learning rate changes over the steps.
    schedule: Cosine | WSD | Constant = Cosine()
    # How a gradient becomes an update.
    rule: AdamW | Muon = AdamW()
    # Gradients are clipped to this global norm.
    clip_norm: float = 1.0

    def __post_init__(self):
        check_fields(self, "optimizer.")
        for field in ("peak_lr", "clip_norm"):
            positive(f"optimizer.{field}", getattr(self, field))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    """Initial weights are drawn from the seed."""

    kind: Literal["scratch"] = dataclasses.field(default="scratch", init=False)


Init = Literal["own", "mean", "renormalized", "aligned", "fitted", "least_squares", "svd"]
INITS = get_args(Init)
CALIBRATED_INITS = ("aligned", "fitted", "least_squares")  # those that look at activations
LATENT_INITS = ("svd", "least_squares")  # those that make a latent of heads
HEAD_INITS = tuple(init for init in INITS if init != "svd")  # those that join heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromRun:
    """Initial weights are those of another run, converted to this model.

    The two models may differ in n_kv_heads and kv_map: several KV heads become one. Or heads become a latent.
    The other run may also be the teacher. The loss is then (1 - w) cross-entropy +
    w T^2 KL(teacher || student).
    """

    kind: Literal["run"] = dataclasses.field(default="run", init=False)
    # The directory of the other run.
    run: str = ""
    # The checksum of its weights; empty for the newest checkpoint. Older configs have that of its files.
    checkpoint: str = ""
    # How several KV heads become one. own: the producer's first head. mean: their mean. renormalized: the
    # mean, scaled to the mean norm of the heads. aligned: the mean of the heads after rotations that align
    # them. fitted: the producer's first head, with the other readers fitted to it. least_squares: the best
    # prediction of all heads. The last three run the source on training text. A latent is made of heads by
    # least_squares, or by svd: of their weights alone.
    init: Init = "least_squares"
    # Windows of training text for aligned, fitted and least_squares.
    calibration_windows: int = 16
    # w: the weight of the teacher (the source run) in the loss; 0 for no teacher.
    distill_weight: float = 0.0
    # T: the logits of teacher and student are divided by it.
    distill_temperature: float = 1.0

    def __post_init__(self):
        check_fields(self, "start.")
        names.check_path("start.run", self.run)
        positive("start.calibration_windows", self.calibration_windows)
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"start.distill_weight = {self.distill_weight} must lie in 0 to 1")
        positive("start.distill_temperature", self.distill_temperature)
