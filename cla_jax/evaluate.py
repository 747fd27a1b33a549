"""Evaluating runs: held-out perplexity and bits per byte, by full forward and through KV caches."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from cla_jax import checkpoint, evaluation, eviction, memory
from cla_jax import mesh as meshes
from cla_jax.cache import cache_spec, ledger
from cla_jax.config import MeshConfig
from cla_jax.data import prepare
from cla_jax.data.mixture import of_component
from cla_jax.evaluation import CachedScores, Evaluation, Scores, plain
from cla_jax.eviction_scores import evicting_decoding
from cla_jax.model import cpu_matmul, decode_kernels
from cla_jax.model.transformer import Transformer
from cla_jax.runs import TRAINING, Run, check_paths
from cla_jax.scoring import (
    Progress,
    agreement,
    cached_decoding,
    full_forward,
    sensitivity,
)
from cla_jax.session import EvaluationSession, Session, prepare_evaluation

log = logging.getLogger(__name__)


def during_training(session: Session, model: Transformer) -> dict[str, Any]:
    """The evaluator that training is given: a flat dict for the metrics, and the whole under `record`.

    Of a mixture it has those of all held-out text, and `perplexity/NAME` and so on of each component.
    The record has the scores of each document too.
    """
    scores = full_forward(session.evaluation, model)
    metrics = _metrics(scores)
    for name, part in scores.components.items():
        metrics |= {of_component(metric, name): n for metric, n in _metrics(part).items()}
    whole = {"method": TRAINING, "data_fingerprint": session.prepared.fingerprint}
    return metrics | {"record": whole | plain(scores)}


def _metrics(scores: Scores) -> dict[str, Any]:
    assert scores.nll is not None
    assert scores.tokens
    return {
        "held_out_loss": scores.nll / scores.tokens,
        "perplexity": scores.perplexity,
        "bits_per_byte": scores.bits_per_byte,
        # What tells a comparison whether two runs were scored on the same text.
        "held_out_tokens": scores.tokens,
        "held_out_bytes": scores.bytes,
    }


def open_session(
    run: Run,
    data_dir: str | None = None,
    *,
    data_sources: Sequence[str] = (),
    mesh: MeshConfig = MeshConfig(),
    split_cache: bool = False,
    batch_size: int | None = None,
) -> EvaluationSession:
    """What a finished or running run becomes on the devices at hand, whatever mesh it was trained on.

    `data_dir` says where prepared data is, if not where it was in training; `batch_size` how many windows are
    evaluated at once, if not as many. Raises ValueError if the held-out text or the tokenizer are not those
    the run was trained with; nothing is prepared then. A run may be somebody else's. So it may name places
    outside the current directory. They are used only if they are given here too, in `data_dir` and
    `data_sources` (`runs.check_paths`).
    """
    check_paths(run, data_dir, data_sources)
    config = run.config()
    data, placement = config.data, config.placement
    data_dir = data_dir or placement.data_dir
    # The run has a copy of a tokenizer that was a file, which may be gone, or that a mixture learned.
    from_file = data.tokenizer.endswith(".json") or bool(data.mixture)
    tokenizer_json = run.tokenizer_json() if from_file else None
    fingerprint = prepare.fingerprint(data, data_dir, tokenizer_json)
    if fingerprint != run.record().get("data_fingerprint"):
        changes = lambda earlier: prepare.changes(data, data_dir, earlier, tokenizer_json)
        run.check_data(fingerprint, run.tokenizer_json(), changes)
    session = prepare_evaluation(
        config.model,
        data,
        data_dir=data_dir,
        mesh=mesh,
        scan_layers=placement.scan_layers,
        remat=placement.remat,
        batch_size=batch_size or placement.eval_batch_size,
        loss_chunk=placement.loss_chunk,
        tokenizer_json=tokenizer_json,
    )
    run.check_data(session.prepared.fingerprint, session.tokenizer.to_json())
    if split_cache:
        rules = meshes.split_cache(session.rules, session.mesh)
        session = dataclasses.replace(
            session, options=dataclasses.replace(session.options, rules=rules)
        )
    return session


def evaluate(
    run: Run,
    *,
    formats: Sequence[str] = ("dense",),
    chunk: int = 1,
    attention: str = "xla",
    matmul: str = "xla",
    windows: int | None = None,
    prompt: float = 0.5,
    per_kv_layer: bool = False,
    again: bool = False,
    progress: Callable[[str], Progress] = lambda name: lambda done, total: None,
    **options: Any,
) -> Iterator[tuple[str, Evaluation]]:
    """Evaluates a run by full forward and through each cache format; yields and writes the evaluations.

    What is recorded already, of the same checkpoint and in the same way, is not evaluated again, so what was
    interrupted goes on; unless `again`. With `windows`, only that many windows are scored, and nothing is
    written: a part of the held-out split is no result of the run. A record of a later step is kept.

    `attention` reads the cache: `xla`, or a kernel of `cla_jax.model.decode_kernels`. `matmul` multiplies
    tokens with weights in steps through a cache, as in `decoding_weights`. For a cache that evicts, the share
    `prompt` of a window is its prompt. `per_kv_layer` adds what the error of each KV layer does by itself;
    `options` are those of `open_session`.

    Raises ValueError for what the arguments or the run do not allow, and for a run that cannot be written
    to, before anything is computed. If a record could not be written later, raises its OSError at the end.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows = {windows} must be positive")
    formats = (formats,) if isinstance(formats, str) else formats
    formats = tuple(dict.fromkeys(eviction.canonical(name) for name in formats))
    run.check_decodable(formats, chunk, prompt)
    if per_kv_layer and any(map(eviction.is_policy, formats)):
        raise ValueError("per_kv_layer does not support caches that evict tokens")
    decode_kernels.check(attention, run.config().model, formats)
    decode_kernels.check_chunk(attention, run.config().model, chunk)
    session = open_session(run, **options)
    for name in formats:
        # A cache that evicts is on one device.
        cpu_matmul.check(matmul, None if eviction.is_policy(name) else session.mesh)
    step, model = checkpoint.load_model(run, session.rules, session.mesh)
    origin = {
        "step": step,
        "checkpoint": checkpoint.fingerprint(run, step),
        "data_fingerprint": session.prepared.fingerprint,
    }
    peak = memory.allocator_peak() or 0
    notes = {name: _pointless(session, name) for name in formats if not eviction.is_policy(name)}
    how: dict[str, Any] = {"chunk": chunk, "attention": attention, "matmul": matmul}
    unwritten: OSError | None = None
    for name in ("", *formats):
        policy = eviction.parse(name) if eviction.is_policy(name) else None
        # A cache that evicts is on one device.
        with contextlib.nullcontext() if policy else jax.set_mesh(session.mesh):
            written_as = f"cached-{name}" if name else "full"
            asked = origin | (how if name else {})
            asked |= {"prompt": prompt} if policy else {}
            known = None if again or windows else _recorded(run, written_as, asked)
            if known and not (name and per_kv_layer and not _has_each_kv_layer(known)):
                log.warning("%s is already recorded (--again evaluates it again)", written_as)
                yield written_as, known
                continue
            if windows is None:
                run.check_recordable()
            if note := notes.get(name):
                log.warning(note)
            method, scores = _score(
                session,
                model,
                name,
                policy,
                how=how,
                prompt=prompt,
                per_kv_layer=per_kv_layer,
                windows=windows,
                progress=progress,
            )
            before, peak = peak, memory.allocator_peak() or 0
            # A lower peak than before is that of something else.
            own_peak = peak if peak > before else None
            made = Evaluation(method=method, **origin, device_peak_bytes=own_peak, scores=scores)
            yield written_as, made  # first: it is known even where it cannot be written
            if windows is None:
                try:
                    run.write_eval(written_as, made.record())
                except OSError as error:
                    unwritten = error
    if unwritten is not None:
        raise unwritten


def _score(
    session: EvaluationSession,
    model: Transformer,
    name: str,
    policy: eviction.Policy | None,
    *,
    how: dict[str, Any],
    prompt: float,
    per_kv_layer: bool,
    windows: int | None,
    progress: Callable[[str], Progress],
) -> tuple[str, Scores]:
    """How the model was evaluated, and the scores: through the cache of this name, or without one."""
    work = f"{name} cache" if name else "full forward"
    limits: dict[str, Any] = {"windows": windows, "progress": progress(f"{work}, windows")}
    if policy:
        # XLA reads a cache that evicts.
        how = {"chunk": how["chunk"], "matmul": how["matmul"]}
        return "evicting decoding", evicting_decoding(
            session, model, policy, prompt=prompt, **how, **limits
        )
    if not name:
        return "full forward", full_forward(session, model, **limits)
    scores = cached_decoding(session, model, name, **how, **limits)
    sampled: dict[str, Any] = how | {"windows": min(windows or 64, 64)}
    sampled["progress"] = progress(f"{name} cache compared with full forward, windows")
    close, each = agreement(session, model, name, **sampled), None
    if per_kv_layer:
        sampled["progress"] = progress(f"KV layers in {name}")
        each = sensitivity(session, model, name, **sampled)
    return "cached decoding", dataclasses.replace(scores, agreement=close, per_kv_layer=each)


def _recorded(run: Run, name: str, asked: dict[str, Any]) -> Evaluation | None:
    """The evaluation of this name, if it was asked for in this way; None too if it is damaged."""
    record = run.eval(name)
    if not evaluation.made_as(asked, record):
        return None
    with contextlib.suppress(ValueError):
        return evaluation.read(name, record, run.path / "eval" / f"{name}.json")
    return None


def _has_each_kv_layer(known: Evaluation) -> bool:
    return isinstance(known.scores, CachedScores) and known.scores.per_kv_layer is not None


def _pointless(session: EvaluationSession, name: str) -> str | None:
    """What to say of a format that holds no less than dense does in windows as short as the run's."""
    context = session.data.seq_len
    dense, held = (
        ledger.predicted(cache_spec(session.model, n, batch=1, capacity=context), context).resident
        for n in ("dense", name)
    )
    if name == "dense" or held < dense:
        return None
    return (
        f"{name}: stores at least as many bytes as dense in windows of {context} tokens, so this result says "
        "little about the format"
    )
