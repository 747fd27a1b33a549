"""What is compiled does not grow with depth in training; benchmarks/compile_time.py has the seconds."""

import jax
import jax.numpy as jnp
import pytest

from cla_jax.model.transformer import ForwardOptions, Transformer
from tests.conftest import MODEL, replace


def instructions(n_layers: int, options: ForwardOptions) -> int:
    """Of the lowered forward and backward pass."""
    config = replace(MODEL, n_layers=n_layers)
    model = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    tokens = jax.ShapeDtypeStruct((1, 16), jnp.int32)
    gradient = jax.grad(lambda model, tokens: model.logits(tokens, options).sum())
    return len(jax.jit(gradient).lower(model, tokens).as_text().splitlines())


@pytest.mark.slow
def test_the_scanned_training_program_is_as_long_for_32_layers_as_for_8():
    short, long = (instructions(n, ForwardOptions(remat="block")) for n in (8, 32))
    assert long == short
    unrolled = instructions(32, ForwardOptions(remat="block", scan_layers=False))
    assert unrolled > 2 * long
