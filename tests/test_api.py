"""What `import cla_jax` offers."""

import dataclasses
import inspect
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import cla_jax
from tests.test_imports import loaded_after

NOTEBOOK = Path(__file__).parents[1] / "docs/first_run.ipynb"


@pytest.mark.parametrize("name", cla_jax.__all__)
def test_public_names_are_there_and_documented(name):
    """With what they raise; of classes, each public method and property has a docstring too."""
    public = getattr(cla_jax, name)
    documented = inspect.getdoc(public)
    assert documented
    if inspect.isclass(public):
        own = {key: value for key, value in vars(public).items() if not key.startswith("_")}
        fields = {field.name for field in dataclasses.fields(public)}
        assert [
            key for key in own.keys() - fields if not inspect.getdoc(getattr(public, key))
        ] == []
    else:
        assert re.search(r"Raises|errors are those of", documented)


def test_names_of_no_use_to_anyone_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'Decoders'"):
        cla_jax.Decoders  # noqa: B018


def test_a_config_is_changed_without_jax():
    assert "jax" not in loaded_after("import cla_jax; cla_jax.Config, cla_jax.replaced")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: cla_jax.compare_runs("runs/x"), "must be a list"),
        (lambda: cla_jax.compare_runs([]), "runs is empty"),
        (lambda: cla_jax.train_run("smoke.tiny"), "'smoke.tiny' is not a config"),
        (
            lambda: object.__new__(cla_jax.Decoder).generate(["x"], max_tokens=8),
            "unknown option of Decoder.generate 'max_tokens'; did you mean .*new_tokens",
        ),
    ],
)
def test_arguments_that_cannot_be_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


def printed(cell) -> str:
    return "".join(output.text for output in cell.outputs if output.get("name") == "stdout")


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (first,) = [cell for cell in notebook.cells if "steps" in cell.source]
    first.source = first.source.replace('"steps": 200', '"steps": 4')
    NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    ).execute()
    *_, scores, text, picture = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert printed(scores).count("perplexity") == 6
    assert printed(text).startswith("Fellow citizens")
    assert "image/png" in picture.outputs[-1].data
    rows = {row.name: row for row in cla_jax.compare_runs([tmp_path / "runs"])}
    assert 2 * rows["cla2"].kv_bytes == rows["mqa"].kv_bytes
    scored = cla_jax.evaluate_run(tmp_path / "runs/notebook/mqa", caches=["int8"])
    assert scored["full"].scores.perplexity == rows["mqa"].scores.perplexity
