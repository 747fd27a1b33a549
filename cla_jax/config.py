"""What a run is: frozen dataclasses, checked when made, without jax.

A `Config` has two halves. Its *identity* (model, data, optimizer, batch_size, steps, seed, start) says which
numbers the run computes; two runs with one identity are the same run. Its *placement* says where and
how: mesh, microbatches, rematerialisation, backends, logging, paths. Resuming compares the identity
only, so a run may move to half the chips.
"""

import dataclasses
import functools
import math
import re
from numbers import Integral
from typing import Any, Literal, get_args

from cla_jax import kv_map as kv_maps
from cla_jax import names
from cla_jax.fields import from_dict
from cla_jax.messages import choice, near_choice, shown

BYTE_VOCABULARY = 257  # 256 bytes and the end token
# The forms of model.rope_scaling, with the names of their numbers.
ROPE_SCALINGS = {
    "none": (),
    "linear": ("factor",),
    "llama3": ("factor", "low", "high", "original"),
    "yarn": ("factor", "fast", "slow", "original", "attention"),
}


# -------------------------------------------------------------------------------------- checks


def _positive(name: str, value: float) -> None:
    if not value < float("inf"):  # NaN is not
        raise ValueError(f"{name} = {shown(value)} must be finite")
    if value <= 0:
        raise ValueError(f"{name} = {shown(value)} must be positive")


# What numbers may be at most: far above any model, and below what would take hours only to count.
_MOST = {
    "n_layers": 10_000,
    **dict.fromkeys(("n_heads", "n_kv_heads", "d_head"), 2**20),
    **dict.fromkeys(("d_model", "d_ff"), 2**24),
    **dict.fromkeys(("vocab_size", "seq_len", "batch_size", "eval_batch_size"), 2**31 - 1),
    **dict.fromkeys(("accumulate", "loss_chunk", "keep"), 2**31 - 1),
    **dict.fromkeys(("steps", "log_every", "save_every", "eval_every"), 2**40),
}


def _bounded(config: Any, prefix: str = "") -> None:
    """Raises ValueError for a field above the limit that it has."""
    for name in _MOST.keys() & {field.name for field in dataclasses.fields(config)}:
        if (value := getattr(config, name)) > _MOST[name]:
            raise ValueError(f"{prefix}{name} = {shown(value)} must be at most {_MOST[name]:,}")


def _digits(text: str, most: int = 18) -> bool:
    """Whether a text is a plain number of at most so many digits."""
    return text.isascii() and text.isdecimal() and len(text) <= most


SOURCES = ("sotu", "text", "jsonl", "tfds")


def split_source(source: str) -> tuple[str, str, str]:
    """The kind of a source of text, the field that its documents are in, and its argument."""
    kind, _, argument = source.partition(":")
    kind, _, field = kind.partition(".")
    return kind, field or "text", argument


def check_source(name: str, source: str) -> None:
    """Raises ValueError, naming the field `name`, for a source that has none of the forms."""
    kind, _, argument = split_source(source)
    near_choice(name, kind, SOURCES)
    if "." in source.partition(":")[0] and kind not in ("jsonl", "tfds"):
        raise ValueError(f"{name} = {shown(source)}: only jsonl and tfds sources have fields")
    if kind != "sotu" and not argument:
        raise ValueError(f"{name} = {shown(source)} needs an argument: {kind}:...")
    if kind == "sotu" and argument and not (_digits(argument) and int(argument) >= 2):
        raise ValueError(f"{name} = {shown(source)}: sotu:N takes N >= 2 documents")


# ------------------------------------------------------------------------------------- classes


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsKV:
    """Keys and values of n_kv_heads heads, each d_head wide."""

    # heads or latent; each kind has its own fields.
    kind: Literal["heads"] = dataclasses.field(default="heads", init=False)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentKV:
    """One latent for all heads, and a rotated key beside it: multi-head latent attention (2405.04434, 2.1).

    Each layer has its own matrices, which compute keys and values from the latent. So layers that share a
    latent do not share keys and values.
    """

    # heads or latent; each kind has its own fields.
    kind: Literal["latent"] = dataclasses.field(default="latent", init=False)
    # Width of the latent.
    rank: int = 64
    # Width of the rotated (RoPE) part of queries and keys, in addition to d_head; even.
    rope_dims: int = 16
    # RMSNorm of the latent, as in DeepSeek-V2. A model converted from heads is closer to its source without.
    norm: bool = True

    def __post_init__(self):
        _positive("model.kv.rank", self.rank)
        if self.rope_dims < 2 or self.rope_dims % 2:
            raise ValueError(
                f"model.kv.rope_dims = {self.rope_dims} must be even: RoPE turns pairs of dimensions"
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
    # Width of the SwiGLU hidden layer.
    d_ff: int
    # Query heads. n_heads * d_head need not equal d_model.
    n_heads: int
    # Key/value heads, a divisor of n_heads: n_heads is MHA, 1 is MQA, a number between them is GQA.
    n_kv_heads: int
    # Width of a head; even, because RoPE rotates pairs of dimensions.
    d_head: int
    # What a K/V projection computes and the cache stores.
    kv: HeadsKV | LatentKV = HeadsKV()
    # Which layer's keys and values each layer reads. Forms: identity, cla:2, cla:3:last, keep-ends,
    # dense-front, dense-back, pizza:N, sandwich:N, lasagna:N, trailing:N; or a list of source layers such as
    # 0,0,2,2. Keys and values may have different maps: k=cla:2;v=identity (any two of these forms), or
    # fused-lite.
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
    # RoPE scaling, for contexts longer than in pretraining: none, linear:FACTOR,
    # llama3:FACTOR:LOW:HIGH:ORIGINAL, or yarn:FACTOR:FAST:SLOW:ORIGINAL:ATTENTION. ORIGINAL is the context
    # length of pretraining in tokens; the rotated vectors are multiplied by ATTENTION.
    rope_scaling: str = "none"
    # Added to the mean square in RMSNorm.
    norm_eps: float = 1e-5
    # Standard deviation of the initial weights (2405.12981, appendix B: 0.01275 everywhere).
    init_std: float = 0.01275
    # Dtype of matrix products and activations; parameters and reductions stay in float32.
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self):
        for field in ("vocab_size", "n_layers", "d_model", "d_ff", "n_heads", "n_kv_heads"):
            _positive(f"model.{field}", getattr(self, field))
        _bounded(self, "model.")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"model.n_heads = {self.n_heads} is not divisible by "
                f"model.n_kv_heads = {self.n_kv_heads}"
            )
        if self.d_head < 2 or self.d_head % 2:
            raise ValueError(
                f"model.d_head = {self.d_head} must be even: RoPE turns pairs of dimensions"
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
        choice("model.kv_norm", self.kv_norm, ("own", "block"))
        choice("model.compute_dtype", self.compute_dtype, ("bfloat16", "float32"))
        for field in ("rope_theta", "norm_eps", "init_std"):
            _positive(f"model.{field}", getattr(self, field))
        self.resolved_rope_scaling  # noqa: B018  raises for what is none of its forms
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
        if not all(map(_digits, entries)):
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

    @functools.cached_property
    def resolved_rope_scaling(self) -> tuple[str, dict[str, float]]:
        """`rope_scaling` as its kind and numbers: `("linear", {"factor": 4.0})`."""
        kind, *texts = self.rope_scaling.split(":")
        near_choice("model.rope_scaling", kind, ROPE_SCALINGS)
        parts = ROPE_SCALINGS[kind]
        form = ":".join((kind, *map(str.upper, parts)))
        try:
            numbers = [float(text) for text in texts]
        except ValueError:
            numbers = []
        if len(numbers) != len(parts) or not all(0 < number < float("inf") for number in numbers):
            raise ValueError(
                f"model.rope_scaling = {shown(self.rope_scaling)} must have the form {form}"
                + (", with positive numbers" if parts else "")
            )
        values = dict(zip(parts, numbers, strict=True))
        if kind == "llama3" and not values["low"] < values["high"]:
            raise ValueError(
                f"model.rope_scaling = {shown(self.rope_scaling)}: LOW must be below HIGH"
            )
        return kind, values

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
        """Dimensions of a query head that RoPE turns."""
        return self.kv.rope_dims if isinstance(self.kv, LatentKV) else self.d_head

    @property
    def kept_widths(self) -> tuple[int, int]:
        """Widths of what is kept of a token as keys and as values of a KV head.

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


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Component:
    """One source of a mixture."""

    # Its name in metrics and stages: letters, digits and . _ -
    name: str
    # Where its documents come from, as in data.source.
    source: str
    # Its share of the training tokens, relative to the other weights. A component with weight 0 is not
    # trained on until a stage gives it another weight, but its held-out documents are always scored.
    weight: float

    def __post_init__(self):
        _check_name("data.mixture", self.name)
        check_source(f"data.mixture: {self.name}", self.source)
        _check_weight(f"data.mixture: the weight of {self.name}", self.weight)

    @classmethod
    def parse(cls, text: str) -> "Component":
        """The component of `NAME=WEIGHT:SOURCE`. Raises ValueError for what has another form."""
        name, equals, rest = text.partition("=")
        weight, colon, source = rest.partition(":")
        if not (equals and colon):
            raise ValueError(
                f"data.mixture: {text!r} must be NAME=WEIGHT:SOURCE, as in web=0.7:jsonl:'web/*.gz'"
            )
        return cls(name=name, source=source, weight=_number(f"data.mixture: {text!r}", weight))

    def __str__(self) -> str:
        """What `parse` reads."""
        return f"{self.name}={self.weight}:{self.source}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """Other weights of a mixture, from a step on."""

    # The last step with the old weights.
    step: int
    # The new weight of each component; a component that is not listed gets weight 0.
    weights: tuple[tuple[str, float], ...]

    def __post_init__(self):
        _positive("data.stages: step", self.step)
        for name, weight in self.weights:
            _check_name("data.stages", name)
            _check_weight(f"data.stages: from step {self.step} on, the weight of {name}", weight)

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """The stage of `STEP:NAME=WEIGHT,NAME=WEIGHT`. Raises ValueError for what has another form."""
        step, colon, rest = text.partition(":")
        pairs = [pair.partition("=") for pair in rest.split(",")]
        if not (colon and step.isdecimal() and all(equals for _, equals, _ in pairs)):
            raise ValueError(
                f"data.stages: {text!r} must be STEP:NAME=WEIGHT,NAME=WEIGHT, as in "
                "2000:web=0.2,code=0.8"
            )
        where = f"data.stages: {text!r}"
        weights = tuple((name, _number(where, weight)) for name, _, weight in pairs)
        return cls(step=int(step), weights=weights)

    def __str__(self) -> str:
        """What `parse` reads."""
        return f"{self.step}:" + ",".join(f"{name}={weight}" for name, weight in self.weights)


def _check_name(field: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{field}: the name {name!r} may contain only letters, digits and . _ -, and must begin with a "
            "letter or a digit"
        )


def _check_weight(what: str, weight: float) -> None:
    if not 0 <= weight < math.inf:  # NaN too
        raise ValueError(f"{what} is {weight}: it must be 0 or a positive number")


def _number(what: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{what}: the weight {text!r} is not a number") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, the tokenizer, and the windows that tokens are cut into."""

    # Where documents come from: text:GLOB, jsonl:GLOB (field `text`), tfds:NAME (feature `text`), or sotu.
    # sotu is built in: 233 State of the Union addresses; sotu:N has the first N. jsonl.FIELD:GLOB and
    # tfds.FIELD:NAME read another field. Files may be compressed: .gz, .xz, .bz2, or .zst (extra `zstd`).
    source: str = "sotu"
    # Several sources instead of data.source: NAME=WEIGHT:SOURCE NAME=WEIGHT:SOURCE. Weights are relative
    # shares of the training tokens.
    mixture: tuple[Component, ...] = ()
    # New weights after a step, STEP:NAME=WEIGHT,NAME=WEIGHT. Each source continues where it was.
    stages: tuple[Stage, ...] = ()
    # byte, bpe:SIZE (byte-level BPE trained on the training split), or the path of a tokenizer.json.
    tokenizer: str = "byte"
    # The token between documents.
    end_token: str = "<|endoftext|>"
    # The token that the model reads before every text. Empty: the end token.
    begin_token: str = ""
    # Target tokens per window.
    seq_len: int
    # Fraction of the documents that is held out, chosen by a hash of the text.
    held_out: float = 0.05
    # Whether a token attends to earlier documents in its window. The paper does not say what it did.
    attend_across_documents: bool = True

    def __post_init__(self):
        _positive("data.seq_len", self.seq_len)
        _bounded(self, "data.")
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out = {self.held_out} must lie between 0 and 1")
        if self.mixture:
            object.__setattr__(self, "source", "")  # not read: runs must not differ in it
        else:
            check_source("data.source", self.source)
        self._check_mixture()
        if self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            if not _digits(size) or int(size) < BYTE_VOCABULARY:
                raise ValueError(
                    f"data.tokenizer = {shown(self.tokenizer)}: SIZE in bpe:SIZE must be an integer of at "
                    f"least {BYTE_VOCABULARY}"
                )
        elif self.tokenizer != "byte" and not self.tokenizer.endswith(".json"):
            near_choice("data.tokenizer", self.tokenizer, ("byte", "bpe:4096", "FILE.json"))

    def _check_mixture(self) -> None:
        components = [component.name for component in self.mixture]
        for name in components:
            if components.count(name) > 1:
                raise ValueError(f"data.mixture has two components called {name!r}")
        if self.stages and not self.mixture:
            raise ValueError("data.stages changes the weights of a mixture: give data.mixture")
        if self.mixture and not any(component.weight for component in self.mixture):
            raise ValueError("data.mixture: all weights are 0")
        before = 0
        for stage in self.stages:
            if stage.step <= before:
                raise ValueError(
                    f"data.stages must be in increasing order of steps, but {stage.step} comes after {before}"
                )
            before = stage.step
            given = [name for name, _ in stage.weights]
            for name in given:
                near_choice("component of data.mixture in data.stages:", name, components)
                if given.count(name) > 1:
                    raise ValueError(f"data.stages: step {stage.step} gives {name!r} two weights")
            if not any(weight for _, weight in stage.weights):
                raise ValueError(f"data.stages: from step {stage.step} on, all weights are 0")

    @property
    def named_sources(self) -> tuple[tuple[str, str], ...]:
        """Each source, behind the words by which a message names its field."""
        parts = tuple((f"data.mixture: {part.name}", part.source) for part in self.mixture)
        return parts or (("data.source", self.source),)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the text comes from, sorted: the names, order and weights of a mixture do not matter."""
        return tuple(sorted({part.source for part in self.mixture} or {self.source}))

    @property
    def weights(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Of a mixture: from which step on its components have which weights."""
        first = (0, tuple(component.weight for component in self.mixture))
        later = ((stage.step, dict(stage.weights)) for stage in self.stages)
        components = [component.name for component in self.mixture]
        return (first, *((step, tuple(new.get(c, 0.0) for c in components)) for step, new in later))

    @property
    def known_vocabulary(self) -> int:
        """Ids of the tokenizer as far as its name tells; 0 for one that is read from a file."""
        if self.tokenizer.startswith("bpe:"):
            return int(self.tokenizer.removeprefix("bpe:"))
        return BYTE_VOCABULARY if self.tokenizer == "byte" else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine:
    """Linear warm-up, then half a cosine down to the floor (2405.12981, section 3.1)."""

    # cosine, wsd or constant; each kind has its own fields.
    kind: Literal["cosine"] = dataclasses.field(default="cosine", init=False)
    # Fraction of the steps that warm up.
    warmup_fraction: float = 0.05
    # Learning rate at the last step, as a fraction of peak_lr.
    final_fraction: float = 0.1

    def __post_init__(self):
        _fractions(self, "optimizer.schedule")


@dataclasses.dataclass(frozen=True, kw_only=True)
class WSD:
    """Warmup-stable-decay: linear warm-up, the peak, linear decay to the floor (2404.06395, section 4)."""

    # cosine, wsd or constant; each kind has its own fields.
    kind: Literal["wsd"] = dataclasses.field(default="wsd", init=False)
    # Fraction of the steps that warm up.
    warmup_fraction: float = 0.05
    # Fraction of the steps, at the end, in which the learning rate decays.
    decay_fraction: float = 0.1
    # Learning rate at the last step, as a fraction of peak_lr.
    final_fraction: float = 0.1

    def __post_init__(self):
        _fractions(self, "optimizer.schedule")
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"optimizer.schedule: warmup_fraction = {self.warmup_fraction} and decay_fraction = "
                f"{self.decay_fraction} must add up to at most 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """Linear warm-up, then the peak to the end."""

    # cosine, wsd or constant; each kind has its own fields.
    kind: Literal["constant"] = dataclasses.field(default="constant", init=False)
    # Fraction of the steps that warm up.
    warmup_fraction: float = 0.05

    def __post_init__(self):
        _fractions(self, "optimizer.schedule")


def _fractions(config: Any, name: str) -> None:
    """Raises ValueError unless every field that is a fraction lies in 0 to 1."""
    for field in dataclasses.fields(config):
        if field.name.endswith("_fraction") and not 0 <= getattr(config, field.name) <= 1:
            raise ValueError(
                f"{name}.{field.name} = {getattr(config, field.name)} must lie in 0 to 1"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """Adam with decoupled weight decay (1711.05101).

    Weight decay applies to every parameter, including norms and embeddings, as in the CLA authors' public
    code. Their paper does not say.
    """

    # adamw or muon; each kind has its own fields.
    kind: Literal["adamw"] = dataclasses.field(default="adamw", init=False)
    # Decay of the first moment.
    b1: float = 0.9
    # Decay of the second moment.
    b2: float = 0.95
    # Added to the square root of the second moment.
    eps: float = 1e-8
    # Decoupled weight decay.
    weight_decay: float = 0.1

    def __post_init__(self):
        _check_rule(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Muon:
    """Orthogonalised momentum for the matrices of blocks; AdamW for the other parameters.

    The others are the embedding, the output head, norms and biases. An update has the same root mean square
    as AdamW's, so learning rate and weight decay have the same scale (Moonlight, 2502.16982, section 2.2).
    """

    # adamw or muon; each kind has its own fields.
    kind: Literal["muon"] = dataclasses.field(default="muon", init=False)
    # Momentum decay for matrices.
    momentum: float = 0.95
    # Newton-Schulz iterations for each matrix.
    iterations: int = 5
    # Decay of AdamW's first moment, for the other parameters.
    b1: float = 0.9
    # Decay of AdamW's second moment, for the other parameters.
    b2: float = 0.95
    # Added to the square root of AdamW's second moment.
    eps: float = 1e-8
    # Decoupled weight decay, for all parameters.
    weight_decay: float = 0.1

    def __post_init__(self):
        _check_rule(self)
        if not 1 <= self.iterations <= 100:
            raise ValueError(f"optimizer.rule.iterations = {self.iterations} must lie in 1 to 100")


def _check_rule(rule: AdamW | Muon) -> None:
    _positive("optimizer.rule.eps", rule.eps)
    for field in dataclasses.fields(rule):
        value = getattr(rule, field.name)
        if field.name in ("b1", "b2", "momentum") and not 0 <= value < 1:
            raise ValueError(f"optimizer.rule.{field.name} = {value} must lie in [0, 1)")
    if not 0 <= rule.weight_decay < float("inf"):
        raise ValueError(
            f"optimizer.rule.weight_decay = {rule.weight_decay} must be finite and not negative"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Gradient clipping, then an update rule with a scheduled learning rate."""

    # The highest learning rate in the schedule.
    peak_lr: float = 3e-4
    # How the learning rate changes over the steps.
    schedule: Cosine | WSD | Constant = Cosine()
    # How a gradient becomes an update.
    rule: AdamW | Muon = AdamW()
    # Gradients are clipped to this global norm.
    clip_norm: float = 1.0

    def __post_init__(self):
        for field in ("peak_lr", "clip_norm"):
            _positive(f"optimizer.{field}", getattr(self, field))

    @staticmethod
    def upgrade(fields: dict[str, Any]) -> dict[str, Any]:
        """The fields of a record; also of one from when all runs had AdamW, or the cosine too."""
        fields = dict(fields)
        for union, first in (("schedule", Cosine()), ("rule", AdamW())):
            its_fields = {field.name for field in dataclasses.fields(first) if field.init}
            if union not in fields and its_fields & fields.keys():
                own = {name: fields.pop(name) for name in its_fields & fields.keys()}
                fields[union] = {"kind": first.kind} | own
        return fields


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scratch:
    """Initial weights are drawn from the seed."""

    # scratch or run; each kind has its own fields.
    kind: Literal["scratch"] = dataclasses.field(default="scratch", init=False)


Init = Literal["own", "mean", "renormalized", "aligned", "fitted", "least_squares", "svd"]
INITS = get_args(Init)
LATENT_INITS = ("svd", "least_squares")  # those that make a latent of heads
HEAD_INITS = tuple(init for init in INITS if init != "svd")  # those that join heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromRun:
    """Initial weights are those of another run, converted to this model.

    The two models may differ in n_kv_heads and kv_map: several KV heads become one. Or heads become a latent.
    The other run may also be the teacher. The loss is then (1 - w) cross-entropy +
    w T^2 KL(teacher || student).
    """

    # scratch or run; each kind has its own fields.
    kind: Literal["run"] = dataclasses.field(default="run", init=False)
    # The directory of the other run.
    run: str = ""
    # The checksum of its checkpoint; empty for the newest checkpoint.
    checkpoint: str = ""
    # How several KV heads become one. own: the producer's first head. mean: their mean. renormalized: the
    # mean, scaled to the mean norm of the heads. aligned: the mean of the heads after rotations that align
    # them. fitted: the producer's first head, with the other readers fitted to it. least_squares: the best
    # prediction of all heads. The last three run the source on training text. A latent is made of heads by
    # least_squares, or by svd: of their weights alone.
    init: Init = "least_squares"
    # Windows of training text for aligned, fitted and least_squares.
    calibration_windows: int = 16
    # w: the weight of the teacher (the source run) in the loss; 0 for no teacher.
    distill_weight: float = 0.0
    # T: the logits of teacher and student are divided by it.
    distill_temperature: float = 1.0

    def __post_init__(self):
        names.check_path("start.run", self.run)
        choice("start.init", self.init, INITS)
        _positive("start.calibration_windows", self.calibration_windows)
        if not 0 <= self.distill_weight <= 1:
            raise ValueError(f"start.distill_weight = {self.distill_weight} must lie in 0 to 1")
        _positive("start.distill_temperature", self.distill_temperature)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices along each axis; one axis may be -1, which takes the devices that are left."""

    # Choose data, fsdp and model from the chip's communication rooflines, and print the reason.
    auto: bool = False
    # TPU slices, connected by the data-centre network. Each has all parameters and its own rows of the batch.
    slice: int = 1
    # Data parallelism: copies of the parameters within a slice, each with its own rows of the batch.
    data: int = 1
    # FSDP: parameters are sharded over this many devices, each with its own rows of the batch. -1: all that
    # are left.
    fsdp: int = -1
    # Tensor parallelism: heads, MLP width and vocabulary are sharded over this many devices.
    model: int = 1

    def __post_init__(self):
        sizes = {
            "slice": self.slice,
            "data": self.data,
            "fsdp": self.fsdp,
            "model": self.model,
        }
        for axis, size in sizes.items():
            if size != -1 and size < 1:
                raise ValueError(f"placement.mesh.{axis} = {size} must be positive, or -1")
        if list(sizes.values()).count(-1) > 1:
            raise ValueError(f"placement.mesh: only one axis may be -1, not all of {sizes}")
        if self.slice == -1:
            raise ValueError("placement.mesh.slice = -1 must be the number of slices")
        if self.auto and (self.data, self.fsdp, self.model) != (1, -1, 1):
            raise ValueError(
                f"placement.mesh.auto chooses data, fsdp and model: do not set them as well ({sizes})"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Where and how a run computes. A change never makes it another run."""

    # Devices along each axis.
    mesh: MeshConfig = MeshConfig()
    # Microbatches per step (gradient accumulation, in float32).
    accumulate: int = 1
    # Rematerialisation. The backward pass recomputes nothing (none), each block (block), each block except
    # attention (attention), or each block except its matrix products (dots).
    remat: Literal["none", "block", "attention", "dots"] = "none"
    # Run equal layers in a scan, so that compile time does not grow with depth. Unrolled layers (off) are
    # faster in shallow models.
    scan_layers: bool = True
    # Attention kernel; auto chooses the fastest one that supports the model and the hardware.
    attention: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    # XLA compiler options for the training step: name=value, separated by commas.
    compiler_options: str = ""
    # Positions per chunk of the loss: logits exist for one chunk at a time, to save memory.
    loss_chunk: int = 256
    # Steps between log lines on the console, in TensorBoard and wandb; metrics.jsonl has every step.
    log_every: int = 10
    # Steps between checkpoints; the last step is always saved.
    save_every: int = 100
    # Number of checkpoints to keep; at least 2.
    keep: int = 2
    # Steps between evaluations on the held-out split; 0: only at the end.
    eval_every: int = 0
    # STEP:COUNT writes an xprof trace of COUNT steps, beginning at STEP, to the run's profile/; empty: none.
    profile: str = ""
    # Sequences per evaluation batch; rounded up to a multiple of the devices that share the batch.
    eval_batch_size: int = 32
    # Also write TensorBoard files (extra `tensorboard`).
    tensorboard: bool = False
    # Weights & Biases project to log to; empty for none (extra `wandb`).
    wandb: str = ""
    # Directory of all run directories; local or gs://.
    runs: str = "runs"
    # Directory of prepared (tokenised) data.
    data_dir: str = "data"

    def __post_init__(self):
        for field in ("accumulate", "loss_chunk", "log_every", "save_every", "eval_batch_size"):
            _positive(f"placement.{field}", getattr(self, field))
        _bounded(self, "placement.")
        if self.keep < 2:
            raise ValueError(
                f"placement.keep = {self.keep} must be at least 2: if the newest checkpoint is damaged, the "
                "one before it is needed"
            )
        if self.eval_every < 0:
            raise ValueError(f"placement.eval_every = {self.eval_every} must not be negative")
        for option in self.compiler_options.split(",") if self.compiler_options else ():
            if not all(option.partition("=")):
                raise ValueError(f"placement.compiler_options: {shown(option)} must be name=value")
        choice("placement.remat", self.remat, ("none", "block", "attention", "dots"))
        choice("placement.attention", self.attention, ("auto", "xla", "cudnn", "splash"))
        for field in ("runs", "data_dir"):
            names.check_path(f"placement.{field}", getattr(self, field))
        self.profiled_steps  # noqa: B018  raises for what is not STEP:COUNT

    @functools.cached_property
    def profiled_steps(self) -> range:
        """`profile` as the steps to trace, counted from 1."""
        if not self.profile:
            return range(0)
        step, _, count = self.profile.partition(":")
        if not (_digits(step) and _digits(count) and int(step) > 0 and int(count) > 0):
            raise ValueError(
                f"placement.profile = {shown(self.profile)} must be STEP:COUNT, two positive numbers"
            )
        return range(int(step), int(step) + int(count))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything about one training run.

    All fields except `name` and `placement` are the run's identity: with other values it is another run.
    Raises ValueError, naming the field and its value, if the fields do not fit together.
    """

    # The run directory below placement.runs, such as `study/row`.
    name: str
    # The model.
    model: ModelConfig
    # The text and its tokens.
    data: DataConfig
    # The optimiser and its schedule.
    optimizer: OptimizerConfig = OptimizerConfig()
    # Sequences per step, over all devices.
    batch_size: int
    # Optimiser steps.
    steps: int
    # Random seed of the initial weights and of the data order.
    seed: int = 0
    # Where the initial weights come from.
    start: Scratch | FromRun = Scratch()
    # Where and how the run computes. It may change at every restart.
    placement: Placement = Placement()

    def __post_init__(self):
        _positive("batch_size", self.batch_size)
        _positive("steps", self.steps)
        _bounded(self)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed = {self.seed} must lie in 0 to 2**32 - 1")
        names.check("name", self.name)
        check_vocabulary(self.data.known_vocabulary, self.model, self.data.tokenizer)
        if self.batch_size % self.placement.accumulate:
            raise ValueError(
                f"batch_size = {self.batch_size} is not divisible by "
                f"placement.accumulate = {self.placement.accumulate}"
            )
        if self.data.seq_len % min(self.placement.loss_chunk, self.data.seq_len):
            raise ValueError(
                f"data.seq_len = {self.data.seq_len} is not divisible by "
                f"placement.loss_chunk = {self.placement.loss_chunk}"
            )
        if self.data.stages and self.data.stages[-1].step >= self.steps:
            raise ValueError(
                f"data.stages: {self.data.stages[-1]} begins after the last step: steps = {self.steps}"
            )
        if self.placement.profiled_steps.start > self.steps:
            raise ValueError(
                f"placement.profile = {self.placement.profile!r} begins after the last step: "
                f"steps = {self.steps}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.data.seq_len


def check_vocabulary(ids: int, model: ModelConfig, tokenizer: str) -> None:
    """Raises ValueError if the tokenizer makes ids that the model has no rows for."""
    if ids > model.vocab_size:
        raise ValueError(
            f"model.vocab_size = {model.vocab_size} must be at least {ids}, the number of ids of "
            f"data.tokenizer = {shown(tokenizer)}"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    # 0 takes the most likely token; 1 samples the model's distribution.
    temperature: float = 1.0
    # Sample from the k most likely tokens only; 0 for all.
    top_k: int = 0
    # Sample from the smallest set of tokens whose total probability is at least this.
    top_p: float = 1.0

    def __post_init__(self):
        if self.temperature != 0 and not 1e-6 <= self.temperature < math.inf:  # NaN too
            raise ValueError(
                f"temperature = {self.temperature} must be 0 (the most likely token), or finite and at "
                "least 1e-6"
            )
        if not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise ValueError(f"top_k = {self.top_k} must be an integer, and not negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p = {self.top_p} must lie in (0, 1]")


def check_new_tokens(count: int) -> None:
    """Raises ValueError for a number of tokens that cannot be generated."""
    if count < 1:
        raise ValueError(f"new_tokens = {count} must be positive")
    if count >= 1 << 31:
        raise ValueError(f"new_tokens = {count} must be below 2**31")


def check_chunk(chunk: int, seq_len: int) -> None:
    """Raises ValueError unless the windows of a run are whole chunks."""
    if chunk < 1 or seq_len % chunk:
        nearest = min(
            (d for d in range(1, seq_len + 1) if not seq_len % d), key=lambda d: abs(d - chunk)
        )
        raise ValueError(
            f"chunk = {chunk} does not divide data.seq_len = {seq_len}; {nearest} does"
        )


# ------------------------------------------------------------------------- identity, dict form


def run_identity(config: Config) -> dict[str, Any]:
    """The fields of the config that define which run it is, as nested dicts.

    The fields of a mixture, `start`, `kv` and `qk_norm` are left out if the run does not use them. So is
    `kv.norm` if it is the default. So runs that were made before these fields existed keep their identity.
    """
    fields = dataclasses.asdict(config)
    if config.model.kv == HeadsKV():
        del fields["model"]["kv"]
    elif isinstance(config.model.kv, LatentKV) and config.model.kv.norm:
        del fields["model"]["kv"]["norm"]
    if not config.model.qk_norm:
        del fields["model"]["qk_norm"]
    if config.start == Scratch():
        del fields["start"]
    for field in ("mixture", "stages"):
        if not fields["data"][field]:
            del fields["data"][field]
    return {key: fields[key] for key in fields if key not in ("name", "placement")}


def to_record(config: Config) -> dict[str, Any]:
    """A config as the files of a run hold it: name, identity and placement."""
    placement = dataclasses.asdict(config.placement)
    return {"name": config.name, "identity": run_identity(config), "placement": placement}


def from_record(record: dict[str, Any]) -> Config:
    """The inverse of `to_record`; other keys are left alone. Raises ValueError for what is no config."""
    try:
        fields = {"name": record["name"], "placement": record["placement"]}
        if not isinstance(record["identity"], dict):
            raise ValueError(f"identity = {shown(record['identity'])} is not a record of fields")
        return from_dict(Config, fields | record["identity"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a run's config: {error}") from None
