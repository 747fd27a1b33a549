"""The registry of KV-cache formats. It needs no jax, so a wrong name is refused before jax is imported."""

import types
from collections.abc import Mapping
from typing import Any, NamedTuple


class Entry(NamedTuple):
    """Where the class of a format is, and how it is made."""

    module: str  # below cla_jax.cache
    name: str  # of the class
    settings: Mapping[str, Any] = types.MappingProxyType({})
    # Whether it stores each token separately. Then an evicting cache can replace single tokens.
    per_token: bool = True


FORMATS: dict[str, Entry] = {
    "dense": Entry("dense", "Dense"),
    "float32": Entry("dense", "Dense", {"cache_dtype": "float32"}),
    "bfloat16": Entry("dense", "Dense", {"cache_dtype": "bfloat16"}),
    "int8": Entry("quantized", "Int8"),
    "fp8": Entry("quantized", "Fp8"),
    "kivi4": Entry("kivi", "Kivi", {"bits": 4}, per_token=False),
    "kivi2": Entry("kivi", "Kivi", {"bits": 2, "longest_block": 128}, per_token=False),
}
