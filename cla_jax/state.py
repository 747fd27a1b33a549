"""The state of a run: parameters, optimizer moments, step; and its layout on a mesh."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax._src import config as jax_config  # has no public name for a setting of one thread
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cla_jax.config import Config, ModelConfig
from cla_jax.mesh import AxisRules, replicated
from cla_jax.model.layers import is_param
from cla_jax.model.transformer import Transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    step: jax.Array  # updates done, int32 scalar
    model: Transformer
    moments: optax.OptState  # empty where only a model was read


def layout(tree: Any, rules: AxisRules, mesh: Mesh) -> Any:
    """A NamedSharding for every array of a tree of parameters; scalars and counts are replicated."""

    def sharding(leaf: Any) -> Any:
        if not is_param(leaf):
            return replicated(mesh)
        stack = [None] * (leaf.get_value().ndim - len(leaf.axes))
        return leaf.replace(
            NamedSharding(mesh, PartitionSpec(*stack, *rules.partition(*leaf.axes)))
        )

    return jax.tree.map(sharding, tree, is_leaf=is_param)


def with_layout(shapes: Any, rules: AxisRules, mesh: Mesh) -> Any:
    """A tree of shapes and dtypes with the layout of each array added."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        layout(shapes, rules, mesh),
    )


def _initial(
    seed: np.uint32, config: ModelConfig, optimizer: optax.GradientTransformation
) -> State:
    model: Any = Transformer(jax.random.key(seed), config)
    return State(step=jnp.zeros((), jnp.int32), model=model, moments=optimizer.init(model))


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, rules: AxisRules, mesh: Mesh
) -> State:
    """Shapes, dtypes and layouts of a state; nothing is allocated."""
    shapes = jax.jit(_initial, static_argnums=(1, 2)).eval_shape(
        np.uint32(config.seed), config.model, optimizer
    )
    return with_layout(shapes, rules, mesh)


def initial_state(
    config: Config, optimizer: optax.GradientTransformation, abstract: State
) -> State:
    """A fresh state as `abstract_state` lays it out. The same numbers on any mesh."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    with _compiled_to_run_once() as options:
        initial = jax.jit(
            _initial, static_argnums=(1, 2), out_shardings=shardings, compiler_options=options
        )
        return initial(np.uint32(config.seed), config.model, optimizer)


@contextlib.contextmanager
def _compiled_to_run_once() -> Iterator[dict[str, Any] | None]:
    """Options of the compiler: on the CPU, optimising takes several times what one run can save."""
    if jax.default_backend() != "cpu":
        yield None
    elif jax.__version_info__ >= (0, 11):
        yield {"xla_backend_optimization_level": 0}
    else:
        # Without the newer emitters of fusions it compiles in half the time. It is not kept on disk:
        # jaxlib has crashed writing programs of the older ones.
        with jax_config.persistent_cache_min_compile_time_secs(math.inf):
            yield {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}


def named(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by name: `model.stacks.0.blocks.mlp.up.weight`."""

    def name(path: tuple) -> str:
        text = jax.tree_util.keystr(path, simple=True, separator=".")
        return text.removesuffix(".value")  # the content of a parameter

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name(path): leaf for path, leaf in leaves}


def with_named(tree: Any, arrays: dict[str, Any]) -> Any:
    """The tree with its arrays replaced by those of the same names."""
    assert arrays.keys() == named(tree).keys()
    return jax.tree.unflatten(jax.tree.structure(tree), [arrays[name] for name in named(tree)])
