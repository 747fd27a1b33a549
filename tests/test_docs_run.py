"""The commands of README and docs are run as they stand, with small budgets; what is not run has a reason."""

import dataclasses
import importlib
import re
import shlex
import shutil

import jax
import numpy as np
import pytest
from matplotlib.figure import Figure

import experiments
from cla_jax import runs
from cla_jax.cache.quantized import Int8
from cla_jax.fields import replaced
from cla_jax.model.attention import KV
from experiments import demo, smoke
from tests.test_docs import PAGES, README, ROOT
from tests.test_report import FINGERPRINT, evaluate, log

# Pages whose commands are run: those of VERBATIM with the runs that they train
# themselves, those of WRITTEN beside runs whose records were written without training.
VERBATIM = ("README", "index")
WRITTEN = ("evaluation", "launch", "memory", "prefix", "tasks", "training")
# Pages whose commands train or convert: each in a directory with the trained runs and these sizes and names.
TRAINED = {
    "data": {"--data.stages 20:": "--data.stages 1:"},
    "interop": {" PATH ": " foreign ", "runs/NAME": "runs/imported", " DIR": " exported"},
    "latent": {"--model.kv.rank 24": "--model.kv.rank 8"},
    "sharing": {},
    "uptraining": {"--rope-dims 16": "--rope-dims 4"},
}
# What is not run, by how a command begins, and why.
NOT_RUN = {
    "make": "an environment of its own; its targets are checked below",
    "pip": "installs packages",
    "source": "only sets a shell up",
    "git": "a network",
    "gcloud": "a cloud account",
    "jupyter": "a browser; the notebook is executed by another test",
    "python -m launch.plan": "a compiler for TPUs or GPUs, which has tests of its own",
    "python -m launch.convert fetch": "93 MB from a network",
    "python -m launch.tasks fetch": "a network",
    "python -m launch.evaluate runs/smollm2-135m": "the model of 93 MB",
}
BENCHMARKS = {"python -m benchmarks": "minutes of measurements"}
# What of WRITTEN is not run either.
NOT_THERE = {
    "python -m launch.evaluate runs/demo/seeds --task-data": "the harness, in an environment of its own",
    "python -m launch.evaluate": "needs trained weights; README's commands evaluate them",
    "python -m launch.generate": "needs trained weights; README's commands generate with them",
    "python -m launch.train smoke": "README's commands train it",
    "python -m launch.train demo ": "README's sweep trains its rows",
    "python -m launch.train demo.h16_mqa --optimizer": "compiles a step; tests of optimizers do",
    "python -m launch.train NAME": "several devices, several hosts, or text of the user's",
    "python -m launch.sweep smoke.grid": "six trainings in processes of their own; README's sweep runs",
    "python -m launch.status smoke.grid": "belongs to that sweep",
    "python -m launch.cancel smoke.grid": "belongs to that sweep",
    "python -m launch.compare runs/smoke/grid": "belongs to that sweep",
    "python -m launch.serve_trace": "a replay of minutes; its tests replay short traces",
} | BENCHMARKS
# Pages whose commands are only parsed, and why.
PARSED = {
    "eviction": "minutes of compilation; tests of evaluation use each policy",
    "paper": "pretraining of 1B and 3B models",
    "pods": "compilers for TPUs and GPUs",
    "studies": "trainings of hours; tests make reports of studies from written runs",
    "benchmarks": "minutes of measurements beside peers",
    "design": "",
    "extending": "",
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page):
    found = []
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append(shlex.join(words))
    return found


def reason(command, reasons=NOT_RUN):
    found = (why for start, why in reasons.items() if f"{command} ".startswith(start))
    return next(found, None)


def test_every_page_is_run_or_says_why_not():
    names = {page.stem for page in (README, *PAGES)}
    assert names == {*VERBATIM, *WRITTEN, *TRAINED, *PARSED}
    for page in PAGES:
        if page.stem in PARSED and commands(page):
            assert PARSED[page.stem], page.stem


def test_what_is_made_has_a_target():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in (README, *PAGES):
        for command in commands(page):
            if command.startswith("make "):
                assert command.split()[1] in targets, command
    recipe = re.search(r"^demo:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert recipe is not None
    # Its commands are those that are run here.
    assert re.findall(r"launch\.(\w+) (?:runs/)?demo[./]seeds", recipe[1]) == [
        *("sweep", "evaluate", "compare")
    ]


SMALL = {
    "model.n_layers": 2,
    "model.d_model": 16,
    "model.d_ff": 24,
    "model.d_head": 4,
    "data.source": "sotu:4",
    "data.held_out": 0.3,
    "data.seq_len": 64,
    "batch_size": 2,
    "steps": 2,
    "placement.log_every": 1,
    "placement.save_every": 2,
    "placement.eval_every": 2,
}


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A directory as after `make demo`, with text of the user's, where all experiments are small."""
    directory = tmp_path_factory.mktemp("clone")
    small = replaced(demo.h16_mqa(), SMALL)
    # One model for all, so that its programs are compiled once.
    tiny = replaced(small, {"name": "smoke/tiny", "model.kv_norm": "own"})

    def h16_mqa():
        return small

    def learning_rate():
        yield "h16_mqa.lr", small

    (directory / "books").mkdir()
    for i in range(40):
        (directory / "books" / f"{i}.txt").write_text(f"A book, number {i}.\n" + "Words. " * 40)
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(jax, "devices", lambda *_: first)
        patched.setattr(jax, "device_count", lambda *_: 1)
        patched.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # of the trials
        draw_nothing(patched)
        patched.chdir(directory)
        patched.setattr(demo, "h16_mqa", h16_mqa)
        patched.setattr(demo, "ROWS", (h16_mqa, demo.h16_mqa_cla2))
        patched.setattr(demo, "SWEEPS", (demo.seeds, learning_rate))
        patched.setattr(smoke, "tiny", lambda: tiny)
        patched.setattr(smoke, "ROWS", (smoke.tiny,))
        smoke.tiny.__name__ = "tiny"
        run("python -m launch.train demo.h16_mqa_cla2 --name demo/seeds/h16_mqa_cla2.seed-0")
        yield directory


def draw_nothing(patched):
    """Other tests draw pictures."""
    patched.setattr("cla_jax.report._figures", lambda _: {})
    patched.setattr("cla_jax.report.pareto.plot", lambda *_, **__: Figure())
    patched.setattr("cla_jax.report.page._inline", lambda *_: "")


def run(command):
    _, _, module, *argv = shlex.split(command)
    try:
        importlib.import_module(module).main(argv)
    except SystemExit as end:
        if end.code:
            raise


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [p for p in (README, *PAGES) if p.stem in VERBATIM], ids=lambda p: p.stem
)
def test_the_blocks_of_a_page_run_verbatim(clone, text):
    ran = [command for command in commands(text) if reason(command) is None]
    assert ran
    for command in ran:
        run(command)
    for example in blocks(text, "python"):
        if "import" in example:  # others are pieces of our code
            exec(compile(example, text.name, "exec"), {})
    if text == README:
        assert (clone / "runs/demo/mine/checkpoints/00000002.json").exists()
        assert (clone / "runs/mine/books/metrics.jsonl").exists()
        assert (clone / "runs/demo/seeds/report.html").exists()
        assert (clone / "exported/config.json").exists()


SEEDS = ("runs/demo/seeds/h16_mqa.seed-0", "runs/demo/seeds/h16_mqa_cla2.seed-0")


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if p.stem in TRAINED], ids=lambda p: p.stem)
def test_the_commands_of_a_page_train_and_convert(clone, page, tmp_path, monkeypatch):
    if not (clone / SEEDS[0]).exists():
        run("python -m launch.train demo.h16_mqa --name demo/seeds/h16_mqa.seed-0")
    for trained in SEEDS:
        shutil.copytree(clone / trained, tmp_path / trained)
    shutil.copytree(clone / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cla_jax").mkdir()
    for i in range(20):
        (tmp_path / f"cla_jax/{i}.py").write_text(f"# A module, number {i}.\n" + "pass\n" * 40)
    if page.stem == "interop":
        run(f"python -m launch.convert export {SEEDS[0]} foreign")
    ran = [c for c in commands(page) if reason(c) is None and reason(c, BENCHMARKS) is None]
    assert ran
    for command in ran:
        for words, ours in TRAINED[page.stem].items():
            command = command.replace(words, ours)
        run(command)


@pytest.fixture(scope="module")
def beside_runs(tmp_path_factory):
    """A directory with the runs of `make demo` as a comparison reads them: their records, no weights."""
    directory = tmp_path_factory.mktemp("beside")
    with pytest.MonkeyPatch.context() as patched:
        draw_nothing(patched)
        # Whether trials fit is asked of compilers for TPUs and GPUs, which are not installed.
        patched.setattr("launch.sweeps.fitting.check", lambda *_: {})
        patched.chdir(directory)
        for i, (trial, config) in enumerate(demo.seeds()):
            small = replaced(config, {"name": f"demo/seeds/{trial}", "steps": 30})
            made = runs.open_run(small, data_fingerprint=FINGERPRINT, tokenizer_json="{}")
            log(made)
            evaluate(made, 8.0 + i / 10)
            made.write_eval("cached-int8", made.eval("full") | {"cache": "int8"})
        yield directory


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem in WRITTEN], ids=lambda p: p.stem)
def test_the_commands_of_a_page_run_beside_written_runs(beside_runs, page, capsys):
    """Those for clusters and clouds as far as they can without one: until something would be submitted."""
    ran = [c for c in commands(page) if reason(c) is None and reason(c, NOT_THERE) is None]
    assert ran
    for command in ran:
        run(as_dry_run(command) if " --engine " in command else command)
        assert capsys.readouterr().out, command
    if page.stem == "tasks":
        assert list((beside_runs / "data/recall").iterdir())


def as_dry_run(command):
    words = [word for word in shlex.split(command) if word != "…"]
    end = words.index("--") if "--" in words else len(words)
    return shlex.join([*words[:end], "--dry-run", *words[end:]])


def test_the_example_of_the_page_on_sharing_runs(capsys):
    (page,) = (page for page in PAGES if page.stem == "sharing")
    (example,) = blocks(page, "python")
    exec(compile(example, page.name, "exec"), {})
    assert capsys.readouterr().out.splitlines()[-1] == "3 kv 5 1"  # of whose keys five layers read


def test_the_study_of_the_page_on_studies_can_be_run(tmp_path):
    (page,) = (page for page in PAGES if page.stem == "studies")
    (example,) = blocks(page, "python")
    (tmp_path / "mine.py").write_text(example)
    declared = experiments.find_study(f"{tmp_path / 'mine.py'}:main")
    assert len(declared.trials) == 12
    assert declared.study.needed <= 6


def test_the_format_that_the_page_on_extending_adds_works():
    (page,) = (page for page in PAGES if page.stem == "extending")
    (example,) = (block for block in blocks(page, "python") if "class Int6" in block)
    exec(compile(example, page.name, "exec"), found := {"dataclasses": dataclasses, "Int8": Int8})
    k, v = np.random.default_rng(0).normal(size=(2, 1, 5, 2, 8)).astype(np.float32)
    errors = {}
    for made in (found["Int6"](name="int6", dtype="float32"), Int8(name="int8", dtype="float32")):
        read = made.decode(made.encode(KV(k, v)))
        errors[made.name] = np.abs(read.k_BSKH - k) / np.abs(k).max(axis=-1, keepdims=True)
    assert errors["int8"].max() < errors["int6"].max() < 1.02 / 62
