"""Runs as directories that transformers opens.

A model without sharing, with kv_norm = block, is a plain Llama, or a DeepSeek-V2 without experts if its keys
and values are latents. Any other comes with modeling_cla.py, one
PyTorch file, and is opened with `trust_remote_code=True`.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from cla_jax import checkpoint
from cla_jax import mesh as meshes
from cla_jax.config import LatentKV, MeshConfig, ModelConfig, SwiGLU, YarnScaling
from cla_jax.data import tokenizers
from cla_jax.interop import deepseek, names, safetensors
from cla_jax.messages import near_choice
from cla_jax.runs import Run

_DTYPES = {"float32": "F32", "bfloat16": "BF16"}
_RECORD = "export.json"  # says from what run; its presence, that the directory may be replaced
_MODELING = "modeling_cla"


def export(
    run: Run,
    directory: str | os.PathLike[str],
    dtype: str = "float32",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Writes the newest checkpoint of a run to a directory: whole, or not at all.

    Raises ValueError if the run has no checkpoint, or if the directory holds what is not an export.
    """
    near_choice("dtype", dtype, _DTYPES)
    path = Path(directory)
    if path.exists() and not (path / _RECORD).is_file():
        raise ValueError(
            f"{path} exists and is not an export: remove it, or choose another directory"
        )
    config = run.config()
    mesh = meshes.make_mesh(MeshConfig(), jax.devices()[:1])
    step, model = checkpoint.load_model(run, meshes.axis_rules(config.model, mesh), mesh)
    tokenizer = tokenizers.load(run.tokenizer_json(), config.data.end_token)
    origin = run.origin()
    max_length = origin.get("max_length") or config.data.seq_len
    written = hf_config(config.model, max_length) | {"dtype": dtype}
    # Here a document begins and ends with one token; an imported model may have another to begin with.
    begin = config.data.begin_token or origin.get("begin_token") or tokenizer.end_token
    end, *others = run.end_ids(tokenizer.end, config.model.vocab_size)
    ends: dict[str, Any] = {"eos_token_id": [end, *others] if others else end, "pad_token_id": end}
    ends["bos_token_id"] = tokenizers.token_id(tokenizer.to_json(), begin)
    of_tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "bos_token": begin,
        **dict.fromkeys(("eos_token", "pad_token"), config.data.end_token),
    }
    if template := origin.get("chat_template"):
        of_tokenizer["chat_template"] = template
    partial = path.parent / f".{path.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    try:
        tensors = names.from_model(model)
        if isinstance(config.model.kv, LatentKV):
            tensors = deepseek.foreign_tensors(tensors, config.model)
        safetensors.write(partial / "model.safetensors", tensors, _DTYPES[dtype], progress)
        _write(partial / "config.json", written | ends)
        _write(partial / "generation_config.json", ends)
        (partial / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
        _write(partial / "tokenizer_config.json", of_tokenizer)
        if written["model_type"] == "cla":
            shutil.copy(Path(__file__).with_name(f"{_MODELING}.py"), partial)
        _write(partial / _RECORD, {"run": str(run.path), "step": step, "origin": origin})
        if path.exists():
            shutil.rmtree(path)
        os.rename(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return path


def hf_config(model: ModelConfig, max_length: int) -> dict[str, Any]:
    """The config.json of a model: that of a Llama where it is one."""
    fields: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.n_kv_heads,
        "head_dim": model.d_head,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": _rope_parameters(model),
        "max_position_embeddings": max_length,
        "attention_bias": model.bias,
        "mlp_bias": model.bias,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
    }
    if not isinstance(model.mlp, SwiGLU):
        raise ValueError(
            f"model.mlp.kind = {model.mlp.kind}: only models with swiglu can be exported"
        )
    if model.qk_norm:
        raise ValueError(
            "model.qk_norm = True: a model with norms of queries and keys cannot be exported"
        )
    kv_map = list(model.resolved_kv_map)  # raises if keys and values have maps of their own
    if isinstance(model.kv, LatentKV):
        return deepseek.hf_config(fields, model)
    if is_llama(model):
        return {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | fields
    return {
        "model_type": "cla",
        "architectures": ["ClaForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{_MODELING}.ClaConfig",
            "AutoModel": f"{_MODELING}.ClaModel",
            "AutoModelForCausalLM": f"{_MODELING}.ClaForCausalLM",
        },
        **fields,
        "kv_map": kv_map,
        "kv_norm": model.kv_norm,
        "windows": list(model.resolved_windows),
    }


def is_llama(model: ModelConfig) -> bool:
    """Whether transformers' Llama computes the same; it asks for widths that the heads divide."""
    return (
        model.n_kv_layers == model.n_layers
        and model.kv_norm == "block"
        and not any(model.resolved_windows)
        and model.d_model % model.n_heads == 0
    )


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling = model.rope_scaling
    fields = dataclasses.asdict(scaling)
    kind = fields.pop("kind")
    if isinstance(scaling, YarnScaling):
        fields["attention_factor"] = scaling.resolved_attention_factor
    return {
        "rope_type": "default" if kind == "none" else kind,
        "rope_theta": model.rope_theta,
        **fields,
    }


def _write(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
