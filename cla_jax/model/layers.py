"""Linear maps, norms, the MLP and rotary embeddings.

Shape letters, here and in the rest of the model:
    B batch, T query positions, S key positions, D d_model, F d_ff, V vocabulary,
    K key/value heads, G query heads per key/value head, H d_head, C key and value (2),
    E entries of a cache, W width of a query head, which is H but for latents, R the rank of a latent,
    J the joint projection that a latent and a rotated key are parts of,
    N one axis that joins others: tokens of all rows, or the queries of a KV head,
    P KV layers, t the positions of one step, a part of T.
Tensors carry them as a suffix: q_BTKGH. A parameter remembers the logical axes of its trailing
dimensions (`axes`); leading dimensions, if any, are those of a stack.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from cla_jax.config import LinearScaling, Llama3Scaling, ModelConfig, NoScaling, SwiGLU, YarnScaling
from cla_jax.mesh import AxisRules
from cla_jax.model.platform import per_token, rotate

Part = TypeVar("Part")
M = TypeVar("M")

# The logical axis of each letter; activations are split along B, K, G, F and V, never along D.
AXES = {
    "B": "batch",
    "N": "batch",
    "D": "embed",
    "F": "ff",
    "V": "vocab",
    "K": "kv_heads",
    "G": "q_groups",
    "E": "cache_entries",
}


def axes(letters: str) -> tuple[str | None, ...]:
    """The logical axes of an array with these letters; None for one that is never split."""
    return tuple(AXES.get(letter) for letter in letters)


def sizes(config: ModelConfig) -> dict[str, int]:
    """The size of each letter of a weight."""
    return {
        "D": config.d_model,
        "F": config.d_ff,
        "V": config.vocab_size,
        "K": config.n_kv_heads,
        "G": config.q_groups,
        "H": config.d_head,
        "W": config.query_width,
        "R": config.kept_widths[1],
        "J": sum(config.kept_widths),
        "C": 2,
    }


def normal_param(key: jax.Array, letters: str, config: ModelConfig) -> nnx.Param:
    """A weight drawn from N(0, init_std^2) (2405.12981, appendix B)."""
    shape = [sizes(config)[letter] for letter in letters]
    return nnx.Param(config.init_std * jax.random.normal(key, shape), axes=axes(letters))


def is_param(x) -> bool:
    return isinstance(x, nnx.Variable)


def gather(module: M, rules: AxisRules, dtype: jnp.dtype) -> M:
    """The module's weights as a computation uses them: in `dtype`, and whole along D.

    This is where FSDP gathers. Called inside the rematerialised body of a scan, so that no more than
    one block is ever whole. Vectors (norm scales) keep their dtype: they meet float32 reductions.
    """

    def use(param: Any) -> Any:
        value = param[...]
        if len(param.axes) > 1:
            value = value.astype(dtype)
        stack = [None] * (value.ndim - len(param.axes))
        spec = rules.gathered().spec(*stack, *param.axes)
        return param.replace(value if spec is None else jax.reshard(value, spec))

    return jax.tree.map(use, module, is_leaf=is_param)


def shard_sequence(x_BTD: jax.Array, rules: AxisRules) -> jax.Array:
    """The residual stream as it is between blocks: split along T too, if the rules say so."""
    return jax.reshard(x_BTD, rules.spec("batch", "sequence", None)) if rules.sequence else x_BTD


def gather_sequence(x_BTD: jax.Array, rules: AxisRules) -> jax.Array:
    """The residual stream as a linear map reads it: all positions."""
    return jax.reshard(x_BTD, rules.gathered().spec(*axes("BTD"))) if rules.sequence else x_BTD


class Linear(nnx.Module):
    """A linear map, written as the einsum it is: `Linear(key, "BTD,DKGH->BTKGH", config)`."""

    def __init__(self, key: jax.Array, equation: str, config: ModelConfig):
        self.equation = equation
        inputs, self.outputs = equation.split("->")
        weight = inputs.split(",")[1]
        self.weight = normal_param(key, weight, config)
        biased = [letter for letter in self.outputs if letter in weight]
        shape = [sizes(config)[letter] for letter in biased]
        self.bias = nnx.Param(jnp.zeros(shape), axes=axes("".join(biased))) if config.bias else None

    def __call__(self, x: jax.Array, rules: AxisRules) -> jax.Array:
        if rules.sequence and self.outputs == "BTD":
            return self._reduce_scattered(x, rules)
        spec = lambda letters: rules.gathered().spec(*axes(letters))
        y = per_token(self.equation, x, self.weight[...], spec)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype)

    def _reduce_scattered(self, x: jax.Array, rules: AxisRules) -> jax.Array:
        """The residual stream, split along the sequence: a reduce-scatter of each device's partial sums."""
        spec = rules.gathered().partition(*axes("BTD"))
        inputs = axes(self.equation.split(",")[0])
        if rules.sequence in [getattr(rules, axis, None) for axis in inputs if axis]:
            spec = spec.update(unreduced=frozenset({rules.sequence}))
        y_BTD = shard_sequence(
            jnp.einsum(self.equation, x, self.weight[...], out_sharding=spec), rules
        )
        return y_BTD if self.bias is None else y_BTD + self.bias[...].astype(y_BTD.dtype)


# A linear map of a module: `Linear`, or another form of the same (`replaced_parts`).
LinearMap = Callable[[jax.Array, AxisRules], jax.Array]


def replaced_parts(module: M, kind: type[Part], form: Callable[[Part], Any]) -> M:
    """A copy of a module that has another form of its parts of a kind."""
    is_part = lambda part: isinstance(part, kind)
    change = lambda part: form(part) if is_part(part) else part
    return jax.tree.map(change, module, is_leaf=is_part)


class RMSNorm(nnx.Module):
    """Root mean square norm over the axis of a letter, in float32 (1910.07467)."""

    def __init__(self, config: ModelConfig, letter: str = "D"):
        self.eps = config.norm_eps
        self.scale = nnx.Param(jnp.ones(sizes(config)[letter]), axes=(None,))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        x = x_BTD.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...]).astype(x_BTD.dtype)


class Mlp(nnx.Module):
    """SwiGLU; or the square of a ReLU, which has no gate."""

    def __init__(self, key: jax.Array, config: ModelConfig):
        gate, up, down = jax.random.split(key, 3)
        gated = isinstance(config.mlp, SwiGLU)
        self.gate: LinearMap | None = Linear(gate, "BTD,DF->BTF", config) if gated else None
        self.up: LinearMap = Linear(up, "BTD,DF->BTF", config)
        self.down: LinearMap = Linear(down, "BTF,FD->BTD", config)

    def __call__(
        self,
        x_BTD: jax.Array,
        rules: AxisRules,
        lay_out: Callable[[jax.Array], jax.Array] = lambda x: x,
    ) -> jax.Array:
        if self.gate is None:
            hidden_BTF = jnp.square(jax.nn.relu(lay_out(self.up(x_BTD, rules))))
        else:
            gate_BTF = lay_out(self.gate(x_BTD, rules))
            hidden_BTF = jax.nn.silu(gate_BTF) * lay_out(self.up(x_BTD, rules))
        return self.down(hidden_BTF, rules)


def _cos_and_sin(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    def in_loop(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
        # A loop is not fused with anything. Otherwise XLA would compute cosines and sines again for every
        # head of every unrolled layer, a twelfth of a small training step. A barrier does not prevent it.
        cos, sin = jax.lax.map(
            lambda is_sin: jnp.where(is_sin, jnp.sin(angles), jnp.cos(angles)),
            jnp.array([False, True]),
        )
        return cos, sin

    # Chosen by the platform that it is compiled for, which may not be the local one.
    return jax.lax.platform_dependent(
        angles, cpu=in_loop, default=lambda angles: (jnp.cos(angles), jnp.sin(angles))
    )


def _frequencies(config: ModelConfig) -> jax.Array:
    """Radians a position by which each pair of dimensions turns, [H/2]."""
    half = config.rotary_width // 2
    frequencies = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    scaling = config.rope_scaling
    if isinstance(scaling, NoScaling):
        return frequencies
    slowed = frequencies / scaling.factor
    if isinstance(scaling, LinearScaling):
        return slowed
    # Pairs that turn often within the original context keep their speed, those that turn seldom are
    # slowed, and those between get a blend.
    original = scaling.original_max_position_embeddings
    if isinstance(scaling, Llama3Scaling):
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = (original * frequencies / (2 * math.pi) - low) / (high - low)
    else:  # yarn blends by the index of a pair instead, between those that turn fast and slow times

        def pair(turns: float) -> float:
            wavelength = original / (2 * math.pi * turns)
            return half * math.log(wavelength) / math.log(config.rope_theta)

        first = max(math.floor(pair(scaling.beta_fast)), 0)
        last = min(math.ceil(pair(scaling.beta_slow)), config.rotary_width - 1)
        kept = 1 - (jnp.arange(half) - first) / (last - first or 1e-3)
    kept = jnp.clip(kept, 0, 1)
    return kept * frequencies + (1 - kept) * slowed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding, half-split: dimension i turns with dimension i + H/2."""

    cos: jax.Array  # [B, T, H/2]
    sin: jax.Array

    @classmethod
    def at(cls, positions_BT: jax.Array, config: ModelConfig) -> "Rope":
        angles = positions_BT[..., None].astype(jnp.float32) * _frequencies(config)
        cos, sin = _cos_and_sin(angles)
        if isinstance(config.rope_scaling, YarnScaling):
            factor = config.rope_scaling.resolved_attention_factor
            cos, sin = cos * factor, sin * factor
        return cls(cos, sin)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rotates x_BT...H, any number of head axes, in float32."""
        heads = tuple(range(2, x.ndim - 1))
        cos, sin = jnp.expand_dims(self.cos, heads), jnp.expand_dims(self.sin, heads)
        return rotate(x, cos, sin)
