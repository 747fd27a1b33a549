"""Directories of Hugging Face models: config.json, safetensors, tokenizer.json.

Llama and Mistral, and the public formats in which layers share keys and values: `gpt_crosslayer` of
dolomite-engine (`sharing_pattern`), `lckv-llama` of LCKV (`layer_types`), and `cla`, which
`cla_jax.interop.export` writes. What the model here cannot express is refused, naming the key.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cla_jax.config import ModelConfig, near_choice
from cla_jax.data import tokenizers
from cla_jax.interop import dolomite, safetensors
from cla_jax.interop.foreign import Foreign
from cla_jax.interop.keys import Keys
from cla_jax.interop.names import Tensor

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Constants that old checkpoints store and that follow from the config.
_CONSTANTS = (".rotary_emb.inv_freq",)


def read(directory: Path, tokenizer_json: str | None = None) -> Foreign:
    """The model of a directory.

    Args:
      directory: holds config.json, model.safetensors or its shards with their index, tokenizer.json.
      tokenizer_json: a tokenizer that stands for the directory's own.

    Raises:
      ValueError: a file is missing or damaged, or the config has what the architecture cannot express;
        names the file, tensor or key.
    """
    values = _json(directory / "config.json")
    keys = Keys(values)
    family = keys.take("model_type", kind=str)
    near_choice(f"model_type in {directory / 'config.json'}:", family, FAMILIES)
    if "quantization_config" in keys:
        raise ValueError(
            "key quantization_config: quantised checkpoints are not readable, only float"
        )
    try:
        config = FAMILIES[family](keys)
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'}: {error}") from None
    tensors, dropped = _kept(_tensors(directory), config, family)
    tokenizer_json = tokenizer_json or text(directory / "tokenizer.json")
    max_length = keys.take("max_position_embeddings", keys.take("n_positions", None, int), int)
    begin, end = (_token(tokenizer_json, key, keys) for key in ("bos_token_id", "eos_token_id"))
    notes = [f"unknown key {key} in config.json was not used" for key in keys.unknown()]
    if dropped:
        shown = ", ".join(dropped[:4]) + (f" and {len(dropped) - 4} more" if dropped[4:] else "")
        notes.append(f"{len(dropped)} tensors that nothing reads were dropped: {shown}")
    if tokenizers.adds_special_tokens(tokenizer_json):
        notes.append("its tokenizer puts special tokens around a text; here none are put there")
    origin = {"format": "hf", "path": str(directory), "model_type": family, "begin_token": begin}
    return Foreign(
        origin=origin | _chat(directory),
        config=config,
        tensors=tensors,
        tokenizer_json=tokenizer_json,
        end_token=end,
        max_length=max_length,
        notes=tuple(notes),
    )


# ---------------------------------------------------------------------------------------- files


def text(file: Path) -> str:
    if not file.is_file():
        advice = "; give one with --tokenizer" if file.name == "tokenizer.json" else ""
        raise ValueError(f"{file} is missing{advice}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not text: {error}") from error


def _json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(text(file))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    return values


def _tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of the one file, or of exactly the shards that an index lists."""
    # Before an index, which may have been left there; as transformers does.
    if (directory / _SINGLE).is_file():
        return safetensors.read(directory / _SINGLE)
    if not (directory / _INDEX).is_file():
        raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}")
    shard_of = _json(directory / _INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(f, str) for f in shard_of.values()):
        raise ValueError(f"{directory / _INDEX} has no weight_map of tensors to files")
    found: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        file = directory / shard
        if Path(shard).name != shard or not file.is_file():
            raise ValueError(f"{file}, which {_INDEX} lists, is missing")
        for name, tensor in safetensors.read(file).items():
            if shard_of.get(name) != shard:
                raise ValueError(f"{file} has a tensor {name} that {_INDEX} does not place there")
            found[name] = tensor
    if missing := shard_of.keys() - found.keys():
        raise ValueError(f"tensor {min(missing)} is not in {shard_of[min(missing)]}")
    return found


def _kept(
    tensors: Mapping[str, Tensor], config: ModelConfig, family: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names of a Llama, and the names of those that no layer reads."""
    if family == "gpt_crosslayer":
        tensors = dolomite.renamed(tensors, config)
    dead = set()
    if family == "lckv-llama":
        for layer, source in enumerate(config.resolved_kv_map):
            if layer != source:
                own = f"model.layers.{layer}.self_attn"
                dead |= {f"{own}.{kv}_proj.{part}" for kv in "kv" for part in ("weight", "bias")}
    if config.tied_embeddings and "lm_head.weight" in tensors:
        _check_tied(tensors)
        dead.add("lm_head.weight")
    dropped = [name for name in tensors if name in dead or name.endswith(_CONSTANTS)]
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    return kept, dropped


def _check_tied(tensors: Mapping[str, Tensor]) -> None:
    """A stored head beside tied embeddings must be the table, or it would be lost."""
    head, table = tensors["lm_head.weight"], tensors.get("model.embed_tokens.weight")
    if table and (table.shape != head.shape or (table.read() != head.read()).any()):
        raise ValueError(
            "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight"
        )


def _token(tokenizer_json: str, key: str, keys: Keys) -> str | None:
    """The token whose id, or the first of whose ids, stands under a key."""
    given = keys.take(key, None)
    i = next(iter(given), None) if isinstance(given, list) else given
    if i is not None and (type(i) is not int or not 0 <= i < 2**32):
        raise ValueError(f"key {key} = {given!r} is no token id")
    return None if i is None else tokenizers.token(tokenizer_json, i)


def _chat(directory: Path) -> dict[str, str]:
    """The chat template, which goes with the model wherever it is exported to."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        return {"chat_template": text(file)}
    config = directory / "tokenizer_config.json"
    template = _json(config).get("chat_template") if config.is_file() else None
    return {"chat_template": template} if isinstance(template, str) else {}


# -------------------------------------------------------------------------------------- configs


def _llama(keys: Keys) -> ModelConfig:
    """What all families have in common."""
    keys.only("hidden_act", "silu")
    bias = keys.take("attention_bias", False, bool)
    keys.only("mlp_bias", bias)
    d_model, n_heads = (
        keys.take("hidden_size", kind=int),
        keys.take("num_attention_heads", kind=int),
    )
    d_head = keys.take("head_dim", None, int) or d_model // max(n_heads, 1)
    theta, scaling = rope(keys)
    return ModelConfig(
        vocab_size=keys.take("vocab_size", kind=int),
        n_layers=keys.take("num_hidden_layers", kind=int),
        d_model=d_model,
        d_ff=keys.take("intermediate_size", kind=int),
        n_heads=n_heads,
        n_kv_heads=keys.take("num_key_value_heads", n_heads, int),
        d_head=d_head,
        kv_norm="block",
        tied_embeddings=keys.take("tie_word_embeddings", False, bool),
        bias=bias,
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=keys.take("rms_norm_eps", 1e-6, float),
        init_std=keys.take("initializer_range", 0.02, float),
    )


def _mistral(keys: Keys) -> ModelConfig:
    window = keys.take("sliding_window", 0, int)
    _every_layer(keys, "sliding_attention" if window else "full_attention")
    return dataclasses.replace(_llama(keys), windows=str(window))


def _every_layer(keys: Keys, kind: str) -> None:
    if any(each != kind for each in keys.take("layer_types", [], list)):
        raise ValueError(f"key layer_types: only {kind} in every layer can be expressed here")


def _cla(keys: Keys) -> ModelConfig:
    return dataclasses.replace(
        _llama(keys),
        kv_map=_integers(keys, "kv_map"),
        windows=_integers(keys, "windows"),
        kv_norm=keys.take("kv_norm", kind=str),
    )


def _integers(keys: Keys, key: str) -> str:
    values = keys.take(key, kind=list)
    if not values or not all(isinstance(value, int) for value in values):
        raise ValueError(f"key {key} = {values!r} is not a list of integers, one a layer")
    return ",".join(map(str, values))


def _lckv(keys: Keys) -> ModelConfig:
    """LCKV: the entry of a layer is the layer whose keys and values it reads, `s` after it a window."""
    config = _llama(keys)
    window = keys.take("sliding_window", 4096, int)
    keys.only("force_nodiag", False)
    for training in ("forward_passes", "backward_passes", "use_sequential"):
        keys.take(training, None)  # of training with cycles, which are refused below
    types = keys.take("layer_types", kind=str).split("_")
    sources = [each.removesuffix("s") for each in types]
    windows = [window if each.endswith("s") else 0 for each in types]
    if not all(source.isdecimal() for source in sources):
        raise ValueError(f"key layer_types = {'_'.join(types)!r}: write 0_0_2_2, s for a window")
    try:
        return dataclasses.replace(
            config, kv_map=",".join(sources), windows=",".join(map(str, windows))
        )
    except ValueError as error:
        raise ValueError(f"key layer_types = {'_'.join(types)!r}: {error}") from None


def rope(keys: Keys) -> tuple[float, str]:
    """(rope_theta, rope_scaling) from rope_parameters of transformers 5, or the two keys before it."""
    top = keys.take("rope_theta", 10_000.0, float)
    inner = keys.inner("rope_parameters" if "rope_parameters" in keys else "rope_scaling")
    for place in (keys, inner):
        place.only("partial_rotary_factor", 1.0)
        place.only("rope_interleaved", False)
    theta = inner.take("rope_theta", top, float)
    kind = inner.take("rope_type", inner.take("type", "default"))
    longest = keys.take("max_position_embeddings", 2048, int)
    original = inner.take("original_max_position_embeddings", longest)
    match kind:
        case "default":
            numbers = ("none",)
        case "linear":
            numbers = ("linear", inner.take("factor", kind=float))
        case "llama3":
            low, high = inner.take("low_freq_factor"), inner.take("high_freq_factor")
            numbers = ("llama3", inner.take("factor", kind=float), low, high, original)
        case "yarn":
            inner.only("truncate", True)
            fast, slow = inner.take("beta_fast", 32.0), inner.take("beta_slow", 1.0)
            factor = inner.take("factor", kind=float)
            numbers = ("yarn", factor, fast, slow, original, _yarn_attention(inner, factor))
        case _:
            known = "default, linear, llama3 and yarn"
            raise ValueError(f"key rope_type = {kind!r} cannot be expressed, only {known}")
    if unknown := inner.unknown():
        raise ValueError(f"key {unknown[0]} of a {kind} scaling is not understood")
    return theta, ":".join(
        number if isinstance(number, str) else repr(number) for number in numbers
    )


def _yarn_attention(inner: Keys, factor: float) -> float:
    """What the rotated vectors are multiplied by, as transformers derives it."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = inner.take("mscale", 0.0, float), inner.take("mscale_all_dim", 0.0, float)
    derived = grown(over) / grown(under) if over and under else grown(1.0)
    return inner.take("attention_factor", derived, float)


FAMILIES: dict[str, Callable[[Keys], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "cla": _cla,
    "lckv-llama": _lckv,
    "gpt_crosslayer": lambda keys: dolomite.config(keys, *rope(keys)),
}
