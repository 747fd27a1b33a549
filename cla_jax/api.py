"""What users call from Python, offered by the package itself. jax and matplotlib are imported when used.

import cla_jax
import experiments

(config,) = experiments.find("smoke.tiny")
run = cla_jax.train_run(cla_jax.replaced(config, {"name": "mine", "model.kv_map": "cla:2"}))
print(cla_jax.evaluate_run(run, caches=["int8"])["cached-int8"]["perplexity"])
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

    from cla_jax.report import Row

Path = str | os.PathLike[str]


def train_run(config: Config) -> Run:
    """Trains a run to its end on the devices of this process, from its newest checkpoint if it has one.

    Ctrl-C ends it as an error would: what was saved stays, and the next call continues from it.

    Raises:
      ValueError: the config, data, run directory or checkpoints do not allow it.
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
    windows: int | None = None,
    data_dir: str | None = None,
) -> dict[str, dict[str, Any]]:
    """The scores of a run on its held-out text, which are also written to its directory.

    Args:
      run: the run, or its directory.
      caches: formats of the KV cache to decode through: some of `cla_jax.cache.FORMATS`, or eviction
        policies such as "h2o:keep=0.5".
      chunk: tokens that a cached forward takes at once. One is what generation does.
      windows: score only so many windows of text, and write nothing.
      data_dir: where prepared data is, if not where it was in training.

    Returns:
      Records by name: "full" for the forward without a cache, and "cached-FORMAT". Each has `perplexity`
      per token, `bits_per_byte`, `tokens`, `step`, and for caches `kv_bytes`: of all tokens of a window.

    Raises:
      ValueError: there is no such run, format or checkpoint, or the held-out text is not that of training.
    """
    from cla_jax.evaluate import evaluate

    run = run if isinstance(run, Run) else find_run(run)
    return dict(evaluate(run, formats=caches, chunk=chunk, windows=windows, data_dir=data_dir))


def compare_runs(runs: Iterable[Run | Path], *, context: int | None = None) -> list["Row"]:
    """A row for each run, and for each cache format it was evaluated through, from the run directories alone.

    Runs of one directory that differ in their seed alone are one row.

    Args:
      runs: runs, or directories that hold runs.
      context: tokens of context that KV bytes are counted for; by default the window of training.

    Returns:
      Rows with `name`, `kv_bytes` (resident bytes per token, at 16 bits where nothing is quantised), and
      `evaluation`, the record with `perplexity` and `bits_per_byte`, or None where there is none.

    Raises:
      ValueError: a directory holds no run, or a config is damaged.
    """
    from cla_jax import report

    if isinstance(runs, Run | str | os.PathLike):
        raise ValueError("runs must be a list of runs or directories, not a single one")
    named = [one.path if isinstance(one, Run) else one for one in runs]
    if not named:
        raise ValueError("runs is empty: give at least one run or directory")
    return report.merged(report.read(find_runs(named), context))


def plot_runs(runs: Iterable[Run | Path], *, context: int | None = None) -> "Figure":
    """Accuracy against resident KV bytes per token, as `launch.compare` draws it.

    Arguments and errors are those of `compare_runs`.
    """
    from cla_jax.report import page

    return page.plot(compare_runs(runs, context=context))
