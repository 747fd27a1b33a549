import jax.numpy as jnp
import numpy as np
import pytest

from cla_jax.config import WSD, Constant, Cosine, OptimizerConfig
from cla_jax.fields import replaced
from cla_jax.optimizer import make_optimizer, schedule

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
