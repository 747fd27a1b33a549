"""Held-out perplexity and bits per byte, by full forward and by cached decoding.

Perplexity is exp of the mean negative log-likelihood per token over the held-out split: windows of
seq_len targets in order, each token scored once. Bits per byte divides the same total by the UTF-8
bytes of the same text.
"""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cla_jax import cache as caches
from cla_jax import checkpoint
from cla_jax.cache import CacheFormat, ledger
from cla_jax.config import MeshConfig, ModelConfig
from cla_jax.data import loader
from cla_jax.generate import decode, decoding_weights
from cla_jax.loss import cross_entropy
from cla_jax.mesh import AxisRules
from cla_jax.model.transformer import Transformer, document_starts
from cla_jax.runs import Run
from cla_jax.train import Setup, loss_sum, set_up

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (windows done, windows in all)


@dataclasses.dataclass(kw_only=True)
class Score:
    """What was scored so far; totals, so that batches of any size add up exactly."""

    nll: float = 0.0  # nats
    tokens: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def record(self) -> dict[str, Any]:
        """The totals and what follows from them, as plain numbers."""
        return {
            "perplexity": math.exp(min(self.nll / self.tokens, 700.0)),
            "bits_per_byte": self.nll / math.log(2) / self.bytes,
            "nll": self.nll,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(self.tokens / self.seconds, 1),
        }


def score(
    setup: Setup,
    batch_nll: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    windows: int | None = None,
    progress: Progress = lambda done, total: None,
) -> Score:
    """Scores the held-out split: `batch_nll(tokens [B, T + 1], weights [B, T])` sums over a batch.

    `windows` limits it to the first ones. The first batch is run twice, so that compilation does not
    count as evaluation time.
    """
    split = setup.prepared.split("held_out")
    total = len(split) if windows is None else min(windows, len(split))
    size = setup.config.placement.eval_batch_size
    spec = setup.rules.spec("batch", None)
    result = Score()
    for i, batch in enumerate(loader.windows(split, size)):
        done = i * size
        if done >= total:
            break
        batch["n_targets"][total - done :] = 0
        batch["n_bytes"][total - done :] = 0
        T = batch["tokens"].shape[1] - 1
        weights_BT = (np.arange(T) < batch["n_targets"][:, None]).astype(np.float32)
        arrays = jax.device_put((batch["tokens"], weights_BT), spec)
        if i == 0:
            jax.block_until_ready(batch_nll(*arrays))
        clock = time.monotonic()
        result.nll += float(batch_nll(*arrays))
        result.seconds += time.monotonic() - clock
        result.tokens += int(batch["n_targets"].sum())
        result.bytes += int(batch["n_bytes"].sum())
        progress(min(done + size, total), total)
    return result


# ---------------------------------------------------------------------------------- two methods


@functools.partial(jax.jit, static_argnames=("run", "end", "loss_chunk"))
def _full_nll(model, tokens_BT1, weights_BT, *, run, end, loss_chunk):
    return loss_sum(model, tokens_BT1, weights_BT, run=run, end=end, loss_chunk=loss_chunk)


def full_forward(setup: Setup, model: Transformer, **limits: Any) -> dict[str, Any]:
    """Perplexity and bits per byte with the whole window in one pass, as in training."""
    nll = functools.partial(
        _full_nll,
        model,
        run=setup.run,
        end=setup.end,
        loss_chunk=setup.config.placement.loss_chunk,
    )
    return {"method": "full forward"} | score(setup, nll, **limits).record()


@functools.partial(
    jax.jit,
    static_argnames=("config", "format", "chunk", "end", "rules"),
    donate_argnames="cache",
)
def _cached_nll(weights, cache, tokens_BT1, weights_BT, *, config, format, chunk, end, rules):
    """Teacher-forced decoding of whole windows, `chunk` tokens a step; (summed nll, cache)."""
    inputs_BT, targets_BT = tokens_BT1[:, :-1], tokens_BT1[:, 1:]
    B, T = inputs_BT.shape
    starts_BT = jnp.zeros_like(inputs_BT) if end is None else document_starts(inputs_BT, end)

    def steps(a_BT: jax.Array) -> jax.Array:
        return jnp.moveaxis(a_BT.reshape(B, T // chunk, chunk), 1, 0)

    def step(carry, inputs):
        total, cache, index = carry
        tokens_Bt, targets_Bt, weights_Bt, starts_Bt = inputs
        positions_Bt = jnp.zeros_like(tokens_Bt) + index + jnp.arange(chunk)
        x_BtD, cache = decode(
            weights,
            config,
            format,
            cache,
            tokens_BT=tokens_Bt,
            positions_BT=positions_Bt,
            starts_BT=starts_Bt,
            index=index,
            rules=rules,
        )
        total += cross_entropy(x_BtD, weights.head, targets_Bt, weights_Bt, chunk, rules)
        return (total, cache, index + chunk), None

    xs = tuple(map(steps, (inputs_BT, targets_BT, weights_BT, starts_BT)))
    (total, cache, _), _ = jax.lax.scan(step, (jnp.zeros(()), cache, jnp.int32(0)), xs)
    return total, cache


def cached_decoding(
    setup: Setup, model: Transformer, format: CacheFormat, *, chunk: int = 1, **limits: Any
) -> dict[str, Any]:
    """The same text scored token by token through a KV cache, and the bytes of that cache.

    `chunk` tokens go through a step (1: decoding as in generation). Raises ValueError unless it
    divides seq_len.
    """
    config, seq_len, rules = setup.config.model, setup.config.data.seq_len, setup.rules
    check_chunk(chunk, seq_len)
    weights = decoding_weights(model, rules)
    batch = setup.config.placement.eval_batch_size
    cache = caches.allocate(format, config, batch=batch, capacity=seq_len, rules=rules)
    counted = ledger.counted(format, cache, _one_step(weights, config, batch, rules))
    predicted = ledger.predicted(config, format)
    options = {"config": config, "format": format, "chunk": chunk, "end": setup.end, "rules": rules}

    def nll(tokens_BT1: jax.Array, weights_BT: jax.Array) -> jax.Array:
        nonlocal cache  # what an earlier window left in it lies behind this window's queries
        total, cache = _cached_nll(weights, cache, tokens_BT1, weights_BT, **options)
        return total

    return {
        "method": "cached decoding",
        "cache": format.name,
        "cache_dtype": format.dtype,
        **score(setup, nll, **limits).record(),
        "kv_bytes": {
            name: {"predicted": getattr(predicted, name), "counted": getattr(counted, name)}
            for name in ("resident", "written", "read")
        },
    }


def check_chunk(chunk: int, seq_len: int) -> None:
    if chunk < 1 or seq_len % chunk:
        raise ValueError(f"chunk = {chunk} does not divide data.seq_len = {seq_len}")


def _one_step(weights: Any, config: ModelConfig, batch: int, rules: AxisRules) -> Callable:
    """A decode step of one token, for the ledger to trace."""

    def step(format: CacheFormat, cache: caches.Cache) -> Any:
        zeros_B1 = jnp.zeros((batch, 1), jnp.int32, out_sharding=rules.spec("batch", None))
        return decode(
            weights,
            config,
            format,
            cache,
            tokens_BT=zeros_B1,
            positions_BT=zeros_B1,
            starts_BT=zeros_B1,
            index=jnp.int32(0),
            rules=rules,
        )

    return step


# ------------------------------------------------------------------------------ evaluating runs


def during_training(setup: Setup, model: Transformer) -> dict[str, Any]:
    """The evaluator that training is given: a flat dict for the metrics."""
    record = full_forward(setup, model)
    return {
        "held_out_loss": record["nll"] / record["tokens"],
        "perplexity": record["perplexity"],
        "bits_per_byte": record["bits_per_byte"],
    }


def open_setup(run: Run, data_dir: str | None = None) -> Setup:
    """What a finished or running run becomes on the devices at hand, whatever mesh it was trained on.

    `data_dir` says where prepared data is, if not where it was in training. Raises ValueError if
    the held-out text or the tokenizer are not those the run was trained with.
    """
    config = run.config()
    here = dataclasses.replace(
        config.placement,
        mesh=MeshConfig(),
        accumulate=1,
        attention="auto",
        data_dir=data_dir or config.placement.data_dir,
    )
    setup = set_up(dataclasses.replace(config, placement=here))
    run.check_data(setup.prepared.path.name, setup.prepared.tokenizer.to_json())
    return setup


def evaluate(
    run: Run,
    *,
    formats: tuple[str, ...] = ("dense",),
    chunk: int = 1,
    windows: int | None = None,
    data_dir: str | None = None,
    progress: Callable[[str], Progress] = lambda name: lambda done, total: None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Evaluates a run by full forward and through each cache format; yields and writes the records.

    With `windows`, only that many windows are scored, and nothing is written: a part of the held-out
    split is no result of the run. Raises ValueError for what the arguments or the run do not allow.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows = {windows} must be positive")
    setup = open_setup(run, data_dir)
    check_chunk(chunk, setup.config.data.seq_len)
    step, model = checkpoint.load_model(run, setup.rules, setup.mesh)
    dtype = setup.config.model.compute_dtype
    with jax.set_mesh(setup.mesh):
        methods: dict[str, Callable[..., dict[str, Any]]] = {
            "full": functools.partial(full_forward, setup, model)
        }
        for name in formats:
            format = caches.make_format(name, dtype)
            methods[f"cached-{name}"] = functools.partial(
                cached_decoding, setup, model, format, chunk=chunk
            )
        for name, method in methods.items():
            record = method(windows=windows, progress=progress(name))
            record |= {"step": step, "data_fingerprint": setup.prepared.path.name}
            if windows is None:
                run.write_eval(name, record)
            yield name, record
