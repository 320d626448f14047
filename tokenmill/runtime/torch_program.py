"""`TorchProgram`: a `Program` run with torch tensors, on any device. The reference of the program executors, and what a
built engine runs on a GPU.

It is to a runner what a model of `models/` is: hidden states of a step, then logits of the rows that want them. The
program is cut where rows are selected; what the second part needs of the first are the hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from tokenmill.attention.base import AttentionBackend
from tokenmill.layers.forward_batch import ForwardBatch
from tokenmill.program.program import Buffer, Operand, Operation, Program
from tokenmill.runtime.torch_operations import PREPARE, Execute, Preparation, TorchStep, Values


class TorchProgram:
    """A program, ready to run.

    Args:
        program: what to run.
        weights: every weight of the program by name, decoded to floats, on the device where the program shall run.
        backend: what attention calls; fits the device.
        keep: names of buffers whose values `values` returns.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        backend: AttentionBackend,
        *,
        keep: Sequence[str] = (),
    ) -> None:
        self.program = program
        self.vocab_size = program.output.columns
        self._buffers = {buffer.name: buffer for buffer in (*program.inputs, *program.buffers, program.output)}
        prepared = Preparation(self._buffers, weights, backend)
        is_head = [self._reads_rows(operation) for operation in program.operations]
        head = [operation for operation, of_head in zip(program.operations, is_head, strict=True) if of_head]
        body = [operation for operation, of_head in zip(program.operations, is_head, strict=True) if not of_head]
        self._hidden = self._hidden_buffers(head)
        self._keep = frozenset(keep)
        self._body = self._prepare(body, prepared, keep=[buffer.name for buffer in self._hidden])
        self._head = self._prepare(head, prepared, keep=[program.output.name])

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """What the head needs of each token [T, columns]; writes the step's keys and values to the caches."""
        return self._hidden_of(self._run_body(batch))

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of what a call gave, [n, columns], to logits [n, vocab_size] float32."""
        return self._run_head(hidden)[self.program.output.name]

    @torch.inference_mode()
    def run(self, batch: ForwardBatch, row_index: torch.Tensor) -> Values:
        """One step as a whole: the logits of the tokens at `row_index` [R] and the buffers of `keep`, by name."""
        values = self._run_body(batch)
        head = self._run_head(self._hidden_of(values)[row_index])
        kept = {name: tensor for name, tensor in {**values, **head}.items() if name in self._keep}
        return kept | {self.program.output.name: head[self.program.output.name]}

    def _run_body(self, batch: ForwardBatch) -> Values:
        values = {"token_ids": batch.input_ids.unsqueeze(1), "positions": batch.positions.unsqueeze(1)}
        _execute(self._body, values, TorchStep(batch.attention, batch.caches))
        return values

    def _hidden_of(self, values: Values) -> torch.Tensor:
        parts = [values[buffer.name] for buffer in self._hidden]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run_head(self, hidden: torch.Tensor) -> Values:
        widths = [buffer.columns for buffer in self._hidden]
        parts = hidden.split(widths, dim=1) if len(widths) > 1 else (hidden,)
        values = {buffer.name: part for buffer, part in zip(self._hidden, parts, strict=True)}
        # The rows have been selected: what `select_rows` is told is to take them all.
        values["row_index"] = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
        _execute(self._head, values, None)
        return values

    # ---- preparation -----------------------------------------------------------------------------------------

    def _reads_rows(self, operation: Operation) -> bool:
        """Whether the operation belongs to the part of the program that computes rows, not tokens."""
        operands = (*operation.inputs.values(), *operation.outputs.values())
        return any(self._buffers[operand.buffer].rows == "rows" for operand in operands)

    def _hidden_buffers(self, head: Sequence[Operation]) -> list[Buffer]:
        """What the head reads of the tokens, in order of name."""
        read = {operand.buffer for operation in head for operand in operation.inputs.values()}
        return [self._buffers[name] for name in sorted(read) if self._buffers[name].rows == "tokens"]

    def _prepare(
        self, operations: Sequence[Operation], prepared: Preparation, *, keep: Sequence[str]
    ) -> list[tuple[Execute, tuple[str, ...]]]:
        """What runs each operation, and the buffers that nobody reads after it."""
        steps: list[tuple[Execute, tuple[str, ...]]] = []
        live = {*keep, *self._keep}
        for operation in reversed(operations):
            operands: tuple[Operand, ...] = (*operation.inputs.values(), *operation.outputs.values())
            dead = tuple(dict.fromkeys(operand.buffer for operand in operands if operand.buffer not in live))
            live.update(dead)
            steps.append((PREPARE[operation.kind](operation, prepared), dead))
        return steps[::-1]


def _execute(steps: Sequence[tuple[Execute, tuple[str, ...]]], values: Values, step: TorchStep | None) -> None:
    for execute, dead in steps:
        execute(values, step)  # type: ignore[arg-type]  # the head has no operation that asks for the step
        for name in dead:
            values.pop(name, None)
