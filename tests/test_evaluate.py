import dataclasses
import errno
import functools
import json
import math
import os
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from cla_jax import cache as caches
from cla_jax import checkpoint, costs, documents, runs, scoring
from cla_jax import evaluate as evaluation
from cla_jax.config import Component, MeshConfig
from cla_jax.data import sources
from cla_jax.decode import decode, decoding_weights
from cla_jax.evaluate import during_training, evaluate, open_session
from cla_jax.evaluation import Evaluation, read
from cla_jax.model.transformer import ForwardOptions, project
from cla_jax.report import rows as report
from cla_jax.runs import Run, check_paths, find_runs
from cla_jax.scoring import agreement, cached_decoding, full_forward, score, sensitivity
from cla_jax.session import prepare_session
from cla_jax.train import opened, train
from tests import reference
from tests.sealed import write_metrics

pytestmark = pytest.mark.usefixtures("above_all_runs")


@pytest.fixture
def session(tiny, devices):
    devices(1)
    # Not bytes: tokens and bytes must not be the same number.
    changes = {"placement.eval_batch_size": 8, "data.tokenizer": "bpe:260"}
    return prepare_session(tiny(**changes)).evaluation


def test_full_forward_is_perplexity_as_defined(session):
    """Against numbers put together by hand: every held-out token once, in windows of seq_len."""
    model = reference.randomised(session.model)
    split = session.prepared.parts[""].split("held_out")
    limit = 10
    with jax.set_mesh(session.mesh):
        record = full_forward(session, model, windows=limit)
    nll, tokens, size = 0.0, 0, 0
    for i in range(limit):
        window = split[i]
        inputs, targets = window["tokens"][:-1], window["tokens"][1:].astype(int)
        logits = reference.logits(model, session.model, inputs.astype(int))
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        n = int(window["n_targets"])
        nll -= log_p[np.arange(n), targets[:n]].sum()
        tokens, size = tokens + n, size + int(window["n_bytes"])
    assert (record.tokens, record.bytes) == (tokens, size)
    assert tokens < size
    assert record.documents is None  # the last one may be cut off
    assert record.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert record.bits_per_byte == pytest.approx(nll / math.log(2) / size, rel=1e-5)


@pytest.mark.parametrize(
    ("windows", "expected"), [(1, 1), (2, 2), (8, 8), (9, 5), (20, 7), (None, 8), (10_000, 8)]
)
def test_a_batch_is_no_larger_than_what_is_scored(session, windows, expected):
    """Batches of at most 8 windows, of like size: the last one computes hardly a row for nothing."""
    size = scoring.rows(session, windows)
    assert size == expected
    with jax.set_mesh(session.mesh):
        spec = scoring._spec(session, "dense", 16, windows, "xla")
        assert spec.batch == expected
        shapes = []

        def nll(tokens_BT1, weights_BT):
            shapes.append(len(tokens_BT1))
            return weights_BT

        score(session, nll, windows=windows, warm_up=False)
    assert set(shapes) == {expected}
    held = session.prepared.totals["held_out"]["windows"]
    assert sum(shapes) - min(windows or held, held) < len(shapes)


def test_the_whole_split_is_scored_once(session):
    model = reference.randomised(session.model)
    with jax.set_mesh(session.mesh):
        record = full_forward(session, model)
    totals = session.prepared.totals["held_out"]
    assert (record.tokens, record.bytes) == (totals["tokens"], totals["bytes"])


@pytest.mark.slow
@pytest.mark.parametrize("across", [True, False])
def test_cached_decoding_gives_the_same_perplexity(tiny, devices, across, short_documents):
    devices(1)
    changes = {"data.source": short_documents, "placement.eval_batch_size": 8}
    session, other = (
        prepare_session(tiny(**changes, **{"data.attend_across_documents": a})).evaluation
        for a in (across, not across)
    )
    model = reference.randomised(session.model)
    # The last window too: it is padded, and its batch is filled up.
    with jax.set_mesh(session.mesh):
        full = full_forward(session, model)
        assert abs(full_forward(other, model).nll - full.nll) > 1  # documents end within windows
        for chunk in (1, 16):
            cached = cached_decoding(session, model, "dense", chunk=chunk)
            assert cached.tokens == full.tokens
            assert cached.nll == pytest.approx(full.nll, rel=1e-5)
            close = agreement(session, model, "dense", chunk=chunk, windows=12)
            assert close.top1_agreement == 1
            assert close.tokens == 12 * 32
            assert close.max_logit_difference < 1e-4
            assert abs(close.kl) < 1e-6


@pytest.mark.slow
def test_agreement_is_what_its_names_say(session):
    """Against logits compared by hand, for a format that really differs, padding at the end included."""
    model = reference.randomised(session.model)
    config, T = session.model, session.data.seq_len
    coarse = dataclasses.replace(caches.make_format("int8", "float32"), largest=2.0)
    with jax.set_mesh(session.mesh):
        found = agreement(session, model, coarse, chunk=T, windows=10_000)
        first = agreement(session, model, coarse, chunk=T, windows=1)  # of a batch of 8
    split = session.prepared.parts[""].split("held_out")
    n = len(split)
    tokens = np.stack([split[i]["tokens"][:-1] for i in range(n)]).astype(int)
    seen = np.arange(T) < np.array([int(split[i]["n_targets"]) for i in range(n)])[:, None]
    assert not seen.all()
    full = np.asarray(model.logits(tokens, ForwardOptions()), np.float64)
    weights = decoding_weights(model)
    spec = caches.cache_spec(config, coarse, batch=n, capacity=T, chunk=T)
    x, _ = decode(weights, spec, spec.allocate(), tokens, np.full(n, T))
    ours = np.asarray(project(x, weights.head, spec.rules), np.float64)
    log = lambda a: a - np.log(np.exp(a).sum(-1, keepdims=True))
    kl, reverse = (
        (np.exp(log(a)) * (log(a) - log(b))).sum(-1)[seen].mean()
        for a, b in ((full, ours), (ours, full))
    )
    apart = np.abs(full - ours)
    assert found.tokens == seen.sum()
    assert found.max_logit_difference == pytest.approx(apart[seen].max(), rel=1e-3)
    assert first.max_logit_difference == pytest.approx(apart[0].max(), rel=1e-3)
    assert apart[0].max() < 0.99 * apart[:8].max()
    assert found.mean_logit_difference == pytest.approx(apart[seen].mean(), rel=1e-3)
    same = (ours.argmax(-1) == full.argmax(-1))[seen]
    assert found.top1_agreement == pytest.approx(same.mean(), abs=2 / seen.sum())
    assert found.kl == pytest.approx(kl, rel=1e-3)
    assert abs(reverse / kl - 1) > 3e-3


def test_the_error_of_one_kv_layer_is_felt_by_its_readers_only(session):
    model = reference.randomised(session.model)
    with jax.set_mesh(session.mesh):
        layers = sensitivity(session, model, "fp8", chunk=16, windows=8)
        whole = agreement(session, model, "fp8", chunk=16, windows=8)
    assert [(s.kv_layer, s.layer, s.readers) for s in layers] == [(0, 0, 2), (1, 2, 2)]
    assert all(1e-6 < s.kl < whole.kl for s in layers)


def test_ledger_counts_what_the_closed_form_predicts(session):
    model = reference.randomised(session.model)
    with jax.set_mesh(session.mesh):
        record = cached_decoding(session, model, "dense", chunk=16, windows=1)
    predicted = costs.kv_bytes(session.model, 32, bytes_per_element=4)
    for counts in record.kv_bytes.values():
        assert counts.predicted == counts.counted
    for name in ("resident", "written", "read"):
        assert record.kv_bytes[name].counted == getattr(predicted, name)
    # CLA2: half the layers are held and written, every layer reads.
    assert record.kv_bytes["read"].counted == 2 * record.kv_bytes["resident"].counted
    assert record.readers_per_kv_layer == (2, 2)


def test_a_chunk_must_divide_the_window(session):
    model = reference.randomised(session.model)
    with pytest.raises(ValueError, match=r"chunk = 5 does not divide data.seq_len = 32"):
        cached_decoding(session, model, "dense", chunk=5)


@pytest.mark.parametrize("windows", [0, -1])
def test_no_windows_cannot_be_scored(session, windows):
    model = reference.randomised(session.model)
    for score_with in (full_forward, functools.partial(cached_decoding, format="dense", chunk=16)):
        refused = pytest.raises(ValueError, match=f"windows = {windows} must be positive")
        with jax.set_mesh(session.mesh), refused:
            score_with(session, model, windows=windows)


def recorded(run):
    """The evaluations on the disk of a run."""
    return {name: read(name, record, name) for name, record in run.evals().items()}


@pytest.mark.slow
def test_a_run_is_evaluated_from_its_directory_on_any_mesh(tiny, devices):
    devices(1)
    config = tiny()
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    assert dict(evaluate(run, formats=(), windows=20))["full"].scores.tokens == 20 * 32
    assert run.evals() == {}  # a part of the split is no result of the run
    alone = dict(evaluate(run, chunk=32))
    assert alone["full"].step == config.steps
    assert recorded(run) == alone
    later = alone["full"].record() | {"step": config.steps + 1}
    run.write_eval("full", later)
    assert "full" in dict(evaluate(run, formats=()))
    assert run.evals()["full"] == later  # the checkpoint of an earlier step does not replace it
    devices(8)
    split = {"mesh": MeshConfig(data=4, fsdp=1, model=2), "split_cache": True}
    for way in ({"formats": ()}, split):
        spread = dict(evaluate(run, chunk=32, windows=1000, batch_size=64, **way))
        assert len(spread) == (1 if "formats" in way else 2)
        for name in spread:
            assert spread[name].scores.nll == pytest.approx(alone[name].scores.nll, rel=1e-6)


def test_kv_layers_are_not_measured_one_by_one_where_layers_read_two_of_them(tiny):
    session = SimpleNamespace(model=tiny(**{"model.kv_map": "k=cla:2;v=identity"}).model)
    with pytest.raises(
        ValueError, match=r"per_kv_layer: .* read keys and values in different formats"
    ):
        sensitivity(session, None, "int8")


@pytest.mark.slow
def test_formats_are_evaluated_beside_each_other(tiny, devices, monkeypatch):
    devices(1)
    config = tiny(steps=2, **{"model.n_layers": 2})
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    records = dict(evaluate(run, formats=("dense", "int8"), chunk=32, per_kv_layer=True))
    assert list(records) == ["full", "cached-dense", "cached-int8"]
    assert run.evals().keys() == records.keys()
    int8 = run.evals()["cached-int8"]
    dense = run.evals()["cached-dense"]
    # One KV layer: K and V, codes and scale.
    assert int8["kv_bytes"]["resident"]["counted"] == 2 * (8 + 2)
    assert dense["kv_bytes"]["resident"]["counted"] == 2 * 8 * 4
    assert [layer["readers"] for layer in int8["per_kv_layer"]] == [2]
    rows = report.read([run])
    assert [(row.cache, row.kv_bytes) for row in rows] == [("", 32), ("int8", 20)]
    with pytest.raises(ValueError, match="unknown cache format 'int4'; did you mean int8"):
        next(evaluate(run, formats="int4"))

    # What was interrupted goes on; what is recorded in this way, of this checkpoint, is not done twice.
    (run.path / "eval" / "cached-int8.json").unlink()
    done = []
    for name in ("full_forward", "cached_decoding"):
        real = getattr(evaluation, name)
        noted = lambda *a, real=real, **k: done.append(a[2:]) or real(*a, **k)
        monkeypatch.setattr(evaluation, name, noted)
    same = {"formats": ("dense", "int8"), "chunk": 32}
    assert dict(evaluate(run, **same, per_kv_layer=True)).keys() == records.keys()
    assert done == [("int8",)]
    done.clear()
    assert dict(evaluate(run, **same)) == recorded(run)
    assert done == []
    run.write_eval("cached-dense", dense | {"checkpoint": "another of this step"})
    list(evaluate(run, **same))
    assert done == [("dense",)]
    assert run.evals()["cached-dense"]["checkpoint"] == dense["checkpoint"]
    done.clear()
    for more in ({"again": True}, {"chunk": 16}, {"windows": 1}):
        list(evaluate(run, **same | {"formats": ("dense", "dense")} | more))
    assert done == [(), ("dense",), ("dense",), (), ("dense",)]

    def refused(number, message):
        def temporary_file(**_: object) -> None:
            raise OSError(number, message)

        return SimpleNamespace(TemporaryFile=temporary_file)

    # Told before anything is computed, unless nothing has to be written.
    list(evaluate(run, **same))
    done.clear()
    with monkeypatch.context() as patched:
        patched.setattr(runs.files, "tempfile", refused(errno.EROFS, "Read-only file system"))
        assert dict(evaluate(run, **same)) == recorded(run)
        with pytest.raises(ValueError, match=r"written to .*/eval: Read-only .* --windows N"):
            list(evaluate(run, **same, again=True))
        assert done == []
        list(evaluate(run, **same, windows=1))
        assert done == [(), ("dense",), ("int8",)]
        patched.setattr(runs.files, "tempfile", refused(errno.ENOSPC, "No space left on device"))
        with pytest.raises(OSError, match="No space left"):
            list(evaluate(run, **same, again=True))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Run, "write_eval", full)
    peaks = iter([100, 300, 300, 400])  # before, and after each
    monkeypatch.setattr(evaluation.memory, "allocator_peak", lambda: next(peaks))
    seen = {}
    with pytest.raises(OSError, match="No space left"):
        seen.update(evaluate(run, formats=("dense", "int8"), again=True))
    # All is told, whatever could not be kept; and a peak of whoever reached it.
    told = {name: record.device_peak_bytes for name, record in seen.items()}
    assert told == {"full": 300, "cached-dense": None, "cached-int8": 400}


def test_an_untrained_run_and_changed_data_are_refused(tiny, devices, tmp_path):
    devices(1)
    config = tiny(steps=1)
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    session = open_session(run)
    run.checkpoints.rmtree()
    with pytest.raises(ValueError, match=r"00000001\.json is missing: .* was saved; none is left"):
        checkpoint.load_model(run, session.rules, session.mesh)
    text = (run.path / "config.json").read_text()
    elsewhere = open_session(run, str(tmp_path / "elsewhere"))
    assert elsewhere.prepared.parts[""].path.parent == tmp_path / "elsewhere"
    older = json.loads(text.replace("sotu-4", "sotu-7"))
    for field in ("checksum", "run", "format"):  # as before records had checksums
        del older[field]
    (run.path / "config.json").write_text(json.dumps(older))
    with pytest.raises(ValueError, match=r"trained on data 'sotu-7.*here is 'sotu-4"):
        open_session(run)


@pytest.mark.parametrize("mixed", [False, True])
def test_changed_text_is_named_by_its_files(tiny, devices, tmp_path, monkeypatch, mixed):
    """In evaluation and when training continues."""
    devices(1)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(30):
            (tmp_path / name / f"{i:02d}.txt").write_text(f"document {i} of {name} " * 9)
    mixture = tuple(Component.parse(f"{name}=1:text:{name}/*.txt") for name in ("a", "b"))
    config = tiny(
        **{"placement.data_dir": "data", "placement.eval_batch_size": 8, "data.seq_len": 32}
        | ({"data.mixture": mixture} if mixed else {"data.source": "text:b/*.txt"})
    )
    session = prepare_session(config)
    with opened(session) as run:
        write_metrics(run, [{"step": 1, "loss": 5.0}])
    (tmp_path / "b" / "07.txt").write_text("another text " * 9)
    (tmp_path / "b" / "08.txt").unlink()
    (tmp_path / "b" / "new.txt").write_text("one more " * 9)
    words = (
        r"files of .*text:b/\*\.txt changed after .* was trained on them \(07.txt changed, 08.txt is "
        r"missing, new.txt is new\)\. Restore them, or train on the new text as another run, with --name"
    )
    with pytest.raises(ValueError, match=words):
        open_session(run)
    with pytest.raises(ValueError, match=words), opened(prepare_session(config)):
        pass
    for file in (tmp_path / "b").glob("*.txt"):
        file.write_text("changed again " * 9)
    with pytest.raises(ValueError, match=r"04.txt changed, 26 more\)"):
        open_session(run)
    shutil.rmtree("data")  # then nothing says what the files were
    with pytest.raises(ValueError, match=r"was trained on them\. Restore"):
        open_session(run)


@pytest.mark.parametrize("place", ["/srv/data", "../data", "~/data", "a/../../data"])
def test_a_place_that_only_the_run_names_is_not_used(tiny, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    config = tiny(**{"placement.data_dir": place})
    run = runs.open_run(config, data_fingerprint="sotu-1", tokenizer_json="{}")
    with pytest.raises(
        ValueError, match=f"outside the current directory: confirm it with --data-dir {place}"
    ):
        check_paths(run, None, ())
    check_paths(run, "mine", ())
    for ours in ("data", "a/b/../data", str(tmp_path / "data")):
        config = tiny(name="ours", **{"placement.data_dir": ours})
        check_paths(runs.open_run(config, data_fingerprint="", tokenizer_json="{}"), None, ())


@pytest.mark.parametrize("source", ["text:/home/me/*.txt", "jsonl:../mine.jsonl", "tfds:/srv/set"])
def test_text_that_only_the_run_names_is_not_read(tiny, tmp_path, monkeypatch, source):
    monkeypatch.chdir(tmp_path)
    config = tiny(**{"data.source": source, "placement.data_dir": "data"})
    run = runs.open_run(config, data_fingerprint="prepared-1", tokenizer_json="{}")
    with pytest.raises(ValueError, match=r"is not prepared: .* --data-source"):
        check_paths(run, None, ())
    check_paths(run, None, (source,))
    (tmp_path / "data" / "prepared-1").mkdir(parents=True)  # the user prepared it before
    check_paths(run, None, ())


def test_every_component_of_a_mixture_is_named(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixture = tuple(Component.parse(f"{name}=1:text:/home/{name}/*.txt") for name in ("a", "b"))
    config = tiny(**{"data.mixture": mixture, "placement.data_dir": "data"})
    run = runs.open_run(config, data_fingerprint="mixture-1", tokenizer_json="{}")
    with pytest.raises(ValueError, match=r"text:/home/b/\*.txt.*--data-source"):
        check_paths(run, None, ("text:/home/a/*.txt",))
    check_paths(run, None, ("text:/home/a/*.txt", "text:/home/b/*.txt"))


def test_links_below_a_run_do_not_make_a_place_the_users(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = tiny(**{"placement.runs": "runs", "placement.data_dir": "runs/tiny/profile/x/data"})
    run = runs.open_run(config, data_fingerprint="", tokenizer_json="{}")
    check_paths(run, None, ())
    run.profile.mkdir()
    os.symlink("/", run.profile / "x")
    with pytest.raises(ValueError, match="outside the current directory"):
        check_paths(run, None, ())


def test_data_of_another_fingerprint_is_not_prepared(tiny, devices, tmp_path):
    devices(1)
    config = tiny(**{"placement.data_dir": str(tmp_path / "theirs")})
    run = runs.open_run(config, data_fingerprint="sotu-4-other", tokenizer_json="{}")
    with pytest.raises(ValueError, match="was trained on data 'sotu-4-other'"):
        open_session(run)
    assert not (tmp_path / "theirs").exists()


def test_who_calls_from_python_names_the_places_of_a_run_too(tiny, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    theirs, source = str(tmp_path / "theirs"), f"text:{tmp_path}/*.txt"
    (tmp_path / "a.txt").write_text("secret")
    config = tiny(**{"placement.data_dir": theirs, "data.source": source})
    run = runs.open_run(config, data_fingerprint="text-other", tokenizer_json="{}")
    with pytest.raises(ValueError, match="outside the current directory: confirm it"):
        open_session(run)
    with pytest.raises(ValueError, match="is not prepared"):
        open_session(run, theirs)
    with pytest.raises(ValueError, match="was trained on data 'text-other'"):
        open_session(run, theirs, data_sources=[source])
    assert not os.path.exists(theirs)


# ---------------------------------------------------------------------------------- documents


def by_hand(session, model):
    """Each document's nats, tokens and bytes, from the text and an independent forward pass."""
    texts = list(sources.documents(session.data.source))
    texts = [text for text in texts if sources.is_held_out(text, session.data.held_out)]
    ids = [
        [*session.prepared.tokenizer.encode(text), session.prepared.tokenizer.end] for text in texts
    ]
    losses, T = [], session.data.seq_len
    split = session.prepared.parts[""].split("held_out")
    for window in (split[i] for i in range(len(split))):
        n, tokens = int(window["n_targets"]), window["tokens"].astype(int)
        logits = reference.logits(model, session.model, tokens[:T])
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        losses += list(-log_p[np.arange(n), tokens[1 : 1 + n]])
    ends = np.cumsum([len(document) for document in ids])
    nll = [sum(part) for part in np.split(losses, ends)[:-1]]
    return nll, [len(document) for document in ids], [len(text.encode()) for text in texts]


@pytest.mark.slow
def test_each_document_keeps_its_score(tiny, devices, short_documents):
    changes = {"data.source": short_documents, "data.tokenizer": "bpe:260"}
    records = []
    for batch, count in ((8, 1), (24, 8)):
        devices(count)
        session = prepare_session(
            tiny(**changes, **{"placement.eval_batch_size": batch})
        ).evaluation
        model = reference.randomised(session.model)
        with jax.set_mesh(session.mesh):
            records.append(full_forward(session, model))
    devices(1)
    session = prepare_session(tiny(**changes, **{"placement.eval_batch_size": 8})).evaluation
    nll, tokens, n_bytes = by_hand(session, model)
    with jax.set_mesh(session.mesh):
        records.append(cached_decoding(session, model, "dense", chunk=16))
    assert len(nll) > 40
    for record in records:
        written = json.loads(json.dumps(Evaluation(step=1, scores=record).record()))
        found = read("full", written, "full.json").scores.documents
        assert found is not None
        assert found.nll == pytest.approx(nll, rel=1e-4)
        assert (list(found.tokens), list(found.bytes)) == (tokens, n_bytes)
        assert found.nll.sum() == pytest.approx(record.nll, abs=1e-2)
        assert (found.tokens.sum(), found.bytes.sum()) == (record.tokens, record.bytes)
    # What an older version prepared does not list its documents.
    (path,) = (part.path for part in session.prepared.parts.values())
    listed, bare = session.prepared.parts[""], path.with_name("older")
    shutil.copytree(path, bare)
    (bare / "held_out.json").unlink()
    older = dataclasses.replace(listed, path=bare).documents()
    for a, b in zip(older, listed.documents(), strict=True):
        assert (a == b).all()
    shutil.rmtree(bare)


def test_documents_that_do_not_add_up_are_not_scored_but_told(tiny, caplog, short_documents):
    session = prepare_session(tiny(**{"data.source": short_documents})).evaluation
    part = session.prepared.parts[""]
    totals = {"held_out": part.totals["held_out"] | {"bytes": 7}}
    wrong = dataclasses.replace(part, totals=totals)
    with pytest.raises(ValueError, match=r"the held-out split has 7 and"):
        wrong.documents()
    corpus = dataclasses.replace(session.prepared, parts={"": wrong})
    model = reference.randomised(session.model)
    with jax.set_mesh(session.mesh):
        record = full_forward(dataclasses.replace(session, prepared=corpus), model)
    assert record.documents is None
    assert "single documents are not scored" in caplog.text


def test_training_keeps_the_documents_of_its_evaluation(tiny, short_documents):
    mixture = tuple(map(Component.parse, (f"a=1:{short_documents}", "b=1:sotu:4")))
    config = tiny(**{"data.mixture": mixture, "data.source": ""})
    train(config, evaluate=during_training)
    (run,) = find_runs([config.placement.runs])
    record = run.eval("training")
    scores = read("training", record, "training.json").scores
    found = scores.all_documents
    assert found is not None
    parts = [part.documents for part in scores.components.values()]
    a, b = (part.record() for part in parts if part is not None)
    assert a["count"] > b["count"] > 0
    for key in ("nll", "tokens", "bytes"):  # in the order of the components
        assert found.record()[key] == f"{a[key]} {b[key]}"
    assert found.bytes.sum() == record["bytes"] == run.read_metrics()[-1]["held_out_bytes"]
    assert record["step"] == config.steps
    # Older evaluations have none; a damaged one is named.
    del record["components"]["a"]["documents"]
    assert read("training", record, "training.json").scores.all_documents is None


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"count": 3}, "has 2 numbers for 3 documents"),
        ({"nll": "1.0 x"}, "documents.nll is not a list of numbers"),
        ({"bytes": 7}, "field bytes: expected"),
        ({"tokens": "1 99999999999999999999"}, "documents.tokens is not a list of numbers"),
    ],
)
def test_damaged_documents_are_named(change, what):
    one = documents.Documents(nll=np.ones(2), tokens=np.ones(2, int), bytes=np.ones(2, int))
    scores = {"step": 1, "perplexity": 2.0, "bits_per_byte": 1.0, "tokens": 2}
    with pytest.raises(ValueError, match=rf"full.json: .*{what}"):
        read("full", scores | {"documents": one.record() | change}, "full.json")
