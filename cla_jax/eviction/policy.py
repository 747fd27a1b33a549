"""What the policies have in common: their settings, what they are shown, and what they choose."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from cla_jax.eviction.rule import LONGEST, SHARES, Rule, parts, share_of
from cla_jax.messages import shown

Scoring = Literal["none", "attention", "random"]


class Lost(NamedTuple):
    """Attention that candidates would lose, [C, R, B, K, G]: of each reader layer and query head."""

    mean: np.ndarray  # over the positions of the prompt
    worst: np.ndarray  # of any position
    last: np.ndarray  # the mean over the last positions, see `LAST`


LAST = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What a policy is shown of the prompts, for one KV layer; positions beyond a length are padding."""

    lengths_B: np.ndarray
    layer: int  # the number of the KV layer
    tokens_BS: np.ndarray
    classes_BS: np.ndarray  # SPECIAL, PUNCTUATION
    # Attention that each position received, summed over queries, reader layers and query heads.
    received_BKS: np.ndarray
    observed_BKS: np.ndarray  # the same, of the last `observation` queries
    # (dropped [C, B, K, S], bands [C, B]) -> what C candidates would lose. A candidate drops these positions
    # except where they are among the newest `band` of a query.
    lost: Callable[[np.ndarray, np.ndarray], Lost]

    @property
    def heads(self) -> tuple[int, int]:
        B, K, _ = self.received_BKS.shape
        return B, K

    def classes_BKS(self) -> np.ndarray:
        return np.broadcast_to(self.classes_BS[:, None], self.received_BKS.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a policy chooses for one KV layer."""

    rule: Rule
    scores_BKS: np.ndarray
    chosen_BKS: np.ndarray | None = None  # positions with the class CHOSEN
    # FastGen: the chosen policy of each head, and the recovery of that policy.
    policy_BK: np.ndarray | None = None
    recovery: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """Which tokens a KV cache keeps. The settings are the fields.

    `sinks` first tokens and the `recent` newest are always kept. `format` is how a token is kept: a cache
    format that keeps every token by itself.
    """

    kind: ClassVar[str]
    scoring: ClassVar[Scoring] = "none"
    needs_classes: ClassVar[bool] = False
    profiles: ClassVar[bool] = (
        True  # whether it looks at attention; if not, what it is shown are zeros
    )
    counts: ClassVar[Sequence[str]] = ("sinks", "recent")  # settings that are numbers of tokens
    names: ClassVar[Sequence[str]] = ()  # of the policies among which each head has one

    sinks: int = 4
    recent: int = 8
    format: str = "dense"

    def __post_init__(self) -> None:
        for name, least in (("sinks", 0), ("recent", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{self.kind}: {name} = {value} must be at least {least}")
        for name in self.counts:
            if (value := getattr(self, name)) > LONGEST:
                raise ValueError(
                    f"{self.kind}: {name} = {shown(value)} is more than the {LONGEST:,} tokens that a row "
                    f"may have"
                )

    @property
    def name(self) -> str:
        """The text form, with the settings that are not the default ones."""
        changed = [
            f"{field.name}={getattr(self, field.name):g}"
            if isinstance(getattr(self, field.name), float)
            else f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ":".join([self.kind, ",".join(changed)]) if changed else self.kind

    @property
    def programs(self) -> tuple[Any, ...]:
        """What compiled decode steps depend on: policies with equal values share programs."""
        return self.scoring, self.sinks, self.recent

    @property
    def observation(self) -> int:
        """Last queries of the prompt whose attention is summed apart."""
        return 1

    def check(self, lengths_B: Sequence[int]) -> None:  # noqa: B027
        """Raises ValueError for prompts that the settings do not fit; by default they fit all."""

    @abc.abstractmethod
    def choose(self, seen: Seen) -> Choice: ...

    def first_scores(self, positions: Any, tokens: Any, heads: Any, layer: int) -> Any:
        """Scores of new tokens in a KV layer; the arrays are unsigned integers of 32 bits and broadcast."""
        del tokens, heads, layer
        return np.zeros((1,) * positions.ndim, np.float32)

    def _share(self, name: str, zero: bool = False) -> None:
        value = getattr(self, name)
        least, bracket = (0, "[") if zero else (1 / SHARES, "(")
        if not least <= value <= 1 or abs(value * SHARES - parts(value)) > 1e-6:
            raise ValueError(
                f"{self.kind}: {name} = {shown(value)} must lie in {bracket}0, 1] and be a multiple of "
                f"1/{SHARES:,}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(Policy):
    """A policy with a budget for each head: `keep`, a share of the tokens so far, or `tokens`, a number."""

    counts = (*Policy.counts, "tokens")

    keep: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.keep != 0) == (self.tokens != 0):
            raise ValueError(
                f"{self.kind}: give a budget, either keep (a fraction of the tokens) or tokens (a number); "
                f"for example {self.kind}:keep=0.25"
            )
        if self.keep:
            self._share("keep")
        elif self.tokens < self.always:
            raise ValueError(
                f"{self.kind}: tokens = {self.tokens} is less than the {self.always} tokens that are always "
                f"kept"
            )

    @property
    def always(self) -> int:
        """Tokens that are kept whatever the budget is."""
        return self.sinks + self.recent

    def budget(self, lengths: Any) -> Any:
        """Tokens that a head keeps of so many."""
        return share_of(parts(self.keep), self.tokens, np.asarray(lengths))

    def pair(self, halves: int = 1) -> tuple[int, int]:
        """The budget without the first tokens, or half of it, as a rule has it."""
        return parts(self.keep) // halves, (self.tokens - self.sinks) // halves

    def check(self, lengths_B: Sequence[int]) -> None:
        for length in sorted(set(map(int, lengths_B))):
            if length > self.always > self.budget(length):
                raise ValueError(
                    f"{self.kind}: keep = {self.keep:g} of a prompt of {length} tokens is "
                    f"{int(self.budget(length))}, less than the {self.always} tokens that are always kept"
                )
