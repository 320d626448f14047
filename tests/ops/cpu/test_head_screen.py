"""The most likely token through a screen of the head, against the head's own product and `argmax`, bit by bit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.native_ops import run_equally, run_ops
from tests.support.packed_linear import LinearRun, aligned, linear_weight, make_weight, quantize_activations
from tokenmill.ops.cpu.argmax import NOT_FINITE
from tokenmill.ops.cpu.cpu_features import DotProduct, best_dot_product, supported_dot_products
from tokenmill.ops.cpu.head_screen import (
    NUM_GROUPS,
    NUM_QUADS,
    NUM_ROWS,
    PREPARED,
    QUAD_BYTES,
    SCRATCH,
    SCREEN,
    TOKEN,
    VALUES,
    ExactQuads,
    ScreenPlaces,
    can_screen,
    head_screen_kernel,
    pack_screen_kernel,
    prepare,
    screen_bytes,
    screen_scratch_bytes,
)
from tokenmill.ops.cpu.intrinsics import argument
from tokenmill.ops.cpu.jit import kernel
from tokenmill.ops.cpu.packing import PackedWeight, encoding_of
from tokenmill.ops.cpu.screen_blocks import SCREEN_GROUP_BYTES, screen_tile

pytestmark = [
    pytest.mark.spec("C1"),
    pytest.mark.skipif(not can_screen("q8_0", best_dot_product()), reason="this processor has no screens"),
]
BEST = best_dot_product()
WAY = int(BEST)
Floats = npt.NDArray[np.floating]


@kernel
def approximate(thread: int, num_threads: int, row: int) -> None:
    """All logits and bounds of a screen, float32 [tiles, 2, 16] to the address in the token's column."""
    groups = argument(row, SCRATCH) + PREPARED
    quads = prepare(row, groups)
    count, num_quads = argument(row, NUM_GROUPS), argument(row, NUM_QUADS)
    for tile in range((argument(row, NUM_ROWS) + 15) // 16):
        place = argument(row, SCREEN) + tile * (count * SCREEN_GROUP_BYTES + num_quads * QUAD_BYTES)
        result = argument(row, TOKEN) + tile * 128
        screen_tile(WAY, place, argument(row, VALUES), groups, count, quads, num_quads, result)


@dataclass
class Head:
    """A packed head and its screen, for one row of activations at a time."""

    weight: PackedWeight
    quads: npt.NDArray[np.int64]
    way: DotProduct = BEST

    def __post_init__(self) -> None:
        rows, columns, count = self.weight.num_rows, self.weight.num_columns, len(self.quads)
        self.data, self.x = aligned(len(self.weight.data)), aligned(-(-columns // 32) * 40)
        self.data[:] = self.weight.data
        self.screen, self.scratch = aligned(screen_bytes(rows, columns, count)), aligned(1 << 16)
        assert screen_scratch_bytes(rows, columns, count, 3) <= 1 << 16
        self.found, self.counts = np.zeros(1, np.int32), np.zeros(2, np.int64)
        self.exact = ExactQuads.of(self.quads, -(-columns // 32))
        self.places = ScreenPlaces(
            values=self.x.ctypes.data,
            weight=linear_weight(self.weight, self.data.ctypes.data),
            screen=self.screen.ctypes.data,
            exact=self.exact,
            scratch=self.scratch.ctypes.data,
            token=self.found.ctypes.data,
            counts=self.counts.ctypes.data,
        )
        run_ops([(pack_screen_kernel(self.weight.format, self.way), self.places.arguments()[0])], 1, 2)

    def logits(self, x: npt.NDArray[np.uint8]) -> Floats:
        """By the op `linear`, float32."""
        return LinearRun(self.weight, x, 1).run(way=self.way)[0]

    def bounded(self, x: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Approximate logits and bounds."""
        self.x[:] = x
        result = np.zeros((-(-self.weight.num_rows // 16), 2, 16), np.float32)
        places = replace(self.places, token=result.ctypes.data)
        run_ops([(approximate, places.arguments()[0])], 1)
        return result[:, 0].reshape(-1)[: self.weight.num_rows], result[:, 1].reshape(-1)[: self.weight.num_rows]

    def token(self, x: npt.NDArray[np.uint8]) -> int:
        """By the screen, with 1, 2 and 3 threads; compared with what the logits say."""
        self.x[:] = x

        def compute(num_threads: int) -> torch.Tensor:
            self.found[:], self.counts[:] = 99, 0
            kernel = head_screen_kernel(self.weight.format, self.way)
            run_ops([(kernel, part) for part in self.places.arguments()], 1, num_threads)
            return torch.tensor(self.found)

        token = int(run_equally(compute)[0])
        logits = self.logits(x)
        expected = int(logits.argmax())  # of the first NaN, if there is one
        assert token == (expected if np.isfinite(logits[expected]) else NOT_FINITE)
        return token


def make_head(rows: int, columns: int, *, seed: int = 0, quads: int = 2, weight_format: str = "int8_group32") -> Head:
    weight, _ = make_weight(weight_format, rows, columns, seed=seed)
    generator = np.random.default_rng(seed)
    return Head(weight, generator.permutation(-(-columns // 32) * 8)[:quads].astype(np.int64))


def records_of(head: Head) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.uint8]]:
    """The packed weight's scales [tiles, groups, 16] and values [tiles, groups, 8, 16, 4]: views."""
    size = encoding_of(head.weight.format).group_bytes
    records = head.weight.data.reshape(-1, -(-head.weight.num_columns // 32), size)
    return records[:, :, :32].view(np.float16), records[:, :, 32:].reshape(*records.shape[:2], 8, 16, 4)


def activations(columns: int, seed: int = 0, outliers: int = 3) -> npt.NDArray[np.uint8]:
    """Of one token, some of whose columns are much larger than others, as those of real models."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((1, columns)).astype(np.float32)
    x[0, generator.permutation(columns)[:outliers]] *= 50
    return quantize_activations(x)[0]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_the_bound_is_one(data: st.DataObject) -> None:
    """Against the exact kernel, whatever values, scales and activations are: extremes of all of them included."""
    columns = data.draw(st.sampled_from([32, 64, 96, 160]))
    groups = columns // 32
    seed = data.draw(st.integers(0, 1 << 20))
    generator = np.random.default_rng(seed)
    weight, _ = make_weight("int8_group32", 40, columns, seed=seed)
    head = Head(weight, np.arange(2))
    scales, values = records_of(head)
    kind = data.draw(st.sampled_from(["random", "extreme", "edges", "large scales", "negative scales", "tiny scales"]))
    if kind == "extreme":
        values[:] = generator.choice(np.array([0, 255], np.uint8), values.shape)
    if kind == "edges":  # the low halves that are farthest from 7.5, all on one side
        values[:] = 16 * generator.integers(0, 16, values.shape) + generator.choice([0, 15])
    if kind == "large scales":
        scales[:] = generator.choice(np.array([65504, 1, 1e-3], np.float16), scales.shape)
    if kind == "negative scales":
        scales[:] = -scales
    if kind == "tiny scales":
        scales[:] = np.float16(6e-8)
    count = data.draw(st.integers(1, groups * 4)) * 2
    head = Head(weight, generator.permutation(groups * 8)[:count].astype(np.int64))
    size = data.draw(st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e18]))
    x = generator.standard_normal((1, columns)).astype(np.float32) * np.float32(size)
    if data.draw(st.booleans()):
        x[0, generator.integers(columns)] *= 100
    if data.draw(st.booleans()):
        x = np.abs(x)
    if data.draw(st.booleans()):  # a group of zeros
        x[0, :32] = 0
    record, _ = quantize_activations(x)
    approximate, bounds = head.bounded(record)
    logits = head.logits(record)
    errors = np.abs(logits.astype(np.float64) - approximate)
    assert np.all(errors <= bounds), (errors / bounds).max()
    assert np.all(np.isfinite(bounds))
    # Above the logit, not at it, rounded as the kernel does: a row that only reaches another's logit is below it.
    assert np.all(approximate.astype(np.float32) + bounds.astype(np.float32) > logits)


def test_activations_in_the_direction_of_the_error() -> None:
    """Nothing is larger: the bound is reached, but for its rounding."""
    head = make_head(64, 96, quads=2)
    _, values = records_of(head)
    for row in range(64):
        low = values[row // 16, :, :, row % 16].astype(np.int64) % 16  # [groups, 8, 4]
        levels = 8 * (2 * low - 15)
        levels.reshape(-1, 4)[head.quads] = 0
        record = np.zeros((3, 40), np.uint8)
        record[:, :32] = levels.astype(np.int8).reshape(3, 32).view(np.uint8)
        record[:, 32:36] = np.array([[0.01]], np.float32).view(np.uint8)
        sums = np.float32(0.01) * levels.reshape(3, -1).sum(1, keepdims=True).astype(np.float32)
        record[:, 36:] = sums.view(np.uint8)
        approximate, bounds = head.bounded(record.reshape(-1))
        errors = np.abs(head.logits(record.reshape(-1)).astype(np.float64) - approximate)
        assert np.all(errors <= bounds)
        assert errors[row] > 0.98 * bounds[row]


def test_the_bound_is_not_idle() -> None:
    """It is a few times the usual error, and only rounding where all columns are exact."""
    record = activations(256, outliers=0)
    head = make_head(4096, 256)
    approximate, bounds = head.bounded(record)
    errors = np.abs(head.logits(record) - approximate)
    assert errors.max() > 0.2 * bounds.mean()
    whole = make_head(4096, 256, quads=64)
    approximate, bounds = whole.bounded(record)
    logits = whole.logits(record)
    assert np.abs(logits - approximate).max() < 1e-5 * np.abs(logits).max()
    assert bounds.max() < 0.01 * np.abs(logits).max()


@pytest.mark.parametrize("weight_format", ["int8_group32", "q8_0"])
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (15, 64), (16, 32), (33, 96), (1000, 160), (5003, 576)])
def test_the_token_is_that_of_the_logits(weight_format: str, rows: int, columns: int) -> None:
    head = make_head(rows, columns, weight_format=weight_format)
    tokens = [head.token(activations(columns, seed)) for seed in range(12)]
    assert len(set(tokens)) > min(2, rows - 1)


def test_columns_that_fill_no_group() -> None:
    head = make_head(100, 40)
    assert len({head.token(activations(40, seed)) for seed in range(12)}) > 2


@pytest.mark.parametrize("way", [one for one in supported_dot_products() if one is not DotProduct.PORTABLE])
def test_every_way_of_computing(way: DotProduct) -> None:
    head = make_head(300, 96)
    other = Head(head.weight, head.quads, way)
    for seed in range(8):
        assert head.token(activations(96, seed)) == other.token(activations(96, seed))
    assert np.array_equal(head.screen, other.screen)


def test_of_equal_ones_the_first() -> None:
    """Rows that are copies of each other, in one tile, in others, and in those of another thread."""
    weight, _ = make_weight("int8_group32", 640, 64)
    head = Head(weight, np.arange(2))
    scales, values = records_of(head)
    record = activations(64, outliers=0)
    best = int(head.logits(record).argmax())
    for copies in ([639], [320, 5], [7, 6], [600, 17, 18, 19]):
        for row in copies:
            scales[row // 16, :, row % 16] = scales[best // 16, :, best % 16]
            values[row // 16, :, :, row % 16] = values[best // 16, :, :, best % 16]
        assert Head(weight, head.quads).token(record) == min(best, *copies)
        best = min(best, *copies)


def test_all_are_equal() -> None:
    weight, _ = make_weight("int8_group32", 500, 64)
    scales, values = records_of(Head(weight, np.arange(2)))
    scales[:], values[:] = 1.0, 131
    assert Head(weight, np.arange(2)).token(activations(64)) == 0
    scales[:] = 0
    assert Head(weight, np.arange(2)).token(activations(64)) == 0


def test_activations_of_zero() -> None:
    assert make_head(100, 64).token(quantize_activations(np.zeros((1, 64), np.float32))[0]) == 0


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_the_smallest_gaps(gap: int) -> None:
    """Rows that differ by a step of one value in one column."""
    weight, _ = make_weight("int8_group32", 800, 64)
    head = Head(weight, np.arange(2))
    scales, values = records_of(head)
    values[:], scales[:] = values[:1, :, :, :1], np.float16(0.01)
    generator = np.random.default_rng(gap)
    values[:, 1, 7, :, 3] = 120 + gap * generator.integers(0, 3, values.shape[0] * 16).reshape(-1, 16)
    for seed in range(6):
        Head(weight, np.arange(2)).token(activations(64, seed))


def test_numbers_that_are_not_finite() -> None:
    weight, _ = make_weight("int8_group32", 333, 96)
    scales, _ = records_of(Head(weight, np.arange(2)))
    for row, scale in ((0, np.nan), (332, np.nan), (170, np.inf), (171, -np.inf)):
        before = scales[row // 16, 1, row % 16].copy()
        scales[row // 16, 1, row % 16] = scale
        assert Head(weight, np.arange(4)).token(activations(96)) == NOT_FINITE
        scales[row // 16, 1, row % 16] = before
    head = Head(weight, np.arange(4))
    assert head.token(activations(96)) != NOT_FINITE
    for scale, total in ((np.nan, np.nan), (np.inf, np.nan), (1.0, np.nan), (1e36, 1e38)):
        record = activations(96)
        record.reshape(-1, 40)[2, 32:36] = np.array([scale], np.float32).view(np.uint8)
        record.reshape(-1, 40)[2, 36:40] = np.array([total], np.float32).view(np.uint8)
        assert head.token(record) == NOT_FINITE


def test_a_screen_whose_sums_are_infinite_excludes_nothing() -> None:
    """Logits that float32 holds, beyond what it holds where low halves are taken for their middle.

    With `unit`, the 300th part of the largest float32, all logits of the first tile are -256 units, by the screen -16;
    those of the second -160 units, by the screen -384, with a bound of less than 300: finite.
    """
    weight, _ = make_weight("int8_group32", 32, 64)
    quads = np.array([8, 9])  # of the second group, where activations are zero
    scales, values = records_of(Head(weight, quads))
    scales[:] = 65504.0
    unit = np.finfo(np.float32).max / 300
    plus, minus = values[:, 0, :4], values[:, 0, 4:]  # [tiles, quads, 16, columns]
    plus[0], minus[0] = 0, 15
    minus[0, 0, :, 0] += 16
    plus[1], minus[1] = 14, 0
    minus[1] += 16
    minus[1, :, :, :2] += 16
    record = np.zeros((2, 40), np.uint8)
    record[0, :32] = np.repeat(np.array([127, -127], np.int8), 16).view(np.uint8)
    record[0, 32:36] = np.array([unit / 127 / 65504], np.float32).view(np.uint8)
    head = Head(weight, quads)
    assert np.allclose(head.logits(record.reshape(-1)) / unit, [-256] * 16 + [-160] * 16)
    assert head.token(record.reshape(-1)) == 16


def test_few_tiles_are_computed_where_one_row_stands_out() -> None:
    weight, _ = make_weight("int8_group32", 4096, 128)
    head = Head(weight, np.arange(2))
    x = activations(128, outliers=0)
    scales, _ = records_of(head)
    best = int(head.logits(x).argmax())
    scales[best // 16, :, best % 16] *= 3
    head = Head(weight, np.arange(2))
    assert head.token(x) == best
    assert head.counts[1] == 1
    assert 1 <= head.counts[0] <= 3


def test_what_has_a_screen() -> None:
    way = best_dot_product()
    assert {name for name in ("q8_0", "int8_group32", "int8_channel", "q4_0", "q6_k") if can_screen(name, way)} == {
        "q8_0",
        "int8_group32",
    }
    assert not can_screen("q8_0", DotProduct.PORTABLE)
