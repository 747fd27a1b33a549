import json

import pytest

from cla_jax import runs
from cla_jax.runs import find_runs, open_run


def opened(config, fingerprint="data-1", tokenizer="{}"):
    return open_run(config, data_fingerprint=fingerprint, tokenizer_json=tokenizer)


def test_config_comes_back(tiny):
    config = tiny()
    assert opened(config).config() == config


def test_another_placement_continues_and_is_recorded(tiny):
    opened(tiny())
    moved = tiny(**{"placement.remat": "block"})
    assert opened(moved).config() == moved


def test_another_identity_is_refused_with_the_difference(tiny):
    run = opened(tiny())
    before = (run.path / "config.json").read_text()
    with pytest.raises(ValueError) as error:
        opened(tiny(seed=3, **{"model.kv_map": "identity"}))
    for words in ("model.kv_map: 'cla:2' there, 'identity' asked for", "seed: 0 there", "--name"):
        assert words in str(error.value)
    assert (run.path / "config.json").read_text() == before
    opened(tiny(seed=3, name="another"))


def test_other_data_or_tokenizer_is_refused(tiny):
    opened(tiny())
    with pytest.raises(ValueError, match="data_fingerprint: 'data-1' there"):
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
    (run.path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="n_experts"):
        run.config()


def test_a_run_older_than_a_field_goes_on(tiny):
    """The field has its default: that is what it meant before it could be set."""
    run = opened(tiny())
    record = run.record()
    del record["identity"]["model"]["rope_scaling"]
    (run.path / "config.json").write_text(json.dumps(record))
    assert opened(tiny()).path == run.path
    with pytest.raises(ValueError, match=r"model.rope_scaling: 'none' there, 'linear:2' asked for"):
        opened(tiny(**{"model.rope_scaling": "linear:2"}))


def test_find_runs_takes_runs_and_studies(tiny, tmp_path):
    for name in ("study/a", "study/b", "alone"):
        opened(tiny(name=name))
    root = tmp_path / "runs"
    names = lambda paths: [run.path.name for run in find_runs(paths)]
    assert names([root / "study"]) == ["a", "b"]
    assert names([root]) == ["alone", "a", "b"]
    assert names([root / "study/b", root / "study"]) == ["b", "a"]
    with pytest.raises(ValueError, match="nowhere does not exist"):
        find_runs([root / "nowhere"])
    (root / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is neither a run directory nor holds any"):
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
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 3, "lo'
    run.metrics.write_text(text)
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
    run.metrics.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 2, "lo')
    assert list(run.read_records()) == lines
    assert run.read_metrics() == [{"step": 1, "loss": 5.0}]


def test_segments_of_a_remote_run_are_read_in_order(tiny):
    run = opened(tiny())
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
    runs.write_atomically(run.checkpoints / "00000004.json", "{}")
    runs.write_atomically(run.checkpoints / "notes.json", "{}")
    assert runs.saved_steps(run.checkpoints) == [4]


def test_a_write_that_fails_leaves_the_old_content(tiny, monkeypatch):
    run = opened(tiny())
    run.write_eval("full", {"perplexity": 3.5})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as failed:
        run.write_eval("full", {"perplexity": 9.0})
    assert failed.value.filename == str(run.path / "eval" / "full.json")  # not a temporary one
    assert run.evals()["full"] == {"perplexity": 3.5}


def test_checkpoints_without_a_config_belong_to_nobody(tiny):
    """Another run would be taken for theirs."""
    run = opened(tiny())
    runs.write_atomically(run.checkpoints / "00000004.json", "{}")
    (run.path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing.*restore it"):
        opened(tiny(seed=7))
    assert not (run.path / "config.json").exists()


def test_who_does_not_write_only_checks(tiny):
    """As all hosts but the first, which holds the lock."""
    options = {"data_fingerprint": "f", "tokenizer_json": "{}"}
    run = runs.open_run(tiny(), **options, write=False)
    assert not run.path.exists()
    runs.open_run(tiny(), **options)
    before = (run.path / "config.json").read_text()
    runs.open_run(tiny(**{"placement.log_every": 77}), **options, write=False)
    assert (run.path / "config.json").read_text() == before
    with pytest.raises(ValueError, match="holds another run"):
        runs.open_run(tiny(seed=7), **options, write=False)


def test_a_damaged_evaluation_is_replaced_and_a_later_one_is_kept_and_named(tiny, caplog):
    run = opened(tiny())
    for damaged in ("[]", '{"step": "x"}', "{"):
        runs.write_atomically(run.path / "eval" / "full.json", damaged)
        run.write_eval("full", {"step": 4})
        assert run.evals()["full"] == {"step": 4}
    assert not caplog.records
    run.write_eval("full", {"step": 2})
    assert run.evals()["full"] == {"step": 4}
    assert "full.json is of step 4 and kept" in caplog.text


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
