"""Sweeps as generators: grids, the paper's learning-rate protocol, searches, and the plans made of them."""

import math

import pytest

import experiments
from cla_jax import costs, runs
from cla_jax.fields import replaced
from experiments import heads, one_gpu, recovery, small, smoke, sweeping
from experiments.sweeping import Pending, Result
from launch import sweep as launch_sweep
from launch.sweeps import trials
from tests.sealed import write_metrics


def played(sweep, perplexity, most=100):
    """The names of a sweep's trials, each answered with its perplexity; and what it returns or waits for."""
    names, answer = [], None
    while len(names) < most:
        try:
            name, config = sweep.send(answer)
        except StopIteration as end:
            return names, end.value
        except Pending as waits:
            return names, waits
        names.append(name)
        found = perplexity(config)
        metrics = None if found is None or math.isinf(found) else {"perplexity": found}
        diverged = found is not None and math.isinf(found)
        answer = Result(name=name, config=config, metrics=metrics, diverged=diverged)
    raise AssertionError("the sweep does not end")


def test_a_grid_is_every_combination_with_names_that_say_which():
    axes = {
        "optimizer.peak_lr": (1e-3, 3e-3),
        "heads": {"16": {}, "32": {"model.n_heads": 2, "model.d_head": 32}},
        "model.kv_map": ("identity", "cla:2"),
    }
    found = dict(sweeping.grid(smoke.tiny(), axes))
    assert len(found) == 8
    config = found["peak_lr=0.003,heads=32,kv_map=cla-2"]
    assert (config.optimizer.peak_lr, config.model.kv_map) == (3e-3, "cla:2")
    assert (config.model.n_heads, config.model.d_head) == (2, 32)
    assert list(found)[:2] == [
        "peak_lr=0.001,heads=16,kv_map=identity",
        "peak_lr=0.001,heads=16,kv_map=cla-2",
    ]


def test_fields_are_replaced_together_and_unknown_ones_named():
    # Neither is valid alone: 3 query heads do not divide by 4, nor 4 by 3.
    mha = replaced(smoke.tiny(), {"model.n_kv_heads": 4})
    assert replaced(mha, {"model.n_heads": 6, "model.n_kv_heads": 3}).model.q_groups == 2
    with pytest.raises(
        ValueError, match=r"unknown field of optimizer 'peak_l'; did you mean peak_lr"
    ):
        replaced(mha, {"optimizer.peak_l": 1.0})


@pytest.mark.parametrize("by", ["parameters", "flops"])
def test_a_control_has_the_cost_of_its_base_and_only_another_mlp(by):
    cost = {
        "parameters": lambda config: costs.parameters(config.model).total,
        "flops": lambda config: costs.train_flops_per_token(config.model, config.data.seq_len),
    }[by]
    base = replaced(smoke.tiny(), {"model.n_kv_heads": 4, "model.kv_map": "identity"})
    for row in (smoke.tiny(), replaced(base, {"model.n_kv_heads": 2})):
        control = sweeping.matched(row, base, by)
        assert control.model.d_ff > row.model.d_ff
        assert replaced(control, {"model.d_ff": row.model.d_ff}) == row
        apart = [abs(cost(c) - cost(base)) for c in (row, control)]
        assert apart[1] < apart[0] / 4
        for width in (control.model.d_ff - 1, control.model.d_ff + 1):
            other = replaced(control, {"model.d_ff": width})
            assert abs(cost(other) - cost(base)) >= apart[1]
    with pytest.raises(
        ValueError, match=r"cannot be matched to smoke/tiny by its MLP: it has .* with a width"
    ):
        sweeping.matched(replaced(base, {"model.d_model": 512}), smoke.tiny(), by)


def test_the_rows_of_heads_have_equal_parameters():
    counts = [costs.parameters(config.model).total for config in experiments.find("heads")]
    assert max(counts) / min(counts) < 1.002
    resident = [costs.kv_bytes(config.model, 256).resident for config in experiments.find("heads")]
    assert resident == [2048, 1024, 512, 512]


def test_the_second_set_of_3b_models_tries_the_rates_of_the_paper():
    found = [name for name, _ in experiments.find_sweep("cla_3b.second_learning_rate")()]
    assert len(found) == 7
    assert {"second_h32_mqa.lr-0.0015", "second_h64_mqa_cla2.lr-0.000675"} < set(found)


def rate_of(config):
    return config.optimizer.peak_lr


@pytest.mark.parametrize(
    ("perplexity", "count", "best"),
    [
        (lambda rate: abs(math.log(rate / 1e-3)), 5, 3e-4 * 1.5**3),  # 1.01e-3; 1.52e-3 is worse
        (lambda rate: math.inf if rate > 5e-4 else 1 / rate, 3, 4.5e-4),  # 6.75e-4 diverges
        (lambda rate: rate, 2, 3e-4),  # no better at once
        (lambda _: 7.0, 2, 3e-4),  # equal is no improvement
    ],
)
def test_the_papers_learning_rate_rises_until_perplexity_stops_improving(perplexity, count, best):
    sweep = sweeping.learning_rates(smoke.tiny())
    names, found = played(sweep, lambda config: perplexity(rate_of(config)))
    assert len(names) == count
    assert names[:2] == ["lr-0.0003", "lr-0.00045"]
    assert rate_of(found.config) == pytest.approx(best)


def test_a_search_that_diverges_at_once_finds_nothing():
    assert played(sweeping.learning_rates(smoke.tiny()), lambda _: math.inf) == (
        ["lr-0.0003"],
        None,
    )


def test_a_dependent_sweep_stops_where_it_needs_a_result():
    names, waits = played(sweeping.learning_rates(smoke.tiny()), lambda _: None)
    assert names == ["lr-0.0003"]
    assert str(waits) == "lr-0.0003 has no result yet"


def test_sweeps_side_by_side_wait_for_their_own_trials_only():
    def make():
        return sweeping.together(
            *(sweeping.learning_rates(smoke.tiny(), name, start=0.1, factor=2) for name in "ab")
        )

    first = lambda config: 5.0 if rate_of(config) == 0.1 else None
    names, waits = played(make(), first)
    assert names == ["a-0.1", "a-0.2", "b-0.1", "b-0.2"]
    assert "a-0.2" in str(waits)
    assert "b-0.2" in str(waits)
    _, found = played(make(), lambda config: 5.0)
    assert [best.name for best in found] == ["a-0.1", "b-0.1"]


def test_a_search_suggests_tells_and_is_rebuilt_from_its_journal(tmp_path):
    def make(trial):
        rate = trial.suggest_float("rate", 1e-4, 1e-1, log=True)
        return replaced(smoke.tiny(), {"optimizer.peak_lr": rate})

    search = lambda: sweeping.searched(tmp_path, make, trials=6, parallel=2)
    names, waits = played(search(), lambda _: None)
    assert names == ["trial-0000", "trial-0001"]  # two may be without a result
    assert "trial-0000 and trial-0001 must end" in str(waits)
    seen = {}
    for _ in range(6):  # each time from the beginning, as after a restart
        before = dict(seen)
        names, found = played(search(), lambda config: seen.setdefault(rate_of(config), None))
        for rate in seen:
            first = next(iter(seen))
            seen[rate] = math.inf if rate == first else math.log(rate / 1e-2) ** 2
        assert list(before) == list(seen)[: len(before)]  # the trials stay what they were
    assert len(seen) == 6
    names, found = played(search(), lambda config: seen[rate_of(config)])
    assert names == [f"trial-000{i}" for i in range(6)]
    assert rate_of(found.config) == min(seen, key=lambda rate: seen[rate])
    import optuna

    journal = optuna.storages.journal.JournalFileBackend(str(tmp_path / "optuna.log"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(journal))
    states = [trial.state.name for trial in study.trials]
    assert states.count("COMPLETE") == 5
    assert states.count("FAIL") == 1  # what diverged
    assert study.best_trial.params["rate"] == rate_of(found.config)


def test_a_search_goes_on_past_what_failed_for_good(tmp_path):
    make = lambda trial: replaced(
        smoke.tiny(), {"optimizer.peak_lr": trial.suggest_float("rate", 1e-4, 1e-1)}
    )
    sweep, answer, names = sweeping.searched(tmp_path, make, trials=4, parallel=2), None, []
    while len(names) < 4:
        name, config = sweep.send(answer)
        names.append(name)
        failed = name in ("trial-0000", "trial-0001")
        metrics = None if failed else {"perplexity": 5.0}
        answer = Result(name=name, config=config, metrics=metrics, failed=failed)
    assert names == [f"trial-000{i}" for i in range(4)]
    with pytest.raises(StopIteration) as end:
        sweep.send(answer)
    assert end.value.value.name in ("trial-0002", "trial-0003")


def test_a_trial_that_a_killed_launcher_did_not_finish_asking_for_is_passed_over(tmp_path):
    def killed(trial):
        trial.suggest_float("a", 0.1, 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        next(sweeping.searched(tmp_path, killed, trials=3))

    def make(trial):
        return replaced(smoke.tiny(), {"optimizer.peak_lr": trial.suggest_float("a", 0.1, 1)})

    names, _ = played(sweeping.searched(tmp_path, make, trials=3), lambda _: 1.0)
    assert names == ["trial-0001", "trial-0002"]


# ---------------------------------------------------------------------------------- plans


@pytest.fixture
def all_tuned(monkeypatch):
    """As if each row of the studies had a learning rate."""
    for module in (small, heads, one_gpu):
        for row in module.ROWS:
            monkeypatch.setitem(module.RATES, row.__name__, 1e-3)


@pytest.mark.usefixtures("all_tuned")
def test_every_sweep_is_documented_and_plans(tmp_path):
    flags = ["--placement.runs", str(tmp_path)]
    for name, sweep in experiments.sweeps().items():
        assert sweep.__doc__, name
        if name == "recovery.main" and not recovery.CHECKPOINT:
            continue  # it waits
        plan = trials.make(name, overrides=flags, dry=True)
        assert plan.trials, name
        assert plan.directory == type(plan.directory)(tmp_path) / name.replace(".", "/")
    assert not list(tmp_path.iterdir())  # planning writes nothing


def test_a_study_that_waits_is_declared_but_not_launched(monkeypatch):
    waiting = sweeping.waiting(recovery.main, "train the source first")
    monkeypatch.setattr(recovery, "SWEEPS", (recovery.source, waiting))
    with pytest.raises(ValueError, match="has no trial to launch: train the source first"):
        trials.make("recovery.main")
    declared = experiments.find_study("recovery.main")
    assert {row for row, _ in declared.trials} == recovery.MAIN.rows.keys()


def test_rows_without_a_learning_rate_are_declared_but_not_launched(monkeypatch):
    monkeypatch.delitem(small.RATES, "h16_gqa2")
    plan = trials.make("small.main")
    launched = {trial.name.rpartition(".seed-")[0] for trial in plan.trials}
    assert launched == small.MAIN.rows.keys() - {"h16_gqa2"}
    assert plan.waits_for.startswith("h16_gqa2: no learning rate yet; run small.tuning, and add")
    assert "experiments/small.py" in plan.waits_for
    assert not experiments.is_declared("small.tuning")
    assert experiments.is_declared("small.main")
    declared = experiments.find_study("small.main")
    assert {row for row, _ in declared.trials} == small.MAIN.rows.keys()


def test_a_study_without_any_learning_rate_launches_nothing():
    with pytest.raises(
        ValueError, match=r"one_gpu\.main has no trial to launch: .*run one_gpu\.tuning"
    ):
        trials.make("one_gpu.main")


@pytest.mark.parametrize("module", [small, heads, one_gpu])
def test_every_study_is_tuned_and_its_baseline_has_both_norms(module, monkeypatch):
    """Rows that share have a norm of their own before keys and values: so has a control."""
    for row in list(module.RATES):
        monkeypatch.delitem(module.RATES, row)
    for key in module.STUDIES:
        name = f"{module.__name__.rpartition('.')[2]}.{key}"
        with pytest.raises(ValueError, match="no learning rate yet"):
            trials.make(name)
        declared = experiments.find_study(name)
        models = [declared.config(row).model for row in declared.study.rows]
        whole = [model for model in models if model.kv_map == "identity"]
        baselines = [model for model in whole if model.kv_norm == "block"]
        if baselines and len(whole) < len(models):
            assert any(replaced(one, {"kv_norm": "own"}) in models for one in baselines), name


def test_a_study_is_the_sweep_of_its_rows():
    plan = trials.make("demo")
    assert [trial.config for trial in plan.trials] == experiments.find("demo")
    assert [trial.name for trial in plan.trials] == ["h16_mqa", "h16_mqa_cla2", "h8_mqa"]


def test_fields_are_overridden_for_every_trial():
    flags = ["--steps", "7", "--placement.no-scan-layers", "--optimizer.peak-lr=0.5"]
    for trial in trials.make("demo.seeds", overrides=flags).trials:
        assert (trial.config.steps, trial.config.optimizer.peak_lr) == (7, 0.5)
        assert not trial.config.placement.scan_layers
        assert trial.name.endswith(f"seed-{trial.config.seed}")


def test_results_let_a_plan_go_on():
    def result(config):
        known = {0.01: 9.0, 0.015: 8.0, 0.0225: 8.5}
        metrics = {"perplexity": known[round(rate_of(config), 4)]}
        return Result(name=config.name.rpartition("/")[2], config=config, metrics=metrics)

    plan = trials.make("smoke.learning_rate", result=result)
    assert [trial.name for trial in plan.trials] == ["lr-0.01", "lr-0.015", "lr-0.0225"]
    assert (plan.found.name, plan.waits_for) == ("lr-0.015", "")
    assert trials.make("smoke.learning_rate").waits_for == "lr-0.01 has no result yet"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "a"], "two trials are called 'a'"),
        (["a/b"], "trial 'a/b': a name may contain only letters"),
        ([".a"], "must begin with a letter or a digit"),
        ([], "has no trial to launch"),
    ],
)
def test_names_that_cannot_be_directories_are_refused(monkeypatch, names, words):
    def sweep():
        yield from ((name, smoke.tiny()) for name in names)

    monkeypatch.setattr(smoke, "SWEEPS", (sweep,))
    with pytest.raises(ValueError, match=words):
        trials.make("smoke.sweep")


def test_unknown_sweeps_get_the_nearest():
    with pytest.raises(ValueError, match=r"'smoke.gird'; did you mean smoke.grid"):
        trials.make("smoke.gird")


def test_jobs_have_names_of_their_own_that_every_engine_takes():
    plan = trials.make("smoke.grid")
    names = {trial.job(number) for trial in plan.trials for number in (1, 2)}
    assert len(names) == 12
    for name in names:
        assert len(name) <= 40
        assert name.strip("abcdefghijklmnopqrstuvwxyz0123456789-") == ""
    assert plan.trials[0].job(1) == trials.make("smoke.grid").trials[0].job(1)


def test_a_sweep_evaluates_what_is_done(tmp_path, monkeypatch, capsys):
    there = ["--", "--placement.runs", str(tmp_path)]
    given = []
    monkeypatch.setattr("launch.evaluate.main", given.append)
    configs = dict(smoke.grid())
    for name, steps in zip(configs, (40, 40, 20), strict=False):
        config = replaced(
            configs[name], {"name": f"smoke/grid/{name}", "placement.runs": str(tmp_path)}
        )
        run = runs.open_run(config, data_fingerprint="sotu", tokenizer_json="{}")
        line = {"step": steps, "held_out_loss": 2.0, "perplexity": 7.5}
        write_metrics(run, [line])
    launch_sweep.main(["smoke.grid", "--evaluate", *there])
    done = [str(tmp_path / "smoke" / "grid" / name) for name in list(configs)[:2]]
    assert given == [done]
    where = tmp_path / "smoke" / "grid"
    assert f"launch.compare {where}" in capsys.readouterr().out
    monkeypatch.setattr("experiments.is_declared", lambda name: name == "smoke.grid")
    launch_sweep.main(["smoke.grid", "--evaluate", *there])
    assert f"launch.compare --study smoke.grid {where}" in capsys.readouterr().out
    assert not (tmp_path / "smoke" / "grid" / ".sweep").exists()  # nothing was submitted
