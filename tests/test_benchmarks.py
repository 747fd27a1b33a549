import dataclasses
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import accelerator, eviction, eviction_pareto
from benchmarks.common import SHAPES
from cla_jax import costs
from cla_jax.config import ModelConfig
from cla_jax.model.platform import query_block
from experiments import smoke

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def decode_bandwidth():
    """The benchmark, without what it sets up for a process of its own."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("launch.allocator.set_up", lambda: None)
        return importlib.import_module("benchmarks.decode_bandwidth")


def test_a_latent_and_mqa_have_equal_bytes_and_if_asked_equal_parameters(monkeypatch):
    monkeypatch.setattr("launch.allocator.set_up", lambda: None)
    latent = importlib.import_module("benchmarks.latent")
    total = lambda config: costs.parameters(config).total
    own = latent.models(latent.Options(layers=4))
    equal = latent.models(latent.Options(layers=4, equal_parameters=True))
    for kv_map in ("identity", "cla:2"):
        mqa, wide, narrow = (
            own[f"MQA, {kv_map}"],
            own[f"latent, {kv_map}"],
            equal[f"latent, {kv_map}"],
        )
        assert mqa.kv_elements == wide.kv_elements == narrow.kv_elements
        assert wide.d_ff == mqa.d_ff
        # The MLP's width is a multiple of 16: 16 columns more or less would be further away.
        columns = 16 * 4 * mqa.mlp.n_matrices * mqa.d_model
        assert narrow.d_ff % 16 == 0
        assert abs(total(narrow) - total(mqa)) <= columns / 2 < total(wide) - total(mqa)


@pytest.mark.parametrize("name", ["7m", "100m"])
def test_the_products_of_a_training_step_have_its_flops(name, monkeypatch):
    """The costs count half of the scores, and 6 FLOPs for each norm's scale."""
    monkeypatch.setattr("launch.allocator.set_up", lambda: None)
    train_matmul = importlib.import_module("benchmarks.train_matmul")
    shape, length = SHAPES[name], 256
    model = ModelConfig(**shape, kv_norm="block")
    spec = {"shape": shape, "batch_size": 4, "seq_len": length}
    counted = 3 * sum(2 * n * r * k * c for n, r, k, c in train_matmul.products(spec))
    # In blocks of queries, half of each block's own square is masked.
    masked = 6 * model.n_layers * model.n_heads * model.d_head * query_block(length)
    norms = 6 * model.d_model * (2 * model.n_layers + 1)
    expected = costs.train_flops_per_token(model, length) + masked - norms
    assert counted / (4 * length) == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_what_a_decode_step_reads_is_counted(decode_bandwidth, tmp_path):
    """The rest of what decode_bandwidth prints is time."""
    model, context, new_tokens = smoke.tiny().model, 6, 5
    decode_bandwidth.main(
        decode_bandwidth.Options(
            name="smoke.tiny",
            batch=(1, 3),
            rounds=1,
            context=context,
            new_tokens=new_tokens,
            probe="1MiB",
            output=tmp_path / "out.json",
        )
    )
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["bandwidth"] > 0
    assert [row["batch"] for row in result["rows"]] == [1, 3]
    # Both layers read the one KV layer they share: keys and values of one head in float32.
    a_token = model.n_layers * 2 * model.d_head * 4
    for row in result["rows"]:
        assert row["bytes"] == {
            "weights": 4 * costs.parameters(model).total,
            "cache": row["batch"] * a_token * (context + new_tokens // 2),
        }
        [round_] = row["rounds"]
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / round_["step_seconds"])
        reached = sum(row["bytes"].values()) / round_["step_seconds"]
        assert row["fraction"] == pytest.approx(reached / result["bandwidth"])


@pytest.mark.slow
def test_what_the_program_of_a_prefix_shared_cache_reads_is_what_it_must():
    """Each page once for all rows of a work item, or once for its row, by the compiled program."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("launch.allocator.set_up", lambda: None)
        prefix = importlib.import_module("benchmarks.prefix")
    config = dataclasses.replace(smoke.tiny().model, n_kv_heads=2)
    for batch, shared, alone in ((3, 0, 64), (18, 256, 576)):
        options = prefix.Options(alone=alone)
        spec, cache = prefix.contestants(config, batch, shared, options)["two-phase"]
        expected = prefix.read_bytes(config, batch, shared, options.alone)["two-phase"]
        assert abs(prefix.program_reads(spec, cache) / expected - 1) < 0.02, (batch, shared)


WITHOUT_PACKAGES = """
import sys
for name in ("tensorflow_datasets", "grain", "array_record", "tyro"):
    sys.modules[name] = None  # cannot be imported
from benchmarks import accelerator
accelerator.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_what_a_gpu_has_to_show_can_be_measured(tmp_path):
    """Small, on the CPU, without the packages that such a machine may lack."""
    flags = ["--tiny", "--together", "--minutes", "5", "--out", str(tmp_path)]
    command = [sys.executable, "-c", WITHOUT_PACKAGES, *flags]
    subprocess.run(command, cwd=ROOT, check=True)
    found = accelerator.results([tmp_path])
    assert [r["name"] for r in found] == [m.name for m in accelerator.measurements(tiny=True)]
    assert all("result" in r for r in found), found
    assert len({m.name for m in accelerator.measurements(tiny=False)}) == len(
        accelerator.measurements(tiny=False)
    )
    shown = accelerator.tables(found)
    assert "| cpu | smoke.tiny | 2 | none | True |" in shown
    assert "Nothing of this was measured" not in shown


def test_measurements_are_continued_where_they_were_cut_off(tmp_path, monkeypatch, capsys):
    made = []

    def record(measurement):
        made.append(measurement.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        failed = {"error": "no such kernel"} if len(made) == 2 else {"result": {}}
        return {"name": measurement.name, "device": "a GPU", **failed}

    monkeypatch.setattr(accelerator, "record", record)
    run = ["--tiny", "--together", "--out", str(tmp_path)]
    with pytest.raises(KeyboardInterrupt):
        accelerator.main(run)
    names = [m.name for m in accelerator.measurements(tiny=True)]
    assert made == names[:3]
    (file,) = tmp_path.iterdir()
    with file.open("a") as lines:
        lines.write('{"name": "torn')
    made.clear()
    monkeypatch.setattr(
        accelerator,
        "record",
        lambda m: made.append(m.name) or {"name": m.name, "device": "a GPU", "result": {}},
    )
    accelerator.main(run)
    assert made == names  # the device again; what failed, and what was not reached
    made.clear()
    accelerator.main(run)
    assert made == names[:1]
    monkeypatch.setattr(
        accelerator,
        "record",
        lambda m: made.append(m.name) or {"name": m.name, "device": "another", "result": {}},
    )
    made.clear()
    accelerator.main(run)
    assert made == names
    made.clear()
    accelerator.main([*run, "--minutes", "0.1"])
    assert made == []
    assert "the time is over" in capsys.readouterr().out


def test_what_fails_or_takes_too_long_is_not_in_the_way_of_the_others(
    tmp_path, monkeypatch, capsys
):
    made, first = [], {}
    names = [m.name for m in accelerator.measurements(tiny=True)]
    _, large, slow, *others = names

    def apart(measurement, _tiny, seconds, _out):
        made.append(measurement.name)
        if measurement.name == large:
            error = "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory while trying to allocate"
            return {"name": large, "device": "a GPU", "error": error}
        if measurement.name == slow:
            return {"name": slow, "late": first.setdefault("seconds", seconds)}
        return {"name": measurement.name, "device": "a GPU", "result": {}}

    monkeypatch.setattr(accelerator, "_apart", apart)
    accelerator.main(["--tiny", "--out", str(tmp_path)])
    made.clear()
    accelerator.main(["--tiny", "--out", str(tmp_path), "--minutes", "8"])  # less than it had
    assert made == names[:1]
    assert f"takes more than is left  {slow}" in capsys.readouterr().out
    accelerator.main(["--tiny", "--out", str(tmp_path), "--minutes", "99"])
    assert made == [names[0], names[0], slow]
    # On another stay it comes behind those that were not reached.
    for file in tmp_path.iterdir():
        kept = [line for line in file.read_text().splitlines() if json.loads(line)["name"] == slow]
        file.write_text("\n".join(kept) + "\n")
    made.clear()
    accelerator.main(["--tiny", "--out", str(tmp_path), "--minutes", "99"])
    assert made == [names[0], large, *others, slow]


STAY = """
import os, signal, sys, types
import jax
from benchmarks import accelerator
card, rate, dies, *flags = sys.argv[1:]
jax.devices = lambda: [types.SimpleNamespace(device_kind=card)]
begun = []

def pretended(what):
    def run(**arguments):
        begun.append(what)
        if len(begun) == int(dies):
            os.kill(os.getpid(), signal.SIGKILL)
        reached = {"tokens_per_s": 7.0, "fraction": 0.5e12 / float(rate)}
        return {"matmul_flops": 1e14, "bandwidth": {"read": float(rate)}, **reached}
    run.__name__ = what if what in ("device", "decoding") else "another"
    return run

listed = [
    accelerator.Measurement(name=m.name, run=pretended(m.run.__name__), arguments=m.arguments)
    for m in accelerator.measurements(tiny=True)
]
accelerator.measurements = lambda tiny: listed
accelerator.main(["--tiny", "--together", *flags])
"""


def test_stays_on_several_machines_make_one_set(tmp_path):
    """Two machines with one kind of card, of which the first is killed half way; then another card."""
    names = [m.name for m in accelerator.measurements(tiny=True)]
    half = len(names) // 2

    def stay(card, rate, dies=0):
        words = [sys.executable, "-c", STAY, card, str(rate), str(dies), "--out", str(tmp_path)]
        return subprocess.run(words, cwd=ROOT, check=False).returncode

    measured = lambda: [(r["device"], r["name"]) for r in accelerator.results([tmp_path])]
    assert stay("H100", 1e12, dies=half + 1) == -signal.SIGKILL
    assert measured() == [("H100", name) for name in names[:half]]
    assert stay("H100", 1e12) == 0
    # Of what was there, only the measurement that tells the card is made on every machine.
    assert sorted(measured()) == sorted(("H100", name) for name in [names[0], *names])
    assert stay("H200", 2e12) == 0
    of_each = [(card, name) for card in ("H100", "H200") for name in names]
    assert sorted(measured()) == sorted([("H100", names[0]), *of_each])
    # Each row is of one card, and a fraction is of its own bandwidth.
    shown = accelerator.tables(accelerator.results([tmp_path]))
    for card, rate, fraction in (("H100", 1000, "50%"), ("H200", 2000, "25%")):
        assert shown.count(f"| {card} | 100 | {rate} |") == 1
        assert shown.count(f"| {card} | smoke.tiny | 2 | dense | xla | 7 | {fraction} |") == 1


def test_the_newest_record_counts_wherever_it_is():
    old = {"name": "a", "device": "x", "when": "2026-01-02 10:00:00", "result": {"n": 1}}
    new = {"name": "a", "device": "x", "when": "2026-01-02 10:00:01", "result": {"n": 2}}
    died = {"name": "a", "when": "2026-01-01 10:00:00", "error": "the process ended"}
    for found in ([new, old, died], [died, old, new]):
        assert list(accelerator.newest(found).values()) == [new]


def test_a_process_that_dies_leaves_what_it_was_about(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator.sys, "executable", "false")
    found = accelerator._apart(accelerator.measurements(tiny=True)[1], True, 9.0, tmp_path)
    assert {"what", "when", "d_head", "error"} <= set(found)


SLEEPING = """
import time
from benchmarks import accelerator
measurement = accelerator.Measurement(name="x", run=dict, arguments={})
accelerator.measurements = lambda tiny: [measurement]
accelerator.record = lambda _: print("begun", flush=True) or time.sleep(30) or "not ended"
accelerator.child("x", True)
"""


def test_a_measurement_ends_when_what_has_started_it_is_killed():
    shell = ["sh", "-c", '"$0" -c "$1" & wait', sys.executable, SLEEPING]
    with subprocess.Popen(shell, cwd=ROOT, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "begun\n"
        started.kill()
        assert started.stdout.read() == ""


@pytest.mark.parametrize("flags", [["--out", "X", "--show"], ["--out", "Y", "--done", "X"]])
def test_results_that_are_not_there_are_refused(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        accelerator.main(flags)
    assert "no results-*.jsonl in X" in capsys.readouterr().err


def test_a_benchmark_that_fails_leaves_no_empty_file(decode_bandwidth, tmp_path, capsys):
    output = tmp_path / "out.json"
    options = decode_bandwidth.Options(name="smoke.tiny", cache="int9", probe="1MiB", output=output)
    for before in (None, "{}"):
        if before:
            output.write_text(before)
        with pytest.raises(SystemExit):
            decode_bandwidth.main(options)
        assert "did you mean int8" in capsys.readouterr().err
        assert (output.read_text() if output.exists() else None) == before


def eviction_line(policy: str, worse: list[float], T: float = 0.9) -> dict:
    asked = {"run": "x", "context": 64, "prompt": 0.5, "chunk": 8, "windows": 3, "checkpoint": "c"}
    scores = {"kept": 0.5, "live_bytes_share": 0.6, "tokens": 96, "perplexity_by_full_forward": 4.0}
    by_window = {"worse": worse, "kl": [0.01, 0.02, 0.03]}
    return asked | scores | {"policy": policy, "T": T, "top1": 0.9, "by_window": by_window}


def test_policies_at_equal_bytes_are_compared_window_by_window(tmp_path):
    lines = [
        eviction_line("fastgen:T=0.9", [0.003, 0.004, 0.008]),
        eviction_line("random:keep=0.5", [0.005, 0.007, 0.012]),
        eviction_line("random:keep=0.5,seed=1", [0.007, 0.007, 0.008]),
        eviction_line("random:keep=0.7", [0.001, 0.001, 0.001], T=0.98),
    ]
    task = {"run": "x", "checkpoint": "c", "task": "needle", "policy": "fastgen:T=0.9"}
    fastgen, random, alone = eviction_pareto.cells([*lines, task])
    with pytest.raises(ValueError, match="two checkpoints of x"):
        eviction_pareto.cells([*lines, lines[0] | {"checkpoint": "d"}])
    assert random.worse_DN.shape == (2, 3)
    # Draws are averaged within a window: 6, 7 and 10 thousandths; the difference is -3, -3 and -2.
    rows = eviction_pareto.table([fastgen, random, alone]).splitlines()
    assert len(rows) == 2 + 3
    (row,) = [row for row in rows if "2 draws" in row]
    assert "2 draws: 7.3 to 8.0" in row
    assert "| 7.7 ± 5.2 |" in row  # sd 2.08, times 4.30 / sqrt(3)
    assert row.endswith("| -2.7 ± 1.4 |")
    assert rows[2].endswith("|  |")  # nothing at the same bytes
    *_, row = eviction_pareto.summary([fastgen, random, alone]).splitlines()
    assert row == "| `x` | 0.9 | 50% | 60% | 5.0 ± 6.6 | +0.50% | -2.7 ± 1.4 |"
    for name in ("plot.svg", "plot.png"):
        eviction_pareto.draw([fastgen, random, alone], tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_the_page_has_the_table_of_the_measured_policies():
    cells = eviction_pareto.cells(
        eviction.read_lines(ROOT / "benchmarks/results/eviction.jsonl")[0]
    )
    assert eviction_pareto.summary(cells) in (ROOT / "docs" / "eviction.md").read_text()


def test_a_measured_policy_is_not_measured_again(tmp_path):
    line, file = eviction_line("window:keep=0.5", [0.1, 0.2, 0.3]), tmp_path / "cells.jsonl"
    assert eviction.recorded(file, {"policy": "window:keep=0.5"}) is None
    file.write_text(json.dumps(line) + "\n" + '{"run": "x", "pol')
    assert eviction.recorded(file, {"policy": "window:keep=0.5", "windows": 3}) == line
    assert eviction.recorded(file, {"policy": "window:keep=0.5", "windows": 4}) is None
    assert eviction.read_lines(file) == ([line], False)


def test_a_task_is_scored_at_the_bytes_of_fastgen(tmp_path, monkeypatch, capsys):
    kept_of = {"fastgen": 0.5}
    asked = []

    def scores(_model, _tokenizer, policy, examples):
        asked.append(policy.name)
        name, _, settings = policy.name.partition(":")
        kept = kept_of.get(name) or float(settings.split(",")[0].removeprefix("keep="))
        return {"examples": len(examples), "kept_of_prompt": kept}

    monkeypatch.setattr(eviction, "recall_scores", scores)
    model = ModelConfig(
        vocab_size=257, n_layers=1, d_model=32, d_ff=32, n_heads=2, n_kv_heads=1, d_head=16
    )
    session = SimpleNamespace(model=model, tokenizer=SimpleNamespace(encode=list))
    output = tmp_path / "cells.jsonl"
    arguments = eviction.Arguments(runs=(), T=(0.9,), length=200, count=2, draws=2, output=output)
    eviction.score_task(session, None, "needle", arguments, {"run": "x"})
    lines, _ = eviction.read_lines(output)
    assert [line["policy"].partition(":")[0] for line in lines] == [
        *("fastgen", "window", "h2o", "snapkv", "adakv", "random", "random")
    ]
    # 64 bytes of keys and values, 9 with a score and 5 without: 36.5 of 64 for all.
    assert [line["live_bytes_share"] for line in lines] == pytest.approx([36.5 / 64] * 7, abs=2e-4)
    assert lines[1]["policy"] == "window:keep=0.5289"
    # A second call measures nothing again.
    eviction.score_task(session, None, "needle", arguments, {"run": "x"})
    assert len(asked) == 7
    # A budget below what is always kept is left out, and this is said.
    kept_of["fastgen"] = 0.05
    capsys.readouterr()
    eviction.score_task(session, None, "copy", arguments, {"run": "x"})
    assert "snapkv: a budget of" in capsys.readouterr().out
    assert len(asked) < 14
    # By default, what FastGen keeps with T = 0.95.
    kept_of["fastgen"] = 0.5
    asked.clear()
    arguments = dataclasses.replace(arguments, T=(), draws=1)
    eviction.score_task(session, None, "needle", arguments, {"run": "x"})
    assert "fastgen" in asked
    assert "fastgen:T=0.9" not in asked


@pytest.fixture
def opened(monkeypatch):
    """A run without a checkpoint; what was decoded with, policy by policy."""
    model = ModelConfig(
        vocab_size=257, n_layers=1, d_model=32, d_ff=32, n_heads=2, n_kv_heads=1, d_head=16
    )
    data = SimpleNamespace(seq_len=600)
    session = SimpleNamespace(model=model, data=data, rules=None, mesh=None)
    decoded = []

    def scores(_session, _model, policy, **_sizes):
        decoded.append(policy.name)
        return SimpleNamespace(kept=0.5)

    monkeypatch.setattr(eviction.runs, "find_run", lambda path: SimpleNamespace(path=Path(path)))
    monkeypatch.setattr(eviction, "open_session", lambda *_, **__: session)
    monkeypatch.setattr(eviction.checkpoint, "load_model", lambda *_: (7, None))
    monkeypatch.setattr(eviction.checkpoint, "fingerprint", lambda *_: "c")
    monkeypatch.setattr(eviction, "evicting_decoding", scores)
    monkeypatch.setattr(eviction, "line", lambda scores, _: {"kept": scores.kept})
    return decoded


def test_two_thresholds_with_one_budget_measure_each_policy_once(opened, tmp_path):
    file = tmp_path / "cells.jsonl"
    argv = ["runs/x", "--T", "0.9", "--T", "0.98", "--policy", "window", "--output", str(file)]
    eviction.main(argv)
    assert opened == ["fastgen:T=0.9", "window:keep=0.5289", "fastgen:T=0.98"]
    cells = [(cell["policy"], cell["T"], cell["kept"]) for cell in eviction.read_lines(file)[0]]
    assert cells == [
        ("fastgen:T=0.9", 0.9, 0.5),
        ("window:keep=0.5289", 0.9, 0.5),
        ("fastgen:T=0.98", 0.98, 0.5),
        ("window:keep=0.5289", 0.98, 0.5),
    ]
    eviction.main(argv)
    assert len(opened) == 3


def test_kept_only_decodes_nothing(opened, monkeypatch, capsys):
    asked = []
    kept = lambda _session, _model, policy, _: asked.append(policy.name) or {"kept": 0.25}
    monkeypatch.setattr(eviction, "kept_of_prompts", kept)
    eviction.main(["runs/x", "--T", "0.9", "--T", "0.98", "--kept-only"])
    assert asked == ["fastgen:T=0.9", "fastgen:T=0.98"]
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"run": "x", "policy": name, "kept": 0.25} for name in asked]
    assert opened == []


def test_policies_have_the_format_and_the_always_kept_tokens_of_fastgen():
    model = ModelConfig(
        vocab_size=257, n_layers=1, d_model=32, d_ff=32, n_heads=2, n_kv_heads=1, d_head=16
    )
    of = lambda first: list(
        eviction.at_equal_bytes(
            model, first, 0.5, 1.0, 600, eviction.Arguments(runs=(), policy=("window", "h2o"))
        )
    )
    assert of("fastgen:T=0.9") == ["window:keep=0.5289", "h2o:keep=0.5"]
    # int8: 16 + 16 bytes and two scales of 2 for a key and a value, and 9 or 5 beside.
    common = ",format=int8,recent=32"
    assert of(f"fastgen:T=0.9{common}") == [f"window:keep=0.5487{common}", f"h2o:keep=0.5{common}"]
    arguments = eviction.Arguments(runs=(), policy=("snapkv",))
    first = "fastgen:T=0.9,recent=48"
    (snapkv,) = eviction.at_equal_bytes(model, first, 0.5, 1.0, 600, arguments)
    assert snapkv == "snapkv:keep=0.5289,recent=48,window=48"
    # With T = 1 FastGen has no scores either.
    assert of("fastgen:T=1") == ["window:keep=0.5", "h2o:keep=0.4726"]
