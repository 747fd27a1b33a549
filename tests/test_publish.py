"""Copies of runs for a repository: reports read them as they read the runs."""

import shutil

import pytest
from etils import epath

from cla_jax import runs
from cla_jax.runs import Run
from launch import publish
from tests.sealed import make_older, write_metrics
from tests.test_report import evaluate, make, rows


def trained(directory, name, last=70):
    """A run of 70 steps, or the beginning of one."""
    run = make(directory, name, steps=70)
    records = [{"step": step, "loss": 5 - 0.01 * step} for step in range(1, last + 1)]
    records.insert(50, {"step": 50, runs.SAVED: 50})
    if last == 70:
        records.append({"step": 70, "held_out_loss": 3.0, "perplexity": 9.0, "bits_per_byte": 1.1})
    write_metrics(run, records)
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "00000050.json").write_text("{}")
    return run


def test_a_copy_is_reported_as_the_run_is(tmp_path, capsys):
    runs_, copies = tmp_path / "runs", tmp_path / "copies"
    first = trained(runs_, "x/a")
    evaluate(first, 8.0, step=70)
    older = trained(runs_, "x/older")
    make_older(older)
    trained(runs_, "x/begun", last=60)
    publish.main([str(runs_ / "x"), str(copies)])
    assert "begun: skipped, because it is not finished" in capsys.readouterr().out
    assert sorted(path.name for path in copies.iterdir()) == ["a", "older"]
    for name in ("a", "older"):
        copy = Run(epath.Path(copies / name))
        problems: list[str] = []
        steps = [record["step"] for record in copy.read_metrics(problems)]
        assert (steps, problems, copy.missing_records().problems) == ([1, 32, 64, 70], [], ())
        (ours,), (theirs,) = rows(copy), rows(Run(epath.Path(runs_ / "x" / name)))
        assert ours.evaluation == theirs.evaluation
        assert not ours.altered
    publish.main([str(runs_ / "x"), str(copies), "--every", "35"])  # again: replaced
    assert [r["step"] for r in copy.read_metrics()] == [1, 35, 70]


def test_altered_runs_and_places_that_are_taken_are_refused(tmp_path, capsys):
    run = trained(tmp_path / "runs", "x/a")
    lines = run.metrics.read_text().splitlines(keepends=True)
    run.metrics.write_text("".join(lines[:10] + lines[11:]))
    with pytest.raises(SystemExit):
        publish.main([str(run.path), str(tmp_path / "copies")])
    assert "1 line before line 11 is missing" in capsys.readouterr().err
    assert not (tmp_path / "copies").exists()
    run.metrics.write_text("".join(lines))
    publish.main([str(run.path), str(tmp_path / "copies")])
    other = trained(tmp_path / "others", "y/a")
    with pytest.raises(SystemExit):
        publish.main([str(other.path), str(tmp_path / "copies")])
    assert "contains another run and is not overwritten" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        publish.main([str(run.path), str(tmp_path / "copies" / "a")])
    assert "copies/a is a run itself" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        publish.main([str(run.path), str(tmp_path / "copies"), "--every", "0"])
    assert "every = 0 must be positive" in capsys.readouterr().err


def test_no_run_is_replaced_by_its_own_copy(tmp_path, capsys):
    run = trained(tmp_path / "runs", "x/a")
    before = run.metrics.read_text()
    (tmp_path / "link").symlink_to(run.path.parent)
    for source, target in ((run.path, run.path.parent), (run.path.parent,) * 2, (run.path, "link")):
        with pytest.raises(SystemExit):
            publish.main([str(source), str(tmp_path / target)])
        assert "would replace it: name another directory" in capsys.readouterr().err
    assert run.metrics.read_text() == before
    publish.main([str(run.path), str(tmp_path / "runs")])  # a directory above is none of its own
    assert (tmp_path / "runs" / "a" / "metrics.jsonl").exists()
    shutil.rmtree(tmp_path / "runs" / "a")
    for every in ("35", "32"):  # the second time, the copy is below the source
        publish.main([str(tmp_path / "runs"), str(tmp_path / "runs" / "copies"), "--every", every])
    copy = Run(epath.Path(tmp_path / "runs" / "copies" / "a"))
    assert [record["step"] for record in copy.read_metrics()] == [1, 32, 64, 70]


@pytest.mark.parametrize("missing", [False, True])
def test_a_run_with_a_missing_file_does_not_keep_others_from_being_copied(
    tmp_path, capsys, missing
):
    broken, whole = trained(tmp_path / "runs", "x/a"), trained(tmp_path / "runs", "x/b")
    for run in (broken, whole):
        evaluate(run, 8.0, step=70)
    if missing:
        (broken.path / "tokenizer.json").unlink()
        with pytest.raises(SystemExit):
            publish.main([str(tmp_path / "runs" / "x"), str(tmp_path / "copies")])
        assert "tokenizer.json" in capsys.readouterr().err
    else:
        publish.main([str(tmp_path / "runs" / "x"), str(tmp_path / "copies")])
    copies = [run.path.name for run in runs.find_runs([tmp_path / "copies"])]
    assert copies == ["a", "b"][missing:]


@pytest.mark.parametrize("name", ["eval", "metrics.jsonl"])
def test_no_copy_is_written_where_a_link_leads(tmp_path, capsys, name):
    run = trained(tmp_path / "runs", "x/a")
    evaluate(run, 8.0, step=70)
    elsewhere, copy = tmp_path / "elsewhere", tmp_path / "copies" / "a"
    elsewhere.mkdir()
    copy.mkdir(parents=True)
    (copy / name).symlink_to(elsewhere)
    with pytest.raises(SystemExit):
        publish.main([str(run.path), str(tmp_path / "copies")])
    assert f"{name} is a symbolic link" in capsys.readouterr().err
    assert not list(elsewhere.iterdir())


def test_an_altered_run_does_not_keep_the_others_from_being_copied(tmp_path, capsys):
    runs_, copies = tmp_path / "runs", tmp_path / "copies"
    for name in ("x/a", "x/b", "x/c"):
        trained(runs_, name)
    for name, old, new in (("a", "1e-08", "1e-07"), ("b", '"steps"', '"step"')):
        config = runs_ / "x" / name / "config.json"
        assert old in config.read_text()
        config.write_text(config.read_text().replace(old, new, 1))
    with pytest.raises(SystemExit):
        publish.main([str(runs_ / "x"), str(copies)])
    told = capsys.readouterr().err
    assert "x/a" in told
    assert "x/b" in told
    assert [path.name for path in copies.iterdir()] == ["c"]
