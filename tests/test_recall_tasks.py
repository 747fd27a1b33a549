"""Texts for caches that forget: what they ask can be answered from their context alone."""

import json
import re

import pytest

from cla_jax.recall_tasks import KINDS, make_examples, write_tasks


@pytest.mark.parametrize("kind", KINDS)
def test_examples_are_of_the_length_and_come_from_the_seed(kind):
    examples = make_examples(kind, count=30, length=600)
    assert examples == make_examples(kind, count=30, length=600)
    assert examples != make_examples(kind, count=30, length=600, seed=1)
    assert examples[:10] == make_examples(kind, count=10, length=600)  # more examples change none
    for one in examples:
        assert 300 <= len(one.context + one.question) <= 700
        assert re.fullmatch(r" \w+", one.answer)
        assert 0 <= one.depth < 1
        assert one.answer.strip() in one.context
    # What is asked for is anywhere in the text.
    depths = [one.depth for one in examples]
    if kind == "recency":
        assert min(depths) > 0.7
    elif kind != "common_words":
        assert min(depths) < 0.3
        assert max(depths) > 0.5


@pytest.mark.parametrize("length", [120, 200, 500])
def test_answers_are_what_the_context_says(length):
    of = lambda kind: make_examples(kind, count=20, length=length)
    for one in of("needle"):
        key = re.fullmatch(r"The number of (\w+) is", one.question)[1]
        assert f"The number of {key} is{one.answer}." in one.context
        assert one.context.index("The number of") == round(one.depth * len(one.context))
    for one in of("key_value"):
        assert f"{one.question}{one.answer}\n" in one.context
    for one in of("variables"):
        values = dict(re.findall(r"VAR (\w+) = (\w+)\.", one.context))
        value = re.fullmatch(r"The value of (\w+) is", one.question)[1]
        while value in values:
            value = values[value]
        assert value == one.answer.strip()
        assert len(values) == 4
    for one in of("common_words"):
        listed = one.context.partition(".")[0].split()
        counts = sorted(((listed.count(w), w) for w in set(listed)), reverse=True)
        assert counts[0][1] == one.answer.strip()
        assert counts[0][0] > counts[1][0]
    for one in of("recall"):
        assert f"{one.question.split()[-1]}{one.answer}, " in one.context
    for one in of("copy"):
        assert one.context.startswith(one.question + one.answer)
    for one in of("recency"):
        listed = re.search(r"The words are (.*)\. Again,$", one.context)[1]
        again = one.question.removeprefix(" the words are ")
        assert f"{listed},".startswith(f"{again}{one.answer},")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"kind": "neddle", "count": 1, "length": 500},
            "unknown task 'neddle'; did you mean needle",
        ),
        ({"kind": "needle", "count": 0, "length": 500}, "count = 0 must be positive"),
        ({"kind": "needle", "count": 1, "length": 50}, "length = 50 must be 120 to 1,000,000"),
        ({"kind": "copy", "count": 1, "length": 10**7}, "length = 10,000,000 must be 120 to"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        make_examples(**arguments)


def test_tasks_are_written_as_the_harness_reads_them(tmp_path):
    made = write_tasks(tmp_path / "tasks", count=3, length=200)
    assert [file.stem for file in made] == [f"recall_{kind}" for kind in KINDS]
    for file, kind in zip(made, KINDS, strict=True):
        rows = tmp_path / "tasks" / "recall" / kind / "test.jsonl"
        lines = rows.read_text().splitlines()
        keys = {"context", "question", "answer", "depth"}
        assert [set(json.loads(line)) for line in lines] == [keys] * 3
        assert f"task: {file.stem}\n" in file.read_text()
        assert f"dataset_name: {kind}\n" in file.read_text()
