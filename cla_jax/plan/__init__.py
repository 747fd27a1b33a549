"""What a training run will need on a pod or a GPU cluster, before there is one: its real step, compiled for
the topology.

TPU programs are compiled by libtpu and GPU programs by jax's CUDA plugin, both on any machine. Beside the
compiler's figures stand our own: what the closed forms say, at once and for any layout. Where the two
disagree, one of them is wrong, and worth a look.
"""

import dataclasses
from pathlib import Path

from cla_jax import chips, costs, hlo
from cla_jax.config import Config
from cla_jax.plan.compiler import compiled_step
from cla_jax.plan.estimates import estimate, recomputed_flops, roofline, rows
from cla_jax.plan.topologies import HERE, Topology
from cla_jax.session import Layout, plan_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step needs on each device. Bytes and seconds, unless said otherwise."""

    name: str
    topology: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    attention: str
    remat: str
    accumulate: int
    rows: int  # sequences of a device in a microbatch
    fits: bool
    memory: float | None  # of a device; None where it is not known
    peak: int  # by the compiler
    parts: dict[str, int]  # of the peak; parameters and optimizer exact, the others by our estimate
    estimate: int  # our closed forms, together
    flops: float  # of a step on all devices, by `costs.train_flops_per_token`
    recomputed_flops: float  # on top of them, by rematerialisation
    collective_bytes: dict[str, int]  # a step hands each device, by kind
    network_bytes: dict[str, int]  # of GPUs: a step takes through the network port of each, by kind
    traffic: int  # a step moves to and from the main memory of each device
    copied: int  # of these, only to change the layout of an array
    roofline: dict[str, float]  # seconds of a step that each resource takes, if nothing else did
    buffers: tuple[hlo.Buffer, ...]  # the largest
    advice: str  # where it does not fit: what to change first
    compile_seconds: float

    @property
    def step_seconds(self) -> float | None:
        """The least a step can take: the slowest resource, everything else hidden behind it."""
        return max(self.roofline.values(), default=None)

    def mfu(self) -> float | None:
        """The most that can be reached: useful FLOPs over what the devices could do in that time."""
        chip = chips.find(self.device_kind)
        if chip is None or self.step_seconds is None:
            return None
        return self.flops / (self.step_seconds * chip.flops * self.devices)

    @property
    def links(self) -> str:
        """What joins the devices of a host or a slice."""
        chip = chips.find(self.device_kind)
        return chip.links if chip else "interconnect"

    @property
    def on_gpus(self) -> bool:
        """Whether the devices are GPUs whose figures are known."""
        chip = chips.find(self.device_kind)
        return chip is not None and chip.is_gpu

    @property
    def elsewhere(self) -> bool:
        """Whether the step was compiled for devices that are not at hand."""
        return self.topology != HERE

    @property
    def chips(self) -> int:
        """What is bought; jax may see several devices of a chip."""
        chip = chips.find(self.device_kind)
        return self.devices // (chip.devices if chip else 1)

    def days(self, steps: int, mfu: float | None = None) -> float | None:
        """Of so many steps, at an MFU that is assumed, or else the least they can take."""
        chip = chips.find(self.device_kind)
        if chip is None or self.step_seconds is None:
            return None
        seconds = self.flops / (mfu * chip.flops * self.devices) if mfu else self.step_seconds
        return steps * seconds / 86_400


def plan(config: Config, topology: Topology, cache: Path | None = None) -> Plan:
    """Compiles the step of a config for a topology, and says what it needs.

    If `cache` is given, the compiler's output is stored there under the program's own text. So a config that
    changes nothing in the program is not compiled again. Raises ValueError, before compiling, where the mesh
    or the batch does not fit the devices; ChildProcessError if the compiler was killed.
    """
    layout = plan_layout(config, topology.devices)
    kind = topology.devices[0].device_kind
    chip = chips.find(kind)
    estimated = estimate(layout)
    compiled = compiled_step(layout, topology, cache)
    # The compilers of GPUs and CPUs do not mind a program that does not fit.
    fits = compiled["fits"] and (chip is None or compiled["peak"] <= chip.memory)
    model, tokens = config.model, config.tokens_per_step
    flops = costs.train_flops_per_token(model, config.data.seq_len) * tokens
    recomputed = recomputed_flops(config, layout.options.attention) * tokens
    return Plan(
        name=config.name,
        topology=str(topology),
        devices=len(topology.devices),
        device_kind=kind,
        mesh=dict(layout.mesh.shape),
        attention=layout.options.attention,
        remat=config.placement.remat,
        accumulate=config.placement.accumulate,
        rows=rows(layout),
        fits=fits,
        memory=chip.memory if chip else None,
        peak=compiled["peak"],
        parts=estimated | {"rest": compiled["peak"] - sum(estimated.values())},
        estimate=sum(estimated.values()),
        flops=flops,
        recomputed_flops=recomputed,
        collective_bytes=compiled["collective_bytes"],
        network_bytes=compiled["network_bytes"],
        traffic=compiled["traffic"]["total"],
        copied=compiled["traffic"]["copies"],
        roofline=roofline(layout, chip, flops + recomputed, compiled),
        buffers=tuple(hlo.Buffer(**buffer) for buffer in compiled["buffers"]),
        advice="" if fits else _advice(layout),
        compile_seconds=compiled["seconds"],
    )


def _advice(layout: Layout) -> str:
    placement = layout.config.placement
    if placement.remat != "block":
        return "set placement.remat = block, which recomputes blocks in the backward pass"
    if rows(layout) % 2 == 0:
        return f"set placement.accumulate = {2 * placement.accumulate}, which halves the microbatch"
    return "use more chips, or placement.mesh.model above 1"
