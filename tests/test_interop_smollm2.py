"""A real model, SmolLM2-135M, beside transformers; the weights come by pip and are kept in data/."""

import math
from pathlib import Path

import numpy as np
import pytest

from cla_jax import interop
from cla_jax.data import tokenizers
from cla_jax.evaluate import evaluate, open_session
from cla_jax.eviction import parse
from cla_jax.eviction_scores import recall_scores
from cla_jax.interop import fetch
from cla_jax.interop.export import export
from cla_jax.interop.foreign import import_run
from cla_jax.interop.text import Text
from cla_jax.recall_tasks import make_examples
from cla_jax.runs import Run
from tests import interop as made
from tests.test_interop_hf import load
from tests.test_interop_torch import torch_logits

pytestmark = pytest.mark.interop
ROOT = Path(__file__).parents[1]
WINDOWS = 4  # of 512 tokens of held-out prose


@pytest.fixture(scope="module")
def gguf():
    return fetch.fetch("smollm2-135m", ROOT / "data")


@pytest.fixture(scope="module")
def run(gguf, tmp_path_factory) -> Run:
    directory = tmp_path_factory.mktemp("smollm2")
    text = Text(
        source="sotu:60",
        seq_len=512,
        end_token=fetch.MODELS["smollm2-135m"].end_token,
        data_dir=str(directory / "data"),
    )
    return import_run(interop.read(gguf), directory / "run", text)


@pytest.fixture(scope="module")
def theirs(gguf):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()


@pytest.fixture(scope="module")
def windows(run):
    split = (
        open_session(run, run.config().placement.data_dir, batch_size=1)
        .prepared.parts[""]
        .split("held_out")
    )
    return [split[i] for i in range(WINDOWS)]


def test_logits_and_bits_per_byte_are_those_of_transformers(run, theirs, windows, devices):
    devices(1)
    _, model = load(run)
    nll, n_bytes, apart, agreed = 0.0, 0, 0.0, 0
    for window in windows:
        inputs, targets = window["tokens"][None, :-1].astype(int), window["tokens"][1:].astype(int)
        expected = torch_logits(theirs, inputs)
        ours = made.logits(model, inputs)
        apart = max(apart, np.abs(ours - expected).max())
        agreed += (ours.argmax(-1) == expected.argmax(-1)).sum()
        n = int(window["n_targets"])
        scores = expected[0, :n].astype(np.float64)
        log_z = np.logaddexp.reduce(scores, axis=-1)
        nll += (log_z - scores[np.arange(n), targets[:n]]).sum()
        n_bytes += int(window["n_bytes"])
    ((_, evaluated), *_) = evaluate(
        run, formats=(), data_dir=run.config().placement.data_dir, windows=WINDOWS, batch_size=2
    )
    bits = nll / math.log(2) / n_bytes
    print(
        f"max |dlogit| {apart:.2e}, bits per byte {evaluated.scores.bits_per_byte:.6f} and {bits:.6f}"
    )
    assert apart <= 1e-3
    assert agreed == WINDOWS * 512
    assert abs(evaluated.scores.bits_per_byte - bits) < 5e-5
    assert 0.5 < bits < 1.5  # it knows English


def test_its_export_opens_as_the_same_llama(run, theirs, tmp_path):
    """Bit for bit what transformers reads of the GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(export(run, tmp_path / "out"))
    ours, expected = found.state_dict(), theirs.state_dict()
    assert type(found) is type(theirs)
    assert ours.keys() == expected.keys()
    for name in ours:
        assert torch.equal(ours[name], expected[name]), name
    assert found.config.max_position_embeddings == 8192


def test_its_tokenizer_is_that_of_transformers(run, gguf, windows):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    ours = tokenizers.load(run.tokenizer_json(), run.config().data.end_token)
    text = ours.decode(np.concatenate([window["tokens"] for window in windows]))
    for sentence in (
        *text.split("\n"),
        "naïve café — 日本語 😀\t x  y",
        "It's 10:45; I'll pay $3.50",
    ):
        assert (
            ours.encode(sentence).tolist() == theirs(sentence, add_special_tokens=False).input_ids
        )


def test_it_knows_the_capital_of_france(run):
    from launch import generate

    prompt = ["--prompt", "The capital of France is", "--temperature", "0", "--new-tokens", "4"]
    with pytest.MonkeyPatch.context() as patch:
        import io
        import sys

        patch.setattr(sys, "stdout", out := io.StringIO())
        generate.main([str(run.path), *prompt])
    assert out.getvalue().startswith("The capital of France is Paris")


@pytest.mark.parametrize(
    ("policy", "passes"),
    [
        ("window:keep=0.4", True),
        ("h2o:keep=0.4", True),
        ("snapkv:keep=0.4", True),
        ("adakv:keep=0.4", True),
        ("fastgen:T=0.95", True),
        ("fastgen:T=0.8,recent=32", True),
        # Its heads keep what they attend to most, which is the first token: see docs/eviction.md.
        ("fastgen:T=0.8", False),
    ],
)
def test_a_list_among_the_newest_tokens_is_read_again(run, devices, policy, passes):
    """Public implementations passed tests of exactness, and were wrong in every task."""
    devices(1)
    _, model = load(run)
    tokenizer = open_session(run, run.config().placement.data_dir, batch_size=1).tokenizer
    examples = make_examples("recency", count=4, length=1000)
    scores = recall_scores(model, tokenizer, parse(policy), examples)
    assert scores["rank1_by_full_forward"] == 1
    assert scores["kept_of_prompt"] < 0.75
    assert (scores["rank1"] == 1 and scores["kl"] < 0.1) == passes
