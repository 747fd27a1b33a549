"""Device mesh, and which mesh axis each logical axis of an array is split over.

All mesh axes are Explicit. The layout of an array is part of its type, so a layout that does not work is an
error at trace time. The model names logical axes only; `AxisRules` turns them into a PartitionSpec.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from cla_jax import chips
from cla_jax.config import Config, MeshConfig, ModelConfig

MESH_AXES = ("slice", "data", "fsdp", "model")

log = logging.getLogger(__name__)

MeshAxis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Logical axis -> mesh axis. An axis that is not a field, or None, is not split."""

    batch: MeshAxis = ("slice", "data", "fsdp")  # rows of a batch
    embed: MeshAxis = "fsdp"  # D of a weight
    ff: MeshAxis = "model"
    vocab: MeshAxis = "model"
    kv_heads: MeshAxis = None  # K, if the mesh divides it; else the split moves to G
    q_groups: MeshAxis = None
    cache_entries: MeshAxis = None  # entries of a KV cache, distributed in blocks
    sequence: MeshAxis = None  # T of what the backward pass keeps of the residual stream

    def spec(self, *axes: str | None) -> PartitionSpec | None:
        """The PartitionSpec of an array with these logical axes; None where no mesh is set.

        Raises ValueError if two axes of the array would be split over one mesh axis.
        """
        if jax.sharding.get_abstract_mesh().empty:
            return None
        return self.partition(*axes)

    def partition(self, *axes: str | None) -> PartitionSpec:
        """As `spec`, whether a mesh is set or not."""
        split = [getattr(self, axis, None) if axis else None for axis in axes]
        seen: dict[str, str | None] = {}
        for axis, target in zip(axes, split, strict=True):
            for mesh_axis in (target,) if isinstance(target, str) else target or ():
                if mesh_axis in seen:
                    raise ValueError(
                        f"axes {seen[mesh_axis]} and {axis} of one array are both split over the "
                        f"mesh axis {mesh_axis!r}"
                    )
                seen[mesh_axis] = axis
        return PartitionSpec(*split)

    def own_sums(self, *axes: str | None) -> PartitionSpec | None:
        """Of the gradient of a weight, summed over a device's own rows only: to be added up over devices.

        None where no mesh is set.
        """
        spec = self.gathered().spec(*axes)
        return None if spec is None else spec.update(unreduced=frozenset(self.batch or ()))

    def gathered(self) -> "AxisRules":
        """The rules of a weight at its use: whole along D, still split along heads and widths."""
        return dataclasses.replace(self, embed=None)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices. Raises ValueError unless the axes multiply to their number.

    Neighbours along `slice` are on different TPU slices, all other neighbours on one.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.slice, config.data, config.fsdp, config.model]
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"placement.mesh: slice x data x fsdp x model = {' x '.join(map(str, sizes))} does not "
            f"match the {len(devices)} devices"
        )
    # Of GPUs the slice is the node, over which FSDP may well run.
    on_tpu = devices[0].platform == "tpu"
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if on_tpu else 1
    if slices not in (1, config.slice):
        raise ValueError(
            f"placement.mesh.slice = {config.slice}, but the devices form {slices} slices: set it to {slices}"
        )
    # An axis of the mesh need not be an axis of the torus: 16 x 16 chips may be 128 x 2.
    if slices == 1:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        within, across = (1, *shape[1:]), (shape[0], 1, 1, 1)
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, allow_split_physical_axes=True
        )
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def choose_mesh(
    mesh: MeshConfig, model: ModelConfig, rows: int, seq_len: int, devices: Sequence[Any]
) -> tuple[MeshConfig, str]:
    """The mesh that `placement.mesh.auto` stands for, and why; `rows` are those of a microbatch.

    Splitting weights over all chips (FSDP) costs nothing as long as a chip computes longer on its tokens
    than the weights take to arrive: tokens per chip >= FLOP/s / interconnect bandwidth. Below that, and where
    a batch has fewer rows than there are chips, heads and widths are split too (tensor parallelism), as
    little as possible. ("How to Scale Your Model", chapter 5.)
    """
    slices = mesh.slice
    count = len(devices) // slices
    if count * slices != len(devices) or count == 0:
        raise ValueError(
            f"placement.mesh.slice = {slices} does not divide the {len(devices)} devices"
        )
    rows //= slices
    chip = chips.find(devices[0].device_kind)
    critical = chip.flops / chip.interconnect if chip and chip.axes else 0.0
    limit = model.d_ff / critical if critical else 1.0  # of devices that a layer's width hides
    tensor, chips_with_rows, fsdp, tokens = count, 1, 1, rows * seq_len
    for tensor in (t for t in range(1, count + 1) if count % t == 0 and rows % (count // t) == 0):
        chips_with_rows = count // tensor
        # What FSDP cannot split evenly, copies of the parameters take.
        fsdp = math.gcd(chips_with_rows, model.d_model)
        # A chip holds 1 / tensor of the weights it gathers, and does as little of the work on them.
        tokens = rows // chips_with_rows * seq_len
        if tokens >= critical or tensor == count or tensor * 2 > limit:
            break
    chosen = dataclasses.replace(
        mesh, auto=False, data=chips_with_rows // fsdp, fsdp=fsdp, model=tensor
    )
    why = f"{tokens:,} tokens per device and microbatch"
    if critical:
        side = "above" if tokens >= critical else "below"
        why += (
            f", {side} the {critical:,.0f} at which gathering weights hides behind computing with them; "
            f"tensor parallelism hides up to {limit:.1f} devices"
        )
    else:
        why += f"; no bandwidths are known for {devices[0].device_kind}: weights are split over all"
    return chosen, why


def row_shards(mesh: Mesh | AbstractMesh) -> int:
    """Devices that see different rows of a batch."""
    return mesh.shape["slice"] * mesh.shape["data"] * mesh.shape["fsdp"]


def axis_rules(model: ModelConfig, mesh: Mesh) -> AxisRules:
    """The rules for a model on a mesh.

    If there are fewer KV heads than devices on the model axis (MQA has one), the query groups are split over
    that axis. Keys and values are then replicated. A width or vocabulary that the model axis does not divide
    stays whole, with a warning: each of its devices then does all of that work. Raises ValueError, before any
    array exists, for an fsdp axis that does not divide d_model: every weight has that axis.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["model"]
    if model.d_model % fsdp:
        raise ValueError(
            f"model.d_model = {model.d_model} is not divisible by placement.mesh.fsdp = {fsdp}"
        )
    sizes = {
        "ff": ("model.d_ff", model.d_ff),
        "vocab": ("model.vocab_size", model.vocab_size),
        "kv_heads": ("model.n_kv_heads", model.n_kv_heads),
        "q_groups": ("query heads of a KV head", model.q_groups),
    }
    split = {axis: "model" if size % tensor == 0 else None for axis, (_, size) in sizes.items()}
    if split["kv_heads"] or tensor == 1:
        split["q_groups"] = None
    whole = [sizes[axis] for axis in ("ff", "vocab") if not split[axis]]
    if not split["kv_heads"] and not split["q_groups"]:
        whole += [sizes["kv_heads"], sizes["q_groups"]]
    if whole:
        log.warning(
            "SLOW: placement.mesh.model = %d does not divide %s: every device computes this part completely",
            tensor,
            ", ".join(f"{name} = {size}" for name, size in whole),
        )
    return AxisRules(**split)


def sequence_parallel(rules: AxisRules, mesh: Mesh, seq_len: int) -> AxisRules:
    """The rules with the residual stream, where it is kept for the backward pass, split along the model axis.

    There all of its devices hold the same otherwise. A reduce-scatter where attention or MLP end, and an
    all-gather where they begin, move together what an all-reduce does; recomputing gathers once more.
    (2205.05198, section 4.2.2.)
    """
    size = mesh.shape["model"]
    split = size > 1 and seq_len % size == 0
    return dataclasses.replace(rules, sequence="model") if split else rules


def split_cache(rules: AxisRules, mesh: Mesh) -> AxisRules:
    """The rules with the entries of KV caches distributed along the model axis, instead of copied to it.

    For models with fewer KV heads than the axis has devices. Raises ValueError where heads are split.
    """
    if mesh.shape["model"] == 1:
        raise ValueError("splitting a KV cache needs placement.mesh.model above 1; it is 1")
    if rules.kv_heads is not None:
        raise ValueError(
            f"the KV heads are already split over placement.mesh.model = {mesh.shape['model']}: do not "
            "split the cache as well"
        )
    return dataclasses.replace(rules, cache_entries="model")


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ValueError unless every microbatch splits evenly over the devices that take rows."""
    shards = row_shards(mesh)
    sizes = " x ".join(str(mesh.shape[axis]) for axis in ("slice", "data", "fsdp"))
    rows = config.batch_size // config.placement.accumulate
    if rows % shards:
        raise ValueError(
            f"batch_size = {config.batch_size} / placement.accumulate = {config.placement.accumulate} gives "
            f"{rows} rows per microbatch, which slice x data x fsdp = {sizes} does not divide"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())
