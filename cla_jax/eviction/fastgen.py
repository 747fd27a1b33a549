"""FastGen (2310.01801): each head has the smallest set of tokens that keeps its attention on the prompt."""

import dataclasses
from typing import Literal

import numpy as np

from cla_jax.eviction.policy import Choice, Policy, Seen
from cla_jax.eviction.rule import (
    PUNCTUATION,
    SPECIAL,
    Rule,
    kept,
    kept_whatever_its_score,
    make_rule,
    parts,
    window_of,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FastGen(Policy):
    """Each KV head takes the first of these sets that keeps at least the share T of its attention:

        special          special tokens
        +punctuation     and punctuation
        +frequent        and the share r_f of tokens that received most attention
        +local           and the share r_l of newest tokens
        full             everything

    Kept attention is the probability on kept tokens, as a mean over the positions of the prompt. For one
    position it is 1 minus the total variation between attention before and after the eviction. If several
    layers and query heads read a KV head, T holds for each of them (`over` = min) or for their mean (`over` =
    mean).

    Shares are of the current length; in the profile, of the prompt's length. The most attended tokens are
    chosen among those that the set does not already contain. The profile takes those at the end of the
    prompt.
    """

    kind = "fastgen"
    scoring = "attention"
    needs_classes = True
    needs_losses = True
    names = ("special", "+punctuation", "+frequent", "+local", "full")

    T: float = 0.95
    r_l: float = 0.3
    r_f: float = 0.3
    over: Literal["min", "mean"] = "min"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("T", "r_l", "r_f"):
            self._share(name)
        if self.over not in ("min", "mean"):
            raise ValueError(f"fastgen: over = {self.over!r} must be min or mean")
        if self.T == 1:  # all heads are full: a decode step ranks nothing
            object.__setattr__(self, "scoring", "none")

    def candidates(self, heads: tuple[int, int]) -> list[Rule]:
        """A rule for each of `names`."""
        both, frequent = SPECIAL | PUNCTUATION, (parts(self.r_f), 0)
        return [
            make_rule(heads, classes=SPECIAL),
            make_rule(heads, classes=both),
            make_rule(heads, classes=both, hitters=frequent),
            make_rule(heads, classes=both, hitters=frequent, window=(parts(self.r_l), 0)),
            make_rule(heads, since=0),
        ]

    def choose(self, seen: Seen) -> Choice:
        rules = self.candidates(seen.heads)
        dropped, bands = [], []
        classes_BKS, positions = seen.classes_BKS(), np.arange(seen.classes_BS.shape[-1])
        lengths_BK = np.broadcast_to(seen.lengths_B[:, None], seen.heads)
        for rule in rules[:-1]:
            kept_BKS = kept(
                rule, classes_BKS, seen.received_BKS, seen.lengths_B, self.sinks, self.recent
            )
            # Each query has its own newest tokens, so those at the end of the prompt count as dropped here.
            # `bands` has how many newest tokens a query keeps in addition.
            static = kept_whatever_its_score(
                rule._replace(window_share=0 * rule.since, since=0 * rule.since + (1 << 30)),
                *(positions, classes_BKS, lengths_BK + (1 << 29), self.sinks, self.recent),
            )
            always_BKS = kept_whatever_its_score(
                rule, positions, classes_BKS, lengths_BK, self.sinks, self.recent
            )
            dropped.append(~(static | (kept_BKS & ~always_BKS)))
            bands.append(window_of(rule, lengths_BK, self.recent)[:, 0])
        lost = seen.lost(np.stack(dropped), np.stack(bands))
        over = {"min": np.max, "mean": np.mean}[self.over]
        enough_CBK = over(lost.mean, axis=(1, 4)) <= 1 - self.T
        if self.T == 1:  # keeps everything, also what no query of the prompt looked at
            enough_CBK = np.zeros_like(enough_CBK)
        full = np.ones((1, *seen.heads), bool)
        policy_BK = np.argmax(np.concatenate([enough_CBK, full]), axis=0)
        of = lambda arrays: np.take_along_axis(np.stack(arrays), policy_BK[None], axis=0)[0]
        nothing = np.zeros((1, *seen.heads))
        recovery = {
            "min": 1 - of([*np.max(lost.mean, axis=(1, 4)), nothing[0]]),
            "mean": 1 - of([*np.mean(lost.mean, axis=(1, 4)), nothing[0]]),
            "worst": 1 - of([*np.max(lost.worst, axis=(1, 4)), nothing[0]]),
            "last": 1 - of([*np.mean(lost.last, axis=(1, 4)), nothing[0]]),
        }
        return Choice(
            rule=Rule(*map(of, zip(*rules, strict=True))),
            scores_BKS=seen.received_BKS,
            policy_BK=policy_BK,
            recovery=recovery,
        )
