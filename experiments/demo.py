"""The paper's question on a laptop: what does half the KV cache cost?

Three small models on the embedded corpus: MQA; MQA with CLA2, at half its cache; and MQA with heads
half as wide, at that same half. Everything else is equal.
"""

import dataclasses

from cla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, Placement
from experiments import sweeping
from experiments.sweeping import Trials


def h32_mqa() -> Config:
    """MQA with head size 32: 1,024 B a token at 16 bits."""
    return Config(
        name="demo/h32_mqa",
        model=ModelConfig(
            vocab_size=2048,
            n_layers=8,
            d_model=128,
            d_ff=344,
            n_heads=4,
            n_kv_heads=1,
            d_head=32,
            kv_norm="block",
            init_std=0.05,
            compute_dtype="float32",
        ),
        data=DataConfig(source="sotu", tokenizer="bpe:2048", seq_len=256, held_out=0.02),
        optimizer=OptimizerConfig(peak_lr=3e-3),
        batch_size=4,
        steps=240,
        placement=Placement(log_every=40, save_every=80, eval_every=80, scan_layers=False),
    )


def h32_mqa_cla2() -> Config:
    """The same under CLA2: half the cache, 512 B."""
    base = h32_mqa()
    model = dataclasses.replace(base.model, kv_map="cla:2", kv_norm="own")
    return dataclasses.replace(base, name="demo/h32_mqa_cla2", model=model)


def h16_mqa() -> Config:
    """Half the head size and twice the heads: half the cache too, without sharing."""
    base = h32_mqa()
    model = dataclasses.replace(base.model, n_heads=8, d_head=16)
    return dataclasses.replace(base, name="demo/h16_mqa", model=model)


ROWS = (h32_mqa, h32_mqa_cla2, h16_mqa)


def seeds() -> Trials:
    """Three seeds of each row: nine runs, and how far seeds alone move a perplexity."""
    for row in ROWS:
        for seed in range(3):
            yield f"{row.__name__}.seed-{seed}", dataclasses.replace(row(), seed=seed)


def learning_rate() -> Trials:
    """The paper's search for a learning rate, for every row; the rows side by side."""
    return sweeping.together(
        *(sweeping.learning_rates(row(), f"{row.__name__}.lr", start=1e-3) for row in ROWS)
    )


SWEEPS = (seeds, learning_rate)
