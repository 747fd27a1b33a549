"""Device mesh, and which mesh axis each logical axis of an array is split over.

All mesh axes are Explicit: the layout of an array is part of its type, and a layout that does not
work is an error at trace time. The model names logical axes only; `AxisRules` turns them into a
PartitionSpec.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cla_jax.config import Config, MeshConfig, ModelConfig

MESH_AXES = ("data", "fsdp", "model")

MeshAxis = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """Logical axis -> mesh axis. An axis that is not a field, or None, is not split."""

    batch: MeshAxis = ("data", "fsdp")  # rows of a batch
    embed: MeshAxis = "fsdp"  # D of a weight
    ff: MeshAxis = "model"
    vocab: MeshAxis = "model"
    kv_heads: MeshAxis = None  # K, if the mesh divides it; else the split moves to G
    q_groups: MeshAxis = None
    cache_entries: MeshAxis = None  # entries of a KV cache, dealt out in blocks

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

    def gathered(self) -> "AxisRules":
        """The rules of a weight at its use: whole along D, still split along heads and widths."""
        return dataclasses.replace(self, embed=None)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices. Raises ValueError unless the axes multiply to their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.model]
    known = math.prod(size for size in sizes if size != -1)
    shape = tuple(len(devices) // known if size == -1 else size for size in sizes)
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"placement.mesh: data x fsdp x model = {' x '.join(map(str, sizes))} does not make up "
            f"the {len(devices)} devices"
        )
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def axis_rules(model: ModelConfig, mesh: Mesh) -> AxisRules:
    """The rules for a model on a mesh; refuses, before any array exists, what cannot be split evenly.

    With fewer KV heads than the model axis has devices (MQA has one), the query groups are split and
    the keys and values replicated over that axis.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["model"]
    _divides("model.d_model", model.d_model, "fsdp", fsdp)
    _divides("model.d_ff", model.d_ff, "model", tensor)
    _divides("model.vocab_size", model.vocab_size, "model", tensor)
    if model.n_kv_heads % tensor == 0:
        return AxisRules(kv_heads="model")
    if model.q_groups % tensor == 0:
        return AxisRules(q_groups="model")
    raise ValueError(
        f"placement.mesh.model = {tensor} divides neither model.n_kv_heads = {model.n_kv_heads} nor "
        f"the {model.q_groups} query heads of each"
    )


def split_cache(rules: AxisRules, mesh: Mesh) -> AxisRules:
    """The rules with the entries of KV caches dealt out along the model axis, instead of copied to it.

    For models with fewer KV heads than the axis has devices. Raises ValueError where heads are split.
    """
    if mesh.shape["model"] == 1:
        raise ValueError("a KV cache is split over placement.mesh.model, which is 1")
    if rules.kv_heads is not None:
        raise ValueError(
            f"the KV heads are split over placement.mesh.model = {mesh.shape['model']} already: "
            "the cache has nothing left to split"
        )
    return dataclasses.replace(rules, cache_entries="model")


def check_batch(config: Config, mesh: Mesh) -> None:
    """Raises ValueError unless every microbatch splits evenly over the devices that take rows."""
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    rows = config.batch_size // config.placement.accumulate
    if rows % shards:
        raise ValueError(
            f"batch_size = {config.batch_size} in placement.accumulate = "
            f"{config.placement.accumulate} microbatches gives {rows} rows, which data x fsdp = "
            f"{mesh.shape['data']} x {mesh.shape['fsdp']} does not divide"
        )
    if config.placement.eval_batch_size % shards:
        raise ValueError(
            f"placement.eval_batch_size = {config.placement.eval_batch_size} is not divisible by "
            f"data x fsdp = {shards}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def _divides(field: str, size: int, axis: str, parts: int) -> None:
    if size % parts:
        raise ValueError(f"{field} = {size} is not divisible by placement.mesh.{axis} = {parts}")
