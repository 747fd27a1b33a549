"""Traces of requests: read from JSON lines, made, and replayed through an engine. Only a replay needs jax.

A line is one request:

    {"arrival": 0.5, "prompt": [1, 2, 3], "new_tokens": 100, "group": "a"}

`arrival` is in seconds from the start. `prompt` is a list of token ids, or a text where there is a tokenizer.
Requests of one `group` are samples of one prompt; it may be left out.
"""

import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from etils import epath

from cla_jax import directories, files
from cla_jax.messages import near_choice, shown

if TYPE_CHECKING:
    from cla_jax.engine import Engine, Listener, Request

FIELDS = ("arrival", "prompt", "new_tokens", "group")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A request of a trace."""

    arrival: float  # seconds
    prompt: tuple[int, ...]
    new_tokens: int
    group: str | None = None


def read_trace(
    path: str | Path, encode: Callable[[str], Sequence[int]] | None = None
) -> list[Line]:
    """The requests of a trace by their arrival.

    Args:
      encode: makes token ids of a prompt that is a text.

    Raises:
      ValueError: a line that is no request, which is named with its file; or no line at all.
    """
    lines: list[Line] = []
    groups: dict[str, tuple[int, ...]] = {}
    for number, text in enumerate(files.read_lines(path, longest=files.LINES_BYTES), 1):
        if text.strip():
            where = f"{files.name(path)}, line {number}"
            line = _line(files.as_object(files.parse_json(text, where), where), where, encode)
            if line.group is not None and groups.setdefault(line.group, line.prompt) != line.prompt:
                raise ValueError(
                    f"{where}: the prompt differs from the first one of group {shown(line.group)}"
                )
            lines.append(line)
    if not lines:
        raise ValueError(f"{files.name(path)} has no requests")
    return sorted(lines, key=lambda line: line.arrival)


def _line(record: dict, where: str, encode: Callable[[str], Sequence[int]] | None) -> Line:
    for name in record:
        try:
            near_choice("field", name, FIELDS)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    if isinstance(prompt := record.get("prompt"), str):
        if encode is None:
            raise ValueError(
                f"{where}: field prompt is a text, but the model has no tokenizer: give token ids"
            )
        prompt = encode(prompt)
    else:
        prompt = files.field(record, "prompt", list, where)
    if not all(files.is_a(token, int) for token in prompt):
        raise ValueError(f"{where}: field prompt: expected token ids, found {shown(prompt)}")
    line = Line(
        arrival=files.field(record, "arrival", float, where),
        prompt=tuple(prompt),
        new_tokens=files.field(record, "new_tokens", int, where),
        group=files.field(record, "group", str, where, None),
    )
    if line.arrival < 0:
        raise ValueError(f"{where}: arrival = {line.arrival} must not be negative")
    if not line.prompt:
        raise ValueError(f"{where}: the prompt is empty")
    if line.new_tokens < 1:
        raise ValueError(f"{where}: new_tokens = {line.new_tokens} must be positive")
    return line


def write_trace(path: str | Path, lines: Sequence[Line]) -> None:
    records = [
        {k: v for k, v in dataclasses.asdict(line).items() if v is not None} for line in lines
    ]
    text = "".join(json.dumps(record) + "\n" for record in records)
    directories.write_atomically(epath.Path(path), text)


# ---------------------------------------------------------------------------------------- makers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """What a made trace looks like."""

    # Number of requests.
    requests: int = 64
    # Tokens of a common prefix.
    shared: int = 1024
    # Number of different prefixes; requests use them in turn.
    mixes: int = 1
    # Prompt tokens after the prefix, different for each request.
    own: int = 32
    # Tokens to generate for each request.
    new_tokens: int = 32
    # Mean arrivals per second, as a Poisson process; 0: all requests arrive at once.
    rate: float = 0.0
    # Token ids are below this, and below the model's vocabulary.
    vocabulary: int = 256
    # Random seed of the tokens and the arrivals.
    seed: int = 0


def make_trace(kind: str, shape: Shape) -> list[Line]:
    """A trace of one of `MAKERS`, of random tokens. Raises ValueError for an unknown kind or bad sizes."""
    near_choice("kind of trace", kind, MAKERS)
    for name in ("requests", "mixes", "new_tokens", "vocabulary"):
        if getattr(shape, name) < 1:
            raise ValueError(f"trace: {name} = {getattr(shape, name)} must be positive")
    for name in ("shared", "own", "rate"):
        if getattr(shape, name) < 0:
            raise ValueError(f"trace: {name} = {getattr(shape, name)} must not be negative")
    if shape.shared + shape.own < 1:
        raise ValueError("trace: shared and own are both 0, but a prompt needs at least one token")
    draw = random.Random(shape.seed)
    tokens = lambda n: tuple(draw.randrange(shape.vocabulary) for _ in range(n))
    prompts = MAKERS[kind](shape, tokens)
    arrival, lines = 0.0, []
    for prompt, group in prompts:
        arrival += draw.expovariate(shape.rate) if shape.rate else 0.0
        lines.append(Line(arrival=arrival, prompt=prompt, new_tokens=shape.new_tokens, group=group))
    return lines


Tokens = Callable[[int], tuple[int, ...]]
Prompts = list[tuple[tuple[int, ...], str | None]]


def _shared_prompt(shape: Shape, tokens: Tokens) -> Prompts:
    """System prompts, each followed by what a user asks."""
    begins = [tokens(shape.shared) for _ in range(shape.mixes)]
    return [(begins[i % shape.mixes] + tokens(shape.own), None) for i in range(shape.requests)]


def _few_shot(shape: Shape, tokens: Tokens) -> Prompts:
    """Evaluation: the examples of a task, a question (half of what is a request's own), and an option."""
    examples = [tokens(shape.shared) for _ in range(shape.mixes)]
    prompts: Prompts = []
    while len(prompts) < shape.requests:
        question = examples[len(prompts) // 4 % shape.mixes] + tokens(shape.own // 2)
        prompts += [(question + tokens(shape.own - shape.own // 2), None) for _ in range(4)]
    return prompts[: shape.requests]


def _parallel_sampling(shape: Shape, tokens: Tokens) -> Prompts:
    """Four samples of each prompt."""
    prompts: Prompts = []
    while len(prompts) < shape.requests:
        prompts += [(tokens(shape.shared + shape.own), f"group-{len(prompts) // 4}")] * 4
    return prompts[: shape.requests]


def _no_sharing(shape: Shape, tokens: Tokens) -> Prompts:
    """Prompts of the same lengths that have nothing in common."""
    return [(tokens(shape.shared + shape.own), None) for _ in range(shape.requests)]


MAKERS: dict[str, Callable[[Shape, Tokens], Prompts]] = {
    "shared-prompt": _shared_prompt,
    "few-shot": _few_shot,
    "parallel-sampling": _parallel_sampling,
    "no-sharing": _no_sharing,
}


# ---------------------------------------------------------------------------------------- replay


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moment:
    """Between two steps of the engine: seconds from the start, and KV bytes that requests use."""

    at: float
    resident: int
    unshared: int  # what they would use without sharing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """What came of a trace. Times are in seconds; lists are in the order of the lines."""

    seconds: float
    tokens: int  # generated
    first_token: list[float]  # from the arrival on
    latency_per_token: list[float]  # from the arrival to the end, a generated token
    moments: list[Moment]

    def summary(self) -> dict[str, float]:
        peak = max(self.moments, key=lambda moment: moment.resident)
        numbers = {
            "seconds": self.seconds,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
            "resident_peak_bytes": peak.resident,
            "unshared_at_peak_bytes": peak.unshared,
            "saved_at_peak_bytes": peak.unshared - peak.resident,
        }
        for name in ("first_token", "latency_per_token"):
            values = sorted(getattr(self, name))
            for percent in (50, 90, 99):
                numbers[f"{name}_p{percent}"] = values[-(-len(values) * percent // 100) - 1]
        return numbers


def check(engine: "Engine", lines: Sequence[Line], where: str = "the trace") -> None:
    """Raises ValueError for the first line that the engine cannot serve. Nothing is left in the engine."""
    for i, line in enumerate(lines, 1):
        name = f"{where}, request {i} by arrival"
        engine.cancel(engine.submit(line.prompt, new_tokens=line.new_tokens, name=name))


def warm_up(engine: "Engine") -> None:
    """Compiles all programs. What this counts is forgotten.

    Prompts for all rows, two of them equal; then one alone that the host ends, and one after it. They have no
    more tokens than a row may have.
    """
    from cla_jax.places import Counts

    new_tokens = min(2, engine.spec.capacity - 1)

    def submit(i: int, listener: "Listener | None" = None) -> None:
        prompt = [i % engine.spec.config.vocab_size]
        engine.submit(prompt, new_tokens=new_tokens, listener=listener)

    for i in (0, *range(engine.spec.batch - 1)):
        submit(i)
    engine.run()
    for listener in (lambda _: True, None):
        submit(0, listener)
        engine.run()
    engine.places.counts = Counts()


def replay(engine: "Engine", lines: Sequence[Line]) -> Replay:
    """Runs a trace as it comes, in real time. Every request draws with its own seed."""
    begin = time.perf_counter()
    now = lambda: time.perf_counter() - begin
    first: dict[int, float] = {}
    ends: dict[int, float] = {}
    asked: dict[int, Request] = {}
    moments = [Moment(at=0.0, resident=0, unshared=0)]
    waiting = list(enumerate(lines))[::-1]

    def listener(i: int) -> Callable[[list[int]], None]:
        def listen(_new: list[int]) -> None:
            first.setdefault(i, now())

        return listen

    while waiting or not engine.idle:
        while waiting and waiting[-1][1].arrival <= now():
            i, line = waiting.pop()
            asked[i] = engine.submit(
                line.prompt, new_tokens=line.new_tokens, seed=(0, i), listener=listener(i)
            )
        if engine.idle:
            time.sleep(max(waiting[-1][1].arrival - now(), 0))
            continue
        engine.step()
        at = now()
        ends |= {i: at for i, request in asked.items() if request.ended and i not in ends}
        resident, unshared = engine.places.bytes()
        moments.append(Moment(at=at, resident=resident, unshared=unshared))
    counts = {i: len(request.completion.tokens) for i, request in asked.items()}
    return Replay(
        seconds=now(),
        tokens=sum(counts.values()),
        first_token=[first.get(i, ends[i]) - line.arrival for i, line in enumerate(lines)],
        latency_per_token=[
            (ends[i] - line.arrival) / max(counts[i], 1) for i, line in enumerate(lines)
        ],
        moments=moments,
    )
