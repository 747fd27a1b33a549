"""A foreign model as all formats are read into, and the run directory that is made of it."""

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cla_jax import checkpoint, files, runs
from cla_jax.config import Config, DataConfig, ModelConfig, Placement
from cla_jax.data import prepare, tokenizers
from cla_jax.interop import names
from cla_jax.interop.names import Tensor
from cla_jax.interop.text import Text
from cla_jax.runs import Run

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Foreign:
    """A model of another library: what it computes, and its tensors under the names of a Llama."""

    # Where it is from; goes into config.json of the run.
    origin: dict[str, Any]
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer_json: str
    # The token that ends a document, as far as the format says.
    end_token: str | None
    # The ids of all tokens that end a text: that of `end_token`, and others.
    end_ids: tuple[int, ...] = ()
    # The token that its tokenizer puts before every text, if it does.
    begins_with: str | None = None
    # The longest context it was made for, if the format says.
    max_length: int | None = None
    # What was found and does not go into the model, for the user to know.
    notes: tuple[str, ...] = ()


def import_run(
    foreign: Foreign,
    path: str | os.PathLike[str],
    text: Text = Text(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Run:
    """Makes a run directory of a foreign model: whole, or none.

    It has a checkpoint at step 0 and the origin in its config; evaluation, generation and export read it
    like any other. Raises ValueError where the model, its tokenizer or the directory do not allow it.
    """
    config = _config(foreign, Path(path), text)
    notes = list(foreign.notes)
    # transformers loads such a model too: nothing makes these ids, and it would fail where something did.
    given, dropped = tokenizers.without_added(foreign.tokenizer_json, config.model.vocab_size)
    if dropped:
        shown = ", ".join(dropped[:4]) + (f" and {len(dropped) - 4} more" if dropped[4:] else "")
        notes.append(
            f"tokens that have no row in the model were removed from its tokenizer: {shown}"
        )
    tokenizer = tokenizers.load(given, config.data.end_token)
    tokenizer.begin(config.data.begin_token)
    if tokenizer.size > config.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} ids, but the model has only vocab_size = "
            f"{config.model.vocab_size} rows: the tokenizer belongs to another model"
        )
    check(foreign)
    tokenizer_json = tokenizer.to_json()
    prepared = prepare.prepared_path(config.data, config.placement.data_dir, tokenizer_json)
    for note in notes:
        log.warning("%s", note)
    if foreign.max_length and config.data.seq_len > foreign.max_length:
        log.warning("the model supports at most %d tokens of context", foreign.max_length)
    with runs.new_run(
        config,
        data_fingerprint=prepared.name,
        tokenizer_json=tokenizer_json,
        origin=foreign.origin
        | {
            "max_length": foreign.max_length,
            "end_ids": [i for i in foreign.end_ids if i < config.model.vocab_size],
            "notes": notes,
        },
    ) as run:
        model = names.to_model(foreign.tensors, config.model, progress)
        saver = checkpoint.Checkpointer(run.checkpoints, config.placement.keep, run.owner)
        try:
            saver.save_model(0, model)
        finally:
            saver.close()  # nothing may still be written when an interrupted import is removed
    return Run(runs.run_path(config))


def check(foreign: Foreign) -> None:
    """Raises ValueError, naming where the model is from, unless its tensors are those of its config."""
    with files.about(foreign.origin.get("path", "the model")):
        names.check(foreign.tensors, foreign.config)


def _config(foreign: Foreign, path: Path, text: Text) -> Config:
    end_token = text.end_token or foreign.end_token
    if end_token is None:
        raise ValueError("the model has no end token (eos_token_id): give one with --end-token")
    begins_with = foreign.begins_with if text.begin_token is None else text.begin_token
    longest = min(1024, foreign.max_length or 1024)
    seq_len = longest if text.seq_len is None else text.seq_len
    model = dataclasses.replace(foreign.config, compute_dtype=text.compute_dtype)
    return Config(
        name=path.name,
        model=model,
        data=DataConfig(
            source=text.source,
            tokenizer="tokenizer.json",  # the run's own
            end_token=end_token,
            # A model may begin and end texts with one token, as all do here that have no other.
            begin_token="" if begins_with in (None, end_token) else begins_with,
            seq_len=seq_len,
        ),
        # Nothing was trained here: what a further training needs is for that to say.
        batch_size=1,
        steps=1,
        placement=Placement(
            runs=str(path.parent),
            data_dir=text.data_dir,
            eval_batch_size=8,
            loss_chunk=math.gcd(256, seq_len) or 1,
        ),
    )
