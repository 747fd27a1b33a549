"""The fastest placement of a run that fits, in few compilations."""

import dataclasses
from pathlib import Path

from cla_jax import chips, costs
from cla_jax.config import Config
from cla_jax.mesh import row_shards
from cla_jax.plan import Plan, plan
from cla_jax.plan.estimates import estimate, recomputed_flops
from cla_jax.plan.topologies import Topology
from cla_jax.session import Layout, plan_layout

MAX_COMPILATIONS = 3
RECOMPUTES = ("none", "dots", "attention", "block")  # values of placement.remat, the cheapest first


class DoesNotFit(ValueError):
    """The compiler found that the program needs more memory than a device has."""


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
    correction, best, planned, tried = 1.0, None, None, set[int]()
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
        planned = plan(candidates[index], topology, cache)
        correction = planned.peak / sizes[index]
        if planned.fits:
            best = planned
            faster = range(index)
    assert planned is not None
    if best is None:
        raise DoesNotFit(
            f"{config.name} does not fit {topology}: with one sequence per device and remat = block it needs "
            f"{planned.peak / 2**30:.1f} GiB of {chip.memory / 2**30:.1f} GiB. "
            "Use more chips, or placement.mesh.model above 1"
        )
    return best, len(tried)


def _expected_seconds(config: Config, layout: Layout, chip: chips.Chip) -> float:
    """Of a step: computing, or gathering and reducing the weights once a microbatch."""
    flops = costs.train_flops_per_token(config.model, config.data.seq_len) + recomputed_flops(
        config, layout.options.attention
    )
    compute = flops * config.tokens_per_step / (layout.mesh.size * chip.flops)
    if not chip.interconnect:
        return compute
    # Gathered forward and backward; an all-reduce moves its bytes twice. 16 bits each.
    moved = 4 * 2 * costs.parameters(config.model).total * config.placement.accumulate
    return max(compute, moved / layout.mesh.shape["model"] / chip.interconnect)
