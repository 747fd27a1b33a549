"""Which source of a mixture each training row comes from, in closed form.

Rows are numbered from 0 over the whole run. The components of a mixture are interleaved. With the weights 7,
2 and 1 (or 0.7, 0.2 and 0.1), each block of ten rows has seven, two and one of them. Within a block the
components named first come a little earlier. A stage has weights of its own. It goes on in every component
where the stage before stopped.

grain's `MapDataset.mix` interleaves alike, but rounds the weights (0.7 and 0.3 become 233 and 100) and
cannot start in the middle of its components.
"""

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction

from cla_jax.config import Config


class Schedule:
    """The components of a run's rows.

    Args:
      stages: the first row and the weights of each stage, in order; the first begins at row 0.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]]):
        assert stages[0][0] == 0, stages
        self._stages = [(first, shares(weights)) for first, weights in stages]

    def counts(self, rows: int) -> list[int]:
        """How many of the first rows are of each component."""
        total = [0] * len(self._stages[0][1])
        ends = [first for first, _ in self._stages[1:]]
        for (first, weights), end in zip(self._stages, [*ends, rows], strict=True):
            if first >= rows:
                break
            new = _interleaved(min(end, rows) - first, weights)
            total = [before + more for before, more in zip(total, new, strict=True)]
        return total

    def place(self, row: int) -> tuple[int, int]:
        """The component of a row, and how many rows of that component come before it."""
        before, after = self.counts(row), self.counts(row + 1)
        component = next(i for i, count in enumerate(after) if count > before[i])
        return component, before[component]


def schedule(config: Config) -> Schedule:
    """The schedule of a run."""
    if not config.data.mixture:
        return ONE_SOURCE
    return Schedule(
        [(step * config.batch_size, weights) for step, weights in config.data.weights_by_step]
    )


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """The least whole numbers in the proportions of weights, read as decimals: 0.7 is exactly 7/10."""
    exact = [Fraction(repr(weight)) for weight in weights]
    whole = [int(weight * math.lcm(*(each.denominator for each in exact))) for weight in exact]
    return tuple(number // math.gcd(*whole) for number in whole)


def seed_of(seed: int, name: str) -> int:
    """The seed of a component's order: it depends on its name alone, so other components do not change it."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big") if name else seed


def _interleaved(rows: int, weights: tuple[int, ...]) -> list[int]:
    """How many of the first rows are of each component.

    The first component takes its share of the rows, rounded up; the others share the rest likewise.
    """
    counts, remaining = [], sum(weights)
    for weight in weights:
        others = rows * (remaining - weight) // remaining if remaining else 0
        counts.append(rows - others)
        rows, remaining = others, remaining - weight
    return counts


ONE_SOURCE = Schedule([(0, (1.0,))])


def of_component(metric: str, component: str) -> str:
    """The name of a metric of one component of a mixture; of one source alone, its own."""
    return f"{metric}/{component}" if component else metric
