"""Kernels for attention through a cache, in jax's interpreters; one test for all of them."""

import dataclasses
import functools
import platform
import typing
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.experimental.pallas import tpu as pltpu

from cla_jax import mesh as meshes
from cla_jax.cache import cache_spec, ledger, make_format, prefix_shared
from cla_jax.cache import pages as pages_module
from cla_jax.cache.bits import restored
from cla_jax.cache.prefix_shared import prefix_spec
from cla_jax.cache.quantized import Scaled
from cla_jax.config import CacheAttention, LatentKV, MeshConfig
from cla_jax.decode import decode, decoding_weights
from cla_jax.evaluate import evaluate
from cla_jax.model import decode_kernels, mosaic, paged
from cla_jax.model.attention import EMPTY, KV, MASKED, Partial, StepPositions, normalized
from cla_jax.model.native import attention as native
from cla_jax.model.native import library
from cla_jax.prefix_tree import PrefixTree
from cla_jax.runs import find_runs
from cla_jax.state import layout
from cla_jax.train import train
from launch import evaluate as launch_evaluate
from launch import generate as launch_generate
from launch import plan as launch_plan
from launch import serve_trace
from tests import reference
from tests.conftest import MODEL
from tests.test_gpu import decoding_step, kept_elements, largest_copy

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


def in_pages(layer, page):
    """Rows of entries as pages of a pool, in any order and with pages of others between them; and the table
    of the pages of each row."""
    pages = ROWS * ENTRIES // page
    numbers = np.random.default_rng(1).permutation(2 * pages)[:pages]

    def pool(rows):
        of_pages = rows.reshape(pages, page, *rows.shape[2:]).swapaxes(1, 2)
        others = jnp.full((2 * pages, *of_pages.shape[1:]), 99, rows.dtype)
        return others.at[numbers].set(of_pages)

    return jax.tree.map(pool, layer), jnp.asarray(numbers.reshape(ROWS, -1), jnp.int32)


def for_any_rows(test):
    lengths = st.tuples(*[st.integers(0, ENTRIES)] * ROWS)
    return settings(max_examples=4, deadline=None)(
        given(lengths, st.integers(0, ENTRIES), st.booleans())(test)
    )


class Attention:
    """Every kernel: its error against float64, for heads of any width and rows of any lengths."""

    name: str
    attend: Any
    kept_width: Any
    error = 1e-4

    @functools.cache  # noqa: B019
    def compiled(self):
        return jax.jit(lambda *arguments: normalized(self.attend(*arguments)))

    def check(
        self,
        d_head,
        n_kv_heads,
        queries,
        lengths,
        window=0,
        ring=False,
        *,
        eight_bit=False,
        page=None,
    ):
        rng = np.random.default_rng(d_head)
        draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.bfloat16)
        q = draw(ROWS, n_kv_heads, queries, d_head) * d_head**-0.5
        kv = KV(*(draw(ROWS, ENTRIES, n_kv_heads, d_head) for _ in range(2)))
        lengths = np.array(lengths)
        entries = np.arange(ENTRIES)
        kept_BE = np.where(entries < lengths[:, None], entries, EMPTY)
        if ring:  # entries hold the newest tokens, out of order
            kept_BE = np.roll(kept_BE, 100, axis=1)
        kept_BE = kept_BE.astype(np.int32)
        positions_BN = np.repeat(lengths[:, None] - 1, queries, axis=1)
        starts_BN = np.maximum(positions_BN - window + 1, 0) if window else 0 * positions_BN
        missing = self.kept_width(d_head) - d_head
        wide = lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, missing)])
        format: Any = make_format("int8" if eight_bit else "bfloat16", "float32")
        coded = format.encode(kv.each(wide))
        if eight_bit:
            kv = format.decode(coded).each(lambda a: a[..., :d_head])
        pages = None
        if page is not None:
            coded, pages = in_pages(coded, page)
        kept = format.for_kernel(coded, jnp.asarray(kept_BE), pages)
        asked = (jnp.asarray(a, jnp.int32) for a in (positions_BN, starts_BN))
        found = self.compiled()(wide(q), kept, *asked)[..., :d_head]
        expected = exact(q, *kv, kept_BE, positions_BN, starts_BN)
        scale = max(np.abs(expected).max(), 1e-3)
        assert np.abs(np.asarray(found) - expected).max() < self.error * scale

    def test_pages_that_several_rows_read(self, monkeypatch):
        """In two phases, as XLA reads them in float32; the queries of one work item are two tiles."""
        kernel = decode_kernels.KERNELS[self.name]._replace(attend=self.attend, queries=4)
        monkeypatch.setitem(decode_kernels.KERNELS, self.name, kernel)
        monkeypatch.setattr(prefix_shared, "BLOCK", 64)  # one page
        changes = {"d_head": 64, "n_heads": 4, "n_kv_heads": 2}
        config = dataclasses.replace(MODEL_16, **changes)
        sizes = {"batch": 4, "page": 64, "pages": 12, "capacity": 200}
        fed = dataclasses.replace(prefix_spec(config, **sizes), attention=self.name)
        config = dataclasses.replace(config, compute_dtype="float32")
        xla = prefix_spec(config, "bfloat16", **sizes)
        tree = PrefixTree(chunk=64, pages=12)
        lengths = [150, 200, 0, 131]
        shared = [128, 128, 0, 64]  # the last one begins like the others, but shares one page only
        prompts = [[*range(shared[r]), *[300 + r] * (lengths[r] - shared[r])] for r in range(4)]
        rows = {r: tree.insert(prompts[r], new_tokens=0) for r in (0, 1, 3)}
        tables = fed.tables(rows, tree)
        assert tables.items == 2
        draw = np.random.default_rng(0)
        normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.bfloat16)
        q_BTKGH = normal(4, 1, 2, 2, 64)
        kv = KV(normal(12, 2, 64, 64), normal(12, 2, 64, 64))
        lengths_B = jnp.array(lengths, jnp.int32)
        step = StepPositions(
            positions_BT=lengths_B[:, None] - 1,
            starts_BT=jnp.array([[0], [90], [0], [0]], jnp.int32),  # one row has a window
            lengths_B=lengths_B,
            extra=jax.tree.map(jnp.asarray, tables),
        )

        def outputs(spec, q_BTKGH):
            missing = spec.stored_config.d_head - 64
            wide = lambda a: jnp.pad(a, [(0, 0)] * 3 + [(0, missing)])
            pool = spec.formats[0].encode(kv.each(wide))
            attend = jax.jit(lambda *arguments: spec.attend(0, *arguments))
            return np.asarray(attend(pool, q_BTKGH, step), np.float32)

        expected = outputs(xla, q_BTKGH.astype(jnp.float32))
        found = outputs(fed, q_BTKGH.astype(jnp.float32))
        assert (found[2] == 0).all()
        assert np.abs(found - expected).max() < self.error * np.abs(expected).max()


class TestMosaic(Attention):
    name = "mosaic"
    attend = staticmethod(in_interpreter)
    kept_width = staticmethod(mosaic.kept_width)

    @for_any_rows
    def test_rows_of_any_lengths_windows_and_order(self, lengths, window, ring):
        self.check(46, 1, 5, lengths, window, ring)

    @pytest.mark.parametrize(("page", "eight_bit"), [(64, True), (128, False)])
    def test_pages_of_any_size(self, page, eight_bit):
        self.check(46, 2, 5, (250, 70), page=page, eight_bit=eight_bit)

    @pytest.mark.parametrize(
        ("d_head", "n_kv_heads", "queries", "eight_bit"),
        [
            (64, 2, 16, True),
            (128, 1, 16, True),
            *((d_head, 1, 16, False) for d_head in (32, 46, 64, 90, 128, 256, 512)),
        ],
    )
    def test_heads_of_every_width(self, d_head, n_kv_heads, queries, eight_bit):
        self.check(d_head, n_kv_heads, queries, (200, 3), eight_bit=eight_bit)


class TestPaged(Attention):
    name = "paged"
    kept_width = staticmethod(paged.kept_width)

    @staticmethod
    def attend(*arguments):
        with pltpu.force_tpu_interpret_mode():
            return paged.attend(*arguments)

    @for_any_rows
    def test_rows_of_any_lengths_windows_and_order(self, lengths, window, ring):
        self.check(46, 1, 5, lengths, window, ring)

    @pytest.mark.parametrize(
        ("page", "eight_bit"), [(None, False), (16, False), (64, False), (None, True), (32, True)]
    )
    def test_pages_of_any_size(self, page, eight_bit):
        heads = 2 if page else 1
        self.check(90, heads, 20, (250, 70), window=100, page=page, eight_bit=eight_bit)

    @pytest.mark.parametrize("d_head", [32, 128, 256, 512])
    def test_heads_of_every_width(self, d_head):
        self.check(d_head, 1, 16, (200, 3))


def floats(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.usefixtures("compiler")
class TestNative(Attention):
    name = "native"
    attend = staticmethod(native.attend)
    kept_width = staticmethod(native.kept_width)
    error = 2e-6

    @for_any_rows
    def test_rows_of_any_lengths_windows_and_order(self, lengths, window, ring):
        self.check(46, 1, 5, lengths, window, ring)

    @pytest.mark.parametrize(
        ("page", "eight_bit"), [(None, False), (1, True), (8, False), (64, True), (128, False)]
    )
    def test_pages_of_any_size(self, page, eight_bit):
        self.check(46, 2, 5, (250, 70), window=100, page=page, eight_bit=eight_bit)

    # Up to 8 queries read keys as they are, more read them transposed. Blocks of wide heads are shorter.
    @pytest.mark.parametrize("queries", [1, 3, 6, 7, 9, 16, 65])
    @pytest.mark.parametrize("d_head", [4, 32, 64, 136, 300])
    def test_heads_of_every_width(self, d_head, queries):
        self.check(d_head, 3, queries, (200, 3))

    @pytest.mark.parametrize("name", native.FORMATS)
    @pytest.mark.parametrize("d_head", [24, 64])
    def test_every_format_that_it_names(self, name, d_head):
        rng = np.random.default_rng(0)
        format: Any = make_format(name, "float32")
        coded = format.encode(KV(floats(rng, 2, 128, 2, d_head), floats(rng, 2, 128, 2, d_head)))
        q = floats(rng, 2, 2, 4, d_head)
        kept_BE = np.tile(np.arange(128, dtype=np.int32), (2, 1))
        asked = np.full((2, 4), 99, np.int32), np.zeros((2, 4), np.int32)
        found = self.compiled()(q, format.for_kernel(coded, jnp.asarray(kept_BE)), *asked)
        expected = exact(q, *format.decode(coded), kept_BE, *asked)
        assert np.abs(found - expected).max() < self.error * np.abs(expected).max()

    def test_fp8_of_every_code(self):
        codes = jnp.arange(256, dtype=jnp.uint8)
        is_number = codes & 127 != 127  # NaN reaches every query, with a weight of 0 too
        codes = jnp.where(is_number, codes, 0)
        format: Any = make_format("fp8", "float32")
        scales = jnp.full((1, 256, 1), 0x3F80, jnp.uint16)  # 1
        half = Scaled(codes.reshape(1, 256, 1, 1), scales)
        kept_BE = jnp.arange(256, dtype=jnp.int32)[None]
        kept = format.for_kernel(KV(half._replace(codes=0 * half.codes), half), kept_BE)
        at = jnp.arange(256, dtype=jnp.int32)[None]  # each query sees one entry
        found = self.compiled()(jnp.zeros((1, 1, 256, 1)), kept, at, at)
        expected = format.decode_half(half)[0, :, 0, 0]
        np.testing.assert_array_equal(found[0, 0, :, 0], expected)
        half = half._replace(codes=half.codes.at[0, 3].set(127))
        kept = format.for_kernel(KV(half._replace(codes=0 * half.codes), half), kept_BE)
        assert np.isnan(self.compiled()(jnp.zeros((1, 1, 256, 1)), kept, at, at)[0, 0, 3])

    @pytest.mark.parametrize("queries", [4, 12])
    def test_the_beginning_of_a_latents_queries_meets_its_values(self, queries):
        rng = np.random.default_rng(0)
        k, v = floats(rng, 2, 128, 1, 24), floats(rng, 2, 128, 1, 40)
        q = floats(rng, 2, 1, queries, 64)
        kept_BE = np.tile(np.arange(128, dtype=np.int32), (2, 1))
        asked = np.full((2, queries), 100, np.int32), np.zeros((2, queries), np.int32)
        format: Any = make_format("dense", "float32")
        kept = format.for_kernel(format.encode(KV(k, v)), jnp.asarray(kept_BE))
        found = self.compiled()(q, kept, *asked)
        expected = exact(q, jnp.concatenate([v, k], axis=-1), v, kept_BE, *asked)
        assert np.abs(found - expected).max() < self.error * np.abs(expected).max()

    def test_long_rows_are_divided_among_threads(self):
        """Into sixteen parts, the last of which have no entries; then parts are merged."""
        rng = np.random.default_rng(0)
        k, v, q = floats(rng, 1, 4224, 2, 32), floats(rng, 1, 4224, 2, 32), floats(rng, 1, 2, 3, 32)
        format: Any = make_format("dense", "float32")
        for length in (1, 700, 4224):
            kept_BE = np.where(np.arange(4224) < length, np.arange(4224), EMPTY)[None].astype(
                np.int32
            )
            asked = np.full((1, 3), length - 1, np.int32), np.array([[0, 500, 5000]], np.int32)
            kept = format.for_kernel(format.encode(KV(k, v)), jnp.asarray(kept_BE))
            found = self.compiled()(q, kept, *asked)
            expected = exact(q, k, v, kept_BE, *asked)
            assert np.abs(found - expected).max() < self.error * np.abs(expected).max()

    @pytest.mark.parametrize("queries", [2, 8])
    def test_what_no_query_sees_is_not_read(self, queries):
        """It may hold anything; a number that is not finite and is seen shows."""
        rng = np.random.default_rng(0)
        k, v, q = (
            floats(rng, 1, 128, 1, 32),
            floats(rng, 1, 128, 1, 32),
            floats(rng, 1, 1, queries, 32),
        )
        kept_BE = jnp.where(jnp.arange(128) < 90, jnp.arange(128, dtype=jnp.int32), EMPTY)[None]
        asked = jnp.full((1, queries), 80, jnp.int32), jnp.full((1, queries), 10, jnp.int32)
        q = jnp.abs(q)  # times infinity: infinity
        format: Any = make_format("dense", "float32")

        def attention(k, v):
            return self.compiled()(q, format.for_kernel(format.encode(KV(k, v)), kept_BE), *asked)

        expected = attention(k, v)
        unseen = (jnp.arange(128) < 10) | (jnp.arange(128) > 80)
        spoiled = lambda a: jnp.where(unseen[None, :, None, None], jnp.nan, a)
        np.testing.assert_array_equal(attention(spoiled(k), spoiled(v)), expected)
        for bad in (jnp.nan, jnp.inf):
            assert np.isnan(attention(k.at[0, 50, 0, 3].set(bad), v)).all()
        assert np.isnan(attention(k, v.at[0, 50, 0, 3].set(jnp.nan))[..., 3]).all()

    @pytest.mark.parametrize(
        ("changes", "format"),
        [
            ({"n_kv_heads": 2, "kv_map": "cla:2"}, "dense"),
            ({"windows": "24,0", "n_layers": 2, "kv_map": "identity"}, "dense"),
            ({"n_kv_heads": 4, "kv_map": "k=0,0;v=0,1", "n_layers": 2}, "int8"),
            ({"n_kv_heads": 1, "kv": LatentKV(rank=24, rope_dims=8)}, "fp8"),
            ({"compute_dtype": "bfloat16"}, "bfloat16"),
        ],
    )
    @pytest.mark.parametrize("sizes", [MeshConfig(fsdp=1), MeshConfig(fsdp=2, model=2)])
    def test_a_model_decodes_as_through_xla(self, changes, format, sizes):
        config = dataclasses.replace(MODEL, vocab_size=256, **changes)
        mesh = meshes.make_mesh(sizes, jax.devices()[: sizes.fsdp * sizes.model])
        rules = meshes.axis_rules(config, mesh)
        prompts = np.random.default_rng(0).integers(0, 256, (2, 40))
        model = reference.randomised(config)
        found = []
        with jax.set_mesh(mesh):
            placed = lambda a, *axes: jax.device_put(a, rules.spec("batch", *axes))
            weights = decoding_weights(jax.device_put(model, layout(model, rules, mesh)), rules)
            for attention in ("xla", "native"):
                capacities = {"batch": 2, "capacity": 128, "chunk": 40, "rules": rules}
                spec = cache_spec(config, format, attention=attention, **capacities)
                step = jax.jit(functools.partial(decode, weights, spec))
                arguments = spec.allocate(), placed(prompts, None), placed(np.array([40, 13]))
                assert (native._TARGET in step.lower(*arguments).as_text()) == (
                    attention == "native"
                )
                _, cache = step(*arguments)
                for _ in range(2):
                    x_BTD, cache = step(
                        cache, placed(prompts[:, :1], None), placed(np.ones(2, int))
                    )
                found.append(np.asarray(x_BTD, np.float32))
        tolerance = 0.03 if config.compute_dtype == "bfloat16" else 1e-5
        assert np.abs(found[0] - found[1]).max() < tolerance * np.abs(found[0]).max()

    def test_many_queries_are_divided_among_threads(self):
        """A task has at most 256 of a head; one row has 600, which see more and more entries."""
        rng = np.random.default_rng(0)
        k, v, q = floats(rng, 1, 640, 2, 16), floats(rng, 1, 640, 2, 16), floats(rng, 1, 2, 600, 16)
        kept_BE = np.arange(640, dtype=np.int32)[None]
        asked = kept_BE[:, :600], np.zeros((1, 600), np.int32)
        format: Any = make_format("dense", "float32")
        kept = format.for_kernel(format.encode(KV(k, v)), jnp.asarray(kept_BE))
        found = self.compiled()(q, kept, *asked)
        expected = exact(q, k, v, kept_BE, *asked)
        assert np.abs(found - expected).max() < self.error * np.abs(expected).max()

    def test_shapes_that_the_kernel_would_read_past_are_found_before(self):
        format: Any = make_format("dense", "float32")
        zeros = jnp.zeros((1, 128, 1, 16))
        kept = format.for_kernel(
            format.encode(KV(zeros, zeros)), jnp.arange(128, dtype=jnp.int32)[None]
        )
        at = jnp.zeros((1, 2), jnp.int32)
        for q, changes, asked in (
            (jnp.zeros((1, 1, 2, 24)), {}, at),
            (jnp.zeros((1, 2, 2, 16)), {}, at),
            (jnp.zeros((1, 1, 2, 16)), {}, at[:, :1]),
            (jnp.zeros((1, 1, 2, 16)), {"v": kept.v[:, :, :64]}, at),
            (jnp.zeros((1, 1, 2, 16)), {"pages_BC": kept.pages_BC[:, :0]}, at),
        ):
            with pytest.raises(AssertionError):
                native.attend(q, dataclasses.replace(kept, **changes), asked, at)

    @pytest.mark.parametrize(("queries", "width"), [(3, 46), (9, 64)])
    def test_processors_with_shorter_vectors(self, monkeypatch, compiler, queries, width):
        monkeypatch.setattr(native, "_TARGET", f"short_vectors_{queries}")
        # Other processors have no longer ones.
        short = ("-mno-avx512f",) if platform.machine() == "x86_64" else ()
        monkeypatch.setattr(library, "_FLAGS", (*library._FLAGS, *short))
        handler = library.load_library(compiler).cla_jax_attend
        jax.ffi.register_ffi_target(native._TARGET, jax.ffi.pycapsule(handler), platform="cpu")
        rng = np.random.default_rng(0)
        kv = KV(floats(rng, 2, 384, 2, width), floats(rng, 2, 384, 2, width))
        q, kept_BE = (
            floats(rng, 2, 2, queries, width),
            np.tile(np.arange(384, dtype=np.int32), (2, 1)),
        )
        asked = np.full((2, queries), 300, np.int32), np.full((2, queries), 7, np.int32)
        for name in native.FORMATS:
            format: Any = make_format(name, "float32")
            coded = format.encode(kv)
            kept = format.for_kernel(coded, jnp.asarray(kept_BE))
            found = normalized(native.attend(q, kept, *map(jnp.asarray, asked)))
            expected = exact(q, *format.decode(coded), kept_BE, *asked)
            assert np.abs(found - expected).max() < self.error * np.abs(expected).max(), name


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


@pytest.mark.parametrize(
    ("attention", "width"), [("xla", 46), ("native", 46), ("mosaic", 64), ("paged", 128)]
)
def test_the_ledger_counts_the_padding_that_a_kernel_needs(attention, width):
    spec = cache_spec(MODEL_16, batch=1, capacity=128)
    spec = dataclasses.replace(spec, attention=attention)
    assert ledger.predicted(spec, 100).resident == 100 * 2 * width * 2
    assert spec.shapes(0).k_BSKH.shape == (1, 128, 1, width)
    in_pages = prefix_spec(MODEL_16, batch=1, page=64, pages=5, capacity=128)
    in_pages = dataclasses.replace(in_pages, attention=attention)
    assert in_pages.page_bytes == 64 * 2 * width * 2
    assert ledger.nbytes(in_pages.allocate().kv_layers) == in_pages.allocated_bytes


@pytest.mark.parametrize(
    ("name", "changes", "format", "platform", "capability", "words"),
    [
        ("mosaic", {}, "dense", "gpu", 9.0, None),
        ("mosaic", {}, "int8", "gpu", 9.0, None),
        ("mosaic", {"d_head": 512}, "dense", "gpu", 9.0, None),
        ("mosaic", {"windows": "16"}, "dense", "gpu", 9.0, None),
        ("mosaic", {"d_head": 512}, "int8", "gpu", 9.0, "up to 256 in cache format int8, not 512"),
        ("mosaic", {"d_head": 576}, "dense", "gpu", 9.0, "up to 512"),
        (
            "mosaic",
            {"n_heads": 65},
            "dense",
            "gpu",
            9.0,
            "up to 64 query heads per KV head, not 65",
        ),
        ("mosaic", {}, "kivi4", "gpu", 9.0, "not cache format kivi4"),
        ("mosaic", {}, "dense", "gpu", 8.0, "Hopper"),
        ("mosaic", {}, "dense", "cpu", 0.0, "Mosaic GPU is not available on cpu"),
        ("mosaic", {"compute_dtype": "float32"}, "dense", "gpu", 9.0, "bfloat16, not float32"),
        ("paged", {}, "dense", "tpu", 0.0, None),
        ("paged", {"windows": "16"}, "dense", "tpu", 0.0, None),
        ("paged", {"n_kv_heads": 2}, "dense", "tpu", 0.0, "2 KV heads"),
        ("paged", {}, "int8", "tpu", 0.0, None),
        ("paged", {}, "fp8", "tpu", 0.0, "bfloat16 and int8, not cache format fp8"),
        ("paged", {}, "dense", "gpu", 9.0, "the paged kernel is not available on gpu"),
        ("native", {}, "kivi4", "cpu", 0.0, "not cache format kivi4"),
        ("native", {}, "dense", "tpu", 0.0, "the native kernel is not available on tpu"),
    ],
)
def test_what_a_kernel_cannot_serve_is_refused_by_name(
    name, changes, format, platform, capability, words
):
    config = dataclasses.replace(MODEL_16, **changes)
    reason = decode_kernels.refusal(name, config, format, platform, capability)
    assert reason is None if words is None else words in reason


@pytest.mark.parametrize(
    ("name", "changes", "format", "page", "words"),
    [
        ("mosaic", {}, "dense", 64, None),
        ("mosaic", {"d_head": 512}, "dense", 32, None),
        ("mosaic", {}, "dense", 32, "pages of a multiple of 64 tokens, not 32"),
        ("paged", {"n_kv_heads": 2}, "dense", 16, None),
        ("paged", {}, "dense", 24, "pages of a multiple of 16 tokens, not 24"),
        ("paged", {}, "int8", 32, None),
        ("paged", {}, "int8", 48, "pages of a multiple of 32 tokens, not 48"),
        (
            "paged",
            {"n_heads": 32, "n_kv_heads": 32},
            "dense",
            256,
            "up to 128 tokens of this model, not 256",
        ),
    ],
)
def test_pages_that_a_kernel_cannot_read_are_refused(name, changes, format, page, words):
    config = dataclasses.replace(MODEL_16, **changes)
    platform = {"mosaic": ("gpu", 9.0), "paged": ("tpu", 0.0)}[name]
    reason = decode_kernels.refusal(name, config, format, *platform, page)
    assert reason is None if words is None else words in str(reason)


def test_latents_and_unknown_kernels_are_refused():
    latent = dataclasses.replace(MODEL_16, kv=LatentKV(rank=16))
    assert "latent" in str(decode_kernels.refusal("mosaic", latent, "dense", "gpu", 9.0))
    with pytest.raises(ValueError, match="mosaic"):
        cache_spec(MODEL_16, batch=1, capacity=128, attention="mosiac")
    with pytest.raises(ValueError, match="Mosaic GPU is not available on cpu"):
        cache_spec(MODEL_16, batch=1, capacity=128, attention="mosaic")
    with pytest.raises(ValueError, match="the paged kernel is not available on cpu"):
        prefix_spec(MODEL_16, batch=1, page=16, pages=9, capacity=128, attention="paged")


def in_xla(q_BKNH, kept, positions_BN, starts_BN):
    """What a kernel computes, without one."""

    def rows(pool):
        of_rows = restored(pool, "bfloat16").astype(jnp.float32)[kept.pages_BC]
        of_rows = of_rows.swapaxes(2, 3) if kept.heads_first else of_rows
        return of_rows.reshape(len(of_rows), -1, *of_rows.shape[3:])

    kept_B1E = kept.positions_BE[:, None]
    seen_BNE = (kept_B1E <= positions_BN[:, :, None]) & (kept_B1E >= starts_BN[:, :, None])
    s_BKNE = jnp.einsum("BKNH,BEKH->BKNE", q_BKNH.astype(jnp.float32), rows(kept.k))
    s_BKNE = jnp.where(seen_BNE[:, None], s_BKNE, MASKED)
    peak = s_BKNE.max(axis=-1, keepdims=True)
    weights = jnp.exp(s_BKNE - peak)
    sum_BKNH = jnp.einsum("BKNE,BEKH->BKNH", weights, rows(kept.v))
    return Partial(sum_BKNH, weights.sum(axis=-1, keepdims=True), peak)


@pytest.mark.slow
def test_commands_decode_through_the_kernel_that_is_named(
    tiny, devices, monkeypatch, capsys, tmp_path
):
    devices(1)
    assert typing.get_args(CacheAttention) == decode_kernels.NAMES
    config = tiny(steps=2, **{"model.compute_dtype": "bfloat16"})
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    data, trace = str(config.placement.data_dir), tmp_path / "trace.jsonl"
    trace.write_text('{"arrival": 0, "prompt": [1, 2, 3], "new_tokens": 4}\n')
    served = [str(trace), "--unshared", "--rows", "1", "--chunk", "2"]
    commands = [
        (launch_evaluate.main, [str(run.path), "--windows", "2", "--data-dir", data]),
        (launch_generate.main, [str(run.path), "--new-tokens", "4"]),
        (serve_trace.main, [*served, "--model", str(run.path)]),
    ]
    for main, argv in commands:
        for name, words in (
            ("mosaic", "Mosaic GPU is not available on cpu"),
            ("mosiac", "unknown --attention 'mosiac'; did you mean mosaic"),
        ):
            with pytest.raises(SystemExit):
                main([*argv, "--attention", name])
            assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())

    traced = []
    kernel = decode_kernels.KERNELS["mosaic"]._replace(
        attend=lambda *arguments: traced.append(arguments[0].shape) or in_xla(*arguments),
        refusal=lambda *_: None,
    )
    monkeypatch.setitem(decode_kernels.KERNELS, "mosaic", kernel)
    for main, argv in commands:
        main([*argv, "--attention", "mosaic"])
        assert traced
        traced.clear()
    assert "read by the kernel mosaic" in capsys.readouterr().out
    # The record says so, and does not answer for XLA.
    xla = dict(evaluate(run, data_dir=data))["cached-dense"].scores
    assert not traced
    through = dict(evaluate(run, data_dir=data, attention="mosaic"))["cached-dense"].scores
    assert traced
    assert through.nll == pytest.approx(xla.nll, rel=1e-3)
    assert (xla.attention, run.eval("cached-dense")["attention"]) == ("", "mosaic")
    traced.clear()
    assert dict(evaluate(run, data_dir=data, attention="mosaic"))["cached-dense"].scores == through
    assert not traced
    kernel = kernel._replace(queries=16 * config.model.q_groups)
    monkeypatch.setitem(decode_kernels.KERNELS, "mosaic", kernel)
    with pytest.raises(ValueError, match=r"chunk = 32: .* up to 16 tokens; use --chunk 16"):
        list(evaluate(run, data_dir=data, attention="mosaic", chunk=32))


@pytest.mark.pods
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("n_kv_heads", "format", "page", "changes", "calls"),
    [
        (1, "dense", None, {}, 2),
        (1, "int8", None, {}, 2),
        # Two phases of two layers.
        (1, "dense", 64, {"d_head": 46}, 4),
        (16, "dense", 64, {"windows": "128"}, 4),
        (4, "dense", 64, {"kv_map": "k=0,0;v=0,1"}, 4),
        (4, "int8", 64, {}, 4),
    ],
)
def test_the_paged_kernel_is_compiled_for_tpus(
    monkeypatch, topology, n_kv_heads, format, page, changes, calls
):
    """Neither rows nor pools are copied for it, or for a write."""
    monkeypatch.setattr(pages_module, "on_cpu", lambda: False)
    config = dataclasses.replace(
        MODEL_16, n_layers=2, n_heads=16, n_kv_heads=n_kv_heads, **{"d_head": 128} | changes
    )
    with launch_plan.compiling_elsewhere():
        text = str(decoding_step(topology, config, "paged", format, page).as_text())
    assert text.count('custom_call_target="tpu_custom_call"') == calls
    kinds = "copy|transpose|convert|bitcast-convert"  # copy-start: a small pool to fast memory
    assert largest_copy(text, kinds) < kept_elements(config, 128, page)
