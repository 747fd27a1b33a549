"""What a step needs by our closed forms, at once and for any layout: bytes, FLOPs, seconds."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from cla_jax import chips, costs
from cla_jax.config import Config
from cla_jax.kv_map import Stack
from cla_jax.mesh import row_shards
from cla_jax.model import splash
from cla_jax.model.platform import describe
from cla_jax.model.transformer import UNROLLED, ForwardOptions
from cla_jax.session import Layout
from cla_jax.state import named

# Arrays of the compute dtype that the backward pass of an MLP holds at once, beside the gradients of the
# products of its matrices of F columns:
_FF = 2  # [tokens, F]: activated and not
_EMBED = (
    3  # [tokens, D]: the residual stream before the MLP, the gradients behind it and of its input
)
_HEADS = 2  # [tokens, Q]: queries and output of the attention before it, recomputed already


def estimate(layout: Layout) -> dict[str, int]:
    """Bytes of a device at the peak of a step, by what they are for, in closed form.

    The peak is in the loss or in the backward pass of the last block's MLP, whichever needs more. Everything
    that the forward pass saved is still there. Of the state the bytes are exact. Gaps between buffers are not
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
    tokens = rows(layout) * config.data.seq_len
    platform, _ = describe(layout.mesh.devices.flat[0])
    on_cpu, on_gpu = platform == "cpu", platform == "gpu"
    chunk = rows(layout) * min(config.placement.loss_chunk, config.data.seq_len)

    # Left by the forward pass, in arrays of the compute dtype: what enters each block; also what its matrix
    # products give; and attention. On a CPU everything, of which norms and SwiGLU are in float32.
    n_inner = model.mlp.n_matrices - 1  # products of F columns
    entry = D // tensor if layout.training_options.rules.sequence else D
    left = {
        "block": entry,
        "attention": entry + Q,
        "dots": 2 * D + Q + n_inner * F,
        "none": 4 * D + 4 * Q + 5 * n_inner * F if on_cpu else 2 * D + 2 * Q + n_inner * F,
    }[options.remat]
    saved = (model.n_layers * left + made) * tokens * width
    block = ((_FF + n_inner) * F + _EMBED * D + _HEADS * Q) * tokens * width
    if on_gpu and options.remat == "block":
        # The gradients of the products come from a fusion each, and only one of them takes the place of what
        # all of them read. What attention read after its norm is there too; on TPUs it is computed again.
        block += ((n_inner - 1) * F + D) * tokens * width
    if on_gpu and options.remat == "none":
        # Nothing orders the gradients of a group's weights (`transformer.gradients_together`). XLA computes
        # them last. So the inputs of all products of the group are there, and the gradients of their outputs;
        # and the queries of the first block.
        read = (n_inner + 1) * F + 4 * D + 2 * Q
        block = max(block, (_blocks_of_a_turn(layout) * read + Q) * tokens * width)
    if options.attention == "splash":  # its sums are float32, in tiles of as many lanes
        block += heads * splash.LANES * tokens * 4
    if options.attention == "xla":
        scores_of_attention = 3 * rows(layout) * heads * config.data.seq_len**2 * 4
        block += scores_of_attention
        saved += scores_of_attention * (model.n_layers if options.remat == "none" else 0)
    # Of the MLP the weights and their gradients; of attention the weights, which are read next.
    gathered = (2 * D * Q + D * KV + 2 * (n_inner + 1) * D * F) * width
    # The loss holds a device's own sum of the head's gradient in float32, the head, and a chunk's scores. It
    # also holds the hidden states before and after the norm, with their gradients. All are freed before the
    # backward pass of the blocks begins.
    loss = V * D * (4 + width) + chunk * V * 4 + 3 * D * tokens * width
    if on_gpu:  # the gradient of the scores, which no fusion writes over them
        loss += chunk * V * width
    return {
        "parameters": parameters,
        "optimizer": sum(per_device.values()) - parameters,
        # Two while they are added up.
        "gradients": parameters * (1 if config.placement.accumulate == 1 else 2),
        "activations": round(saved + block),
        "logits": round(max(0, loss - block - gathered)),
        "gathered weights": round(gathered),
        "weights held twice": _held_twice(layout, on_cpu, on_gpu),
    }


def _held_twice(layout: Layout, on_cpu: bool, on_gpu: bool) -> int:
    """Bytes of a device's part of weights that FSDP has XLA hold once more; 0 without it."""
    if layout.mesh.shape["fsdp"] == 1:
        return 0
    options = layout.options
    weights = named(layout.state.model)
    held = 0
    # A loop over groups saves the weights of their blocks for the backward pass, if it runs the blocks one by
    # one (`transformer.fold_again`). Without rematerialisation a CPU does not.
    if not (on_cpu and options.remat == "none"):
        for i, stack in enumerate(layout.config.model.sharing.stacks):
            if _unrolled_in_a_loop(options, stack) and stack.size > 1:
                held += _total(weights, f"stacks.{i}.blocks.")
    # GPUs gather along the first axis. XLA lays out a weight again of which the last one is split: once, and
    # it keeps the result for all microbatches.
    if on_gpu and layout.config.placement.accumulate > 1:
        last = {k: leaf for k, leaf in weights.items() if "fsdp" in leaf.sharding.spec[-1:]}
        held += _total(last, "")
    return held


def _unrolled_in_a_loop(options: ForwardOptions, stack: Stack) -> bool:
    """Whether the blocks of a group run one by one in each turn of a loop over the groups of a stack."""
    return options.scan_layers and len(stack.groups) > 1 and stack.size <= UNROLLED


def _blocks_of_a_turn(layout: Layout) -> int:
    """The most blocks that run one by one in a turn of a loop over groups; 1 without such a loop."""
    stacks = layout.config.model.sharing.stacks
    return max(s.size if _unrolled_in_a_loop(layout.options, s) else 1 for s in stacks)


def _total(leaves: dict[str, jax.ShapeDtypeStruct], prefix: str) -> int:
    return sum(_shard_bytes(leaf) for name, leaf in leaves.items() if name.startswith(prefix))


def _shard_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def rows(layout: Layout) -> int:
    return layout.batch.shape[1] // row_shards(layout.mesh)


def recomputed_flops(config: Config, kernel: str) -> float:
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


def roofline(
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
