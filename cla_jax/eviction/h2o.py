"""The newest tokens, and as many of those that received most attention (H2O, 2306.14048)."""

import dataclasses

from cla_jax.eviction.policy import Budgeted, Choice, Seen
from cla_jax.eviction.rule import make_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Budgeted):
    """Keeps the newest tokens and the most attended tokens.

    The score of a token is the attention from all queries so far, summed over all layers and query heads
    that read it. The budget without the first `sinks` tokens is divided. One half is for the newest tokens,
    but at least `recent`; a share of the length is rounded up. The rest is for the tokens with the highest
    scores.
    """

    kind = "h2o"
    scoring = "attention"

    def choose(self, seen: Seen) -> Choice:
        rule = make_rule(seen.heads, window=self.pair(2), hitters=self.pair(), joint=1)
        return Choice(rule=rule, scores_BKS=seen.received_BKS)
