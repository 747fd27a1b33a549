"""Evaluating a run through caches that evict tokens, and continuing texts through them."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Compressor
from cla_jax.config import DataConfig, MeshConfig, ModelConfig, Sampling
from cla_jax.data import tokenizers
from cla_jax.decode import decoding_weights
from cla_jax.decoder import Decoder
from cla_jax.evaluate import evaluate
from cla_jax.eviction import parse
from cla_jax.eviction.rule import PUNCTUATION, SPECIAL
from cla_jax.eviction_scores import evicting_decoding, recall_scores
from cla_jax.generate import generate
from cla_jax.model.transformer import Transformer
from cla_jax.recall_tasks import make_examples
from cla_jax.report import eviction_map
from cla_jax.report import rows as report
from cla_jax.runs import find_runs
from cla_jax.scoring import rows
from cla_jax.session import EvaluationSession, prepare_evaluation
from cla_jax.state import named, with_named
from cla_jax.train import train
from tests import reference
from tests.test_evicting import CLASSES, SHARED, TOKENS, step

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
    found = {name: one.scores for name, one in evaluate(run, formats=names)}
    everything, some = (found[f"cached-{parse(name).name}"] for name in names)
    full = found["full"]
    assert everything.nll == pytest.approx(full.nll, rel=1e-5)
    assert everything.tokens == full.tokens
    assert everything.kept_share == 1
    assert everything.agreement.top1_agreement == 1
    assert everything.agreement.max_logit_difference < 1e-4
    assert "." in everything.token_classes.marks
    assert some.token_classes is None
    assert everything.profile[0].policies["full"].share == (1.0,)
    # Of 32 tokens 14 are kept at the end, in one KV layer of one head: 32 bytes at 16 bits, and 5 beside.
    assert some.kept_share == 14 / 32
    assert some.resident_share == pytest.approx(14 / 32 * (32 + 5) / 32)
    assert some.kv_bytes["resident"].counted == 14 / 32 * (64 + 5)
    assert some.kv_bytes["read"].counted == 2 * 14 / 32 * 64
    for kind in some.kv_bytes.values():
        assert kind.counted == kind.predicted
    after = some.after_prompt
    assert after.kl > 1e-6
    assert after.nll != pytest.approx(after.nll_by_full_forward, rel=1e-6)
    before = everything.nll - everything.after_prompt.nll
    assert some.nll == pytest.approx(before + after.nll, rel=1e-6)

    file = run.path / "picture.png"
    eviction_map.draw({name: found[f"cached-{parse(name).name}"].profile for name in names}, file)
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


@pytest.mark.parametrize("cache", ["dense", "window:keep=0.75,recent=2"])
def test_a_decoder_lays_out_its_weights_once(run, cache, monkeypatch):
    laid_out = []

    def counted(*args, **how):
        laid_out.append(args)
        return decoding_weights(*args, **how)

    monkeypatch.setattr("cla_jax.decoder.decoding_weights", counted)
    decoder = Decoder.open(run, cache=cache)
    for text in ("document of words", "short ones, and more of them."):
        decoder.generate([text], new_tokens=2, temperature=0)
    assert len(laid_out) == 1


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """`held_out(batch_size, documents, share)`: a session with windows of 64 tokens, and a model."""
    place = tmp_path_factory.mktemp("held_out")

    def make(
        batch_size: int, documents: int, share: float
    ) -> tuple[EvaluationSession, Transformer]:
        texts = [f"Document {i} of a few words, {i * 7}{'.' * (i % 5)}" for i in range(documents)]
        file = place / f"{documents}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        session = prepare_evaluation(
            SHARED,
            DataConfig(source=f"jsonl:{file}", seq_len=64, held_out=share),
            data_dir=str(place / f"data-{documents}-{share}"),
            mesh=MeshConfig(fsdp=1),
            scan_layers=True,
            remat="none",
            batch_size=batch_size,
            loss_chunk=64,
        )
        return session, reference.randomised(SHARED)

    return make


def test_a_profile_and_bytes_are_those_of_whole_windows(held_out, devices):
    """Nine windows, of which the last is not whole. Batches of two and five have a row of padding.

    The last batch of two has no whole window.
    """
    devices(1)
    found = []
    for batch_size in (2, 5, 9):
        session, model = held_out(batch_size, 30, 0.5)
        totals = session.prepared.parts[""].totals["held_out"]
        assert (totals["windows"], rows(session)) == (9, batch_size)
        assert totals["tokens"] % 64
        found.append(evicting_decoding(session, model, parse("fastgen:T=0.8"), chunk=32))
    for other in found[1:]:
        assert other.profile == found[0].profile
        assert other.kept_share == found[0].kept_share
    assert 0 < found[0].kept_share < 1


def test_a_held_out_text_without_a_whole_window_is_refused(held_out, devices):
    devices(1)
    session, model = held_out(2, 60, 0.06)
    with pytest.raises(ValueError, match=r"only \d+ tokens and a window 64"):
        evicting_decoding(session, model, parse("window:tokens=14,recent=4"), chunk=32)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"formats": "fastgen:T=2"}, r"T = 2.0 must lie in \(0, 1\]"),
        ({"formats": "window:keep=0.1"}, "0.1 of a prompt of 16 tokens is 2, less than the 12"),
        ({"formats": "window:keep=0.9", "prompt": 1.0}, "prompt = 1.0 must lie between 0 and 1"),
        ({"formats": "window:keep=0.9", "chunk": 32}, "positive multiple of chunk = 32"),
        ({"formats": "fastgen", "per_kv_layer": True}, "per_kv_layer does not support"),
        ({"formats": "window:keep=0.9", "windows": 0}, "windows = 0 must be positive"),
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


# ------------------------------------------------------------------------------ recency and sinks

BEGIN, WRONG, WORDS = 0, 15, 14  # the first token, a wrong answer, and tokens 1 to 14
FOLLOWING = np.array([0, *range(2, WORDS + 1), 1, WRONG])  # the word after each word


def sinking() -> Transformer:
    """A model that predicts the word after the token before the newest, and has an attention sink.

    One head attends to the token before. The other attends to the first token, from which it gets nothing.
    Without it, the head attends to words, and its output drowns the other's. Trained models have such heads.
    """
    config = ModelConfig(
        vocab_size=16, n_layers=1, d_model=64, d_ff=8, n_heads=2, n_kv_heads=1, d_head=32,
        rope_theta=1e8, tied_embeddings=False, compute_dtype="float32",
    )  # fmt: skip
    model = Transformer(jax.random.key(0), config)
    made = {name: np.array(array) for name, array in named(model).items()}
    for name, array in made.items():
        array[...] = 1 if name.endswith("scale") else 0
    token, constant, answer = 0, 16, 32  # where the dimensions of each begin
    normed = np.sqrt(64 / 2)  # what the norm makes of a 1
    made["embedding"][:, token : token + 16] = np.eye(16)
    made["embedding"][:, constant] = 1
    query, kv = (
        made["stacks.0.blocks.query.weight"][0, 0, :, 0],
        made["stacks.0.projection.kv.weight"][0],
    )
    output = made["stacks.0.blocks.output.weight"][0, 0, 0]
    (key, value), sink, before = (kv[:, i, 0] for i in (0, 1)), 0, 1
    scale = 32**0.5 / normed**2  # of a product of a query and a key
    # Pairs 0 to 7 turn with the position: they tell the token before. Pair 15 does not turn.
    speeds = 1e8 ** (-np.arange(8) / 16)
    key[constant, :8] = 1
    query[constant, before, :8] = 28 * scale * np.cos(speeds)
    query[constant, before, 16:24] = -28 * scale * np.sin(speeds)
    key[token + BEGIN, 15] = 1
    query[constant, sink, 15] = 14 * scale
    words = np.arange(1, WORDS + 1)
    value[token + words, words] = 1 / normed
    value[token + words, 16] = 1 / normed
    output[before, words, answer + words] = 1
    output[sink, 16, answer + WRONG] = 30
    made["head"][FOLLOWING[words], answer + words] = 1
    made["head"][WRONG, answer + WRONG] = 1
    return with_named(model, {name: jnp.asarray(array) for name, array in made.items()})


SMALL = (
    "fastgen:T=0.9", "window:keep=0.25", "h2o:keep=0.25", "snapkv:keep=0.4", "adakv:keep=0.4",
    "random:keep=0.25",
)  # fmt: skip


def recency(policy: str) -> tuple[float, float]:
    """The share of right predictions after a prompt, and the share of the prompt that is kept."""
    model = sinking()
    classes = np.zeros(16, np.uint8)
    classes[[BEGIN, 1]] = SPECIAL, PUNCTUATION
    tokens = np.random.default_rng(1).integers(1, WORDS + 1, (2, 160)).astype(np.int32)
    tokens[:, 0] = BEGIN
    spec = evicting_spec(
        model.config, parse(policy), classes=classes.tobytes(), batch=2, capacity=160
    )
    compressor = Compressor(decoding_weights(model), spec)
    _, cache = compressor.fill(spec.allocate(), dict(enumerate(tokens[:, :96].tolist())), 64)
    right = []
    for t in range(96, 160):
        given = tokens[:, t : t + 1], np.ones(2, np.int32)
        logits, cache = step(compressor.weights, cache, *given, spec=compressor.spec)
        right.append(logits[:, 0].argmax(-1) == FOLLOWING[tokens[:, t - 1]])
    return float(np.mean(right)), compressor.chosen[0].kept_BKS.sum() / (2 * 96)


@pytest.mark.parametrize("policy", SMALL)
def test_recent_tokens_are_found_under_every_policy(policy):
    """Caches that evict the first tokens pass tests of exactness, and then get every task wrong."""
    score, kept = recency(policy)
    assert kept < 0.5
    assert score == 1


@pytest.mark.parametrize("policy", ["window:keep=0.25", "random:keep=0.25"])
def test_without_the_first_tokens_nothing_is_right(policy):
    """So the test above can fail. (The other policies find the first token by its attention or class.)"""
    score, _ = recency(f"{policy},sinks=0")
    assert score == 0
