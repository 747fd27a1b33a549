"""Kernels for CPUs: the library that contains them, and products of tokens with weights."""

import contextlib
import dataclasses
import platform
import subprocess
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax import mesh as meshes
from cla_jax.cache import cache_spec
from cla_jax.config import DecodingMatmul, LatentKV, MeshConfig
from cla_jax.decode import decode, decoding_weights
from cla_jax.evaluate import evaluate
from cla_jax.model import cpu_matmul, latent
from cla_jax.model.native import library, matmul
from cla_jax.runs import find_runs
from cla_jax.state import layout
from cla_jax.train import train
from launch import evaluate as launch_evaluate
from launch import generate as launch_generate
from launch import serve_trace
from tests import reference
from tests.conftest import MODEL

pytestmark = pytest.mark.usefixtures("compiler")

# ------------------------------------------------------------------------------------- the library


def test_it_is_compiled_once_and_kept(monkeypatch, tmp_path, compiler):
    monkeypatch.setenv("HOME", str(tmp_path))
    ran = []
    output = library._output
    monkeypatch.setattr(library, "_output", lambda *c: ran.append(c) or output(*c))
    compilations = lambda: sum("-shared" in command for command in ran)
    for _ in range(2):
        library.load_library(compiler)
    assert compilations() == 1
    assert list((tmp_path / ".cache/cla_jax").iterdir()) == [library._kept(compiler)]
    monkeypatch.setenv("HOME", str(tmp_path / "other"))
    kept = library._kept(compiler)
    assert kept is not None
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b"not whole")
    library.load_library(compiler)
    assert compilations() == 2
    assert kept.stat().st_size > 1000


def test_without_a_cache_directory_it_is_compiled_each_time(monkeypatch, tmp_path, compiler):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    assert library.load_library(compiler)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("no-such-c++", "nor-this"), "none of no-such-c++, nor-this is on the PATH"),
        (("no-such-c++", "false"), "false cannot compile it: exit status 1, and no message"),
    ],
)
def test_without_a_compiler_the_native_kernel_is_refused(monkeypatch, names, words):
    monkeypatch.setattr(library, "_COMPILERS", names)
    assert words in library._loaded.__wrapped__()


def test_what_the_compiler_says_is_wrong_is_named(monkeypatch):
    said = "attention.cc: in function\n/usr/bin/ld: No space left on device\ncollect2: error: ld returned 1"
    error = subprocess.CalledProcessError(1, "c++", stderr=said)
    monkeypatch.setattr(library, "load_library", lambda _: (_ for _ in ()).throw(error))
    assert "No space left on device" in library._loaded.__wrapped__()
    lost = OSError("no such library")
    monkeypatch.setattr(library, "load_library", lambda _: (_ for _ in ()).throw(lost))
    assert "cannot be compiled or loaded: no such library" in library._loaded.__wrapped__()


# --------------------------------------------------------------------------------------- products


def numbers(dtype, *shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def exact(x_GNI, weight_GOI):
    return np.einsum("GNI,GOI->GNO", *(np.asarray(a, np.float64) for a in (x_GNI, weight_GOI)))


def close(found, expected):
    assert found.shape == expected.shape
    return np.abs(found - expected).max() < 2e-6 * np.abs(expected).max()


# Tiles have 16 outputs and up to 8 tokens; a task has some tiles, or one if it is large.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tokens", [1, 2, 3, 5, 8, 9, 16, 33])
@pytest.mark.parametrize(
    ("matrices", "outputs", "inputs"),
    [(1, 16, 64), (1, 1, 1), (1, 5, 7), (3, 33, 6), (4, 48, 31), (1, 250, 300), (1, 40, 3000)],
)
def test_products(dtype, tokens, matrices, outputs, inputs):
    x = numbers(dtype, matrices, tokens, inputs)
    weights = numbers(dtype, matrices, outputs, inputs, seed=1)
    found = jax.jit(matmul.multiply)(x, matmul.Packed.of(weights))
    assert found.dtype == jnp.float32
    assert close(found, exact(x, weights))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_numbers_that_are_not_finite_reach_their_own_outputs_only(dtype):
    x, weights = numbers(dtype, 2, 3, 21), numbers(dtype, 2, 19, 21, seed=1)
    expected = np.array(exact(x, weights))
    x, weights = x.at[0, 2, 20].set(jnp.nan), weights.at[1, 18, 20].set(jnp.inf)
    found = np.array(matmul.multiply(x, matmul.Packed.of(weights)))
    assert np.isnan(found[0, 2]).all()
    assert np.isinf(found[1, :, 18]).all()
    found[0, 2], found[1, :, 18] = expected[0, 2], expected[1, :, 18]
    assert close(found, expected)


def test_the_order_of_sums_does_not_depend_on_the_other_tokens_of_a_tile():
    """Tiles of other sizes may divide a sum into other parts, so these tokens are all of one tile."""
    x, weights = (
        numbers("float32", 1, 8, 100),
        matmul.Packed.of(numbers("float32", 1, 32, 100, seed=1)),
    )
    all_of_them = matmul.multiply(x, weights)
    np.testing.assert_array_equal(matmul.multiply(x[:, ::-1], weights)[:, ::-1], all_of_them)


def test_other_dtypes_and_shapes_are_refused():
    weights = matmul.Packed.of(jnp.zeros((1, 16, 8)))
    with pytest.raises(TypeError, match="tokens are bfloat16, weights float32"):
        matmul.multiply(jnp.zeros((1, 2, 8), jnp.bfloat16), weights)
    for shape in ((2, 2, 8), (1, 2, 9)):
        with pytest.raises(AssertionError):
            matmul.multiply(jnp.zeros(shape), weights)


@pytest.mark.parametrize("flags", [("-mno-avx512f",), ("-mno-avx512bf16",)])
def test_products_of_other_processors(monkeypatch, compiler, flags):
    monkeypatch.setattr(matmul, "_TARGET", f"multiply{flags[0]}")
    # Other machines have no such instructions.
    flags = flags if platform.machine() == "x86_64" else ()
    monkeypatch.setattr(library, "_FLAGS", (*library._FLAGS, *flags))
    handler = library.load_library(compiler).cla_jax_multiply
    jax.ffi.register_ffi_target(matmul._TARGET, jax.ffi.pycapsule(handler), platform="cpu")
    for dtype in ("float32", "bfloat16"):
        for tokens in (1, 4, 6, 7, 13):
            x, weights = numbers(dtype, 2, tokens, 35), numbers(dtype, 2, 50, 35, seed=1)
            assert close(matmul.multiply(x, matmul.Packed.of(weights)), exact(x, weights))


# ---------------------------------------------------------------------------------------- in a model


@pytest.mark.parametrize(
    "changes",
    [
        {"n_kv_heads": 2, "kv_map": "cla:2"},
        {"tied_embeddings": False, "bias": True, "vocab_size": 251},
        {"n_kv_heads": 4, "kv_map": "k=0,0;v=0,1", "n_layers": 2},
        {"n_kv_heads": 1, "kv": LatentKV(rank=24, rope_dims=8)},
        {"compute_dtype": "bfloat16"},
    ],
)
@pytest.mark.parametrize("on_mesh", [True, False])
def test_a_model_decodes_as_through_xla(changes, on_mesh):
    config = dataclasses.replace(MODEL, **{"vocab_size": 256} | changes)
    model = reference.randomised(config)
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    rules = meshes.axis_rules(config, mesh) if on_mesh else meshes.AxisRules()
    prompts = np.random.default_rng(0).integers(0, 250, (2, 40))
    found = []
    with jax.set_mesh(mesh) if on_mesh else contextlib.nullcontext():
        model = jax.device_put(model, layout(model, rules, mesh)) if on_mesh else model
        spec = cache_spec(config, batch=2, capacity=64, chunk=40, rules=rules)
        placed = lambda a, *axes: jax.device_put(a, rules.spec("batch", *axes))
        for name in cpu_matmul.NAMES:
            weights = decoding_weights(model, rules, name)

            @jax.jit
            def step(weights, cache, tokens, counts):
                x_BTD, cache = decode(weights, spec, cache, tokens, counts)
                return weights.logits(x_BTD, rules), cache

            arguments = spec.allocate(), placed(prompts, None), placed(np.array([40, 13]))
            is_map = lambda leaf: isinstance(leaf, cpu_matmul.CpuLinear | latent.AbsorbedHeads)
            matrices = [weights.head]
            for one in filter(is_map, jax.tree.leaves(weights.groups, is_leaf=is_map)):
                matrices += (
                    [one.weight_OI]
                    if isinstance(one, cpu_matmul.CpuLinear)
                    else [one.keys_GRH, one.values_GHR]
                )
            is_packed = {isinstance(matrix, matmul.Packed) for matrix in matrices}
            native = name == cpu_matmul.NATIVE
            assert is_packed == {native}
            assert (matmul._TARGET in step.lower(weights, *arguments).as_text()) == native
            _, cache = step(weights, *arguments)
            for _ in range(2):
                counts = placed(np.ones(2, int))
                logits, cache = step(weights, cache, placed(prompts[:, :1], None), counts)
            found.append(np.asarray(logits))
    tolerance = 0.03 if config.compute_dtype == "bfloat16" else 1e-5
    assert np.abs(found[0] - found[1]).max() < tolerance * np.abs(found[0]).max()


def test_more_than_one_device_and_unknown_names_are_refused():
    model = reference.randomised(MODEL)
    with pytest.raises(ValueError, match="unknown matmul 'nativ'; did you mean native"):
        decoding_weights(model, matmul="nativ")
    mesh = meshes.make_mesh(MeshConfig(fsdp=2), jax.devices()[:2])
    rules = meshes.axis_rules(MODEL, mesh)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="one device, and the mesh has fsdp = 2"),
    ):
        decoding_weights(jax.device_put(model, layout(model, rules, mesh)), rules, "native")


def test_without_a_compiler_it_is_refused(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: "it needs a C++ compiler")
    with pytest.raises(ValueError, match=r"'native' cannot be used .* C.. compiler; use 'xla'"):
        cpu_matmul.check("native")


@pytest.mark.slow
def test_commands_multiply_as_they_are_told(tiny, devices, monkeypatch, capsys, tmp_path):
    assert typing.get_args(DecodingMatmul) == cpu_matmul.NAMES
    config = tiny(steps=2)
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    data, trace = str(config.placement.data_dir), tmp_path / "trace.jsonl"
    evaluates = [str(run.path), "--data-dir", data, "--matmul", "native"]
    devices(2)
    with pytest.raises(SystemExit):
        launch_evaluate.main(evaluates)
    assert "one device, and the mesh has fsdp = 2" in " ".join(capsys.readouterr().err.split())
    assert not run.eval("full")
    devices(1)
    trace.write_text('{"arrival": 0, "prompt": [1, 2, 3], "new_tokens": 4}\n')
    served = [str(trace), "--rows", "1", "--chunk", "2", "--matmul", "native"]
    traced = []
    multiply = matmul.multiply
    monkeypatch.setattr(
        cpu_matmul, "multiply", lambda *a: traced.append(a[0].shape) or multiply(*a)
    )
    for main, argv in (
        (launch_evaluate.main, [*evaluates, "--windows", "2"]),
        (launch_generate.main, [str(run.path), "--new-tokens", "4", "--matmul", "native"]),
        (serve_trace.main, [*served, "--model", str(run.path)]),
        (serve_trace.main, [*served, "--model", "smoke.tiny"]),
        (launch_evaluate.main, [*evaluates, "--windows", "2", "--cache", "h2o:keep=0.9"]),
    ):
        main(argv)
        assert traced, argv
        traced.clear()
    assert "weights multiplied by the kernel native" in capsys.readouterr().out
    # The record says so, and does not answer for XLA.
    xla = dict(evaluate(run, data_dir=data))["cached-dense"].scores
    assert not traced
    through = dict(evaluate(run, data_dir=data, matmul="native"))["cached-dense"].scores
    assert traced
    assert through.nll == pytest.approx(xla.nll, rel=1e-5)
    assert (xla.matmul, run.eval("cached-dense")["matmul"]) == ("", "native")
    traced.clear()
    assert dict(evaluate(run, data_dir=data, matmul="native"))["cached-dense"].scores == through
    assert not traced
