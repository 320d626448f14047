"""Static memory for a program: every buffer gets an offset in one arena, so that buffers in use never overlap.

A result takes the memory of an input that dies with it where the operation allows that. What is left are intervals of
operations with sizes; they are placed from the largest to the smallest, each in the lowest gap that fits. The lower
bound, the most bytes that are alive at once, shows how much that leaves on the table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

from tokenmill.program.buffer_sizes import buffer_nbytes
from tokenmill.program.program import Buffer, Operand, Operation, Program

IN_PLACE: Final[Mapping[str, tuple[str, str]]] = {
    "add_bias": ("x", "y"),
    "add_rms_norm": ("residual", "sum"),
    "linear": ("residual", "y"),
    "rope": ("x", "y"),
}
"""Operations whose output may be the memory of an input: roles of input and output."""


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """What a plan achieves, in bytes at the largest step.

    Args:
        arena_bytes: of the plan.
        sum_bytes: of all buffers, side by side.
        lower_bound_bytes: alive at once, at most; no plan with the same in-place results can do with less.
        num_in_place: buffers in the memory of another.
    """

    arena_bytes: int
    sum_bytes: int
    lower_bound_bytes: int
    num_in_place: int


@dataclass(slots=True)
class _Block:
    """Buffers that share their memory, one after the other.

    Args:
        names: of them.
        nbytes: of the largest.
        first, last: operations by position: the first that writes, the last that reads or writes.
    """

    names: list[str]
    nbytes: int
    first: int
    last: int
    offset: int = 0

    def overlaps(self, other: _Block) -> bool:
        return self.first <= other.last and other.first <= self.last


def plan_memory(program: Program, *, max_tokens: int, max_rows: int, keep: Collection[str] = ()) -> Program:
    """The program with offsets for its buffers.

    Args:
        program: lowered.
        max_tokens, max_rows: of the largest step.
        keep: names of buffers whose values stay until the step's end: debug outputs.
    """
    blocks = _placed(_blocks(program, max_tokens, max_rows, keep))
    offsets = {name: block.offset for block in blocks for name in block.names}
    buffers = tuple(replace(buffer, offset=offsets[buffer.name]) for buffer in program.buffers)
    arena_bytes = max((block.offset + block.nbytes for block in blocks), default=0)
    return replace(program, buffers=buffers, arena_bytes=arena_bytes)


def memory_report(program: Program, *, max_tokens: int, max_rows: int, keep: Collection[str] = ()) -> MemoryReport:
    """What `plan_memory` achieves for the same arguments."""
    blocks = _placed(_blocks(program, max_tokens, max_rows, keep))
    alive = [0] * (len(program.operations) + 1)
    for block in blocks:
        for position in range(block.first, block.last + 1):
            alive[position] += block.nbytes
    return MemoryReport(
        arena_bytes=max((block.offset + block.nbytes for block in blocks), default=0),
        sum_bytes=sum(buffer_nbytes(buffer, max_tokens, max_rows) for buffer in program.buffers),
        lower_bound_bytes=max(alive, default=0),
        num_in_place=sum(len(block.names) - 1 for block in blocks),
    )


def _blocks(program: Program, max_tokens: int, max_rows: int, keep: Collection[str]) -> list[_Block]:
    """One block for each buffer, or for several that follow each other in place."""
    buffers = {buffer.name: buffer for buffer in program.buffers}
    blocks: dict[str, _Block] = {}
    for position, operation in enumerate(program.operations):
        for operand in _operands(operation):
            if operand.buffer not in buffers:
                continue
            if operand.buffer not in blocks:
                nbytes = buffer_nbytes(buffers[operand.buffer], max_tokens, max_rows)
                blocks[operand.buffer] = _Block([operand.buffer], nbytes, position, position)
            blocks[operand.buffer].last = len(program.operations) if operand.buffer in keep else position
    for position, operation in enumerate(program.operations):
        _share(operation, position, buffers, blocks)
    return list({id(block): block for block in blocks.values()}.values())


def _share(operation: Operation, position: int, buffers: Mapping[str, Buffer], blocks: dict[str, _Block]) -> None:
    """Put an output into the memory of an input, if both are whole buffers of one shape and the input dies here."""
    source_role, result_role = IN_PLACE.get(operation.kind, ("", ""))
    source, result = operation.inputs.get(source_role), operation.outputs.get(result_role)
    if source is None or result is None or source.buffer not in buffers or result.buffer not in buffers:
        return
    before, after = buffers[source.buffer], buffers[result.buffer]
    is_same_shape = (before.rows, before.columns, before.dtype) == (after.rows, after.columns, after.dtype)
    is_whole = source.num_columns == before.columns == result.num_columns
    block, other = blocks[source.buffer], blocks[result.buffer]
    readers = [role for role, operand in operation.inputs.items() if operand.buffer == source.buffer]
    if not is_same_shape or not is_whole or block.last != position or other.first != position or len(readers) != 1:
        return
    block.names.extend(other.names)
    block.last = other.last
    for name in other.names:
        blocks[name] = block


def _placed(blocks: list[_Block]) -> list[_Block]:
    """The blocks with offsets: the largest first, each in the lowest gap between those it lives beside."""
    placed: list[_Block] = []
    for block in sorted(blocks, key=lambda one: (-one.nbytes, one.first)):
        offset = 0
        for other in sorted((one for one in placed if one.overlaps(block)), key=lambda one: one.offset):
            if offset + block.nbytes <= other.offset:
                break
            offset = max(offset, other.offset + other.nbytes)
        block.offset = offset
        placed.append(block)
    return placed


def _operands(operation: Operation) -> Iterable[Operand]:
    return (*operation.inputs.values(), *operation.outputs.values())
