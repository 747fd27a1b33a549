"""Plans rendered for engines that need a cloud: what is handed over, held against tables of our own.

Real tools check the same in tests/test_engines_real.py.
"""

import json
import os
import stat
import subprocess
import sys

import pytest
import yaml as pyyaml
from hypothesis import example, given
from hypothesis import strategies as st

from experiments import smoke, sweeping
from launch import sweep
from launch.sweeps import engines, fitting, launcher, tpus, trials
from launch.sweeps.engines import yaml
from launch.sweeps.engines.jobset import RESTARTED, JobSet, Xpk
from launch.sweeps.engines.local import Local, Pool, cores
from launch.sweeps.engines.queued_resources import QueuedResources, listing
from launch.sweeps.engines.sky import Sky
from launch.sweeps.engines.slurm import Slurm
from launch.sweeps.records import Submission
from launch.sweeps.retry import Retry
from tests import jobset_schema

IMAGE = "gcr.io/project/cla:1"
CLOUD = {
    "queued-resources": QueuedResources(
        zone="us-central1-a", setup="pip install cla_jax", spot=True
    ),
    "jobset": JobSet(image=IMAGE, reservation="ours", service_account="trainer", spot=True),
    "xpk": Xpk(cluster="pods", zone="us-central1-a", project="lab", image=IMAGE, capacity="spot"),
    "sky": Sky(spot=True, infra="gcp/us-central1"),
}
# What `gcloud compute tpus queued-resources` takes (528); values are checked by gcloud itself.
GCLOUD_FLAGS = {
    "create": {
        *("node-id", "zone", "project", "accelerator-type", "runtime-version", "labels", "spot"),
        *("metadata-from-file", "service-account", "scopes", "valid-until-duration", "reserved"),
        *("async", "quiet"),
    },
    "delete": {"zone", "project", "force", "async", "quiet"},
    "list": {"zone", "project", "format"},
}


def planned(
    name="smoke.grid",
    runs="gs://bucket/runs",
    topology="v5e:16x16",
    slices=1,
    vms=False,
    **options,
):
    return trials.make(
        name,
        overrides=["--placement.runs", runs],
        resources=trials.resources(topology, slices, vms),
        environment={"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b='2'"},
        priority="low",
        python="python3",
        **options,
    )


def jobs(engine, plan=None, numbers=None):
    return engine.jobs(plan or planned(), numbers or {})


# ------------------------------------------------------------------------------ topologies


def test_topologies_have_the_names_of_clouds():
    found = tpus.find("v5e:16x16")
    assert (found.accelerator_type, found.hosts, found.xpk_type) == (
        *("v5litepod-256", 64, "v5litepod-16x16"),
    )
    assert tpus.find("v5p:4x4x8").accelerator_type == "v5p-256"  # cores: two a chip
    assert tpus.find("v4:2x2x1").hosts == 1
    assert (tpus.find("v5e:2x4").hosts, tpus.find("v5e:4x4").hosts) == (2, 4)
    assert (tpus.find("v5e:2x4").vms, tpus.find("v5e:4x4").vms) == (1, 4)  # v5litepod-8 is one VM


def test_every_topology_of_the_planner_is_known_to_the_engines():
    from cla_jax.chips import topology_names

    for name in topology_names():
        assert trials.resources(name, 1).hosts >= 1


@pytest.mark.parametrize(
    ("topology", "words"),
    [
        ("v5:4x4", "did you mean v5"),
        ("v5e:4x4x4", "2 dimensions, in chips: v5e:16x16"),
        ("v5p:4x4", "3 dimensions, in chips: v5p:4x4x8"),
        ("v6e:1x2", "4 chips each"),
        ("v6e", "2 dimensions"),
    ],
)
def test_topologies_that_do_not_exist_are_refused(topology, words):
    with pytest.raises(ValueError, match=words):
        trials.resources(topology, 1)


# ------------------------------------------------------------------------------ rendering


@pytest.mark.parametrize("name", CLOUD)
def test_every_trial_gets_a_job_with_its_command(name):
    plan = planned()
    made = jobs(CLOUD[name], plan)
    assert [trial for job in made for trial in job.jobs] == [trial.name for trial in plan.trials]
    for job, trial in zip(made, plan.trials, strict=True):
        text = "\n".join([*job.files.values(), *job.command])
        assert "launch.trial gs://bucket/runs/smoke/grid" in text or "launch.trial" in text
        assert trial.name in text
        assert "--hosts" in text  # sixty-four
        assert "LIBTPU_INIT_ARGS" in text


def flags_of(command, verb):
    words = command[command.index(verb) + 1 :]
    return {word[2:].partition("=")[0] for word in words if word.startswith("--")}


def test_queued_resources_are_asked_for_with_flags_that_gcloud_has():
    engine = CLOUD["queued-resources"]
    for job in jobs(engine):
        (name,) = job.jobs.values()
        assert job.command[:5] == ("gcloud", "compute", "tpus", "queued-resources", "create")
        assert job.command[5] == name
        flags = flags_of(job.command, "create")
        assert flags <= GCLOUD_FLAGS["create"]
        assert {"node-id", "zone", "accelerator-type", "runtime-version", "spot"} <= flags
        assert "--accelerator-type=v5litepod-256" in job.command
        assert "--runtime-version=v2-alpha-tpuv5-lite" in job.command
        (script,) = job.files.values()
        deletion = next(line for line in script.splitlines() if "gcloud" in line).split()
        assert deletion[4:6] == ["delete", name]
        assert flags_of(deletion, "delete") <= GCLOUD_FLAGS["delete"]
    small = planned(topology="v6e:2x4", vms=engine.vms)
    (script,) = jobs(engine, small)[0].files.values()
    assert "--hosts" not in script  # one VM waits for no other
    submitted = [Submission(engine="queued-resources", job="a", group="--zone=z --project=p")]
    (command,) = engine.cancel(submitted)
    assert flags_of(list(command), "delete") <= GCLOUD_FLAGS["delete"]
    assert flags_of(listing(submitted[0].group), "list") == GCLOUD_FLAGS["list"]
    assert command[5:8] == ("a", "--zone=z", "--project=p")


def test_a_start_up_script_goes_on_after_preemption_and_stops_at_a_verdict(tmp_path):
    """The script itself, with stand-ins for what a TPU VM has."""
    (job, *_) = jobs(CLOUD["queued-resources"])
    (script,) = job.files.values()
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    codes = tmp_path / "codes"
    fakes = {
        "curl": "echo 0",
        "pip": "true",
        "sleep": "true",
        "gcloud": f'echo "$@" >> {tmp_path}/gcloud',
        "python3": f'echo "$@" >> {tmp_path}/runs; code=$(head -1 {codes}); sed -i 1d {codes}; exit $code',
    }
    for name, text in fakes.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    script = script.replace("/opt/cla_jax", f"{tmp_path}/opt")
    environment = os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}"}
    for said, runs in (("42\n134\n0\n", 3), ("1\n", 1)):
        codes.write_text(said)
        for file in ("runs", "gcloud"):
            (tmp_path / file).unlink(missing_ok=True)
        subprocess.run(["bash", "-c", script], env=environment, check=True, capture_output=True)
        assert len((tmp_path / "runs").read_text().splitlines()) == runs
        assert "delete" in (tmp_path / "gcloud").read_text()  # nothing is paid for any longer


@pytest.mark.parametrize("topology", ["v5e:16x16", "v4:2x2x2", "v7x:4x4x4"])
@pytest.mark.parametrize("slices", [1, 2])
def test_jobsets_fit_the_schema(topology, slices):
    import jsonschema

    plan = planned(topology=topology, slices=slices)
    for job in jobs(CLOUD["jobset"], plan):
        (text,) = job.files.values()
        manifest = pyyaml.safe_load(text)
        jsonschema.validate(manifest, jobset_schema.SCHEMA)
        (replicated,) = manifest["spec"]["replicatedJobs"]
        assert replicated["replicas"] == slices
        assert replicated["template"]["spec"]["parallelism"] == tpus.find(topology).hosts


def test_the_schema_refuses_what_the_cluster_would():
    import jsonschema

    (job, *_) = jobs(CLOUD["jobset"])
    manifest = pyyaml.safe_load(*job.files.values())
    for break_ in (
        lambda m: m["spec"]["replicatedJobs"][0].pop("name"),
        lambda m: m["spec"].update(maxRestarts=3),
        lambda m: m["spec"]["failurePolicy"]["rules"][0].update(action="Retry"),
        lambda m: m["metadata"].update(name="Not_a_name"),
    ):
        broken = json.loads(json.dumps(manifest))
        break_(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, jobset_schema.SCHEMA)


def test_a_jobset_restarts_on_stops_and_dead_peers_and_on_nothing_else():
    (job, *_) = jobs(CLOUD["jobset"])
    spec = pyyaml.safe_load(*job.files.values())["spec"]
    (replicated,) = spec["replicatedJobs"]
    (rule,) = replicated["template"]["spec"]["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert (rule["action"], codes["operator"]) == ("FailJob", "NotIn")
    assert {42, 134} <= set(codes["values"])  # asked to stop; peer dead
    assert not {1, 2} & set(codes["values"])
    actions = {r["onJobFailureReasons"][0]: r["action"] for r in spec["failurePolicy"]["rules"]}
    assert actions == {
        "PodFailurePolicy": "FailJobSet",
        "BackoffLimitExceeded": "RestartJobSetAndIgnoreMaxRestarts",
    }
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "16x16",
        "cloud.google.com/gke-spot": "true",
        "cloud.google.com/reservation-name": "ours",
    }
    assert pod["priorityClassName"] == "low"
    assert pod["containers"][0]["env"][0]["value"] == "--xla_a=1 --xla_b='2'"


def test_sky_asks_for_the_topology_and_recovers_what_is_stopped():
    (job, *_) = jobs(CLOUD["sky"])
    task = pyyaml.safe_load(*job.files.values())
    assert task["resources"]["accelerators"] == "tpu-v5litepod-256"
    assert task["resources"]["job_recovery"] == {
        "max_restarts_on_errors": 0,
        "recover_on_exit_codes": list(RESTARTED),
    }
    assert task["envs"] == {"LIBTPU_INIT_ARGS": "--xla_a=1 --xla_b='2'"}
    assert task["run"].startswith("python3 -m launch.trial gs://bucket/runs/smoke/grid")


def test_a_slurm_array_has_a_task_a_trial():
    engine = Slurm(
        partition="gpu", time="1:00", nodes=2, cpus=4, gpus=8, at_once=3, sbatch="--account=a -C x"
    )
    plan = planned(runs="/shared/runs", topology="")
    (job,) = jobs(engine, plan)
    (script,) = job.files.values()
    words = [word.removeprefix("--") for word in job.command]
    for word in ("array=0-5%3", "partition=gpu", "time=1:00", "nodes=2", "gpus-per-node=8"):
        assert word in words
    assert {"requeue", "signal=TERM@120", "account=a", "-C", "x", "cpus-per-task=4"} <= set(words)
    assert "launch.trial /shared/runs/smoke/grid" in script
    assert '"$trial" --hosts 2' in script
    assert list(job.jobs.values()) == [f"{{}}_{i}" for i in range(6)]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    with pytest.raises(ValueError, match=r"--slurm\.sbatch=.*No closing quotation"):
        Slurm(sbatch="--comment='a")


def test_a_topology_of_gpus_says_how_many_nodes_slurm_gives_a_trial():
    plan = planned(runs="/shared/runs", topology="h100:4x8", slices=2)
    (job,) = jobs(Slurm(), plan)
    assert {"--nodes=8", "--gpus-per-node=8"} <= set(job.command)
    assert '"$trial" --hosts 8' in next(iter(job.files.values()))
    (same,) = jobs(Slurm(nodes=8, gpus=8), plan)
    assert same == job
    with pytest.raises(ValueError, match=r"--slurm\.nodes 4, but --topology h100:4x8 has 8"):
        jobs(Slurm(nodes=4), plan)
    with pytest.raises(ValueError, match=r"--slurm\.gpus 4, but --topology h100:4x8 has 8"):
        jobs(Slurm(gpus=4), plan)
    with pytest.raises(
        ValueError, match=r"--topology v5e:4x4: engine slurm supports GPU topologies only"
    ):
        jobs(Slurm(), planned(topology="v5e:4x4"))
    with pytest.raises(ValueError, match=r"unknown kind of accelerator 'h10'; did you mean h100"):
        planned(topology="h10:8")


def started(tmp_path, script, task):
    """The words and the variable `trial` that a task of an array starts its trial with."""
    bin_ = tmp_path / "bin"
    bin_.mkdir(exist_ok=True)
    fakes = {"srun": 'shift; exec "$@"', "python3": 'printf "%s\\n" "$trial" "$@"'}
    for name, text in fakes.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    path = {"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": str(task)}
    ran = subprocess.run(
        ["bash", "-c", script], env=path, capture_output=True, text=True, check=True
    )
    return ran.stdout.splitlines()[:-1]


def test_a_task_starts_its_own_trial_whatever_names_and_variables_are(monkeypatch, tmp_path):
    """A trial may be called like another word of its command, a variable like one of the script's."""

    def numbers():
        yield from ((str(n), smoke.tiny()) for n in (5, 100, 7))

    monkeypatch.setattr(smoke, "SWEEPS", (numbers,))
    odd = '/shared/it\'s a "b" #c $HOME é'
    variables = {"trial": "X", "trials": "Y", "stopped": "1", "SLURM_ARRAY_TASK_ID": "0"}
    plan = trials.make(
        "smoke.numbers",
        overrides=["--placement.runs", odd],
        environment=variables,
        retry=Retry(failures=5),
        python="python3",
    )
    (job,) = Slurm(setup="trial=Z").jobs(plan, {})
    (script,) = job.files.values()
    for task, name in enumerate(("5", "100", "7")):
        variable, *words = started(tmp_path, script, task)
        assert words == ["-m", "launch.trial", f"{odd}/smoke/numbers", name, "--failures", "5"]
        assert variable == "X"  # it is the trial's, and reaches it
    runs = next(word for word in job.command if word.startswith("--output="))
    assert runs == f"--output={odd}/smoke/numbers/.sweep/jobs/%A_%a.out"
    (job,) = Slurm().jobs(planned("smoke", runs="/shared/%A", topology=""), {})
    assert "--output=/shared/%%A/smoke/.sweep/jobs/%A_%a.out" in job.command
    (job, *_) = jobs(CLOUD["queued-resources"], planned("smoke"))
    assert "export LIBTPU_INIT_ARGS" not in "".join(job.files.values())


def test_kubernetes_expands_nothing_of_ours():
    plan = trials.make(
        "smoke.grid",
        overrides=["--placement.runs", "gs://b/$(HOME)"],
        resources=trials.resources("v5e:4x4", 1),
        environment={"A": "$(HOSTNAME) $$"},
    )
    (job, *_) = CLOUD["jobset"].jobs(plan, {})
    spec = pyyaml.safe_load(*job.files.values())["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert container["env"] == [{"name": "A", "value": "$$(HOSTNAME) $$$$"}]
    assert "gs://b/$$(HOME)/smoke/grid" in container["command"]


def test_a_sweep_larger_than_an_array_becomes_several(tool):
    tool("scontrol", "echo 'MaxArraySize            = 4'")
    made = Slurm().jobs(planned(runs="/shared/runs", topology=""), {})
    assert [[w for w in job.command if "--array" in w] for job in made] == [
        *(["--array=0-3"], ["--array=0-1"]),
    ]
    assert [list(job.jobs.values()) for job in made] == [
        *([f"{{}}_{i}" for i in range(4)], [f"{{}}_{i}" for i in range(2)]),
    ]
    assert len({name for job in made for name in job.files}) == 2
    tool("scontrol", "exit 1")
    assert len(Slurm().jobs(planned(runs="/shared/runs", topology=""), {})) == 1


_characters = st.sampled_from(
    " \n\t\r:#-'\"\\%&*!|>{}[],?@`~\x00\x1b\x7f\x85\xa0\u2028\ufeff😀é0aey=<."
)
_texts = st.text(_characters, max_size=20) | st.text(st.characters(exclude_categories=["Cs"]))
_documents = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)


@given(_documents)
@example({"on": "yes", "7": 1e-05, "lines": "one\n\n  two: 'x'\n", "\x85": "a\rb\u2028c"})
def test_documents_are_read_back_as_they_were(value):
    assert pyyaml.safe_load(yaml.dump(value)) == value


def test_lines_of_text_stay_readable():
    assert yaml.dump({"run": "a: b\nc\n"}) == "run: |\n  a: b\n  c\n"


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        (JobSet(), {}, "--jobset.image is missing"),
        (Xpk(image=IMAGE), {}, "--xpk.cluster is missing"),
        (QueuedResources(setup="x"), {}, "--queued-resources.zone is missing"),
        (QueuedResources(zone="z"), {}, "--queued-resources.setup is missing"),
        (CLOUD["queued-resources"], {"slices": 2}, "for more, use jobset"),
        (CLOUD["queued-resources"], {"topology": "v7x:4x4x4"}, "no TPU VMs of that type"),
        (CLOUD["sky"], {"topology": "v7x:4x4x4"}, "is unknown to SkyPilot"),
        (Sky(), {"topology": ""}, "--sky.accelerators"),
        (CLOUD["jobset"], {"runs": "runs"}, "means another place on another machine"),
    ],
)
def test_what_an_engine_needs_is_asked_for(engine, options, words):
    with pytest.raises(ValueError, match=words):
        jobs(engine, planned(**options))


# ----------------------------------------------------------------------------- the machinery


@pytest.fixture
def tool(tmp_path, monkeypatch):
    """Puts a stand-in for a command-line tool on the PATH: `tool("squeue", "echo 7_0")`."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")

    def make(name, script):
        (bin_ / name).write_text(f"#!/bin/sh\n{script}\n")
        (bin_ / name).chmod(stat.S_IRWXU)

    # Those of the machine may wait for a cluster, and there may be none.
    make("scontrol", "exit 1")
    for name in ("squeue", "scancel"):
        make(name, "true")
    return make


def test_jobs_that_wait_or_run_are_asked_of_the_machinery(tool):
    submitted = [Submission(engine="", job=job, group="--zone=z") for job in ("7_0", "7_1", "8_0")]
    tool("squeue", "echo 7_1; echo 9_0")
    assert Slurm().alive(submitted) == {"7_1"}
    resources = [
        {"name": "projects/p/locations/z/queuedResources/7_0", "state": {"state": "ACTIVE"}},
        {"name": "projects/p/locations/z/queuedResources/7_1", "state": {"state": "SUSPENDED"}},
    ]
    tool("gcloud", f"echo '{json.dumps(resources)}'")
    assert QueuedResources().alive(submitted) == {"7_0"}
    jobsets = {
        "items": [
            {"metadata": {"name": "7_0"}, "status": {"conditions": [ended("Completed")]}},
            {"metadata": {"name": "7_1"}, "status": {"conditions": [ended("Suspended")]}},
            {"metadata": {"name": "8_0"}},
        ]
    }
    tool("kubectl", f"echo '{json.dumps(jobsets)}'")
    assert JobSet().alive(submitted) == Xpk().alive(submitted) == {"7_1", "8_0"}
    managed = [{"job_name": "7_0", "status": "RECOVERING"}, {"job_name": "7_1", "status": "FAILED"}]
    tool("sky", f"echo '{json.dumps(managed)}'")
    assert Sky().alive(submitted) == {"7_0"}


def ended(kind):
    return {"type": kind, "status": "True"}


def test_a_tool_that_fails_is_quoted(tool):
    tool("squeue", "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1")
    with pytest.raises(ValueError, match="failed with code 1: slurm_load_jobs error: Unable"):
        Slurm().alive([])


@pytest.mark.parametrize("name", ["slurm", *CLOUD])
def test_a_missing_tool_is_named_with_how_to_get_it(monkeypatch, tmp_path, name):
    monkeypatch.setenv("PATH", str(tmp_path))
    engine = CLOUD.get(name, Slurm())
    tool, how = next(iter(engine.tools.items()))
    with pytest.raises(
        ValueError, match=f"needs the command {tool}, which is not on the PATH"
    ) as error:
        engines.check_tools(engine)
    assert how in str(error.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["smoke.grid", "--engine", "slrum"], "unknown engine 'slrum'; did you mean slurm"),
        (["smoke.girdd"], "unknown sweep 'smoke.girdd'; did you mean smoke.grid"),
        (["smoke.grid", "--engine", "jobset"], "engine jobset needs --topology"),
        (["smoke.grid", "--topology", "v5e:4x4"], "engine local takes no --topology"),
        (["smoke.grid", "--env", "A"], "--env 'A' must be NAME=VALUE"),
        (["smoke.grid", "--env", "ñ=1"], "--env 'ñ=1' must be NAME=VALUE"),
        (["smoke.grid", "--env", "A=\udce9"], "is not UTF-8"),
        (["smoke.grid", "--local.workers", "100000"], "this machine has"),
        (["smoke.grid", "--retry.failures", "0"], "--retry.failures 0 must be at least 1"),
    ],
)
def test_mistakes_on_the_command_line_are_named(capsys, argv, words):
    with pytest.raises(SystemExit) as stop:
        sweep.main([*argv, "--dry-run"])
    assert stop.value.code == 2
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_pool_deals_out_cores_and_gpus(monkeypatch):
    monkeypatch.setattr("launch.sweeps.engines.local.cores", lambda: list(range(8)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert [slot["cores"] for slot in Local().slots()] == ["0,1,2,3", "4,5,6,7"]
    assert [slot["cores"] for slot in Local(workers=3, cores=2).slots()] == ["0,1", "2,3", "4,5"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    slots = Local().slots()
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["0", "3"]
    assert [slot["OMP_NUM_THREADS"] for slot in slots] == ["4", "4"]
    assert Local(workers=1).slots()[0]["CUDA_VISIBLE_DEVICES"] == "0,3"


# ------------------------------------------------------------------------------- does it fit


def wide_sweep():
    """Two hundred trials of two shapes."""
    yield from sweeping.grid(
        smoke.tiny(),
        {
            "model.kv_map": ("identity", "cla:2"),
            "optimizer.peak_lr": [1e-3 * 1.1**i for i in range(10)],
            "seed": range(10),
        },
    )


def test_a_shape_is_compiled_once_and_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smoke, "SWEEPS", (wide_sweep,))
    plan = planned("smoke.wide_sweep", runs=str(tmp_path))
    asked = []

    def ask(config, topology, slices, _):
        asked.append((config.model.kv_map, topology, slices))
        return "too large" if config.model.kv_map == "identity" else ""

    monkeypatch.setattr(fitting, "_ask", ask)
    refused = fitting.check(plan)
    assert asked == [("identity", "v5e:16x16", 1), ("cla:2", "v5e:16x16", 1)]
    assert len(plan.trials) == 200
    assert refused == {t.name: "too large" for t in plan.trials if "identity" in t.name}
    assert fitting.check(plan) == refused  # from the files
    assert len(asked) == 2
    fitting.check(planned("smoke.wide_sweep", runs=str(tmp_path), topology="v5e:4x4"))
    assert len(asked) == 4
    monkeypatch.setattr(fitting, "_library", lambda: "another")
    fitting.check(plan)
    assert len(asked) == 6


@pytest.mark.parametrize(
    ("field", "value", "same"),
    [
        ("seed", 3, True),
        ("optimizer.peak_lr", 1.0, True),
        ("data.source", "text:x", True),
        ("placement.log_every", 3, True),
        ("batch_size", 16, False),
        ("model.d_ff", 256, False),
        ("data.seq_len", 256, False),
        ("placement.remat", "block", False),
        ("placement.accumulate", 2, False),
        ("data.attend_across_documents", False, False),
    ],
)
def test_what_changes_the_shape_is_compiled_again(field, value, same):
    from cla_jax.fields import replaced

    changed = replaced(smoke.tiny(), {field: value})
    assert (fitting.shape(changed) == fitting.shape(smoke.tiny())) == same


def test_the_planner_is_asked_and_its_reasons_are_passed_on(monkeypatch, tmp_path, devices):
    """On the devices at hand, in place of a pod."""
    from cla_jax import chips
    from cla_jax import plan as planning

    here = planning.topologies.Topology("here", 1, devices(2))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(planning.topologies, "topology", lambda name, slices: here)
    config = fitting.shape(smoke.tiny())
    assert fitting._ask(config, "v5e:2x2", 1, tmp_path) == ""
    small = chips.Chip(flops=1e12, memory=1e5, bandwidth=1e11)
    monkeypatch.setattr(chips, "find", lambda kind: small)
    reason = fitting._ask(config, "v5e:2x2", 1, tmp_path)
    assert "does not fit here: needs" in reason
    assert "To make it fit: set placement.remat" in reason
    import dataclasses

    # Jobs that are submitted later must not find what keeps compilers from the accelerators here.
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == "0,1"
    odd = dataclasses.replace(config, batch_size=3)
    assert "3" in fitting._ask(odd, "v5e:2x2", 1, tmp_path)  # no way to share it


def test_a_dry_run_shows_what_would_be_submitted_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(fitting, "_ask", lambda *_: "")
    runs = tmp_path / "runs"
    flags = ["smoke.grid", "--engine", "jobset", "--jobset.image", IMAGE, "--topology", "v5e:4x4"]
    fields = ["--", "--placement.runs", str(runs)]
    sweep.main([*flags, "--dry-run", *fields])
    shown = capsys.readouterr().out
    assert shown.count("kind: ") == shown.count("kubectl apply") == 6
    assert not (runs / "smoke").exists()
    sweep.main([*flags, "--dry-run", "--out", str(tmp_path / "out"), *fields])
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert len(written) == 7
    assert written[0] == "submit.sh"
    assert (tmp_path / "out" / "submit.sh").read_text().count("kubectl apply") == 6


def test_trials_that_do_not_fit_are_refused_and_the_others_go_on(
    monkeypatch, tmp_path, capsys, tool
):
    def make():
        yield from sweeping.grid(smoke.tiny(), {"model.kv_map": ("identity", "cla:2")})

    make.__doc__ = "Two shapes."
    monkeypatch.setattr(smoke, "SWEEPS", (make,))
    reason = lambda config, *_: "" if "cla" in config.model.kv_map else "needs 9 GiB of 1 GiB"
    monkeypatch.setattr(fitting, "_ask", reason)
    tool(
        "kubectl",
        f'case "$*" in apply*) echo "$*" >> {tmp_path}/told;; *) echo \'{{"items":[]}}\';; esac',
    )
    with pytest.raises(SystemExit) as stop:
        sweep.main(
            [
                *("smoke.make", "--engine", "jobset", "--jobset.image", IMAGE),
                *("--topology", "v5e:4x4", "--", "--placement.runs", str(tmp_path / "runs")),
            ]
        )
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "kv_map=identity  refused: needs 9 GiB of 1 GiB" in shown
    assert "1 refused, 1 submitted" in shown
    assert len((tmp_path / "told").read_text().splitlines()) == 1


def test_planning_loads_no_jax_once_the_shapes_are_known():
    """Importing it would take longer than planning two hundred trials."""
    code = (
        "import sys, launch.sweep, launch.status, launch.cancel\n"
        "from launch.sweeps import trials\ntrials.make('cla_1b')\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_submitting_twice_submits_once(tmp_path, monkeypatch, capsys, tool):
    tool("sbatch", f"echo once >> {tmp_path}/told; echo 7")
    tool("squeue", "for i in 0 1 2 3 4 5; do echo 7_$i; done")
    tool("scancel", f'echo "$*" > {tmp_path}/cancelled')
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    argv = ["smoke.grid", "--engine", "slurm", "--", "--placement.runs", str(tmp_path / "runs")]
    for said in ("6 submitted", "6 queued"):
        with pytest.raises(SystemExit) as stop:
            sweep.main(argv)
        assert stop.value.code == 0
        assert said in capsys.readouterr().out
    assert (tmp_path / "told").read_text() == "once\n"
    # What has left the queue is submitted again; the others are not.
    tool("squeue", "for i in 0 1 2 4 5; do echo 7_$i; done")
    with pytest.raises(SystemExit):
        sweep.main(argv)
    assert "5 queued, 1 submitted" in capsys.readouterr().out
    from launch import cancel

    directory = str(tmp_path / "runs/smoke/grid")
    cancel.main([directory])
    assert len((tmp_path / "cancelled").read_text().split()) == 6
    capsys.readouterr()
    with pytest.raises(SystemExit):
        sweep.main(argv)
    assert "6 cancelled" in capsys.readouterr().out


def test_what_is_submitted_inherits_nothing_of_the_job_around_the_launcher(
    tmp_path, monkeypatch, tool
):
    """Inside an allocation SLURM's variables bind what inherits them to the launcher's own core."""
    of_a_job = ("SLURM_CPU_BIND", "SLURM_NTASKS", "SLURM_JOB_ID", "SBATCH_MEM_BIND", "PMI_RANK")
    for name in of_a_job:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/ours")
    monkeypatch.setenv("SLURM_CLUSTERS", "east")
    tool("sbatch", f"env > {tmp_path}/environment; echo 7")
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit):
        sweep.main(["smoke.grid", "--engine", "slurm", "--", "--placement.runs", str(tmp_path)])
    passed = dict(
        line.partition("=")[::2] for line in (tmp_path / "environment").read_text().splitlines()
    )
    assert (passed["SLURM_CONF"], passed["SLURM_CLUSTERS"]) == ("/etc/ours", "east")
    assert not passed.keys() & set(of_a_job)
    # Nor does a trial of the pool: it would wait for the other processes of that job.
    pool = Pool(Local(workers=1))
    job = engines.Job(files={}, command=("sh", "-c", f"env > {tmp_path}/pool #"), jobs={})
    pool.start("a", job, {"A": "1"}, tmp_path / "log")
    pool.end(ask=False)
    text = (tmp_path / "pool").read_text()
    assert "A=1" in text
    assert not any(f"{name}=" in text for name in of_a_job)


def test_an_error_that_trials_share_is_told_once(tmp_path, monkeypatch, capsys, tool):
    tool("sbatch", "echo 'sbatch: error: invalid account' >&2; exit 1")
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        sweep.main(["smoke.grid", "--engine", "slurm", "--", "--placement.runs", str(tmp_path)])
    shown = capsys.readouterr().out
    assert stop.value.code == 1
    assert shown.count("invalid account") == 1
    assert "peak_lr=0.001,seed=0 and 5 more  stuck: sbatch" in shown


def test_a_job_that_cannot_be_handed_over_is_told_with_the_tools_words(
    tmp_path, monkeypatch, capsys, tool
):
    monkeypatch.setattr(fitting, "_ask", lambda *_: "")
    refuse_second = f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n+1)) > {tmp_path}/n\n"
    refuse_second += (
        '[ "$n" != 1 ] || { echo "namespace is full" >&2; exit 1; }; echo \'{"items":[]}\''
    )
    tool("kubectl", refuse_second)
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as stop:
        sweep.main(
            [
                *("smoke.grid", "--engine", "jobset", "--jobset.image", IMAGE),
                *("--topology", "v5e:4x4", "--", "--placement.runs", str(tmp_path / "runs")),
            ]
        )
    assert stop.value.code == 1
    shown = capsys.readouterr().out
    assert "namespace is full" in shown
    assert "5 submitted" in shown


def test_more_cores_than_there_are_is_refused():
    with pytest.raises(ValueError, match=f"this machine has {len(cores())} cores"):
        Local(workers=2, cores=len(cores()))


# -------------------------------------------------------------------------------- the pool

# Stands in for `python -m launch.trial DIRECTORY NAME`: what the orders beside it say of the trial.
RUNNER = """#!{python}
import json, pathlib, sys, time
directory, name = map(str, sys.argv[3:5])
sweep = pathlib.Path(directory)
with open({log!r}, "a") as log:
    log.write(name + "\\n")
seen = pathlib.Path({log!r} + ".seen")
seen.exists() or seen.write_text(str(len(list((sweep / ".sweep").glob("*/trial.json")))))
order = json.loads(pathlib.Path({orders!r}).read_text()).get(name, "finish")
if order == "finish":
    (sweep / name).mkdir(parents=True, exist_ok=True)
    line = {{"step": 40, "perplexity": 7.0}}
    (sweep / name / "metrics.jsonl").write_text(json.dumps(line) + "\\n")
    time.sleep(1.2)  # done, and not yet ended
elif order == "fail once":
    while not pathlib.Path({log!r} + ".running").exists():
        time.sleep(0.05)
    state = {{"status": "stopped", "failures": 1, "failed_in_a_row": 1, "error": "no space\\nleft"}}
    (sweep / ".sweep" / name / "state.json").write_text(json.dumps(state))
    while not pathlib.Path({log!r} + ".told").exists():
        time.sleep(0.05)
    (sweep / name).mkdir(parents=True, exist_ok=True)
    (sweep / name / "metrics.jsonl").write_text('{{"step": 40, "perplexity": 7.0}}\\n')
elif order == "take long":
    (sweep / name).mkdir(parents=True, exist_ok=True)
    metrics = sweep / name / "metrics.jsonl"
    metrics.write_text('{{"step": 7, "loss": 2.5, "eta_s": 90.0}}\\n')
    while not pathlib.Path({log!r} + ".told").exists():
        time.sleep(0.05)
    metrics.write_text('{{"step": 40, "perplexity": 7.0}}\\n')
elif order == "call it done":
    (sweep / ".sweep" / name / "state.json").write_text('{{"status": "done", "attempts": 1}}')
elif order == "crash":
    sys.exit("Traceback: the runner is broken")
"""


@pytest.fixture
def pool(tmp_path, monkeypatch, capsys):
    """Launches smoke.grid with a stand-in for runners: `pool({trial: order})`; exit code, words, starts."""
    monkeypatch.setattr(launcher.signal, "signal", lambda *_: None)
    log, orders, runner = (tmp_path / name for name in ("log", "orders", "runner"))
    text = RUNNER.format(python=sys.executable, log=str(log), orders=str(orders))
    runner.write_text(text)
    runner.chmod(0o755)

    class FakeSys:
        argv, stderr, executable = sys.argv, sys.stderr, str(runner)

    monkeypatch.setattr(launcher, "sys", FakeSys)

    def launch(said, *flags):
        orders.write_text(json.dumps(said))
        log.write_text("")
        with pytest.raises(SystemExit) as stop:
            sweep.main(["smoke.grid", *flags, "--", "--placement.runs", str(tmp_path / "runs")])
        return stop.value.code, capsys.readouterr().out, log.read_text().split()

    return launch


def test_a_pool_of_one_trains_every_trial_and_only_once(pool):
    code, said, started = pool({}, "--local.workers", "1")
    assert (code, len(started), len(set(started))) == (0, 6, 6)
    assert "6 done" in said
    code, said, started = pool({}, "--local.workers", "1")
    assert (code, started) == (0, [])


def test_a_broken_runner_is_not_started_for_ever(pool):
    broken = "peak_lr=0.001,seed=1"
    code, said, started = pool({broken: "crash"}, "--local.workers", "2", "--local.cores", "1")
    assert (code, started.count(broken)) == (1, 1)
    assert f"{broken}  stuck: exit code 1: Traceback: the runner is broken" in said
    assert "5 done" in said
    assert "1 stuck" in said


def test_a_trial_that_failed_and_is_started_again_is_told_once(pool, tmp_path, monkeypatch):
    """A pipe has no live table: without this line nothing was said until the end."""
    monkeypatch.setattr(launcher, "_POOL_SECONDS", 0.1)
    failing = "peak_lr=0.001,seed=1"
    printed, rounds = launcher._print_together, iter(range(600))

    def noted(lines):
        printed(lines)
        for name, state, reason in lines:
            if name == failing and state == "running":
                (tmp_path / ("log.told" if "failed" in reason else "log.running")).touch()
        assert next(rounds, None) is not None, "it is never told"

    monkeypatch.setattr(launcher, "_print_together", noted)
    code, said, _ = pool({failing: "fail once"}, "--local.workers", "2", "--local.cores", "1")
    assert code == 0
    words = f"{failing}  running: failed once and is started again: no space\n"
    assert said.count(words) == said.count("started again") == 1


def test_a_long_trial_says_how_far_it_is(pool, tmp_path, monkeypatch):
    """A pipe has no live table, and a trial may take hours."""
    monkeypatch.setattr(launcher, "_POOL_SECONDS", 0.1)
    monkeypatch.setattr(launcher, "_PROGRESS_SECONDS", 0.0)
    long = "peak_lr=0.001,seed=1"
    printed, rounds = launcher._print_together, iter(range(600))

    def noted(lines):
        printed(lines)
        if any(name == long and reason.startswith("step 7") for name, _, reason in lines):
            (tmp_path / "log.told").touch()
        assert next(rounds, None) is not None, "it is never told"

    monkeypatch.setattr(launcher, "_print_together", noted)
    code, said, _ = pool({long: "take long"}, "--local.workers", "2", "--local.cores", "1")
    assert code == 0, said
    assert f"{long}  running: step 7 of 40, loss 2.5000, ETA 1.5 min\n" in said
    assert "\r" not in said


def test_a_runner_that_sees_another_result_is_not_started_for_ever(pool):
    """As one whose code has changed since the launcher began."""
    odd = "peak_lr=0.001,seed=1"
    code, said, started = pool({odd: "call it done"}, "--local.workers", "2", "--local.cores", "1")
    assert (code, started.count(odd)) == (1, 1)
    assert f"{odd}  stuck: its runner reported success, but there is no result" in said
    assert "5 done" in said


def test_a_damaged_record_is_one_trial_s_trouble(pool, tmp_path):
    bad = tmp_path / "runs/smoke/grid/.sweep/peak_lr=0.001,seed=1/state.json"
    bad.parent.mkdir(parents=True)
    for content in ("{", "[]"):
        bad.write_text(content)
        code, said, started = pool({}, "--local.workers", "2", "--local.cores", "1")
        assert code == 1
        assert "peak_lr=0.001,seed=1" not in started
        assert "1 refused" in said
        assert "5 done" in said


def test_what_diverged_is_started_again_once_when_it_is_asked_for(pool, tmp_path):
    state = tmp_path / "runs/smoke/grid/.sweep/peak_lr=0.001,seed=1/state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"status": "failed", "diverged": True, "error": "diverged: x"}))
    flags = ("--local.workers", "2", "--local.cores", "1")
    code, _, started = pool({}, *flags)
    assert (code, len(started)) == (1, 5)
    code, said, started = pool({}, *flags, "--again")
    assert (code, started) == (0, ["peak_lr=0.001,seed=1"])
    assert "6 done" in said


def test_every_trial_has_its_record_before_the_first_is_started(pool, tmp_path):
    """So that those that wait for a place can be seen, and cancelled."""
    pool({}, "--local.workers", "1")
    assert (tmp_path / "log.seen").read_text() == "6"
