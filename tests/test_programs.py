"""Compiled programs kept on disk."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from cla_jax.runs import Run
from launch import programs

ROOT = Path(__file__).parents[1]


@pytest.fixture
def settings(monkeypatch):
    """What `remember` sets, written down instead; the suite has a place of its own for programs."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    taken = {}
    monkeypatch.setattr(jax.config, "update", taken.__setitem__)
    return taken


def test_programs_are_kept_beside_the_runs(tmp_path, settings):
    programs.remember(tmp_path / "not" / "yet")
    assert settings["jax_compilation_cache_dir"] == str(tmp_path / "not" / "yet" / ".programs")


def test_a_bucket_has_no_limit(settings):
    # The limit needs a lock that an object store does not have.
    programs.remember("gs://bucket/runs")
    assert settings["jax_compilation_cache_dir"] == "gs://bucket/runs/.programs"
    assert "jax_compilation_cache_max_size" not in settings


def test_the_environment_has_the_last_word(tmp_path, settings, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    programs.remember(tmp_path)
    assert not settings


def test_runs_that_are_only_read_get_nothing(tmp_path, settings, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    programs.remember(tmp_path)
    assert not settings


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_damage_only_costs_time(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler"}
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

    def start(name: str) -> str:
        command = [sys.executable, "-m", "launch.train", "smoke", "--name", name, "--steps", "2"]
        command += ["--model.n-layers", "1", "--model.kv-map", "identity"]
        command += [
            "--placement.runs",
            str(tmp_path),
            "--placement.data-dir",
            str(tmp_path / "data"),
        ]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        return done.stderr

    def losses(name: str) -> list[float]:
        return [r["loss"] for r in Run(tmp_path / name).read_metrics() if "loss" in r]  # pyright: ignore

    start("a")
    kept = {file: file.read_bytes() for file in (tmp_path / ".programs").glob("*-cache")}
    assert any("train_step" in file.name for file in kept)
    if jax.__version_info__ < (0, 11):  # the first state's is of the older emitters
        assert not any("initial" in file.name for file in kept)
    assert "Persistent compilation cache hit for 'jit_train_step'" in start("b")
    for file, content in kept.items():
        file.write_bytes(content[: len(content) // 2])
    assert "Persistent compilation cache hit for 'jit_train_step'" not in start("c")
    assert losses("a") == losses("b") == losses("c")
