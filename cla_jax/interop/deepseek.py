"""DeepSeek-V2 models as transformers writes them: dense layers, latent keys and values.

Two things differ from the model here. A head's rotated dimensions are interleaved there, pair by pair (0, 1),
(2, 3), ...; here dimensions i and i + half are a pair. And one matrix, kv_b_proj, makes keys and values
of a latent, head by head.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cla_jax.config import LatentKV, ModelConfig, NoScaling
from cla_jax.interop.keys import Keys
from cla_jax.interop.names import Tensor

_NORM_EPS = 1e-6  # of the norm of a latent, whatever rms_norm_eps says


def config(keys: Keys, llama: Callable[[Keys], ModelConfig]) -> ModelConfig:
    """The model of a config.json. Raises ValueError, naming the key, for what has no place here.

    `llama` reads what these models have in common with a Llama.
    """
    layers = keys.take("num_hidden_layers", kind=int)
    heads = keys.take("num_attention_heads", kind=int)
    dense = keys.take("first_k_dense_replace", kind=int)
    if dense < layers:
        raise ValueError(
            f"key first_k_dense_replace = {dense}: layers {dense} to {layers - 1} are mixtures of experts, "
            "which are not supported"
        )
    if (rank := keys.take("q_lora_rank", None)) is not None:
        raise ValueError(
            f"key q_lora_rank = {rank}: queries with a latent are not supported; it must be null"
        )
    d_head = keys.take("qk_nope_head_dim", kind=int)
    if (values := keys.take("v_head_dim", kind=int)) != d_head:
        raise ValueError(f"key v_head_dim = {values} must equal qk_nope_head_dim = {d_head}")
    if keys.take("num_key_value_heads", heads, int) != heads:
        raise ValueError("key num_key_value_heads must equal num_attention_heads")
    for unused in _OF_EXPERTS:
        keys.take(unused, None)
    latent = LatentKV(
        rank=keys.take("kv_lora_rank", kind=int), rope_dims=keys.take("qk_rope_head_dim", kind=int)
    )
    made = llama(keys)
    if (scaling := made.rope_scaling) != NoScaling():
        raise ValueError(f"key rope_parameters: {scaling.kind} is not supported with latents")
    if made.norm_eps != _NORM_EPS:
        raise ValueError(
            f"key rms_norm_eps = {made.norm_eps} must be {_NORM_EPS}, as in the norm of the latent"
        )
    return dataclasses.replace(made, d_head=d_head, n_kv_heads=1, kv=latent)


_OF_EXPERTS = (
    *("n_routed_experts", "n_shared_experts", "n_group", "topk_group", "topk_method"),
    *("routed_scaling_factor", "norm_topk_prob", "num_experts_per_tok", "moe_intermediate_size"),
    *("output_router_logits", "qk_head_dim", "aux_loss_alpha", "seq_aux", "scoring_func"),
    *("ep_size", "moe_layer_freq", "num_experts"),
)


def renamed(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors as `names` has them: pairs apart, keys and values of kv_b_proj apart."""
    assert isinstance(config.kv, LatentKV)
    N, H, R, turned = config.n_heads, config.d_head, config.kv.rank, config.kv.rope_dims
    tensors_of_llama: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        # What has another shape is left as it is: `names.check` tells of it.
        if name.endswith("self_attn.kv_b_proj.weight") and tensor.shape == (N * 2 * H, R):
            for i, part in enumerate(("keys", "values")):
                read = functools.partial(_part, tensor, N, i)
                tensors_of_llama[name.removesuffix("weight") + part] = Tensor(
                    (N * H, R), read, tensor.unreadable
                )
        elif name.endswith("self_attn.q_proj.weight") and tensor.shape[:1] == (N * (H + turned),):
            tensors_of_llama[name] = _reordered(tensor, N, turned)
        elif name.endswith("self_attn.kv_a_proj_with_mqa.weight") and tensor.shape[:1] == (
            R + turned,
        ):
            tensors_of_llama[name] = _reordered(tensor, 1, turned)
        else:
            tensors_of_llama[name] = tensor
    return tensors_of_llama


def foreign_tensors(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `renamed`."""
    assert isinstance(config.kv, LatentKV)
    N, H, R, turned = config.n_heads, config.d_head, config.kv.rank, config.kv.rope_dims
    foreign: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("self_attn.kv_b_proj.keys"):
            parts = [tensors[name.removesuffix("keys") + part] for part in ("keys", "values")]
            read = functools.partial(_joined, parts, N)
            foreign[name.removesuffix("keys") + "weight"] = Tensor((N * 2 * H, R), read)
        elif name.endswith("self_attn.q_proj.weight"):
            foreign[name] = _reordered(tensor, N, turned, back=True)
        elif name.endswith("self_attn.kv_a_proj_with_mqa.weight"):
            foreign[name] = _reordered(tensor, 1, turned, back=True)
        elif not name.endswith("self_attn.kv_b_proj.values"):
            foreign[name] = tensor
    return foreign


def hf_config(fields: dict[str, Any], model: ModelConfig) -> dict[str, Any]:
    """A config.json with the `fields` that all models have. Raises ValueError for what it cannot say."""
    assert isinstance(model.kv, LatentKV)
    scaling = model.rope_scaling.kind
    sayable = {
        "model.kv_map": (model.kv_map, model.n_kv_layers == model.n_layers, "identity"),
        "model.windows": (model.windows, not any(model.resolved_windows), "0"),
        "model.kv_norm": (model.kv_norm, model.kv_norm == "block", "block"),
        "model.rope_scaling.kind": (scaling, scaling == "none", "none"),
        "model.kv.norm": (model.kv.norm, model.kv.norm, True),
        "model.norm_eps": (model.norm_eps, model.norm_eps == _NORM_EPS, _NORM_EPS),
    }
    for field, (value, fits, only) in sayable.items():
        if not fits:
            raise ValueError(f"{field} = {value}: a DeepSeek-V2 checkpoint only supports {only}")
    own = {
        "model_type": "deepseek_v2",
        "architectures": ["DeepseekV2ForCausalLM"],
        "num_key_value_heads": model.n_heads,
        "head_dim": model.kv.rope_dims,
        "first_k_dense_replace": model.n_layers,
        "q_lora_rank": None,
        "kv_lora_rank": model.kv.rank,
        "qk_nope_head_dim": model.d_head,
        "qk_rope_head_dim": model.kv.rope_dims,
        "v_head_dim": model.d_head,
    }
    return fields | own


def _joined(parts: Sequence[Tensor], heads: int) -> np.ndarray:
    """The inverse of `_part`, of keys and values."""
    each = [part.read().reshape(heads, -1, part.shape[1]) for part in parts]
    return np.concatenate(each, axis=1).reshape(-1, each[0].shape[2])


def _part(tensor: Tensor, heads: int, i: int) -> np.ndarray:
    """Keys (0) or values (1) of a kv_b_proj, whose rows are those of head after head."""
    rows = tensor.read()
    return rows.reshape(heads, 2, -1, rows.shape[1])[:, i].reshape(-1, rows.shape[1])


def _reordered(tensor: Tensor, heads: int, turned: int, back: bool = False) -> Tensor:
    """A projection whose last dimensions of each head are pairs: first all firsts, then all seconds."""

    def read() -> np.ndarray:
        rows = tensor.read()
        each = rows.reshape(heads, -1, rows.shape[1])
        still, pairs = each[:, :-turned], each[:, -turned:]
        order = np.arange(turned).reshape(-1, 2).T.ravel()
        pairs = pairs[:, np.argsort(order) if back else order]
        return np.concatenate([still, pairs], axis=1).reshape(rows.shape)

    return Tensor(tensor.shape, read, tensor.unreadable)
