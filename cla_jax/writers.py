"""Where metrics go: one small protocol, one class a destination.

Metrics are a flat dict of numbers for a step, or of the run's time up to it. `make_writer` gives the
process that should write the real ones, every other process none.
"""

import contextlib
import dataclasses
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from etils import epath
from rich.console import Console

from cla_jax import directories, extras, files, names, progress, runs, seals
from cla_jax.config import Config
from cla_jax.runs import Run


class MetricWriter(Protocol):
    def write(self, step: int, metrics: dict[str, Any]) -> None: ...

    def flush(self) -> None:
        """Makes what was written safe; called when a checkpoint is saved."""

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line: appended to metrics.jsonl, or in segments where nothing can append.

    Two threads may write at once.
    """

    def __init__(self, run: Run):
        self.run, self.id = run, run.id
        self.lock = threading.Lock()
        self.lines: list[str] = []
        self.number = seals.last_record(run.metric_lines(), self.id).get("line", 0)
        # Lines that are missing at the end keep a number, so that readers go on to see that they are.
        self.number += run.missing_records().metrics
        if run.is_local:
            run.path.mkdir(parents=True, exist_ok=True)
            self.file = directories.open_plain(run.metrics, "a+b", buffering=0)
            self._end_torn_line()

    def _end_torn_line(self) -> None:
        """A crash may have left half a line; what follows must not be glued to it."""
        if self.file.seek(0, os.SEEK_END):
            self.file.seek(-1, os.SEEK_END)
            if self.file.read(1) != b"\n":
                self.file.write(b"\n")

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        record = {"step": step, **metrics, "time": round(time.time(), 3)}
        with self.lock, files.naming(self.run.metrics):
            self.number += 1
            line = seals.seal_line(record, self.number, self.id)
            if self.run.is_local:
                self.file.write(line.encode())
            else:
                self.lines.append(line)

    def flush(self) -> None:
        with self.lock, files.naming(self.run.metrics):
            if self.run.is_local:
                os.fsync(self.file.fileno())
            elif self.lines:
                segment = f"{time.time_ns():020d}.jsonl"  # names sort in the order of writing
                epath.Path(self.run.path / "metrics" / segment).write_text("".join(self.lines))
                self.lines = []

    def close(self) -> None:
        self.flush()
        if self.run.is_local:
            self.file.close()


class ConsoleWriter:
    """A progress bar on a terminal, plain lines elsewhere.

    A terminal that was closed, or a full disk that its output goes to, does not end training.

    The bar moves with every step; it draws itself ten times a second at most. A line is printed for every
    `every`-th step, and for others if there was none for so many `seconds`.
    """

    def __init__(
        self,
        run: Run,
        steps: int,
        console: Console | None = None,
        *,
        every: int = 1,
        seconds: float = 30.0,
        now: Callable[[], float] = time.monotonic,
    ):
        self.name, self.steps = run.path.name, steps
        self.every, self.seconds, self.now = every, seconds, now
        self.printed = now()
        self.console = console or Console(file=sys.stderr)
        self.progress = None
        if self.console.is_terminal:
            self.progress = progress.make_bar(self.console)
            self.task = self.progress.add_task(self.name, total=steps, line="first step")
            self.progress.start()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        line = _line(metrics)
        if line:  # the run's time has a line of its own, at the end
            with contextlib.suppress(OSError):
                self._show(step, metrics, line)

    def _show(self, step: int, metrics: dict[str, Any], line: str) -> None:
        if self.progress is None:
            self._print(step, metrics, line)
        elif "loss" in metrics:
            self.progress.update(self.task, completed=step, line=line)
        else:
            text = f"{self.name}  step {step}  {line}"
            self.progress.console.print(text, highlight=False, markup=False)

    def _print(self, step: int, metrics: dict[str, Any], line: str) -> None:
        due = "loss" not in metrics or _is_due(step, self.every, self.steps)
        if not due and self.now() - self.printed < self.seconds:
            return
        self.printed = self.now()
        eta = metrics.get("eta_s")
        ending = "" if eta is None else f"  ETA {eta / 60:.1f} min"
        print(f"{self.name}  step {step}/{self.steps}  {line}{ending}", file=self.console.file)
        self.console.file.flush()

    def flush(self) -> None: ...

    def close(self) -> None:
        if self.progress is not None:
            with contextlib.suppress(OSError):
                self.progress.stop()


def _line(metrics: dict[str, Any]) -> str:
    formats = {
        "loss": "loss {:.4f}",
        "tokens_per_s": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
        "held_out_loss": "held-out loss {:.4f}",
        "perplexity": "perplexity {:.3f}",
        "bits_per_byte": "{:.4f} bits/byte",
    }
    shown = [
        form.format(metrics[key]) for key, form in formats.items() if metrics.get(key) is not None
    ]
    return "  ".join(shown)


class TensorBoardWriter:
    """Event files for TensorBoard below the run directory, without TensorFlow."""

    def __init__(self, run: Run, start_step: int):
        extras.require("tensorboard", "placement.tensorboard")
        from tensorboardX import SummaryWriter

        # What an earlier process wrote beyond the checkpoint is done again: it must not stand there twice.
        purge = start_step + 1 if start_step else None
        self.writer = SummaryWriter(os.fspath(run.path / "tensorboard"), purge_step=purge)

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for key, value in metrics.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(key, value, step)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class WandbWriter:
    """Weights & Biases; a restarted run continues its own page."""

    def __init__(self, run: Run, config: Config):
        extras.require("wandb", "placement.wandb")
        import wandb

        self.session = wandb.init(
            project=config.placement.wandb,
            name=config.name,
            id=names.word(config.name, most=48),  # it may hold none of : ; , # ? / and the like
            resume="allow",
            config=dataclasses.asdict(config),
            dir=os.fspath(run.path),
        )

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        self.session.log(metrics, step=step)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.session.finish()


class ThinnedWriter:
    """Hands on the training metrics of every `every`-th step, and all of an evaluation's."""

    def __init__(self, writer: MetricWriter, every: int, last: int):
        self.writer, self.every, self.last = writer, every, last

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        if "loss" not in metrics or _is_due(step, self.every, self.last):
            self.writer.write(step, metrics)

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


def _is_due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step in (1, last)


class CompositeWriter:
    """All of several writers.

    Args:
      writers: those that get every record.
      log: the one among them that keeps the run's log, if this process does.
    """

    def __init__(self, writers: Sequence[MetricWriter], log: JsonlWriter | None = None):
        self.writers, self.log = writers, log

    def note_saved(self, step: int) -> None:
        """Makes it known, and safe, that the checkpoint of a step is whole. Any thread may call it."""
        if self.log is not None:
            self.log.write(step, {runs.SAVED: step})
            self.log.flush()

    def write(self, step: int, metrics: dict[str, Any]) -> None:
        for writer in self.writers:
            writer.write(step, metrics)

    def flush(self) -> None:
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        for writer in self.writers:
            writer.close()


def make_writer(
    run: Run, config: Config, *, process_index: int, start_step: int = 0
) -> CompositeWriter:
    """The writers that a config asks for, on process 0; none on the others.

    `start_step`: the checkpoint from which the run goes on.
    """
    if process_index != 0:
        return CompositeWriter([])
    every, last = config.placement.log_every, config.steps
    thinned: list[MetricWriter] = []
    if config.placement.tensorboard:
        thinned.append(TensorBoardWriter(run, start_step))
    if config.placement.wandb:
        thinned.append(WandbWriter(run, config))
    log, console = JsonlWriter(run), ConsoleWriter(run, last, every=every)
    return CompositeWriter(
        [log, console, *(ThinnedWriter(writer, every, last) for writer in thinned)], log
    )
