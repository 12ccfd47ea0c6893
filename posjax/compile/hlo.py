"""Cost of one run of a compiled program on one device, read from the program's text (optimised HLO).

The compiler's cost analysis counts the body of a loop once, as does a plain search for collectives in the text. This module counts
an instruction as often as the loops around it run it, and reports each collective with the mesh axes that it communicates over.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_KINDS += ("collective-broadcast",)
_SCATTER = "all-reduce-scatter"  # prefix of the fusions that are a reduce-scatter on TPUs; they contain an all-reduce
_OVERLAPPED = "async_collective_fusion"  # prefix of the fusions that overlap a gather with a matrix product on TPUs


@dataclasses.dataclass(frozen=True)
class Collective:
    """Describes all collectives of one kind over the same mesh axes.

    Attributes:
      kind: such as all-reduce.
      axes: the mesh axes that they communicate over, such as ("fsdp",); () if unknown.
      count: how many a device takes part in.
      bytes: total bytes on a device: of the results of all-gathers, and of the operands of all others.
      largest: bytes of the largest one.
      overlapped_bytes: the part of ``bytes`` whose communication the compiler overlaps with computation.
      op_names: HLO metadata: the operations in the JAX program that they come from.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int
    largest: int
    overlapped_bytes: int = 0
    op_names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Cost:
    """Describes the work of a device in one run of a program.

    Attributes:
      flops: operations of matrix products (a multiplication and an addition are two), without those of custom kernels.
      bytes: bytes read from and written to its memory.
      collectives: communication by kind and axes.
      uncounted: number of loops whose trip count the text does not state; of these, only collectives are counted, once each.
    """

    flops: float
    bytes: float
    collectives: tuple[Collective, ...]
    uncounted: int

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> "Cost":
        """Creates a cost from the result of ``dataclasses.asdict``, after a round trip through JSON."""
        collectives = [c | {"axes": tuple(c["axes"]), "op_names": tuple(c["op_names"])} for c in fields["collectives"]]
        return cls(**{**fields, "collectives": tuple(Collective(**c) for c in collectives)})


@dataclasses.dataclass(frozen=True)
class Instruction:
    """Holds one instruction of HLO: ``name = shape opcode(inside), attributes``."""

    name: str
    shape: str
    opcode: str
    inside: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.inside)


_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*->.*\{\s*$")
_LINE = re.compile(r"(?:ROOT )?%?([\w.-]+) = (\(.*?\)|\S+) ([\w-]+)\(", re.S)
_SHAPE = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{[^}]*\})?")


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """Parses HLO into the instructions of each computation, by name, and the name of the entry computation."""
    found: dict[str, list[Instruction]] = {}
    entry, here = "", ""
    for part in re.split(r"\n(?=\s*(?:ROOT )?%?[\w.-]+ = |(?:ENTRY )?%?[\w.-]+ \()", text):
        line = part.strip()
        if match := _LINE.match(line):
            end = _closing(line, match.end())
            found.setdefault(here, []).append(Instruction(*match.groups(), line[match.end() : end], line[end + 1 :]))
        elif match := _HEAD.match(line.split("\n")[0]):
            here = match[2]
            found.setdefault(here, [])
            entry = here if match[1] else entry
    return found, entry


def _closing(line: str, start: int) -> int:
    """Returns the index of the bracket that closes the one opened before ``start``."""
    depth = 1
    for at in range(start, len(line)):
        depth += {"(": 1, ")": -1}.get(line[at], 0)
        if depth == 0:
            return at
    return len(line)


def read_cost(text: str, mesh: Mapping[str, int] | None = None) -> Cost:
    """Computes the cost of a program on one device.

    Args:
      text: the result of ``compiled.as_text()``.
      mesh: sizes of the mesh axes in order, with devices in the order in which the program numbers them.
    """
    program, entry = computations(text)
    shapes = {name: {i.name: i.shape for i in body} for name, body in program.items()}
    runs = _runs(program, entry)
    fused = {called for body in program.values() for i in body if i.opcode == "fusion" for called in _called(i, "calls")}
    flops = moved = 0.0
    collectives: dict[tuple[str, tuple[str, ...]], dict[str, list]] = {}
    for name, body in program.items():
        times = runs.get(name)
        if times is None:
            continue
        for i in body:
            kind, size = _collective(i, shapes[name], program, name)
            if kind:
                within = [x for called in _called(i, "calls") for x in program.get(called, ()) if x.opcode == "all-reduce"]
                ones = collectives.setdefault((kind, _axes((within or [i])[0].attributes, mesh)), {})
                # A collective that overlaps several products appears in each of their fusions, as links of one chain.
                link = re.search(r"channel_id=(\d+).*chain_id=", i.attributes)
                op_name = re.search(r'op_name="([^"]*)"', i.attributes)
                one = ones.setdefault(link[1] if link else i.name, [max(1, times), size, False, op_name[1] if op_name else ""])
                one[2] |= name.startswith(_OVERLAPPED) or i.opcode.endswith("-start")
            flops += times * _flops(i, shapes[name])
            if name not in fused:
                moved += times * _moved(i, shapes[name], program)
    return Cost(
        flops=flops,
        bytes=moved,
        collectives=tuple(
            Collective(
                kind=kind,
                axes=axes,
                count=sum(times for times, *_ in ones.values()),
                bytes=sum(times * size for times, size, *_ in ones.values()),
                largest=max(size for _, size, *_ in ones.values()),
                overlapped_bytes=sum(times * size for times, size, is_overlapped, _ in ones.values() if is_overlapped),
                op_names=tuple(dict.fromkeys(op_name for *_, op_name in ones.values() if op_name)),
            )
            for (kind, axes), ones in sorted(collectives.items())
        ),
        uncounted=sum(_trips(i, program) is None for n in runs for i in program[n] if i.opcode == "while"),
    )


# How often a computation runs --------------------------------------------------------------------------------------------


def _called(i: Instruction, *names: str) -> list[str]:
    found = [re.search(rf"\b{name}=%?([\w.-]+)", i.attributes) for name in names]
    return [match[1] for match in found if match]


def _runs(program: dict[str, list[Instruction]], entry: str) -> dict[str, int]:
    """Counts the runs of each reachable computation: 0 within a loop of unknown trip count; all branches count as taken."""
    runs: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        runs[name] = runs.get(name, 0) + times
        for i in program.get(name, ()):
            if i.opcode == "while":
                for called in _called(i, "body"):
                    visit(called, times * (_trips(i, program) or 0))
            elif i.opcode in ("fusion", "call", "async-start"):
                for called in _called(i, "calls", "to_apply"):
                    visit(called, times)
            elif i.opcode == "conditional":
                branches = re.search(r"branch_computations=\{([^}]*)\}", i.attributes)
                for called in re.findall(r"%?([\w.-]+)", branches[1] if branches else "") or _called(
                    i, "true_computation", "false_computation"
                ):
                    visit(called, times)

    visit(entry, 1)
    return runs


def _trips(loop: Instruction, program: dict[str, list[Instruction]]) -> int | None:
    """Returns a loop's trip count, as the compiler states it or from the constant limit of its counter; None if unknown."""
    if match := re.search(r'"?known_trip_count"?:\s*\{"?n"?:"?(\d+)', loop.attributes):
        return int(match[1])
    condition = {i.name: i for called in _called(loop, "condition") for i in program.get(called, ())}
    compared = [i for i in condition.values() if _compares(i, program)]
    if len(compared) != 1 or len(compared[0].operands) != 2:
        return None
    counter, limit = (condition.get(name) for name in compared[0].operands)
    if counter is None or limit is None or counter.opcode != "get-tuple-element" or limit.opcode != "constant":
        return None
    return int(limit.inside)


def _compares(i: Instruction, program: dict[str, list[Instruction]]) -> bool:
    """Returns whether an instruction computes "first operand < second operand"; on CPUs a fusion may contain the comparison."""
    if i.opcode != "fusion":
        return i.opcode == "compare" and "direction=LT" in i.attributes
    body = [x for called in _called(i, "calls") for x in program.get(called, ())]
    numbers = {x.name: x.inside for x in body if x.opcode == "parameter"}
    rest = [x for x in body if x.opcode != "parameter"]
    return len(rest) == 1 and _compares(rest[0], program) and [numbers.get(name) for name in rest[0].operands] == ["0", "1"]


# Communication -----------------------------------------------------------------------------------------------------------


def _collective(i: Instruction, shapes: Mapping[str, str], program: dict[str, list[Instruction]], name: str) -> tuple[str, int]:
    """Returns the kind of a collective, or "" for other instructions, and the bytes of its larger side on a device."""
    before = sum(_bytes(*part) for operand in i.operands for part in _SHAPE.findall(shapes.get(operand, "")))
    if i.opcode == "fusion" and any(called.startswith(_SCATTER) for called in _called(i, "calls")):
        return "reduce-scatter", before
    kind = i.opcode.removesuffix("-start")
    if kind not in _KINDS or name.startswith(_SCATTER):
        return "", 0
    if kind == "collective-permute" and all(a == b for a, b in _pairs(i.attributes)):
        return "", 0  # every device sends to itself
    if kind != "all-gather":
        return kind, before
    parts = _SHAPE.findall(i.shape)
    return kind, sum(_bytes(*part) for part in (parts if i.opcode == kind else parts[len(parts) // 2 :]))  # -start: operands too


def _axes(attributes: str, mesh: Mapping[str, int] | None) -> tuple[str, ...]:
    """Returns the mesh axes along which the devices of a group differ."""
    if mesh is None:
        return ()
    groups = _groups(attributes, math.prod(mesh.values()))
    if groups is None:
        return ()
    places = np.stack(np.unravel_index(groups, tuple(mesh.values())), -1)  # [groups, devices of one, axes]
    differ = (places != places[:, :1]).any((0, 1))
    return tuple(name for name, differs in zip(mesh, differ, strict=True) if differs)


def _groups(attributes: str, devices: int) -> np.ndarray | None:
    """Parses the device numbers of each group, [groups, devices], in any notation of HLO; for a permutation, pairs of devices."""
    if pairs := _pairs(attributes):
        return np.array(pairs)
    if match := re.search(r"replica_groups=\{(\{[\d,]*\}(?:,\{[\d,]*\})*)\}", attributes):
        return np.array([[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", match[1])])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source, order = ([int(n) for n in part.split(",")] if part else None for part in match.groups())
        ids = np.arange(math.prod(source)).reshape(source)
        return (ids if order is None else ids.transpose(order)).reshape(shape)
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?\s*\{([^}]*)\}", attributes
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = np.arange(math.prod(sizes.values()))
        numbers, order = ([int(n) for n in part.split(",")] if part else None for part in match.groups()[1:3])
        if numbers is not None:  # a list of devices, or 0, 1, 2, ... in a shape, transposed
            ids = np.array(numbers) if order is None else ids.reshape(numbers).transpose(order)
        over = re.findall(r"'([^']+)'", match[4])
        names = list(sizes)
        rest = [names.index(name) for name in names if name not in over]
        ids = ids.reshape(tuple(sizes.values())).transpose(rest + [names.index(name) for name in over])
        return ids.reshape(-1, math.prod(sizes[name] for name in over))
    if re.search(r"replica_groups=\{\}", attributes):
        return np.arange(devices)[None]
    return None


def _pairs(attributes: str) -> list[tuple[int, int]]:
    match = re.search(r"source_target_pairs=\{(.*?)\}\}", attributes)
    return [(int(a), int(b)) for a, b in re.findall(r"(\d+),\s*(\d+)", match[1])] if match else []


# Matrix products ---------------------------------------------------------------------------------------------------------


def _flops(i: Instruction, shapes: Mapping[str, str]) -> float:
    if i.opcode == "dot" or (i.opcode == "custom-call" and "__cublas$" in i.attributes):
        dims = _dims(shapes.get(i.operands[0], i.inside))
        contracted = re.search(r'lhs_contracting_dim(?:s=\{|ensions"?:\s*\[)([\d,\s"]*)', i.attributes)
        over = [int(n) for n in re.findall(r"\d+", contracted[1])] if contracted else []
        return 2.0 * math.prod(_dims(i.shape)) * math.prod(dims[n] for n in over)
    return _convolution(i, shapes) if i.opcode == "convolution" else 0.0


def _convolution(i: Instruction, shapes: Mapping[str, str]) -> float:
    """Counts the operations of a convolution, without padding. On TPUs, every matrix product is compiled to a convolution."""
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", i.attributes)
    image, kernel, out = (_dims(shape) for shape in (shapes.get(i.operands[0], ""), shapes.get(i.operands[1], ""), i.shape))
    window = re.search(r"window=\{([^}]*)\}", i.attributes)
    fields = dict(part.split("=") for part in window[1].split()) if window else {}
    pairs = 1.0
    for number, letter in enumerate(sorted(set(labels[1]) - {"b", "f"})):

        def field(name: str, default: str, number: int = number) -> str:
            return fields[name].split("x")[number] if name in fields else default

        size, low = int(field("size", "1")), int(field("pad", "0_0").split("_")[0])
        stride, spread, dilated = (int(field(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
        at = np.arange(out[labels[3].index(letter)])[:, None] * stride + np.arange(size)[None] * dilated - low
        reach = (image[labels[1].index(letter)] - 1) * spread
        pairs *= ((at >= 0) & (at <= reach) & (at % spread == 0)).sum()
    batch_and_features = math.prod(out[labels[3].index(letter)] for letter in "bf")
    return 2.0 * batch_and_features * kernel[labels[2].index("i")] * pairs


# Memory ------------------------------------------------------------------------------------------------------------------

# Opcodes that move no data, and opcodes that run other computations, which are counted separately.
_FREE = {"parameter", "constant", "iota", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id"}
_FREE |= {"while", "conditional", "call"}
_SLICES = ("dynamic-slice", "slice", "gather")


def _moved(i: Instruction, shapes: Mapping[str, str], program: dict[str, list[Instruction]]) -> int:
    """Counts the bytes that an instruction reads and writes; if it slices or updates an array, only that part counts."""
    if i.opcode in _FREE or i.opcode.endswith(("-start", "-done")):
        return 0
    read = [size_of(shapes.get(operand, "")) for operand in i.operands]
    if i.opcode in _SLICES:
        return 2 * size_of(i.shape)
    if i.opcode == "dynamic-update-slice":
        return 2 * read[1]
    if i.opcode != "fusion":
        return sum(read) + size_of(i.shape)
    written = size_of(i.shape)
    for number, size in enumerate(read):
        if (part := _part_used(i, number, program)) is None:
            continue
        sliced, updated = part
        read[number] = min(size, sliced)
        if updated:  # in place: the rest of the result is the operand
            written -= max(0, min(written, size) - updated)
    return sum(read) + written


def _part_used(fusion: Instruction, number: int, program: dict[str, list[Instruction]]) -> tuple[int, int] | None:
    """Counts the bytes that a fusion slices from an operand and those that it updates in it; None if it reads the full operand."""
    body = [x for called in _called(fusion, "calls") for x in program.get(called, ())]
    shapes = {x.name: x.shape for x in body}
    sliced = updated = 0
    names = [x.name for x in body if x.opcode == "parameter" and int(x.inside) == number]
    for name in names:  # grows in the loop: bitcasts of the operand are followed
        for user in (x for x in body if name in x.operands):
            if user.opcode == "bitcast":
                names.append(user.name)
            elif user.opcode == "fusion":
                within = [_part_used(user, at, program) for at, operand in enumerate(user.operands) if operand == name]
                if None in within:
                    return None
                sliced, updated = sliced + sum(part[0] for part in within), updated + sum(part[1] for part in within)
            elif user.opcode in _SLICES and user.operands[0] == name:
                sliced += size_of(user.shape)
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name and user.operands.count(name) == 1:
                updated += size_of(shapes.get(user.operands[1], ""))
            else:
                return None
    return (sliced, updated) if names else None


def size_of(shape: str) -> int:
    """Counts the bytes of a shape in the device's main memory; arrays that the compiler placed in another memory do not count."""
    return sum(_bytes(m[1], m[2]) for m in _SHAPE.finditer(shape) if not re.search(r"S\([1-9]\d*\)", m[0]))


def _dims(shape: str) -> list[int]:
    match = _SHAPE.search(shape)
    return [int(n) for n in match[2].split(",") if n] if match else []


def _bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
    return math.ceil(math.prod(int(n) for n in dims.split(",") if n) * bits / 8)
