"""Launch engines as they are: trials that are killed, a SLURM cluster, the tools that clouds are told with.

`make test-engines` runs these; what they need is installed there.
"""

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml as pyyaml

from launch import status
from launch.sweeps import records, tpus
from launch.sweeps.engines.jobset import RESTARTED
from launch.sweeps.engines.local import cores
from launch.sweeps.engines.queued_resources import listing
from tests import slurm
from tests.test_engines import CLOUD, IMAGE, jobs, planned

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
ENVIRONMENT.pop("JAX_COMPILATION_CACHE_DIR", None)

# Seconds; only what hangs should reach them, on a busy machine too.
PATIENCE = 1800

pytestmark = pytest.mark.engines


@pytest.fixture(autouse=True)
def nothing_is_left_running(tmp_path):
    """Trials outlive a launcher that is killed: after a test that failed nothing else would end them."""
    yield
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if str(tmp_path) in (directory / "cmdline").read_bytes().decode(errors="replace"):
                _kill(int(directory.name))


def launch(tmp_path, sweep, *flags, runs="runs", fields=(), environment=ENVIRONMENT):
    """A launcher, as a process."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "launch.sweep", sweep, *flags, "--"),
            *("--placement.runs", str(tmp_path / runs)),
            *("--placement.data-dir", str(tmp_path / "data"), *fields),
        ],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0, timeout=PATIENCE):
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, out
    return out


def steps_of(run):
    return [record for record in run.read_records() if "tokens_hash" in record]


def lines(sweep):
    return {line["trial"]: line for line in status.lines(sweep)} if sweep.exists() else {}


def wait_for(condition, what, timeout=PATIENCE):
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


def parameters(run, step) -> dict[str, np.ndarray]:
    from orbax.checkpoint import v1 as ocp

    parts = ocp.load_checkpointables(run.checkpoints / f"{step:08d}")
    return {k: np.asarray(v) for part in ("model", "training") for k, v in parts[part].items()}


# ------------------------------------------------------------------------------------ local


def test_twelve_trials_and_their_launcher_are_killed_and_nothing_is_trained_twice(tmp_path):
    steps, every = 40, 5
    fields = ("--steps", str(steps), "--placement.save-every", str(every))
    pool = ("--local.workers", "2", "--local.cores", "1", "--retry.delay", "0")
    start = lambda: launch(tmp_path, "smoke.seeds", *pool, fields=fields)
    sweep = records.epath.Path(tmp_path / "runs/smoke/seeds")
    draw = random.Random(time.time_ns())
    launcher = start()
    wait_for(lambda: len(lines(sweep)) == 12, "twelve trials were not planned")
    names = list(lines(sweep))
    # The runner alone, the training alone, both, or the launcher; each when some trial has come so far, not
    # after so many seconds: a fast machine would be done before.
    whats = [*("launch.trial", "launch.train", "") * 2, "launch.sweep", "launch.sweep"]
    due = [(draw.choice(names), draw.randrange(0, steps // 2), what) for what in whats]
    deadline = time.monotonic() + PATIENCE
    while due:
        assert launcher.poll() is None, f"the sweep ended before {due}"
        assert time.monotonic() < deadline, f"nothing has come as far as {due}"
        time.sleep(0.1)
        found = lines(sweep).values()
        came = {line["trial"]: line["step"] for line in found if line["state"] == "running"}
        # What a trial was too fast for strikes another.
        going = [line["trial"] for line in found if line["state"] != "done"] or names
        due = [(x if x in going else draw.choice(going), *rest) for x, *rest in due]
        reached = [event for event in due if came.get(event[0], -1) >= event[1]]
        if not reached:
            continue
        name, _, what = event = draw.choice(reached)
        time.sleep(draw.uniform(0, 0.3))  # a moment of its own in the step or the save
        if what == "launch.sweep":
            launcher.kill()
            launcher.communicate()
            launcher = start()
            due.remove(event)
            continue
        record = records.Record(sweep, name)
        # A training whose runner was killed goes on alone.
        if victims := _processes(record, what) or _processes(record, ""):
            for pid in victims:
                _kill(pid)
            due.remove(event)
    out = finish(launcher)
    assert "12 done" in out
    found = lines(sweep)
    assert len(found) == 12
    for name, line in found.items():
        assert line["state"] == "done"
        run = records.Record(sweep, name).run
        numbers = [record["step"] for record in steps_of(run)]
        hashes: dict[int, set[int]] = {}
        for record in steps_of(run):
            hashes.setdefault(record["step"], set()).add(record["tokens_hash"])
        assert sorted(hashes) == list(range(1, steps + 1))
        assert all(len(seen) == 1 for seen in hashes.values())  # the same tokens again
        # A start goes on right after a checkpoint, and loses no more than lies between two.
        restarts = [(a, b) for a, b in itertools.pairwise(numbers) if b != a + 1]
        assert len(restarts) <= line["attempts"] - 1
        for last, first in restarts:
            assert (first - 1) % every == 0
            assert last - first < 2 * every  # the save of the newest may have been cut off
        assert line["attempts"] <= 1 + line["preemptions"] + line["failures"]
    again = finish(start())
    assert "12 done" in again
    assert [line["attempts"] for line in lines(sweep).values()] == [
        line["attempts"] for line in found.values()
    ]


def _processes(record, what):
    """The processes of a trial, its runner and its training, whose command line has a word."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            words = (directory / "cmdline").read_bytes().decode(errors="replace").split("\0")
            runner = "launch.trial" in words and str(record.sweep) in words and record.name in words
            if (runner or str(record.trial) in words) and any(what in word for word in words):
                found.append(int(directory.name))
    return found


def _kill(pid):
    with contextlib.suppress(ProcessLookupError):  # it has ended
        os.kill(pid, signal.SIGKILL)


def test_a_search_for_the_learning_rate_ends_where_the_papers_rule_says(tmp_path):
    out = finish(launch(tmp_path, "smoke.learning_rate"))
    found = list(lines(records.epath.Path(tmp_path / "runs/smoke/learning_rate")).values())
    found.sort(key=lambda line: float(line["trial"].removeprefix("lr-")))
    perplexities = [line["perplexity"] for line in found]
    assert len(found) >= 2
    rates = [float(line["trial"].removeprefix("lr-")) for line in found]
    assert rates == pytest.approx([1e-2 * 1.5**i for i in range(len(rates))], rel=1e-2)
    *improving, last = perplexities
    assert improving == sorted(improving, reverse=True)
    assert last >= improving[-1]
    assert f"best: {found[-2]['trial']}, perplexity {improving[-1]:.4f}" in out


def test_a_bad_trial_leaves_the_others_alone(tmp_path):
    """Another run's directory, and checkpoints that no longer verify."""
    fields = ("--steps", "4", "--placement.save-every", "2")
    finish(launch(tmp_path, "smoke.grid", "--local.workers", "1", fields=fields))
    sweep = records.epath.Path(tmp_path / "runs/smoke/grid")
    foreign, damaged, *others = (records.Record(sweep, name) for name in records.names(sweep))
    config = json.loads((foreign.run.path / "config.json").read_text())
    config["identity"]["seed"] = 77
    del config["checksum"], config["run"], config["format"]
    (foreign.run.path / "config.json").write_text(json.dumps(config))
    for manifest in damaged.run.checkpoints.glob("*.json"):
        manifest.write_text("{}")
    for record in [damaged, *others]:
        # As if the evaluation at the end had not been written.
        kept = [line for line in record.run.metrics.read_text().splitlines() if "loss" in line]
        record.run.metrics.write_text("\n".join(x for x in kept if "perplexity" not in x) + "\n")
    before = {record.name: record.state().attempts for record in [damaged, *others]}
    out = finish(launch(tmp_path, "smoke.grid", fields=fields), code=1)
    assert f"{foreign.name}  refused: {foreign.run.path} contains another run:" in out
    assert "seed: 77 there, 0 asked for" in out
    assert f"{damaged.name}  failed: error: no intact checkpoint is left" in out
    assert "4 done" in out
    for record in others:
        assert record.state().attempts == before[record.name] + 1
        assert len(steps_of(record.run)) == 4  # evaluated, not trained again


def test_a_full_disk_is_named_and_costs_nothing(tmp_path):
    disk = tmp_path / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "none", str(disk)]  # fails if not root
    subprocess.run(mount, check=True)
    try:
        fields = ("--steps", "6", "--placement.save-every", "2")
        ballast = disk / "ballast"
        pool = ("--local.workers", "1", "--retry.failures", "1")
        start = lambda *more: launch(tmp_path, "smoke.learning_rate", *pool, *more, fields=fields)
        with open(ballast, "wb") as file:
            file.write(bytes(39 << 20))
        out = finish(start(), code=1)
        assert "No space left on device" in out
        ballast.unlink()
        assert "best: lr-" in finish(start("--again"))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# ------------------------------------------------------------------------------------ SLURM

# A directory that a shell, sbatch, and the names of its files would each take apart.
ODD = 'it\'s a "b" #c %A $HOME é'
NAMES = ("5", "0", "X", "trial", "srun", "a,b=1", "x+y")  # some stand in the command too

# In place of srun, for a job script: writes down what it was called with, and runs a step that tells its
# cores. Training is left out.
INSTEAD_OF_SRUN = """\
srun() {{
    here={directory}/$SLURM_ARRAY_JOB_ID-$SLURM_ARRAY_TASK_ID
    printf '%s\\0' "$PWD" "$@" > "$here.words"
    env > "$here.env"
    command srun --ntasks=1 sh -c 'sleep 1; grep Cpus_allowed_list: /proc/self/status' > "$here.cores"
}}"""


def test_slurm_starts_every_trial_as_it_is_called_and_bound_to_a_core_of_its_own(tmp_path):
    """Odd names and directories, more trials than an array may have, from inside a job bound to a core."""
    assert not slurm.missing(), f"`make test-engines` installs {slurm.missing()}"
    told = tmp_path / "told"
    told.mkdir()
    (tmp_path / "mine.py").write_text(
        "from cla_jax.fields import replaced\n"
        "from experiments.smoke import tiny\n"
        "def odd():\n"
        '    """Odd names."""\n'
        f"    for seed, name in enumerate({NAMES!r}):\n"
        '        yield name, replaced(tiny(), {"seed": seed})\n'
    )
    runs = tmp_path / ODD
    with slurm.cluster(tmp_path / "cluster", tasks="task/affinity", array=5) as cluster:
        environment = ENVIRONMENT | dict(cluster)
        launcher = subprocess.run(
            [
                *("srun", "--partition=urgent", "--ntasks=1", "--cpu-bind=map_cpu:0"),
                *(sys.executable, "-m", "launch.sweep", "mine.py:odd", "--engine", "slurm"),
                *("--slurm.partition", "spot", "--slurm.cpus", "1", "--env", "trial=X"),
                *("--slurm.setup", INSTEAD_OF_SRUN.format(directory=told)),
                *("--retry.failures", "5", "--", "--placement.runs", str(runs)),
            ],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert launcher.returncode == 0, launcher.stdout + launcher.stderr
        assert "7 submitted" in launcher.stdout
        ended = lambda: (
            not subprocess.run(
                ["squeue", "--noheader"], env=environment, capture_output=True, check=True
            ).stdout.strip()
        )
        wait_for(ended, "the jobs do not end")
    sweep = runs / "mine" / "odd"
    outputs = {file.stem: file.read_text() for file in (sweep / ".sweep/jobs").glob("*_*.out")}
    # Two arrays, each from task 0.
    arrays = {job.partition("_")[0] for job in outputs}
    tasks = sorted(int(job.partition("_")[2]) for job in outputs)
    assert len(arrays) == 2
    assert tasks == sorted([*range(5), *range(2)])
    started = {}
    for file in told.glob("*.words"):
        here, *words = file.read_text().split("\0")[:-1]
        assert here == str(tmp_path)
        at = words.index("launch.trial")
        assert words[at + 1] == str(sweep)
        assert words[words.index("--failures") + 1] == "5"
        assert "trial=X" in words[:at]
        job = file.stem.replace("-", "_")
        assert outputs[job] == f"{words[at + 2]}: exit code 0\n"
        started[words[at + 2]] = job
    assert sorted(started) == sorted(NAMES)
    variables = "\n".join(file.read_text() for file in told.glob("*.env"))
    assert "SLURM_ARRAY_TASK_ID=" in variables
    assert "SLURM_CPU_BIND" not in variables
    assert "SLURM_STEP_ID" not in variables
    cores = [file.read_text().split()[1] for file in told.glob("*.cores")]
    assert len(cores) == 7
    assert len(set(cores)) >= min(2, len(os.sched_getaffinity(0)))


def test_a_preempted_and_killed_sweep_on_slurm_ends_bit_for_bit_as_an_undisturbed_one(tmp_path):
    assert not slurm.missing(), f"`make test-engines` installs {slurm.missing()}"
    steps = 120
    fields = ("--steps", str(steps), "--placement.save-every", "20")
    # The cluster binds nothing to cores: its trials use all of them, so these must too.
    pool = ("--local.workers", "1", "--local.cores", str(len(cores())))
    finish(launch(tmp_path, "smoke.grid", *pool, runs="steady", fields=fields))
    sweep = records.epath.Path(tmp_path / "runs/smoke/grid")
    with slurm.cluster(tmp_path / "cluster") as cluster:
        environment = ENVIRONMENT | dict(cluster)
        call = lambda *command: subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        ).stdout.strip()
        flags = ("--engine", "slurm", "--slurm.partition", "spot", "--slurm.cpus", "1")
        start = lambda *more: launch(
            tmp_path, "smoke.grid", *flags, *more, fields=fields, environment=environment
        )
        assert "6 submitted" in finish(start())
        assert "queued" in finish(start())  # and nothing was submitted twice
        assert len(call("squeue", "--noheader", "--array").splitlines()) == 6
        # A job in the other partition takes all cores: what runs in this one is told to save, and requeued.
        under_way(sweep, range(1, steps - 30))
        call(
            "sbatch",
            "--partition=urgent",
            f"--ntasks={os.cpu_count()}",
            "--wrap=sleep 5",
            "--output=/dev/null",
        )
        preempted = lambda: [x for x in lines(sweep).values() if x["preemptions"]]
        wait_for(preempted, "nothing was preempted")
        requeued = wait_for(
            lambda: [job for job in queue(call) if job[2] == "BeginTime"], "nothing was requeued"
        )
        for job, *_ in requeued:  # two minutes early
            call("scontrol", "update", f"jobid={job}", "StartTime=now")
        # Another is killed where it stands; scancel would tell it first, and it would save.
        name = under_way(sweep, range(31, steps - 30))  # after the first save
        for pid in _processes(records.Record(sweep, name), ""):
            _kill(pid)
        wait_for(lambda: lines(sweep)[name]["state"] == "dead", "it was not killed")
        process = start("--wait", "--every", "2")
        while process.poll() is None:
            for job, *_ in queue(call):
                call("scontrol", "update", f"jobid={job}", "StartTime=now")
            time.sleep(5)
        assert "6 done" in finish(process)
        assert sum(line["preemptions"] for line in lines(sweep).values()) >= 2
        assert not any(line["failures"] for line in lines(sweep).values())
        assert requeued
    for line in lines(sweep).values():
        disturbed = records.Record(sweep, line["trial"]).run
        steady = records.Record(
            records.epath.Path(tmp_path / "steady/smoke/grid"), line["trial"]
        ).run
        expected = {record["step"]: record for record in steps_of(steady)}
        for record in steps_of(disturbed):
            for what in ("tokens_hash", "loss", "grad_norm"):
                assert record[what] == expected[record["step"]][what], (line, record["step"], what)
        ours, theirs = parameters(disturbed, steps), parameters(steady, steps)
        assert ours.keys() == theirs.keys()
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key], err_msg=key)


def queue(call):
    """(job, state, reason) of what is in the queue."""
    shown = call("squeue", "--noheader", "--array", "--format=%i|%T|%r")
    return [tuple(line.split("|")) for line in shown.splitlines()]


def under_way(sweep, steps):
    """Waits for a trial that runs and is at one of these steps; its name."""

    def found():
        for line in lines(sweep).values():
            if line["state"] == "running" and line["step"] in steps:
                return line["trial"]
        return None

    return wait_for(found, "no trial is under way")


# ------------------------------------------------------------------- the tools of the clouds


@pytest.mark.parametrize("topology", ["v5e:16x16", "v4:2x2x2", "v5p:4x4x8", "v6e:4x4"])
def test_gcloud_takes_every_line(tmp_path, topology):
    assert shutil.which("gcloud"), "https://cloud.google.com/sdk/docs/install"
    environment = os.environ | {
        "CLOUDSDK_CONFIG": str(tmp_path / "gcloud"),
        "CLOUDSDK_CORE_PROJECT": "lab",
    }

    def complaints(command):
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        # gcloud reads all its flags before it misses an account.
        return "" if "active account" in ran.stderr else ran.stderr

    plan = planned(topology=topology)
    engine = CLOUD["queued-resources"]
    (job, *others) = jobs(engine, plan)
    shapes = {
        tuple(w.replace(n, "N") for w in j.command) for j in [job, *others] for n in j.jobs.values()
    }
    assert len(shapes) == 1  # they differ by their names alone
    for name, text in job.files.items():
        (tmp_path / name).write_text(text)
    command = [word.replace("{files}", str(tmp_path)) for word in job.command]
    assert complaints(command) == ""
    assert "did you mean '--spot'" in complaints([*command, "--spotx"])
    (script,) = job.files.values()
    (deletion,) = [line.split() for line in script.splitlines() if "gcloud" in line]
    assert complaints(deletion) == ""
    submission = records.Submission(engine="", job="x", group=job.group)
    assert complaints(engine.cancel([submission])[0]) == ""
    assert complaints(listing(job.group)) == ""
    assert "--zoned" in complaints([*listing(job.group), "--zoned=a"])


@pytest.mark.parametrize(
    ("topology", "slices"), [("v5e:16x16", 1), ("v5e:4x4", 2), ("v4:2x2x2", 1), ("v7x:4x4x4", 1)]
)
def test_xpks_own_manifest_agrees_with_ours(tmp_path, topology, slices):
    assert shutil.which("xpk"), "`make test-engines` installs xpk"
    plan = planned(topology=topology, slices=slices)
    job, ours = jobs(CLOUD["xpk"], plan)[0], jobs(CLOUD["jobset"], plan)[0]
    file = tmp_path / "manifest.yaml"
    more = ("--dry-run", "--skip-validation", "--output-manifest-file", str(file))
    ran = subprocess.run(
        [*job.command, *more],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert file.exists(), ran.stdout + ran.stderr
    theirs = pyyaml.safe_load(file.read_text())
    ours = pyyaml.safe_load(*ours.files.values())
    replicated = lambda manifest: manifest["spec"]["replicatedJobs"][0]
    spec = lambda manifest: replicated(manifest)["template"]["spec"]
    pod = lambda manifest: spec(manifest)["template"]["spec"]
    container = lambda manifest: pod(manifest)["containers"][0]
    assert theirs["metadata"]["name"] == ours["metadata"]["name"]
    assert container(theirs)["image"] == container(ours)["image"] == IMAGE
    assert plan.trials[0].shell() in " ".join(container(theirs)["command"])
    assert container(ours)["command"] == list(plan.trials[0].command)
    assert container(theirs)["resources"]["limits"] == container(ours)["resources"]["limits"]
    for label in ("cloud.google.com/gke-tpu-accelerator", "cloud.google.com/gke-tpu-topology"):
        assert pod(theirs)["nodeSelector"][label] == pod(ours)["nodeSelector"][label]
    for field in ("parallelism", "completions", "backoffLimit"):
        assert spec(theirs)[field] == spec(ours)[field]
    assert spec(ours)["parallelism"] == tpus.find(topology).hosts
    assert replicated(theirs)["replicas"] == replicated(ours)["replicas"] == slices
    failure = lambda manifest: manifest["spec"]["failurePolicy"]
    assert failure(theirs)["maxRestarts"] == failure(ours)["maxRestarts"]
    assert failure(theirs)["rules"][0]["action"] == failure(ours)["rules"][0]["action"]
    codes = lambda manifest: spec(manifest)["podFailurePolicy"]["rules"][0]["onExitCodes"]
    assert codes(theirs)["operator"] == codes(ours)["operator"] == "NotIn"
    assert set(RESTARTED) <= set(codes(theirs)["values"])
    for final in (1, 2):
        assert final not in codes(theirs)["values"]
    assert pod(theirs)["priorityClassName"] == pod(ours)["priorityClassName"] == "low"


def test_skypilot_reads_every_task(tmp_path):
    sky = shutil.which("sky")
    assert sky, "`make test-engines` installs SkyPilot"
    for topology in ("v5e:16x16", "v4:2x2x2", "v5p:4x4x8", "v6e:4x4"):
        for job in jobs(CLOUD["sky"], planned(topology=topology)):
            for name, text in job.files.items():
                (tmp_path / f"{topology[:3]}-{name}").write_text(text)
    code = (
        "import sky, sys, json\n"
        "for file in sys.argv[1:]:\n"
        "    task = sky.Task.from_yaml(file)\n"
        "    (r,) = task.resources\n"
        "    print(json.dumps([task.name, task.run, r.accelerators, r.use_spot, r.job_recovery]))"
    )
    files = sorted(map(str, tmp_path.glob("*.yaml")))
    ran = subprocess.run(
        [str(Path(sky).parent / "python"), "-c", code, *files],
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert ran.returncode == 0, ran.stderr
    read = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("[")]
    assert len(read) == len(files) == 24
    for name, run, accelerators, spot, recovery in read:
        assert name.startswith("t-")
        assert "launch.trial gs://bucket/runs/smoke/grid" in run
        assert list(accelerators.values()) == [1]
        assert spot
        assert recovery["recover_on_exit_codes"] == list(RESTARTED)
    kinds = {next(iter(accelerators)) for _, _, accelerators, _, _ in read}
    assert kinds == {"tpu-v5litepod-256", "tpu-v4-16", "tpu-v5p-256", "tpu-v6e-16"}
