"""The matrix products of a training step and nothing else, as one contestant of `benchmarks.train_step`.

What a step does besides takes additional time. It is a reference, not a strict bound: here each product has
operands of its own, which a step often finds in the processor's cache.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch import allocator

allocator.set_up()  # as the step that is compared with it

import jax

from benchmarks.child import Contestant, serve, versions
from cla_jax.model.platform import query_block


def products(spec: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """Number, rows, inner size and columns of the products of one forward pass, in order.

    Linear maps see all tokens of the batch. Attention leaves out the keys after a block of queries, as ours.
    """
    shape, batch, length = spec["shape"], spec["batch_size"], spec["seq_len"]
    tokens, heads = batch * length, batch * shape["n_heads"]
    d, width = shape["d_model"], shape["n_heads"] * shape["d_head"]
    block = query_block(length)
    scores = [(heads, block, shape["d_head"], end) for end in range(block, length + 1, block)]
    layer = [
        (1, tokens, d, 2 * shape["n_kv_heads"] * shape["d_head"]),
        (1, tokens, d, width),
        *scores,
        *[(n, rows, end, inner) for n, rows, inner, end in scores],  # products with values
        (1, tokens, width, d),
        (1, tokens, d, shape["d_ff"]),
        (1, tokens, d, shape["d_ff"]),
        (1, tokens, shape["d_ff"], d),
    ]
    return layer * shape["n_layers"] + [(1, tokens, d, shape["vocab_size"])]


def contestant(spec: dict[str, Any]) -> Contestant:
    sizes = products(spec)
    keys = iter(jax.random.split(jax.random.key(0), 3 * len(sizes)))
    # Arrays of their own for each product: equal products would be computed once.
    operands = [
        tuple(jax.random.normal(next(keys), (n, *dims)) for dims in ((r, k), (k, c), (r, c)))
        for n, r, k, c in sizes
    ]

    @jax.jit
    def multiply(operands: list[tuple[jax.Array, ...]]) -> list[tuple[jax.Array, ...]]:
        """x w, and what the backward pass multiplies: the gradient of the result with w and with x."""
        squeezed = [tuple(a[0] if len(a) == 1 else a for a in given) for given in operands]
        return [(x @ w, d @ w.mT, x.mT @ d) for x, w, d in squeezed]

    def steps(count: int) -> dict[str, Any]:
        for _ in range(count):
            jax.block_until_ready(multiply(operands))
        return {"loss": None}

    steps(1)  # compiles
    shape = spec["shape"]
    matrices = sum(k * c for n, _, k, c in sizes if n == 1)
    parameters = matrices + shape["d_model"] * (2 * shape["n_layers"] + 1)
    about = {"parameters": parameters, "loss": None}
    return Contestant(steps, about | {"versions": versions("jax", "jaxlib")})


if __name__ == "__main__":
    serve(contestant)
