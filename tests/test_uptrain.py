"""Runs that start from other runs: the arithmetic of joining heads, whole conversions, teachers, refusals."""

import dataclasses
import json
import re
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from cla_jax import checkpoint, conversion, layerwise, runs, start, uptrain
from cla_jax import mesh as meshes
from cla_jax.config import (
    HEAD_INITS,
    LATENT_INITS,
    Component,
    DataConfig,
    FromRun,
    LatentKV,
    MeshConfig,
    SquaredReLU,
    Stage,
    YarnScaling,
)
from cla_jax.loss import Distillation, TeacherOutput, cross_entropy
from cla_jax.mesh import AxisRules
from cla_jax.model.transformer import ForwardOptions, Transformer
from cla_jax.state import named
from cla_jax.train import train
from launch import convert
from launch import train as launch_train
from tests import reference
from tests.conftest import MODEL, replace, tiny_config

M, D, H, N = 3, 12, 8, 200


@pytest.fixture
def members():
    """Three heads that are one head in disguise: rotated in pairs, and by orthogonal maps."""
    draw = np.random.default_rng(0)
    key, value = draw.normal(size=(2, D, H))
    turns = np.exp(2j * np.pi * draw.random((M, 1, H // 2)))
    maps = [np.linalg.qr(draw.normal(size=(H, H)))[0] for _ in range(M)]
    stream = draw.normal(size=(N, D))
    return conversion.Members(
        conversion.unpaired(conversion.pairs(key) * turns),
        np.stack([value @ rotation for rotation in maps]),
        [stream] * M,
    )


def error(shared: conversion.Shared, members: conversion.Members) -> float:
    """The part of the keys and values, as their readers see them, that a join loses."""
    key = conversion.pairs(shared.key) * shared.turns[:, None]
    lost = np.linalg.norm(conversion.unpaired(key) - members.keys)
    lost += np.linalg.norm(shared.value @ shared.maps - members.values)
    return lost / (np.linalg.norm(members.keys) + np.linalg.norm(members.values))


@pytest.mark.parametrize("how", ["aligned", "fitted", "least_squares"])
def test_heads_that_differ_by_rotations_are_joined_without_loss(members, how):
    assert error(conversion.JOINS[how](members), members) < 1e-6
    assert error(conversion.mean(members), members) > 0.3


def test_least_squares_loses_least(members):
    draw = np.random.default_rng(1)
    noisy = conversion.Members(
        draw.normal(size=members.keys.shape), draw.normal(size=members.values.shape), members.inputs
    )

    def lost(how: str) -> float:
        shared, (stream, *_) = conversion.JOINS[how](noisy), noisy.inputs
        key = conversion.unpaired(conversion.pairs(shared.key) * shared.turns[:, None])
        return float(
            np.square(stream @ (key - noisy.keys)).sum()
            + np.square(stream @ (shared.value @ shared.maps - noisy.values)).sum()
        )

    losses = {how: lost(how) for how in conversion.JOINS}
    assert min(losses, key=losses.__getitem__) == "least_squares"


def test_every_way_to_join_heads_has_a_name_in_the_config():
    assert tuple(conversion.JOINS) == HEAD_INITS


@pytest.mark.parametrize("how", conversion.JOINS)
def test_one_member_stays_what_it_is(members, how):
    one = conversion.Members(members.keys[:1], members.values[:1], members.inputs[:1])
    shared = conversion.join(one, how)
    np.testing.assert_array_equal(shared.key, members.keys[0])
    np.testing.assert_array_equal(shared.maps[0], np.eye(H))


def test_a_renormalized_mean_is_as_long_as_its_members(members):
    lengths = np.linalg.norm(members.keys, axis=(1, 2))
    assert np.linalg.norm(conversion.mean(members).key) < 0.9 * lengths.mean()
    assert np.isclose(np.linalg.norm(conversion.renormalized(members).key), lengths.mean())


# ----------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_map": "0,1,0,0"},
        {"kv_map": "0,1,1,3", "kv_norm": "block", "bias": True, "tied_embeddings": False},
    ],
)
def test_a_model_is_taken_apart_and_put_together(changes):
    config = replace(MODEL, **changes)
    model = Transformer(jax.random.key(0), config)
    parts = layerwise.taken_apart(model)
    again = layerwise.put_together(parts)
    for name, array in named(model).items():
        np.testing.assert_array_equal(named(again)[name], array)
    tokens = np.random.default_rng(0).integers(0, 260, (2, 17))
    starts = np.zeros((2, 16), np.int32)
    logits = jax.jit(lambda model, tokens: model.logits(tokens, ForwardOptions()))
    log_p = jax.nn.log_softmax(logits(model, tokens[:, :-1]))
    expected = -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()
    found = layerwise.mean_loss(parts, tokens[:, :-1], tokens[:, 1:], starts)
    assert np.isclose(found, expected, rtol=1e-6)


def disguised(config) -> tuple[layerwise.Layers, dict[int, np.ndarray]]:
    """A model with two KV heads a layer that are one, but for rotations; and inputs to its layers."""
    parts = layerwise.taken_apart(Transformer(jax.random.key(0), config))
    draw, layers = np.random.default_rng(0), []
    for layer in parts.layers:
        angles = np.exp(2j * np.pi * draw.random(config.d_head // 2))
        rotation = np.linalg.qr(draw.normal(size=(config.d_head, config.d_head)))[0]
        kv = layer.projection["kv.weight"].copy()
        kv[:, 0, 1] = conversion.unpaired(conversion.pairs(kv[:, 0, 0]) * angles)
        kv[:, 1, 1] = kv[:, 1, 0] @ rotation
        layers.append(layerwise.Layer(layer.block, layer.projection | {"kv.weight": kv}))
    inputs = {i: draw.normal(size=(64, config.d_model)) for i in range(config.n_layers)}
    return layerwise.Layers(config, tuple(layers), parts.rest), inputs


@pytest.mark.parametrize(
    ("init", "is_exact"),
    [("aligned", True), ("fitted", True), ("least_squares", True), ("mean", False)],
)
def test_what_is_folded_into_queries_and_outputs_leaves_the_model_as_it_is(init, is_exact):
    """Through RoPE, for every position: a rotation that mixed pairs would show."""
    config = replace(MODEL, n_kv_heads=2, kv_map="identity", n_layers=2)
    parts, inputs = disguised(config)
    made = uptrain.converted(parts, replace(config, n_kv_heads=1), init, inputs)
    tokens = np.random.default_rng(0).integers(0, 260, (1, 17))
    starts = np.zeros((1, 16), np.int32)
    before, after = (layerwise.run(p, tokens[:, :-1], starts) for p in (parts, made))
    assert (float(jnp.abs(after - before).max()) < 1e-4) == is_exact


def test_a_conversion_that_changes_nothing_is_exact():
    config = replace(MODEL, n_kv_heads=2, kv_map="0,0,2,0", bias=True)
    model = Transformer(jax.random.key(0), config)
    parts = layerwise.taken_apart(model)
    for init in conversion.JOINS:
        made = layerwise.put_together(uptrain.converted(parts, config, init, None))
        for name, array in named(model).items():
            np.testing.assert_array_equal(named(made)[name], array)


def test_own_keeps_the_first_head_of_the_producer():
    config = replace(MODEL, n_kv_heads=2, kv_map="identity", kv_norm="block")
    parts = layerwise.taken_apart(Transformer(jax.random.key(0), config))
    made = uptrain.converted(parts, replace(config, n_kv_heads=1, kv_map="cla:2"), "own", None)
    before, after = (p.layers[2].projection["kv.weight"] for p in (parts, made))
    np.testing.assert_array_equal(after, before[:, :, :1])
    assert made.layers[3].projection is None


# ---------------------------------------------------------------------------------------- latents


def latent_error(parts: layerwise.Layers, kv: LatentKV, init: str, **changes) -> float:
    """The largest change of the hidden states when the heads of a model become latents."""
    tokens = np.random.default_rng(0).integers(0, 260, (1, 32))
    starts, inputs = np.zeros_like(tokens), {}

    def visit(layer: int, x_BTD: jax.Array) -> None:
        square = np.mean(np.square(x_BTD), axis=-1, keepdims=True)
        inputs[layer] = np.asarray(x_BTD) / np.sqrt(square + parts.config.norm_eps)

    expected = layerwise.run(parts, tokens, starts, visit)
    made = uptrain.converted(
        parts, replace(parts.config, n_kv_heads=1, kv=kv, **changes), init, inputs
    )
    layerwise.put_together(made)  # every parameter has its shape
    return float(jnp.abs(layerwise.run(made, tokens, starts) - expected).max())


YARN = YarnScaling(original_max_position_embeddings=16)


def latents_of(rank: int, rope_dims: int, norm: bool = False) -> LatentKV:
    return LatentKV(rank=rank, rope_dims=rope_dims, norm=norm)


ONE_HEAD = replace(MODEL, n_kv_heads=1, kv_map="identity", n_layers=2)


@pytest.mark.parametrize("init", LATENT_INITS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_layers": 4, "kv_map": "0,0,2,0"},
        {
            "kv_norm": "block",
            "rope_scaling": YarnScaling(
                factor=4.0, original_max_position_embeddings=16, attention_factor=1.2
            ),
        },
    ],
)
def test_one_head_is_a_latent_of_its_size(init, changes):
    config = replace(ONE_HEAD, **changes)
    parts = layerwise.taken_apart(reference.randomised(config, 0))
    width = config.d_head
    assert latent_error(parts, latents_of(width, width), init) < 1e-4
    assert latent_error(parts, latents_of(width, width, norm=True), init) > 1e-2


@pytest.mark.parametrize("init", LATENT_INITS)
def test_heads_that_differ_by_rotations_are_one_latent(init):
    """Each member turns the one rotated key for itself, through its queries."""
    parts, _ = disguised(replace(ONE_HEAD, n_kv_heads=2))
    width = parts.config.d_head
    assert latent_error(parts, latents_of(width, width), init) < 1e-4


@pytest.mark.parametrize("zero", ["query.weight", "output.weight"])
def test_a_layer_without_queries_or_outputs_becomes_a_latent(zero):
    parts = layerwise.taken_apart(reference.randomised(ONE_HEAD, 0))
    first, second = parts.layers
    dead = layerwise.Layer(first.block | {zero: 0 * first.block[zero]}, first.projection)
    parts = dataclasses.replace(parts, layers=(dead, second))
    width = ONE_HEAD.d_head
    assert latent_error(parts, latents_of(width, width), "least_squares") < 1e-4


def test_the_latent_of_layers_that_share_is_made_of_all_of_them():
    """Two layers that read the same stream: the second has nothing of its own but its projection."""
    parts = layerwise.taken_apart(reference.randomised(ONE_HEAD, 0))
    silent = {"output.weight", "mlp.down.weight"}
    block = {k: a * (0 if k in silent else 1) for k, a in parts.layers[0].block.items()}
    parts = dataclasses.replace(
        parts, layers=(layerwise.Layer(block, parts.layers[0].projection), parts.layers[1])
    )
    width = ONE_HEAD.d_head
    # One rotated key for two unrelated layers loses something; two heads would not fit at all.
    both = latent_error(parts, latents_of(2 * width, width), "least_squares", kv_map="cla:2")
    half = latent_error(parts, latents_of(width // 2, width), "least_squares", kv_map="cla:2")
    assert both < half


def test_the_best_latent_loses_less_than_that_of_the_weights():
    draw, P = np.random.default_rng(0), H // 2
    streams = draw.normal(size=(N, D)) * np.logspace(0, -2, D)
    members = conversion.Members(*draw.normal(size=(2, M, D, H)), [streams] * M)
    moments = lambda: np.stack([a @ a.T for a in draw.normal(size=(M, H, H))])
    readers = conversion.Readers(moments(), moments())

    def lost(made: conversion.Latent) -> float:
        values = np.einsum("nr,mrh->mnh", streams @ made.latent, made.values)
        wrong = values - streams @ members.values
        return float(np.einsum("mnh,mhi,mni->", wrong, readers.outputs, wrong))

    best = [
        lost(conversion.latent(members, readers, rank, H, np.ones(P))) for rank in (2, 4, 8, 24)
    ]
    assert best == sorted(best, reverse=True)
    assert best[1] < 0.9 * lost(conversion.latent_of_weights(members, 4, H))
    mistaken = conversion.Readers(readers.queries, readers.queries)
    made = conversion.latent(members, mistaken, 4, H, np.ones(P))
    assert best[1] < 0.9 * lost(made)
    # A norm leaves the latent as large as it is over the text.
    assert np.isclose(made.root_mean_square, np.sqrt(np.mean((streams @ made.latent) ** 2)))


def test_a_pair_without_rotation_has_its_mean_rotation():
    """A query's score with what is left of a key is its mean score over all distances."""
    draw, angles = np.random.default_rng(0), 0.3 * np.arange(7)[:, None] * (1 + np.arange(H // 2))
    members = conversion.Members(*draw.normal(size=(2, 1, D, H)), [draw.normal(size=(N, D))])
    readers = conversion.Readers(np.eye(H)[None], np.eye(H)[None])
    turns = np.exp(1j * angles)  # of queries that stand that much after the key
    made = conversion.latent(members, readers, 2 * H, 2, turns.mean(axis=0))
    query = draw.normal(size=H)
    query[[0, H // 2]] = 0  # the rotated key has all of the first pair
    turned = conversion.unpaired(conversion.pairs(query) * turns)
    expected = np.mean(turned @ members.keys[0].T, axis=0)
    np.testing.assert_allclose(made.latent @ made.keys[0] @ query, expected, atol=1e-6)
    np.testing.assert_allclose((made.latent @ made.keys[0])[:, [0, H // 2]], 0, atol=1e-6)


# ------------------------------------------------------------------------------------------- maps


def test_maps_are_drawn_or_take_the_least_damage():
    config = replace(MODEL, kv_map="identity", n_layers=6)
    drawn = {start.random_map(config, 3, seed) for seed in range(8)}
    assert len(drawn) > 3
    for kv_map in drawn:
        assert replace(config, kv_map=kv_map).n_kv_layers == 3
    damage = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.2, 5: 0.3}
    assert start.least_damaged(config, damage, 3) == "0,1,1,3,3,3"
    shared = replace(config, kv_map="0,0,2,2,4,4")
    assert start.least_damaged(shared, {2: 0.1, 4: 0.2}, 2) == "0,0,0,0,4,4"
    assert start.resolved_map("cla:2", config) is None
    with pytest.raises(
        ValueError, match=r"random:7.*6 producers \(kv_map identity\), so .* 1 to 6"
    ):
        start.resolved_map("random:7", config)
    with pytest.raises(ValueError, match="must have the form damage:PRODUCERS"):
        start.resolved_map("damage:3:1", config)
    latents = replace(config, n_kv_heads=1, kv=LatentKV(rank=8, rope_dims=4))
    with pytest.raises(ValueError, match="a model with latents keeps its kv_map"):
        start.resolved_map("damage:6", latents)


def test_only_layers_with_the_same_window_share_in_a_drawn_map():
    config = replace(MODEL, kv_map="identity", n_layers=6, windows="8,8,0,8,0,0")
    drawn = {start.random_map(config, 4, seed) for seed in range(16)}
    assert drawn == {
        *("0,0,2,0,4,5", "0,0,2,3,2,5", "0,0,2,3,4,4"),
        *("0,1,2,1,2,5", "0,1,2,1,4,4", "0,1,2,3,2,2"),
    }
    assert all(replace(config, kv_map=kv_map).n_kv_layers == 4 for kv_map in drawn)
    damage = {1: 0.5, 3: 0.4, 4: 0.1, 5: 0.2}
    assert start.least_damaged(config, damage, 2) == "0,0,2,0,2,2"
    assert start.least_damaged(config, damage, 3) == "0,1,2,1,2,2"
    with pytest.raises(
        ValueError, match=r"2 different sliding windows, so the run can have 2 to 6"
    ):
        start.resolved_map("random:1", config)


def test_only_layers_with_an_earlier_producer_of_their_window_are_measured():
    config = replace(MODEL, kv_map="identity", n_layers=4, windows="8,0,8,0")
    parts = layerwise.taken_apart(reference.randomised(config))
    tokens = np.arange(17)[None] % 7
    windows = (tokens[:, :-1], tokens[:, 1:], np.zeros((1, 16), int))
    text, told = SimpleNamespace(windows=lambda _: windows), []
    found = uptrain.damages(parts, text, "own", 1, lambda *done: told.append(done))
    assert sorted(found) == [2, 3]
    assert told == [(1, 2), (2, 2)]


# ----------------------------------------------------------------------------------------- teacher


def test_the_loss_of_a_teacher_and_its_gradient():
    draw = jax.random.split(jax.random.key(0), 6)
    x, taught = (jax.random.normal(key, (2, 6, 5)) for key in draw[:2])
    head, theirs = (jax.random.normal(key, (7, 5)) for key in draw[2:4])
    targets = jax.random.randint(draw[4], (2, 6), 0, 7)
    weights = jax.random.uniform(draw[5], (2, 6))
    w, T = 0.7, 2.0

    def plain(x, head):
        student, teacher = x @ head.T, taught @ theirs.T
        log_p = jax.nn.log_softmax(student)
        nll = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        teacher = jax.nn.softmax(teacher / T)
        kl = jnp.sum(teacher * (jnp.log(teacher) - jax.nn.log_softmax(student / T)), -1)
        return jnp.sum(weights * ((1 - w) * nll + w * T**2 * kl))

    def ours(x, head):
        said = TeacherOutput(taught, theirs)
        return cross_entropy(x, head, targets, weights, 3, AxisRules(), said, Distillation(w, T))

    expected, found = (jax.value_and_grad(f, argnums=(0, 1))(x, head) for f in (plain, ours))
    assert np.isclose(found[0], expected[0], rtol=1e-6)
    assert np.isclose(ours(x, head), expected[0], rtol=1e-6)  # without a gradient
    for a, b in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_dir):
    """A run of a few steps, with two KV heads and no sharing."""
    config = tiny_config(
        str(tmp_path_factory.mktemp("source")),
        data_dir,
        name="source",
        steps=40,
        **{
            "model.kv_map": "identity",
            "model.n_layers": 2,
            "model.n_kv_heads": 2,
            "placement.save_every": 40,
        },
    )
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "devices", lambda *_: first)
        patched.setattr(jax, "device_count", lambda *_: 1)
        assert train(config, evaluate=lambda *_: {})
    return runs.find_run(f"{config.placement.runs}/source")


def model_of(path) -> Transformer:
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    run = runs.find_run(path)
    with jax.set_mesh(mesh):
        return checkpoint.load_model(run, meshes.axis_rules(run.config().model, mesh), mesh)[1]


def uptrained(trained, path, *flags: str) -> runs.Run:
    convert.main(["uptrain", str(trained.path), str(path), "--calibration-windows", "2", *flags])
    return runs.find_run(path)


def test_a_start_without_a_change_has_the_weights_of_the_source(trained, tmp_path, devices):
    devices(1)
    made = uptrained(trained, tmp_path / "same", "--fraction", "0.5")
    config, source = made.config(), trained.config()
    assert (config.steps, config.seed, config.optimizer) == (20, source.seed, source.optimizer)
    assert config.start.checkpoint == checkpoint.weights_fingerprint(model_of(trained.path))
    before, after = named(model_of(trained.path)), named(model_of(made.path))
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)


@pytest.mark.slow
def test_a_converted_run_is_trained_and_taught_and_goes_on(trained, tmp_path, devices):
    devices(1)
    flags = ("--kv-map", "damage:1", "--kv-heads", "1", "--fraction", "0.1")
    made = uptrained(trained, tmp_path / "shared", *flags, "--distill-weight", "0.5")
    assert made.config().model.kv_map == "0,0"
    first = named(model_of(made.path))
    (config,) = launch_train.parse([str(made.path / "config.json")])

    def trained_on(config, until=None) -> list[float]:
        stop = lambda step: step == until
        done = train(config, evaluate=lambda *_: {"held_out_loss": 1.0}, should_stop=stop)
        assert done == (until is None)
        found = runs.find_run(runs.run_path(config))
        return [record["loss"] for record in found.read_metrics() if "loss" in record]

    assert len(trained_on(config, until=2)) == 2
    losses = trained_on(config)
    assert len(losses) == config.steps == 4
    last = named(model_of(made.path))
    assert any(bool(jnp.any(last[name] != array)) for name, array in first.items())
    # The start says it all: of the config alone the same weights are made again, on any mesh.
    devices(2)
    again = trained_on(dataclasses.replace(config, name="again"))
    np.testing.assert_allclose(again, losses, rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_latents_is_made_of_one_with_heads_and_trained(trained, tmp_path, devices):
    devices(1)
    flags = ("--latent-rank", "16", "--rope-dims", "4", "--fraction", "0.1")
    made = uptrained(trained, tmp_path / "latent", *flags, "--distill-weight", "0.5")
    assert made.config().model.kv == latents_of(16, 4)
    assert made.config().model.n_kv_heads == 1
    (config,) = launch_train.parse([str(made.path / "config.json")])
    assert train(config, evaluate=lambda *_: {"held_out_loss": 1.0})
    weights = uptrained(
        trained, tmp_path / "w", "--latent-rank", "8", "--init", "svd", "--latent-norm"
    )
    assert weights.config().model.kv == latents_of(8, trained.config().model.d_head, norm=True)


def test_latents_that_cannot_be_made_are_refused_before_anything_is_read(
    trained, tmp_path, devices, monkeypatch, capsys
):
    devices(1)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("weights were read"))

    def refusal(*flags: str) -> str:
        with pytest.raises(SystemExit):
            uptrained(trained, tmp_path / "x", *flags)
        assert not (tmp_path / "x").exists()
        return " ".join(capsys.readouterr().err.split())

    assert "--rope-dims and --latent-norm need --latent-rank" in refusal("--rope-dims", "4")
    assert "--kv-heads 2: with --latent-rank" in refusal("--latent-rank", "8", "--kv-heads", "2")
    d_head = trained.config().model.d_head
    assert f"model.d_head = {d_head}: this run's model.kv.rope_dims = 6 must divide it" in refusal(
        "--latent-rank", "8", "--rope-dims", "6"
    )
    assert "start.init = mean joins heads" in refusal("--latent-rank", "8", "--init", "mean")
    assert "start.init = svd makes latents of heads" in refusal("--init", "svd")


@pytest.mark.parametrize(
    ("changes", "flags", "words"),
    [
        ({"model.qk_norm": True}, "--kv-heads 1", "models with model.qk_norm = True cannot"),
        ({"model.qk_norm": True}, "--kv-map cla:2", "models with model.qk_norm = True cannot"),
        ({"model.qk_norm": True}, "--latent-rank 8", "models with model.qk_norm = True cannot"),
        (
            {"model.rope_scaling": YARN},
            "--latent-rank 8 --rope-dims 4",
            "rope_dims must be 8, not 4",
        ),
        ({"model.kv": latents_of(8, 4)}, "--kv-map cla:2", "rank 8 with 4 rotated dimensions and"),
        ({"model.kv": latents_of(8, 4)}, "--kv-heads 2", "must be 1 with model.kv.kind = latent"),
        ({"model.kv": latents_of(8, 4)}, "--latent-rank 4", "it cannot be converted"),
        ({"model.kv_map": "k=cla:2;v=identity"}, "--kv-map random:1", "different maps for keys"),
    ],
)
def test_a_source_that_cannot_be_converted_is_named_with_the_flags(
    tmp_path, data_dir, capsys, changes, flags, words
):
    heads = 1 if "model.kv" in changes else 2
    config = tiny_config(
        str(tmp_path),
        data_dir,
        name="source",
        **{"model.kv_map": "identity", "model.n_kv_heads": heads} | changes,
    )
    source = runs.open_run(config, data_fingerprint="sotu", tokenizer_json="{}")
    source.checkpoints.mkdir()
    (source.checkpoints / "00000004.json").write_text("{}")
    with pytest.raises(SystemExit):
        uptrained(source, tmp_path / "x", *flags.split())
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"error: {source.path} with {flags} ")
    assert words in line


def test_a_temperature_without_a_teacher_is_refused(trained, tmp_path, capsys):
    with pytest.raises(SystemExit):
        uptrained(trained, tmp_path / "x", "--distill-temperature", "2")
    assert "--distill-temperature needs --distill-weight" in capsys.readouterr().err


def test_a_teacher_that_could_change_is_refused(tiny):
    taught = replace(tiny(), start=FromRun(run="runs/x", distill_weight=0.5))
    with pytest.raises(ValueError, match=r"start\.checkpoint is empty.*launch\.convert uptrain"):
        train(taught, evaluate=lambda *_: {})


def test_stages_of_the_data_are_shortened_as_the_steps_are(tiny):
    weights = (("a", 1.0), ("b", 1.0))
    data = DataConfig(
        mixture=tuple(Component(name=name, weight=1.0, source="sotu:4") for name, _ in weights),
        stages=(Stage(step=30, weights=weights), Stage(step=36, weights=weights[:1])),
        seq_len=32,
    )
    trained = replace(tiny(steps=40), data=data)
    source = SimpleNamespace(config=lambda: trained, origin=dict, path="runs/x")
    made = convert._uptrained(convert.Uptrain(run="runs/x", made="runs/y", fraction=0.5), source)
    assert (made.steps, [stage.step for stage in made.data.stages]) == (20, [15, 18])
    # After the last step, or both at step 4.
    for fraction, stages in ((0.05, ()), (0.075, ((2, weights),)), (0.125, ((4, weights[:1]),))):
        made = convert._uptrained(convert.Uptrain(run="x", made="y", fraction=fraction), source)
        assert tuple((stage.step, stage.weights) for stage in made.data.stages) == stages


def test_conversions_that_cannot_be_name_both_sides(trained, tmp_path, devices, monkeypatch):
    devices(1)
    monkeypatch.setattr(checkpoint, "load_model", lambda *_: pytest.fail("weights were read"))
    given = trained.config()

    def refusal(**changes) -> str:
        started = FromRun(run=str(trained.path))
        with pytest.raises(ValueError) as refused:
            start.check_start(replace(given, **({"start": started} | changes)))
        assert "\n" not in str(refused.value)
        return str(refused.value)

    assert "model.n_layers = 2, but this run has 3" in refusal(**{"model.n_layers": 3})
    assert "model.mlp.kind = swiglu, but this run has relu2" in refusal(
        **{"model.mlp": SquaredReLU()}
    )
    assert "n_kv_heads = 2: this run's model.n_kv_heads = 4 must divide it" in refusal(
        **{"model.n_kv_heads": 4}
    )
    assert "data.tokenizer = 'byte', but this run has 'bpe:259'" in refusal(
        **{"data.tokenizer": "bpe:259"}
    )
    assert "different maps for keys and values cannot be converted" in refusal(
        **{"model.kv_map": "k=cla:2;v=identity"}
    )
    normed = replace(given, **{"model.qk_norm": True})
    with pytest.raises(ValueError, match=r"models with model\.qk_norm = True cannot be converted"):
        start.check(normed, replace(normed, **{"model.n_kv_heads": 1}), trained)
    assert "start.run is empty" in refusal(start=FromRun())
    missing = FromRun(run=str(tmp_path / "moved"), distill_weight=0.5)
    assert re.search(
        r"start\.run = '.*moved', the teacher of this run: .*does not exist", refusal(start=missing)
    )
    with pytest.raises(ValueError, match=r"layer 1 is a producer in .*identity.*cla:2"):
        start.check(replace(given, **{"model.kv_map": "cla:2"}), given, trained)
    with pytest.raises(SystemExit):
        convert.main(["uptrain", str(trained.path), str(tmp_path / "x"), "--kv-heads", "3"])
    assert not (tmp_path / "x").exists()


def test_another_checkpoint_than_the_one_named_is_refused(trained, devices):
    devices(1)
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    with pytest.raises(
        ValueError, match=r"start.checkpoint = 0+, but the newest weights of .*step 40"
    ):
        uptrain.load(FromRun(run=str(trained.path), checkpoint="0" * 8), AxisRules(), mesh)


def test_a_start_is_known_by_its_weights_however_they_are_stored(trained, tmp_path, devices):
    """Orbax writes other bytes for equal weights. Older configs name the checksum of the files."""
    devices(1)
    model = model_of(trained.path)
    again = runs.Run(epath.Path(tmp_path / "again"))
    shutil.copytree(trained.path, again.path, ignore=shutil.ignore_patterns("checkpoints"))

    def store(weights: Transformer) -> str:
        checkpointer = checkpoint.Checkpointer(again.checkpoints, 1, trained.owner)
        checkpointer.save_model(40, weights)
        checkpointer.close()
        return checkpoint.fingerprint(again, 40)

    def load(known: str) -> Transformer:
        mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
        with jax.set_mesh(mesh):
            return uptrain.load(FromRun(run=str(again.path), checkpoint=known), AxisRules(), mesh)

    weights = checkpoint.weights_fingerprint(model)
    files = store(model)
    assert files != checkpoint.fingerprint(trained, 40)
    for known in (weights, files):
        for name, array in named(load(known)).items():
            np.testing.assert_array_equal(array, named(model)[name])
    shutil.rmtree(again.checkpoints)
    store(jax.tree.map(lambda a: a * 1.001, model))
    with pytest.raises(ValueError, match="that run was trained further, or altered"):
        load(weights)


def test_a_start_is_two_flags():
    flags = ["--start.kind", "run", "--start.run", "runs/x", "--name", "y"]
    (config,) = launch_train.parse(["smoke.tiny", *flags])
    assert config.start == FromRun(run="runs/x")


def test_a_run_from_scratch_has_no_start_in_its_identity(trained):
    assert "start" not in json.loads((trained.path / "config.json").read_text())["identity"]
