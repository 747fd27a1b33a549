"""Reports: what is compared, what is drawn, and that any text may stand in a run."""

import dataclasses
import io
import itertools
import json
import math
import os
import re
import shutil
import warnings
from html import escape
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex, to_rgba
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from rich.console import Console

from cla_jax import costs, report, runs
from cla_jax.config import (
    Config,
    DataConfig,
    FromRun,
    LatentKV,
    LinearScaling,
    ModelConfig,
    Placement,
)
from cla_jax.report import Point, page, pareto, tasks
from cla_jax.report import rows as reading
from launch import compare
from tests.sealed import write_metrics

FINGERPRINT = "sotu-byte-64-abc"


def make(directory, name="tiny/a", *, source="sotu", tokenizer="{}", fingerprint=FINGERPRINT, **kw):
    model = {"n_kv_heads": 1, "d_head": 32, "kv_map": "identity"}
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    model |= {key: kw.pop(key) for key in tuple(kw) if key in known}
    config = Config(
        name=name,
        steps=kw.pop("steps", 30),
        model=ModelConfig(vocab_size=257, n_layers=4, d_model=64, d_ff=96, n_heads=4, **model),
        data=DataConfig(seq_len=64, source=source),
        placement=Placement(runs=str(directory)),
        batch_size=8,
        **kw,
    )
    return runs.open_run(config, data_fingerprint=fingerprint, tokenizer_json=tokenizer)


def evaluate(run, perplexity, *, step=30, cached=True, **other):
    full = {
        "method": "full forward",
        "step": step,
        "perplexity": perplexity,
        "bits_per_byte": math.log2(perplexity) / 4,
        "tokens": 1000,
        "bytes": 4000,
        "data_fingerprint": FINGERPRINT,
    } | other
    run.write_eval("full", full)
    if cached:
        close = {"method": "cached decoding", "cache": "dense", "perplexity": perplexity + 0.001}
        run.write_eval("cached-dense", full | close)


def log(run, last=30, *, evaluated=None, **totals):
    records = [
        {"step": step, "loss": 5 - 0.1 * step, "tokens_per_s": 1000.0 * step}
        for step in range(1, last + 1)
    ]
    if evaluated is not None:
        scores = {"held_out_loss": 3.0, "perplexity": evaluated, "bits_per_byte": 1.1}
        records.append({"step": last, **scores, **totals})
    write_metrics(run, records)


def rows(*found):
    return report.read(found)


def cells(rows, name):
    """The line of a run, or of a run and a cache, as a dict by heading."""
    line = next(cells for _, cells in reading.lines(rows) if cells[1] == name)
    return dict(zip(reading.COLUMNS, line, strict=True))


def printed(rows, width=220):
    out = io.StringIO()
    Console(file=out, width=width).print(report.table(rows))
    return out.getvalue()


def drawn(rows, width):
    """As in a terminal of a width."""
    out = io.StringIO()
    Console(file=out, width=width).print(report.table(rows, width))
    return out.getvalue()


def at(kv_bytes, quality, **kw):
    return Point(**{"label": "p", "kv_bytes": kv_bytes, "quality": quality, "series": "s"} | kw)


def plot(points, **kw):
    return pareto.plot(points, quality="perplexity", subtitle="", **kw)


def html(rows, title="title"):
    return page.html(rows, title)


# ----------------------------------------------------------------------------------- frontier


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), max_size=12))
def test_the_frontier_is_what_nothing_dominates(pairs):
    def dominated(a):
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in pairs)

    found = pareto.frontier([at(*pair) for pair in pairs])
    assert sorted(found) == [i for i, pair in enumerate(pairs) if not dominated(pair)]
    assert [pairs[i] for i in found] == sorted(pairs[i] for i in found)


def test_a_quality_that_is_not_a_number_is_on_no_frontier():
    assert pareto.frontier([at(1, math.nan), at(2, math.inf), at(3, 5.0)]) == [2]


# -------------------------------------------------------------------------------------- table


def test_the_columns_of_a_finished_run(tmp_path):
    run = make(tmp_path, kv_map="cla:2")
    evaluate(run, 12.5)
    log(run)
    model = run.config().model
    assert cells(rows(run), "a") == {
        "": "●",
        "run": "a",
        "heads\nq/kv": "4/1",
        "d_head": "32",
        "kv_map": "cla:2",
        "parameters\nno embed.": reading.human(costs.parameters(model).non_embedding),
        "parameters\ntotal": reading.human(costs.parameters(model).total),
        "KV bytes\nper token": "256",  # K and V, 1 head of 32, 2 bytes, 2 KV layers
        "perplexity": "12.500",
        "bits per\nbyte": "0.9110",
        "perplexity\ncached": "12.501",
    }
    assert "step 30/30" not in printed(rows(run))


def test_a_latent_does_not_look_like_the_heads_that_it_was_made_of(tmp_path):
    heads = make(tmp_path, "tiny/heads")
    latent = make(tmp_path, "tiny/latent", kv=LatentKV(rank=24, rope_dims=8))
    both = rows(heads, latent)
    assert cells(both, "heads")["heads\nq/kv"] == "4/1"
    assert cells(both, "latent")["heads\nq/kv"] == "4/24+8"
    words = "width of the latent"
    assert words in reading.caption(both)
    assert words not in reading.caption(rows(heads))


@pytest.mark.parametrize(
    ("width", "hidden"),
    [(200, ()), (80, ("d_head", "kv_map", "total")), (60, ("d_head", "kv_map", "total", "cached"))],
)
def test_a_narrow_terminal_shows_fewer_columns_and_those_whole(tmp_path, width, hidden):
    run = make(tmp_path, "tiny/a-long-name-of-a-run", kv_map="cla:2")
    evaluate(run, 12.5)
    log(run)
    text = drawn(rows(run), width)
    for heading in ("run", "KV bytes", "perplexity", "bits per"):
        assert re.search(rf"[ ┃]{heading} ", text)
    assert "12.500" in text
    for heading in ("d_head", "kv_map", "total", "cached"):
        assert (heading not in text) == (heading in hidden)
    assert ("further columns" in text) == bool(hidden)


def test_lines_are_sorted_by_bytes_then_perplexity_and_the_frontier_is_marked(tmp_path):
    big = make(tmp_path, "tiny/big", n_kv_heads=4)
    small = make(tmp_path, "tiny/small", kv_map="cla:4")
    worse = make(tmp_path, "tiny/worse", kv_map="cla:4")
    for run, perplexity in ((big, 10.0), (small, 11.0), (worse, 12.0)):
        evaluate(run, perplexity)
    found = [cells for _, cells in reading.lines(rows(worse, big, small))]
    assert [cells[1] for cells in found] == ["small", "worse", "big"]
    assert [cells[0] for cells in found] == ["●", "", "●"]


def test_a_run_without_evaluation_shows_dashes_and_says_what_to_do(tmp_path):
    run, other = make(tmp_path, "tiny/un evaluated"), make(tmp_path, "tiny/b")
    evaluate(other, 9.0)
    log(run)
    found = rows(run, other)
    line = cells(found, "un evaluated")
    assert [line[key] for key in ("perplexity", "bits per\nbyte", "perplexity\ncached")] == [
        "—"
    ] * 3
    command = f"python -m launch.evaluate '{run.path}'"
    assert report.notes(found) == [f"un evaluated is not evaluated: {command}"]
    assert escape(command) in html(found)
    assert [point.quality for point in reading.points(found)] == [math.inf, 9.0]


def test_what_training_measured_is_compared_until_there_is_an_evaluation(tmp_path):
    found = [make(tmp_path, f"tiny/{i}", seed=i) for i in range(3)]
    for run in found:
        log(run, evaluated=20.0 + run.config().seed)
    assert [cells(rows(*found), str(i))["perplexity"] for i in range(3)] == [
        "20.000*",
        "21.000*",
        "22.000*",
    ]
    assert cells(rows(*found), "0")[""] == "●"
    assert [point.quality for point in reading.points(rows(*found))] == [20.0, 21.0, 22.0]
    assert "*: measured during training" in reading.caption(rows(*found))
    assert "*: measured during training" in html(rows(*found))
    assert report.notes(rows(*found)) == []  # copies without checkpoints cannot be evaluated
    for run in found:
        run.checkpoints.mkdir()
    # One line, one command, and not a run that is not compared.
    study = f"python -m launch.evaluate {tmp_path / 'tiny'}"
    told = "are not evaluated (*: what training measured is shown)"
    assert report.notes(rows(*found)) == [f"3 of 3 runs {told}: {study}"]
    two = f"python -m launch.evaluate {found[0].path} {found[1].path}"
    assert report.notes(rows(*found[:2])) == [f"2 of 2 runs {told}: {two}"]
    # The later step counts; of the same step, what was evaluated apart from training.
    evaluate(found[0], 19.0, step=30)
    evaluate(found[1], 19.5, step=20)
    assert cells(rows(*found), "0")["perplexity"] == "19.000"
    assert cells(rows(*found), "1")["perplexity"] == "21.000*"
    assert report.notes(rows(found[0])) == []
    assert "*: measured during training" not in reading.caption(rows(found[0]))


@pytest.mark.parametrize(("logged", "evaluated"), [(12, None), (30, 12)])
def test_an_unfinished_run_is_marked(tmp_path, logged, evaluated):
    run = make(tmp_path)
    log(run, last=logged)
    if evaluated:
        evaluate(run, 9.0, step=evaluated)
        assert reading.points(rows(run))[0].unfinished
    assert "step 12/30" in printed(rows(run))
    assert "step 12/30" in html(rows(run))


def test_a_torn_line_of_metrics_is_skipped(tmp_path, caplog):
    run = make(tmp_path)
    log(run)
    whole = rows(run)[0].metrics
    assert not caplog.messages
    with open(run.metrics, "a") as file:
        file.write('{"step": 31, "loss": 2.')
    (row,) = rows(run)
    assert (row.metrics, row.altered) == (whole, ())
    (said,) = caplog.messages
    assert f"{run.metrics}: line 31, the last, is not whole" in said
    with open(run.metrics, "ab") as file:
        file.write(b'\n{"step": 31, "\xff": 2}\n{}\n{"stfp": 31}\n')  # damaged
    assert rows(run)[0].metrics == whole
    assert len(whole) == 30


def test_an_evaluation_without_its_scores_is_named(tmp_path):
    run = make(tmp_path)
    evaluate(run, 10.0)
    run.write_eval("full", {"step": 31})
    (row,) = rows(run)
    words = "eval/full.json: field perplexity is missing: evaluate the run again"
    assert words in report.notes([row])[0]
    assert set(row.evals) == {"cached-dense"}


def test_a_further_cache_format_is_a_line_and_a_point_of_its_own(tmp_path):
    run = make(tmp_path)
    evaluate(run, 10.0)
    record = {"perplexity": 10.2, "bits_per_byte": 0.84, "step": 30, "tokens": 1000}
    run.write_eval("cached-int8", record)
    found = rows(run)
    full, int8 = reading.points(found)
    assert (full.kv_bytes, full.quality) == (512, 10.0)
    # K and V of 4 KV layers: 32 codes and a scale of 16 bits.
    assert (int8.label, int8.kv_bytes, int8.quality) == ("a, int8", 272, 10.2)
    assert int8.series != full.series
    assert int8.colour == full.colour  # one run
    line = cells(found, "a, int8")
    assert (line["KV bytes\nper token"], line["perplexity"]) == ("272", "10.200")
    assert line["perplexity\ncached"] == "10.200"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_a_format_does_not_quantise_counts_16_bits_whatever_the_model_computes_in(
    tmp_path, dtype
):
    run = make(tmp_path, compute_dtype=dtype)
    evaluate(run, 10.0)
    for cache in ("int8", "kivi4", "bfloat16", "float32"):
        run.write_eval(f"cached-{cache}", run.evals()["full"])
    at = lambda context: {
        row.cache: row.kv_bytes for row in report.read([run], context) if row.cache or not context
    }
    # 64 tokens: none is old enough for kivi to quantise it.
    assert at(None) == {"": 512, "int8": 272, "kivi4": 512, "bfloat16": 512, "float32": 1024}
    # 128 newest tokens in full, 1,920 as 16 + 4 bytes of keys and as many of values, 4 KV layers.
    assert at(2048)["kivi4"] == 4 * (128 * 128 + 1920 * 40) / 2048 == 182
    assert at(2048)["int8"] == 272
    assert "at 2,048 tokens of context" in reading.caption(report.read([run], 2048))


def test_a_context_too_short_for_a_cache_format_is_told(tmp_path):
    run = make(tmp_path)
    evaluate(run, 10.0)
    for cache in ("int8", "kivi4"):
        run.write_eval(f"cached-{cache}", run.evals()["full"])
    (note,) = report.notes(rows(run))
    assert note.startswith("A kivi4 cache does not quantise its newest tokens")
    assert "saves nothing at 64 tokens of context and 68% at 32,768" in note
    assert "launch.compare --context 32768" in note
    note, measured = report.notes(report.read([run], 256))
    assert "saves 34% at 256 tokens" in note
    assert "a kivi4 cache was measured in windows of 64 tokens, where it saves nothing" in measured
    (measured,) = report.notes(report.read([run], 32_768))
    assert "With 32,768 tokens of context, more tokens are quantised" in measured


def test_altered_results_are_named_and_not_ranked(tmp_path, caplog):
    runs = [make(tmp_path, f"tiny/{name}") for name in "abcd"]
    for run, perplexity in zip(runs, (10.0, 9.0, 8.0, 7.0), strict=True):
        evaluate(run, perplexity, cached=False)
    edits = [
        (runs[0].path / "eval" / "full.json", '"perplexity": 10.0', '"perplexity": 1.0'),
        (runs[1].path / "config.json", '"d_ff": 96', '"d_ff": 97'),
        (runs[2].path / "tokenizer.json", "{}", "{ }"),
    ]
    for file, before, after in edits:
        text = file.read_text()
        assert before in text
        file.write_text(text.replace(before, after))
    found = rows(*runs)
    told = " ".join(report.notes(found))
    assert all(f"{file} was altered" in told for file, *_ in edits)
    assert [cells(found, name)[""] for name in "abcd"] == ["", "", "", "●"]
    assert [cells(found, name)["perplexity"] for name in "abcd"] == ["—", "—", "—", "7.000"]
    assert "was altered" in page.html(found, "x")
    assert not caplog.records  # nothing says that an edited config is used: it is not


def test_a_report_is_replaced_whole_and_not_written_through_a_link(tmp_path, monkeypatch):
    run = make(tmp_path)
    evaluate(run, 10.0)
    (out := tmp_path / "out").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("kept")
    os.symlink(precious, out / "report.html")
    report.write(rows(run), out)
    assert precious.read_text() == "kept"
    assert not os.path.islink(out / "report.html")
    before = {file.name: file.read_bytes() for file in out.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cla_jax.directories.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        report.write(rows(run), out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_cached_decoding_of_another_checkpoint_is_not_shown(tmp_path):
    run = make(tmp_path)
    evaluate(run, 10.0, step=20)
    evaluate(run, 9.0, cached=False)
    assert cells(rows(run), "a")["perplexity\ncached"] == "—"


def score(run, way, *, step=30, **accuracies):
    tasks = {
        task: {"metrics": {"acc": value, "acc_stderr": 0.01}, "n": 100, "split": "test", "shots": 0}
        for task, value in accuracies.items()
    }
    run.write_eval(f"tasks-{way}", {"step": step, "tasks": tasks})


def test_scores_of_tasks_are_a_table_of_their_own(tmp_path):
    a, b = make(tmp_path, "tiny/a"), make(tmp_path, "tiny/b<i>")
    assert tasks.table(rows(a, b)) is None
    assert "Downstream" not in page.html(rows(a, b), "x")
    score(a, "full", piqa=0.5, sciq=0.25)
    score(a, "int8", piqa=0.4375)
    score(b, "full", step=20, piqa=0.0)
    record = a.evals()["tasks-full"]
    record["tasks"]["sciq"]["metrics"] |= {"acc_norm": 0.75}
    a.write_eval("tasks-full", record)
    headings, lines = tasks.lines(rows(a, b))
    assert headings == ["run", "piqa\nacc", "sciq\nacc_norm"]
    assert lines == [
        ["a", "0.5000 ± 0.0100", "0.7500"],
        ["a, int8", "0.4375 ± 0.0100", "—"],
        ["b<i>  step 20/30", "0.0000 ± 0.0100", "—"],
    ]
    out = io.StringIO()
    Console(file=out, width=120).print(tasks.table(rows(a, b)))
    assert "b<i>  step 20/30" in out.getvalue()
    html = page.html(rows(a, b), "x")
    assert "<h2>Downstream tasks</h2>" in html
    assert '<td class="left">b&lt;i&gt;  step 20/30</td>' in html
    assert not any("comparable" in note for note in report.notes(rows(a, b)))
    record["tasks"]["piqa"] |= {"n": 7, "split": "validation"}
    a.write_eval("tasks-full", record)
    (note,) = [note for note in report.notes(rows(a, b)) if "comparable" in note]
    assert note.startswith("piqa: the scores are not comparable")
    assert "(7, 'validation', 0, None)" in note
    assert "(100, 'test', 0, None)" in note


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (999_600, "1.00M"), (1_214_000, "1.21M"), (121_400_000, "121M")],
)
def test_human_numbers(count, text):
    assert reading.human(count) == text


# --------------------------------------------------------------------------------- comparable


def two(tmp_path, a=None, b=None):
    found = make(tmp_path, "tiny/a", **(a or {})), make(tmp_path, "tiny/b", **(b or {}))
    for run in found:
        evaluate(run, 10.0)
    return rows(*found)


def test_one_tokenizer_and_text_compare_by_perplexity(tmp_path):
    found = two(tmp_path)
    assert reading.comparison(found) == reading.Comparison(measure="perplexity")
    assert report.notes(found) == []


def test_two_tokenizers_compare_by_bits_per_byte_and_say_so(tmp_path):
    found = two(tmp_path, b={"tokenizer": '{"other": 1}', "fingerprint": "sotu-bpe-64-def"})
    assert reading.comparison(found).measure == "bits_per_byte"
    assert all(point.quality == pytest.approx(math.log2(10) / 4) for point in reading.points(found))
    figure = page.plot(found)
    for told in (*report.notes(found), html(found), " ".join(t.get_text() for t in figure.texts)):
        assert "perplexities are not comparable" in told
    assert figure.axes[0].get_ylabel().startswith("held-out bits per byte")


def two_texts(directory, how):
    if how == "another source":
        return two(directory, b={"source": "sotu:9", "fingerprint": "x"})
    found = make(directory, "tiny/a"), make(directory, "tiny/b", fingerprint="x")
    for run, count in zip(found, (4000, 4001), strict=True):
        if how == "changed":
            evaluate(run, 10.0, bytes=count)
        else:
            log(run, evaluated=10.0, held_out_tokens=1000, held_out_bytes=count)
    return rows(*found)


@pytest.mark.parametrize("how", ["another source", "changed", "changed, by training"])
def test_two_texts_are_not_comparable_and_have_no_frontier(tmp_path, how):
    found = two_texts(tmp_path, how)
    compared = reading.comparison(found)
    assert (compared.measure, compared.ranked) == ("bits_per_byte", False)
    assert compared.warning.startswith("Not comparable")
    assert compared.warning in report.notes(found)
    assert [cells[0] for _, cells in reading.lines(found)] == ["", ""]
    assert "Pareto frontier" not in reading.caption(found)
    (axes,) = page.plot(found).axes
    assert not axes.get_lines()
    assert len(axes.collections) == 2  # the points, and no shaded area


def test_runs_of_different_lengths_are_told(tmp_path):
    a, b = make(tmp_path, "tiny/a"), make(tmp_path, "tiny/b", steps=60)
    evaluate(a, 10.0)
    evaluate(b, 9.0, step=60)
    (note,) = report.notes(rows(a, b))
    assert "trained on different numbers of tokens, 15.4K to 30.7K" in note
    assert note in html(rows(a, b))
    evaluate(b, 9.0, step=60)
    (b.path / "eval" / "full.json").unlink()
    evaluate(b, 9.5, step=30)  # unfinished, and as long as the other
    assert report.notes(rows(a, b)) == []


def test_captions_say_tokens_steps_seed_and_data(tmp_path):
    a, b = make(tmp_path, "tiny/a"), make(tmp_path, "tiny/b", seed=7)
    for run in (a, b):
        evaluate(run, 10.0)
    found = rows(a, b)
    told = (
        "Trained on 15,360 tokens (30 steps of 512), seed 0 and 7. Data: sotu, tokenizer byte. "
        "Held out: 5 % of the documents, 1,000 tokens, in windows of 64."
    )
    assert reading.setting(found) == told
    assert told in reading.caption(found)
    assert html(found).count(told) == 2  # below the table, and the curves
    for width in (8.4, 4.6):
        drawn = " ".join(text.get_text() for text in page.plot(found, width=width).texts)
        assert told in " ".join(drawn.split())


def test_changed_data_or_a_partial_evaluation_is_told(tmp_path):
    assert "with care" in report.notes(two(tmp_path / "changed", b={"fingerprint": "x"}))[0]
    a, b = make(tmp_path, "tiny/a"), make(tmp_path, "tiny/b")
    evaluate(a, 10.0)
    evaluate(b, 10.0, tokens=10)
    assert "with care" in report.notes(rows(a, b))[0]


# ------------------------------------------------------------------------------ plot and page


def test_points_that_are_as_good_as_equal_are_drawn_so():
    figure = plot([at(22, 16.0783), at(36, 16.0785), at(64, 16.0783)])
    FigureCanvasAgg(figure).draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert high - low > 0.16
    assert axes.yaxis.get_offset_text().get_text() == ""


def test_the_plot_draws_points_frontier_and_grey_reference():
    points = [at(512, 9.0, series="2 layers"), at(1024, 8.0, series="10 layers"), at(2048, 8.5)]
    figure = plot(points, reference=[at(700, 8.7, label="paper")])
    axes = figure.axes[0]
    legend = axes.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["reference", "2 layers", "10 layers", "s"]
    assert [text.get_text() for text in axes.texts].count("paper") == 1
    (line,) = axes.get_lines()
    assert not plot(points, ranked=False).axes[0].get_lines()
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    corners = [[512, top], [512, 9.0], [1024, 9.0], [1024, 8.0], [right, 8.0]]
    assert np.asarray(line.get_xydata()).tolist() == corners
    ticks = [axes.xaxis.get_major_formatter()(x, None) for x in axes.get_xticks()]
    assert ticks == ["512", "700", "1,024", "2,048"]


def test_reference_points_are_perplexities(tmp_path):
    paper = [at(700, 8.7, label="paper")]
    for other, drawn in ({}, True), ({"tokenizer": "[]"}, False):
        figure = page.plot(two(tmp_path / str(drawn), b=other), paper)
        assert ("paper" in [text.get_text() for text in figure.axes[0].texts]) == drawn


def test_unfinished_points_are_hollow_and_the_legend_shows_a_finished_one():
    (axes,) = plot([at(2, 5.0, unfinished=True), at(1, 6.0, colour=1)]).axes
    colours = [to_rgba(pareto.SURFACE), to_rgba(pareto.COLOURS[1])]
    dots = [np.asarray(dots.get_facecolor())[0].tolist() for dots in axes.collections[:2]]
    assert dots == [list(colour) for colour in colours]
    (key,) = axes.get_legend().legend_handles
    assert key.get_markerfacecolor() != pareto.SURFACE


def test_a_run_has_one_colour_in_every_picture(tmp_path):
    found = []
    for i, kv_map in enumerate(("cla:4", "identity", "cla:2")):  # not in the order of sharing
        run = make(tmp_path, f"tiny/{i}", kv_map=kv_map)
        evaluate(run, 10.0 + i)
        log(run)
        found.append(run)
    found = rows(*found)
    colours = {point.label: pareto.COLOURS[point.colour] for point in reading.points(found)}
    assert len(set(colours.values())) == 3
    drawn = {
        dots.get_offsets()[0][1]: to_hex(dots.get_facecolor()[0])
        for dots in page.plot(found).axes[0].collections[:3]
    }
    assert drawn == {10.0 + i: colours[str(i)] for i in range(3)}
    for figure in page.curves(found):
        assert [line.get_color() for line in figure.axes[0].get_lines()] == list(colours.values())
    for name, colour in colours.items():
        assert re.search(rf'solid {colour}"></i>{name}</li>', html(found))


SPREAD = [(512 * 2**i, 9 - 0.1 * i - j / 3) for i in range(4) for j in range(2)]
STACKED = [(512, 9 + i / 50) for i in range(12)]
CLOSE = [(512 + i % 8, 9 + (i * 7 % 40) / 400) for i in range(40)]


@pytest.mark.parametrize("width", [8.4, 4.6])
@pytest.mark.parametrize(
    ("pairs", "least"),
    [(SPREAD, 8), (STACKED, 10), (CLOSE, 15)],
    ids=("spread", "stacked", "close"),
)
def test_labels_never_overlap(pairs, least, width):
    """One that has no room is left out, and how many are is told."""
    figure = plot(
        [at(*pair, label=f"run={i},seed={i}") for i, pair in enumerate(pairs)], width=width
    )
    figure.draw_without_rendering()
    (axes,) = figure.axes
    # Of an annotation with a leader, without the leader.
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    if width > 6:
        assert len(boxes) >= least
    told = " ".join(text.get_text() for text in figure.texts)
    assert (f"{len(pairs) - len(boxes)} label" in told) == (len(boxes) < len(pairs))
    frame = axes.get_window_extent()
    radius = 5 * figure.dpi / 72
    centres = axes.transData.transform(pairs)
    dots = [Bbox([centre - radius, centre + radius]) for centre in centres]
    for i, box in enumerate(boxes):
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert not any(box.overlaps(other) for other in (*boxes[:i], *dots))


@pytest.mark.parametrize("width", [8.4, 4.6])
@pytest.mark.parametrize("pairs", [SPREAD, STACKED], ids=("spread", "stacked"))
def test_labels_lie_over_no_error_bar_and_no_dot_of_a_seed(pairs, width):
    """Those of a reference: rows of several seeds are named in a legend."""
    points = [at(*pair, label=f"run {i}") for i, pair in enumerate(pairs)]
    figure = plot(
        [
            dataclasses.replace(one, seeds=tuple(one.quality + d for d in (-0.15, 0.05, 0.1)))
            for one in points
        ],
        reference=[dataclasses.replace(one, quality=one.quality + 0.02) for one in points],
        width=width,
    )
    figure.draw_without_rendering()
    (axes,) = figure.axes
    labels = [Text.get_window_extent(text) for text in axes.texts]
    assert len(labels) >= 4
    place = axes.transData.transform
    bars = [segment for bar in axes.containers for segment in bar.lines[2][0].get_segments()]
    dots = [dot for line in axes.lines if line.get_marker() == "o" for dot in line.get_xydata()]
    assert (len(bars), len(dots)) == (len(pairs), 3 * len(pairs))
    cap = np.array([4, 0]) * figure.dpi / 72
    ends = [[place(end) - cap, place(end) + cap] for bar in bars for end in bar]
    drawn = [Bbox(box).padded(0.5) for box in (*map(place, bars), *ends)]
    drawn += [Bbox([place(dot), place(dot)]).padded(1) for dot in dots]
    assert not [box for box in labels if any(box.overlaps(other) for other in drawn)]


def test_ticks_do_not_overlap():
    sizes = (16_384, 16_896, 17_920, 20_480, 24_576, 131_072)
    figure = plot([at(size, 9 - i / 10) for i, size in enumerate(sizes)])
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    assert 3 <= len(boxes) < len(sizes)
    assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))


def test_long_words_above_the_picture_are_cut_into_lines(tmp_path):
    found = two(tmp_path, b={"tokenizer": '{"other": 1}', "source": "sotu:9", "fingerprint": "x"})
    for width in (8.4, 4.6):
        figure = page.plot(found, width=width)
        figure.draw_without_rendering()
        top = figure.axes[0].get_legend().get_window_extent().y1
        for text in figure.texts:
            box = text.get_window_extent()
            assert 0 <= box.x0 < box.x1 <= figure.bbox.x1
            assert top <= box.y0 < box.y1 <= figure.bbox.y1


def test_nothing_evaluated_still_makes_a_report(tmp_path):
    found = rows(make(tmp_path))
    assert "is not evaluated" in html(found)
    assert page.plot(found).axes[0].get_title() == "no run has been evaluated yet"


NASTY = "<script>alert(1)</script> $x_{$ [red] & \" '"


def nasty(tmp_path):
    run = make(tmp_path / "tiny")
    moved = tmp_path / "tiny" / NASTY.replace("/", "|")
    shutil.move(run.path, moved)
    run = runs.find_runs([moved])[0]
    other = make(tmp_path / "tiny", "b")
    record = json.loads((run.path / "config.json").read_text())
    record["versions"]["jax"] = "<b>bold</b>"
    del record["checksum"], record["run"], record["format"]
    (run.path / "config.json").write_text(json.dumps(record))
    evaluate(run, 10.0, note="<i>")
    evaluate(other, 11.0)
    log(run)
    return rows(run, other)


def test_every_text_is_escaped(tmp_path):
    text = html(nasty(tmp_path), title="<u>title")
    for tag in ("<script>alert", "<b>", "<i>", "<u>"):
        assert tag not in text
    assert "&lt;script&gt;" in text
    assert "&lt;u&gt;title" in text


def test_markup_and_mathtext_in_a_name_are_text(tmp_path):
    found = nasty(tmp_path)
    assert "$x_{$ [red]" in printed(found)
    pareto.saved(page.plot(found), "png")  # mathtext would raise
    for figure in page.curves(found):
        pareto.saved(figure, "png")


def test_a_name_can_neither_steer_a_terminal_nor_break_the_picture(tmp_path, capsys):
    run = make(tmp_path, name="tiny/a")
    evaluate(run, 20.0)
    hostile = "a\x1b[2J\x9b\ufffe--"
    scores = {"step": 30, "tasks": {hostile: {"metrics": {"acc": 0.5}}}}
    run.write_eval("tasks-full", scores)
    run.path.rename(run.path.parent / hostile)
    compare.main([str(tmp_path / "tiny")])
    shown = capsys.readouterr().out
    assert not set(shown) & set("\x1b\x9b\ufffe")
    ET.fromstring((tmp_path / "tiny/pareto.svg").read_text())


def test_the_page_needs_nothing_from_elsewhere(tmp_path):
    run = make(tmp_path)
    evaluate(run, 10.0)
    log(run)
    text = html(rows(run))
    assert "http" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert text.count("<svg") == text.count("</svg>") == 6
    for detail in ("prefers-color-scheme: dark", FINGERPRINT, "var(--ink)", "jaxlib"):
        assert detail in text
    for colour in (pareto.INK, pareto.SURFACE):
        assert colour not in text.split("</style>")[1]  # would not follow dark mode


def test_settings_that_differ_are_shown(tmp_path):
    a, b = make(tmp_path, "tiny/a"), make(tmp_path, "tiny/b", seed=7)
    assert re.findall(r"<summary>(.*?)</summary>", html(rows(a, b))) == [
        'a <span class="muted">seed = 0</span>',
        'b <span class="muted">seed = 7</span>',
    ]


def test_long_names_break_after_their_separators(tmp_path):
    text = html(rows(make(tmp_path, "tiny/h16_mqa.lr-0.003")))
    wrapped = "h16_<wbr>mqa.<wbr>lr-0.003"
    assert text.count(wrapped) == 3  # the row of the table, the legend, the details
    assert wrapped not in text.partition('id="data"')[2]


def test_a_further_cache_is_no_further_run(tmp_path):
    run = make(tmp_path)
    evaluate(run, 10.0)
    run.write_eval("cached-int8", run.evals()["full"])
    text = html(rows(run))
    assert "1 run, compared" in text
    assert text.count("<details>") == 1


def test_the_same_rows_give_the_same_bytes(tmp_path):
    found = two(tmp_path)
    first, second = (pareto.saved(page.plot(found), "svg") for _ in range(2))
    assert first == second
    assert b"<dc:date>" not in first
    assert html(found) == html(found)


def test_long_curves_are_thinned_and_keep_their_end(tmp_path):
    run = make(tmp_path)
    records = [{"step": step, "loss": float(step)} for step in range(1, 1002)]
    write_metrics(run, [*records, {"step": 1002, "loss": math.nan}])
    (row,) = rows(run)
    steps, values = page.curve(row, "loss")
    assert steps == list(range(2, 1002, 3))
    assert values == [float(step) for step in steps]
    assert page.curve(row, "perplexity") == ([], [])


# ------------------------------------------------------------------------------------- command


def test_the_command_writes_into_the_study_and_prints_the_table(tmp_path, capsys):
    evaluate(make(tmp_path, "tiny/a"), 10.0)
    evaluate(make(tmp_path, "tiny/b", kv_map="cla:2"), 11.0)
    compare.main([str(tmp_path / "tiny")])
    out = capsys.readouterr().out
    assert "11.000" in out
    assert f"wrote {tmp_path / 'tiny' / 'report.html'}" in out
    assert (tmp_path / "tiny/pareto.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "tiny/pareto.png").stat().st_size > 30_000
    svg = (tmp_path / "tiny/pareto.svg").read_text()
    assert svg.count("<path") > 30


def test_a_file_gets_every_column_whole(tmp_path, capsys):
    """Many columns of differing fields left names no width."""
    evaluate(make(tmp_path, "tiny/a"), 10.0)
    numbers = dict.fromkeys(("norm_eps", "init_std"), 0.25) | {"rope_theta": 4.0}
    start = FromRun(run="runs/a-run-with-a-long-name-that-takes-its-room/of-several-words")
    other = make(
        tmp_path,
        "tiny/b",
        kv_norm="block",
        rope_scaling=LinearScaling(factor=2.0),
        start=start,
        **numbers,
    )
    evaluate(other, 11.0)
    compare.main([str(tmp_path / "tiny")])
    lines = capsys.readouterr().out.splitlines()
    (row,) = (line for line in lines if "11.000" in line)
    assert re.search(r"│ b .*│ linear .*│ +2\.0 ", row), row


def test_several_paths_write_into_their_common_parent_or_out(tmp_path, capsys):
    a, b = make(tmp_path, "one/a"), make(tmp_path, "two/a")
    compare.main([str(a.path), str(b.path)])
    assert (tmp_path / "report.html").exists()
    assert "one/a" in capsys.readouterr().out
    compare.main([str(a.path), str(a.path) + "/", "--out", str(tmp_path / "new" / "place")])
    assert (tmp_path / "new/place/pareto.svg").exists()
    out = capsys.readouterr().out
    assert len(re.findall(r"│ a  step 0/30", out)) == 1  # once, under its own name
    assert f"\na is not evaluated: python -m launch.evaluate {a.path}\n" in out


def test_paths_without_anything_in_common_need_out():
    assert str(report.common_directory(["gs://b/x/y", "gs://b/x/z"])) == "gs://b/x"
    assert str(report.common_directory(["/a/x/", "/a/x"])) == "/a/x"
    for paths in (["/a/x", "/b/y"], ["gs://a/x", "gs://b/y"], ["/a", "gs://b/y"]):
        assert report.common_directory(paths) is None


@pytest.mark.parametrize("arguments", [[], ["/does/not/exist"]])
def test_a_users_mistake_is_one_line_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        compare.main(arguments)
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    assert "python -m launch.compare runs/tiny" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["pipe", "brackets", "missing"])
def test_one_hostile_run_does_not_stop_the_comparison_of_the_others(tmp_path, capsys, harm):
    """Its config says nothing: it has no line, and the table, the page and the terminal say why."""
    found = [make(tmp_path, f"tiny/{name}") for name in "abc"]
    for run in found:
        evaluate(run, 10.0)
        log(run)
    words = str(found[1].path / "config.json")
    if harm == "missing":
        (found[1].path / "config.json").unlink()
        words = f"{found[1].path} has checkpoints or metrics, but no config.json"
    else:
        spoil(found[1].path / "config.json", harm)
    compare.main([str(tmp_path / "tiny")])
    out = capsys.readouterr().out
    assert out.count("10.000") == 2
    for told in (out, (tmp_path / "tiny" / "report.html").read_text()):
        assert escape(words) in told
    with pytest.raises(SystemExit):  # alone, there is nothing to compare
        compare.main([str(found[1].path)])
    assert f"error: {words}" in capsys.readouterr().err


@pytest.mark.parametrize("harm", ["pipe", "brackets", "device", "gone"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "eval/full.json", "tokenizer.json"])
def test_a_hostile_record_costs_its_run_a_note(tmp_path, name, harm):
    found = [make(tmp_path, f"tiny/{name}") for name in "ab"]
    for run in found:
        evaluate(run, 10.0)
        log(run)
    spoil(found[0].path / name, harm)
    told = " ".join(report.notes(rows(*found)))
    if (name, harm) == ("metrics.jsonl", "brackets"):
        assert "[" * 100 not in told  # a line that is no record is passed over
    elif (name, harm) != ("metrics.jsonl", "gone"):
        assert str(found[0].path / name) in told or "a is not evaluated" in told
    assert cells(rows(*found), "b")["perplexity"] == "10.000"


def spoil(file, harm):
    file.unlink()
    match harm:
        case "pipe":
            os.mkfifo(file)
        case "brackets":
            file.write_text("[" * 3_000_000)
        case "device":
            os.symlink("/dev/zero", file)


@pytest.mark.parametrize("sizes", [(256,), (256, 512)])
def test_points_of_several_seeds_are_drawn_without_a_warning(sizes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pareto.saved(plot([at(size, 8.0, seeds=(7.9, 8.1)) for size in sizes]), "png")


def test_an_evaluation_through_an_unknown_cache_format_is_named_and_left_out(tmp_path):
    run, other = make(tmp_path, "tiny/a"), make(tmp_path, "tiny/b")
    for one in (run, other):
        evaluate(one, 8.0)
    run.write_eval("cached-int8row", run.evals()["full"] | {"cache": "int8row"})
    problems: list[str] = []
    found = report.read([run, other], None, problems)
    assert [row.name for row in found] == ["a", "b"]
    (problem,) = problems
    assert problem.startswith("a, int8row: unknown cache format 'int8row'")
    assert problem.endswith("this evaluation is left out")


@pytest.mark.parametrize("width", [4.6, 8.4])
@pytest.mark.parametrize("rows", [2, 3, 6])
def test_rows_with_the_same_bytes_stand_side_by_side(rows, width):
    alike = [at(512, 8.0 + i / 9, seeds=(7.9, 8.2), number=i) for i in range(rows)]
    figure = plot([*alike, at(256, 8.3, seeds=(8.2, 8.4))], width=width)
    figure.canvas.draw()
    (axes,) = figure.axes
    place = {
        gid: axes.transData.transform(drawn.get_offsets())[0, 0]
        for drawn in axes.collections
        if (gid := drawn.get_gid())
    }
    columns = sorted(place.values())
    ends = 2 * pareto._CAP * figure.dpi / 72
    assert min(np.diff(columns)) > (ends if rows < 6 else 0)
    assert axes.bbox.x0 < columns[0]
    assert columns[-1] < axes.bbox.x1
    # The best row is on the frontier and above its tick.
    assert place["point-0"] == pytest.approx(axes.transData.transform((512, 8.0))[0])
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "512"]


def test_points_of_several_seeds_are_named_in_a_legend_of_their_own():
    rows = [at(2**i, 8.0 + i / 9, label=f"row {i}", colour=i, seeds=(7.9, 8.2)) for i in range(9)]
    figure = plot(rows)
    names, series = (one for one in figure.axes[0].get_children() if isinstance(one, Legend))
    texts = [[text.get_text() for text in legend.get_texts()] for legend in (series, names)]
    assert texts == [["s"], [row.label for row in rows]]
    assert len({key.get_color() for key in names.legend_handles}) == 9
    assert not figure.axes[0].texts
    figure.canvas.draw()
    above = min(text.get_window_extent().y0 for text in series.get_texts())
    assert max(text.get_window_extent().y1 for text in names.get_texts()) < above
    assert series.get_window_extent().y1 < figure.bbox.y1
    # Without bars there is room for labels.
    figure = plot([at(1, 8.0, label="a"), at(2, 7.0, label="b")])
    assert sorted(text.get_text() for text in figure.axes[0].texts) == ["a", "b"]


@pytest.mark.parametrize("width", [4.6, 8.4])
def test_legends_end_within_the_picture(width):
    series = [f"{layers} layers per KV layer" for layers in ("1.6", "2.67", "2.4", "2.33")]
    names = [f"h16_mqa_cla2_{end}" for end in ("dense_back", "keep_ends", "own_norm", "wide")]
    rows = [
        at(2**i, 8.0, label=label, series=line, seeds=(7.9, 8.2))
        for i, (label, line) in enumerate(zip(names, series, strict=True))
    ]
    figure = plot(rows, width=width)
    figure.canvas.draw()
    for legend in (one for one in figure.axes[0].get_children() if isinstance(one, Legend)):
        assert legend.get_window_extent().x1 <= figure.bbox.x1


def test_tables_of_a_study_fold_on_a_phone(tmp_path):
    """Else they show two columns there: no cell of them keeps its line whole, and names get narrow."""
    (made,) = re.findall(r"<table[^>]*>", page._table(("title", ("claim", "verdict"), [], "")))
    assert made == '<table class="folded">'
    phone = page._CSS[page._CSS.index("@media screen") : page._CSS.index("@media print")]
    everywhere = page._CSS[: page._CSS.index("@media screen")]

    def declared(css, selector):
        found = re.findall(rf"(?:^|[}}\s]){re.escape(selector)} {{ ([^}}]*) }}", css)
        return dict(one.split(": ") for one in (found or [""])[-1].rstrip(";").split("; ") if one)

    assert declared(everywhere, "th, td")["white-space"] == "pre"  # what has to be undone
    assert declared(everywhere, "table.folded td")["white-space"] == "normal"
    assert declared(phone, "table.folded th")["white-space"] == "normal"
    wide, narrow = (declared(css, "table.folded td.left") for css in (everywhere, phone))
    assert wide["overflow-wrap"] == "anywhere"
    assert float(narrow["min-width"].removesuffix("rem")) < float(
        wide["min-width"].removesuffix("rem")
    )
    assert '<meta name="viewport" content="width=device-width' in html(two(tmp_path))


def test_what_lies_beyond_an_edge_casts_a_shadow_in_light_and_dark():
    (scroll,) = re.findall(r"\.scroll \{ overflow-x: auto;([^}]*)\}", page._CSS)
    assert scroll.count("var(--shadow)") == scroll.count(" scroll ") == scroll.count(" local ") == 2
    light, dark = re.findall(r":root \{([^}]*)\}", page._CSS)[:2]
    used = set(re.findall(r"var\((--[\w-]+)\)", page._CSS))
    for colours in (light, dark):
        assert used <= set(re.findall(r"(--[\w-]+):", colours))


def test_a_dot_of_a_seed_keeps_no_pointer_from_its_point():
    assert re.search(r"\.pareto \{ pointer-events: none; \}", page._CSS)
    assert re.search(r"\.point \{[^}]*pointer-events: auto;", page._CSS)


def test_rows_of_one_run_stay_where_their_bytes_are():
    figure = plot([at(512, 8.0, number=0), at(512, 8.1, number=1)])
    found = [one.get_offsets()[0, 0] for one in figure.axes[0].collections if one.get_gid()]
    assert found == [512, 512]


def test_what_only_a_screen_can_do_is_not_printed(tmp_path):
    text = html(two(tmp_path))
    printed, screen = text.index("@media print"), text.index(".screen { display: none; }")
    assert "@media" not in text[printed + 1 : screen]
    for words in ("Click a point", "Two runs side by side"):
        assert re.search(rf'class="[a-z ]*screen">\s*(<h2>)?{words}', text)
