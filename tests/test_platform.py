import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, Mesh

from cla_jax.mesh import AxisRules
from cla_jax.model import platform
from cla_jax.model.layers import Linear
from cla_jax.model.transformer import ForwardOptions, Transformer
from cla_jax.state import named
from tests.conftest import MODEL, replace


def test_the_mesh_says_what_platform_a_program_is_for():
    cpu = Mesh(jax.devices()[:1], "x")
    assert platform.on_cpu()
    with jax.set_mesh(cpu):
        assert platform.on_cpu()
    tpu = jax.sharding.AbstractDevice("TPU v5 lite", None, "tpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=tpu)):
        assert not platform.on_cpu()


def test_rows_of_short_caches_are_read_together(monkeypatch):
    """As many as have the tokens of 16 long ones."""
    rows = lambda tokens: platform.rows_at_once(64, tokens)
    assert [rows(tokens) for tokens in (512, 4096, 256, 128)] == [16, 16, 32, 64]
    assert platform.rows_at_once(3, 128) == 3
    monkeypatch.setattr(platform, "on_cpu", lambda: False)
    assert rows(512) == 64


def test_a_block_of_many_rows_has_fewer_entries(monkeypatch):
    """Its keys take 4 MiB at most in float32, unless there are many queries or very many rows."""
    entries = lambda rows, queries=1, most=512: platform.entries_at_once(most, queries, rows * 64)
    assert [entries(rows) for rows in (8, 32, 33, 128, 1 << 20)] == [512, 512, 256, 128, 32]
    assert entries(8, most=384) == 384
    assert (entries(128, queries=16), entries(128, queries=17)) == (128, 512)
    monkeypatch.setattr(platform, "on_cpu", lambda: False)
    assert entries(128) == 512


def test_elsewhere_than_on_a_cpu_no_activation_is_reshaped(monkeypatch):
    """For a TPU each such reshape may be a copy in memory."""
    linear = Linear(jax.random.key(0), "BTD,DKGH->BTKGH", MODEL)
    x = jnp.ones((2, 3, MODEL.d_model))
    operations = lambda: str(jax.make_jaxpr(lambda x: linear(x, AxisRules()))(x))
    assert "reshape" in operations()
    monkeypatch.setattr(platform, "on_cpu", lambda: False)
    assert "reshape" not in operations()


@pytest.mark.parametrize("bias", [False, True])
def test_all_platforms_compute_the_same(monkeypatch, bias):
    model = Transformer(jax.random.key(0), replace(MODEL, bias=bias))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, MODEL.vocab_size)

    def gradients():
        loss = lambda m: jnp.mean(jax.nn.logsumexp(m.logits(tokens, ForwardOptions()), axis=-1))
        return named(jax.jit(jax.grad(loss))(model))

    expected = gradients()
    monkeypatch.setattr(platform, "on_cpu", lambda: False)
    monkeypatch.setattr(platform, "on_tpu", lambda: True)
    for name, gradient in gradients().items():
        scale = jnp.abs(expected[name]).max()
        assert jnp.abs(gradient - expected[name]).max() <= 2e-6 * scale, name
