"""What the report of a study was made of: report.json, beside it.

It names the declaration by its digest and each run by a checksum of its files. A report that is made again of
the same inputs keeps the commit of the first time. One that is made of other results says which changed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from cla_jax import files
from cla_jax.directories import listed
from cla_jax.goodput import is_time_summary
from cla_jax.messages import printable
from cla_jax.report import seeds, studies
from cla_jax.report.rows import Row
from cla_jax.runs import Run

FILE = "report.json"
PAGE = "report.html"  # of every report; the record is only beside that of a study
MARK = ":root { color-scheme: light dark; --ink"  # in every page
FIGURES = ("pareto", "read_bytes", "training_loss", "held_out", "learning_rates")
PICTURES = ("png", "svg", "pdf")
TABLES = ("results", *studies.TABLES)
# What a report may write beside its page.
_BESIDE = (
    *(f"{name}.{ending}" for name in FIGURES for ending in PICTURES),
    *(f"{name}.{ending}" for name in TABLES for ending in ("csv", "tex")),
    "report.md",
)
NAMES = {PAGE, FILE, *_BESIDE}


def make(
    outcome: studies.Outcome,
    rows: Sequence[Row],
    *,
    earlier: Mapping[str, Any] | None,
    commit: str,
    command: str,
) -> dict[str, Any]:
    """The record of a report; `earlier` is that of the report before, if there was one."""
    own = [row for row in rows if not row.cache]
    # Not by the names in the table: these depend on what is compared.
    results = {
        "/".join(studies.place(row.path)): _digest(row) for row in own if not seeds.excuse(row)
    }
    digest = outcome.declared.study.digest
    changes: list[str] = []
    if earlier:
        before = earlier["results"]
        changes = list(earlier["changes"])
        at = earlier["commit"] or "an unknown commit"
        if earlier["digest"] != digest:
            changes.append(
                f"The declaration changed after the report of {at}: from {earlier['digest']} to "
                f"{digest}."
            )
        changed = [name for name in before if name in results and results[name] != before[name]]
        gone = [name for name in before if name not in results]
        for what, names in (("changed", changed), ("disappeared", gone)):
            if names:
                changes.append(f"Results {what} after the report of {at}: {', '.join(names)}.")
        if (before, earlier["digest"]) == (results, digest):
            commit = earlier["commit"]
    return {
        "study": outcome.declared.name,
        "digest": digest,
        "commit": commit,
        "command": command,
        "hours": round(sum(_seconds(Run(epath.Path(row.path))) for row in own) / 3600, 1),
        "runs": f"{len(results)} of {len(own)}",
        "verdicts": {str(one.claim): one.status for one in outcome.verdicts},
        "changes": changes,
        "results": results,
    }


def replaced(directory: epath.Path, study: str) -> dict[str, Any] | None:
    """The record of the report that a new one in this directory will replace; None if it has none.

    A report replaces only one of its own kind: of the same study, or also of none.

    Args:
      study: of the new report; empty for a comparison without one.

    Raises ValueError if a report of another kind is there, if its record is damaged, or if a file that is not
    of a report has the name of one that is.
    """
    page, foreign = directory / PAGE, ""
    if page.exists():
        foreign = "" if MARK.encode() in page.read_bytes() else PAGE
    elif not (directory / FILE).exists():
        foreign = next((name for name in _BESIDE if (directory / name).exists()), "")
    if foreign:
        raise ValueError(
            f"{files.name(directory / foreign)} was not written by this command, and is not overwritten: "
            "choose another directory with --out DIR"
        )
    earlier = _read(directory)
    if earlier is None and not page.exists():
        return None
    there = earlier["study"] if earlier else ""
    if there == study:
        return earlier
    what, again = (
        (f"the report of study {there}", f"with --study {there}")
        if there
        else ("the report of a comparison without a study", "without --study")
    )
    raise ValueError(
        f"{printable(directory)} contains {printable(what)}, which is not overwritten: repeat the command "
        f"{printable(again)}, or choose another directory with --out DIR"
    )


def _read(directory: epath.Path) -> dict[str, Any] | None:
    """The record of the report in a directory; None if there is none.

    Raises ValueError if it is damaged.
    """
    file = directory / FILE
    if not file.exists():
        return None
    record = files.read_object(file)
    fields = {"study": str, "digest": str, "commit": str, "results": dict, "changes": list}
    kept = {name: files.field(record, name, kind, file) for name, kind in fields.items()}
    if not all(isinstance(change, str) for change in kept["changes"]):
        raise ValueError(f"{files.name(file)}: changes must be lines of text")
    return kept


def dump(made: Mapping[str, Any]) -> bytes:
    return (json.dumps(made, indent=2) + "\n").encode()


def words(made: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of how a report was made."""
    commit = made["commit"] or "no commit: the code is not under git"
    return [
        *made["changes"],
        f"Study {made['study']}, declaration {made['digest']}, results first reported at commit {commit}. "
        f"{made['runs']} run directories have results, also those that no claim uses; {made['hours']} hours "
        f"of training in total. Command: {made['command']}",
    ]


def _digest(row: Row) -> str:
    """A checksum of what a run says of itself: config, tokenizer, metrics and evaluations."""
    run, digest = Run(epath.Path(row.path)), hashlib.sha256()
    texts = [run.path / "config.json", run.path / "tokenizer.json"]
    for file in (*texts, *listed(run.path / "eval", ".json")):
        digest.update(f"{file.name}\n{files.read_text(file, files.TOKENIZER_BYTES)}\n".encode())
    for line in run.metric_lines():
        digest.update(line)
    return digest.hexdigest()[:16]


def _seconds(run: Run) -> float:
    """How long a run took, over all its restarts; 0 where it does not say."""
    last = {}
    for one in run.read_records():
        if is_time_summary(one):
            last = one
    return sum(value for key, value in last.items() if key.endswith("_s"))
