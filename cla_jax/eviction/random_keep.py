"""Tokens at random: the control that a policy has to beat."""

import dataclasses
from typing import Any

import numpy as np

from cla_jax.eviction.policy import Budgeted, Choice, Seen
from cla_jax.eviction.rule import make_rule


def priorities(positions: Any, heads: Any, seed: int) -> Any:
    """A number in [0, 1) for each position and head, unsigned integers of 32 bits: the same everywhere."""
    mixed = (positions * np.uint32(2654435761)) ^ (heads * np.uint32(2246822519))
    mixed = mixed ^ np.uint32((seed * 3266489917) % 2**32)
    for shift, factor in ((16, 2146121005), (15, 2221713035)):
        mixed = (mixed ^ (mixed >> np.uint32(shift))) * np.uint32(factor)
    mixed = mixed ^ (mixed >> np.uint32(16))
    return (mixed >> np.uint32(8)).astype(np.float32) / np.float32(2**24)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Budgeted):
    """Each position has a random priority for each KV head; the highest stay."""

    kind = "random"
    scoring = "random"
    profiles = False

    seed: int = 0

    def choose(self, seen: Seen) -> Choice:
        _, K = seen.heads
        share, fixed = self.pair()
        rule = make_rule(seen.heads, hitters=(share, fixed - self.recent))
        S = seen.received_BKS.shape[-1]
        scores_KS = priorities(
            np.arange(S, dtype=np.uint32), np.arange(K, dtype=np.uint32)[:, None], self.seed
        )
        return Choice(rule=rule, scores_BKS=np.broadcast_to(scores_KS, seen.received_BKS.shape))
