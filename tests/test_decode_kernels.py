"""Kernels for attention through a cache, in jax's interpreters; one test for all of them."""

import dataclasses
import functools
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import tpu as pltpu

from cla_jax.cache import cache_spec, ledger
from cla_jax.cache.bits import restored
from cla_jax.cache.quantized import Int8
from cla_jax.config import LatentKV
from cla_jax.decode import decode, decoding_weights
from cla_jax.model import decode_kernels, mosaic, paged
from cla_jax.model.attention import EMPTY, KV, Kept, normalized
from launch import plan as launch_plan
from tests import reference
from tests.conftest import MODEL
from tests.test_gpu import decoding_step

ENTRIES = 256  # two thread blocks a row
ROWS = 2
in_interpreter = functools.partial(mosaic.attend, interpret=InterpretGPUParams())


def exact(q_BKNH, k_BEKH, v_BEKH, kept_BE, positions_BN, starts_BN):
    """Attention in float64; zeros for a query that sees nothing."""
    q, k, v = (np.asarray(a, np.float64) for a in (q_BKNH, k_BEKH, v_BEKH))
    seen_BNE = (kept_BE[:, None] <= positions_BN[:, :, None]) & (
        kept_BE[:, None] >= starts_BN[:, :, None]
    )
    scores_BKNE = np.where(seen_BNE[:, None], np.einsum("BKNH,BEKH->BKNE", q, k), -np.inf)
    peak = scores_BKNE.max(axis=-1, keepdims=True)
    weights = np.exp(scores_BKNE - np.where(np.isfinite(peak), peak, 0))
    total = weights.sum(axis=-1, keepdims=True)
    return np.einsum("BKNE,BEKH->BKNH", weights / np.where(total > 0, total, 1), v)


class Attention:
    """Every kernel: its error against float64, for heads of any width and rows of any lengths."""

    attend: Any
    kept_width: Any
    error: float

    @functools.cache  # noqa: B019
    def compiled(self):
        return jax.jit(lambda *arguments: normalized(self.attend(*arguments)))

    def check(self, d_head, n_kv_heads, queries, lengths, window=0, eight_bit=False, ring=False):
        rng = np.random.default_rng(d_head)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        q = draw(ROWS, n_kv_heads, queries, d_head) * d_head**-0.5
        kv = KV(*(draw(ROWS, ENTRIES, n_kv_heads, d_head) for _ in range(2)))
        lengths = np.array(lengths)
        entries = np.arange(ENTRIES)
        kept_BE = np.where(entries < lengths[:, None], entries, EMPTY)
        if ring:  # entries hold the newest tokens, out of order
            kept_BE = np.roll(kept_BE, 100, axis=1)
        positions_BN = np.repeat(lengths[:, None] - 1, queries, axis=1)
        starts_BN = np.maximum(positions_BN - window + 1, 0) if window else 0 * positions_BN
        missing = self.kept_width(d_head) - d_head
        wide = lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, missing)])
        k, v = map(wide, kv)
        kept = Kept(k, v, jnp.asarray(kept_BE, jnp.int32))
        if eight_bit:
            form = Int8(name="int8", dtype="float32")
            coded = form.encode(KV(k, v))
            kv = KV(*(a[..., :d_head] for a in form.decode(coded)))
            k, k_scales, v, v_scales = jax.tree.leaves(coded)
            by_head = lambda a_BEK: restored(a_BEK, "bfloat16").swapaxes(1, 2)
            kept = Kept(k, v, kept.positions_BE, by_head(k_scales), by_head(v_scales))
        asked = (jnp.asarray(a, jnp.int32) for a in (positions_BN, starts_BN))
        found = self.compiled()(wide(q), kept, *asked)[..., :d_head]
        expected = exact(q, *kv, kept_BE, positions_BN, starts_BN)
        scale = max(np.abs(expected).max(), 1e-3)
        assert np.abs(np.asarray(found) - expected).max() < self.error * scale


class TestMosaic(Attention):
    attend = staticmethod(in_interpreter)
    kept_width = staticmethod(mosaic.kept_width)
    error = 1e-4

    @settings(max_examples=4, deadline=None)
    @given(st.tuples(*[st.integers(0, ENTRIES)] * ROWS), st.integers(0, ENTRIES), st.booleans())
    def test_rows_of_any_lengths_windows_and_order(self, lengths, window, ring):
        self.check(46, 1, 5, lengths, window, ring=ring)

    @pytest.mark.parametrize(
        ("d_head", "n_kv_heads", "queries", "eight_bit"),
        [
            (64, 2, 16, True),
            *(
                pytest.param(d_head, 1, 16, eight_bit, marks=pytest.mark.gpu)
                for d_head, eight_bit in [
                    (32, False),
                    (90, False),
                    (128, True),
                    (256, False),
                    (512, False),
                ]
            ),
        ],
    )
    def test_heads_of_every_width(self, d_head, n_kv_heads, queries, eight_bit):
        self.check(d_head, n_kv_heads, queries, (200, 3), eight_bit=eight_bit)


class TestPaged(Attention):
    kept_width = staticmethod(paged.kept_width)
    error = 1e-2  # it writes bfloat16

    @staticmethod
    def attend(*arguments):
        with pltpu.force_tpu_interpret_mode():
            return paged.attend(*arguments)

    @settings(max_examples=3, deadline=None)
    @given(st.tuples(*[st.integers(1, ENTRIES)] * ROWS))
    def test_rows_of_any_lengths(self, lengths):
        self.check(90, 1, 8, lengths)


# ------------------------------------------------------------------------------ in a model, by name

MODEL_16 = dataclasses.replace(
    MODEL,
    compute_dtype="bfloat16",
    d_head=46,
    n_heads=2,
    n_kv_heads=1,
    n_layers=1,
    kv_map="identity",
)


def test_a_model_decodes_through_a_kernel_as_through_xla(monkeypatch):
    kernel = decode_kernels.KERNELS["mosaic"]._replace(attend=in_interpreter)
    monkeypatch.setitem(decode_kernels.KERNELS, "mosaic", kernel)
    weights = decoding_weights(reference.randomised(MODEL_16))
    xla = cache_spec(MODEL_16, "int8", batch=2, capacity=128, chunk=96)
    found = []
    prompts = np.random.default_rng(0).integers(0, 256, (2, 96))
    counts = np.array([96, 30])
    for spec in (xla, dataclasses.replace(xla, attention="mosaic")):
        step = jax.jit(functools.partial(decode, weights, spec))
        _, cache = step(spec.allocate(), prompts, counts)  # too many queries for the kernel
        x_BTD, cache = step(cache, prompts[:, :1], np.ones(2, int))
        assert (np.asarray(cache.lengths_B) == counts + 1).all()
        found.append(np.asarray(x_BTD, np.float32))
    assert np.abs(found[0] - found[1]).max() < 0.03 * np.abs(found[0]).max()


@pytest.mark.parametrize(("attention", "width"), [("xla", 46), ("mosaic", 64), ("paged", 128)])
def test_the_ledger_counts_the_padding_that_a_kernel_needs(attention, width):
    spec = cache_spec(MODEL_16, batch=1, capacity=128)
    spec = dataclasses.replace(spec, attention=attention)
    assert ledger.predicted(spec, 100).resident == 100 * 2 * width * 2
    assert spec.shapes(0).k_BSKH.shape == (1, 128, 1, width)


@pytest.mark.parametrize(
    ("name", "changes", "format", "platform", "capability", "words"),
    [
        ("mosaic", {}, "dense", "gpu", 9.0, None),
        ("mosaic", {}, "int8", "gpu", 9.0, None),
        ("mosaic", {"d_head": 512}, "dense", "gpu", 9.0, None),
        ("mosaic", {"windows": "16"}, "dense", "gpu", 9.0, None),
        ("mosaic", {"d_head": 512}, "int8", "gpu", 9.0, "up to 256 in cache format int8, not 512"),
        ("mosaic", {"d_head": 576}, "dense", "gpu", 9.0, "up to 512"),
        ("mosaic", {}, "kivi4", "gpu", 9.0, "not cache format kivi4"),
        ("mosaic", {}, "dense", "gpu", 8.0, "Hopper"),
        ("mosaic", {}, "dense", "cpu", 0.0, "Mosaic GPU is not available on cpu"),
        ("mosaic", {"compute_dtype": "float32"}, "dense", "gpu", 9.0, "bfloat16, not float32"),
        ("paged", {}, "dense", "tpu", 0.0, None),
        ("paged", {"windows": "16"}, "dense", "tpu", 0.0, "sliding windows"),
        ("paged", {"n_kv_heads": 2}, "dense", "tpu", 0.0, "2 KV heads"),
        ("paged", {}, "int8", "tpu", 0.0, "not cache format int8"),
        ("paged", {}, "dense", "gpu", 9.0, "the paged kernel is not available on gpu"),
    ],
)
def test_what_a_kernel_cannot_serve_is_refused_by_name(
    name, changes, format, platform, capability, words
):
    config = dataclasses.replace(MODEL_16, **changes)
    reason = decode_kernels.refusal(name, config, format, platform, capability)
    assert reason is None if words is None else words in reason


def test_latents_and_unknown_kernels_are_refused():
    latent = dataclasses.replace(MODEL_16, kv=LatentKV(rank=16))
    assert "latent" in str(decode_kernels.refusal("mosaic", latent, "dense", "gpu", 9.0))
    with pytest.raises(ValueError, match="mosaic"):
        cache_spec(MODEL_16, batch=1, capacity=128, attention="mosiac")
    with pytest.raises(ValueError, match="Mosaic GPU is not available on cpu"):
        cache_spec(MODEL_16, batch=1, capacity=128, attention="mosaic")


def test_documents_within_a_row_are_refused_where_a_kernel_sees_all_of_it():
    spec = dataclasses.replace(cache_spec(MODEL_16, batch=1, capacity=128), attention="paged")
    one = np.ones((1, 1), np.int32)
    with pytest.raises(ValueError, match="'paged' does not support starts within a row"):
        decode(None, spec, None, one, one[0], starts_BT=one)


@pytest.mark.pods
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_the_paged_kernel_is_compiled_for_tpus(topology):
    config = dataclasses.replace(MODEL_16, n_heads=16)
    with launch_plan.compiling_elsewhere():
        text = str(decoding_step(topology, config, "paged").as_text())
    assert text.count('custom_call_target="tpu_custom_call"') == config.n_layers
