"""Eviction by a mask over a cache that keeps everything: saves nothing, and is easy to believe."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.cache import Cache, CacheSpec, cache_spec
from cla_jax.cache.per_token import LayerCache
from cla_jax.compressor import Compressor, classes_of, scratch_spec
from cla_jax.decode import decode
from cla_jax.eviction.rule import Rule


class Masked(NamedTuple):
    inner: LayerCache
    kept_BKE: jax.Array
    scores_BKE: jax.Array
    classes_BKE: jax.Array
    rule: Rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedSpec(CacheSpec):
    reads_tokens = True
    policy: Any
    mates: tuple[int, ...]  # KV layers with the same number are read together

    def write(self, p, layer: Masked, kv, step):
        inner = super().write(p, layer.inner, kv, step)
        rows = jnp.arange(self.batch)[:, None]
        at = jnp.where(step.positions_BT >= 0, step.positions_BT, 1 << 29)
        put = lambda held, new: held.at[rows, :, at].set(new, mode="drop")
        heads = jnp.arange(self.config.n_kv_heads, dtype=jnp.uint32)
        positions, tokens = (a.astype(jnp.uint32)[..., None] for a in (at, step.tokens_BT))
        scores = self.policy.first_scores(positions, tokens, heads, self.mates[p])
        return Masked(
            inner,
            put(layer.kept_BKE, True),
            put(layer.scores_BKE, scores),
            put(layer.classes_BKE, step.extra[step.tokens_BT][..., None]),
            layer.rule,
        )

    def source(self, layers, k, v):
        inner = super().source([layer.inner for layer in layers], k, v)
        return layers[k]._replace(inner=inner)

    def observed(self, p, layer: Masked, q_BTKGH, step):
        kv = self.formats[p].decode(layer.inner)
        s = jnp.einsum("BTKGH,BSKH->BTKGS", q_BTKGH, kv.k_BSKH) * q_BTKGH.shape[-1] ** -0.5
        E = s.shape[-1]
        seen = jnp.arange(E) <= step.positions_BT[..., None]
        seen &= jnp.arange(E) >= step.starts_BT[..., None]
        seen = seen[:, :, None, None] & layer.kept_BKE[:, None, :, None]
        weights = jax.nn.softmax(jnp.where(seen, s, -jnp.inf), axis=-1)
        weights = jnp.where(seen, weights, 0)
        return jnp.einsum("BTKGS,BSKH->BTKGH", weights, kv.v_BSKH), weights.sum((1, 3))

    def settled(self, cache, notes, step):
        layers = []
        for p, layer in enumerate(cache.kv_layers):
            scores = layer.scores_BKE
            if self.policy.scoring == "attention":
                alike = [q for q in range(len(notes)) if self.mates[q] == self.mates[p]]
                scores = scores + sum(note for q in alike for note in notes[q])
            rule, n = layer.rule, step.lengths_B[:, None]
            E = scores.shape[-1]
            at = jnp.arange(E)
            share = lambda s, f, n=n: jnp.maximum(-(-s * n // 10_000) + f, 0)
            window = jnp.maximum(share(rule.window_share, rule.window_fixed), self.policy.recent)
            sure = (at < self.policy.sinks) | (at >= (n - window)[..., None])
            sure |= (at >= rule.since[..., None]) | (
                (layer.classes_BKE & rule.classes[..., None]) != 0
            )
            rest = layer.kept_BKE & ~sure
            keys = (jnp.broadcast_to(-at, rest.shape), -scores, ~rest)
            order = jnp.lexsort(keys, axis=-1)
            rank = jnp.argsort(order, axis=-1)
            count = share(rule.hitters_share, rule.hitters_fixed) - rule.joint * window
            count = jnp.maximum(count, 0)[..., None]
            kept = layer.kept_BKE & (sure | (rank < count))
            layers.append(layer._replace(kept_BKE=kept, scores_BKE=scores))
        return dataclasses.replace(cache, kv_layers=tuple(layers))


def mates(config) -> tuple[int, ...]:
    """For each KV layer the lowest that it is read together with, by following readers to and fro."""
    sharing = config.sharing
    pairs = [sharing.read_by(group) for group in sharing.groups]
    found = []
    for p in range(len(sharing.kv_layers)):
        seen = {p}
        while more := {q for pair in pairs if seen & set(pair) for q in pair} - seen:
            seen |= more
        found.append(min(seen))
    return tuple(found)


def masked_cache(compressor: Compressor, prompts, capacity: int) -> tuple[MaskedSpec, Cache]:
    """What `compressor` last chose for the prompts, as a mask over a cache of all their tokens."""
    config, policy = compressor.spec.config, compressor.spec.policy
    B, T = len(prompts), max(map(len, prompts))
    scratch = scratch_spec(config, policy, batch=B, tokens=capacity)
    tokens = np.zeros((B, T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    lengths = np.array(list(map(len, prompts)))
    plain = cache_spec(config, scratch.formats, batch=B, capacity=capacity, chunk=capacity)
    fields = {field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}
    spec = MaskedSpec(**fields, policy=policy, mates=mates(config))
    _, cache = jax.jit(decode, static_argnums=1)(
        compressor.weights, plain, plain.allocate(), tokens, lengths
    )
    layers = []
    classes = np.where(np.arange(T) < lengths[:, None], compressor.spec.classes_V[tokens], 0)
    for layer, one in zip(cache.kv_layers, compressor.chosen, strict=True):
        E = jax.tree.leaves(layer)[0].shape[1]
        S = min(E, one.kept_BKS.shape[-1])
        padded = functools.partial(_padded, size=E, given=S)
        layers.append(
            Masked(
                layer,
                padded(one.kept_BKS),
                padded(np.asarray(one.choice.scores_BKS, np.float32)),
                padded(
                    classes_of(
                        one.choice,
                        np.pad(classes, [(0, 0), (0, one.kept_BKS.shape[-1] - T)]).astype(np.uint8),
                    )
                ),
                jax.tree.map(jnp.asarray, one.choice.rule),
            )
        )
    return spec, Cache(tuple(layers), cache.lengths_B, jnp.asarray(compressor.spec.classes_V))


def _padded(a: np.ndarray, *, size: int, given: int) -> jax.Array:
    return jnp.asarray(np.pad(a[..., :given], [(0, 0), (0, 0), (0, size - given)]))
