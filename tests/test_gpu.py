"""Programs for GPUs, compiled by jax's CUDA plugin; none is needed, and nothing runs (`make test-gpu`)."""

import dataclasses
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import experiments
from cla_jax import hlo, plan
from cla_jax.cache import cache_spec
from cla_jax.cache.prefix_shared import prefix_spec
from cla_jax.decode import decode, decoding_weights
from cla_jax.model import mosaic
from cla_jax.model.transformer import Transformer
from cla_jax.plan import compiler, search, topologies
from cla_jax.session import plan_layout
from launch import plan as launch_plan
from tests.conftest import MODEL, replace

pytestmark = pytest.mark.gpu

SMALL = ["--model.n-layers", "4", "--model.d-model", "256", "--model.d-ff", "512"]


@pytest.fixture(autouse=True, scope="module")
def elsewhere():
    with launch_plan.compiling_elsewhere():
        yield


@pytest.mark.parametrize(
    ("topology", "spans_hosts"),
    [("h100:8", False), ("h100:2x8", True), ("a100-80:8", False), ("b200:8", False)],
)
def test_one_step_is_planned_for_gpus(capsys, topology, spans_hosts):
    """The real step, with cuDNN's attention; the JSON of the plan."""
    arguments = ["cla_1b.h128_mqa_cla2", "--topology", topology, "--json", "--"]
    launch_plan.main([*arguments, *SMALL, "--batch-size", "32"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["fits"]
    assert found["attention"] == "cudnn"
    assert 0 < found["mfu"] < 1
    # Gradients of weights are reduce-scattered.
    assert found["collective_bytes"]["all-gather"] > 0
    assert found["collective_bytes"]["reduce-scatter"] > 0
    assert bool(found["network_bytes"]) is spans_hosts
    assert ("network" in found["roofline"]) is spans_hosts
    assert len(found["buffers"]) == 5


def test_slices_are_hosts_with_a_copy_each(capsys):
    arguments = ["cla_1b.h128_mqa", "--topology", "h100:8", "--slices", "2", "--"]
    launch_plan.main([*arguments, *SMALL, "--batch-size", "32"])
    shown = capsys.readouterr().out
    assert "2 x h100:8: 16 devices" in shown
    assert "over NVLink and through its network port" in shown
    assert launch_plan.UNTRIED in " ".join(shown.split())


def test_devices_are_as_on_the_real_machine():
    found = topologies.topology("h200:4x8")
    assert len(found.devices) == 32
    assert found.devices[0].device_kind == "NVIDIA H200"
    assert found.devices[0].compute_capability == "9.0"


# ------------------------------------------------------------------------- the 1B step of the paper


@functools.cache
def planned(row, topology, **changes):
    (config,) = experiments.find(row)
    return plan.plan(replace(config, **changes), topologies.topology(topology))


def planned_1b(topology, batch, remat):
    changes = {"batch_size": batch, "placement.remat": remat, "placement.eval_batch_size": 128}
    return planned("cla_1b.h128_mqa_cla2", topology, **changes)


@pytest.mark.parametrize(
    ("topology", "batch", "remat", "gib"),
    [
        ("h100:8", 64, "block", 4.99),
        ("h100:16x8", 2048, "none", 27.38),
        ("h100:16x8", 2048, "block", 5.31),
    ],
)
def test_peaks_of_the_1b_step_are_those_of_the_documents(topology, batch, remat, gib):
    """docs/pods.md has them."""
    found = planned_1b(topology, batch, remat)
    assert found.fits
    assert found.peak == pytest.approx(gib * 2**30, rel=0.05)
    assert found.copied < 0.02 * found.traffic
    told = found.collective_bytes
    assert told["all-reduce"] < 0.01 * told["reduce-scatter"]


@pytest.mark.parametrize(
    ("topology", "batch", "remat"),
    [
        ("h100:8", 64, "block"),
        ("h100:16x8", 2048, "none"),
        ("h100:16x8", 2048, "block"),
    ],
)
def test_the_closed_form_of_the_1b_peak_is_near(topology, batch, remat):
    found = planned_1b(topology, batch, remat)
    assert found.estimate == pytest.approx(found.peak, rel=0.05)


def test_the_closed_form_counts_what_microbatches_hold():
    """Of all rows, the 3B step on 8 GPUs has the largest weights on each."""
    changes = {"placement.remat": "block", "placement.accumulate": 16}
    found = planned("cla_3b.h128_mqa_cla2", "h100:8", **changes)
    assert found.estimate == pytest.approx(found.peak, rel=0.05)


def test_the_search_compiles_only_what_it_chooses():
    """The next larger microbatch needs 0.4 % more than an H200 has, by the closed form."""
    (config,) = experiments.find("cla_3b.h128_mqa_cla2")
    found, compilations = search.search(config, topologies.topology("h200:8"))
    assert (found.accumulate, found.remat, compilations) == (16, "none", 1)
    assert found.estimate == pytest.approx(found.peak, rel=0.05)


@pytest.mark.parametrize("remat", ["none", "block", "attention", "dots"])
def test_under_a_scan_nothing_is_held_twice(remat):
    changes = {"model.n_layers": 8, "batch_size": 8, "placement.remat": remat}
    changes |= {"placement.eval_batch_size": 8}
    scanned, unrolled = (
        planned("cla_1b.h128_mqa_cla2", "h100:1", **changes, **{"placement.scan_layers": scan})
        for scan in (True, False)
    )
    # Unrolled, each weight is updated as soon as its gradient is there; a loop has them all at its end.
    assert scanned.peak - scanned.parts["gradients"] <= 1.05 * unrolled.peak


@pytest.mark.parametrize("remat", ["attention", "dots"])
def test_on_a_cluster_a_scan_needs_no_more_than_unrolled_layers(remat):
    """With the paper's batch. A GPU's part of the gradients, which a scan holds at its end, is small."""
    changes = {"model.n_layers": 8, "placement.remat": remat}
    scanned, unrolled = (
        planned("cla_1b.h128_mqa_cla2", "h100:16x8", **changes, **{"placement.scan_layers": scan})
        for scan in (True, False)
    )
    assert scanned.peak <= 1.05 * unrolled.peak
    for found in (scanned, unrolled):
        assert found.estimate == pytest.approx(found.peak, rel=0.05)


# --------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    ("d_head", "remat", "forward"),
    [
        *((d_head, "none", 1) for d_head in (32, 46, 64, 90, 128, 256)),
        (64, "attention", 1),
        (64, "block", 2),
    ],
)
def test_cudnn_attends_forward_and_backward(tiny, tmp_path, d_head, remat, forward):
    """For every head size of the paper that it takes; the output is kept where the policy says so."""
    config = tiny(
        **{"model.d_head": d_head, "model.n_heads": 2, "model.kv_map": "cla:2"},
        **{"model.n_layers": 4, "model.compute_dtype": "bfloat16", "placement.remat": remat},
        **{"data.seq_len": 128, "placement.loss_chunk": 64},
    )
    layout = plan_layout(config, topologies.topology("h200:8").devices)
    assert layout.options.attention == "cudnn"
    compiler._compile_apart(config, topologies.topology("h200:8"), tmp_path)
    text = hlo.find(tmp_path, "after_optimizations.txt")
    blocks = 2  # of a group, compiled one by one
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == blocks
    assert text.count('custom_call_target="__cudnn$fmhaSoftmax"') == forward * blocks


# ------------------------------------------------------------------------------ decoding kernels


TOKENS, PAGES = 1024, 40


def decoding_step(topology, config, attention, format="dense", page=None):
    """One decode step of 2 rows of up to 1,024 tokens, compiled for a device that is not here."""
    sizes = {"batch": 2, "capacity": TOKENS}
    spec = cache_spec(config, format, **sizes)
    if page is not None:
        spec = prefix_spec(config, format, page=page, pages=PAGES, **sizes)
    spec = dataclasses.replace(spec, attention=attention)
    here = SingleDeviceSharding(topologies.topology(topology).devices[0])
    there = lambda tree: jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), tree
    )
    weights = jax.eval_shape(lambda: decoding_weights(Transformer(jax.random.key(0), config)))
    arguments = weights, jax.eval_shape(spec.allocate), jax.ShapeDtypeStruct((2, 1), jnp.int32)
    one_each = jax.ShapeDtypeStruct((2,), jnp.int32)
    step = lambda weights, cache, tokens, counts: decode(weights, spec, cache, tokens, counts)
    return jax.jit(step, donate_argnums=1).lower(*map(there, (*arguments, one_each))).compile()


def kept_elements(config, width, page):
    """Elements of the keys of such a cache: its rows, or its pool."""
    return (2 * TOKENS if page is None else PAGES * page) * config.n_kv_heads * width


def largest_copy(text, kinds="copy|transpose|convert"):
    """Elements of the largest array that a program copies or converts."""
    copied = [line for line in text.splitlines() if re.search(rf" ({kinds})\(", line)]
    sizes = [
        math.prod(map(int, s.split(","))) for s in re.findall(r"\[([0-9,]+)\]", "".join(copied))
    ]
    return max(sizes, default=0)


@pytest.mark.parametrize(
    ("d_head", "n_kv_heads", "format", "page", "registers", "spilled"),
    [
        (32, 1, "dense", None, 168, False),
        (46, 1, "dense", None, 168, False),  # kept, and read, as 64
        (64, 2, "int8", None, 224, False),
        (90, 1, "dense", None, 208, False),
        (128, 1, "dense", None, 232, False),
        (128, 1, "int8", None, 255, True),
        (256, 1, "dense", None, 248, False),
        (512, 1, "dense", None, 255, True),
        (64, 2, "int8", 64, 224, False),
        (128, 4, "dense", 64, 232, False),
        (512, 1, "dense", 64, 255, True),  # two blocks a page
    ],
)
def test_the_decoding_kernel_is_compiled_for_hopper(
    monkeypatch, capfd, d_head, n_kv_heads, format, page, registers, spilled
):
    """docs/pods.md has registers, shared memory and spills. The cache is not copied for the kernel."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    changes = {"d_head": d_head, "n_heads": 4, "n_kv_heads": n_kv_heads, "kv_map": "cla:2"}
    config = dataclasses.replace(
        MODEL, n_layers=2, compute_dtype="bfloat16", windows="0", **changes
    )
    compiled = decoding_step("h100:1", config, "mosaic", format, page)
    text = str(compiled.as_text())
    assert text.count("mosaic_gpu") >= 2 * (1 if page is None else 2)  # of each layer and phase
    words = capfd.readouterr().out
    used = {int(n) for n in re.findall(r"Used (\d+) registers", words)}
    spills = {int(n) for n in re.findall(r"(\d+) bytes spill stores", words)}
    assert used, words
    assert max(used) <= registers
    assert (max(spills) > 0) is spilled
    width = mosaic.kept_width(d_head)
    assert mosaic.Tiling.of(width).shared_bytes(format == "int8") < 232448
    assert largest_copy(text) < kept_elements(config, width, page)
