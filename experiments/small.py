"""The paper's question with seeds, on two CPU cores: what does sharing keys and values cost?

The rows of the 1B study at a 2,400th of its size: a third of a million parameters and 8 layers. The text is
bytes of English Wikipedia, 14 tokens per parameter. A run takes about ten minutes of one core. So every row
has its own learning rate, and the main rows have eight seeds. `python -m launch.data fetch enwik8` downloads
the text.

Rows with the same bytes per token: `h8_mqa` and `h16_mqa_cla2` (256 B), `h16_mqa` and `h32_mqa_cla2` (512 B).
A seed fixes the order of the training data and, layer by layer, the initial values of every tensor that rows
have in common. The held-out text is the same for all. So rows are compared seed by seed, in pairs.
"""

from collections.abc import Callable, Iterable

from cla_jax.config import Config, DataConfig, LatentKV, ModelConfig, OptimizerConfig, Placement
from cla_jax.fields import replaced
from cla_jax.study import Claim, Gain, Study
from experiments import sweeping
from experiments.sweeping import Trials

CORPUS = "jsonl:data/enwik8/prose.jsonl"


def h16_mqa() -> Config:
    """MQA with head size 16: 512 B per token at 16 bits."""
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
    """MQA with a separate norm for keys and values, as in the rows that share: 512 B."""
    return _row("h16_mqa_own_norm", kv_norm="own")


def h8_mqa() -> Config:
    """MQA with half the head size and twice the query heads: 256 B, without sharing."""
    return _row("h8_mqa", n_heads=8, d_head=8)


def h16_mqa_cla2() -> Config:
    """MQA with CLA2: 256 B, as many bytes as `h8_mqa`."""
    return _row("h16_mqa_cla2", kv_map="cla:2", kv_norm="own")


def h32_mqa_cla2() -> Config:
    """MQA with CLA2 and twice the head size: 512 B, as many bytes as `h16_mqa`."""
    return _row("h32_mqa_cla2", n_heads=2, d_head=32, kv_map="cla:2", kv_norm="own")


def h16_gqa2() -> Config:
    """Two KV heads: 1,024 B."""
    return _row("h16_gqa2", n_kv_heads=2)


def h16_mqa_cla3() -> Config:
    """MQA with CLA3: 192 B."""
    return _row("h16_mqa_cla3", kv_map="cla:3", kv_norm="own")


def h16_mqa_cla2_keep_ends() -> Config:
    """MQA with CLA2; the first and the last layer do not share: 320 B."""
    return _row("h16_mqa_cla2_keep_ends", kv_map="keep-ends", kv_norm="own")


def h16_mqa_cla2_dense_back() -> Config:
    """MQA; layers 1 to 4 share keys and values, the others do not: 320 B."""
    return _row("h16_mqa_cla2_dense_back", kv_map="dense-back", kv_norm="own")


def h16_mqa_pizza() -> Config:
    """MQA; layers 3 to 7 share keys and values, the first three do not: 256 B."""
    return _row("h16_mqa_pizza", kv_map="pizza:4", kv_norm="own")


def h16_mqa_sandwich() -> Config:
    """MQA; layers 2 to 6 share keys and values, the others do not: 256 B."""
    return _row("h16_mqa_sandwich", kv_map="sandwich:4", kv_norm="own")


def h16_mqa_fused_lite() -> Config:
    """MQA; layers 4 to 7 read the keys of layer 3 and the values of layer 0: 256 B."""
    return _row("h16_mqa_fused_lite", kv_map="fused-lite", kv_norm="own")


def h8_gqa2() -> Config:
    """Two KV heads of half the head size, with the query heads of `h8_mqa`: 512 B."""
    return _row("h8_gqa2", n_heads=8, n_kv_heads=2, d_head=8)


def h32_mqa_fused_lite() -> Config:
    """The map of `h16_mqa_fused_lite` with twice the head size: 512 B."""
    return _row("h32_mqa_fused_lite", n_heads=2, d_head=32, kv_map="fused-lite", kv_norm="own")


def latent24() -> Config:
    """Multi-head latent attention, rank 24 and a rotated key of 8: 512 B.

    A narrower MLP makes up for the matrices of the heads: the row has the parameters of `h16_mqa`.
    """
    row = _row("latent24", kv=LatentKV(rank=24, rope_dims=8), kv_norm="own")
    return sweeping.matched(row, h16_mqa(), "parameters")


def latent48_cla2() -> Config:
    """Pairs of layers share a latent of rank 48 and a rotated key of 16, parameters as `latent24`: 512 B."""
    latent = LatentKV(rank=48, rope_dims=16)
    row = _row("latent48_cla2", kv=latent, kv_map="cla:2", kv_norm="own")
    return sweeping.matched(row, h16_mqa(), "parameters")


MAIN_ROWS = (
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

# With CLA2, the maps that keep half the cache. With eight layers, five named maps are three: lasagna:4 is
# CLA2, and trailing:4 is pizza:4.
MAP_ROWS = (h16_mqa_cla2, h16_mqa_pizza, h16_mqa_sandwich, h16_mqa_fused_lite)
# Ways to spend 512 B.
LEAGUE_ROWS = (
    *(h16_mqa, h16_mqa_own_norm, h8_gqa2, h32_mqa_cla2, h32_mqa_fused_lite),
    *(latent24, latent48_cla2),
)
ROWS = tuple(dict.fromkeys((*MAIN_ROWS, *MAP_ROWS, *LEAGUE_ROWS)))

# Half of what halving the heads costs in `tuning`: 2.2565 against 2.2256 bits per byte at the fitted optima.
# In the noise pilot a seed alone moves the loss by 0.0088, the standard deviation of six.
MARGIN = 0.015

MAIN = Study(
    rows={
        "h16_mqa": 8,
        "h8_mqa": 8,
        "h16_mqa_cla2": 8,
        "h32_mqa_cla2": 8,
        "h16_mqa_own_norm": 3,
        "h16_gqa2": 3,
        "h16_mqa_cla3": 3,
        "h16_mqa_cla2_keep_ends": 3,
        "h16_mqa_cla2_dense_back": 3,
    },
    claims=(
        # At 256 B, and at 512 B.
        Claim("h16_mqa_cla2", "h8_mqa"),
        Claim("h32_mqa_cla2", "h16_mqa"),
        # What half the cache costs, by sharing and by smaller heads.
        Claim("h16_mqa_cla2", "h16_mqa", margin=MARGIN),
        Claim("h8_mqa", "h16_mqa", margin=MARGIN),
    ),
    guardrails=("perplexity",),
    gains=(Gain(ours=("h16_mqa_cla2", "h32_mqa_cla2"), theirs=("h8_mqa", "h16_mqa")),),
)

# One study of 1.1B models found CLA2's map the weakest of five at half the cache, with one seed. If so, each
# other map should beat it here. Another, of 1.5B models, found it worse than keys of the middle layer with
# values of the bottom layer.
MAPS = Study(
    rows={row.__name__: 8 for row in MAP_ROWS},
    claims=(
        Claim("h16_mqa_pizza", "h16_mqa_cla2"),
        Claim("h16_mqa_sandwich", "h16_mqa_cla2"),
        Claim("h16_mqa_fused_lite", "h16_mqa_cla2"),
    ),
    guardrails=("perplexity",),
)
# At equal bytes, does a latent beat heads, does sharing it beat keeping one per layer, and do keys and values
# shared differently beat CLA2?
LEAGUE = Study(
    rows={row.__name__: 8 for row in LEAGUE_ROWS} | {"h16_mqa_own_norm": 3},
    claims=(
        Claim("latent24", "h16_mqa"),
        Claim("latent24", "h32_mqa_cla2"),
        Claim("latent48_cla2", "latent24"),
        Claim("h32_mqa_fused_lite", "h32_mqa_cla2"),
        Claim("h8_gqa2", "h16_mqa"),
    ),
    guardrails=("perplexity",),
)
STUDIES = {"main": MAIN, "maps": MAPS, "league": LEAGUE}

# The best learning rate of each row: the optimum in the report of `tuning`, to two digits. A row that is
# missing here is declared but not launched.
RATES: dict[str, float] = {
    "h16_mqa": 3.6e-3,
    "h16_mqa_own_norm": 3.4e-3,
    "h8_mqa": 3.5e-3,
    "h16_mqa_cla2": 3.7e-3,
    "h32_mqa_cla2": 3.5e-3,
    "h16_gqa2": 3.3e-3,
    "h16_mqa_cla3": 3.5e-3,
    "h16_mqa_cla2_keep_ends": 3.2e-3,
    "h16_mqa_cla2_dense_back": 3.4e-3,
    "h16_mqa_pizza": 3.1e-3,
    "h16_mqa_sandwich": 3.4e-3,
    "h16_mqa_fused_lite": 2.9e-3,
    "h32_mqa_fused_lite": 3.2e-3,
    "h8_gqa2": 5.4e-3,
    "latent24": 3.5e-3,
    "latent48_cla2": 4.0e-3,
}

# Tuning and the noise pilot have seeds of their own: a seed that chose a rate does not judge it.
TUNING_SEED = 100
# First tried were 0.003 to 0.0101. Two rows in, the best rates were 0.0035 and 0.003, the lowest tried, and
# 0.0101 was worse than both by 0.03 bits per byte: so 0.002 took its place. With it both rows have their best
# rate between 0.003 and 0.0045, and 0.00675 is worse by 0.014. So the other rows are tried at three rates.
# 0.00675 is added only if the best of the three is 0.0045 or the fitted optimum lies above it:
# so it was for h16_mqa_cla2, h16_mqa_sandwich, h8_gqa2, latent24 and latent48_cla2.
TUNING_RATES = (2e-3, 3e-3, 4.5e-3)
HIGHER_RATES = {
    "h16_mqa": (6.75e-3,),
    "h16_mqa_own_norm": (6.75e-3,),
    "h16_mqa_cla2": (6.75e-3,),
    "h16_mqa_sandwich": (6.75e-3,),
    "h8_gqa2": (6.75e-3,),
    "latent24": (6.75e-3,),
    "latent48_cla2": (6.75e-3,),
}
PILOT_SEEDS = range(200, 206)


def tuning() -> Trials:
    """Learning rates for every row of `main`, with a separate seed."""
    yield from _tuned(MAIN_ROWS)


def maps_tuning() -> Trials:
    """Learning rates for the rows that only `maps` has, with a separate seed."""
    yield from _tuned(row for row in MAP_ROWS if row not in MAIN_ROWS)


def league_tuning() -> Trials:
    """Learning rates for the rows that only `league` has, with a separate seed."""
    yield from _tuned(row for row in LEAGUE_ROWS if row not in MAIN_ROWS)


def _tuned(rows: Iterable[Callable[[], Config]]) -> Trials:
    for row in rows:
        for rate in (*TUNING_RATES, *HIGHER_RATES.get(row.__name__, ())):
            changes = {"optimizer.peak_lr": rate, "seed": TUNING_SEED}
            yield f"{row.__name__}.lr-{rate:g}", replaced(row(), changes)


def pilot() -> Trials:
    """Six seeds of one row: how much the held-out loss depends on the seed."""
    for seed in PILOT_SEEDS:
        changes = {"optimizer.peak_lr": RATES["h16_mqa"], "seed": seed}
        yield f"h16_mqa.seed-{seed}", replaced(h16_mqa(), changes)


def main() -> Trials:
    """The rows of the study at their tuned learning rates, with all seeds."""
    return sweeping.declared(MAIN, MAIN_ROWS, RATES)


def maps() -> Trials:
    """Maps with half the cache, compared with eight seeds each."""
    return sweeping.declared(MAPS, MAP_ROWS, RATES)


def league() -> Trials:
    """Models with 512 B per token, compared with eight seeds each."""
    return sweeping.declared(LEAGUE, LEAGUE_ROWS, RATES)


SWEEPS = (
    tuning,
    maps_tuning,
    league_tuning,
    pilot,
    sweeping.once_tuned(main, RATES, "small.tuning"),
    sweeping.once_tuned(maps, RATES, "small.maps_tuning"),
    sweeping.once_tuned(league, RATES, "small.league_tuning"),
)
