"""The paper's question with seeds, on two CPU cores: what does sharing keys and values cost?

The rows of the 1B study at a 2,300th of its size: a third of a million parameters, 8 layers, bytes of
English Wikipedia, 14 tokens a parameter. A run takes about ten minutes of one core, so every row gets a
learning rate of its own and the main rows get eight seeds. `python -m launch.data fetch enwik8` brings
the text.

Rows with the same bytes a token: `h8_mqa` and `h16_mqa_cla2` (256 B), `h16_mqa` and `h32_mqa_cla2` (512 B).
A seed fixes the order of the training data and, layer by layer, the initial values of every tensor that rows
have in common. The held-out text is the same for all. So rows are compared seed by seed, in pairs.
"""

from cla_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, Placement, replaced
from experiments.sweeping import Trials

CORPUS = "jsonl:data/enwik8/prose.jsonl"


def h16_mqa() -> Config:
    """MQA with head size 16: 512 B a token at 16 bits."""
    return Config(
        name="small/h16_mqa",
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
        data=DataConfig(source=CORPUS, tokenizer="byte", seq_len=256, held_out=0.02),
        optimizer=OptimizerConfig(peak_lr=6e-3),
        batch_size=8,
        steps=2560,
        placement=Placement(log_every=160, save_every=640, scan_layers=False),
    )


def _row(name: str, **model) -> Config:
    changes = {f"model.{field}": value for field, value in model.items()}
    return replaced(h16_mqa(), {"name": f"small/{name}"} | changes)


def h16_mqa_own_norm() -> Config:
    """MQA whose keys and values have a norm of their own, as rows that share have: 512 B."""
    return _row("h16_mqa_own_norm", kv_norm="own")


def h8_mqa() -> Config:
    """MQA with half the head size and twice the query heads: 256 B, without sharing."""
    return _row("h8_mqa", n_heads=8, d_head=8)


def h16_mqa_cla2() -> Config:
    """MQA with CLA2: 256 B, the bytes of `h8_mqa`."""
    return _row("h16_mqa_cla2", kv_map="cla:2", kv_norm="own")


def h32_mqa_cla2() -> Config:
    """MQA with CLA2 and twice the head size: 512 B, the bytes of `h16_mqa`."""
    return _row("h32_mqa_cla2", n_heads=2, d_head=32, kv_map="cla:2", kv_norm="own")


def h16_gqa2() -> Config:
    """Two KV heads: 1,024 B."""
    return _row("h16_gqa2", n_kv_heads=2)


def h16_mqa_cla3() -> Config:
    """MQA with CLA3: 192 B."""
    return _row("h16_mqa_cla3", kv_map="cla:3", kv_norm="own")


def h16_mqa_cla2_keep_ends() -> Config:
    """CLA2 whose first and last layers keep keys and values of their own: 320 B."""
    return _row("h16_mqa_cla2_keep_ends", kv_map="keep-ends", kv_norm="own")


def h16_mqa_cla2_dense_back() -> Config:
    """One run of sharing layers in front, layers without sharing behind: 320 B."""
    return _row("h16_mqa_cla2_dense_back", kv_map="dense-back", kv_norm="own")


ROWS = (
    h16_mqa,
    h16_mqa_own_norm,
    h8_mqa,
    h16_mqa_cla2,
    h32_mqa_cla2,
    h16_gqa2,
    h16_mqa_cla3,
    h16_mqa_cla2_keep_ends,
    h16_mqa_cla2_dense_back,
)

# Tuning and the noise pilot have seeds of their own: a seed that chose a rate does not judge it.
TUNING_SEED = 100
TUNING_RATES = (3e-3, 4.5e-3, 6.75e-3, 1.01e-2)
PILOT_SEEDS = range(200, 206)


def tuning() -> Trials:
    """Four learning rates for every row, with one seed that is used for nothing else."""
    for row in ROWS:
        for rate in TUNING_RATES:
            changes = {"optimizer.peak_lr": rate, "seed": TUNING_SEED}
            yield f"{row.__name__}.lr-{rate:g}", replaced(row(), changes)


def pilot() -> Trials:
    """Six seeds of one row: how far seeds alone move the held-out loss."""
    for seed in PILOT_SEEDS:
        yield f"h16_mqa.seed-{seed}", replaced(h16_mqa(), {"seed": seed})


SWEEPS = (tuning, pilot)
