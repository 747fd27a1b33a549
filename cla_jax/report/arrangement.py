"""How a comparison is arranged, as its user asks: further columns, differences to a baseline, the order."""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from typing import Any

from cla_jax import costs
from cla_jax.messages import near_choice, printable
from cla_jax.report import seeds
from cla_jax.report.rows import Arrangement, Column, Row, comparison

# What the table shows of the config in columns of its own.
_SHOWN = {"model.n_heads", "model.n_kv_heads", "model.d_head", "model.kv_map"}
_LONGEST = 40  # characters of a setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What a user asks of a comparison; fields are dotted names of the config."""

    group_by: tuple[str, ...] = ()  # runs with the same values of these fields are one row
    over: tuple[str, ...] = ("seed",)  # runs that differ in these fields alone are one row
    baseline: str = ""  # the row, or a run of it, that others are compared with
    sort: str = ""  # a field, or one of `_ORDERS`


def merged(rows: Sequence[Row], view: View) -> list[Row]:
    """The rows of a comparison. Raises ValueError for a field that no run has, with the nearest ones."""
    known = dict.fromkeys(field for row in rows for field in seeds.settings(row))
    for what, names in (("--group-by", view.group_by), ("--over", view.over)):
        for name in names:
            near_choice(f"field of {what}", name, known)
    return seeds.merged(rows, view.group_by, view.over)


def arrange(rows: Sequence[Row], view: View, among: frozenset[str] | None = None) -> Arrangement:
    """Columns and order of merged rows. Raises ValueError for an unknown run or field.

    Args:
      among: paths of the runs that are ranked, if not all are.
    """
    flat = [seeds.settings(row) for row in rows]
    columns = [_setting(name, flat) for name in _differing(flat, view)]
    words = ""
    if view.baseline:
        base = _baseline(rows, view.baseline)
        columns = [*_differences(rows, base, view.over), *columns]
        words = (
            f"Difference: bits per byte minus those of {base.name}; below 0 is better. It is the mean over "
            f"pairs of runs with equal {seeds.words(view.over)}, ± one standard deviation. If there are no "
            "pairs, it is the difference of the means."
        )
    order = None
    if view.sort:
        known = _orders(rows, columns) | {
            name: [settings.get(name) for settings in flat]
            for name in dict.fromkeys(name for settings in flat for name in settings)
        }
        if view.sort == "difference" and not view.baseline:
            raise ValueError("--sort difference needs --baseline")
        near_choice("field of --sort", view.sort, known)
        values = known[view.sort]
        order = tuple(sorted(range(len(rows)), key=lambda i: (_key(values[i]), rows[i].name)))
    return Arrangement(columns=tuple(columns), order=order, words=words, among=among)


def _orders(rows: Sequence[Row], columns: Sequence[Column]) -> dict[str, list[Any]]:
    """What rows can be sorted by besides the fields of their configs."""
    scores = ("perplexity", "bits_per_byte")
    orders: dict[str, list[Any]] = {
        "run": [row.name for row in rows],
        "kv_bytes": [row.kv_bytes for row in rows],
        "parameters": [costs.parameters(row.config.model).total for row in rows],
        **{score: [getattr(row.scores, score, None) for row in rows] for score in scores},
    }
    return orders | {one.name: list(one.values) for one in columns if one.name == "difference"}


def _key(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then words, then what is not known."""
    if isinstance(value, int | float) and not math.isnan(value):
        return 0, float(value), ""
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))


def _differing(flat: Sequence[dict[str, Any]], view: View) -> list[str]:
    """The fields in which rows differ and that no other column shows."""
    names = dict.fromkeys(name for settings in flat for name in settings)
    return [
        name
        for name in names
        if name not in _SHOWN
        and name not in view.over
        and len({str(settings.get(name)) for settings in flat}) > 1
    ]


def _setting(name: str, flat: Sequence[dict[str, Any]]) -> Column:
    values = [settings.get(name) for settings in flat]
    texts = ["—" if value is None else printable(str(value), _LONGEST) for value in values]
    where, dot, last = name.rpartition(".")
    numbers = all(value is None or isinstance(value, int | float) for value in values)
    return Column(
        name=name,
        heading=f"{where}{dot}\n{last}" if where else name,
        values=tuple(values),
        texts=tuple(texts),
        side="right" if numbers else "left",
    )


def _baseline(rows: Sequence[Row], name: str) -> Row:
    """The row that is called so, or that has a run that is, by its name or its path."""
    known: dict[str, Row] = {}
    for row in rows:
        for one in (row, *row.seeds):
            cache = f", {row.cache}" * bool(row.cache)
            own = one.name.removesuffix(cache)
            for word in (own, seeds.common_name([own.partition(" (")[0]]), one.path.rstrip("/")):
                known.setdefault(f"{word}{cache}", row)
    name = name.rstrip("/")
    bare = {row.name.partition(" (")[0]: row for row in rows}
    if name not in known:  # few names in what is said, not the paths of all runs
        near_choice("run of --baseline", name, bare)
    return known.get(name) or bare[name]


def _differences(rows: Sequence[Row], base: Row, over: Sequence[str]) -> list[Column]:
    """Bits per byte minus those of the baseline, and the deviation over the seeds that both have."""
    comparable = comparison(rows).ranked
    differences = [_difference(row, base, over) if comparable else (None, None) for row in rows]
    texts = [
        "baseline"
        if row is base
        else "—"
        if mean is None
        else f"{mean:+.4f}"
        + (f" ± {deviation:.4f}" if deviation is not None else "")
        + ("*" if row.from_training or base.from_training else "")
        for row, (mean, deviation) in zip(rows, differences, strict=True)
    ]
    means, deviations = zip(*differences, strict=True)
    return [
        Column(name="difference", heading="difference", values=means, texts=tuple(texts)),
        Column(name="difference_sd", heading="", values=deviations, texts=()),
    ]


def _difference(row: Row, base: Row, over: Sequence[str]) -> tuple[float | None, float | None]:
    if not row.scores or not base.scores:
        return None, None
    scores, baseline = (_by_seed(one, over) for one in (row, base))
    pairs = [scores[seed] - baseline[seed] for seed in scores if seed in baseline]
    if not pairs:
        return row.scores.bits_per_byte - base.scores.bits_per_byte, None
    return math.fsum(pairs) / len(pairs), statistics.stdev(pairs) if len(pairs) > 1 else None


def _by_seed(row: Row, over: Sequence[str]) -> dict[tuple[str, ...], float]:
    return {
        seeds.values_of(one, over): one.scores.bits_per_byte
        for one in row.seeds or (row,)
        if one.scores
    }
