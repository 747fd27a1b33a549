"""Names: which are refused wherever they come from, and what they become for other systems."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cla_jax import names


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (r"back\x", "has a backslash"),
        ("a\tb", "unprintable character '\\\\t'"),
        ("a\x1b[31mb", "unprintable character '\\\\x1b'"),
        ("a\udce9", "unprintable character"),  # bytes that are not UTF-8
        ("a\u202eb", "unprintable character"),  # turns the direction of what follows
        ("é" * 101, "has 202 bytes; the limit is 200"),
        ("study//row", "without empty, . or .. parts"),
        ("../row", "without empty, . or .. parts"),
        ("study/.row", "begins with a dot"),
    ],
)
def test_names_that_would_lead_elsewhere_are_refused(tiny, name, words):
    with pytest.raises(ValueError, match=words) as error:
        tiny(name=name)
    assert str(error.value).startswith("name = ")
    assert len(str(error.value)) < 300
    if "/" not in name:
        for field in ("placement.runs", "placement.data_dir"):
            with pytest.raises(ValueError, match=words) as error:
                tiny(**{field: f"/shared/{name}"})
            assert str(error.value).startswith(f"{field} = ")


def test_odd_names_that_are_directories_like_others_are_taken(tiny):
    for name in ("a#b", "é/ü", "it's", "50%A", "a b", "[x]", '"q"', "$x$", "日本"):
        assert tiny(name=name).name == name
        assert tiny(**{"placement.runs": f"../{name}"}).placement.runs == f"../{name}"


@pytest.mark.parametrize("name", ["5", "peak_lr=0.001,seed=0", "a" * 200])
def test_names_of_trials(name):
    names.check_trial(name)


@pytest.mark.parametrize("name", ["a" * 201, "a b", "-a", "é", "", "a/b", "a\n"])
def test_trials_are_words_of_a_command_line(name):
    with pytest.raises(ValueError, match="trial"):
        names.check_trial(name)


@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_a_word_is_safe_and_tells_names_apart(pair):
    first, second = map(names.word, pair)
    assert first != second
    for word in (first, second):
        assert re.fullmatch("[a-z0-9]([a-z0-9-]*[a-z0-9])?", word)
        assert len(word) <= 33


def test_a_word_reads_like_its_name():
    assert names.word("Smoke/grid,seed=0").startswith("smoke-grid-seed-0-")
    assert names.word("a-b/c") != names.word("a/b-c")
