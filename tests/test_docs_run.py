"""The commands of README and docs are run as they stand, with small budgets; what is not run has a reason."""

import dataclasses
import gzip
import importlib
import json
import re
import runpy
import shlex
import shutil
import sys

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
from launch.plan import compiling_elsewhere
from tests.test_docs import PAGES, README, ROOT
from tests.test_report import FINGERPRINT, evaluate, log

# Pages whose commands are run as they stand: those of VERBATIM with the runs that they train themselves,
# those of RECORDED with the runs of docs/results, which are finished.
VERBATIM = ("README", "index")
RECORDED = ("studies",)
# Those of WRITTEN beside runs whose records were written without training; what needs weights, as TRAINED.
WRITTEN = ("evaluation", "launch", "memory", "pods", "prefix", "tasks", "training")
WITH_WEIGHTS = (
    "python -m launch.evaluate",
    "python -m launch.generate",
    "python -m launch.serve_trace",
    "python -m launch.train NAME",
    "python -m launch.train demo",
    "python -m launch.train smoke",
)
# Pages whose commands train or convert: each in a directory with trained runs. What a command has of these
# words is replaced.
TRAINED = ("benchmarks", "data", "eviction", "interop", "latent", "paper", "sharing", "uptraining")
TRACE = "--made.requests 2 --made.shared 16 --made.own 4 --made.new-tokens 2"
REPLACED = {
    "--data.stages 20:": "--data.stages 1:",
    "--make shared-prompt": f"--make shared-prompt {TRACE}",
    " PATH ": " foreign ",
    "runs/NAME": "runs/imported",
    " NAME ": " smoke ",
    " DIR": " exported",
    "heads.mha": "runs/demo/seeds/h16_mqa.seed-0",
    "runs/small/main/h16_mqa_cla3.": "runs/demo/seeds/h16_mqa_cla2.",
    "runs/small/maps/h16_mqa_fused_lite.": "runs/demo/seeds/h16_mqa_cla2.",
    "runs/small/main/": "runs/demo/seeds/",
    "runs/smollm2-135m": "runs/demo/seeds/h16_mqa.seed-0",
    "--T 0.75 --T 0.92 --T 0.96": "--T 0.92",
    "--T 0.7 --T 0.8 --T 0.94": "--T 0.8",
    "--T 0.8 --T 0.94 --T 0.99": "--T 0.94",
    "--kv-map cla:2 cla:3": "--kv-map cla:2",
    "--kv-map identity cla:2 cla:4 random:4 damage:4": "--kv-map cla:2",
    "--kv-heads 3": "--kv-heads 1",
    "--latents 320:64 128:64 64:64 160:32 96:32": "--latents 8:4 4:2",
    "--latents 128:64": "--latents 8:4",
    " 64:64": "",
    "--model.kv.rank 24": "--model.kv.rank 8",
    "--rope-dims 16": "--rope-dims 4",
}
# Flags that make a command small, by how it begins.
SMALLER = {
    "python -m benchmarks.compile_time": "--layers 2 4 --rounds 1",
    "python -m benchmarks.conversions": "--init mean least_squares svd",
    "python -m benchmarks.decode": "--shape 7m --batch 1 --context 8 --new-tokens 4 --rounds 1 "
    "--only ours torch --output made.json",
    "python -m benchmarks.eviction runs/demo/seeds/h16_mqa.seed-0 --task": "--length 150 --count 1",
    "python -m benchmarks.eviction runs": "--windows 2 --policy h2o",
    "python -m benchmarks.eviction_profile": "--tokens 80 --layers 1 --width 8 --rounds 1",
    "python -m benchmarks.eviction_step": "--context 48 --layers 1 --width 8 --steps 1 --rounds 1",
    "python -m benchmarks.latent": "--context 32 --layers 1 --rounds 1",
    "python -m benchmarks.prefix": "--batch 2 --shared 16 --alone 16 --page 16 --heads 2 1 8 --layers 1 "
    "--rounds 1 --output made.json",
    "python -m benchmarks.serving": f"{TRACE} --rows 2 --page 8 --heads 2 2 8 --layers 1 "
    "--rounds 1 --output made.json",
    "python -m benchmarks.train_step": "--shape 7m --rounds 1 --burst 1 --only ours torch "
    "--output made.json",
    "python -m launch.evaluate": "--windows 2",
    "python -m launch.evaluate runs/demo/seeds --task-data": "--limit 1",
    "python -m launch.generate": "--new-tokens 4",
    "python -m launch.serve_trace": "--rows 2 --chunk 8",
    # Of models with billions of parameters the launch, then a small one of the same row.
    "python -m launch.sweep cla_": "--dry-run",
    "python -m launch.train smoke --data.mixture": "--name mine/mixture",
    "python -m launch.train cla_": "--model.n-layers 2 --model.d-model 16 --model.d-ff 24 "
    "--model.n-heads 4 --model.d-head 4 --model.vocab-size 257 --model.compute-dtype float32 "
    "--data.source sotu:4 --data.tokenizer byte --data.held-out 0.3 --data.seq-len 64 --batch-size 2 "
    "--steps 2 --placement.eval-batch-size 8",
}
# What other targets run, by how a command begins: they have compilers for accelerators, torch, the harness.
PLANS = "python -m launch.plan cla_"
BESIDE_TORCH = (
    "python -m benchmarks.decode",
    "python -m benchmarks.serving --rounds",
    "python -m benchmarks.train_step",
)
BY_THE_HARNESS = "python -m launch.evaluate runs/demo/seeds --task-data data/recall"
ELSEWHERE = (PLANS, *BESIDE_TORCH, BY_THE_HARNESS)
# What is not run, by how a command begins, and why.
NOT_RUN = {
    "make": "an environment of its own; its targets are checked below",
    "pip": "installs packages",
    "source": "only sets a shell up",
    "git": "a network",
    "gcloud": "a cloud account",
    "jupyter": "a browser; the notebook is executed by another test",
    "python -m benchmarks.maxtext": "MaxText, 5 GB, and a compiler for TPUs",
    "python -m benchmarks.serving --model": "the model of 93 MB",
    "python -m benchmarks.tasks": "the model of 93 MB",
    "python -m launch.convert fetch": "93 MB from a network",
    "python -m launch.evaluate runs/demo/seeds --task-data data/tasks": "86 MB from a network",
    "python -m launch.evaluate runs/smollm2-135m --task": "86 MB from a network",
    "python -m launch.tasks fetch": "86 MB from a network",
    "python -m launch.train NAME --coordinator": "four hosts; `make test-hosts` starts several processes",
    "python -m launch.train NAME --placement": "eight devices; tests of meshes have them",
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL)


def commands(page):
    """Those of its blocks and of its tables."""
    found = []
    cells = re.findall(
        r"`(python -m [^`]+)`", "".join(re.findall(r"^\|.*\n", page.read_text(), re.M))
    )
    for block in (*blocks(page, "bash"), "\n".join(cells)):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append(shlex.join(words))
    return found


def reason(command, reasons=NOT_RUN):
    """What is said of a command by the longest beginning that it has."""
    starts = [start for start in reasons if f"{command} ".startswith(start)]
    return reasons[max(starts, key=len)] if starts else None


def run_here(page):
    """The commands of a page that have no reason against it, and no other target."""
    here = [c for c in commands(page) if reason(c) is None and not c.startswith(ELSEWHERE)]
    assert here
    return here


def smaller(command):
    for words, ours in REPLACED.items():
        command = command.replace(words, ours)
    return f"{command} {reason(command, SMALLER) or ''}".rstrip()


def test_the_commands_of_every_page_are_run():
    with_commands = {page.stem for page in (README, *PAGES) if commands(page)}
    assert with_commands == {*VERBATIM, *WRITTEN, *RECORDED, *TRAINED}


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
    patched.setattr("cla_jax.report.pareto.saved", lambda *_: b"")
    patched.setattr("cla_jax.report.page._inline", lambda *_: "")


def run(command):
    _, _, module, *argv = shlex.split(command)
    try:
        if module.startswith("benchmarks."):
            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(sys, "argv", [module, *argv])
                # The tests have several devices; a contestant has a process and one device.
                patched.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
                # Both are for a process of its own.
                patched.setattr("launch.allocator.set_up", lambda: None)
                patched.setattr(jax, "clear_caches", lambda: None)
                # Another test may have imported it; runpy would warn of that.
                patched.delitem(sys.modules, module, raising=False)
                runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            importlib.import_module(module).main(argv)
    except SystemExit as end:
        if end.code:
            raise


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", [p for p in (README, *PAGES) if p.stem in VERBATIM], ids=lambda p: p.stem
)
def test_the_blocks_of_a_page_run_verbatim(clone, text):
    for command in run_here(text):
        run(command)
    for example in blocks(text, "python"):
        if "import" in example:  # others are pieces of our code
            exec(compile(example, text.name, "exec"), {})
    if text == README:
        assert (clone / "runs/demo/mine/checkpoints/00000002.json").exists()
        assert (clone / "runs/mine/books/metrics.jsonl").exists()
        assert (clone / "runs/demo/seeds/report.html").exists()
        assert (clone / "exported/config.json").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("clone")
def test_the_example_of_the_page_on_prefixes_runs(capsys):
    (page,) = (page for page in PAGES if page.stem == "prefix")
    (example,) = blocks(page, "python")
    exec(compile(example, page.name, "exec"), {})
    assert "bytes are allocated" in capsys.readouterr().out


SEEDS = ("runs/demo/seeds/h16_mqa.seed-0", "runs/demo/seeds/h16_mqa_cla2.seed-0")


@pytest.fixture
def beside_trained(clone, tmp_path, monkeypatch):
    """A directory of its own with two trained runs, their data, and text of the user's."""
    if not (clone / SEEDS[0]).exists():
        run("python -m launch.train demo.h16_mqa --name demo/seeds/h16_mqa.seed-0")
    for trained in SEEDS:
        shutil.copytree(clone / trained, tmp_path / trained)
    shutil.copytree(clone / "data", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    for directory in ("cla_jax", "src/a", "web"):
        (tmp_path / directory).mkdir(parents=True)
    for i in range(20):
        for directory in ("cla_jax", "src/a"):
            (tmp_path / directory / f"{i}.py").write_text(
                f"# A module, number {i}.\n" + "pass\n" * 40
            )
    pages = [json.dumps({"text": f"Page {i}. " + "Words. " * 40}) for i in range(20)]
    (tmp_path / "web/pages.jsonl.gz").write_bytes(gzip.compress("\n".join(pages).encode()))
    return tmp_path


def with_weights(page):
    here = run_here(page)
    return [c for c in here if page.stem in TRAINED or c.startswith(WITH_WEIGHTS)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    [p for p in PAGES if p.stem in (*TRAINED, *WRITTEN) and with_weights(p)],
    ids=lambda p: p.stem,
)
@pytest.mark.usefixtures("beside_trained")
def test_the_commands_of_a_page_train_and_convert(page):
    if page.stem == "interop":
        run(f"python -m launch.convert export {SEEDS[0]} foreign")
    if page.stem == "paper":
        run(smaller("python -m launch.train cla_1b.h128_mqa") + " --name cla_1b/small")
    for command in with_weights(page):
        run(smaller(command))


@pytest.mark.interop
@pytest.mark.usefixtures("beside_trained")
def test_the_harness_scores_generated_tasks(capsys):
    run("python -m launch.tasks recall data/recall --length 1000 --count 2")
    for page in PAGES:
        for command in commands(page):
            if command.startswith(BY_THE_HARNESS):
                run(smaller(command))
    assert re.search(r"fastgen:T=0.9 +perplexity .* 1 example of", capsys.readouterr().out)


@pytest.mark.interop
@pytest.mark.parametrize(
    "command", [c for page in PAGES for c in commands(page) if c.startswith(BESIDE_TORCH)]
)
def test_benchmarks_beside_torch_run(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(smaller(command))
    (file,) = tmp_path.iterdir()
    assert '"torch"' in file.read_text()


@pytest.mark.slow
def test_the_commands_of_a_page_run_on_recorded_runs(tmp_path, monkeypatch, capsys):
    """A sweep whose runs are finished trains nothing."""
    for sweep in ("tuning", "main"):
        shutil.copytree(ROOT / "docs/results/small" / sweep, tmp_path / "runs/small" / sweep)
    monkeypatch.chdir(tmp_path)
    draw_nothing(monkeypatch)
    (page,) = (page for page in PAGES if page.stem in RECORDED)
    for command in run_here(page):
        run(command)
    told = capsys.readouterr().out
    assert "runs/small/tuning: 30 done" in told
    assert "runs/small/main: 47 done" in told
    assert "h16_mqa_cla2 is better than h8_mqa: inconclusive" in told
    assert len(list((tmp_path / "docs/results/small/main").iterdir())) == 47


GPUS = ("a100", "b200", "h100", "h200")


def plans():
    """The commands that compile for accelerators, with the topologies that one compiler knows."""
    for page in (README, *PAGES):
        for command in commands(page):
            if not command.startswith(PLANS):
                continue
            words, _, fields = command.partition(" -- ")
            topologies = re.findall(r" --topology (\S+)", words)
            for mark, on_gpus in ((pytest.mark.pods, False), (pytest.mark.gpu, True)):
                known = [one for one in topologies if one.startswith(GPUS) is on_gpus]
                if known:
                    wanted = re.sub(r" --topology \S+", "", words) + "".join(
                        f" --topology {t}" for t in known
                    )
                    yield pytest.param(
                        f"{wanted} -- {fields}", id=f"{page.stem}: {command}", marks=mark
                    )


@pytest.mark.parametrize("command", [*plans()])
def test_steps_are_planned_as_the_pages_say(command, capsys):
    """Of models with the sequences, heads and vocabulary of the paper, and fewer and narrower layers."""
    with compiling_elsewhere():
        run(f"{command} --model.n-layers 4 --model.d-model 256 --model.d-ff 512")
    assert "peak" in capsys.readouterr().out


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
        for trial, config in smoke.grid():
            named = replaced(config, {"name": f"smoke/grid/{trial}"})
            made = runs.open_run(named, data_fingerprint=FINGERPRINT, tokenizer_json="{}")
            log(made, named.steps, evaluated=8.0)
        yield directory


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem in WRITTEN], ids=lambda p: p.stem)
def test_the_commands_of_a_page_run_beside_written_runs(beside_runs, page, capsys):
    """Those for clusters and clouds as far as they can without one: until something would be submitted."""
    for command in run_here(page):
        if not command.startswith(WITH_WEIGHTS):
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


H16_MQA = demo.h16_mqa  # not the small one of other tests


def test_the_experiment_that_the_page_on_extending_adds_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "h16_mqa", H16_MQA)
    (page,) = (page for page in PAGES if page.stem == "extending")
    (example,) = (block for block in blocks(page, "python") if "h16_mqa_cla4()" in block)
    file = tmp_path / "mine.py"
    file.write_text(f"from experiments.demo import h8_mqa, h16_mqa, h16_mqa_cla2\n{example}")
    (found,) = experiments.find(f"{file}:h16_mqa_cla4")
    assert len(found.model.sharing.kv_layers) == 2


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
