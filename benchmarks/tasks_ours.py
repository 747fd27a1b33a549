"""Log-likelihoods of task options by this repository, as one contestant of `benchmarks.tasks`."""
# ruff: noqa: E402 - the allocator is set up before jax is imported

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch import allocator

allocator.set_up()

import jax

from benchmarks.child import Contestant, serve, versions
from benchmarks.tasks_common import requests
from cla_jax import checkpoint
from cla_jax.evaluate import open_session
from cla_jax.interop.lm_eval import Model
from cla_jax.runs import find_runs
from launch import compilation_cache


def contestant(spec: dict[str, Any]) -> Contestant:
    (run,) = find_runs([spec["run"]])
    compilation_cache.enable()
    session = open_session(run, spec["data_dir"])
    asked = requests(spec)
    with jax.set_mesh(session.mesh):
        _, weights = checkpoint.load_model(run, session.rules, session.mesh)
        model = Model(session, weights, way=spec["way"], context=spec["context"])

    def burst(task: int) -> dict[str, Any]:
        with jax.set_mesh(session.mesh):
            return {"answers": model.loglikelihood(list(asked.values())[task])}

    parameters = sum(leaf.size for leaf in jax.tree.leaves(weights))
    about = {"parameters": parameters, "versions": versions("jax", "jaxlib", "lm_eval")}
    return Contestant(burst, about)


if __name__ == "__main__":
    serve(contestant)
