"""Bytes of main memory that a compiled program reads and writes, counted from its HLO text."""

from __future__ import annotations

import re
from collections.abc import Mapping

from train.plan import hlo

# Instructions that move no data by themselves.
_FREE = {
    "parameter",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "constant",
    "while",
    "conditional",
    "call",
    "partition-id",
}


def loop_bytes(text: str) -> int:
    """Bytes that the bodies of loops read from and write to main memory in one iteration each.

    Layouts show which arrays are in a chip's fast memory; a transfer between the two counts once, by the bytes that
    arrive; an array that is updated in place does not count.
    """
    computations, _ = hlo.computations_of(text)
    bodies = {match[1] for lines in computations.values() for line in lines if (match := _BODY.search(line))}
    return sum(_bytes_of_body(computations[name]) for name in bodies)


def program_bytes(text: str) -> int:
    """Bytes that a run reads from and writes to main memory, counted as in `loop_bytes`, with all branches.

    Of a table in which rows are looked up, and of stacked layers of which one is taken, only these count.
    """
    computations, entry = hlo.computations_of(text)

    def of(name: str) -> int:
        total = _bytes_of_body(computations[name], computations)
        for line in computations[name]:
            if body := _BODY.search(line):
                total += hlo.turns_of(line, computations) * of(body[1])
            elif (match := hlo.INSTRUCTION.match(line)) and match["opcode"] in ("conditional", "call"):
                total += sum(of(callee) for callee in hlo.called_by([line]) if callee in computations)
        return total

    return of(entry)


_BODY = re.compile(r" while\(.*\bbody=%?([\w.\-]+)")


def _looked_up(rest: str, computations: Mapping[str, list[str]]) -> dict[int, int]:
    """For each parameter of a fusion in which rows are looked up, or a slice is taken, and nothing else is read: the
    bytes that are found."""
    matches = [
        match
        for name in hlo.called_by([rest])
        for match in map(hlo.INSTRUCTION.match, computations.get(name, ()))
        if match
    ]
    numbers = {match["name"]: int(match["rest"].split(")")[0]) for match in matches if match["opcode"] == "parameter"}
    found: dict[int, int] = {}
    read: set[int] = set()
    for match in matches:
        for place, name in enumerate(re.findall(r"%([\w.\-]+)", match["rest"].split(")")[0])):
            if name in numbers and match["opcode"] in ("gather", "dynamic-slice") and place == 0:
                found[numbers[name]] = found.get(numbers[name], 0) + sum(
                    array.bytes for array in hlo.arrays_in(match["type"])
                )
            elif name in numbers:
                read.add(numbers[name])
    return {number: size for number, size in found.items() if number not in read}


def _bytes_of_body(lines: list[str], computations: Mapping[str, list[str]] | None = None) -> int:
    """Bytes that these lines move; with all `computations`, what fusions look up counts by what they find."""
    matches = [match for match in map(hlo.INSTRUCTION.match, lines) if match]
    types = {match["name"]: match["type"] for match in matches}
    total = 0
    for match in matches:
        opcode = match["opcode"]
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            continue
        results = hlo.arrays_in(match["type"])
        if opcode.endswith("-start"):
            arrived = [array.bytes for array in results[1:] if array.bytes > 4]
            total += max(arrived, default=0)
            continue
        operands = [types.get(name, "") for name in re.findall(r"%([\w.\-]+)", match["rest"].split("), ")[0])]
        changed = opcode != "copy" and match["type"] in operands
        found = {} if computations is None or opcode != "fusion" else _looked_up(match["rest"], computations)
        total += sum(found.values())
        operands = [kind for number, kind in enumerate(operands) if number not in found]
        read = [array for kind in operands if not (changed and kind == match["type"]) for array in hlo.arrays_in(kind)]
        written = () if changed else results
        total += sum(array.bytes for array in (*read, *written) if not array.fast)
    return total
