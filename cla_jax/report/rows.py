"""What runs say: rows, whether they may be compared, their points, and the table."""

import dataclasses
import functools
import hashlib
import logging
import math
import os
import shlex
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

from etils import epath
from rich.table import Table
from rich.text import Text

from cla_jax import costs, evaluation, files
from cla_jax.config import Config, LatentKV, ModelConfig
from cla_jax.config.record import from_record
from cla_jax.directories import is_local
from cla_jax.evaluation import Evaluation, EvictingScores, Scores, TaskEvaluation
from cla_jax.eviction import is_policy
from cla_jax.messages import printable
from cla_jax.report.pareto import Point, frontier
from cla_jax.runs import TRAINING, Run, find_runs, read_json
from cla_jax.statistics import pairs_needed

log = logging.getLogger(__name__)

Measure = Literal["perplexity", "bits_per_byte"]
Record = dict[str, Any]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the comparison: a run, or a run that was decoded through a further cache format."""

    name: str  # short: unique among the rows
    path: str
    config: Config
    record: Record  # config.json as it stands there
    evals: dict[str, Record]  # eval/*.json as they stand there
    evaluations: dict[str, Evaluation]  # the same, but those of tasks
    tasks: dict[str, TaskEvaluation]  # by the cache; `full` by full forward
    metrics: list[Record]
    tokenizer: str  # digest of tokenizer.json
    cache: str = ""  # the format of cached decoding; empty: by full forward
    evaluation: Evaluation | None  # the one that is compared
    context: int  # tokens of context that KV bytes are counted for
    altered: tuple[str, ...] = ()  # what of the run's records cannot be trusted, and is not used
    has_checkpoints: bool = True  # a published copy has none, so it cannot be evaluated
    # Where the row stands for runs that differ in their seed alone (see `seeds`): those that count.
    seeds: tuple["Row", ...] = ()

    @functools.cached_property
    def kv_bytes(self) -> float:
        """Resident KV bytes per token of context; what a format does not quantise has 16 bits."""
        if not self.cache:
            return costs.kv_bytes(self.config.model, self.context).resident
        return self._cached_bytes(self.cache, self.context)

    def saving(self, context: int) -> float:
        """What the cache holds at a context, as a share of a 16-bit cache."""
        held = self._cached_bytes(self.cache, context)
        return held / costs.kv_bytes(self.config.model, context).resident

    def _cached_bytes(self, cache: str, context: int) -> float:
        if is_policy(cache):
            # What it keeps is known from the evaluation alone, as a share of everything.
            assert isinstance(self.scores, EvictingScores)
            return self.scores.resident_share * costs.kv_bytes(self.config.model, context).resident
        from cla_jax.cache import ledger  # imports jax, which other rows do not need

        return ledger.resident_at_16_bits(self.config.model, cache, context)

    @property
    def scores(self) -> Scores | None:
        """Those that are compared."""
        return self.evaluation and self.evaluation.scores

    @property
    def sharing(self) -> float:
        """Layers for each layer that makes keys and values; where they differ, for half of both counts."""
        made = self.config.model.sharing
        return 2 * self.config.model.n_layers / (made.count("k") + made.count("v"))

    @property
    def from_training(self) -> bool:
        """Whether the evaluation, of a seed at least, is the one that training made."""
        evaluations = [row.evaluation for row in (self, *self.seeds) if row.evaluation]
        return any(one.method == TRAINING for one in evaluations)

    @property
    def trained_steps(self) -> int | None:
        """Steps that the evaluated, or the newest, parameters were trained for; None if imported."""
        if "origin" in self.record:
            return None
        if self.evaluation:
            return self.evaluation.step
        return self.metrics[-1]["step"] if self.metrics else 0

    @property
    def progress(self) -> str:
        """`step n/N` for a run, or an evaluation, that stopped early; else empty."""
        done, steps = self.trained_steps, self.config.steps
        return "" if done is None or done >= steps else f"step {done:,}/{steps:,}"


def read(
    runs: Sequence[Run], context: int | None = None, problems: list[str] | None = None
) -> list[Row]:
    """A row a run, named by its path below what all share, and one for each eval/cached-NAME.json.

    What of a run is damaged or altered is left out, and the row says so. Of a run whose config or tokenizer
    is such, nothing is compared.

    Args:
      context: what KV bytes are counted for, by default the window that a run was trained with.
      problems: is told why there is no row of a run.

    Raises:
      ValueError: a config says nothing of a model, and `problems` is not there to be told.
    """
    if context is not None and context < 1:
        raise ValueError(f"context = {context} must be positive")
    common = common_directory(run.path.parent for run in runs)
    rows = []
    for run in runs:
        path = _absolute(run.path)
        try:
            row, *cached = _read(run, str(path.relative_to(common) if common else path), context)
            rows.append(row)
        except ValueError as error:
            if problems is None:
                raise
            problems.append(f"{error}: the run is left out")
            continue
        for one in cached:
            try:
                _ = one.kv_bytes  # a format may be of another version, or of another's own code
            except ValueError as error:
                if problems is None:
                    raise
                problems.append(f"{one.name}: {error}: this evaluation is left out")
            else:
                rows.append(one)
    return rows


def _read(run: Run, name: str, context: int | None) -> list[Row]:
    altered: list[str] = []
    try:
        record, tokenizer = run.record(), run.tokenizer_json()
        files.field(record, "data_fingerprint", str, run.path / "config.json")
        config = run.config()
    except ValueError as error:
        return [_unusable(run, printable(name), context, str(error))]
    evals = run.evals(altered)
    evaluations: dict[str, Evaluation] = {}
    tasks: dict[str, TaskEvaluation] = {}
    for stem in tuple(evals):
        file, cache = run.path / "eval" / f"{stem}.json", stem.removeprefix("tasks-")
        try:
            if cache != stem:
                tasks[cache] = evaluation.read_tasks(evals[stem], file)
            else:
                evaluations[stem] = evaluation.read(stem, evals[stem], file)
        except ValueError as error:
            del evals[stem]
            altered.append(f"{error}: evaluate the run again")
    metrics: list[Record] = []
    try:
        torn_end: list[str] = []
        metrics = run.read_metrics(altered, torn_end)
        for words in torn_end:
            log.warning("%s", words)
        altered += run.missing_records().problems
    except ValueError as error:
        altered.append(str(error))
    name = printable(name)  # of a directory, which may be anyone's
    row = Row(
        name=name,
        path=str(run.path),
        config=config,
        record=record,
        evals=evals,
        evaluations=evaluations,
        tasks=tasks,
        metrics=metrics,
        tokenizer=hashlib.sha256(tokenizer.encode()).hexdigest(),
        evaluation=_newest(evaluations.get("full"), _made_by_training(metrics)),
        context=context or config.data.seq_len,
        altered=tuple(altered),
        has_checkpoints=run.checkpoints.is_dir(),
    )
    # Through a dense cache a model is the same point again, to the last digits.
    caches = {
        printable(stem.removeprefix("cached-")): one
        for stem, one in evaluations.items()
        if stem.startswith("cached-") and stem != "cached-dense"
    }
    return [row] + [
        dataclasses.replace(row, name=f"{name}, {cache}", cache=cache, evaluation=one)
        for cache, one in caches.items()
    ]


def _unusable(run: Run, name: str, context: int | None, why: str) -> Row:
    """A line for a run that says nothing that can be trusted, but perhaps what model it should be of.

    Raises ValueError if its config does not say even that.
    """
    file = run.path / "config.json"
    record = read_json(file)
    with files.about(file):
        config = from_record(record)
    return Row(
        name=name,
        path=str(run.path),
        config=config,
        record=record,
        evals={},
        evaluations={},
        tasks={},
        metrics=[],
        tokenizer="",
        evaluation=None,
        context=context or config.data.seq_len,
        altered=(why,),
    )


def _made_by_training(metrics: Sequence[Record]) -> Evaluation | None:
    """The last evaluation among the metrics, as if it were one of eval/*.json."""
    scores = {"perplexity", "bits_per_byte"}
    last = next((record for record in reversed(metrics) if scores <= set(record)), None)
    if last is None:
        return None
    parts: dict[str, Record] = {}
    for key, value in last.items():
        metric, _, name = key.partition("/")
        if name and metric in scores:
            parts.setdefault(name, {})[metric] = value
    return Evaluation(
        method=TRAINING,
        step=last["step"],
        scores=Scores(
            perplexity=last["perplexity"],
            bits_per_byte=last["bits_per_byte"],
            tokens=last.get("held_out_tokens"),
            bytes=last.get("held_out_bytes"),
            components={
                name: Scores(
                    perplexity=part.get("perplexity", math.nan),
                    bits_per_byte=part["bits_per_byte"],
                    tokens=None,
                )
                for name, part in parts.items()
                if "bits_per_byte" in part
            },
        ),
    )


def _newest(full: Evaluation | None, training: Evaluation | None) -> Evaluation | None:
    """The evaluation of the later step; of the same step, the one that was made apart from training."""
    if full is None or training is None:
        return full or training
    return training if training.step > full.step else full


def common_directory(paths: Iterable[str | os.PathLike[str]]) -> epath.Path | None:
    """The deepest directory that is, or holds, each of the paths; None if that is only a root."""
    first, *others = ([path, *path.parents] for path in map(_absolute, paths))
    shared = [path for path in first if all(path in other for other in others)]
    return shared[0] if shared and not str(shared[0]).endswith("/") else None


def _absolute(path: str | os.PathLike[str]) -> epath.Path:
    path = epath.Path(path)
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """Whether and how rows may be compared."""

    measure: Measure  # by which they are ranked
    ranked: bool = True  # False: no row is better than another
    warning: str = ""


def comparison(rows: Sequence[Row]) -> Comparison:
    """In which measure rows are ranked, if they may be, and a warning.

    A perplexity is per token, so it says nothing about another tokenizer. Bits per byte survive
    that, but not another text.
    """
    scored = [(row, row.config.data, row.scores) for row in rows if row.scores]
    texts = {(data.sources, data.held_out) for _, data, _ in scored}
    tokenizers = {(row.tokenizer, data.end_token) for row, data, _ in scored}
    n_bytes = {scores.bytes for _, _, scores in scored} - {None}
    n_tokens = {scores.tokens for _, _, scores in scored} - {None}
    # One text has one number of bytes. (The first token is not scored, and is as long as the tokenizer
    # makes it.)
    if len(texts) > 1 or (len(tokenizers) == 1 and len(n_bytes) > 1):
        return Comparison(
            measure="bits_per_byte",
            ranked=False,
            warning="Not comparable: the runs were evaluated on different text.",
        )
    if len(tokenizers) > 1:
        return Comparison(
            measure="bits_per_byte",
            warning="The tokenizers differ, so perplexities are not comparable: compare bits per byte.",
        )
    fingerprints = {row.record["data_fingerprint"] for row, _, _ in scored}
    if len(fingerprints) > 1 or len(n_tokens) > 1:
        warning = "Compare with care: the context lengths or the evaluated tokens differ."
        return Comparison(measure="perplexity", warning=warning)
    return Comparison(measure="perplexity")


def warnings(rows: Sequence[Row], problems: Sequence[str] = ()) -> list[str]:
    """What to know before one reads a comparison; `problems` are those of `read`."""
    altered = dict.fromkeys((*problems, *(why for row in rows for why in row.altered)))
    notes = [comparison(rows).warning, *altered, _lengths(rows), *_caches(rows)]
    return [note for note in notes if note]


def _lengths(rows: Sequence[Row]) -> str:
    """A warning where runs were trained for longer than others."""
    tokens = {
        row.trained_steps * row.config.tokens_per_step
        for row in rows
        if row.evaluation and row.trained_steps is not None
    }
    if len(tokens) < 2:
        return ""
    return (
        f"The runs were trained on different numbers of tokens, {human(min(tokens))} to "
        f"{human(max(tokens))}: so part of their difference may come from training."
    )


_LONG = 32_768  # a context at which every format shows what it saves


def _caches(rows: Sequence[Row]) -> list[str]:
    """Where a context is too short for a cache format to show what it saves, or what that costs."""
    notes: list[str] = []
    told: set[str] = set()
    for row in rows:
        if not row.cache or row.cache in told:
            continue
        told.add(row.cache)
        here, long = row.saving(row.context), row.saving(_LONG)
        if here > 1.1 * long:
            notes.append(
                f"A {row.cache} cache does not quantise its newest tokens. Compared with a 16-bit cache, it "
                f"saves {_saved(here)} at {row.context:,} tokens of context and {_saved(long)} at "
                f"{_LONG:,}; see python -m launch.compare --context {_LONG}."
            )
        scored = row.config.data.seq_len  # the windows that its perplexity was measured in
        if scored < row.context and row.saving(scored) > 1.1 * here:
            notes.append(
                f"The perplexity through a {row.cache} cache was measured in windows of {scored:,} tokens, "
                f"where it saves {_saved(row.saving(scored))}. With {row.context:,} tokens of context, more "
                "tokens are quantised, and the perplexity may be higher."
            )
    return notes


def _saved(share: float) -> str:
    return "nothing" if share >= 1 else f"{1 - share:.0%}"


def missing(rows: Sequence[Row]) -> str:
    """One line with the command that evaluates what is not evaluated, if anything is."""
    runs = [row for row in rows if not row.cache]
    usable = [row for row in runs if row.metrics or row.evaluation or not row.altered]
    unevaluated = [
        row for row in usable if not row.evaluation or (row.from_training and row.has_checkpoints)
    ]
    if not unevaluated:
        return ""
    names = (
        unevaluated[0].name if len(unevaluated) == 1 else f"{len(unevaluated)} of {len(runs)} runs"
    )
    verb = "is" if len(unevaluated) == 1 else "are"
    how = (
        " (*: what training measured is shown)"
        if any(row.from_training for row in unevaluated)
        else ""
    )
    command = shlex.join(("python", "-m", "launch.evaluate", *_arguments(unevaluated, runs)))
    return f"{names} {verb} not evaluated{how}: {command}"


def _arguments(missing: Sequence[Row], compared: Sequence[Row]) -> list[str]:
    """Paths that name these rows, a study's for all of its runs: what is evaluated is not done again."""
    known = {row.path for row in compared}
    by_parent: dict[str, list[str]] = {}
    for row in missing:
        by_parent.setdefault(str(epath.Path(row.path).parent), []).append(row.path)
    arguments = []
    for parent, paths in by_parent.items():
        whole = len(paths) > 1 and {str(run.path) for run in find_runs([parent], [])} <= known
        arguments += [parent] if whole else paths
    return arguments


def points(rows: Sequence[Row]) -> list[Point]:
    """A point a row, in the measure of `comparison`; one that is not evaluated is infinitely bad."""
    measure = comparison(rows).measure
    numbers = {path: i for i, path in enumerate(dict.fromkeys(row.path for row in rows))}
    of_rows = []
    for row in rows:
        layers = (
            f"{row.sharing:.3g} layers per KV layer" if row.sharing > 1 else "1 layer per KV layer"
        )
        point = Point(
            label=row.name,
            kv_bytes=row.kv_bytes,
            quality=getattr(row.scores, measure) if row.scores else math.inf,
            series=f"{layers}, {row.cache} cache" if row.cache else layers,
            colour=numbers[row.path],
            unfinished=bool(row.progress),
            seeds=tuple(getattr(seed.scores, measure) for seed in row.seeds if seed.scores),
            number=len(of_rows),
        )
        of_rows.append(point)
    return of_rows


def setting(rows: Sequence[Row]) -> str:
    """What the runs were trained on and for how long, their seeds and their held-out text."""
    rows = [seed for row in rows for seed in row.seeds or (row,)]
    if not rows:
        return "No run counts yet."
    of_rows = [row.config for row in rows]
    trained = [(row.config, steps) for row in rows if (steps := row.trained_steps) is not None]
    parts = []
    if trained:
        parts.append(
            f"Trained on {_range([steps * one.tokens_per_step for one, steps in trained])} tokens "
            f"({_range([steps for _, steps in trained])} steps of "
            f"{_range([one.tokens_per_step for one, _ in trained])}), "
            f"seed {_range([one.seed for one, _ in trained])}."
        )
    if len(trained) < len(rows):
        parts.append(f"{len(rows) - len(trained)} imported.")
    data = [config.data for config in of_rows]
    scored = [row.scores.tokens for row in rows if row.scores and row.scores.tokens]
    held_out = " and ".join(dict.fromkeys(f"{100 * one.held_out:.3g} %" for one in data))
    parts.append(
        f"Data: {_words(', '.join(one.sources) for one in data)}, tokenizer "
        f"{_words(one.tokenizer for one in data)}. "
        f"Held out: {held_out} of the documents{f', {_range(scored)} tokens' if scored else ''}, in "
        f"windows of {_range([one.seq_len for one in data])}."
    )
    return " ".join(parts)


def _range(numbers: Sequence[int]) -> str:
    """`7`, `0, 1 and 2`, or `1,024 to 8,192`."""
    values = [f"{value:,}" for value in sorted(set(numbers))]
    if len(values) > 3:
        return f"{values[0]} to {values[-1]}"
    return " and ".join(filter(None, (", ".join(values[:-1]), values[-1])))


def _words(texts: Iterable[str]) -> str:
    """Up to three different texts, and how many there are beyond them."""
    values = list(dict.fromkeys(texts))
    first = " and ".join(values[:3])
    return first if len(values) <= 3 else f"{first} and {len(values) - 3} more"


# -------------------------------------------------------------------------------------- table

# What the comparison is about comes first: a narrow screen shows it without scrolling.
COLUMNS: dict[str, Literal["left", "right", "center"]] = {
    "": "center",
    "run": "left",
    "KV bytes\nper token": "right",
    "perplexity": "right",
    "bits per\nbyte": "right",
    "perplexity\ncached": "right",
    "heads\nq/kv": "right",
    "d_head": "right",
    "kv_map": "left",
    "parameters\nno embed.": "right",
    "parameters\ntotal": "right",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A further column of the comparison, with a value and a text for each row."""

    name: str  # in tables for other programs
    heading: str  # empty: only in tables for other programs
    values: tuple[Any, ...]
    texts: tuple[str, ...]
    side: Literal["left", "right"] = "right"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrangement:
    """What a comparison shows besides what it always does; see `arrangement`."""

    columns: tuple[Column, ...] = ()
    order: tuple[int, ...] | None = None  # of the rows; None: by KV bytes, then quality
    words: str = ""  # for the caption
    # Paths of the runs of a study: other rows are shown, but are on no frontier. None: all are ranked.
    among: frozenset[str] | None = None

    def ranks(self, row: Row) -> bool:
        """Whether a row may be on the frontier."""
        return self.among is None or (not row.cache and row.path in self.among)

    @property
    def shown(self) -> list[Column]:
        return [column for column in self.columns if column.heading]


PLAIN = Arrangement()


def components(rows: Sequence[Row]) -> list[str]:
    """The components of the mixtures that rows were scored on, each for itself."""
    scored = [row.scores for row in rows if row.scores]
    return list(dict.fromkeys(name for one in scored for name in one.components))


def columns(
    rows: Sequence[Row], arranged: Arrangement = PLAIN
) -> dict[str, Literal["left", "right", "center"]]:
    """COLUMNS, one for each component of a mixture, and those of an arrangement."""
    made = dict(COLUMNS)
    for name in components(rows):
        made[f"bits per byte\n{printable(name)}"] = "right"
    for column in arranged.shown:
        made[column.heading] = column.side
    return made


def caption(rows: Sequence[Row], arranged: Arrangement = PLAIN) -> str:
    """What the table shows, and of what."""
    contexts = [row.context for row in rows]
    parts = []
    if comparison(rows).ranked:
        whose = "" if arranged.among is None else " of the rows that the study declares"
        parts.append(f"● on the Pareto frontier{whose}.")
    parts.append(
        f"KV bytes are resident bytes per token at {_range(contexts)} tokens of context, with 16 bits for "
        "elements that are not quantised."
    )
    parts.append(
        "Perplexity and bits per byte are those of the held-out split, by a full forward pass or through the "
        "cache that the row names."
    )
    if any(isinstance(row.config.model.kv, LatentKV) for row in rows):
        parts.append(
            "q/kv of a latent: query heads / width of the latent + width of the rotated key."
        )
    if any(row.from_training for row in rows):
        parts.append("*: measured during training.")
    if any(len(row.seeds) > 1 for row in rows):
        parts.append("±: one standard deviation over seeds.")
    if arranged.words:
        parts.append(printable(arranged.words, 4000))
    return " ".join(filter(None, (*parts, setting(rows), limits(rows))))


def limits(rows: Sequence[Row]) -> str:
    """What a comparison with few seeds can and cannot show; empty with enough of them, or of one row."""
    trained = [row for row in rows if row.evaluation and not row.cache]
    most = max((len(row.seeds) or 1 for row in trained), default=0)
    needed = pairs_needed()
    if len(trained) < 2 or most >= needed or any(row.trained_steps is None for row in trained):
        return ""
    shares = [
        (row.trained_steps or 0)
        * row.config.tokens_per_step
        / costs.parameters(row.config.model).total
        for row in trained
    ]
    span = " to ".join(dict.fromkeys(f"{share:.2g}" for share in (min(shares), max(shares))))
    return (
        f"{most} seed{'s' * (most > 1)} per row and {span} training tokens per parameter show how these runs "
        f"differ, but not which row is better in general: a sign-flip test needs at least {needed} paired "
        "seeds."
    )


def lines(rows: Sequence[Row], arranged: Arrangement = PLAIN) -> list[tuple[Row, list[str]]]:
    """The lines of the table as (row, a cell for each of `columns`), by KV bytes, then quality.

    The first cell is empty for what is not on the frontier, and for all where rows are not ranked.
    """
    plotted = points(rows)
    ranked = [
        point if arranged.ranks(row) else dataclasses.replace(point, quality=math.inf)
        for row, point in zip(rows, plotted, strict=True)
    ]
    best = frontier(ranked) if comparison(rows).ranked else []
    order = arranged.order
    if order is None:
        order = sorted(range(len(rows)), key=lambda i: (plotted[i].kv_bytes, plotted[i].quality))
    names = components(rows)
    made = []
    for i in order:
        further = [column.texts[i] for column in arranged.shown]
        made.append((rows[i], _cells(rows[i], i in best) + _parts(rows[i], names) + further))
    return made


def _parts(row: Row, names: Sequence[str]) -> list[str]:
    """Bits per byte of components."""
    parts = row.scores.components if row.scores else {}
    return [f"{parts[name].bits_per_byte:.4f}" if name in parts else "—" for name in names]


def _cells(row: Row, on_frontier: bool) -> list[str]:
    scored = row.evaluation
    cached = scored if row.cache else row.evaluations.get("cached-dense")
    if scored and cached and cached.step != scored.step:
        cached = None  # of another checkpoint
    mark = "*" if row.from_training else ""
    return [
        "●" if on_frontier else "",
        row.name,
        per_token(row.kv_bytes),
        f"{scored.scores.perplexity:,.3f}{mark}" if scored else "—",
        f"{scored.scores.bits_per_byte:.4f}{_spread(row)}{mark}" if scored else "—",
        f"{cached.scores.perplexity:,.3f}" if cached else "—",
        same(row, _heads) or "several",
        same(row, lambda one: str(one.d_head)) or "several",
        same(row, lambda one: one.kv_map) or "several",
        same(row, lambda one: human(costs.parameters(one).non_embedding)) or "several",
        same(row, lambda one: human(costs.parameters(one).total)) or "several",
    ]


def _heads(model: ModelConfig) -> str:
    """Query heads and KV heads, `4/1`; of a latent its width and that of the rotated key, `4/64+16`."""
    kept = f"{model.kv.rank}+{model.kv.rope_dims}" if isinstance(model.kv, LatentKV) else None
    return f"{model.n_heads}/{kept or model.n_kv_heads}"


def same(row: Row, of: Callable[[ModelConfig], T]) -> T | None:
    """What the models of all runs of a row have; None if they differ."""
    values = [of(one.config.model) for one in row.seeds or (row,)]
    return values[0] if all(one == values[0] for one in values) else None


def _spread(row: Row) -> str:
    """The standard deviation over the seeds of a row; empty for a single run."""
    values = [seed.scores.bits_per_byte for seed in row.seeds if seed.scores]
    return f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""


# Columns that a narrow terminal does not show, the first to go first.
_DISPENSABLE = (
    "parameters\ntotal",
    "d_head",
    "heads\nq/kv",
    "kv_map",
    "parameters\nno embed.",
    "perplexity\ncached",
)
# Columns whose cells may take several lines, and their least width.
_FOLDING, _FOLDED = ("run", "kv_map"), 12


def table(rows: Sequence[Row], width: int | None = None, arranged: Arrangement = PLAIN) -> Table:
    """The comparison for a terminal; one with a width shows the columns that fit."""
    body = lines(rows, arranged)
    headings = dict(enumerate(columns(rows, arranged).items()))
    settings = [column.heading for column in arranged.shown if column.name != "difference"]
    widths = [
        _width(heading, [cells[i] for _, cells in body]) for i, (heading, _) in headings.items()
    ]
    hidden: set[str] = set()
    for name in (*settings[::-1], *_DISPENSABLE):
        here = [widths[i] + 3 for i, (heading, _) in headings.items() if heading not in hidden]
        if width is None or sum(here) + 1 <= width:
            break
        hidden.add(name)
    words = caption(rows, arranged)
    if hidden:
        words += " A wider terminal, and the report, show further columns."
    # Text throughout: names may hold what rich would read as markup.
    made = Table(caption=Text(words), caption_justify="left")
    for _, (heading, justify) in headings.items():
        if heading not in hidden:
            fold = heading in _FOLDING
            made.add_column(Text(heading), justify=justify, no_wrap=not fold, overflow="fold")
    for row, cells in body:
        texts = [Text(cell) for cell in cells]
        if row.progress:
            texts[1].append(f"  {row.progress}", style="yellow")
        shown_cells = [texts[i] for i, (heading, _) in headings.items() if heading not in hidden]
        made.add_row(*shown_cells, style="bold" if cells[0] else "")
    return made


def _width(heading: str, cells: Sequence[str]) -> int:
    """What a column needs without cutting anything off."""
    words = max(map(len, heading.split("\n")))
    widest = max([words, *map(len, cells)])
    return min(widest, max(words, _FOLDED)) if heading in _FOLDING else widest


def per_token(count: float) -> str:
    """Bytes a token, with a decimal only where they are not whole: 20, 284.9."""
    return f"{count:,.0f}" if count == round(count) else f"{count:,.1f}"


def human(count: float) -> str:
    """Three significant digits: 1.21M."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= 0.9995 * size:
            return f"{count / size:#.3g}".rstrip(".") + suffix
    return f"{count:.0f}"
