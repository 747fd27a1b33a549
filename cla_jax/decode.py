"""One step through the KV cache: of one token in decoding, of a chunk of a prompt in prefill.

Decoding uses the parameters of each layer, taken out of their stacks once, and an unrolled step. Slicing
stacked weights inside the loop would copy them for every token. The cache is donated and read block by block
up to the current length.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, CacheSpec
from cla_jax.config import ModelConfig
from cla_jax.mesh import AxisRules
from cla_jax.model import cpu_matmul
from cla_jax.model.attention import KV, StepPositions
from cla_jax.model.latent import AbsorbedHeads, LatentHeads, LatentProjection
from cla_jax.model.layers import Linear, RMSNorm, Rope, axes, gather, replaced_parts
from cla_jax.model.native.matmul import Packed
from cla_jax.model.transformer import (
    Block,
    Context,
    KVProjection,
    Transformer,
    element,
    project,
)

M = TypeVar("M")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingGroup:
    """Consecutive blocks that attend to the same keys and values, each with arrays of its own.

    The linear maps are those that multiply few tokens fastest on the backend at hand.
    """

    projection: KVProjection | LatentProjection | None  # of a producing group
    blocks: tuple[Block, ...]

    def keys_and_values(self, x_BTD: jax.Array, rope: Rope, rules: AxisRules) -> KV:
        """What the group makes; None for keys or values that it does not make."""
        assert self.projection is not None  # only a producing group is asked
        return self.projection(x_BTD, self.blocks[0].attention_norm, rope, rules)

    def __call__(self, x_BTD: jax.Array, kv: Any, context: Context) -> jax.Array:
        for block in self.blocks:
            x_BTD = block(x_BTD, kv, context)
        return x_BTD


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """A model's parameters as decoding wants them: in the compute dtype, layer by layer."""

    embedding: jax.Array  # [V, D]
    groups: tuple[DecodingGroup, ...]
    norm: RMSNorm
    own_head: jax.Array | Packed | None  # None if one table serves both ends

    @property
    def head(self) -> jax.Array | Packed:
        """The output head, [V, D]."""
        return self.embedding if self.own_head is None else self.own_head

    def logits(self, x_BTD: jax.Array, rules: AxisRules) -> jax.Array:
        """Scores of the next token in float32, [B, T, V]."""
        if not cpu_matmul.enabled():
            return project(x_BTD, self.head, rules)
        return cpu_matmul.logits(x_BTD, self.head, rules)


def on_one_device(model: Transformer) -> Transformer:
    """A copy on the first device, whose arrays know of no mesh."""
    return jax.device_put(jax.device_get(model), jax.devices()[0])


def decoding_weights(
    model: Transformer, rules: AxisRules = AxisRules(), matmul: str = cpu_matmul.XLA
) -> Weights:
    """The weights for `decode`, laid out for the backend at hand.

    Args:
      model: the parameters.
      rules: how they are split over the mesh that is set.
      matmul: what multiplies tokens with weights: `xla`, or the `native` kernel for CPUs. For the latter, a
        table that is both embedding and output head is stored twice.

    Raises:
      ValueError: the native kernel cannot be used here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    cpu_matmul.check(matmul, None if mesh.empty else mesh)
    return _decoding_weights(model, rules, matmul == cpu_matmul.NATIVE)


@functools.partial(jax.jit, static_argnames=("rules", "packed"))
def _decoding_weights(model: Transformer, rules: AxisRules, packed: bool) -> Weights:
    dtype = jnp.dtype(model.config.compute_dtype)
    groups = []
    for stack, stacked in zip(model.config.sharing.stacks, model.stacks, strict=True):
        gathered = gather(stacked, rules, dtype)
        for i in range(len(stack.groups)):
            group = element(gathered, i)
            blocks = tuple(_laid_out(element(group.blocks, j), packed) for j in range(stack.size))
            projection = _laid_out(group.projection, packed)
            groups.append(DecodingGroup(projection=projection, blocks=blocks))
    embedding = gather(model.embedding, rules, dtype)[...]
    own_head = None if model.head is None else gather(model.head, rules, dtype)[...]
    if packed:
        head = embedding if own_head is None else own_head
        own_head = Packed.of(cpu_matmul.unsplit(head)[None])
    return Weights(embedding=embedding, groups=tuple(groups), norm=model.norm, own_head=own_head)


def random_weights(config: ModelConfig, seed: int = 0, matmul: str = cpu_matmul.XLA) -> Weights:
    """The initial weights of a model, for `decode`: for measurements, where only sizes matter."""
    model = jax.jit(Transformer, static_argnums=1)(jax.random.key(seed), config)
    return decoding_weights(model, matmul=matmul)


def _laid_out(module: M, packed: bool) -> M:
    """A copy with absorbed latent heads, and with the linear maps that are fastest on this backend."""
    module = replaced_parts(module, LatentHeads, LatentHeads.absorbed)
    if not cpu_matmul.enabled():
        return module
    module = replaced_parts(module, Linear, cpu_matmul.CpuLinear.of)
    if packed:
        module = replaced_parts(module, cpu_matmul.CpuLinear, cpu_matmul.CpuLinear.packed)
        module = replaced_parts(module, AbsorbedHeads, AbsorbedHeads.packed)
    return module


def decode(
    weights: Weights,
    spec: CacheSpec,
    cache: Cache,
    tokens_BT: jax.Array,
    counts_B: jax.Array,
    starts_BT: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Appends T tokens to each row: their hidden states [B, T, D], and the cache with them in it.

    Only the first counts_B tokens of a row are text. The rest, and what would go beyond the capacity, is
    padding. It is neither stored nor seen, and its outputs mean nothing. `starts_BT`, if given, is the first
    position each token sees.
    """
    config, rules = spec.config, spec.rules
    # Positions are computed here, once, so a consumer's query position does not depend on cache writes of
    # this step.
    T = tokens_BT.shape[1]
    steps_T = jnp.arange(T)
    counts_B = jnp.minimum(jnp.minimum(counts_B, T), spec.capacity - cache.lengths_B)
    is_text_BT = steps_T < counts_B[:, None]
    positions_BT = jnp.where(is_text_BT, cache.lengths_B[:, None] + steps_T, -1)
    lengths_B = cache.lengths_B + counts_B
    rope = Rope.at(positions_BT, config)
    starts_BT = jnp.zeros_like(positions_BT) if starts_BT is None else starts_BT
    step = StepPositions(
        positions_BT=positions_BT,
        starts_BT=starts_BT,
        lengths_B=lengths_B,
        extra=cache.extra,
        tokens_BT=tokens_BT if spec.reads_tokens else None,
    )
    layers = list(cache.kv_layers)
    notes: list[list[Any]] = [[] for _ in layers]
    spec_BTD = rules.gathered().spec(*axes("BTD"))
    x_BTD = weights.embedding.at[tokens_BT].get(out_sharding=spec_BTD, mode="clip")
    for group, module in zip(config.sharing.groups, weights.groups, strict=True):
        k, v = config.sharing.read_by(group)
        if group.projects:
            kv = module.keys_and_values(x_BTD, rope, rules)
            p = k if "k" in group.projects else v
            layers[p] = spec.write(p, layers[p], kv, step)
        here = step.within(spec.windows[k])
        source, p = spec.source(layers, k, v), spec.representative(k)
        x_BTD, noted = _group(module, x_BTD, source, rope, here, spec=spec, p=p)
        notes[k] += noted
    cache = dataclasses.replace(cache, kv_layers=tuple(layers), lengths_B=lengths_B)
    # A cache that evicts does so now: all readers of a step see the same entries.
    return weights.norm(x_BTD), spec.settled(cache, notes, step)


# Equal groups are one function to jax, traced and lowered once, and inlined by the compiler.
@functools.partial(jax.jit, static_argnames=("spec", "p"))
def _group(
    module: DecodingGroup,
    x_BTD: jax.Array,
    source: Any,
    rope: Rope,
    step: StepPositions,
    *,
    spec: CacheSpec,
    p: int,
) -> tuple[jax.Array, list[Any]]:
    notes: list[Any] = []  # of each block, in order: blocks are unrolled

    def attend(q_BTKGH: jax.Array, source: Any) -> jax.Array:
        o_BTKGH, note = spec.observed(p, source, q_BTKGH, step)
        notes.append(note)
        return o_BTKGH

    context = Context(rope=rope, attend=attend, rules=spec.rules)
    return module(x_BTD, source, context), notes


# -------------------------------------------------------------------------------------- prefill


@functools.partial(jax.jit, static_argnames="spec", donate_argnames=("cache", "last_BD"))
def _prefill_chunk(
    weights: Weights,
    cache: Cache,
    last_BD: jax.Array,
    tokens_BT: jax.Array,
    counts_B: jax.Array,
    *,
    spec: CacheSpec,
) -> tuple[jax.Array, Cache]:
    x_BTD, cache = decode(weights, spec, cache, tokens_BT, counts_B)
    # A masked sum picks each row's last token without a gather over the split rows.
    is_last_BT = jnp.arange(tokens_BT.shape[1]) == counts_B[:, None] - 1
    picked_BD = jnp.sum(jnp.where(is_last_BT[:, :, None], x_BTD, 0), axis=1)
    return jnp.where(counts_B[:, None] > 0, picked_BD, last_BD), cache


def prefill(
    weights: Weights,
    spec: CacheSpec,
    cache: Cache,
    prompts: Sequence[Sequence[int] | None],
    last_BD: jax.Array | None = None,
    held: Mapping[int, int] | None = None,
) -> tuple[jax.Array, Cache]:
    """Fills rows with prompts of any lengths, `spec.chunk` tokens per step, the last padded.

    What these rows held is forgotten, except for the first `held` tokens of a row's prompt. Rows without
    a prompt (None, or beyond the last prompt) keep what they hold. Returns the hidden state of the last
    token of each row with a prompt, [B, D], that of the others from `last_BD`, and the cache. The cache and
    `last_BD` are donated. One program serves every chunk of every prompt. Raises ValueError for prompts
    that do not fit.
    """
    T, B = spec.chunk, spec.batch
    if len(prompts) > B:
        raise ValueError(f"{len(prompts)} prompts, but the cache has only {B} rows")
    given = {row: prompt for row, prompt in enumerate(prompts) if prompt is not None}
    if not given:
        raise ValueError("no prompt was given")
    for row, prompt in given.items():
        check_prompt(prompt, spec, name=f"prompt {row}")
    held = held or {}
    for row, count in held.items():
        if row not in given or not 0 <= count < len(given[row]):
            raise ValueError(
                f"row {row} cannot hold {count} tokens of its prompt: the last token must be computed"
            )
    given = {row: prompt[held.get(row, 0) :] for row, prompt in given.items()}
    chunks = -(-max(map(len, given.values())) // T)
    tokens = np.zeros((B, chunks * T), np.int32)
    counts, before = np.zeros((2, B), np.int32)
    for row, prompt in given.items():
        tokens[row, : len(prompt)] = prompt
        counts[row], before[row] = len(prompt), held.get(row, 0)
    rules = spec.rules
    cache = spec.reset(cache, *jax.device_put((counts > 0, before), (rules.spec("batch"),) * 2))
    x_BD = no_states(spec) if last_BD is None else last_BD
    for i in range(chunks):
        chunk = tokens[:, i * T : (i + 1) * T]
        placed = jax.device_put(
            (chunk, np.clip(counts - i * T, 0, T)), (rules.spec("batch", None), rules.spec("batch"))
        )
        x_BD, cache = _prefill_chunk(weights, cache, x_BD, *placed, spec=spec)
    return x_BD, cache


def no_states(spec: CacheSpec) -> jax.Array:
    """The hidden states of rows that have no token yet, [B, D]."""
    shape, layout = (spec.batch, spec.config.d_model), spec.rules.gathered().spec(*axes("BD"))
    return jnp.zeros(shape, spec.config.compute_dtype, out_sharding=layout)


def check_weights(weights: Weights, spec: CacheSpec) -> None:
    """Raises ValueError for the weights of a model that the cache is not made for."""
    config = spec.config
    of_weights = weights.embedding.shape, [len(group.blocks) for group in weights.groups]
    of_config = (config.vocab_size, config.d_model), [group.size for group in config.sharing.groups]
    if of_weights != of_config:
        raise ValueError(
            "the weights do not belong to the cache's model: embedding and layers of each group are "
            f"{of_weights}, in the cache's config {of_config}"
        )


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether it is an integer, numpy's included."""
    return isinstance(value, Integral)


def check_prompt(
    prompt: Sequence[int], spec: CacheSpec, new_tokens: int = 0, name: str = "the prompt"
) -> None:
    """Raises ValueError for a prompt that the cache or the model cannot take."""
    if not len(prompt):
        raise ValueError(f"{name} is empty: give at least the end token, as in training")
    ids, vocabulary = np.asarray(prompt), spec.config.vocab_size
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise ValueError(f"{name} is not a sequence of token ids, which are integers")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(
            f"{name} has a token outside the vocabulary: ids are 0 to {vocabulary - 1}, but it has "
            f"{ids.min()} to {ids.max()}"
        )
    if len(prompt) + new_tokens > spec.capacity:
        raise ValueError(
            f"{name} has {len(prompt)} tokens; with {new_tokens} new tokens, this exceeds the cache's "
            f"capacity of {spec.capacity} tokens per row"
        )
