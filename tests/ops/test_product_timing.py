"""The choice among candidates, with a library that only pretends to multiply; test_library_product has the real one."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from tokenmill.ops import product_timing
from tokenmill.ops.cublas_lt import Algorithm, ProductShape
from tokenmill.ops.product_choices import ProductKey
from tokenmill.ops.product_timing import ROUNDS, Candidates

PRODUCT = ProductKey(80, 16, 8, "bfloat16")
TORCH = 0


def algorithm(number: int) -> Algorithm:
    return Algorithm((ctypes.c_uint64 * 8)(number))


class FakeLibrary:
    """Algorithms 1 and 2 for the number of rows, 2 to 4 for near ones; 4 computes nothing."""

    def __init__(self, times: dict[int, list[float]]) -> None:
        self.times = times
        self.asked: list[int] = []
        self.launched = TORCH
        self.num_runs = dict.fromkeys(times, 0)

    def product_of(self, shape: ProductShape, device_index: int) -> FakeLibrary:
        self.asked.append(shape.num_rows)
        return self

    def algorithms(self, num_algorithms: int) -> list[Algorithm]:
        return [algorithm(number) for number in ((1, 2) if self.asked[-1] == PRODUCT.num_rows else (2, 3, 4))]

    def launches(self, one: Algorithm, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> bool:
        assert (x.shape, weight.shape, out.shape) == ((80, 8), (16, 8), (80, 16))
        self.launched = int(one.algorithm[0])
        return self.launched != 4

    def microseconds(self, call: Callable[[], object], flushed: torch.Tensor) -> float:
        self.launched = TORCH
        call()
        times = self.times[self.launched]
        self.num_runs[self.launched] += 1
        return times[(self.num_runs[self.launched] - 1) % len(times)]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, list[float]]], tuple[FakeLibrary, Candidates]]:
    def made(times: dict[int, list[float]]) -> tuple[FakeLibrary, Candidates]:
        fake = FakeLibrary(times)
        monkeypatch.setattr(product_timing, "product_of", fake.product_of)
        monkeypatch.setattr(product_timing, "launches", fake.launches)
        monkeypatch.setattr(product_timing, "_microseconds", fake.microseconds)
        monkeypatch.setattr(Algorithm, "name", lambda one: f"number {one.algorithm[0]}")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        return fake, Candidates(PRODUCT, torch.zeros(16, 8, dtype=torch.bfloat16))

    return made


Make = Callable[[dict[int, list[float]]], tuple[FakeLibrary, Candidates]]


def test_the_fastest_by_the_median(make: Make) -> None:
    one_fast_run = [30.0, 10.0, 30.0]
    fake, candidates = make({TORCH: [25.0], 1: one_fast_run, 2: [20.0], 3: [90.0]})
    assert fake.asked == [80, 128, 256]
    assert list(candidates.algorithms) == [bytes(algorithm(number).algorithm) for number in (1, 2, 3, 4)]
    choice = candidates.fastest()
    assert choice.product == PRODUCT
    assert choice.algorithm == bytes(algorithm(2).algorithm)
    assert (choice.name, choice.microseconds, choice.torch_microseconds) == ("number 2", 20.0, 25.0)
    assert fake.num_runs == {TORCH: 1 + ROUNDS, 1: 1, 2: 1 + ROUNDS, 3: 1}, "what is hopeless is not run again"


@pytest.mark.parametrize("time", [25.0, 24.7])
def test_torch_is_kept_unless_another_one_is_clearly_faster(make: Make, time: float) -> None:
    _, candidates = make({TORCH: [25.0], 1: [time], 2: [26.0], 3: [26.0]})
    choice = candidates.fastest()
    assert (choice.algorithm, choice.microseconds, choice.torch_microseconds) == (None, 25.0, 25.0)


def test_what_was_read_runs_only_if_it_is_offered(make: Make) -> None:
    _, candidates = make({})
    known = [bytes(algorithm(number).algorithm) for number in (1, 3, 4, 5)]
    assert [candidates.runs(one) for one in (*known, b"", None)] == [True, True, False, False, False, True]
