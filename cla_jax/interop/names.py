"""Our parameters and the tensors of a Llama checkpoint: one table, read in both directions.

A foreign linear layer is a matrix (out, in); ours is an einsum operand with an axis for each thing that has a
meaning, and the layers of a stack together: [groups, size, ...]. The table says for one layer which tensor
holds which parameter and how its axes are flattened. Query head n of the matrix is our head (n // G, n % G).
In both, the G heads that read one KV head are next to each other.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np

from cla_jax.config import ModelConfig
from cla_jax.model.layers import sizes
from cla_jax.model.transformer import Transformer
from cla_jax.state import named, with_named


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is asked for, as float32."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    # Why it cannot be read, if it cannot: an error only where a model needs it.
    unreadable: str | None = None


def check_apart(file: Path, spans: list[tuple[int, int, str]]) -> None:
    """Raises ValueError if two tensors, (first byte, end, name), have bytes in common."""
    spans = sorted(span for span in spans if span[0] < span[1])
    for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
        if begin < end:
            raise ValueError(f"{file}: {name} and {other} share bytes: the file is damaged")


@dataclasses.dataclass(frozen=True)
class _Entry:
    parameter: str  # within its block, projection or model
    letters: str  # its axes
    tensors: tuple[str, ...]  # within its layer; one for keys and one for values
    form: str  # the tensor's axes, of which each flattens some of the letters


_BLOCK = (
    _Entry("attention_norm.scale", "D", ("input_layernorm.weight",), "D"),
    _Entry("query.weight", "DKGW", ("self_attn.q_proj.weight",), "KGW,D"),
    _Entry("query.bias", "KGW", ("self_attn.q_proj.bias",), "KGW"),
    # Of a latent; `deepseek` makes two tensors of kv_b_proj.
    _Entry("heads.keys", "RGH", ("self_attn.kv_b_proj.keys",), "GH,R"),
    _Entry("heads.values", "RGH", ("self_attn.kv_b_proj.values",), "GH,R"),
    _Entry("output.weight", "KGHD", ("self_attn.o_proj.weight",), "D,KGH"),
    _Entry("output.bias", "D", ("self_attn.o_proj.bias",), "D"),
    _Entry("mlp_norm.scale", "D", ("post_attention_layernorm.weight",), "D"),
    _Entry("mlp.gate.weight", "DF", ("mlp.gate_proj.weight",), "F,D"),
    _Entry("mlp.gate.bias", "F", ("mlp.gate_proj.bias",), "F"),
    _Entry("mlp.up.weight", "DF", ("mlp.up_proj.weight",), "F,D"),
    _Entry("mlp.up.bias", "F", ("mlp.up_proj.bias",), "F"),
    _Entry("mlp.down.weight", "FD", ("mlp.down_proj.weight",), "D,F"),
    _Entry("mlp.down.bias", "D", ("mlp.down_proj.bias",), "D"),
)
_KEYS_AND_VALUES = (  # of the layer that produces them
    _Entry("norm.scale", "D", ("self_attn.kv_norm.weight",), "D"),
    _Entry("kv.weight", "DCKH", ("self_attn.k_proj.weight", "self_attn.v_proj.weight"), "KH,D"),
    _Entry("down.weight", "DJ", ("self_attn.kv_a_proj_with_mqa.weight",), "J,D"),
    _Entry("latent_norm.scale", "R", ("self_attn.kv_a_layernorm.weight",), "R"),
    _Entry("kv.bias", "CKH", ("self_attn.k_proj.bias", "self_attn.v_proj.bias"), "KH"),
)
_MODEL = (
    _Entry("embedding", "VD", ("model.embed_tokens.weight",), "V,D"),
    _Entry("norm.scale", "D", ("model.norm.weight",), "D"),
    _Entry("head", "VD", ("lm_head.weight",), "V,D"),
)


@dataclasses.dataclass(frozen=True)
class _Place:
    """One parameter of one layer: a slice of our array, and the tensors that hold it."""

    array: str
    index: tuple[int, ...]  # group, and block within the group
    entry: _Entry
    tensors: tuple[str, ...]


@functools.cache
def _places(config: ModelConfig) -> list[_Place]:
    """All places of a model of this config: none for a head if it is tied, say."""
    places = [_Place(entry.parameter, (), entry, entry.tensors) for entry in _MODEL]
    for s, stack in enumerate(config.sharing.stacks):
        for g, group in enumerate(stack.groups):
            parts = [("projection", (g,), group.first, _KEYS_AND_VALUES)]
            parts += [("blocks", (g, i), group.first + i, _BLOCK) for i in range(group.size)]
            for part, index, layer, entries in parts:
                for entry in entries:
                    tensors = tuple(f"model.layers.{layer}.{name}" for name in entry.tensors)
                    places.append(
                        _Place(f"stacks.{s}.{part}.{entry.parameter}", index, entry, tensors)
                    )
    known = named(_abstract(config))
    places = [place for place in places if place.array in known]
    if homeless := sorted(known.keys() - {place.array for place in places}):
        raise ValueError(
            f"parameter {homeless[0]} of the model has no tensor in a Llama checkpoint: add it to the "
            "table in cla_jax/interop/names.py (and to modeling_cla.py, for an export)"
        )
    return places


def _abstract(config: ModelConfig) -> Transformer:
    return jax.eval_shape(lambda: Transformer(jax.random.key(0), config))


def _shape(entry: _Entry, config: ModelConfig) -> tuple[int, ...]:
    size = sizes(config)
    return tuple(math.prod(size[letter] for letter in axis) for axis in entry.form.split(","))


def expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors, with their shapes, that a checkpoint of such a model has: these and no others."""
    return {
        name: _shape(place.entry, config) for place in _places(config) for name in place.tensors
    }


def check(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Raises ValueError naming the tensors that are missing, left over or of another shape."""
    # By itself, for a damaged number of layers may be in the millions.
    if len(tensors) < config.n_layers:
        raise ValueError(f"{len(tensors)} tensors are too few for {config.n_layers:,} layers")
    wanted = expected(config)
    missing = [name for name in wanted if name not in tensors]
    extra = [name for name in tensors if name not in wanted]
    problems = [f"missing: {_some(missing)}"] if missing else []
    problems += [f"not expected: {_some(extra)}"] if extra else []
    for name, shape in wanted.items():
        if name in tensors and (refusal := tensors[name].unreadable):
            raise ValueError(refusal)
        if name in tensors and tuple(tensors[name].shape) != shape:
            actual = tuple(tensors[name].shape)
            problems.append(f"{name} has shape {actual}, but the config needs {shape}")
    if problems:
        raise ValueError("the tensors do not match the config: " + "; ".join(problems[:6]))


def with_zero_biases(
    tensors: Mapping[str, Tensor], config: ModelConfig, part: str | None
) -> tuple[dict[str, Tensor], str | None]:
    """The tensors with zeros for the biases of the part of a layer (attention, mlp) that has none.

    Here a model has biases everywhere or nowhere. Returns the part, if there was one to fill.
    """
    if part is None:
        return dict(tensors), None
    where = {"attention": ".self_attn.", "mlp": ".mlp."}[part]
    if len(tensors) < config.n_layers or any(
        where in name and name.endswith(".bias") for name in tensors
    ):
        return dict(tensors), None  # `check` says what is wrong
    zeros = {
        name: Tensor(shape, functools.partial(np.zeros, shape, np.float32))
        for name, shape in expected(config).items()
        if where in name and name.endswith(".bias")
    }
    return {**tensors, **zeros}, part


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"


def to_model(
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Transformer:
    """The model that a checkpoint holds; its arrays are numpy's, float32.

    Raises ValueError as `check` does, and for numbers that are not finite.
    """
    check(tensors, config)
    size, abstract = sizes(config), _abstract(config)
    arrays = {name: np.empty(leaf.shape, np.float32) for name, leaf in named(abstract).items()}
    places = _places(config)
    for done, place in enumerate(places):
        entry, parts = place.entry, []
        for name in place.tensors:
            tensor = tensors[name].read()
            if not np.isfinite(tensor).all():
                raise ValueError(f"{name} has numbers that are not finite")
            flat = entry.form.replace(",", "")
            parts.append(tensor.reshape([size[letter] for letter in flat]))
        array = arrays[place.array][place.index]
        for part, target in zip(parts, _by_tensor(array, entry), strict=True):
            letters = entry.letters.replace("C", "")
            target[...] = part.transpose([flat.index(one) for one in letters])
        progress(done + 1, len(places))
    return with_named(abstract, arrays)


def from_model(model: Transformer) -> dict[str, Tensor]:
    """The tensors of a model's checkpoint; the inverse of `to_model`."""
    config, arrays = model.config, named(model)

    def read(place: _Place, c: int) -> np.ndarray:
        entry, array = place.entry, np.asarray(arrays[place.array])
        letters, flat = entry.letters.replace("C", ""), entry.form.replace(",", "")
        part = _by_tensor(array[place.index], entry)[c]
        part = part.transpose([letters.index(one) for one in flat])
        return np.ascontiguousarray(part.reshape(_shape(entry, config)))

    return {
        name: Tensor(_shape(place.entry, config), functools.partial(read, place, c))
        for place in _places(config)
        for c, name in enumerate(place.tensors)
    }


def _by_tensor(array: np.ndarray, entry: _Entry) -> list[np.ndarray]:
    """Views of a parameter, one for each tensor that holds it."""
    if "C" not in entry.letters:
        return [array]
    return list(np.moveaxis(array, entry.letters.index("C"), 0))
