"""Held-out text scored through an evicting cache.

The first part of each window is the prompt: it is encoded whole, and the policy sees its attention. The rest
is decoded token by token through what the policy keeps, as in generation. All tokens of the window are
scored, so that the result compares with other caches. Only those after the prompt are affected by eviction.
They are also scored apart, and compared with the full forward pass.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax import costs
from cla_jax.cache import ledger, make_format
from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Chosen, Compressor
from cla_jax.config import ModelConfig
from cla_jax.decode import decode, decoding_weights, on_one_device
from cla_jax.evaluation import (
    AfterPrompt,
    Agreement,
    ByteCount,
    EvictingScores,
    HeadPolicy,
    LayerProfile,
    TokenClasses,
)
from cla_jax.eviction import Policy, prompt_tokens
from cla_jax.eviction.classes import classes_of_tokenizer, described
from cla_jax.loss import losses, token_losses
from cla_jax.mesh import AxisRules
from cla_jax.model.transformer import ForwardOptions, Transformer, document_starts, inputs_of
from cla_jax.recall_tasks import Example
from cla_jax.scoring import rows, score
from cla_jax.session import EvaluationSession
from cla_jax.statistics import paired


@functools.partial(
    jax.jit, static_argnames=("spec", "options", "loss_chunk"), donate_argnames="cache"
)
def _continued(
    model, weights, cache, inputs_BT, targets_BT, starts_BT, x_BSD, *, spec, options, loss_chunk
):
    """Of the tokens after the prompts: nats through the cache and by full forward, KL, equal top tokens.

    Returns nats of every target through the cache [B, T], the four with the largest difference of logits
    [5, B, T - S], and the cache.
    """
    B, T = inputs_BT.shape
    S = x_BSD.shape[1]
    full_BTD = model(inputs_BT, options, starts_BT)
    nll_BS = token_losses(x_BSD, model.head_VD, targets_BT[:, :S], loss_chunk, spec.rules)

    def steps(a_BT: jax.Array) -> jax.Array:
        rest = a_BT[:, S:]
        parts = rest.reshape(B, (T - S) // spec.chunk, spec.chunk, *rest.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    def step(cache, given):
        tokens_Bt, starts_Bt, targets_Bt, full_BtD = given
        counts_B = jnp.full_like(cache.lengths_B, spec.chunk)
        x_BtD, cache = decode(weights, spec, cache, tokens_Bt, counts_B, starts_Bt)
        cached_BtV, full_BtV = (weights.logits(x, spec.rules) for x in (x_BtD, full_BtD))
        scores = (
            *_nats(cached_BtV, full_BtV, targets_Bt),
            cached_BtV.argmax(-1) == full_BtV.argmax(-1),
            jnp.abs(cached_BtV - full_BtV).max(-1),
        )
        return cache, jnp.stack([one.astype(jnp.float32) for one in scores])

    given = tuple(map(steps, (inputs_BT, starts_BT, targets_BT, full_BTD)))
    cache, scores_N5Bt = jax.lax.scan(step, cache, given)
    scores_5BT = jnp.moveaxis(scores_N5Bt, 0, 2).reshape(5, B, T - S)
    return jnp.concatenate([nll_BS, scores_5BT[0]], axis=1), scores_5BT, cache


def _nats(
    cached_BTV: jax.Array, full_BTV: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Nats of the targets through the cache and by full forward, and KL(full forward || cache). [B, T]"""
    cached, full = jax.nn.log_softmax(cached_BTV), jax.nn.log_softmax(full_BTV)
    kl_BT = jnp.sum(jnp.exp(full) * (full - cached), axis=-1)
    return losses(cached_BTV, targets_BT)[0], losses(full_BTV, targets_BT)[0], kl_BT


def evicting_decoding(
    session: EvaluationSession,
    model: Transformer,
    policy: Policy,
    *,
    chunk: int = 1,
    prompt: float = 0.5,
    matmul: str = "xla",
    windows: int | None = None,
    **how: Any,
) -> EvictingScores:
    """The held-out text through an evicting cache, on the first device, and the bytes of that cache.

    Bytes are those at the end of a window, a mean over the whole windows; so is the profile. Raises
    ValueError where the policy, the model, the tokenizer and the length of windows do not fit, and if no
    window of the text is whole. `matmul` is as in `decoding_weights`.
    """
    data = session.data
    S, T = prompt_tokens(prompt, data.seq_len, chunk), data.seq_len
    policy.check([S])
    held_out = max(part.totals["held_out"]["tokens"] for part in session.prepared.parts.values())
    if held_out < T:
        raise ValueError(
            f"{policy.name}: the bytes of an evicting cache are measured at the end of a window, but the "
            f"held-out text has only {held_out:,} tokens and a window {T:,}: use a longer text or "
            "a larger data.held_out"
        )
    # No mesh: an evicting cache is on one device.
    options = dataclasses.replace(session.options, rules=AxisRules(), attention="xla")
    alone = dataclasses.replace(session, options=options)
    model = on_one_device(model)
    weights = decoding_weights(model, matmul=matmul)
    B = rows(session, windows)
    tokenizer = session.tokenizer
    classes = classes_of_tokenizer(tokenizer, data.begin_token)
    spec = evicting_spec(session.model, policy, classes=classes, batch=B, capacity=T, chunk=chunk)
    compressor, cache = Compressor(weights, spec), spec.allocate()
    after = _AfterPrompts()
    counts: list[ledger.EvictingLedger] = []
    chosen: list[tuple[Chosen, ...]] = []  # of each batch, of its whole windows
    texts = 0

    def nll(tokens_BT1: jax.Array, weights_BT: jax.Array) -> jax.Array:
        nonlocal cache, texts
        inputs_BT, targets_BT = inputs_of(tokens_BT1[:, :-1], session.begins), tokens_BT1[:, 1:]
        starts_BT = jnp.zeros_like(inputs_BT)
        if session.end is not None:
            starts_BT = document_starts(tokens_BT1[:, :-1], session.end)
        prompts = dict(enumerate(np.asarray(inputs_BT[:, :S]).tolist()))
        starts_BS = np.asarray(starts_BT[:, :S])
        x_BSD, cache = compressor.fill(cache, prompts, T - S, starts_BS)
        nll_BT, scores_5BT, cache = _continued(
            *(model, weights, cache, inputs_BT, targets_BT, starts_BT, x_BSD[:, :S]),
            spec=compressor.spec,
            options=options,
            loss_chunk=math.gcd(S, session.loss_chunk),
        )
        scored_BT = np.asarray(weights_BT[:, S:], np.float64)
        after.add(np.asarray(scores_5BT, np.float64) * scored_BT, scored_BT.sum(1))
        whole = np.flatnonzero(scored_BT.all(axis=1))
        counts.append(ledger.counted_evicting(compressor.spec, cache, whole))
        chosen.append(tuple(one.of_rows(whole) for one in compressor.chosen))
        texts += len(whole)
        return nll_BT

    scores = score(alone, nll, windows=windows, warm_up=False, **how).scores()
    return EvictingScores(
        **vars(scores),
        cache=policy.name,
        cache_dtype=spec.formats[0].dtype,
        context=T,
        prompt=prompt,
        chunk=chunk,
        after_prompt=after.scores(),
        agreement=after.agreement(),
        **_bytes(compressor, counts, texts, T),
        readers_per_kv_layer=spec.readers,
        profile=profile(session.model, policy, chosen),
        token_classes=TokenClasses(**described(tokenizer, classes))
        if policy.needs_classes
        else None,
        prefill_seconds={
            name: round(value, 3) for name, value in dataclasses.asdict(compressor.seconds).items()
        },
    )


@functools.partial(jax.jit, static_argnames=("spec", "options", "steps"), donate_argnames="cache")
def _answered(model, weights, cache, tokens_BT, bounds_3B, *, spec, options, steps):
    """Teacher-forced questions and answers: sums over the tokens of each answer, [5, B], and the cache.

    `bounds_3B` are where the questions and the answers begin, and where the texts end. The sums are nats
    through the cache and by full forward, KL, and how many tokens are the likeliest, of both.
    """
    first_B, answer_B, end_B = bounds_3B
    full_BTD = model(tokens_BT, options)
    of = lambda a_BT, at_B: jnp.take_along_axis(a_BT, at_B[:, None], axis=1, mode="clip")

    def step(carry, i):
        cache, sums = carry
        at_B = first_B + i
        token_B1, target_B1 = of(tokens_BT, at_B), of(tokens_BT, at_B + 1)
        counts_B = (at_B + 1 < end_B).astype(jnp.int32)
        x_B1D, cache = decode(weights, spec, cache, token_B1, counts_B)
        full_B1D = jnp.take_along_axis(full_BTD, at_B[:, None, None], axis=1, mode="clip")
        cached_B1V, full_B1V = (weights.logits(x, spec.rules) for x in (x_B1D, full_B1D))
        scores = (
            *_nats(cached_B1V, full_B1V, target_B1),
            cached_B1V.argmax(-1) == target_B1,
            full_B1V.argmax(-1) == target_B1,
        )
        counts = (at_B + 1 >= answer_B) & (at_B + 1 < end_B)
        new_5B = jnp.stack([one[:, 0].astype(jnp.float32) for one in scores])
        return (cache, sums + jnp.where(counts, new_5B, 0)), None

    sums_5B = jnp.zeros((5, tokens_BT.shape[0]))
    (cache, sums_5B), _ = jax.lax.scan(step, (cache, sums_5B), jnp.arange(steps))
    return sums_5B, cache


def recall_scores(
    model: Transformer,
    tokenizer: Any,
    policy: Policy,
    examples: Sequence[Example],
    *,
    begin_token: str = "",
    batch: int = 16,
) -> dict[str, Any]:
    """How well a cache that evicts answers `recall_tasks`, beside the full forward pass.

    The context is the prompt, which the policy sees; the question and the answer are decoded token by token.
    Rank 1 is the share of answers all of whose tokens are the likeliest. Numbers are means over answers;
    `depths` has those of tenths of the depth.
    """
    model = on_one_device(model)
    weights, options = decoding_weights(model), ForwardOptions()
    begin = tokenizer.begin(begin_token)
    texts = []
    for one in examples:
        context = [begin, *tokenizer.encode(one.context).tolist()]
        question, answer = (tokenizer.encode(t).tolist() for t in (one.question, one.answer))
        texts.append((context, question, answer))
    policy.check([len(context) for context, _, _ in texts])
    T = max(sum(map(len, text)) for text in texts)
    steps = max(len(question) + len(answer) for _, question, answer in texts)
    classes = classes_of_tokenizer(tokenizer, begin_token)
    sizes = {"batch": min(batch, len(texts)), "capacity": T}
    spec = evicting_spec(model.config, policy, classes=classes, **sizes)
    compressor, cache = Compressor(weights, spec), spec.allocate()
    sums, kept = [], []
    for i in range(0, len(texts), spec.batch):
        asked = texts[i : i + spec.batch]
        here = [*asked, *[asked[-1]] * (spec.batch - len(asked))]
        tokens_BT = np.zeros((spec.batch, T), np.int32)
        for row, text in enumerate(here):
            joined = [token for part in text for token in part]
            tokens_BT[row, : len(joined)] = joined
        lengths = np.array([list(map(len, text)) for text in here], np.int32)
        _, cache = compressor.fill(cache, {row: text[0] for row, text in enumerate(here)}, steps)
        bounds_3B = np.cumsum(lengths, axis=1).T
        sums_5B, cache = _answered(
            *(model, weights, cache, tokens_BT, bounds_3B),
            spec=compressor.spec,
            options=options,
            steps=steps,
        )
        sums.append(np.asarray(sums_5B, np.float64)[:, : len(asked)])
        kept += compressor.kept_of_prompts()[: len(asked)]
    sums_5N = np.concatenate(sums, axis=1)
    size_N = np.array([len(answer) for _, _, answer in texts])
    depth_N = np.array([min(int(one.depth * 10), 9) for one in examples])

    def means(which_N: np.ndarray) -> dict[str, float]:
        nll, full, kl, same, full_same = sums_5N[:, which_N] / size_N[which_N]
        return {
            "examples": int(which_N.sum()),
            "nll": float(nll.mean()),
            "nll_by_full_forward": float(full.mean()),
            "kl": float(kl.mean()),
            "rank1": float((same == 1).mean()),
            "rank1_by_full_forward": float((full_same == 1).mean()),
        }

    return {
        **means(np.ones(len(texts), bool)),
        "kept_of_prompt": float(np.mean(kept)),
        "depths": {f"{d / 10:.1f}": means(depth_N == d) for d in sorted(set(depth_N.tolist()))},
    }


def _half_interval(values: Sequence[float]) -> float:
    """Half of the 95 % t interval of their mean; 0 of a single value."""
    if len(values) < 2:
        return 0.0
    interval = paired(values)
    return (interval.high - interval.low) / 2


class _AfterPrompts:
    """The scores of the tokens after the prompts, summed over windows."""

    def __init__(self) -> None:
        self._sums = np.zeros(5)  # nats, nats by full forward, KL, equal top tokens, tokens
        self._largest_difference = 0.0
        # Of each window, a token: nats above the full forward pass, and KL.
        self._windows: dict[str, list[float]] = {"worse": [], "kl": []}

    def add(self, scores_5BT: np.ndarray, tokens_B: np.ndarray) -> None:
        """Adds what `_continued` returned of windows, which have so many tokens after their prompts."""
        nll_BT, full_BT, kl_BT = scores_5BT[:3]
        self._largest_difference = max(self._largest_difference, scores_5BT[4].max())
        scored_B = tokens_B > 0
        for name, nats_BT in (("worse", nll_BT - full_BT), ("kl", kl_BT)):
            means = nats_BT.sum(1)[scored_B] / tokens_B[scored_B]
            self._windows[name] += means.round(7).tolist()
        self._sums += [*scores_5BT[:4].sum((1, 2)), tokens_B.sum()]

    def scores(self) -> AfterPrompt:
        nll, full, kl, same, tokens = map(float, self._sums)
        return AfterPrompt(
            nll=nll,
            nll_by_full_forward=full,
            tokens=int(tokens),
            perplexity=math.exp(min(nll / tokens, 700.0)),
            perplexity_by_full_forward=math.exp(min(full / tokens, 700.0)),
            kl=kl / tokens,
            top1_agreement=same / tokens,
            worse_interval=_half_interval(self._windows["worse"]),
            kl_interval=_half_interval(self._windows["kl"]),
            windows={name: tuple(values) for name, values in self._windows.items()},
        )

    def agreement(self) -> Agreement:
        _, _, kl, same, tokens = map(float, self._sums)
        return Agreement(
            kl=kl / tokens,
            top1_agreement=same / tokens,
            max_logit_difference=float(self._largest_difference),
            tokens=int(tokens),
        )


def _bytes(
    compressor: Compressor, counts: Sequence[ledger.EvictingLedger], texts: int, context: int
) -> dict[str, Any]:
    """KV bytes per token of context, and what they are of a cache that keeps everything at 16 bits."""
    spec, config = compressor.spec, compressor.spec.config
    entries = [sum(one.entries[p] for one in counts) for p in range(len(spec.pages))]
    predicted = ledger.predicted_evicting(spec, entries)
    tokens, rows_here = texts * context, spec.batch * context
    of = lambda name: sum(getattr(one, name) for one in counts)
    allocated = counts[-1].allocated + counts[-1].tables
    format = make_format(spec.policy.format, "bfloat16")
    at_16_bits = dataclasses.replace(spec, formats=(format,) * len(spec.formats))
    held = ledger.predicted_evicting(at_16_bits, entries)
    dense = costs.kv_bytes(config, context).resident
    return {
        "kv_bytes": {
            "allocated": ByteCount(
                predicted=(predicted.allocated + predicted.tables) / rows_here,
                counted=allocated / rows_here,
            ),
            "resident": ByteCount(
                predicted=(predicted.resident + predicted.notes) / tokens,
                counted=(of("resident") + of("notes")) / tokens,
            ),
            "read": ByteCount(predicted=predicted.read / tokens, counted=of("read") / tokens),
        },
        # Positions, classes and scores included.
        "resident_share": (held.resident + held.notes) / tokens / dense,
        "kept_share": sum(entries) / (tokens * len(spec.pages) * config.n_kv_heads),
    }


def profile(
    config: ModelConfig, policy: Policy, chosen: Sequence[tuple[Chosen, ...]]
) -> tuple[LayerProfile, ...]:
    """What was chosen for each KV layer, means over all prompts; of FastGen also each head's policies."""
    profiles = []
    for p, of_each in enumerate(zip(*chosen, strict=True)):
        lengths = np.concatenate([one.lengths_B for one in of_each])
        kept_NK = np.concatenate([one.kept_BKS.sum(-1) for one in of_each]) / lengths[:, None]
        policies, recovery = {}, {}
        if policy.names:
            policy_NK = np.concatenate([one.choice.policy_BK for one in of_each])
            policies = {
                name: HeadPolicy(
                    share=_rounded((policy_NK == i).mean(0)),
                    kept=tuple(
                        round(float(kept_NK[policy_NK[:, k] == i, k].mean()), 4)
                        if (policy_NK[:, k] == i).any()
                        else None
                        for k in range(config.n_kv_heads)
                    ),
                )
                for i, name in enumerate(policy.names)
            }
            recovery = {
                name: _rounded(
                    np.concatenate([one.choice.recovery[name] for one in of_each]).mean(0)
                )
                for name in of_each[0].choice.recovery
            }
        kept = _rounded(kept_NK.mean(0))
        profiles.append(LayerProfile(kv_layer=p, kept=kept, policies=policies, recovery=recovery))
    return tuple(profiles)


def _rounded(values: np.ndarray) -> tuple[float, ...]:
    return tuple(np.round(values, 4).tolist())
