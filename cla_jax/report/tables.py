"""The comparison as files for other programs: CSV, LaTeX and Markdown."""

import csv
import io
import math
import re
import statistics
from collections.abc import Sequence
from typing import Any

from cla_jax import costs
from cla_jax.messages import printable
from cla_jax.report import seeds
from cla_jax.report.rows import PLAIN, Arrangement, Row, components, same

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
_SIGNS = {"—": "---", "±": r"$\pm$", "●": r"$\bullet$", "→": r"$\to$"}


def values(rows: Sequence[Row], arranged: Arrangement = PLAIN) -> list[dict[str, Any]]:
    """A dict of plain numbers and words for each merged row; what is not known is None."""
    made = []
    order = arranged.order
    if order is None:
        order = sorted(range(len(rows)), key=lambda i: (rows[i].kv_bytes, rows[i].name))
    for i in order:
        row = rows[i]
        model = row.config.model
        scores = row.scores
        by_seed = [one.scores.bits_per_byte for one in row.seeds if one.scores]
        read = None if row.cache else costs.kv_bytes(model, row.context).read
        steps = row.trained_steps
        made.append(
            {
                "run": row.name,
                "state": "counts" if row.seeds or not (why := seeds.excuse(row)) else why,
                "seeds": len(row.seeds) or 1,
                "kv_bytes_per_token": _plain(row.kv_bytes),
                "kv_bytes_read_per_token": _plain(read),
                "perplexity": scores and scores.perplexity,
                "bits_per_byte": scores and scores.bits_per_byte,
                "bits_per_byte_sd": statistics.stdev(by_seed) if len(by_seed) > 1 else None,
                "heads": same(row, lambda one: one.n_heads),
                "kv_heads": same(row, lambda one: one.n_kv_heads),
                "d_head": same(row, lambda one: one.d_head),
                "kv_map": same(row, lambda one: one.kv_map),
                "peak_lr": row.config.optimizer.peak_lr,
                "parameters": same(row, lambda one: costs.parameters(one).total),
                "training_tokens": None if steps is None else steps * row.config.tokens_per_step,
                **{
                    f"bits_per_byte/{name}": scores.components[name].bits_per_byte
                    if scores and name in scores.components
                    else None
                    for name in components(rows)
                },
            }
        )
        known = made[-1].keys()
        further = [one for one in arranged.columns if one.name.rpartition(".")[2] not in known]
        made[-1] |= {one.name: one.values[i] for one in further}
    return made


def _plain(number: float | None) -> float | int | None:
    return int(number) if number is not None and number == math.floor(number) else number


def as_csv(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> bytes:
    """Comma-separated values; a word that a spreadsheet would compute is quoted with an apostrophe."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_cell(heading) for heading in headings])
    writer.writerows([[_cell(cell) for cell in line] for line in lines])
    return out.getvalue().encode()


def _cell(value: Any) -> Any:
    if isinstance(value, str):
        value = printable(value, 4000)
        return f"'{value}" if re.match(r"[=@\t]|[+-](?![\d.])", value) else value
    return value


def as_latex(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> bytes:
    """A tabular of the package booktabs."""
    sides = "l" + "r" * (len(headings) - 1)
    row = lambda cells: " & ".join(map(_latex, cells)) + r" \\"
    body = [row(headings), r"\midrule", *map(row, lines)]
    text = [r"\begin{tabular}{" + sides + "}", r"\toprule", *body, r"\bottomrule", r"\end{tabular}"]
    return ("\n".join(text) + "\n").encode()


def _latex(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else "---" if value is None else str(value)
    return "".join(_LATEX.get(sign, _SIGNS.get(sign, sign)) for sign in printable(text, 4000))


def as_markdown(headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    cell = lambda text: re.sub(r"([|\\`*_<>\[\]])", r"\\\1", printable(str(text), 4000))
    row = lambda cells: f"| {' | '.join(map(cell, cells))} |"
    return "\n".join([row(headings), "|" + "---|" * len(headings), *map(row, lines)]) + "\n"
