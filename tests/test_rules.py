"""The rules of docs/design.md that are about the source itself."""

import ast
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CLOCKS = {"time", "monotonic", "perf_counter", "process_time", "thread_time"}
SKIPS = {"skip", "skipif", "importorskip", "xfail"}


def nodes(folder: str, kind: type) -> list[tuple[str, Any]]:
    """The nodes of a kind in the files of a folder, with where they are."""
    found = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        tree = ast.walk(ast.parse(file.read_text()))
        found += [(f"{file.relative_to(ROOT)}:{n.lineno}", n) for n in tree if isinstance(n, kind)]
    assert found, f"nothing was read in {folder}"
    return found


def is_clock(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="time"), attr=name)):
            return name.removesuffix("_ns") in CLOCKS
    return False


def test_no_test_measures_a_time():
    """Deadlines are sums with a clock; a duration, which might be asserted, would be a difference."""
    differences = [(at, node) for at, node in nodes("tests", ast.BinOp) if type(node.op) is ast.Sub]
    assert [at for at, node in differences if any(map(is_clock, ast.walk(node)))] == []


def test_no_test_can_pass_by_skipping():
    assert [at for at, node in nodes("tests", ast.Attribute) if node.attr in SKIPS] == []


def test_a_compiled_function_takes_its_cache_over():
    """Else every call would hold two. One copies a cache: the rows of a prefix, for its suffixes."""
    kept, taken_over = set(), set()
    for _, node in nodes("cla_jax", ast.FunctionDef):
        jitted = [how for how in map(ast.unparse, node.decorator_list) if "jax.jit" in how]
        if jitted and "cache" in [argument.arg for argument in node.args.args]:
            donated = jitted[0].partition("donate_argnames=")[2]
            (taken_over if "'cache'" in donated else kept).add(node.name)
    assert kept == {"_gather_rows"}
    assert {"_prefill_chunk", "_loop"} <= taken_over


@pytest.mark.parametrize("folder", ["cla_jax", "launch", "experiments", "benchmarks", "tests"])
def test_what_is_caught_broadly_is_raised_again(folder):
    broad = (None, "Exception", "BaseException")
    swallowed = [
        at
        for at, node in nodes(folder, ast.ExceptHandler)
        if (node.type and ast.unparse(node.type)) in broad
        and not isinstance(node.body[-1], ast.Raise)
    ]
    assert swallowed == []


def test_every_option_of_a_benchmark_has_a_help_text_of_its_own():
    """A field without a comment gets that of the field before."""
    missing = []
    for at, node in nodes("benchmarks", ast.ClassDef):
        if node.name not in ("Arguments", "Options", "CommonOptions"):
            continue
        lines = (ROOT / at.rpartition(":")[0]).read_text().splitlines()
        for field in (one for one in node.body if isinstance(one, ast.AnnAssign)):
            before, own = lines[field.lineno - 2], lines[field.end_lineno - 1]
            if not before.strip().startswith("#") and "  # " not in own:
                missing.append(f"{at}: {ast.unparse(field.target)}")
    assert missing == []
