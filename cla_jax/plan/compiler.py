"""What the compiler says of a step: its memory, collectives and traffic, for devices here or elsewhere.

For devices elsewhere it runs in a process that is ended once the memory is laid out.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import multiprocessing
import os
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax

from cla_jax import budget, chips, files, hlo, machine
from cla_jax.config import Config
from cla_jax.messages import printable
from cla_jax.plan import topologies
from cla_jax.plan.topologies import CUDA, HERE, Topology, asked_of
from cla_jax.session import Layout, plan_layout
from cla_jax.state import named
from cla_jax.step import make_step, option_errors


def compiled_step(layout: Layout, topology: Topology, cache: Path | None) -> dict[str, Any]:
    """What the compiler says of the step of a layout, as JSON has it; from the cache if it is there."""
    lowered = _lower(layout)
    options = layout.config.placement.compiler_options
    versions = [f"{p.metadata['Name']} {p.version}" for p in _compilers()]
    kind = layout.mesh.devices.flat[0].device_kind
    key = _key(lowered.as_text(), str(topology), kind, options, *versions)
    kept = cache and cache / f"{key}.json"
    if kept and kept.exists():
        with contextlib.suppress(ValueError):  # a damaged file costs another compilation
            return files.read_object(kept)
    inputs: dict[str, str] = {}
    for path, leaf in named(layout.state.model).items():
        dims = ",".join(map(str, leaf.sharding.shard_shape(leaf.shape)))
        dtype = _HLO_TYPES.get(leaf.dtype.name, leaf.dtype.name)
        # The first of its shape; gradients and moments are of that shape too.
        inputs.setdefault(f"{dtype}[{dims}]", f"{path}, its gradient, moments, or one like it")
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        started = time.monotonic()
        if topology.name == HERE:
            peak, fits = _compile(lowered, dump, options)
        else:
            peak, fits = _compile_apart(layout.config, topology, dump)
        seconds = time.monotonic() - started
        text = hlo.find(dump, "after_optimizations.txt")
        assert text or not fits, "the compiler wrote nothing"
        report = hlo.find(dump, REPORT)
    collectives = hlo.collectives(text)
    record = {
        "peak": peak,
        "fits": fits,
        "collective_bytes": hlo.by_kind((each.kind, each.bytes) for each in collectives),
        "network_bytes": hlo.network_bytes(collectives, topology.per_host)
        if topology.per_host
        else {},
        "traffic": dataclasses.asdict(hlo.memory_traffic(text)),
        "buffers": [dataclasses.asdict(b) for b in hlo.largest_buffers(report, text, inputs)],
        "seconds": seconds,
    }
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")  # several plans at once
        partial.write_text(json.dumps(record))
        partial.replace(kept)
    return record


def _key(*asked: str) -> str:
    """The name in the cache of an answer to what was asked. An answer is made by the compiler and by the code
    of these modules: how a topology is described, how it is compiled, what is read from the program."""
    modules = (chips.__file__, topologies.__file__, __file__, hlo.__file__)
    made_by = (Path(str(file)).read_bytes() for file in modules)
    words = [text.encode() for text in asked]
    return hashlib.sha256(b"\n".join([*words, *made_by])).hexdigest()[:24]


def _lower(layout: Layout) -> Any:
    with jax.set_mesh(layout.mesh), asked_of(list(layout.mesh.devices.flat)):
        return make_step(layout).lower(*layout.inputs)


def _compilers() -> list[importlib.metadata.Distribution]:
    distributions = (
        importlib.metadata.distributions(name=name) for name in ("jaxlib", "libtpu", *CUDA)
    )
    return [distribution for several in distributions for distribution in several]


_HLO_TYPES = {"float32": "f32", "bfloat16": "bf16", "int32": "s32"}


# What a compiler writes when it has laid out the memory, and what comes last before it generates code.
REPORT = "memory-usage-report.txt"
LAST_OF_TPU = "after_optimizations_after_buffer_assignment.txt"
_LAST_OF_GPU = ".debug_options"


def _compile_apart(config: Config, topology: Topology, dump: Path) -> tuple[int, bool]:
    """`_compile`, for devices elsewhere, as far as a plan needs it. It runs in a process that is ended when
    code generation begins, because that takes four fifths of the time."""
    last = _LAST_OF_GPU if topology.per_host else LAST_OF_TPU
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit jax's threads, dead
    receiver, sender = spawn.Pipe(duplex=False)
    arguments = (config, topology.name, topology.slices, dump, sender)
    compiler = spawn.Process(target=_compile_for, args=arguments, daemon=True)
    with tempfile.TemporaryFile() as said, contextlib.ExitStack() as ended:
        # Compilers complain, past Python, that the accelerator is not here.
        with machine.stderr_to(said):
            compiler.start()
        ended.callback(compiler.join)
        ended.callback(compiler.kill)
        sender.close()  # its end is then the end of the pipe
        while not receiver.poll(0.1):
            if hlo.find(dump, last) and hlo.find(dump, REPORT):
                return hlo.allocated_bytes(hlo.find(dump, REPORT)), True
        try:
            outcome = receiver.recv()
        except EOFError:
            compiler.join()
            said.seek(0)
            lines = said.read().decode(errors="replace").splitlines()
            raise ChildProcessError(
                f"the compiler died with exit code {compiler.exitcode}; -9 means that this machine has too "
                f"little memory for it. Its last output: {printable(lines[-1] if lines else 'none')}"
            ) from None
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _compile_for(config: Config, name: str, slices: int, dump: Path, outcome: Any) -> None:
    """The process of `_compile_apart`: hands over (peak, fits), or what was raised."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        layout = plan_layout(config, topologies.topology(name, slices).devices)
        result = _compile(_lower(layout), dump, config.placement.compiler_options)
    except ValueError as error:
        result = error
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        result = ValueError(refusal(name, str(error)))
    outcome.send(result)


def refusal(topology: str, message: str) -> str:
    """What a compiler said that took no program, on one line, and what may help."""
    first = next((line for line in message.splitlines() if line.strip()), "no reason given")
    remedy = (
        "--placement.attention xla does without this kernel"
        if re.search("cudnn|attention|splash|mosaic|head dim", message, re.IGNORECASE)
        else "another version of jax and its plugins may take it"
    )
    return f"the compiler for {topology} rejected the program: {printable(first)}; {remedy}"


def _end_with_parent() -> None:
    """Whoever asked may be killed; nobody would then end the compiler before it has done all its work."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _compile(lowered: Any, dump: Path, asked: str = "") -> tuple[int, bool]:
    """Bytes that the program takes on a device, and whether they fit. `asked` are the user's options."""
    try:
        with option_errors(asked):
            compiled = lowered.compile(compiler_options={"xla_dump_to": os.fspath(dump)})
    except jax.errors.JaxRuntimeError as error:
        if peak := needed_bytes(str(error)):
            return peak, False
        raise
    # Not its peak of live bytes: allocated is what the layout of the memory takes, gaps included.
    size = budget.program_bytes(compiled)
    assert size is not None  # the compilers of TPUs and GPUs say it
    return size, True


def needed_bytes(message: str) -> int | None:
    """What the compiler says a program that does not fit would need; None if it says something else."""
    match = re.search(
        r"(?:Used |temporaries \()([0-9.]+)([KMGT])\)? (?:of|exceeds).*?(?:hbm|HBM)", message
    )
    if match is None:
        return None
    return round(float(match[1]) * 2 ** (10 * ("KMGT".index(match[2]) + 1)))
