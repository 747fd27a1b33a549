"""Quality of held-out text through caches that evict tokens, policies beside each other at equal live bytes.

    python -m benchmarks.eviction runs/demo/seeds/h16_mqa.seed-0 --T 0.9 --T 0.98 --output X.jsonl
    python -m benchmarks.eviction_pareto X.jsonl --plot X.svg

For each T of FastGen the other policies get the budget at which they hold as many bytes at the end of a
window. These include positions, classes and scores. Scores are those of the tokens after the prompt: nats per
token above the full forward pass, the KL divergence to it, both with a 95 % interval over windows, and how
often the top token is the same. A line of JSON is printed for each policy, and appended to `--output`. What
is there already is not measured again.

    python -m benchmarks.eviction runs/demo/seeds/h16_mqa.seed-0 --task needle --T 0.95 --output Y.jsonl

scores a task of cla_jax/recall_tasks.py in the same way. The bytes are equal when the policy has seen the
context; the question and the answer follow. With `--policy` and without `--T`, the policies are taken with
their own settings.
"""

import contextlib
import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from cla_jax import checkpoint, costs, runs
from cla_jax.cache.evicting import evicting_spec
from cla_jax.compressor import Compressor
from cla_jax.config import ModelConfig
from cla_jax.decode import decoding_weights, on_one_device
from cla_jax.evaluate import open_session
from cla_jax.evaluation import EvictingScores
from cla_jax.eviction import Policy, parse, prompt_tokens
from cla_jax.eviction.classes import classes_of_tokenizer
from cla_jax.eviction.fastgen import FastGen
from cla_jax.eviction.policy import Budgeted
from cla_jax.eviction.rule import PUNCTUATION, SPECIAL
from cla_jax.eviction.snapkv import SnapKV
from cla_jax.eviction_scores import evicting_decoding, recall_scores
from cla_jax.model.transformer import Transformer
from cla_jax.recall_tasks import make_examples
from cla_jax.session import EvaluationSession
from cla_jax.uptrain import Text

OTHERS = ("window", "h2o", "snapkv", "adakv", "random")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arguments:
    # Run directories.
    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    # Thresholds of FastGen.
    T: tyro.conf.UseAppendAction[tuple[float, ...]] = ()
    # Further settings of FastGen, such as over=mean.
    settings: str = ""
    # The other policies, by default all of them; of tasks without T the policies, with their settings.
    policy: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Seeds of the policy random.
    draws: int = 3
    # Tasks of cla_jax/recall_tasks.py to score instead of held-out text.
    task: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    # Characters of a task's context and question together, about.
    length: int = 200
    # Examples of a task.
    count: int = 64
    # Only what FastGen would keep of the prompts; nothing is decoded.
    kept_only: bool = False
    # Windows of held-out text.
    windows: int = 64
    # Share of a window that is the prompt.
    prompt: float = 0.5
    # Tokens of a decode step. A step evicts after its last token.
    chunk: int = 1
    # Windows at once, if not as many as in training.
    batch_size: int | None = None
    # Where prepared data is, if not where the run says.
    data_dir: str | None = None
    # JSON lines are added to this file.
    output: Path | None = None


def main(argv: Sequence[str] | None = None) -> None:
    arguments = tyro.cli(Arguments, args=argv, description=__doc__)
    for path in arguments.runs:
        run = runs.find_run(path)
        session = open_session(run, arguments.data_dir, batch_size=arguments.batch_size)
        step, model = checkpoint.load_model(run, session.rules, session.mesh)
        named = {"run": run.path.name, "checkpoint": checkpoint.fingerprint(run, step)}

        for kind in arguments.task:
            score_task(session, model, kind, arguments, named)
        if arguments.kept_only:
            for threshold in arguments.T or (0.95,):
                policy = parse(fastgen(threshold, arguments.settings))
                numbers = kept_of_prompts(session, model, policy, arguments)
                say({"run": run.path.name, "policy": policy.name} | numbers)
        if arguments.task or arguments.kept_only:
            continue
        asked = named | {
            "context": session.data.seq_len,
            "windows": arguments.windows,
            "prompt": arguments.prompt,
            "chunk": arguments.chunk,
        }

        def measured(name: str, T: float, session=session, model=model, asked=asked):
            cell = asked | {"policy": parse(name).name}
            known = recorded(arguments.output, cell)  # perhaps at the bytes of another T

            def measure() -> dict[str, Any]:
                if known is not None:
                    return known | {"T": T}
                scores = evicting_decoding(
                    *(session, model, parse(name)),
                    chunk=arguments.chunk,
                    prompt=arguments.prompt,
                    windows=arguments.windows,
                )
                return line(scores, session)

            # T: that of the FastGen whose bytes this policy has.
            return once(cell | {"T": T}, measure, arguments.output)

        tokens = prompt_tokens(arguments.prompt, session.data.seq_len, arguments.chunk)
        for threshold in arguments.T or (0.95,):
            first = fastgen(threshold, arguments.settings)
            kept = measured(first, threshold)["kept"]
            for name in at_equal_bytes(
                session.model, first, kept, arguments.prompt, tokens, arguments
            ):
                measured(name, threshold)


def score_task(
    session: EvaluationSession,
    model: Transformer,
    kind: str,
    arguments: Arguments,
    named: dict[str, Any],
) -> None:
    """Prints what each policy answers of a task's examples; with thresholds, at the bytes of FastGen."""
    examples = make_examples(kind, count=arguments.count, length=arguments.length)
    asked = named | {"task": kind, "length": arguments.length, "count": arguments.count}
    dense = 2 * session.model.kv_elements / session.model.n_kv_heads  # bytes of a head at 16 bits

    def scored(name: str) -> dict[str, Any]:
        policy = parse(name)

        def measure() -> dict[str, Any]:
            scores = recall_scores(model, session.tokenizer, policy, examples)
            held = scores["kept_of_prompt"] * entry_bytes(session.model, policy) / dense
            return {"live_bytes_share": round(held, 4)} | scores

        return once(asked | {"policy": policy.name}, measure, arguments.output)

    if not arguments.T:
        for name in arguments.policy:
            scored(name)
    thresholds = arguments.T or (() if arguments.policy else (0.95,))
    # The context and a token that begins it: no budget may be less than what is always kept of the shortest.
    shortest = 1 + min(len(session.tokenizer.encode(one.context)) for one in examples)
    for threshold in thresholds:
        first = fastgen(threshold, arguments.settings)
        kept = scored(first)["kept_of_prompt"]
        for name in at_equal_bytes(session.model, first, kept, 1.0, shortest, arguments):
            scored(name)


def once(
    asked: dict[str, Any], measure: Callable[[], dict[str, Any]], output: Path | None
) -> dict[str, Any]:
    """A cell: what is in the file already, or else what was measured, which is printed and added to it."""
    if (known := recorded(output, asked)) is not None:
        return known
    cell = asked | measure()
    say(cell)
    if output:
        # On a line of its own, also after a line that a stop has cut short.
        cut = output.exists() and not read_lines(output)[1]
        with output.open("a") as file:
            file.write("\n" * cut + json.dumps(cell) + "\n")
    return cell


def say(cell: dict[str, Any]) -> None:
    print(json.dumps(cell), flush=True)


def fastgen(threshold: float, settings: str) -> str:
    return "fastgen:" + ",".join(filter(None, [f"T={threshold:g}", settings]))


def read_lines(file: Path) -> tuple[list[dict[str, Any]], bool]:
    """The cells of a file without those that a stop has cut short, and whether the last line is whole."""
    text, records = file.read_text(), []
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records, not text or text.endswith("\n")


def recorded(output: Path | None, cell: dict[str, Any]) -> dict[str, Any] | None:
    """The cell of a file that has all of this, if there is one."""
    if output is None or not output.exists():
        return None
    return next((one for one in read_lines(output)[0] if cell.items() <= one.items()), None)


def at_equal_bytes(
    model: ModelConfig, first: str, kept: float, prompt: float, tokens: int, arguments: Arguments
) -> Iterator[str]:
    """The other policies, with the budget at which they hold the bytes of FastGen with this share.

    `first` names FastGen's policy; the others have its format, its first tokens and its newest tokens.
    `prompt` is the share of all tokens that is the prompt, and `tokens` the length of the shortest prompt.
    """
    of_fastgen = parse(first)
    common = "".join(
        f",{name}={getattr(of_fastgen, name)}"
        for name in ("format", "sinks", "recent")
        if getattr(of_fastgen, name) != getattr(FastGen, name)
    )
    for other in arguments.policy or OTHERS:
        # These two keep the newest tokens as a part of their window.
        wide = other in ("snapkv", "adakv") and of_fastgen.recent > SnapKV.window
        more = f"{common},window={of_fastgen.recent}" if wide else common
        policy = parse(f"{other}:keep=1{more}")
        assert isinstance(policy, Budgeted)
        share = kept * entry_bytes(model, of_fastgen) / entry_bytes(model, policy)
        if other in ("snapkv", "adakv"):  # their budget is the prompt's
            share = (share - (1 - prompt)) / prompt
        budget = min(math.floor(share * 10_000) / 10_000, 1)
        if budget * tokens < policy.always:
            print(f"{other}: a budget of {budget:g} is less than what is always kept", flush=True)
        elif other == "random":
            seeds = range(arguments.draws)
            yield from (f"random:keep={budget:g},seed={seed}{more}" for seed in seeds)
        else:
            yield f"{other}:keep={budget:g}{more}"


def entry_bytes(model: ModelConfig, policy: Policy) -> int:
    """Of an entry of one head of all KV layers together, at 16 bits: position, class and score included."""
    config = dataclasses.replace(model, compute_dtype="bfloat16")
    classes = bytes([SPECIAL, PUNCTUATION])
    spec = evicting_spec(config, policy, classes=classes, batch=1, capacity=1)
    return sum(sum(spec.entry_bytes(p)) for p in range(len(spec.pages)))


def kept_of_prompts(
    session: EvaluationSession, model: Transformer, policy: Policy, arguments: Arguments
) -> dict[str, Any]:
    """The share of the prompts that is kept, over all and of each KV layer, and what policies heads have."""
    data, tokenizer = session.data, session.tokenizer
    classes = classes_of_tokenizer(tokenizer, data.begin_token)
    S = prompt_tokens(arguments.prompt, data.seq_len, 1)
    text = Text(session.prepared, session.end, session.begins)
    totals = [part.totals["held_out"] for part in session.prepared.parts.values()]
    whole = sum(each["tokens"] // data.seq_len for each in totals)
    inputs_BT, _, starts_BT = text.windows(min(arguments.windows, whole), "held_out")
    prompts = dict(enumerate(inputs_BT[:, :S].tolist()))
    size = len(prompts)
    spec = evicting_spec(session.model, policy, classes=classes, batch=size, capacity=data.seq_len)
    compressor = Compressor(decoding_weights(on_one_device(model)), spec)
    chosen = compressor.profiled(prompts, starts_BT[:, :S]).chosen
    kept_P = [float((one.kept_BKS.sum(-1) / one.lengths_B[:, None]).mean()) for one in chosen]
    policies = [policy.names[i] for one in chosen for i in one.choice.policy_BK.ravel()]
    return {
        "kept_of_prompt": round(sum(kept_P) / len(kept_P), 4),
        "layers": [round(share, 2) for share in kept_P],
        "policies": {name: round(policies.count(name) / len(policies), 3) for name in policy.names},
    }


def line(scores: EvictingScores, session: EvaluationSession) -> dict[str, Any]:
    """What a cell of the file has; losses in nats per token, bytes at 16 bits per token of context."""
    after, profile = scores.after_prompt, scores.profile
    assert after is not None
    full = costs.kv_bytes(session.model, session.data.seq_len).resident
    heads = sum(len(layer.kept) for layer in profile)
    return {
        "kept": round(scores.kept_share, 4),
        "kept_of_prompt": round(
            statistics.mean(sum(layer.kept) / len(layer.kept) for layer in profile), 4
        ),
        "live_bytes_share": round(scores.resident_share, 4),
        "live_bytes": round(scores.resident_share * full, 2),
        "tokens": after.tokens,
        "perplexity": round(after.perplexity, 4),
        "perplexity_by_full_forward": round(after.perplexity_by_full_forward, 4),
        "worse": round((after.nll - after.nll_by_full_forward) / after.tokens, 6),
        "worse_interval": round(after.worse_interval, 6),
        "kl": round(after.kl, 6),
        "kl_interval": round(after.kl_interval, 6),
        "top1": round(after.top1_agreement, 4),
        "by_window": after.windows,
        "policies": {
            name: round(sum(sum(layer.policies[name].share) for layer in profile) / heads, 3)
            for name in profile[0].policies
        },
        "seconds": {**scores.prefill_seconds, "all": scores.seconds},
    }


if __name__ == "__main__":
    main()
