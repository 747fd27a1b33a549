"""What runs say: rows, whether they may be compared, their points, and the table."""

import dataclasses
import hashlib
import math
import os
import shlex
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from etils import epath
from rich.table import Table
from rich.text import Text

from cla_jax import costs
from cla_jax.config import Config
from cla_jax.report.pareto import Point, frontier
from cla_jax.runs import Run, is_local

Measure = Literal["perplexity", "bits_per_byte"]
Record = dict[str, Any]

_SCORES = ("perplexity", "bits_per_byte", "tokens")  # of every evaluation but those of tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the comparison: a run, or a run that was decoded through a further cache format."""

    name: str  # short: unique among the rows
    path: str
    config: Config
    record: Record  # config.json as it stands there
    evals: dict[str, Record]
    metrics: list[Record]
    tokenizer: str  # digest of tokenizer.json
    cache: str = ""  # of cached decoding; empty: by full forward, bytes of a dense 16-bit cache
    evaluation: Record | None  # the one that is compared

    @property
    def kv_bytes(self) -> float:
        if self.cache and self.evaluation:
            return self.evaluation["kv_bytes"]["resident"]["counted"]
        return costs.kv_bytes(self.config.model, self.config.data.seq_len).resident

    @property
    def sharing(self) -> float:
        """Layers for each layer that has keys and values of its own."""
        return self.config.model.n_layers / self.config.model.n_slots

    @property
    def progress(self) -> str:
        """`step n/N` for a run, or an evaluation, that stopped early; else empty."""
        if "origin" in self.record:  # imported: nothing was trained here
            return ""
        seen = self.evaluation or (self.metrics[-1] if self.metrics else {"step": 0})
        done, steps = seen["step"], self.config.steps
        return f"step {done:,}/{steps:,}" if done < steps else ""


def read(runs: Sequence[Run]) -> list[Row]:
    """A row a run, named by its path below what all share, and one for each eval/cached-NAME.json.

    Raises ValueError naming a file that is missing or broken.
    """
    common = common_directory(run.path.parent for run in runs)
    found = []
    for run in runs:
        path = _absolute(run.path)
        found += _read(run, str(path.relative_to(common) if common else path))
    return found


def _read(run: Run, name: str) -> list[Row]:
    evals = run.evals()
    for stem, record in evals.items():
        if missing := {"step", *(() if stem.startswith("tasks-") else _SCORES)} - set(record):
            what = ", ".join(sorted(missing))
            raise ValueError(
                f"{run.path / 'eval' / stem}.json has no {what}: evaluate the run again"
            )
    row = Row(
        name=name,
        path=str(run.path),
        config=run.config(),
        record=run.record(),
        evals=evals,
        metrics=run.read_metrics(),
        tokenizer=hashlib.sha256(run.tokenizer_json().encode()).hexdigest(),
        evaluation=evals.get("full"),
    )
    # Through a dense cache a model is the same point again, to the last digits.
    stems = [stem for stem in evals if stem.startswith("cached-") and stem != "cached-dense"]
    caches = {stem.removeprefix("cached-"): evals[stem] for stem in stems}
    return [row] + [
        dataclasses.replace(row, name=f"{name}, {cache}", cache=cache, evaluation=evaluation)
        for cache, evaluation in caches.items()
    ]


def common_directory(paths: Iterable[str | os.PathLike[str]]) -> epath.Path | None:
    """The deepest directory that is, or holds, each of the paths; None if that is only a root."""
    first, *others = ([path, *path.parents] for path in map(_absolute, paths))
    shared = [path for path in first if all(path in other for other in others)]
    return shared[0] if shared and not str(shared[0]).endswith("/") else None


def _absolute(path: str | os.PathLike[str]) -> epath.Path:
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


def comparison(rows: Sequence[Row]) -> tuple[Measure, str]:
    """In which measure rows are ranked, and a warning that may be empty.

    A perplexity is per token, so it says nothing about another tokenizer. Bits per byte survive
    that, but not another text.
    """
    found = [(row, row.config.data, row.evaluation) for row in rows if row.evaluation]
    texts = {(data.source, data.held_out) for _, data, _ in found}
    tokenizers = {(row.tokenizer, data.end_token) for row, data, _ in found}
    tokens = {(row.record["data_fingerprint"], scored["tokens"]) for row, _, scored in found}
    if len(texts) > 1:
        return "bits_per_byte", "Not comparable: the runs were evaluated on different text."
    if len(tokenizers) > 1:
        return "bits_per_byte", (
            "The tokenizers differ, so perplexities are not comparable: compare bits per byte."
        )
    if len(tokens) > 1:
        return "perplexity", "Compare with care: context lengths or the evaluated tokens differ."
    return "perplexity", ""


def notes(rows: Sequence[Row]) -> list[str]:
    """What to know about a comparison: its warning, and how to evaluate what is not evaluated."""
    missing = [
        f"{row.name} is not evaluated: python -m launch.evaluate {shlex.quote(row.path)}"
        for row in rows
        if not row.evaluation
    ]
    wide = [
        row.name
        for row in rows
        if row.cache and (row.evaluation or {}).get("cache_dtype") == "float32"
    ]
    units = ""
    if wide:
        units = (
            f"{', '.join(wide)}: what the format does not quantise is float32, as the model computes; rows "
            "without a cache count 16-bit elements."
        )
    return [note for note in (comparison(rows)[1], units, *missing) if note]


def points(rows: Sequence[Row]) -> list[Point]:
    """A point a row, in the measure of `comparison`; one that is not evaluated is infinitely bad."""
    measure, _ = comparison(rows)
    found = []
    for row in rows:
        layers = f"{row.sharing:.3g} layers per KV" if row.sharing > 1 else "1 layer per KV"
        point = Point(
            label=row.name,
            kv_bytes=row.kv_bytes,
            quality=row.evaluation[measure] if row.evaluation else math.inf,
            series=f"{layers}, {row.cache} cache" if row.cache else layers,
            unfinished=bool(row.progress),
        )
        found.append(point)
    return found


# -------------------------------------------------------------------------------------- table

COLUMNS: dict[str, Literal["left", "right", "center"]] = {
    "": "center",
    "run": "left",
    "heads\nq/kv": "right",
    "d_head": "right",
    "kv_map": "left",
    "parameters\nno embed.": "right",
    "parameters\ntotal": "right",
    "KV bytes\nper token": "right",
    "perplexity\nfull": "right",
    "bits per\nbyte": "right",
    "perplexity\ncached": "right",
    "training\ntokens/s": "right",
}
CAPTION = (
    "● on the Pareto frontier. KV bytes: resident, per token of context, 16-bit "
    "elements unless the line names a cache. Perplexity and bits per byte: held-out split."
)


def lines(rows: Sequence[Row]) -> list[tuple[Row, list[str]]]:
    """The lines of the table as (row, a cell for each of COLUMNS), by KV bytes, then quality.

    The first cell is empty for what is not on the frontier.
    """
    found = points(rows)
    best = frontier(found)
    order = sorted(range(len(rows)), key=lambda i: (found[i].kv_bytes, found[i].quality))
    return [(rows[i], _cells(rows[i], i in best)) for i in order]


def _cells(row: Row, on_frontier: bool) -> list[str]:
    model, scored, count = row.config.model, row.evaluation, costs.parameters(row.config.model)
    full, cached = (None, scored) if row.cache else (scored, row.evals.get("cached-dense"))
    if full and cached and cached["step"] != full["step"]:
        cached = None  # of another checkpoint
    speeds = [record["tokens_per_s"] for record in row.metrics if "tokens_per_s" in record]
    return [
        "●" if on_frontier else "",
        row.name,
        f"{model.n_heads}/{model.n_kv_heads}",
        str(model.d_head),
        model.kv_map,
        human(count.non_embedding),
        human(count.total),
        per_token(row.kv_bytes),
        f"{full['perplexity']:,.3f}" if full else "—",
        f"{scored['bits_per_byte']:.4f}" if scored else "—",
        f"{cached['perplexity']:,.3f}" if cached else "—",
        f"{statistics.median(speeds):,.0f}" if speeds else "—",
    ]


def table(rows: Sequence[Row]) -> Table:
    """The comparison for a terminal."""
    # Text throughout: names may hold what rich would read as markup.
    made = Table(caption=Text(CAPTION), caption_justify="left")
    for heading, justify in COLUMNS.items():
        fold = heading in ("run", "kv_map")
        made.add_column(Text(heading), justify=justify, no_wrap=not fold, overflow="fold")
    for row, cells in lines(rows):
        texts = [Text(cell) for cell in cells]
        if row.progress:
            texts[1].append(f"  {row.progress}", style="yellow")
        made.add_row(*texts, style="bold" if cells[0] else "")
    return made


def per_token(count: float) -> str:
    """Bytes a token, with a decimal only where they are not whole: 20, 284.9."""
    return f"{count:,.0f}" if count == round(count) else f"{count:,.1f}"


def human(count: float) -> str:
    """Three significant digits: 1.21M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= 0.9995 * size:
            return f"{count / size:#.3g}".rstrip(".") + suffix
    return f"{count:.0f}"
