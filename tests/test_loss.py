import jax
import jax.numpy as jnp
import pytest

from cla_jax.loss import cross_entropy
from cla_jax.mesh import AxisRules
from tests.conftest import equations

B, T, D, V = 4, 64, 16, 512
KEYS = jax.random.split(jax.random.key(0), 3)
X = jax.random.normal(KEYS[0], (B, T, D))
HEAD = jax.random.normal(KEYS[1], (V, D))
TARGETS = jax.random.randint(KEYS[2], (B, T), 0, V)
WEIGHTS = jnp.ones((B, T)).at[1, 3:].set(0)


def naive(x, head):
    log_p = jax.nn.log_softmax(x @ head.T)
    return -jnp.sum(WEIGHTS * jnp.take_along_axis(log_p, TARGETS[..., None], -1)[..., 0])


def chunked(x, head, chunk=8):
    return cross_entropy(x, head, TARGETS, WEIGHTS, chunk, AxisRules())


@pytest.mark.parametrize("chunk", [1, 8, T])
def test_equals_the_naive_loss_and_gradients(chunk):
    # Scaled, so that a backward pass that forgets the cotangent is noticed.
    f = lambda g: jax.jit(jax.value_and_grad(lambda x, w: 3.0 * g(x, w), argnums=(0, 1)))
    loss, gradients = f(lambda x, w: chunked(x, w, chunk))(X, HEAD)
    expected, expected_gradients = f(naive)(X, HEAD)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert 3 * chunked(X, HEAD, chunk) == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert jnp.abs(ours - theirs).max() <= 1e-5 * jnp.abs(theirs).max()


def test_left_out_tokens_have_no_gradient():
    d_x = jax.grad(chunked)(X, HEAD)
    assert (d_x[1, 3:] == 0).all()
    assert (jnp.abs(d_x).sum(-1)[0] > 0).all()


def test_the_logits_of_the_whole_batch_never_exist():
    """Compiled temporaries: far less than B * T * V floats, which the naive loss needs several times."""

    def temporaries(f):
        compiled = jax.jit(jax.grad(f, argnums=(0, 1))).lower(X, HEAD).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * B * T * V
    assert temporaries(naive) > logits
    assert temporaries(chunked) < logits / 2


def test_bfloat16_states_keep_a_float32_loss_and_head_gradient():
    x = X.astype(jnp.bfloat16)
    loss, (d_x, d_head) = jax.value_and_grad(chunked, argnums=(0, 1))(x, HEAD)
    assert (loss.dtype, d_x.dtype, d_head.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    assert loss == pytest.approx(float(naive(x.astype(jnp.float32), HEAD)), rel=1e-2)
    program = jax.make_jaxpr(jax.grad(chunked, argnums=(0, 1)))(x, HEAD).jaxpr
    products = [eqn for eqn in equations(program) if eqn.primitive.name == "dot_general"]
    for eqn in products:
        assert {operand.aval.dtype for operand in eqn.invars} == {jnp.dtype("bfloat16")}, eqn
    # Logits, the gradient of the states, and that of the head, which is summed over the chunks.
    kept = [eqn.outvars[0].aval.dtype.name for eqn in products]
    assert kept == ["float32", "bfloat16", "float32"]


def test_both_gradients_are_scaled_by_the_same_cotangent():
    """1 / tokens has no exact bfloat16: rounding it for one gradient only would bias the trunk."""
    x = X.astype(jnp.bfloat16)
    plain = jax.grad(chunked, argnums=(0, 1))(x, HEAD)
    scaled = jax.grad(lambda x, w: chunked(x, w) / 1200, argnums=(0, 1))(x, HEAD)
    ratios = [
        float(jnp.sum(s.astype(jnp.float32) * p) / jnp.sum(p.astype(jnp.float32) ** 2)) * 1200
        for s, p in zip(scaled, plain, strict=True)
    ]
    assert ratios == pytest.approx([1, 1], rel=5e-4)
