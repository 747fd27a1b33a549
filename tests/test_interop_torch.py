"""Beside transformers: the same logits from the same weights, in both directions."""

import dataclasses
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from cla_jax.cache import cache_spec
from cla_jax.config import LatentKV, LinearScaling, Llama3Scaling, Sampling, YarnScaling
from cla_jax.data import tokenizers
from cla_jax.decode import decoding_weights
from cla_jax.generate import generate
from cla_jax.interop import hf, names
from cla_jax.interop.export import export, is_llama
from cla_jax.interop.foreign import import_run
from cla_jax.interop.keys import Keys
from cla_jax.interop.text import Text
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


def deepseek(rank, turned, d_head, tied):
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        vocab_size=260,
        hidden_size=96,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        first_k_dense_replace=3,
        q_lora_rank=None,
        kv_lora_rank=rank,
        qk_nope_head_dim=d_head,
        v_head_dim=d_head,
        qk_rope_head_dim=turned,
        tie_word_embeddings=tied,
        initializer_range=0.15,
        max_position_embeddings=256,
        eos_token_id=256,
    )
    return randomised(DeepseekV2ForCausalLM(config).eval())


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


@pytest.mark.parametrize("shape", [(24, 8, 16, True), (40, 16, 12, False)])
def test_a_random_deepseek_v2_has_the_same_logits(tmp_path, shape):
    theirs = deepseek(*shape)
    found = hf.read(saved(theirs, tmp_path))
    assert found.config.kv == LatentKV(rank=shape[0], rope_dims=shape[1])
    assert found.notes == ()
    tokens = interop.tokens(2, 40)
    config = dataclasses.replace(found.config, compute_dtype="float32")
    model = names.to_model(found.tensors, config)
    expected = torch_logits(theirs, tokens)
    assert_close(interop.logits(model, tokens), expected)

    run = import_run(found, tmp_path / "run", Text(seq_len=32, data_dir=str(tmp_path / "d")))
    out = export(run, tmp_path / "out")
    np.testing.assert_array_equal(torch_logits(opened(out), tokens), expected)
    back = hf.read(out)
    assert back.config == found.config
    interop.assert_equal_models(names.to_model(back.tensors, back.config), model)

    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"first_k_dense_replace": 1}))
    with pytest.raises(ValueError, match="first_k_dense_replace = 1: layers 1 to 2 are mixtures"):
        hf.read(tmp_path)


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
    "reused": {"kv_map": "0,0,2,0,2,5", "n_layers": 6, "kv_norm": "own"},
    "windows": {"kv_map": "cla:2", "windows": "5,5,0,0"},
    "llama3": {
        "kv_map": "cla:2",
        "rope_scaling": Llama3Scaling(original_max_position_embeddings=16),
    },
    "yarn": {
        "kv_map": "cla:2",
        "rope_scaling": YarnScaling(
            factor=4.0, original_max_position_embeddings=16, attention_factor=1.1
        ),
    },
    "linear-identity": {"kv_norm": "own", "rope_scaling": LinearScaling(factor=2.0)},
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
        2 * 28 * per_token * config.n_kv_layers
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


# ------------------------------------------------------- the exported file as a part of transformers


@pytest.fixture(scope="module")
def twins():
    """A Llama, and the same weights in the exported file's own classes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cla_jax.interop.modeling_cla import ClaConfig, ClaForCausalLM

    torch.manual_seed(0)
    theirs = randomised(llama(4, 2, 24, True, 1e4, {}, False))
    keys = theirs.config.to_dict()
    for name in ("model_type", "architectures", "transformers_version"):
        keys.pop(name)
    ours = ClaForCausalLM(ClaConfig(**keys, kv_norm="block")).eval()
    ours.load_state_dict(theirs.state_dict())
    for model in (ours, theirs):
        model.set_attn_implementation("eager")
    assert isinstance(theirs, LlamaForCausalLM)
    assert isinstance(theirs.config, LlamaConfig)
    return ours, theirs


def assert_same(ours, theirs):
    import torch

    assert type(ours) is type(theirs)
    if torch.is_tensor(ours):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    elif isinstance(ours, dict):
        assert list(ours) == list(theirs)
        assert_same(tuple(ours.values()), tuple(theirs.values()))
    elif isinstance(ours, (tuple, list)):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)


def asked(*, tokens):
    """What can be asked of a forward pass, by name."""
    import torch

    padding = torch.ones_like(tokens)
    padding[0, :3] = 0
    return {
        "plain": {},
        "hidden states": {"output_hidden_states": True},
        "attentions": {"output_attentions": True},
        "tuple": {"return_dict": False},
        "tuple of all": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "labels": tokens,
        },
        "last": {"logits_to_keep": 3},
        "positions": {"logits_to_keep": torch.tensor([0, 5, 2])},
        "no cache": {"use_cache": False},
        "padding": {"attention_mask": padding, "position_ids": padding.cumsum(1) - 1},
    }


def test_a_forward_pass_answers_as_a_llama_does(twins):
    import torch

    tokens = torch.as_tensor(interop.tokens(2, 12))
    with torch.no_grad():
        for name, options in asked(tokens=tokens).items():
            ours, theirs = (model(tokens, **options) for model in twins)
            if name == "padding":  # what padding itself sees is nobody's business
                ours, theirs = ours.logits[options["attention_mask"] > 0], theirs.logits
                theirs = theirs[options["attention_mask"] > 0]
            assert_same(ours, theirs)
            base = {k: v for k, v in options.items() if k not in ("labels", "logits_to_keep")}
            if name != "padding":
                assert_same(*(model.model(tokens, **base) for model in twins))


def test_what_the_exported_file_has_no_use_for_is_refused_by_name(twins):
    import torch

    tokens = torch.as_tensor(interop.tokens(1, 4))
    for call in (twins[0], twins[0].model):
        with pytest.raises(TypeError, match="does not support the argument token_type_ids"):
            call(tokens, token_type_ids=tokens)
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
            call()


@pytest.mark.parametrize("exported", ["cla2", "windows", "reused"], indirect=True)
def test_a_static_cache_generates_the_same(exported):
    import torch

    _, theirs, _ = exported
    prompts = torch.as_tensor(interop.tokens(2, 9))
    mask = torch.ones_like(prompts)
    mask[0, :4] = 0  # padding on the left
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": -1, "attention_mask": mask}
    dynamic = theirs.generate(prompts, **options)
    static = theirs.generate(prompts, cache_implementation="static", **options)
    assert static.tolist() == dynamic.tolist()


@pytest.mark.parametrize("exported", ["reused"], indirect=True)
def test_gradient_checkpointing_changes_no_gradient(exported):
    import torch

    _, theirs, _ = exported
    tokens = torch.as_tensor(interop.tokens(2, 16))
    theirs.train()

    def gradients():
        theirs.zero_grad()
        theirs(tokens, labels=tokens).loss.backward()
        return {name: p.grad.clone() for name, p in theirs.named_parameters()}

    plain = gradients()
    theirs.gradient_checkpointing_enable()
    calls = []
    theirs.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(0))
    for name, gradient in gradients().items():
        torch.testing.assert_close(gradient, plain[name], msg=name)
    assert len(calls) == 2  # it ran again for the gradients


@pytest.mark.parametrize("exported", ["cla2"], indirect=True)
def test_the_model_without_a_head_opens_by_itself(exported):
    import torch
    from transformers import AutoModel

    _, theirs, directory = exported
    base = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
    tokens = torch.as_tensor(interop.tokens(1, 8))
    with torch.no_grad():
        assert_same(base(tokens).last_hidden_state, theirs.model(tokens).last_hidden_state)


# ------------------------------------------------------------------------------- class defaults


def resolved(values, directory):
    """What our reader makes of a config: the model, and the tokens; or its refusal."""
    (directory / "config.json").write_text(json.dumps(values))
    keys = Keys(values, defaults=hf.DEFAULTS[values["model_type"]])
    try:
        model = hf.FAMILIES[values["model_type"]](keys)
    except ValueError as error:
        return str(error)
    ids = {key: keys.take(key, None) for key in ("bos_token_id", "eos_token_id")}
    maps = {"kv_map": model.resolved_kv_map, "windows": model.resolved_windows}
    return (
        dataclasses.asdict(model)
        | maps
        | ids
        | {"length": keys.take("max_position_embeddings", None)}
    )


def spelled_out(config) -> dict:
    """A config of transformers with no key left to defaults: none is absent or null that has a meaning."""
    keys = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings"),
        *("initializer_range", "rms_norm_eps", "tie_word_embeddings", "rope_parameters"),
        *("attention_bias", "mlp_bias", "sliding_window", "kv_map", "kv_norm", "windows"),
        *("bos_token_id", "eos_token_id", "model_type"),
    )
    return {key: getattr(config, key) for key in keys if hasattr(config, key)}


@pytest.mark.parametrize("family", ["llama", "mistral", "cla", "deepseek_v2"])
def test_a_key_that_is_absent_or_null_means_what_the_class_says(tmp_path, family):
    """Key by key: a version of transformers that changes a default fails here."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from cla_jax.interop.modeling_cla import ClaConfig

    class_of = {
        "llama": transformers.LlamaConfig,
        "mistral": transformers.MistralConfig,
        "cla": ClaConfig,
        "deepseek_v2": transformers.DeepseekV2Config,
    }[family]
    whole = {
        "model_type": family,
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "hidden_act": "silu",
        "max_position_embeddings": 77,
        "initializer_range": 0.05,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": class_of().tie_word_embeddings is False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 77.0},
        "bos_token_id": 7,
        "eos_token_id": 8,
    }
    if family == "mistral":
        whole["sliding_window"] = 9
    else:
        whole |= {"attention_bias": True, "mlp_bias": True}
    if family == "cla":
        whole |= {"kv_map": [0, 0, 2, 2], "kv_norm": "block", "windows": [5, 5, 0, 0]}
    compared, refused = 0, []
    without = [({k: v for k, v in whole.items() if k != key}, key) for key in whole]
    nulled = [(whole | {key: None}, key) for key in whole]
    for values, key in [(whole, "nothing"), *without, *nulled]:
        if key == "model_type":
            continue
        ours = resolved(values, tmp_path)
        try:
            config = class_of(**{k: v for k, v in values.items() if k != "model_type"})
        except (ValueError, TypeError, StrictDataclassError):  # its own validation refuses
            continue
        theirs = resolved(spelled_out(config), tmp_path)
        if isinstance(ours, str) and ours != theirs:  # a value that fits no head is refused in both
            assert key in ours, (key, ours)
            refused.append(key)
            continue
        assert ours == theirs, key
        compared += 1
    # Sizes alone are refused where they are absent.
    assert set(refused) <= set(hf_sizes())
    assert compared > 15


def hf_sizes():
    return (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
        "num_attention_heads",
    )


def test_chat_templates_of_an_export_are_those_of_the_model(tmp_path):
    from transformers import AutoTokenizer

    named = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
    foreign = interop.foreign(interop.MODEL)
    foreign = dataclasses.replace(foreign, origin=foreign.origin | {"chat_template": named})
    run = import_run(foreign, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(export(run, tmp_path / "out"))
    assert tokenizer.chat_template == {"default": "A", "rag": "B"}


def test_the_example_in_the_documentation_runs_in_a_terminal(tmp_path):
    """In a pseudo-terminal, where a question to the user would wait for an answer."""
    run = interop.make_run(tmp_path / "run", kv_map="cla:2")
    directory = export(run, tmp_path / "DIR")
    docs = Path(__file__).parent.parent / "docs" / "interop.md"
    (example,) = re.findall(r"```python\n(.*?)```", docs.read_text(), re.DOTALL)
    program = example.replace('"DIR"', repr(str(directory))) + '\nprint("THE END")\n'
    ours, theirs = pty.openpty()
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    streams = {"stdin": theirs, "stdout": theirs, "stderr": theirs}
    with subprocess.Popen([sys.executable, "-c", program], env=environment, **streams) as process:
        os.close(theirs)
        said = b""
        while b"[y/N]" not in said:
            try:
                piece = os.read(ours, 4096)
            except OSError:  # how Linux says that the other side is closed
                piece = b""
            if not piece:
                break
            said += piece
        process.kill()
    os.close(ours)
    assert b"[y/N]" not in said
    assert b"THE END" in said, said.decode()
