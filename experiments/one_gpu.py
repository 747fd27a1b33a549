"""The paper's question on one GPU: 12 million parameters, each sweep under 40 minutes on one H100.

The rows of the study `small` at forty times its size: 8 layers of 384, and windows of 1,024 bytes of English
Wikipedia. A run has 131 million training tokens, about two epochs. `python -m launch.data fetch enwik8`
downloads the text.

No sweep of this study has been run yet. The 40 minutes are computed at a fifth of an H100's peak (`seconds`).
"""

from cla_jax import chips, costs
from cla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, Placement
from cla_jax.fields import replaced
from cla_jax.study import Claim, Gain, Study
from experiments import small, sweeping
from experiments.sweeping import Trials


def h64_mqa() -> Config:
    """MQA with head size 64: 2,048 B per token at 16 bits."""
    return Config(
        name="one_gpu/h64_mqa",
        model=ModelConfig(
            vocab_size=257,
            n_layers=8,
            d_model=384,
            d_ff=1024,
            n_heads=6,
            n_kv_heads=1,
            d_head=64,
            kv_norm="block",
            init_std=0.02,
        ),
        data=DataConfig(source=small.CORPUS, tokenizer="byte", seq_len=1024, held_out=0.02),
        optimizer=OptimizerConfig(peak_lr=1e-3),
        batch_size=64,
        steps=2000,
        placement=Placement(log_every=100, save_every=500),
    )


def _row(name: str, **model) -> Config:
    changes = {f"model.{field}": value for field, value in model.items()}
    return replaced(h64_mqa(), {"name": f"one_gpu/{name}"} | changes)


def h64_mqa_own_norm() -> Config:
    """MQA with a separate norm for keys and values, as in the rows that share: 2,048 B."""
    return _row("h64_mqa_own_norm", kv_norm="own")


def h32_mqa() -> Config:
    """MQA with half the head size and twice the query heads: 1,024 B, without sharing."""
    return _row("h32_mqa", n_heads=12, d_head=32)


def h64_mqa_cla2() -> Config:
    """MQA with CLA2: 1,024 B, as many bytes as `h32_mqa`."""
    return _row("h64_mqa_cla2", kv_map="cla:2", kv_norm="own")


def h128_mqa_cla2() -> Config:
    """MQA with CLA2 and twice the head size: 2,048 B, as many bytes as `h64_mqa`."""
    return _row("h128_mqa_cla2", n_heads=3, d_head=128, kv_map="cla:2", kv_norm="own")


ROWS = (h64_mqa, h64_mqa_own_norm, h32_mqa, h64_mqa_cla2, h128_mqa_cla2)


def seconds(config: Config, mfu: float = 0.2) -> float:
    """How long a run takes on one H100 at a share of its peak, start and evaluation not counted."""
    chip = chips.find("NVIDIA H100 80GB HBM3")
    assert chip is not None
    flops = costs.train_flops_per_token(config.model, config.data.seq_len)
    return flops * config.tokens_per_step * config.steps / (mfu * chip.flops)


MAIN = Study(
    rows={
        "h64_mqa": 6,
        "h32_mqa": 6,
        "h64_mqa_cla2": 6,
        "h128_mqa_cla2": 6,
        "h64_mqa_own_norm": 3,
    },
    claims=(Claim("h64_mqa_cla2", "h32_mqa"), Claim("h128_mqa_cla2", "h64_mqa")),
    guardrails=("perplexity",),
    gains=(Gain(ours=("h64_mqa_cla2", "h128_mqa_cla2"), theirs=("h32_mqa", "h64_mqa")),),
)
STUDIES = {"main": MAIN}
# The best learning rate of each row, from the report of `tuning`. A row that is missing here is declared but
# not launched.
RATES: dict[str, float] = {}


def tuning() -> Trials:
    """Three learning rates for every row, with a separate seed."""
    for row in ROWS:
        for rate in (6.67e-4, 1e-3, 1.5e-3):
            changes = {"optimizer.peak_lr": rate, "seed": 100}
            yield f"{row.__name__}.lr-{rate:g}", replaced(row(), changes)


def main() -> Trials:
    """Six seeds of each row with a claim, the fewest for an exact test of two; three of the other row."""
    return sweeping.declared(MAIN, ROWS, RATES)


SWEEPS = (tuning, sweeping.once_tuned(main, RATES, "one_gpu.tuning"))
