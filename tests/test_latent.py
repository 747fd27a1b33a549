"""Latent keys and values: absorbed is expanded, cached is uncached, and every byte is counted."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax import costs
from cla_jax import mesh as meshes
from cla_jax.cache import cache_spec, ledger
from cla_jax.config import (
    HeadsKV,
    LatentKV,
    LinearScaling,
    MeshConfig,
    ModelConfig,
    Muon,
    OptimizerConfig,
)
from cla_jax.config.record import from_record, to_record
from cla_jax.decode import decode, decoding_weights, prefill
from cla_jax.interop import deepseek
from cla_jax.memory import workspace_bytes
from cla_jax.mesh import AxisRules
from cla_jax.model.attention import KV, causal_attention, choose_backend
from cla_jax.model.latent import LatentHeads
from cla_jax.model.layers import Rope
from cla_jax.model.transformer import ForwardOptions, Transformer
from cla_jax.optimizer import make_optimizer
from cla_jax.state import layout, named
from cla_jax.step import loss_sum
from tests import reference
from tests.conftest import MODEL, equations, replace

RANK, TURNED, HEADS, H = 12, 4, 4, 8
LATENT = replace(MODEL, kv=LatentKV(rank=RANK, rope_dims=TURNED), n_layers=4)
MAPS = ("identity", "cla:2", "0,0,2,0")
B, T = 2, 21


def random_model(config: ModelConfig, seed: int = 0) -> Transformer:
    """Every parameter random, norms too."""
    return jax.tree.map(jnp.asarray, reference.randomised(config, seed))


def some_tokens(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (B, T))


def test_the_layer_is_that_of_the_paper():
    """One layer, written out head by head in numpy, float64 (2405.04434, equations 9 to 19)."""
    config = dataclasses.replace(LATENT, n_layers=1, kv_map="identity", norm_eps=1e-6)
    model = random_model(config)
    w = {name: np.asarray(a, np.float64) for name, a in named(model).items()}
    tokens = some_tokens()

    def norm(x, scale):
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def turn(x):  # [B, T, 2 * pairs]
        half = TURNED // 2
        angles = np.arange(T)[:, None] * 10_000.0 ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
        return np.concatenate([z.real, z.imag], -1)

    block, kv = "stacks.0.blocks.", "stacks.0.projection."
    of = lambda name: w[block + name][0, 0]
    x = w["embedding"][tokens]
    kept = norm(x, w[kv + "norm.scale"][0]) @ w[kv + "down.weight"][0]
    latent, turned = norm(kept[..., :RANK], w[kv + "latent_norm.scale"][0]), turn(kept[..., RANK:])
    q = np.einsum("btd,dkgw->btgw", norm(x, of("attention_norm.scale")), of("query.weight"))
    out = np.zeros_like(x)
    for head in range(HEADS):
        keys = np.concatenate([latent @ of("heads.keys")[:, head], turned], -1)
        query = np.concatenate([q[:, :, head, :H], turn(q[:, :, head, H:])], -1)
        scores = query @ keys.transpose(0, 2, 1) / math.sqrt(H + TURNED)
        scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        values = latent @ of("heads.values")[:, head]
        out += (p / p.sum(-1, keepdims=True)) @ values @ of("output.weight")[0, head]
    x = x + out
    h = norm(x, of("mlp_norm.scale"))
    gate = h @ of("mlp.gate.weight")
    x = x + (gate / (1 + np.exp(-gate)) * (h @ of("mlp.up.weight"))) @ of("mlp.down.weight")
    expected = norm(x, w["norm.scale"]) @ w["embedding"].T
    found = model.logits(tokens, ForwardOptions())
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


NO_NORM = LatentKV(rank=RANK, rope_dims=TURNED, norm=False)


@pytest.fixture(scope="module", params=[*MAPS, "no norm"])
def of_map(request):
    """A model of each map, and its scores by full forward."""
    changes = {"kv": NO_NORM} if request.param == "no norm" else {"kv_map": request.param}
    config = replace(LATENT, **changes)
    model = random_model(config)
    return config, model, np.asarray(model.logits(some_tokens(), ForwardOptions()))


def test_absorbed_is_expanded():
    heads = LatentHeads(jax.random.key(0), LATENT)
    draw = lambda seed, *shape: jax.random.normal(jax.random.key(seed), (B, T, *shape))
    q_BTKGW, kv = draw(1, 1, HEADS, H + TURNED), KV(draw(2, 1, TURNED), draw(3, 1, RANK))
    rope = Rope.at(jnp.arange(T)[None], LATENT)

    def attend_to_latent(q_BTKGW, kv):  # a key is the latent and the rotated key
        keys = jnp.concatenate([kv.v_BSKH, kv.k_BSKH], axis=-1)
        return causal_attention(q_BTKGW, KV(keys, kv.v_BSKH))

    expected = heads(q_BTKGW, kv, rope, causal_attention, AxisRules())
    found = heads.absorbed()(q_BTKGW, kv, rope, attend_to_latent, AxisRules())
    assert found.shape == expected.shape == (B, T, 1, HEADS, H)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("chunk", [1, 7])
def test_cached_is_uncached(of_map, chunk):
    config, model, expected = of_map
    spec = cache_spec(config, batch=B, capacity=32, chunk=chunk)
    weights, cache = decoding_weights(model), spec.allocate()
    step = jax.jit(lambda cache, tokens: decode(weights, spec, cache, tokens, jnp.full(B, chunk)))
    for first in range(0, T, chunk):
        x_BTD, cache = step(cache, some_tokens()[:, first : first + chunk])
        found = weights.logits(x_BTD, spec.rules)
        np.testing.assert_allclose(
            found, expected[:, first : first + chunk], atol=1e-5 * np.abs(expected).max()
        )


@pytest.mark.parametrize("format", ["bfloat16", "int8"])
def test_every_byte_is_counted_twice(format):
    config = dataclasses.replace(LATENT, n_layers=3, kv_map="0,1,0")
    spec = cache_spec(config, format, batch=B, capacity=32)
    weights = decoding_weights(random_model(config))
    _, cache = prefill(weights, spec, spec.allocate(), some_tokens().tolist())
    step = lambda spec, cache: decode(
        weights, spec, cache, jnp.zeros((B, 1), jnp.int32), jnp.ones(B, jnp.int32)
    )
    assert ledger.counted(spec, cache, step) == ledger.predicted(spec, T)
    if format == "bfloat16":  # two producers keep the latent and the rotated key, and no head
        assert ledger.predicted(spec, T).resident == T * 2 * (RANK + TURNED) * 2
        assert costs.kv_bytes(config, T).resident == 2 * (RANK + TURNED) * 2


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kv_map", MAPS)
def test_parameters_and_flops_have_closed_forms(kv_map, norm):
    config = replace(LATENT, kv_map=kv_map, kv=dataclasses.replace(LATENT.kv, norm=norm))
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(model))
    assert costs.parameters(config).total == count
    # The tied table counts once, as the head; queries and keys are wider than values.
    attention = 3 * config.n_layers * HEADS * (H + TURNED + H) * 64
    assert costs.train_flops_per_token(config, 64) == 6 * count + attention


@pytest.mark.parametrize("kv", [LATENT.kv, NO_NORM])
def test_muon_has_one_moment_for_what_meets_the_residual_stream(kv):
    rule, config = OptimizerConfig(rule=Muon()), replace(LATENT, kv=kv)
    moments = jax.eval_shape(
        lambda: make_optimizer(rule, 4).init(Transformer(jax.random.key(0), config))
    )
    held = sum(math.prod(a.shape) * 4 for a in jax.tree.leaves(moments) if a.dtype == jnp.float32)
    assert costs.training_bytes(config, rule).optimizer == held


def test_a_decode_step_makes_nothing_of_each_head_for_each_token():
    """No array of the program has both the entries of the cache and the heads with a width."""
    config = replace(LATENT, kv_map="cla:2")
    entries = 96  # unlike every other size
    spec = cache_spec(config, batch=B, capacity=entries)
    weights = jax.eval_shape(lambda: decoding_weights(random_model(config)))
    program = jax.make_jaxpr(lambda w, cache, *new: decode(w, spec, cache, *new))
    jaxpr = program(
        weights,
        jax.eval_shape(spec.allocate),
        jax.ShapeDtypeStruct((B, 1), jnp.int32),
        jax.ShapeDtypeStruct((B,), jnp.int32),
    )
    made = [v.aval.shape for eqn in equations(jaxpr.jaxpr) for v in eqn.outvars]
    of_entries = [shape for shape in made if spec.entries(0) in shape]
    assert of_entries
    # Scores have an entry and a head, and nothing else; what is read has no head.
    most = B * spec.entries(0) * max(HEADS, RANK + TURNED)
    assert max(math.prod(shape) for shape in of_entries) <= most


def test_layers_that_share_a_latent_have_matrices_of_their_own():
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), replace(LATENT, kv_map="cla:2")))
    shapes = {name: leaf.shape for name, leaf in named(model).items()}
    assert shapes["stacks.0.projection.down.weight"] == (2, 32, RANK + TURNED)
    assert shapes["stacks.0.blocks.heads.keys"] == (2, 2, RANK, HEADS, H)


def test_a_window_hides_the_same_tokens_in_a_ring():
    config = dataclasses.replace(LATENT, windows="5", n_layers=2)
    model = random_model(config)
    expected = np.asarray(model.logits(some_tokens(), ForwardOptions()))
    spec = cache_spec(config, batch=B, capacity=64, chunk=3)
    assert spec.is_ring(0)
    weights, cache = decoding_weights(model), spec.allocate()
    step = jax.jit(lambda cache, tokens: decode(weights, spec, cache, tokens, jnp.full(B, 3)))
    for first in range(0, T, 3):
        x_BTD, cache = step(cache, some_tokens()[:, first : first + 3])
        found = weights.logits(x_BTD, spec.rules)
        np.testing.assert_allclose(
            found, expected[:, first : first + 3], atol=1e-5 * np.abs(expected).max()
        )


def summed_loss(model: Transformer, tokens, options: ForwardOptions) -> jax.Array:
    weights = jnp.ones((B, T - 1), out_sharding=options.rules.spec("batch", None))
    return loss_sum(model, tokens, weights, options=options, end=None, loss_chunk=T - 1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1), (2, 2)])
def test_on_a_mesh_heads_are_split_and_scores_and_gradients_are_the_same(sizes):
    config = dataclasses.replace(LATENT, n_layers=2, vocab_size=264)
    model = random_model(config)
    gradient = jax.jit(jax.grad(summed_loss), static_argnums=2)
    expected = named(gradient(model, jnp.asarray(some_tokens()), ForwardOptions()))
    scores = np.asarray(model.logits(some_tokens(), ForwardOptions()))
    fsdp, tensor = sizes
    devices = jax.devices()[: fsdp * tensor]
    mesh = meshes.make_mesh(MeshConfig(fsdp=fsdp, model=tensor), devices)
    rules = meshes.axis_rules(config, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(model, layout(model, rules, mesh))
        keys = placed.stacks[0].blocks.heads.keys[...]
        assert keys.sharding.shard_shape(keys.shape)[-2] == HEADS // tensor
        tokens = jax.device_put(some_tokens(), rules.spec("batch", None))
        for name, found in named(gradient(placed, tokens, ForwardOptions(rules=rules))).items():
            bound = 1e-4 * np.abs(expected[name]).max()
            np.testing.assert_allclose(found, expected[name], atol=bound, err_msg=name)
        spec = cache_spec(config, batch=B, capacity=32, chunk=T, rules=rules)
        weights = decoding_weights(placed, rules)
        x_BTD, _ = jax.jit(lambda c, t, n: decode(weights, spec, c, t, n))(
            spec.allocate(), tokens, jax.device_put(np.full(B, T), rules.spec("batch"))
        )
        found = weights.logits(x_BTD, rules)
        np.testing.assert_allclose(found, scores, atol=1e-5 * np.abs(scores).max())


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"kv\.rank = 40 must be at most model\.d_model = 32"):
        replace(LATENT, kv=LatentKV(rank=40))
    with pytest.raises(ValueError, match="n_kv_heads = 2 must be 1"):
        replace(LATENT, n_kv_heads=2)
    with pytest.raises(ValueError, match="rope_dims = 5 must be even"):
        LatentKV(rope_dims=5)
    with pytest.raises(ValueError, match=r"model\.bias must be False"):
        replace(LATENT, bias=True)
    with pytest.raises(ValueError, match="'kivi4' does not support latents"):
        cache_spec(LATENT, "kivi4", batch=1, capacity=64)
    for platform, kernel in (("gpu", "cudnn"), ("tpu", "splash")):
        device = type("Device", (), {"platform": platform, "compute_capability": "9.0"})
        with pytest.raises(ValueError, match=r"does not support model\.kv\.kind = latent"):
            choose_backend(kernel, replace(LATENT, compute_dtype="bfloat16"), 128, device)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kv_map", "cla:2"),
        ("windows", "5"),
        ("kv_norm", "own"),
        ("norm_eps", 1e-5),
        ("rope_scaling", LinearScaling()),
        ("kv", NO_NORM),
    ],
)
def test_an_export_refuses_what_a_deepseek_checkpoint_cannot_say(field, value):
    sayable = replace(LATENT, kv_map="identity", kv_norm="block", norm_eps=1e-6)
    assert deepseek.hf_config({}, sayable)["kv_lora_rank"] == RANK
    with pytest.raises(ValueError, match=rf"^model\.{field}.*: a DeepSeek-V2 checkpoint only"):
        deepseek.hf_config({}, replace(sayable, **{field: value}))


def test_records_from_before_there_were_latents_are_read(tiny):
    config = tiny()
    record = to_record(config)
    assert "kv" not in record["identity"]["model"]
    assert from_record(record).model.kv == HeadsKV()
    latent = dataclasses.replace(config, model=LATENT)
    assert from_record(to_record(latent)) == latent
    # Nor has one with a norm, which all had at first, changed its identity.
    assert "norm" not in to_record(latent)["identity"]["model"]["kv"]
    without = dataclasses.replace(config, model=replace(LATENT, kv=NO_NORM))
    assert from_record(to_record(without)) == without


def test_the_workspace_of_a_step_is_that_of_what_attention_reads():
    wide = replace(LATENT, kv=LatentKV(rank=32, rope_dims=TURNED))
    a, b = (
        workspace_bytes(cache_spec(config, batch=1, capacity=32), 1) for config in (LATENT, wide)
    )
    assert b > a
