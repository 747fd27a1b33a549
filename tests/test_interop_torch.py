"""Beside transformers: the same logits from the same weights, in both directions."""

import dataclasses

import jax
import numpy as np
import pytest

from cla_jax import kv_map as kv_maps
from cla_jax.cache import cache_spec
from cla_jax.data import tokenizers
from cla_jax.decode import decoding_weights
from cla_jax.generate import Sampling, generate
from cla_jax.interop import hf, names
from cla_jax.interop.export import export, is_llama
from tests import interop, reference

pytestmark = pytest.mark.interop


@pytest.fixture(autouse=True)
def _few_threads():
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
# (heads, KV heads, d_head, tied, theta, scaling, biases)
LLAMAS = {
    "mha-46": (4, 4, 46, True, 1e4, {}, False),
    "mha-64-untied": (2, 2, 64, False, 5e5, {}, False),
    "gqa-90-bias": (4, 2, 90, False, 1e4, {}, True),
    "gqa-64": (6, 2, 64, True, 1e5, {}, False),
    "mqa-128": (2, 1, 128, True, 1e6, {}, False),
    "mqa-46-untied": (6, 1, 46, False, 500.0, {}, False),
    "linear": (4, 2, 64, True, 1e4, {"rope_type": "linear", "factor": 4.0}, False),
    "llama3": (4, 2, 64, False, 5e5, LLAMA3, False),
    "yarn": (4, 1, 64, True, 1e4, YARN, False),
    "yarn-factor": (2, 2, 46, True, 1e4, YARN | {"attention_factor": 0.9, "beta_fast": 8.0}, False),
}


def llama(heads, kv_heads, d_head, tied, theta, scaling, bias):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=260,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=d_head,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": theta} | scaling,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.15,
        max_position_embeddings=256,
        eos_token_id=256,
    )
    return randomised(LlamaForCausalLM(config).eval())


def randomised(model):
    """Norms and biases too, which start as ones and zeros."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.2 * torch.randn_like(parameter)
    return model


def saved(model, directory, **options):
    model.save_pretrained(directory, **options)
    (directory / "tokenizer.json").write_text(tokenizers.byte_tokenizer(interop.END).to_json())
    return directory


def torch_logits(model, tokens, **options) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.as_tensor(tokens), **options).logits.float().numpy()


def assert_close(a, b, bound=1e-4) -> None:
    """The greatest difference of logits is printed: docs/interop.md quotes it (pytest -rP)."""
    difference = np.abs(a - b).max()
    print(f"max |dlogit| {difference:.2e}, std of logits {b.std():.2f}")
    assert b.std() > 0.3  # not a comparison of zeros
    assert difference <= bound


@pytest.mark.parametrize("case", LLAMAS)
def test_a_random_llama_has_the_same_logits(tmp_path, case):
    theirs = llama(*LLAMAS[case])
    found = hf.read(saved(theirs, tmp_path))
    assert found.notes == ()
    tokens = interop.tokens(2, 96)
    config = dataclasses.replace(found.config, compute_dtype="float32")
    ours = interop.logits(names.to_model(found.tensors, config), tokens)
    expected = torch_logits(theirs, tokens)
    assert_close(ours, expected)


def test_mistral_sees_as_many_tokens(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=260,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=7,
        initializer_range=0.2,
        eos_token_id=256,
    )
    theirs = randomised(MistralForCausalLM(config).eval())
    found = hf.read(saved(theirs, tmp_path))
    assert found.config.windows == "7"
    tokens = interop.tokens(1, 40)
    config = dataclasses.replace(found.config, compute_dtype="float32")
    ours = interop.logits(names.to_model(found.tensors, config), tokens)
    assert_close(ours, torch_logits(theirs, tokens))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_shards_and_half_precision_are_read_as_stored(tmp_path, dtype):
    import torch

    theirs = llama(*LLAMAS["gqa-64"]).to(getattr(torch, dtype))
    saved(theirs, tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    found = hf.read(tmp_path)
    parameters = dict(theirs.named_parameters())
    assert found.tensors.keys() == parameters.keys()
    for name, tensor in found.tensors.items():
        np.testing.assert_array_equal(tensor.read(), parameters[name].detach().float().numpy())


# --------------------------------------------------------------------------------------- export

EXPORTED = {
    "cla2": {"kv_map": "cla:2", "kv_norm": "own"},
    "cla3-untied-bias": {
        "kv_map": "cla:3",
        "n_layers": 5,
        "tied_embeddings": False,
        "bias": True,
        "n_kv_heads": 1,
    },
    "keep-ends": {"kv_map": "keep-ends", "n_layers": 6, "kv_norm": "own", "n_kv_heads": 4},
    "lent": {"kv_map": "0,0,2,0,2,5", "n_layers": 6, "kv_norm": "own"},
    "windows": {"kv_map": "cla:2", "windows": "5,5,0,0"},
    "llama3": {"kv_map": "cla:2", "rope_scaling": "llama3:8:1:4:16"},
    "yarn": {"kv_map": "cla:2", "rope_scaling": "yarn:4:32:1:16:1.1"},
    "linear-identity": {"kv_norm": "own", "rope_scaling": "linear:2"},
    "llama": {"d_head": 12},
}


def opened(directory, **options):
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, attn_implementation="sdpa", **options
    )
    return found.eval()


@pytest.fixture
def exported(tmp_path, request):
    run = interop.make_run(tmp_path / "run", **EXPORTED[request.param])
    directory = export(run, tmp_path / "exported")
    return run.config().model, opened(directory), directory


def parameters(config):
    return reference.randomised(config)


@pytest.mark.parametrize("exported", EXPORTED, indirect=True)
def test_an_export_has_the_same_logits(exported):
    config, theirs, _ = exported
    assert is_llama(config) == (type(theirs).__name__ == "LlamaForCausalLM")
    tokens = interop.tokens(2, 48)
    expected = interop.logits(parameters(config), tokens)
    assert_close(torch_logits(theirs, tokens), expected)


@pytest.mark.parametrize("exported", EXPORTED, indirect=True)
def test_an_export_generates_the_same_tokens_from_the_producers_cache(exported):
    import torch

    config, theirs, _ = exported
    prompts = interop.tokens(2, 9)
    model = jax.tree.map(jax.numpy.asarray, parameters(config))
    spec = cache_spec(config, "dense", batch=2, capacity=40, chunk=16)
    ours = generate(
        decoding_weights(model),
        spec,
        prompts.tolist(),
        new_tokens=20,
        stop=[],
        sampling=Sampling(temperature=0),
    )
    out = theirs.generate(
        torch.as_tensor(prompts),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=-1,
        return_dict_in_generate=True,
    )
    assert out.sequences[:, 9:].tolist() == [list(completion.tokens) for completion in ours]
    arrays = [
        array
        for layer in out.past_key_values.layers
        for array in (layer.keys, layer.values)
        if array is not None
    ]
    # Two rows; the last token was never put in.
    per_token = 2 * config.n_kv_heads * config.d_head * 4
    assert sum(array.numel() * array.element_size() for array in arrays) == (
        2 * 28 * per_token * len(kv_maps.slots(config.resolved_kv_map))
    )


@pytest.mark.parametrize("exported", ["cla2", "windows"], indirect=True)
def test_padding_on_the_left_changes_nothing(exported):
    import torch

    _, theirs, directory = exported
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    assert tokenizer.pad_token == tokenizer.eos_token == interop.END
    texts = ["Fellow citizens", "a"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1}
    together = theirs.generate(batch.input_ids, attention_mask=batch.attention_mask, **options)
    for row, text in zip(together, texts, strict=True):
        alone = tokenizer(text, return_tensors="pt").input_ids
        assert alone[0].tolist() == list(text.encode())
        single = theirs.generate(alone, attention_mask=torch.ones_like(alone), **options)
        assert row[-12:].tolist() == single[0, -12:].tolist()


@pytest.mark.parametrize("exported", ["cla2"], indirect=True)
def test_an_export_is_trained_on_by_the_labels(exported):
    import torch

    _, theirs, _ = exported
    tokens = torch.as_tensor(interop.tokens(2, 16))
    out = theirs(tokens, labels=tokens)
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert out.loss.item() == pytest.approx(expected.item())
    out.loss.backward()
    assert all(parameter.grad is not None for parameter in theirs.parameters())


def test_bfloat16_is_the_rounded_model(tmp_path):
    import torch

    run = interop.make_run(tmp_path / "run", kv_map="cla:2")
    theirs = opened(export(run, tmp_path / "exported", "bfloat16"))
    ours = names.from_model(parameters(run.config().model))
    assert theirs.dtype == torch.bfloat16
    for name, parameter in theirs.named_parameters():
        expected = torch.tensor(ours[name].read()).bfloat16()
        assert torch.equal(parameter, expected), name
