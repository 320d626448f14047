"""`HeadScreen`: lets greedy steps of one row read half of the output head. Called by `CpuExecutor`.

Which columns of the screen are exact is learned from the first steps: those in which their hidden states are largest.
Tokens never depend on it, nor on whether there is a screen (see `ops.cpu.head_screen`), only how much is read.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final

import numpy as np

from tokenmill.ops.cpu.cpu_features import DotProduct, best_dot_product
from tokenmill.ops.cpu.head_screen import (
    ExactQuads,
    ScreenPlaces,
    can_screen,
    head_screen_kernel,
    pack_screen_kernel,
    screen_bytes,
    screen_scratch_bytes,
)
from tokenmill.ops.cpu.jit import NativeFunction
from tokenmill.ops.cpu.layout import GROUP_BYTES, GROUP_SIZE
from tokenmill.ops.cpu.linear_int8 import LinearWeight
from tokenmill.ops.cpu.packing import FORMATS, ROW_BLOCK, num_groups, packed_bytes
from tokenmill.ops.cpu.threads import OpList, ThreadPool
from tokenmill.program.program import Operation, Program
from tokenmill.runtime.cpu_operations import Op, OpWriter, linear_input
from tokenmill.runtime.huge_pages import Bytes
from tokenmill.runtime.program_parts import split_program
from tokenmill.runtime.step_arrays import MAX_STEPS

MEASURED_STEPS: Final = 6
"""Steps whose hidden states choose the exact columns. With SmolLM2-135M 4 steps choose as well as 600."""

EXACT_SHARE: Final = 8
"""One in so many columns is exact."""

MAX_SHARE: Final = 0.25
"""Of the tiles, computed exactly on the average of some steps: with more the screen saves too little to be kept."""

AVERAGED_STEPS: Final = 32
MAX_PATIENCE: Final = 4096
"""Steps from one attempt to the next, at most; they become twice as many with each one that fails."""


@dataclass(frozen=True, slots=True)
class ScreenedHead:
    """The product that a screen stands for.

    Args:
        name: of the operation.
        before: ops that make its input.
        weight: packed.
        values: address of the row's activations.
        way: how to compute dot products.
    """

    name: str
    before: tuple[Op, ...]
    weight: LinearWeight
    values: int
    way: DotProduct

    @staticmethod
    def of(program: Program, operation: Operation, writer: OpWriter) -> ScreenedHead | None:
        """The last operation of a program, if there is a screen for it: a plain product of 8-bit values."""
        if not _is_plain_head(program, operation):
            return None
        name = operation.weights["weight"]
        if writer.weights[name].format not in FORMATS:
            return None
        weight = writer.weights.linear(name, gated=False)
        variant = writer.choices.linear(weight, one_token=True)
        way = variant.way if variant else best_dot_product()
        if not can_screen(weight.format, way):
            return None
        before, x = linear_input(writer, operation)
        return ScreenedHead(operation.name, tuple(before), weight, x.address + x.first_group * GROUP_BYTES, way)


class HeadScreen:
    """The screen of a head. It is written once the exact columns are known; until then steps compute all logits.

    Args:
        head: whose screen it is.
        writer: whose memory it takes; pages that are not written take none.
        token: address of int32, where steps leave their token.

    Attributes:
        is_ready: whether steps may use it.
        share: of the tiles that the last steps with it computed exactly.
    """

    def __init__(self, head: ScreenedHead, writer: OpWriter, token: int) -> None:
        rows, columns = head.weight.num_rows, head.weight.num_columns
        num_quads = _num_exact_quads(columns)
        pages, groups = writer.memory.pages, num_groups(columns)
        self._exact = ExactQuads.of(np.arange(num_quads), groups)
        self._counts = pages.take(16).view(np.int64)  # tiles and tokens
        self._places = ScreenPlaces(
            values=head.values,
            weight=head.weight,
            screen=writer.memory.reserve(screen_bytes(rows, columns, num_quads)),
            exact=self._exact,
            scratch=writer.memory.reserve(screen_scratch_bytes(rows, columns, num_quads, writer.places.num_threads)),
            token=token,
            counts=self._counts.ctypes.data,
        )
        self._head = head
        self._num_tiles = -(-rows // ROW_BLOCK)
        record = (ctypes.c_uint8 * (groups * GROUP_BYTES)).from_address(head.values)
        self._values: Bytes = np.ctypeslib.as_array(record).reshape(groups, GROUP_BYTES)
        self._energy = np.zeros(groups * GROUP_SIZE // 4)
        self._patience = self._steps_left = MEASURED_STEPS
        self._average = self.share = 0.0
        self.is_ready = False
        self._pack: OpList | None = None

    @property
    def ops(self) -> tuple[Op, ...]:
        """What takes the place of the product, and of finding the most likely token."""
        kernel = head_screen_kernel(self._head.weight.format, self._head.way)
        return (*self._head.before, *(Op(kernel, part) for part in self._places.arguments()))

    @property
    def functions(self) -> tuple[NativeFunction, ...]:
        """What is called between steps."""
        return (pack_screen_kernel(self._head.weight.format, self._head.way),)

    @property
    def num_bytes(self) -> int:
        """What a step reads, at the share of the last ones."""
        weight, quads = self._head.weight, len(self._exact.quads)
        whole = packed_bytes(weight.format, weight.num_rows, weight.num_columns)
        return screen_bytes(weight.num_rows, weight.num_columns, quads) + int(self.share * whole)

    @property
    def max_steps(self) -> int:
        """Steps after which it wants to learn or to be written. Each hidden state that it learns from ends a call."""
        return MAX_STEPS if self.is_ready else max(1, self._steps_left - MEASURED_STEPS)

    def after_steps(self, num_steps: int, pool: ThreadPool) -> None:
        """Learn from steps of one token and row; they have used the screen if `is_ready`."""
        if self.is_ready:
            self._watch()
            return
        if self._steps_left <= MEASURED_STEPS:
            self._measure()
        self._steps_left -= num_steps
        if self._steps_left <= 0:
            self._write(pool)

    def _watch(self) -> None:
        """Put it aside if it does not help, and learn again after a while."""
        num_exact, num_tokens = self._counts.tolist()
        self._counts[:] = 0
        if num_tokens == 0:
            return
        self.share = num_exact / num_tokens / self._num_tiles
        self._average += (self.share - self._average) * min(1.0, num_tokens / AVERAGED_STEPS)
        if self._average > MAX_SHARE:
            self.is_ready = False
            self._patience = self._steps_left = min(2 * self._patience, MAX_PATIENCE)
            self._energy[:] = 0

    def _measure(self) -> None:
        """Add the squares of the step's hidden state, by quad of columns."""
        levels = self._values[:, :GROUP_SIZE].view(np.int8).astype(np.float64)
        scales = self._values[:, GROUP_SIZE : GROUP_SIZE + 4].copy().view(np.float32)
        squares = np.square(levels * scales).reshape(-1, 4).sum(1)
        if np.all(np.isfinite(squares)):
            self._energy += squares

    def _write(self, pool: ThreadPool) -> None:
        """Write the screen, in about the time of a step."""
        largest = np.argsort(-self._energy, kind="stable")[: len(self._exact.quads)]
        exact = ExactQuads.of(largest, len(self._values))
        self._exact.quads[:], self._exact.masks[:] = exact.quads, exact.masks
        self._exact.constants[:] = exact.constants
        if self._pack is None:
            self._pack = OpList(1)
            self._pack.append(self.functions[0], *self._places.arguments()[0], num_tokens=1)
        pool.run(self._pack)
        self._average = 0.0
        self.is_ready = True


def screen_nbytes(program: Program) -> int:
    """Memory that the screen of a program's head takes on this processor, once greedy steps use it; 0 without one."""
    head = split_program(program).head[-1]
    if not _is_plain_head(program, head):
        return 0
    weight = next(one for one in program.weights if one.name == head.weights["weight"])
    if weight.format not in FORMATS or not can_screen(weight.format, best_dot_product()):
        return 0
    num_rows, num_columns = weight.shape
    return screen_bytes(num_rows, num_columns, _num_exact_quads(num_columns))


def _is_plain_head(program: Program, operation: Operation) -> bool:
    """Whether the operation's products are the program's logits as they are."""
    roles = set(operation.inputs) | set(operation.weights)
    is_product = operation.kind == "linear" and roles == {"x", "weight"} and "activation" not in operation.attributes
    return is_product and operation.outputs["y"].buffer == program.output.name


def _num_exact_quads(num_columns: int) -> int:
    """An even number."""
    return max(2, num_columns // (4 * EXACT_SHARE) // 2 * 2)
