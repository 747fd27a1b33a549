"""A run's first weights, made of another run's.

The config says it all (`start`), so what is made once can be made again. `cla_jax.start` knows which models
go together.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from cla_jax import checkpoint, conversion, layerwise, runs
from cla_jax import mesh as meshes
from cla_jax.config import CALIBRATED_INITS, Config, FromRun, LatentKV, MeshConfig, ModelConfig
from cla_jax.data.prepare import Corpus
from cla_jax.layerwise import Arrays, Layer, Layers
from cla_jax.mesh import AxisRules
from cla_jax.messages import shown
from cla_jax.model.layers import Rope
from cla_jax.model.transformer import Transformer, document_starts, inputs_of
from cla_jax.start import check_start, fixed_producers, least_damaged, map_of, source

log = logging.getLogger(__name__)


def check_tokenizers(run: runs.Run, prepared: Corpus) -> None:
    """Raises ValueError unless the other run's tokenizer is that of this run's data."""
    if run.tokenizer_json() != prepared.tokenizer.to_json():
        raise ValueError(
            f"start.run = {shown(str(run.path))} has a different tokenizer.json than this run's data: its "
            "embeddings belong to other tokens"
        )


def load(start: FromRun, rules: AxisRules, mesh: Mesh) -> Transformer:
    """The model of the other run on a mesh. Raises ValueError if its weights are not the ones asked for."""
    run = source(start)
    step, model = checkpoint.load_model(run, rules, mesh)
    if start.checkpoint and start.checkpoint != checkpoint.fingerprint(run, step):
        found = checkpoint.weights_fingerprint(model)
        if start.checkpoint != found:
            raise ValueError(
                f"start.checkpoint = {start.checkpoint}, but the newest weights of {run.path} (step {step}) "
                f"have the checksum {found}: that run was trained further, or altered"
            )
    return model


def load_here(start: FromRun) -> Layers:
    """The model of the other run, taken apart on this host."""
    config, mesh = source(start).config().model, _one_device()
    with jax.set_mesh(mesh):
        model = load(start, meshes.axis_rules(config, mesh), mesh)
    return layerwise.taken_apart(model)


def _one_device() -> Mesh:
    return meshes.make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])


def first_model(config: Config, text: "Text") -> Transformer:
    """The weights that a run starts with, as its `start` says. Its arrays are numpy's."""
    start = config.start
    assert isinstance(start, FromRun)
    if jax.process_count() > 1:
        raise ValueError(
            "start.run: several processes cannot convert a model together: convert it with launch.convert "
            "uptrain in one process first, then start them"
        )
    check_start(config)
    check_tokenizers(source(start), text.prepared)
    parts = load_here(start)
    model = dataclasses.replace(config.model, compute_dtype="float32")
    inputs, changes = None, _changes(parts.config, model)
    if changes and start.init in CALIBRATED_INITS:
        # One window at a time: the run's own mesh would split rows.
        with jax.set_mesh(_one_device()):
            inputs = streams(parts, text, start.calibration_windows)
    made = converted(parts, model, start.init, inputs) if changes else parts
    return layerwise.put_together(dataclasses.replace(made, config=config.model))


# ------------------------------------------------------------------------------------ conversion


def converted(
    parts: Layers, config: ModelConfig, init: str, inputs: Mapping[int, np.ndarray] | None
) -> Layers:
    """The layers of a model with fewer KV heads or producers, or with latents.

    `inputs` are the streams of the layers, for the ways of conversion that ask for them (`streams`).
    """
    kv_map, source_map = config.resolved_kv_map, parts.config.resolved_kv_map
    convert = _with_latent if isinstance(config.kv, LatentKV) else _with_fewer_heads
    layers = list(parts.layers)
    for producer in sorted(set(kv_map)):
        readers = [layer for layer, read in enumerate(kv_map) if read == producer]
        # The producer's own source is the first: its stream is what the projection reads.
        sources = list(dict.fromkeys(source_map[layer] for layer in readers))
        for layer, made in convert(parts, config, readers, sources, init, inputs).items():
            layers[layer] = made
    return Layers(config, tuple(layers), parts.rest)


def _with_fewer_heads(
    parts: Layers,
    config: ModelConfig,
    readers: Sequence[int],
    sources: Sequence[int],
    init: str,
    inputs: Mapping[int, np.ndarray] | None,
) -> dict[int, Layer]:
    """The layers that read one producer; the first of them is the producer."""
    source_map = parts.config.resolved_kv_map
    per_head = parts.config.n_kv_heads // config.n_kv_heads
    joined = [
        conversion.join(
            _members(parts, sources, range(k * per_head, (k + 1) * per_head), inputs), init
        )
        for k in range(config.n_kv_heads)
    ]
    layers = {}
    for layer in readers:
        at = sources.index(source_map[layer]) * per_head
        block = _folded(parts.layers[layer].block, joined, slice(at, at + per_head))
        layers[layer] = Layer(block, None)
    projection = dict(parts.layers[readers[0]].projection or {})
    kv = np.stack([np.stack([each.key, each.value], 1) for each in joined], 2)  # [D, C, K, H]
    D = projection["kv.weight"].shape[0]
    projection["kv.weight"] = kv[:D].astype(np.float32)
    if "kv.bias" in projection:
        projection["kv.bias"] = kv[D].astype(np.float32)
    layers[readers[0]] = Layer(layers[readers[0]].block, projection)
    return layers


def _changes(source: ModelConfig, model: ModelConfig) -> bool:
    return any(
        getattr(source, field) != getattr(model, field) for field in ("n_kv_heads", "sharing", "kv")
    )


def _members(
    parts: Layers, sources: Sequence[int], heads: range, inputs: Mapping[int, np.ndarray] | None
) -> conversion.Members:
    """The heads of these layers that become one; the first layer is the producer."""
    scale = _norm_scale(parts.layers[sources[0]])
    keys, values, streams = [], [], []
    for producer in sources:
        layer = parts.layers[producer]
        assert layer.projection is not None
        ratio = np.divide(_norm_scale(layer), scale, out=np.zeros_like(scale), where=scale != 0)
        weight = layer.projection["kv.weight"].astype(np.float64) * ratio[:, None, None, None]
        if "kv.bias" in layer.projection:
            weight = np.concatenate([weight, layer.projection["kv.bias"][None]])
        if inputs is not None:
            stream = inputs[producer].reshape(-1, len(scale)) * scale
            if "kv.bias" in layer.projection:
                stream = np.concatenate([stream, np.ones((len(stream), 1))], axis=1)
            streams += [stream] * len(heads)
        for head in heads:
            keys.append(weight[:, 0, head])
            values.append(weight[:, 1, head])
    return conversion.Members(np.stack(keys), np.stack(values), streams)


def _norm_scale(layer: Layer) -> np.ndarray:
    """Of the norm that feeds a layer's K/V projection."""
    own = (layer.projection or {}).get("norm.scale")
    return (layer.block["attention_norm.scale"] if own is None else own).astype(np.float64)


def _folded(block: Arrays, joined: Sequence[conversion.Shared], members: slice) -> Arrays:
    """A block whose queries and outputs make up for what was done to the keys and values that they read."""
    turns = np.concatenate([each.turns[members] for each in joined]).conj()  # [K, H / 2]
    maps = np.concatenate([each.maps[members] for each in joined])  # [K, H, H]
    K = len(joined)

    def turned(query: np.ndarray) -> np.ndarray:
        new = conversion.unpaired(conversion.pairs(query.astype(np.float64)) * turns[:, None])
        return new.astype(np.float32).reshape(*query.shape[:-3], K, -1, query.shape[-1])

    output = np.einsum("kij,kgjd->kgid", maps, block["output.weight"].astype(np.float64))
    _, _, H, D = output.shape
    changed = {
        "query.weight": turned(block["query.weight"]),
        "output.weight": output.astype(np.float32).reshape(K, -1, H, D),
    }
    if "query.bias" in block:
        changed["query.bias"] = turned(block["query.bias"])
    return block | changed


def _with_latent(
    parts: Layers,
    config: ModelConfig,
    readers: Sequence[int],
    sources: Sequence[int],
    init: str,
    inputs: Mapping[int, np.ndarray] | None,
) -> dict[int, Layer]:
    """The layers that read one producer, its heads made a latent; the first of them is the producer."""
    assert isinstance(config.kv, LatentKV)
    source_map, K = parts.config.resolved_kv_map, parts.config.n_kv_heads
    sizes = config.kv.rank, config.kv.rope_dims
    members = _members(parts, sources, range(K), inputs)
    of = lambda layer: slice(
        sources.index(source_map[layer]) * K, (sources.index(source_map[layer]) + 1) * K
    )
    if init == "svd":
        made = conversion.latent_of_weights(members, *sizes)
    else:
        assert inputs is not None
        reading = _readers(parts, readers, of, len(members), inputs)
        windows = np.shape(inputs[readers[0]])
        made = conversion.latent(
            members, reading, *sizes, _mean_rotations(windows[-2], parts.config)
        )
    layers = {
        layer: Layer(_of_latent(parts.layers[layer].block, made, of(layer), config), None)
        for layer in readers
    }
    producer = parts.layers[readers[0]].projection or {}
    projection = {name: array for name, array in producer.items() if name == "norm.scale"}
    down = np.concatenate([made.latent, made.key], axis=1)
    projection["down.weight"] = down.astype(np.float32)
    if config.kv.norm:
        scale = np.full(config.kv.rank, made.root_mean_square, np.float32)
        projection["latent_norm.scale"] = scale
    layers[readers[0]] = Layer(layers[readers[0]].block, projection)
    return layers


def _readers(
    parts: Layers,
    readers: Sequence[int],
    of: Callable[[int], slice],
    members: int,
    inputs: Mapping[int, np.ndarray],
) -> conversion.Readers:
    H = parts.config.d_head
    queries, outputs = np.zeros((2, members, H, H))
    for layer in readers:
        block = parts.layers[layer].block
        scale = block["attention_norm.scale"].astype(np.float64)
        stream = inputs[layer].reshape(-1, len(scale)) * scale
        square = stream.T @ stream / len(stream)
        query = block["query.weight"].astype(np.float64)
        output = block["output.weight"].astype(np.float64)
        queries[of(layer)] += np.einsum("dkgh,de,ekgi->khi", query, square, query, optimize=True)
        outputs[of(layer)] += np.einsum("kghd,kgid->khi", output, output)
    return conversion.Readers(queries, outputs)


def _mean_rotations(length: int, config: ModelConfig) -> np.ndarray:
    """The mean of exp(i w d) over the distances d of all pairs of tokens of a window, [H / 2]."""
    rope = Rope.at(jnp.arange(length)[None], config)
    turns = np.asarray(rope.cos[0], np.float64) + 1j * np.asarray(rope.sin[0], np.float64)
    pairs_at = length - np.arange(length)
    # Queries and keys each have the factor of YaRN, which is the rotation at distance 0.
    return pairs_at @ turns / pairs_at.sum() * turns[0].real


def _of_latent(
    block: Arrays, made: conversion.Latent, members: slice, config: ModelConfig
) -> Arrays:
    """A block that reads the latent and the rotated key instead of heads."""
    assert isinstance(config.kv, LatentKV)
    D, K, G, H = block["query.weight"].shape
    turned = np.arange(0, H // 2, H // config.kv.rope_dims)
    query = block["query.weight"].astype(np.float64)
    rotated = conversion.pairs(query)[..., turned] * made.turns[members, None].conj()
    widened = np.concatenate([query, conversion.unpaired(rotated)], axis=-1)
    widened *= (widened.shape[-1] / H) ** 0.5  # attention divides by the root of the width
    of_heads = lambda weight_KRH: np.repeat(weight_KRH[members], G, axis=0).swapaxes(
        0, 1
    )  # [R, G, H]
    changed = {
        "query.weight": widened.reshape(D, 1, K * G, -1),
        "heads.keys": of_heads(made.keys),
        "heads.values": of_heads(made.values),
        "output.weight": block["output.weight"].reshape(1, K * G, H, -1),
    }
    return block | {name: array.astype(np.float32) for name, array in changed.items()}


# ----------------------------------------------------------------------------------- calibration


@dataclasses.dataclass(frozen=True)
class Text:
    """The text of a run, as its model reads it."""

    prepared: Corpus
    end: int | None  # the token that attention must not cross
    begins: tuple[int, int] | None

    def windows(self, count: int, split: str = "train") -> tuple[np.ndarray, ...]:
        """The first windows of a split, of each component alike: inputs, targets, and the first position
        that each token may see; [B, T] each."""
        parts = [part.split(split) for part in self.prepared.parts.values()]
        each = -(-count // len(parts))
        tokens_BT1 = np.stack(
            [
                example["tokens"]
                for part in parts
                for example in part.take(range(min(each, len(part))))
            ]
        )
        inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
        starts_BT = np.zeros_like(inputs_BT)
        if self.end is not None:
            starts_BT = np.asarray(document_starts(jnp.asarray(inputs_BT), self.end))
        read_BT = np.asarray(inputs_of(jnp.asarray(inputs_BT), self.begins))
        return read_BT, targets_BT, starts_BT


def streams(parts: Layers, text: Text, windows: int) -> dict[int, np.ndarray]:
    """The stream that each layer reads on training text, normed, before its norm's scale: [B, T, D]."""
    tokens_BT, _, starts_BT = text.windows(windows)
    by_layer: dict[int, list[np.ndarray]] = {}

    def visit(layer: int, x_BTD: jax.Array) -> None:
        x = np.asarray(x_BTD[0])
        square = np.mean(x * x, axis=-1, keepdims=True)
        by_layer.setdefault(layer, []).append(x / np.sqrt(square + parts.config.norm_eps))

    for row in range(len(tokens_BT)):
        layerwise.run(parts, tokens_BT[row : row + 1], starts_BT[row : row + 1], visit)
    return {layer: np.stack(rows) for layer, rows in by_layer.items()}


# -------------------------------------------------------------------- which layers can consume


def damages(
    parts: Layers, text: Text, init: str, windows: int, progress: Callable[[int, int], None]
) -> dict[int, float]:
    """The loss in nats on training text if a producer alone becomes a consumer, for each that can.

    It then reads the producer before it that has the same sliding window.
    """
    if init not in conversion.JOINS:  # it makes latents; the measurement keeps the heads
        init = "least_squares"
    inputs = streams(parts, text, windows) if init in CALIBRATED_INITS else None
    batch = text.windows(windows)
    producers = set(parts.config.resolved_kv_map)
    candidates, losses = sorted(producers - fixed_producers(parts.config)), {}
    for done, layer in enumerate(candidates):
        kv_map = map_of(parts.config, producers - {layer})
        config = dataclasses.replace(parts.config, kv_map=kv_map)
        losses[layer] = layerwise.mean_loss(converted(parts, config, init, inputs), *batch)
        progress(done + 1, len(candidates))
    return losses


def with_least_damage(
    config: Config, producers: int, text: Text, progress: Callable[[int, int], None]
) -> Config:
    """The config with the kv_map of so many producers whose consumers do the least damage one by one."""
    start = config.start
    assert isinstance(start, FromRun)
    parts = load_here(start)
    measured = damages(parts, text, start.init, start.calibration_windows, progress)
    log.info(
        "loss (nats per token) with each layer as a consumer: %s",
        {k: round(v, 3) for k, v in measured.items()},
    )
    kv_map = least_damaged(parts.config, measured, producers)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, kv_map=kv_map))


def pinned(start: FromRun) -> FromRun:
    """The start with the weights named that are the newest now."""
    run, mesh = source(start), _one_device()
    with jax.set_mesh(mesh):
        _, model = checkpoint.load_model(run, meshes.axis_rules(run.config().model, mesh), mesh)
    return dataclasses.replace(start, checkpoint=checkpoint.weights_fingerprint(model))
