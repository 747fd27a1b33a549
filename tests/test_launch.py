import errno
import importlib
import io
import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from jax._src.clusters import K8sCluster, cloud_tpu_cluster
from rich.console import Console

from cla_jax import runs
from cla_jax import train as training
from cla_jax.config import LatentKV
from cla_jax.config.record import to_record
from cla_jax.fields import replaced
from cla_jax.runs import Run
from cla_jax.writers import ConsoleWriter
from experiments import smoke
from launch import cli, hosts
from launch import evaluate as launch_evaluate
from launch import generate as launch_generate
from launch import memory as launch_memory
from launch import train as launch_train
from launch.cli import user_errors
from launch.hosts import distributed

ROOT = Path(__file__).parents[1]


def test_fields_are_overridden_by_flag():
    (config,) = launch_train.parse(
        ["demo.h16_mqa", "--optimizer.peak-lr", "1e-3", "--model.kv-map", "cla:4", "--steps", "7"]
    )
    assert (config.optimizer.peak_lr, config.model.kv_map, config.steps) == (1e-3, "cla:4", 7)
    assert [c.steps for c in launch_train.parse(["demo", "--steps", "9"])] == [9, 9, 9]


def test_a_run_is_trained_again_from_its_config(tmp_path):
    (config,) = launch_train.parse(["demo.h16_mqa", "--steps", "7"])
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_record(config) | {"versions": {}}))
    assert launch_train.parse([str(file)]) == [config]
    (renamed,) = launch_train.parse([str(file), "--name", "again"])
    assert (renamed.name, renamed.steps) == ("again", 7)
    for content, words in (("{}", "not a run's config"), ("x", "not valid JSON")):
        file.write_text(content)
        with pytest.raises(ValueError, match=words):
            launch_train.parse([str(file)])


def test_a_kind_and_the_fields_that_it_needs_are_set_together():
    """The default rank is more than this width, and a latent needs one KV head."""
    small = ["--model.d-model", "32", "--model.d-head", "8", "--model.n-kv-heads"]
    latent = ["--model.kv.kind", "latent", "--model.kv.rank", "16"]
    (config,) = launch_train.parse(["demo.h16_mqa", *small, "1", *latent])
    assert config.model.kv == LatentKV(rank=16)
    for flags, words in (
        ([*small, "1", *latent[:2]], "model.kv.rank = 64 must be at most model.d_model = 32"),
        ([*small, "2", *latent], "model.n_kv_heads = 2 must be 1 with model.kv.kind = latent"),
        (["--model.kv.kind", "latents"], "model.kv.kind = 'latents' must be one of heads, latent"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            launch_train.parse(["demo.h16_mqa", *flags])


def test_a_copied_run_is_not_trained_under_the_name_inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (config,) = launch_train.parse(["demo.h16_mqa", "--name", "study/a"])
    original = Path("runs/study/a")
    (original / "checkpoints").mkdir(parents=True)
    (original / "config.json").write_text(json.dumps(to_record(config) | {"versions": {}}))
    assert launch_train.parse([str(original / "config.json")]) == [config]
    Path("linked").symlink_to(original.absolute())
    assert launch_train.parse(["linked/config.json"]) == [config]
    for copy, flags in (
        ("runs/study/b", ["--name", "study/b"]),
        ("else where/b", ["--name", "b", "--placement.runs", "else where"]),
    ):
        file = str(Path(shutil.copytree(original, copy)) / "config.json")
        with pytest.raises(ValueError, match="run 'study/a' in runs/study/a") as refused:
            launch_train.parse([file])
        assert f"To train on in {copy}, add {shlex.join(flags)}; " in str(refused.value)
        (chosen,) = launch_train.parse([file, *flags])
        assert Path(runs.run_path(chosen)) == Path(copy)
        assert launch_train.parse([file, "--name=study/a"]) == [config]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model.kv-map", "0,0,1"], "it has 3 entries, but model.n_layers = 8"),
        (["--model.n-heads", "3", "--model.n-kv-heads", "2"], "model.n_heads = 3 is not divisible"),
        (["--steps", "many"], "'many' is not a whole number"),
        (["--steps", "1_0"], "'1_0' is not a whole number"),
        (["--optimizer.peak-lr", "\u0660.\u0665"], "'\u0660.\u0665' is not a number"),
        (["--model.kv-map", "0,\u0660"], "the sources must be integers"),
        (["--model.kv-map", "cla:\u0662"], "the form is cla:FACTOR"),
        (["--data.source", "sotu:\u0663"], "sotu:N takes N >= 2 documents"),
        (["--optimizer.peak-lr", "high"], "'high' is not a number"),
        (["--name", "a" * 300], "has 300 bytes; the limit is 200"),
        (
            ["--model.qk-norm", "True"],
            "'True' follows it: use --model.qk-norm or --model.no-qk-norm",
        ),
        (["--model.no_qk_norm=1"], "'1' follows it: use --model.qk-norm or --model.no-qk-norm"),
        (["--model.qk-norm", "--model.no-bias", "x"], "--model.no-bias takes no value, but 'x'"),
        (["--seed", "1", "True"], "unknown argument 'True'"),
    ],
)
def test_values_that_cannot_work_are_refused_on_the_command_line(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        launch_train.main(["demo.h16_mqa", *flags])
    assert stop.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["smok"], "did you mean smoke"),
        ([f"{ROOT}/docs/results/small/main/h16_mqa.seed-0/"], "h16_mqa.seed-0/config.json"),
        (["demo", "--name", "x"], "same directory"),
        (["smoke", "--placement.mesh.fsdp", "3"], "does not match the 8 devices"),
        (["smoke", "--placement.runs", str(ROOT / "LICENSE")], f"{ROOT / 'LICENSE'} is a file"),
        (["smoke", "--placement.data-dir", str(ROOT / "LICENSE")], "LICENSE is a file"),
    ],
)
def test_user_errors_are_one_line(capsys, argv, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        launch_train.main(argv)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.parametrize("module", ["evaluate", "memory", "compare"])
def test_commands_without_runs_say_what_they_want(capsys, module):
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"launch.{module}").main([])
    assert stop.value.code == 2
    assert "error: give at least one" in (line := capsys.readouterr().err)
    assert f"python -m launch.{module}" in line


# Where {runs} is one run, which has a checkpoint and windows of 32 tokens.
MISTAKES = """
train smok
train smoke.tiny --placement.runs {runs} --name tiny --seed 3
evaluate {runs}/none
evaluate {runs} --cache int9
evaluate {runs} --chunk 7
evaluate {runs} --windows 0
evaluate {runs} --tasks piqa --cache int9
evaluate {runs}/none --tasks piqa
generate {runs}/none
generate {runs} --cache int9
generate {runs} --stream --prompt a --prompt b
memory nothing
memory {runs}/none
memory smoke --cache int9
plan nothing --topology v5e:16x16
plan demo --topology v5e:16x17
plan demo --topology v5e:16x16 --mfu 2
convert import {runs}/none {runs}/made
convert export {runs}/none {runs}/made
compare {runs}/none
sweep nothing
sweep smoke.seeds --evaluate -- --placement.runs {runs}
status nothing
"""


def test_mistakes_do_not_wait_for_jax(tiny, tmp_path):
    config = tiny(**{"placement.runs": str(tmp_path)})
    run = runs.open_run(config, data_fingerprint="sotu", tokenizer_json="{}")
    run.checkpoints.mkdir()
    (run.checkpoints / "00000004.json").write_text("{}")
    lines = MISTAKES.format(runs=tmp_path).strip().splitlines()
    program = """
import importlib, sys
sys.modules["jax"] = None
for line in sys.stdin.read().splitlines():
    module, *argv = line.split()
    print("#", line, file=sys.stderr, flush=True)
    try:
        importlib.import_module(f"launch.{module}").main(argv)
    except SystemExit as stop:
        assert stop.code == 2, line
    else:
        raise AssertionError(line)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        input="\n".join(lines),
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    for line, told in zip(lines, ended.stderr.split("# ")[1:], strict=True):
        assert told.startswith(f"{line}\nerror: "), told


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "train smoke --model.kv-mp cla:2",
            "unknown flag '--model.kv-mp'; did you mean --model.kv-map?",
        ),
        ("train smoke --peak-lr 1", "unknown flag '--peak-lr'; did you mean --optimizer.peak-lr?"),
        ("train smoke --batch_sise=3", "unknown flag '--batch_sise'; did you mean --batch-size?"),
        ("train smoke --procesess 2", "unknown flag '--procesess'; did you mean --processes?"),
        (
            "sweep smoke.grid --placement.runs x",
            "'--placement.runs' is a config field: put it after a separate `--`; "
            "see `python -m launch.sweep --help`",
        ),
        (
            "sweep smoke.grid --optimizer.schedule.decay-fraction 0.1",
            "'--optimizer.schedule.decay-fraction' is a config field: put it after a separate `--`; "
            "see `python -m launch.sweep --help`",
        ),
        ("train smoke steps 3", "unknown argument 'steps'; did you mean --steps?"),
        (
            "train smoke --zzz",
            "unknown flag '--zzz'; see `python -m launch.train smoke --help`",
        ),
        ("train smoke --steps ten", "--steps: 'ten' is not a whole number"),
        (
            "train smoke --steps",
            "--steps needs a value; see `python -m launch.train smoke --help`",
        ),
        (
            "train smoke --placement.remat blok",
            "unknown --placement.remat 'blok'; did you mean block?",
        ),
        (
            "train smoke --data.mixture a=x:sotu",
            "data.mixture: 'a=x:sotu': the weight 'x' is not a number",
        ),
        ("train smoke --data.seq-len 0", "data.seq_len = 0 must be positive"),
        ("compare --context x", "--context: 'x' is not a whole number"),
        ("sweep", "NAME must be given; see `python -m launch.sweep --help`"),
        ("convert exprt a b", "unknown argument 'exprt'; did you mean export?"),
        ("convert export a b --dtyp x", "unknown flag '--dtyp'; did you mean --dtype?"),
        (
            "convert",
            "give one of import, export, fetch, uptrain; see `python -m launch.convert --help`",
        ),
    ],
)
def test_a_refused_command_line_is_one_line_with_the_nearest_match(capsys, command, words):
    module, *argv = command.split()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"launch.{module}").main(argv)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {words}\n"


def test_help_lists_experiments_and_explains_fields(capsys):
    with pytest.raises(SystemExit) as stop:
        launch_train.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for words in (
        "cla_1b.h128_mqa_cla2",
        "--coordinator HOST:PORT",
        "--processes N",
        "--process-id I",
    ):
        assert words in shown
    with pytest.raises(SystemExit):
        launch_train.main(["smoke", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for words in ("--optimizer.peak-lr", "Which layer's keys and values each layer reads"):
        assert words in text
    # Each group of fields says what it is, and not what its neighbour's first field is.
    groups = {
        "model": "The model.",
        "data": "The text and its tokens.",
        "optimizer": "The optimizer and its schedule.",
        "placement": "Where and how the run computes",
    }
    plain = " ".join(re.sub("[─╭╮╰╯-]{2,}", " ", text).split())
    for group, words in groups.items():
        assert f"{group} options {words}" in plain
        assert plain.count(words) == 1


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        ("KeyboardInterrupt", 130, "interrupted\n"),
        ("__import__('jax').errors.JaxRuntimeError('RESOURCE_EXHAUSTED: 9 bytes')", 2, "9 bytes\n"),
        ("OSError(28, 'No space left on device', '/runs/a')", 1, "left on device: /runs/a\n"),
        ("OSError(24, 'Too many open files')", 1, "(ulimit -n) is too low\n"),
        ("MemoryError", 1, "error: this machine has run out of memory\n"),
        ('RuntimeError("can\'t start new thread")', 1, "(ulimit -u) are too low\n"),
        # A library's own exception around it.
        ("RuntimeError('INTERNAL: [OS error 28: No space left on device]')", 1, "on device]\n"),
        ("OSError(40, 'Too many levels of symbolic links', 'a')", 2, "links: a\n"),
        # A path at which nothing can be made; a mount may come back.
        ("OSError(2, 'No such file or directory', '/proc/x')", 1, "directory: /proc/x\n"),
    ],
)
def test_what_is_no_bug_ends_without_a_traceback(raised, code, words):
    program = f"""
from launch.cli import user_errors
@user_errors
def main():
    print("said before")
    raise {raised}
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stdout) == (code, "said before\n")
    assert ended.stderr.endswith(words)
    assert len(ended.stderr.splitlines()) == bool(words)


@pytest.mark.parametrize(
    "place",
    [
        "gc.callbacks.append(lambda *_: interrupt())\n    gc.collect()",  # as jax has one
        "type('Last', (), {'__del__': lambda _: interrupt()})()",
        # On a busy machine a new thread does not run at once, and the next signal comes before.
        "threads_start_late()\n    gc.callbacks.append(lambda *_: interrupt())\n    gc.collect()",
    ],
    ids=["garbage collector", "destructor", "late threads"],
)
def test_an_interrupt_where_python_only_prints_exceptions_is_not_lost(place):
    program = f"""
import _thread, gc, os, signal, threading, time
from launch.cli import user_errors
signal.signal(signal.SIGINT, signal.default_int_handler)
start, sent = _thread.start_new_thread, []
def threads_start_late():
    late = lambda run, *rest: start(lambda *given: (time.sleep(0.1), run(*given)), *rest)
    _thread.start_new_thread = threading._start_new_thread = late
def interrupt():
    if len(sent) < 2:  # the second is one that was sent again
        sent.append(os.kill(os.getpid(), signal.SIGINT))
@user_errors
def main():
    {place}
    print("goes on", flush=True)
    time.sleep(20)
main()
"""
    command = [sys.executable, "-c", program]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (130, "goes on\n")
    assert ended.stderr == "interrupted\n"


def test_a_process_without_memory_ends_though_a_thread_waits_for_ever():
    program = """
import threading
from launch.cli import user_errors
@user_errors
def main():
    threading.Thread(target=threading.Event().wait).start()
    raise RuntimeError("can't start new thread")
main()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: can't start new thread: the limits")


def test_a_terminal_that_knows_only_ascii(tmp_path):
    """What it cannot show becomes an escape; what was typed is what is meant."""
    program = """
import sys
from launch import cli
@cli.user_errors
def main():
    print("\u25cf")
    print(cli.utf8(sys.argv[1]).encode().hex(), flush=True)
    raise ValueError("\u2014\x1b[2J")
main()
"""
    file = tmp_path / "program.py"
    file.write_text(program, encoding="utf-8")
    ascii_only = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "PYTHONPATH": str(ROOT),
    }
    for argument, hexadecimal in (("é".encode(), "c3a9"), (b"a", "61")):
        command = [sys.executable, str(file), argument]
        ended = subprocess.run(command, env=os.environ | ascii_only, capture_output=True)
        assert ended.stdout == b"\\u25cf\n" + hexadecimal.encode() + b"\n"
        assert (
            ended.stderr.splitlines()[-1] == b"ValueError: \\u2014\x1b[2J"
        )  # not ours: a traceback
    command = [sys.executable, str(file), b"\xff"]
    ended = subprocess.run(command, env=os.environ | ascii_only, capture_output=True)
    assert (ended.returncode, ended.stderr) == (2, b"error: '\\udcff' is not UTF-8\n")


def test_who_reads_only_the_first_lines_sees_no_traceback():
    program = """
from launch.cli import user_errors
@user_errors
def main():
    for i in range(100_000):
        print(i)
main()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize(
    ("fails", "error"),
    [
        (lambda: np.zeros(3).reshape(2), ValueError),
        (lambda: os.write(closed_pipe(), b"x"), BrokenPipeError),  # not stdout
    ],
)
def test_an_error_of_a_library_keeps_its_traceback(fails, error):
    with pytest.raises(error):
        user_errors(fails)()


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("complete", [True, False])
def test_a_stop_ends_the_study_not_only_the_row(monkeypatch, complete):
    """Between two rows, or in one; after the last there is nothing left to stop."""
    trained = []
    monkeypatch.setattr(distributed, "stop_on_signal", lambda: lambda step: True)
    monkeypatch.setattr(
        training, "train", lambda config, **_: trained.append(config.name) or complete
    )
    with pytest.raises(SystemExit) as stop:
        launch_train.main(["demo"])
    assert stop.value.code == distributed.STOPPED
    assert trained == ["demo/h16_mqa"]
    if complete:
        launch_train.main(["smoke"])
    else:
        with pytest.raises(SystemExit):
            launch_train.main(["smoke"])


def test_the_first_row_pays_for_the_start_of_the_process_and_no_row_for_another(monkeypatch):
    started = []
    monkeypatch.setattr(distributed, "stop_on_signal", lambda: lambda step: False)
    monkeypatch.setattr(launch_train.goodput, "process_start", lambda: 123.0)
    monkeypatch.setattr(launch_train.goodput, "Clock", lambda started="now": started)
    train = lambda config, *, clock, **_: started.append((config.name, clock)) or True
    monkeypatch.setattr(training, "train", train)
    launch_train.main(["demo"])
    assert started[0] == ("demo/h16_mqa", 123.0)
    assert {clock for _, clock in started[1:]} == {"now"}


def test_a_run_that_diverges_says_so_in_one_line(monkeypatch):
    def train(*_, **__):
        raise training.Diverged("step 3: loss is nan")

    monkeypatch.setattr(training, "train", train)
    with pytest.raises(SystemExit) as stop:
        launch_train.main(["demo"])
    assert stop.value.code == "diverged: step 3: loss is nan"


# What launchers set; the names and counts are those that jax's own detectors read.
SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a[1-4]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
ORTE = {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1:34911"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, True),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, False),  # inside salloc, not srun
        (ORTE | {"OMPI_COMM_WORLD_SIZE": "2"}, True),
        (ORTE | {"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_HOSTNAMES": "localhost"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # a pod by itself
    ],
)
def test_when_several_processes_are_wanted(monkeypatch, environment, wanted):
    monkeypatch.setattr(
        cloud_tpu_cluster, "running_in_cloud_tpu_vm", any("TPU" in name for name in environment)
    )
    for name in [*SLURM, "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert distributed.wanted() == wanted


def test_pods_of_an_indexed_job_are_counted(monkeypatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "0")
    monkeypatch.setattr(K8sCluster, "is_env_present", lambda: True)
    for count in (1, 2):
        monkeypatch.setattr(K8sCluster, "get_process_count", lambda count=count: count)
        assert distributed.wanted() == (count > 1)


def test_processes_that_jax_cannot_join_are_not_trained_apart(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    with pytest.raises((ValueError, RuntimeError), match=r"--coordinator|mpi4py"):
        distributed.wanted()


def test_flags_for_several_processes_stand_anywhere_and_go_together():
    flags = ["--coordinator", "10.0.0.1:1234", "--processes", "4", "--process-id=3"]
    rest = ["smoke", "--placement.mesh.fsdp", "-1", "--steps=7"]
    assert hosts.parse(rest) == (hosts.Hosts(), rest)
    for argv in (flags + rest, rest + flags, [*rest[:3], *flags, *rest[3:]]):
        assert hosts.parse([*argv, "--peer-timeout", "9"]) == (
            hosts.Hosts(coordinator="10.0.0.1:1234", processes=4, process_id=3, peer_timeout=9),
            rest,
        )


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--processes 2", "or none: --coordinator and --process-id missing"),
        ("--coordinator a:1 --process-id 0", "or none: --processes missing"),
        ("--coordinator a --processes 2 --process-id 0", "must be HOST:PORT"),
        ("--coordinator a:1 --processes 2 --process-id 2", "must lie in 0 to --processes - 1 = 1"),
        ("--coordinator a:1 --processes 0 --process-id 0", "--processes 0 must be positive"),
        ("--peer-timeout 0", "at least 1 second"),
        ("--processes two", "--processes: 'two' is not a whole number"),
        ("--processes", "--processes needs a value"),
    ],
)
def test_flags_for_several_processes_that_cannot_work_are_refused(capsys, flags, words):
    with pytest.raises(SystemExit) as stop:
        launch_train.main(["smoke", *flags.split()])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_explicit_flags_are_all_that_jax_is_told(monkeypatch, caplog):
    """Not the cluster's word too: SLURM's would leave a process one device."""
    told = {}
    monkeypatch.setattr("jax.distributed.initialize", lambda **arguments: told.update(arguments))
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    own = hosts.Hosts(coordinator="a:1", processes=2, process_id=1, peer_timeout=9)
    distributed.initialize(own)
    assert (told["coordinator_address"], told["num_processes"], told["process_id"]) == ("a:1", 2, 1)
    assert (told["cluster_detection_method"], told["heartbeat_timeout_seconds"]) == (
        "deactivate",
        9,
    )
    assert told["local_device_ids"] is None
    with caplog.at_level("INFO"):
        distributed.initialize(hosts.Hosts())  # now SLURM is asked
    assert told["coordinator_address"].startswith("a1:")
    assert (told["num_processes"], told["process_id"], told["local_device_ids"]) == (4, 1, [0])
    assert told["heartbeat_timeout_seconds"] == 100
    assert "process 1 of 4 (from SLURM_NTASKS='4'); waiting for process 0 at a1:" in caplog.text


def test_who_is_waited_for_is_said_at_once_and_nobody_is_waited_for_for_ever(
    monkeypatch, caplog, capfd
):
    left = threading.Event()
    monkeypatch.setattr(distributed, "_WAITING_S", 0.01)
    monkeypatch.setattr(distributed, "_JOINING_S", 2.05)
    monkeypatch.setattr(distributed.os, "_exit", lambda code: (codes.append(code), left.set()))
    codes: list[int] = []
    with caplog.at_level("INFO"), distributed._waiting("node1:99", 4, 0, "SLURM_NTASKS='4'"):
        assert (
            "process 0 of 4 (from SLURM_NTASKS='4'); waiting for process 1 to 3 to connect to node1:99"
            in (caplog.text)
        )
        assert left.wait(60)
    assert codes == [134]
    assert "still waiting for process 1 to 3" in caplog.text
    assert "waited for process 1 to 3 to connect to node1:99" in capfd.readouterr().err


def test_a_difference_names_the_field_and_who_holds_which_value():
    said = [{"config": {"steps": 4, "seed": 0}, "data": 1} for _ in range(12)]
    said[3] = {"config": {"steps": 5, "seed": 0}, "data": 1}
    said[4] = {"config": {"steps": 4, "seed": 0}}
    assert distributed._differences(said) == [
        "  config.steps: 4 on processes 0, 1, 2, 4, 5, 6, 7, 8 and 3 more; 5 on process 3",
        "  data: 1 on processes 0, 1, 2, 3, 5, 6, 7, 8 and 3 more; None on process 4",
    ]
    assert distributed._differences([said[0]] * 3) == []


# ------------------------------------------------------------------------- real processes

# One device, optimised code: what a user runs.
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}


def command(tmp_path, name, *flags):
    return [
        *(sys.executable, "-m", "launch.train", "smoke", "--name", name),
        *("--placement.runs", str(tmp_path / "runs")),
        *("--placement.data-dir", str(tmp_path / "data"), *flags),
    ]


def start(tmp_path, name, *flags):
    return subprocess.Popen(
        command(tmp_path, name, *flags),
        cwd=tmp_path,
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    )


def last_step(tmp_path, name) -> int:
    file = tmp_path / "runs" / name / "metrics.jsonl"
    steps = [0]
    if file.exists():
        for line in file.read_text().splitlines():
            try:
                steps.append(json.loads(line)["step"])
            except json.JSONDecodeError:
                continue
    return max(steps)


def wait_for_step(process, tmp_path, name, step):
    deadline = time.monotonic() + 120
    while last_step(tmp_path, name) < step and process.poll() is None:
        assert time.monotonic() < deadline, f"{name} did not reach step {step}"
        time.sleep(0.005)


def final_arrays(tmp_path, name) -> dict[str, np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    (checkpoint,) = sorted((tmp_path / "runs" / name / "checkpoints").glob("*40"))
    parts = ocp.load_checkpointables(checkpoint)
    return {k: np.asarray(v) for part in ("model", "training") for k, v in parts[part].items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for key in a:
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The arrays that a run ends with which nothing happens to."""
    directory = tmp_path_factory.mktemp("undisturbed")
    process = start(directory, "undisturbed")
    _, log = process.communicate(timeout=200)
    assert process.returncode == 0, log
    return final_arrays(directory, "undisturbed")


@pytest.mark.slow
def test_killed_at_random_steps_ends_bit_for_bit_as_never_killed(tmp_path, undisturbed):
    draw = random.Random(time.time_ns())
    kills = 0
    while True:
        process = start(tmp_path, "killed", "--placement.save-every", "5")
        if kills < 4:
            # Somewhere in the next steps, at a moment of its own within the step and the save.
            target = min(last_step(tmp_path, "killed") + draw.randint(1, 9), 39)
            wait_for_step(process, tmp_path, "killed", target)
            time.sleep(draw.random() * 0.2)
        else:
            process.wait(timeout=200)
        process.kill()
        code = process.wait(timeout=60)
        process.stderr.close()
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills >= 3
    assert_same_bits(final_arrays(tmp_path, "killed"), undisturbed)


@pytest.mark.slow
def test_sigterm_saves_exits_42_and_continues_bit_for_bit(tmp_path, undisturbed):
    process = start(tmp_path, "stopped")
    wait_for_step(process, tmp_path, "stopped", 7)
    process.terminate()
    _, log = process.communicate(timeout=200)
    assert process.returncode == distributed.STOPPED == 42, log
    assert "stopped on request" in log
    stopped_at = last_step(tmp_path, "stopped")
    assert 7 <= stopped_at < 40
    manifests = (tmp_path / "runs/stopped/checkpoints").glob("*.json")
    assert stopped_at in [int(manifest.stem) for manifest in manifests]
    assert start(tmp_path, "stopped").wait(timeout=200) == 0
    assert_same_bits(final_arrays(tmp_path, "stopped"), undisturbed)


@pytest.mark.slow
def test_train_evaluate_and_generate_from_the_command_line(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    flags = ["--placement.runs", str(tmp_path / "runs"), "--steps", "4"]
    launch_train.main(["smoke", *flags, "--placement.accumulate", "1"])
    run = str(tmp_path / "runs" / "smoke" / "tiny")
    with pytest.raises(SystemExit) as stop:  # another learning rate is another run
        launch_train.main(["smoke", *flags, "--optimizer.peak-lr", "0.1"])
    assert stop.value.code == 2
    assert "optimizer.peak_lr: 0.003 there, 0.1 asked for" in capsys.readouterr().err
    launch_evaluate.main([run, "--chunk", "32"])
    shown = capsys.readouterr().out
    assert "128 resident KV bytes per token" in shown
    assert "predicted" not in shown  # the ledger is for those who ask for it
    result = [line for line in shown.splitlines() if "perplexity" in line]
    assert [line.split()[:2] for line in result] == [
        ["full", "perplexity"],
        ["dense", "perplexity"],
    ]
    full = json.loads((tmp_path / "runs/smoke/tiny/eval/full.json").read_text())
    cached = json.loads((tmp_path / "runs/smoke/tiny/eval/cached-dense.json").read_text())
    assert cached["perplexity"] == pytest.approx(full["perplexity"], rel=1e-5)
    for seed in ("1", "1", "2"):
        launch_generate.main(
            [run, "--prompt", "Fellow citizens", "--new-tokens", "20", "--seed", seed]
        )
    first, again, other = capsys.readouterr().out.split("Fellow citizens")[1:]
    assert first == again != other
    launch_generate.main([run, "--temperature", "0", "--new-tokens", "5"])  # from nothing
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (example,) = [found for found in examples if "Decoder" in found]
    capsys.readouterr()
    exec(example.replace("runs/demo/seeds/h16_mqa_cla2.seed-0", run), found := {})
    shown = capsys.readouterr().out
    launch_generate.main(
        [run, "--cache", "int8", "--prompt", "Fellow citizens", "--prompt", "The state of"]
    )
    first, second = found["decoder"].generate(["Fellow citizens", "The state of"])
    with pytest.raises(ValueError, match="prompts must be a list of texts"):
        found["decoder"].generate("Fellow citizens")
    assert capsys.readouterr().out == f"{first}\n{second}\n"
    assert shown == f"{[first, second]}\n"
    for new_tokens in (126, 127, 128):  # after a begin token and "a"
        found["decoder"].generate(["a"], new_tokens=new_tokens, temperature=0)
    # Once, with the first of them.
    assert re.findall(
        r"trained on contexts of 128 tokens, .* may have (\d+) together", caplog.text
    ) == ["129"]
    with pytest.raises(ValueError, match="temperature = -1 must be 0"):
        found["decoder"].generate(["a"], temperature=-1)
    with pytest.raises(SystemExit):
        launch_generate.main([run, "--prompt", "good", "--prompt", "\udcffbad"])
    assert "error: '\\udcffbad' is not UTF-8" in capsys.readouterr().err
    # Of a study, what can be evaluated is.
    (tmp_path / "runs/smoke/untrained").mkdir()
    shutil.copy(tmp_path / "runs/smoke/tiny/config.json", tmp_path / "runs/smoke/untrained")
    (tmp_path / "runs/smoke/tiny/eval/full.json").unlink()
    study = str(tmp_path / "runs" / "smoke")
    for argv, words in (
        ([str(tmp_path / "nowhere")], "nowhere does not exist"),
        ([run, "--windows", "0"], "windows = 0"),
        ([run, "--chunk", "3"], "chunk = 3 does not divide"),
        ([run, "--chunk", "0"], "chunk = 0"),
        ([study], "untrained has no checkpoint yet"),
        ([run, "--limit", "3"], "limit = 3 applies only to tasks: add --tasks"),
        ([run, "--tasks", "sciq", "--windows", "3"], "do not apply to tasks"),
        ([run, "--tasks", "sciq", "--prompt", "0.6"], "do not apply to tasks"),
        ([run, "--batch-size", "-3"], "batch_size = -3 must be positive"),
    ):
        with pytest.raises(SystemExit):
            launch_evaluate.main(argv)
        assert words in capsys.readouterr().err
    assert (tmp_path / "runs/smoke/tiny/eval/full.json").exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/x"),
            "No space left on device: runs/x",
        ),
        (OSError(errno.EMFILE, "Too many open files"), "Too many open files"),
        (MemoryError(), "this machine has run out of memory"),
        (RuntimeError("can't start new thread"), "can't start new thread"),
        # As tensorstore says it, in several lines.
        (
            ValueError("RESOURCE_EXHAUSTED: a\nwrite: [OS error 28: No space left on device]\nb"),
            "No space left on device: write: [OS error 28",
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_machine_has_run_out_of_is_one_line(capsys, monkeypatch, error, words):
    monkeypatch.setattr(cli, "leave", sys.exit)  # else the tests end too
    code = compile("raise error", "library.py", "exec")  # not a file of ours

    @user_errors
    def fails() -> None:
        exec(code, {"error": error})

    with pytest.raises(SystemExit) as stop:
        fails()
    assert stop.value.code == 1  # not 2: a launcher may start it again
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {words}")


@pytest.fixture
def handlers(monkeypatch):
    """The signal handlers of this process, as they were; no signal ends it."""
    monkeypatch.setattr(distributed, "leave", lambda code: None)
    numbers = (signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("handlers")
def test_a_closed_terminal_stops_a_run_and_nohup_does_not():
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    should_stop = distributed.stop_on_signal()
    assert not should_stop(1)
    os.kill(os.getpid(), signal.SIGHUP)
    assert should_stop(2)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    should_stop = distributed.stop_on_signal()
    os.kill(os.getpid(), signal.SIGHUP)
    assert not should_stop(1)


def test_a_signal_in_start_up_ends_a_process_whose_main_thread_waits_in_native_code():
    """As some native libraries wait for ever once the system starts no further thread."""
    program = """
import ctypes
from launch.hosts import distributed
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
distributed.stop_on_signal()
print("ready", flush=True)
while True:
    libc.pthread_mutex_lock(mutex)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.terminate()
            assert process.wait(timeout=60) == distributed.STOPPED
        finally:
            process.kill()


@pytest.mark.usefixtures("handlers")
def test_once_steps_are_made_a_signal_waits_for_the_end_of_one(monkeypatch):
    left = []
    monkeypatch.setattr(distributed, "leave", left.append)
    should_stop = distributed.stop_on_signal()
    with distributed.watched(should_stop, 60) as ask:
        assert not ask(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert ask(2)
        time.sleep(0.2)  # for the thread that would end the process
    assert not left


def test_a_console_that_is_gone_does_not_end_training(tmp_path):
    class Gone(io.StringIO):
        def write(self, *_: object) -> int:
            raise OSError(errno.EIO, "Input/output error")

    for terminal in (False, True):
        console = Console(file=io.StringIO(), force_terminal=terminal)
        writer = ConsoleWriter(Run(epath.Path(tmp_path)), 10, console)
        console.file = Gone()
        writer.write(3, {"loss": 2.0})
        writer.write(3, {"perplexity": 2.0})
        writer.close()


def test_one_hostile_run_does_not_stop_a_command_for_the_others(tmp_path, capsys):
    for name in ("a", "b", "c"):
        config = replaced(smoke.tiny(), {"name": name, "placement.runs": str(tmp_path)})
        runs.open_run(config, data_fingerprint="x", tokenizer_json="{}")
    (tmp_path / "b" / "config.json").unlink()
    os.mkfifo(tmp_path / "b" / "config.json")
    with pytest.raises(SystemExit) as stop:
        launch_memory.main([str(tmp_path), "--context", "64", "--cache", "dense", "--json"])
    shown = capsys.readouterr()
    assert stop.value.code == 2
    names = [line["name"] for line in json.loads(shown.out)["lines"]]
    assert names == [str(tmp_path / "a"), str(tmp_path / "c")]
    assert f"{tmp_path / 'b' / 'config.json'} is a pipe" in shown.err
    refused: list[str] = []
    with pytest.raises(ValueError, match="invalid literal"), cli.collected(refused):
        int("of a library, or of Python: a bug of ours")
    assert refused == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "temperature = -1.0 must be 0"),
        (["--top-p", "0"], "top_p = 0.0"),
        (["--top-k", "-1"], "top_k = -1"),
        (["--new-tokens", "0"], "new_tokens = 0 must be positive"),
        (["--chunk", "0"], "chunk = 0 must be positive"),
    ],
)
def test_what_generation_cannot_do_is_refused_before_jax(
    tmp_path, monkeypatch, capsys, flags, words
):
    config = replaced(smoke.tiny(), {"placement.runs": str(tmp_path)})
    run = runs.open_run(config, data_fingerprint="x", tokenizer_json="{}")
    run.checkpoints.mkdir()
    (run.checkpoints / "00000040.json").write_text("{}")
    monkeypatch.setattr("launch.allocator.set_up", lambda: pytest.fail("jax is set up"))
    with pytest.raises(SystemExit):
        launch_generate.main([str(run.path), *flags])
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code"), [("ValueError", 2), ("KeyError", 1)])
def test_an_error_does_not_wait_for_a_compiler(tmp_path, error, code):
    """Python waits at its end for threads of executors; a compiler may work for minutes."""
    script = tmp_path / "script.py"
    script.write_text(
        "import threading\n"
        "from concurrent.futures import ThreadPoolExecutor\n"
        "import launch.cli\n"
        "from cla_jax import machine\n"
        "launch.cli._OURS = (__file__,)\n"
        "@launch.cli.user_errors\n"
        "def main():\n"
        "    threads = ThreadPoolExecutor(1, thread_name_prefix=machine.COMPILER)\n"
        "    threads.submit(threading.Event().wait)\n"
        f"    raise {error}('what is wrong')\n"
        "main()\n"
    )
    ended = subprocess.run(
        [sys.executable, script],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ended.returncode == code
    assert "what is wrong" in ended.stderr
