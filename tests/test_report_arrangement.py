"""What a user asks of a comparison: rows, differences to a baseline, further columns, the order."""

import csv
import io
import math

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from cla_jax import report
from cla_jax.config import OptimizerConfig
from cla_jax.report import page, pareto
from cla_jax.runs import find_runs
from launch import compare
from tests.test_report import evaluate, log, make


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """They take most of the time of a report."""
    monkeypatch.setattr(report, "_figures", lambda _: {})
    monkeypatch.setattr(page.pareto, "plot", lambda *_, **__: Figure())
    monkeypatch.setattr(page, "_inline", lambda *_: "")


@pytest.fixture
def study(tmp_path):
    """Two maps and two seeds of each, in directories of their own."""
    bits = {("a", 0): 2.0, ("a", 1): 2.2, ("b", 0): 1.9, ("b", 1): 2.0}
    for (name, seed), scored in bits.items():
        run = make(
            tmp_path / "runs",
            f"{name}/x.seed-{seed}",
            kv_map={"a": "identity", "b": "cla:2"}[name],
            seed=seed,
        )
        evaluate(run, 10.0, bits_per_byte=scored)
        log(run)
    return tmp_path / "runs"


def compared(capsys, study, *flags):
    """The table of the terminal, and what results.csv, report.html and results.tex hold."""
    compare.main([str(study), "--out", str(study), *flags])
    shown = capsys.readouterr().out
    with (study / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    return shown, lines, (study / "report.html").read_text(), (study / "results.tex").read_text()


def refused(capsys, study, *flags):
    with pytest.raises(SystemExit) as stop:
        compare.main([str(study), "--out", str(study), *flags])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_differences_to_a_baseline_are_paired_by_seed_and_everywhere(capsys, study):
    shown, lines, page_, latex = compared(capsys, study, "--baseline", "a/x")
    assert [line["run"] for line in lines] == ["b/x (2 seeds)", "a/x (2 seeds)"]
    ours, base = lines
    # -0.1 and -0.2; the seeds of a row are farther apart than that.
    assert float(ours["difference"]) == pytest.approx(-0.15)
    assert float(ours["difference_sd"]) == pytest.approx(0.05 * 2**0.5)
    assert float(base["difference"]) == 0
    for text in (shown, page_):
        assert "-0.1500 ± 0.0707" in text
        assert "baseline" in text
        assert "minus those of a/x (2 seeds)" in " ".join(text.split())
    assert "-0.1500" in latex
    # A run of a row, by its name or its path, stands for the row.
    for name in ("a/x.seed-1", str(study / "a" / "x.seed-1")):
        assert compared(capsys, study, "--baseline", name)[1] == lines


def test_runs_of_different_text_have_no_difference(capsys, study):
    for seed in (0, 1):
        run = make(study, f"c/x.seed-{seed}", source="sotu:9", seed=seed)
        evaluate(run, 10.0)
    _, lines, _, _ = compared(capsys, study, "--baseline", "a/x")
    assert {line["difference"] for line in lines} == {""}


def test_a_row_for_each_value_of_a_field_wherever_its_runs_lie(capsys, study):
    again = make(study, "elsewhere/x.seed-2", kv_map="cla:2", seed=2)
    evaluate(again, 10.0, bits_per_byte=2.1)
    log(again)
    asked = ("--group-by", "model.kv_map", "--over", "seed")
    shown, lines, page_, latex = compared(capsys, study, *asked)
    assert [(line["run"], line["seeds"]) for line in lines] == [
        ("kv_map cla:2 (3 seeds)", "3"),
        ("kv_map identity (2 seeds)", "2"),
    ]
    assert float(lines[0]["bits_per_byte"]) == pytest.approx(2.0)
    for text in (shown, page_, latex):
        assert "cla:2 (3 seeds)" in text
    lines = compared(capsys, study, *asked, "--baseline", "kv_map identity")[1]
    assert float(lines[0]["difference"]) == pytest.approx(-0.15)  # of the seeds that both have


def test_runs_that_cannot_be_one_row_are_named(capsys, study):
    line = refused(capsys, study, "--group-by", "data.source")
    assert "the runs with source sotu differ in model.kv_map too" in line
    line = refused(
        capsys, study, "--group-by", "data.source", "--over", "seed", "--over", "model.kv_map"
    )
    assert "have 256 to 512 KV bytes per token: they cannot be one row" in line
    make(study, "c/y", kv_map="cla:2")
    assert "b/x.seed-0 and c/y have the same seed 0" in refused(
        capsys, study, "--group-by", "model.kv_map"
    )


def test_fields_that_differ_are_columns_and_the_order_is_asked_for(capsys, study):
    for rate in (0.002, 0.001):
        run = make(study, f"lr/{rate}", kv_map="cla:2", optimizer=OptimizerConfig(peak_lr=rate))
        evaluate(run, 10.0, bits_per_byte=2.0 + rate)
        log(run)
    shown, lines, page_, _ = compared(capsys, study, "--sort", "optimizer.peak_lr")
    rates = [float(line["peak_lr"]) for line in lines]
    assert rates == sorted(rates)
    assert rates[-2:] == [0.001, 0.002]
    names = [line["run"] for line in lines]
    for text in (shown, page_.replace("<wbr>", "")):
        table = text[text.index("peak_lr") :]
        assert [table.index(name) for name in names] == sorted(table.index(name) for name in names)
    assert "optimizer." in shown
    assert [line["run"] for line in compared(capsys, study, "--sort", "bits_per_byte")[1]] == [
        *("b/x (2 seeds)", "lr/0.001", "lr/0.002", "a/x (2 seeds)"),
    ]
    rows = report.arrangement.merged(report.read(find_runs([str(study)])), report.View())
    arranged = report.arrangement.arrange(rows, report.View())
    out = io.StringIO()
    Console(file=out, width=80).print(report.table(rows, 80, arranged))
    assert "peak_lr" not in out.getvalue()  # the first to go in a narrow terminal
    assert "optimizer.\npeak_lr" in page.columns(rows, arranged)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ("--group-by", "model.kvmap"),
            "unknown field of --group-by 'model.kvmap'; did you mean model.kv_map",
        ),
        (("--over", "seet"), "unknown field of --over 'seet'; did you mean seed"),
        (("--sort", "bits"), "unknown field of --sort 'bits'; did you mean"),
        (("--baseline", "b/y"), "unknown run of --baseline 'b/y'; did you mean b/x"),
        (("--study", "small.main", "--group-by", "seed"), "--study defines which runs belong"),
    ],
)
def test_bad_names_give_the_nearest_match(capsys, study, flags, words):
    assert words in refused(capsys, study, *flags)


def test_rows_over_another_field_are_named_by_what_they_have_in_common(capsys, tmp_path):
    for rate in (0.001, 0.002):
        for seed in (0, 1):
            run = make(
                tmp_path / "runs",
                f"x/peak_lr={rate},seed={seed}",
                seed=seed,
                optimizer=OptimizerConfig(peak_lr=rate),
            )
            evaluate(run, 10.0)
            log(run)
    flags = ("--over", "optimizer.peak-lr", "--baseline", "seed 0")  # as flags spell a field
    shown, lines, _, _ = compared(capsys, tmp_path / "runs", *flags)
    assert [line["run"] for line in lines] == ["seed 0 (2 runs)", "seed 1 (2 runs)"]
    assert "pairs of runs with equal optimizer.peak_lr" in " ".join(shown.split())


def test_a_row_of_one_run_has_the_name_of_its_group_and_what_is_left_out_is_said(capsys, tmp_path):
    for name, kv_map, last in (("a", "identity", 30), ("b", "cla:2", 30), ("c", "cla:2", 12)):
        run = make(tmp_path / "runs", f"x/{name}", kv_map=kv_map, seed=ord(name))
        log(run, last, evaluated=9.0 if last == 30 else None)
    flags = ("--group-by", "model.kv_map", "--baseline", "kv_map identity", "--sort", "difference")
    shown, lines, _, _ = compared(capsys, tmp_path / "runs", *flags)
    assert [line["run"] for line in lines] == ["kv_map cla:2 (1 seed)", "kv_map identity (1 seed)"]
    assert "c is left out of the mean over seeds: no evaluation" in shown
    assert "+0.0000*" in shown  # from training, as the scores are
    assert "--sort difference needs --baseline" in refused(
        capsys, tmp_path / "runs", "--sort", "difference"
    )


def test_an_svg_does_not_depend_on_the_last_bits_of_its_layout():
    """These differ between processors; a clip path was named by them."""

    def drawn(left: float) -> bytes:
        figure = Figure()
        figure.add_axes((left, 0.1, 0.8, 0.8)).plot([0, 1], [0, 1])
        return pareto.saved(figure, "svg")

    assert drawn(0.1) == drawn(math.nextafter(0.1, 1))
    assert drawn(0.1) != drawn(0.11)
    assert b"clip-path" in drawn(0.1)
