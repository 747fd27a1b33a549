"""The fields of a model."""

import dataclasses
import functools
import math
from typing import ClassVar, Literal

from cla_jax import kv_map as kv_maps
from cla_jax.config.checks import check_fields, positive
from cla_jax.messages import shown
from cla_jax.typed_numbers import is_digits


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsKV:
    """Keys and values of n_kv_heads heads, each d_head wide."""

    kind: Literal["heads"] = dataclasses.field(default="heads", init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentKV:
    """One latent for all heads, and a rotated key beside it: multi-head latent attention (2405.04434, 2.1).

    Each layer has its own matrices, which compute keys and values from the latent. So layers that share a
    latent do not share keys and values.
    """

    kind: Literal["latent"] = dataclasses.field(default="latent", init=False)
    # Width of the latent.
    rank: int = 64
    # Width of the rotated (RoPE) part of queries and keys, in addition to d_head; even.
    rope_dims: int = 16
    # RMSNorm of the latent, as in DeepSeek-V2. A model converted from heads starts closer to its
    # source without it.
    norm: bool = True

    def __post_init__(self):
        check_fields(self, "model.kv.")
        positive("model.kv.rank", self.rank)
        if self.rope_dims < 2 or self.rope_dims % 2:
            raise ValueError(
                f"model.kv.rope_dims = {self.rope_dims} must be even: RoPE rotates pairs of dimensions"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """Two products with the input. SiLU is applied to one, which then multiplies the other (2002.05202)."""

    kind: Literal["swiglu"] = dataclasses.field(default="swiglu", init=False)
    n_matrices: ClassVar[int] = 3  # each d_model times d_ff; the last one projects back to d_model


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredReLU:
    """One product with the input, then a ReLU, which is squared (2109.08668)."""

    kind: Literal["relu2"] = dataclasses.field(default="relu2", init=False)
    n_matrices: ClassVar[int] = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoScaling:
    """RoPE as in pretraining."""

    kind: Literal["none"] = dataclasses.field(default="none", init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """All frequencies are divided by the factor (2306.15595)."""

    kind: Literal["linear"] = dataclasses.field(default="linear", init=False)
    # How many times longer than in pretraining the context is.
    factor: float = 8.0

    def __post_init__(self):
        _check_scaling(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Low frequencies are divided by the factor, high ones are kept, as in Llama 3.1.

    A frequency is low or high by its number of rotations within the context of pretraining.
    """

    kind: Literal["llama3"] = dataclasses.field(default="llama3", init=False)
    # How many times longer than in pretraining the context is.
    factor: float = 8.0
    # Frequencies with fewer rotations than this are divided by the factor.
    low_freq_factor: float = 1.0
    # Frequencies with more rotations than this are kept; those between are blended.
    high_freq_factor: float = 4.0
    # The context length of pretraining, in tokens.
    original_max_position_embeddings: int = 8192

    def __post_init__(self):
        _check_scaling(self)
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"model.rope_scaling.low_freq_factor = {self.low_freq_factor} must be below "
                f"model.rope_scaling.high_freq_factor = {self.high_freq_factor}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnScaling:
    """As llama3, blended linearly over the indices of pairs; vectors also become longer (2309.00071)."""

    kind: Literal["yarn"] = dataclasses.field(default="yarn", init=False)
    # How many times longer than in pretraining the context is.
    factor: float = 8.0
    # Pairs with more rotations than this within the context of pretraining keep their frequency.
    beta_fast: float = 32.0
    # Pairs with fewer rotations than this have their frequency divided by the factor.
    beta_slow: float = 1.0
    # The context length of pretraining, in tokens.
    original_max_position_embeddings: int = 8192
    # Rotated queries and keys are multiplied by this. None: 0.1 ln(factor) + 1, as the paper recommends.
    attention_factor: float | None = None

    def __post_init__(self):
        _check_scaling(self)
        if not self.beta_slow < self.beta_fast:
            raise ValueError(
                f"model.rope_scaling.beta_slow = {self.beta_slow} must be below "
                f"model.rope_scaling.beta_fast = {self.beta_fast}"
            )

    @property
    def resolved_attention_factor(self) -> float:
        """`attention_factor`, or what the paper recommends for the factor (2309.00071, equation 22)."""
        if self.attention_factor is None:
            return 0.1 * math.log(self.factor) + 1
        return self.attention_factor


RopeScaling = NoScaling | LinearScaling | Llama3Scaling | YarnScaling


def _check_scaling(scaling: RopeScaling) -> None:
    check_fields(scaling, "model.rope_scaling.")
    for field in dataclasses.fields(scaling):
        if field.init and (value := getattr(scaling, field.name)) is not None:
            positive(f"model.rope_scaling.{field.name}", value)
    if not isinstance(scaling, NoScaling) and scaling.factor < 1:
        raise ValueError(
            f"model.rope_scaling.factor = {scaling.factor} must be at least 1: scaling makes contexts longer"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama-like decoder with grouped heads. Layers may share keys and values.

    Raises ValueError, naming the field and its value, if the fields do not fit together.
    """

    # Rows of the embedding table: at least the tokenizer's number of ids, rounded up to suit the hardware.
    vocab_size: int
    # Transformer blocks; each has attention and an MLP.
    n_layers: int
    # Width of the residual stream.
    d_model: int
    # Width of the MLP's hidden layer.
    d_ff: int
    # Query heads. n_heads * d_head need not equal d_model.
    n_heads: int
    # Key/value heads, a divisor of n_heads: n_heads is MHA, 1 is MQA, a number between them is GQA.
    n_kv_heads: int
    # Width of a head; even, because RoPE rotates pairs of dimensions.
    d_head: int
    # What a K/V projection computes and the cache stores.
    kv: HeadsKV | LatentKV = HeadsKV()
    # The MLP of a block.
    mlp: SwiGLU | SquaredReLU = SwiGLU()
    # Which layer's keys and values each layer reads. Forms: identity, cla:2, cla:3:last, keep-ends,
    # dense-front, dense-back, or a list of source layers such as 0,0,2,2. With pizza:4, sandwich:4 and
    # lasagna:4, four layers make keys and values. With trailing:4, the last four layers make none. Keys and
    # values may have different maps: k=cla:2;v=identity (any two of these forms), or fused-lite.
    kv_map: str = "identity"
    # Sliding windows: how many tokens a layer attends to, the current one included; 0 means all. Give one
    # number for all layers, or a pattern that repeats over the layers, such as 1024,1024,1024,0. Layers that
    # share keys and values must have the same window.
    windows: str = "0"
    # The norm before a K/V projection. `own` is a separate norm, as in the paper's CLA models. `block` is the
    # attention norm of the group's first block, as in Llama.
    kv_norm: Literal["own", "block"] = "own"
    # Whether each query and key head is normalised (RMSNorm) before it is rotated.
    qk_norm: bool = False
    # Whether the output head is the transposed embedding table.
    tied_embeddings: bool = True
    # Biases on every linear layer of the blocks.
    bias: bool = False
    # Base of the RoPE frequencies.
    rope_theta: float = 10_000.0
    # RoPE scaling, for contexts longer than in pretraining.
    rope_scaling: RopeScaling = NoScaling()
    # Added to the mean square in RMSNorm.
    norm_eps: float = 1e-5
    # Standard deviation of the initial weights (2405.12981, appendix B: 0.01275 everywhere).
    init_std: float = 0.01275
    # Dtype of matrix products and activations; parameters and reductions stay in float32.
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        check_fields(self, "model.")
        for field in ("vocab_size", "n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads"):
            positive(f"model.{field}", getattr(self, field))
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_heads = {self.n_heads} is not divisible by "
                f"model.n_kv_heads = {self.n_kv_heads}"
            )
        if self.d_head < 2 or self.d_head % 2:
            raise ValueError(
                f"model.d_head = {self.d_head} must be even: RoPE rotates pairs of dimensions"
            )
        if isinstance(self.kv, LatentKV):
            if self.kv.rank > self.d_model:
                raise ValueError(
                    f"model.kv.rank = {self.kv.rank} must be at most model.d_model = {self.d_model}"
                )
            if self.n_kv_heads != 1:
                raise ValueError(
                    f"model.n_kv_heads = {self.n_kv_heads} must be 1 with model.kv.kind = latent: all query "
                    "heads read the same latent"
                )
            if self.qk_norm:
                raise ValueError("model.qk_norm must be False with model.kv.kind = latent")
            if self.bias:
                raise ValueError("model.bias must be False with model.kv.kind = latent")
        for field in ("rope_theta", "norm_eps", "init_std"):
            positive(f"model.{field}", getattr(self, field))
        if self.rope_theta <= 1:
            raise ValueError(
                f"model.rope_theta = {self.rope_theta} must be above 1: frequencies fall with the dimension"
            )
        sharing = self.sharing  # raises for a map that does not fit the depth
        named = {"keys": sharing.k_map, "values": sharing.v_map}
        for what, sources in named.items():
            for layer, source in enumerate(sources):
                own, read = self.resolved_windows[layer], self.resolved_windows[source]
                if own != read:
                    raise ValueError(
                        f"model.windows = {shown(self.windows)}: layer {layer} has window {own}, but it "
                        f"reads the {what} of layer {source}, which has window {read}; they must be equal"
                    )
        if sharing.is_split and isinstance(self.kv, LatentKV):
            raise ValueError(
                f"model.kv_map = {shown(self.kv_map)}: with model.kv.kind = latent, keys and values come "
                "from the same latent, so they must have the same map"
            )

    @functools.cached_property
    def sharing(self) -> kv_maps.Sharing:
        """Who reads whose keys and values."""
        try:
            maps = kv_maps.resolve(self.kv_map, self.n_layers)
        except ValueError as error:
            raise ValueError(f"model.kv_map = {shown(self.kv_map)}: {error}") from None
        return kv_maps.Sharing(*maps, self.resolved_windows)

    @property
    def resolved_kv_map(self) -> kv_maps.KvMap:
        """The map of keys and values, as a tuple with one source layer per layer.

        Raises ValueError if keys and values have different maps.
        """
        if self.sharing.is_split:
            raise ValueError(
                f"model.kv_map = {shown(self.kv_map)} has different maps for keys and values; this operation "
                "supports only models with one map for both"
            )
        return self.sharing.k_map

    @functools.cached_property
    def resolved_windows(self) -> tuple[int, ...]:
        """`windows` as a tuple with one window per layer, in tokens; 0 for none."""
        entries = self.windows.replace(" ", "").split(",")
        if not all(map(is_digits, entries)):
            raise ValueError(
                f"model.windows = {shown(self.windows)}: write it as 1024 or 1024,1024,0"
            )
        if len(entries) > self.n_layers:
            raise ValueError(
                f"model.windows = {shown(self.windows)} has {len(entries)} entries, more than "
                f"model.n_layers = {self.n_layers}"
            )
        pattern = tuple(map(int, entries))
        if max(pattern) >= 2**30:
            raise ValueError(
                f"model.windows = {shown(self.windows)}: a window must be below 2**30; 0 means no window"
            )
        return tuple(pattern[layer % len(pattern)] for layer in range(self.n_layers))

    @property
    def q_groups(self) -> int:
        """Query heads per key/value head (G)."""
        return self.n_heads // self.n_kv_heads

    @property
    def query_width(self) -> int:
        """Width of a query head: with a latent, d_head and what is rotated."""
        return self.d_head + (self.kv.rope_dims if isinstance(self.kv, LatentKV) else 0)

    @property
    def rotary_width(self) -> int:
        """Dimensions of a query head that RoPE rotates."""
        return self.kv.rope_dims if isinstance(self.kv, LatentKV) else self.d_head

    @property
    def kept_widths(self) -> tuple[int, int]:
        """Widths of a cached key and of a cached value, for one token and KV head.

        With a latent, these are the rotated key and the latent.
        """
        if isinstance(self.kv, LatentKV):
            return self.kv.rope_dims, self.kv.rank
        return self.d_head, self.d_head

    @property
    def read_widths(self) -> tuple[int, int]:
        """Widths of a key and a value as attention reads them from a cache.

        With a latent, values are the latent, and keys are the latent and the rotated key.
        """
        keys, values = self.kept_widths
        return (keys + values, values) if isinstance(self.kv, LatentKV) else (keys, values)

    @property
    def n_kv_layers(self) -> int:
        """Layers that make keys or values (P)."""
        return len(self.sharing.kv_layers)

    @property
    def kv_elements(self) -> int:
        """Elements of the keys and values of one token, over all layers that make them."""
        keys, values = self.kept_widths
        made = self.sharing.count("k") * keys + self.sharing.count("v") * values
        return self.n_kv_heads * made
