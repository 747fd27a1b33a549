"""What is refused before anything is made: missing packages, unusable places, other runs' names."""

import dataclasses
import sys

import pytest

from cla_jax import extras, preflight, runs
from cla_jax.config import Component
from cla_jax.data import sources
from launch import cli, sweep
from launch import train as launch_train
from launch.sweeps import launcher
from tests.sealed import write_metrics


@pytest.mark.parametrize(
    ("field", "value", "package"),
    [
        ("placement.tensorboard", True, "tensorboardX"),
        ("placement.wandb", "project", "wandb"),
        ("placement.runs", "gs://bucket/runs", "gcsfs"),
        ("placement.data_dir", "gs://bucket/data", "gcsfs"),
        ("data.source", "text:a.txt.zst", "zstd"),
    ],
)
def test_a_missing_package_is_named_with_what_works_from_a_clone(
    tiny, monkeypatch, tmp_path, field, value, package
):
    for name in ("backports.zstd", "compression.zstd") if package == "zstd" else (package,):
        monkeypatch.setitem(sys.modules, name, None)
    words = rf"^{field}.* needs the extra `(\w+)`: `pip install -e '\.\[\1\]'` in your clone"
    with pytest.raises(ValueError, match=words):
        preflight.check(tiny(**{field: value}))
    if field in ("placement.tensorboard", "placement.wandb"):
        preflight.check(tiny(**{field: value}), leads=False)  # only one process writes the metrics
    assert not (tmp_path / "runs").exists()


def test_every_source_of_a_mixture_is_asked_for_its_package(tiny, monkeypatch):
    for name in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    parts = [Component.parse(text) for text in ("web=1:sotu:20", "code=1:text:a/*.TXT.ZST")]
    config = tiny()
    data = dataclasses.replace(config.data, source="", mixture=tuple(parts))
    config = dataclasses.replace(config, data=data)
    with pytest.raises(
        ValueError, match=r"^data\.mixture: code = 'text:a/\*.TXT.ZST' needs the extra"
    ):
        preflight.check(config)


def test_a_place_where_nothing_can_be_made_is_named_before_data_is_prepared(tiny):
    """The permissions of /proc allow everything to root."""
    with pytest.raises(
        ValueError, match=r"placement\.runs = '/proc/x': /proc may not be written to"
    ):
        preflight.check(tiny(**{"placement.runs": "/proc/x"}))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda p: (p / "runs").write_text(""),
            "placement.runs = .*runs is a file, not a directory",
        ),
        (lambda p: (p / "runs").symlink_to("none"), "placement.runs = .*runs is a broken link"),
        (lambda p: ((p / "runs").mkdir(), (p / "runs/tiny").write_text("")), "name = .*is a file"),
    ],
)
def test_a_place_that_is_no_directory_is_named(tiny, tmp_path, make, words):
    make(tmp_path)
    with pytest.raises(ValueError, match=words):
        preflight.check(tiny())


def test_a_directory_whose_name_misleads_libraries_is_refused_from_inside_too(
    tiny, tmp_path, monkeypatch
):
    (tmp_path / "back\\x").mkdir()
    monkeypatch.chdir(tmp_path / "back\\x")
    with pytest.raises(ValueError, match=r"placement\.runs = .*has a backslash"):
        preflight.check(tiny(**{"placement.runs": "runs"}))


def test_another_runs_name_is_refused_before_data_is_prepared(tiny, tmp_path, capsys, monkeypatch):
    run = runs.open_run(tiny(), data_fingerprint="x", tokenizer_json="{}")
    write_metrics(run, [{"step": 1, "loss": 5.0}])
    monkeypatch.setattr(
        launch_train, "parse", lambda _: [tiny(seed=1, **{"placement.data_dir": "d"})]
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        launch_train.main(["tiny"])
    assert stop.value.code == 2
    assert "seed: 0 there, 1 asked for" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_a_sweep_is_refused_before_its_trials_are(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(extras, "there", lambda _: False)
    with pytest.raises(SystemExit) as stop:
        sweep.main(
            ["smoke.grid", "--", "--placement.wandb", "p", "--placement.runs", str(tmp_path / "r")]
        )
    assert stop.value.code == 2
    assert "placement.wandb needs the extra" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
    monkeypatch.setattr(extras, "there", lambda _: True)
    with pytest.raises(ValueError, match="may not contain '#'"):
        preflight.check_trackers(sweeping_config("a#b"))


def sweeping_config(project):
    from cla_jax.fields import replaced
    from experiments import smoke

    return replaced(smoke.tiny(), {"placement.wandb": project})


def test_a_dry_run_for_a_cloud_needs_no_package_of_it(monkeypatch, capsys):
    from launch.sweeps import fitting

    monkeypatch.setattr(extras, "there", lambda _: False)
    monkeypatch.setattr(fitting, "check", lambda *_: {})
    argv = ["smoke.grid", "--engine", "jobset", "--topology", "v5e:4x4", "--jobset.image", "i"]
    argv += ["--dry-run", "--", "--placement.runs", "gs://bucket/runs"]
    sweep.main(argv)
    shown = capsys.readouterr().out
    assert "is not read without the extra `gcs`" in shown
    assert "# 6 of 6 trials would be submitted" in shown
    argv.remove("--dry-run")
    with pytest.raises(ValueError, match="extra `gcs`"):
        launcher.Launcher(
            cli.read(launcher.Arguments, args=argv[: argv.index("--")]), argv[-2:]
        ).run()


def test_text_that_needs_a_package_names_it(monkeypatch, tmp_path):
    for name in ("backports.zstd", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match="needs the extra `zstd`"):
        sources._zstd(tmp_path / "a.zst")


def test_a_run_lies_in_no_other_run_and_above_none(tiny, tmp_path):
    place = tmp_path / "runs/study/one"
    place.mkdir(parents=True)
    (place / "config.json").write_text("{}")
    for name, words in {
        "study": "name = 'study' is a directory of runs, such as study/one",
        "study/one/checkpoints": "lies inside another run, study/one",
        "study/one/eval/x": "lies inside another run, study/one",
    }.items():
        with pytest.raises(ValueError, match=words):
            preflight.check(tiny(name=name))
    preflight.check(tiny(name="study/two"))
    with pytest.raises(ValueError, match=r"placement\.runs = .*/study/one is a run, so"):
        preflight.check(tiny(name="x", **{"placement.runs": str(place)}))
    data = tiny(
        name="d", **{"placement.runs": str(tmp_path), "placement.data_dir": f"{tmp_path}/d"}
    )
    with pytest.raises(ValueError, match=r"name = 'd': .* is placement\.data_dir"):
        preflight.check(data)
