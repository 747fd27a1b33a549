"""The TPU kernel in jax's interpreter, beside the XLA backend; compiled for TPUs in test_plan."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.model import splash, transformer
from cla_jax.model.attention import KV, causal_attention, choose_backend
from cla_jax.model.transformer import ForwardOptions
from tests.conftest import MODEL, replace

TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


@pytest.mark.parametrize(
    ("K", "G", "H", "documents"), [(1, 3, 46, False), (2, 2, 64, True), (2, 1, 90, True)]
)
def test_splash_is_attention_forward_and_backward(K, G, H, documents):
    """At head sizes that are padded and not; for MQA, GQA and MHA; across documents and within."""
    B, T = 2, 128
    keys = jax.random.split(jax.random.key(H), 4)
    q, o = (jax.random.normal(key, (B, T, K, G, H)) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H)) for key in keys[2:])
    starts = None
    if documents:
        ends = jnp.array([[0, 5, 90], [0, 1, 127]])
        starts = jnp.max(jnp.where(ends[:, None] <= jnp.arange(T)[:, None], ends[:, None], 0), -1)

    def value_and_gradients(function):
        value, pullback = jax.vjp(function, q, k, v)
        return value, *pullback(o)

    expected = value_and_gradients(lambda q, k, v: causal_attention(q, KV(k, v), starts_BT=starts))
    got = value_and_gradients(lambda q, k, v: splash.attend(q, k, v, starts, interpret=True))
    for name, a, b in zip(("output", "dq", "dk", "dv"), expected, got, strict=True):
        np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5 * jnp.abs(a).max(), err_msg=name)


def test_what_the_kernel_returns_can_be_kept_for_the_backward_pass():
    """Its output and the logarithms of its sums are all that its backward kernels need of it."""
    q = jnp.ones((1, 128, 1, 2, 64))
    kv = jnp.ones((1, 128, 1, 64))

    def kept(remat):
        attention = lambda q: splash.attend(q, kv, kv, None, interpret=True)
        body = transformer.remat(attention, ForwardOptions(remat=remat), False)
        backward = jax.eval_shape(lambda q: jax.vjp(body, q)[1], q)
        return {leaf.shape for leaf in jax.tree.leaves(backward)}

    output, sums = (1, 1, 2, 128, 64), (1, 1, 2, 128)
    assert {output, sums} <= kept("attention")
    assert not {output, sums} & kept("block")


def test_on_a_tpu_splash_is_taken_where_it_serves(caplog):
    model = replace(MODEL, d_head=46)
    assert choose_backend("auto", model, 2048, TPU) == "splash"
    assert choose_backend("xla", model, 2048, TPU) == "xla"
    assert (
        "SLOW ATTENTION: placement.attention = 'xla', although splash is available" in caplog.text
    )
    for changes, seq_len, words in (
        ({}, 100, "multiple of 128"),
        ({}, 640, "multiple of 128, and of 512"),
        ({"windows": "64"}, 2048, "model.windows"),
    ):
        assert choose_backend("auto", replace(model, **changes), seq_len, TPU) == "xla"
        with pytest.raises(ValueError, match=f"'splash' cannot be used.*{words}"):
            choose_backend("splash", replace(model, **changes), seq_len, TPU)
    cpu = SimpleNamespace(platform="cpu", device_kind="cpu")
    with pytest.raises(ValueError, match="no splash kernel on cpu"):
        choose_backend("splash", model, 2048, cpu)
