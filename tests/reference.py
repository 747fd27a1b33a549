"""A plain transformer written without looking at the model: one layer after another, heads repeated.

It takes a model's parameters by name and shares nothing else with it.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.config import ModelConfig
from cla_jax.model.transformer import Transformer
from cla_jax.state import named, with_named


def layer_parameters(model) -> list[dict[str, np.ndarray]]:
    """The parameters of each layer; consumers have no `kv`. Found by walking groups and blocks."""
    arrays = {name: np.asarray(array) for name, array in named(model).items()}
    layers = []
    stack = 0
    while any(name.startswith(f"stacks.{stack}.") for name in arrays):
        mine = {
            name.removeprefix(f"stacks.{stack}."): array
            for name, array in arrays.items()
            if name.startswith(f"stacks.{stack}.")
        }
        groups, size = mine["blocks.query.weight"].shape[:2]
        for group in range(groups):
            for i in range(size):
                layer = {
                    name.removeprefix("blocks."): array[group, i]
                    for name, array in mine.items()
                    if name.startswith("blocks.")
                }
                if i == 0:
                    layer |= {
                        name: array[group]
                        for name, array in mine.items()
                        if name.startswith("projection.")
                    }
                layers.append(layer)
        stack += 1
    return layers


def norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def turning(config: ModelConfig) -> tuple[np.ndarray, float]:
    """Radians a position of each pair, one after another, and what rotated vectors are multiplied by."""
    H, theta = config.d_head, config.rope_theta
    kind, *numbers = dataclasses.astuple(config.rope_scaling)
    found = []
    for pair in range(H // 2):
        speed = theta ** (-2 * pair / H)
        if kind == "linear":
            speed /= numbers[0]
        elif kind == "llama3":
            factor, low, high, original = numbers
            wavelength = 2 * np.pi / speed
            if wavelength > original / low:
                speed /= factor
            elif wavelength > original / high:
                smooth = (original / wavelength - low) / (high - low)
                speed = (1 - smooth) * speed / factor + smooth * speed
        elif kind == "yarn":
            factor, fast, slow, original, _ = numbers
            lo, hi = np.log(original / (2 * np.pi * np.array([fast, slow]))) / np.log(theta) * H / 2
            lo, hi = max(np.floor(lo), 0), min(np.ceil(hi), H - 1)
            ramp = min(max((pair - lo) / (hi - lo), 0), 1)
            speed = ramp * speed / factor + (1 - ramp) * speed
        found.append(speed)
    scale = 1.0
    if kind == "yarn":
        scale = 0.1 * np.log(numbers[0]) + 1 if numbers[4] is None else numbers[4]
    return np.array(found), scale


def rotate(x, config: ModelConfig):
    """x [T, N, H]; pairs (i, i + H/2)."""
    T, _, H = x.shape
    speeds, scale = turning(config)
    angle = np.arange(T)[:, None] * speeds
    cos, sin = scale * np.cos(angle)[:, None], scale * np.sin(angle)[:, None]
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return np.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def logits(model, config: ModelConfig, tokens: np.ndarray) -> np.ndarray:
    """Scores [T, V] for one row of token ids, in float64."""
    arrays = {name: np.asarray(array, np.float64) for name, array in named(model).items()}
    x = arrays["embedding"][tokens]
    T, H, eps = len(tokens), config.d_head, config.norm_eps
    shared, maps = {}, {"k": config.sharing.k_map, "v": config.sharing.v_map}
    for i, p in enumerate(layer_parameters(model)):
        p = {name: np.asarray(array, np.float64) for name, array in p.items()}
        bias = lambda name, p=p: p.get(f"{name}.bias", 0.0)
        h = norm(x, p["attention_norm.scale"], eps)
        if "projection.kv.weight" in p:
            source = h
            if "projection.norm.scale" in p:
                source = norm(x, p["projection.norm.scale"], eps)
            kv = np.einsum("td,dckh->tckh", source, p["projection.kv.weight"])
            kv = kv + bias("projection.kv")
            made = [half for half in maps if maps[half][i] == i]  # keys first
            for half, part in zip(made, np.moveaxis(kv, 1, 0), strict=True):
                if "projection.k_norm.scale" in p and half == "k":
                    part = norm(part, p["projection.k_norm.scale"], eps)
                shared[half, i] = rotate(part, config) if half == "k" else part
        k, v = (shared[half, sources[i]] for half, sources in maps.items())
        # Query head n reads key/value head n // G.
        k, v = (np.repeat(a, config.q_groups, axis=1) for a in (k, v))
        q = np.einsum("td,dkgh->tkgh", h, p["query.weight"]) + bias("query")
        q = q.reshape(T, config.n_heads, H)
        if "q_norm.scale" in p:
            q = norm(q, p["q_norm.scale"], eps)
        q = rotate(q, config)
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
        window = config.resolved_windows[i] or T
        seen = np.tril(np.ones((T, T), bool)) & ~np.tril(np.ones((T, T), bool), -window)
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        o = np.einsum("nts,snh->tnh", weights, v).reshape(T, config.n_heads * H)
        x = x + o @ p["output.weight"].reshape(-1, config.d_model) + bias("output")
        h = norm(x, p["mlp_norm.scale"], eps)
        up = h @ p["mlp.up.weight"] + bias("mlp.up")
        if "mlp.gate.weight" in p:
            gate = h @ p["mlp.gate.weight"] + bias("mlp.gate")
            hidden = gate / (1 + np.exp(-gate)) * up
        else:
            hidden = np.maximum(up, 0) ** 2
        x = x + hidden @ p["mlp.down.weight"] + bias("mlp.down")
    x = norm(x, arrays["norm.scale"], eps)
    return x @ arrays.get("head", arrays["embedding"]).T


def randomised(config: ModelConfig, seed: int = 0) -> Transformer:
    """A model with every parameter, norms and biases too, away from its initial value.

    Drawn by numpy into the abstract shapes: nothing is compiled.
    """
    draw = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    arrays = {
        name: jnp.asarray(
            draw.normal(size=leaf.shape, scale=0.15) + name.endswith("scale"), jnp.float32
        )
        for name, leaf in named(shapes).items()
    }
    return with_named(shapes, arrays)
