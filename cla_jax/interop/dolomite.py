"""`gpt_crosslayer` of dolomite-engine, the code that the CLA paper's authors released: names and keys.

A projection of keys and values has a norm of its own (kv_norm = own here). Its rows, and those of the
gated MLP, are two matrices in one. Later versions nest the layers of a group, name attention and MLP
otherwise, and say heads and widths layer by layer.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from cla_jax import kv_map as kv_maps
from cla_jax.config import ModelConfig, RopeScaling
from cla_jax.interop.keys import Keys
from cla_jax.interop.names import Tensor
from cla_jax.messages import shown

_ATTENTION, _MLP = ("attn", "sequence_mixer"), ("mlp", "mlp_block")


def config(keys: Keys, rope_theta: float, rope_scaling: RopeScaling) -> ModelConfig:
    """The model of such a config.json."""
    for key, only in (("position_embedding_type", "rope"), ("normalization_function", "rmsnorm")):
        if (given := keys.take(key, None)) != only:
            raise ValueError(f"key {key} = {shown(given)} is not supported, only {only!r}")
    keys.only("scale_attn_weights", True)
    keys.only("joint_residual_stream", False)
    for multiplier in ("m_emb", "m_width", "m_residual", "attention_multiplier"):
        if multiplier in keys:
            raise ValueError(
                f"key {multiplier} = {keys.take(multiplier)} is not supported, only null"
            )
    for training in _TRAINING:
        keys.take(training, None)
    n_layers = _first(keys, "num_layers", "n_layer", "num_hidden_layers")
    d_model = _first(keys, "hidden_size", "n_embd")
    n_heads = _first(keys, "num_attention_heads", "n_head")
    mixers = _blocks(keys, ("sequence_mixer_blocks", "attention_blocks"), _MIXER)
    mlps = _blocks(keys, ("mlp_blocks",), {"mlp_block_type": "MLP"})
    kind = keys.take("attention_head_type", mixers.take("attention_head_type", "", str), str)
    default_heads = {"mha": n_heads, "mqa": 1}.get(kind)
    its_heads = mixers.take("num_key_value_heads", default_heads, int)
    n_kv_heads = keys.take("num_key_value_heads", its_heads, int)
    if n_kv_heads is None:
        raise ValueError("key num_key_value_heads is missing")
    activation = keys.take("activation_function", mlps.take("activation_function", None))
    if activation != "swiglu":
        raise ValueError(
            f"key activation_function = {shown(activation)} is not supported, only 'swiglu'"
        )
    biases = {
        keys.take("add_bias", None, bool),
        mixers.take("add_bias", None, bool),
        mlps.take("add_bias", None, bool),
    } - {None}
    if len(biases) > 1:
        raise ValueError("key add_bias differs between attention and MLP")
    d_ff = mlps.take("intermediate_size", None, int) or _first(keys, "n_inner", "intermediate_size")
    pattern = keys.take("sharing_pattern", None, list)
    made = ModelConfig(
        vocab_size=keys.take("vocab_size", kind=int),
        n_layers=n_layers,
        d_model=d_model,
        d_ff=d_ff,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_model // max(n_heads, 1),  # zero is refused there
        kv_norm="own",
        tied_embeddings=keys.take("tie_word_embeddings", True, bool),
        bias=biases.pop() if biases else True,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        norm_eps=keys.take("layer_norm_epsilon", 1e-5, float),
        init_std=keys.take("initializer_range", 0.02, float),
    )
    if pattern is None:
        return made
    try:
        return dataclasses.replace(made, kv_map=",".join(map(shown, pattern)))
    except ValueError as error:
        raise ValueError(f"key sharing_pattern = {shown(pattern)}: {error}") from None


_MIXER = {"sequence_mixer_type": "softmax_attention", "attention_block_type": "softmax_attention"}
_TRAINING = (
    *("resid_pdrop", "embd_pdrop", "attn_pdrop", "init_method", "upcast_logits_for_loss"),
    *("attention_softmax_in_fp32", "scale_attention_softmax_in_fp32", "embedding_dropout"),
    *("router_aux_loss_coef", "multi_query", "num_experts", "num_experts_per_tok"),
    *("shared_intermediate_size", "shared_n_inner", "use_aux_free_moe"),
)


def _first(keys: Keys, *names: str) -> int:
    """The value of whichever name this version gives the key."""
    given = [name for name in names if name in keys]
    return keys.take((given or list(names))[0], kind=int)


def _blocks(keys: Keys, names: tuple[str, ...], only: dict[str, str]) -> Keys:
    """What the layers, described one by one, have in common: everything, or it is refused."""
    for name in names:
        blocks = keys.take(name, [], list)
        if not blocks:
            continue
        for i, block in enumerate(blocks):
            if not isinstance(block, dict):
                raise ValueError(f"key {name}[{i}] = {shown(block)} is not of type dict")
            for key, value in block.items():
                if key in only and value != only[key]:
                    raise ValueError(f"key {name}[{i}].{key} = {shown(value)} is not supported")
                if value != blocks[0].get(key):
                    raise ValueError(f"key {name}[{i}].{key} differs from layer to layer")
        return Keys(blocks[0], f"{name}[0].")
    return Keys({})


# -------------------------------------------------------------------------------------- tensors


def renamed(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The tensors under the names of a Llama, those that are two matrices cut in two.

    Names that are not understood stay as they are, and are then reported.
    """
    groups = config.sharing.groups
    nested = any(".layers." in name for name in tensors)
    llama = {}
    for name, tensor in tensors.items():
        for new, part in _cut(name, tensor, groups, nested, config):
            if new in llama:
                raise ValueError(f"tensor {name}: another tensor is also {new}")
            llama[new] = part
    return llama


def _cut(
    name: str, tensor: Tensor, groups: tuple[kv_maps.Group, ...], nested: bool, config: ModelConfig
) -> list[tuple[str, Tensor]]:
    whole = {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "transformer.ln_f.weight": "model.norm.weight",
    }
    if name in whole:
        return [(whole[name], tensor)]
    words = name.split(".")
    if words[:2] != ["transformer", "h"] or len(words) < 4 or not _is_layer(words[2]):
        return [(name, tensor)]
    layer, rest = int(words[2]), words[3:]
    if nested:  # the number is that of a group
        if layer >= len(groups):
            return [(name, tensor)]
        layer = groups[layer].first
        if rest[0] == "layers" and len(rest) > 2 and _is_layer(rest[1]):
            layer, rest = layer + int(rest[1]), rest[2:]
    prefix, kind = f"model.layers.{layer}", rest[-1]
    match rest[:-1]:
        case ["kv_proj", "ln"]:
            return [(f"{prefix}.self_attn.kv_norm.{kind}", tensor)]
        case ["kv_proj", "kv_attn"]:  # head by head: the rows of its keys, then of its values
            targets = [f"{prefix}.self_attn.{kv}_proj.{kind}" for kv in "kv"]
            return list(zip(targets, _halves(name, tensor, config.n_kv_heads), strict=True))
        case ["ln_1"]:
            return [(f"{prefix}.input_layernorm.{kind}", tensor)]
        case ["ln_2"]:
            return [(f"{prefix}.post_attention_layernorm.{kind}", tensor)]
        case [part, "q_attn"] if part in _ATTENTION:
            return [(f"{prefix}.self_attn.q_proj.{kind}", tensor)]
        case [part, "c_proj"] if part in _ATTENTION:
            return [(f"{prefix}.self_attn.o_proj.{kind}", tensor)]
        case [part, "c_fc"] if part in _MLP:  # what is multiplied, then what gates it
            targets = [f"{prefix}.mlp.{which}_proj.{kind}" for which in ("up", "gate")]
            return list(zip(targets, _halves(name, tensor, 1), strict=True))
        case [part, "c_proj"] if part in _MLP:
            return [(f"{prefix}.mlp.down_proj.{kind}", tensor)]
    return [(name, tensor)]


def _is_layer(word: str) -> bool:
    return word.isascii() and word.isdecimal() and len(word) <= 9


def _halves(name: str, tensor: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """The first and the second half of the rows of every block. Raises ValueError if it has no halves."""
    rows, *columns = tensor.shape or (1,)
    if rows % (2 * blocks):
        raise ValueError(f"tensor {name} has {rows} rows, which are not two halves of {blocks}")
    shape = (rows // 2, *columns)

    def half(i: int) -> Tensor:
        def read() -> np.ndarray:
            cut = tensor.read().reshape(blocks, 2, -1, *columns)
            return np.ascontiguousarray(cut[:, i].reshape(shape))

        return Tensor(shape, read)

    return half(0), half(1)
