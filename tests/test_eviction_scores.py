"""Evaluating a run through caches that evict tokens, and continuing texts through them."""

import numpy as np
import pytest

from cla_jax.cache.evicting import evicting_spec
from cla_jax.config import Sampling
from cla_jax.data import tokenizers
from cla_jax.decode import decoding_weights
from cla_jax.decoder import Decoder
from cla_jax.evaluate import evaluate
from cla_jax.eviction import parse
from cla_jax.eviction_scores import recall_scores
from cla_jax.generate import generate
from cla_jax.recall_tasks import make_examples
from cla_jax.report import eviction_map
from cla_jax.report import rows as report
from cla_jax.runs import find_runs
from cla_jax.train import train
from tests import reference
from tests.test_evicting import CLASSES, SHARED, TOKENS

pytestmark = pytest.mark.usefixtures("above_all_runs")
POLICY = "window:tokens=14,recent=4"


@pytest.fixture
def run(tiny, devices):
    devices(1)
    config = tiny(steps=2, **{"model.n_layers": 2})
    train(config, evaluate=lambda *_: {})
    (run,) = find_runs([config.placement.runs])
    return run


@pytest.mark.slow
def test_a_run_is_evaluated_and_continued_through_policies(run):
    names = ("fastgen:T=1", "window:recent=4,tokens=14")
    records = dict(evaluate(run, formats=names))
    everything, some = (records[f"cached-{parse(name).name}"] for name in names)
    full = records["full"]
    assert everything["nll"] == pytest.approx(full["nll"], rel=1e-5)
    assert everything["tokens"] == full["tokens"]
    assert everything["kept_share"] == 1
    assert everything["agreement"]["top1_agreement"] == 1
    assert everything["agreement"]["max_logit_difference"] < 1e-4
    assert "." in everything["token_classes"]["marks"]
    assert "token_classes" not in some
    assert everything["profile"][0]["policies"]["full"]["share"] == [1.0]
    # Of 32 tokens 14 are kept at the end, in one KV layer of one head: 32 bytes at 16 bits, and 5 beside.
    assert some["kept_share"] == 14 / 32
    assert some["resident_share"] == pytest.approx(14 / 32 * (32 + 5) / 32)
    assert some["kv_bytes"]["resident"]["counted"] == 14 / 32 * (64 + 5)
    assert some["kv_bytes"]["read"]["counted"] == 2 * 14 / 32 * 64
    for kind in some["kv_bytes"].values():
        assert kind["counted"] == kind["predicted"]
    after = some["after_prompt"]
    assert after["kl"] > 1e-6
    assert after["nll"] != pytest.approx(after["nll_by_full_forward"], rel=1e-6)
    before = everything["nll"] - everything["after_prompt"]["nll"]
    assert some["nll"] == pytest.approx(before + after["nll"], rel=1e-6)

    file = run.path / "picture.png"
    eviction_map.draw({name: records[f"cached-{parse(name).name}"] for name in names}, file)
    assert len(file.read_bytes()) > 1000

    # It is a further point of the comparison.
    rows = report.read([run])
    assert [row.cache for row in rows] == ["", *(parse(name).name for name in names)]
    assert rows[2].kv_bytes == pytest.approx(14 / 32 * (32 + 5))
    assert len(report.points(rows)) == 3

    text = ["document of words, and more of them", "short ones."]
    greedy = {"new_tokens": 12, "temperature": 0}
    same = Decoder.open(run, cache="fastgen:T=1").generate(text, **greedy)
    assert same == Decoder.open(run).generate(text, **greedy)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": "fastgen:T=2"}, r"T = 2.0 must lie in \(0, 1\]"),
        ({"formats": "window:keep=0.1"}, "0.1 of a prompt of 16 tokens is 2, less than the 12"),
        ({"formats": "window:keep=0.9", "prompt": 1.0}, "prompt = 1.0 must lie between 0 and 1"),
        ({"formats": "window:keep=0.9", "chunk": 32}, "positive multiple of chunk = 32"),
        ({"formats": "fastgen", "per_kv_layer": True}, "per_kv_layer does not support"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_before_anything_is_compiled(run, options, words):
    with pytest.raises(ValueError, match=words):
        next(evaluate(run, **options))


@pytest.mark.slow
def test_what_is_forgotten_shows_in_the_answers():
    model, tokenizer = reference.randomised(SHARED), tokenizers.byte_tokenizer()
    examples = make_examples("needle", count=3, length=150)
    of = lambda policy: recall_scores(model, tokenizer, parse(policy), examples, batch=2)
    everything, some = of("fastgen:T=1"), of("window:tokens=20")
    assert everything["kl"] == pytest.approx(0, abs=1e-5)
    assert everything["nll"] == pytest.approx(everything["nll_by_full_forward"], rel=1e-5)
    assert everything["rank1"] == everything["rank1_by_full_forward"]
    assert everything["kept_of_prompt"] == 1
    assert some["kl"] > 1e-3
    assert some["nll_by_full_forward"] == pytest.approx(everything["nll"], rel=1e-5)
    assert some["kept_of_prompt"] < 0.2
    assert sum(depth["examples"] for depth in some["depths"].values()) == 3
    # The answer's likelihood by hand, of one example.
    (one,) = examples[:1]
    context = one.context + one.question
    tokens = [tokenizer.end, *tokenizer.encode(context + one.answer).tolist()]
    logits = reference.logits(model, SHARED, np.array(tokens[:-1]))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    n = len(one.answer)
    by_hand = -log_p[np.arange(len(log_p)), tokens[1:]][-n:].mean()
    alone = recall_scores(model, tokenizer, parse("fastgen:T=1"), [one])
    assert alone["nll"] == pytest.approx(by_hand, rel=1e-4)


@pytest.mark.slow
def test_requests_that_join_later_get_what_they_would_get_alone():
    """Three prompts through two rows: the pools grow, and pages are handed on."""
    weights = decoding_weights(reference.randomised(SHARED))
    prompts = [TOKENS[0, :20].tolist(), TOKENS[1, :44].tolist(), TOKENS[2, :60].tolist()]

    def continued(prompts, batch, limits):
        spec = evicting_spec(
            SHARED, parse(POLICY), classes=CLASSES.tobytes(), batch=batch, capacity=96, page=4
        )
        found = generate(
            weights, spec, prompts, new_tokens=limits, sampling=Sampling(temperature=0)
        )
        return [one.tokens for one in found]

    limits = [6, 30, 20]
    together = continued(prompts, 2, limits)
    assert [len(tokens) for tokens in together] == limits
    for prompt, limit, tokens in zip(prompts, limits, together, strict=True):
        assert continued([prompt], 1, [limit]) == [tokens]
    spec = evicting_spec(SHARED, parse("h2o:keep=0.25"), classes=b"", batch=1, capacity=96)
    with pytest.raises(ValueError, match=r"prompt 0: h2o: keep = 0\.25 of a prompt of 20"):
        generate(weights, spec, prompts, new_tokens=2)
