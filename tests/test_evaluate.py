import math

import jax
import numpy as np
import pytest

from cla_jax import cache as caches
from cla_jax import checkpoint, costs
from cla_jax.evaluate import cached_decoding, evaluate, full_forward, open_setup
from cla_jax.runs import find_runs
from cla_jax.train import set_up, train
from tests import reference


@pytest.fixture
def setup(tiny, devices):
    devices(1)
    return set_up(tiny(**{"placement.eval_batch_size": 8}))


def test_full_forward_is_perplexity_as_defined(setup):
    """Against numbers put together by hand: every held-out token once, in windows of seq_len."""
    model = reference.randomised(setup.config.model)
    split = setup.prepared.split("held_out")
    limit = 10
    with jax.set_mesh(setup.mesh):
        record = full_forward(setup, model, windows=limit)
    nll, tokens, size = 0.0, 0, 0
    for i in range(limit):
        window = split[i]
        inputs, targets = window["tokens"][:-1], window["tokens"][1:].astype(int)
        logits = reference.logits(model, setup.config.model, inputs.astype(int))
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        n = int(window["n_targets"])
        nll -= log_p[np.arange(n), targets[:n]].sum()
        tokens, size = tokens + n, size + int(window["n_bytes"])
    assert (record["tokens"], record["bytes"]) == (tokens, size)
    assert record["perplexity"] == pytest.approx(math.exp(nll / tokens), rel=1e-5)
    assert record["bits_per_byte"] == pytest.approx(nll / math.log(2) / size, rel=1e-5)


def test_the_whole_split_is_scored_once(setup):
    model = reference.randomised(setup.config.model)
    with jax.set_mesh(setup.mesh):
        record = full_forward(setup, model)
    totals = setup.prepared.totals["held_out"]
    assert (record["tokens"], record["bytes"]) == (totals["tokens"], totals["bytes"])


@pytest.mark.parametrize("across", [True, False])
def test_cached_decoding_gives_the_same_perplexity(tiny, devices, across):
    devices(1)
    setup = set_up(tiny(**{"placement.eval_batch_size": 8, "data.attend_across_documents": across}))
    model = reference.randomised(setup.config.model)
    format = caches.make_format("dense", "float32")
    # The last windows too: they are padded, and the batch is filled up.
    with jax.set_mesh(setup.mesh):
        full = full_forward(setup, model, windows=12)
        for chunk in (1, 16):
            cached = cached_decoding(setup, model, format, chunk=chunk, windows=12)
            assert cached["tokens"] == full["tokens"]
            assert cached["nll"] == pytest.approx(full["nll"], rel=1e-5)


def test_ledger_counts_what_the_closed_form_predicts(setup):
    model = reference.randomised(setup.config.model)
    format = caches.make_format("dense", "float32")
    with jax.set_mesh(setup.mesh):
        record = cached_decoding(setup, model, format, chunk=16, windows=1)
    predicted = costs.kv_bytes(setup.config.model, bytes_per_element=4)
    for name, counts in record["kv_bytes"].items():
        assert counts["predicted"] == counts["counted"] == getattr(predicted, name)
    # CLA2: half the layers are held and written, every layer reads.
    assert record["kv_bytes"]["read"]["counted"] == 2 * record["kv_bytes"]["resident"]["counted"]


def test_a_chunk_must_divide_the_window(setup):
    model = reference.randomised(setup.config.model)
    with pytest.raises(ValueError, match=r"chunk = 5 does not divide data.seq_len = 32"):
        cached_decoding(setup, model, caches.make_format("dense", "float32"), chunk=5)


@pytest.mark.slow
def test_a_run_is_evaluated_from_its_directory_on_any_mesh(tiny, devices):
    devices(1)
    config = tiny()
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    assert dict(evaluate(run, chunk=16, windows=20))["full"]["tokens"] == 20 * 32
    assert run.evals() == {}  # a part of the split is no result of the run
    alone = dict(evaluate(run, chunk=32))
    assert alone["full"]["step"] == config.steps
    assert run.evals() == alone
    devices(8)
    spread = dict(evaluate(run, chunk=32))
    for name in ("full", "cached-dense"):
        assert spread[name]["nll"] == pytest.approx(alone[name]["nll"], rel=1e-6)


def test_an_untrained_run_and_changed_data_are_refused(tiny, devices, tmp_path):
    devices(1)
    config = tiny(steps=1)
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    setup = open_setup(run)
    run.checkpoints.rmtree()
    with pytest.raises(ValueError, match="no checkpoint yet"):
        checkpoint.load_model(run, setup.rules, setup.mesh)
    text = (run.path / "config.json").read_text()
    elsewhere = open_setup(run, str(tmp_path / "elsewhere"))
    assert elsewhere.prepared.path.parent == tmp_path / "elsewhere"
    (run.path / "config.json").write_text(text.replace("sotu-6", "sotu-7"))
    with pytest.raises(ValueError, match=r"trained on data 'sotu-7.*here is 'sotu-6"):
        open_setup(run)
