"""`algorithm_name`: what the numbers of an algorithm of cuBLASLt mean, as text. Called by `ops.cublas_lt`.

The numbers are those of cublasLt.h (CUDA 12.8; later ones are shown as they are). Its list of tiles is 35 by
hand, then all up to a size, by steps of 64 in one direction and of 8 in the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Final, NamedTuple

_FIRST_TILES: Final = (
    "8x8 8x16 16x8 8x32 16x16 32x8 8x64 16x32 32x16 64x8 32x32 32x64 64x32 32x128 64x64 128x32 64x128 128x64 "
    "64x256 128x128 256x64 64x512 128x256 256x128 512x64 64x96 96x64 96x128 128x160 160x128 192x128 128x192 128x96 "
    "32x256 256x32"
)
_LAST_TILES: Final = "256x512 256x1024 512x512 512x1024"
_LONGEST_TILE: Final = 768
_LARGEST_TILES: Final = 384 * 128, 256 * 256
_STAGE_SIZES: Final = (16, 32, 64, 128)
_MOST_STAGES: Final = 6
_FIRST_AUTO: Final = 32
_OTHER_STAGES: Final = {25: (32, 10), 26: (8, 4), 27: (16, 10), 28: (8, 5), 31: (8, 3)}
_FIRST_CLUSTER: Final = 2
_CLUSTERS: Final = "1x1 2x1 4x1 1x2 2x2 4x2 1x4 2x4 4x4 8x1 1x8 8x2 2x8 16x1 1x16"


class AlgorithmNumbers(NamedTuple):
    """Attributes of an algorithm, in the order and with the meaning of `cublasLtMatmulAlgoConfigAttributes_t`."""

    kind: int
    tile: int
    num_splits: int
    reduction: int
    swizzling: int
    custom_option: int
    stages: int
    inner_shape: int
    cluster: int


def algorithm_name(numbers: AlgorithmNumbers) -> str:
    """Such as `128 x 256 rows, stages of 64, cluster 2x1`: a tile's features and rows, and what else is known."""
    tiles = _tiles()
    if numbers.tile == 0:
        tile = f"algorithm {numbers.kind}"
    elif numbers.tile < len(tiles):
        tile = "{} x {} rows".format(*tiles[numbers.tile])
    else:
        tile = f"tile {numbers.tile}"
    parts = [tile, _stages(numbers.stages)]
    if numbers.num_splits > 1:
        parts.append(f"{numbers.num_splits} splits")
    if numbers.cluster > _FIRST_CLUSTER:  # which is 1x1; 0: the library's choice
        clusters, index = _CLUSTERS.split(), numbers.cluster - _FIRST_CLUSTER
        parts.append(f"cluster {clusters[index] if index < len(clusters) else numbers.cluster}")
    return ", ".join(part for part in parts if part)


def _stages(number: int) -> str:
    """Input features of a stage, and how many stages there are where that is not left to the library."""
    if 0 < number <= _MOST_STAGES * len(_STAGE_SIZES):
        size, count = _STAGE_SIZES[(number - 1) // _MOST_STAGES], 1 + (number - 1) % _MOST_STAGES
    elif number in _OTHER_STAGES:
        size, count = _OTHER_STAGES[number]
    elif _FIRST_AUTO <= number < _FIRST_AUTO + 6:
        return f"stages of {8 << (number - _FIRST_AUTO)}"
    else:
        return f"stages {number}" if number else ""
    return f"{count} stage{'s' if count > 1 else ''} of {size}"


@lru_cache(maxsize=1)
def _tiles() -> tuple[tuple[int, int], ...]:
    """(output features, rows) by number; the first one is none."""
    found = dict.fromkeys([(0, 0), *_parsed(_FIRST_TILES)])
    for limit, (step, other_step) in zip(_LARGEST_TILES, ((8, 64), (64, 8)), strict=True):
        for size in range(step, _LONGEST_TILE + 1, step):
            others = range(other_step, _LONGEST_TILE + 1, other_step)
            found |= dict.fromkeys((size, other) for other in others if size * other <= limit)
    return tuple(found | dict.fromkeys(_parsed(_LAST_TILES)))


def _parsed(tiles: str) -> Iterator[tuple[int, int]]:
    for tile in tiles.split():
        size, other = tile.split("x")
        yield int(size), int(other)
