"""Directories of Hugging Face models: config.json, safetensors, tokenizer.json.

Llama, Mistral, and `deepseek_v2` (latents without experts). Also the public formats in which layers share
keys and values: `gpt_crosslayer` of dolomite-engine (`sharing_pattern`), `lckv-llama` of LCKV
(`layer_types`), and `cla`, which `cla_jax.interop.export` writes. What the model here cannot express is
refused, naming the key.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cla_jax import files
from cla_jax.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    NoScaling,
    RopeScaling,
    YarnScaling,
)
from cla_jax.data import tokenizers
from cla_jax.interop import deepseek, dolomite, names, safetensors
from cla_jax.interop.foreign import Foreign
from cla_jax.interop.keys import Keys
from cla_jax.interop.names import Tensor
from cla_jax.messages import near_choice, shown
from cla_jax.typed_numbers import is_digits

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
# Constants that old checkpoints store and that follow from the config.
_CONSTANTS = (
    *("rotary_emb.inv_freq", "rotary_emb.original_inv_freq", "rotary_emb.cos_cached"),
    *("rotary_emb.sin_cached", "position_ids", "self_attn.bias", "self_attn.masked_bias"),
)
_MOST_IDS = 64  # of tokens that begin or end a text
_HEAD, _TABLE = "lm_head.weight", "model.embed_tokens.weight"


def read(directory: Path, tokenizer_json: str | None = None) -> Foreign:
    """The model of a directory.

    Args:
      directory: holds config.json, model.safetensors or its shards with their index, tokenizer.json.
      tokenizer_json: a tokenizer that stands for the directory's own.

    Raises:
      ValueError: a file is missing or damaged, or the config has what the architecture cannot express;
        names the file, tensor or key.
    """
    with files.about(directory):
        return _read(directory, tokenizer_json)


def _read(directory: Path, tokenizer_json: str | None) -> Foreign:
    values = _json(directory / "config.json")
    family = Keys(values).take("model_type", kind=str)
    near_choice(f"model_type in {directory / 'config.json'}:", family, FAMILIES)
    keys = Keys(values, defaults=DEFAULTS.get(family, {}))
    keys.take("model_type")
    if "quantization_config" in keys:
        raise ValueError(
            "key quantization_config: quantised checkpoints are not supported, only floating point"
        )
    with files.about(directory / "config.json"):
        config = FAMILIES[family](keys)
    tensors, dropped = _kept(_tensors(directory, config), config, family)
    tensors, zeros = names.with_zero_biases(tensors, config, _without_biases(keys, config))
    tokenizer_json = tokenizer_json or text(directory / "tokenizer.json")
    max_length = keys.take("max_position_embeddings", keys.take("n_positions", None, int), int)
    said = _said_of_tokens(directory)
    begins = _ids(tokenizer_json, "bos_token_id", keys, said)
    ends = _ids(tokenizer_json, "eos_token_id", keys, said)
    named = [token for i in ends if (token := tokenizers.token(tokenizer_json, i)) is not None]
    begin = next(iter(tokenizers.token(tokenizer_json, i) for i in begins), None)
    notes = [f"unknown key {key} in config.json was not used" for key in keys.unknown()]
    if zeros:
        notes.append(f"the {zeros} has no biases, unlike the other part: they were set to zero")
    if dropped:
        first = ", ".join(dropped[:4]) + (f" and {len(dropped) - 4} more" if dropped[4:] else "")
        notes.append(f"{len(dropped)} unused tensors were dropped: {first}")
    before, after = tokenizers.added_tokens(tokenizer_json)
    explicit = [said["tokenizer_config.json"].get(f"add_{k}_token") for k in ("bos", "eos")]
    if explicit != [None, None]:  # it replaces what tokenizer.json says
        before = [begin] if explicit[0] and begin else []
        after = named[:1] if explicit[1] else []
    if before[1:] or after:
        whole = " ".join([*before[1:], "TEXT", *after])
        notes.append(
            f"its tokenizer also adds special tokens around a text, {whole}; this is not supported"
        )
    origin = {"format": "hf", "path": str(directory), "model_type": family, "begin_token": begin}
    return Foreign(
        origin=origin | _chat(directory, said["tokenizer_config.json"]),
        config=config,
        tensors=tensors,
        tokenizer_json=tokenizer_json,
        end_token=next(iter(named), None),
        end_ids=tuple(ends),
        begins_with=next(iter(before), None),
        max_length=max_length,
        notes=tuple(notes),
    )


# ---------------------------------------------------------------------------------------- files


def text(file: Path) -> str:
    if file.name == "tokenizer.json" and not files.exists(file):
        raise ValueError(f"{file} is missing: give a tokenizer with --tokenizer")
    return files.read_text(file, files.TOKENIZER_BYTES)


_json = files.read_object


def _tensors(directory: Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of the one file, or of exactly the shards that an index lists."""
    # Before an index, which may have been left there; as transformers does.
    if (directory / _SINGLE).is_file():
        return safetensors.read(directory / _SINGLE)
    if not (directory / _INDEX).is_file():
        raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}")
    shard_of = _json(directory / _INDEX).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(f, str) for f in shard_of.values()):
        raise ValueError(f"{directory / _INDEX} has no weight_map of tensors to files")
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shard_of.values())):
        file = directory / shard
        if Path(shard).name != shard or not os.path.isfile(file):
            raise ValueError(f"{file}, which {_INDEX} lists, is missing")
        for name, tensor in safetensors.read(file).items():
            if shard_of.get(name) != shard and not _unneeded(name, config):
                raise ValueError(f"{file} has a tensor {name} that {_INDEX} does not place there")
            tensors[name] = tensor
    lost = shard_of.keys() - tensors.keys()
    if missing := {name for name in lost if not _unneeded(name, config)}:
        raise ValueError(f"tensor {min(missing)} is not in {shard_of[min(missing)]}")
    return tensors


def _unneeded(name: str, config: ModelConfig) -> bool:
    """Whether a tensor says nothing that the config and the other tensors do not say."""
    return name.endswith(_CONSTANTS) or (config.tied_embeddings and name == _HEAD)


def _kept(
    tensors: Mapping[str, Tensor], config: ModelConfig, family: str
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under the names of a Llama, and the names of those that no layer reads."""
    if family == "gpt_crosslayer":
        tensors = dolomite.renamed(tensors, config)
    if family == "deepseek_v2":
        tensors = deepseek.renamed(tensors, config)
    dead = set()
    if family == "lckv-llama":
        for layer, source in enumerate(config.resolved_kv_map):
            if layer != source:
                own = f"model.layers.{layer}.self_attn"
                dead |= {f"{own}.{kv}_proj.{part}" for kv in "kv" for part in ("weight", "bias")}
    if config.tied_embeddings and _HEAD in tensors:
        if _TABLE in tensors:
            _check_tied(tensors)
            dead.add(_HEAD)
        else:  # a tied tensor may be stored under either of its names
            tensors = {_TABLE if name == _HEAD else name: t for name, t in tensors.items()}
    dropped = [name for name in tensors if name in dead or name.endswith(_CONSTANTS)]
    kept = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    return kept, dropped


def _check_tied(tensors: Mapping[str, Tensor]) -> None:
    """A stored head beside tied embeddings must be the table, or it would be lost."""
    head, table = tensors[_HEAD], tensors[_TABLE]
    if table.shape != head.shape or (table.read() != head.read()).any():
        raise ValueError(
            "tie_word_embeddings is true, but lm_head.weight is not model.embed_tokens.weight"
        )


def _said_of_tokens(directory: Path) -> dict[str, dict[str, Any]]:
    """What the files beside config.json hold, as far as they are there."""
    beside = ("generation_config.json", "tokenizer_config.json")
    return {f: _json(directory / f) if files.exists(directory / f) else {} for f in beside}


def _ids(
    tokenizer_json: str, key: str, keys: Keys, said: Mapping[str, dict[str, Any]]
) -> list[int]:
    """The ids under a key of config.json, then of generation_config.json, else of the tokenizer."""
    numbers: list[int] = []
    is_given = keys.is_given(key)
    for where, value in (("", keys.take(key, None)), *((f, v.get(key)) for f, v in said.items())):
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if len(ids) > _MOST_IDS:
            raise ValueError(f"key {where and where + ': '}{key} names {len(ids):,} tokens")
        for i in ids:
            if type(i) is not int or not 0 <= i < 2**32:
                raise ValueError(
                    f"key {where and where + ': '}{key} = {shown(value)} is not a token id"
                )
            # What only a class names has to be a token for that.
            if where or is_given or tokenizers.is_special(tokenizer_json, i):
                numbers.append(i)
    if not numbers:
        token = said["tokenizer_config.json"].get(key.removesuffix("_id"))
        token = token.get("content") if isinstance(token, dict) else token
        i = tokenizers.token_id(tokenizer_json, token) if isinstance(token, str) else None
        numbers = [] if i is None else [i]
    return list(dict.fromkeys(numbers))


def _chat(directory: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The chat template, or several by name, which go with the model wherever it is exported to."""
    default, folder = directory / "chat_template.jinja", directory / "additional_chat_templates"
    in_files = {"default": text(default)} if default.is_file() else {}
    in_files |= {file.stem: text(file) for file in sorted(folder.glob("*.jinja"))}
    template = config.get("chat_template")
    if in_files:
        template = [{"name": name, "template": each} for name, each in in_files.items()]
        if in_files.keys() == {"default"}:
            template = in_files["default"]
    is_named = lambda each: (
        isinstance(each, dict) and all(isinstance(each.get(k), str) for k in ("name", "template"))
    )
    if isinstance(template, list) and not all(map(is_named, template)):
        file = directory / "tokenizer_config.json"
        raise ValueError(f"{file}: key chat_template is not a list of named templates")
    return {"chat_template": template} if isinstance(template, (str, list)) else {}


# -------------------------------------------------------------------------------------- configs


def _llama(keys: Keys) -> ModelConfig:
    """What all families have in common."""
    keys.only("hidden_act", "silu")
    biases = [keys.take(f"{part}_bias", False, bool) for part in _PARTS]
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
        bias=any(biases),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=keys.take("rms_norm_eps", 1e-6, float),
        init_std=keys.take("initializer_range", 0.02, float),
    )


_PARTS = ("attention", "mlp")


def _without_biases(keys: Keys, config: ModelConfig) -> str | None:
    """The part of a layer, if one of two, that has no biases."""
    without = [part for part in _PARTS if not keys.take(f"{part}_bias", False)]
    return without[0] if config.bias and len(without) == 1 else None


def _mistral(keys: Keys) -> ModelConfig:
    window = keys.take("sliding_window", 0, int)
    _every_layer(keys, "sliding_attention" if window else "full_attention")
    return dataclasses.replace(_llama(keys), windows=str(window))


def _every_layer(keys: Keys, kind: str) -> None:
    if any(each != kind for each in keys.take("layer_types", [], list)):
        raise ValueError(f"key layer_types: only {kind} in every layer is supported")


def _cla(keys: Keys) -> ModelConfig:
    return dataclasses.replace(
        _llama(keys),
        kv_map=_integers(keys, "kv_map") if "kv_map" in keys else "identity",
        windows=_integers(keys, "windows") if "windows" in keys else "0",
        kv_norm=keys.take("kv_norm", kind=str),
    )


def _integers(keys: Keys, key: str) -> str:
    values = keys.take(key, kind=list)
    if not values or not all(files.is_a(value, int) for value in values):
        raise ValueError(f"key {key} = {shown(values)} is not a list of integers, one a layer")
    return ",".join(map(str, values))


def _lckv(keys: Keys) -> ModelConfig:
    """LCKV: the entry of a layer is the layer whose keys and values it reads, `s` after it a window."""
    config = _llama(keys)
    window = keys.take("sliding_window", 0, int)
    keys.only("force_nodiag", False)
    for training in ("forward_passes", "backward_passes", "use_sequential"):
        keys.take(training, None)  # of training with cycles, which are refused below
    each_its_own = "_".join(map(str, range(config.n_layers)))
    types = keys.take("layer_types", each_its_own, str).split("_")
    sources = [each.removesuffix("s") for each in types]
    windows = [window if each.endswith("s") else 0 for each in types]
    if not all(map(is_digits, sources)):
        raise ValueError(
            f"key layer_types = {shown('_'.join(types))} must be like 0_0_2_2, with s for a window"
        )
    try:
        return dataclasses.replace(
            config, kv_map=",".join(sources), windows=",".join(map(str, windows))
        )
    except ValueError as error:
        raise ValueError(f"key layer_types = {shown('_'.join(types))}: {error}") from None


def rope(keys: Keys) -> tuple[float, RopeScaling]:
    """(rope_theta, rope_scaling) from rope_parameters of transformers 5, or the two keys before it."""
    top = keys.take("rope_theta", 10_000.0, float)
    inner = keys.inner("rope_parameters" if "rope_parameters" in keys else "rope_scaling")
    for place in (keys, inner):
        place.only("partial_rotary_factor", 1.0)
        place.only("rope_interleaved", False)
    theta = inner.take("rope_theta", top, float)
    kind = inner.take("rope_type", inner.take("type", "default"))
    longest = keys.take("max_position_embeddings", 2048, int)
    factor = lambda: inner.take("factor", kind=float)
    original = inner.take("original_max_position_embeddings", longest, int)
    match kind:
        case "default":
            return theta, NoScaling()
        case "linear":
            return theta, LinearScaling(factor=factor())
        case "llama3":
            return theta, Llama3Scaling(
                factor=factor(),
                low_freq_factor=inner.take("low_freq_factor", kind=float),
                high_freq_factor=inner.take("high_freq_factor", kind=float),
                original_max_position_embeddings=original,
            )
        case "yarn":
            inner.only("truncate", True)
            return theta, YarnScaling(
                factor=factor(),
                beta_fast=inner.take("beta_fast", 32.0, float),
                beta_slow=inner.take("beta_slow", 1.0, float),
                original_max_position_embeddings=original,
                attention_factor=_yarn_attention(inner, factor()),
            )
    known = "default, linear, llama3 and yarn"
    raise ValueError(f"key rope_type = {shown(kind)} is not supported, only {known}")


def _yarn_attention(inner: Keys, factor: float) -> float:
    """What the rotated vectors are multiplied by, as transformers derives it."""

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    over, under = inner.take("mscale", 0.0, float), inner.take("mscale_all_dim", 0.0, float)
    if over < 0 or under < 0:
        raise ValueError(f"keys mscale = {over} and mscale_all_dim = {under} must not be negative")
    derived = grown(over) / grown(under) if over and under else grown(1.0)
    return inner.take("attention_factor", derived, float)


# What the config classes of the formats give a key that is absent (null is another thing, see keys.py).
# Sizes are left out: a config without one is damaged, and is refused by that key.
_LLAMA_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS,
    "mistral": _LLAMA_DEFAULTS
    | {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
    "lckv-llama": _LLAMA_DEFAULTS | {"sliding_window": 4096},
    "deepseek_v2": _LLAMA_DEFAULTS
    | {
        "first_k_dense_replace": 0,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
    },
    # GPTCrossLayerConfig of 2024, and CommonConfig of 2025, in dolomite-engine. What blocks describe one by
    # one has no default here; without it a config is refused.
    "gpt_crosslayer": {
        "position_embedding_type": "learned_absolute",
        "normalization_function": "layernorm",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "rope_theta": 10_000,
        "n_positions": 1024,
        "bos_token_id": 50256,
        "eos_token_id": 50256,
        "tie_word_embeddings": True,
    },
    # ClaConfig in modeling_cla.py.
    "cla": {
        "num_key_value_heads": 1,
        "head_dim": 64,
        "kv_map": None,
        "kv_norm": "own",
        "windows": None,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
}

FAMILIES: dict[str, Callable[[Keys], ModelConfig]] = {
    "llama": _llama,
    "mistral": _mistral,
    "cla": _cla,
    "lckv-llama": _lckv,
    "deepseek_v2": lambda keys: deepseek.config(keys, _llama),
    "gpt_crosslayer": lambda keys: dolomite.config(keys, *rope(keys)),
}
