import pytest

import experiments
from cla_jax import costs
from tests import golden


@pytest.mark.parametrize("name", experiments.rows())
def test_resolved_config_is_the_golden_one(name):
    file = golden.DIRECTORY / f"{name}.json"
    assert file.exists(), f"new experiment {name}: run `make golden` and commit {file.name}"
    assert golden.text(name) == file.read_text(), (
        f"experiment {name} has changed; if that is meant, run `make golden` and say why in the commit"
    )


def test_no_golden_file_is_left_over():
    assert {file.stem for file in golden.DIRECTORY.glob("*.json")} == set(experiments.rows())


def test_every_experiment_is_named_after_its_function():
    for name, row in experiments.rows().items():
        assert row().name == name.replace(".", "/")
        assert row.__doc__


def test_unknown_names_get_the_nearest():
    with pytest.raises(
        ValueError, match=r"'cla_1b.h128_mqa_cla5'; did you mean cla_1b.h128_mqa_cla"
    ):
        experiments.find("cla_1b.h128_mqa_cla5")
    with pytest.raises(ValueError, match=r"'dmo'; did you mean demo"):
        experiments.find("dmo")


def test_a_study_is_all_its_rows():
    assert [config.name for config in experiments.find("demo")] == [
        "demo/h16_mqa",
        "demo/h16_mqa_cla2",
        "demo/h8_mqa",
    ]


def test_the_demo_compares_half_a_cache_with_half_a_cache():
    mqa, cla2, narrow = (config.model for config in experiments.find("demo"))
    resident = [costs.kv_bytes(model, 128).resident for model in (mqa, cla2, narrow)]
    assert resident == [512, 256, 256]
    assert mqa.n_heads * mqa.d_head == cla2.n_heads * cla2.d_head == narrow.n_heads * narrow.d_head
    fields = ("n_layers", "d_model", "d_ff", "vocab_size")
    for field in fields:
        assert len({getattr(model, field) for model in (mqa, cla2, narrow)}) == 1


MINE = """
import dataclasses
from experiments import smoke, sweeping

def row():
    return dataclasses.replace(smoke.tiny(), name="mine/row", steps=4)

def unlisted():
    ''' '''
    return dataclasses.replace(row(), name="mine/unlisted")

def grid():
    return sweeping.grid(row(), {"seed": range(2)})

ROWS = (row,)
SWEEPS = (grid,)
"""


@pytest.fixture
def mine(tmp_path):
    """A file of experiments that is no module of this directory; nothing in it has a docstring."""
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def test_a_file_anywhere_is_a_study(mine):
    assert [config.name for config in experiments.find(str(mine))] == ["mine/row"]
    assert [config.name for config in experiments.find(f"{mine}:unlisted")] == ["mine/unlisted"]
    assert [name for name, _ in experiments.find_sweep(f"{mine}:grid")()] == ["seed=0", "seed=1"]
    assert [name for name, _ in experiments.find_sweep(str(mine))()] == ["row"]
    for name, words in {
        f"{mine}:rwo": "unknown experiment 'mine.rwo'; did you mean mine.row",
        f"{mine}:grid": "mine.grid is no experiment: it returns generator",
        f"{mine.parent / 'other.py'}:row": "other.py does not exist",
    }.items():
        with pytest.raises(ValueError, match=words):
            experiments.find(name)
    (mine.parent / "empty.py").write_text("")
    with pytest.raises(ValueError, match="lists nothing in ROWS"):
        experiments.find(str(mine.parent / "empty.py"))


def test_a_file_is_taken_wherever_a_name_is(mine, tmp_path, capsys):
    from launch import memory, plan, status, sweep, train
    from launch.sweeps import trials

    assert [config.steps for config in train.parse([f"{mine}:row", "--seed", "3"])] == [4]
    assert list(memory.models([str(mine), f"{mine}:unlisted"])) == ["mine/row", "mine/unlisted"]
    arguments = plan.Arguments(names=(f"{mine}:row",))
    assert [config.name for config in plan._configs(arguments, [])] == ["mine/row"]
    runs = ["--placement.runs", str(tmp_path / "runs")]
    with pytest.raises(ValueError, match=r"mine\.py:row yields no trials: a sweep is a generator"):
        trials.make(f"{mine}:row", overrides=runs)
    with pytest.raises(ValueError, match=r"mine\.py:grid was not launched from here"):
        status.find(f"{mine}:grid", str(tmp_path / "runs"))
    made = trials.make(f"{mine}:grid", overrides=runs)
    assert (made.sweep, made.directory) == ("mine.grid", tmp_path / "runs/mine/grid")
    sweep.main([f"{mine}:grid", "--dry-run", "--", *runs])
    assert "2 of 2 trials would be submitted" in capsys.readouterr().out
    (tmp_path / "runs/mine/grid/.sweep").mkdir(parents=True)
    assert status.find(f"{mine}:grid", str(tmp_path / "runs")) == tmp_path / "runs/mine/grid"


def test_modules_are_found_by_themselves(monkeypatch, mine):
    """And one whose functions say nothing about themselves is listed all the same."""
    from launch import sweep, train

    monkeypatch.setattr(experiments, "__path__", [*experiments.__path__, str(mine.parent)])
    assert "mine.row" in experiments.rows()
    assert {"mine", "mine.grid"} <= set(experiments.sweeps())
    assert "sweeping" not in experiments.sweeps()  # it has no rows
    for listing in (lambda: train.parse(["--help"]), lambda: sweep.main(["--help"])):
        with pytest.raises(SystemExit) as stop:
            listing()
        assert stop.value.code == 0
