"""Every config field is read: changing it changes something that can be seen from outside."""

import contextlib
import dataclasses
import io
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax import checkpoint, fields, runs
from cla_jax import config as configs
from cla_jax import mesh as meshes
from cla_jax.config import (
    WSD,
    Component,
    FromRun,
    LatentKV,
    LinearScaling,
    Llama3Scaling,
    Muon,
    SquaredReLU,
    Stage,
    YarnScaling,
)
from cla_jax.evaluate import during_training
from cla_jax.fields import flatten
from cla_jax.model.transformer import Transformer
from cla_jax.runs import find_runs
from cla_jax.session import batch_stream, prepare_session
from cla_jax.state import named
from cla_jax.step import make_step
from cla_jax.train import load_teacher, restore_or_init, train
from tests.conftest import tiny_config

# Fields that say what is computed: other data, other arrays, or three steps that end in other numbers.
IDENTITY = {
    "model.vocab_size": 268,
    "model.n_layers": 3,
    "model.d_model": 40,
    "model.d_ff": 56,
    "model.n_heads": 8,
    "model.n_kv_heads": 2,
    "model.d_head": 6,
    "model.windows": "3,3",
    "model.kv_map": "identity",
    "model.kv": LatentKV(rank=12, rope_dims=4),
    "model.kv.rank": 8,
    "model.kv.rope_dims": 6,
    "model.kv.norm": False,
    "model.kv_norm": "block",
    "model.mlp": SquaredReLU(),
    "model.qk_norm": True,
    "model.tied_embeddings": False,
    "model.bias": True,
    "model.rope_theta": 500.0,
    "model.rope_scaling": LinearScaling(),
    "model.rope_scaling.factor": 2.0,
    "model.rope_scaling.low_freq_factor": 2.0,
    "model.rope_scaling.high_freq_factor": 8.0,
    "model.rope_scaling.beta_fast": 2.0,
    "model.rope_scaling.beta_slow": 8.0,
    "model.rope_scaling.original_max_position_embeddings": 64,
    "model.rope_scaling.attention_factor": 1.5,
    "model.norm_eps": 1e-2,
    "model.init_std": 0.2,
    "model.compute_dtype": "bfloat16",
    "data.source": "sotu:7",
    "data.mixture": (Component.parse("a=1:sotu:7"), Component.parse("b=3:sotu:9")),
    "data.stages": (Stage.parse("1:b=1"),),
    "data.tokenizer": "bpe:257",
    "data.end_token": "<|end|>",
    "data.begin_token": "Ċ",
    "data.seq_len": 16,
    "data.held_out": 0.5,
    "data.attend_across_documents": False,
    "optimizer.peak_lr": 2e-2,
    "optimizer.schedule": WSD(),
    "optimizer.schedule.warmup_fraction": 0.75,
    "optimizer.schedule.final_fraction": 0.5,
    "optimizer.schedule.decay_fraction": 0.75,
    "optimizer.rule": Muon(),
    "optimizer.rule.b1": 0.5,
    "optimizer.rule.b2": 0.5,
    "optimizer.rule.eps": 1.0,
    "optimizer.rule.weight_decay": 0.5,
    "optimizer.rule.momentum": 0.5,
    "optimizer.rule.iterations": 1,
    "optimizer.clip_norm": 0.01,
    "batch_size": 4,
    "steps": 8,
    "seed": 1,
    "start": FromRun(),
    "start.run": "of another seed",
    "start.checkpoint": "another",
    "start.init": "mean",
    "start.calibration_windows": 1,
    "start.distill_weight": 0.5,
    "start.distill_temperature": 5.0,
}
# Of those, what only several layers can show.
OF_LAYERS = ("model.n_layers", "model.windows", "model.kv_map", "model.kv_norm")
# Fields that only one kind of a union has.
OF_KINDS = {
    "model.rope_scaling.factor": {"model.rope_scaling": LinearScaling()},
    "model.rope_scaling.low_freq_factor": {"model.rope_scaling": Llama3Scaling()},
    "model.rope_scaling.high_freq_factor": {"model.rope_scaling": Llama3Scaling()},
    "model.rope_scaling.original_max_position_embeddings": {"model.rope_scaling": Llama3Scaling()},
    "model.rope_scaling.beta_fast": {"model.rope_scaling": YarnScaling()},
    "model.rope_scaling.beta_slow": {"model.rope_scaling": YarnScaling()},
    "model.rope_scaling.attention_factor": {"model.rope_scaling": YarnScaling()},
    "optimizer.schedule.decay_fraction": {"optimizer.schedule": WSD()},
    "optimizer.rule.momentum": {"optimizer.rule": Muon()},
    "optimizer.rule.iterations": {"optimizer.rule": Muon()},
}
# Fields that say where and how; what to look at is in the tests below.
PLACEMENT = {
    "name": "another",
    "placement.mesh.auto": True,
    "placement.mesh.slice": 2,
    "placement.mesh.data": 2,
    "placement.mesh.fsdp": 4,
    "placement.mesh.model": 2,
    "placement.accumulate": 2,
    "placement.remat": "block",
    "placement.scan_layers": False,
    "placement.attention": "cudnn",
    "placement.compiler_options": "xla_backend_optimization_level=1",
    "placement.loss_chunk": 8,
    "placement.log_every": 1,
    "placement.save_every": 1,
    "placement.keep": 3,
    "placement.eval_every": 1,
    "placement.eval_batch_size": 128,
    "placement.profile": "2:1",
    "placement.tensorboard": True,
    "placement.wandb": "project",
    "placement.runs": "elsewhere",
    "placement.data_dir": "elsewhere",
}


def test_every_field_stands_in_a_table(tiny):
    found = set(flatten(dataclasses.asdict(tiny())))
    for name, union in fields.unions(configs.Config):
        kinds = fields.variants(union).values()
        found |= {name} | {f"{name}.{f.name}" for kind in kinds for f in dataclasses.fields(kind)}
        found -= {f"{name}.kind"}  # the union itself stands in the table
    assert found == IDENTITY.keys() | PLACEMENT.keys()


def outcome(config) -> Iterator[dict]:
    """What a config computes with; then what three steps of it end in."""
    session = prepare_session(config)
    with contextlib.closing(batch_stream(session, 0)) as batches:
        batch = next(batches)
    yield {
        "batch": batch,
        "json": session.prepared.tokenizer.to_json(),
        "end": session.prepared.tokenizer.end,
        "shapes": {name: leaf.shape for name, leaf in named(session.state).items()},
    }
    with contextlib.closing(batch_stream(session, 0)) as batches, jax.set_mesh(session.mesh):
        state = restore_or_init(session, runs.Run(runs.epath.Path("/nowhere")))
        step = make_step(session)
        teaching = load_teacher(session)
        for _ in range(3):
            state, metrics = step(state, next(batches), *teaching)
    yield {"loss": metrics["loss"], **named(state.model)}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def base_outcomes():
    """By the number of layers, and what else the base has."""
    return {}


@pytest.fixture
def sources(tmp_path, data_dir):
    """Runs of two KV heads, of two seeds, that a run of one may start from."""

    def make(seed: int) -> str:
        changes = {"model.kv_map": "identity", "model.n_layers": 1, "model.n_kv_heads": 2}
        config = tiny_config(str(tmp_path), data_dir, name=f"seed-{seed}", seed=seed, **changes)
        tokenizer = prepare_session(config).prepared.tokenizer.to_json()
        with runs.new_run(config, data_fingerprint="", tokenizer_json=tokenizer, origin={}) as run:
            saver = checkpoint.Checkpointer(run.checkpoints, 2, run.owner)
            saver.save_model(0, Transformer(jax.random.key(seed), config.model))
            saver.close()
        return str(tmp_path / config.name)

    return make


@pytest.mark.slow  # a compilation a field
@pytest.mark.parametrize("field", IDENTITY)
def test_an_identity_field_changes_what_is_computed(
    tiny, devices, field, base_outcomes, short_documents, sources
):
    devices(1)
    value = IDENTITY[field]
    base = {"data.source": short_documents, "placement.scan_layers": False}
    if field in OF_LAYERS:
        base |= {"model.n_layers": 2}
    else:
        base |= {"model.kv_map": "identity", "model.n_layers": 1}
    if field in OF_KINDS:
        base |= OF_KINDS[field]
    if field == "data.stages":
        base |= {"data.mixture": IDENTITY["data.mixture"]}
    if field.startswith("model.kv."):
        base |= {"model.kv": IDENTITY["model.kv"]}
    if field == "start":
        value = FromRun(run=sources(0))
    elif field.startswith("start."):
        weight = 0.5 if field == "start.distill_temperature" else 0.0
        base |= {"start": FromRun(run=sources(0), distill_weight=weight)}
        value = sources(1) if field == "start.run" else value
    key = tuple(sorted((name, str(each)) for name, each in base.items()))
    if key not in base_outcomes:
        base_outcomes[key] = list(outcome(tiny(**base)))
    if field == "start.checkpoint":
        with pytest.raises(
            ValueError, match=r"start\.checkpoint = another, but the newest weights"
        ):
            list(outcome(tiny(**(base | {field: value}))))
        return
    changed = outcome(tiny(**(base | {field: value})))
    # The steps are compiled only where nothing else differs.
    assert not all(map(equal, changed, base_outcomes[key]))


def test_the_seed_draws_the_weights_and_orders_the_data(tiny, devices):
    """One of them alone would pass above."""
    devices(1)

    def start(seed):
        session = prepare_session(tiny(seed=seed))
        with jax.set_mesh(session.mesh):
            state = restore_or_init(session, runs.Run(runs.epath.Path("/nowhere")))
            batches = batch_stream(session, 0)
            batch = next(batches)
            batches.close()
        return {"batch": batch, **named(state.model)}

    zero, one = start(0), start(1)
    for name in zero:
        assert name.endswith("scale") or bool(jnp.any(zero[name] != one[name])), name


def files(directory) -> set[str]:
    return {
        str(file.relative_to(directory))
        for file in Path(directory).rglob("*")
        if "/d/" not in str(file) and not file.name.startswith("events.")
    }


@pytest.mark.parametrize(
    "field",
    ["save_every", "keep", "tensorboard", "eval_every", "log_every", "wandb", "profile", "runs"],
)
def test_a_field_of_the_loop_changes_what_a_run_leaves(tiny, devices, tmp_path, monkeypatch, field):
    devices(1)
    logged = []
    session = types.SimpleNamespace(
        log=lambda metrics, step: logged.append(step), finish=lambda: None
    )
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: session))
    # A real trace stands in test_profiler.py.
    trace = lambda directory: contextlib.nullcontext(Path(directory).mkdir())
    monkeypatch.setattr(jax.profiler, "trace", trace)

    def left_by(name, **changes):
        base = {"placement.save_every": 1} if field == "keep" else {}
        config = tiny(name=name, steps=4, **(base | changes))
        out = io.StringIO()
        monkeypatch.setattr(sys, "stderr", out)
        train(config, evaluate=lambda *_: {"perplexity": 1.0})
        (run,) = find_runs([f"{config.placement.runs}/{config.name}"])
        evaluated = [record["step"] for record in run.read_metrics() if "perplexity" in record]
        lines = len(out.getvalue().splitlines())
        return files(run.path), evaluated, lines, len(logged), run.path.parent

    value = PLACEMENT[f"placement.{field}"]
    if field == "runs":
        value = str(tmp_path / value)
    assert left_by("a") != left_by("b", **{f"placement.{field}": value})


@pytest.mark.parametrize("field", ["accumulate", "remat", "scan_layers", "loss_chunk"])
def test_a_field_of_the_step_changes_the_program(tiny, devices, field):
    devices(1)

    def program(config):
        session = prepare_session(config)
        with jax.set_mesh(session.mesh):
            state = restore_or_init(session, runs.Run(runs.epath.Path("/nowhere")))
            batches = batch_stream(session, 0)
            text = make_step(session).lower(state, next(batches)).as_text()
            batches.close()
            return text

    changed = program(tiny(**{f"placement.{field}": PLACEMENT[f"placement.{field}"]}))
    assert changed != program(tiny())


def test_the_mesh_the_backend_the_names_and_the_evaluation_batch_are_read(tiny, devices, tmp_path):
    shapes = {
        tuple(meshes.make_mesh(tiny(**changes).placement.mesh).shape.values())
        for changes in (
            {},
            {"placement.mesh.slice": 2},
            {"placement.mesh.data": 2},
            {"placement.mesh.model": 2},
        )
        if devices(8)
    }
    assert len(shapes) == 4
    with pytest.raises(ValueError, match="x 4 x 1 does not match the 8"):
        meshes.make_mesh(tiny(**{"placement.mesh.fsdp": 4}).placement.mesh)
    devices(1)
    with pytest.raises(ValueError, match="'cudnn' cannot be used"):
        prepare_session(tiny(**{"placement.attention": "cudnn"}))
    other = prepare_session(tiny(**{"placement.data_dir": str(tmp_path / "elsewhere")}))
    assert other.prepared.parts[""].path.parent == tmp_path / "elsewhere"
    run = runs.open_run(tiny(name="another"), data_fingerprint="", tokenizer_json="")
    assert run.path.name == "another"
    seen = set()
    for size in (256, 128):
        session = prepare_session(tiny(**{"placement.eval_batch_size": size}))
        with jax.set_mesh(session.mesh):
            state = restore_or_init(session, runs.Run(runs.epath.Path("/nowhere")))
            with jax.log_compiles(False), count_batches() as batches:
                during_training(session, state.model)
        seen.add(tuple(batches))
    assert len(seen) == 2


class count_batches:
    """Records the batch sizes that an evaluation asks its loader for."""

    def __enter__(self):
        from cla_jax.data import loader

        self.loader, self.windows, sizes = loader, loader.windows, []

        def recorded(split, batch_size):
            sizes.append(batch_size)
            return self.windows(split, batch_size)

        loader.windows = recorded
        return sizes

    def __exit__(self, *_):
        self.loader.windows = self.windows
