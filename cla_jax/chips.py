"""What an accelerator can do, by kind: figures for plans, rooflines and MFU.

TPU figures are a chip's as jax sees it (one device; of a TPU v7x chip, jax sees the two halves). Sources:
Google's system pages for FLOP/s, memory, its bandwidth, interconnect and wrap-around links; "How to Scale
Your Model" (Austin et al., 2025), chapters 2 and 5, for the one-way bandwidths of links and of the
data-centre network; NVIDIA's data sheets, dense, SXM.
"""

import dataclasses
import difflib

from cla_jax.messages import near_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    flops: float  # dense bfloat16 FLOP/s
    memory: float  # bytes of HBM
    bandwidth: float  # bytes/s of HBM
    link: float = 0.0  # bytes/s through one axis of the interconnect, both directions together
    axes: int = 0  # axes of the interconnect's torus
    network: float = 0.0  # bytes/s of its share of its host's data-centre network
    devices: int = 1  # that jax sees of what is sold as one chip

    @property
    def interconnect(self) -> float:
        """Bytes/s through all axes together."""
        return self.link * self.axes


_GIB = 2**30

_V5E = Chip(flops=197e12, memory=16 * _GIB, bandwidth=819e9, link=90e9, axes=2, network=3.1e9)
_V6E = Chip(flops=918e12, memory=32 * _GIB, bandwidth=1640e9, link=180e9, axes=2, network=6.25e9)

# By a part of jax's device kind; the first that matches counts.
CHIPS = {
    "H200": Chip(flops=989e12, memory=141e9, bandwidth=4.8e12, link=450e9, axes=1),
    "H100": Chip(flops=989e12, memory=80e9, bandwidth=3.35e12, link=450e9, axes=1),
    "A100": Chip(flops=312e12, memory=80e9, bandwidth=2.04e12, link=300e9, axes=1),
    "TPU v4": Chip(
        flops=275e12, memory=32 * _GIB, bandwidth=1228e9, link=90e9, axes=3, network=6.25e9
    ),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    # v5p; also written "TPU v5p"
    "TPU v5": Chip(
        flops=459e12, memory=95 * _GIB, bandwidth=2765e9, link=180e9, axes=3, network=6.25e9
    ),
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip(
        flops=1153e12,
        memory=96 * _GIB,
        bandwidth=3690e9,
        link=100e9,
        axes=3,
        network=6.25e9,
        devices=2,
    ),
}


def find(device_kind: str) -> Chip | None:
    """The chip of a jax device kind; None where it is not known."""
    return next((chip for name, chip in CHIPS.items() if name in device_kind), None)


# Shapes of slices, in chips; of v4, v5p and 7x they are three-dimensional. (Their names in the cloud count
# cores.)
_PLANE = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
)
# By our name of a kind of TPU.
TOPOLOGIES = {"v4": _CUBE, "v5e": _PLANE, "v5p": _CUBE, "v6e": _PLANE, "v7x": _CUBE}


def wrap(name: str) -> tuple[bool, bool, bool]:
    """Along which axes the links of a topology close to a ring.

    Of v4, v5p and 7x, optical switches join whole cubes of 4 x 4 x 4 chips, and close every axis. On v5e
    and v6e an axis is closed where it is as long as the pod.
    """
    kind, _, shape = name.partition(":")
    sizes = [int(size) for size in shape.split("x")]
    if TOPOLOGIES[kind] is _PLANE:
        return sizes[0] == 16, sizes[1] == 16, False
    whole = all(size % 4 == 0 for size in sizes)
    return whole, whole, whole


def topology_names() -> list[str]:
    return [f"{kind}:{shape}" for kind, shapes in TOPOLOGIES.items() for shape in shapes]


def check_topology(name: str) -> None:
    """Raises ValueError, with those near it, for a topology that does not exist."""
    kind, _, shape = name.partition(":")
    near_choice("kind of TPU", kind, TOPOLOGIES)
    if shape not in TOPOLOGIES[kind]:
        near = difflib.get_close_matches(shape, TOPOLOGIES[kind], n=3, cutoff=0.0)
        raise ValueError(
            f"there is no topology {name!r}; near it: {', '.join(f'{kind}:{s}' for s in near)} "
            "(shapes are in chips)"
        )
