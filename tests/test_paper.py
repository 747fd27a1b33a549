"""The paper's printed results, beside our rows and beside the differences that the paper states."""

import pytest

import experiments
from cla_jax import costs
from experiments import cla_1b, cla_1b_tuned, cla_3b, paper

STUDIES = {"cla_1b": cla_1b, "cla_1b_tuned": cla_1b_tuned, "cla_3b": cla_3b}
ROWS = {f"{study}.{row.__name__}" for study, module in STUDIES.items() for row in module.ROWS}


def test_every_row_of_the_studies_is_printed_in_the_paper():
    assert set(paper.PRINTED) == ROWS
    assert len(ROWS) == 29


@pytest.mark.parametrize("line", paper.PRINTED.values(), ids=lambda line: line.row)
def test_our_rows_have_the_printed_bytes_and_rates(line):
    (config,) = experiments.find(line.row)
    assert costs.kv_bytes(config.model, config.data.seq_len).resident == line.kv_bytes
    assert config.optimizer.peak_lr == line.peak_lr
    assert len(line.tasks) in (0, len(paper.TASKS))


@pytest.mark.parametrize(
    "stated", paper.DIFFERENCES, ids=lambda d: f"{d.row}-{d.other}-{d.measure}"
)
def test_the_stated_differences_are_those_of_the_tables(stated):
    ours, theirs = (
        getattr(paper.PRINTED[row], stated.measure) for row in (stated.row, stated.other)
    )
    assert ours - theirs == pytest.approx(stated.value, abs=1e-9)
