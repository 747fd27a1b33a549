"""Models in GGUF files, the format of llama.cpp: Llama architectures, float and simple quantised tensors.

    header      "GGUF", version, number of tensors and of metadata entries
    metadata    key, type, value: the config and the tokenizer
    tensors     name, dimensions (the fastest first), type, offset
    data        from the next multiple of general.alignment on; offsets count from here

Weights become float32, exactly as stored: codes times scales. llama.cpp stores the rows of query and key
projections in another order, because it rotates neighbouring dimensions. The reader reverses that.
"""

import dataclasses
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax.numpy as jnp
import numpy as np

from cla_jax import files
from cla_jax.config import LinearScaling, Llama3Scaling, ModelConfig, NoScaling, RopeScaling
from cla_jax.interop import gguf_tokenizer, names
from cla_jax.interop.foreign import Foreign
from cla_jax.interop.keys import Keys
from cla_jax.interop.names import Tensor
from cla_jax.messages import near_choice, shown

_SCALARS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
_SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
_STRING, _ARRAY = 8, 9
# Limits, above every vocabulary: of entries, tensors and elements of arrays together; of a text in bytes.
_MOST_ELEMENTS, _LONGEST_STRING = 4_000_000, 1 << 20
_LONGEST_NAME = 200

# ----------------------------------------------------------------------------------- tensor types


@dataclasses.dataclass(frozen=True)
class _Type:
    name: str
    values: int  # in a block
    bytes: int  # of a block
    decode: Callable[[np.ndarray], np.ndarray]  # uint8 [blocks, bytes] -> float32 [blocks, values]


def _floats(dtype: Any, blocks: np.ndarray) -> np.ndarray:
    return blocks.view(dtype).astype(np.float32)


def _nibbles(blocks: np.ndarray) -> np.ndarray:
    """The low halves of 16 bytes, then the high halves, float32 [blocks, 32]."""
    return np.concatenate([blocks & 15, blocks >> 4], axis=1).astype(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _floats("<f2", blocks[:, :2].copy()) * blocks[:, 2:].view(np.int8)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    return _floats("<f2", blocks[:, :2].copy()) * (_nibbles(blocks[:, 2:]) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    scale, least = _floats("<f2", blocks[:, :2].copy()), _floats("<f2", blocks[:, 2:4].copy())
    return scale * _nibbles(blocks[:, 4:]) + least


# Types that are not read, by the names that people know.
_OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K"}
_OTHER_TYPES |= {14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S"}
_OTHER_TYPES |= {20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16"}
_OTHER_TYPES |= {
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
}

_TYPES = {
    0: _Type("F32", 1, 4, functools.partial(_floats, "<f4")),
    1: _Type("F16", 1, 2, functools.partial(_floats, "<f2")),
    2: _Type("Q4_0", 32, 18, _q4_0),
    3: _Type("Q4_1", 32, 20, _q4_1),
    8: _Type("Q8_0", 32, 34, _q8_0),
    30: _Type("BF16", 1, 2, functools.partial(_floats, jnp.bfloat16)),
}

# ------------------------------------------------------------------------------------------ file


class _Cursor:
    """Reads the head of a file from front to back."""

    def __init__(self, file: Path, stream: IO[bytes]):
        self.file, self.offset, self.elements = file, 0, 0
        self.stream, self.size = stream, os.fstat(stream.fileno()).st_size

    def count(self, n: int) -> int:
        """A number of elements, if the file may have so many."""
        self.elements += n
        if self.elements > _MOST_ELEMENTS:
            raise ValueError(f"{self.file}: over {_MOST_ELEMENTS:,} elements: the file is damaged")
        return n

    def take(self, n: int) -> bytes:
        if self.offset + n > self.size:
            raise ValueError(f"{self.file} is truncated: its header ends after {self.size:,} bytes")
        self.offset += n
        return self.stream.read(n)

    def number(self, kind: str) -> Any:
        return np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0].item()

    def string(self) -> str:
        if (length := int.from_bytes(self.take(8), "little")) > _LONGEST_STRING:
            raise ValueError(f"{self.file}: a string of {length:,} bytes: the file is damaged")
        return self.take(length).decode(errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            element, count = self.number("<u4"), self.number("<u8")
            if element in _SCALARS:
                dtype = np.dtype(_SCALARS[element])
                return np.frombuffer(self.take(self.count(count) * dtype.itemsize), dtype).tolist()
            if element == _STRING:
                return [self.string() for _ in range(self.count(count))]
            kind = element  # arrays of arrays: llama.cpp does not read them either
        if kind not in _SCALARS:
            raise ValueError(
                f"{self.file}: unknown type {kind} in the metadata: the file is damaged"
            )
        return self.number(_SCALARS[kind])


def _parse(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metadata and tensors, under llama.cpp's names."""
    with files.opened(file) as stream:
        return _parse_from(_Cursor(file, stream), file)


def _parse_from(cursor: _Cursor, file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if cursor.size < 4 or cursor.take(4) != b"GGUF":
        raise ValueError(f"{file} is not a GGUF file")
    version = cursor.number("<u4")
    if version in (2 << 24, 3 << 24):
        raise ValueError(f"{file} is big-endian: only little-endian GGUF files are supported")
    if version not in (2, 3):
        raise ValueError(f"{file} is GGUF version {version}; only versions 2 and 3 are supported")
    n_tensors, n_entries = cursor.number("<u8"), cursor.number("<u8")
    metadata: dict[str, Any] = {}
    for _ in range(cursor.count(n_entries)):
        if (key := cursor.string()) in metadata:
            raise ValueError(f"{file}: key {shown(key)} occurs twice: the file is damaged")
        metadata[key] = cursor.value(cursor.number("<u4"))
    if (count := metadata.get("split.count", 1)) != 1:
        raise ValueError(
            f"{file} is one of {shown(count)} files of a split model: join them first, with llama.cpp's "
            "`llama-gguf-split --merge FIRST OUT`"
        )
    entries = []
    for _ in range(cursor.count(n_tensors)):
        name, n_dimensions = cursor.string(), cursor.number("<u4")
        if not 1 <= n_dimensions <= 4:
            raise ValueError(f"{file}: {name} has {n_dimensions} dimensions: the file is damaged")
        shape = tuple(cursor.number("<u8") for _ in range(n_dimensions))[::-1]
        entries.append((name, shape, cursor.number("<u4"), cursor.number("<u8")))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise ValueError(
            f"{file}: key general.alignment = {shown(alignment)} is not a positive integer"
        )
    start = -(-cursor.offset // alignment) * alignment
    tensors, spans = {}, []
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise ValueError(f"{file}: tensor {name} occurs twice: the file is damaged")
        tensors[name], size = _tensor(file, cursor.size, name, shape, kind, start + offset)
        spans.append((offset, offset + size, name))
    names.check_apart(file, spans)
    return metadata, tensors


def _tensor(
    file: Path, file_size: int, name: str, shape: tuple[int, ...], kind: int, offset: int
) -> tuple[Tensor, int]:
    """A tensor, and how many bytes of the file it takes."""
    if kind not in _TYPES:
        known = ", ".join(each.name for each in _TYPES.values())
        label = _OTHER_TYPES.get(kind, f"{kind}, which is unknown")
        raise ValueError(f"{file}: {name} has tensor type {label}; only {known} are supported")
    type_ = _TYPES[kind]
    if shape[-1] % type_.values:
        raise ValueError(
            f"{file}: {name}, {type_.name}, has rows of {shape[-1]} values, not whole blocks"
        )
    size = math.prod(shape) // type_.values * type_.bytes
    if offset + size > file_size:
        raise ValueError(
            f"{file} is truncated: {name} ends at byte {offset + size:,} of {file_size:,}"
        )

    def read() -> np.ndarray:
        blocks = np.fromfile(file, np.uint8, size, offset=offset).reshape(-1, type_.bytes)
        return type_.decode(blocks).reshape(shape)

    return Tensor(shape, read), size


# ----------------------------------------------------------------------------------------- model

_ROPE_FREQS = "rope_freqs.weight"  # divisors of the frequencies of rotation
_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read(file: Path, tokenizer_json: str | None = None) -> Foreign:
    """The model of a GGUF file.

    Args:
      file: the file.
      tokenizer_json: a tokenizer that stands for the one in the file.

    Raises:
      ValueError: the file is damaged, or has what the architecture cannot express; names the tensor or key.
    """
    with files.about(file):
        return _read(file, tokenizer_json)


def _read(file: Path, tokenizer_json: str | None) -> Foreign:
    metadata, stored = _parse(file)
    general = Keys(metadata)
    architecture = general.take("general.architecture", "", str)
    near_choice(f"general.architecture in {file}:", architecture, ("llama",))
    keys = _keys(metadata)
    max_length = keys.take("context_length", None, int)
    config = _config(keys, stored)
    heads = {"attn_q": config.n_heads, "attn_k": config.n_kv_heads}
    stored.pop(_ROPE_FREQS, None)  # what it says is in the config
    tensors = {}
    for name, tensor in stored.items():
        match name.split("."):
            case [part, kind] if part in _NAMES:
                prefix = ""
            case ["blk", layer, part, kind] if (
                part in _NAMES and layer.isdecimal() and len(layer) < 10
            ):
                prefix = f"model.layers.{layer}."
            case _:
                raise ValueError(f"{file}: tensor {name} is unknown")
        if part in heads:
            tensor = _unpermuted(tensor, heads[part])
        tensors[f"{prefix}{_NAMES[part]}.{kind}"] = tensor
    tokens = general.take("tokenizer.ggml.tokens", [], list)
    if not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{file}: key tokenizer.ggml.tokens is not a list of strings")
    begins = _ids(file, metadata, tokens, "bos")
    ends = _ids(file, metadata, tokens, "eos", "eot", "eom")
    begin = next((tokens[i] for i in begins), None)
    # llama.cpp's defaults for byte-level BPE, where the file does not say.
    is_llama3 = metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    begins_with = begin if metadata.get("tokenizer.ggml.add_bos_token", is_llama3) is True else None
    name = general.take("general.name", None, str)
    origin = {"format": "gguf", "path": str(file), "name": name and name[:_LONGEST_NAME]}
    origin["begin_token"] = begin
    if template := general.take("tokenizer.chat_template", None, str):
        origin["chat_template"] = template
    return Foreign(
        origin=origin,
        config=config,
        tensors=tensors,
        tokenizer_json=tokenizer_json or gguf_tokenizer.build(metadata, file),
        end_token=next((tokens[i] for i in ends), None),
        end_ids=tuple(ends),
        begins_with=begins_with,
        max_length=max_length,
        notes=tuple(f"unknown key {key} in {file.name} was not used" for key in keys.unknown()),
    )


def _ids(file: Path, metadata: dict[str, Any], tokens: list[str], *kinds: str) -> list[int]:
    """The ids that a file names for such tokens."""
    ids = []
    for kind in kinds:
        key = f"tokenizer.ggml.{kind}_token_id"
        i = metadata.get(key)
        if i is not None and (type(i) is not int or not 0 <= i < len(tokens)):
            raise ValueError(
                f"{file}: key {key} = {shown(i)} is not an id of its {len(tokens):,} tokens"
            )
        ids += [] if i is None else [i]
    return list(dict.fromkeys(ids))


def _keys(metadata: dict[str, Any]) -> Keys:
    """What the file says of the architecture; of a value for each layer, the one that all have."""
    values = {}
    for key, value in metadata.items():
        if key.startswith("llama."):
            if isinstance(value, list):
                if len(set(value)) != 1:
                    raise ValueError(f"key {key} differs from layer to layer: {shown(value)}")
                value = value[0]
            values[key.removeprefix("llama.")] = value
    return Keys(values, "llama.")


def _config(keys: Keys, tensors: dict[str, Tensor]) -> ModelConfig:
    d_model = keys.take("embedding_length", kind=int)
    n_heads = keys.take("attention.head_count", kind=int)
    d_head = keys.take("attention.key_length", d_model // max(n_heads, 1), int)
    keys.only("attention.value_length", d_head)
    keys.only("rope.dimension_count", d_head)
    keys.only("expert_count", 0)
    keys.only("expert_used_count", 0)
    keys.only("attention.sliding_window", 0)
    keys.only("rope.scaling.type", "none", "linear")
    epsilon = keys.take("attention.layer_norm_rms_epsilon", kind=float)
    if not 1e-30 < epsilon < 1e30:  # it is a float32
        raise ValueError(f"key llama.attention.layer_norm_rms_epsilon = {epsilon} is out of range")
    factor = keys.take("rope.scaling.factor", 1.0, float)
    linear = keys.take("rope.scaling.type", "linear") == "linear" and factor != 1
    theta = keys.take("rope.freq_base", 10_000.0, float)
    scaling = LinearScaling(factor=factor) if linear else NoScaling()
    if _ROPE_FREQS in tensors:
        if linear:
            raise ValueError(f"tensor {_ROPE_FREQS} together with linear scaling is not supported")
        if math.prod(tensors[_ROPE_FREQS].shape) > d_head or theta <= 0:
            raise ValueError(f"tensor {_ROPE_FREQS} does not fit heads of {d_head} dimensions")
        scaling = _llama3_scaling(tensors[_ROPE_FREQS].read(), theta)
    if "token_embd.weight" not in tensors:
        raise ValueError("tensor token_embd.weight is missing")
    table = tensors["token_embd.weight"].shape
    keys.only("vocab_size", table[0])
    return ModelConfig(
        vocab_size=table[0],
        n_layers=keys.take("block_count", kind=int),
        d_model=d_model,
        d_ff=keys.take("feed_forward_length", kind=int),
        n_heads=n_heads,
        n_kv_heads=keys.take("attention.head_count_kv", n_heads, int),
        d_head=d_head,
        kv_norm="block",
        tied_embeddings="output.weight" not in tensors,
        bias="blk.0.attn_q.bias" in tensors,
        rope_theta=theta,
        rope_scaling=scaling,
        # A float32 in the file: 1e-5 is meant.
        norm_eps=float(str(np.float32(epsilon))),
    )


def _llama3_scaling(slower_by: np.ndarray, theta: float) -> RopeScaling:
    """The rope_scaling that divides the frequencies of a head as a file of Llama 3.1 or later says.

    Such files hold the divisors and not what they follow from. Raises ValueError for other divisors.
    """
    pairs = len(slower_by)
    if slower_by.ndim != 1 or not np.isfinite(slower_by).all() or slower_by.min() <= 0:
        raise ValueError(f"tensor {_ROPE_FREQS} is not a list of positive numbers")
    if np.allclose(slower_by, 1):
        return NoScaling()
    scaling = Llama3Scaling(factor=float(slower_by.max()))  # with the other numbers of Llama 3
    factor, low, high = scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor
    turning = theta ** (-np.arange(pairs) / pairs)
    turns = scaling.original_max_position_embeddings * turning / (2 * np.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(slower_by, 1 / (kept + (1 - kept) / factor), rtol=1e-4):
        raise ValueError(
            f"tensor {_ROPE_FREQS} scales the rotation by up to {factor:g}, but not as Llama 3 does: this is "
            "not supported"
        )
    return scaling


def _unpermuted(tensor: Tensor, heads: int) -> Tensor:
    """Rows (head, pair, half) of llama.cpp as (head, half, pair); biases too."""

    def read() -> np.ndarray:
        rows = tensor.read()
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)

    return Tensor(tensor.shape, read)
