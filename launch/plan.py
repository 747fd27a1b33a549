"""Predict what a training run needs on a TPU pod or a GPU cluster, by compiling its step without one.

    python -m launch.plan cla_1b.h128_mqa_cla2 --topology v5e:16x16
    python -m launch.plan cla_3b --topology v5p:4x4x8 --topology v4:4x4x8
    python -m launch.plan cla_1b.h128_mqa --topology v5e:16x16 --slices 2 --search
    python -m launch.plan cla_1b.h128_mqa_cla2 --topology h100:8 --topology h100:16x8
    python -m launch.plan demo --topology here

Prints whether a step fits, and what uses the memory of a device. Also prints the collectives, the traffic to
and from device memory, and the shortest possible step time. The cost of the run, in days and chip-hours,
assumes --mfu. A topology is KIND:SHAPE. The shape of TPUs (v4, v5e, v5p, v6e, v7x) is in chips. That of GPUs
(a100-80, h100, h200, b200) is hosts x GPUs; h100:8 is one host. --list prints all. `here` means the devices
of this machine. The compiler must be installed: pip install -e '.[plan]' for TPUs, '.[plan-gpu]' for GPUs.
--search finds the fastest microbatch and rematerialisation that fit, and prints the training command. Config
fields come after a separate --:

    python -m launch.plan cla_1b.h128_mqa --topology v6e:16x16 -- --placement.remat dots --batch-size 4096
"""

import contextlib
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from cla_jax import chips, machine
from cla_jax.config import Config
from launch.cli import log_to_stderr, read, user_errors

if TYPE_CHECKING:
    from cla_jax.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # Experiments or studies.
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME ...")] = ()
    # KIND:SHAPE, such as v5e:16x16 or h100:16x8; `here` for the devices of this machine. Repeat the flag for
    # several.
    topology: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # TPU slices, connected by the data-centre network; 0 for placement.mesh.slice of the config.
    slices: int = 0
    # Find the fastest microbatch and rematerialisation that fit, in at most 3 compilations.
    search: bool = False
    # Model FLOPs utilisation, 0 to 1, that days and chip-hours assume. The output also has the highest one
    # that the roofline allows.
    mfu: float = 0.4
    # Print JSON instead of tables.
    json: bool = False
    # Print the topologies.
    list: bool = False


# By themselves, jax and the compilers would look for accelerators here. No variable of the user's may keep
# them from compiling for others.
_ELSEWHERE = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # several plans at once: nothing runs on a TPU
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",  # it asks the driver
}


def compile_elsewhere() -> None:
    """Makes jax compute on the CPU, and compilers not look for accelerators; before the first use of jax."""
    os.environ.update(_ELSEWHERE)


def planner() -> Any:
    """`cla_jax.plan`. With it comes jax, and its plugins say that there is no driver: not here."""
    with machine.stderr_to_nowhere():
        import cla_jax.plan.search

        return cla_jax.plan


@contextlib.contextmanager
def compiling_elsewhere() -> Iterator[None]:
    """The same for a while: programs that are started later see the environment as it was."""
    before = {name: os.environ.get(name) for name in _ELSEWHERE}
    compile_elsewhere()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@user_errors
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    arguments = read(
        Arguments,
        fields_follow=True,
        args=argv[:cut],
        prog="python -m launch.plan",
        description=__doc__,
    )
    if any(topology != "here" for topology in arguments.topology):
        if "here" in arguments.topology:
            raise ValueError(
                "--topology here cannot be combined with other topologies: plan them in separate commands"
            )
        compile_elsewhere()
    log_to_stderr(informed=True)
    if arguments.list:
        print("\n".join(chips.topology_names()))
        return
    if not arguments.names or not arguments.topology:
        raise ValueError("give an experiment and a --topology; see python -m launch.plan --help")
    if not 0 < arguments.mfu <= 1:
        raise ValueError(f"--mfu {arguments.mfu} must lie between 0 and 1")
    for topology in arguments.topology:
        if topology != "here":
            chips.check_topology(topology)
    overrides = argv[cut + 1 :]
    configs = _configs(arguments, overrides)
    planning = planner()  # after the checks: mistakes should not wait for jax
    plans, refusals = [], []
    for topology in arguments.topology:
        for config in configs:
            devices = planning.topologies.topology(topology, config.placement.mesh.slice)
            cache = _cache()
            try:
                if arguments.search:
                    plan, _ = planning.search.search(config, devices, cache)
                else:
                    plan = planning.plan(config, devices, cache)
            except planning.search.DoesNotFit as error:  # the other rows may
                refusals.append(str(error))
                continue
            plans.append((plan, config))
            if not arguments.json:
                _print(plan, config, arguments.mfu)
                if arguments.search:
                    print(f"Training command: {_command(plan, config, overrides)}\n")
    if arguments.json:
        json.dump(
            [_as_dict(plan, config, arguments.mfu) for plan, config in plans], sys.stdout, indent=1
        )
        print()
    if refusals:
        raise ValueError("\n".join(refusals))


def _cache() -> Path | None:
    """Where the compiler's answers are kept; nowhere if the user has no place of their own."""
    from launch import compilation_cache

    place = compilation_cache.directory()
    return place / "plans" if place is not None else None


def _configs(arguments: Arguments, overrides: Sequence[str]) -> list[Config]:
    from launch.train import parse

    configs = [config for name in arguments.names for config in parse([name, *overrides])]
    if not arguments.slices:
        return configs
    return [
        dataclasses.replace(
            config,
            placement=dataclasses.replace(
                config.placement,
                mesh=dataclasses.replace(config.placement.mesh, slice=arguments.slices),
            ),
        )
        for config in configs
    ]


def _as_dict(plan: "Plan", config: Config, mfu: float) -> dict[str, Any]:
    days = plan.days(config.steps, mfu)
    return dataclasses.asdict(plan) | {
        "step_seconds": plan.step_seconds,
        "mfu": plan.mfu(),
        "chips": plan.chips,
        "tokens": config.steps * config.tokens_per_step,
        "assumed_mfu": mfu,
        "days": days,
        "chip_hours": None if days is None else 24 * days * plan.chips,
    }


def _command(plan: "Plan", config: Config, overrides: Sequence[str]) -> str:
    """What starts the run as it was planned: the fields of the command line, and those that were found."""
    import experiments

    row = config.name.replace("/", ".")
    planned = {"--placement.accumulate": str(plan.accumulate), "--placement.remat": plan.remat}
    if plan.mesh["slice"] > 1:
        planned["--placement.mesh.slice"] = str(plan.mesh["slice"])
    name = row if row in experiments.rows() else "NAME"
    flags = [word for flag in planned.items() for word in flag]
    variables = chips.GPU_ENVIRONMENT if plan.on_gpus else {}
    before = [f"{variable}={value}" for variable, value in variables.items()]
    return shlex.join([*before, "python", "-m", "launch.train", name, *overrides, *flags])


def count(number: float) -> str:
    """Three digits and a unit, as people say it: `30 B`, `246 K`."""
    units = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
    return next((f"{number / size:.3g} {u}" for size, u in units if number >= size), f"{number:g}")


def _duration(days: float) -> str:
    """A time in the unit that fits it."""
    hours = 24 * days
    if days >= 2:
        return f"{days:,.1f} days"
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def cost(plan: "Plan", config: Config, assumed: float) -> list[str]:
    """What a run takes: tokens and steps, days and chip-hours at the assumed MFU, and at the least."""
    tokens = config.steps * config.tokens_per_step
    lines = [f"Training: {count(tokens)} tokens, in {config.steps:,} steps."]
    bound = plan.mfu()
    if bound is None or plan.step_seconds is None:
        return [f"{lines[0]} The peak performance of {plan.device_kind} is not known."]

    def at(mfu: float | None) -> str:
        days = plan.days(config.steps, mfu)
        assert days is not None
        hours = 24 * days * plan.chips
        return f"{_duration(days)}, {hours:,.{0 if hours >= 10 else 2}f} chip-hours"

    if assumed < bound:
        lines.append(f"At an MFU of {assumed:.0%}, on {plan.chips} chips: {at(assumed)}.")
    else:
        lines.append(f"An MFU of {assumed:.0%} cannot be reached here.")
    times = ", ".join(f"{name} {seconds:.3g} s" for name, seconds in plan.roofline.items())
    lines.append(
        f"At the roofline: {at(None)}. A step takes at least {plan.step_seconds:.3g} s ({times}), an MFU of "
        f"{bound:.0%}."
    )
    return lines


UNTRIED = "These figures were not measured: XLA compiled the step for a GPU that is not present."


def _print(plan: "Plan", config: Config, mfu: float) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    gib = lambda count: f"{count / 2**30:.2f} GiB"
    mesh = (
        " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    )
    verdict = "needs" if not plan.memory else "fits" if plan.fits else "DOES NOT FIT"
    of = f" of {gib(plan.memory)}" if plan.memory else ""
    console = Console()
    console.width = max(console.width, 100)
    console.print(
        f"[bold]{escape(plan.name)}[/bold] on {plan.topology}: {plan.devices} devices ({plan.device_kind}) "
        f"as {mesh}, attention by {plan.attention}, remat {plan.remat}, {plan.rows} sequences a device "
        f"in each of {plan.accumulate} microbatches",
        soft_wrap=True,
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, title=f"{verdict}: {gib(plan.peak)}{of} a device")
    table.add_column("memory of a device at the peak")
    table.add_column("", justify="right")
    for part, size in plan.parts.items():
        table.add_row(part, gib(size))
    table.add_row("peak, by the compiler", gib(plan.peak))
    table.add_row(
        "peak, by our closed forms", f"{gib(plan.estimate)} ({plan.estimate / plan.peak - 1:+.0%})"
    )
    console.print(table)
    buffers = Table(box=box.SIMPLE_HEAD, title="Largest buffers")
    for column in ("bytes", "shape", "what"):
        buffers.add_column(column, justify="right" if column == "bytes" else "left")
    for buffer in plan.buffers:
        buffers.add_row(*map(escape, (gib(buffer.bytes), buffer.shape, buffer.where)))
    console.print(buffers)
    if not plan.fits:
        console.print(f"To make it fit: {escape(plan.advice)}", highlight=False)
    by_kind = lambda sizes: ", ".join(f"{k} {size / 1e9:.2f} GB" for k, size in sizes.items())
    links = f" over {plan.links}" if plan.links != "interconnect" and plan.collective_bytes else ""
    received = f"{by_kind(plan.collective_bytes) or 'nothing'}{links}"
    if plan.network_bytes:
        received += f" and through its network port {by_kind(plan.network_bytes)}"
    console.print(
        f"A step: {plan.flops:.3g} FLOPs and {plan.recomputed_flops:.3g} recomputed; each device receives "
        f"{received}, and moves {plan.traffic / 1e9:.1f} GB to and from its memory, including "
        f"{plan.copied / 1e9:.2f} GB of layout copies.",
        soft_wrap=True,
        highlight=False,
    )
    for line in cost(plan, config, mfu):
        console.print(line, soft_wrap=True, highlight=False)
    console.print(f"Compiled in {plan.compile_seconds:.0f} s.", highlight=False)
    if plan.on_gpus and plan.elsewhere:
        console.print(UNTRIED, soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
