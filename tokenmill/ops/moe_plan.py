"""Block sizes of the kernels that multiply tokens with their experts on a GPU. Pure arithmetic: no torch, no triton.

The numbers were found by `python -m benchmarks.gpu.moe --tune` on an H100 (docs/log.md). Called by
`ops.moe` and the kernels in `ops.triton`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, NamedTuple

SCALE_GROUP: Final = 128
"""Features that share a scale: of what is between the two projections, and of block-scaled weights and inputs."""
MAX_PAIR_TOKENS: Final = 4
"""Steps of so few tokens take one matrix-vector product for each token and expert: hardly two share an expert."""


EARLY_PIECE: Final = 32 * 1024
"""Bytes; 6 pieces for each multiprocessor of an H100 are half of its L2."""


class GroupedPlan(NamedTuple):
    """How tokens sorted by expert are multiplied.

    Args:
        block_rows: rows of a tile, all of one expert; a power of two from 16 on.
        gate_up_warps, gate_up_stages: of a program of the first product, which holds 128 features of gate and of up.
        gate_up_bytes: bytes of each feature's weights in one stage of the first product.
        down_out: output features of a program of the second product, which has `SCALE_GROUP` bytes in a stage.
        down_warps, down_stages: of the second product.
        halves: the first product multiplies a tile's first half alone if there are no more rows.
        early_pieces: pieces of weights that a program of the first product asks for while pairs are sorted.
    """

    block_rows: int
    gate_up_warps: int
    gate_up_stages: int
    gate_up_bytes: int
    down_out: int
    down_warps: int
    down_stages: int
    halves: bool = False
    early_pieces: int = 0

    def early_piece(self, weight_bytes: int, mean_rows: float, num_programs: int) -> int:
        """Bytes of a piece, of which each of the first programs of the first product asks for `early_pieces`.

        The pieces of all follow each other from the first expert's weights on. With fewer rows for each expert on the
        average than one, too many of the first experts have none: 0.
        """
        if self.early_pieces == 0 or mean_rows < 1.0:
            return 0
        return min(EARLY_PIECE, weight_bytes // (num_programs * self.early_pieces) // 128 * 128)


class PairPlan(NamedTuple):
    """Matrix-vector products of single tokens: features and input features of a program, and its warps."""

    block_out: int
    block_in: int
    num_warps: int


GROUPED_PLANS: Final = (
    (12.0, GroupedPlan(16, 8, 3, 256, 128, 4, 4, early_pieces=6)),
    (20.0, GroupedPlan(32, 4, 3, 256, 128, 4, 4, halves=True, early_pieces=6)),
    (32.0, GroupedPlan(32, 4, 3, 256, 128, 4, 4)),
    (48.0, GroupedPlan(64, 4, 4, 128, 128, 4, 4)),
    (float("inf"), GroupedPlan(128, 8, 4, 128, 256, 8, 4)),
)
"""By the mean number of rows that an expert has, up to that of each line."""


INVARIANT_PLAN: Final = GroupedPlan(64, 4, 4, 128, 128, 4, 4)
"""For all numbers of tokens, where a token's result shall not depend on how many there are."""


def grouped_plan(num_pairs: int, num_experts: int) -> GroupedPlan:
    """For `num_pairs` pairs of token and expert over `num_experts` experts."""
    mean = num_pairs / num_experts
    return next(plan for limit, plan in GROUPED_PLANS if mean <= limit)


def scales_inner_by_token(num_pairs: int, num_experts: int) -> bool:
    """Whether what is between the projections has one scale for each row instead of one for each 128 features.

    Scales of groups come at no cost while the weights are what takes time, and are more exact. When arithmetic is, they
    interrupt the tensor cores after every 128 features: then a pass of its own that finds a row's scale is cheaper.
    """
    return num_pairs / num_experts > GROUPED_PLANS[-2][0]


MANY_ROWS: Final = 128
"""Rows of a tile of the products that stay, `ops.triton.moe_many`; twice as many rows of weights are a block."""
MANY_STAGES: Final = 4
"""Blocks of 128 input features of both that are in shared memory at a time."""


def fits_many(hidden: int, size: int) -> bool:
    """Whether the products that stay take weights [2 I, H] and [H, I]: whole blocks only, and enough to look ahead."""
    is_whole = hidden % (2 * MANY_ROWS) == 0 and size % MANY_ROWS == 0
    return is_whole and min(hidden, size) >= (MANY_STAGES - 1) * SCALE_GROUP


def max_row_blocks(num_pairs: int, num_experts: int, block_rows: int) -> int:
    """Tiles that are enough however the pairs fall, if expert e begins with tile `(pairs before it) // rows + e`."""
    return num_pairs // block_rows + num_experts


class RouterPlan(NamedTuple):
    """How a router's product is computed for some hundred tokens.

    Args:
        block_rows, block_in: tokens and input features of a program, which holds that part of the weight.
        num_warps: of such a program.
        choice_rows: tokens for which a program chooses, with a warp for each.
    """

    block_rows: int
    block_in: int
    num_warps: int
    choice_rows: int


ROUTER_PLAN: Final = RouterPlan(16, 256, 8, 1)
ROUTER_TOKENS: Final = range(5, 257)
"""Fewer are the matter of `matvec`, more that of cuBLAS."""
MAX_ROUTER_EXPERTS: Final = 256
MAX_ROUTER_FEATURES: Final = 4096
"""Each number of parts is compiled, and they are added up in registers."""


def has_router_kernel(num_tokens: int, num_experts: int, hidden: int) -> bool:
    """Whether a router's weight [E, H] has launches of its own for so many tokens."""
    return num_tokens in ROUTER_TOKENS and num_experts <= MAX_ROUTER_EXPERTS and hidden <= MAX_ROUTER_FEATURES


PAIR_ELEMENTS: Final = (2048, 1024)
"""Weights that a program holds of the first product's gate (and as many of up), and of one step of the second."""
PAIR_ELEMENTS_PER_WARP: Final = 1024


@lru_cache(maxsize=256)
def gate_up_pair_plan(size: int, hidden: int) -> PairPlan:
    """For gate and up [I, H] of an expert."""
    return _pair_plan(size, hidden, 512, PAIR_ELEMENTS[0])


@lru_cache(maxsize=256)
def down_pair_plan(hidden: int, size: int) -> PairPlan:
    """For the second product [H, I] of an expert."""
    return _pair_plan(hidden, size, 1024, PAIR_ELEMENTS[1])


def _pair_plan(out_features: int, in_features: int, max_in: int, num_elements: int) -> PairPlan:
    block_in = min(max_in, 1 << max(in_features - 1, 0).bit_length())
    while block_in > 128 and in_features % block_in:
        block_in //= 2
    block_out = max(1, min(16, num_elements // block_in))
    while block_out > 1 and out_features < 2 * block_out:
        block_out //= 2
    return PairPlan(block_out, block_in, max(1, min(4, block_out * block_in // PAIR_ELEMENTS_PER_WARP)))
