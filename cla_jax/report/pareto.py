"""Points of quality over KV bytes: their Pareto frontier and its picture. Knows nothing of runs."""

import contextlib
import dataclasses
import io
import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

# Legible on white and on a dark page alike. Eight colours and seven markers: 56 looks.
COLOURS = ("#2f6fde", "#e8710a", "#12977f", "#a54bd1", "#d93a5e", "#8a7a12", "#d65aa6", "#1b9bd1")
_MARKERS = (("o", 92), ("s", 80), ("D", 72), ("^", 105), ("v", 105), ("P", 105), ("X", 105))
# The neutral colours; `page` turns them into CSS variables, so that a plot follows light and dark.
INK, MUTED, GRID, SURFACE = "#1b1f24", "#66707b", "#dfe3e8", "#ffffff"
_STYLE = {
    "figure.dpi": 200,
    "font.size": 10,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called $x$
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "svg.hashsalt": "cla_jax",  # element ids, and with them the bytes, are reproducible
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Something with a cache size and a quality, wherever the two come from."""

    label: str
    kv_bytes: float  # resident, per token of context
    quality: float  # less is better
    series: str = ""  # points of a series share colour and marker, and a line of the legend
    unfinished: bool = False  # drawn hollow


def frontier(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, by rising KV bytes.

    A point dominates another if it is no worse in bytes and in quality, and better in one of them;
    exact duplicates stay together. A quality that is not finite never counts.
    """
    finite = [i for i, point in enumerate(points) if math.isfinite(point.quality)]
    kept: list[int] = []
    for i in sorted(finite, key=lambda i: (points[i].kv_bytes, points[i].quality)):
        here, last = points[i], points[kept[-1] if kept else i]
        equal = (here.kv_bytes, here.quality) == (last.kv_bytes, last.quality)
        if equal or here.quality < last.quality:
            kept.append(i)
    return kept


def plot(
    points: Sequence[Point], *, quality: str, subtitle: str, reference: Sequence[Point] = ()
) -> Figure:
    """Quality over KV bytes, with the frontier of `points`; `reference` is grey, not part of it.

    `quality` names the vertical axis; the legend lists the series as they first occur in `points`.
    """
    points = [point for point in points if math.isfinite(point.quality)]
    names = list(dict.fromkeys(point.series for point in points))
    entries = len(names) + bool(reference)
    columns = 5 if entries <= 5 else 3
    with styled():
        figure = Figure(figsize=(8.4, 5.4))
        FigureCanvasAgg(figure)  # measures texts
        figure.text(0.022, 0.945, "Accuracy against KV-cache memory", size=14.5, weight="bold")
        figure.text(0.022, 0.904, subtitle, size=9.5, color=MUTED)
        top = 0.875 - 0.046 * math.ceil(entries / columns)
        figure.subplots_adjust(left=0.095, right=0.975, bottom=0.125, top=top)
        axes = figure.add_subplot()
        axes.set_xlabel("resident KV cache, bytes per token of context     ← smaller is better")
        axes.set_ylabel(f"{quality}     ← lower is better")
        if not points:
            axes.set_title("no run has been evaluated yet", y=0.5, size=10, color=MUTED)
            axes.set(xticks=[], yticks=[])
            return figure
        axes.set_xscale("log")
        axes.margins(0.13, 0.16)
        if reference:
            _scatter(axes, reference, "reference", "#9aa3ad", "o", 52)
        for i, name in enumerate(names):
            marker, size = _MARKERS[i % len(_MARKERS)]
            members = [point for point in points if point.series == name]
            _scatter(axes, members, name, COLOURS[i % len(COLOURS)], marker, size)
        axes.autoscale_view()
        axes.autoscale(False)
        _ticks(axes, [point.kv_bytes for point in (*points, *reference)])
        best = [points[i] for i in frontier(points)]
        line = _draw_frontier(axes, best)
        others = [point for point in points if point not in best]
        _annotate(axes, [*best, *others, *reference], best, line)
        look = {"columnspacing": 1.3, "handletextpad": 0.2, "borderaxespad": 0.2}
        axes.legend(loc="lower left", bbox_to_anchor=(-0.012, 1.0), ncols=columns, **look)
    return figure


def _scatter(
    axes: Axes, points: Sequence[Point], label: str, colour: str, marker: str, size: float
) -> None:
    points = sorted(points, key=lambda point: point.unfinished)  # the first is in the legend
    axes.scatter(
        [point.kv_bytes for point in points],
        [point.quality for point in points],
        s=size,
        marker=marker,
        label=label,
        facecolors=[SURFACE if point.unfinished else colour for point in points],
        edgecolors=[colour if point.unfinished else SURFACE for point in points],
        linewidths=[1.8 if point.unfinished else 1.2 for point in points],
        zorder=4,
    )


def _ticks(axes: Axes, sizes: Sequence[float]) -> None:
    """A tick at each cache size that occurs, as far as the labels have room."""
    left, right = axes.get_xlim()
    ticks: list[float] = []
    for size in sorted(sizes):
        if not ticks or math.log(size / ticks[-1]) > 0.08 * math.log(right / left):
            ticks.append(size)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _draw_frontier(axes: Axes, best: Sequence[Point]) -> list[Bbox]:
    """Draws the steps; returns a thin box around each piece, in pixels."""
    right, top = axes.get_xlim()[1], axes.get_ylim()[1]
    xs = [*np.repeat([point.kv_bytes for point in best], 2), right]
    ys = [top, *np.repeat([point.quality for point in best], 2)]
    axes.fill_between(xs, ys, top, color=MUTED, alpha=0.07, linewidth=0)
    axes.plot(xs, ys, color=MUTED, linewidth=1.6, zorder=2)
    corners = axes.transData.transform(np.column_stack((xs, ys)))
    return [
        Bbox([np.minimum(a, b), np.maximum(a, b)]).padded(2) for a, b in itertools.pairwise(corners)
    ]


# Where a label may stand, by preference: offset in points of its nearest edge or corner.
_PLACES = ((6, 3.5), (9, 0), (0, 7.5), (6, -3.5), (-6, 3.5), (-9, 0), (-6, -3.5), (0, -7.5))


def _annotate(
    axes: Axes, points: Sequence[Point], best: Sequence[Point], line: Sequence[Bbox]
) -> None:
    """Labels the points, in order, each where it overlaps least with what is there already.

    Those of the frontier prefer the places in reverse: no other point can be below them.
    """
    frame, radius = axes.get_window_extent(), 6 * axes.figure.dpi / 72
    centres = axes.transData.transform([(point.kv_bytes, point.quality) for point in points])
    taken = [*line, *(Bbox([centre - radius, centre + radius]) for centre in centres)]
    for point in points:
        choices = []
        for x, y in _PLACES[::-1] if point in best else _PLACES:
            label = axes.annotate(
                shortened(point.label),
                (point.kv_bytes, point.quality),
                xytext=(x, y),
                textcoords="offset points",
                ha="left" if x > 0 else "right" if x else "center",
                va="bottom" if y > 0 else "top" if y else "center",
                size=8.5,
                color=INK if point in best else MUTED,
                zorder=5,
            )
            box = label.get_window_extent()
            outside = box.width * box.height - _overlap(box, frame)
            crowding = sum(_overlap(box, other) for other in taken) + 4 * outside
            choices.append((round(crowding), len(choices), label, box))
        (*_, box), *rest = sorted(choices)
        taken.append(box)
        for _, _, label, _ in rest:
            label.remove()


def _overlap(a: Bbox, b: Bbox) -> float:
    common = Bbox.intersection(a, b)
    return common.width * common.height if common else 0.0


def shortened(text: str, most: int = 36) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def styled() -> contextlib.AbstractContextManager[None]:
    """Our look, whatever the user's matplotlibrc says; saving a figure needs it as well as making."""
    return style.context(["default", _STYLE])


def saved(figure: Figure, format: Literal["svg", "png"]) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes."""
    out = io.BytesIO()
    bare = dict.fromkeys(("Creator", "Date", "Format", "Type")) if format == "svg" else None
    with styled():
        figure.savefig(out, format=format, metadata=bare)
    return out.getvalue()
