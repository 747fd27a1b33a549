"""What fewer KV heads cost: MHA, GQA, MQA, and MHA with smaller heads.

The papers of MQA (1911.02150) and GQA (2305.13245) order them so: MHA is best, then GQA, then MQA. MQA is
better than MHA whose heads are shrunk until its cache is as small. Fewer or smaller heads also save
parameters. As in the first of these papers, a wider MLP makes up for that: all rows have the parameters of
MHA. The models are those of the study `small`, and train on its text.

No sweep of this study has been run yet.
"""

from cla_jax.config import Config
from cla_jax.fields import replaced
from cla_jax.study import Claim, Study
from experiments import small, sweeping
from experiments.sweeping import Trials


def _row(name: str, **model) -> Config:
    changes = {f"model.{field}": value for field, value in model.items()}
    return replaced(small.h16_mqa(), {"name": f"heads/{name}"} | changes)


def _matched(name: str, **model) -> Config:
    return sweeping.matched(_row(name, **model), mha(), "parameters")


def mha() -> Config:
    """Four KV heads of 16: 2,048 B per token at 16 bits."""
    return _row("mha", n_kv_heads=4)


def gqa2() -> Config:
    """Two KV heads of 16: 1,024 B."""
    return _matched("gqa2", n_kv_heads=2)


def mqa() -> Config:
    """One KV head of 16: 512 B."""
    return _matched("mqa", n_kv_heads=1)


def mha_small_heads() -> Config:
    """Four query heads and four KV heads of 4: 512 B, as many bytes as MQA."""
    return _matched("mha_small_heads", n_kv_heads=4, d_head=4)


ROWS = (mha, gqa2, mqa, mha_small_heads)

ORDER = Study(
    rows={row.__name__: 8 for row in ROWS},
    claims=(Claim("mha", "gqa2"), Claim("gqa2", "mqa"), Claim("mqa", "mha_small_heads")),
    guardrails=("perplexity",),
    control="parameters",
    base="mha",
)
STUDIES = {"order": ORDER}
# The best learning rate of each row, from the report of `tuning`. A row that is missing here is declared but
# not launched.
RATES: dict[str, float] = {}


def tuning() -> Trials:
    """Three learning rates for every row, with a separate seed."""
    for row in ROWS:
        for rate in small.TUNING_RATES:
            changes = {"optimizer.peak_lr": rate, "seed": small.TUNING_SEED}
            yield f"{row.__name__}.lr-{rate:g}", replaced(row(), changes)


def order() -> Trials:
    """Eight seeds of each row: is the order the same as in the papers?"""
    return sweeping.declared(ORDER, ROWS, RATES)


SWEEPS = (tuning, sweeping.once_tuned(order, RATES, "heads.tuning"))
