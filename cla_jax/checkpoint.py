"""Checkpoints that are known to be whole.

    checkpoints/00000100/        orbax, written asynchronously and committed by a rename
    checkpoints/00000100.json    manifest: step, number and identity of the run, sizes and SHA-256 of its
                                 files, shapes of its arrays

Orbax restores a flipped byte without an error. So a checkpoint counts only if it has a manifest, which is
written after the commit. Every load verifies its files, its step and its run. One that is not is set aside
under another name, never deleted. A directory without a manifest was interrupted and is ignored. It is
removed, as older checkpoints are, only after a newer manifest is written.
"""

import concurrent.futures
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from orbax.checkpoint import v1 as ocp

from cla_jax import files
from cla_jax.directories import (
    check_links,
    is_local,
    remove_partial,
    set_aside,
    write_atomically,
)
from cla_jax.mesh import AxisRules
from cla_jax.messages import printable
from cla_jax.model.transformer import Transformer
from cla_jax.runs import Owner, Run
from cla_jax.runs import saved_steps as steps
from cla_jax.seals import digest
from cla_jax.state import State, named, with_layout, with_named

log = logging.getLogger(__name__)


class Checkpointer:
    """Saves in the background, one checkpoint at a time; an error surfaces at the next call."""

    def __init__(
        self,
        directory: epath.Path,
        keep: int,
        owner: Owner | None = None,
        on_saved: Callable[[int], None] = lambda step: None,
    ):
        """Makes one for a directory.

        Args:
          directory: `checkpoints` of a run.
          keep: how many of the newest checkpoints stay.
          owner: the run that they belong to.
          on_saved: called with its step as soon as a checkpoint is whole, in another thread.
        """
        self.directory = directory
        self.keep = keep
        self.owner = owner
        self.on_saved = on_saved
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: concurrent.futures.Future | None = None

    def save(self, state: State) -> None:
        """Starts saving; returns when the arrays have left the device, so the state may be donated."""
        self._save(int(state.step), _parts(state))

    def save_model(self, step: int, model: Transformer) -> None:
        """Like `save`, of a model without a training state: training begins with it."""
        self._save(step, {"model": named(model)})

    def _save(self, step: int, parts: dict[str, dict[str, Any]]) -> None:
        self.wait()
        path = self.directory / f"{step:08d}"
        if _manifest(path).exists():
            problem = _foreign(path, self.owner)
            if problem is None:
                return
            if jax.process_index() == 0:
                log.warning("%s", problem)
                _set_aside(path)
        if files.exists(path) and jax.process_index() == 0:
            if path.is_dir():
                log.warning("removing %s, which was interrupted while it was written", path)
                path.rmtree()
            else:
                _set_aside(path)
        saving = ocp.save_checkpointables_async(_absolute(path), parts)
        arrays = {
            k: [list(a.shape), str(a.dtype)] for part in parts.values() for k, a in part.items()
        }
        self._pending = self._thread.submit(self._finish, saving, path, arrays)

    def wait(self) -> None:
        """Blocks until the checkpoint under way is whole; raises what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        self.wait()
        self._thread.shutdown()

    def _finish(self, saving: Any, path: epath.Path, arrays: dict[str, Any]) -> None:
        saving.result()
        if jax.process_index() != 0:
            return
        checksums = {str(file.relative_to(path)): _checksum(file) for file in _files(path)}
        # Orbax lists the arrays in this file.
        if not any(name.endswith("/manifest.ocdbt") for name in checksums):
            raise ValueError(
                f"{path} contains no arrays: the checkpoint was written to another place"
            )
        manifest = {"step": int(path.name), "files": checksums, "arrays": arrays}
        if self.owner is not None:
            manifest |= {"run": self.owner.run, "identity": self.owner.identity}
        manifest["checksum"] = digest(manifest)
        write_atomically(_manifest(path), json.dumps(manifest, indent=1))
        self.on_saved(manifest["step"])
        for step in steps(self.directory)[: -self.keep]:
            old = self.directory / f"{step:08d}"
            if problem := _foreign(old, self.owner):
                log.warning("%s", problem)
                _set_aside(old)
                continue
            _manifest(old).unlink()  # first: what has no manifest does not count
            old.rmtree()
        remove_partial(self.directory)
        for left in _interrupted(self.directory):
            log.warning("removing %s, which was interrupted while it was written", left)
            left.rmtree()


def report_missing_records(run: Run) -> None:
    """Warns of records that a run no longer has; renames a checkpoint whose manifest is missing.

    Raises ValueError if no checkpoint is left of those that were saved: only the user may begin again.
    """
    missing = run.missing_records()
    if missing.checkpoint is not None and not steps(run.checkpoints):
        raise ValueError(
            f"{'; '.join(missing.problems)}: restore it from a copy, or remove {run.path} to train from the "
            "beginning"
        )
    for problem in missing.problems:
        log.warning("%s", problem)
    if missing.checkpoint is not None and jax.process_index() == 0:
        _set_aside(run.checkpoints / f"{missing.checkpoint:08d}")


def restore_latest(
    directory: epath.Path, abstract: State, owner: Owner | None = None
) -> State | None:
    """The newest checkpoint that verifies, in the layout of `abstract`; None if none was ever saved.

    Of one that holds a model alone, the moments are empty.

    One that is damaged or of another run is reported, set aside as STEP.damaged with its manifest, and the
    one before it used. Raises ValueError if no checkpoint is left, or if the arrays are not those of
    `abstract`.
    """
    return _restore(directory, owner, lambda path: _load(path, abstract), keep_aside=True)


def load_model(run: Run, rules: AxisRules, mesh: Mesh) -> tuple[int, Transformer]:
    """(step, model) of a run's newest checkpoint that verifies, on any mesh; changes nothing.

    The optimizer is not read, nor is damage to it looked for. Raises ValueError if there is no
    checkpoint that can be trusted.
    """
    run.check_saved()
    for problem in run.missing_records().problems:
        log.warning("%s", problem)
    owner, config = run.owner, run.config().model
    shapes = jax.eval_shape(lambda: Transformer(jax.random.key(0), config))
    abstract = with_layout(shapes, rules, mesh)

    def load(path: epath.Path) -> tuple[int, Transformer]:
        arrays = _load_parts(path, {"model": named(abstract)})["model"]
        return int(path.name), with_named(abstract, arrays)

    return _restore(run.checkpoints, owner, load, keep_aside=False, unread="training")


def fingerprint(run: Run, step: int) -> str:
    """Tells a checkpoint from another one of the same step: of its files' checksums."""
    return digest(_read_manifest(run.checkpoints / f"{step:08d}"))


def weights_fingerprint(model: Transformer) -> str:
    """Tells weights from others, wherever and however they are stored. Each array is read to the host."""
    hashed = hashlib.sha256()
    for name, array in sorted(named(model).items()):
        if not array.is_fully_addressable:  # parts of it are on other hosts
            array = multihost_utils.process_allgather(array, tiled=True)
        array = np.asarray(array)
        hashed.update(f"{name} {array.dtype} {array.shape}\n".encode())
        hashed.update(array.tobytes())
    return hashed.hexdigest()


def _restore(
    directory: epath.Path,
    owner: Owner | None,
    load: Any,
    *,
    keep_aside: bool,
    unread: str | None = None,
) -> Any:
    damaged: dict[epath.Path, str] = {}
    for step in reversed(steps(directory)):
        path = directory / f"{step:08d}"
        problem = verify(path, unread, owner)
        if problem is None:
            restored = load(path)
            if owner is not None and not _read_manifest(path).get("run"):
                log.warning(
                    "%s is from an older version, whose checkpoints do not identify their run: changes of "
                    "config.json cannot be detected",
                    path,
                )
            # Only now that a good one is loaded: otherwise the next start would begin from nothing.
            if keep_aside and jax.process_index() == 0:
                for bad in damaged:
                    _set_aside(bad)
            return restored
        damaged[path] = problem
        log.warning("%s; trying an earlier checkpoint", problem)
    if damaged:
        raise ValueError(
            f"no intact checkpoint is left: {'; '.join(damaged.values())}. Restore one from a copy; or "
            f"remove {directory.parent} and train the run again"
        )
    return None


def verify(path: epath.Path, unread: str | None = None, owner: Owner | None = None) -> str | None:
    """What is wrong with a checkpoint, naming the file; None if it is as it was written, by `owner`.

    A part that is not going to be read is left out.
    """
    if problem := _foreign(path, owner):
        return problem
    try:
        _verify_files(path, _read_manifest(path)["files"], unread)
    except ValueError as error:
        return str(error)
    return None


def _verify_files(path: epath.Path, listed: dict[str, Any], unread: str | None) -> None:
    """Raises ValueError, naming the file, unless all files that a manifest lists are as they were written."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"checkpoint {path} is not a directory")
    present = {
        str(file.relative_to(path)): file for file in (_files(path) if path.exists() else [])
    }
    for name, expected in listed.items():
        if name.split("/")[0] == unread:
            continue
        if name not in present:
            raise ValueError(f"checkpoint file {path / name} is missing")
        actual = _checksum(present[name])
        if actual["bytes"] != expected["bytes"]:
            raise ValueError(
                f"checkpoint file {path / name} has {actual['bytes']} bytes instead of "
                f"{expected['bytes']}"
            )
        if actual != expected:
            raise ValueError(
                f"checkpoint file {path / name} was altered: its checksum does not match"
            )


def _foreign(path: epath.Path, owner: Owner | None) -> str | None:
    """Why a manifest cannot be that of its name and of the run; None if it is."""
    try:
        manifest = _read_manifest(path)
        difference = owner.difference(manifest) if owner else ""
    except ValueError as error:
        return str(error)
    saved = manifest.get("step", int(path.name))
    if saved != int(path.name):
        return f"checkpoint manifest {_manifest(path)} belongs to step {saved}: it was moved"
    if difference:
        return f"checkpoint {path} belongs to another run: {difference}"
    return None


def _parts(state: State) -> dict[str, dict[str, jax.Array]]:
    """What is saved: the model apart, so that an evaluation need not read the optimizer."""
    return {
        "model": named(state.model),
        "training": named({"step": state.step, "moments": state.moments}),
    }


def _load(path: epath.Path, abstract: State) -> State:
    wanted = _parts(abstract)
    if "step" not in _read_manifest(path)["arrays"]:  # `save_model` made it
        del wanted["training"]
    parts = _load_parts(path, wanted)
    if "training" not in parts:
        step = jax.numpy.asarray(int(path.name), abstract.step.dtype)
        return State(step=step, model=with_named(abstract.model, parts["model"]), moments=())
    training = with_named({"step": abstract.step, "moments": abstract.moments}, parts["training"])
    return State(
        step=training["step"],
        model=with_named(abstract.model, parts["model"]),
        moments=training["moments"],
    )


def _load_parts(path: epath.Path, abstract: dict[str, dict[str, Any]]) -> dict[str, dict]:
    saved = _read_manifest(path)["arrays"]
    for part in abstract.values():
        for name, leaf in part.items():
            if saved.get(name) != [list(leaf.shape), str(leaf.dtype)]:
                raise ValueError(
                    f"{path}: array {name} is {saved.get(name, 'missing')}, but the config needs "
                    f"{[list(leaf.shape), str(leaf.dtype)]}"
                )
    return ocp.load_checkpointables(_absolute(path), abstract)


def _interrupted(directory: epath.Path) -> list[epath.Path]:
    """What a kill left of saving or of removing a checkpoint; orbax writes beside the final name."""
    name = re.compile(r"\d{8}(\.orbax-checkpoint-tmp.*)?")
    whole = {f"{step:08d}" for step in steps(directory)}
    return [
        path
        for path in directory.iterdir()
        if name.fullmatch(path.name) and path.name not in whole and path.is_dir()
    ]


def _set_aside(path: epath.Path) -> None:
    """Keeps what cannot be trusted for inspection, out of the way of the one saved in its place."""
    # The manifest first: without it, the directory does not count.
    there = [each for each in (_manifest(path), path) if files.exists(each)]
    renamed = [f"{each.name} to {set_aside(each, 'damaged').name}" for each in there]
    if renamed:
        log.warning("%s: renamed %s", path.parent, " and ".join(renamed))


def _absolute(path: epath.Path) -> epath.Path:
    """Orbax takes no relative paths."""
    return epath.Path(os.path.abspath(path)) if is_local(path) else path


def _manifest(path: epath.Path) -> epath.Path:
    return path.parent / f"{path.name}.json"


def _read_manifest(path: epath.Path) -> dict[str, Any]:
    """Raises ValueError if it is damaged."""
    file = _manifest(path)
    try:
        manifest = files.read_object(file, links=False)
        # Those written before manifests had a checksum name no run, and are taken as they are.
        checksum = manifest.pop("checksum", None)
        intact = "run" not in manifest if checksum is None else checksum == digest(manifest)
        whole = all(set(sizes) == {"bytes", "sha256"} for sizes in manifest["files"].values())
        whole = whole and isinstance(manifest["arrays"], dict)
    except (OSError, ValueError) as error:
        why = printable(error)
    except (KeyError, TypeError, AttributeError):
        why = "it does not list files and arrays"
    else:
        why = None
    if why is not None:
        raise ValueError(f"checkpoint manifest {file} is not readable: {why}")
    if not (intact and whole):
        raise ValueError(f"checkpoint manifest {file} was altered")
    return manifest


def _files(path: epath.Path) -> list[epath.Path]:
    """All files below a directory. Raises ValueError for a link among them."""
    check_links(path)
    children = sorted(path.iterdir())  # epath has no recursive glob
    is_folder = lambda child: child.is_dir() and not (is_local(child) and os.path.islink(child))
    return [f for child in children for f in (_files(child) if is_folder(child) else [child])]


def _checksum(file: epath.Path) -> dict[str, Any]:
    hashed, size = hashlib.sha256(), 0
    with files.opened(file, links=False) as stream:
        while chunk := stream.read(1 << 22):
            hashed.update(chunk)
            size += len(chunk)
    return {"bytes": size, "sha256": hashed.hexdigest()}
