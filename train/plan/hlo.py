"""Collectives and copies of a compiled program, read from its HLO text and counted as often as loops run them."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_ASYNC = 'custom_call_target="AsyncCollectiveStart"'
_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
INSTRUCTION = re.compile(
    r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<opcode>[a-z][a-z0-9\-]*)\((?P<rest>.*)$"
)
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|(?:true|false)_computation|branch_computations|called_computations)"
    r"=\{?([^,}]*(?:, ?%[^,}]*)*)"
)
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9]\w*)?)\[([0-9,]*)\](?:\{([^}]*)\})?")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type: HLO's dtype, its shape, and whether its layout places it in a chip's fast memory."""

    dtype: str
    shape: tuple[int, ...]
    fast: bool

    @property
    def bytes(self) -> int:
        """Size of the whole array."""
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype, int(digits[0]) if digits else 0)
        return math.prod(self.shape) * bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program and how often a run executes it.

    Attributes:
      opcode: HLO's name, without the -start of its asynchronous form.
      arrays: the arrays of its result.
      line: its text.
      computation: the computation that contains it.
      times: how often it runs; loops of unknown length count as one iteration.
      in_loop: whether it is in the body of a loop.
      stored: whether its result is an array of its own, and not a value inside a fusion.
      operands: the arrays of what it reads.
      overlapped: whether it is a collective during which the program goes on multiplying.
    """

    opcode: str
    arrays: tuple[Array, ...]
    line: str
    computation: str
    times: int
    in_loop: bool
    stored: bool
    operands: tuple[Array, ...] = ()
    overlapped: bool = False

    @property
    def bytes(self) -> int:
        """Size of its largest array."""
        return max((array.bytes for array in self.arrays), default=0)


def arrays_in(text: str) -> tuple[Array, ...]:
    """The arrays of a type, which may be a tuple."""
    return tuple(
        Array(dtype, tuple(int(n) for n in shape.split(",") if n), "S(" in layout)
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def instructions(text: str, during_collectives: bool = False) -> Iterator[Instruction]:
    """Every instruction that a run of the module `text` executes, through loops, branches and fusions.

    Args:
      during_collectives: also those of fusions that run while an asynchronous collective is under way; the collective
        itself then appears in each of them.
    """
    computations, entry = computations_of(text)
    types_of: dict[str, dict[str, str]] = {}
    # As TPU's compiler writes what has a -start elsewhere.
    asynchronous = {name for name, lines in computations.items() if any(_ASYNC in line for line in lines)}

    multiplying: dict[str, bool] = {}

    def multiplies(name: str) -> bool:
        """Whether a computation has a product of matrices, or a kernel such as attention's."""
        if name not in multiplying:
            multiplying[name] = False
            lines = computations.get(name, ())
            multiplying[name] = any(map(_MULTIPLIES.search, lines)) or any(map(multiplies, called_by(lines)))
        return multiplying[name]

    def walk(name: str, times: int, in_loop: bool, fusions: int, overlapped: bool = False) -> Iterator[Instruction]:
        lines = computations.get(name, ())
        meanwhile = {
            start for start, between in _under_way(lines)
            if any(_MULTIPLIES.search(line) for line in between) or any(map(multiplies, called_by(between)))
        }  # fmt: skip
        results = _results(lines) if fusions == 1 else set()
        if name not in types_of:
            types_of[name] = {match["name"]: match["type"] for match in map(INSTRUCTION.match, lines) if match}
        for line in lines:
            match = INSTRUCTION.match(line)
            if not match or match["opcode"].endswith(("-done", "-update")):
                continue
            # An asynchronous collective appears in every fusion that runs meanwhile; counting its start is enough.
            if match["name"].startswith("async-collective-done"):
                continue
            opcode = match["opcode"]
            loops = opcode == "while"
            inside = times * turns_of(line, computations) if loops else times
            for called in _CALLED.findall(line):
                for callee in called.replace("%", "").split(","):
                    if during_collectives or not callee.strip().startswith("async_collective_fusion"):
                        within = fusions + (opcode == "fusion")
                        beside = overlapped or match["name"] in meanwhile
                        yield from walk(callee.strip(), inside, in_loop or loops, within, beside)
            read = re.findall(r"%([\w.\-]+)", match["rest"].split(")")[0])
            yield Instruction(
                opcode.removesuffix("-start"), arrays_in(match["type"]), line.strip(), name, times, in_loop,
                stored=not fusions or match["name"] in results,
                operands=tuple(array for one in read for array in arrays_in(types_of[name].get(one, ""))),
                overlapped=opcode.removesuffix("-start") in _COLLECTIVES
                and (overlapped or name in asynchronous or match["name"] in meanwhile),
            )  # fmt: skip

    yield from walk(entry, 1, False, 0)


_MULTIPLIES = re.compile(r" (?:dot|convolution)\(|custom_call_target=\"tpu_custom_call\"|custom-call\(.*__cu")


def called_by(lines: Iterable[str]) -> Iterator[str]:
    """The computations that these lines call; an asynchronous one's only where it starts."""
    for line in lines:
        for called in _CALLED.findall(line):
            yield from (callee.strip() for callee in called.replace("%", "").split(","))


def _under_way(lines: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each asynchronous instruction's name, and the lines from its start to its end: of a scheduled module, in order.

    Where a -start is followed by an -update, which hands over the operands, the transfer begins there.
    """
    begun: dict[str, tuple[str, int]] = {}  # name of the last instruction -> name of the first, where it began
    for number, line in enumerate(lines):
        if not (match := INSTRUCTION.match(line)):
            continue
        if match["opcode"].endswith("-start"):
            begun[match["name"]] = match["name"], number
        elif match["opcode"].endswith(("-update", "-done")):
            before = re.match(r"\(*%?([\w.\-]+)", match["rest"])
            if not (before and before[1] in begun):
                continue
            first, since = begun.pop(before[1])
            if match["opcode"].endswith("-update"):
                begun[match["name"]] = first, number
            else:
                yield first, [other for other in lines[since + 1 : number] if not _ASYNCHRONOUS.search(other)]


_ASYNCHRONOUS = re.compile(r" [a-z\-]+-(?:start|update|done)\(")


def _results(lines: Sequence[str]) -> set[str]:
    """The names of what a computation returns: its root, or the parts of a tuple."""
    for line in lines:
        if (match := INSTRUCTION.match(line)) and line.lstrip().startswith("ROOT "):
            parts = match["rest"].split(")")[0] if match["opcode"] == "tuple" else ""
            return {match["name"], *re.findall(r"%([\w.\-]+)", parts)}
    return set()


def turns_of(line: str, computations: dict[str, list[str]]) -> int:
    """How often the loop of this line runs: the compiler's own count, or the constant up to which it counts from 0."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    condition = re.search(r"\bcondition=%?([\w.\-]+)", line)
    body = "\n".join(computations.get(condition[1], ())) if condition else ""
    compared = re.search(r"ROOT .* compare\((.*?)\), direction=LT", body)
    for name in re.findall(r"%([\w.\-]+)", compared[1]) if compared else ():
        if constant := re.search(rf"%{re.escape(name)} = s32\[\]\S* constant\((\d+)\)", body):
            return int(constant[1])
    return 1


def computations_of(text: str) -> tuple[dict[str, list[str]], str]:
    found: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        header = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$", line)
        if header:
            name = header[2]
            found[name] = []
            entry = name if header[1] else entry
        elif name:
            found[name].append(line)
    return found, entry


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one run: their number, and the bytes of their larger sides: in total, of the largest,
    and of those during which the program goes on computing."""

    count: int = 0
    bytes: int = 0
    largest: int = 0
    overlapped: int = 0


def collectives(text: str, slice_size: int = 0) -> dict[str, Traffic]:
    """`Traffic` of each kind of collective in the module `text`, without those between slices.

    Args:
      slice_size: devices of each slice, if there are several, whose numbers in the program follow one another.
    """
    return _by_kind(one for one in instructions(text) if not crosses_slices(one, slice_size))


def between_slices(text: str, slice_size: int) -> dict[str, Traffic]:
    """`Traffic` of each kind of collective between slices of `slice_size` devices, in bytes of one device."""
    return _by_kind(one for one in instructions(text) if crosses_slices(one, slice_size))


def crosses_slices(one: Instruction, slice_size: int) -> bool:
    """Whether an instruction is a collective whose devices are of several slices."""
    if one.opcode == "send":  # as TPU's compiler writes it: the host sends what each device of a slice has
        return _MEGASCALE.search(one.line) is not None
    if not slice_size or one.opcode not in _COLLECTIVES:
        return False
    if pairs := re.search(r"source_target_pairs=\{(\{.*?\})\}", one.line):
        groups = [[int(n) for n in pair.split(",")] for pair in re.findall(r"\{([0-9,]+)\}", pairs[1])]
    else:
        groups = _groups(one.line)
    # Without groups, all devices are one.
    return not groups or any(len({device // slice_size for device in group}) > 1 for group in groups)


_MEGASCALE = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


def _by_kind(found: Iterable[Instruction]) -> dict[str, Traffic]:
    by_kind: dict[str, Traffic] = {}
    for one in found:
        kind, size = one.opcode, one.bytes
        if kind == "send" and (transfer := _MEGASCALE.search(one.line)):
            kind = transfer[1].lower().replace("_", "-")
        elif kind not in _COLLECTIVES:
            continue
        else:
            size = _larger_side(one)
        if kind == "reduce-scatter":
            size = max(size, one.bytes * _group_size(one.line))  # its result is the share of one device
        elif one.computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"  # as TPU's compiler writes it: an all-reduce of which each device keeps a slice
        so_far, moved = by_kind.get(kind, Traffic()), one.times * size
        by_kind[kind] = Traffic(
            so_far.count + one.times,
            so_far.bytes + moved,
            max(so_far.largest, size),
            so_far.overlapped + (moved if one.overlapped else 0),
        )
    return dict(sorted(by_kind.items()))


def _larger_side(one: Instruction) -> int:
    """Bytes of the larger side of a collective, of which the compiler may have made one of several."""
    result, operands = (sum(array.bytes for array in arrays) for arrays in (one.arrays, one.operands))
    if f" {one.opcode}-start(" in one.line and one.opcode != "all-reduce":
        result -= operands  # whose result repeats what it is given
    return max(result, operands)


def _group_size(line: str) -> int:
    return len(next(iter(_groups(line)), [0]))


def _groups(line: str) -> list[list[int]]:
    """The groups of devices of a collective; none if it does not say."""
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", line):
        shape = [int(n) for n in match[3].split(",")]
        order = [int(n) for n in match[4].split(",")] if match[4] else range(len(shape))
        devices = np.arange(math.prod(shape)).reshape(shape).transpose(order)
        return devices.reshape(int(match[1]), int(match[2])).tolist()
    if match := re.search(r"replica_groups=\{(\{[0-9,{}]+\})\}", line):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([0-9,]+)\}", match[1])]
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        over = re.findall(r"'(\w+)'", match[2])
        devices = np.arange(math.prod(sizes.values())).reshape(list(sizes.values()))
        last = [list(sizes).index(axis) for axis in over]
        moved = np.moveaxis(devices, last, range(-len(over), 0))
        return moved.reshape(-1, math.prod(sizes[axis] for axis in over)).tolist()
    return []


def copies(text: str, at_least: int, anywhere: bool = False) -> list[Instruction]:
    """Copies in loops, or `anywhere`, from main memory to main memory, of arrays of `at_least` bytes."""
    return [
        one
        for one in instructions(text)
        if one.opcode == "copy"
        and (one.in_loop or anywhere)
        and one.stored
        and one.bytes >= at_least
        and not any(a.fast for a in one.arrays)
    ]
