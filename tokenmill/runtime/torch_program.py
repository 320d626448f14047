"""`TorchProgram`: a `Program` run with torch tensors, on any device. The reference of the program executors, and what a
built engine runs on a GPU.

It is to a runner what a model of `models/` is: hidden states of a step, then logits of the rows that want them. The
program is cut where rows are selected; what the second part needs of the first are the hidden states.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch

from tokenmill.attention.base import AttentionBackend
from tokenmill.layers.forward_batch import ForwardBatch, wanted_rows
from tokenmill.program.program import Operand, Operation, Program
from tokenmill.runtime.program_parts import split_program
from tokenmill.runtime.torch_operations import PREPARE, Execute, Preparation, TorchStep, Values

Times: TypeAlias = dict[str, float]
"""Seconds by the operation's name."""


class TorchProgram:
    """A program, ready to run.

    Args:
        program: what to run.
        weights: every weight of the program by name, decoded to floats, on the device where the program shall run.
        backend: what attention calls; fits the device.
        keep: names of buffers whose values `values` returns.
        batch_invariant: give a token the same bits in any company, as `backend` does then.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[str, torch.Tensor],
        backend: AttentionBackend,
        *,
        keep: Sequence[str] = (),
        batch_invariant: bool = False,
    ) -> None:
        self.program = program
        self.vocab_size = program.output.columns
        self._buffers = {buffer.name: buffer for buffer in (*program.inputs, *program.buffers, program.output)}
        prepared = Preparation(self._buffers, weights, backend, batch_invariant)
        parts = split_program(program)
        self._hidden = parts.hidden
        self.keep = frozenset(keep)
        self._body = self._prepare(parts.body, prepared, keep=[buffer.name for buffer in self._hidden])
        self._head = self._prepare(parts.head, prepared, keep=[program.output.name])

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch) -> torch.Tensor:
        """What the head needs of the wanted tokens [n, columns]; writes the step's keys and values to the caches."""
        return wanted_rows(self._hidden_of(self._run_body(batch)), batch.wanted)

    @torch.inference_mode()
    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Rows of what a call gave, [n, columns], to logits [n, vocab_size] float32."""
        return self._run_head(hidden)[self.program.output.name]

    @torch.inference_mode()
    def run(self, batch: ForwardBatch, row_index: torch.Tensor, times: Times | None = None) -> Values:
        """One step as a whole: the logits of the tokens at `row_index` [R] and the buffers of `keep`, by name.

        Args:
            batch: the step.
            row_index: int64.
            times: takes the seconds of each operation, by its name.
        """
        values = self._run_body(batch, times)
        head = self._run_head(self._hidden_of(values)[row_index], times)
        kept = {name: tensor for name, tensor in {**head, **values}.items() if name in self.keep}
        return kept | {self.program.output.name: head[self.program.output.name]}

    def _run_body(self, batch: ForwardBatch, times: Times | None = None) -> Values:
        values = {"token_ids": batch.input_ids.unsqueeze(1), "positions": batch.positions.unsqueeze(1)}
        _execute(self._body, values, TorchStep(batch.attention, batch.caches), times)
        return values

    def _hidden_of(self, values: Values) -> torch.Tensor:
        parts = [values[buffer.name] for buffer in self._hidden]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _run_head(self, hidden: torch.Tensor, times: Times | None = None) -> Values:
        values: Values = {}
        first = 0
        for buffer in self._hidden:
            values[buffer.name] = hidden[:, first : first + buffer.columns]
            first += buffer.columns
        # The rows have been selected: what `select_rows` is told is to take them all.
        values["row_index"] = torch.arange(hidden.shape[0], device=hidden.device).unsqueeze(1)
        _execute(self._head, values, None, times)
        return values

    # ---- preparation -----------------------------------------------------------------------------------------

    def _prepare(
        self, operations: Sequence[Operation], prepared: Preparation, *, keep: Sequence[str]
    ) -> list[_Prepared]:
        """What runs each operation, and the buffers that nobody reads after it."""
        steps: list[_Prepared] = []
        live = {*keep, *self.keep}
        for operation in reversed(operations):
            operands: tuple[Operand, ...] = (*operation.inputs.values(), *operation.outputs.values())
            dead = tuple(dict.fromkeys(operand.buffer for operand in operands if operand.buffer not in live))
            live.update(dead)
            steps.append(_Prepared(operation.name, PREPARE[operation.kind](operation, prepared), dead))
        return steps[::-1]


class _Prepared(NamedTuple):
    name: str
    execute: Execute
    dead: tuple[str, ...]


def _execute(operations: Sequence[_Prepared], values: Values, step: TorchStep | None, times: Times | None) -> None:
    for name, execute, dead in operations:
        started = 0.0 if times is None else _now(values)
        execute(values, step)  # type: ignore[arg-type]  # the head has no operation that asks for the step
        if times is not None:
            times[name] = _now(values) - started
        for buffer in dead:
            values.pop(buffer, None)


def _now(values: Values) -> float:
    """Seconds, when the device has done what it was told."""
    if any(tensor.is_cuda for tensor in values.values()):
        torch.cuda.synchronize()
    return time.perf_counter()
