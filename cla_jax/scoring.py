"""Scores held-out text: by full forward, through a KV cache, and a comparison of the two.

Perplexity is exp of the mean negative log-likelihood per token over the held-out split: windows of
seq_len targets in order, each token scored once. Bits per byte divides the same total by the UTF-8
bytes of the same text.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax import cache as caches
from cla_jax.cache import CacheFormat, ledger
from cla_jax.config import check_chunk
from cla_jax.data import loader
from cla_jax.decode import Weights, decode, decoding_weights
from cla_jax.documents import Documents
from cla_jax.evaluation import Agreement, ByteCount, CachedScores, KVLayerAgreement, Scores
from cla_jax.loss import losses, token_losses
from cla_jax.mesh import AxisRules, row_shards
from cla_jax.model.decode_kernels import XLA
from cla_jax.model.transformer import Transformer, document_starts, inputs_of
from cla_jax.session import EvaluationSession

if TYPE_CHECKING:
    from cla_jax.data.prepare import Prepared
    from cla_jax.data.records import Windows

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (windows done, windows in all)


@dataclasses.dataclass(kw_only=True)
class Totals:
    """What was scored so far; batches of any size add up exactly."""

    nll: float = 0.0  # nats
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0
    # Of the whole held-out split; for a mixture, see `components`.
    documents: Documents | None = None
    # Of a mixture, also those of its components.
    components: dict[str, "Totals"] = dataclasses.field(default_factory=dict)

    def scores(self) -> Scores:
        """The totals and what follows from them."""
        return Scores(
            perplexity=math.exp(min(self.nll / self.tokens, 700.0)),
            bits_per_byte=self.nll / math.log(2) / self.bytes,
            nll=self.nll,
            tokens=self.tokens,
            bytes=self.bytes,
            seconds=round(self.seconds, 3),
            tokens_per_s=round(self.tokens / self.seconds, 1),
            documents=self.documents,
            components={name: part.scores() for name, part in self.components.items()},
        )


def score(
    session: EvaluationSession,
    batch_nll: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    windows: int | None = None,
    progress: Progress = lambda done, total: None,
    warm_up: bool = True,
) -> Totals:
    """Scores the held-out split: `batch_nll(tokens [B, T + 1], weights [B, T])` gives nats [B, T].

    A scalar is broadcast. What it gives where a weight is 0 does not count. Sums are in float64 and in the
    order of the text, so neither batches nor meshes change how they are rounded. If the whole split is
    scored, so is each of its documents: the sum over its tokens and over the end token behind it, whatever
    windows they fell in. (A token sees the window that it is in, and so, unless
    `data.attend_across_documents` is off, the end of the document before.)

    Of a mixture, the held-out texts of all components count as one text, whatever their weights; each is
    scored for itself too. `windows` limits each to its first ones. With `warm_up` the first batch is run
    twice, so that compilation does not count as evaluation time.
    """
    splits = {name: part.split("held_out") for name, part in session.prepared.parts.items()}
    totals = {
        name: len(split) if windows is None else min(windows, len(split))
        for name, split in splits.items()
    }
    total, done, size = Totals(), 0, rows(session, windows)
    progress(0, sum(totals.values()))
    for name, split in splits.items():
        part, pieces = Totals(), []
        for scored in _score_split(
            session, batch_nll, split, size, totals[name], part, pieces, warm_up and not done
        ):
            done += scored
            progress(done, sum(totals.values()))
        nll_N = np.concatenate(pieces)
        part.nll = float(nll_N.sum())
        if windows is None:
            part.documents = _documents(session.prepared.parts[name], nll_N)
            total.documents = None if name else part.documents
        for field in ("nll", "tokens", "bytes", "seconds"):
            setattr(total, field, getattr(total, field) + getattr(part, field))
        if name:
            total.components[name] = part
    return total


def rows(session: EvaluationSession, windows: int | None = None) -> int:
    """Windows that are scored at once: as many as asked for, or as there are, in batches of like size.

    The devices share them evenly. Of a mixture, the component with most windows decides.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows = {windows} must be positive")
    available = max(part.totals["held_out"]["windows"] for part in session.prepared.parts.values())
    scored = available if windows is None else min(windows, available)
    batches = -(-scored // session.rows)
    shards = row_shards(session.mesh)
    return -(-scored // (batches * shards)) * shards


def _score_split(
    session: EvaluationSession,
    batch_nll: Callable[[jax.Array, jax.Array], jax.Array],
    split: "Windows",
    size: int,
    total: int,
    result: Totals,
    pieces: list[np.ndarray],
    warm_up: bool,
) -> Iterator[int]:
    """Scores the first windows of a split; yields how many, batch by batch of `size`.

    Updates `result`, and appends to `pieces` one array of the nats of each token for each window.
    """
    spec = session.rules.spec("batch", None)
    for i, batch in enumerate(loader.windows(split, size)):
        done = i * size
        if done >= total:
            break
        batch["n_targets"][total - done :] = 0
        batch["n_bytes"][total - done :] = 0
        T = batch["tokens"].shape[1] - 1
        weights_BT = (np.arange(T) < batch["n_targets"][:, None]).astype(np.float32)
        arrays = jax.device_put((batch["tokens"], weights_BT), spec)
        if i == 0 and warm_up:
            jax.block_until_ready(batch_nll(*arrays))
        clock = time.monotonic()
        nll_BT = np.broadcast_to(np.asarray(batch_nll(*arrays), np.float64), weights_BT.shape)
        result.seconds += time.monotonic() - clock
        pieces += [row[:n] for row, n in zip(nll_BT, batch["n_targets"], strict=True)]
        result.tokens += int(batch["n_targets"].sum())
        result.bytes += int(batch["n_bytes"].sum())
        yield min(size, total - done)


def _documents(prepared: "Prepared", nll_N: np.ndarray) -> Documents | None:
    """The scores of a split's documents; None, with a warning, where it is not known which they are."""
    try:
        tokens, n_bytes = prepared.documents()
    except ValueError as error:
        log.warning("single documents are not scored: %s", error)
        return None
    starts = np.cumsum(tokens) - tokens
    return Documents(nll=np.add.reduceat(nll_N, starts), tokens=tokens, bytes=n_bytes)


# ---------------------------------------------------------------------------------- two methods


@functools.partial(jax.jit, static_argnames=("options", "end", "begins", "loss_chunk"))
def _full_nll(model, tokens_BT1, *, options, end, begins, loss_chunk):
    """The nats of every target, [B, T], whole on each device."""
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    starts_BT = None if end is None else document_starts(inputs_BT, end)
    x_BTD = model(inputs_of(inputs_BT, begins), options, starts_BT)
    chunk = min(loss_chunk, inputs_BT.shape[1])
    return _whole(
        token_losses(x_BTD, model.head_VD, targets_BT, chunk, options.rules), options.rules
    )


def _whole(a_BT: jax.Array, rules: AxisRules) -> jax.Array:
    """A copy on every device, so that every host can read it."""
    spec = rules.spec(None, None)
    return a_BT if spec is None else jax.reshard(a_BT, spec)


def full_forward(session: EvaluationSession, model: Transformer, **limits: Any) -> Scores:
    """Perplexity and bits per byte with the whole window in one pass, as in training."""
    static = {
        "options": session.options,
        "end": session.end,
        "begins": session.begins,
        "loss_chunk": session.loss_chunk,
    }

    def nll(tokens_BT1: jax.Array, _: jax.Array) -> jax.Array:
        return _full_nll(model, tokens_BT1, **static)

    return score(session, nll, **limits).scores()


def _teacher_forced(weights, cache, tokens_BT1, spec, end, begins, visit, carry, *more_BT):
    """Feeds whole windows through a cache that was reset, `spec.chunk` tokens per step.

    `visit(carry, x_BtD, targets_Bt, *more_Bt) -> carry` sees the hidden states of every step.
    """
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    B, T = inputs_BT.shape
    starts_BT = jnp.zeros_like(inputs_BT) if end is None else document_starts(inputs_BT, end)

    def steps(a_BT: jax.Array) -> jax.Array:
        return jnp.moveaxis(a_BT.reshape(B, T // spec.chunk, spec.chunk, *a_BT.shape[2:]), 1, 0)

    def step(carry, inputs):
        cache, carry = carry
        tokens_Bt, starts_Bt, *seen = inputs
        counts_B = jnp.full_like(cache.lengths_B, spec.chunk)
        x_BtD, cache = decode(weights, spec, cache, tokens_Bt, counts_B, starts_Bt)
        return (cache, visit(carry, x_BtD, *seen)), None

    read_BT = inputs_of(inputs_BT, begins)
    xs = tuple(map(steps, (read_BT, starts_BT, targets_BT, *more_BT)))
    none_B = jnp.zeros_like(cache.lengths_B)
    (cache, carry), _ = jax.lax.scan(step, (spec.reset(cache, none_B == 0, none_B), carry), xs)
    return carry, cache


@functools.partial(jax.jit, static_argnames=("spec", "end", "begins"), donate_argnames="cache")
def _cached_nll(weights, cache, tokens_BT1, *, spec, end, begins):
    """Teacher-forced decoding of whole windows: (nats of every target [B, T], cache)."""

    def visit(carry, x_BtD, targets_Bt):
        nll_BT, at = carry
        # By the head that decoding uses, in the form that it keeps its weights in.
        nll_Bt = losses(weights.logits(x_BtD, spec.rules), targets_Bt)[0]
        return jax.lax.dynamic_update_slice_in_dim(nll_BT, nll_Bt, at, 1), at + spec.chunk

    nll_BT = jnp.zeros_like(tokens_BT1[:, 1:], jnp.float32)
    carry = (nll_BT, jnp.zeros((), jnp.int32))
    (nll_BT, _), cache = _teacher_forced(
        weights, cache, tokens_BT1, spec, end, begins, visit, carry
    )
    return _whole(nll_BT, spec.rules), cache


def cached_decoding(
    session: EvaluationSession,
    model: Transformer,
    format: str | CacheFormat,
    *,
    chunk: int = 1,
    attention: str = "xla",
    matmul: str = "xla",
    windows: int | None = None,
    **how: Any,
) -> CachedScores:
    """The same text scored through a KV cache, and the bytes of that cache at the end of a window.

    `chunk` tokens go through a step: with 1 the cache is used as generation uses it. Longer steps are faster.
    They change nothing for formats that store each token separately. kivi gets worse, because for the first
    tokens of a step, later tokens of that step count among the newest. `attention` reads the cache, as in
    `cache_spec`; `matmul` multiplies tokens with weights, as in `decoding_weights`. Raises ValueError unless
    the chunk divides seq_len.
    """
    weights = decoding_weights(model, session.rules, matmul)
    spec = _spec(session, format, chunk, windows, attention)
    cache = spec.allocate()

    def nll(tokens_BT1: jax.Array, _: jax.Array) -> jax.Array:
        nonlocal cache
        ends = {"end": session.end, "begins": session.begins}
        nll_BT, cache = _cached_nll(weights, cache, tokens_BT1, spec=spec, **ends)
        return nll_BT

    scores = score(session, nll, windows=windows, **how).scores()
    context = session.data.seq_len
    predicted = ledger.predicted(spec, context).per_token(context)
    counted = ledger.counted(spec, cache, _one_step(weights)).per_token(context)
    return CachedScores(
        **vars(scores),
        cache=spec.formats[0].name,
        cache_dtype=spec.formats[0].dtype,
        context=context,
        chunk=chunk,
        attention="" if attention == XLA else attention,
        matmul="" if matmul == XLA else matmul,
        kv_bytes={
            name: ByteCount(predicted=predicted[name], counted=counted[name]) for name in predicted
        },
        readers_per_kv_layer=spec.readers,
    )


def _spec(
    session: EvaluationSession,
    format: str | CacheFormat | Sequence[CacheFormat],
    chunk: int,
    windows: int | None,
    attention: str,
) -> caches.CacheSpec:
    """A cache for the windows of the held-out split."""
    seq_len = session.data.seq_len
    check_chunk(chunk, seq_len)
    return caches.cache_spec(
        session.model,
        format,
        batch=rows(session, windows),
        capacity=seq_len,
        chunk=chunk,
        rules=session.rules,
        attention=attention,
    )


def _one_step(weights: Weights) -> Callable:
    """A decode step of one token, for the ledger to trace."""

    def step(spec: caches.CacheSpec, cache: caches.Cache) -> Any:
        rows_B = cache.lengths_B  # only its shape matters, and it stands for the tokens too
        return decode(weights, spec, cache, rows_B[:, None], jnp.zeros_like(rows_B))

    return step


# ------------------------------------------------------------------------------------ agreement


@functools.partial(
    jax.jit, static_argnames=("spec", "options", "end", "begins"), donate_argnames="cache"
)
def _agreement(model, weights, cache, tokens_BT1, weights_BT, *, spec, options, end, begins):
    """Sums over the tokens of windows of how far cached logits are from those of the full forward."""
    inputs_BT = tokens_BT1[:, :-1]
    starts_BT = None if end is None else document_starts(inputs_BT, end)
    full_BTD = model(inputs_of(inputs_BT, begins), options, starts_BT)

    def visit(carry, x_BtD, _, weights_Bt, full_BtD):
        cached_BtV, full_BtV = (weights.logits(x, spec.rules) for x in (x_BtD, full_BtD))
        if (whole := spec.rules.spec("batch", None, None)) is not None:
            cached_BtV, full_BtV = jax.reshard((cached_BtV, full_BtV), whole)
        apart_BtV = jnp.abs(cached_BtV - full_BtV)
        cached, full = jax.nn.log_softmax(cached_BtV), jax.nn.log_softmax(full_BtV)
        sums = {
            "mean_logit_difference": apart_BtV.mean(-1),
            "top1_agreement": cached_BtV.argmax(-1) == full_BtV.argmax(-1),
            "kl": jnp.sum(jnp.exp(full) * (full - cached), axis=-1),
        }
        peak = jnp.max(apart_BtV * weights_Bt[:, :, None])
        new = {name: carry[name] + jnp.sum(value * weights_Bt) for name, value in sums.items()}
        return new | {"max_logit_difference": jnp.maximum(carry["max_logit_difference"], peak)}

    names = ("mean_logit_difference", "top1_agreement", "kl", "max_logit_difference")
    carry = {name: jnp.zeros(()) for name in names}
    return _teacher_forced(
        weights, cache, tokens_BT1, spec, end, begins, visit, carry, weights_BT, full_BTD
    )


def agreement(
    session: EvaluationSession,
    model: Transformer,
    format: str | CacheFormat | Sequence[CacheFormat],
    *,
    chunk: int = 1,
    attention: str = "xla",
    matmul: str = "xla",
    windows: int = 64,
    progress: Progress = lambda done, total: None,
) -> Agreement:
    """How far decoding through a cache is from the full forward, token by token.

    Over the first held-out windows: the largest and the mean absolute difference of logits, and the mean
    divergence KL(full || cached) in nats. Also how often the most likely token is the same. Several formats
    are one for each KV layer.
    """
    weights = decoding_weights(model, session.rules, matmul)
    spec = _spec(session, format, chunk, windows, attention)
    cache = spec.allocate()
    totals: dict[str, float] = {}

    def visit(tokens_BT1: jax.Array, weights_BT: jax.Array) -> jax.Array:
        nonlocal cache
        sums, cache = _agreement(
            model,
            weights,
            cache,
            tokens_BT1,
            weights_BT,
            spec=spec,
            options=session.options,
            end=session.end,
            begins=session.begins,
        )
        for name, value in sums.items():
            join = max if name.startswith("max") else float.__add__
            totals[name] = join(totals.get(name, 0.0), float(value))
        return jnp.zeros(())

    tokens = score(session, visit, windows=windows, warm_up=False, progress=progress).tokens
    means = {k: v if k.startswith("max") else v / tokens for k, v in totals.items()}
    return Agreement(**means, tokens=tokens)


def sensitivity(
    session: EvaluationSession,
    model: Transformer,
    name: str,
    *,
    chunk: int = 1,
    attention: str = "xla",
    matmul: str = "xla",
    windows: int = 64,
    progress: Progress = lambda done, total: None,
) -> tuple[KVLayerAgreement, ...]:
    """What the error of each KV layer alone does to the model: one KV layer in a format, all others dense.

    An error in a shared KV layer is felt by every layer that reads it (`readers`).
    """
    config = session.model
    dense, lossy = (caches.make_format(n, config.compute_dtype) for n in ("dense", name))
    if config.sharing.is_split:
        raise ValueError(
            f"per_kv_layer: model.kv_map = {config.kv_map} has different maps for keys and values, so a "
            "layer would read keys and values in different formats"
        )
    kv_layers = config.sharing.kv_layers
    measured = []
    for p, kv in enumerate(kv_layers):
        formats = [lossy if i == p else dense for i in range(len(kv_layers))]
        how: dict[str, Any] = {"chunk": chunk, "attention": attention, "matmul": matmul}
        close = agreement(session, model, formats, windows=windows, **how)
        measured.append(
            KVLayerAgreement(**vars(close), kv_layer=p, layer=kv.layer, readers=kv.readers)
        )
        progress(p + 1, len(kv_layers))
    return tuple(measured)
