"""Evaluating runs: held-out perplexity and bits per byte, by full forward and through KV caches."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cla_jax import cache as caches
from cla_jax import checkpoint, memory
from cla_jax import mesh as meshes
from cla_jax.config import MeshConfig, near_choice
from cla_jax.model.transformer import Transformer
from cla_jax.runs import Run
from cla_jax.scoring import (
    Progress,
    agreement,
    cached_decoding,
    check_chunk,
    full_forward,
    sensitivity,
)
from cla_jax.train import Setup, set_up


def during_training(setup: Setup, model: Transformer) -> dict[str, Any]:
    """The evaluator that training is given: a flat dict for the metrics."""
    record = full_forward(setup, model)
    return {
        "held_out_loss": record["nll"] / record["tokens"],
        "perplexity": record["perplexity"],
        "bits_per_byte": record["bits_per_byte"],
    }


def open_setup(
    run: Run,
    data_dir: str | None = None,
    *,
    mesh: MeshConfig = MeshConfig(),
    split_cache: bool = False,
    batch_size: int | None = None,
) -> Setup:
    """What a finished or running run becomes on the devices at hand, whatever mesh it was trained on.

    `data_dir` says where prepared data is, if not where it was in training; `batch_size` how many
    windows are evaluated at once, if not as many. Raises ValueError if the held-out text or the
    tokenizer are not those the run was trained with.
    """
    config = run.config()
    here = dataclasses.replace(
        config.placement,
        mesh=mesh,
        accumulate=1,
        attention="auto",
        data_dir=data_dir or config.placement.data_dir,
        eval_batch_size=batch_size or config.placement.eval_batch_size,
    )
    # The batch of training need not divide over these devices.
    config = dataclasses.replace(config, batch_size=jax.device_count(), placement=here)
    from_file = config.data.tokenizer.endswith(".json")  # the run has a copy; the file may be gone
    setup = set_up(config, run.tokenizer_json() if from_file else None)
    run.check_data(setup.prepared.path.name, setup.prepared.tokenizer.to_json())
    if split_cache:
        rules = meshes.split_cache(setup.rules, setup.mesh)
        setup = dataclasses.replace(setup, run=dataclasses.replace(setup.run, rules=rules))
    return setup


def evaluate(
    run: Run,
    *,
    formats: tuple[str, ...] = ("dense",),
    chunk: int = 1,
    windows: int | None = None,
    per_slot: bool = False,
    progress: Callable[[str], Progress] = lambda name: lambda done, total: None,
    **options: Any,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Evaluates a run by full forward and through each cache format; yields and writes the records.

    With `windows`, only that many windows are scored, and nothing is written: a part of the held-out
    split is no result of the run. A record of a later step is kept. `per_slot` adds what each slot's error
    does by itself; `options` are those of `open_setup`. Raises ValueError for what the arguments or the
    run do not allow.
    """
    if windows is not None and windows < 1:
        raise ValueError(f"windows = {windows} must be positive")
    for name in formats:
        near_choice("cache format", name, caches.FORMATS)
    setup = open_setup(run, **options)
    check_chunk(chunk, setup.config.data.seq_len)
    step, model = checkpoint.load_model(run, setup.rules, setup.mesh)
    origin = {"step": step, "data_fingerprint": setup.prepared.path.name}
    with jax.set_mesh(setup.mesh):
        for name in ("", *formats):
            limits = {"windows": windows, "progress": progress(name or "full forward")}
            if not name:
                record = full_forward(setup, model, **limits)
            else:
                record = cached_decoding(setup, model, name, chunk=chunk, **limits)
                sampled: dict[str, Any] = {"chunk": chunk, "windows": min(windows or 64, 64)}
                record["agreement"] = agreement(setup, model, name, **sampled)
                if per_slot:
                    record["per_slot"] = sensitivity(setup, model, name, **sampled)
            record |= origin
            if (peak := memory.allocator_peak()) is not None:
                record["device_peak_bytes"] = peak
            written_as = f"cached-{name}" if name else "full"
            yield written_as, record  # first: it is known even where it cannot be written
            if windows is None:
                run.write_eval(written_as, record)
