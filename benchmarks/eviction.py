"""Quality of held-out text through caches that evict tokens, policies beside each other at equal live bytes.

    python -m benchmarks.eviction runs/demo/seeds/h16_mqa.seed-0 --windows 64 --T 0.9 --T 0.98

For each T of FastGen the other policies get the budget at which they hold as many bytes at the end of a
window. These include positions, classes and scores. Scores are those of the tokens after the prompt: bits per
token above the full forward pass, with a 95 % interval over windows. The KL divergence to the full forward
pass is printed too, and how often the top token is the same.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Annotated, Any

import tyro

from cla_jax import checkpoint, runs
from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Compressor
from cla_jax.decode import decoding_weights, on_one_device
from cla_jax.evaluate import open_session
from cla_jax.eviction import Policy, parse
from cla_jax.eviction.classes import classes_of_tokenizer
from cla_jax.eviction_scores import evicting_decoding, recall_scores
from cla_jax.model.transformer import Transformer
from cla_jax.recall_tasks import make_examples
from cla_jax.session import Session

OTHERS = ("window", "h2o", "snapkv", "adakv", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Thresholds of FastGen.
    T: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    # Further settings of FastGen, such as over=mean.
    settings: str = ""
    # The other policies, by default all of them; of tasks the policies, with their settings.
    policy: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Tasks of cla_jax/recall_tasks.py to score instead of held-out text, with contexts of so many characters.
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    length: int = 200
    count: int = 64
    # Only what FastGen would keep of the prompts; nothing is decoded.
    kept_only: bool = False
    windows: int = 64
    prompt: float = 0.5


def main(argv: Sequence[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    for path in arguments.runs:
        run = runs.find_run(path)
        session = open_session(run)
        _, model = checkpoint.load_model(run, session.rules, session.mesh)

        for kind in arguments.task:
            examples = make_examples(kind, count=arguments.count, length=arguments.length)
            for name in arguments.policy:
                tokenizer = session.prepared.tokenizer
                found = recall_scores(model, tokenizer, parse(name), examples)
                print(
                    json.dumps({"run": run.path.name, "task": kind, "policy": name} | found),
                    flush=True,
                )
        if arguments.kept_only:
            for threshold in arguments.T or (0.95,):
                for over in ("min", "mean"):
                    policy = parse(f"fastgen:T={threshold:g},over={over}")
                    found = kept_of_prompts(session, model, policy, arguments)
                    print(
                        json.dumps({"run": run.path.name, "policy": policy.name} | found),
                        flush=True,
                    )
        if arguments.task or arguments.kept_only:
            continue

        def measured(name: str, session=session, model=model, run=run) -> dict[str, Any]:
            record = evicting_decoding(
                session, model, parse(name), prompt=arguments.prompt, windows=arguments.windows
            )
            print(json.dumps({"run": run.path.name, "policy": name} | line(record)), flush=True)
            return record

        data = session.config.data
        after = 1 - arguments.prompt
        for threshold in arguments.T or (0.95,):
            settings = ",".join(filter(None, [f"T={threshold:g}", arguments.settings]))
            record = measured(f"fastgen:{settings}")
            entry = session.config.model.d_head * 4  # bytes at 16 bits
            for other in arguments.policy or OTHERS:
                noted = 9 if parse(f"{other}:keep=1").scoring != "none" else 5
                share = record["kept_share"] * (entry + 9) / (entry + noted)
                if other in ("snapkv", "adakv"):  # their budget is the prompt's
                    share = (share - after) / arguments.prompt
                budget = math.floor(share * 10_000) / 10_000
                least = 36 if other in ("snapkv", "adakv") else 12
                if budget * arguments.prompt * data.seq_len < least:
                    print(json.dumps({"run": run.path.name, "policy": other, "budget": share}))
                    continue
                measured(f"{other}:keep={min(budget, 1):g}")


def kept_of_prompts(
    session: Session, model: Transformer, policy: Policy, arguments: Arguments
) -> dict[str, Any]:
    """The share of the prompts that is kept, over all and of each KV layer, and what policies heads have."""
    data, tokenizer = session.config.data, session.prepared.tokenizer
    classes = classes_of_tokenizer(tokenizer, data.begin_token)
    split = next(iter(session.prepared.parts.values())).split("held_out")
    S = math.ceil(arguments.prompt * data.seq_len)
    size = min(arguments.windows, len(split))
    prompts = {i: split[i]["tokens"][:S].tolist() for i in range(size)}
    spec = evicting_spec(
        session.config.model, policy, classes=classes, batch=size, capacity=data.seq_len
    )
    compressor = Compressor(decoding_weights(on_one_device(model)), spec)
    chosen = compressor.profiled(prompts).chosen
    kept_P = [float((one.kept_BKS.sum(-1) / one.lengths_B[:, None]).mean()) for one in chosen]
    policies = [policy.names[i] for one in chosen for i in one.choice.policy_BK.ravel()]
    return {
        "kept_of_prompt": round(sum(kept_P) / len(kept_P), 4),
        "layers": [round(share, 2) for share in kept_P],
        "policies": {name: round(policies.count(name) / len(policies), 3) for name in policy.names},
    }


def line(record: dict[str, Any]) -> dict[str, Any]:
    after = record["after_prompt"]
    worse = (after["nll"] - after["nll_by_full_forward"]) / after["tokens"] / math.log(2)
    return {
        "kept": round(record["kept_share"], 4),
        "kept_of_prompt": round(
            sum(sum(layer["kept"]) / len(layer["kept"]) for layer in record["profile"])
            / len(record["profile"]),
            4,
        ),
        "live_bytes_share": round(record["resident_share"], 4),
        "bits_worse": round(worse, 5),
        "interval": round(record["after_prompt"]["worse_interval"] / math.log(2), 5),
        "perplexity": round(after["perplexity"] / after["perplexity_by_full_forward"] - 1, 5),
        "kl": round(after["kl"], 5),
        "top1": round(after["top1_agreement"], 4),
        "policies": {
            name: round(
                sum(sum(layer["policies"][name]["share"]) for layer in record["profile"])
                / sum(len(layer["kept"]) for layer in record["profile"]),
                3,
            )
            for name in record["profile"][0].get("policies", {})
        },
        "seconds": record["prefill_seconds"],
    }


if __name__ == "__main__":
    main()
