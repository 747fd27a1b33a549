"""Who shares keys and values with whom.

A map has one entry per layer: `k_map[i]` is the layer whose keys layer `i` attends to, `v_map[i]` the layer
whose values its weights sum. Mostly both are one map, `kv_map`: that is cross-layer attention (CLA, Brandon
et al. 2024). A layer with `k_map[i] == i` or `v_map[i] == i` is a *producer*: it projects keys, values, or
both, and writes them to a cache. A layer that does neither is a *consumer*. From the maps alone follow

    groups      consecutive layers with the same sources: the unit of structure of the model,
    stacks      consecutive groups of equal shape: what one `jax.lax.scan` executes in training,
    KV layers   the layers that make keys or values, in order: a KV cache has an entry for each.

Example, six layers with CLA2 (2405.12981, section 3):

    kv_map      (0, 0, 2, 2, 4, 4)
    groups      0-1, 2-3, 4-5     (three producing groups of two layers)
    stacks      one, of three groups
    KV layers   0, 2, 4           (half the KV cache)

Keys of the middle layer and values of the bottom layer for the upper half (`fused-lite`), six layers:

    k_map       (0, 1, 2, 2, 2, 2)
    v_map       (0, 1, 2, 0, 0, 0)
    groups      0, 1, 2, 3-5
    KV layers   0, 1, 2           (half the KV cache)
"""

import bisect
import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Callable
from typing import Literal

from cla_jax.messages import shown
from cla_jax.typed_numbers import whole_number

KvMap = tuple[int, ...]
# Keys, values, both, or neither.
KVHalves = Literal["", "k", "v", "kv"]


# ------------------------------------------------------------------------------------ structure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Consecutive layers with the same sources of keys and of values."""

    first: int  # its first layer
    size: int  # number of layers
    k_source: int  # the layer whose keys all of them read; `first` if they are its own
    v_source: int  # likewise for values
    reused: KVHalves  # what later groups read of this one

    @property
    def projects(self) -> KVHalves:
        """What it projects itself."""
        return _kv_halves(self.k_source == self.first, self.v_source == self.first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Consecutive groups that make the same and read the same earlier layers, or one consuming group."""

    groups: tuple[Group, ...]

    @property
    def size(self) -> int:
        """Layers in each of its groups."""
        return self.groups[0].size

    @property
    def projects(self) -> KVHalves:
        return self.groups[0].projects

    @property
    def reused(self) -> KVHalves:
        return self.groups[0].reused


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayer:
    """A layer that makes keys or values. A KV cache stores them."""

    layer: int
    holds: KVHalves
    k_readers: int  # layers that read its keys, itself included
    v_readers: int
    readers: int  # layers that read its keys, its values, or both
    window: int  # of all of them; 0 for none


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Who reads whose keys and values, and all that follows from it. One entry per layer."""

    k_map: KvMap
    v_map: KvMap
    windows: tuple[int, ...]  # 0 for none; equal for layers that share

    @property
    def is_split(self) -> bool:
        """Whether keys and values are shared differently."""
        return self.k_map != self.v_map

    @functools.cached_property
    def groups(self) -> tuple[Group, ...]:
        """The layers, cut into runs with the same sources.

        A layer that makes keys or values always starts a group. The layers after it either read the same as
        it does, and belong to its group, or start another.
        """
        runs, first = [], 0
        for sources, layers in itertools.groupby(zip(self.k_map, self.v_map, strict=True)):
            size = len(list(layers))
            runs.append((first, size, *sources))
            first += size
        later_k = {k for first, _, k, _ in runs if k != first}
        later_v = {v for first, _, _, v in runs if v != first}
        return tuple(
            Group(
                first=first,
                size=size,
                k_source=k,
                v_source=v,
                reused=_kv_halves(first == k and k in later_k, first == v and v in later_v),
            )
            for first, size, k, v in runs
        )

    @functools.cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """Consecutive groups that make and read the same, of equal size; a consuming group stands alone."""

        def shape(group: Group) -> tuple:
            if not group.projects:
                return (group.first,)
            # All groups of a stack read the same array of an earlier group.
            elsewhere = [s for s in (group.k_source, group.v_source) if s != group.first]
            return (group.size, group.projects, group.reused, *elsewhere)

        return tuple(
            Stack(groups=tuple(run)) for _, run in itertools.groupby(self.groups, key=shape)
        )

    @functools.cached_property
    def kv_layers(self) -> tuple[KVLayer, ...]:
        """The layers that make keys or values. A cache keeps what they make in this order."""
        sources = list(zip(self.k_map, self.v_map, strict=True))
        return tuple(
            KVLayer(
                layer=group.first,
                holds=group.projects,
                k_readers=self.k_map.count(group.first),
                v_readers=self.v_map.count(group.first),
                readers=sum(group.first in pair for pair in sources),
                window=self.windows[group.first],
            )
            for group in self.groups
            if group.projects
        )

    def read_by(self, group: Group) -> tuple[int, int]:
        """The KV layers whose keys, and whose values, a group's layers read: indices in `kv_layers`."""
        return self._index_of[group.k_source], self._index_of[group.v_source]

    @functools.cached_property
    def together(self) -> tuple[int, ...]:
        """For each KV layer, the first KV layer of its set. A set is what layers read together.

        A layer that reads the keys of one KV layer and the values of another reads the two together, so it
        joins their sets (union-find). A KV layer that is read alone is its own set.
        """
        firsts = list(range(len(self.kv_layers)))
        for group in self.groups:
            low, high = sorted(firsts[p] for p in self.read_by(group))
            firsts = [low if p == high else p for p in firsts]
        return tuple(firsts)

    @functools.cached_property
    def _index_of(self) -> dict[int, int]:
        return {kv.layer: p for p, kv in enumerate(self.kv_layers)}

    def count(self, half: Literal["k", "v"]) -> int:
        """How many layers make keys, or values."""
        return sum(half in kv.holds for kv in self.kv_layers)


def _kv_halves(keys: bool, values: bool) -> KVHalves:
    if keys:
        return "kv" if values else "k"
    return "v" if values else ""


def validate(kv_map: KvMap, n_layers: int) -> None:
    """Raises ValueError, naming the offending layer, unless every layer reads a producer at or below it."""
    if len(kv_map) != n_layers:
        raise ValueError(f"it has {len(kv_map)} entries, but model.n_layers = {n_layers}")
    for layer, source in enumerate(kv_map):
        if not 0 <= source < n_layers:
            raise ValueError(
                f"kv_map[{layer}] is {shown(source)}; sources are layers 0 to {n_layers - 1}"
            )
        if source > layer:
            raise ValueError(
                f"kv_map[{layer}] is {source}: layer {layer} would read the keys and values of a "
                "later layer"
            )
        if kv_map[source] != source:
            raise ValueError(
                f"kv_map[{layer}] is {shown(source)}, but layer {source} is a consumer itself "
                f"(kv_map[{source}] is {kv_map[source]}): use {kv_map[source]} or {layer}"
            )


# ------------------------------------------------------------------------------------- builders


# Names of the builders' arguments in messages, with what they count.
_FACTOR = "FACTOR (layers per group)"
_KV_LAYERS = "KV_LAYERS (how many layers make keys and values)"
_SHARED_LAYERS = "SHARED_LAYERS (how many layers read those of a layer below)"


def no_sharing(n_layers: int) -> KvMap:
    """Every layer is a producer: an ordinary transformer, CLA1 in the paper's words."""
    return tuple(range(n_layers))


def cla(n_layers: int, factor: int, short_group: Literal["first", "last"] = "first") -> KvMap:
    """CLA`factor` (2405.12981, section 3.1 and figure 2): groups of `factor` consecutive layers.

    Where `factor` does not divide `n_layers`, one group is shorter. The paper's picture of ten layers
    under CLA3 has producers 0, 1, 4, 7, the short group first; Hunyuan-like code puts it last.
    """
    _check_count("cla", _FACTOR, factor, n_layers)
    if short_group not in ("first", "last"):
        raise ValueError(f"cla: short_group = {shown(short_group)} must be 'first' or 'last'")
    offset = n_layers % factor if short_group == "first" else 0
    return tuple(
        0 if layer < offset else layer - (layer - offset) % factor for layer in range(n_layers)
    )


def keep_ends(n_layers: int) -> KvMap:
    """1B-KeepEnds (2405.12981, section 3.2.2): first and last layer alone, CLA2 between them.

    Twenty layers: 0 | 1,1 | 3,3 | ... | 17,17 | 19, eleven producers.
    """
    _check_depth("keep-ends", n_layers, 3)
    middle = cla(n_layers - 2, min(2, n_layers - 2), "last")
    return (0, *(1 + source for source in middle), n_layers - 1)


def dense_front(n_layers: int) -> KvMap:
    """1B-DenseFront (2405.12981, section 3.2.2): the first half produce, the rest but the last share one.

    Twenty layers: 0-9 produce, 10-18 read layer 9, 19 produces; eleven producers.
    """
    _check_depth("dense-front", n_layers, 3)
    half = n_layers // 2
    return (*range(half), *[half - 1] * (n_layers - half - 1), n_layers - 1)


def dense_back(n_layers: int) -> KvMap:
    """1B-DenseBack (2405.12981, section 3.2.2): the mirror image, sharing near the bottom.

    The paper's text counts 2 + 10 + 9 = 21 layers for a model of 20. Its table gives 11 KV layers,
    which leaves one reading for 20 layers: 0 and 1 produce, 2-10 read layer 1, 11-19 produce.
    """
    _check_depth("dense-back", n_layers, 4)
    half = n_layers // 2
    return (0, 1, *[1] * (half - 1), *range(half + 1, n_layers))


def pizza(n_layers: int, n_kv_layers: int) -> KvMap:
    """Pizza-bottom (2410.14442): `n_kv_layers - 1` layers read their own K/V, all later ones the next K/V."""
    _check_count("pizza", _KV_LAYERS, n_kv_layers, n_layers)
    return (*range(n_kv_layers - 1), *[n_kv_layers - 1] * (n_layers - n_kv_layers + 1))


def sandwich(n_layers: int, n_kv_layers: int) -> KvMap:
    """Sandwich-bottom (2410.14442): layers at both ends read their own K/V, one shared block between.

    Of the `n_kv_layers - 1` layers that alone read their K/V, the larger half is at the bottom.
    """
    _check_count("sandwich", _KV_LAYERS, n_kv_layers, n_layers)
    top = (n_kv_layers - 1) // 2
    bottom = n_kv_layers - 1 - top
    return (
        *range(bottom),
        *[bottom] * (n_layers - top - bottom),
        *range(n_layers - top, n_layers),
    )


def lasagna(n_layers: int, n_kv_layers: int) -> KvMap:
    """Lasagna-bottom (2410.14442): `n_kv_layers` consecutive groups, as equal as they can be.

    Producers are floor(p * n_layers / n_kv_layers), as in MLKV (2406.09297). With `n_kv_layers`
    dividing `n_layers` this is CLA.
    """
    _check_count("lasagna", _KV_LAYERS, n_kv_layers, n_layers)
    producers = [p * n_layers // n_kv_layers for p in range(n_kv_layers)]
    return tuple(producers[bisect.bisect(producers, layer) - 1] for layer in range(n_layers))


def trailing(n_layers: int, n_shared: int) -> KvMap:
    """The last `n_shared` layers read the K/V of the layer before them (Gemma 3n, one layer type)."""
    if not 0 <= n_shared < n_layers:
        raise ValueError(
            f"trailing: {_SHARED_LAYERS} is {shown(n_shared)}; it must lie in 0 to {n_layers - 1}"
        )
    own = n_layers - n_shared
    return (*range(own), *[own - 1] * n_shared)


def fused_lite(n_layers: int, n_kv_layers: int | None = None) -> tuple[KvMap, KvMap]:
    """FusedKV-Lite (ICLR 2026): layers above the middle read its keys, and the bottom layer's values.

    The first `n_kv_layers` layers, by default half of them, make keys and values of their own. Returns the
    K map and the V map.
    """
    own = -(-n_layers // 2) if n_kv_layers is None else n_kv_layers
    _check_count("fused-lite", _KV_LAYERS, own, n_layers)
    k_map, v_map = ((*range(own), *[source] * (n_layers - own)) for source in (own - 1, 0))
    return k_map, v_map


def _check_count(name: str, number: str, value: int, n_layers: int) -> None:
    if not 1 <= value <= n_layers:
        raise ValueError(
            f"{name}: {number} is {shown(value)}; it must lie in 1 to n_layers = {n_layers}"
        )


def _check_depth(name: str, n_layers: int, least: int) -> None:
    if n_layers < least:
        raise ValueError(f"{name} needs n_layers >= {least}, not {n_layers}")


# ----------------------------------------------------------------------------------- text form

_BUILDERS: dict[str, tuple[Callable[..., KvMap], str]] = {
    "identity": (no_sharing, ""),
    "cla": (cla, ":FACTOR[:first|last]"),
    "keep-ends": (keep_ends, ""),
    "dense-front": (dense_front, ""),
    "dense-back": (dense_back, ""),
    "pizza": (pizza, ":KV_LAYERS"),
    "sandwich": (sandwich, ":KV_LAYERS"),
    "lasagna": (lasagna, ":KV_LAYERS"),
    "trailing": (trailing, ":SHARED_LAYERS"),
}


# These are a K map and a V map.
_PAIR_BUILDERS: dict[str, tuple[Callable[..., tuple[KvMap, KvMap]], str]] = {
    "fused-lite": (fused_lite, "[:KV_LAYERS]"),
}


def forms() -> str:
    """The textual forms that `resolve` takes, for help texts and errors."""
    builders = _BUILDERS | _PAIR_BUILDERS
    names = [name + arguments for name, (_, arguments) in builders.items()]
    return ", ".join([*names, "0,0,2,2", "k=MAP;v=MAP"])


def resolve(text: str, n_layers: int) -> tuple[KvMap, KvMap]:
    """The K map and the V map of a textual form and the depth.

    `cla:2`, `keep-ends` and `0,0,2,2` are one map for both; `k=cla:2;v=identity` names two.

    Raises ValueError for an unknown form (with the nearest one), wrong arguments, or an invalid map. The
    message does not repeat the text.
    """
    text = text.strip()
    if "=" in text or ";" in text:
        parts = [part.partition("=") for part in text.split(";")]
        keys = sorted(key.strip() for key, _, _ in parts)
        if keys != ["k", "v"]:
            missing = {"k": "; the map of v is missing", "v": "; the map of k is missing"}
            raise ValueError(
                f"two maps must have the form k=MAP;v=MAP{missing.get(''.join(keys), '')}"
            )
        named = {}
        for key, _, form in parts:
            if form.strip().partition(":")[0] in _PAIR_BUILDERS:
                raise ValueError(f"{shown(form.strip())} already defines both maps")
            try:
                named[key.strip()] = _single_map(form.strip(), n_layers)
            except ValueError as error:
                raise ValueError(f"{key.strip()}: {error}") from None
        if named["k"] == named["v"]:
            raise ValueError("both maps are equal; write only one")
        return named["k"], named["v"]
    name, *arguments = text.split(":")
    if name in _PAIR_BUILDERS:
        builder, usage = _PAIR_BUILDERS[name]
        k_map, v_map = builder(n_layers, *_arguments(name, usage, arguments))
        for made in (k_map, v_map):
            validate(made, n_layers)
        return k_map, v_map
    made = _single_map(text, n_layers)
    return made, made


def _single_map(text: str, n_layers: int) -> KvMap:
    name, *arguments = text.split(":")
    if name[:1].isdigit():
        try:
            kv_map = tuple(map(whole_number, text.split(",")))
        except ValueError:
            raise ValueError("the sources must be integers, such as 0,0,2,2") from None
    elif name in _BUILDERS:
        builder, usage = _BUILDERS[name]
        kv_map = builder(n_layers, *_arguments(name, usage, arguments))
    else:
        known, number = _BUILDERS | _PAIR_BUILDERS, re.search(r"(?<!\d)\d{1,4}$", text[:100])
        near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.4)
        hint = ""
        if near:
            usage = known[near[0]][1]  # `cla2` lacks a colon
            form = f":{number[0]}" if usage and number else usage if usage[:1] == ":" else ""
            hint = f"; did you mean {near[0] + form!r}?"
        raise ValueError(f"there is no such map{hint} (known: {forms()})")
    validate(kv_map, n_layers)
    return kv_map


def _arguments(name: str, usage: str, arguments: list[str]) -> list[int | str]:
    """The arguments of a builder: a number, and a word where there is a second one."""
    least, most = usage.count(":") - usage.count("["), usage.count(":")
    numbers = (_FACTOR, _KV_LAYERS, _SHARED_LAYERS)
    counts = [f"{n} is a whole number" for n in numbers if f":{n.split()[0]}" in usage]
    refusal = "; ".join([f"the form is {name}{usage}", *counts])
    if not least <= len(arguments) <= most:
        raise ValueError(refusal)
    try:
        return [*map(whole_number, arguments[:1]), *arguments[1:]]
    except ValueError:
        raise ValueError(refusal) from None
