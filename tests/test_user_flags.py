"""Exactness with the compiler flags that users have: other tests compile at optimisation level 0."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CASES = [
    # Cached = uncached: by single tokens, in chunks, in one pass.
    "test_decode.py::test_cached_decoding_equals_the_full_forward[cla:2-2-chunks1]",
    # A shared prefix = each request alone.
    "test_prefix_shared.py::test_requests_that_share_chunks_get_what_they_get_alone[changes1-1-2-8]",
    # Every mesh = one device.
    "test_model.py::test_layouts_are_declared_and_change_no_logits[shape2-mqa]",
]


@pytest.mark.slow
def test_results_are_exact_as_users_compile():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-n", "0", "-q", *(f"tests/{case}" for case in CASES)],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": "", "TESTS_COMPILE_AS_USERS": "yes"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert f"{len(CASES)} passed" in done.stdout
