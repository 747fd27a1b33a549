"""Tokens at random: the control that a policy has to beat."""

import dataclasses
from typing import Any

import numpy as np

from cla_jax.eviction.policy import Budgeted, Choice, Seen
from cla_jax.eviction.rule import make_rule
from cla_jax.messages import shown

FACTORS = 2654435761, 2246822519, 3266489917, 668265263, 374761393  # odd: no number is lost


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Budgeted):
    """Keeps the first and the newest tokens, and random other ones.

    Each entry has a random score, and the highest are kept. The score depends on the seed, the KV layer and
    head, the position and the token. So layers, heads and texts drop different tokens, and a text drops the
    same tokens in every batch.
    """

    kind = "random"
    scoring = "first"
    profiles = False

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"{self.kind}: seed = {shown(self.seed)} must lie in 0 to 2**32 - 1")

    @property
    def programs(self) -> tuple[Any, ...]:
        return self.scoring, self.sinks, self.recent, self.kind, self.seed  # whatever the budget

    def first_scores(self, positions: Any, tokens: Any, heads: Any, layer: int) -> Any:
        """A number in [0, 1) for each entry: the same on the host and on devices."""
        by_position, by_token, by_head, by_layer, by_seed = FACTORS
        fixed = np.uint32((layer * by_layer ^ self.seed * by_seed) % 2**32)
        mixed = positions * np.uint32(by_position) ^ tokens * np.uint32(by_token)
        mixed = _mixed(mixed) ^ heads * np.uint32(by_head) ^ fixed
        return (_mixed(mixed) >> np.uint32(8)).astype(np.float32) / np.float32(2**24)

    def choose(self, seen: Seen) -> Choice:
        _, K = seen.heads
        share, fixed = self.pair()
        rule = make_rule(seen.heads, hitters=(share, fixed - self.recent))
        positions = np.arange(seen.tokens_BS.shape[-1], dtype=np.uint32)
        tokens_B1S = seen.tokens_BS.astype(np.uint32)[:, None]
        heads_K1 = np.arange(K, dtype=np.uint32)[:, None]
        scores_BKS = self.first_scores(positions, tokens_B1S, heads_K1, seen.layer)
        return Choice(rule=rule, scores_BKS=scores_BKS)


def _mixed(bits: Any) -> Any:
    """Unsigned integers of 32 bits, each bit of which depends on all bits of the given ones."""
    for shift, factor in ((16, 2146121005), (15, 2221713035)):
        bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
    return bits ^ (bits >> np.uint32(16))
