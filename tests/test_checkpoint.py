import json
import logging
import os
import shutil
import types

import jax
import numpy as np
import pytest
from etils import epath

from cla_jax import checkpoint
from cla_jax.checkpoint import Checkpointer, restore_latest, steps
from cla_jax.config import MeshConfig
from cla_jax.mesh import axis_rules, make_mesh
from cla_jax.optimizer import make_optimizer
from cla_jax.runs import open_run
from cla_jax.state import abstract_state, initial_state, named
from tests.sealed import make_older, write_metrics

MESH = make_mesh(MeshConfig(), jax.devices()[:1])


@pytest.fixture
def saved(tiny, devices, tmp_path):
    """A directory with checkpoints of steps 2 and 4, and what they hold."""
    config = tiny()
    mesh = make_mesh(MeshConfig(), devices(1))
    optimizer = make_optimizer(config.optimizer, config.steps)
    rules = axis_rules(config.model, mesh)
    abstract = abstract_state(config, optimizer, rules, mesh)
    state = initial_state(config, optimizer, abstract)
    states = {step: jax.tree.map(lambda a, s=step: a + s, state) for step in (2, 4)}
    directory = epath.Path(tmp_path / "checkpoints")
    saver = Checkpointer(directory, keep=2)
    for step in (2, 4):
        saver.save(states[step])
    saver.close()
    return directory, abstract, states


def assert_equal(a, b):
    for name, array in named(a).items():
        np.testing.assert_array_equal(array, named(b)[name], err_msg=name)


def data_file(directory, step, part="."):
    return max(checkpoint._files(directory / f"{step:08d}" / part), key=lambda f: f.stat().length)


def test_the_newest_is_restored_bit_for_bit(saved):
    directory, abstract, states = saved
    assert steps(directory) == [2, 4]
    assert_equal(restore_latest(directory, abstract), states[4])


def test_nothing_saved_is_none(saved, tmp_path):
    assert restore_latest(epath.Path(tmp_path / "nothing"), saved[1]) is None


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return "altered"


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])
    return "bytes instead of"


def remove(file):
    file.unlink()
    return "missing"


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, remove])
def test_damage_is_noticed_and_the_one_before_used(saved, caplog, damage):
    directory, abstract, states = saved
    file = data_file(directory, 4)
    what = damage(file)
    with caplog.at_level(logging.WARNING):
        assert_equal(restore_latest(directory, abstract), states[2])
    problem, kept = (record.message for record in caplog.records)
    assert what in problem
    assert str(file) in problem
    assert "renamed 00000004.json to 00000004.json.damaged and 00000004 to 00000004.damaged" in kept
    assert (directory / "00000004.json.damaged").exists()
    # Kept for inspection, and out of the way of the run that saves step 4 again.
    assert (directory / "00000004.damaged").exists()
    assert steps(directory) == [2]
    saver = Checkpointer(directory, keep=2)
    saver.save(states[4])
    saver.close()
    assert_equal(restore_latest(directory, abstract), states[4])


def test_who_only_reads_uses_the_one_before_and_moves_nothing(saved, tiny):
    directory, _, states = saved
    config = tiny()
    run = open_run(config, data_fingerprint="", tokenizer_json="{}")
    make_older(run)  # what was saved does not say of which run it is
    directory.rename(run.checkpoints)
    mesh = make_mesh(MeshConfig())
    load = lambda: checkpoint.load_model(run, axis_rules(config.model, mesh), mesh)
    flip_a_byte(data_file(run.checkpoints, 4, "training"))
    assert load()[0] == 4  # the optimizer's damage is nothing to a reader of the model
    flip_a_byte(data_file(run.checkpoints, 4, "model"))
    step, model = load()
    assert step == 2
    assert_equal(model, states[2].model)
    assert steps(run.checkpoints) == [2, 4]


def test_every_file_of_a_checkpoint_is_watched(saved):
    directory, _, _ = saved
    path = directory / "00000004"
    for file in checkpoint._files(path):
        content = file.read_bytes()
        flip_a_byte(file) if content else file.write_bytes(b"x")
        assert str(file) in (checkpoint.verify(path) or "")
        file.write_bytes(content)
    assert checkpoint.verify(path) is None


def test_all_damaged_is_an_error_not_a_fresh_start(saved):
    directory, abstract, _ = saved
    for step in (2, 4):
        flip_a_byte(data_file(directory, step))
    for _ in range(2):  # a launcher that starts it again gets the same answer
        with pytest.raises(
            ValueError, match=r"no intact checkpoint is left.*altered.*altered.* Restore one from"
        ):
            restore_latest(directory, abstract)


def test_a_broken_manifest_is_damage_too(saved):
    directory, abstract, states = saved
    file = directory / "00000004.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({"files": whole["files"]}))  # without its arrays
    assert "does not list files and arrays" in (checkpoint.verify(directory / "00000004") or "")
    altered = {**whole, "arrays": {**whole["arrays"], "embedding": [[1, 2], "float32"]}}
    unmarked = {key: value for key, value in whole.items() if key != "checksum"}
    file.write_text(json.dumps(unmarked))  # written before manifests had checksums
    assert checkpoint.verify(directory / "00000004") is None
    for damaged in (
        altered,
        {**unmarked, "files": []},
        {**unmarked, "arrays": []},
        {**unmarked, "files": {name: {"bites": 1} for name in whole["files"]}},
    ):
        file.write_text(json.dumps(damaged))
        assert str(file) in (checkpoint.verify(directory / "00000004") or "")
    file.write_text('{"step": 4, "files"')
    assert_equal(restore_latest(directory, abstract), states[2])


def test_without_a_manifest_it_does_not_count(saved):
    """What a kill between writing and committing leaves."""
    directory, abstract, states = saved
    (directory / "00000004.json").unlink()
    assert steps(directory) == [2]
    assert_equal(restore_latest(directory, abstract), states[2])
    saver = Checkpointer(directory, keep=2)
    saver.save(states[4])  # the half-written directory stands in the way, and is replaced
    saver.close()
    assert_equal(restore_latest(directory, abstract), states[4])


def test_retention_keeps_the_newest(saved):
    directory, _, states = saved
    saver = Checkpointer(directory, keep=2)
    for step in (6, 8):
        saver.save(jax.tree.map(lambda a, s=step: a + s - 4, states[4]))
    saver.close()
    assert steps(directory) == [6, 8]
    assert {file.name for file in directory.iterdir()} == {
        "00000006",
        "00000006.json",
        "00000008",
        "00000008.json",
    }


def test_the_manifest_is_written_and_older_ones_removed_after_the_commit(saved, monkeypatch):
    directory, _, states = saved
    save, before_the_commit = checkpoint.ocp.save_checkpointables_async, []

    def watched(path, parts):
        saving = save(path, parts)

        def result():
            before_the_commit.append(steps(directory))
            saving.result()

        return types.SimpleNamespace(result=result)

    monkeypatch.setattr(checkpoint.ocp, "save_checkpointables_async", watched)
    saver = Checkpointer(directory, keep=2)
    saver.save(jax.tree.map(lambda a: a + 2, states[4]))
    saver.close()
    assert before_the_commit == [[2, 4]]
    assert steps(directory) == [4, 6]


def test_who_waits_for_a_checkpoint_is_told_when_it_is_whole(saved, tmp_path):
    _, _, states = saved
    told = []
    directory = epath.Path(tmp_path / "other")
    saver = Checkpointer(directory, 2, on_saved=lambda step: told.append((step, steps(directory))))
    saver.save(states[2])
    saver.close()
    assert told == [(2, [2])]


def test_a_checkpoint_that_is_being_removed_counts_no_more(saved, monkeypatch):
    directory, _, states = saved

    def killed(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(directory), "rmtree", killed)
    saver = Checkpointer(directory, keep=2)
    saver.save(jax.tree.map(lambda a: a + 2, states[4]))
    with pytest.raises(KeyboardInterrupt):
        saver.close()
    assert steps(directory) == [4, 6]


def test_another_model_is_refused_with_the_array(saved):
    directory, abstract, _ = saved
    manifest = json.loads((directory / "00000004.json").read_text())
    name = "stacks.0.blocks.mlp.up.weight"
    manifest["arrays"][name][0][-1] = 7
    del manifest["checksum"]
    (directory / "00000004.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"array {name} is .*7.*but the config needs"):
        restore_latest(directory, abstract)


def test_a_full_disk_surfaces_and_costs_no_older_checkpoint(saved, monkeypatch):
    directory, abstract, states = saved

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    saver = Checkpointer(directory, keep=2)
    later = [jax.tree.map(lambda a, n=n: a + n, states[4]) for n in (2, 4)]
    saver.save(later[0])
    with pytest.raises(OSError, match="No space left"):
        saver.save(later[1])
    saver.save(later[1])
    with pytest.raises(OSError, match="No space left"):
        saver.close()
    monkeypatch.undo()
    assert steps(directory) == [2, 4]
    assert_equal(restore_latest(directory, abstract), states[4])


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_restores_onto_another_mesh_bit_for_bit(saved, tiny, shape):
    directory, _, states = saved
    config = tiny(**{"model.d_ff": 48})
    data, fsdp, tensor = shape
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, model=tensor), jax.local_devices())
    optimizer = make_optimizer(config.optimizer, config.steps)
    abstract = abstract_state(config, optimizer, axis_rules(config.model, mesh), mesh)
    restored = restore_latest(directory, abstract)
    assert_equal(restored, states[4])
    for name, leaf in named(restored).items():
        assert leaf.sharding == named(abstract)[name].sharding


def test_what_a_kill_left_is_removed_after_the_next_checkpoint(saved):
    """A save cut short, a removal cut short; what was set aside is kept."""
    directory, abstract, states = saved
    for left in ("00000001", "00000003.orbax-checkpoint-tmp", "00000002.damaged"):
        (directory / left).mkdir()
        (directory / left / "part").write_text("x")
    saver = Checkpointer(directory, keep=2)
    saver.save(jax.tree.map(lambda a: a + 1, states[4]))
    saver.close()
    names = {path.name for path in directory.iterdir() if path.is_dir()}
    assert names == {"00000004", "00000005", "00000002.damaged"}
    assert_equal(restore_latest(directory, abstract), jax.tree.map(lambda a: a + 1, states[4]))


def of_a_run(tiny, states, **changes):
    """A run with checkpoints of steps 2 and 4 of its own."""
    run = open_run(tiny(**changes), data_fingerprint="", tokenizer_json="{}")
    saver = Checkpointer(run.checkpoints, keep=2, owner=run.owner)
    for step in (2, 4):
        saver.save(states[step])
    saver.close()
    return run


def move(source, target):
    """A checkpoint with its manifest, under another step's or another run's name."""
    for ending in ("", ".json"):
        path = target.parent / f"{target.name}{ending}"
        if path.exists():
            path.rmtree() if path.is_dir() else path.unlink()
        (shutil.copytree if ending == "" else shutil.copy)(f"{source}{ending}", path)


def test_a_checkpoint_counts_only_under_its_own_step_and_in_its_own_run(saved, tiny, caplog):
    _, abstract, states = saved
    run = of_a_run(tiny, states)
    twin = of_a_run(tiny, states, name="twin")  # of the same identity: only the number differs
    moved = [(run.checkpoints / "00000002", "belongs to step 2: it was moved")]
    moved += [(twin.checkpoints / "00000004", f"it belongs to run {twin.id}")]
    for source, words in moved:
        caplog.clear()
        move(source, run.checkpoints / "00000004")
        load = lambda: checkpoint.load_model(run, axis_rules(tiny().model, MESH), MESH)
        assert load()[0] == 2  # a reader leaves everything in its place
        assert steps(run.checkpoints) == [2, 4]
        assert_equal(restore_latest(run.checkpoints, abstract, run.owner), states[2])
        assert words in caplog.text
        assert steps(run.checkpoints) == [2]
    # Training comes to step 4 again: both were kept, and its own state is saved.
    saver = Checkpointer(run.checkpoints, keep=2, owner=run.owner)
    saver.save(states[4])
    saver.close()
    names = {path.name for path in run.checkpoints.iterdir()}
    assert {"00000004.damaged", "00000004.damaged-2", "00000004.json.damaged-2"} <= names
    assert_equal(restore_latest(run.checkpoints, abstract, run.owner), states[4])


def test_saving_and_retention_set_aside_what_is_of_another_run(saved, tiny):
    _, abstract, states = saved
    run, twin = of_a_run(tiny, states), of_a_run(tiny, states, name="twin")
    for step in ("00000002", "00000004"):
        move(twin.checkpoints / step, run.checkpoints / step)
    saver = Checkpointer(run.checkpoints, keep=1, owner=run.owner)
    saver.save(states[4])  # there is a manifest of this step: another run's
    saver.close()
    assert steps(run.checkpoints) == [4]
    assert_equal(restore_latest(run.checkpoints, abstract, run.owner), states[4])
    kept = {path.name for path in run.checkpoints.iterdir() if "damaged" in path.name}
    assert kept == {f"0000000{n}{end}.damaged" for n in (2, 4) for end in ("", ".json")}


def test_a_damaged_manifest_is_kept(saved):
    directory, abstract, states = saved
    (directory / "00000004.json").write_text("{")
    assert_equal(restore_latest(directory, abstract), states[2])
    assert (directory / "00000004.json.damaged").read_text() == "{"


def test_a_model_is_not_read_with_another_config_than_it_was_trained_with(saved, tiny):
    run = of_a_run(tiny, saved[2])
    file = run.path / "config.json"
    load = lambda: checkpoint.load_model(run, axis_rules(tiny().model, MESH), MESH)
    whole = json.loads(file.read_text())
    altered = json.loads(file.read_text())
    altered["identity"]["model"]["rope_theta"] = 50000.0
    file.write_text(json.dumps(altered))
    words = "model.rope_theta is 50000.0, and what was saved has 10000.0"
    with pytest.raises(ValueError, match=f"config.json was altered: {words}"):
        load()
    # The checkpoint itself knows, too.
    del altered["checksum"], altered["run"], altered["format"]
    file.write_text(json.dumps(altered))
    with pytest.raises(ValueError, match=f"00000004 belongs to another run: {words}"):
        load()
    # What does not change the model may be edited.
    whole["placement"]["data_dir"] = "elsewhere"
    file.write_text(json.dumps(whole))
    assert load()[0] == 4


def test_a_run_from_before_its_records_had_checksums_goes_on(saved, tiny, caplog):
    run = of_a_run(tiny, saved[2])
    number = run.id
    for file in (run.path / "config.json", *run.checkpoints.glob("*.json")):
        record = json.loads(file.read_text())
        for key in ("run", "identity", "tokenizer", "checksum", "format"):
            if key != "identity" or "arrays" in record:
                record.pop(key, None)
        file.write_text(json.dumps(record))
    assert checkpoint.load_model(run, axis_rules(tiny().model, MESH), MESH)[0] == 4
    (said,) = caplog.records
    assert "is from an older version" in said.message
    # The next start gives it a number; what it saved without one is still its own.
    run = open_run(tiny(), data_fingerprint="", tokenizer_json="{}")
    assert run.id not in ("", number)
    assert_equal(restore_latest(run.checkpoints, saved[1], run.owner), saved[2][4])
    # A config.json that an older version wrote again has no number: the checkpoints have it.
    saver = Checkpointer(run.checkpoints, keep=2, owner=run.owner)
    saver.save(jax.tree.map(lambda a: a + 1, saved[2][4]))
    saver.close()
    record = json.loads((run.path / "config.json").read_text())
    del record["run"], record["checksum"], record["format"]
    (run.path / "config.json").write_text(json.dumps(record))
    assert open_run(tiny(), data_fingerprint="", tokenizer_json="{}").id == run.id


def test_links_in_a_checkpoint_are_not_followed(saved, tmp_path):
    directory, abstract, states = saved
    file = data_file(directory, 4)
    file.rename(tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", file)
    assert "is a symbolic link" in (checkpoint.verify(directory / "00000004") or "")
    assert_equal(restore_latest(directory, abstract), states[2])


@pytest.mark.parametrize("kind", ["pipe", "directory", "checkpoint is a file"])
def test_what_is_no_file_among_those_of_a_checkpoint_is_damage_too(saved, tiny, kind):
    _, abstract, states = saved
    run = of_a_run(tiny, states)
    path = run.checkpoints / "00000004"
    if kind == "checkpoint is a file":
        shutil.rmtree(path)
        path.write_text("")
    else:
        file = data_file(run.checkpoints, 4)
        file.unlink()
        os.mkfifo(file) if kind == "pipe" else file.mkdir()
    assert str(path) in (checkpoint.verify(path) or "")
    assert checkpoint.load_model(run, axis_rules(tiny().model, MESH), MESH)[0] == 2
    assert_equal(restore_latest(run.checkpoints, abstract, run.owner), states[2])
    saver = Checkpointer(run.checkpoints, keep=2, owner=run.owner)
    saver.save(states[4])
    saver.close()
    assert_equal(restore_latest(run.checkpoints, abstract, run.owner), states[4])


def test_a_manifest_without_its_checksum_or_its_run_is_altered(saved, tiny):
    run = of_a_run(tiny, saved[2])
    path, owner = run.checkpoints / "00000004", run.owner
    manifest = json.loads((run.checkpoints / "00000004.json").read_text())
    for keys, words in (
        (["checksum"], "was altered"),
        (["run"], "was altered"),
        (["checksum", "run"], "it does not name its run"),
    ):
        left = {key: value for key, value in manifest.items() if key not in keys}
        (run.checkpoints / "00000004.json").write_text(json.dumps(left))
        assert words in (checkpoint.verify(path, owner=owner) or "")


def test_a_checkpoint_whose_manifest_was_deleted_is_named_and_kept(saved, tiny, caplog):
    run = of_a_run(tiny, saved[2])
    records = [{"step": step, "loss": 1.0} for step in range(1, 5)]
    write_metrics(run, [*records, {"step": 4, "goodput": 1.0, "saved": 4}])
    (run.checkpoints / "00000004.json").unlink()
    assert checkpoint.load_model(run, axis_rules(tiny().model, MESH), MESH)[0] == 2
    words = "00000004.json is missing: that checkpoint was saved"
    assert words in caplog.text
    checkpoint.report_missing_records(run)
    assert steps(run.checkpoints) == [2]
    assert (run.checkpoints / "00000004.damaged").is_dir()
    (run.checkpoints / "00000002.json").unlink()
    with pytest.raises(ValueError, match=f"{words}.*to train from the beginning"):
        checkpoint.report_missing_records(run)


def test_a_checkpoint_without_arrays_is_an_error(saved, tmp_path, monkeypatch):
    """What orbax is given another path for, and writes elsewhere, was not saved."""
    _, _, states = saved
    saver = Checkpointer(epath.Path(tmp_path / "other"), keep=2)
    real = checkpoint._files
    monkeypatch.setattr(
        checkpoint, "_files", lambda path: [f for f in real(path) if f.name != "manifest.ocdbt"]
    )
    saver.save(states[2])
    with pytest.raises(
        ValueError, match="contains no arrays: the checkpoint was written to another place"
    ):
        saver.close()
    assert steps(saver.directory) == []
