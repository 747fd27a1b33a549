"""What the compiler wrote about a program: collectives of its optimised HLO, and its largest buffers.

Read from the files of `xla_dump_to`: the text of some TPU programs cannot be had from the executable.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_SHAPE = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(-start)?\("
)
# For TPUs a reduce-scatter is a fusion: an all-reduce, and the part of it that the device keeps.
_FUSED_REDUCE_SCATTER = "all-reduce-scatter"
_CALLED = re.compile(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")


def find(dump: Path, ending: str) -> str:
    """The text of the file of a dump with this ending, of the largest program in it; empty if none."""
    files = sorted(dump.glob(f"*{ending}"), key=lambda file: file.stat().st_size)
    return files[-1].read_text() if files else ""


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation of a module; the entry under the name ENTRY too."""
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found[match[2]] = []
            if match[1]:
                found["ENTRY"] = lines
        elif line == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that the collectives of a run of the program hand a device, by kind of collective.

    An all-gather counts its result; an all-reduce twice its result, as a ring moves it; a reduce-scatter
    its operand. What stands in a loop counts as often as the loop turns.
    """
    modules = computations(text)
    # By channel: one that is overlapped with computation is written into each of the fusions it spans.
    moved: dict[str, tuple[str, int]] = {}

    def visit(name: str, times: int) -> None:
        for line in modules.get(name, ()):
            if loop := _WHILE.search(line):
                visit(loop[2], times * trip_count(modules[loop[1]]))
                continue
            if match := _COLLECTIVE.search(line):
                result, kind, started = match.groups()
                sizes = [nbytes for _, _, nbytes in shapes(result)]
                if started and kind in ("all-gather", "collective-permute"):
                    sizes = sizes[len(sizes) // 2 :]  # operands, results
                size = sum(sizes)
                factor = {"all-reduce": 2, "reduce-scatter": _group_size(line)}.get(kind, 1)
                if kind == "all-reduce" and name.startswith(_FUSED_REDUCE_SCATTER):
                    kind, factor = "reduce-scatter", 1
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line
                # A first or last turn may stand before or after its loop.
                moved[key] = max(moved.get(key, (kind, 0)), (kind, times * factor * size))
                continue
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += re.findall(r"[\w.\-]+", branches)
            for inner in called:
                visit(inner, times)

    visit("ENTRY", 1)
    total: Counter[str] = Counter()
    for kind, size in moved.values():
        total[kind] += size
    return dict(total)


def trip_count(condition: list[str]) -> int:
    """How often a loop from 0 turns: the constant that its condition compares with."""
    constants = [
        int(found) for line in condition for found in re.findall(r"constant\((\d+)\)", line)
    ]
    if not constants:
        raise ValueError("a loop whose condition compares with no constant: " + "".join(condition))
    return max(constants)


def shapes(text: str) -> Iterator[tuple[str, tuple[int, ...], int]]:
    """(dtype, dimensions, bytes) of every array type in a text."""
    for dtype, listed in _SHAPE.findall(text):
        if dtype in _BYTES:
            dims = tuple(int(size) for size in listed.split(",") if size)
            yield dtype, dims, math.prod(dims) * _BYTES[dtype]


def _group_size(line: str) -> int:
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([0-9,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    return 1


def allocated_bytes(report: str) -> int:
    """Bytes of a device's main memory that a program takes, arguments and results included.

    Args:
      report: of the dump, `memory-usage-report.txt`.
    """
    return int(re.findall(r"^Total bytes: (\d+)", report, re.MULTILINE)[0])  # of the first space


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """A stretch of memory that one or several values use, one after another."""

    bytes: int
    shape: str  # of the largest of its values
    where: str  # what computes that value


def largest_buffers(report: str, text: str, names: dict[str, str], count: int = 5) -> list[Buffer]:
    """The largest buffers of a memory-usage report, named.

    Args:
      report: of the dump, `memory-usage-report.txt`.
      text: the optimised HLO.
      names: shape, as HLO writes it, to a name: of the arrays that go in.
      count: how many.
    """
    main = report.split("Memory Space:")[1] if "Memory Space:" in report else report
    buffers = []
    for line in main.splitlines():
        parts = line.split(";")
        values = [
            (nbytes, f"{dtype}[{','.join(map(str, dims))}]")
            for dtype, dims, nbytes in shapes(parts[-1])
        ]
        if len(parts) != 5 or not values:
            continue
        size, shape = max(values)
        buffers.append(
            Buffer(bytes=size, shape=shape, where=names.get(shape, _source(shape, text)))
        )
        if len(buffers) == count:
            break
    return buffers


def _source(shape: str, text: str) -> str:
    """The named scope and operation that compute a value of this shape; empty if none says."""
    computed = (
        rf"= {re.escape(shape)}[^=]*? (?!parameter|get-tuple|copy)[\w\-]+\(.*op_name=\"([^\"]*)\""
    )
    match = re.search(computed, text)
    if match is None:
        return ""
    # A step of the path is jit(train_step), transpose(jvp(mlp)), while, or an operation.
    steps = [re.sub(r"\w+\(|\)", "", step) for step in match[1].split("/")]
    noise = ("", "train_step", "while", "body", "closed_call", "checkpoint", "rematted_computation")
    backward = " (backward)" if "transpose(" in match[1] else ""
    return "/".join([step for step in steps if step not in noise][-3:]) + backward
