"""Whether two checkouts compute the same, bit for bit: for a change that must not change any output.

    python -m benchmarks.outputs                         # digests of this checkout
    python -m benchmarks.outputs --against ../before     # and of another one; exit code 1 if any differ
    python -m benchmarks.outputs --against ../before --cases mqa,cla2

Each case is a small model: it is trained for ten steps, evaluated by full forward and through caches, and
continues two prompts. Compared are the losses and gradient norms of all steps, the final parameters, the
evaluations, and the generated tokens with their log-probabilities. Every checkout runs its own copy of this
file, in processes of its own with one and with four devices on the CPU. Compare on one machine, with equal
versions of all packages.
"""

import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

STEPS = 10
PROMPTS = ("Fellow citizens", "The")

# Changes to `experiments.smoke.tiny`, cache formats, and devices along (data, fsdp, model).
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[int, int, int]]] = {
    "mqa": ({"model.kv_map": "identity"}, ("dense", "int8"), (1, 1, 1)),
    "mha": ({"model.n_kv_heads": 4, "model.kv_map": "identity"}, ("dense", "kivi4"), (1, 1, 1)),
    "gqa": ({"model.n_kv_heads": 2}, ("dense", "fp8"), (1, 1, 1)),
    "cla2": ({"model.n_layers": 4}, ("dense", "bfloat16", "kivi2"), (1, 1, 1)),
    "cla3": ({"model.n_layers": 5, "model.kv_map": "cla:3"}, ("dense",), (1, 1, 1)),
    "cla3-last": ({"model.n_layers": 4, "model.kv_map": "cla:3:last"}, ("int8",), (1, 1, 1)),
    "keep-ends": ({"model.n_layers": 5, "model.kv_map": "keep-ends"}, ("dense",), (1, 1, 1)),
    "dense-front": ({"model.n_layers": 5, "model.kv_map": "dense-front"}, ("fp8",), (1, 1, 1)),
    "reused": ({"model.n_layers": 4, "model.kv_map": "0,1,0,1"}, ("dense", "int8"), (1, 1, 1)),
    "own-norm": ({"model.kv_norm": "own", "model.n_layers": 4}, ("dense",), (1, 1, 1)),
    "windows": (
        {"model.n_layers": 4, "model.kv_map": "identity", "model.windows": "24,0,24,0"},
        ("dense", "kivi4"),
        (1, 1, 1),
    ),
    "window-shared": ({"model.n_layers": 4, "model.windows": "32,32,0,0"}, ("int8",), (1, 1, 1)),
    "scanned": (
        {"model.n_layers": 4, "placement.scan_layers": True, "placement.remat": "block"},
        ("dense",),
        (1, 1, 1),
    ),
    "dots": ({"model.n_layers": 4, "placement.remat": "dots"}, ("dense",), (1, 1, 1)),
    "untied": ({"model.tied_embeddings": False, "model.bias": True}, ("dense",), (1, 1, 1)),
    "yarn": (
        {
            "model.rope_scaling.kind": "yarn",
            "model.rope_scaling.factor": 4.0,
            "model.rope_scaling.original_max_position_embeddings": 32,
            "model.rope_scaling.attention_factor": 1.1,
        },
        ("dense",),
        (1, 1, 1),
    ),
    "bfloat16": ({"model.compute_dtype": "bfloat16", "model.n_layers": 4}, ("dense",), (1, 1, 1)),
    "data": ({"model.n_layers": 4}, ("dense",), (4, 1, 1)),
    "fsdp-model": ({"model.n_layers": 4}, ("dense", "int8"), (1, 2, 2)),
    "model-kivi": ({"model.n_kv_heads": 4, "model.n_layers": 4}, ("kivi4",), (1, 1, 4)),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    # Another checkout to compare with.
    against: Path | None = None
    # Cases, separated by commas; by default all.
    cases: str = ",".join(CASES)
    # Print the digests as JSON and nothing else.
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    cases = options.cases.split(",")
    if unknown := set(cases) - set(CASES):
        raise SystemExit(f"error: unknown cases {sorted(unknown)}; there are {', '.join(CASES)}")
    if options.json:
        print(json.dumps({case: digests(case) for case in cases}))
        return
    here = measured(Path(__file__).parents[1], cases)
    there = here if options.against is None else measured(options.against, cases)
    different = False
    for case in cases:
        for what, digest in here[case].items():
            same = there[case].get(what) == digest
            different |= not same
            print(f"{case:14s} {what:24s} {digest}{'' if same else '  DIFFERS'}")
    raise SystemExit(different)


def measured(checkout: Path, cases: Sequence[str]) -> dict[str, dict[str, str]]:
    """The digests of a checkout, by case and by what was computed."""
    digests = {}
    for devices in sorted({math.prod(CASES[case][2]) for case in cases}):
        these = [case for case in cases if math.prod(CASES[case][2]) == devices]
        environment = os.environ | {
            "PYTHONPATH": os.fspath(checkout.resolve()),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        }
        command = [sys.executable, "-m", "benchmarks.outputs", "--json", "--cases", ",".join(these)]
        done = subprocess.run(
            command, env=environment, cwd=checkout, stdout=subprocess.PIPE, check=True
        )
        digests |= json.loads(done.stdout)
    return digests


def digests(case: str) -> dict[str, str]:
    import logging

    from cla_jax.evaluate import during_training, evaluate
    from cla_jax.fields import replaced
    from cla_jax.runs import find_runs
    from cla_jax.train import train
    from experiments.smoke import tiny

    logging.disable(logging.WARNING)
    changes, formats, mesh = CASES[case]
    axes = dict(zip(("data", "fsdp", "model"), mesh, strict=True))
    with tempfile.TemporaryDirectory() as directory:
        config = replaced(
            tiny(),
            {
                "name": case,
                "steps": STEPS,
                "data.seq_len": 64,
                "placement.save_every": STEPS,
                "placement.runs": directory,
                "placement.data_dir": f"{directory}/data",
                **{f"placement.mesh.{axis}": size for axis, size in axes.items()},
                **changes,
            },
        )
        train(config, evaluate=during_training)
        (run,) = find_runs([f"{directory}/{case}"])
        steps = [
            {key: line[key] for key in ("loss", "grad_norm") if key in line}
            for line in run.read_metrics()
        ]
        outputs = {"losses": steps, "parameters": parameters(run)}
        for name, evaluated in evaluate(
            run, formats=formats, chunk=16, windows=8, data_dir=f"{directory}/data"
        ):
            scores = evaluated.scores
            outputs[f"scores, {name}"] = {
                "perplexity": scores.perplexity,
                "bits_per_byte": scores.bits_per_byte,
            }
        outputs |= {f"tokens, {name}": generated(run, name) for name in formats}
    return {
        what: hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
        for what, value in outputs.items()
    }


def parameters(run: Any) -> dict[str, str]:
    """Digests of the parameters of the newest checkpoint, by name."""
    import jax
    import numpy as np

    from cla_jax import checkpoint, mesh
    from cla_jax.config import MeshConfig

    devices = mesh.make_mesh(MeshConfig(), jax.devices()[:1])
    with jax.set_mesh(devices):
        _, model = checkpoint.load_model(run, mesh.axis_rules(run.config().model, devices), devices)
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {
        jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
        for path, leaf in leaves
    }


def generated(run: Any, format: str) -> Any:
    """Tokens and log-probabilities of two prompts of unequal length, greedy on one device."""
    import jax

    from cla_jax import checkpoint, mesh
    from cla_jax.cache import cache_spec
    from cla_jax.config import MeshConfig
    from cla_jax.data import tokenizers
    from cla_jax.decode import decoding_weights
    from cla_jax.generate import generate

    config, devices = run.config(), mesh.make_mesh(MeshConfig(), jax.devices()[:1])
    rules = mesh.axis_rules(config.model, devices)
    tokenizer = tokenizers.load(run.tokenizer_json(), config.data.end_token)
    prompts = [[tokenizer.end, *tokenizer.encode(text)] for text in PROMPTS]
    with jax.set_mesh(devices):
        _, model = checkpoint.load_model(run, rules, devices)
        weights = decoding_weights(model, rules)
        spec = cache_spec(config.model, format, batch=2, capacity=256, chunk=8, rules=rules)
        completions = generate(weights, spec, prompts, new_tokens=180, seeds=1)
    return [(completion.tokens, completion.logprobs) for completion in completions]


if __name__ == "__main__":
    main()
