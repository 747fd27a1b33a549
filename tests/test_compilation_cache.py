"""Compiled programs kept on disk."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax._src import compilation_cache as jax_cache

from cla_jax.runs import Run
from launch import compilation_cache

ROOT = Path(__file__).parents[1]


@pytest.fixture
def settings(monkeypatch):
    """What `enable` sets, written down instead; the suite has a place of its own for programs."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    taken = {}
    monkeypatch.setattr(jax.config, "update", taken.__setitem__)
    return taken


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cla_jax"


def test_programs_are_kept_in_a_place_of_the_user(cache_home, settings, monkeypatch):
    compilation_cache.enable()
    assert settings["jax_compilation_cache_dir"] == str(cache_home / "programs")
    assert cache_home.stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # as the standard says, it does not count
    monkeypatch.setenv("HOME", str(cache_home / "home"))
    assert compilation_cache.directory() == cache_home / "home" / ".cache" / "cla_jax"


def test_the_environment_has_the_last_word(settings, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    compilation_cache.enable()
    assert not settings


def test_a_place_that_others_can_write_to_is_not_used(cache_home, settings):
    cache_home.mkdir()
    cache_home.chmod(0o777)
    assert compilation_cache.directory() is None
    compilation_cache.enable()
    assert not settings


def test_no_place_at_all_means_no_programs(settings, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/none")
    compilation_cache.enable()
    assert not settings


def test_a_program_under_another_key_or_damaged_is_none(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(jax_cache, "get_file_cache", jax_cache.get_file_cache)
    compilation_cache._check_contents()
    compilation_cache._check_contents()  # once is enough
    found = jax_cache.get_file_cache(str(tmp_path))
    assert found is not None
    cache, _ = found
    file = lambda key: tmp_path / f"{key}-checked-cache"
    for key in ("one", "two"):
        cache.put(key, key.encode() * 100)
    assert (cache.get("one"), cache.get("three")) == (b"one" * 100, None)
    assert sorted(path.name for path in tmp_path.glob("*-cache")) == [
        "one-checked-cache",
        "two-checked-cache",
    ]
    for harm in (
        lambda: file("one").write_bytes(file("two").read_bytes()),
        lambda: file("one").write_bytes(file("one").read_bytes()[:-1]),
        lambda: file("one").write_bytes(b""),
    ):
        harm()
        caplog.clear()
        assert cache.get("one") is None
        assert "damaged" in caplog.text
        cache.put("one", b"compiled again")
        assert cache.get("one") == b"compiled again"


@pytest.mark.slow
def test_a_second_start_compiles_nothing_and_damage_only_costs_time(tmp_path):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment["XDG_CACHE_HOME"] = str(tmp_path / "cache")
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
    kept = {
        file: file.read_bytes()
        for file in (tmp_path / "cache" / "cla_jax" / "programs").glob("*-cache")
    }
    assert any("train_step" in file.name for file in kept)
    if jax.__version_info__ < (0, 11):  # the first state's is of the older emitters
        assert not any("initial" in file.name for file in kept)
    assert "Persistent compilation cache hit for 'jit_train_step'" in start("b")
    assert not (tmp_path / ".programs").exists()
    # Damage, and another program's bytes under a name.
    contents = list(kept.values())
    for file, content in zip(kept, contents[1:] + contents[:1], strict=True):
        file.write_bytes(content)
    assert "Persistent compilation cache hit for 'jit_train_step'" not in start("c")
    assert losses("a") == losses("b") == losses("c")
