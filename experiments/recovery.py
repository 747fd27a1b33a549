"""What does a conversion cost after a twentieth of the training? On two CPU cores.

A model of 8M parameters with eight KV heads is trained once (`source`). Then its cache is halved in three
ways, or reduced to an eighth. Each converted model trains with a twentieth of the source's steps, with and
without the source as a teacher (2305.13245, section 2.1, trains GQA in this way). `same` is the source
with as many additional steps.

Three rows keep half the cache, 5,120 bytes per token at 16 bits: `cla2`, `gqa4`, `mla`. `mla` has a quarter
more parameters than the other two: each layer has matrices that make keys and values of the latent.

    python -m launch.data fetch enwik8
    python -m launch.sweep recovery.source
    python -m launch.sweep recovery.main --local.workers 2
"""

from typing import Any

from cla_jax.config import (
    Config,
    DataConfig,
    FromRun,
    LatentKV,
    ModelConfig,
    OptimizerConfig,
    Placement,
)
from cla_jax.fields import replaced
from cla_jax.study import Claim, Study
from experiments import sweeping
from experiments.sweeping import Trials

CORPUS = "jsonl:data/enwik8/prose.jsonl"
SOURCE = "runs/recovery/source/h32_mha"
# The checksum of its weights, in the identity of all runs that start from it. The same training with the same
# versions and kind of processor has it again. If yours differs, `launch.convert uptrain
# runs/recovery/source/h32_mha X --fraction 0.05` writes it to the config of X.
CHECKPOINT = "557c7885771d2efab18053a338272181183fba7c25852e4817ebb8d3f98defed"
STEPS, FRACTION = 4000, 0.05


def h32_mha() -> Config:
    """The source: MHA with 8 heads of 32, 10 layers, 10,240 B per token at 16 bits."""
    return Config(
        name="recovery/h32_mha",
        model=ModelConfig(
            vocab_size=257,
            n_layers=10,
            d_model=256,
            d_ff=688,
            n_heads=8,
            n_kv_heads=8,
            d_head=32,
            kv_norm="block",
            init_std=0.02,
            compute_dtype="float32",
        ),
        # 0.1 % of the text is 57,000 bytes: a curve needs many evaluations.
        data=DataConfig(source=CORPUS, tokenizer="byte", seq_len=256, held_out=0.001),
        optimizer=OptimizerConfig(peak_lr=1.5e-3),
        batch_size=16,
        steps=STEPS,
        seed=100,  # another order of the text than in the runs that start from it
        placement=Placement(log_every=100, save_every=100, eval_every=500, scan_layers=False),
    )


def _row(name: str, weight: float = 0.0, init: Any = "least_squares", **model: Any) -> Config:
    """A converted model with its recipe; `weight` is that of the teacher in the loss."""
    start = FromRun(run=SOURCE, checkpoint=CHECKPOINT, init=init, distill_weight=weight)
    changes = {
        "name": f"recovery/{name}",
        "start": start,
        "steps": round(STEPS * FRACTION),
        "placement.log_every": 10,
        "placement.save_every": 50,
        "placement.eval_every": 20,
    }
    return replaced(h32_mha(), changes | {f"model.{key}": value for key, value in model.items()})


_MLA = {"kv": LatentKV(rank=224, rope_dims=32, norm=False), "n_kv_heads": 1}
_TAUGHT = 0.5


def same() -> Config:
    """The source, trained again with the steps of the others: 10,240 B."""
    return _row("same")


def cla2() -> Config:
    """Pairs of layers share keys and values, all 8 heads of them: 5,120 B."""
    return _row("cla2", kv_map="cla:2")


def cla2_own() -> Config:
    """The same; consumers read their producer's heads without any change to their weights."""
    return _row("cla2_own", init="own", kv_map="cla:2")


def cla2_taught() -> Config:
    """CLA2 with the source as a teacher."""
    return _row("cla2_taught", _TAUGHT, kv_map="cla:2")


def gqa4() -> Config:
    """Four KV heads of eight: 5,120 B."""
    return _row("gqa4", n_kv_heads=4)


def gqa4_taught() -> Config:
    """Four KV heads with the source as a teacher."""
    return _row("gqa4_taught", _TAUGHT, n_kv_heads=4)


def mla() -> Config:
    """A latent of 224 and a rotated key of 32 for all heads: 5,120 B."""
    return _row("mla", **_MLA)


def mla_taught() -> Config:
    """The latent with the source as a teacher."""
    return _row("mla_taught", _TAUGHT, **_MLA)


def mqa() -> Config:
    """One KV head of eight: 1,280 B."""
    return _row("mqa", n_kv_heads=1)


def mqa_taught() -> Config:
    """One KV head with the source as a teacher."""
    return _row("mqa_taught", _TAUGHT, n_kv_heads=1)


CONVERTED = (
    same,
    cla2,
    cla2_own,
    cla2_taught,
    gqa4,
    gqa4_taught,
    mla,
    mla_taught,
    mqa,
    mqa_taught,
)
ROWS = (h32_mha, *CONVERTED)

MAIN = Study(
    rows={row.__name__: 3 for row in CONVERTED},
    claims=(
        # At equal bytes, which half of the cache is closest to the source?
        Claim("mla", "cla2"),
        Claim("gqa4", "cla2"),
        # Are fitted consumers better than plain ones, and does a teacher help?
        Claim("cla2", "cla2_own"),
        Claim("cla2_taught", "cla2"),
        Claim("gqa4_taught", "gqa4"),
        Claim("mla_taught", "mla"),
    ),
    # Three pairs are too few for a sign-flip test: its least p is an eighth.
    test="t",
    guardrails=("perplexity",),
)
STUDIES = {"main": MAIN}


def source() -> Trials:
    """The model that all others start from."""
    yield "h32_mha", h32_mha()


def main() -> Trials:
    """Every conversion with three orders of the training text."""
    return sweeping.declared(MAIN, CONVERTED)


_UNTRAINED = "run recovery.source, then write its checksum to CHECKPOINT in experiments/recovery.py"
SWEEPS = (source, main if CHECKPOINT else sweeping.waiting(main, _UNTRAINED))
