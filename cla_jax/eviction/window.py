"""The first tokens and a window of the newest ones (StreamingLLM, 2309.17453)."""

import dataclasses

from cla_jax.eviction.policy import Budgeted, Choice, Seen
from cla_jax.eviction.rule import make_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Window(Budgeted):
    """Keeps the first tokens and the newest ones."""

    kind = "window"
    profiles = False

    def choose(self, seen: Seen) -> Choice:
        return Choice(rule=make_rule(seen.heads, window=self.pair()), scores_BKS=seen.received_BKS)
