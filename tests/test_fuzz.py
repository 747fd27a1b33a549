"""Every reader of files from elsewhere, on damaged ones: read, or refused in one short line."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cla_jax.interop import task_data
from tests import fuzzing

ROOT = Path(__file__).parents[1]
SEED, CASES = "1", 60  # of each reader


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    directory = tmp_path_factory.mktemp("f")
    fuzzing.write_examples(directory)
    return directory


def test_damaged_files_are_read_or_refused_in_a_line(examples):
    check(examples)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", 'text,n\n"two\nlines",1\n', ""),
        ("a.csv", "text,n\na\n", "line 2 has 1 values, but the first line has 2 columns"),
        ("a.csv", '"open', "is not CSV"),
        ("a.csv", "", "the first line must name the columns"),
        ("a.csv", b"text\n\xff\n", "line 2 is not text in UTF-8"),
        ("a.jsonl", '{"text": "a"}\n\n', ""),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_rows_of_a_data_set_are_checked_in_their_own_form(tmp_path, name, content, words):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=words) if words else contextlib.nullcontext():
        task_data.check_rows(file)


def check(examples, *readers):
    """Fuzzes readers, by default all; nothing may go wrong."""
    command = [sys.executable, "-m", "tests.fuzzing", str(examples), SEED, str(CASES), *readers]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    problems = [line for line in lines if "problem" in line]
    assert not problems, "\n".join(f"{line.pop('problem')}\n  in {line}" for line in problems)
    assert lines, ended.stderr
    assert lines[-1] == {"done": True}, (ended.returncode, lines[-1], ended.stderr[-2000:])
