"""Devices to compile for, which need not be at hand: slices of TPUs, hosts of GPUs."""

import contextlib
import dataclasses
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from cla_jax import chips, machine

_MEGACORE: dict[str, Any] = {
    "chip_config_name": "megacore",  # two cores as one device, as jax runs them
    "chips_per_host_bounds": (2, 2, 1),
}
# Where libtpu has another name or needs options.
_LIBTPU_NAMES = {"v7x": "tpu7x"}
_LIBTPU_OPTIONS = {"v4": _MEGACORE}
HERE = "here"  # the devices at hand


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for, which need not be at hand."""

    name: str  # `v5e:16x16`, `h100:16x8`, or `here` for those at hand
    slices: int
    devices: Sequence[Any]
    per_host: int = 0  # GPUs that NVLink joins; 0 for TPUs, and where it is not known

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def topology(name: str, slices: int = 1) -> Topology:
    """The devices of `v5e:16x16`, `h100:16x8` and so on, several slices of it, or those `here`.

    Raises ValueError for a topology that does not exist, and if its compiler is not installed. In the
    environment should stand what keeps compilers from looking for accelerators here (`launch.plan` sees to
    it).
    """
    if name == HERE:
        return Topology(name, 1, jax.devices())
    kind, _, shape = name.partition(":")
    chips.check_topology(name)
    if chips.is_gpu(name):
        return _gpus(name, slices)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "compiling for a TPU needs libtpu: pip install -e '.[plan]' in the repository"
        ) from None
    from jax.experimental import topologies

    with machine.stderr_to_nowhere():
        description = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{_LIBTPU_NAMES.get(kind, kind)}:{shape}",
            wrap=chips.wrap(name),
            **_LIBTPU_OPTIONS.get(kind, {}),
            **({"num_slices": slices} if slices > 1 else {}),
        )
    return Topology(name, slices, description.devices)


# What compiles for GPUs: jax's plugin for CUDA with the runtime that holds XLA, and cuDNN, which says how
# much memory its kernels take.
CUDA = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12")


def _gpus(name: str, slices: int) -> Topology:
    missing = [package for package in CUDA if not _installed(package)]
    if missing:
        raise ValueError(
            f"compiling for a GPU needs {', '.join(missing)}: pip install -e '.[plan-gpu]' in the repository"
        )
    hosts, per_host = chips.gpu_shape(name)
    from jax.experimental import topologies

    with machine.stderr_to_nowhere():
        description = topologies.get_topology_desc(
            platform="cuda",
            target_config=chips.gpu_target(name.partition(":")[0]),
            topology=f"1x{hosts * slices}x{per_host}",
        )
    return Topology(name, slices, description.devices, per_host)


def _installed(package: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=package)))


@contextlib.contextmanager
def asked_of(devices: Sequence[Any]) -> Iterator[None]:
    """Has jax judge what cuDNN takes by the devices that are compiled for; it asks those at hand."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    capability = getattr(devices[0], "compute_capability", None)
    if capability is None or devices[0] in jax.local_devices():
        yield
        return
    numbers = lambda text: tuple(map(int, text.split(".")))
    replaced = {
        "check_compute_capability": lambda least: numbers(capability) >= numbers(least),
        "is_cuda_compute_capability_equal": lambda exact: numbers(capability) == numbers(exact),
    }
    original = {name: getattr(cudnn, name) for name in replaced}
    try:
        for name, check in replaced.items():
            setattr(cudnn, name, check)
        yield
    finally:
        for name, check in original.items():
            setattr(cudnn, name, check)
