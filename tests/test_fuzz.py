"""Every reader of files from elsewhere, on damaged ones: read, or refused in one short line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzzing

ROOT = Path(__file__).parents[1]
SEED, CASES = "1", 60  # of each reader


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    directory = tmp_path_factory.mktemp("f")
    fuzzing.write_examples(directory)
    return directory


def test_damaged_files_are_read_or_refused_in_a_line(examples):
    command = [sys.executable, "-m", "tests.fuzzing", str(examples), SEED, str(CASES)]
    ended = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, stdin=subprocess.DEVNULL
    )
    lines = [json.loads(line) for line in ended.stdout.splitlines()]
    problems = [line for line in lines if "problem" in line]
    assert not problems, "\n".join(f"{line.pop('problem')}\n  in {line}" for line in problems)
    assert lines, ended.stderr
    assert lines[-1] == {"done": True}, (ended.returncode, lines[-1], ended.stderr[-2000:])
