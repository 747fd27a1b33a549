import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax import costs
from cla_jax.config import (
    LinearScaling,
    Llama3Scaling,
    MeshConfig,
    NoScaling,
    SquaredReLU,
    YarnScaling,
)
from cla_jax.mesh import AxisRules, axis_rules, make_mesh
from cla_jax.model.layers import is_param
from cla_jax.model.transformer import ForwardOptions, Transformer, document_starts
from cla_jax.state import layout, named, with_named
from tests import reference
from tests.conftest import MODEL, equations, replace

HEADS = {"mha": (4, 4), "gqa": (4, 2), "mqa": (4, 1)}
# Plain, shared, uneven, one source that is reused twice, one from within a run of equal groups.
MAPS = ["identity", "cla:2", "cla:3", "0,0,2,0,0", "0,1,2,1,2", "keep-ends", "fused-lite"]
MAPS += ["k=cla:2;v=identity", "k=0,1,1,3,0;v=pizza:1"]

T = 9
OPTIONS = ForwardOptions()
TOKENS = jax.random.randint(jax.random.key(1), (2, T), 0, 260)


def model_config(kv_map="cla:2", heads="mqa", n_layers=5, **changes):
    n_heads, n_kv_heads = HEADS[heads]
    heads = {"n_heads": n_heads, "n_kv_heads": n_kv_heads}
    return replace(MODEL, n_layers=n_layers, kv_map=kv_map, **heads, **changes)


make = functools.cache(reference.randomised)


initial = jax.jit(Transformer, static_argnums=1)


@functools.partial(jax.jit, static_argnames="options")
def logits(model, tokens=TOKENS, options=OPTIONS, starts=None):
    return model.logits(tokens, options, starts)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kv_map", ["identity", "cla:2", "0,0,2,0,0"])
def test_causality_by_gradient(kv_map, heads):
    """The logits of a position depend on every earlier input and on no later one."""
    model = make(model_config(kv_map, heads))
    embed = Transformer.embed

    @jax.jit
    @jax.grad
    def gradient_at(delta_BTD, position):
        shifted = lambda self, tokens, rules: embed(self, tokens, rules) + delta_BTD
        with mock.patch.object(Transformer, "embed", shifted):
            return model.logits(TOKENS, OPTIONS)[:, position].sum()

    for position in (0, 4, T - 1):
        gradient = gradient_at(jnp.zeros((2, T, 32)), position)
        reach = jnp.abs(gradient).sum(-1)
        assert (reach[:, : position + 1] > 0).all()
        assert (reach[:, position + 1 :] == 0).all()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kv_map", MAPS)
def test_equals_an_independent_plain_transformer(kv_map, heads):
    config = model_config(kv_map, heads, d_head=6, bias=True, tied_embeddings=heads == "mha")
    model = make(config)
    ours = logits(model)
    theirs = np.stack([reference.logits(model, config, row) for row in np.asarray(TOKENS)])
    bound = 2e-6 if config.sharing.is_split else 1e-6
    assert np.abs(ours - theirs).max() <= bound * np.abs(theirs).max()


# Local and global layers as Character.AI, MixAttention and Gemma mix them.
WINDOWS = [
    ("identity", "4"),
    ("cla:2", "3,3,0,0,0"),
    ("0,0,2,0,0", "0,0,5,0,0"),
    ("identity", "3,0"),
]


@pytest.mark.parametrize(("kv_map", "windows"), WINDOWS)
def test_windows_equal_an_independent_plain_transformer(kv_map, windows):
    short = "last" if kv_map == "cla:2" else ""
    config = model_config(f"{kv_map}:{short}" if short else kv_map, windows=windows)
    model = make(config)
    for scan in (True, False):
        ours = logits(model, options=ForwardOptions(scan_layers=scan))
        theirs = np.stack([reference.logits(model, config, row) for row in np.asarray(TOKENS)])
        assert np.abs(ours - theirs).max() <= 1e-6 * np.abs(theirs).max()
    assert np.abs(ours - logits(make(model_config(config.kv_map)))).max() > 1e-3


@pytest.mark.parametrize(
    "scaling",
    [
        LinearScaling(factor=2.0),
        Llama3Scaling(original_max_position_embeddings=16),
        YarnScaling(
            factor=4.0, beta_fast=4.0, original_max_position_embeddings=16, attention_factor=1.2
        ),
        YarnScaling(factor=4.0, beta_fast=4.0, original_max_position_embeddings=16),
    ],
    ids=["linear", "llama3", "yarn", "yarn-attention"],
)
def test_rope_scaling_equals_an_independent_plain_transformer(scaling):
    """Every pair kept, slowed and between is among the eight of a head."""
    config = model_config("cla:2", rope_scaling=scaling, rope_theta=50.0, d_head=16)
    model = make(config)
    theirs = np.stack([reference.logits(model, config, row) for row in np.asarray(TOKENS)])
    assert np.abs(logits(model) - theirs).max() <= 1e-6 * np.abs(theirs).max()
    assert np.abs(theirs - logits(make(replace(config, rope_scaling=NoScaling())))).max() > 1e-3


@pytest.mark.parametrize("bias", [False, True])
def test_a_squared_relu_equals_an_independent_plain_transformer(bias):
    config = model_config("cla:2", mlp=SquaredReLU(), bias=bias)
    model = make(config)
    theirs = np.stack([reference.logits(model, config, row) for row in np.asarray(TOKENS)])
    assert np.abs(logits(model) - theirs).max() <= 1e-6 * np.abs(theirs).max()
    assert not [name for name in named(model) if "gate" in name]


@pytest.mark.parametrize("kv_map", ["identity", "k=cla:2;v=pizza:3"])
def test_norms_of_queries_and_keys_equal_an_independent_plain_transformer(kv_map):
    config = model_config(kv_map, heads="gqa", qk_norm=True)
    model = make(config)
    theirs = np.stack([reference.logits(model, config, row) for row in np.asarray(TOKENS)])
    assert np.abs(logits(model) - theirs).max() <= 2e-6 * np.abs(theirs).max()
    arrays = named(model)
    assert sum(a.size for a in arrays.values()) == costs.parameters(config).total
    scales = [arrays[name].size for name in arrays if "k_norm" in name]
    assert (
        sum(scales) == config.sharing.count("k") * config.d_head
    )  # shared: of the layers that make keys


def test_a_pattern_of_windows_does_not_break_a_stack():
    config = replace(MODEL, kv_map="identity", n_layers=12, windows="3,3,3,3,3,0")
    assert len(make(config).stacks) == 1


@pytest.mark.parametrize("kv_map", ["identity", "cla:3"])
def test_block_norm_is_a_llama_and_has_no_norm_of_its_own(kv_map):
    """Shared, it is the norm of the group's first block."""
    config = model_config(kv_map, kv_norm="block")
    model = make(config)
    assert not any("projection.norm" in name for name in named(model))
    theirs = reference.logits(model, config, np.asarray(TOKENS[0]))
    assert np.abs(logits(model)[0] - theirs).max() <= 1e-6 * np.abs(theirs).max()


def loss_and_gradients(model, options):
    loss = lambda m: jnp.mean(jax.nn.logsumexp(m.logits(TOKENS, options), axis=-1))
    value, gradients = jax.jit(jax.value_and_grad(loss))(model)
    return value, named(gradients)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kv_map", "scanned", "unrolled"),  # each remat in both, with shared keys and values
    [
        ("0,1,2", "block", "dots"),
        ("0,0,2,2", "dots", "block"),
        ("0,0,0,0,0", "none", "dots"),  # more blocks than are unrolled
        ("0,0,2,0", "block", "none"),
        ("0,1,0,1", "dots", "attention"),
    ],
)
def test_scan_and_remat_change_nothing(kv_map, scanned, unrolled):
    model = make(model_config(kv_map, n_layers=kv_map.count(",") + 1))
    expected = loss_and_gradients(model, ForwardOptions(scan_layers=False, remat="none"))
    for scan, remat in [(True, scanned), (False, unrolled)]:
        value, gradients = loss_and_gradients(model, ForwardOptions(scan_layers=scan, remat=remat))
        np.testing.assert_allclose(value, expected[0], rtol=1e-6)
        for name, gradient in gradients.items():
            scale = jnp.abs(expected[1][name]).max()
            # 1e-6 relative to the largest entry, and a few roundings of single sums.
            assert jnp.abs(gradient - expected[1][name]).max() <= 2e-6 * scale, (name, scan, remat)


@pytest.mark.slow
@pytest.mark.parametrize("kv_map", ["0,0,2,2,4", "0,1,0,1"])
def test_what_accelerators_compute_again_changes_nothing(kv_map, monkeypatch):
    """Under a scan they keep the results of products and kernels only, a CPU keeps everything."""
    model = make(model_config(kv_map, n_layers=kv_map.count(",") + 1))
    expected, gradients = loss_and_gradients(model, ForwardOptions(scan_layers=False))
    for module in ("transformer", "platform"):
        monkeypatch.setattr(f"cla_jax.model.{module}.on_cpu", lambda: False)
    program = jax.make_jaxpr(jax.grad(lambda m: m.logits(TOKENS, ForwardOptions()).sum()))(model)
    assert "policy" in str(program)
    value, found = loss_and_gradients(model, ForwardOptions())
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for name, gradient in found.items():
        scale = jnp.abs(gradients[name]).max()
        assert jnp.abs(gradient - gradients[name]).max() <= 2e-6 * scale, name


@pytest.mark.parametrize("remat", ["none", "block", "attention", "dots"])
def test_a_scan_saves_no_weight_for_the_backward_pass(remat, monkeypatch):
    """It has them as its input."""
    for module in ("transformer", "platform"):
        monkeypatch.setattr(f"cla_jax.model.{module}.on_cpu", lambda: False)
    model = make(model_config("0,0,2,2", n_layers=4))
    loss = lambda m: m.logits(TOKENS, ForwardOptions(remat=remat)).sum()
    equations = jax.make_jaxpr(jax.grad(loss))(model).jaxpr.eqns
    forward = next(e for e in equations if e.primitive.name == "scan")
    saved = {v.aval.shape for v in forward.outvars}
    (stack,) = model.stacks  # [groups, blocks, ...]; a block of each group is [groups, ...]
    weights = {leaf.shape[:1] + leaf.shape[2:] for leaf in jax.tree.leaves(stack.blocks)}
    assert (2, *TOKENS.shape, 32) in saved  # the residual stream
    assert not saved & weights


def test_scan_and_remat_are_really_different_programs():
    """What the test above compares; otherwise it could not fail."""
    model = make(model_config())

    def program(options):
        gradient = jax.grad(lambda m: m.logits(TOKENS, options).sum())
        return str(jax.make_jaxpr(gradient)(model))

    count = lambda options, word: program(options).count(word)
    unrolled = count(ForwardOptions(scan_layers=False), "scan[")
    assert unrolled == 1  # Rope's cosines and sines
    assert count(ForwardOptions(scan_layers=True), "scan[") > unrolled
    assert "remat" not in program(ForwardOptions(remat="none"))
    assert count(ForwardOptions(remat="block"), "remat") > 0
    assert program(ForwardOptions(remat="block")) != program(ForwardOptions(remat="dots"))


@pytest.mark.parametrize("scan", [True, False])
def test_remat_keeps_less_for_the_backward_pass(scan):
    """A recomputation that keeps everything would change no number, and save nothing."""
    model = make(model_config())

    def kept(remat):
        options = ForwardOptions(scan_layers=scan, remat=remat)
        backward = lambda m: jax.vjp(lambda m: m.logits(TOKENS, options).sum(), m)[1]
        return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(backward, model)))

    assert kept("block") < kept("attention") < kept("dots") < kept("none")


def test_products_are_of_bfloat16_and_reductions_of_float32():
    model = make(replace(MODEL, compute_dtype="bfloat16"))
    program = jax.make_jaxpr(lambda m: m.logits(TOKENS, OPTIONS))(model).jaxpr
    products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    for eqn in products:
        assert {operand.aval.dtype for operand in eqn.invars} == {jnp.dtype("bfloat16")}, eqn
    # Scores, weighted values and logits are accumulated and kept in float32.
    assert sum(eqn.outvars[0].aval.dtype == jnp.float32 for eqn in products) == 3
    reductions = ("exp", "rsqrt", "reduce_sum", "reduce_max", "cos", "sin")
    for eqn in equations(program):
        if eqn.primitive.name in reductions:
            assert eqn.outvars[0].aval.dtype == jnp.float32, eqn


@pytest.mark.parametrize("kv_map", MAPS)
def test_gradients_flow_through_shared_keys_and_values(kv_map):
    """Only producers have a projection, each gets a gradient, and together they are right."""
    config = model_config(kv_map)
    model = make(config)
    loss = jax.jit(jax.value_and_grad(lambda m: (m.logits(TOKENS, OPTIONS) ** 2).mean()))
    _, gradients = loss(model)
    for stack, group in zip(config.sharing.stacks, gradients.stacks, strict=True):
        if stack.projects:
            weight = group.projection.kv.weight[...]
            assert (jnp.abs(weight).sum(axis=(1, 2, 3, 4)) > 0).all()
        else:
            assert group.projection is None
    # A finite difference along a random direction, through every projection at once.
    draw = np.random.default_rng(0)
    direction = {name: draw.normal(size=g.shape) for name, g in named(gradients).items()}
    moved = lambda eps: with_named(
        model, {name: p + eps * direction[name] for name, p in named(model).items()}
    )
    slope = sum(float((g * direction[name]).sum()) for name, g in named(gradients).items())
    measured = float(loss(moved(1e-3))[0] - loss(moved(-1e-3))[0]) / 2e-3
    assert measured == pytest.approx(slope, rel=2e-2)


def test_a_layer_starts_from_the_same_weights_under_every_map():
    a, b = (
        reference.layer_parameters(initial(jax.random.key(0), model_config(m)))
        for m in ("identity", "cla:2")
    )
    for layer_a, layer_b in zip(a, b, strict=True):
        for name in layer_b:
            np.testing.assert_array_equal(layer_a[name], layer_b[name])


def test_initial_weights_have_the_papers_deviation():
    model = initial(jax.random.key(0), replace(MODEL, d_model=256, init_std=0.01275))
    weights = [p[...] for p in jax.tree.leaves(model, is_leaf=is_param) if len(p.axes) > 1]
    for weight in weights:
        assert float(weight.std()) == pytest.approx(0.01275, rel=0.05)
        # ... of a normal distribution: 4.6 % lie beyond twice that.
        assert float((abs(weight) > 2 * 0.01275).mean()) == pytest.approx(0.0455, rel=0.2)
    assert len(weights) == 1 + 1 + 5  # embedding; one stack: kv, query, output, gate, up, down
    norms = [p[...] for p in jax.tree.leaves(model, is_leaf=is_param) if len(p.axes) == 1]
    assert all((norm == 1).all() for norm in norms)


def test_no_two_weights_start_from_the_same_numbers():
    config = replace(MODEL, d_model=64, n_heads=8, d_head=16, kv_map="cla:3", tied_embeddings=False)
    weights = {
        f"{i}.{name}": array.ravel()
        for i, layer in enumerate(reference.layer_parameters(initial(jax.random.key(0), config)))
        for name, array in layer.items()
        if "norm" not in name
    }
    model = initial(jax.random.key(0), config)
    weights |= {"embedding": model.embedding[...].ravel(), "head": model.head[...].ravel()}
    for (a, x), (b, y) in itertools.combinations(weights.items(), 2):
        n = min(len(x), len(y))
        assert abs(np.corrcoef(x[:n], y[:n])[0, 1]) < 0.2, (a, b)


def test_documents_can_be_kept_apart():
    """With starts, a window of two documents scores like each document alone."""
    config = model_config()
    model = make(config)
    end, first, second = 7, [7, 20, 21, 22], [7, 30, 31, 32, 33]
    both = jnp.array([first + second])
    starts = document_starts(both, end)
    assert starts.tolist() == [[0, 0, 0, 0, 4, 4, 4, 4, 4]]
    apart = logits(model, both, starts=starts)[0]
    # Rotary positions are relative: the second document alone stands elsewhere, and scores alike.
    for document, window in ((first, apart[:4]), (second, apart[4:])):
        alone = logits(model, jnp.array([document]))[0]
        assert jnp.abs(alone - window).max() <= 1e-5 * jnp.abs(alone).max()
    across = logits(model, both)[0]
    assert jnp.abs(across[4:] - apart[4:]).max() > 1e-2


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2)])
def test_layouts_are_declared_and_change_no_logits(shape, heads):
    config = model_config("0,0,2,0,0", heads, d_model=32, d_ff=48)
    data, fsdp, tensor = shape
    mesh = make_mesh(
        MeshConfig(data=data, fsdp=fsdp, model=tensor), jax.devices()[: data * fsdp * tensor]
    )
    rules = axis_rules(config, mesh)
    model = make(config)
    tokens = jnp.tile(TOKENS, (4, 1))
    expected = logits(model, tokens)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, layout(model, rules, mesh))
        placed = jax.device_put(tokens, rules.spec("batch", None))
        scores = logits(sharded, placed, options=ForwardOptions(rules=rules))
    # The one KV head of MQA cannot be split: its query heads are.
    split = (None, "model") if heads == "mqa" and tensor > 1 else ("model", None)
    declared = {
        "embedding": ("model", "fsdp"),
        "projection.kv.weight": ("fsdp", None, split[0], None),
        "query.weight": ("fsdp", *split, None),
        "output.weight": (*split, None, "fsdp"),
        "gate.weight": ("fsdp", "model"),
        "up.weight": ("fsdp", "model"),
        "down.weight": ("model", "fsdp"),
        "scale": (None,),
    }
    for name, leaf in named(sharded).items():
        (spec,) = (spec for ending, spec in declared.items() if name.endswith(ending))
        stack = (None,) * (leaf.ndim - len(spec))
        assert tuple(jax.typeof(leaf).sharding.spec) == stack + spec, name
    assert tuple(jax.typeof(scores).sharding.spec) == (("slice", "data", "fsdp"), None, "model")
    assert jnp.abs(jax.device_get(scores) - expected).max() <= 1e-5 * jnp.abs(expected).max()


def test_rules_refuse_two_axes_on_one_mesh_axis():
    rules = AxisRules(kv_heads="model", q_groups="model")
    with pytest.raises(ValueError, match=r"kv_heads and q_groups.*'model'"):
        rules.partition("embed", "kv_heads", "q_groups", "head")
