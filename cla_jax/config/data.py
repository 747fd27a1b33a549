"""The fields of the text and its tokens."""

import dataclasses
import math
import re

from cla_jax.config.checks import check_fields, positive
from cla_jax.messages import near_choice, shown
from cla_jax.typed_numbers import is_digits, number

BYTE_VOCABULARY = 257  # 256 bytes and the end token
SOURCES = ("sotu", "text", "jsonl", "tfds")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def split_source(source: str) -> tuple[str, str, str]:
    """The kind of a source of text, the field that its documents are in, and its argument."""
    kind, _, argument = source.partition(":")
    kind, _, field = kind.partition(".")
    return kind, field or "text", argument


def check_source(name: str, source: str) -> None:
    """Raises ValueError, naming the field `name`, for a source that has none of the forms."""
    kind, _, argument = split_source(source)
    try:
        near_choice("source type", kind, SOURCES)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if "." in source.partition(":")[0] and kind not in ("jsonl", "tfds"):
        raise ValueError(f"{name} = {shown(source)}: only jsonl and tfds sources have fields")
    if kind != "sotu" and not argument:
        raise ValueError(f"{name} = {shown(source)} needs an argument: {kind}:...")
    if kind == "sotu" and argument and not (is_digits(argument) and int(argument) >= 2):
        raise ValueError(f"{name} = {shown(source)}: sotu:N takes N >= 2 documents")


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
        check_fields(self, "data.mixture: ")
        _check_name("data.mixture", self.name)
        check_source(f"data.mixture: component {self.name}", self.source)
        _check_weight(f"data.mixture: the weight of {self.name}", self.weight)

    @classmethod
    def parse(cls, text: str) -> "Component":
        """The component of `NAME=WEIGHT:SOURCE`. Raises ValueError if the text has another form."""
        name, equals, rest = text.partition("=")
        weight, colon, source = rest.partition(":")
        if not (equals and colon):
            raise ValueError(
                f"data.mixture: {text!r} must be NAME=WEIGHT:SOURCE, as in web=0.7:jsonl:'web/*.gz'"
            )
        return cls(name=name, source=source, weight=_weight(f"data.mixture: {text!r}", weight))

    def __str__(self) -> str:
        """What `parse` reads."""
        return f"{self.name}={self.weight}:{self.source}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """New weights of a mixture, which apply after a given step."""

    # The last step with the old weights.
    step: int
    # The new weight of each component; a component that is not listed gets weight 0.
    weights: tuple[tuple[str, float], ...]

    def __post_init__(self):
        check_fields(self, "data.stages: ")
        positive("data.stages: step", self.step)
        for name, weight in self.weights:
            _check_name("data.stages", name)
            _check_weight(f"data.stages: from step {self.step} on, the weight of {name}", weight)

    @classmethod
    def parse(cls, text: str) -> "Stage":
        """The stage of `STEP:NAME=WEIGHT,NAME=WEIGHT`. Raises ValueError for what has another form."""
        step, colon, rest = text.partition(":")
        pairs = [pair.partition("=") for pair in rest.split(",")]
        if not (colon and is_digits(step) and all(equals for _, equals, _ in pairs)):
            raise ValueError(
                f"data.stages: {text!r} must be STEP:NAME=WEIGHT,NAME=WEIGHT, as in "
                "2000:web=0.2,code=0.8"
            )
        where = f"data.stages: {text!r}"
        weights = tuple((name, _weight(where, weight)) for name, _, weight in pairs)
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


def _weight(what: str, text: str) -> float:
    try:
        return number(text)
    except ValueError as error:
        raise ValueError(f"{what}: the weight {error}") from None


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text, the tokenizer, and the windows that tokens are cut into."""

    # Where documents come from: text:GLOB, jsonl:GLOB (field `text`), tfds:NAME (feature `text`), or sotu.
    # The source sotu is built in: 233 State of the Union addresses; sotu:N has the first N. The forms
    # jsonl.FIELD:GLOB and tfds.FIELD:NAME read another field. Files may be compressed: .gz, .xz, .bz2, or
    # .zst (extra `zstd`).
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
        check_fields(self, "data.")
        positive("data.seq_len", self.seq_len)
        if not 0 < self.held_out < 1:
            raise ValueError(f"data.held_out = {self.held_out} must lie between 0 and 1")
        if self.mixture:
            object.__setattr__(self, "source", "")  # not read: runs must not differ in it
        else:
            check_source("data.source", self.source)
        self._check_mixture()
        if self.tokenizer.startswith("bpe:"):
            size = self.tokenizer.removeprefix("bpe:")
            if not is_digits(size) or int(size) < BYTE_VOCABULARY:
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
        """Pairs of the name of a field, for messages, and the source in it."""
        parts = tuple((f"data.mixture: {part.name}", part.source) for part in self.mixture)
        return parts or (("data.source", self.source),)

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the text comes from, sorted: the names, order and weights of a mixture do not matter."""
        return tuple(sorted({part.source for part in self.mixture} or {self.source}))

    @property
    def weights_by_step(self) -> tuple[tuple[int, tuple[float, ...]], ...]:
        """Pairs of a first step and the weights of the components from then on, in order of the steps."""
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
