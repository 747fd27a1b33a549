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
from cla_jax.report.rows import Row, components

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


def values(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A dict of plain numbers and words for each merged row; what is not known is None."""
    made = []
    for row in sorted(rows, key=lambda row: (row.kv_bytes, row.name)):
        model, count = row.config.model, costs.parameters(row.config.model)
        scored: dict[str, Any] = row.evaluation or {}
        by_seed = [one.evaluation["bits_per_byte"] for one in row.seeds if one.evaluation]
        read = None if row.cache else costs.kv_bytes(model, row.context).read
        steps = row.trained_steps
        made.append(
            {
                "run": row.name,
                "state": "counts" if row.seeds or not (why := seeds.excuse(row)) else why,
                "seeds": len(row.seeds) or 1,
                "kv_bytes_per_token": _plain(row.kv_bytes),
                "kv_bytes_read_per_token": _plain(read),
                "perplexity": scored.get("perplexity"),
                "bits_per_byte": scored.get("bits_per_byte"),
                "bits_per_byte_sd": statistics.stdev(by_seed) if len(by_seed) > 1 else None,
                "heads": model.n_heads,
                "kv_heads": model.n_kv_heads,
                "d_head": model.d_head,
                "kv_map": model.kv_map,
                "peak_lr": row.config.optimizer.peak_lr,
                "parameters": count.total,
                "training_tokens": None if steps is None else steps * row.config.tokens_per_step,
                **{
                    f"bits_per_byte/{name}": (scored.get("components") or {})
                    .get(name, {})
                    .get("bits_per_byte")
                    for name in components(rows)
                },
            }
        )
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
