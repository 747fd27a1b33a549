"""The functions for users of Python; `cla_jax` exports them. jax and matplotlib are imported when used.

import cla_jax
import experiments

(config,) = experiments.find("smoke.tiny")
run = cla_jax.train_run(cla_jax.replaced(config, {"name": "mine", "model.kv_map": "cla:2"}))
print(cla_jax.evaluate_run(run, caches=["int8"])["cached-int8"].scores.perplexity)
print(cla_jax.Decoder.open(run).generate(["Fellow citizens"]))
cla_jax.plot_runs([run]).savefig("pareto.png")
"""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from cla_jax.config import Config
from cla_jax.runs import Run, find_run, find_runs, run_path

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from cla_jax.evaluation import Evaluation
    from cla_jax.report import Row

Path = str | os.PathLike[str]


def train_run(config: Config) -> Run:
    """Trains a run to its last step, on the devices of this process.

    If the run has a checkpoint, training continues from the newest one. Ctrl-C stops it like an error:
    checkpoints stay, and the next call continues from the newest.

    Returns:
      The run, in the directory `placement.runs`/`name`.

    Raises:
      ValueError: the config is invalid, or data, run directory or checkpoints do not match it.
      cla_jax.train.Diverged: a loss or a gradient was not finite.
    """
    if not isinstance(config, Config):
        raise ValueError(f"{config!r} is not a config; experiments.find(NAME) returns configs")
    from cla_jax import preflight, train
    from cla_jax.evaluate import during_training

    preflight.check(config)
    train.train(config, evaluate=during_training)
    return Run(run_path(config))


def evaluate_run(
    run: Run | Path,
    *,
    caches: Sequence[str] = ("dense",),
    chunk: int = 64,
    attention: str = "xla",
    matmul: str = "xla",
    windows: int | None = None,
    data_dir: str | None = None,
) -> dict[str, "Evaluation"]:
    """Scores a run on its held-out text, and writes the scores to its directory.

    Args:
      run: the run, or its directory.
      caches: formats of the KV cache to decode through: keys of `cla_jax.formats.FORMATS`, or eviction
        policies such as "h2o:keep=0.5".
      chunk: tokens per decoding step. Generation has 1; more is faster.
      attention: what reads the cache: `xla`, or a kernel of `cla_jax.model.decode_kernels`.
      matmul: what multiplies tokens with weights in steps through a cache: `xla`, or `native` for CPUs.
      windows: score only this many windows of text, and write nothing. Default: all.
      data_dir: directory of the prepared data. Default: the directory that training used.

    Returns:
      Evaluations by name: "full" for the full forward pass, and "cached-FORMAT". Each has a `step`, and
      `scores` with `perplexity` (per token), `bits_per_byte` and `tokens`. Scores through caches also have
      `kv_bytes`: bytes per token, at a context of one window.

    Raises:
      ValueError: the run, format or checkpoint does not exist, or the held-out text is not that of training.
        Or a kernel does not support this model, format, chunk or hardware.
    """
    from cla_jax.evaluate import evaluate

    run = run if isinstance(run, Run) else find_run(run)
    how: dict[str, Any] = {"chunk": chunk, "attention": attention, "matmul": matmul}
    return dict(evaluate(run, formats=caches, data_dir=data_dir, windows=windows, **how))


def compare_runs(runs: Iterable[Run | Path], *, context: int | None = None) -> list["Row"]:
    """A row for each run, and for each cache format that it was evaluated with. Evaluates nothing.

    Runs of one directory that differ only in their seed are one row.

    Args:
      runs: runs, run directories, or directories of runs.
      context: tokens of context for the KV bytes. Default: the training window.

    Returns: Rows with `name`, `kv_bytes` and `scores`. `kv_bytes` are resident bytes per token, with 16
      bits for elements that are not quantised. `scores` have `perplexity` and `bits_per_byte`, or are None.

    Raises:
      ValueError: a directory contains no run, or a config is damaged.
    """
    from cla_jax import report

    if isinstance(runs, Run | str | os.PathLike):
        raise ValueError("runs must be a list of runs or directories, not a single one")
    named = [one.path if isinstance(one, Run) else one for one in runs]
    if not named:
        raise ValueError("runs is empty: give at least one run or directory")
    return report.merged(report.read(find_runs(named), context))


def plot_runs(runs: Iterable[Run | Path], *, context: int | None = None) -> "Figure":
    """A plot of accuracy against resident KV bytes per token, like that of `launch.compare`.

    Arguments and errors are those of `compare_runs`.
    """
    from cla_jax.report import page

    return page.plot(compare_runs(runs, context=context))
