from __future__ import annotations

import ctypes
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from tests.support.triton_kernels import relative_error
from tokenmill.ops import fp8, library_product
from tokenmill.ops.cublas_lt import Algorithm, Product, ProductShape
from tokenmill.ops.fp8 import Fp8Weight, QuantizedRows, per_token_quantize_fp8
from tokenmill.ops.library_product import (
    NUM_ALGORITHMS,
    add_library_product,
    add_scaled_product,
    adds_scaled_product,
)


def normal(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(device, torch.bfloat16)


def test_what_the_library_is_given_has_the_size_that_it_expects() -> None:
    assert ctypes.sizeof(Algorithm) == 96


def test_numbers_of_rows_that_share_a_choice() -> None:
    shared = [library_product._shared_rows(num_rows) for num_rows in (1, 2, 65, 72, 129, 232, 512, 1000, 1025, 8190)]
    assert shared == [1, 2, 72, 72, 144, 240, 512, 1024, 2048, 8192]


@pytest.mark.parametrize("algorithm", [None, Algorithm()])
def test_torch_multiplies_what_no_algorithm_can(algorithm: Algorithm | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_product, "_algorithm", lambda x, weight: algorithm)
    monkeypatch.setattr(library_product, "_run", lambda *_, **__: False)
    x, weight, total = normal(5, 24), normal(16, 24), normal(5, 16)
    assert torch.equal(library_product.library_product(x, weight), functional.linear(x, weight))
    expected = torch.addmm(total, x, weight.t())
    add_library_product(total, x, weight)
    assert torch.equal(total, expected)


def test_without_the_library_nothing_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_product, "is_available", lambda: False)
    assert library_product._algorithm(normal(300, 64), normal(128, 64)) is None
    assert not adds_scaled_product(300, 128, 64, torch.bfloat16)


def test_float8_products_are_added_by_two_operations_where_memory_is_not_aligned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library_product, "_first_algorithm", lambda *_: Algorithm())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    rows = per_token_quantize_fp8(normal(4, 32))
    weight = Fp8Weight.of(per_token_quantize_fp8(normal(16, 32)))
    total = normal(4, 17)[:, 1:]  # neither contiguous nor aligned
    expected = total.double() + fp8.scaled_linear(rows, weight, None, torch.float32).double()
    fp8.add_product(total, rows, weight)
    torch.testing.assert_close(total.double(), expected, rtol=1e-2, atol=2e-2)


def test_float8_products_are_added_where_the_library_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "choose", lambda device, dtype: "triton")
    monkeypatch.setattr(fp8, "adds_scaled_product", lambda *_: True)
    weight = Fp8Weight.of(QuantizedRows(torch.zeros(6144, 64).to(fp8.FP8_DTYPE), torch.ones(6144)))
    assert [fp8.adds_product(rows, weight, torch.bfloat16) for rows in (2, 128, 129)] == [False, False, True]
    assert not fp8.adds_product(129, replace(weight, batch_invariant=True), torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [65, 171, 512, 2000])
@pytest.mark.parametrize("shape", [(4096, 1024), (136, 1024)])
def test_every_algorithm_computes_the_product(num_rows: int, shape: tuple[int, int]) -> None:
    x, weight = normal(num_rows, shape[1], device="cuda"), normal(*shape, device="cuda")
    product = Product(ProductShape(num_rows, *shape, x.dtype, x.dtype))
    algorithms = product.algorithms(NUM_ALGORITHMS)
    assert algorithms
    stream, exact = normal(num_rows, shape[0], device="cuda"), x.double() @ weight.double().T
    for algorithm in algorithms:
        out, total = torch.full_like(stream, torch.nan), stream.clone()
        product.run(algorithm, x, weight, out)
        product.run(algorithm, x, weight, total, adds=True)
        assert relative_error(out, exact) < 4e-3
        assert relative_error(total, stream.double() + exact) < 4e-3


def test_shapes_are_measured_once_and_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, measured = Algorithm(), []

    def fastest(num_rows: int, weight: torch.Tensor) -> Algorithm:
        measured.append((num_rows, *weight.shape))
        return chosen

    monkeypatch.setattr(library_product, "is_available", lambda: True)
    monkeypatch.setattr(library_product, "_is_aligned", lambda x: True)
    monkeypatch.setattr(library_product, "_fastest", fastest)
    device = torch.device("cpu")
    library_product._choices.cache_clear()
    weight, gone = normal(24, 16), normal(8, 16)
    for num_rows in (300, 301, 512, 0):
        assert library_product._algorithm(normal(num_rows, 16), weight) is None, "torch, until it is measured"
    assert library_product._algorithm(normal(300, 16), gone) is None
    del gone
    library_product.measure_products(device)
    again = normal(8, 16)
    assert library_product._algorithm(normal(290, 16), again) is None
    assert measured == [(300, 24, 16), (512, 24, 16)], "301 rows share a choice with 300"
    library_product.measure_products(device)
    assert measured[2:] == [(290, 8, 16)], "another weight of the shape whose first one is gone"
    assert library_product._algorithm(normal(303, 16), weight) is chosen
    assert library_product._algorithm(normal(700, 16), weight) is None
    monkeypatch.setattr(library_product, "_fastest", no_memory)
    library_product.measure_products(device)
    assert library_product._algorithm(normal(700, 16), weight) is None
    monkeypatch.setattr(library_product, "_fastest", fastest)
    library_product.measure_products(device)
    assert len(measured) == 3, "what could not be measured is left to torch"
    library_product._choices.cache_clear()


def no_memory(num_rows: int, weight: torch.Tensor) -> Algorithm:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [0, 65, 192, 300])
def test_the_chosen_algorithm(num_rows: int) -> None:
    x, weight = normal(num_rows, 2048, device="cuda"), normal(4096, 2048, device="cuda")
    library_product.library_product(x, weight)
    library_product.measure_products(x.device)
    exact = x.double() @ weight.double().T
    total = normal(num_rows, 4096, device="cuda")
    expected = total.double() + exact
    actual = library_product.library_product(x, weight)
    assert actual.shape == (num_rows, 4096)
    assert num_rows == 0 or relative_error(actual, exact) < 4e-3
    add_library_product(total, x, weight)
    assert num_rows == 0 or relative_error(total, expected) < 4e-3
    assert torch.equal(library_product.library_product(x, weight), actual)


@pytest.mark.gpu
def test_a_graph_records_the_choice() -> None:
    x, weight = normal(300, 2048, device="cuda"), normal(4096, 2048, device="cuda")
    library_product.library_product(x, weight)
    library_product.measure_products(x.device)
    eager = library_product.library_product(x, weight)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = library_product.library_product(x, weight)
        never_met = library_product.library_product(x[:9], weight)
    recorded.zero_()
    graph.replay()
    assert torch.equal(recorded, eager)
    assert relative_error(never_met, x[:9].double() @ weight.double().T) < 4e-3


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [129, 300, 1024])
def test_float8_products_added_to_a_stream(num_rows: int) -> None:
    """In a graph, whose launch must have the scales of this product and not of the one after it."""
    rows = [per_token_quantize_fp8(factor * normal(num_rows, 4096, device="cuda")) for factor in (1.0, 9.0)]
    weight = per_token_quantize_fp8(normal(6144, 4096, device="cuda"))
    exact = [
        (x.values.double() * x.scales.double()[:, None])
        @ (weight.values.double() * weight.scales.double()[:, None]).T
        for x in rows
    ]  # fmt: skip
    assert adds_scaled_product(num_rows, 6144, 4096, torch.bfloat16)
    streams = [normal(num_rows, 6144, device="cuda") for _ in rows]
    expected = [stream.double() + product for stream, product in zip(streams, exact, strict=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for stream, x in zip(streams, rows, strict=True):
            assert add_scaled_product(stream, *x, *weight)
    graph.replay()
    for stream, total in zip(streams, expected, strict=True):
        assert relative_error(stream, total) < 6e-3
