"""What the tests of foreign formats share: models made up on the spot, in and out."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax.config import LatentKV, ModelConfig
from cla_jax.data import tokenizers
from cla_jax.interop import deepseek, names, safetensors
from cla_jax.interop.export import hf_config
from cla_jax.interop.foreign import Foreign, import_run
from cla_jax.interop.text import Text
from cla_jax.model.transformer import ForwardOptions
from cla_jax.runs import Run
from cla_jax.state import named
from tests import reference

# Where transformers puts the modules of a model; nothing is looked up elsewhere.
os.environ.setdefault("HF_HOME", os.path.join(tempfile.gettempdir(), "cla_jax-test-huggingface"))
os.environ["HF_HUB_OFFLINE"] = "1"

MODEL = ModelConfig(
    vocab_size=264,
    n_layers=4,
    d_model=48,
    d_ff=64,
    n_heads=4,
    n_kv_heads=2,
    d_head=10,
    kv_norm="block",
    compute_dtype="float32",
)
END = "<|endoftext|>"


def make_run(path: Path, seed: int = 0, **changes) -> Run:
    """A run directory with a random model: MODEL with fields replaced."""
    config = dataclasses.replace(MODEL, **changes)
    return import_run(
        foreign(config, seed), path, Text(seq_len=64, data_dir=str(path.parent / "d"))
    )


def foreign(config: ModelConfig, seed: int = 0) -> Foreign:
    return Foreign(
        origin={"format": "test"},
        config=config,
        tensors=names.from_model(reference.randomised(config, seed)),
        tokenizer_json=tokenizers.byte_tokenizer(END).to_json(),
        end_token=END,
    )


def logits(model, tokens) -> np.ndarray:
    """Scores [B, T, V] by full forward."""
    model = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), model)  # off any mesh
    return np.asarray(
        jax.jit(lambda m, t: m.logits(t, ForwardOptions()))(model, jnp.asarray(tokens))
    )


def tokens(batch: int, length: int, vocabulary: int = 256, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (batch, length))


def assert_equal_models(a, b) -> None:
    """Bit for bit, every parameter."""
    ours, theirs = named(a), named(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name]), np.asarray(theirs[name]), name)


def write_hf(directory: Path, config: ModelConfig = MODEL, seed: int = 0, **keys) -> Path:
    """A directory as Hugging Face's libraries write it, with keys of config.json replaced (None: removed)."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = names.from_model(reference.randomised(config, seed))
    if isinstance(config.kv, LatentKV):
        tensors = deepseek.foreign_tensors(tensors, config)
    safetensors.write(directory / "model.safetensors", tensors, "F32")
    values = hf_config(config, 64) | {"eos_token_id": 256} | keys
    values = {key: value for key, value in values.items() if value is not None or key not in keys}
    (directory / "config.json").write_text(json.dumps(values))
    (directory / "tokenizer.json").write_text(tokenizers.byte_tokenizer(END).to_json())
    return directory
