"""The training step of this repository, as one contestant of `benchmarks.train_step`."""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch import allocator

allocator.set_up()  # as `launch.train` does

import jax
import numpy as np

from benchmarks.child import Contestant, serve, versions
from cla_jax.config import AdamW, Config, DataConfig, ModelConfig, OptimizerConfig, Placement
from cla_jax.session import plan_layout
from cla_jax.state import initial_state
from cla_jax.step import make_step


def contestant(spec: dict[str, Any]) -> Contestant:
    settings = spec["optimizer"]
    config = Config(
        name="benchmark",
        model=ModelConfig(
            **spec["shape"],
            kv_map=spec["kv_map"],
            kv_norm="block",  # with the identity map: an ordinary Llama
            compute_dtype="float32",
        ),
        data=DataConfig(seq_len=spec["seq_len"]),
        optimizer=OptimizerConfig(
            peak_lr=settings["peak_lr"],
            clip_norm=settings["clip_norm"],
            rule=AdamW(**{key: settings[key] for key in ("b1", "b2", "eps", "weight_decay")}),
        ),
        batch_size=spec["batch_size"],
        steps=spec["total_steps"],
        placement=Placement(**spec["placement"]),
    )
    layout = plan_layout(config)
    mesh = layout.mesh
    tokens = np.random.default_rng(0).integers(
        0,
        config.model.vocab_size,
        (spec["batches"], config.placement.accumulate, spec["batch_size"], spec["seq_len"] + 1),
        np.int32,
    )
    with jax.set_mesh(mesh):
        state = initial_state(config, layout.optimizer, layout.state)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.model))
    step = make_step(layout)
    batch = 0

    def steps(count: int) -> dict[str, Any]:
        """As the training loop does it: metrics are fetched one step late."""
        nonlocal state, batch
        pending: dict[str, jax.Array] | None = None
        with jax.set_mesh(mesh):
            for _ in range(count):
                state, metrics = step(state, jax.numpy.asarray(tokens[batch % len(tokens)]))
                batch += 1
                if pending is not None:
                    jax.device_get(pending)
                pending = metrics
        jax.block_until_ready(state)
        assert pending is not None
        return {"loss": float(pending["loss"])}

    first = steps(1)  # compiles
    about = {"parameters": parameters, "versions": versions("jax", "jaxlib", "flax")}
    return Contestant(steps, about | first)


if __name__ == "__main__":
    serve(contestant)
