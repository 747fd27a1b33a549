import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings

import experiments
from cla_jax import chips, costs
from cla_jax.config import AdamW, ModelConfig, Muon, SquaredReLU, SwiGLU
from cla_jax.model.transformer import ForwardOptions, Transformer
from cla_jax.optimizer import make_optimizer
from cla_jax.state import abstract_state, initial_state
from tests.conftest import MODEL, replace
from tests.test_kv_map import map_pairs


@st.composite
def models(draw):
    k_map, _, text = draw(map_pairs(8))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return ModelConfig(
        vocab_size=11,
        n_layers=len(k_map),
        d_model=draw(st.sampled_from([4, 6])),
        d_ff=draw(st.sampled_from([5, 8])),
        n_heads=kv_heads * draw(st.sampled_from([1, 2, 3])),
        n_kv_heads=kv_heads,
        d_head=draw(st.sampled_from([2, 6])),
        kv_map=text,
        kv_norm=draw(st.sampled_from(["own", "block"])),
        tied_embeddings=draw(st.booleans()),
        bias=draw(st.booleans()),
        mlp=draw(st.sampled_from([SwiGLU(), SquaredReLU()])),
        compute_dtype="float32",
    )


def shapes(model: ModelConfig) -> Transformer:
    return jax.eval_shape(lambda: Transformer(jax.random.key(0), model))


@pytest.mark.slow
@given(models())
@settings(max_examples=60, deadline=None)
def test_parameters_equal_the_live_arrays(model):
    live = shapes(model)
    count = costs.parameters(model)
    assert count.total == sum(leaf.size for leaf in jax.tree.leaves(live))
    assert count.embedding == live.embedding.get_value().size
    assert count.head == (0 if live.head is None else live.head.get_value().size)
    assert count.blocks == sum(leaf.size for leaf in jax.tree.leaves(live.stacks))


def kv_weights(model: ModelConfig) -> list[jax.Array]:
    """The weights of all K/V projections, [groups, D, C, K, H] a stack."""
    projections = [group.projection for group in shapes(model).stacks]
    return [p.kv.weight.get_value() for p in projections if p is not None]


@given(models())
@settings(max_examples=30, deadline=None)
def test_consumers_have_no_kv_parameters(model):
    """One projection for each KV layer, of what it makes; 10 layers under CLA3 have 4."""
    weights = kv_weights(model)
    assert sum(weight.shape[0] for weight in weights) == model.n_kv_layers
    made = sum(weight.shape[0] * weight.shape[2] for weight in weights)
    assert made == model.sharing.count("k") + model.sharing.count("v")


@given(models(), st.sampled_from([1, 2, 4]))
@settings(max_examples=30, deadline=None)
def test_kv_bytes_are_what_the_live_projections_make_of_a_token(model, element):
    made = element * sum(weight.size for weight in kv_weights(model)) // model.d_model
    cost = costs.kv_bytes(model, 64, element)
    assert cost.resident == cost.written == made
    # Each layer reads keys and values of all heads, whoever made them.
    assert cost.read == element * model.n_layers * 2 * model.n_kv_heads * model.d_head


def dot_flops(jaxpr) -> int:
    """FLOPs of all matrix products in a jaxpr without loops."""
    total = 0
    for eqn in jaxpr.eqns:
        for inner in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr") or hasattr(p, "eqns")
        ):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                total += dot_flops(getattr(inner, "jaxpr", inner))
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lhs = eqn.invars[0].aval.shape
            size = 1
            for axis in contracted:
                size *= lhs[axis]
            total += 2 * eqn.outvars[0].aval.size * size
    return total


@pytest.mark.slow
@given(models().filter(lambda model: not model.bias))
@settings(max_examples=15, deadline=None)
def test_flops_equal_those_of_the_traced_forward(model):
    T = 8
    options = ForwardOptions(scan_layers=False)
    forward = jax.make_jaxpr(lambda m, t: m.logits(t, options))(
        shapes(model), jax.ShapeDtypeStruct((1, T), jnp.int32)
    )
    count = costs.parameters(model)
    norms = sum(
        leaf.size
        for path, leaf in jax.tree_util.tree_flatten_with_path(shapes(model))[0]
        if "norm" in jax.tree_util.keystr(path)
    )
    matrices = count.non_embedding - norms + model.vocab_size * model.d_model
    full_attention = 4 * model.n_layers * model.n_heads * model.d_head * T
    assert dot_flops(forward.jaxpr) == T * (2 * matrices + full_attention)
    # The training figure: three times the forward, attention halved, norms counted with N.
    expected = 3 * (2 * (matrices + norms) + full_attention / 2)
    assert costs.train_flops_per_token(model, T) == expected


def test_kv_bytes_divide_what_is_held_and_written_but_not_what_is_read():
    mqa, cla2 = (costs.kv_bytes(replace(MODEL, kv_map=m), 64) for m in ("identity", "cla:2"))
    assert mqa.resident == mqa.written == mqa.read == 2 * 8 * 4 * 2
    assert (cla2.resident, cla2.written, cla2.read) == (
        mqa.resident // 2,
        mqa.written // 2,
        mqa.read,
    )


def test_windows_bound_what_is_held_and_read():
    windowed = replace(MODEL, kv_map="0,0,2,2", windows="16,16,0,0")
    found = costs.kv_bytes(windowed, 64)
    of_token = 2 * 8 * 2
    assert found.resident * 64 == of_token * (16 + 64)
    assert found.written == of_token * 2
    assert found.read * 64 == of_token * 2 * (16 + 64)
    assert costs.kv_bytes(windowed, 10) == costs.kv_bytes(replace(windowed, windows="0"), 10)


def test_flops_count_what_windows_leave_to_see():
    """Exactly: query t of T sees min(t + 1, W) keys, a product of scores and one of values each."""
    T, W = 64, 16
    extra = costs.train_flops_per_token(MODEL, T) - costs.train_flops_per_token(
        replace(MODEL, windows=str(W)), T
    )
    pairs = sum(t + 1 - min(t + 1, W) for t in range(T)) / T
    exact = 3 * 4 * MODEL.n_layers * MODEL.n_heads * MODEL.d_head * pairs
    # Halving for causality is T / 2, not (T + 1) / 2.
    assert extra == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("rule", [AdamW(), Muon()])
def test_training_bytes_equal_the_live_state(tiny, devices, rule):
    from cla_jax.mesh import axis_rules, make_mesh

    config = tiny(**{"optimizer.rule": rule})
    mesh = make_mesh(config.placement.mesh, devices(1))
    optimizer = make_optimizer(config.optimizer, config.steps)
    state = initial_state(
        config, optimizer, abstract_state(config, optimizer, axis_rules(config.model, mesh), mesh)
    )
    predicted = costs.training_bytes(config.model, config.optimizer)
    nbytes = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert nbytes(state.model) == predicted.parameters == predicted.gradients
    scalars = sum(leaf.nbytes for leaf in jax.tree.leaves(state.moments) if leaf.ndim == 0)
    assert nbytes(state.moments) - scalars == predicted.optimizer
    assert predicted.total == nbytes(state) - scalars - state.step.nbytes + predicted.gradients


def test_the_papers_1b_row_without_allocating_it():
    (config,) = experiments.find("cla_1b.h128_mqa_cla2")
    assert costs.kv_bytes(config.model, 2048).resident == 5120
    count = costs.parameters(config.model)
    block = 2 * 2048 * 2048 + 3 * 2048 * 5472 + 2 * 2048
    assert count.non_embedding == 20 * block + 10 * (2048 * 256 + 2048) + 2048 == 845_518_848
    assert count.total == sum(leaf.size for leaf in jax.tree.leaves(shapes(config.model)))
    # The paper's batch and budget: 4,194,304 tokens per step, 30e9 tokens.
    assert config.tokens_per_step == 4_194_304
    assert config.steps * config.tokens_per_step == pytest.approx(30e9, rel=1e-3)


def test_peak_flops_is_known_by_kind_or_not_at_all():
    for kind, flops in (("NVIDIA H200", 989e12), ("TPU v5 lite", 197e12), ("TPU v5p", 459e12)):
        chip = chips.find(kind)
        assert chip is not None
        assert chip.flops == flops
    for other in ("cpu", "NVIDIA GH200 480GB", "NVIDIA A100-SXM4-40GB", "NVIDIA H100 PCIe"):
        assert chips.find(other) is None
