"""`CpuExecutor`: runs a program's steps on the CPU, each as one native call that walks a list of kernels.

The lists are written once: one for each combination of one or several tokens and one or several wanted rows, because
kernels differ, and one for a token whose successor is wanted without logits. A step fills in numbers of tokens and the
address of what is fixed about it, and calls.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from tokenmill.attention.base import LayerCache
from tokenmill.engine.plan import Interruption
from tokenmill.ops.cpu.argmax import advance_arguments, argmax, argmax_arguments, argmax_scratch_bytes
from tokenmill.ops.cpu.cache_layout import STEP_SIZE, cache_shapes
from tokenmill.ops.cpu.compile_processes import compile_all
from tokenmill.ops.cpu.layout import COLUMN_NUM_TOKENS
from tokenmill.ops.cpu.repetition import Repetition
from tokenmill.ops.cpu.threads import STEP_FUNCTIONS, OpList, ThreadPool
from tokenmill.ops.platform import num_usable_cores
from tokenmill.program.package import EnginePackage
from tokenmill.program.program import Operation, Program
from tokenmill.runtime.cpu_memory import ProgramMemory
from tokenmill.runtime.cpu_operations import Op, OpWriter, StepPlaces
from tokenmill.runtime.cpu_weights import CpuWeights
from tokenmill.runtime.head_screen import HeadScreen, ScreenedHead
from tokenmill.runtime.huge_pages import HugePages
from tokenmill.runtime.kernel_choices import KernelChoices
from tokenmill.runtime.program_executor import ProgressCallback, Values
from tokenmill.runtime.program_parts import ProgramParts, layer_caches, split_program
from tokenmill.runtime.step_arrays import MAX_STEPS, Integers, StepArrays

NUM_SPINS: Final = 200_000
"""Looks for a step before a worker thread sleeps: some milliseconds. To wake it takes up to one, and the host needs 0.3
ms between two steps of one stream; with 20,000 looks SmolLM2-135M decoded at 290 tokens/s instead of 390."""

_NUM_ROWS: Final = 0
_QUERY_STARTS: Final = 1
_KV_LENS: Final = 2
_BLOCK_TABLES: Final = 3
_TABLE_STRIDE: Final = 4
"""Places in the step's rows, see `ops.cpu.cache_layout`."""

_ONE: Final = (1, 1)
_SCREENED: Final = (1, -1)
"""Lists of steps of one token whose successor is wanted: that with logits, and that which uses the head's screen."""


@dataclass(frozen=True, slots=True)
class _StepList:
    """The ops of one kind of step.

    Args:
        ops: the one that goes on from the step before, those of the body and of the head, the most likely tokens.
        num_body: how many the first and the body's are.
        names: the operation that each op belongs to.
    """

    ops: OpList
    num_body: int
    names: tuple[str, ...]


class CpuExecutor:
    """A program in the memory of this machine, with its cache and threads.

    Args:
        package: the engine.
        arrays: where steps are written; gives the largest sizes.
        num_blocks: cache blocks.
        cache_dtype: float32 or bfloat16.
        num_threads: that compute, the caller's included.
        on_progress: told `kernels`, how many are compiled, and how many there are.
        deterministic: compute a token in the same way in every batch.

    Attributes:
        screen: of the head, for steps without logits; None if there is none for it.

    Raises:
        UnsupportedFeatureError: there is no kernel for something in the program.
    """

    def __init__(
        self,
        package: EnginePackage,
        arrays: StepArrays,
        num_blocks: int,
        cache_dtype: torch.dtype,
        num_threads: int,
        on_progress: ProgressCallback | None = None,
        *,
        deterministic: bool = False,
    ) -> None:
        self.arrays = arrays
        self._program = package.program
        self._debug_buffers = tuple(package.config.debug_outputs.values())
        self._parts = split_program(package.program)
        # What the head reads must outlive it: logits of further rows may be asked for after the step.
        memory = ProgramMemory(package.program, arrays, apart=[buffer.name for buffer in self._parts.hidden])
        self._memory = memory
        if package.region is not None:
            memory.pages.adopt(package.region)
        sizes = (num_blocks, arrays.tokens_per_block)
        self._blocks, self._caches = _allocate_caches(package.program, *sizes, cache_dtype, memory.pages)
        self._step = np.zeros(STEP_SIZE, np.int64)
        self._step[_QUERY_STARTS] = arrays.query_start.ctypes.data
        self._step[_KV_LENS] = arrays.kv_lens.ctypes.data
        self._step[_BLOCK_TABLES] = arrays.block_tables.ctypes.data
        self._step[_TABLE_STRIDE] = arrays.block_tables.strides[0]
        self._logits = memory.floats(package.program.output.name, arrays.max_num_rows)
        self._most_likely: Integers = memory.pages.take(4 * arrays.max_num_rows).view(np.int32)
        self._repetition = Repetition(self._most_likely, arrays.end_ids, MAX_STEPS)
        writer = OpWriter(
            memory,
            CpuWeights(package.program, package.weights, memory),
            StepPlaces(
                arrays, self._step.ctypes.data, self._caches, layer_caches(package.program), num_threads, deterministic
            ),
            KernelChoices.of(package, num_threads),
        )
        head = ScreenedHead.of(package.program, self._parts.head[-1], writer)
        # Debug outputs may be logits, or what is computed from them.
        has_screen = head is not None and not self._debug_buffers
        self.screen = HeadScreen(head, writer, self._most_likely.ctypes.data) if head and has_screen else None
        around = self._token_ops(package.program.output.name)
        progress = on_progress or (lambda what, done, total: None)
        self._lists = _write_lists(self._parts, writer, around, self.screen, progress)
        self._pool = ThreadPool(num_threads, num_spins=NUM_SPINS)

    def run(self) -> Values:
        """See `ProgramExecutor.run`."""
        self._pool.run(self._ready(self._lists[self._kind()]).ops)
        return self._logits[: self.arrays.num_rows]

    def run_steps(self, max_steps: int, seconds: float, interruption: Interruption) -> Integers:
        """See `ProgramExecutor.run_steps`."""
        kind = self._kind_without_logits()
        screen = self.screen if kind in (_ONE, _SCREENED) else None
        if screen is not None:
            max_steps = min(max_steps, screen.max_steps)
        ops = self._ready(self._lists[kind]).ops
        self._repetition.set(self.arrays.num_rows, max_steps, seconds, interruption.address)
        num_steps = self._pool.run_steps(ops, self._repetition)
        if screen is not None:
            screen.after_steps(num_steps, self._pool)
        return self._repetition.found(num_steps)

    def logits_at(self, row_index: Sequence[int]) -> Values:
        """See `ProgramExecutor.logits_at`."""
        arrays, size = self.arrays, self.arrays.max_num_rows
        wanted = arrays.row_index[: arrays.num_rows].copy()
        found = np.empty((len(row_index), self._logits.shape[1]), np.float32)
        for first in range(0, len(row_index), size):
            part = row_index[first : first + size]
            self._want(part)
            self._pool.run(self._ready(self._lists[0, min(len(part), 2)]).ops)
            found[first : first + len(part)] = self._logits[: len(part)]
        self._want(wanted)
        return found

    def copy_blocks(self, sources: Sequence[int], destinations: Sequence[int]) -> None:
        """See `ProgramExecutor.copy_blocks`."""
        with torch.inference_mode():
            for source, destination in zip(sources, destinations, strict=True):
                self._blocks[destination].copy_(self._blocks[source])

    def kept(self) -> Mapping[str, Values]:
        """See `ProgramExecutor.kept`."""
        sizes: Mapping[int | str, int] = {"tokens": self.arrays.num_tokens, "rows": self.arrays.num_rows}
        found = {}
        for name in self._debug_buffers:
            rows = self._memory.buffers[name].rows
            found[name] = self._memory.values(name, sizes[rows] if isinstance(rows, str) else rows)
        return found

    def run_timed(self, *, with_logits: bool = True) -> Mapping[str, float]:
        """See `ProgramExecutor.run_timed`."""
        step = self._ready(self._lists[self._kind() if with_logits else self._kind_without_logits()])
        times = dict.fromkeys((operation.name for operation in self._program.operations), 0.0)
        for name, nanoseconds in zip(step.names, self._pool.run_timed(step.ops).tolist(), strict=True):
            times[name] += nanoseconds * 1e-9
        return times

    def close(self) -> None:
        """End the threads."""
        self._pool.close()

    def _token_ops(self, logits: str) -> tuple[Op, list[Op]]:
        """The op that makes the most likely tokens the step's input, and those that find them."""
        scratch = self._memory.reserve(argmax_scratch_bytes(self.arrays.max_num_rows))
        halves = argmax_arguments(
            logits=self._memory.buffer_address(logits),
            columns=self._memory.buffers[logits].columns,
            scratch=scratch,
            tokens=self._most_likely.ctypes.data,
        )
        arrays = self.arrays
        inputs = advance_arguments(
            tokens=self._most_likely.ctypes.data,
            token_ids=arrays.token_ids.ctypes.data,
            positions=arrays.positions.ctypes.data,
            kv_lens=arrays.kv_lens.ctypes.data,
        )
        return Op(argmax, inputs), [Op(argmax, half) for half in halves]

    def _kind(self) -> tuple[int, int]:
        return min(self.arrays.num_tokens, 2), min(self.arrays.num_rows, 2)

    def _kind_without_logits(self) -> tuple[int, int]:
        kind = self._kind()
        return _SCREENED if kind == _ONE and self.screen is not None and self.screen.is_ready else kind

    def _want(self, row_index: Sequence[int] | np.ndarray[tuple[int], np.dtype[np.int32]]) -> None:
        self.arrays.num_rows = len(row_index)
        self.arrays.row_index[: len(row_index)] = row_index

    def _ready(self, step: _StepList) -> _StepList:
        """Write this step's sizes to its list."""
        self._step[_NUM_ROWS] = self.arrays.num_sequences
        counts = step.ops.rows[: step.ops.num_ops, COLUMN_NUM_TOKENS]
        counts[0] = 0
        counts[1 : step.num_body] = self.arrays.num_tokens
        counts[step.num_body :] = self.arrays.num_rows
        return step


def _write_lists(
    parts: ProgramParts,
    writer: OpWriter,
    around: tuple[Op, Sequence[Op]],
    screen: HeadScreen | None,
    on_progress: ProgressCallback,
) -> dict[tuple[int, int], _StepList]:
    """Lists by (tokens, rows), where 2 stands for several; 0 tokens: the head alone, 0 rows: the body alone.

    Args:
        around: what comes before each step, and after those with rows.
        screen: of the head's last operation.
    """
    before, after = around
    written: dict[tuple[int, int], list[tuple[Operation, Op]]] = {}
    for num_tokens, num_rows in ((1, 1), (1, 2), (1, 0), (2, 1), (2, 2), (2, 0), (0, 1), (0, 2)):
        body: Sequence[Operation] = parts.body if num_tokens else ()
        head: Sequence[Operation] = parts.head if num_rows else ()
        written[num_tokens, num_rows] = [
            (parts.body[0], before),
            *((operation, op) for operation in body for op in writer.write(operation, one=num_tokens == 1)),
            *((operation, op) for operation in head for op in writer.write(operation, one=num_rows == 1)),
            *((parts.head[-1], op) for op in after if num_rows),
        ]
    functions = [*STEP_FUNCTIONS]
    if screen is not None:
        whole = [(operation, op) for operation, op in written[_ONE] if operation is not parts.head[-1]]
        written[_SCREENED] = [*whole, *((parts.head[-1], op) for op in screen.ops)]
        functions += screen.functions
    functions += [function for entries in written.values() for _, op in entries for function in op.functions]
    compile_all(functions, num_usable_cores(), lambda done, total: on_progress("kernels", done, total))
    body_names = {operation.name for operation in parts.body}
    lists = {}
    for sizes, entries in written.items():
        ops = OpList(len(entries))
        for _, op in entries:
            op.append_to(ops)
        names = tuple(operation.name for operation, _ in entries)
        lists[sizes] = _StepList(ops, sum(name in body_names for name in names), names)
    return lists


def _allocate_caches(
    program: Program, num_blocks: int, tokens_per_block: int, dtype: torch.dtype, pages: HugePages
) -> tuple[torch.Tensor, tuple[LayerCache, ...]]:
    """Blocks [N, bytes], and in them keys and values of each layer in the kernels' layout.

    A block of all layers lies together: a new page, which the system fills with zeros when it is first written, costs
    up to 4 ms on a virtual machine, and the first token writes to every layer. Pages that nobody writes take no memory.
    """
    shapes = [
        shape
        for layer in layer_caches(program)
        for shape in cache_shapes(num_blocks, tokens_per_block, layer.num_kv_heads, layer.head_dim, dtype)
    ]
    sizes = [math.prod(shape[1:]) * dtype.itemsize for shape in shapes]
    blocks = torch.from_numpy(pages.take(num_blocks * sum(sizes))).view(num_blocks, sum(sizes))
    parts = [part.view(dtype).view(shape) for part, shape in zip(torch.split(blocks, sizes, 1), shapes, strict=True)]
    return blocks, tuple(zip(parts[::2], parts[1::2], strict=True))
