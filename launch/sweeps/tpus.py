"""What clouds call the planner's topologies, v5e:16x16: from Google's documents and xpk's table."""

import dataclasses
import math

from cla_jax.messages import near_choice
from cla_jax.typed_numbers import is_digits

CHIPS_PER_HOST = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A generation of TPUs."""

    accelerator: str  # prefix of accelerator types, v5litepod-256
    counts: int  # what accelerator types count, for each chip: chips 1, cores 2
    gke: str  # the value of GKE's node label
    xpk: str  # prefix of xpk's device types, v5litepod-16x16
    runtime: str  # of a TPU VM; empty where there are none
    dimensions: int


KINDS = {
    "v4": Kind(
        accelerator="v4",
        counts=2,
        gke="tpu-v4-podslice",
        xpk="v4",
        runtime="tpu-ubuntu2204-base",
        dimensions=3,
    ),
    "v5e": Kind(
        accelerator="v5litepod",
        counts=1,
        gke="tpu-v5-lite-podslice",
        xpk="v5litepod",
        runtime="v2-alpha-tpuv5-lite",
        dimensions=2,
    ),
    "v5p": Kind(
        accelerator="v5p",
        counts=2,
        gke="tpu-v5p-slice",
        xpk="v5p",
        runtime="v2-alpha-tpuv5",
        dimensions=3,
    ),
    "v6e": Kind(
        accelerator="v6e",
        counts=1,
        gke="tpu-v6e-slice",
        xpk="v6e",
        runtime="v2-alpha-tpuv6e",
        dimensions=2,
    ),
    "v7x": Kind(accelerator="tpu7x", counts=2, gke="tpu7x", xpk="tpu7x", runtime="", dimensions=3),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
    """One slice of TPUs."""

    kind: Kind
    shape: str  # in chips, 16x16

    @property
    def chips(self) -> int:
        return math.prod(map(int, self.shape.split("x")))

    @property
    def hosts(self) -> int:
        return self.chips // CHIPS_PER_HOST

    @property
    def vms(self) -> int:
        """Cloud TPU VMs, which are GKE's hosts but for eight chips of a v5e or v6e: those are one VM."""
        return 1 if self.kind.dimensions == 2 and self.shape == "2x4" else self.hosts

    @property
    def accelerator_type(self) -> str:
        return f"{self.kind.accelerator}-{self.chips * self.kind.counts}"

    @property
    def xpk_type(self) -> str:
        return f"{self.kind.xpk}-{self.shape}"


def find(topology: str) -> Slice:
    """Raises ValueError for what is not kind:shape."""
    name, _, shape = topology.partition(":")
    near_choice("kind of TPU", name, KINDS)
    kind = KINDS[name]
    sides = shape.split("x")
    if len(sides) != kind.dimensions or not all(is_digits(side) and int(side) for side in sides):
        example = "16x16" if kind.dimensions == 2 else "4x4x8"
        raise ValueError(
            f"--topology {topology!r}: a {name} has {kind.dimensions} dimensions, in chips: {name}:{example}"
        )
    tpu = Slice(kind=kind, shape=shape)
    if tpu.chips % CHIPS_PER_HOST:
        raise ValueError(f"--topology {topology!r}: hosts have {CHIPS_PER_HOST} chips each")
    return tpu
