"""What an accelerator can do, by kind: figures for plans, rooflines and MFU.

TPU figures are a chip's as jax sees it (one device; of a TPU v7x chip, jax sees the two halves). Sources:
Google's system pages have FLOP/s, memory, its bandwidth, interconnect and wrap-around links. "How to Scale
Your Model" (Austin et al., 2025), chapters 2 and 5, has the one-way bandwidths of links and of the
data-centre network. GPUs are from NVIDIA's data sheets, dense, SXM. For a GPU, the link is NVLink, one way.
The network is the one port per GPU that NVIDIA's DGX and HGX systems have: 200 Gb/s for A100, 400 Gb/s since
then.
"""

import dataclasses
import difflib
import re

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
    links: str = "interconnect"  # what it is called

    @property
    def is_gpu(self) -> bool:
        return self.links == "NVLink"

    @property
    def interconnect(self) -> float:
        """Bytes/s through all axes together."""
        return self.link * self.axes


_GIB = 2**30

# Of what CUDA reports as a GPU's memory, the share that a plan counts on. jax takes three quarters unless
# the environment says otherwise.
_MEMORY_SHARE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
GPU_ENVIRONMENT = {_MEMORY_SHARE: "0.94"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU: what XLA must know to compile for it, as CUDA reports it, and what it does in a second."""

    description: str  # jax's device kind
    capability: int  # major number of the compute capability
    cores: int  # streaming multiprocessors
    lanes: int  # float32 units of each
    clock: float  # GHz
    memory: int  # bytes
    bandwidth: int  # bytes/s
    l2: int  # bytes
    shared: int  # bytes of shared memory of each core
    shared_by_block: int  # the most that a thread block may ask for
    flops: float  # dense bfloat16 FLOP/s
    link: float  # bytes/s of NVLink, one way
    network: float  # bytes/s of its network port

    def chip(self) -> "Chip":
        return Chip(
            flops=self.flops,
            memory=self.memory * float(GPU_ENVIRONMENT[_MEMORY_SHARE]),
            bandwidth=self.bandwidth,
            link=self.link,
            axes=1,
            network=self.network,
            links="NVLink",
        )


GPUS = {
    "a100-80": Gpu(
        description="NVIDIA A100-SXM4-80GB",
        capability=8,
        cores=108,
        lanes=64,
        clock=1.41,
        memory=85100068864,
        bandwidth=2039040000000,
        l2=41943040,
        shared=167936,
        shared_by_block=166912,
        flops=312e12,
        link=300e9,
        network=25e9,
    ),
    "h100": Gpu(
        description="NVIDIA H100 80GB HBM3",
        capability=9,
        cores=132,
        lanes=128,
        clock=1.98,
        memory=84942979072,
        bandwidth=3352320000000,
        l2=52428800,
        shared=233472,
        shared_by_block=232448,
        flops=989e12,
        link=450e9,
        network=50e9,
    ),
    "h200": Gpu(
        description="NVIDIA H200",
        capability=9,
        cores=132,
        lanes=128,
        clock=1.98,
        memory=151397597184,
        bandwidth=4800000000000,
        l2=52428800,
        shared=233472,
        shared_by_block=232448,
        flops=989e12,
        link=450e9,
        network=50e9,
    ),
    "b200": Gpu(
        description="NVIDIA B200",
        capability=10,
        cores=148,
        lanes=128,
        clock=1.965,
        memory=191514411008,
        bandwidth=7672320000000,
        l2=132644864,
        shared=233472,
        shared_by_block=232448,
        flops=2250e12,
        link=900e9,
        network=50e9,
    ),
}

_V5E = Chip(flops=197e12, memory=16 * _GIB, bandwidth=819e9, link=90e9, axes=2, network=3.1e9)
_V5P = Chip(flops=459e12, memory=95 * _GIB, bandwidth=2765e9, link=180e9, axes=3, network=6.25e9)
_V6E = Chip(flops=918e12, memory=32 * _GIB, bandwidth=1640e9, link=180e9, axes=2, network=6.25e9)

# By jax's device kind, whole. A card with a similar name has other figures. There is an A100 with 40 GB, H100
# PCIe and NVL are slower than SXM, and GH200 is not H200.
CHIPS = {gpu.description: gpu.chip() for gpu in GPUS.values()} | {
    "TPU v4": Chip(
        flops=275e12, memory=32 * _GIB, bandwidth=1228e9, link=90e9, axes=3, network=6.25e9
    ),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
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
    return CHIPS.get(device_kind)


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
_TPUS = {"v4": _CUBE, "v5e": _PLANE, "v5p": _CUBE, "v6e": _PLANE, "v7x": _CUBE}

# Shapes of GPU systems: GPUs of one host, or hosts x GPUs. Other numbers of hosts are taken too.
_HOST = ("1", "2", "4", "8")
_HOSTS = tuple(f"{hosts}x8" for hosts in (2, 4, 8, 16, 32, 64, 128))
_GPU_SHAPE = re.compile(r"(?:([1-9][0-9]{0,3})x)?([1248])")


# By our name of a kind of accelerator.
TOPOLOGIES = _TPUS | dict.fromkeys(GPUS, (*_HOST, *_HOSTS))


def is_gpu(name: str) -> bool:
    """Whether a topology, `h100:16x8`, is one of GPUs."""
    return name.partition(":")[0] in GPUS


def gpu_shape(name: str) -> tuple[int, int]:
    """Hosts, and GPUs of each, of a topology of GPUs."""
    check_topology(name)
    match = _GPU_SHAPE.fullmatch(name.partition(":")[2])
    assert match is not None  # it was checked
    return int(match[1] or 1), int(match[2])


def gpu_target(kind: str) -> str:
    """The description of a GPU that XLA's compiler takes in its place, as text of a protocol buffer."""
    gpu = GPUS[kind]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          core_count: {gpu.cores} fpus_per_core: {gpu.lanes} clock_rate_ghz: {gpu.clock}
          shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
          shared_memory_per_block_optin: {gpu.shared_by_block}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          device_memory_size: {gpu.memory} memory_bandwidth: {gpu.bandwidth} l2_cache_size: {gpu.l2}
          cuda_compute_capability {{ major: {gpu.capability} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "{gpu.description}"
    """


def wrap(name: str) -> tuple[bool, bool, bool]:
    """Along which axes the links of a topology close to a ring; none of GPUs, which are joined by switches.

    Of v4, v5p and 7x, optical switches join whole cubes of 4 x 4 x 4 chips, and close every axis. On v5e
    and v6e an axis is closed where it is as long as the pod.
    """
    kind, _, shape = name.partition(":")
    if kind in GPUS:
        return False, False, False
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
    near_choice("kind of accelerator", kind, TOPOLOGIES)
    if shape in TOPOLOGIES[kind] or (kind in GPUS and _GPU_SHAPE.fullmatch(shape)):
        return
    near = difflib.get_close_matches(shape, TOPOLOGIES[kind], n=3, cutoff=0.0)
    unit = "GPUs of one host, or hosts x GPUs" if kind in GPUS else "chips"
    raise ValueError(
        f"unknown topology {name!r}; similar ones: {', '.join(f'{kind}:{s}' for s in near)} "
        f"(shapes in {unit})"
    )
