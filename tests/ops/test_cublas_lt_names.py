from __future__ import annotations

import pytest

from tokenmill.ops.cublas_lt_names import AlgorithmNumbers, algorithm_name


@pytest.mark.parametrize(
    ("number", "tile"),  # of cublasLt.h, around where its list changes from one rule to the next
    [
        (1, "8 x 8"), (20, "128 x 128"), (23, "128 x 256"), (35, "256 x 32"), (36, "8 x 128"), (46, "8 x 768"),
        (47, "16 x 64"), (123, "64 x 768"), (133, "72 x 640"), (177, "128 x 384"), (210, "192 x 256"),
        (264, "384 x 128"),
        (279, "504 x 64"), (280, "520 x 64"), (311, "768 x 64"), (312, "64 x 16"), (392, "64 x 760"),
        (416, "128 x 240"),
        (447, "128 x 512"), (485, "192 x 336"), (513, "256 x 256"), (536, "320 x 200"), (587, "512 x 128"),
        (611, "640 x 96"), (630, "768 x 80"), (631, "256 x 512"), (634, "512 x 1024"),
    ],
)  # fmt: skip
def test_tiles(number: int, tile: str) -> None:
    assert algorithm_name(AlgorithmNumbers(66, number, 1, 0, 0, 0, 0, 0, 0)) == f"{tile} rows"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        (AlgorithmNumbers(66, 23, 1, 0, 0, 0, 35, 0, 3), "128 x 256 rows, stages of 64, cluster 2x1"),
        (AlgorithmNumbers(21, 20, 4, 2, 0, 0, 10, 0, 2), "128 x 128 rows, 4 stages of 32, 4 splits"),
        (AlgorithmNumbers(21, 20, 1, 0, 0, 0, 13, 0, 0), "128 x 128 rows, 1 stage of 64"),
        (AlgorithmNumbers(21, 20, 1, 0, 0, 0, 31, 0, 16), "128 x 128 rows, 3 stages of 8, cluster 1x16"),
        (AlgorithmNumbers(70, 0, 0, 0, 0, 0, 0, 0, 0), "algorithm 70"),
        (AlgorithmNumbers(70, 635, 0, 0, 0, 0, 99, 0, 52), "tile 635, stages 99, cluster 52"),
    ],
)
def test_names(numbers: AlgorithmNumbers, text: str) -> None:
    assert algorithm_name(numbers) == text
