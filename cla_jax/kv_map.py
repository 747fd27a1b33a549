"""Who shares keys and values with whom.

`kv_map[i]` is the layer whose keys and values layer `i` attends to. A *producer* (`kv_map[i] == i`)
projects keys and values and writes a cache; every other layer is a *consumer*. From the map alone follow

    groups   consecutive layers with one source: the unit of structure of the model,
    stacks   consecutive groups of equal shape: what one `jax.lax.scan` executes in training,
    slots    the producers in order: a KV cache has one entry for each.

Example, six layers with CLA2 (Brandon et al. 2024, section 3):

    kv_map   (0, 0, 2, 2, 4, 4)
    groups   0-1, 2-3, 4-5     (three producing groups of two layers)
    stacks   one, of three groups
    slots    0, 2, 4           (half the KV cache)
"""

import bisect
import dataclasses
import difflib
import itertools
from collections.abc import Callable
from typing import Literal

from cla_jax.messages import shown

KvMap = tuple[int, ...]


# ------------------------------------------------------------------------------------ structure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """Consecutive layers with the same source of keys and values."""

    first: int  # its first layer
    size: int  # number of layers
    source: int  # the layer whose keys and values all of them read; `first` if they are its own
    reused: bool  # a later group reads them too

    @property
    def produces(self) -> bool:
        return self.source == self.first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stack:
    """Consecutive producing groups of equal shape, or one consuming group."""

    groups: tuple[Group, ...]

    @property
    def size(self) -> int:
        """Layers in each of its groups."""
        return self.groups[0].size

    @property
    def produces(self) -> bool:
        return self.groups[0].produces

    @property
    def reused(self) -> bool:
        return self.groups[0].reused


def validate(kv_map: KvMap, n_layers: int) -> None:
    """Raises ValueError, naming the offending layer, unless every layer reads a producer at or below it."""
    if len(kv_map) != n_layers:
        raise ValueError(f"kv_map has {len(kv_map)} entries but model.n_layers is {n_layers}")
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
                f"(kv_map[{source}] is {kv_map[source]})"
            )


def slots(kv_map: KvMap) -> tuple[int, ...]:
    """The producers, in order. Slot `p` of a cache belongs to layer `slots(kv_map)[p]`."""
    return tuple(layer for layer, source in enumerate(kv_map) if layer == source)


def groups(kv_map: KvMap) -> tuple[Group, ...]:
    """Cuts the layers into runs with one source.

    A producer always starts a group of its own: the layers after it either read it, and belong to its
    group, or start another.
    """
    runs, first = [], 0
    for source, layers in itertools.groupby(kv_map):
        size = len(list(layers))
        runs.append((first, size, source))
        first += size
    later = {source for first, _, source in runs if source != first}
    return tuple(
        Group(first=first, size=size, source=source, reused=first == source and source in later)
        for first, size, source in runs
    )


def stacks(kv_map: KvMap) -> tuple[Stack, ...]:
    """Gathers consecutive producing groups of equal (size, reused); a consuming group stands alone."""

    def shape(group: Group) -> tuple[int, ...]:
        return (group.size, group.reused) if group.produces else (-1, group.first)

    return tuple(
        Stack(groups=tuple(run)) for _, run in itertools.groupby(groups(kv_map), key=shape)
    )


# ------------------------------------------------------------------------------------- builders


def identity(n_layers: int) -> KvMap:
    """Every layer is a producer: an ordinary transformer, CLA1 in the paper's words."""
    return tuple(range(n_layers))


def cla(n_layers: int, factor: int, short_group: Literal["first", "last"] = "first") -> KvMap:
    """CLA`factor` (2405.12981, section 3.1 and figure 2): groups of `factor` consecutive layers.

    Where `factor` does not divide `n_layers`, one group is shorter. The paper's picture of ten layers
    under CLA3 has producers 0, 1, 4, 7, the short group first; Hunyuan-like code puts it last.
    """
    _positive("cla", "factor", factor, n_layers)
    if short_group not in ("first", "last"):
        raise ValueError(f"cla: short_group is {shown(short_group)}; it is 'first' or 'last'")
    offset = n_layers % factor if short_group == "first" else 0
    return tuple(
        0 if layer < offset else layer - (layer - offset) % factor for layer in range(n_layers)
    )


def keep_ends(n_layers: int) -> KvMap:
    """1B-KeepEnds (2405.12981, section 3.2.2): first and last layer alone, CLA2 between them.

    Twenty layers: 0 | 1,1 | 3,3 | ... | 17,17 | 19, eleven producers.
    """
    _at_least("keep-ends", n_layers, 3)
    middle = cla(n_layers - 2, min(2, n_layers - 2), "last")
    return (0, *(1 + source for source in middle), n_layers - 1)


def dense_front(n_layers: int) -> KvMap:
    """1B-DenseFront (2405.12981, section 3.2.2): the first half produce, the rest but the last share one.

    Twenty layers: 0-9 produce, 10-18 read layer 9, 19 produces; eleven producers.
    """
    _at_least("dense-front", n_layers, 3)
    half = n_layers // 2
    return (*range(half), *[half - 1] * (n_layers - half - 1), n_layers - 1)


def dense_back(n_layers: int) -> KvMap:
    """1B-DenseBack (2405.12981, section 3.2.2): the mirror image, sharing near the bottom.

    The paper's text counts 2 + 10 + 9 = 21 layers for a model of 20. Its table gives 11 KV layers,
    which leaves one reading for 20 layers: 0 and 1 produce, 2-10 read layer 1, 11-19 produce.
    """
    _at_least("dense-back", n_layers, 4)
    half = n_layers // 2
    return (0, 1, *[1] * (half - 1), *range(half + 1, n_layers))


def pizza(n_layers: int, n_kv_layers: int) -> KvMap:
    """Pizza-bottom (2410.14442): `n_kv_layers - 1` layers read their own K/V, all later ones the next K/V."""
    _positive("pizza", "n_kv_layers", n_kv_layers, n_layers)
    return (*range(n_kv_layers - 1), *[n_kv_layers - 1] * (n_layers - n_kv_layers + 1))


def sandwich(n_layers: int, n_kv_layers: int) -> KvMap:
    """Sandwich-bottom (2410.14442): layers at both ends read their own K/V, one shared block between.

    Of the `n_kv_layers - 1` layers that alone read their K/V, the larger half is at the bottom.
    """
    _positive("sandwich", "n_kv_layers", n_kv_layers, n_layers)
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
    _positive("lasagna", "n_kv_layers", n_kv_layers, n_layers)
    producers = [p * n_layers // n_kv_layers for p in range(n_kv_layers)]
    return tuple(producers[bisect.bisect(producers, layer) - 1] for layer in range(n_layers))


def trailing(n_layers: int, n_shared: int) -> KvMap:
    """The last `n_shared` layers read the K/V of the layer before them (Gemma 3n, one layer type)."""
    if not 0 <= n_shared < n_layers:
        raise ValueError(
            f"trailing: n_shared is {shown(n_shared)}; it must lie in 0 to {n_layers - 1}"
        )
    own = n_layers - n_shared
    return (*range(own), *[own - 1] * n_shared)


def _positive(name: str, field: str, value: int, n_layers: int) -> None:
    if not 1 <= value <= n_layers:
        raise ValueError(
            f"{name}: {field} is {shown(value)}; it must lie in 1 to n_layers = {n_layers}"
        )


def _at_least(name: str, n_layers: int, least: int) -> None:
    if n_layers < least:
        raise ValueError(f"{name} needs n_layers >= {least}, not {n_layers}")


# ----------------------------------------------------------------------------------- text form

_BUILDERS: dict[str, tuple[Callable[..., KvMap], str]] = {
    "identity": (identity, ""),
    "cla": (cla, ":FACTOR[:first|last]"),
    "keep-ends": (keep_ends, ""),
    "dense-front": (dense_front, ""),
    "dense-back": (dense_back, ""),
    "pizza": (pizza, ":KV_LAYERS"),
    "sandwich": (sandwich, ":KV_LAYERS"),
    "lasagna": (lasagna, ":KV_LAYERS"),
    "trailing": (trailing, ":SHARED_LAYERS"),
}


def forms() -> str:
    """The textual forms that `resolve` takes, for help texts and errors."""
    return ", ".join([name + arguments for name, (_, arguments) in _BUILDERS.items()] + ["0,0,2,2"])


def resolve(text: str, n_layers: int) -> KvMap:
    """A map from its textual form and the depth: `cla:2`, `keep-ends`, `0,0,2,2`.

    Raises ValueError for an unknown form (with the nearest one), wrong arguments, or an invalid map.
    """
    name, *arguments = text.strip().split(":")
    if name[:1].isdigit():
        try:
            kv_map = tuple(int(entry) for entry in text.split(","))
        except ValueError:
            raise ValueError(
                f"kv_map {shown(text)}: write the sources as integers, 0,0,2,2"
            ) from None
    elif name in _BUILDERS:
        builder, usage = _BUILDERS[name]
        least, most = usage.count(":") - usage.count("["), usage.count(":")
        if not least <= len(arguments) <= most:
            raise ValueError(f"kv_map {shown(text)}: the form is {name}{usage}")
        try:
            numbers = [int(argument) for argument in arguments[:1]]
        except ValueError:
            raise ValueError(f"kv_map {shown(text)}: the form is {name}{usage}") from None
        kv_map = builder(n_layers, *numbers, *arguments[1:])
    else:
        near = difflib.get_close_matches(name[:100], _BUILDERS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown kv_map {shown(text)}{hint} (known: {forms()})")
    validate(kv_map, n_layers)
    return kv_map
