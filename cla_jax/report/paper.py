"""Our results compared with those that a paper prints, row by row, and difference by difference."""

import dataclasses
from collections.abc import Mapping, Sequence

from cla_jax.report import seeds
from cla_jax.report.rows import Row

Table = tuple[str, Sequence[str], Sequence[Sequence[str]], str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What a paper prints of a row."""

    kv_bytes: float
    perplexity: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stated:
    """A difference in perplexity that a paper states: `row - other`."""

    row: str
    other: str
    value: float


def tables(
    rows: Sequence[Row], printed: Mapping[str, Line], stated: Sequence[Stated]
) -> list[Table]:
    """Tables of the rows that are the paper's, known by the name in their config; none if there are none."""
    found = {}
    for row in seeds.merged(rows):
        name = seeds.common_name([row.record.get("name", "")]).replace("/", ".")
        if not row.cache and name in printed:
            found[name] = row
    if not found:
        return []
    ours = {
        name: row.evaluation["perplexity"]
        for name, row in found.items()
        if row.evaluation and not (seeds.excuse(row) and not row.seeds)
    }
    number = lambda value, form="{:.2f}": "missing" if value is None else form.format(value)
    lines = []
    for name, line in printed.items():
        if name not in found:
            continue
        row, theirs = found[name], line.perplexity
        apart = None if theirs is None or name not in ours else ours[name] - theirs
        lines.append(
            [
                name,
                f"{row.kv_bytes:,.0f}",
                f"{line.kv_bytes:,.0f}",
                number(ours.get(name)),
                "not printed" if theirs is None else number(theirs),
                number(apart, "{:+.2f}"),
            ]
        )
    differences = []
    for one in stated:
        if one.row in found and one.other in found:
            both = one.row in ours and one.other in ours
            here = ours[one.row] - ours[one.other] if both else None
            apart = None if here is None else here - one.value
            cells = [f"{one.row} - {one.other}", number(here, "{:+.2f}"), f"{one.value:+.2f}"]
            differences.append([*cells, number(apart, "{:+.2f}")])
    headings = ["row", "KV bytes, ours", "the paper's", "perplexity, ours", "the paper's"]
    headings.append("ours minus the paper's")
    below = (
        "The paper's perplexities are of its own validation text: compare differences, not values."
    )
    made: list[Table] = [("Compared with the paper", headings, lines, below)]
    if differences:
        headings = ["difference in perplexity", "ours", "the paper's", "ours minus the paper's"]
        made.append(("Differences compared with the paper's", headings, differences, below))
    return made
