"""Imports run one way, heavy ones stay where they are needed, and the library reads no argv."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DESIGN = ROOT / "docs/design.md"
# From the lowest: a module imports only from layers before its own, or from its own.
LAYERS = [
    set(names.split(", "))
    for names in re.findall(r'^ +level\d+\["(.+)"\]$', DESIGN.read_text(), flags=re.MULTILINE)
]
ORDER = {name: i for i, layer in enumerate(LAYERS) for name in layer}


FOLDERS = ("cla_jax", "experiments", "launch")
MODULES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))


def layer_of(parts: tuple[str, ...]) -> str | None:
    """cla_jax.model.layers -> model; launch.cli -> launch; None for cla_jax itself and others."""
    if parts[0] == "cla_jax":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ORDER else None


def imported(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield (*node.module.split("."), alias.name)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_run_one_way(file):
    here = layer_of(file.relative_to(ROOT).with_suffix("").parts)
    if here in (None, "__init__"):
        return
    assert here in ORDER, f"{file}: give {here} a place in the picture of docs/design.md, section 3"
    for parts in imported(ast.parse(file.read_text())):
        there = layer_of(parts)
        if there in ORDER:
            assert ORDER[there] <= ORDER[here], f"{here} imports {'.'.join(parts)}"


def test_every_package_is_installed():
    """An editable installation finds what the list leaves out; a wheel does not."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"][
        "packages"
    ]
    folders = {file.parent.relative_to(ROOT) for file in MODULES}
    assert sorted(declared) == sorted(".".join(folder.parts) for folder in folders)


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_only_launch_reads_argv_and_environment(file):
    if file.is_relative_to(ROOT / "launch"):
        return
    text = file.read_text()
    for word in ("sys.argv", "os.environ", "os.getenv", "jax.distributed"):
        assert word not in text, f"{file} uses {word}"


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return set(run.stdout.split())


def test_configs_need_no_jax():
    assert "jax" not in loaded_after("import experiments, cla_jax.costs; experiments.find('demo')")


def test_training_loads_nothing_heavy_that_it_does_not_use():
    loaded = loaded_after("import cla_jax.evaluate, cla_jax.train")
    assert "jax" in loaded
    for package in (
        *("tensorflow_datasets", "array_record", "grain", "tyro"),
        *("matplotlib", "tensorflow", "torch", "wandb"),
    ):
        assert package not in loaded, package


def test_foreign_formats_are_read_and_written_without_the_libraries_of_others():
    """Here they may be installed."""
    loaded = loaded_after(
        "import launch.convert, cla_jax.interop.export, cla_jax.interop.gguf, cla_jax.interop.hf"
    )
    for package in ("torch", "transformers", "safetensors", "gguf", "lm_eval"):
        assert package not in loaded, package


def test_the_conversion_command_starts_without_jax():
    assert "jax" not in loaded_after("import launch.convert")
