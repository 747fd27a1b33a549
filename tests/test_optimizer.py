import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cla_jax import runs
from cla_jax.config import WSD, Constant, Cosine, MeshConfig, Muon, OptimizerConfig
from cla_jax.fields import replaced
from cla_jax.optimizer import make_optimizer, schedule
from cla_jax.session import batch_stream, prepare_session
from cla_jax.step import make_step
from cla_jax.train import restore_or_init

CONFIG = OptimizerConfig(
    peak_lr=1e-2, schedule=Cosine(warmup_fraction=0.1, final_fraction=0.1), clip_norm=0.5
)


def test_schedule_rises_to_the_peak_and_falls_to_the_floor():
    rates = np.array([schedule(CONFIG, 100)(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 1e-2 * np.arange(1, 11) / 10, rtol=1e-6)
    assert rates[10] == pytest.approx(1e-2)
    assert rates[99] == pytest.approx(1e-3, rel=1e-5)
    assert (np.diff(rates[10:]) < 0).all()
    # Half way down the cosine: the mean of peak and floor. 10 + 89 / 2 lies between two steps.
    assert (rates[54] + rates[55]) / 2 == pytest.approx(5.5e-3, rel=1e-4)


def test_wsd_keeps_the_peak_and_falls_in_the_last_steps():
    config = OptimizerConfig(
        peak_lr=1e-2,
        schedule=WSD(warmup_fraction=0.1, decay_fraction=0.2, final_fraction=0.1),
    )
    rates = np.array([schedule(config, 100)(step) for step in range(100)])
    np.testing.assert_allclose(rates[:10], 1e-2 * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(rates[10:80], 1e-2, rtol=1e-6)
    np.testing.assert_allclose(rates[79:], np.linspace(1e-2, 1e-3, 21), rtol=1e-5)


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "expected"),
    [
        (1, 0.0, 0.1, [1]),  # no step is left for the decay
        (2, 0.0, 0.1, [1, 0.1]),
        (4, 0.05, 0.1, [1, 1, 1, 0.1]),
        (4, 0.05, 0.6, [1, 1, 0.55, 0.1]),
        (10, 0.9, 0.1, [*np.arange(1, 10) / 9, 0.1]),
        (4, 0.0, 0.0, [1, 1, 1, 1]),
    ],
)
def test_wsd_decays_in_short_runs(steps, warmup, decay, expected):
    kind = WSD(warmup_fraction=warmup, decay_fraction=decay, final_fraction=0.1)
    rate = schedule(OptimizerConfig(peak_lr=1e-2, schedule=kind), steps)
    rates = [float(rate(step)) for step in range(steps)]
    np.testing.assert_allclose(rates, 1e-2 * np.array(expected), rtol=1e-5)


def test_a_constant_rate_stays_at_the_peak():
    config = OptimizerConfig(peak_lr=1e-2, schedule=Constant(warmup_fraction=0.1))
    rates = [float(schedule(config, 20)(step)) for step in range(20)]
    np.testing.assert_allclose(rates, [5e-3] + [1e-2] * 19, rtol=1e-6)


@pytest.mark.parametrize("kind", [Cosine, WSD, Constant])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_schedule_of_very_short_runs(steps, kind):
    config = replaced(CONFIG, {"schedule": kind(warmup_fraction=0.1)})
    rates = [float(schedule(config, steps)(step)) for step in range(steps)]
    assert all(0 < rate <= 1e-2 for rate in rates)


def test_updates_equal_adamw_written_out():
    """AdamW with decoupled decay of every parameter, gradients clipped to a global norm."""
    optimizer = make_optimizer(CONFIG, 100)
    parameters = {"norm": jnp.array([1.0, 2.0]), "w": jnp.array([[3.0, -1.0]])}
    state = optimizer.init(parameters)
    p = {name: np.asarray(value, np.float64) for name, value in parameters.items()}
    m = {name: np.zeros_like(value) for name, value in p.items()}
    v = {name: np.zeros_like(value) for name, value in p.items()}
    # Gradients below the norm and far above it: AdamW alone hardly notices a scale that stays.
    for step, scale in enumerate([1.0, 0.1, 10.0, 0.05, 3.0]):
        gradients = {
            "norm": scale * jnp.array([0.3, 0.1 * step]),
            "w": scale * jnp.array([[2.0, -0.4]]),
        }
        updates, state = optimizer.update(gradients, state, parameters)
        parameters = {name: parameters[name] + updates[name] for name in parameters}
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradients.values()))
        rate = float(schedule(CONFIG, 100)(step))
        for name in p:
            g = np.asarray(gradients[name], np.float64) * min(1, 0.5 / norm)
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            mean, square = m[name] / (1 - 0.9 ** (step + 1)), v[name] / (1 - 0.95 ** (step + 1))
            p[name] -= rate * (mean / (np.sqrt(square) + 1e-8) + 0.1 * p[name])
    for name in p:
        np.testing.assert_allclose(parameters[name], p[name], rtol=1e-5)


def _parameters():
    """A stack of two weights that read the residual stream, one that writes it, a table and a norm."""
    shapes = {
        "query": ((2, 6, 2, 4), ("embed", "kv_heads", None)),
        "output": ((2, 4, 6), ("kv_heads", None, "embed")),
        "table": ((9, 6), ("vocab", "embed")),
        "norm": ((6,), (None,)),
    }
    rng = np.random.default_rng(0)
    return {
        name: nnx.Param(jnp.asarray(rng.normal(size=shape), jnp.float32), axes=axes)
        for name, (shape, axes) in shapes.items()
    }


def test_muon_makes_the_matrices_of_blocks_orthogonal_and_leaves_the_rest_to_adamw():
    config = replaced(CONFIG, {"schedule": Constant(warmup_fraction=0), "rule": Muon()})
    parameters, gradients = _parameters(), jax.tree.map(jnp.sin, _parameters())
    updates = {}
    for kind in ("muon", "adamw"):
        optimizer = make_optimizer(replaced(config, {"rule.kind": kind}), 100)
        state = optimizer.init(parameters)
        for _ in range(2):
            updates[kind], state = optimizer.update(gradients, state, parameters)
    for name in ("table", "norm"):
        ours, theirs = (updates[kind][name][...] for kind in ("muon", "adamw"))
        np.testing.assert_array_equal(ours, theirs)
    # query: two matrices of 6 x 8; output: one of 8 x 6.
    for name, shape in {"query": (2, 6, 8), "output": (1, 8, 6)}.items():
        decay = 0.1 * np.asarray(parameters[name][...])
        made = (-np.asarray(updates["muon"][name][...]) / 1e-2 - decay).reshape(shape)
        given = np.asarray(gradients[name][...]).reshape(shape)
        for update, gradient in zip(made, given, strict=True):
            assert np.sqrt((update**2).mean()) == pytest.approx(0.2, rel=0.25)
            u, _, v = np.linalg.svd(gradient, full_matrices=False)
            values = np.diag(u.T @ update @ v.T) / (0.2 * 8**0.5)
            assert values.min() > 0.6
            assert values.max() < 1.3
            # The singular vectors are the gradient's.
            assert np.abs(u @ np.diag(values) @ v * 0.2 * 8**0.5 - update).max() < 1e-4


def test_muon_trains_the_same_on_any_mesh(tiny, devices):
    def losses(**mesh):
        config = tiny(**{"optimizer.rule": Muon(), "placement.mesh": MeshConfig(**mesh)})
        session = prepare_session(config)
        step, found = make_step(session), []
        with contextlib.closing(batch_stream(session, 0)) as batches, jax.set_mesh(session.mesh):
            state = restore_or_init(session, runs.Run(runs.epath.Path("/nowhere")))
            for _ in range(3):
                state, metrics = step(state, next(batches))
                found.append(float(metrics["loss"]))
        return found

    devices(1)
    expected = losses()
    assert expected[2] < expected[0]
    devices(4)
    np.testing.assert_allclose(losses(fsdp=2, model=2), expected, rtol=2e-5)
