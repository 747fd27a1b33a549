"""Tokens that the last queries of the prompt attend to (SnapKV, 2404.14469; AdaKV, 2407.11550)."""

import dataclasses

import numpy as np

from cla_jax.eviction.policy import Budgeted, Choice, Seen
from cla_jax.eviction.rule import CHOSEN, make_rule


@dataclasses.dataclass(frozen=True, kw_only=True)
class SnapKV(Budgeted):
    """Keeps the first tokens of a prompt, its last `window` tokens, and those with the highest scores.

    The score of a token is the attention from the last `window` queries, max-pooled over `pool` neighbours.
    The choice is made once: the budget is for the prompt, and all later tokens are kept. If a prompt has no
    more tokens than are always kept, it is kept whole.
    """

    kind = "snapkv"
    counts = (*Budgeted.counts, "window", "pool")

    window: int = 32
    pool: int = 7

    def __post_init__(self) -> None:
        if self.window < self.recent:
            raise ValueError(
                f"{self.kind}: window = {self.window} is less than recent = {self.recent}"
            )
        if self.pool < 1 or self.pool % 2 == 0:
            raise ValueError(f"{self.kind}: pool = {self.pool} must be odd")
        super().__post_init__()

    @property
    def always(self) -> int:
        return self.sinks + self.window

    @property
    def observation(self) -> int:
        return self.window

    def choose(self, seen: Seen) -> Choice:
        scores_BKS = self.pooled(seen)
        chosen_BKS = self.top(scores_BKS, self._free(seen))
        since_B = np.maximum(seen.lengths_B - self.window, 0)
        rule = make_rule(seen.heads, classes=CHOSEN, since=since_B[:, None])
        return Choice(rule=rule, scores_BKS=seen.received_BKS, chosen_BKS=chosen_BKS)

    def _free(self, seen: Seen) -> np.ndarray:
        """Positions that each head may choose, [B, K]."""
        free_B = np.maximum(self.budget(seen.lengths_B) - self.always, 0)
        return np.broadcast_to(free_B[:, None], seen.heads)

    def pooled(self, seen: Seen) -> np.ndarray:
        """The pooled score of each position that is not kept anyway; less than zero elsewhere. [B, K, S]"""
        S, half = seen.observed_BKS.shape[-1], self.pool // 2
        at = np.arange(S)
        choosable_BKS = (at >= self.sinks) & (at < (seen.lengths_B - self.window)[:, None, None])
        choosable_BKS = np.broadcast_to(choosable_BKS, seen.observed_BKS.shape)
        padded = np.pad(np.where(choosable_BKS, seen.observed_BKS, -1.0), [(0, 0), (0, 0), (half, half)],
                        constant_values=-1.0)  # fmt: skip
        pooled = np.max([padded[..., i : i + S] for i in range(self.pool)], axis=0)
        return np.where(choosable_BKS, pooled, -1.0)

    @staticmethod
    def top(scores_BKS: np.ndarray, counts_BK: np.ndarray) -> np.ndarray:
        """The positions with the highest scores, none with a score below zero; the newer of equal ones."""
        S = scores_BKS.shape[-1]
        order = np.argsort(-scores_BKS[..., ::-1], axis=-1, kind="stable")
        rank = np.empty_like(order)
        np.put_along_axis(rank, order, np.broadcast_to(np.arange(S), order.shape), axis=-1)
        return (rank[..., ::-1] < counts_BK[..., None]) & (scores_BKS >= 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaKV(SnapKV):
    """SnapKV with one budget for all KV heads of a layer: the highest scores of all heads are kept.

    Each head may choose at least the share `floor` of an even split.
    """

    kind = "adakv"

    floor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self._share("floor", zero=True)

    def choose(self, seen: Seen) -> Choice:
        choice = super().choose(seen)
        B, K, S = seen.received_BKS.shape
        scores_BKS, free_BK = self.pooled(seen), self._free(seen)
        sure_BKS = self.top(scores_BKS, np.ceil(free_BK * self.floor).astype(int))
        left_B = np.maximum(free_BK.sum(1) - sure_BKS.sum((1, 2)), 0)
        # Scores of a head are shares of its own queries' attention, so heads compare.
        others_B1N = np.where(sure_BKS, -1.0, scores_BKS).reshape(B, 1, K * S)
        more_BKS = self.top(others_B1N, left_B[:, None]).reshape(B, K, S)
        return dataclasses.replace(choice, chosen_BKS=sure_BKS | more_BKS)
