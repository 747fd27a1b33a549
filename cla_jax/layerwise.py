"""A model layer by layer: its parameters apart, and forward passes that compile one layer for all.

The parameters of a `Transformer` are stacked as its kv_map says, so those of two maps have other names and
shapes. Here each layer has its own, and any map can be put together from them. A forward pass calls the
same two programs for every layer, whatever the map: trying out many maps compiles nothing again.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax import kv_map as kv_maps
from cla_jax.config import ModelConfig
from cla_jax.loss import token_losses
from cla_jax.mesh import AxisRules
from cla_jax.model.attention import KV, causal_attention, window_starts
from cla_jax.model.layers import Rope
from cla_jax.model.transformer import Context, ForwardOptions, Group, Transformer
from cla_jax.state import named, with_named

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Layer:
    """Parameters of one layer by name, float32."""

    block: Arrays
    projection: Arrays | None  # of a producer


@dataclasses.dataclass(frozen=True)
class Layers:
    """A model taken apart."""

    config: ModelConfig
    layers: tuple[Layer, ...]
    rest: Arrays  # embedding, final norm, head


def taken_apart(model: Transformer) -> Layers:
    """The layers of a model; the inverse of `put_together`. The arrays are numpy's."""
    arrays = {name: np.asarray(array) for name, array in named(model).items()}
    layers: list[Layer] = []
    for prefix, g, group in _groups(model.config):
        projection = _within(arrays, f"{prefix}.projection.", (g,))
        for i in range(group.size):
            block = _within(arrays, f"{prefix}.blocks.", (g, i))
            layers.append(Layer(block, (projection or None) if i == 0 else None))
    rest = {name: array for name, array in arrays.items() if not name.startswith("stacks.")}
    return Layers(model.config, tuple(layers), rest)


def put_together(parts: Layers) -> Transformer:
    """The model of these layers, float32, its arrays numpy's."""
    stacks: dict[str, list[list[np.ndarray]]] = {}
    for prefix, g, group in _groups(parts.config):
        members = parts.layers[group.first : group.first + group.size]
        for name, array in (members[0].projection or {} if group.projects else {}).items():
            stacks.setdefault(f"{prefix}.projection.{name}", []).append([array])
        for layer in members:
            for name, array in layer.block.items():
                of_groups = stacks.setdefault(f"{prefix}.blocks.{name}", [])
                if len(of_groups) == g:
                    of_groups.append([])
                of_groups[g].append(array)
    arrays = dict(parts.rest)
    for name, of_groups in stacks.items():
        is_projection = ".projection." in name
        arrays[name] = np.stack(
            [each[0] if is_projection else np.stack(each) for each in of_groups]
        )
    return with_named(_abstract_model(parts.config), arrays)


def _groups(config: ModelConfig) -> Iterator[tuple[str, int, kv_maps.Group]]:
    """Each group with the name of its stack, and its place there."""
    for s, stack in enumerate(config.sharing.stacks):
        for g, group in enumerate(stack.groups):
            yield f"stacks.{s}", g, group


def _within(arrays: Arrays, prefix: str, index: tuple[int, ...]) -> Arrays:
    return {
        name.removeprefix(prefix): array[index]
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _abstract_model(config: ModelConfig) -> Transformer:
    return jax.eval_shape(lambda: Transformer(jax.random.key(0), config))


# --------------------------------------------------------------------------------- forward passes


def run(
    parts: Layers,
    tokens_BT: np.ndarray,
    starts_BT: np.ndarray,
    visit: Callable[[int, jax.Array], None] = lambda layer, x_BTD: None,
) -> jax.Array:
    """Hidden states after the last layer, [B, T, D], in float32.

    `visit(layer, x_BTD)` is shown the residual stream that enters each layer.
    """
    config = _computing(parts.config)
    x_BTD = jnp.asarray(parts.rest["embedding"])[tokens_BT]
    produced: dict[int, KV] = {}
    for i, layer in enumerate(parts.layers):
        visit(i, x_BTD)
        source = config.resolved_kv_map[i]
        group = _as_group(config, layer, source == i)
        window = jnp.int32(config.resolved_windows[i])
        if source == i:
            produced[i] = _keys_and_values(group, x_BTD, config)
        x_BTD = _blocks(group, x_BTD, produced[source], window, starts_BT, config)
    return x_BTD


def mean_loss(
    parts: Layers, tokens_BT: np.ndarray, targets_BT: np.ndarray, starts_BT: np.ndarray
) -> float:
    """Mean negative log-likelihood in nats of the targets of whole windows, row by row."""
    norm = jnp.asarray(parts.rest["norm.scale"])
    head = jnp.asarray(parts.rest.get("head", parts.rest["embedding"]))
    total = 0.0
    for row in range(len(tokens_BT)):
        here = slice(row, row + 1)
        x_BTD = run(parts, tokens_BT[here], starts_BT[here])
        total += float(_loss(x_BTD, norm, head, targets_BT[here], eps=parts.config.norm_eps))
    return total / targets_BT.size


@functools.lru_cache(maxsize=8)
def _computing(config: ModelConfig) -> ModelConfig:
    """The model in float32: calibration is done once, and exactly."""
    return dataclasses.replace(config, compute_dtype="float32")


def _layer_config(config: ModelConfig) -> ModelConfig:
    """What the programs of one layer depend on: the same for all maps and windows."""
    return dataclasses.replace(config, n_layers=1, kv_map="identity", windows="0")


@functools.lru_cache(maxsize=8)
def _abstract_group(config: ModelConfig, produces: bool) -> Group:
    return jax.eval_shape(lambda: Group(jax.random.key(0), 0, 1, config, "kv" if produces else ""))


def _as_group(config: ModelConfig, layer: Layer, produces: bool) -> Group:
    arrays = {f"blocks.{name}": array[None] for name, array in layer.block.items()}
    if produces:
        arrays |= {f"projection.{name}": array for name, array in (layer.projection or {}).items()}
    return with_named(_abstract_group(_layer_config(config), produces), arrays)


def _keys_and_values(group: Group, x_BTD: jax.Array, config: ModelConfig) -> KV:
    return _projected(group, x_BTD, config=_layer_config(config))


@functools.partial(jax.jit, static_argnames="config")
def _projected(group: Group, x_BTD: jax.Array, *, config: ModelConfig) -> KV:
    rope = Rope.at(jnp.arange(x_BTD.shape[1])[None], config)
    return group.keys_and_values(x_BTD, rope, AxisRules())


def _blocks(
    group: Group,
    x_BTD: jax.Array,
    kv: KV,
    window: jax.Array,
    starts_BT: np.ndarray,
    config: ModelConfig,
) -> jax.Array:
    group.projection = None  # a producer and a consumer are one program
    return _attended(group, x_BTD, kv, window, starts_BT, config=_layer_config(config))


@functools.partial(jax.jit, static_argnames="config")
def _attended(group, x_BTD, kv, window, starts_BT, *, config: ModelConfig) -> jax.Array:
    positions_BT = jnp.arange(x_BTD.shape[1])[None]
    seen_from_BT = window_starts(positions_BT, window, starts_BT)
    context = Context(
        rope=Rope.at(positions_BT, config),
        attend=lambda q_BTKGH, kv: causal_attention(q_BTKGH, kv, starts_BT=seen_from_BT),
        rules=AxisRules(),
    )
    return group(x_BTD, kv, context, ForwardOptions(scan_layers=False))


@functools.partial(jax.jit, static_argnames="eps")
def _loss(x_BTD, norm_D, head_VD, targets_BT, *, eps: float) -> jax.Array:
    x = x_BTD * jax.lax.rsqrt(jnp.mean(x_BTD * x_BTD, -1, keepdims=True) + eps)
    T = targets_BT.shape[1]
    chunk = next(size for size in range(min(T, 256), 0, -1) if T % size == 0)
    return token_losses(x * norm_D, head_VD, targets_BT, chunk, AxisRules()).sum()
