"""List the arrays that fill a device's memory at the peak of a compiled program.

    python benchmarks/accelerators.py --targets v3-8 --dtypes float32 --objectives causal
        --steps train --buffers

XLA returns a program whose instructions are in the order in which they run. `find_peak` replays
this order: an array lives from the instruction that makes it to the last one that reads it. Sizes
include the padding of a TPU's tiles, as in `f32[64,512]{1,0:T(8,128)}`. Arrays in the small memory
on the chip, such as `S(1)`, are left out, and so are the parameters of the program. The compiler
plans a few percent more than the sum, because its memory has gaps.

The syntax is that of HLO: https://openxla.org/xla/operation_semantics.
"""

import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

# Of an array type, in bytes. Types that are not here take no memory.
ITEM_SIZES = {
    "pred": 1,
    "s8": 1,
    "u8": 1,
    "bf16": 2,
    "f16": 2,
    "f32": 4,
    "s32": 4,
    "u32": 4,
    "f64": 8,
    "s64": 8,
    "u64": 8,
}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
NO_ARRAYS = ("parameter", "constant")
# The result is memory of the operands.
ALIASES = ("bitcast", "copy-done", "async-done", "slice-done", "all-reduce-done")
TUPLES = ("tuple", "while", "opt-barrier")
# They overwrite their first operand.
IN_PLACE = ("dynamic-update-slice", "scatter")


class Instruction(NamedTuple):
    """A line of a program."""

    name: str
    shape: str
    operation: str
    operands: list[str]
    # What follows the operation's name: operands, attributes and metadata.
    rest: str
    is_root: bool


class Buffer(NamedTuple):
    """An array that an instruction makes."""

    shape: str
    num_bytes: int
    # The operation in the Python program, such as jit(step)/layer_0/dot_general.
    source: str


class Peak(NamedTuple):
    """The arrays at the moment when they take the most memory."""

    num_bytes: int
    instruction: str
    buffers: list[Buffer]


def array_bytes(item_type: str, dimensions: str, layout: str | None) -> int:
    """The bytes of an array on the device, 0 if it is not in its main memory.

    `layout` has the dimensions from the one that varies fastest, and after a colon the tiles.
    """
    sizes = [int(size) for size in dimensions.split(",") if size]
    order, _, tiling = (layout or "").partition(":")
    if re.search(r"S\([1-9]", tiling):
        return 0
    tile = re.search(r"T\(([\d,]+)\)", tiling)
    if tile and sizes:
        fastest_first = [int(axis) for axis in order.split(",")]
        tile_sizes = reversed([int(size) for size in tile[1].split(",")])
        for axis, tile_size in zip(fastest_first, tile_sizes, strict=False):
            sizes[axis] = math.ceil(sizes[axis] / tile_size) * tile_size
    return math.prod(sizes) * ITEM_SIZES.get(item_type, 0)


def operands_of(rest: str) -> list[str]:
    """The names between the parenthesis of an operation and the one that closes it."""
    depth = 1
    for position, character in enumerate(rest):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return re.findall(r"%([\w.\-]+)", rest[:position])
    return []


def parse_program(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parse the text of a program. Returns its computations, and the name of the first to run."""
    computations = {}
    entry = ""
    instructions = []
    for line in text.splitlines():
        start = COMPUTATION.match(line)
        found = INSTRUCTION.match(line)
        if start:
            instructions = computations.setdefault(start[2], [])
            entry = start[2] if start[1] else entry
        elif found:
            root, name, shape, operation, rest = found.groups()
            operands = operands_of(rest)
            instructions.append(
                Instruction(name, shape, operation, operands, rest, is_root=bool(root))
            )
    return computations, entry


class Lifetimes:
    """The arrays that the instructions of a computation make, and when each is last read."""

    def __init__(self, instructions: list[Instruction]):
        self.buffers = {}
        # Number of the instruction that makes a buffer, and of the last one that reads it.
        self.made = {}
        self.read = {}
        # The buffers in each element of each value. A value that is no tuple has one element.
        self.elements = {}
        for number, instruction in enumerate(instructions):
            if instruction.operation != "get-tuple-element":
                self.note_reads(instruction.operands, number)
            self.elements[instruction.name] = self.result_of(instruction, number)
            # An unread result lives as long as its instruction runs, one of the root for ever.
            self.note_reads([instruction.name], number)
            if instruction.is_root:
                self.note_reads([instruction.name], len(instructions))

    def note_reads(self, names: list[str], number: int):
        for name in names:
            for buffer in set().union(*self.elements.get(name, [])):
                self.read[buffer] = number

    def result_of(self, instruction: Instruction, number: int) -> list[set[str]]:
        """The buffers in each element of the result. New ones are noted."""
        operation = instruction.operation
        given = [self.elements.get(operand, []) for operand in instruction.operands]
        if operation in NO_ARRAYS or (not given and operation in (*ALIASES, *TUPLES)):
            return []
        if operation == "get-tuple-element":
            index = int(re.search(r"index=(\d+)", instruction.rest)[1])
            return given[0][index : index + 1]
        if operation == "tuple":
            return [set().union(*elements) for elements in given]
        is_in_place = operation in IN_PLACE or "output_to_operand_aliasing" in instruction.rest
        if operation in (*ALIASES, *TUPLES) or (is_in_place and given[0]):
            return given[0]
        arrays = ARRAY.findall(instruction.shape)
        if operation.endswith("-start"):
            # The tuple has the destination, the source and a context.
            arrays = arrays[:1]
        source = re.search(r'op_name="([^"]*)"', instruction.rest)
        elements = []
        for index, (item_type, dimensions, layout) in enumerate(arrays):
            name = f"{instruction.name}#{index}"
            num_bytes = array_bytes(item_type, dimensions, layout)
            self.buffers[name] = Buffer(
                f"{item_type}[{dimensions}]", num_bytes, source[1] if source else ""
            )
            self.made[name] = number
            elements.append({name})
        return elements


def find_peak(text: str) -> Peak:
    """Find the peak of a program, the result of `compiled.as_text()`."""
    computations, entry = parse_program(text)
    return peak_of_computation(computations, entry)


def peak_of_computation(computations: dict[str, list[Instruction]], name: str) -> Peak:
    """Replay a computation. The body of a loop adds its own peak to what lives around it."""
    instructions = computations[name]
    lifetimes = Lifetimes(instructions)
    made = defaultdict(list)
    freed = defaultdict(list)
    for buffer, number in lifetimes.made.items():
        made[number].append(buffer)
        freed[lifetimes.read[buffer]].append(buffer)
    live = {}
    num_bytes = 0
    peak = Peak(0, "", [])
    for number, instruction in enumerate(instructions):
        for buffer in made[number]:
            live[buffer] = lifetimes.buffers[buffer]
            num_bytes += live[buffer].num_bytes
        inner = Peak(0, instruction.name, [])
        body = re.search(r"body=%?([\w.\-]+)", instruction.rest)
        if instruction.operation == "while" and body:
            inner = peak_of_computation(computations, body[1])
        if num_bytes + inner.num_bytes > peak.num_bytes:
            buffers = [*live.values(), *inner.buffers]
            peak = Peak(num_bytes + inner.num_bytes, inner.instruction, buffers)
        for buffer in freed[number]:
            num_bytes -= live.pop(buffer).num_bytes
    return peak


def report(peak: Peak, num_lines: int = 12) -> str:
    """The largest groups of arrays of the same shape, one on a line with the source of one."""
    totals = Counter()
    groups = defaultdict(list)
    for buffer in peak.buffers:
        totals[buffer.shape] += buffer.num_bytes
        groups[buffer.shape].append(buffer)
    lines = [f"  peak of {peak.num_bytes / 1e9:.2f} GB at {peak.instruction}"]
    for shape, total in totals.most_common(num_lines):
        count = len(groups[shape])
        # The end of the path names the layer and the operation.
        source = groups[shape][-1].source[-60:]
        lines.append(f"  {total / 1e9:7.3f} GB {count:4} x {shape:24} {source}")
    return "\n".join(lines)
