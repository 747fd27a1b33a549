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
        "demo/h32_mqa",
        "demo/h32_mqa_cla2",
        "demo/h16_mqa",
    ]


def test_the_demo_compares_half_a_cache_with_half_a_cache():
    mqa, cla2, narrow = (config.model for config in experiments.find("demo"))
    resident = [costs.kv_bytes(model, 128).resident for model in (mqa, cla2, narrow)]
    assert resident == [1024, 512, 512]
    assert mqa.n_heads * mqa.d_head == cla2.n_heads * cla2.d_head == narrow.n_heads * narrow.d_head
    fields = ("n_layers", "d_model", "d_ff", "vocab_size")
    for field in fields:
        assert len({getattr(model, field) for model in (mqa, cla2, narrow)}) == 1
