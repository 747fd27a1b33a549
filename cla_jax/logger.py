"""Writes the metrics of each step, one step late, and the log of a run."""

import collections
import contextlib
import logging
import math
from collections.abc import Callable, Iterator

import jax

from cla_jax import chips, costs, directories, goodput
from cla_jax.config import Config
from cla_jax.data.mixture import of_component
from cla_jax.runs import Run
from cla_jax.session import Session
from cla_jax.writers import CompositeWriter

log = logging.getLogger(__name__)

_SPEED_STEPS = 10  # the speed is a mean over this many steps


class Diverged(RuntimeError):
    """The loss or a gradient of a step was not finite."""


class StepLogger:
    """Writes each step's metrics once the next step is under way, so the device never waits.

    The seconds of a step are those that the clock books under it and under its batch. They begin when this
    process sees that the step before is complete. A process that the system holds up sees the ends of two
    steps at once: then one step seems to take the time of both, and the other none. So the speed,
    `tokens_per_s` and `mfu`, is a mean over the newest steps.

    Raises Diverged, with the number of the step, when a loss or gradient norm is not finite.
    """

    def __init__(
        self,
        config: Config,
        writer: CompositeWriter,
        start_step: int,
        clock: goodput.Clock,
        epochs: Callable[[int], dict[str, float]] = lambda step: {},
    ):
        self.config, self.writer, self.clock = config, writer, clock
        self.epochs = epochs
        self.flops = costs.train_flops_per_token(config.model, config.data.seq_len)
        chip = chips.find(jax.devices()[0].device_kind)
        self.peak_flops = chip.flops if chip else None  # unknown: no MFU is printed
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.start_step = self.written = start_step
        # Seconds of training when the step before was written, and when the first step was over.
        self.seconds_before = self._training_seconds()
        self.first_step_end: float | None = None
        self.newest = collections.deque[float](maxlen=_SPEED_STEPS)  # seconds of steps

    def record(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Hands in the metrics of update `step` (counted from 1); writes those of the one before."""
        previous, self.pending = self.pending, (step, metrics)
        self._write(previous)

    def flush(self) -> None:
        """Waits for the last step handed in and writes it: afterwards it is known to be finite."""
        previous, self.pending = self.pending, None
        self._write(previous)
        self.writer.flush()

    @contextlib.contextmanager
    def timed(self, bucket: goodput.Bucket) -> Iterator[None]:
        """Counts the time of what happens inside under `bucket`, and writes the run's time so far.

        Then only steps lie between two such records. So the time of a killed process is known up to its last
        step.
        """
        with self.clock.timed(bucket):
            yield
        self.write_time_summary()

    def write_time_summary(self) -> None:
        """Writes how the time of the run was spent so far."""
        self.writer.write(self.written, goodput.time_summary(self.clock.seconds()))

    def _training_seconds(self) -> float:
        seconds = self.clock.seconds()
        return seconds["data_wait"] + seconds["step"]

    def _write(self, handed_in: tuple[int, dict[str, jax.Array]] | None) -> None:
        if handed_in is None:
            return
        step, metrics = handed_in
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        for name in ("loss", "grad_norm"):
            if not math.isfinite(values[name]):
                raise Diverged(f"step {step}: {name} is {values[name]}; this step was not saved")
        now = self._training_seconds()
        seconds, self.seconds_before = now - self.seconds_before, now
        speed: dict[str, float] = {"seconds": round(seconds, 4)}
        if self.first_step_end is None:
            self.first_step_end = now
        else:  # the first step waits for the first batches: its time is not used for the speed
            self.newest.append(seconds)
            tokens = len(self.newest) * self.config.tokens_per_step
            tokens_per_s = tokens / max(sum(self.newest), 1e-9)
            speed["tokens_per_s"] = round(tokens_per_s, 1)
            if self.peak_flops:
                speed["mfu"] = self.flops * tokens_per_s / (self.peak_flops * jax.device_count())
            done = step - self.start_step - 1
            # Without the time of evaluations and checkpoints.
            per_step = (now - self.first_step_end) / max(done, 1)
            speed["eta_s"] = round(per_step * (self.config.steps - step), 1)
        tokens = step * self.config.tokens_per_step
        epochs = {of_component("epochs", name): seen for name, seen in self.epochs(step).items()}
        self.writer.write(step, {**values, "tokens": tokens, **epochs, **speed})
        self.written = step


def log_start(session: Session, run: Run, start_step: int) -> None:
    config, count = session.config, costs.parameters(session.config.model)
    log.info(
        "%s: %s parameters (%s without embeddings), kv_map %s, %s KV bytes per token at 16 bits",
        run.path,
        f"{count.total:,}",
        f"{count.non_embedding:,}",
        config.model.kv_map,
        f"{costs.kv_bytes(config.model, config.data.seq_len).resident:,.10g}",
    )
    log.info(
        "devices: %d (%s), mesh %s, attention by %s, from step %d of %d, %s tokens per step",
        jax.device_count(),
        jax.devices()[0].device_kind,
        " x ".join(f"{axis} {size}" for axis, size in session.mesh.shape.items()),
        session.options.attention,
        start_step,
        config.steps,
        f"{config.tokens_per_step:,}",
    )
    flops = costs.train_flops_per_token(config.model, config.data.seq_len)
    log.info("training FLOPs: %.4g per token", flops)


# Up to four epochs, tokens seen again are worth nearly as much as new ones (2305.16264).
_MANY_EPOCHS = 4


def log_data(session: Session) -> None:
    """Says how much of each source the whole run will see."""
    config, epochs = session.config, session.epochs(session.config.steps)
    tokens = session.schedule.counts(config.steps * config.batch_size)
    log.info("training tokens: %s in total", f"{config.steps * config.tokens_per_step:,}")
    for (name, part), rows in zip(session.prepared.parts.items(), tokens, strict=True):
        log.info(
            "  %s: %s tokens = %s epochs of its %s tokens",
            name or config.data.source,
            f"{rows * config.data.seq_len:,}",
            _three_digits(epochs[name]),
            f"{part.totals['train']['windows'] * config.data.seq_len:,}",
        )
        if epochs[name] > _MANY_EPOCHS:
            log.warning(
                "%s is seen %s times: more than about %d epochs help little; lower steps or batch_size, or "
                "use more text",
                name or config.data.source,
                _three_digits(epochs[name]),
                _MANY_EPOCHS,
            )


def _three_digits(number: float) -> str:
    """0.168, 4.1, 83,800: three significant digits, without an exponent."""
    if number >= 100:
        return f"{float(f'{number:.2e}'):,.0f}"
    return f"{number:.3g}" if number >= 1e-4 else "under 0.0001"


def log_time(clock: goodput.Clock) -> None:
    if jax.process_index() == 0:
        log.info(goodput.summary(clock.seconds()))


@contextlib.contextmanager
def logging_to(run: Run) -> Iterator[None]:
    """Copies the log into the run's log.txt. A remote run directory gets none: it cannot be appended to."""
    if not run.is_local or jax.process_index() != 0:
        yield
        return
    handler = logging.StreamHandler(directories.open_plain(run.log, "a", encoding="utf-8"))
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("cla_jax")
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.stream.close()
