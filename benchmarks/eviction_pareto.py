"""The tables and the picture of what `benchmarks.eviction` has measured, from its file alone.

    python -m benchmarks.eviction_pareto benchmarks/results/eviction.jsonl --plot docs/eviction.svg
    python -m benchmarks.eviction_pareto benchmarks/results/eviction.jsonl --all

A row of the first table is FastGen with one T, beside the policies at its bytes; `--all` prints every policy.
Intervals are 95 % t intervals over windows. The draws of random tokens are averaged within a window first;
the range of their means is printed beside. FastGen is compared with a policy at the same bytes window by
window: a negative number means that FastGen loses less.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from benchmarks.eviction import OTHERS, read_lines
from cla_jax.statistics import Paired, paired


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # What benchmarks.eviction wrote.
    file: Annotated[Path, tyro.conf.Positional]
    # File of the plot.
    plot: Path | None = None
    # Every policy on a row of its own.
    all: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One policy at the bytes of one threshold of FastGen."""

    run: str
    T: float
    kind: str
    name: str
    kept: float
    share: float  # live bytes, of a cache that keeps everything at 16 bits
    windows: int
    tokens: int
    full: float  # perplexity by full forward, after the prompts
    worse_DN: np.ndarray  # nats a token above the full forward pass, of each draw and window
    kl_DN: np.ndarray
    top1: float

    def interval(self, what: str = "worse") -> Paired:
        return paired(getattr(self, f"{what}_DN").mean(0))


def cells(lines: Sequence[dict[str, Any]]) -> list[Cell]:
    """The lines of a file; those that differ only by the seed of random tokens are one cell.

    Lines of tasks are left out. Raises ValueError for two checkpoints of runs with one name.
    """
    groups: dict[tuple, list[dict[str, Any]]] = {}
    checkpoints: dict[str, str] = {}
    for line in lines:
        if "task" in line:
            continue
        if checkpoints.setdefault(line["run"], line["checkpoint"]) != line["checkpoint"]:
            raise ValueError(
                f"there are results of two checkpoints of {line['run']}: remove the lines of one of them"
            )
        name = line["policy"].partition(",seed=")[0]
        key = tuple(line[k] for k in ("run", "context", "prompt", "chunk", "windows", "T"))
        groups.setdefault((*key, name), []).append(line)
    measured = []
    for (*_, name), alike in groups.items():
        first, mean = alike[0], lambda k, alike=alike: float(np.mean([line[k] for line in alike]))
        of = lambda k, alike=alike: np.array([line["by_window"][k] for line in alike])
        measured.append(
            Cell(
                run=first["run"],
                T=first["T"],
                kind=name.partition(":")[0],
                name=name,
                kept=mean("kept"),
                share=mean("live_bytes_share"),
                windows=first["windows"],
                tokens=first["tokens"],
                full=first["perplexity_by_full_forward"],
                worse_DN=of("worse"),
                kl_DN=of("kl"),
                top1=mean("top1"),
            )
        )
    return measured


def summary(cells: Sequence[Cell]) -> str:
    """FastGen beside the others, in Markdown; losses in thousandths of a nat per token."""
    others = [kind for kind in OTHERS if any(cell.kind == kind for cell in cells)]
    rows = [
        "| model | T | dropped | live bytes | loss difference, 10⁻³ nats | perplexity "
        + "".join(f"| minus `{kind}` " for kind in others)
        + "|",
        "|---" * (6 + len(others)) + "|",
    ]
    for cell in _in_order([cell for cell in cells if cell.kind == "fastgen"]):
        alike = (cell.run, cell.T, cell.windows)
        beside = {c.kind: c for c in cells if (c.run, c.T, c.windows) == alike}
        worse = cell.interval()
        row = [
            f"`{cell.run}`",
            f"{cell.T:g}",
            f"{1 - cell.kept:.0%}",
            f"{cell.share:.0%}",
            _shown(worse),
            f"{np.expm1(worse.mean):+.2%}",
            *(_difference(cell, beside[kind]) if kind in beside else "" for kind in others),
        ]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def _in_order(cells: Sequence[Cell]) -> list[Cell]:
    """By model, as they were measured; most bytes first."""
    place = {cell.run: i for i, cell in reversed(list(enumerate(cells)))}
    return sorted(cells, key=lambda c: (place[c.run], -c.T))


def _difference(fastgen: Cell, cell: Cell) -> str:
    return _shown(paired(fastgen.worse_DN.mean(0) - cell.worse_DN.mean(0)))


def table(cells: Sequence[Cell]) -> str:
    """Every policy, in Markdown, most bytes first; losses in thousandths of a nat per token."""
    rows = [
        "| model | policy | kept | live bytes | loss difference, 10⁻³ nats | perplexity | KL, 10⁻³ nats "
        "| same top token | FastGen minus this, 10⁻³ nats |",
        "|---" * 9 + "|",
    ]
    for cell in _in_order(cells):
        worse, kl = cell.interval(), cell.interval("kl")
        name = f"`{cell.name}`"
        if len(cell.worse_DN) > 1:
            draws = 1000 * cell.worse_DN.mean(1)
            name += f", {len(draws)} draws: {draws.min():.1f} to {draws.max():.1f}"
        beside = ""
        if cell.kind != "fastgen" and (other := _fastgen(cells, cell)) is not None:
            beside = _difference(other, cell)
        rows.append(
            f"| `{cell.run}` | {name} | {cell.kept:.1%} | {cell.share:.1%} | {_shown(worse)} "
            f"| {np.expm1(worse.mean):+.2%} | {_shown(kl)} | {cell.top1:.1%} | {beside} |"
        )
    return "\n".join(rows)


def _shown(one: Paired) -> str:
    return f"{1000 * one.mean:.1f} ± {500 * (one.high - one.low):.1f}"


def _fastgen(cells: Sequence[Cell], cell: Cell) -> Cell | None:
    alike = (c for c in cells if (c.run, c.T, c.kind) == (cell.run, cell.T, "fastgen"))
    return next((c for c in alike if c.worse_DN.shape[1] == cell.worse_DN.shape[1]), None)


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Loss over live bytes: a column for each model, nats above, KL below."""
    from matplotlib.figure import Figure

    from cla_jax.report.pareto import COLOURS, saved, styled

    models = list(dict.fromkeys(cell.run for cell in cells))
    kinds = list(dict.fromkeys(cell.kind for cell in cells))
    with styled():
        figure = Figure(figsize=(3.4 * len(models), 6.2), layout="constrained")
        panels = figure.subplots(2, len(models), squeeze=False, sharex="col")
        for column, model in enumerate(models):
            for row, what in enumerate(("worse", "kl")):
                axes = panels[row, column]
                for i, kind in enumerate(kinds):
                    line = [c for c in cells if (c.run, c.kind) == (model, kind)]
                    line.sort(key=lambda cell: cell.share)
                    values = [cell.interval(what) for cell in line]
                    bars = [(one.high - one.low) / 2 for one in values]
                    axes.errorbar(
                        # Side by side, so that bars at equal bytes do not cover each other.
                        [100 * cell.share + 0.5 * (i - len(kinds) / 2) for cell in line],
                        [one.mean for one in values],
                        bars,
                        color=COLOURS[i],
                        marker="osD^vPX"[i],
                        markersize=5,
                        linewidth=1.8 if kind == "fastgen" else 0.9,
                        capsize=2,
                        label=kind,
                    )
                axes.axhline(0, color="#66707b", linewidth=0.8)
            one = next(cell for cell in cells if cell.run == model)
            panels[0, column].set_title(
                f"{model}\n{one.windows} windows, {one.tokens:,} tokens", size=10
            )
            panels[0, column].set_xlim(30, 110)
        figure.supxlabel("live bytes, % of a cache that keeps everything", size=10)
        panels[0, 0].set_ylabel("nats per token worse than full")
        panels[1, 0].set_ylabel("KL to full, nats per token")
        handles, labels = panels[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=len(kinds))
        path.write_bytes(saved(figure, path.suffix.removeprefix(".")))  # pyright: ignore


def main(argv: Sequence[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    measured = cells(read_lines(arguments.file)[0])
    print(table(measured) if arguments.all else summary(measured))
    if arguments.plot:
        draw(measured, arguments.plot)


if __name__ == "__main__":
    main()
