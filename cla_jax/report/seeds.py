"""Runs that differ in their seed alone, as one row; runs that differ in their learning rate, as one curve."""

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from etils import epath

from cla_jax import statistics
from cla_jax.config.record import run_identity
from cla_jax.evaluation import EvictingScores, Scores
from cla_jax.eviction import is_policy
from cla_jax.fields import flatten
from cla_jax.messages import printable
from cla_jax.report.rows import Row
from cla_jax.statistics import Optimum


def settings(row: Row) -> dict[str, Any]:
    """The fields of a config that say which run it is, by their dotted names."""
    return flatten(run_identity(row.config))


def values_of(row: Row, fields: Sequence[str]) -> tuple[str, ...]:
    """What a run has in some fields."""
    known = settings(row)
    return tuple(str(known.get(field)) for field in fields)


def merged(
    rows: Sequence[Row], group_by: Sequence[str] = (), over: Sequence[str] = ("seed",)
) -> list[Row]:
    """A row for all runs of one directory that differ in nothing but their seed.

    Its evaluation holds the means, and `seeds` the runs that count: finished, evaluated, and as they were
    written. `left_out` names the others. Where none counts, or two runs have the same seed, the runs stay as
    they are.

    Args:
      group_by: fields of the config; then all runs with the same values of these are one row, wherever they
        lie.
      over: the fields that runs of a row may differ in.

    Raises:
      ValueError: of the runs that `group_by` puts together, some differ in other fields too, or have the same
        seed.
    """
    made: list[Row] = []
    groups = _groups(rows, group_by, over)
    for group in groups:
        if group_by:
            name = _check_group(group, group_by, over)
        else:  # seeds stand at the end of names, where they are easily left out; other fields do not
            name = "" if tuple(over) == ("seed",) else _distinction(group, groups, over)
        counting = [row for row in group if not excuse(row)]
        by_data: dict[str, list[Row]] = {}
        for row in counting:
            by_data.setdefault(_data(row), []).append(row)
        distinct = len({values_of(row, over) for row in group}) == len(group)
        if not distinct or not counting or (len(group) == 1 and not group_by):
            made += group
        elif len(by_data) == 1:
            made.append(_mean(group, counting, name, over))
        else:  # of different data: rows of their own
            made += [_mean(part, part, name, over) for part in by_data.values()]
            made += [row for row in group if excuse(row)]
    return made


def _groups(
    rows: Sequence[Row], group_by: Sequence[str] = (), over: Sequence[str] = ("seed",)
) -> list[list[Row]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = (values_of(row, group_by), row.cache, row.context) if group_by else _key(row, *over)
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _distinction(group: Sequence[Row], groups: Sequence[Sequence[Row]], over: Sequence[str]) -> str:
    """What a group has in the fields in which groups differ; empty if it is none, or of one run."""
    differing = _differing([one[0] for one in groups], over)
    pairs = zip(differing, values_of(group[0], differing), strict=True)
    return ", ".join(f"{f.rpartition('.')[2]} {v}" for f, v in pairs) if len(group) > 1 else ""


def _differing(rows: Sequence[Row], over: Sequence[str]) -> list[str]:
    """The fields in which rows differ, apart from `over`."""
    known = [settings(row) for row in rows]
    fields = dict.fromkeys(field for one in known for field in one if field not in over)
    return [field for field in fields if len({str(one.get(field)) for one in known}) > 1]


def _check_group(group: Sequence[Row], group_by: Sequence[str], over: Sequence[str]) -> str:
    """The name of a group. Raises ValueError if its runs are not comparable values of `over`."""
    values = zip(group_by, values_of(group[0], group_by), strict=True)
    name = ", ".join(f"{field.rpartition('.')[2]} {value}" for field, value in values)
    if differing := _differing(group, over):
        raise ValueError(
            f"the runs with {printable(name)} differ in {', '.join(differing)} too: give each of these to "
            "--group-by or to --over"
        )
    by_value: dict[tuple[str, ...], Row] = {}
    for row in group:
        other = by_value.setdefault(values_of(row, over), row)
        if other is not row:
            same = ", ".join(
                f"{field} {value}" for field, value in zip(over, values_of(row, over), strict=True)
            )
            raise ValueError(f"{other.name} and {row.name} have the same {same}: leave one out")
    return name


def excuse(row: Row) -> str:
    """Why a run does not count in a mean; empty for one that does."""
    if row.altered:
        return row.altered[0]
    if not row.evaluation:
        return f"no evaluation{f', {row.progress}' if row.progress else ''}"
    return row.progress


def left_out(
    rows: Sequence[Row], group_by: Sequence[str] = (), over: Sequence[str] = ("seed",)
) -> list[str]:
    """A line for each run that its row leaves out of the mean, with the reason."""
    told = []
    for group in _groups(rows, group_by, over):
        whole = {row.path for made in merged(group, group_by, over) for row in (made, *made.seeds)}
        told += [
            f"{row.name} is left out of the mean over {words(over)}: {excuse(row)}"
            for row in group
            if row.path not in whole
        ]
    return told


def words(over: Sequence[str]) -> str:
    """What runs of a row differ in."""
    return "seeds" if tuple(over) == ("seed",) else ", ".join(over)


def _key(row: Row, *fields: str) -> str:
    """Equal for runs of one directory that differ in nothing but these fields."""
    identity = settings(row)
    for field in fields:
        identity.pop(field, None)
    where = [os.path.dirname(row.path), row.cache, row.context]
    return json.dumps([identity, where], sort_keys=True, default=str)


def _data(row: Row) -> str:
    """Equal for evaluations of the same text in the same tokens."""
    counts = [getattr(row.scores, key, None) for key in ("tokens", "bytes")]
    return json.dumps([row.tokenizer, row.record.get("data_fingerprint"), counts])


def _mean(group: Sequence[Row], counting: Sequence[Row], name: str, over: Sequence[str]) -> Row:
    counting = sorted(counting, key=lambda row: row.config.seed)
    sizes = {row.kv_bytes for row in counting}
    if len(sizes) > 1 and not is_policy(counting[0].cache):
        raise ValueError(
            f"{counting[0].name} and others that differ in {', '.join(over)} have {min(sizes):,.0f} to "
            f"{max(sizes):,.0f} KV bytes per token: they cannot be one row"
        )
    evaluations = [row.evaluation for row in counting if row.evaluation]
    evaluation = dataclasses.replace(
        evaluations[0], scores=_mean_scores([one.scores for one in evaluations])
    )
    cached = [row.evaluations.get("cached-dense") for row in counting]
    through = {}
    if not counting[0].cache and all(cached):
        known = [one for one in cached if one]
        scores = _mean_scores([one.scores for one in known])
        through = {"cached-dense": dataclasses.replace(known[0], scores=scores)}
    if name and counting[0].cache:
        name += f", {counting[0].cache}"
    elif not name:
        name = common_name([row.name for row in group]) if len(group) > 1 else group[0].name
    what = "seed" if tuple(over) == ("seed",) else "run"
    return dataclasses.replace(
        counting[0],
        name=f"{printable(name)} ({len(counting)} {what}{'s' * (len(counting) > 1)})",
        evaluation=evaluation,
        evals={},
        evaluations=through,
        tasks={},
        seeds=tuple(counting),
    )


def _mean_scores(scored: Sequence[Scores]) -> Scores:
    """The first of the scores, with the mean of each measure, and of what evicting caches keep."""
    names = ["perplexity", "bits_per_byte"]
    if all(isinstance(one, EvictingScores) for one in scored):  # it may differ between seeds
        names.append("resident_share")
    means: dict[str, Any] = {
        key: math.fsum(getattr(one, key) for one in scored) / len(scored) for key in names
    }
    first = scored[0].components
    if first and all(one.components.keys() == first.keys() for one in scored):
        means["components"] = {
            name: _mean_scores([one.components[name] for one in scored]) for name in first
        }
    return dataclasses.replace(scored[0], **means)


def common_name(names: Sequence[str]) -> str:
    """What runs of several seeds are called together: `mqa` for `mqa.seed-0` and `mqa.seed-1`."""
    bare = {re.sub(r"[.,_/-]?seed[-=_]?\d+", "", name) for name in names}
    if len(bare) == 1 and "" not in bare:
        return bare.pop()
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).strip(".,-_=/ ") or names[0]


# -------------------------------------------------------------------------------- learning rates


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """Rows that differ in their learning rate alone."""

    name: str
    rows: tuple[Row, ...]  # by rising rate
    # Bits per byte; infinite for a run that diverged, NaN where there is no result yet.
    losses: tuple[float, ...]
    best: Optimum | None  # None: fewer than three results

    @property
    def rates(self) -> tuple[float, ...]:
        return tuple(row.config.optimizer.peak_lr for row in self.rows)

    @property
    def note(self) -> str:
        """What is missing from the curve; empty for one that is whole."""
        waiting = sum(math.isnan(loss) for loss in self.losses)
        if waiting:
            return f"{self.name}: {waiting} of {len(self.losses)} learning rates have no result yet"
        if self.best is None:
            return f"{self.name}: a best learning rate needs three results"
        if self.best.edge:
            which, way = {"low": ("lowest", "lower"), "high": ("highest", "higher")}[self.best.edge]
            return (
                f"{self.name}: the best learning rate, {self.best.rate:.3g}, is the {which} tried: "
                f"try {way} ones"
            )
        return ""


def curves(rows: Sequence[Row], diverged: frozenset[str] = frozenset()) -> list[Curve]:
    """The learning-rate curves among merged rows; `diverged` are paths of runs."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if not row.cache:
            groups.setdefault(_key(row, "seed", "optimizer.peak_lr"), []).append(row)
    made = []
    for group in groups.values():
        group.sort(key=lambda row: row.config.optimizer.peak_lr)
        rates = [row.config.optimizer.peak_lr for row in group]
        if len(set(rates)) < 2 or len(set(rates)) < len(rates):
            continue
        losses = tuple(_loss(row, diverged) for row in group)
        known = [(r, y) for r, y in zip(rates, losses, strict=True) if not math.isnan(y)]
        enough = sum(math.isfinite(loss) for loss in losses) >= 3
        best = statistics.best_rate(*zip(*known, strict=True)) if enough else None
        names = [re.sub(r"[.,_/-]?(lr|peak_lr)[-=_][0-9.e+-]*\d", "", row.name) for row in group]
        name = names[0] if len(set(names)) == 1 and names[0] else common_name(names)
        made.append(Curve(name=name, rows=tuple(group), losses=losses, best=best))
    return made


def _loss(row: Row, diverged: frozenset[str]) -> float:
    if str(epath.Path(row.path)) in diverged:
        return math.inf
    if excuse(row) and not row.seeds:
        return math.nan
    return row.scores.bits_per_byte if row.scores else math.nan


def best_of_rates(rows: Sequence[Row], diverged: frozenset[str] = frozenset()) -> list[Row]:
    """The rows without those that lose to another learning rate of the same model."""
    losing = set()
    for curve in curves(rows, diverged):
        finite = [i for i, loss in enumerate(curve.losses) if math.isfinite(loss)]
        if finite:
            best = min(finite, key=lambda i: curve.losses[i])
            losing |= {row.path for i, row in enumerate(curve.rows) if i != best}
    return [row for row in rows if row.path not in losing]


def rate_table(curves: Sequence[Curve]) -> tuple[str, list[str], list[list[str]], str]:
    """A title, headings, a line for each curve, and what they mean."""
    made = []
    for curve in curves:
        tried = []
        for rate, loss in zip(curve.rates, curve.losses, strict=True):
            result = (
                "diverged"
                if math.isinf(loss)
                else "no result"
                if math.isnan(loss)
                else f"{loss:.4f}"
            )
            tried.append(f"{rate:.3g}: {result}")
        best = curve.best
        made.append(
            [
                curve.name,
                "; ".join(tried),
                f"{best.rate:.3g}" if best else "—",
                f"{best.loss:.4f}" if best else "—",
                curve.note.removeprefix(f"{curve.name}: ") or "inside the rates tried",
            ]
        )
    headings = [
        "row",
        "bits per byte by rate",
        "best rate",
        "bits per byte at best rate",
        "optimum",
    ]
    below = (
        "The best rate is the minimum of a parabola in the logarithm of the rate, through the best point and "
        "its neighbours. If the best point is at an edge of the rates tried, its rate is taken, and more "
        "rates must be tried."
    )
    return "Best learning rates", headings, made, below
