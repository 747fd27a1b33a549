"""What a policy adds to the prefill of a prompt, to choose what each KV head keeps of it.

    python -m benchmarks.eviction_profile --tokens 768 --policy fastgen:T=0.9 --policy h2o:keep=0.5

Weights are random: only sizes matter. A round encodes the prompt with each policy in turn, and with random
tokens, which need no profile. Printed are CPU times relative to that, medians over the rounds.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Sequence

import numpy as np
import tyro

from benchmarks.common import random_model
from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Compressor
from cla_jax.eviction import parse
from cla_jax.eviction.rule import PUNCTUATION, SPECIAL

WITHOUT = "random:keep=0.5"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    tokens: int = 768  # of the prompt
    # Policies to measure.
    policy: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Layers of the model.
    layers: int = 2
    # Query heads.
    heads: int = 9
    # KV heads.
    kv_heads: int = 3
    width: int = 64  # of a head
    # Sharing map of the model.
    kv_map: str = "identity"
    # Alternating rounds.
    rounds: int = 9


def main(argv: Sequence[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    heads = arguments.heads, arguments.kv_heads, arguments.width
    config, weights = random_model(heads, arguments.layers, arguments.kv_map)
    prompt = np.random.default_rng(0).integers(0, 512, arguments.tokens).tolist()
    compressors = {
        name: Compressor(
            weights,
            evicting_spec(
                config,
                parse(name),
                classes=bytes([SPECIAL, PUNCTUATION]),
                batch=1,
                capacity=arguments.tokens + 1,
            ),
        )
        for name in (WITHOUT, *arguments.policy)
    }
    seconds: dict[str, list[float]] = {name: [] for name in compressors}
    for _ in range(arguments.rounds + 1):
        for name, compressor in compressors.items():
            start = time.process_time()
            compressor.profiled({0: prompt})
            seconds[name].append(time.process_time() - start)
    for name in arguments.policy:
        pairs = zip(seconds[name][1:], seconds[WITHOUT][1:], strict=True)  # the first compiles
        ratios = sorted(own / without - 1 for own, without in pairs)
        record = {
            "policy": name,
            "tokens": arguments.tokens,
            "of_prefill": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
        }
        print(json.dumps(record))


if __name__ == "__main__":
    main()
