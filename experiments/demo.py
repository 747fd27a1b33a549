"""The paper's question on a laptop: what does half the KV cache cost?

Three small models on the embedded corpus: MQA, MQA with CLA2, and MQA with heads half as wide. The last two
have half the cache of the first. Everything else is equal. The shapes are those of `experiments.small`, which
asks the same with tuned rates, more seeds and more text. Here a model sees each byte of the corpus at most
once, and about three bytes per parameter.
"""

from cla_jax.config import Config, Cosine, DataConfig, ModelConfig, OptimizerConfig, Placement
from cla_jax.fields import replaced
from experiments import sweeping
from experiments.sweeping import Trials


def h16_mqa() -> Config:
    """MQA with head size 16: 512 B per token at 16 bits."""
    return Config(
        name="demo/h16_mqa",
        model=ModelConfig(
            vocab_size=257,
            n_layers=8,
            d_model=64,
            d_ff=172,
            n_heads=4,
            n_kv_heads=1,
            d_head=16,
            kv_norm="block",
            init_std=0.05,
            compute_dtype="float32",
        ),
        data=DataConfig(source="sotu", tokenizer="byte", seq_len=256, held_out=0.01),
        optimizer=OptimizerConfig(peak_lr=4e-3, schedule=Cosine(warmup_fraction=0.2)),
        batch_size=8,
        steps=500,
        placement=Placement(log_every=50, save_every=500, eval_every=500, scan_layers=False),
    )


def h16_mqa_cla2() -> Config:
    """The same with CLA2: half the cache, 256 B."""
    changes = {"name": "demo/h16_mqa_cla2", "model.kv_map": "cla:2", "model.kv_norm": "own"}
    return replaced(h16_mqa(), changes)


def h8_mqa() -> Config:
    """Half the head size and twice the heads, without sharing: also half the cache, 256 B."""
    changes = {"name": "demo/h8_mqa", "model.n_heads": 8, "model.d_head": 8}
    return replaced(h16_mqa(), changes)


ROWS = (h16_mqa, h16_mqa_cla2, h8_mqa)


def seeds() -> Trials:
    """Two seeds of each row, six runs: they show how much the loss depends on the seed."""
    for seed in range(2):
        for row in ROWS:
            yield f"{row.__name__}.seed-{seed}", replaced(row(), {"seed": seed})


def learning_rate() -> Trials:
    """The paper's learning-rate search, for all rows at the same time."""
    return sweeping.together(
        *(sweeping.learning_rates(row(), f"{row.__name__}.lr", start=3e-3) for row in ROWS)
    )


SWEEPS = (seeds, learning_rate)
