"""KV caches: one file per format, behind one small protocol.

A KV layer is a layer that makes keys or values. A cache stores one `KV` for each KV layer, and nothing for
consumers. The format chooses the pytrees in it; None stands for what the layer does not make. The model
passes the `KV` from the producer's write to the readers of the group and does not look inside. If only layers
with a sliding window read a KV layer, its `KV` is a ring of the newest tokens, in every format.

    spec = cache_spec(config, "int8", batch=8, capacity=2048, chunk=256)
    cache = spec.allocate()

A `CacheSpec` is static: it has the format, window and capacity of each KV layer. The `Cache` is the pytree of
arrays that a decode step takes and returns.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from cla_jax.cache.entries import UNIT, Entries
from cla_jax.cache.per_token import LayerCache, PerToken, Shape
from cla_jax.config import LatentKV, ModelConfig
from cla_jax.formats import FORMATS
from cla_jax.kv_map import KVHalves
from cla_jax.mesh import AxisRules, row_shards
from cla_jax.messages import near_choice
from cla_jax.model import decode_kernels
from cla_jax.model.attention import (
    KV,
    Partial,
    Segment,
    StepPositions,
    attend_segments,
)
from cla_jax.model.layers import axes
from cla_jax.model.platform import entries_at_once


class CacheFormat(Protocol):
    """How the keys and values of one KV layer are stored. All arrays are those of one device.

    `holds` says what the KV layer stores: "k" for keys, "v" for values, "kv" for both.

    A number that is not finite, or too large for the format, never reads back as a finite number. A format
    without scales keeps it (bfloat16 rounds numbers that are too large to infinity). In a format with scales,
    all numbers that share its scale read back as NaN, and no others change. In int8 and fp8 these are the key
    or the value of one token and head. In KIVI they are a key channel of 32 tokens, or 32 value channels of
    one token.
    """

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str:
        """The dtype that attention computes in."""
        ...

    @property
    def longest_block(self) -> int:
        """The most tokens to read at once. It keeps the dequantised block small compared with the cache."""
        ...

    # Tokens that a KV layer stores in full precision besides its entries, and that attention reads at once.
    in_full: ClassVar[int]

    def entries(self, tokens: int) -> int:
        """Entries that a KV layer needs for this number of tokens, before rounding up to blocks."""
        ...

    def shapes(self, config: ModelConfig, batch: int, entries: int, holds: str = "kv") -> Any:
        """The arrays of a KV layer: a `KV` of pytrees of `Shape`, with None for what it does not store."""
        ...

    def write(
        self, layer: LayerCache, kv: KV, positions_BT: jax.Array, entries: Entries
    ) -> LayerCache:
        """Stores the keys and values of T new tokens per row. Negative positions are padding: not stored."""
        ...

    def segments(
        self, layer: LayerCache, lengths_B: jax.Array, first: jax.Array, entries: Entries
    ) -> Sequence[Segment]:
        """The parts that attention reads. No query sees positions before `first`."""
        ...

    def kv_layer_bytes(self, config: ModelConfig, entries: int, holds: str = "kv") -> float:
        """Closed form: allocated bytes of a KV layer with this number of entries, for one row."""
        ...

    def held_bytes(self, config: ModelConfig, first: int, tokens: int, holds: str = "kv") -> float:
        """Closed form: bytes of a KV layer that positions `first` to `tokens` - 1 of one row use."""
        ...

    def written_bytes(self, config: ModelConfig, entries: int, holds: str = "kv") -> float:
        """Closed form: bytes written to such a KV layer per new token of one row, on average."""
        ...


LONGEST_BLOCK = 512


def make_format(name: str, dtype: str) -> CacheFormat:
    """The format with this name; attention computes in `dtype`.

    Raises ValueError for an unknown name, with the nearest ones.
    """
    near_choice("cache format", name, FORMATS)
    entry = FORMATS[name]
    made = getattr(importlib.import_module(f"cla_jax.cache.{entry.module}"), entry.name)
    return made(name=name, dtype=dtype, **entry.settings)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """The arrays of a cache: a decode step takes one and returns the next. Made by `CacheSpec.allocate`."""

    kv_layers: tuple[LayerCache, ...]
    lengths_B: jax.Array  # tokens of each row so far
    extra: Any = None  # what only some specs need: see `StepPositions.extra`


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Everything static about a cache. Make it with `cache_spec`, which checks it."""

    config: ModelConfig
    formats: tuple[CacheFormat, ...]  # of each KV layer
    batch: int
    capacity: int  # the most tokens of a row
    chunk: int  # the most tokens per row that a step writes
    rules: AxisRules
    shards: int  # devices that hold parts of one KV layer
    attention: str = decode_kernels.XLA  # what reads the cache, if it takes a step's queries

    # Whether `write` needs the ids of the tokens.
    reads_tokens: ClassVar[bool] = False

    @functools.cached_property
    def stored_config(self) -> ModelConfig:
        """The model as the cache keeps it: heads may be padded to a width that a kernel reads."""
        if self.attention == decode_kernels.XLA:
            return self.config
        width = decode_kernels.KERNELS[self.attention].kept_width(self.config.d_head)
        return dataclasses.replace(self.config, d_head=width)

    def _padded(self, heads: jax.Array) -> jax.Array:
        missing = self.stored_config.d_head - self.config.d_head
        return jnp.pad(heads, [(0, 0)] * (heads.ndim - 1) + [(0, missing)]) if missing else heads

    @functools.cached_property
    def windows(self) -> tuple[int, ...]:
        """The window of the layers that read each KV layer; 0 for none."""
        return tuple(kv.window for kv in self.config.sharing.kv_layers)

    @functools.cached_property
    def readers(self) -> tuple[int, ...]:
        """How many layers read each KV layer."""
        return tuple(kv.readers for kv in self.config.sharing.kv_layers)

    @functools.cached_property
    def readers_of(self) -> tuple[dict[str, int], ...]:
        """How many layers read each half that a KV layer holds: the keys, `k`, and the values, `v`."""
        each = (
            (kv.holds, {"k": kv.k_readers, "v": kv.v_readers})
            for kv in self.config.sharing.kv_layers
        )
        return tuple({half: readers[half] for half in holds} for holds, readers in each)

    @functools.cached_property
    def holds(self) -> tuple[KVHalves, ...]:
        """What each KV layer holds: keys, values, or both."""
        return tuple(kv.holds for kv in self.config.sharing.kv_layers)

    def representative(self, p: int) -> int:
        """The first KV layer with the format and the window of p: code that is compiled for it serves p."""
        kind = lambda layer: (self.formats[layer], self.windows[layer])
        return next(layer for layer in range(p + 1) if kind(layer) == kind(p))

    def is_ring(self, p: int) -> bool:
        return self.windows[p] > 0 and self.windows[p] + self.chunk - 1 < self.capacity

    def _tokens(self, p: int) -> int:
        """Tokens that KV layer p must hold.

        A ring has room for a window and what a step writes: the first query of a step still finds all that it
        may see.
        """
        return self.windows[p] + self.chunk - 1 if self.is_ring(p) else self.capacity

    def entries(self, p: int) -> int:
        """Entries of KV layer p, over all devices."""
        return round_up(self.formats[p].entries(self._tokens(p)), UNIT * self.shards)

    def block(self, p: int) -> int:
        """Entries of KV layer p that a device reads at once: all, or if there are many, a block in a loop.

        On a CPU, a step of few tokens and many rows reads fewer: see `entries_at_once`.
        """
        here = self.entries(p) // self.shards
        return here if here <= LONGEST_BLOCK else self.formats[p].longest_block

    @functools.partial(jax.jit, static_argnums=0)  # one dispatch, not one an array
    def allocate(self) -> Cache:
        """An empty cache, every array made where it will live."""

        def zeros(shape: Shape) -> jax.Array:
            spec = self.rules.spec(*axes(shape.letters))
            return jnp.zeros(shape.shape, shape.dtype, out_sharding=spec)

        layers = tuple(
            jax.tree.map(zeros, self.shapes(p), is_leaf=lambda x: isinstance(x, Shape))
            for p in range(len(self.formats))
        )
        lengths_B = jnp.zeros(self.batch, jnp.int32, out_sharding=self.rules.spec("batch"))
        return Cache(layers, lengths_B)

    @functools.partial(jax.jit, static_argnums=0, donate_argnames="cache")
    def reset(self, cache: Cache, rows_B: jax.Array, lengths_B: jax.Array) -> Cache:
        """The cache with these rows reset: each holds `lengths_B` tokens of its new sequence.

        What empty rows had is overwritten with zeros. An entry that is not used has a weight of 0, but 0
        times NaN is NaN: what is left of one sequence would reach the next. The cache is donated.
        """
        layers = tuple(
            self.on_devices(
                functools.partial(self.cleared, p), layer, rows_B, lengths_B, cache.extra
            )
            for p, layer in enumerate(cache.kv_layers)
        )
        lengths_B = jnp.where(rows_B, lengths_B, cache.lengths_B)
        return dataclasses.replace(cache, kv_layers=layers, lengths_B=lengths_B)

    def cleared(
        self,
        p: int,  # noqa: ARG002
        layer: LayerCache,
        rows_B: jax.Array,
        lengths_B: jax.Array,
        extra: Any,  # noqa: ARG002
    ) -> LayerCache:
        """KV layer p, or the part of it on one device, with zeros in those of these rows that are empty."""
        empty_B = rows_B & (lengths_B == 0)
        return jax.tree.map(
            lambda held: jnp.where(empty_B.reshape(-1, *[1] * (held.ndim - 1)), 0, held), layer
        )

    def shapes(self, p: int) -> Any:
        return self.formats[p].shapes(
            self.stored_config, self.batch, self.entries(p), self.holds[p]
        )

    def source(self, layers: Sequence[LayerCache], k: int, v: int) -> LayerCache:
        """The cache entries of layers whose keys are in KV layer k and whose values are in KV layer v."""
        return layers[k] if k == v else KV(layers[k].k_BSKH, layers[v].v_BSKH)

    def write(self, p: int, layer: LayerCache, kv: KV, step: StepPositions) -> LayerCache:
        """KV layer p with the KV of new tokens at their positions; negative positions are padding."""
        T = step.positions_BT.shape[1]
        assert self.chunk >= T, f"{T} tokens in a step of a cache made for {self.chunk}"
        return self.on_devices(functools.partial(self.write_here, p), layer, kv, step)

    def write_here(self, p: int, layer: LayerCache, kv: KV, step: StepPositions) -> LayerCache:
        """The same on one device, for its part of the KV layer."""
        kv = kv.each(self._padded)
        return self.formats[p].write(layer, kv, step.positions_BT, self._here(p))

    def on_devices(self, change: Callable[..., LayerCache], layer: LayerCache, *args: Any) -> Any:
        """`change(layer, *args)` on every device, for its part of a KV layer."""
        if jax.sharding.get_abstract_mesh().empty:
            return change(layer, *args)
        layouts = jax.tree.map(lambda array: jax.typeof(array).sharding.spec, layer)
        return jax.shard_map(change, out_specs=layouts, check_vma=False)(layer, *args)

    def attend(
        self,
        p: int,
        layer: LayerCache,
        q_BTKGH: jax.Array,
        step: StepPositions,
    ) -> jax.Array:
        """Attention of a step's new tokens over KV layer p, or the result of `source`. [B, T, K, G, H]"""
        local = functools.partial(self.attend_here, p)
        if jax.sharding.get_abstract_mesh().empty:
            return local(layer, q_BTKGH, step)
        letters, whole = axes("BTKGH"), self.rules
        if self._split_over is not None:  # every device reads its entries for all query heads
            whole = dataclasses.replace(self.rules, q_groups=None)
            q_BTKGH = jax.reshard(q_BTKGH, whole.partition(*letters))
        sharded = jax.shard_map(local, out_specs=whole.partition(*letters), check_vma=False)
        o_BTKGH = sharded(layer, q_BTKGH, step)
        if self._split_over is None:
            return o_BTKGH
        return jax.reshard(o_BTKGH, self.rules.partition(*letters))

    def attend_here(
        self, p: int, layer: LayerCache, q_BTKGH: jax.Array, step: StepPositions
    ) -> jax.Array:
        """The same on one device, over its part of the KV layer."""
        # Padding sees nothing, and must not make others read from the beginning. So it counts as `capacity`,
        # which no other query starts at: the minimum is that only if all queries are padding.
        first = jnp.min(jnp.where(step.positions_BT >= 0, step.starts_BT, self.capacity))
        B, T, K, G, _ = q_BTKGH.shape
        entries, width = self._here(p), B * K * max(self.stored_config.kept_widths)
        block = entries_at_once(entries.block, T * G, width)
        entries = dataclasses.replace(entries, block=block)
        segments = self.formats[p].segments(layer, step.lengths_B, first, entries)
        kernel = self._kernel(p, layer, q_BTKGH, step)
        o_BTKGH = attend_segments(
            self._padded(q_BTKGH),
            segments,
            step,
            self._split_over,
            self.stored_config.read_widths[1],
            scale=q_BTKGH.shape[-1] ** -0.5,
            kernel=kernel,
        )
        return o_BTKGH[..., : self.config.read_widths[1]]

    @property
    def _split_over(self) -> str | None:
        """The mesh axis whose devices hold parts of the entries of one KV layer."""
        axis = self.rules.cache_entries if self.shards > 1 else None
        assert axis is None or isinstance(axis, str)
        return axis

    def _kernel(self, p: int, layer: LayerCache, q_BTKGH: jax.Array, step: StepPositions) -> Any:
        """The kernel over KV layer p, if one is selected and supports this number of queries; else None."""
        kernel = self.kernel_for(q_BTKGH)
        if kernel is None:
            return None
        entries, format = self._here(p), self.formats[p]
        assert isinstance(format, PerToken)  # kernels refuse others
        positions_BE = entries.positions(jnp.arange(entries.capacity), step.lengths_B)
        kept = format.for_kernel(layer, positions_BE)

        def attend(q_BKNH: jax.Array, positions_BN: jax.Array, starts_BN: jax.Array) -> Partial:
            return kernel.attend(q_BKNH, kept, positions_BN, starts_BN)

        return attend

    def kernel_for(self, q_BTKGH: jax.Array) -> decode_kernels.Kernel | None:
        """What reads the cache instead of XLA, if it supports this number of queries; else None."""
        T, _, G = q_BTKGH.shape[1:4]
        kernel = decode_kernels.KERNELS.get(self.attention)
        return kernel if kernel is not None and kernel.queries >= T * G else None

    def observed(
        self, p: int, layer: LayerCache, q_BTKGH: jax.Array, step: StepPositions
    ) -> tuple[jax.Array, Any]:
        """The result of `attend`, and what this cache notes of a reader: by default nothing."""
        return self.attend(p, layer, q_BTKGH, step), None

    def settled(self, cache: Cache, notes: Sequence[Sequence[Any]], step: StepPositions) -> Cache:  # noqa: ARG002
        """The cache at the end of a step, after the last reader. `notes` are of each KV layer's readers."""
        return cache

    def part(self, p: int, shard: jax.Array | int = 0) -> Entries:
        """The entries of KV layer p on one of the devices that share it."""
        return Entries(
            capacity=self.entries(p) // self.shards,
            block=self.block(p),
            ring=self.is_ring(p),
            shards=self.shards,
            shard=shard,
        )

    def _here(self, p: int) -> Entries:
        axis = self.rules.cache_entries
        return self.part(p, jax.lax.axis_index(axis) if self.shards > 1 else 0)


def cache_spec(
    config: ModelConfig,
    format: str | CacheFormat | Sequence[str | CacheFormat] = "dense",
    *,
    batch: int,
    capacity: int,
    chunk: int = 1,
    rules: AxisRules = AxisRules(),
    attention: str = decode_kernels.XLA,
) -> CacheSpec:
    """The spec of a cache. Its `allocate` makes the arrays.

    Args:
      config: the model.
      format: a format or its name; or one for each KV layer.
      batch: number of rows. A row is one sequence.
      capacity: the most tokens of a row, prompt and new tokens together.
      chunk: the most tokens per row that a step writes.
      rules: layout on the mesh. If they split the entries of a KV layer, the mesh must be set.
      attention: `xla`, or a kernel of `cla_jax.model.decode_kernels`, which reads the cache in steps of few
        tokens.

    Raises:
      ValueError: an unknown format, or sizes that are not positive or do not fit the mesh. Or the format or
        the kernel does not support the model.
    """
    if isinstance(format, str) or not isinstance(format, Sequence):
        format = [format] * config.n_kv_layers
    formats = tuple(
        make_format(one, config.compute_dtype) if isinstance(one, str) else one for one in format
    )
    if len(formats) != config.n_kv_layers:
        raise ValueError(
            f"{len(formats)} cache formats for a model of {config.n_kv_layers} KV layers"
        )
    for group in config.sharing.groups:
        k, v = (formats[p] for p in config.sharing.read_by(group))
        if k != v:
            raise ValueError(
                f"cache formats {k.name} and {v.name}: layer {group.first} reads keys in the one and values "
                "in the other; they must be the same format"
            )
    for format in formats if isinstance(config.kv, LatentKV) else ():
        if not isinstance(format, PerToken):
            raise ValueError(
                f"cache format {format.name!r} does not support latents (model.kv.kind): use dense, float32, "
                "bfloat16, int8 or fp8"
            )
    for name, value in (("batch", batch), ("capacity", capacity), ("chunk", chunk)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"cache: {name} = {value} must be a positive integer")
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty or rules.cache_entries is None else mesh.shape[rules.cache_entries]
    if not mesh.empty:
        rows = row_shards(mesh)
        if batch % rows:
            raise ValueError(
                f"cache: batch = {batch} is not divisible by slice x data x fsdp = {rows} of the mesh"
            )
    names = tuple(one.name for one in formats)
    decode_kernels.check(attention, config, names)
    return CacheSpec(
        config=config,
        formats=formats,
        batch=batch,
        capacity=capacity,
        chunk=min(chunk, capacity),
        rules=rules,
        shards=shards,
        attention=attention,
    )


def round_up(entries: int, unit: int) -> int:
    """The capacity that holds this many entries: whole units."""
    return -(-entries // unit) * unit
