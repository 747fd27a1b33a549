"""Writes docs/paper.md: each table and figure of the paper, how to reproduce it, and what that takes.

    python -m experiments.paper_docs > docs/paper.md

Hours are those of `launch.plan` for a topology at an assumed MFU: the FLOPs of training over a share of the
chips' peak. This needs no compiler, so a test makes the page again and compares.
"""

from collections.abc import Iterable, Sequence

import experiments
from cla_jax import chips, costs
from cla_jax.config import Config
from experiments import cla_3b, paper

CHIPS, KIND, TOPOLOGY, MFU = 256, "TPU v5 lite", "v5e:16x16", 0.4
# None of the paper's own rows has been trained: they need its text, and a pod.
RUN: frozenset[str] = frozenset()

_HEAD = """# The paper, table by table

This page lists each table and figure of [the paper](https://arxiv.org/abs/2405.12981) with the \
command that reproduces it. [`experiments/paper.py`](../experiments/paper.py) has the printed \
results, and `launch.compare` shows them next to ours.

The text (SlimPajama) and the tokenizer (GPT-NeoX) are not downloaded: set `--data.source` and \
`--data.tokenizer` to local files. With `launch.sweep`, put these flags after a separate `--`.

Hours are predicted for {topology} ({chips} chips) at an MFU of {mfu:.0%}, as `python -m launch.plan \
NAME --topology {topology}` prints them. They do not include evaluation and restarts.

| in the paper | command | runs | hours | chip-hours | run here |
|---|---|---|---|---|---|
"""
_FOOT = """
A learning-rate sweep continues until the perplexity stops improving. The table counts its runs up \
to one rate above the best rate that the paper prints.

## Row by row

| row | tables | KV bytes per token | learning rate | validation perplexity in the paper | hours | run here |
|---|---|---|---|---|---|---|
"""
_END = """
The seven tasks and the Wikitext perplexity of tables 4, 6, 7 and 8 come from `launch.evaluate` with \
`--tasks` ([tasks.md](tasks.md)). The paper's adaptation experiments (in its NeurIPS version) are \
not among the experiments here yet; [uptraining.md](uptraining.md) has the conversion of a trained model.

Only small models were trained here: [results/small](results/small/report.md) asks the paper's \
question at a 2,400th of its size. `experiments/one_gpu.py` asks it at 12 million parameters, for \
one GPU; it has not been run.

`python -m experiments.paper_docs` makes this page.
"""


def hours(configs: Iterable[Config]) -> float:
    """On the pod, one run after another."""
    chip = chips.find(KIND)
    assert chip is not None
    flops = sum(
        costs.train_flops_per_token(c.model, c.data.seq_len) * c.tokens_per_step * c.steps
        for c in configs
    )
    return flops / (MFU * chip.flops * CHIPS) / 3600


def _searched(lines: Sequence[paper.Printed]) -> list[Config]:
    """The runs of a search from 3e-4 by factors of 1.5 to one rate beyond the best of each row."""
    configs: list[Config] = []
    for line in lines:
        (config,) = experiments.find(line.row)
        rate, count = 3e-4, 1
        while rate < 0.98 * line.peak_lr:
            rate, count = 1.5 * rate, count + 1
        configs += [config] * (count + 1)
    return configs


def document() -> str:
    """The whole page."""
    rows = lambda lines: [experiments.find(line.row)[0] for line in lines]
    sweep = lambda name: f"`python -m launch.sweep {name}`"
    compare = lambda study: f"`python -m launch.compare runs/{study}`"
    design, tuned = paper.DESIGN_SPACE_1B, paper.TUNED_1B
    first, second = paper.FIRST_3B, paper.SECOND_3B
    others = [config for _, config in cla_3b.second_learning_rate()]
    lines: list[tuple[str, str, list[Config]]] = [
        ("table 1: 1B, design space", sweep("cla_1b"), rows(design)),
        ("the Pareto figures of table 1", compare("cla_1b"), []),
        ("table 2: dimensions", "`python -m launch.train cla_1b.h128_mqa --help`", []),
        ("tables 3 and 4: 1B, tuned rates", sweep("cla_1b_tuned"), rows(tuned)),
        ("learning-rate curves, 1B", sweep("cla_1b_tuned.learning_rate"), _searched(tuned)),
        ("tables 5 and 6: 3B, first set", _train(first), rows(first)),
        ("learning-rate curves, 3B", sweep("cla_3b.learning_rate"), _searched(first)),
        ("tables 7 and 8: 3B, second set", _train(second), rows(second)),
        ("other rates of the second set", sweep("cla_3b.second_learning_rate"), others),
        ("tables 5 to 8 in one report", compare("cla_3b"), []),
    ]
    text = _HEAD.format(topology=TOPOLOGY, chips=CHIPS, mfu=MFU)
    for what, command, configs in lines:
        cost = hours(configs)
        cells = (
            [str(len(configs)), f"{cost:,.1f}", f"{cost * CHIPS:,.0f}"] if configs else ["—"] * 3
        )
        text += f"| {what} | {command} | {' | '.join(cells)} | {'no' if configs else '—'} |\n"
    text += _FOOT
    for line in paper.PRINTED.values():
        (config,) = experiments.find(line.row)
        perplexity = "not printed" if line.perplexity is None else f"{line.perplexity:.2f}"
        cells = [
            f"`{line.row}`",
            " and ".join(map(str, line.tables)),
            f"{line.kv_bytes:,}",
            f"{line.peak_lr:g}",
            perplexity,
            f"{hours([config]):.1f}",
            "yes" if line.row in RUN else "no",
        ]
        text += f"| {' | '.join(cells)} |\n"
    return text + _END


def _train(lines: Sequence[paper.Printed]) -> str:
    return "<br>".join(f"`python -m launch.train {line.row}`" for line in lines)


if __name__ == "__main__":
    print(document(), end="")
