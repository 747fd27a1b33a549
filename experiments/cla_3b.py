"""The paper's 3B models (2405.12981, section 3.3, tables 2, 5 and 6; the second set: tables 7 and 8).

Both sets have the same dimensions. The second was trained on another cluster, with another software stack and
data order. Here its seed stands for that. What the paper leaves open is decided as in `experiments.cla_1b`;
the data is read as described there.
"""

from cla_jax.config import Config
from cla_jax.fields import replaced
from experiments import cla_1b, sweeping
from experiments.sweeping import Trials

# 100e9 tokens in batches of 2048 sequences of 2048 tokens.
_STEPS = 23_842


def _row(name: str, d_head: int, peak_lr: float, kv_map: str = "identity", seed: int = 0) -> Config:
    model = {"n_layers": 32, "d_model": 3072, "d_ff": 8192, "n_heads": 3072 // d_head}
    model |= {"d_head": d_head, "kv_map": kv_map}
    changes = {
        "name": f"cla_3b/{name}",
        "optimizer.peak_lr": peak_lr,
        "steps": _STEPS,
        "seed": seed,
    }
    changes |= {f"model.{field}": value for field, value in model.items()}
    return replaced(cla_1b.h128_mqa(), changes)


def h128_mqa() -> Config:
    """MQA, 24 heads of 128: 16,384 B."""
    return _row("h128_mqa", 128, 6.75e-4)


def h128_mqa_cla2() -> Config:
    """MQA and CLA2, head size 128: 8,192 B."""
    return _row("h128_mqa_cla2", 128, 2.25e-3, "cla:2")


def h64_mqa() -> Config:
    """MQA, 48 heads of 64: 8,192 B."""
    return _row("h64_mqa", 64, 1e-3)


def second_h64_mqa() -> Config:
    """Second set: MQA, 48 heads of 64: 8,192 B."""
    return _row("second_h64_mqa", 64, 1e-3, seed=1)


def second_h64_mqa_cla2() -> Config:
    """Second set: MQA and CLA2, head size 64: 4,096 B."""
    return _row("second_h64_mqa_cla2", 64, 1e-3, "cla:2", seed=1)


def second_h32_mqa() -> Config:
    """Second set: MQA, 96 heads of 32: 4,096 B."""
    return _row("second_h32_mqa", 32, 1e-3, seed=1)


ROWS = (
    h128_mqa,
    h128_mqa_cla2,
    h64_mqa,
    second_h64_mqa,
    second_h64_mqa_cla2,
    second_h32_mqa,
)


def learning_rate() -> Trials:
    """The paper's learning-rate search for the first set: from 3e-4, by factors of 1.5."""
    return sweeping.together(
        *(
            sweeping.learning_rates(row(), f"{row.__name__}.lr")
            for row in (h128_mqa, h128_mqa_cla2, h64_mqa)
        )
    )


def second_learning_rate() -> Trials:
    """The paper's other learning rates of the second set: one for MQA, three for each other model."""
    tried = {
        second_h64_mqa: (1e-3,),
        second_h64_mqa_cla2: (6.75e-4, 1e-3, 1.5e-3),
        second_h32_mqa: (6.75e-4, 1e-3, 1.5e-3),
    }
    for row, rates in tried.items():
        for rate in rates:
            yield f"{row.__name__}.lr-{rate:g}", replaced(row(), {"optimizer.peak_lr": rate})


SWEEPS = (learning_rate, second_learning_rate)
