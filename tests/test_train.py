import contextlib
import dataclasses
import functools
import json
import logging
import math
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax import checkpoint, chips, costs, goodput
from cla_jax import train as training
from cla_jax.config import Component, MeshConfig, Stage
from cla_jax.data import tokenizers
from cla_jax.evaluate import during_training
from cla_jax.logger import Diverged, StepLogger
from cla_jax.model import platform
from cla_jax.model.transformer import ForwardOptions
from cla_jax.optimizer import schedule
from cla_jax.recorder import is_complete
from cla_jax.runs import find_runs
from cla_jax.session import batch_stream, prepare_session
from cla_jax.state import named
from cla_jax.step import _step, compile_step, compiler_options, make_step, tokens_hash
from cla_jax.train import opened, restore_or_init, train
from cla_jax.writers import CompositeWriter

NO_EVALUATION = lambda *_: {}


def parameters(config) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint of a run: parameters, moments, step."""
    (run,) = find_runs([f"{config.placement.runs}/{config.name}"])
    step = checkpoint.steps(run.checkpoints)[-1]
    assert checkpoint.verify(run.checkpoints / f"{step:08d}") is None
    session = prepare_session(config)
    with jax.set_mesh(session.mesh):
        return jax.device_get(named(restore_or_init(session, run)))


def metrics(config) -> list[dict]:
    (run,) = find_runs([f"{config.placement.runs}/{config.name}"])
    return run.read_metrics()


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# Two sources, and other weights after step 3: resuming at step 2 goes on within a stage and meets the next.
MIXTURE = {
    "data.mixture": (
        Component(name="four", source="sotu:4", weight=0.7),
        Component(name="five", source="sotu:5", weight=0.3),
    ),
    "data.stages": (Stage(step=3, weights=(("five", 1.0),)),),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [{"model.kv_map": "cla:2"}, {"model.kv_map": "0,0,2,0"}, MIXTURE],
    ids=["cla:2", "0,0,2,0", "mixture"],
)
def test_train_2_resume_to_4_equals_4_straight(tiny, devices, fields):
    devices(1)
    straight = tiny(name="straight", **fields)
    # Step 2 is saved because the run is stopped there, not because it is due.
    resumed = tiny(name="resumed", **fields, **{"placement.save_every": 3})
    assert train(straight, evaluate=NO_EVALUATION)
    assert not train(resumed, evaluate=NO_EVALUATION, should_stop=lambda step: step == 2)
    assert checkpoint.steps(find_runs([f"{resumed.placement.runs}/resumed"])[0].checkpoints) == [2]
    assert train(resumed, evaluate=NO_EVALUATION)
    assert_same_bits(parameters(straight), parameters(resumed))
    keys = ("step", "loss", "grad_norm", "lr", "tokens_hash", "tokens")
    records = [[{key: r[key] for key in keys} for r in metrics(c)] for c in (straight, resumed)]
    assert records[0] == records[1]
    assert [r["step"] for r in records[0]] == [1, 2, 3, 4]


def test_a_finished_run_is_left_alone_without_compiling(tiny, devices, caplog, monkeypatch):
    devices(1)
    config = tiny()
    evaluate = lambda *_: {"held_out_loss": 1.0}
    train(config, evaluate=evaluate)
    before = metrics(config)
    with caplog.at_level(logging.INFO), monkeypatch.context() as patched:
        patched.setattr(training, "compile_step", lambda _: pytest.fail("compiled"))
        assert train(config, evaluate=evaluate)
    assert metrics(config) == before
    assert "already complete" in caplog.text
    # A last checkpoint that is damaged is not taken for a finished run.
    (run,) = find_runs([config.placement.runs])
    saved = Path(run.checkpoints / "00000004").rglob("*")
    arrays = max((file for file in saved if file.is_file()), key=lambda file: file.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[:-1] + b"?")
    assert not is_complete(run, config)


def test_steps_done_again_are_evaluated_again(tiny, devices):
    devices(1)
    config = tiny()  # saves at 2 and 4
    losses = iter((1.0, 2.0))
    evaluate = lambda *_: {"held_out_loss": next(losses)}
    train(config, evaluate=evaluate)
    (run,) = find_runs([config.placement.runs])
    (run.checkpoints / "00000004.json").unlink()
    assert train(config, evaluate=evaluate)
    assert metrics(config)[-1]["held_out_loss"] == 2.0


def test_an_evaluation_that_a_kill_prevented_is_made_up_for(tiny, devices):
    devices(1)
    config = tiny()

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, evaluate=killed)
    assert not any("held_out_loss" in record for record in metrics(config))
    calls = []

    def evaluate(*_):
        calls.append(1)
        return {"held_out_loss": 1.0}

    for _ in range(2):
        assert train(config, evaluate=evaluate)
    assert len(calls) == 1
    assert metrics(config)[-1]["held_out_loss"] == 1.0
    assert metrics(config)[-1]["loss"] > 0


def test_an_evaluation_between_two_checkpoints_that_a_kill_prevented_is_made_up_for(tiny, devices):
    devices(1)
    config = tiny(**{"placement.eval_every": 2})  # saved and evaluated at 2 and 4

    def killed(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, evaluate=killed)
    calls = []

    def evaluate(*_):
        calls.append(1)
        return {"held_out_loss": float(len(calls))}

    assert train(config, evaluate=evaluate)
    held_out = {r["step"]: r["held_out_loss"] for r in metrics(config) if "held_out_loss" in r}
    assert held_out == {2: 1.0, 4: 2.0}
    # A stop between two evaluations, and a start after it, add none.
    other = tiny(name="other", **{"placement.eval_every": 2})
    assert not train(other, evaluate=evaluate, should_stop=lambda step: step == 3)
    assert train(other, evaluate=evaluate)
    assert [r["step"] for r in metrics(other) if "held_out_loss" in r] == [2, 4]


def test_that_a_checkpoint_is_whole_is_known_before_the_evaluation_after_it(tiny, devices):
    """Else its manifest could vanish from a run that is killed in the evaluation, without a word."""
    devices(1)
    config = tiny()

    def killed(*_):
        (run,) = find_runs([config.placement.runs])
        manifest, deadline = run.checkpoints / "00000004.json", time.monotonic() + 20
        while '"saved": 4' not in run.metrics.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
        manifest.unlink()
        assert run.missing_records().checkpoint == 4
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, evaluate=killed)


def test_the_file_of_the_last_evaluation_is_made_again(tiny, devices, caplog):
    devices(1)
    config = tiny()
    evaluate = lambda *_: {"held_out_loss": 1.0, "record": {"nll": 2.0}}
    train(config, evaluate=evaluate)
    (run,) = find_runs([config.placement.runs])
    assert is_complete(run, config)
    (run.path / "eval" / "training.json").unlink()
    train(config, evaluate=evaluate)
    assert "training.json of step 4 is missing" in caplog.text
    assert run.eval("training") == {"nll": 2.0, "step": 4}
    assert is_complete(run, config)


def test_altered_metrics_are_told_when_a_run_goes_on(tiny, devices, caplog):
    devices(1)
    config = tiny()
    train(config, evaluate=NO_EVALUATION, should_stop=lambda step: step == 2)
    (run,) = find_runs([config.placement.runs])
    text = run.metrics.read_text()
    run.metrics.write_text(text.replace('"tokens": 256', '"tokens": 257'))
    assert text != run.metrics.read_text()
    train(config, evaluate=NO_EVALUATION)
    assert "was altered: its checksum does not match" in caplog.text
    assert [record["step"] for record in metrics(config) if "loss" in record] == [2, 3, 4]


def test_a_run_is_trained_by_one_process_at_a_time(tiny, devices):
    devices(1)
    config = tiny()
    other = tiny(**{"placement.eval_batch_size": 128})

    def meanwhile(*_):
        (record,) = Path(config.placement.runs).glob("*/config.json")
        before = record.read_text()
        with pytest.raises(ValueError, match="is being trained by another process"):
            train(other, evaluate=NO_EVALUATION)
        assert record.read_text() == before
        return {"held_out_loss": 1.0}

    assert train(config, evaluate=meanwhile)
    assert train(config, evaluate=NO_EVALUATION)  # the lock is free again


def test_hosts_meet_once_their_steps_are_compiled(tiny, devices, monkeypatch):
    """A host that compiles longer than the others would be late for the first collective."""
    devices(1)
    happened = []
    for name in ("compile_step", "batch_stream"):
        done = getattr(training, name)
        monkeypatch.setattr(
            training, name, lambda *given, n=name, f=done: (f(*given), happened.append(n))[0]
        )
    train(
        tiny(steps=1),
        evaluate=lambda *_: {"held_out_loss": 1.0},
        agree=lambda facts: happened.append(next(iter(facts))),
    )
    assert happened == ["config", "data", "compile_step", "start step", "batch_stream"]


def test_further_hosts_neither_lock_nor_write(tiny, devices, monkeypatch):
    devices(1)
    with opened(prepare_session(tiny())) as run:
        before = (run.path / "config.json").read_text()
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with opened(prepare_session(tiny(**{"placement.eval_batch_size": 128}))):
            assert (run.path / "config.json").read_text() == before


def losses(config, n, mesh: MeshConfig, devices):
    devices(n)
    session = prepare_session(
        dataclasses.replace(config, placement=dataclasses.replace(config.placement, mesh=mesh))
    )
    with jax.set_mesh(session.mesh):
        state = restore_or_init(session, find_run(config))
        layouts = {name: leaf.sharding.spec for name, leaf in named(state).items()}
        step = make_step(session)
        batches = batch_stream(session, 0)
        out = []
        for _ in range(10):
            state, values = step(state, next(batches))
            out.append((float(values["loss"]), int(values["tokens_hash"])))
        batches.close()
        # The step keeps the layout of what it is given.
        assert {name: leaf.sharding.spec for name, leaf in named(state).items()} == layouts
    return out, layouts


def find_run(config):
    from etils import epath

    from cla_jax.runs import Run

    return Run(epath.Path(config.placement.runs) / "none")


@pytest.mark.slow
def test_meshes_give_equal_losses_and_the_declared_layouts(tiny, devices, monkeypatch):
    """Also as the step is compiled for other platforms than the CPU."""
    config = tiny(steps=10)
    alone, _ = losses(config, 1, MeshConfig(), devices)
    tensor = MeshConfig(data=2, fsdp=2, model=2)
    for mesh, remat, cpu in (
        (MeshConfig(fsdp=8), "none", True),
        (tensor, "block", True),
        (MeshConfig(fsdp=8), "block", False),
        (tensor, "none", False),
    ):
        monkeypatch.setattr(platform, "on_cpu", lambda cpu=cpu: cpu)
        spread, layouts = losses(tiny(steps=10, **{"placement.remat": remat}), 8, mesh, devices)
        for (a, hash_a), (b, hash_b) in zip(alone, spread, strict=True):
            assert b == pytest.approx(a, rel=1e-6)
            assert hash_a == hash_b
        up = layouts["model.stacks.0.blocks.mlp.up.weight"]
        assert tuple(up) == (None, None, "fsdp", "model")
        below = lambda prefix, layouts=layouts: {
            name.removeprefix(prefix): spec
            for name, spec in layouts.items()
            if name.startswith(prefix)
        }
        # Moments are split like their parameters.
        assert below("moments.1.0.mu.") == below("moments.1.0.nu.") == below("model.")


@pytest.mark.slow
def test_keys_and_values_with_maps_of_their_own_are_trained_on_a_mesh(tiny, devices):
    """Layer 1 makes values and reads keys; each half of a projection is split like the whole."""
    config = tiny(steps=10, **{"model.kv_map": "k=cla:2;v=identity", "model.n_layers": 2})
    alone, layouts = losses(config, 1, MeshConfig(), devices)
    spread, split = losses(config, 8, MeshConfig(data=2, fsdp=2, model=2), devices)
    assert [hash_ for _, hash_ in alone] == [hash_ for _, hash_ in spread]
    assert [b for b, _ in spread] == pytest.approx([a for a, _ in alone], rel=1e-6)
    assert layouts.keys() == split.keys()
    assert (
        split["model.stacks.0.projection.kv.weight"] == split["model.stacks.1.projection.kv.weight"]
    )


@pytest.mark.slow
def test_resuming_on_another_mesh_keeps_bits_tokens_and_losses(tiny, devices):
    """Eight devices to step 2, then 2 x 2 x 2 to step 4, then one: as if never moved."""
    steady = tiny(name="steady", steps=6, **MIXTURE)
    moved = tiny(name="moved", steps=6, **MIXTURE)
    devices(1)
    train(steady, evaluate=NO_EVALUATION)
    here = functools.partial(tiny, name="moved", steps=6, **MIXTURE)
    devices(8)
    train(here(), evaluate=NO_EVALUATION, should_stop=lambda step: step == 2)
    before = parameters(here())
    tensor = here(**{"placement.mesh": MeshConfig(data=2, fsdp=2, model=2)})
    assert_same_bits(before, parameters(tensor))
    train(tensor, evaluate=NO_EVALUATION, should_stop=lambda step: step == 4)
    devices(1)
    train(moved, evaluate=NO_EVALUATION)
    for a, b in zip(metrics(steady), metrics(moved), strict=True):
        assert (a["step"], a["tokens_hash"]) == (b["step"], b["tokens_hash"])
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)


def test_microbatches_change_the_loss_by_rounding_only(tiny, devices, monkeypatch):
    devices(1)
    whole, parts = tiny(name="whole"), tiny(name="parts", **{"placement.accumulate": 4})
    for config in (whole, parts):
        train(config, evaluate=NO_EVALUATION)
    # As TPUs compute them: all in one loop, from zeros.
    looped = tiny(name="looped", **{"placement.accumulate": 4})
    monkeypatch.setattr("cla_jax.step.first_microbatch_apart", lambda: False)
    _step.cache_clear()
    train(looped, evaluate=NO_EVALUATION)
    _step.cache_clear()
    for a, b in zip(metrics(parts), metrics(looped), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
    for a, b in zip(metrics(whole), metrics(parts), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)
        assert a["tokens_hash"] == b["tokens_hash"]


def test_metrics_hold_the_rate_of_the_update_and_the_norm_before_clipping(tiny, devices):
    devices(1)
    config = tiny(steps=2, **{"optimizer.clip_norm": 1e-3})
    train(config, evaluate=NO_EVALUATION)
    first, second = metrics(config)
    rate = schedule(config.optimizer, 2)
    assert (first["lr"], second["lr"]) == pytest.approx((float(rate(0)), float(rate(1))))
    session = prepare_session(config)
    with jax.set_mesh(session.mesh):
        model = restore_or_init(session, find_run(config)).model
        batches = batch_stream(session, 0)
        model, (tokens,) = jax.device_get((model, next(batches)))
        batches.close()

    @jax.jit
    @jax.value_and_grad
    def mean_loss(model):
        log_p = jax.nn.log_softmax(model.logits(tokens[:, :-1], ForwardOptions()))
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], -1).mean()

    loss, gradients = mean_loss(model)
    assert first["loss"] == pytest.approx(float(loss), rel=1e-5)
    norm = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients)))
    assert first["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert norm > 1e-3


def test_training_learns(tiny, devices):
    devices(1)
    config = tiny(steps=30, **{"placement.save_every": 30})
    train(config, evaluate=during_training)
    records = metrics(config)
    assert records[0]["loss"] == pytest.approx(math.log(260), abs=0.5)
    assert records[-1]["loss"] < records[0]["loss"] - 1.5
    assert records[-1]["held_out_loss"] == pytest.approx(math.log(records[-1]["perplexity"]))
    assert records[-1]["tokens"] == 30 * 8 * 32
    # Speed is known from the second step on: the first one compiles.
    assert "tokens_per_s" not in records[0]
    assert all("tokens_per_s" in record for record in records[1:])


def test_evaluations_come_when_due_and_after_the_checkpoint(tiny, devices):
    devices(1)
    config = tiny(**{"placement.eval_every": 3})
    seen = []

    def evaluate(*_):
        (run,) = find_runs([config.placement.runs])
        seen.append(len(run.read_metrics()))
        return {"perplexity": 7.0}

    train(config, evaluate=evaluate)
    assert seen == [3, 4]
    assert [r.get("perplexity") for r in metrics(config)] == [None, None, 7.0, 7.0]

    def failing(*_):
        raise MemoryError("no memory for the evaluation")

    # No save is due at step 3 otherwise.
    broken = tiny(name="broken", **{"placement.eval_every": 3})
    with pytest.raises(MemoryError):
        train(broken, evaluate=failing)
    assert int(parameters(broken)["step"]) == 3


@pytest.mark.parametrize("bad_step", [2, 3])
def test_a_loss_that_is_not_finite_stops_and_is_not_saved(tiny, devices, monkeypatch, bad_step):
    """Seen one step late, and on save steps before saving."""
    devices(1)
    config = tiny(steps=6, **{"placement.save_every": 1})
    compile_step = training.compile_step

    def poisoned(session):
        step_fn = compile_step(session)

        def step(state, batch):
            if int(state.step) + 1 == bad_step:
                state = jax.tree.map(lambda a: a * jnp.nan if a.ndim > 1 else a, state)
            return step_fn(state, batch)

        return step

    monkeypatch.setattr(training, "compile_step", poisoned)
    with pytest.raises(Diverged, match=f"step {bad_step}: loss is nan"):
        train(config, evaluate=NO_EVALUATION)
    assert int(parameters(config)["step"]) == bad_step - 1
    assert [r["step"] for r in metrics(config)] == list(range(1, bad_step))
    assert all(np.isfinite(array).all() for array in parameters(config).values())


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_neither_loss_nor_gradient_may_be_infinite_or_nan(tiny, name, value):
    logger = StepLogger(tiny(), CompositeWriter([]), 0, goodput.Clock())
    logger.record(1, {"loss": jnp.array(2.0), "grad_norm": jnp.array(1.0)})
    logger.record(2, {"loss": jnp.array(2.0), "grad_norm": jnp.array(1.0), name: jnp.array(value)})
    with pytest.raises(Diverged, match=f"step 2: {name} is {value}"):
        logger.flush()


def test_a_step_is_written_when_the_next_is_under_way(tiny, monkeypatch):
    """Reading its metrics waits for it: by then the device must have more to do."""
    written = []
    writer = types.SimpleNamespace(
        write=lambda step, metrics: written.append((step, metrics)), flush=lambda: None
    )
    monkeypatch.setattr(chips, "find", lambda kind: types.SimpleNamespace(flops=1e12))
    config = tiny()
    logger = StepLogger(config, writer, 0, goodput.Clock())
    for step in (1, 2, 3):
        assert [done for done, _ in written] == list(range(1, step - 1))
        logger.record(step, {"loss": jnp.array(2.0), "grad_norm": jnp.array(1.0)})
    logger.flush()
    assert [done for done, _ in written] == [1, 2, 3]
    # Model FLOPs utilisation is of all devices together.
    flops = costs.train_flops_per_token(config.model, config.data.seq_len)
    for _, record in written[1:]:
        used = flops * record["tokens_per_s"] / (1e12 * jax.device_count())
        assert record["mfu"] == pytest.approx(used, rel=1e-3)


def test_the_speed_is_a_mean_because_the_ends_of_steps_may_be_seen_late(tiny):
    now, written = [0.0], []
    writer = types.SimpleNamespace(
        write=lambda _, metrics: written.append(metrics), flush=lambda: None
    )
    config = tiny()
    clock = goodput.Clock(started=0.0, now=lambda: now[0])
    clock.switch("step")
    logger = StepLogger(config, writer, 0, clock)
    for step in range(1, 21):
        # Step 19 is seen as late as step 20, which then takes no time.
        now[0] += 2.0 if step == 20 else 1.0
        logger.record(step, {"loss": jnp.array(2.0), "grad_norm": jnp.array(1.0)})
    logger.flush()
    assert [record["seconds"] for record in written[-3:]] == [1.0, 2.0, 0.0]
    speeds = [record["tokens_per_s"] / config.tokens_per_step for record in written[1:]]
    assert speeds[:-2] == [1.0] * 17
    assert speeds[-2:] == pytest.approx([10 / 11, 1.0], rel=0.01)


@pytest.fixture
def timed(devices, monkeypatch):
    """Trains on a clock that moves only in the parts of a run, by another time in each.

    Start-up takes 100 s, compiling 50 s, a batch 2 s, a step 11 s, a save 3 s, closing the last one
    0.5 s, an evaluation 7 s. Calling it returns the seconds of the whole.
    """
    devices(1)
    now = 0.0
    clock = goodput.Clock(now=lambda: now)  # replaced by each run

    def slow(seconds: float, call):
        def slower(*args):
            nonlocal now
            now += seconds
            return call(*args)

        return slower

    def compile_step(session):
        # Another thread: only what the first one waits for it is booked.
        while clock.bucket != "compile":
            assert clock.bucket == "startup"
            time.sleep(0.001)
        return slow(11, slow(50, compiled)(session))

    compiled, batches = training.compile_step, training.batch_stream

    def slow_batches(session, start_step, stop):
        stream = batches(session, start_step, stop)
        with contextlib.closing(stream):
            while True:
                yield slow(2, next)(stream)

    monkeypatch.setattr(training, "compile_step", compile_step)
    monkeypatch.setattr(training, "batch_stream", slow_batches)
    monkeypatch.setattr(training, "prepare_session", slow(100, training.prepare_session))
    saver = checkpoint.Checkpointer
    monkeypatch.setattr(saver, "save", slow(3, saver.save))
    monkeypatch.setattr(saver, "close", slow(0.5, saver.close))

    def run(**options):
        nonlocal clock, now
        now = 1e6
        clock = goodput.Clock(now=lambda: now)
        evaluate = slow(7, lambda *_: {"held_out_loss": 1.0})
        with contextlib.suppress(KeyboardInterrupt):
            train(evaluate=evaluate, clock=clock, **options)
        assert clock.bucket in ("startup", "step")
        return now - 1e6

    return run


def accounts(config) -> list[dict]:
    (run,) = find_runs([f"{config.placement.runs}/{config.name}"])
    return [record for record in run.read_records() if goodput.is_time_summary(record)]


def spent(record: dict) -> dict:
    """The buckets of an account that are not empty."""
    return {
        name.removesuffix("_s"): value
        for name, value in record.items()
        if name.endswith("_s") and value
    }


def test_time_is_booked_where_it_was_spent_and_nothing_is_left_over(timed, tiny, caplog):
    config = tiny(**{"placement.eval_every": 3})  # saves at 2, 3 and 4
    with caplog.at_level(logging.INFO):
        wall = timed(config=config)
    first, *_, last = accounts(config)
    assert (first["step"], spent(first)) == (0, {"startup": 100, "compile": 50})
    assert spent(last) == {
        "startup": 100,
        "compile": 50,
        "data_wait": 4 * 2,
        "step": 4 * 11,
        "checkpoint": 3 * 3 + 0.5,
        "evaluation": 2 * 7,
    }
    assert sum(spent(last).values()) == wall
    assert last["goodput"] == pytest.approx(44 / wall, abs=1e-6)
    (line,) = [line for line in caplog.messages if line.startswith("goodput")]
    assert f"goodput {100 * 44 / wall:.1f} % of {wall:.1f} s" in line
    # The speed is of steps and their batches, and the same seconds as in the account.
    assert sum(record["seconds"] for record in metrics(config)) == 4 * (2 + 11)
    # One at the start, then one after each save, each evaluation and the end.
    assert [record["step"] for record in accounts(config)] == [0, 2, 3, 3, 4, 4, 4]


def test_a_run_that_is_stopped_and_continued_loses_nothing(timed, tiny, caplog):
    config = tiny(**{"placement.save_every": 3})
    with caplog.at_level(logging.INFO):
        wall = timed(config=config, should_stop=lambda step: step == 2)
    assert "goodput" in caplog.text
    stopped = spent(accounts(config)[-1])
    expected = {"startup": 100, "compile": 50, "data_wait": 4, "step": 22, "checkpoint": 3.5}
    assert stopped == expected
    assert sum(stopped.values()) == wall
    wall += timed(config=config)
    whole = spent(accounts(config)[-1])
    assert whole == {
        "startup": 200,
        "compile": 100,
        "data_wait": 8,
        "step": 44,
        "checkpoint": 3.5 + 2 * 3 + 0.5,
        "evaluation": 7,
    }
    assert sum(whole.values()) == wall


def test_steps_of_a_killed_process_that_are_done_again_are_lost(timed, tiny):
    config = tiny(steps=8, **{"placement.save_every": 3})

    def kill(step):
        if step == 6:  # before it is saved; step 5 is written
            raise KeyboardInterrupt
        return False

    timed(config=config, should_stop=kill)
    (run,) = find_runs([config.placement.runs])
    *lines, last = run.metrics.read_text().splitlines()
    assert goodput.is_time_summary(json.loads(last))
    run.metrics.write_text("\n".join(lines) + "\n")  # SIGKILL leaves no last account
    steps = [record["step"] for record in map(json.loads, lines) if "loss" in record]
    assert steps[-1] == 5
    wall = timed(config=config)
    before, *_, last = accounts(config)[2:]
    assert before["step"] == 3
    expected = {"startup": 200, "compile": 100, "data_wait": 6, "step": 33, "checkpoint": 3}
    # Step 6 was under way when step 5 was written.
    assert spent(before) == expected | {"lost": 3 * (2 + 11)}
    assert spent(last) == {
        "startup": 200,
        "compile": 100,
        "data_wait": 8 * 2,
        "step": 8 * 11,
        "checkpoint": 3 + 2 * 3 + 0.5,
        "evaluation": 7,
        "lost": 39,
    }
    killed = 100 + 50 + 3 + 6 * (2 + 11)
    assert sum(spent(last).values()) == killed + wall


def test_token_hash_sees_place_and_value_but_not_the_mesh():
    tokens = jnp.arange(48, dtype=jnp.int32).reshape(2, 3, 8)
    hashed = int(tokens_hash(tokens))
    assert int(tokens_hash(tokens.reshape(1, 6, 8))) == hashed  # microbatches do not matter
    assert int(tokens_hash(tokens.at[0, 0, 0].add(1))) != hashed
    swapped = tokens.at[0, 0, 0].set(tokens[0, 0, 1]).at[0, 0, 1].set(tokens[0, 0, 0])
    assert int(tokens_hash(swapped)) != hashed
    rows = tokens.at[0, 0].set(tokens[0, 1]).at[0, 1].set(tokens[0, 0])
    assert int(tokens_hash(rows)) != hashed


def test_the_step_compiles_once(tiny, devices):
    devices(1)
    session = prepare_session(tiny())
    with jax.set_mesh(session.mesh):
        state = restore_or_init(session, find_run(session.config))
        step = make_step(session)
        batches = batch_stream(session, 0)
        for _ in range(3):
            state, _ = step(state, next(batches))
        batches.close()
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("n", "mesh"), [(1, MeshConfig()), (8, MeshConfig(data=2, fsdp=2, model=2))]
)
def test_the_step_is_compiled_for_the_layouts_it_meets_before_there_is_a_state(
    tiny, devices, n, mesh
):
    """A compiled program takes no other shape, layout or dtype: neither at first nor of its own result."""
    devices(n)
    session = prepare_session(tiny(**{"placement.mesh": mesh, "placement.accumulate": 2}))
    step = compile_step(session)
    with jax.set_mesh(session.mesh):
        state = restore_or_init(session, find_run(session.config))
        batches = batch_stream(session, 0)
        for _ in range(3):
            state, metrics = step(state, next(batches))
        batches.close()
    assert math.isfinite(float(metrics["loss"]))


def test_options_reach_the_compiler(tiny, devices):
    """Each as the type it has: a wrong one, and an unknown one, are refused by the compiler."""
    devices(1)
    option = "placement.compiler_options"
    good = "xla_backend_optimization_level=1,xla_llvm_disable_expensive_passes=True"
    compile_step(prepare_session(tiny(**{option: good, "model.n_layers": 2})))
    assert compiler_options(good) == {
        "xla_backend_optimization_level": 1,
        "xla_llvm_disable_expensive_passes": True,
    }
    for bad in ("xla_no_such_thing=1", "xla_backend_optimization_level=high"):
        with pytest.raises(ValueError, match=f"placement.compiler_options.*{bad}"):
            compile_step(prepare_session(tiny(**{option: bad})))
    with pytest.raises(ValueError, match="'flag' must be name=value"):
        tiny(**{option: "flag"})


def test_the_log_names_the_model_and_the_layout(tiny, devices):
    devices(1)
    config = tiny()
    with_logging = logging.getLogger("cla_jax")
    with_logging.setLevel(logging.INFO)
    train(config, evaluate=NO_EVALUATION)
    (run,) = find_runs([config.placement.runs])
    text = run.log.read_text()
    for words in ("attention by xla", "kv_map cla:2", "from step 0"):
        assert words in text
    record = json.loads((run.path / "config.json").read_text())
    assert record["versions"]["jax"] == jax.__version__


@pytest.mark.parametrize(
    ("n", "changes", "words"),
    [
        (1, {"placement.mesh": MeshConfig(fsdp=3)}, "3 x 1 does not match the 1 devices"),
        (8, {"batch_size": 12}, "batch_size = 12 .* 1 x 8 does not divide"),
        (1, {"placement.attention": "cudnn"}, "placement.attention = 'cudnn'"),
        (1, {"data.source": "text:/nowhere/*.txt"}, "/nowhere"),
        # How many ids a file has is known only when it is read.
        (1, {"data.tokenizer": "bytes.json", "model.vocab_size": 256}, "vocab_size = 256 .* 257"),
    ],
)
def test_what_cannot_work_is_refused_before_a_run_directory_exists(
    tiny, devices, tmp_path, monkeypatch, n, changes, words
):
    devices(n)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes.json").write_text(tokenizers.byte_tokenizer().to_json())
    with pytest.raises(ValueError, match=words):
        train(tiny(**changes), evaluate=NO_EVALUATION)
    assert not (tmp_path / "runs").exists()
