"""What executors need to know of a program besides its operations: where it is cut, and the shapes of its cache."""

from __future__ import annotations

from dataclasses import dataclass

from tokenmill.program.program import Buffer, Operation, Program


@dataclass(frozen=True, slots=True)
class ProgramParts:
    """A program, cut where rows are selected: logits of further rows can be had without the tokens' part again.

    Args:
        body: operations on the tokens of a step.
        head: operations on the rows whose logits are wanted.
        hidden: buffers of the body that the head reads, in order of name.
    """

    body: tuple[Operation, ...]
    head: tuple[Operation, ...]
    hidden: tuple[Buffer, ...]


@dataclass(frozen=True, slots=True)
class CacheShape:
    """One layer's keys, or values, in the cache."""

    num_kv_heads: int
    head_dim: int


def split_program(program: Program) -> ProgramParts:
    """The parts of a program."""
    buffers = {buffer.name: buffer for buffer in (*program.inputs, *program.buffers, program.output)}

    def is_of_head(operation: Operation) -> bool:
        operands = (*operation.inputs.values(), *operation.outputs.values())
        return any(buffers[operand.buffer].rows == "rows" for operand in operands)

    head = tuple(operation for operation in program.operations if is_of_head(operation))
    body = tuple(operation for operation in program.operations if not is_of_head(operation))
    read = {operand.buffer for operation in head for operand in operation.inputs.values()}
    hidden = tuple(buffers[name] for name in sorted(read) if buffers[name].rows == "tokens")
    return ProgramParts(body, head, hidden)


def layer_caches(program: Program) -> tuple[CacheShape, ...]:
    """The shape of each layer's cache, by layer."""
    found: dict[int, CacheShape] = {}
    for operation in program.operations:
        if operation.kind == "attention":
            layer, heads, head_dim = (operation.attributes[name] for name in ("layer", "num_kv_heads", "head_dim"))
            assert isinstance(layer, int)
            assert isinstance(heads, int)
            assert isinstance(head_dim, int)
            found[layer] = CacheShape(heads, head_dim)
    return tuple(found[layer] for layer in range(len(found)))
