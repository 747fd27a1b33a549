"""The paper's 1B design space (2405.12981, section 3.2, tables 1 and 2).

Dimensions, schedule and batch are the paper's. Where it is silent, the authors' public code decides:
AdamW eps 1e-10, tied embeddings, a vocabulary of 50,304 rows, RoPE base 10,000.
"""

from cla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, Placement

# 30e9 tokens in batches of 2048 sequences of 2048 tokens.
_STEPS = 7_153


def h128_mqa_cla2() -> Config:
    """MQA with head size 128 and CLA2: the paper's recommendation, 5,120 B a token at 16 bits.

    SlimPajama and the GPT-NeoX tokenizer are read from local files: override `data.source` and
    `data.tokenizer` with their paths.
    """
    return Config(
        name="cla_1b/h128_mqa_cla2",
        model=ModelConfig(
            vocab_size=50_304,
            n_layers=20,
            d_model=2048,
            d_ff=5472,
            n_heads=16,
            n_kv_heads=1,
            d_head=128,
            kv_map="cla:2",
        ),
        data=DataConfig(
            source="jsonl:slimpajama/train/**/*.jsonl.gz",
            tokenizer="gpt-neox-20b.json",
            seq_len=2048,
            held_out=0.0001,
        ),
        optimizer=OptimizerConfig(peak_lr=3e-4, eps=1e-10),
        batch_size=2048,
        steps=_STEPS,
        placement=Placement(
            remat="block", log_every=10, save_every=200, eval_every=1000, eval_batch_size=256
        ),
    )


ROWS = (h128_mqa_cla2,)
