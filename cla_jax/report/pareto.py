"""Points of quality over KV bytes: their Pareto frontier and its picture. Knows nothing of runs."""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

# Legible on white and on a dark page alike. Ten colours and seven markers: 70 looks.
COLOURS = (
    *("#2f6fde", "#e8710a", "#12977f", "#a54bd1", "#d93a5e"),
    *("#8a7a12", "#d65aa6", "#1b9bd1", "#8f5b34", "#4c9a2a"),
)
_REFERENCE = ("#9aa3ad", "o", 52)  # colour, marker and its size
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
    series: str = ""  # points of a series share a marker, and a line of the legend
    colour: int = 0  # which of COLOURS, counted round: a run has the same one in every picture
    unfinished: bool = False  # drawn hollow, and no better than anything
    # The quality with each seed, where `quality` is the mean of several.
    seeds: tuple[float, ...] = ()
    number: int | None = None  # of the row: the page finds it by that


def frontier(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other point dominates, by rising KV bytes.

    A point dominates another if it is no worse in bytes and in quality, and better in one of them;
    exact duplicates stay together. A quality that is not finite never counts, nor does an unfinished run's.
    """
    counts = lambda point: math.isfinite(point.quality) and not point.unfinished
    finite = [i for i, point in enumerate(points) if counts(point)]
    kept: list[int] = []
    for i in sorted(finite, key=lambda i: (points[i].kv_bytes, points[i].quality)):
        here, last = points[i], points[kept[-1] if kept else i]
        equal = (here.kv_bytes, here.quality) == (last.kv_bytes, last.quality)
        if equal or here.quality < last.quality:
            kept.append(i)
    return kept


def plot(
    points: Sequence[Point],
    *,
    quality: str,
    subtitle: str,
    reference: Sequence[Point] = (),
    ranked: bool = True,
    width: float = 8.4,
    kind: Literal["resident", "read"] = "resident",
) -> Figure:
    """Quality over KV bytes, with the frontier of `points`; `reference` is grey, not part of it.

    `quality` names the vertical axis; the legend lists the series as they first occur in `points`. Where
    points are not `ranked`, there is no frontier. `width` is in inches; `kind` says which bytes they are.
    A point of several seeds has a bar of one standard deviation to each side, and a dot for each seed.
    Such points with the same bytes are drawn side by side, the best one where it belongs. Bars leave no
    room for labels: with them, a second legend names the points.
    """
    points = [point for point in points if math.isfinite(point.quality)]
    names = list(dict.fromkeys(point.series for point in points))
    looks = {name: _MARKERS[i % len(_MARKERS)] for i, name in enumerate(names)}
    # A letter is about half as wide as high.
    subtitle = textwrap.fill(subtitle, int((width * 72 - 20) / (0.5 * _SUBTITLE)))
    keys = [_key("reference", *_REFERENCE)] * bool(reference)
    keys += [_key(name, MUTED, *look) for name, look in looks.items()]
    barred = any(len(point.seeds) > 1 for point in points)
    named = [_key(shortened(p.label), _colour(p), *looks[p.series]) for p in points if barred]
    columns, rows = _legend_size(keys, width)
    more_columns, more_rows = _legend_size(named, width)
    rows += more_rows
    lines = 1.35 * (subtitle.count("\n") + 1) * _SUBTITLE
    height = 72 * max(5.4, 0.75 * width) + lines + rows - 28
    with styled():
        figure = Figure(figsize=(width, height / 72))
        FigureCanvasAgg(figure)  # measures texts
        from_top = lambda points: 1 - points / height
        figure.text(0.022, from_top(24), _TITLES[kind], size=14.5, weight="bold")
        figure.text(0.022, from_top(32), subtitle, size=_SUBTITLE, color=MUTED, va="top")
        axes = figure.add_subplot()
        figure.subplots_adjust(
            left=_LEFT / (72 * width),
            right=0.975,
            bottom=46 / height,
            top=from_top(40 + lines + rows),
        )
        axis, gap = (_AXES[kind], "     ") if width > 6 else (_SHORT_AXES[kind], "  ")
        axes.set_xlabel(f"{axis}{gap}← smaller is better")
        axes.set_ylabel(f"{quality}{gap}← lower is better")
        if not points:
            axes.set_title("no run has been evaluated yet", y=0.5, size=10, color=MUTED)
            axes.set(xticks=[], yticks=[])
            return figure
        if left_out := _draw_all(axes, points, reference, looks, ranked):
            plural = "labels have" if left_out > 1 else "label has"
            figure.text(
                0.975, 5 / height, f"{left_out} {plural} no room", ha="right", size=8, color=MUTED
            )
        above = 1 + more_rows / (72 * axes.get_window_extent().height / figure.dpi)
        if named:
            # As an artist: the legend of the series would replace it.
            axes.add_artist(_legend(axes, named, more_columns, 1.0))
        _legend(axes, keys, columns, above)
    return figure


def _draw_all(
    axes: Axes,
    points: Sequence[Point],
    reference: Sequence[Point],
    looks: Mapping[str, tuple[str, float]],
    ranked: bool,
) -> int:
    """Draws the points, the frontier if they are `ranked`, and the labels; returns how many have no room.

    `looks` are the marker of each series and its size. Bars leave room for the labels of `reference` only.
    """
    barred = any(len(point.seeds) > 1 for point in points)
    sizes = [point.kv_bytes for point in (*points, *reference)]
    _make_room(axes, sizes)
    undominated = frontier(points) if ranked else []
    corners = [points[i] for i in undominated]
    points = _side_by_side(axes, points)
    best = [points[i] for i in undominated]
    for point in reference:
        _draw(axes, point, *_REFERENCE)
    for point in points:
        _draw(axes, point, _colour(point), *looks[point.series])
    axes.autoscale_view()
    _keep_apart(axes)
    axes.autoscale(False)
    _ticks(axes, sizes)
    line = _draw_frontier(axes, corners) if corners else []
    others = [point for point in points if point not in best]
    drawn = [*best, *others, *reference]
    return _annotate(axes, list(reference) if barred else drawn, drawn, best, line)


def _make_room(axes: Axes, sizes: Sequence[float]) -> None:
    """Sets the horizontal axis for these bytes, with room at both ends.

    Before anything is drawn: matplotlib warns of the limits of a single point.
    """
    axes.set_xscale("log")
    axes.margins(0.13, 0.16)
    least, most = min(sizes), max(sizes)
    room = (most / least) ** 0.13 if most > least else 2
    axes.set_xlim(least / room, most * room)


def _legend_size(keys: Sequence[Line2D], width: float) -> tuple[int, float]:
    """How many columns of a legend fit in so many inches, and how high it then is in points."""
    longest = max((len(str(key.get_label())) for key in keys), default=1)
    columns = max(1, int((width * 72 - _LEFT) / (40 + 5 * longest)))
    return columns, 15.0 * math.ceil(len(keys) / columns)


def _legend(axes: Axes, keys: Sequence[Line2D], columns: int, bottom: float) -> Legend:
    """A legend above the axes; `bottom` is in units of their height."""
    return axes.legend(
        handles=keys,
        loc="lower left",
        bbox_to_anchor=(-0.012, bottom),
        ncols=columns,
        columnspacing=1.3,
        handletextpad=0.2,
        borderaxespad=0.2,
    )


def _colour(point: Point) -> str:
    return COLOURS[point.colour % len(COLOURS)]


_SUBTITLE = 9.5  # points
_LEFT = 58  # points to the left of the axes, where legends begin too
_TITLES = {
    "resident": "Accuracy against KV-cache memory",
    "read": "Accuracy against KV-cache traffic",
}
_AXES = {
    "resident": "resident KV cache, bytes per token of context",
    "read": "KV bytes that a decode step reads, per token of context",
}
_SHORT_AXES = {"resident": "KV bytes per token", "read": "KV bytes read per token"}


# In points: half the width of a bar's ends, the size of a seed's dot, from one bar to the next.
_CAP, _DOT, _APART = 4, 2.6, 15


def overlapping(points: Sequence[Point]) -> list[list[int]]:
    """Indices of points with the same bytes whose bars would cover each other, best quality first."""
    barred = [i for i, point in enumerate(points) if len(point.seeds) > 1]
    barred.sort(key=lambda i: (points[i].kv_bytes, points[i].quality))
    columns = itertools.groupby(barred, key=lambda i: points[i].kv_bytes)
    return [column for _, indices in columns if len(column := list(indices)) > 1]


def _side_by_side(axes: Axes, points: Sequence[Point]) -> list[Point]:
    """The points as they are drawn: the best of a column stays, the others stand right and left of it."""
    places, columns = list(points), overlapping(points)
    low, high = axes.get_xlim()
    width = axes.get_window_extent().width * 72 / axes.figure.dpi
    # The margin has room for half of the widest column.
    apart = min(_APART, 0.08 * width / max((len(column) // 2 for column in columns), default=1))
    # The axis is logarithmic: a distance on paper is a factor.
    step = (high / low) ** (apart / width)
    for column in columns:
        for rank, i in enumerate(column):
            side = (rank + 1) // 2 * (1 if rank % 2 else -1)
            places[i] = dataclasses.replace(points[i], kv_bytes=points[i].kv_bytes * step**side)
    return places


def _deviation(point: Point) -> float:
    """One standard deviation of the seeds; 0 of a single one."""
    return float(np.std(point.seeds, ddof=1)) if len(point.seeds) > 1 else 0.0


def _draw(axes: Axes, point: Point, colour: str, marker: str, size: float) -> None:
    if len(point.seeds) > 1:
        axes.errorbar(
            [point.kv_bytes],
            [point.quality],
            yerr=[_deviation(point)],
            color=colour,
            elinewidth=1.6,
            capsize=_CAP,
            zorder=3,
        )
        axes.plot(
            [point.kv_bytes] * len(point.seeds),
            point.seeds,
            linestyle="",
            marker="o",
            markersize=_DOT,
            color=colour,
            alpha=0.75,
            zorder=5,
        )
    drawn = axes.scatter(
        [point.kv_bytes],
        [point.quality],
        s=size,
        marker=marker,
        facecolors=SURFACE if point.unfinished else colour,
        edgecolors=colour if point.unfinished else SURFACE,
        linewidths=1.8 if point.unfinished else 1.2,
        zorder=4,
    )
    if point.number is not None:
        drawn.set_gid(f"point-{point.number}")


def _key(label: str, colour: str, marker: str, size: float) -> Line2D:
    """What the legend shows of a series: a finished point."""
    return Line2D(
        [], [], linestyle="", marker=marker, markersize=0.9 * size**0.5, color=colour, label=label
    )


# The least part of a value that the vertical axis spans.
_SPAN = 0.01


def _keep_apart(axes: Axes) -> None:
    """Points that are as good as equal are drawn so, and ticks are whole numbers, not offsets."""
    low, high = axes.get_ylim()
    middle, least = (low + high) / 2, _SPAN * max(abs(low), abs(high))
    if high - low < least:
        axes.set_ylim(middle - least / 2, middle + least / 2)
    axes.ticklabel_format(axis="y", useOffset=False)


def _ticks(axes: Axes, sizes: Sequence[float]) -> None:
    """A tick at each cache size that occurs, as far as the labels have room."""
    place = lambda size: axes.transData.transform((size, 1))[0]
    ticks: list[float] = []
    end = -math.inf  # of the label before, in pixels
    for size in sorted(set(sizes)):
        width, _ = _extent(axes, f"{size:,.0f}", 10)
        if place(size) - width / 2 > end + 6:
            ticks.append(size)
            end = place(size) + width / 2
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xticks([], minor=True)


def _extent(axes: Axes, text: str, size: float) -> tuple[float, float]:
    """Width and height of a text in pixels."""
    drawn = axes.text(0, 0, text, size=size, transform=axes.transAxes)
    box = drawn.get_window_extent()
    drawn.remove()
    return box.width, box.height


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


# Where a label may stand, by preference: offset in points of its nearest edge or corner. Those farther
# away are joined to their point by a line.
_PLACES = ((6, 3.5), (9, 0), (0, 7.5), (6, -3.5), (-6, 3.5), (-9, 0), (-6, -3.5), (0, -7.5))
_FAR = tuple(
    (round(radius * math.cos(angle), 1), round(radius * math.sin(angle), 1))
    for radius in (18, 28, 40, 54, 70, 88)
    for angle in np.arange(0, 2 * math.pi, math.pi / 8)
)


def _annotate(
    axes: Axes,
    points: Sequence[Point],
    drawn: Sequence[Point],
    best: Sequence[Point],
    line: Sequence[Bbox],
) -> int:
    """Labels the points, in order, each where it meets nothing drawn; returns how many had no room.

    Those of the frontier prefer the places in reverse: no other point can be below them.
    """
    frame, pixels = axes.get_window_extent(), axes.figure.dpi / 72
    radius = 5.5 * pixels
    centre_of = lambda point: axes.transData.transform((point.kv_bytes, point.quality))
    taken = list(line)
    for point in drawn:
        centre = centre_of(point)
        taken += [Bbox([centre - radius, centre + radius]), *_bar_and_dots(axes, point)]
    left_out = 0
    for point in points:
        text, centre = shortened(point.label), centre_of(point)
        extent = np.array(_extent(axes, text, 8.5))
        near = _PLACES[::-1] if point in best else _PLACES
        for offset in (*near, *_FAR):
            # The nearest edge or corner of the label is at the offset.
            sides = (np.sign(offset) - 1) / 2
            corner = centre + np.array(offset) * pixels + sides * extent
            box = Bbox([corner, corner + extent])
            inside = (
                frame.x0 <= box.x0
                and box.x1 <= frame.x1
                and frame.y0 <= box.y0 <= box.y1 <= frame.y1
            )
            leader = [] if offset in near else _along(centre, centre + np.array(offset) * pixels)
            clear = not any(box.overlaps(other) for other in taken)
            if inside and clear and not any(box.contains(*at) for box in taken for at in leader):
                break
        else:
            left_out += 1
            continue
        taken += [box, *(Bbox([at - 1, at + 1]) for at in leader)]
        axes.annotate(
            text,
            (point.kv_bytes, point.quality),
            xytext=offset,
            textcoords="offset points",
            ha="left" if offset[0] > 0 else "right" if offset[0] else "center",
            va="bottom" if offset[1] > 0 else "top" if offset[1] else "center",
            size=8.5,
            color=INK if point in best else MUTED,
            arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 5}
            if leader
            else None,
            zorder=5,
        )
    return left_out


def _bar_and_dots(axes: Axes, point: Point) -> list[Bbox]:
    """What is drawn of the seeds of a point, in pixels."""
    if len(point.seeds) < 2:
        return []
    pixels = axes.figure.dpi / 72
    low, high = point.quality - _deviation(point), point.quality + _deviation(point)
    at = axes.transData.transform([(point.kv_bytes, y) for y in (low, high, *point.seeds)])
    bar = Bbox([at[0], at[1]]).padded(pixels)
    ends = [Bbox([end, end]).padded(_CAP * pixels, pixels) for end in at[:2]]
    dots = [Bbox([dot, dot]).padded(_DOT / 2 * pixels) for dot in at[2:]]
    return [bar, *ends, *dots]


def _along(start: np.ndarray, end: np.ndarray) -> list[np.ndarray]:
    """Points on the way from a point of the plot, outside its marker, to its label."""
    return [start + share * (end - start) for share in np.linspace(0.55, 0.95, 6)]


def shortened(text: str, most: int = 36) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def styled() -> contextlib.AbstractContextManager[None]:
    """Our look, whatever the user's matplotlibrc says; saving a figure needs it as well as making."""
    return style.context(["default", _STYLE])


def saved(figure: Figure, format: Literal["svg", "png", "pdf"]) -> bytes:
    """The figure as a file's content; the same figure gives the same bytes."""
    out = io.BytesIO()
    bare = {
        "svg": dict.fromkeys(("Creator", "Date", "Format", "Type")),
        "pdf": dict.fromkeys(("Creator", "Producer", "CreationDate")),
        "png": None,
    }[format]
    with styled():
        figure.savefig(out, format=format, metadata=bare)
    return _with_stable_clips(out.getvalue()) if format == "svg" else out.getvalue()


def _with_stable_clips(svg: bytes) -> bytes:
    """The SVG with clip paths named by their printed content.

    matplotlib names them by all digits of their numbers, the last of which differ between processors.
    """
    text = svg.decode()
    for name, content in re.findall(r'<clipPath id="(\w+)">(.*?)</clipPath>', text, re.DOTALL):
        text = text.replace(name, "p" + hashlib.sha256(content.encode()).hexdigest()[:10])
    return text.encode()
