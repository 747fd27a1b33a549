"""The paper's 1B design space (2405.12981, section 3.2, tables 1 and 2): twenty models at one learning rate.

Dimensions, schedule and batch are the paper's. Where it is silent, the authors' public code decides:
AdamW eps 1e-10, tied embeddings, a vocabulary of 50,304 rows, RoPE base 10,000. Attention is 2048 wide
except in h46_mqa (45 heads of 46) and h90_mqa_cla2 (22 of 90). GQA4 means four KV heads. Each row's
docstring says what it holds: KV bytes per token at 16 bits, as the paper's table has them.

SlimPajama and the GPT-NeoX tokenizer are read from local files: override `data.source` and
`data.tokenizer` with their paths.
"""

from cla_jax.config import AdamW, Config, DataConfig, ModelConfig, OptimizerConfig, Placement

# 30e9 tokens in batches of 2048 sequences of 2048 tokens.
_STEPS = 7_153


def _row(name: str, d_head: int, n_heads: int, n_kv_heads: int, kv_map: str = "identity") -> Config:
    return Config(
        name=f"cla_1b/{name}",
        model=ModelConfig(
            vocab_size=50_304,
            n_layers=20,
            d_model=2048,
            d_ff=5472,
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            kv_map=kv_map,
        ),
        data=DataConfig(
            source="jsonl:slimpajama/train/**/*.jsonl.zst",
            tokenizer="gpt-neox-20b.json",
            seq_len=2048,
            held_out=0.0001,
        ),
        optimizer=OptimizerConfig(peak_lr=3e-4, rule=AdamW(eps=1e-10)),
        batch_size=2048,
        steps=_STEPS,
        placement=Placement(
            remat="block", log_every=10, save_every=200, eval_every=1000, eval_batch_size=256
        ),
    )


def h128_mha() -> Config:
    """MHA, 16 heads of 128: 163,840 B."""
    return _row("h128_mha", 128, 16, 16)


def h128_gqa4() -> Config:
    """GQA with 4 KV heads: 40,960 B."""
    return _row("h128_gqa4", 128, 16, 4)


def h128_gqa2() -> Config:
    """GQA with 2 KV heads: 20,480 B."""
    return _row("h128_gqa2", 128, 16, 2)


def h128_mqa() -> Config:
    """MQA, head size 128, the baseline: 10,240 B."""
    return _row("h128_mqa", 128, 16, 1)


def h64_mqa() -> Config:
    """MQA, head size 64: 5,120 B."""
    return _row("h64_mqa", 64, 32, 1)


def h46_mqa() -> Config:
    """MQA, head size 46: 3,680 B."""
    return _row("h46_mqa", 46, 45, 1)


def h32_mqa() -> Config:
    """MQA, head size 32: 2,560 B."""
    return _row("h32_mqa", 32, 64, 1)


def h512_mqa_cla2() -> Config:
    """MQA and CLA2, head size 512: 20,480 B."""
    return _row("h512_mqa_cla2", 512, 4, 1, "cla:2")


def h256_mqa_cla2() -> Config:
    """MQA and CLA2, head size 256: 10,240 B."""
    return _row("h256_mqa_cla2", 256, 8, 1, "cla:2")


def h128_mqa_cla2() -> Config:
    """MQA and CLA2, head size 128, the paper's recommendation: 5,120 B."""
    return _row("h128_mqa_cla2", 128, 16, 1, "cla:2")


def h90_mqa_cla2() -> Config:
    """MQA and CLA2, head size 90: 3,600 B."""
    return _row("h90_mqa_cla2", 90, 22, 1, "cla:2")


def h64_mqa_cla2() -> Config:
    """MQA and CLA2, head size 64: 2,560 B."""
    return _row("h64_mqa_cla2", 64, 32, 1, "cla:2")


def h256_gqa4_cla2() -> Config:
    """GQA with 4 KV heads of 256, and CLA2: 40,960 B."""
    return _row("h256_gqa4_cla2", 256, 8, 4, "cla:2")


def h128_gqa4_cla2() -> Config:
    """GQA with 4 KV heads, and CLA2: 20,480 B."""
    return _row("h128_gqa4_cla2", 128, 16, 4, "cla:2")


def h128_gqa2_cla2() -> Config:
    """GQA with 2 KV heads, and CLA2: 10,240 B."""
    return _row("h128_gqa2_cla2", 128, 16, 2, "cla:2")


def h128_mqa_cla3() -> Config:
    """MQA and CLA3, seven producers: 3,584 B."""
    return _row("h128_mqa_cla3", 128, 16, 1, "cla:3")


def h128_mqa_cla4() -> Config:
    """MQA and CLA4, five producers: 2,560 B."""
    return _row("h128_mqa_cla4", 128, 16, 1, "cla:4")


def h128_mqa_keep_ends() -> Config:
    """MQA and CLA2; the first and the last layer do not share: 5,632 B."""
    return _row("h128_mqa_keep_ends", 128, 16, 1, "keep-ends")


def h128_mqa_dense_front() -> Config:
    """MQA; only the first ten layers and the last one make KV: 5,632 B."""
    return _row("h128_mqa_dense_front", 128, 16, 1, "dense-front")


def h128_mqa_dense_back() -> Config:
    """MQA; layers 1 to 10 share KV (of 20 layers; the paper states 21): 5,632 B."""
    return _row("h128_mqa_dense_back", 128, 16, 1, "dense-back")


ROWS = (
    h128_mha,
    h128_gqa4,
    h128_gqa2,
    h128_mqa,
    h64_mqa,
    h46_mqa,
    h32_mqa,
    h512_mqa_cla2,
    h256_mqa_cla2,
    h128_mqa_cla2,
    h90_mqa_cla2,
    h64_mqa_cla2,
    h256_gqa4_cla2,
    h128_gqa4_cla2,
    h128_gqa2_cla2,
    h128_mqa_cla3,
    h128_mqa_cla4,
    h128_mqa_keep_ends,
    h128_mqa_dense_front,
    h128_mqa_dense_back,
)
