"""The record of an evaluation: `evaluate` writes it to eval/NAME.json of a run, reports and commands read it.

What a record may lack has a default here: it can be older, or of another kind. Fields that are not known are
ignored, so a record of a newer version is read too.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from cla_jax import documents, eviction, files
from cla_jax.documents import Documents
from cla_jax.files import PathLike
from cla_jax.messages import shown

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scores:
    """How well a model predicts a text, by full forward pass or through a KV cache."""

    perplexity: float  # per token
    bits_per_byte: float
    nll: float | None = None  # nats, of all tokens
    tokens: int | None  # None: training did not write it
    bytes: int | None = None
    seconds: float | None = None
    tokens_per_s: float | None = None
    documents: Documents | None = None  # of a whole split
    # Of a mixture, by name.
    components: Mapping[str, "Scores"] = dataclasses.field(default_factory=dict)

    @property
    def all_documents(self) -> Documents | None:
        """The documents, those of components one after another; None unless all are scored."""
        if not self.components:
            return self.documents
        parts = [part.all_documents for part in self.components.values()]
        return None if None in parts else documents.joined([one for one in parts if one])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far decoding through a cache is from the full forward pass, token by token."""

    max_logit_difference: float
    mean_logit_difference: float | None = None
    top1_agreement: float  # how often the most likely token is the same
    kl: float  # KL(full || cached), nats, a mean
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVLayerAgreement(Agreement):
    """The same where only one KV layer is in the format and all others are dense."""

    kv_layer: int
    layer: int
    readers: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteCount:
    """Bytes per token: in closed form from the config, and counted from the live arrays."""

    predicted: float
    counted: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CachedScores(Scores):
    """Scores through a KV cache, and the bytes of that cache at the end of a window."""

    cache: str = ""  # the format, or the policy
    cache_dtype: str = ""  # of what the format does not quantise
    context: int = 0  # tokens of a window
    chunk: int = 0  # tokens of a step
    attention: str = ""  # the kernel that has read the cache; empty: XLA
    matmul: str = ""  # the kernel that has multiplied tokens with weights; empty: XLA
    # By kind: resident, written, read, allocated.
    kv_bytes: Mapping[str, ByteCount] = dataclasses.field(default_factory=dict)
    readers_per_kv_layer: tuple[int, ...] = ()
    agreement: Agreement | None = None
    per_kv_layer: tuple[KVLayerAgreement, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AfterPrompt:
    """Scores of the tokens after the prompts, which alone feel an eviction."""

    nll: float
    nll_by_full_forward: float
    tokens: int
    perplexity: float
    perplexity_by_full_forward: float
    kl: float
    top1_agreement: float
    # Nats per token above the full forward pass, and KL: halves of 95 % t intervals; means of each window.
    worse_interval: float | None = None
    kl_interval: float | None = None
    windows: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadPolicy:
    """How often each KV head has a policy, and the share of the prompt that it then keeps."""

    share: tuple[float, ...]
    kept: tuple[float | None, ...]  # None: no prompt has chosen it


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerProfile:
    """What an eviction policy keeps for the heads of a KV layer, means over all prompts."""

    kv_layer: int
    kept: tuple[float, ...]  # share of the prompt
    # Of FastGen, by the name of the head's policy, and of the recovered attention by kind.
    policies: Mapping[str, HeadPolicy] = dataclasses.field(default_factory=dict)
    recovery: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClasses:
    """Which tokens a policy treated as special or as punctuation."""

    special: int
    punctuation: int
    marks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvictingScores(CachedScores):
    """Scores through a cache that evicts tokens."""

    prompt: float = 0.0  # share of a window
    after_prompt: AfterPrompt | None = None
    # Live bytes, positions included, as a share of a 16-bit cache that keeps everything.
    resident_share: float
    kept_share: float | None = None  # of all tokens, at the end of a window
    profile: tuple[LayerProfile, ...] = ()
    token_classes: TokenClasses | None = None
    prefill_seconds: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The scores of a checkpoint on its held-out text."""

    method: str = ""
    step: int
    checkpoint: str = ""  # its checksum
    data_fingerprint: str = ""
    device_peak_bytes: int | None = None
    scores: Scores

    def record(self) -> dict[str, Any]:
        """As JSON has it: the scores are among the other fields."""
        own = plain(self)
        scores = own.pop("scores")
        return own | scores


@dataclasses.dataclass(frozen=True, kw_only=True)
class DepthScore:
    """The metrics of those examples of a task whose answer is in one tenth of the context."""

    n: int  # examples
    metrics: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskScore:
    """The metrics of a downstream task, and how it was asked."""

    metrics: Mapping[str, float]
    context: int | None = None
    chunk: int | None = None
    attention: str = ""  # the kernel that has read the cache; empty: XLA
    matmul: str = ""  # the kernel that has multiplied tokens with weights; empty: XLA
    split: Any = None
    shots: Any = None
    version: Any = None
    data: Any = None
    seconds: float | None = None
    n: int | None = None  # examples
    # Of an eviction policy: the mean share of a context that it kept. Tasks of a group have one number.
    kept_of_prompt: float | None = None
    # By where the answer is in the context, from 0.0 to 0.9; empty if the examples do not say it.
    depths: Mapping[str, DepthScore] = dataclasses.field(default_factory=dict)

    def is_asked_like(self, other: "TaskScore") -> bool:
        """Whether both were asked in the same way, whatever came of it."""
        how = ("context", "chunk", "attention", "matmul", "split", "shots", "version", "data")
        return all(getattr(self, name) == getattr(other, name) for name in how)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskEvaluation:
    """The scores of a checkpoint on downstream tasks, by task."""

    method: str = ""
    cache: str = ""  # the format or the policy; empty for full forward passes
    step: int
    checkpoint: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of packages
    tasks: Mapping[str, TaskScore]


def made_as(asked: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether the record of a split was made in the way that is asked for."""
    older = {"attention": "xla", "matmul": "xla"}  # what older records lack
    return asked.items() <= (older | dict(record)).items()


def read(name: str, record: dict[str, Any], file: PathLike) -> Evaluation:
    """The evaluation in eval/NAME.json. Raises ValueError naming the file and the field that is wrong."""
    cache, kind = name.removeprefix("cached-"), Scores
    if cache != name:
        kind = EvictingScores if eviction.is_policy(cache) else CachedScores
    values = _values(Evaluation, record, file, but=("scores",))
    return Evaluation(**values, scores=_read(kind, record, file))


def read_tasks(record: dict[str, Any], file: PathLike) -> TaskEvaluation:
    """The evaluation in eval/tasks-NAME.json. Raises ValueError like `read`."""
    for task, score in files.field(record, "tasks", dict, file).items():
        if not isinstance(score, dict) or not isinstance(score.get("metrics"), dict):
            raise ValueError(f"{files.name(file)}: task {shown(task)} has no metrics")
    return _read(TaskEvaluation, record, file)


def plain(value: Any) -> Any:
    """A value as JSON has it. Fields that are None, or empty where that is their default, are left out."""
    if isinstance(value, Documents):
        return value.record()
    if dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: plain(inner) for name, inner in fields.items() if not _is_empty(inner)}
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | tuple | Mapping) and not value)


def _read(cls: type[T], record: dict[str, Any], where: PathLike) -> T:
    return cls(**_values(cls, record, where))


def _values(
    cls: Any, record: dict[str, Any], where: PathLike, but: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The fields of a dataclass that a record has."""
    values, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, value = field.name, record.get(field.name)
        optional = {field.default, field.default_factory} != {dataclasses.MISSING}
        if name in but or (value is None and optional):
            continue
        if value is None:
            raise ValueError(f"{files.name(where)}: field {name} is missing")
        values[name] = _value(hints[name], name, value, where)
    return values


def _value(hint: Any, name: str, value: Any, where: PathLike) -> Any:
    if isinstance(hint, types.UnionType):  # with None
        (hint,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
    inner = typing.get_args(hint)
    take = lambda kind: files.checked(value, name, kind, where)  # a name may have a dot
    if hint is Any:
        return value
    if hint is Documents:
        return documents.read(take(dict), where)
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast(type, hint), take(dict), f"{files.name(where)}: {name}")
    if typing.get_origin(hint) is tuple:
        return tuple(None if v is None else _value(inner[0], name, v, where) for v in take(list))
    if typing.get_origin(hint) is Mapping:
        known = {key: v for key, v in take(dict).items() if v is not None}
        return {key: _value(inner[1], key, v, where) for key, v in known.items()}
    return take(hint)
