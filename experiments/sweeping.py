"""Sweeps: generators that yield the trials of a study as (name, config).

    def seeds() -> Trials:
        '''Three seeds of one model.'''
        for seed in range(3):
            yield f"seed-{seed}", replaced(h16_mqa(), {"seed": seed})

`yield` returns the trial's `Result`. A grid ignores it, so all its trials are known at once. In other sweeps
the next trial depends on an earlier one, so they read the perplexity of its result. If there is no result
yet, this raises `Pending`: the trials yielded so far can be started now.

When a trial has ended, the generator runs again from its beginning, with the results from the run
directories. So a sweep must yield the same trials for the same results.

A generator may return what it has found: `learning_rates` returns the best of its trials.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
import types
from collections.abc import Callable, Generator, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from cla_jax import costs, extras
from cla_jax.config import Config
from cla_jax.fields import replaced
from cla_jax.messages import near_choice
from cla_jax.study import Study

if TYPE_CHECKING:
    import optuna


class Pending(Exception):
    """A sweep cannot continue before a trial has ended."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """What has become of a trial: its held-out metrics after its last step, if it has come so far."""

    name: str
    config: Config
    metrics: Mapping[str, float] | None = None
    diverged: bool = False
    failed: bool = False  # for good, for now: `launch.sweep --again` may still bring a result

    @property
    def known(self) -> bool:
        return self.diverged or self.metrics is not None

    @property
    def perplexity(self) -> float:
        """Held-out perplexity; infinite for a trial that diverged. Raises Pending while there is none."""
        if self.metrics is not None:
            return self.metrics["perplexity"]
        if self.diverged:
            return math.inf
        raise Pending(f"{self.name} has no result yet")


# What `yield` takes, gives back, and what the sweep returns at its end.
Trials = Generator[tuple[str, Config], Result, Any]


# ------------------------------------------------------------------------------------- studies


def declared(
    study: Study,
    rows: Iterable[Callable[[], Config]],
    rates: Mapping[str, float] = types.MappingProxyType({}),
    **changes: Any,
) -> Trials:
    """The trials of a declared study: `ROW.seed-N` for each of its rows and seeds.

    Args:
      study: the rows and their numbers of seeds; its control widens their MLPs.
      rows: the functions that make the rows; their names are the names of the rows.
      rates: the tuned learning rate of each row, by name. Rows of other studies may be among them.
      changes: for the name of a row, other fields that replace those of its function.

    Raises ValueError for a row without a function.
    """
    made = {row.__name__: row for row in rows}
    for name in (*study.rows, *changes):
        near_choice("row", name, made)
    tuned = {name: {"optimizer.peak_lr": rates[name]} for name in study.rows if name in rates}
    configs = {
        name: replaced(made[name](), tuned.get(name, {}) | changes.get(name, {}))
        for name in study.rows
    }
    if study.control:
        base = configs[study.base]
        configs = {name: matched(config, base, study.control) for name, config in configs.items()}
    for name, seeds in study.rows.items():
        for seed in range(seeds):
            yield f"{name}.seed-{seed}", replaced(configs[name], {"seed": seed})


def once_tuned(
    sweep: Callable[[], Trials], rates: Mapping[str, float], tuning: str
) -> Callable[[], Trials]:
    """The sweep of a declared study as it is launched: rows without a learning rate of their own wait.

    The declaration itself needs all trials, so the module keeps `sweep` too.

    Args:
      sweep: yields `ROW.seed-N`, see `declared`.
      rates: the tuned learning rates, by row.
      tuning: the name of the sweep that finds them.
    """

    @functools.wraps(sweep)
    def launched() -> Trials:
        untuned: dict[str, None] = {}
        for name, config in sweep():
            row = name.rpartition(".seed-")[0]
            if row in rates:
                yield name, config
            else:
                untuned[row] = None
        if untuned:
            file = f"{sweep.__module__.replace('.', '/')}.py"
            raise Pending(
                f"{', '.join(untuned)}: no learning rate yet; run {tuning}, and add the best rates to "
                f"RATES in {file}"
            )

    return launched


def waiting(sweep: Callable[[], Trials], reason: str) -> Callable[[], Trials]:
    """The sweep of a declared study that cannot be launched yet; `reason` says what it waits for."""

    @functools.wraps(sweep)
    def launched() -> Trials:
        raise Pending(reason)
        yield from sweep()  # never reached: it makes this a generator, as every sweep is

    return launched


# --------------------------------------------------------------------------------------- grids


def grid(
    base: Config, axes: Mapping[str, Iterable[Any] | Mapping[str, Mapping[str, Any]]]
) -> Trials:
    """Every combination of the axes; the last axis changes fastest.

    An axis is a field with its values, or any word with named changes of several fields:

        grid(h16_mqa(), {
            "optimizer.peak_lr": (1e-3, 3e-3),
            "heads": {"16": {}, "8": {"model.n_heads": 8, "model.d_head": 8}},
            "seed": range(3),
        })

    yields `peak_lr=0.001,heads=16,seed=0` and eleven more.
    """
    choices = []
    for axis, values in axes.items():
        label = axis.rpartition(".")[2]
        named = values if isinstance(values, Mapping) else {v: {axis: v} for v in values}
        choices.append([(f"{label}={_word(value)}", changes) for value, changes in named.items()])
    for combination in itertools.product(*choices):
        labels, changes = zip(*combination, strict=True) if combination else ((), ())
        merged = {field: value for change in changes for field, value in change.items()}
        yield ",".join(labels) or "only", replaced(base, merged)


def _word(value: Any) -> str:
    """A value as part of a file name: 0.001, cla-2."""
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9.+-]+", "-", text)


def matched(config: Config, base: Config, by: Literal["parameters", "flops"]) -> Config:
    """The config with the MLP width that makes its cost equal to that of `base`. Nothing else changes.

    Sharing and fewer KV heads also save parameters and FLOPs. A control gives these to the MLP, so that only
    the cache differs. `parameters` counts those of the whole model, `flops` those of training on one token.
    The width is the closest integer. Raises ValueError if `config` costs more than `base` even with an MLP of
    width 1.
    """

    def cost(config: Config) -> float:
        if by == "parameters":
            return costs.parameters(config.model).total
        return costs.train_flops_per_token(config.model, config.data.seq_len)

    wide = lambda width: replaced(config, {"model.d_ff": width})
    width = width_of_cost(lambda width: cost(wide(width)), cost(base))
    if width < 1:
        raise ValueError(
            f"{config.name} cannot be matched to {base.name} by its MLP: it has {cost(wide(1)):,.10g} {by} "
            f"with a width of 1, {base.name} has {cost(base):,.10g}"
        )
    return wide(width)


def width_of_cost(cost: Callable[[int], float], wanted: float) -> int:
    """The MLP width whose cost is closest to `wanted`: below 1 if all cost more. Costs are linear in it."""
    least = cost(1)
    return 1 + round((wanted - least) / (cost(2) - least))


# ------------------------------------------------------------------------- dependent sweeps


def learning_rates(
    base: Config, name: str = "lr", *, start: float = 3e-4, factor: float = 1.5, most: int = 20
) -> Trials:
    """The paper's search for a learning rate (2405.12981, tables 3 and 4).

    It starts at `start` and multiplies the rate by `factor` until the held-out perplexity stops improving. A
    run that diverges has not improved. Returns the Result of the best rate, after at most `most` trials.
    """
    best = None
    for i in range(most):
        rate = start * factor**i
        config = replaced(base, {"optimizer.peak_lr": rate})
        result = yield f"{name}-{rate:.3g}", config
        if not result.perplexity < (best.perplexity if best else math.inf):
            break
        best = result
    return best


def together(*sweeps: Trials) -> Trials:
    """Several dependent sweeps at once; each waits only for its own trials. Returns their results."""
    results, pending = [], []
    for sweep in sweeps:
        try:
            results.append((yield from sweep))
        except Pending as waits:
            pending.append(str(waits))
    if pending:
        raise Pending("; ".join(pending))
    return results


# --------------------------------------------------------------------------------------- search


def searched(
    directory: str | os.PathLike[str],
    make: Callable[["optuna.Trial"], Config],
    *,
    trials: int,
    parallel: int = 1,
    sampler: "optuna.samplers.BaseSampler | None" = None,
) -> Trials:
    """A search by Optuna for the config with the lowest held-out perplexity. Needs the extra `search`.

    Args:
      directory: for the files of the sweep. A sweep function that takes an argument gets it. Optuna's journal
        is written there. It needs no server, only a file system, which several machines may share.
      make: a function from Optuna's trial, which suggests values, to a config.
      trials: number of trials.
      parallel: how many trials may be without a result at the same time. With fewer, each can use more
        results.
      sampler: Default: Optuna's tree of Parzen estimators, with a seed.

    Returns the Result with the lowest perplexity. Trials that fail or diverge are reported to Optuna as
    failed.
    """
    study, optuna = _study(directory, sampler)
    best, waiting = None, []
    for number in range(trials):
        if number == len(study.get_trials(deepcopy=False)):
            if len(waiting) >= parallel:
                raise Pending(f"{' and '.join(waiting)} must end before more is tried")
            if sampler is None:  # one seed for all would suggest the same again after each restart
                study.sampler = optuna.samplers.TPESampler(seed=number, constant_liar=True)
            asked = study.ask()
            make(asked)
            asked.set_user_attr("made", True)
        asked = study.get_trials(deepcopy=False)[number]
        if "made" not in asked.user_attrs:  # its launcher was killed just then
            if not asked.state.is_finished():
                study.tell(number, state=optuna.trial.TrialState.FAIL)
            continue
        config = make(optuna.trial.FixedTrial(asked.params))  # type: ignore  # suggests as a Trial does
        result = yield f"trial-{number:04d}", config
        if result.failed and not result.known:  # nothing to learn from, nothing to wait for
            if not asked.state.is_finished():
                study.tell(number, state=optuna.trial.TrialState.FAIL)
            continue
        if not result.known:
            waiting.append(result.name)
            continue
        if not asked.state.is_finished():
            if math.isfinite(result.perplexity):
                study.tell(number, result.perplexity)
            else:
                study.tell(number, state=optuna.trial.TrialState.FAIL)
        if best is None or result.perplexity < best.perplexity:
            best = result
    if waiting:
        raise Pending(f"{' and '.join(waiting)} must end")
    return best


def _study(directory: str | os.PathLike[str], sampler: Any) -> tuple[Any, Any]:
    extras.require("search", "a searched sweep")
    import optuna
    from optuna.storages.journal import JournalFileBackend

    path = os.fspath(directory)
    if "://" in path:
        raise ValueError(
            f"a searched sweep keeps a journal, which {path} cannot: take a file system"
        )
    os.makedirs(path, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = JournalFileBackend(os.path.join(path, "optuna.log"))
    study = optuna.create_study(
        study_name="sweep",
        storage=optuna.storages.JournalStorage(journal),
        sampler=sampler,
        load_if_exists=True,
    )
    return study, optuna
