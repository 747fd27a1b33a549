"""What a training run will need on a pod or a GPU cluster, before there is one: its real step, compiled for
the topology.

TPU programs are compiled by libtpu and GPU programs by jax's CUDA plugin, both on any machine. Beside the
compiler's figures stand our own: what the closed forms say, at once and for any layout. Where the two
disagree, one of them is wrong, and worth a look.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax import chips, costs, files, hlo, machine
from cla_jax.config import Config
from cla_jax.mesh import row_shards
from cla_jax.messages import printable
from cla_jax.model import splash
from cla_jax.session import Layout, plan_layout
from cla_jax.state import named
from cla_jax.step import make_step, option_errors

# ------------------------------------------------------------------------------------ topologies

_MEGACORE: dict[str, Any] = {
    "chip_config_name": "megacore",  # two cores as one device, as jax runs them
    "chips_per_host_bounds": (2, 2, 1),
}
# Where libtpu has another name or needs options.
_LIBTPU_NAMES = {"v7x": "tpu7x"}
_LIBTPU_OPTIONS = {"v4": _MEGACORE}


HERE = "here"  # the devices at hand


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to compile for, which need not be at hand."""

    name: str  # `v5e:16x16`, `h100:16x8`, or `here` for those at hand
    slices: int
    devices: Sequence[Any]
    per_host: int = 0  # GPUs that NVLink joins; 0 for TPUs, and where it is not known

    def __str__(self) -> str:
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"


def topology(name: str, slices: int = 1) -> Topology:
    """The devices of `v5e:16x16`, `h100:16x8` and so on, several slices of it, or those `here`.

    Raises ValueError for a topology that does not exist, and if its compiler is not installed. In the
    environment should stand what keeps compilers from looking for accelerators here (`launch.plan` sees to
    it).
    """
    if name == HERE:
        return Topology(name, 1, jax.devices())
    kind, _, shape = name.partition(":")
    chips.check_topology(name)
    if chips.is_gpu(name):
        return _gpus(name, slices)
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ValueError(
            "compiling for a TPU needs libtpu: pip install -e '.[plan]' in the repository"
        ) from None
    from jax.experimental import topologies

    with machine.stderr_to_nowhere():
        found = topologies.get_topology_desc(
            platform="tpu",
            topology_name=f"{_LIBTPU_NAMES.get(kind, kind)}:{shape}",
            wrap=chips.wrap(name),
            **_LIBTPU_OPTIONS.get(kind, {}),
            **({"num_slices": slices} if slices > 1 else {}),
        )
    return Topology(name, slices, found.devices)


# What compiles for GPUs: jax's plugin for CUDA with the runtime that holds XLA, and cuDNN, which says how
# much memory its kernels take.
_CUDA = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "nvidia-cudnn-cu12")


def _gpus(name: str, slices: int) -> Topology:
    missing = [package for package in _CUDA if not _installed(package)]
    if missing:
        raise ValueError(
            f"compiling for a GPU needs {', '.join(missing)}: pip install -e '.[plan-gpu]' in the repository"
        )
    hosts, per_host = chips.gpu_shape(name)
    from jax.experimental import topologies

    with machine.stderr_to_nowhere():
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=chips.gpu_target(name.partition(":")[0]),
            topology=f"1x{hosts * slices}x{per_host}",
        )
    return Topology(name, slices, found.devices, per_host)


def _installed(package: str) -> bool:
    return bool(list(importlib.metadata.distributions(name=package)))


@contextlib.contextmanager
def _asked_of(devices: Sequence[Any]) -> Iterator[None]:
    """Has jax judge what cuDNN takes by the devices that are compiled for; it asks those at hand."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    capability = getattr(devices[0], "compute_capability", None)
    if capability is None or devices[0] in jax.local_devices():
        yield
        return
    numbers = lambda text: tuple(map(int, text.split(".")))
    ours = {
        "check_compute_capability": lambda least: numbers(capability) >= numbers(least),
        "is_cuda_compute_capability_equal": lambda exact: numbers(capability) == numbers(exact),
    }
    theirs = {name: getattr(cudnn, name) for name in ours}
    try:
        for name, check in ours.items():
            setattr(cudnn, name, check)
        yield
    finally:
        for name, check in theirs.items():
            setattr(cudnn, name, check)


# ------------------------------------------------------------------------------------ estimate


# Arrays of the compute dtype that the backward pass of an MLP holds at once:
_FF = 4  # [tokens, F]: activated and not, the gradients of gate and up
_EMBED = (
    3  # [tokens, D]: the residual stream before the MLP, the gradients behind it and of its input
)
_HEADS = 2  # [tokens, Q]: queries and output of the attention before it, recomputed already


def estimate(layout: Layout) -> dict[str, int]:
    """Bytes of a device at the peak of a step, by what they are for, in closed form.

    The peak is in the loss or in the backward pass of the last block's MLP, whichever holds more: all that
    the forward pass left is still there. Of the state the bytes are exact. Gaps between buffers are not
    counted. Attention is that of a kernel: the scores of the XLA backend are added, roughly.
    """
    config, model, options = layout.config, layout.config.model, layout.options
    width = jnp.dtype(model.compute_dtype).itemsize
    per_device = {name: _shard_bytes(leaf) for name, leaf in named(layout.state).items()}
    parameters = sum(size for name, size in per_device.items() if name.startswith("model."))

    tensor = layout.mesh.shape["model"]
    split = lambda axis, size: size // tensor if getattr(options.rules, axis) else size
    D, F, V = model.d_model, split("ff", model.d_ff), split("vocab", model.vocab_size)
    heads = split("kv_heads", split("q_groups", model.n_heads))
    Q = heads * model.query_width
    KV = split("kv_heads", model.n_kv_heads) * sum(model.kept_widths)
    made = split("kv_heads", model.kv_elements)  # over all layers
    tokens = _rows(layout) * config.data.seq_len
    on_cpu = layout.mesh.devices.flat[0].platform == "cpu"
    chunk = _rows(layout) * min(config.placement.loss_chunk, config.data.seq_len)

    # Left by the forward pass, in arrays of the compute dtype: what enters each block; also what its matrix
    # products give; and attention. On a CPU everything, of which norms and SwiGLU are in float32.
    entry = D // tensor if layout.training.rules.sequence else D
    left = {
        "block": entry,
        "attention": entry + Q,
        "dots": 2 * D + Q + 2 * F,
        "none": 4 * D + 4 * Q + 10 * F if on_cpu else 2 * D + 2 * Q + 2 * F,
    }[options.remat]
    saved = (model.n_layers * left + made) * tokens * width
    block = (_FF * F + _EMBED * D + _HEADS * Q) * tokens * width
    if options.attention == "splash":  # its sums are float32, in tiles of as many lanes
        block += heads * splash.LANES * tokens * 4
    if options.attention == "xla":
        scores_of_attention = 3 * _rows(layout) * heads * config.data.seq_len**2 * 4
        block += scores_of_attention
        saved += scores_of_attention * (model.n_layers if options.remat == "none" else 0)
    # Of the MLP the weights and their gradients; of attention the weights, which are read next.
    gathered = (2 * D * Q + D * KV + 2 * 3 * D * F) * width
    # The loss holds a device's own sum of the head's gradient, float32, the head, a chunk's scores, and the
    # hidden states before and after the norm with their gradients; the backward pass of the blocks begins
    # when they are gone.
    loss = V * D * (4 + width) + chunk * V * 4 + 3 * D * tokens * width
    return {
        "parameters": parameters,
        "optimizer": sum(per_device.values()) - parameters,
        # Two while they are added up.
        "gradients": parameters * (1 if config.placement.accumulate == 1 else 2),
        "activations": round(saved + block),
        "logits": round(max(0, loss - block - gathered)),
        "gathered weights": round(gathered),
    }


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


# ---------------------------------------------------------------------------------------- plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a step needs on each device. Bytes and seconds, unless said otherwise."""

    name: str
    topology: str
    devices: int
    device_kind: str
    mesh: dict[str, int]
    attention: str
    remat: str
    accumulate: int
    rows: int  # sequences of a device in a microbatch
    fits: bool
    memory: float | None  # of a device; None where it is not known
    peak: int  # by the compiler
    parts: dict[str, int]  # of the peak; parameters and optimizer exact, the others by our estimate
    estimate: int  # our closed forms, together
    flops: float  # of a step on all devices, by `costs.train_flops_per_token`
    recomputed_flops: float  # on top of them, by rematerialisation
    collective_bytes: dict[str, int]  # a step hands each device, by kind
    network_bytes: dict[str, int]  # of GPUs: a step takes through the network port of each, by kind
    traffic: int  # a step moves to and from the main memory of each device
    copied: int  # of these, only to change the layout of an array
    roofline: dict[str, float]  # seconds of a step that each resource takes, if nothing else did
    buffers: tuple[hlo.Buffer, ...]  # the largest
    advice: str  # where it does not fit: what to change first
    compile_seconds: float

    @property
    def step_seconds(self) -> float | None:
        """The least a step can take: the slowest resource, everything else hidden behind it."""
        return max(self.roofline.values(), default=None)

    def mfu(self) -> float | None:
        """The most that can be reached: useful FLOPs over what the devices could do in that time."""
        chip = chips.find(self.device_kind)
        if chip is None or self.step_seconds is None:
            return None
        return self.flops / (self.step_seconds * chip.flops * self.devices)

    @property
    def links(self) -> str:
        """What joins the devices of a host or a slice."""
        chip = chips.find(self.device_kind)
        return chip.links if chip else "interconnect"

    @property
    def on_gpus(self) -> bool:
        """Whether the devices are GPUs whose figures are known."""
        chip = chips.find(self.device_kind)
        return chip is not None and chip.is_gpu

    @property
    def elsewhere(self) -> bool:
        """Whether the step was compiled for devices that are not at hand."""
        return self.topology != HERE

    @property
    def chips(self) -> int:
        """What is bought; jax may see several devices of a chip."""
        chip = chips.find(self.device_kind)
        return self.devices // (chip.devices if chip else 1)

    def days(self, steps: int, mfu: float | None = None) -> float | None:
        """Of so many steps, at an MFU that is assumed, or else the least they can take."""
        chip = chips.find(self.device_kind)
        if chip is None or self.step_seconds is None:
            return None
        seconds = self.flops / (mfu * chip.flops * self.devices) if mfu else self.step_seconds
        return steps * seconds / 86_400


class DoesNotFit(ValueError):
    """The compiler found that the program needs more memory than a device has."""


def plan(config: Config, topology: Topology, cache: Path | None = None) -> Plan:
    """Compiles the step of a config for a topology, and says what it needs.

    What the compiler said is kept in `cache`, if that is given, under the program's own text: a config that
    changes nothing in the program is not compiled again. Raises ValueError, before compiling, where the
    mesh or the batch does not fit the devices; ChildProcessError if the compiler was killed.
    """
    layout = plan_layout(config, topology.devices)
    kind = topology.devices[0].device_kind
    chip = chips.find(kind)
    estimated = estimate(layout)
    compiled = _compiled(layout, topology, cache)
    # The compilers of GPUs and CPUs do not mind a program that does not fit.
    fits = compiled["fits"] and (chip is None or compiled["peak"] <= chip.memory)
    model, tokens = config.model, config.tokens_per_step
    flops = costs.train_flops_per_token(model, config.data.seq_len) * tokens
    recomputed = _recomputed_flops(config, layout.options.attention) * tokens
    return Plan(
        name=config.name,
        topology=str(topology),
        devices=len(topology.devices),
        device_kind=kind,
        mesh=dict(layout.mesh.shape),
        attention=layout.options.attention,
        remat=config.placement.remat,
        accumulate=config.placement.accumulate,
        rows=_rows(layout),
        fits=fits,
        memory=chip.memory if chip else None,
        peak=compiled["peak"],
        parts=estimated | {"rest": compiled["peak"] - sum(estimated.values())},
        estimate=sum(estimated.values()),
        flops=flops,
        recomputed_flops=recomputed,
        collective_bytes=compiled["collective_bytes"],
        network_bytes=compiled["network_bytes"],
        traffic=compiled["traffic"]["total"],
        copied=compiled["traffic"]["copies"],
        roofline=_roofline(layout, chip, flops + recomputed, compiled),
        buffers=tuple(hlo.Buffer(**buffer) for buffer in compiled["buffers"]),
        advice="" if fits else _advice(layout),
        compile_seconds=compiled["seconds"],
    )


def _compiled(layout: Layout, topology: Topology, cache: Path | None) -> dict[str, Any]:
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
        report = hlo.find(dump, _REPORT)
    collectives = hlo.collectives(text)
    found = {
        "peak": peak,
        "fits": fits,
        "collective_bytes": hlo.by_kind((found.kind, found.bytes) for found in collectives),
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
        partial.write_text(json.dumps(found))
        partial.replace(kept)
    return found


def _key(*asked: str) -> str:
    """The name in the cache of an answer to what was asked. An answer is made by the compiler and by the code
    of these three modules: how a topology is described, how it is compiled, what is read from the program."""
    made_by = (
        Path(str(module)).read_bytes() for module in (chips.__file__, __file__, hlo.__file__)
    )
    words = [text.encode() for text in asked]
    return hashlib.sha256(b"\n".join([*words, *made_by])).hexdigest()[:24]


def _lower(layout: Layout) -> Any:
    with jax.set_mesh(layout.mesh), _asked_of(list(layout.mesh.devices.flat)):
        return make_step(layout).lower(*layout.inputs)


def _compilers() -> list[importlib.metadata.Distribution]:
    found = (importlib.metadata.distributions(name=name) for name in ("jaxlib", "libtpu", *_CUDA))
    return [distribution for named in found for distribution in named]


_HLO_TYPES = {"float32": "f32", "bfloat16": "bf16", "int32": "s32"}


def _rows(layout: Layout) -> int:
    return layout.batch.shape[1] // row_shards(layout.mesh)


# What a compiler writes when it has laid out the memory, and what comes last before it generates code.
_REPORT = "memory-usage-report.txt"
_LAST_OF_TPU = "after_optimizations_after_buffer_assignment.txt"
_LAST_OF_GPU = ".debug_options"


def _compile_apart(config: Config, topology: Topology, dump: Path) -> tuple[int, bool]:
    """`_compile`, for devices elsewhere, as far as a plan needs it: in a process that is ended where code
    generation begins, which takes four fifths of the time."""
    last = _LAST_OF_GPU if topology.per_host else _LAST_OF_TPU
    spawn = multiprocessing.get_context("spawn")  # a fork would inherit jax's threads, dead
    ours, theirs = spawn.Pipe(duplex=False)
    arguments = (config, topology.name, topology.slices, dump, theirs)
    compiler = spawn.Process(target=_compile_for, args=arguments, daemon=True)
    with tempfile.TemporaryFile() as said, contextlib.ExitStack() as ended:
        # Compilers complain, past Python, that the accelerator is not here.
        with machine.stderr_to(said):
            compiler.start()
        ended.callback(compiler.join)
        ended.callback(compiler.kill)
        theirs.close()  # its end is then the end of the pipe
        while not ours.poll(0.1):
            if hlo.find(dump, last) and hlo.find(dump, _REPORT):
                return hlo.allocated_bytes(hlo.find(dump, _REPORT)), True
        try:
            outcome = ours.recv()
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
        layout = plan_layout(config, topology(name, slices).devices)
        found = _compile(_lower(layout), dump, config.placement.compiler_options)
    except ValueError as error:
        found = error
    except (NotImplementedError, jax.errors.JaxRuntimeError) as error:
        found = ValueError(refusal(name, str(error)))
    outcome.send(found)


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
    analysis = compiled.memory_analysis()
    # Not its peak of live bytes: allocated is what the layout of the memory takes, gaps included.
    return (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        - analysis.alias_size_in_bytes
        + analysis.temp_size_in_bytes
    ), True


def needed_bytes(message: str) -> int | None:
    """What the compiler says a program that does not fit would need; None if it says something else."""
    match = re.search(
        r"(?:Used |temporaries \()([0-9.]+)([KMGT])\)? (?:of|exceeds).*?(?:hbm|HBM)", message
    )
    if match is None:
        return None
    return round(float(match[1]) * 2 ** (10 * ("KMGT".index(match[2]) + 1)))


def _recomputed_flops(config: Config, kernel: str) -> float:
    """FLOPs for one token that rematerialisation adds: a forward pass of the blocks, or of attention."""
    model = config.model
    count = costs.parameters(model)
    head = model.vocab_size * model.d_model
    forward = costs.train_flops_per_token(model, config.data.seq_len) / 3
    matrices = 2.0 * (count.non_embedding + (head if model.tied_embeddings else count.head))
    attention = forward - matrices
    return {
        "none": 0.0,
        "dots": attention,
        # Kernels return all that their backward pass needs.
        "attention": 2.0 * count.non_embedding + (attention if kernel == "xla" else 0.0),
        "block": 2.0 * count.non_embedding + attention,
    }[config.placement.remat]


def _roofline(
    layout: Layout, chip: chips.Chip | None, flops: float, compiled: dict[str, Any]
) -> dict[str, float]:
    """Seconds of a step in which each resource would do its part alone; empty for an unknown chip."""
    if chip is None:
        return {}
    seconds = {
        "compute": flops / (layout.mesh.size * chip.flops),
        "HBM": compiled["traffic"]["total"] / chip.bandwidth,
    }
    over_network = sum(compiled["network_bytes"].values())
    if chip.interconnect:
        received = sum(compiled["collective_bytes"].values()) - over_network
        seconds[chip.links] = received / chip.interconnect
    slices = layout.mesh.shape["slice"]
    if over_network:
        seconds["network"] = over_network / chip.network
    elif slices > 1 and chip.network and layout.mesh.devices.flat[0].platform == "tpu":
        # Every device adds up its shard of the gradients with its counterparts on the other slices.
        gradients = costs.training_bytes(layout.config.model).gradients
        within = layout.mesh.size // slices
        seconds["network"] = 2 * gradients * (slices - 1) / slices / within / chip.network
    return seconds


def _advice(layout: Layout) -> str:
    placement = layout.config.placement
    if placement.remat != "block":
        return "set placement.remat = block, which recomputes blocks in the backward pass"
    if _rows(layout) % 2 == 0:
        return f"set placement.accumulate = {2 * placement.accumulate}, which halves the microbatch"
    return "use more chips, or placement.mesh.model above 1"


# -------------------------------------------------------------------------------------- search

MAX_COMPILATIONS = 3
RECOMPUTES = ("none", "dots", "attention", "block")  # values of placement.remat, the cheapest first


def search(config: Config, topology: Topology, cache: Path | None = None) -> tuple[Plan, int]:
    """The fastest placement that fits: microbatch and rematerialisation; and how many compilations it took.

    Candidates are ordered by what they recompute and how often they gather weights, and then by
    microbatch, the largest first. Our estimate says which of them fits; the compiler is asked, and corrects
    the estimate where it disagrees, up and down. Raises DoesNotFit, a ValueError, if nothing does.
    """
    devices = topology.devices
    layout = plan_layout(config, devices)
    chip = chips.find(devices[0].device_kind)
    if chip is None:
        raise ValueError(
            f"the memory of {devices[0].device_kind} is not known, so no placement can be searched"
        )
    rows = config.batch_size // row_shards(layout.mesh)
    candidates = [
        dataclasses.replace(
            config,
            placement=dataclasses.replace(config.placement, remat=remat, accumulate=accumulate),
        )
        for remat in RECOMPUTES
        for accumulate in range(1, rows + 1)
        if rows % accumulate == 0
    ]
    candidates.sort(key=lambda c: (_expected_seconds(c, layout, chip), c.placement.accumulate))
    sizes = [sum(estimate(plan_layout(candidate, devices)).values()) for candidate in candidates]
    correction, best, found, tried = 1.0, None, None, set[int]()
    faster = range(len(candidates))  # those that have not been ruled out
    while len(tried) < MAX_COMPILATIONS:
        hopeful = (i for i in faster if i not in tried and correction * sizes[i] <= chip.memory)
        index = next(hopeful, None)
        smallest = sizes.index(min(sizes))
        # Before saying that nothing fits, the compiler is asked of the smallest.
        if best is None and (index is None or len(tried) == MAX_COMPILATIONS - 1):
            index = smallest if smallest not in tried else index
        if index is None:
            break
        tried.add(index)
        found = plan(candidates[index], topology, cache)
        correction = found.peak / sizes[index]
        if found.fits:
            best = found
            faster = range(index)
    assert found is not None
    if best is None:
        raise DoesNotFit(
            f"{config.name} does not fit {topology}: with one sequence per device and remat = block it needs "
            f"{found.peak / 2**30:.1f} GiB of {chip.memory / 2**30:.1f} GiB. "
            "Use more chips, or placement.mesh.model above 1"
        )
    return best, len(tried)


def _expected_seconds(config: Config, layout: Layout, chip: chips.Chip) -> float:
    """Of a step: computing, or gathering and reducing the weights once a microbatch."""
    flops = costs.train_flops_per_token(config.model, config.data.seq_len) + _recomputed_flops(
        config, layout.options.attention
    )
    compute = flops * config.tokens_per_step / (layout.mesh.size * chip.flops)
    if not chip.interconnect:
        return compute
    # Gathered forward and backward; an all-reduce moves its bytes twice. 16 bits each.
    moved = 4 * 2 * costs.parameters(config.model).total * config.placement.accumulate
    return max(compute, moved / layout.mesh.shape["model"] / chip.interconnect)
