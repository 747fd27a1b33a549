"""Records of runs as they are written, and as they were written before they had checksums."""

import json
from collections.abc import Iterable
from typing import Any

from cla_jax import runs, seals
from cla_jax.runs import Run


def write_metrics(run: Run, records: Iterable[dict[str, Any]], end: str = "") -> None:
    """metrics.jsonl with these records, and something behind them."""
    number = run.id
    lines = [seals.seal_line(record, i, number) for i, record in enumerate(records, 1)]
    run.metrics.write_text("".join(lines) + end)


def make_older(run: Run, *, numbered: bool = True) -> None:
    """Makes config.json that of a run whose first records may have no checksum, or number."""
    file = run.path / "config.json"
    record = json.loads(file.read_text())
    del record["format"], record["checksum"]
    if numbered:
        record["checksum"] = seals.digest(runs._without_placement(record))
    else:
        del record["run"]
    file.write_text(json.dumps(record))
