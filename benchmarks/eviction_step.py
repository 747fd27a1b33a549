"""Time and memory of a decode step through caches that evict tokens, beside a dense cache.

    python -m benchmarks.eviction_step --context 8192 --policy window:keep=0.5 h2o:keep=0.5

Weights and keys are constants, and attention is random: only sizes matter. FastGen has its largest set.
Rounds go through all caches in turn. Printed are medians, the ratios to the dense cache in each round, and
what the compiled step needs: arguments (weights and cache) and temporaries. On a busy machine, the ratios of
CPU times (`cpu_ratios`) say more than those of wall times.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import shape_of
from cla_jax.cache import cache_spec, ledger
from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Compressor, Profiled
from cla_jax.config import ModelConfig
from cla_jax.decode import decode, random_weights
from cla_jax.eviction import parse
from cla_jax.eviction.fastgen import FastGen
from cla_jax.eviction.policy import Lost, Seen
from cla_jax.eviction.rule import PUNCTUATION, SPECIAL


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # Tokens in the caches.
    context: int = 8192
    # Policies beside the dense cache.
    policy: tuple[str, ...] = ()
    # Layers of the model.
    layers: int = 4
    # Query heads.
    heads: int = 8
    # KV heads.
    kv_heads: int = 1
    width: int = 64  # of a head
    # Sharing map of the model.
    kv_map: str = "identity"
    # Decode steps of a round.
    steps: int = 16
    # Alternating rounds.
    rounds: int = 7


CANDIDATES = FastGen.names[:-1]  # the last is everything


@functools.partial(jax.jit, static_argnames=("spec", "steps"), donate_argnames="cache")
def decoded(weights, cache, token_B1, *, spec, steps):
    """The last token and the cache after `steps` decode steps, in one loop as in `generate`."""

    def step(_, state):
        token_B1, cache = state
        x_B1D, cache = decode(weights, spec, cache, token_B1, jnp.ones_like(cache.lengths_B))
        return weights.logits(x_B1D, spec.rules).argmax(-1).astype(jnp.int32), cache

    return jax.lax.fori_loop(0, steps, step, (token_B1, cache))


def main(argv: Sequence[str] | None = None) -> None:
    import tyro  # not where `benchmarks.accelerator` runs

    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    shape = shape_of((arguments.heads, arguments.kv_heads, arguments.width), arguments.layers)
    shape |= {"vocab_size": 512, "d_ff": 2 * shape["d_model"]}  # less to read beside the cache
    config = ModelConfig(**shape, kv_map=arguments.kv_map, compute_dtype="float32")
    for measured in measure(
        config, arguments.context, arguments.policy, steps=arguments.steps, rounds=arguments.rounds
    ):
        print(json.dumps(measured), flush=True)


class Unseen(Compressor):
    """Encodes no prompt, and shows the policy random attention. Candidates lose everything."""

    def profiled(
        self, prompts: Mapping[int, Sequence[int]], starts: np.ndarray | None = None
    ) -> Profiled:
        del starts
        scratch, tokens_BS, lengths_B = self.padded(prompts)
        (B, S), config = tokens_BS.shape, self.spec.config
        received_BKS = np.random.default_rng(0).random((B, config.n_kv_heads, S), np.float32)
        lost = np.ones((len(CANDIDATES), 1, B, config.n_kv_heads, 1))
        seen = Seen(
            lengths_B=lengths_B,
            layer=0,
            tokens_BS=tokens_BS,
            classes_BS=np.zeros(tokens_BS.shape, np.uint8),
            received_BKS=received_BKS,
            observed_BKS=received_BKS,
            lost=lambda *_: Lost(lost, lost, lost),
        )
        return Profiled(
            x_BTD=jnp.zeros((B, S, config.d_model)),
            encoded=scratch.allocate(),
            chosen=(self.chosen_of(seen),) * config.n_kv_layers,
            classes_BS=seen.classes_BS,
        )


def measure(
    config: ModelConfig, context: int, policies: Sequence[str], *, steps: int, rounds: int
) -> list[dict[str, Any]]:
    """What a step takes with a dense cache, and with those of the policies."""
    shapes = jax.eval_shape(lambda: random_weights(config))
    weights = jax.tree.map(lambda a: jnp.full(a.shape, 0.01, a.dtype), shapes)
    more = steps * (rounds + 1)
    sizes = {"batch": 1, "capacity": context + more}
    dense = cache_spec(config, "dense", **sizes)
    cache = dataclasses.replace(dense.allocate(), lengths_B=jnp.full(1, context))
    caches: dict[str, Any] = {"dense": (dense, cache)}
    held = {"dense": ledger.nbytes(cache.kv_layers)}
    classes = bytes([SPECIAL, PUNCTUATION])
    for name in policies:
        spec = evicting_spec(config, parse(name), classes=classes, **sizes)
        compressor = Unseen(weights, spec)
        _, cache = compressor.fill(spec.allocate(), {0: [0] * context}, more)
        caches[name] = compressor.spec, cache
        counted = ledger.counted_evicting(compressor.spec, cache)
        held[name] = counted.allocated + counted.tables
    token = np.zeros((1, 1), np.int32)
    programs = {
        name: decoded.lower(weights, cache, token, spec=spec, steps=steps).compile()
        for name, (spec, cache) in caches.items()
    }
    memory = {name: program.memory_analysis() for name, program in programs.items()}
    last = {name: cache for name, (_, cache) in caches.items()}
    clocks = {"": time.perf_counter, "cpu_": time.process_time}
    seconds = {kind: {name: [] for name in caches} for kind in clocks}
    for _ in range(rounds + 1):  # the first one warms up
        for name, program in programs.items():
            start = {kind: clock() for kind, clock in clocks.items()}
            _, last[name] = jax.block_until_ready(program(weights, last[name], token))
            for kind, clock in clocks.items():
                seconds[kind][name].append((clock() - start[kind]) / steps)
    measured = []
    for name in caches:
        one: dict[str, Any] = {
            "cache": name,
            "context": context,
            "cache_bytes": held[name],
            "arguments": memory[name].argument_size_in_bytes,
            "temporaries": memory[name].temp_size_in_bytes,
        }
        for kind, of in seconds.items():
            pairs = zip(of[name][1:], of["dense"][1:], strict=True)
            ratios = sorted(own / dense for own, dense in pairs)
            one |= {
                f"{kind}ms": round(1e3 * statistics.median(of[name][1:]), 3),
                f"{kind}of_dense": round(statistics.median(ratios), 3),
                f"{kind}ratios": [round(ratio, 2) for ratio in ratios],
            }
        measured.append(one)
    return measured


if __name__ == "__main__":
    main()
