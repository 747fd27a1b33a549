"""The base classes of policies, what a policy is given (`Seen`), and what it returns (`Choice`)."""

import abc
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from cla_jax.eviction.rule import LONGEST, SHARES, Rule, parts, share_of
from cla_jax.messages import shown

# Where the scores of entries come from while decoding: received attention, or `first_scores`. With "none"
# nothing is ranked.
Scoring = Literal["none", "attention", "first"]


class Lost(NamedTuple):
    """The attention that C candidates would lose, for each reader layer and query head. [C, R, B, K, G]"""

    mean: np.ndarray  # over the positions of the prompt
    worst: np.ndarray  # the maximum over the positions
    last: np.ndarray  # the mean over the last `LAST` positions


LAST = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seen:
    """What a policy knows of B prompts, for one KV layer. Positions beyond a length are padding."""

    lengths_B: np.ndarray  # tokens of each prompt
    layer: int  # the number of the KV layer
    tokens_BS: np.ndarray  # ids
    classes_BS: np.ndarray  # SPECIAL, PUNCTUATION
    # Attention that each position received, summed over queries, reader layers and query heads.
    received_BKS: np.ndarray
    observed_BKS: np.ndarray  # the same, only of the last `observation` queries
    # (dropped [C, B, K, S], bands [C, B]) -> what C candidates would lose. A candidate drops these positions,
    # except for a query that has them among its newest `band` positions.
    lost: Callable[[np.ndarray, np.ndarray], Lost]

    @property
    def heads(self) -> tuple[int, int]:
        B, K, _ = self.received_BKS.shape
        return B, K

    def classes_BKS(self) -> np.ndarray:
        return np.broadcast_to(self.classes_BS[:, None], self.received_BKS.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a policy returns for one KV layer."""

    rule: Rule  # what each head keeps
    scores_BKS: np.ndarray  # the first scores of the prompt's entries; the highest stay
    chosen_BKS: np.ndarray | None = None  # positions that get the class CHOSEN
    # FastGen: the index of the chosen set for each head, and how much attention that set keeps.
    policy_BK: np.ndarray | None = None
    recovery: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy(abc.ABC):
    """Base class: which tokens a KV cache keeps. The fields are the settings.

    The first `sinks` tokens and the newest `recent` tokens are always kept. `format` is the cache format of
    the kept tokens. To add a policy, define `kind` and `choose`, and list the class in `POLICIES`.

    Raises ValueError, naming the setting, for a value that is out of range.
    """

    kind: ClassVar[str]  # the name in the text form
    scoring: ClassVar[Scoring] = "none"  # how entries are ranked while decoding
    # Whether the tokenizer must have special tokens and punctuation.
    needs_classes: ClassVar[bool] = False
    # Whether it uses attention. If not, the attention in `Seen` is zero.
    profiles: ClassVar[bool] = True
    # Whether it calls `Seen.lost`, for which the prefill remembers its queries.
    needs_losses: ClassVar[bool] = False
    counts: ClassVar[Sequence[str]] = ("sinks", "recent")  # settings that are numbers of tokens
    names: ClassVar[Sequence[str]] = ()  # FastGen: the sets, from which each head has one

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
        """The text form, with the settings that differ from their defaults."""
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
        """The values that compiled decode steps depend on. Policies with equal values share programs.

        A policy with `first_scores` of its own shares none by default: they may depend on any setting.
        """
        own = () if type(self).first_scores is Policy.first_scores else (self,)
        return self.scoring, self.sinks, self.recent, *own

    @property
    def observation(self) -> int:
        """How many of the prompt's last queries `Seen.observed_BKS` sums over; 0 if it is not needed."""
        return 0

    def check(self, lengths_B: Sequence[int]) -> None:  # noqa: B027
        """Raises ValueError if the settings do not fit prompts of these lengths."""

    @abc.abstractmethod
    def choose(self, seen: Seen) -> Choice:
        """What each KV head of each prompt keeps, for one KV layer. Called once, after the prefill."""

    def first_scores(self, positions: Any, tokens: Any, heads: Any, layer: int) -> Any:
        """Scores of new tokens in a KV layer, if `scoring` is "first". Arrays are uint32 and broadcast."""
        del tokens, heads, layer
        return np.zeros((1,) * positions.ndim, np.float32)

    def _share(self, name: str, zero: bool = False) -> None:
        value = getattr(self, name)
        least, bracket = (0, "[") if zero else (1 / SHARES, "(")
        if not least <= value <= 1 or abs(value * SHARES - parts(value)) > 1e-6:
            percent = (
                f"; it is a fraction: did you mean {value / 100:g}?" if 2 <= value <= 100 else ""
            )
            raise ValueError(
                f"{self.kind}: {name} = {shown(value)} must lie in {bracket}0, 1] and be a multiple of "
                f"1/{SHARES:,}{percent}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Budgeted(Policy):
    """Base class of policies with a budget for each KV head.

    The budget is `keep`, a share of the tokens so far, or `tokens`, a number of tokens.
    """

    counts = (*Policy.counts, "tokens")

    keep: float = 0.0
    tokens: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep and self.tokens:
            raise ValueError(f"{self.kind}: keep and tokens are two budgets: give only one of them")
        if not self.keep and not self.tokens:
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
        """Number of tokens that are kept whatever the budget is."""
        return self.sinks + self.recent

    def budget(self, lengths: Any) -> Any:
        """Number of tokens that a head keeps of this number of tokens."""
        return share_of(parts(self.keep), self.tokens, np.asarray(lengths))

    def pair(self, halves: int = 1) -> tuple[int, int]:
        """The budget without the first tokens, divided by `halves`: (share, number) of a rule."""
        return parts(self.keep) // halves, (self.tokens - self.sinks) // halves

    def check(self, lengths_B: Sequence[int]) -> None:
        for length in sorted(set(map(int, lengths_B))):
            if length > self.always > self.budget(length):
                raise ValueError(
                    f"{self.kind}: keep = {self.keep:g} of a prompt of {length} tokens is "
                    f"{int(self.budget(length))}, less than the {self.always} tokens that are always kept"
                )
