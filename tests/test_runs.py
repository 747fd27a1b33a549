import errno
import json
import os
import re

import pytest
from etils import epath

from cla_jax import directories, runs
from cla_jax.config import LinearScaling
from cla_jax.runs import find_runs, open_run
from cla_jax.writers import JsonlWriter
from tests.sealed import make_older, write_metrics


def opened(config, fingerprint="data-1", tokenizer="{}"):
    return open_run(config, data_fingerprint=fingerprint, tokenizer_json=tokenizer)


def begun(config):
    """A run that made a step: now it holds its name."""
    run = opened(config)
    write_metrics(run, [{"step": 1, "loss": 5.0}])
    return run


def test_config_comes_back(tiny):
    config = tiny()
    assert opened(config).config() == config


def test_another_placement_continues_and_is_recorded(tiny):
    opened(tiny())
    moved = tiny(**{"placement.remat": "block"})
    assert opened(moved).config() == moved


def test_another_identity_is_refused_with_the_difference(tiny):
    run = begun(tiny())
    before = (run.path / "config.json").read_text()
    with pytest.raises(ValueError) as error:
        opened(tiny(seed=3, **{"model.kv_map": "identity"}))
    for words in ("model.kv_map: 'cla:2' there, 'identity' asked for", "seed: 0 there", "--name"):
        assert words in str(error.value)
    assert (run.path / "config.json").read_text() == before
    opened(tiny(seed=3, name="another"))


def test_more_steps_of_the_same_run_say_how_to_go_on(tiny):
    begun(tiny())
    with pytest.raises(
        ValueError, match=r"steps: 4 there, 8 asked for\n.*cannot be made longer: with another"
    ):
        opened(tiny(steps=8))
    with pytest.raises(ValueError, match="contains another run") as error:
        opened(tiny(steps=8, seed=1))
    assert "made longer" not in str(error.value)


def test_a_directory_without_a_config_is_named_and_left_out(tiny, caplog):
    run, broken, other = (begun(tiny(name=f"study/{name}")) for name in ("a", "b", "c"))
    (broken.path / "config.json").unlink()
    other.checkpoints.mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (other.path / name).unlink()
    problems: list[str] = []
    assert runs.find_runs([run.path.parent, broken.path.parent], problems) == [run]
    assert problems == [
        f"{one.path} has checkpoints or metrics, but no config.json: restore it from a copy; it is left out"
        for one in (broken, other)
    ]
    assert runs.find_runs([run.path.parent]) == [run]
    assert [record.message for record in caplog.records] == problems
    with pytest.raises(
        ValueError, match=r"study/b has .* but no config.json: restore it from a copy$"
    ):
        runs.find_runs([broken.path])


def test_a_file_system_without_locks_is_named(tiny, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    with (
        pytest.raises(
            ValueError, match=r"\.lock cannot be locked \(No locks available\): .* flock"
        ),
        runs.locked(runs.run_path(tiny())),
    ):
        pass


def test_other_data_or_tokenizer_is_refused(tiny):
    begun(tiny())
    with pytest.raises(
        ValueError, match="trained on data 'data-1', but the data here is 'data-2': choose"
    ):
        opened(tiny(), fingerprint="data-2")
    with pytest.raises(ValueError, match=r"tokenizer.json is not the tokenizer"):
        opened(tiny(), tokenizer='{"other": 1}')


@pytest.mark.parametrize("content", ["", "{", '{"name": "x"}', "[]"])
def test_a_broken_config_names_the_file(tiny, content):
    run = opened(tiny())
    (run.path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        run.config()


def test_an_unknown_field_from_another_version_is_named(tiny):
    run = opened(tiny())
    record = json.loads((run.path / "config.json").read_text())
    record["identity"]["model"]["n_experts"] = 4
    del record["checksum"], record["run"]
    (run.path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="n_experts"):
        run.config()


def test_a_run_older_than_a_field_goes_on(tiny):
    """The field has its default: that is what it meant before it could be set."""
    run = opened(tiny())
    run.metrics.write_text('{"step": 1, "loss": 5.0}\n')
    make_older(run, numbered=False)
    record = run.record()
    del record["identity"]["model"]["rope_scaling"]
    (run.path / "config.json").write_text(json.dumps(record))
    assert opened(tiny()).path == run.path
    with pytest.raises(ValueError, match=r"rope_scaling\.kind: 'none' there, 'linear' asked for"):
        opened(tiny(**{"model.rope_scaling": LinearScaling()}))


def test_find_runs_takes_runs_and_studies(tiny, tmp_path):
    for name in ("study/a", "study/b", "alone"):
        opened(tiny(name=name))
    root = tmp_path / "runs"
    names = lambda paths: [run.path.name for run in find_runs(paths)]
    assert names([root / "study"]) == ["a", "b"]
    assert names([root]) == ["alone", "a", "b"]
    assert names([root / "study/b", root / "study"]) == ["b", "a"]
    with pytest.raises(ValueError, match=r"nowhere does not exist$"):
        find_runs([root / "nowhere"])
    with pytest.raises(ValueError, match=r"alon does not exist; did you mean .*runs/alone\?"):
        find_runs([root / "alon"])
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is not a run directory and contains none"):
        find_runs([root / "empty"])


def test_the_last_whole_record_of_a_step_counts(tiny):
    run = opened(tiny())
    lines = [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.0},
        {"step": 2, "perplexity": 50.0},
        {"step": 2, "loss": 4.5},  # repeated after a crash
        {"step": 3, "loss": 3.0},
    ]
    write_metrics(run, lines, '{"step": 3, "lo')
    assert run.read_metrics() == [
        {"step": 1, "loss": 5.0},
        {"step": 2, "loss": 4.5, "perplexity": 50.0},
        {"step": 3, "loss": 3.0},
    ]


def test_records_of_the_time_of_a_run_are_of_no_step(tiny):
    run = opened(tiny())
    lines = [
        {"step": 0, "goodput": 0.0, "startup_s": 9.0},
        {"step": 1, "loss": 5.0},
        {"step": 1, "goodput": 0.5, "startup_s": 9.0},
    ]
    write_metrics(run, lines, '{"step": 2, "lo')
    assert list(run.read_records()) == lines
    assert run.read_metrics() == [{"step": 1, "loss": 5.0}]


def test_segments_of_a_remote_run_are_read_in_order(tiny):
    run = opened(tiny())
    make_older(run)
    (run.path / "metrics").mkdir()
    (run.path / "metrics" / "2.jsonl").write_text('{"step": 2, "loss": 1.5}\n')
    (run.path / "metrics" / "1.jsonl").write_text(
        '{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
    )
    assert [r["loss"] for r in run.read_metrics()] == [3.0, 1.5]


def test_evaluations_by_name(tiny):
    run = opened(tiny())
    assert run.evals() == {}
    run.write_eval("full", {"perplexity": 3.5})
    run.write_eval("cached-dense", {"perplexity": 3.6})
    assert list(run.evals()) == ["cached-dense", "full"]
    assert run.evals()["full"] == {"perplexity": 3.5}


def test_a_name_may_look_like_a_pattern(tiny):
    run = opened(tiny(name="study/cla[2]*"))
    run.write_eval("full", {"perplexity": 3.5})
    assert list(run.evals()) == ["full"]
    directories.write_atomically(run.checkpoints / "00000004.json", "{}")
    directories.write_atomically(run.checkpoints / "notes.json", "{}")
    assert runs.saved_steps(run.checkpoints) == [4]


def test_a_write_that_fails_leaves_the_old_content(tiny, monkeypatch):
    run = opened(tiny())
    run.write_eval("full", {"perplexity": 3.5})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(directories.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        run.write_eval("full", {"perplexity": 9.0})
    assert failed.value.filename == str(run.path / "eval" / "full.json")  # not a temporary one
    assert run.evals()["full"] == {"perplexity": 3.5}


def test_checkpoints_without_a_config_belong_to_nobody(tiny):
    """Another run would be taken for theirs."""
    run = opened(tiny())
    directories.write_atomically(run.checkpoints / "00000004.json", "{}")
    (run.path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing.*restore the file from a copy"):
        opened(tiny(seed=7))
    assert not (run.path / "config.json").exists()


def test_a_run_that_made_no_step_does_not_hold_its_name(tiny):
    """It was killed in start-up, say, and its time was noted already."""
    run = opened(tiny())
    notes = [{"step": 0, "goodput": 0.0}, {"step": 0, runs.SAVED: 0}]
    write_metrics(run, notes)
    other = opened(tiny(seed=3))
    assert other.path == run.path
    assert other.config().seed == 3
    assert other.read_metrics([]) == []
    assert not other.metrics.exists()
    # Whatever there is more of a run holds the name.
    for name in ("checkpoints/00000002.damaged", "eval/full.json"):
        directories.write_atomically(run.path / name, "{}")
        with pytest.raises(ValueError, match="contains another run"):
            opened(tiny())
        (run.path / name).unlink()
    for lines, end in (([{"step": 1, "loss": 1.0}], ""), ([], '{"step": 1}\n')):
        write_metrics(run, notes + lines, end)  # a line without a checksum was altered
        with pytest.raises(ValueError, match="contains another run"):
            opened(tiny())
    opened(tiny(seed=3))


def test_who_does_not_write_only_checks(tiny):
    """As all hosts but the first, which holds the lock."""
    options = {"data_fingerprint": "f", "tokenizer_json": "{}"}
    run = runs.open_run(tiny(), **options, write=False)
    assert not run.path.exists()
    write_metrics(runs.open_run(tiny(), **options), [{"step": 1, "loss": 5.0}])
    before = (run.path / "config.json").read_text()
    runs.open_run(tiny(**{"placement.log_every": 77}), **options, write=False)
    assert (run.path / "config.json").read_text() == before
    with pytest.raises(ValueError, match="contains another run"):
        runs.open_run(tiny(seed=7), **options, write=False)


def test_an_evaluation_with_former_names_of_fields_is_read(tiny):
    run = begun(tiny())
    of_layer = {"layer": 2, "readers": 2, "kl": 0.1}
    former = {
        "readers_per_slot": [2, 2],
        "per_slot": [{"slot": 1} | of_layer],
        "profile": [{"slot": 0, "kept": [0.5]}],
    }
    run.write_eval("cached-int8", former | {"step": 1})
    assert run.eval("cached-int8") == {
        "readers_per_kv_layer": [2, 2],
        "per_kv_layer": [{"kv_layer": 1} | of_layer],
        "profile": [{"kv_layer": 0, "kept": [0.5]}],
        "step": 1,
    }
    assert run.evals() == {"cached-int8": run.eval("cached-int8")}


def test_a_damaged_evaluation_is_kept_aside_and_a_later_one_is_kept_and_named(tiny, caplog):
    run = opened(tiny())
    for damaged in ("[]", '{"step": "x"}', "{"):
        directories.write_atomically(run.path / "eval" / "full.json", damaged)
        run.write_eval("full", {"step": 4})
        assert run.evals()["full"] == {"step": 4}
    kept = sorted(file.name for file in (run.path / "eval").iterdir())
    assert kept == ["full.json", *(f"full.json.altered{n}" for n in ("", "-2", "-3"))]
    run.write_eval("full", {"step": 2})
    assert run.evals()["full"] == {"step": 4}
    assert "full.json has a later step, 4, and is kept" in caplog.text


@pytest.mark.parametrize("damaged", [b"\xff\xfe", b"", b'{"model": {'])
def test_a_damaged_tokenizer_is_named(tiny, damaged):
    run = opened(tiny())
    (run.path / "tokenizer.json").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not (valid JSON|text)"):
        run.tokenizer_json()


def test_a_run_without_tokenizer_says_so(tiny):
    run = opened(tiny())
    (run.path / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        run.tokenizer_json()


def test_a_missing_tokenizer_is_written_again_with_a_word_and_never_replaced(tiny, caplog):
    file = begun(tiny()).path / "tokenizer.json"
    before = file.read_text()
    file.unlink()
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing, and .* another tokenizer"):
        opened(tiny(), tokenizer='{"other": 1}')
    assert not file.exists()
    opened(tiny())
    assert file.read_text() == before
    (told,) = (record.getMessage() for record in caplog.records)
    assert told == f"{file} was missing; it is written again from the prepared data"


def altered(file, before, after):
    text = file.read_text()
    assert before in text
    file.write_text(text.replace(before, after))


@pytest.mark.parametrize("where", ["identity", "data_fingerprint", "versions"])
def test_an_edited_config_is_no_config(tiny, where):
    run = begun(tiny())
    file = run.path / "config.json"
    before, after = {
        "identity": ('"rope_theta": 10000.0', '"rope_theta": 10001.0'),
        "data_fingerprint": ('"data-1"', '"data-2"'),
        "versions": ('"jaxlib": "', '"jaxlib": "9'),
    }[where]
    altered(file, before, after)
    for read in (run.config, run.record, lambda: opened(tiny())):
        with pytest.raises(runs.Altered, match=r"config\.json was altered.*Undo the change"):
            read()


@pytest.mark.parametrize("name", ["identity", "placement", "name"])
def test_a_key_that_was_altered_is_an_altered_config(tiny, name):
    run = opened(tiny())
    directories.write_atomically(run.checkpoints / "00000004.json", '{"run": "x", "identity": {}}')
    altered(run.path / "config.json", f'"{name}": ', f'"{name[:-1]}": ')
    with pytest.raises(ValueError, match=r"config\.json"):
        run.config()


def test_placement_may_be_edited(tiny):
    run = opened(tiny())
    altered(run.path / "config.json", '"log_every": 2', '"log_every": 7')
    assert run.config().placement.log_every == 7


def test_an_edited_tokenizer_is_not_read(tiny):
    run = opened(tiny(), tokenizer='{"a": 1}')
    assert run.tokenizer_json() == '{"a": 1}'
    altered(run.path / "tokenizer.json", "1", "2")
    with pytest.raises(runs.Altered, match=r"tokenizer\.json was altered"):
        run.tokenizer_json()


def test_an_evaluation_that_was_edited_renamed_or_copied_does_not_count(tiny):
    run, other = opened(tiny()), opened(tiny(name="other"))
    for each in (run, other):
        each.write_eval("full", {"perplexity": 3.5, "cache": (1, 2), "step": 4})
    file = run.path / "eval" / "full.json"
    whole = file.read_text()
    as_read = {"perplexity": 3.5, "cache": [1, 2], "step": 4}
    assert run.evals() == {"full": as_read}

    def edited():
        altered(file, "3.5", "3.4")

    def copied():
        file.write_bytes((other.path / "eval" / "full.json").read_bytes())

    def renamed():
        file.rename(file.with_name("cached-int8.json"))

    for harm, words in (
        (edited, "was altered"),
        (copied, "to another run"),
        (renamed, "was altered"),
    ):
        file.write_text(whole)
        harm()
        problems = []
        assert run.evals(problems) == {}
        assert len(problems) == 1
        assert words in problems[0]
        with pytest.raises(runs.Altered, match=words):
            run.evals()
    # A new evaluation replaces none of them.
    file.with_name("cached-int8.json").unlink()
    file.write_text(whole)
    edited()
    run.write_eval("full", {"perplexity": 3.6, "step": 4})
    assert run.evals()["full"]["perplexity"] == 3.6
    assert json.loads(file.with_name("full.json.altered").read_text())["perplexity"] == 3.4


def test_altered_lines_of_the_metrics_are_named_and_not_used(tiny):
    run, other = opened(tiny()), opened(tiny(name="other"))
    make_older(run)
    run.metrics.write_text('{"step": 1, "loss": 9.0}\n')  # before lines had checksums
    for each in (run, other):
        writer = JsonlWriter(each)
        for step in range(2, 8):
            writer.write(step, {"loss": 10.0 - step})
        writer.close()
    first, *lines = run.metrics.read_text().splitlines(keepends=True)
    foreign = other.metrics.read_text().splitlines(keepends=True)

    def read(*lines):
        run.metrics.write_text("".join(lines))
        problems = []
        found = run.read_metrics(problems)
        for record in found:
            record.pop("time", None)
        assert all(
            record == {"step": s, "loss": 10.0 - s}
            for s, record in zip(steps(found), found, strict=True)
        )
        return steps(found), [problem.partition(": ")[2] for problem in problems]

    steps = lambda found: [record["step"] for record in found]
    assert read(first, *lines) == ([1, 2, 3, 4, 5, 6, 7], [])
    edited = lines[2].replace('"loss": 6.0', '"loss": 1.0')
    assert read(first, *lines[:2], edited, *lines[3:]) == (
        [1, 2, 3, 5, 6, 7],
        ["line 4 was altered: its checksum does not match"],
    )
    assert read(first, lines[0], *lines[3:]) == (
        [1, 2, 5, 6, 7],
        ["2 lines before line 3 are missing"],
    )
    assert read(*lines[:3], lines[1], *lines[3:]) == (
        [2, 3, 4, 5, 6, 7],
        ["line 4 is a duplicate or out of order, so it is not used"],
    )
    assert read(lines[0], foreign[1], *lines[2:]) == (
        [2, 4, 5, 6, 7],
        ["line 2 was altered: its checksum does not match"],
    )
    assert read(lines[0], first, *lines[1:]) == (
        [2, 3, 4, 5, 6, 7],
        ["line 2 was altered: it has no checksum"],
    )
    # What no crash leaves is told, also where nothing is missing.
    for garbage in ("garbage\n", "\0\0\n", "[1]\n", "\xff{\n"):
        assert read(first, *lines[:3], garbage, *lines[3:]) == (
            [1, 2, 3, 4, 5, 6, 7],
            ["line 5 is damaged: it is not the beginning of a record"],
        )
    assert read(first, "\n", '{"st\n', *lines)[1] == ["line 3 is damaged, like the line before"]
    assert read("half", "\nof", "\nsomething else\n")[1] == [
        "line 1 is damaged: it is not the beginning of a record",
        "line 2 is damaged, like the line before",
        "line 3 is damaged, like the line before",
    ]
    # A crash tears a line: the next process goes on behind it, and nothing is missing.
    run.metrics.write_text("".join(lines[:3]) + lines[3][:20])
    writer = JsonlWriter(run)
    writer.write(5, {"loss": 5.0})
    writer.close()
    assert read(run.metrics.read_text()) == ([2, 3, 4, 5], [])


def test_a_run_that_is_linked_counts_once(tiny, tmp_path):
    for name in ("study/a", "study/b"):
        opened(tiny(name=name))
    study = tmp_path / "runs" / "study"
    for i in range(3):
        (study / f"self{i}").symlink_to(study)
    (study / "again").symlink_to(study / "a")
    (study / "everything").symlink_to("/")
    names = lambda paths: [run.path.name for run in find_runs(paths)]
    assert names([study]) == ["a", "b"]
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "b").symlink_to(study / "b")  # a comparison put together by hand
    assert names([linked]) == ["b"]
    assert names([linked, study]) == ["b", "a"]


def test_links_that_a_tracker_makes_below_a_run_are_not_followed(tiny):
    """wandb keeps wandb/latest-run beside its logs."""
    run = opened(tiny())
    logs = run.path / "wandb" / "run-1"
    logs.mkdir(parents=True)
    os.symlink("run-1", run.path / "wandb" / "latest-run")
    os.symlink(run.path, logs / "config.json")
    assert run.config() == tiny()
    assert [found.path for found in find_runs([run.path.parent])] == [run.path]
    run.write_eval("full", {"step": 4})
    assert run.evals() == {"full": {"step": 4}}
    directories.remove_partial(run.path)
    assert os.path.islink(run.path / "wandb" / "latest-run")


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "eval", "eval/full.json"])
def test_a_run_directory_holds_no_links(tiny, tmp_path, name):
    run = opened(tiny())
    run.write_eval("full", {"step": 4})
    run.metrics.write_text("")
    path = run.path / name
    path.rename(tmp_path / "target")
    os.symlink(tmp_path / "target", path)
    for use in (
        lambda: (run.record(), run.evals(), list(run.read_records())),
        lambda: run.write_eval("full", {"step": 5}),
    ):
        with pytest.raises(ValueError, match=f"{path} is a (symbolic )?link"):
            use()


@pytest.mark.parametrize("name", [".lock", "log.txt"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_a_link_or_into_a_pipe(tmp_path, name, kind):
    precious = tmp_path / "precious"
    precious.write_text("kept")
    path = epath.Path(tmp_path / "run" / name)
    path.parent.mkdir()
    os.symlink(precious, path) if kind == "link" else os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path} is a"):
        directories.open_plain(path, "a")
    if kind == "link":
        directories.write_atomically(path, "new")  # takes the place of the link
        assert not os.path.islink(path)
    assert precious.read_text() == "kept"


def test_a_lock_outlives_its_file(tmp_path):
    path = epath.Path(tmp_path / "run")
    with runs.locked(path):
        (path / ".lock").unlink()
        with pytest.raises(ValueError, match="is being trained by another process"):
            runs.locked(path).__enter__()
    with runs.locked(path):
        pass


def test_what_a_kill_left_of_a_write_is_removed_by_the_next_start(tiny):
    run = opened(tiny())
    left = run.path / f".config.json.{'0' * 32}"
    left.write_text("half")
    opened(tiny())
    assert not left.exists()


def test_files_that_belong_together_are_replaced_together(tmp_path, monkeypatch):
    files = [epath.Path(tmp_path / name) for name in "abc"]
    directories.write_all_atomically(dict.fromkeys(files, "old"))
    real, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(directories.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        directories.write_all_atomically(dict.fromkeys(files, "new"))
    assert failed.value.filename == str(files[1])
    assert [file.read_text() for file in files] == ["old"] * 3
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def remove_checksum(file):
    record = json.loads(file.read_text())
    del record["checksum"]
    file.write_text(json.dumps(record))


def test_a_checksum_that_was_taken_out_is_seen(tiny):
    run = opened(tiny())
    write_metrics(run, [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}])
    run.write_eval("full", {"step": 2})
    problems = []
    remove_checksum(run.path / "eval" / "full.json")
    assert run.evals(problems) == {}
    bare = [re.sub(', "seal": "[0-9a-f]*"', "", line) for line in run.metrics.open()]
    run.metrics.write_text("".join(bare))
    assert run.read_metrics(problems) == []
    words = ["was altered, so it", "line 1 was altered: it has no", "line 2 was altered: it has no"]
    assert [w in p for w, p in zip(words, problems, strict=True)] == [True] * 3
    remove_checksum(run.path / "config.json")
    with pytest.raises(runs.Altered, match=r"config\.json was altered"):
        run.record()


def test_a_run_that_is_older_than_checksums_stays_so(tiny):
    run = opened(tiny())
    make_older(run, numbered=False)
    run.metrics.write_text('{"step": 1, "loss": 5.0}\n')
    run = opened(tiny())  # goes on with a number, and writes records with checksums from here on
    assert run.id
    assert run.read_metrics() == [{"step": 1, "loss": 5.0}]


def test_what_metrics_and_checkpoints_say_of_each_other_is_missed(tiny):
    run = opened(tiny())
    assert not run.missing_records().problems
    run.checkpoints.mkdir()
    for step in (2, 4):
        (run.checkpoints / f"{step:08d}.json").write_text("{}")
    records = [{"step": step, "loss": 1.0} for step in range(1, 6)]
    write_metrics(run, [*records, {"step": 5, "goodput": 1.0, runs.SAVED: 4}])
    assert run.missing_records() == runs.MissingRecords()
    (run.checkpoints / "00000004.json").unlink()
    (problem,) = run.missing_records().problems
    assert "00000004.json is missing: that checkpoint was saved" in problem
    assert run.missing_records().checkpoint == 4
    (run.checkpoints / "00000004.json").write_text("{}")
    write_metrics(run, records[:3])
    (problem,) = run.missing_records().problems
    assert "its last step is 3, but there is a checkpoint of step 4" in problem
    # What is written afterwards does not hide the gap.
    writer = JsonlWriter(run)
    writer.write(5, {"loss": 1.0})
    writer.close()
    assert not run.missing_records().problems
    problems = []
    run.read_metrics(problems)
    assert "1 line before line 4 is missing" in problems[0]
    run.metrics.unlink()
    assert run.missing_records().metrics


def test_an_evaluation_of_training_that_is_gone_is_missed(tiny):
    run = opened(tiny())
    steps = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 1.0}]
    score = {"step": 2, "held_out_loss": 1.0, runs.RECORDED: 2}
    run.write_eval(runs.TRAINING, {"step": 2})
    write_metrics(run, [*steps, score])
    assert run.missing_records() == runs.MissingRecords()
    write_metrics(run, steps)  # the last line was cut away
    (problem,) = run.missing_records().problems
    assert "metrics.jsonl: the end is missing: it has no evaluation of step 2" in problem
    write_metrics(run, [*steps, score])
    file = run.path / "eval" / "training.json"
    for earlier in (None, {"step": 1}):
        file.unlink(missing_ok=True)
        if earlier:
            run.write_eval(runs.TRAINING, earlier)
        (problem,) = run.missing_records().problems
        assert "training.json of step 2 is missing" in problem
        assert run.missing_records().evaluation == 2
    # An evaluation without a file, of an evaluator of one's own, misses none.
    write_metrics(run, [*steps, {"step": 2, "held_out_loss": 1.0}])
    assert run.missing_records() == runs.MissingRecords()


def test_a_run_that_lost_all_its_checkpoints_says_so_to_readers(tiny):
    run = opened(tiny())
    with pytest.raises(ValueError, match="no checkpoint yet"):
        run.check_saved()
    write_metrics(run, [{"step": 4, "loss": 1.0}, {"step": 4, runs.SAVED: 4}])
    with pytest.raises(ValueError, match=r"00000004\.json is missing: that checkpoint was saved"):
        run.check_saved()
    last = {"step": run.config().steps, "loss": 1.0}
    write_metrics(run, [last])  # its checkpoint is still to come
    with pytest.raises(ValueError, match="no checkpoint yet"):
        run.check_saved()
    write_metrics(run, [last, last | {"held_out_loss": 1.0}])  # as in a published copy
    with pytest.raises(
        ValueError, match="is finished, but has no checkpoints: it is a published copy"
    ):
        run.check_saved()
