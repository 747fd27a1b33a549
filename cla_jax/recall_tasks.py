"""Texts whose end can be predicted only by who remembers their beginning: tests for caches that forget.

    examples = make_examples("needle", count=100, length=1000, seed=0)

Everything is made from a seed, nothing is downloaded. An example is a context, a question, an answer,
and the depth at which the context has what the answer needs: 0 is its beginning, 1 its end. A policy sees
the context alone. `write_tasks` writes them as tasks of the lm-evaluation-harness. The kinds follow RULER
(2404.06654) and Zoology (2312.04927).
"""

import collections
import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

from cla_jax.messages import near_choice

NOISE = (
    "The grass is green. ", "The sky is blue. ", "The sun is yellow. ", "Here we go. ",
    "There and back again. ",
)  # fmt: skip
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    context: str
    question: str
    answer: str  # begins with a space
    depth: float  # where in the context the answer is from


def word(draw: random.Random, syllables: int = 3) -> str:
    return "".join(draw.choice(CONSONANTS) + draw.choice(VOWELS) for _ in range(syllables))


def words(draw: random.Random, count: int, syllables: int = 3) -> list[str]:
    """Different words."""
    drawn: dict[str, None] = {}
    while len(drawn) < count:
        drawn[word(draw, syllables)] = None
    return list(drawn)


def needle(draw: random.Random, length: int) -> Example:
    """A sentence with a number among sentences that say nothing."""
    key, number = word(draw), str(draw.randrange(10_000, 100_000))
    fact, question = f"The number of {key} is {number}. ", f"The number of {key} is"
    return _hidden(draw, fact, question, " " + number, length)


def _noise(draw: random.Random, size: int) -> list[str]:
    """Filler sentences of at least `size` characters together."""
    drawn: list[str] = []
    while size > 0:
        drawn.append(draw.choice(NOISE))
        size -= len(drawn[-1])
    return drawn


def _hidden(draw: random.Random, fact: str, question: str, answer: str, length: int) -> Example:
    noise = _noise(draw, length - len(fact) - len(question))
    at = draw.randint(0, len(noise))
    before = "".join(noise[:at])
    context = before + fact + "".join(noise[at:])
    return Example(
        context=context, question=question, answer=answer, depth=len(before) / len(context)
    )


def key_value(draw: random.Random, length: int) -> Example:
    """One of many pairs of a word and a number."""
    count = max(2, (length - 10) // len("bababa: 12345\n"))
    keys = words(draw, count)
    values = [str(draw.randrange(10_000, 100_000)) for _ in keys]
    lines = [f"{key}: {value}\n" for key, value in zip(keys, values, strict=True)]
    i, context = draw.randrange(count), "".join(lines)
    depth = len("".join(lines[:i])) / len(context)
    return Example(context=context, question=f"{keys[i]}:", answer=" " + values[i], depth=depth)


def variables(draw: random.Random, length: int) -> Example:
    """A variable that has the value of another one, and so on, among sentences that say nothing."""
    names = [name.upper() for name in words(draw, 4)]
    number = str(draw.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {number}. "]
    chain += [f"VAR {new} = {old}. " for old, new in itertools.pairwise(names)]
    question = f"The value of {names[-1]} is"
    parts = _noise(draw, length - len("".join(chain)) - len(question))
    places = sorted(draw.sample(range(len(parts) + len(chain)), len(chain)))
    for place, step in zip(places, chain, strict=True):
        parts.insert(place, step)
    context = "".join(parts)
    depth = context.index(chain[0]) / len(context)
    return Example(context=context, question=question, answer=" " + number, depth=depth)


def common_words(draw: random.Random, length: int) -> Example:
    """The word that is there most often."""
    common, *others = words(draw, max(4, length // 30))
    question = "The most common word is"
    size = len(common) + 1
    total = max(8, (length - len(question)) // size)
    often = max(4, total // 3)
    rest = [draw.choice(others) for _ in range(total - often)]
    while max(collections.Counter(rest).values()) >= often:  # in a short text, another word may win
        rest = [draw.choice(others) for _ in range(total - often)]
    listed = [common] * often + rest
    draw.shuffle(listed)
    return Example(
        context=" ".join(listed) + ". ",
        question=question,
        answer=" " + common,
        depth=listed.index(common) / len(listed),
    )


def recall(draw: random.Random, length: int) -> Example:
    """Pairs of words, some of them asked for again; the last question is the one that counts."""
    count = max(3, length // (2 * len("bababa kakaka, ")))
    drawn = words(draw, 2 * count)
    pairs = list(zip(drawn[:count], drawn[count:], strict=True))
    text = "".join(f"{key} {value}, " for key, value in pairs)
    asked = pairs.copy()
    draw.shuffle(asked)
    while len(asked) > 1 and len(text) + sum(len(k) + len(v) + 3 for k, v in asked) > length:
        asked.pop()
    again = "".join(f"{key} {value}, " for key, value in asked[:-1])
    key, value = asked[-1]
    depth = text.index(f"{key} {value}") / len(text)
    return Example(context=text, question=again + key, answer=" " + value, depth=depth)


def copy(draw: random.Random, length: int) -> Example:
    """A list of words that begins again, up to one of its words."""
    count = max(3, length // (2 * len("bababa ")))
    listed = words(draw, count)
    i = draw.randrange(1, count)
    context, again = " ".join(listed) + ". ", " ".join(listed[:i])
    depth = len(again) / len(context)
    return Example(context=context, question=again, answer=" " + listed[i], depth=depth)


def recency(draw: random.Random, length: int) -> Example:
    """A short list of words at the end of a text that says nothing; it begins again, up to one of its words.

    A cache passes if it keeps the newest tokens, and what the model needs to read them.
    """
    listed = words(draw, 8, syllables=2)
    i = draw.randrange(4, 8)
    fact = f"The words are {', '.join(listed)}. Again,"
    question = f" the words are {', '.join(listed[:i])},"
    context = "".join(_noise(draw, length - len(fact) - len(question))) + fact
    depth = context.index(listed[i]) / len(context)
    return Example(context=context, question=question, answer=f" {listed[i]}", depth=depth)


KINDS: dict[str, Callable[[random.Random, int], Example]] = {
    "needle": needle,
    "key_value": key_value,
    "variables": variables,
    "common_words": common_words,
    "recall": recall,
    "copy": copy,
    "recency": recency,
}


def make_examples(kind: str, *, count: int, length: int, seed: int = 0) -> list[Example]:
    """Examples of about `length` characters, question included; equal arguments give equal examples.

    Raises ValueError for an unknown kind, or a length that leaves no room for what is asked or is too large.
    """
    near_choice("task", kind, KINDS)
    if count < 1:
        raise ValueError(f"count = {count} must be positive")
    if not 120 <= length <= 1_000_000:
        raise ValueError(f"length = {length:,} must be 120 to 1,000,000 characters")
    return list(_drawn(kind, count, length, seed))


def _drawn(kind: str, count: int, length: int, seed: int) -> Iterator[Example]:
    for i in range(count):
        yield KINDS[kind](random.Random(f"{kind} {length} {seed} {i}"), length)


# A task of the lm-evaluation-harness: is the answer the likeliest continuation, and how likely is it.
_TASK = """task: recall_{kind}
dataset_path: recall
dataset_name: {kind}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{context}}}}{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
metadata:
  version: 1
"""


def write_tasks(
    directory: str | Path, *, count: int = 100, length: int = 1000, seed: int = 0
) -> list[Path]:
    """Writes a task of the harness for every kind, with its data, as `--task-data` takes them.

    Returns the task files. Raises ValueError for what `make_examples` refuses.
    """
    directory, made = Path(directory), []
    for kind in KINDS:
        lines = make_examples(kind, count=count, length=length, seed=seed)
        rows = directory / "recall" / kind / "test.jsonl"
        rows.parent.mkdir(parents=True, exist_ok=True)
        rows.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in lines))
        made.append(directory / f"recall_{kind}.yaml")
        made[-1].write_text(_TASK.format(kind=kind))
    return made
