"""Eight virtual CPU devices for every test; small configs and the data they share."""

import hashlib
import os
import sys
import tempfile

_FLAGS = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
_OWN = ""
# Tests compile much and run little: the compiler is told to hurry. `test_user_flags` runs some without.
if not os.environ.pop("TESTS_COMPILE_AS_USERS", ""):
    _FLAGS += (
        " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
    # Here even more: the newer emitters of fusions alone take two thirds of the time of compiling a step.
    # With the older ones programs cannot be kept, though: writing one crashes now and then, in jaxlib.
    _OWN = " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
os.environ["XLA_FLAGS"] = _FLAGS + _OWN
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["JAX_PLATFORMS"] = "cpu"
# Where in the source an operation is from: a fifteenth of the time, and nobody reads it here.
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"

import jax

jax.devices()  # now both are read, and are not for the processes that tests start:
os.environ["XLA_FLAGS"] = _FLAGS
del os.environ["JAX_ENABLE_COMPILATION_CACHE"]
# those remember what they compiled, for each other and for the next run of the tests.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "cla_jax-test-programs")
)
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(1 << 30)
# What else is kept for the user is not the user's here.
_CACHE = os.path.join(tempfile.gettempdir(), "cla_jax-test-cache")
os.environ["XDG_CACHE_HOME"] = _CACHE
# Matplotlib's list of fonts names files of this environment. Another environment may be gone tomorrow.
_ENVIRONMENT = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
os.environ["MPLCONFIGDIR"] = os.path.join(_CACHE, f"matplotlib-{_ENVIRONMENT}")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

import dataclasses
import functools
import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jax._src import compiler as jax_compiler

from cla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, Placement
from cla_jax.model.native import library

# What jax keeps of traced programs are millions of objects, hardly any of them garbage.
gc.set_threshold(100_000, 10, 10)

_programs: dict[bytes, Any] = {}


def _compile_equal_programs_once() -> None:
    """For jax, programs are equal if they are of the same Python function; tests make those anew."""
    compile_program = jax_compiler.backend_compile_and_load

    def compile_once(backend, module, devices, options, host_callbacks):
        if host_callbacks:
            return compile_program(backend, module, devices, options, host_callbacks)
        text = module.operation.get_asm(enable_debug_info=False).encode()
        key = hashlib.sha256(text + options.SerializeAsString() + str(devices).encode()).digest()
        if key not in _programs:
            _programs[key] = compile_program(backend, module, devices, options, host_callbacks)
        return _programs[key]

    jax_compiler.backend_compile_and_load = compile_once


_compile_equal_programs_once()


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """Forgets programs when there are many: each maps memory, and a process may have 65,530 such maps."""
    yield
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 30_000:  # a module adds 12,000 at most
        _programs.clear()
        jax.clear_caches()
        gc.collect()


MODEL = ModelConfig(
    vocab_size=260,
    n_layers=4,
    d_model=32,
    d_ff=48,
    n_heads=4,
    n_kv_heads=1,
    d_head=8,
    kv_map="cla:2",
    init_std=0.1,
    compute_dtype="float32",
)


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    """Prepared data of the whole test session."""
    return str(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def short_documents(tmp_path_factory):
    """Documents so short that every window holds several."""
    file = tmp_path_factory.mktemp("corpus") / "short.jsonl"
    texts = [f"document {i} of a few words" for i in range(200)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return f"jsonl:{file}"


@pytest.fixture
def tiny(tmp_path, data_dir):
    """Makes a config of a run that takes a second: `tiny(steps=3, **{"model.kv_map": "identity"})`."""
    return functools.partial(tiny_config, str(tmp_path / "runs"), data_dir)


def tiny_config(runs: str, data_dir: str, **changes: Any) -> Config:
    config = Config(
        name="tiny",
        model=MODEL,
        data=DataConfig(source="sotu:4", tokenizer="byte", seq_len=32, held_out=0.3),
        optimizer=OptimizerConfig(peak_lr=1e-2),
        batch_size=8,
        steps=4,
        placement=Placement(
            runs=runs,
            data_dir=data_dir,
            loss_chunk=16,
            log_every=2,
            save_every=2,
            eval_batch_size=256,
        ),
    )
    return replace(config, **changes)


def replace(config: Any, **changes: Any) -> Any:
    """`dataclasses.replace` that takes dotted names of nested fields."""
    for path, value in changes.items():
        field, _, rest = path.partition(".")
        inner = replace(getattr(config, field), **{rest: value}) if rest else value
        config = dataclasses.replace(config, **{field: inner})
    return config


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, those of its loops and calls too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            if inner := getattr(value, "jaxpr", None):
                yield from equations(inner)


@pytest.fixture
def above_all_runs(tmp_path_factory, monkeypatch):
    """The current directory holds all that tests write, so evaluation uses the places that runs name."""
    monkeypatch.chdir(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session")
def compiler() -> str:
    """Of C++, for the kernels for CPUs; tests need one, as some of torch's do."""
    assert library.load() is None
    return next(filter(None, map(shutil.which, library._COMPILERS)))


@pytest.fixture
def devices(monkeypatch):
    """Pretends the machine has only the first n devices."""
    all_devices = jax.devices()

    def use(n: int) -> list[Any]:
        monkeypatch.setattr(jax, "devices", lambda *_: all_devices[:n])
        monkeypatch.setattr(jax, "device_count", lambda *_: n)
        return all_devices[:n]

    use(1)
    return use
