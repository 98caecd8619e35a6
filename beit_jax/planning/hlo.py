"""Reads a compiled program's text: the cycles that the compiler estimates, and the communication.

Pure text in, numbers out; nothing here knows about models or chips.

    program = read(compiled.as_text())
    program.cycles  # the compiler's estimate of one call, loops included
    program.collectives  # every collective that runs, with bytes and how often

XLA's TPU compiler writes `estimated_cycles` beside an instruction. A loop's body is listed
once; its trip count is the constant that the loop's condition compares with.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterator

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
    "ragged-all-to-all",
)
BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "f8e4m3fn": 1,
    "f8e5m2": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
}
# Operations without a cost: they do nothing, or wait for something that has been counted.
FREE = {
    "add-dependency",
    "after-all",
    "async-update",
    "bitcast",
    "call",
    "conditional",
    "constant",
    "copy-done",
    "copy-start",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "slice-done",
    "slice-start",
    "tuple",
    "while",
}
# Custom calls that the compiler makes for itself: views and promises, not work.
FREE_TARGETS = {"AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective instruction.

    Attributes:
      kind: "all-reduce" and so on.
      bytes: of the whole arrays, before a scatter or after a gather, on one device and one call.
      bytes_by_dtype: the same, split.
      group: devices that take part together.
      runs: calls per program, loops included.
      overlapped: whether it is split into start and done, so that other work can go on.
      source: the `op_name` it stems from.
    """

    kind: str
    bytes: float
    bytes_by_dtype: dict[str, float]
    group: int
    runs: float
    overlapped: bool
    source: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncosted:
    """Work for which the compiler gives no cycles.

    Attributes:
      name: "sort", "gather_fusion", "gather on sparsecore", a Pallas kernel's name, or another
        custom call's target.
      kernel: a custom call: code that the compiler cannot see into (Pallas).
      runs: calls per program.
      bytes: operands and results, of all calls: a bound on what they move.
      flops: of all calls, where a kernel declares them.
      declared: whether the kernel declares a cost (`pl.CostEstimate`).
    """

    name: str
    kernel: bool
    runs: float
    bytes: float
    flops: float
    declared: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """What the text of a compiled program says.

    Attributes:
      cycles: estimated, of one call; without `uncosted` and `collectives`.
      matmul_cycles: the part in instructions that hold a matrix product or a convolution.
      collectives: in the order of the text.
      uncosted: work without cycles, by name; operations that cost nothing are left out.
      loops: trip counts of the loops, in the order of the text; None where it is unknown (and
        the body was counted once).
      partitions: devices the program is written for.
    """

    cycles: float
    matmul_cycles: float
    collectives: tuple[Collective, ...]
    uncosted: tuple[Uncosted, ...]
    loops: tuple[int | None, ...]
    partitions: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str  # attributes, metadata, backend_config

    def called(self, attribute: str) -> str:
        """The computation that an attribute names; "" where there is none."""
        found = re.search(rf"\b{attribute}=%?([\w.$-]+)", self.rest)
        return found.group(1) if found else ""


def read(text: str) -> Program:
    """Sums up a compiled program's text, from its entry computation down.

    Args:
      text: `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation.
    """
    computations, entry = _parse(text)
    found = re.search(r"num_partitions=(\d+)", text)
    partitions = int(found.group(1)) if found else 1
    return _Reader(computations, partitions).read(entry)


def shape_bytes(shape: str) -> dict[str, float]:
    """Unpadded bytes by dtype of a shape's text: `f32[2,3]{1,0}` or a tuple `(bf16[4], s32[])`."""
    total: dict[str, float] = {}
    for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", shape):
        if dtype in BYTES:
            count = math.prod(int(size.strip("<= ")) for size in sizes.split(",") if size.strip())
            total[dtype] = total.get(dtype, 0) + BYTES[dtype] * count
    return total


class _Reader:
    """Walks the computations that run, counting how often they run."""

    def __init__(self, computations: dict[str, list[_Instruction]], partitions: int):
        self.computations = computations
        self.partitions = partitions
        self.cycles = self.matmul_cycles = 0.0
        self.collectives: list[Collective] = []
        self.uncosted: dict[tuple[str, bool], Uncosted] = {}
        self.loops: list[int | None] = []

    def read(self, entry: str) -> Program:
        self._visit(entry, runs=1.0)
        return Program(
            cycles=self.cycles,
            matmul_cycles=self.matmul_cycles,
            collectives=tuple(self.collectives),
            uncosted=tuple(self.uncosted.values()),
            loops=tuple(self.loops),
            partitions=self.partitions,
        )

    def _visit(self, name: str, *, runs: float, overlapped: bool = False) -> None:
        shapes = {op.name: op.shape for op in self.computations[name]}
        channels: set[str] = set()
        for op in self.computations[name]:
            kind = op.opcode.removesuffix("-start")
            cycles = re.search(r'"estimated_cycles":"(\d+)"', op.rest)
            if cycles:
                self.cycles += runs * int(cycles.group(1))
                if self._multiplies(op):
                    self.matmul_cycles += runs * int(cycles.group(1))
            if kind in COLLECTIVES:
                self._add_collective(op, kind, shapes, runs, overlapped=overlapped)
            elif op.opcode == "while":
                trips = self._trip_count(op.called("condition"))
                self.loops.append(trips)
                times = runs * (1 if trips is None else trips)
                self._visit(op.called("body"), runs=times, overlapped=overlapped)
            elif op.opcode == "call" and not cycles:
                self._visit(op.called("to_apply"), runs=runs, overlapped=overlapped)
            elif op.opcode == "conditional" and not cycles:
                for branch in self._branches(op):
                    # An upper bound: one of them runs.
                    self._visit(branch, runs=runs, overlapped=overlapped)
            elif op.opcode == "async-start":
                self._add_async(op, runs, counted=bool(cycles))
            elif op.opcode == "fusion" and self._add_fused_collectives(op, runs, channels):
                pass
            elif not cycles:
                self._add_uncosted(op, shapes, runs)

    def _add_async(self, start: _Instruction, runs: float, *, counted: bool) -> None:
        """Counts work that runs concurrently with the rest, until its `async-done`.

        Operands may be handed over later, by an `async-update`: bytes are those of the computation.
        On chips with SparseCores gathers run there, without cycles, as custom calls without a name.
        """
        name = start.called("calls")
        body = self.computations.get(name, [])
        thread = re.search(r'async_execution_thread="(\w+)"', start.rest)
        communicates = any(inner.opcode in COLLECTIVES for inner in self._inside(start))
        if not thread or thread.group(1) == "main" or communicates:
            self._visit(name, runs=runs, overlapped=True)
        elif not counted and body:
            source = re.search(r'op_name="[^"]*?([\w-]+)"', start.rest)
            name = source.group(1) if source else re.sub(r"[.\d]+$", "", start.name)
            moved = [*(op for op in body if op.opcode == "parameter"), body[-1]]
            size = sum(sum(shape_bytes(op.shape).values()) for op in moved)
            self._add(f"{name} on {thread.group(1)}", runs=runs, size=size)

    def _inside(self, instruction: _Instruction) -> Iterator[_Instruction]:
        """The instructions of a fusion or call, those of fusions and calls in it included."""
        name = instruction.called("to_apply" if instruction.opcode == "call" else "calls")
        for op in self.computations.get(name, []):
            yield op
            if op.opcode in ("fusion", "call"):
                yield from self._inside(op)

    def _multiplies(self, instruction: _Instruction) -> bool:
        opcodes = {instruction.opcode} | {op.opcode for op in self._inside(instruction)}
        return bool(opcodes & {"dot", "convolution"})

    def _trip_count(self, condition: str) -> int | None:
        """The constant a counter is compared with; None where the condition is of another kind."""
        instructions = self.computations.get(condition, [])
        compares = [op for op in instructions if op.opcode == "compare"]
        for op in instructions:
            if op.opcode == "fusion":
                compares += [inner for inner in self._inside(op) if inner.opcode == "compare"]
        constants = [op.rest for op in instructions if op.opcode == "constant"]
        if len(compares) != 1 or "direction=LT" not in compares[0].rest:
            return None
        values = [int(text) for text in constants if re.fullmatch(r"-?\d+", text)]
        return values[0] if len(values) == 1 else None

    def _branches(self, instruction: _Instruction) -> list[str]:
        found = re.search(r"branch_computations=\{([^}]*)\}", instruction.rest)
        if found:
            return [name.strip().lstrip("%") for name in found.group(1).split(",")]
        names = (instruction.called(f"{which}_computation") for which in ("true", "false"))
        return [name for name in names if name]

    def _add_collective(
        self,
        op: _Instruction,
        kind: str,
        shapes: dict[str, str],
        runs: float,
        *,
        overlapped: bool = False,
    ) -> None:
        by_dtype: dict[str, float] = {}
        for operand in op.operands:
            for dtype, size in shape_bytes(shapes.get(operand, "")).items():
                by_dtype[dtype] = by_dtype.get(dtype, 0) + size
        group = _group_size(op.rest, partitions=self.partitions)
        if kind == "all-gather":
            by_dtype = {dtype: size * group for dtype, size in by_dtype.items()}
        source = re.search(r'op_name="([^"]*)"', op.rest)
        self.collectives.append(
            Collective(
                kind=kind,
                bytes=sum(by_dtype.values()),
                bytes_by_dtype=by_dtype,
                group=group,
                runs=runs,
                overlapped=overlapped or op.opcode.endswith("-start"),
                source=source.group(1) if source else "",
            )
        )

    def _add_fused_collectives(self, fusion: _Instruction, runs: float, channels: set[str]) -> bool:
        """TPU programs fuse collectives with the work around them.

        One collective may be split over a chain of fusions, which then share its channel.
        """
        inside = list(self._inside(fusion))
        shapes = {op.name: op.shape for op in inside}
        found = [op for op in inside if op.opcode.removesuffix("-start") in COLLECTIVES]
        for op in found:
            channel = re.search(r"channel_id=(\d+)", op.rest)
            if channel:
                if channel.group(1) in channels:
                    continue
                channels.add(channel.group(1))
            self._add_collective(
                op, op.opcode.removesuffix("-start"), shapes, runs, overlapped=True
            )
        return bool(found)

    def _add_uncosted(self, op: _Instruction, shapes: dict[str, str], runs: float) -> None:
        if op.opcode in FREE or op.opcode.endswith("-done"):
            return
        target = re.search(r'custom_call_target="([^"]*)"', op.rest)
        if target and target.group(1) in FREE_TARGETS:
            return
        # "gather_fusion.3" → "gather_fusion"; a Pallas kernel's instruction has the kernel's name.
        pallas = target is not None and target.group(1) == "tpu_custom_call"
        name = re.sub(r"[.\d]+$", "", op.name) if pallas or not target else target.group(1)
        size = sum(shape_bytes(op.shape).values())
        if op.opcode == "slice":
            size *= 2  # it reads as much as it returns, not its whole operand
        else:
            read = (shape_bytes(shapes.get(operand, "")) for operand in op.operands)
            size += sum(sum(sizes.values()) for sizes in read)
        declared = re.search(r'"cost_estimate":(\{[^}]*\})', op.rest) if target else None
        flops = 0.0
        if declared:
            estimate = {key: float(value) for key, value in json.loads(declared.group(1)).items()}
            flops, size = estimate.get("flops", 0.0), estimate.get("bytes_accessed", size)
        self._add(
            name, runs=runs, size=size, flops=flops, kernel=bool(target), declared=bool(declared)
        )

    def _add(
        self,
        name: str,
        *,
        runs: float,
        size: float,
        flops: float = 0.0,
        kernel: bool = False,
        declared: bool = False,
    ) -> None:
        before = self.uncosted.get((name, declared))
        self.uncosted[name, declared] = Uncosted(
            name=name,
            kernel=kernel,
            runs=runs + (before.runs if before else 0),
            bytes=runs * size + (before.bytes if before else 0),
            flops=runs * flops + (before.flops if before else 0),
            declared=declared,
        )


def _group_size(attributes: str, *, partitions: int) -> int:
    """Devices per group; the compiler writes `replica_groups` in three forms."""
    # mesh['data'=16,'fsdp'=4] {'fsdp'}
    found = re.search(r"replica_groups=\w*mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes)
    if found:
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found.group(1))}
        axes = re.findall(r"'([^']*)'(?::\(\d+\)(\d+))?", found.group(2))  # 'fsdp':(2)4 is a part
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    found = re.search(r"replica_groups=\[(\d+),(\d+)\]", attributes)  # [groups,size]<=[...]
    if found:
        return int(found.group(2))
    found = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if found:
        return len(found.group(1).split(","))
    return partitions


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Computations by name, and the entry's name."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = None, None
    for line in text.splitlines():
        header = re.match(r"(ENTRY )?%?([\w.$-]+) ", line) if line[:1] in ("%", "E") else None
        if header and line.rstrip().endswith("{"):
            current = computations.setdefault(header.group(2), [])
            if header.group(1):
                entry = header.group(2)
        elif line.startswith("  ") and current is not None:
            instruction = _instruction(line.strip())
            if instruction:
                current.append(instruction)
        elif line.startswith("}"):
            current = None
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return computations, entry


def _instruction(line: str) -> _Instruction | None:
    """`[ROOT] %name = shape opcode(operands), attributes` as its parts."""
    found = re.match(r"(?:ROOT )?%?([\w.$-]+) = ", line)
    if not found:
        return None
    start = found.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.find(" ", start)
    shape = line[start:end]
    call = re.match(r" ?([\w-]+)\(", line[end:])
    if not call:
        return None
    opens = end + call.end() - 1
    closes = _closing(line, opens)
    inner = line[opens + 1 : closes]
    operands = tuple(re.findall(r"%([\w.$-]+)", inner))
    rest = inner if call.group(1) == "constant" else line[closes + 1 :]
    return _Instruction(found.group(1), shape, call.group(1), operands, rest)


def _closing(line: str, opens: int) -> int:
    """The index of the parenthesis that closes the one at `opens`."""
    depth = 0
    for index in range(opens, len(line)):
        depth += (line[index] == "(") - (line[index] == ")")
        if depth == 0:
            return index
    return len(line) - 1
