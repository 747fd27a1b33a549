import jax
import jax.numpy as jnp
import pytest

from cla_jax.decode import decoding_weights
from cla_jax.mesh import AxisRules
from cla_jax.model import cpu_matmul
from cla_jax.model.layers import Linear
from cla_jax.model.transformer import project
from tests import reference
from tests.conftest import MODEL, equations, replace


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("BTD,DKGH->BTKGH", (3, 5, 32)),
        ("BTD,DCKH->BTCKH", (3, 5, 32)),
        ("BTKGH,KGHD->BTD", (3, 5, 2, 2, 8)),
        ("BTD,DF->BTF", (1, 1, 32)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_a_streamed_map_is_the_linear_map(equation, shape, bias):
    linear = Linear(jax.random.key(0), equation, replace(MODEL, n_kv_heads=2, bias=bias))
    if bias:
        linear.bias[...] = jax.random.normal(jax.random.key(1), linear.bias[...].shape)
    x = jax.random.normal(jax.random.key(2), shape)
    expected = linear(x, AxisRules())
    found = cpu_matmul.CpuLinear.of(linear)(x, AxisRules())
    assert found.shape == expected.shape
    assert jnp.abs(found - expected).max() <= 1e-6 * jnp.abs(expected).max()


@pytest.mark.parametrize(
    ("tokens", "out", "cores", "parts"),
    [(1, 1024, 4, 4), (1, 1022, 4, 2), (1, 1021, 4, 1), (1, 1024, 99, 8), (2, 1024, 4, 1)],
)
def test_a_product_with_one_token_is_dealt_out_to_the_cores(tokens, out, cores, parts, monkeypatch):
    """In equal parts, none too small."""
    monkeypatch.setattr(cpu_matmul.machine, "cores", lambda: cores)
    x = jax.random.normal(jax.random.key(0), (tokens, 512))
    weight = jax.random.normal(jax.random.key(1), (out, 512))  # 2 MiB
    found = cpu_matmul.matmul(x, weight)
    assert jnp.abs(found - x @ weight.T).max() <= 1e-5 * jnp.abs(found).max()
    traced = jax.make_jaxpr(lambda x, weight: cpu_matmul.matmul(x, weight))(x, weight)
    (product,) = [eqn for eqn in equations(traced) if eqn.primitive.name == "dot_general"]
    assert product.outvars[0].aval.shape == (parts, out // parts, tokens)


def test_logits_are_float32_whatever_the_model_computes_in():
    config = replace(MODEL, compute_dtype="bfloat16", vocab_size=2000)
    model = reference.randomised(config)
    weights = decoding_weights(model)
    x = jax.random.normal(jax.random.key(0), (4, 1, 32)).astype("bfloat16")
    found, expected = weights.logits(x, AxisRules()), project(x, weights.head, AxisRules())
    assert found.dtype == jnp.float32
    assert jnp.abs(found - expected).max() <= 1e-5 * jnp.abs(expected).max()


@pytest.mark.parametrize("queries", [1, 4, 60])
def test_scores_are_the_same_whichever_comes_first(queries):
    q = jax.random.normal(jax.random.key(0), (2, 3, queries, 8))
    k = jax.random.normal(jax.random.key(1), (2, 64, 3, 8))
    expected = jnp.einsum("BKNH,BSKH->BKNS", q, k)
    for parts in ([k], [k[..., :5], k[..., 5:]]):
        assert jnp.abs(jax.jit(cpu_matmul.scores)(q, *parts) - expected).max() < 1e-5


def test_each_head_has_a_matrix_of_its_own():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    weight = jax.random.normal(jax.random.key(1), (4, 6, 8))
    found = jax.jit(cpu_matmul.matmul_heads)(x, weight)
    assert jnp.abs(found - jnp.einsum("BTGI,GOI->BTGO", x, weight)).max() < 1e-5


@pytest.mark.parametrize("is_heads", [False, True])
def test_bfloat16_weights_have_no_copy_in_float32(is_heads):
    """XLA would make one for each weight and keep it for the whole loop. One token is the exception."""
    size, tokens = 512, 4
    shapes = ((tokens, size), (size, size))
    if is_heads:
        shapes = ((tokens, 1, 1, size), (1, size, size))
    product = cpu_matmul.matmul_heads if is_heads else cpu_matmul.matmul
    loop = lambda x, weight: jax.lax.fori_loop(0, 3, lambda _, x: product(x, weight), x)
    x, weight = (jnp.ones(shape, "bfloat16") for shape in shapes)
    program = jax.jit(loop).lower(x, weight).compile().as_text()
    assert f"bf16[{size},{size}]" in program
    assert f"f32[{size},{size}]" not in program
