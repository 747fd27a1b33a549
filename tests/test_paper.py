"""The paper's printed results, beside our rows and beside the differences that the paper states."""

import re
from pathlib import Path

import jax
import pytest

import experiments
from cla_jax import costs
from cla_jax.model.transformer import Transformer
from experiments import cla_1b, cla_1b_tuned, cla_3b, one_gpu, paper, paper_docs

ROOT = Path(__file__).parents[1]

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


@pytest.mark.parametrize("line", paper.PRINTED.values(), ids=lambda line: line.row)
def test_our_rows_have_the_parameters_of_their_dimensions(line):
    """Counted by hand, in closed form, and as arrays."""
    (config,) = experiments.find(line.row)
    model = config.model
    D, heads = model.d_model, model.n_heads * model.d_head
    block = 2 * D * heads + 3 * D * model.d_ff + 2 * D  # queries, outputs, MLP, two norms
    made = 2 * D * model.n_kv_heads * model.d_head + D  # keys, values, their norm
    layers = line.kv_bytes // (2 * 2 * model.n_kv_heads * model.d_head)  # 16 bits
    counted = model.n_layers * block + layers * made + D
    count = costs.parameters(model)
    assert (count.non_embedding, count.total) == (counted, counted + model.vocab_size * D)
    live = jax.eval_shape(lambda: Transformer(jax.random.key(0), model))
    assert count.total == sum(leaf.size for leaf in jax.tree.leaves(live))


@pytest.mark.parametrize(
    "stated", paper.DIFFERENCES, ids=lambda d: f"{d.row}-{d.other}-{d.measure}"
)
def test_the_stated_differences_are_those_of_the_tables(stated):
    ours, theirs = (
        getattr(paper.PRINTED[row], stated.measure) for row in (stated.row, stated.other)
    )
    assert ours - theirs == pytest.approx(stated.value, abs=1e-9)


def test_the_page_of_tables_is_what_the_rows_say():
    made = paper_docs.document()
    assert made == (ROOT / "docs" / "paper.md").read_text(), "python -m experiments.paper_docs"
    for line in paper.PRINTED.values():
        assert made.count(f"| `{line.row}` |") == 1
    for command in re.findall(r"python -m launch\.sweep ([\w.]+)", made):
        assert callable(experiments.find_sweep(command))
    for link in re.findall(r"\]\(((?!http)[^)]*)\)", made):
        assert (ROOT / "docs" / link).exists(), link


def test_the_hours_are_those_of_a_pod_at_the_assumed_share_of_its_peak():
    (config,) = experiments.find("cla_1b.h128_mqa_cla2")
    tokens = config.tokens_per_step * config.steps
    flops = costs.train_flops_per_token(config.model, config.data.seq_len) * tokens
    assert paper_docs.hours([config]) == pytest.approx(
        flops / (0.4 * 197e12 * 256 * 3600), rel=1e-3
    )


def test_every_sweep_of_one_gpu_takes_less_than_forty_minutes():
    for sweep in (one_gpu.tuning, one_gpu.main):
        configs = [config for _, config in sweep()]
        assert sum(map(one_gpu.seconds, configs)) < 40 * 60
        for config in configs:
            assert 10e6 < costs.parameters(config.model).total < 60e6
    sizes = [costs.kv_bytes(row().model, 1024).resident for row in one_gpu.ROWS]
    assert sizes == [2048, 2048, 1024, 1024, 2048]


@pytest.mark.parametrize("name", ["small.main", "small.maps", "heads.order", "one_gpu.main"])
def test_a_declared_study_has_a_run_for_each_row_and_seed(name):
    declared = experiments.find_study(name)
    assert len(declared.trials) == sum(declared.study.rows.values())
    assert declared.study.claims
    for (row, seed), config in declared.trials.items():
        assert (config.name, config.seed) == (f"{name.replace('.', '/')}/{row}.seed-{seed}", seed)
    with pytest.raises(ValueError, match=rf"unknown declared study '{name}x'; did you mean"):
        experiments.find_study(f"{name}x")
