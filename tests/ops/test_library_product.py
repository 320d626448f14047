from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.nn import functional

from tests.support.source_tree import ROOT
from tests.support.triton_kernels import relative_error
from tokenmill.ops import fp8, library_product
from tokenmill.ops.cublas_lt import Algorithm, Product, ProductShape, gpu_machine
from tokenmill.ops.fp8 import Fp8Weight, QuantizedRows, per_token_quantize_fp8
from tokenmill.ops.library_product import (
    add_library_product,
    add_scaled_product,
    adds_scaled_product,
)
from tokenmill.ops.product_choices import GpuMachine, ProductChoice, ProductChoices, ProductKey
from tokenmill.ops.product_timing import NUM_ALGORITHMS

MACHINE = GpuMachine(device="some GPU", capability="9.0", driver=13000, cublas_lt=130002, torch="2.11")


def normal(*shape: int, device: str = "cpu") -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])).to(device, torch.bfloat16)


def test_what_the_library_is_given_has_the_size_that_it_expects() -> None:
    assert ctypes.sizeof(Algorithm) == 96


@pytest.mark.parametrize("algorithm", [None, Algorithm()])
def test_torch_multiplies_what_no_algorithm_can(algorithm: Algorithm | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_product, "_algorithm", lambda x, weight: algorithm)
    monkeypatch.setattr(library_product, "launches", lambda *_, **__: False)
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


class FakeCandidates:
    """Of a library that offers two algorithms for every product, of which `best` is the fastest."""

    offered: ClassVar[tuple[bytes, ...]] = (b"a" * 64, b"b" * 64)
    best: bytes | None = offered[1]
    measured: ClassVar[list[ProductKey]] = []
    no_memory = False

    def __init__(self, product: ProductKey, weight: torch.Tensor) -> None:
        assert weight.shape == (product.out_features, product.in_features)
        if self.no_memory:
            raise torch.OutOfMemoryError("no memory")
        self._product = product
        self.algorithms = {name: Algorithm(algorithm=(ctypes.c_uint64 * 8)(name[0])) for name in self.offered}

    def runs(self, algorithm: bytes | None) -> bool:
        return algorithm is None or algorithm in self.algorithms

    def fastest(self) -> ProductChoice:
        self.measured.append(self._product)
        return ProductChoice(self._product, self.best, "64 x 128 rows", 20.0, 30.0)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[FakeCandidates]]:
    """A fake library, a cache folder of its own, and a process that has met nothing."""
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    fake: type[FakeCandidates] = type("Fake", (FakeCandidates,), {"measured": []})
    monkeypatch.setattr(library_product, "Candidates", fake)
    monkeypatch.setattr(library_product, "is_available", lambda: True)
    monkeypatch.setattr(library_product, "is_aligned", lambda x: True)
    monkeypatch.setattr(library_product, "gpu_machine", lambda device: MACHINE)
    library_product._products.cache_clear()
    yield fake
    library_product._products.cache_clear()


def chosen(num_rows: int, weight: torch.Tensor) -> int | None:
    """The first word of the chosen algorithm; the shape is met."""
    algorithm = library_product._algorithm(normal(num_rows, weight.shape[1]), weight)
    return None if algorithm is None else algorithm.algorithm[0]


def start(*num_rows: int, weight: torch.Tensor) -> list[int | None]:
    """What a new process chooses for these numbers of rows."""
    library_product._products.cache_clear()
    for count in num_rows:
        assert chosen(count, weight) is None, "torch, until it is measured"
    library_product.measure_products(torch.device("cpu"))
    return [chosen(count, weight) for count in num_rows]


def test_shapes_are_measured_once_and_only_when_asked_for(library: type[FakeCandidates]) -> None:
    weight, gone = normal(24, 16), normal(8, 16)
    assert chosen(300, gone) is None
    del gone
    assert [chosen(num_rows, weight) for num_rows in (300, 301, 512, 0)] == [None] * 4
    library_product.measure_products(torch.device("cpu"))
    again = normal(8, 16)
    assert chosen(290, again) is None
    products = [(320, 24, 16, "bfloat16"), (512, 24, 16, "bfloat16")]
    assert library.measured == products, "301 rows share a choice with 300"
    library_product.measure_products(torch.device("cpu"))
    assert library.measured[2:] == [(320, 8, 16, "bfloat16")], "another weight of the shape whose first one is gone"
    assert chosen(303, weight) == ord("b")
    assert chosen(700, weight) is None
    library.no_memory = True
    library_product.measure_products(torch.device("cpu"))
    library.no_memory = False
    library_product.measure_products(torch.device("cpu"))
    assert chosen(700, weight) is None and len(library.measured) == 3, "what could not be measured is left to torch"


@pytest.mark.spec("D3")
def test_the_next_start_reads_and_measures_only_what_is_missing(
    library: type[FakeCandidates], caplog: pytest.LogCaptureFixture
) -> None:
    weight = normal(24, 16)
    caplog.set_level("INFO", library_product.__name__)
    assert start(300, 512, weight=weight) == [ord("b")] * 2
    library.best = library.offered[0]  # what a measurement would find now
    assert start(300, 512, 700, weight=weight) == [ord("b"), ord("b"), ord("a")]
    assert [product.num_rows for product in library.measured] == [320, 512, 704]
    library.best = None
    assert start(800, weight=weight) == start(800, weight=weight) == [None]
    assert len(library.measured) == 4, "that torch is fastest is kept, too"
    messages = [record.getMessage() for record in caplog.records]
    told = ("0 were read, 2 measured", "2 were read, 1 measured", "0 were read, 1 measured", "1 were read, 0 measured")
    assert [text in message for text, message in zip(told, messages, strict=True)] == [True] * 4


def test_an_algorithm_that_the_library_does_not_offer_is_measured_again(library: type[FakeCandidates]) -> None:
    weight = normal(24, 16)
    start(300, 512, weight=weight)
    library.offered = (b"c" * 64,)
    library.best = library.offered[0]
    assert start(300, weight=weight) == [ord("c")]
    assert len(library.measured) == 3
    kept = ProductChoices.load(MACHINE).by_product
    assert [kept[product].algorithm for product in library.measured[:2]] == [b"c" * 64, b"b" * 64]


def test_what_another_version_measured_is_left_alone(
    library: type[FakeCandidates], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = normal(24, 16)
    start(300, weight=weight)
    monkeypatch.setattr(library_product, "gpu_machine", lambda device: replace(MACHINE, cublas_lt=130100))
    library.best = library.offered[0]
    assert start(300, weight=weight) == [ord("a")]
    assert len(library.measured) == 2
    monkeypatch.setattr(library_product, "gpu_machine", lambda device: MACHINE)
    assert start(300, weight=weight) == [ord("b")]


def test_a_start_without_a_cache_folder(
    library: type[FakeCandidates], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path / "file"))
    assert start(300, weight=normal(24, 16)) == [ord("b")]
    assert "not kept for the next start" in caplog.text


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


STARTS = """
import hashlib, json, sys
import torch
from tokenmill.ops import library_product
from tokenmill.ops.product_timing import Candidates
measured, fastest = [], Candidates.fastest
Candidates.fastest = lambda self: (measured.append(self._product), fastest(self))[1]
generator = torch.Generator("cuda").manual_seed(0)
weight = torch.randn(6144, 4096, dtype=torch.bfloat16, device="cuda", generator=generator)
inputs = [weight[:num_rows] * 0.5 for num_rows in (171, 232, 384, 1024)]
for x in inputs:
    library_product.library_product(x, weight)
library_product.measure_products(x.device)
bits = [library_product.library_product(x, weight).view(torch.uint8).cpu().numpy().tobytes() for x in inputs]
chosen = library_product._products(x.device).chosen.items()
print(json.dumps({
    "measured": len(measured),
    "chosen": {str(key): one and bytes(one.algorithm).hex() for key, one in chosen},
    "bits": [hashlib.sha256(one).hexdigest() for one in bits],
}))
"""


def start_on_gpu(cache: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "TOKENMILL_CACHE": str(cache),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, "-c", STARTS], capture_output=True, text=True, timeout=60, env=environment, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.gpu
@pytest.mark.spec("D3")
def test_a_second_process_uses_what_the_first_one_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = start_on_gpu(tmp_path), start_on_gpu(tmp_path)
    assert (first["measured"], second["measured"]) == (4, 0)
    assert second["chosen"] == first["chosen"]
    assert second["bits"] == first["bits"]
    monkeypatch.setenv("TOKENMILL_CACHE", str(tmp_path))
    kept = ProductChoices.load(gpu_machine(torch.device("cuda", 0)))
    # For two products the file names an algorithm that is none, for one an algorithm of another product.
    of_others = Product(ProductShape(8, 64, 64, torch.float16, torch.float16)).algorithms(1)
    forged = [b"\xff" * 64, b"\0" * 64, bytes(of_others[0].algorithm), None]
    kept.choices = [replace(one, algorithm=algorithm) for one, algorithm in zip(kept.choices, forged, strict=True)]
    kept.save()
    third = start_on_gpu(tmp_path)
    assert third["measured"] == 3
    assert set(third["chosen"].values()).isdisjoint({one.hex() for one in forged if one})
