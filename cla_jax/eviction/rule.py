"""Which entries a KV head keeps, as numbers: one rule for every policy, at prefill and at each decode step.

An entry is kept if any of these holds:

    it is one of the first `sinks` tokens, or of the newest `recent` ones;
    it is one of the newest `window` tokens;
    its position is `since` or later;
    its class (special, punctuation, chosen) is one of `classes`;
    of all other entries, it is among the `hitters` with the highest score. Of equal scores the newer wins.

`window` and `hitters` are shares of the current length, rounded up, plus a fixed number of tokens. Where
`joint` is 1, they have one budget: `hitters` is the number of both, and the window's tokens count in it.
"""

from typing import Any, NamedTuple

import numpy as np

SHARES = 10_000  # shares are whole numbers of these parts, so that host and device round alike
LONGEST = 200_000  # tokens of a row: beyond, a share times a length would not fit in 32 bits
EMPTY = 1 << 30  # the position of an entry that holds nothing, and a `since` that keeps nothing

SPECIAL, PUNCTUATION, CHOSEN = 1, 2, 4  # bits of an entry's class


class Rule(NamedTuple):
    """Integers for each row and KV head, [B, K]; numpy on the host, jax arrays on the device."""

    window_share: Any
    window_fixed: Any
    hitters_share: Any
    hitters_fixed: Any
    joint: Any
    classes: Any
    since: Any


def make_rule(
    shape: tuple[int, ...],
    *,
    window: tuple[Any, Any] = (0, 0),
    hitters: tuple[Any, Any] = (0, 0),
    joint: Any = 0,
    classes: Any = 0,
    since: Any = EMPTY,
) -> Rule:
    """A rule for [B, K] heads; pairs are (parts of `SHARES`, fixed)."""
    filled = (np.broadcast_to(value, shape) for value in (*window, *hitters, joint, classes, since))
    return Rule(*(np.array(value, np.int32) for value in filled))


def parts(share: float) -> int:
    """A share in parts of `SHARES`."""
    return round(share * SHARES)


def share_of(share: Any, fixed: Any, length: Any) -> Any:
    """The one rounding rule: a share of a length, rounded up, plus a fixed number; never below zero."""
    return (-(-share * length // SHARES) + fixed).clip(0)


def keeps_all(rule: Rule, sinks: int) -> Any:
    """Which heads are certain to keep every token at any length, [B, K], by `since` or by the window.

    A window may be shorter by the first `sinks` tokens, because these are kept anyway.
    """
    return (rule.since <= 0) | ((rule.window_share >= SHARES) & (rule.window_fixed >= -sinks))


def window_of(rule: Rule, lengths_BK: Any, recent: int) -> Any:
    """Newest tokens that a head always keeps."""
    return share_of(rule.window_share, rule.window_fixed, lengths_BK).clip(recent)


def hitters_of(rule: Rule, lengths_BK: Any, recent: int) -> Any:
    """Entries that a head keeps for their score."""
    number_BK = share_of(rule.hitters_share, rule.hitters_fixed, lengths_BK)
    return (number_BK - rule.joint * window_of(rule, lengths_BK, recent)).clip(0)


def kept_whatever_its_score(
    rule: Rule, positions_BKE: Any, classes_BKE: Any, lengths_BK: Any, sinks: int, recent: int
) -> Any:
    """Which entries a head keeps without looking at scores. Meaningless where an entry is empty."""
    over_entries = lambda a_BK: a_BK[..., None]
    window_BK = window_of(rule, lengths_BK, recent)
    return (
        (positions_BKE < sinks)
        | (positions_BKE >= over_entries(lengths_BK - window_BK))
        | (positions_BKE >= over_entries(rule.since))
        | ((classes_BKE & over_entries(rule.classes)) != 0)
    )


def kept(
    rule: Rule,
    classes_BKS: np.ndarray,
    scores_BKS: np.ndarray,
    lengths_B: np.ndarray,
    sinks: int,
    recent: int,
) -> np.ndarray:
    """Which of the S positions of a row each head keeps, on the host. [B, K, S]"""
    positions = np.arange(classes_BKS.shape[-1])
    lengths_BK = np.broadcast_to(lengths_B[:, None], rule.since.shape)
    held_BKS = np.broadcast_to(positions < lengths_B[:, None, None], classes_BKS.shape)
    always_BKS = held_BKS & kept_whatever_its_score(
        rule, positions, classes_BKS, lengths_BK, sinks, recent
    )
    rest_BKS = held_BKS & ~always_BKS
    order = np.lexsort((-np.broadcast_to(positions, rest_BKS.shape), -scores_BKS, ~rest_BKS))
    rank_BKS = np.empty_like(order)
    np.put_along_axis(rank_BKS, order, np.broadcast_to(positions, order.shape), axis=-1)
    return always_BKS | (rest_BKS & (rank_BKS < hitters_of(rule, lengths_BK, recent)[..., None]))


def most_kept(rule: Rule, kept_BK: np.ndarray, lengths_B: np.ndarray, new_tokens: Any, *,
              sinks: int, recent: int, chunk: int) -> np.ndarray:  # fmt: skip
    """Entries that a head needs at most while it grows by `new_tokens` [B], `chunk` tokens a step.

    A step writes before it evicts. What keeps tokens for their class may keep every new one.
    """
    new_B = np.broadcast_to(np.asarray(new_tokens, np.int32), lengths_B.shape)
    grown_BK = kept_BK + new_B[:, None]
    longest_BK = np.broadcast_to((lengths_B + new_B)[:, None], kept_BK.shape)
    window_BK = window_of(rule, longest_BK, recent)
    bound_BK = sinks + window_BK + hitters_of(rule, longest_BK, recent) + chunk
    unbounded_BK = (rule.since < EMPTY) | (rule.classes & (SPECIAL | PUNCTUATION) != 0)
    unbounded_BK |= rule.classes & CHOSEN != 0  # as many as were chosen, which `kept` counts
    return np.where(unbounded_BK, grown_BK, np.minimum(grown_BK, bound_BK))
