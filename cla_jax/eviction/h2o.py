"""Half of the budget for the newest tokens, half for those that received most attention (H2O, 2306.14048)."""

import dataclasses

from cla_jax.eviction.policy import Budgeted, Choice, Seen
from cla_jax.eviction.rule import make_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class H2O(Budgeted):
    """Scores are sums of attention over all queries so far, of all layers and heads that read the cache."""

    kind = "h2o"
    scoring = "attention"

    def choose(self, seen: Seen) -> Choice:
        half, whole = self.pair(2), self.pair()
        rest = (whole[0] - half[0], whole[1] - half[1])
        rule = make_rule(seen.heads, window=half, hitters=rest)
        return Choice(rule=rule, scores_BKS=seen.received_BKS)
