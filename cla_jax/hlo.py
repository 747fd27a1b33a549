"""What the compiler wrote about a program: memory traffic and collectives of its optimised HLO, buffers.

Read from the files of `xla_dump_to`: the text of some TPU programs cannot be had from the executable.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
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
_KNOWN_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')  # GPU programs say it


def find(dump: Path, ending: str) -> str:
    """The text of the file of a dump with this ending, of the largest program in it; empty if none."""
    files = sorted(dump.glob(f"*{ending}"), key=lambda file: file.stat().st_size)
    return files[-1].read_text() if files else ""


def computations(text: str) -> dict[str, list[str]]:
    """The instructions of each computation of a module; the entry under the name ENTRY too."""
    bodies: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = bodies[match[2]] = []
            if match[1]:
                bodies["ENTRY"] = lines
        elif line == "}":
            lines = None
        elif lines is not None:
            lines.append(line)
    return bodies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """Devices that exchange something, in one place of the program."""

    kind: str
    bytes: int  # that a run of the program hands each device
    group: tuple[int, ...]  # the devices that exchange it with the first of them; empty for all


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that the collectives of a run of the program hand a device, by kind of collective."""
    return by_kind((collective.kind, collective.bytes) for collective in collectives(text))


def by_kind(sizes: Iterable[tuple[str, int]]) -> dict[str, int]:
    """The sums of (kind, bytes)."""
    total: Counter[str] = Counter()
    for kind, size in sizes:
        total[kind] += size
    return dict(total)


def network_bytes(exchanges: Iterable[Collective], per_host: int) -> dict[str, int]:
    """Bytes that collectives over several hosts take through the network port of each device, by kind.

    Rings pass each host once for all of its devices, which share the work. So a device's port carries
    its share of what its host is handed. Hosts have `per_host` devices.
    """
    return by_kind(
        (collective.kind, collective.bytes // sum(i < per_host for i in collective.group))
        for collective in exchanges
        if collective.group and max(collective.group) >= per_host
    )


def collectives(text: str) -> list[Collective]:
    """The collectives of a run of the program.

    An all-gather counts its result; an all-reduce twice its result, as a ring moves it; a reduce-scatter
    its operand. What stands in a loop counts as often as the loop turns.
    """
    modules = computations(text)
    # By channel: one that is overlapped with computation is written into each of the fusions it spans.
    moved: dict[str, tuple[str, int, tuple[int, ...]]] = {}

    def visit(name: str, times: int) -> None:
        for line in modules.get(name, ()):
            if loop := _WHILE.search(line):
                visit(loop[2], times * _turns(line, modules[loop[1]]))
                continue
            if match := _COLLECTIVE.search(line):
                result, kind, started = match.groups()
                sizes = [nbytes for _, _, nbytes in shapes(result)]
                if started and kind in ("all-gather", "collective-permute"):
                    sizes = sizes[len(sizes) // 2 :]  # operands, results
                size, group = sum(sizes), _group(line)
                # The result of a started reduce-scatter has the operand beside it.
                factor = {"all-reduce": 2, "reduce-scatter": max(len(group), 1)}.get(kind, 1)
                if kind == "all-reduce" and name.startswith(_FUSED_REDUCE_SCATTER):
                    kind, factor = "reduce-scatter", 1
                channel = re.search(r"channel_id=(\d+)", line)
                key = channel[1] if channel else line
                # A first or last turn may stand before or after its loop.
                moved[key] = max(
                    moved.get(key, (kind, 0, group)), (kind, times * factor * size, group)
                )
                continue
            for inner in _called(line):
                visit(inner, times)

    visit("ENTRY", 1)
    return [Collective(kind=kind, bytes=size, group=group) for kind, size, group in moved.values()]


# ------------------------------------------------------------------------------- memory traffic

# Operations that move nothing; what a started operation moves is counted at its start.
_FREE = {
    *("parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("after-all", "partition-id", "replica-id", "async-update"),
}
_LAYOUT = {"copy", "transpose"}
_CONTROL = {"while", "call", "conditional"}
_WITH_BODY = {"fusion", "async-start"}
# These read as much of their first operand as they return.
_PARTIAL = {"slice", "dynamic-slice", "gather"}
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
# An array type, its layout if it is written: S(n) there is another memory than the main one.
_PLACED = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\](\{[^}]*\})?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a run of a program reads from and writes to the main memory of a device."""

    total: int
    copies: int  # of these, by instructions that only change the layout of an array


@dataclasses.dataclass(frozen=True)
class _Instruction:
    is_root: bool
    name: str
    result: str  # type
    operation: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.partition("), ")[0])

    @property
    def parameter(self) -> int:
        """The number of a parameter."""
        return int(self.rest.partition(")")[0])


def _placed_bytes(types: str, *, anywhere: bool = False) -> int:
    """Bytes of the arrays of a type that lie in the main memory, or `anywhere`."""
    return sum(
        nbytes
        for dtype, listed, layout in _PLACED.findall(types)
        if anywhere or "S(" not in layout
        for _, _, nbytes in shapes(f"{dtype}[{listed}]")
    )


def memory_traffic(text: str) -> Traffic:
    """What a run of the program moves, by its instructions.

    A fusion reads of an operand as much as it uses: a slice, if it takes only slices. It writes its
    results; of an array that it updates, the part that is new. What stands in a loop counts as often as the
    loop turns.
    """
    program = _Program(text)
    total = copies = 0
    for name, instruction, times in program.executed("ENTRY", 1):
        size = times * program.moved(name, instruction)
        total += size
        copies += size if program.only_moves(instruction) else 0
    return Traffic(total=total, copies=copies)


def reads(text: str, argument: str) -> dict[str, int]:
    """What each instruction reads, each time that it runs, of the program's arguments with this name.

    The name is that of jax, or its beginning: `cache.kv_layers[0]`. An argument is followed through tuples,
    loops and calls, and through instructions that only change its layout. Instructions by name, those inside
    of fusions left out. How often they run is not in the text, if a loop turns as often as the data say.
    """
    program = _Program(text)
    held = program.holders(argument)
    read = {
        instruction.name: sum(
            part
            for operand, part in program.read_by(within, instruction)
            if (operand, None) in held[within]
        )
        for within, instruction in program.not_fused()
    }
    return {name: size for name, size in read.items() if size}


def _moves(instruction: _Instruction) -> bool:
    """Whether it may move anything."""
    return instruction.operation not in _FREE and not instruction.operation.endswith("-done")


class _Program:
    """The instructions of each computation of a program, and what they read and write."""

    def __init__(self, text: str):
        self._lines = computations(text)
        self._instructions = {
            name: [
                _Instruction(bool(m[1]), *m.groups()[1:])
                for m in map(_INSTRUCTION.match, body)
                if m
            ]
            for name, body in self._lines.items()
        }
        self._defined = {
            name: {i.name: i for i in body} for name, body in self._instructions.items()
        }

    def executed(self, name: str, times: int) -> Iterator[tuple[str, _Instruction, int]]:
        """The instructions that move something, in which computation, and how often a run executes them."""
        for instruction in self._instructions.get(name, ()):
            if instruction.operation == "while":
                condition, body = re.findall(r"(?:condition|body)=%?([\w.\-]+)", instruction.rest)
                turns = _turns(instruction.rest, self._lines[condition])
                yield from self.executed(body, times * turns)
            elif instruction.operation in ("call", "conditional"):
                for inner in self._called(instruction):
                    yield from self.executed(inner, times)
            elif _moves(instruction):
                yield name, instruction, times

    def not_fused(self) -> Iterator[tuple[str, _Instruction]]:
        """All instructions that move something, in which computation; those inside of fusions left out."""
        fused = {
            inner
            for body in self._instructions.values()
            for instruction in body
            if instruction.operation not in _CONTROL
            for inner in self._called(instruction)
        }
        for name in self._instructions.keys() - fused - {"ENTRY"}:
            for instruction in self._instructions[name]:
                if _moves(instruction) and instruction.operation not in _CONTROL:
                    yield name, instruction

    def holders(self, argument: str) -> dict[str, set[tuple[str, int | None]]]:
        """In each computation, the instructions whose result is one of these arguments, or has it in a tuple.

        With its number in the tuple, or None for the result itself.
        """
        held: dict[str, set[tuple[str, int | None]]] = {
            within: {(i.name, None) for i in body if f'op_name="{argument}' in i.rest}
            for within, body in self._instructions.items()
        }
        before = -1
        while before != (count := sum(map(len, held.values()))):  # a loop hands on what it returns
            before = count
            for within, body in self._instructions.items():
                for i in body:
                    held[within] |= {(i.name, number) for number in self._hold(within, i, held)}
        return held

    def _hold(
        self, within: str, i: _Instruction, held: dict[str, set[tuple[str, int | None]]]
    ) -> set[int | None]:
        """Where a result holds what its operands hold. What it calls is told what it is handed."""
        numbers = lambda name, within=within: {k for n, k in held[within] if n == name}
        match i.operation:
            case "tuple":
                return {k for k, operand in enumerate(i.operands) if None in numbers(operand)}
            case "get-tuple-element":
                number = int(re.findall(r"index=(\d+)", i.rest)[0])
                return {None} if number in numbers(i.operands[0]) else set()
            case "while" | "call" | "conditional":
                returned: set[int | None] = set()
                for branch, inner in enumerate(self._called(i)):
                    body = self._instructions[inner]
                    (root,) = (each for each in body if each.is_root)
                    returned |= numbers(root.name, inner)
                    for parameter in body:
                        if parameter.operation == "parameter":
                            # The first operand of a conditional chooses the branch.
                            by = branch + 1 if i.operation == "conditional" else parameter.parameter
                            handed = numbers(i.operands[by])
                            if i.operation == "while":
                                handed = returned = handed | returned
                            held[inner] |= {(parameter.name, number) for number in handed}
                return returned
        moves = i.operation in ("bitcast", "opt-barrier") or self.only_moves(i)
        return numbers(i.operands[0]) if moves and i.operands else set()

    def read_by(self, name: str, instruction: _Instruction) -> list[tuple[str, int]]:
        """The operands that an instruction reads, and how many bytes of each in the main memory."""
        defined = self._defined[name]
        if instruction.operation in _WITH_BODY:
            wholes = {
                operand: _placed_bytes(defined[operand].result)
                for operand in instruction.operands
                if operand in defined
            }
            return [
                (operand, self._read(inner, parameter, wholes[operand]))
                for inner, parameter, operand in self._handed(instruction)
                if wholes.get(operand)
            ]
        operands = self._operands(name, instruction)
        if instruction.operation in _PARTIAL:  # indices are small
            placed = _placed_bytes(operands[0].result)
            part = _placed_bytes(instruction.result, anywhere=True) if placed else 0
            return [(operands[0].name, part)]
        return [(operand.name, _placed_bytes(operand.result)) for operand in operands]

    def moved(self, name: str, instruction: _Instruction) -> int:
        """Bytes that an instruction of a computation reads and writes."""
        operands = self._operands(name, instruction)
        result = _placed_bytes(instruction.result)
        match instruction.operation:
            case "fusion":
                (inner,) = self._called(instruction)
                result = max(result - self._not_written(inner), 0)
            case "dynamic-update-slice":
                part = _placed_bytes(operands[1].result, anywhere=True)
                return _placed_bytes(operands[1].result) + (part if result else 0)
            case "copy-start":  # (to, from, context)
                return result
            case "async-start":
                (inner,) = self._called(instruction)
                inside = self._instructions[inner]
                return sum(self.moved(inner, i) for i in inside if i.operation not in _FREE)
        return result + sum(part for _, part in self.read_by(name, instruction))

    def only_moves(self, instruction: _Instruction) -> bool:
        """Whether an instruction only changes the layout of an array."""
        if instruction.operation != "fusion":
            return instruction.operation in _LAYOUT
        (inner,) = self._called(instruction)
        inside = {i.operation for i in self._instructions[inner]} - _FREE - {"reshape"}
        return bool(inside) and inside <= _LAYOUT

    def _called(self, instruction: _Instruction) -> list[str]:
        return [name for name in _called(instruction.rest) if name in self._instructions]

    def _operands(self, name: str, instruction: _Instruction) -> list[_Instruction]:
        """The instructions that made the operands."""
        defined = self._defined[name]
        return [defined[operand] for operand in instruction.operands if operand in defined]

    def _handed(self, instruction: _Instruction) -> list[tuple[str, str, str]]:
        """The computation of a fusion, its parameters, and the operands that these are."""
        (inner,) = self._called(instruction)
        inside = self._instructions[inner]
        names = {i.parameter: i.name for i in inside if i.operation == "parameter"}
        return [(inner, names[k], operand) for k, operand in enumerate(instruction.operands)]

    def _read(self, name: str, array: str, whole: int) -> int:
        """Bytes that a computation reads of one of its arrays, which has `whole` in the main memory."""
        total = 0
        for user in self._instructions[name]:
            operands = user.operands
            if array not in operands:
                continue
            if user.operation in _PARTIAL and operands[0] == array:
                total += _placed_bytes(user.result, anywhere=True)
            elif user.operation == "dynamic-update-slice" and array not in operands[1:]:
                pass  # the rest of the array stays as it is
            elif user.operation in ("bitcast", "reshape") and not user.is_root:
                total += self._read(name, user.name, whole)
            elif user.operation == "fusion":
                total += sum(
                    self._read(inner, parameter, whole)
                    for inner, parameter, operand in self._handed(user)
                    if operand == array
                )
            else:
                return whole
        return min(total, whole)

    def _not_written(self, name: str) -> int:
        """Bytes of the results of a fused computation that it leaves as they are."""
        kept = 0
        for instruction in self._instructions[name]:
            if instruction.operation == "dynamic-update-slice":
                update = self._defined[name].get(instruction.operands[1])
                if update is not None:
                    kept += _placed_bytes(instruction.result, anywhere=True)
                    kept -= _placed_bytes(update.result, anywhere=True)
            elif instruction.operation == "fusion":
                kept += sum(map(self._not_written, self._called(instruction)))
        return kept


def _called(text: str) -> list[str]:
    """The computations that an instruction calls."""
    names = _CALLED.findall(text)
    for branches in _BRANCHES.findall(text):
        names += re.findall(r"[\w.\-]+", branches)
    return names


def _turns(loop: str, condition: list[str]) -> int:
    """How often a loop turns: by its instruction, if that says it, or else by its condition."""
    known = _KNOWN_TURNS.search(loop)
    return int(known[1]) if known else trip_count(condition)


def trip_count(condition: list[str]) -> int:
    """How often a loop from 0 turns: the constant that its condition compares with."""
    constants = [
        int(number) for line in condition for number in re.findall(r"constant\((\d+)\)", line)
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


def _group(line: str) -> tuple[int, ...]:
    """The devices of the first group of a collective; empty if it names none."""
    if match := re.search(r"replica_groups=\{\{([0-9,]+)\}", line):
        return tuple(map(int, match[1].split(",")))
    if match := re.search(
        r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line
    ):
        sizes = [int(size) for size in match[3].split(",")]
        order = [int(axis) for axis in match[4].split(",")] if match[4] else list(range(len(sizes)))
        return _first_devices(sizes, order)[: int(match[2])]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        named = re.findall(r"'(\w+)'=(\d+)", match[1])
        names, sizes = [name for name, _ in named], [int(size) for _, size in named]
        within = [names.index(axis) for axis in re.findall(r"'(\w+)'", match[2])]
        outside = [axis for axis in range(len(names)) if axis not in within]
        members = math.prod(sizes[axis] for axis in within)
        return _first_devices(sizes, [*outside, *within])[:members]
    return ()


def _first_devices(sizes: list[int], order: list[int]) -> tuple[int, ...]:
    """The numbers of an array of these sizes, which count from 0, with its axes in another order."""
    strides = [math.prod(sizes[axis + 1 :]) for axis in range(len(sizes))]
    places = itertools.product(*(range(sizes[axis]) for axis in order))
    return tuple(
        sum(i * strides[axis] for i, axis in zip(place, order, strict=True)) for place in places
    )


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
