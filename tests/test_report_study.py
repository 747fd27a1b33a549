"""Reports of seeds and of declared studies: from run directories to verdicts, tables and a page."""

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import experiments
from cla_jax import documents, report, runs
from cla_jax.fields import replaced
from cla_jax.report import page, paper, pareto, seeds, studies, tables
from cla_jax.report.rows import caption
from cla_jax.study import Claim, Gain, Study
from experiments import smoke, sweeping
from launch import compare
from tests.sealed import write_metrics

ROOT = Path(__file__).parents[1]
D = 12  # held-out documents


def half():
    """Half the head."""
    return replaced(smoke.tiny(), {"name": "mine/half", "model.d_head": 8})


def cla2():
    """Half the layers."""
    return replaced(smoke.tiny(), {"name": "mine/cla2", "model.kv_map": "cla:2"})


def mqa():
    """All of the cache."""
    return replaced(smoke.tiny(), {"name": "mine/mqa", "model.kv_map": "identity"})


def wide():
    """Twice the cache."""
    changes = {"model.kv_map": "identity", "model.d_head": 32}
    return replaced(smoke.tiny(), {"name": "mine/wide"} | changes)


ROWS = (half, cla2, mqa, wide)
STUDY = Study(
    rows={"half": 6, "cla2": 6, "mqa": 6, "wide": 3},
    claims=(Claim("cla2", "half"), Claim("mqa", "cla2", margin=0.001)),
    guardrails=("perplexity",),
    gains=(Gain(ours=("cla2", "mqa"), theirs=("half", "wide")),),
)
MEANS = {"half": 2.2, "cla2": 2.1, "mqa": 2.11, "wide": 2.0}
MINE = """
from tests.test_report_study import ROWS, STUDY
from experiments import sweeping

STUDIES = {"main": STUDY}

def main():
    return sweeping.declared(STUDY, ROWS)

SWEEPS = (main,)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A file with a declared study, beside a directory for its runs."""
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    return file


def write_run(
    config, score, *, step=None, evaluated=True, fingerprint="smoke-1", tokens=4000, **parts
):
    """A run directory as training leaves it, with the scores of documents."""
    run = runs.open_run(config, data_fingerprint=fingerprint, tokenizer_json="{}")
    step = config.steps if step is None else step
    n_bytes = np.full(D, 1000)
    draw = np.random.default_rng(config.seed)
    nll = score * np.log(2) * n_bytes * (1 + 0.1 * draw.normal(size=D))
    nll *= score * np.log(2) * n_bytes.sum() / nll.sum()
    own = {"step": step, "perplexity": 2 ** (2 * score), "bits_per_byte": score}
    lines: list[dict] = [
        {"step": i, "loss": 6 - 0.1 * i - 0.01 * config.seed} for i in range(1, step + 1)
    ]
    if evaluated:
        lines.append(
            own
            | parts
            | {"held_out_loss": 1.0, "held_out_tokens": tokens, "held_out_bytes": 12_000}
        )
        kept = documents.Documents(nll=nll, tokens=np.full(D, tokens // D), bytes=n_bytes)
        run.write_eval("training", own | {"tokens": tokens, "documents": kept.record()})
    write_metrics(run, lines)
    return run


def trials(study=STUDY):
    """The trials of a study, and what each row would score with each seed."""
    draw = np.random.default_rng(0)
    shared = draw.normal(0, 0.02, 8)
    for name, config in sweeping.declared(study, ROWS):
        row, _, seed = name.rpartition(".seed-")
        score = MEANS[row] + shared[int(seed)] + draw.normal(0, 0.0005)
        yield replaced(config, {"name": f"mine/main/{name}", "placement.runs": "runs"}), score


def run_all(*, but=()):
    return {
        config.name.rpartition("/")[2]: write_run(config, score)
        for config, score in trials()
        if config.name.rpartition("/")[2] not in but
    }


def examined(mine, directory="runs", **more):
    declared = experiments.find_study(f"{mine}:main")
    return report.examine(declared, report.read(runs.find_runs([directory])), **more)


@pytest.fixture
def blank(monkeypatch):
    """Pictures are left blank: they take most of the time, and other tests look at them."""
    monkeypatch.setattr(compare, "_commit", lambda: "c0ffee")
    monkeypatch.setattr(pareto, "saved", lambda *_: b"<svg></svg>")
    for drawn in ("plot", "learning_rates"):
        monkeypatch.setattr(page, drawn, lambda *_, **__: None)
    monkeypatch.setattr(page, "curves", lambda *_: [None, None])


def decide(mine, capsys):
    compare.main(["--study", f"{mine}:main", "runs/mine"])
    return capsys.readouterr().out


# --------------------------------------------------------------------------------------- seeds


@pytest.mark.usefixtures("mine")
def test_runs_that_differ_in_their_seed_are_one_row():
    run_all()
    rows = report.read(runs.find_runs(["runs"]))
    together = seeds.merged(rows)
    assert [row.name for row in together] == [
        "cla2 (6 seeds)",
        "half (6 seeds)",
        "mqa (6 seeds)",
        "wide (3 seeds)",
    ]
    (cla2, *_), scores = together, [score for c, score in trials() if "cla2" in c.name]
    assert cla2.scores is not None
    assert cla2.scores.bits_per_byte == pytest.approx(np.mean(scores))
    (line,) = [line for line in tables.values(together) if line["run"] == cla2.name]
    assert (line["seeds"], line["bits_per_byte_sd"]) == (6, pytest.approx(np.std(scores, ddof=1)))
    figure = page.plot(together)
    dots = [line for line in figure.axes[0].get_lines() if len(line.get_xdata()) == 6]
    assert len(dots) == 3  # every seed of three rows; the fourth has three
    steps, means, low, high = page.band(cla2, "loss")
    assert (steps[0], means[0]) == (1, pytest.approx(5.9 - 0.025))
    assert (low[0], high[0]) == (pytest.approx(5.85), pytest.approx(5.9))


@pytest.mark.usefixtures("mine")
def test_seeds_that_do_not_count_are_named_and_left_out():
    run_all(but=("mqa.seed-4", "mqa.seed-5"))
    late, other = (c for c, _ in trials() if c.name.endswith(("mqa.seed-4", "mqa.seed-5")))
    write_run(late, 1.0, step=3)
    edited = write_run(other, 2.1)
    text = (edited.path / "eval" / "training.json").read_text()
    (edited.path / "eval" / "training.json").write_text(text.replace("4000", "4001"))
    rows = report.read(runs.find_runs(["runs"]))
    (mqa,) = [row for row in seeds.merged(rows) if row.name.startswith("mqa")]
    assert mqa.name == "mqa (4 seeds)"
    told = seeds.left_out(rows)
    assert len(told) == 2
    assert f"mqa.seed-4 is left out of the mean over seeds: step 3/{late.steps}" in told
    assert any("mqa.seed-5" in line and "was altered" in line for line in told)
    assert all(line in page.html(rows, "x") for line in told[:1])


@pytest.mark.usefixtures("mine")
def test_runs_of_one_seed_or_of_other_data_stay_apart():
    a, b = (replaced(mqa(), {"name": f"mine/{n}", "seed": n}) for n in (0, 1))
    write_run(a, 2.0, tokens=4000)
    write_run(b, 2.1, tokens=4008)
    rows = report.read(runs.find_runs(["runs"]))
    assert len(seeds.merged(rows)) == 2
    write_run(replaced(mqa(), {"name": "mine/again"}), 2.0)
    rows = report.read(runs.find_runs(["runs/mine/0", "runs/mine/again"]))
    assert [row.name for row in seeds.merged(rows)] == ["0", "again"]
    assert seeds.common_name(["a-1", "a-2"]) == "a"


@pytest.mark.usefixtures("mine", "blank")
def test_components_of_a_mixture_are_columns():
    parts = {"bits_per_byte/web": 1.5, "perplexity/web": 8.0, "bits_per_byte/code": 2.5}
    run = write_run(mqa(), 2.0, **parts)
    rows = report.read([run])
    assert "bits per byte\nweb" in page.html(rows, "x")
    assert "1.5000" in page.html(rows, "x")
    (line,) = tables.values(rows)
    assert (line["bits_per_byte/web"], line["bits_per_byte/code"]) == (1.5, 2.5)


# ------------------------------------------------------------------------------- learning rates


def curve(losses, rates=(1e-3, 2e-3, 4e-3, 8e-3), **more):
    for rate, loss in zip(rates, losses, strict=False):
        name = f"mine/tuning/mqa.lr-{rate:g}"
        write_run(replaced(mqa(), {"name": name, "optimizer.peak_lr": rate}), loss, **more)
    rows = report.read(runs.find_runs(["runs"]))
    return rows, seeds.curves(seeds.merged(rows))


@pytest.mark.usefixtures("mine")
def test_a_learning_rate_curve_has_an_optimum_inside():
    rows, (found,) = curve((2.3, 2.1, 2.1, 2.3))
    assert found.name == "mqa"
    assert found.best is not None
    assert found.best.rate == pytest.approx(8**0.5 * 1e-3)
    assert found.note == ""
    # One point a model: the best rate.
    (shown,) = page.shown_rows(seeds.merged(rows), None)
    assert shown.config.optimizer.peak_lr in (2e-3, 4e-3)
    text = page.html(rows, "x")
    assert "<h2>Learning rates</h2>" in text
    assert "inside the rates tried" in text


@pytest.mark.usefixtures("mine", "blank")
@pytest.mark.parametrize(
    ("losses", "asks"),
    [
        ((2.4, 2.3, 2.2, 2.1), "the best learning rate, 0.008, is the highest tried: try higher"),
        ((2.1, 2.2, 2.3, 2.4), "the best learning rate, 0.001, is the lowest tried: try lower"),
    ],
)
def test_an_optimum_at_the_edge_asks_for_more_points(losses, asks):
    rows, (found,) = curve(losses)
    assert asks in found.note
    assert asks in page.html(rows, "x")


@pytest.mark.usefixtures("mine", "blank")
def test_a_curve_with_missing_runs_says_so():
    curve((9.0,), rates=(8e-3,), evaluated=False, step=2)
    rows, (found,) = curve((2.3, 2.1, 2.2))
    assert "1 of 4 learning rates have no result yet" in found.note
    last = next(row for row in rows if row.config.optimizer.peak_lr == 8e-3)
    (found,) = seeds.curves(seeds.merged(rows), frozenset({last.path}))
    assert found.note == ""
    assert "0.008: diverged" in str(seeds.rate_table([found]))


# ------------------------------------------------------------------------------------- studies


def test_from_run_directories_to_verdicts(mine, capsys):
    run_all()
    out = decide(mine, capsys)
    assert "cla2 is better than half: supported at" in out
    assert "mqa is no worse than cla2 by more than 0.001: contradicted at" in out
    assert "The mean difference over 6 paired seeds is" in out
    assert (
        "p = 0.0312 for the claim and 1.0000 for its opposite, by Holm's method over 2 claims"
        in out
    )
    assert re.search(r"worth \d\.\d\d times the bytes \(95% interval .*, 3 seeds\)", out)
    assert "missing" not in out
    outcome = examined(mine)
    (low, high), _ = outcome.crossed
    assert low < -0.1 < high < 0
    (first, _) = outcome.guardrails
    assert first["perplexity"] < 0
    assert outcome.notes == ()
    here = Path("runs/mine")
    wanted = {"report.html", "report.md", "report.json", "claims.csv", "claims.tex", "gains.csv"}
    figures = ("pareto", "read_bytes", "training_loss", "held_out")
    wanted |= {f"{name}.{ext}" for name in figures for ext in ("png", "svg", "pdf")}
    assert wanted <= {file.name for file in here.iterdir()}
    with (here / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["run"] for line in lines if line["seeds"] == "6"} == {
        "cla2 (6 seeds)",
        "half (6 seeds)",
        "mqa (6 seeds)",
    }
    record = json.loads((here / "report.json").read_text())
    assert record["digest"] == STUDY.digest
    text = (here / "report.html").read_text()
    assert STUDY.digest in text
    assert (record["commit"] or "no commit") in text


@pytest.mark.usefixtures("blank")
def test_killed_and_relaunched_gives_the_same_report_and_a_finished_one_stays(mine, capsys):
    """What is interrupted shows as missing, never as zero; what is there in the end alone decides."""
    whole = Path("whole")
    run_all()
    decide(mine, capsys)
    shutil.copytree("runs/mine", whole)
    before = {file.name: file.read_bytes() for file in whole.iterdir() if file.is_file()}
    again = decide(mine, capsys)
    assert {f.name: f.read_bytes() for f in Path("runs/mine").iterdir() if f.is_file()} == before
    shutil.rmtree("runs")
    late = ("cla2.seed-5", "mqa.seed-0")
    run_all(but=late)
    for config, _ in trials():
        if config.name.endswith(late):
            write_run(config, 1.0, step=2, evaluated=False)  # killed
    out = decide(mine, capsys)
    assert re.search(r"Not tested at .* training tokens: cla2 is better than half; 1 of 12", out)
    assert "runs are missing: cla2 seed 5" in out
    assert "2 of 21 runs of the study are missing: python -m launch.sweep" in out
    assert f"cla2.seed-5 does not count: no evaluation, step 2/{smoke.tiny().steps}" in out
    rows = Path("runs/mine/rows.csv").read_text()
    assert "5 of 6 seeds" in rows
    run = {config.name.rpartition("/")[2]: (config, score) for config, score in trials()}
    for name in late:
        shutil.rmtree(f"runs/mine/main/{name}")
        shutil.copytree(whole / "main" / name, f"runs/mine/main/{name}")
        assert run[name]
    for name in run:  # the ids of runs are drawn: these are the runs of the first time
        shutil.rmtree(f"runs/mine/main/{name}")
        shutil.copytree(whole / "main" / name, f"runs/mine/main/{name}")
    for file in Path("runs/mine").iterdir():
        if file.is_file():
            file.unlink()
    assert decide(mine, capsys) == again
    assert {f.name: f.read_bytes() for f in Path("runs/mine").iterdir() if f.is_file()} == before


@pytest.mark.usefixtures("blank")
def test_a_row_without_any_run_is_missing_and_not_zero(mine, capsys):
    run_all(but=[f"wide.seed-{s}" for s in range(3)])
    decide(mine, capsys)
    with open("runs/mine/rows.csv") as file:
        (line,) = [line for line in csv.DictReader(file) if line["row"] == "wide"]
    assert (line["bits per byte"], line["state"]) == ("missing", "missing")
    assert line["learning rate"] == "—"
    assert "wide" in Path("runs/mine/report.md").read_text()


@pytest.mark.usefixtures("blank")
def test_results_that_change_after_the_report_are_told_with_their_names(mine, capsys, monkeypatch):
    found = run_all()
    monkeypatch.setattr(compare, "_commit", lambda: "aaaa")
    decide(mine, capsys)
    monkeypatch.setattr(compare, "_commit", lambda: "bbbb")
    decide(mine, capsys)
    assert json.loads(Path("runs/mine/report.json").read_text())["commit"] == "aaaa"
    write_run(found["mqa.seed-3"].config(), 2.05)  # trained again
    shutil.rmtree(found["wide.seed-2"].path)
    for _ in range(2):  # it stays told
        decide(mine, capsys)
        text = Path("runs/mine/report.md").read_text()
        assert "Results changed after the report of aaaa: main/mqa.seed-3." in text
        assert "Results disappeared after the report of aaaa: main/wide.seed-2." in text
        assert text.count("after the report") == 2
        assert "first reported at commit bbbb" in text
    Path("runs/mine/report.json").write_text('{"study": "mine.main", "digest": 3}')
    with pytest.raises(SystemExit):
        compare.main(["--study", f"{mine}:main", "runs/mine"])
    assert "report.json: field digest" in capsys.readouterr().err


@pytest.mark.usefixtures("blank")
@pytest.mark.parametrize("name", ["report.html", "results.csv", "pareto.png"])
def test_a_file_that_is_not_of_a_report_is_not_overwritten(mine, capsys, name):
    run_all()
    (Path("runs/mine") / name).write_text("mine")
    with pytest.raises(SystemExit):
        compare.main(["--study", f"{mine}:main", "runs/mine"])
    assert f"runs/mine/{name} was not written by this command" in capsys.readouterr().err
    assert (Path("runs/mine") / name).read_text() == "mine"


@pytest.mark.usefixtures("blank")
def test_a_report_replaces_only_one_of_its_own_kind(mine, capsys):
    run_all()
    decide(mine, capsys)
    compare.main(["runs/mine", "--out", "plain"])
    other = mine.with_name("other.py")
    other.write_text(MINE)
    place = lambda *path: {
        file: file.read_bytes() for file in Path(*path).iterdir() if file.is_file()
    }
    before = place("runs", "mine"), place("plain")
    of_study = (
        "contains the report of study mine.main, which is not overwritten: repeat the command with "
    )
    for words, told in (
        (
            ["runs/mine"],
            f"runs/mine {of_study}--study mine.main, or choose another directory with --out",
        ),
        (["runs/mine/main", "--out", "runs/mine"], of_study),
        (["runs/mine", "--study", f"{other}:main"], of_study),
        (
            ["runs/mine", "--study", f"{mine}:main", "--out", "plain"],
            "plain contains the report of a comparison without a study, which is not overwritten: repeat the "
            "command without --study",
        ),
    ):
        with pytest.raises(SystemExit):
            compare.main(words)
        assert told in capsys.readouterr().err
        assert (place("runs", "mine"), place("plain")) == before
    compare.main(["runs/mine", "--out", "plain", "--sort", "kv_bytes"])  # its own kind


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"steps": 31}, "its steps is 31, the study has 30"),
        ({"data.held_out": 0.5}, "its data.held_out is 0.5, the study has"),
        ({"data.tokenizer": "bpe:260"}, "its data.tokenizer is 'bpe:260'"),
        ({"optimizer.peak_lr": 1.0}, "its optimizer.peak_lr is 1.0"),
    ],
)
def test_a_run_of_another_identity_is_named_and_does_not_count(mine, change, told):
    found = run_all()
    run = found["cla2.seed-2"]
    config = run.config()
    change = {k: config.steps + 1 if k == "steps" else v for k, v in change.items()}
    told = told.replace("31", str(config.steps + 1)).replace("30", str(config.steps))
    shutil.rmtree(run.path)
    write_run(replaced(config, change), 2.1)
    outcome = examined(mine)
    (note,) = outcome.notes
    assert f"cla2.seed-2 does not count: {told}" in note
    assert outcome.verdicts[0].status == "not tested"
    assert ("cla2", 2) not in outcome.runs


def test_runs_of_other_data_or_token_counts_are_named_with_the_numbers(mine):
    run_all(but=("cla2.seed-1", "cla2.seed-2"))
    for config, score in trials():
        if config.name.endswith("cla2.seed-1"):
            write_run(config, score, fingerprint="other-2")
        if config.name.endswith("cla2.seed-2"):
            write_run(config, score, tokens=4008)
    notes = examined(mine).notes
    assert notes == (
        "cla2.seed-1 does not count: its data are other-2, others have smoke-1 (20 runs)",
        "cla2.seed-2 does not count: its held-out tokens are 4008, others have 4000 (19 runs)",
    )
    assert examined(mine).verdicts[0].reason.startswith("2 of 12 runs are missing")


def test_a_diverged_run_is_an_infinite_score_and_a_failed_one_is_missing(mine):
    found = run_all()
    lost = str(found["half.seed-1"].path)
    failed = {str(found["mqa.seed-1"].path): "out of disk"}
    outcome = examined(mine, diverged=frozenset({lost}), failed=failed)
    assert outcome.verdicts[0].excluded == (1,)
    assert outcome.state("half") == "5 of 6 seeds, 1 diverged"
    assert outcome.notes == ("half.seed-1 diverged", "mqa.seed-1 does not count: out of disk")
    assert "half.seed-1 diverged" in outcome.notes


def test_claims_about_what_is_not_there_are_refused():
    for change, told in {
        (("claims", (Claim("cla3", "half"),)),): r"'cla3'; did you mean cla2",
        (("metric", "bits_per_bite"),): "did you mean bits_per_byte",
        (("guardrails", ("perplxity",)),): "did you mean perplexity",
        (("claims", (Claim("cla2", "half", seeds=(0, 1, 2, 3, 6)),)),): "names seed 6: both rows "
        "have seeds 0 to 5",
        (("claims", (Claim("cla2", "wide"),)),): "has 3 paired seeds; the sign-flip test needs 5",
        (("gains", (Gain(ours=("cla4",), theirs=("half",)),)),): "did you mean cla2",
        (("control", "flops"),): "give both or none",
    }.items():
        with pytest.raises(ValueError, match=told):
            dataclasses.replace(STUDY, **dict(change))


def test_a_control_widens_the_rows_of_a_study():
    study = dataclasses.replace(STUDY, control="parameters", base="wide")
    configs = dict(sweeping.declared(study, ROWS))
    assert configs["cla2.seed-0"].model.d_ff > configs["wide.seed-0"].model.d_ff
    with pytest.raises(ValueError, match="unknown row 'cla4'"):
        list(sweeping.declared(STUDY, ROWS, cla4={}))


@pytest.mark.usefixtures("mine")
def test_a_pilot_says_what_the_study_can_see():
    run_all()
    # One note, however many rows there are.
    (told,) = studies.noise(report.read(runs.find_runs(["runs"])), STUDY)
    row = r"(0\.0\d\d\d) \(\w+, \d seeds\)"
    found = re.search(
        f"over seeds, in bits per byte, is {row} to {row}.*a difference of (.*) to (.*) with", told
    )
    assert found
    least, most, detected, at_most = map(float, found.groups())
    assert least < most
    assert 1.0 < detected / least < 2.5
    assert at_most / most == pytest.approx(detected / least, rel=0.1)


@pytest.mark.usefixtures("blank")
def test_a_page_says_what_would_mislead_then_the_claims_then_the_rest(mine, capsys):
    late = next(config for config, _ in trials() if config.name.endswith("cla2.seed-5"))
    run_all(but=("cla2.seed-5",))
    write_run(late, 1.0, step=2, evaluated=False)
    out = decide(mine, capsys)
    for text in (Path("runs/mine/report.html").read_text(), out):
        claims, noise = "cla2 is better than half", "The standard deviation over seeds, in"
        assert text.index("cla2.seed-5 does not count") < text.index(claims) < text.index(noise)


@pytest.mark.usefixtures("mine", "blank")
def test_only_the_rows_of_a_study_are_on_its_frontier(mine, capsys):
    """Not the luckiest of the runs that tuned it, of which each has one seed."""
    run_all()
    write_run(replaced(mqa(), {"name": "mine/tuning/mqa.lr-1", "optimizer.peak_lr": 1.0}), 1.5)
    out = decide(mine, capsys)
    best = {line.split("│")[2].strip() for line in out.splitlines() if line.startswith("│ ●")}
    assert best == {"main/half (6 seeds)", "main/cla2 (6 seeds)", "main/wide (3 seeds)"}
    assert "● on the Pareto frontier of the rows that the study declares." in out
    compare.main(["runs/mine", "--out", "all"])
    assert re.search(r"│ ● │ tuning/mqa.lr-1 ", capsys.readouterr().out)


def test_a_guardrail_that_no_run_was_scored_on_is_named(mine):
    run_all()
    declared = experiments.find_study(f"{mine}:main")
    study = dataclasses.replace(STUDY, guardrails=("perplexity", "bits_per_byte/cod"))
    declared = dataclasses.replace(declared, study=study)
    told = "the guardrail bits_per_byte/cod is in no evaluation: the runs were scored on "
    rows = report.read(runs.find_runs(["runs"]))
    assert report.examine(declared, rows).notes == (f"{told}no components",)
    for config, score in trials():
        write_run(config, score, **{"bits_per_byte/code": 2.5, "perplexity/code": 9.0})
    rows = report.read(runs.find_runs(["runs"]))
    assert report.examine(declared, rows).notes == (f"{told}code",)


@pytest.mark.usefixtures("mine")
def test_a_comparison_with_few_seeds_says_what_it_cannot_show():
    run_all()
    read = lambda *names: seeds.merged(
        report.read([runs.Run(Path("runs/mine/main") / name) for name in names])
    )
    told = caption(read("cla2.seed-0", "cla2.seed-1", "mqa.seed-0"))
    assert re.search(r"2 seeds per row and [\d.]+ to [\d.]+ training tokens per parameter", told)
    assert "a sign-flip test needs at least 5 paired seeds" in told
    assert "seed per row" in caption(read("cla2.seed-0", "mqa.seed-0"))
    enough = [f"{row}.seed-{seed}" for row in ("cla2", "mqa") for seed in range(5)]
    for names in (enough, ["cla2.seed-0"]):
        assert "paired seeds" not in caption(read(*names))


# ------------------------------------------------------------------------------------ the paper


@pytest.mark.usefixtures("mine")
def test_ours_stand_beside_the_papers():
    lines, stated = compare._printed()
    for name, perplexity in (("h128_mqa", 14.0), ("h128_mqa_cla2", 14.1)):
        config = replaced(mqa(), {"name": f"cla_1b/{name}"})
        score = np.log2(perplexity) / 2
        write_run(config, score)
    rows = report.read(runs.find_runs(["runs"]))
    (title, _, found, _), (_, _, differences, _) = paper.tables(rows, lines, stated)
    assert title == "Compared with the paper"
    assert [cells[3:] for cells in found] == [
        ["14.00", "13.54", "+0.46"],
        ["14.10", "13.60", "+0.50"],
    ]
    assert differences == [["cla_1b.h128_mqa_cla2 - cla_1b.h128_mqa", "+0.10", "+0.06", "+0.04"]]
    assert paper.tables(rows, {}, stated) == []


@pytest.mark.usefixtures("mine")
def test_scores_of_tasks_stand_beside_the_papers():
    """Means over seeds, by task, and the differences in Wikitext perplexity that the paper states."""
    for name, model, perplexity in (("h128_mqa_cla2", cla2(), 20.0), ("h64_mqa", half(), 20.5)):
        for seed in range(2):
            config = replaced(model, {"name": f"cla_1b_tuned/{name}.seed-{seed}", "seed": seed})
            run = write_run(config, 2.0)
            if (name, seed) != ("h64_mqa", 1):
                metrics = {"wikitext": {"word_perplexity": perplexity + seed / 200}}
                metrics["boolq"] = {"acc": 0.5, "acc_norm": 0.9}
                tasks = {task: {"metrics": values} for task, values in metrics.items()}
                run.write_eval("tasks-full", {"step": config.steps, "tasks": tasks})
    rows = report.read(runs.find_runs(["runs"]))
    made = paper.tables(rows, *compare._printed())
    (_, _, differences, _), (title, _, found, _) = made[1:]
    wanted = "cla_1b_tuned.h128_mqa_cla2 - cla_1b_tuned.h64_mqa, wikitext"
    assert differences[-1] == [wanted, "-0.50", "-0.71", "+0.21"]
    assert title == "Tasks compared with the paper"
    ours = [cells[1:] for cells in found if cells[0] == "cla_1b_tuned.h128_mqa_cla2"]
    assert ours[0][2:] == ["20.00", "19.29", "+0.71"]
    assert ["boolq", "acc", "0.5000", "0.5321", "-0.0321"] in ours
    assert ["piqa", "acc", "missing", "0.6915", "missing"] in ours
    assert len(found) == 2 * 8


# -------------------------------------------------------------------------------------- files


def test_words_of_runs_are_text_in_every_file():
    line = [["=1+1", "a & b_c ~ \\ {x} 50%", None, 0.5]]
    assert tables.as_csv(["x"] * 4, line).decode().splitlines()[1].startswith("'=1+1,")
    latex = tables.as_latex(["x"] * 4, line).decode()
    assert r"a \& b\_c \textasciitilde{} \textbackslash{} \{x\} 50\%" in latex
    assert "| \\<b\\> |" in tables.as_markdown(["x"], [["<b>"]])


@pytest.mark.usefixtures("mine")
def test_the_page_carries_configs_and_curves_as_data_that_cannot_break_out():
    run = write_run(replaced(mqa(), {"name": "mine/a"}), 2.0)
    write_run(replaced(mqa(), {"name": "mine/b", "seed": 3}), 2.1)
    shutil.move(run.path, run.path.with_name("<|script>"))
    text = page.html(report.read(runs.find_runs(["runs"])), "x")
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    found = json.loads(data)
    assert "<" not in data
    assert [one["name"] for one in found["runs"]] == ["<|script>", "b"]
    assert found["runs"][1]["config"]["seed"] == "3"
    assert text.count('data-point="0"') == 4  # two widths of two pictures
    assert '<select id="a"' in text


# --------------------------------------------------------------------------------- what is kept


RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("study", ["small", "maps", "league", "recovery"])
def test_the_committed_results_are_made_again_byte_for_byte(study, tmp_path, monkeypatch):
    """With the commands of their page. All but PNG and PDF, whose compression differs between processors."""
    kept, made = RESULTS / study, tmp_path / "docs" / "results" / study
    shutil.copytree(kept, made)
    reports = sorted(kept.rglob("report.html"))
    for directory in (made / file.relative_to(kept).parent for file in reports):
        for file in directory.iterdir():
            if file.is_file() and file.name not in ("README.md", "report.json"):
                file.unlink()
    for block in re.findall(r"```bash\n(.*?)```", (kept / "README.md").read_text(), re.DOTALL):
        monkeypatch.chdir(tmp_path)
        for line in block.splitlines():
            if line.startswith("cd "):
                monkeypatch.chdir(line.removeprefix("cd "))
            elif line.startswith("python -m launch.compare "):
                compare.main(line.removeprefix("python -m launch.compare ").split())
    assert kept / "report.html" in reports
    for directory in (file.parent for file in reports):
        committed = [file for file in sorted(directory.iterdir()) if file.is_file()]
        for file in committed:
            if file.suffix not in (".png", ".pdf"):
                assert (made / file.relative_to(kept)).read_bytes() == file.read_bytes(), file


def test_a_curve_of_two_rates_has_no_best_one():
    note = report.seeds.Curve(name="x", rows=(), losses=(2.1, 2.2), best=None).note
    assert note == "x: a best learning rate needs three results"
