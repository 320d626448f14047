"""`BuildReport`: what a build did: the summary that `tokenmill build` prints, kept in the engine's configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tokenmill.program.program import Program
from tokenmill.program.weight_file import Bytes


@dataclass(frozen=True, slots=True)
class BuildReport:
    """Numbers of one build.

    Args:
        nodes_captured, nodes_after_passes: nodes of the graph.
        operations: operations of the program, by kind.
        weight_bytes: bytes of the weights, by format.
        arena_bytes: memory for intermediate results at the largest step.
        arena_sum_bytes: what it would be if no two of them shared memory.
        kernels: how many kernels were `measured`, and how many times were `reused` from the timing cache.
        seconds: by phase.
        notices: what was done otherwise than asked, for people.
    """

    nodes_captured: int
    nodes_after_passes: int
    operations: dict[str, int]
    weight_bytes: dict[str, int]
    arena_bytes: int
    arena_sum_bytes: int
    kernels: dict[str, int]
    seconds: dict[str, float]
    notices: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def count_kinds(program: Program) -> dict[str, int]:
    """Operations by kind, the most frequent first."""
    return dict(Counter(operation.kind for operation in program.operations).most_common())


def weight_bytes(program: Program, weights: Mapping[str, Bytes]) -> dict[str, int]:
    """Bytes by format and layout, the largest share first."""
    total = Counter[str]()
    for weight in program.weights:
        if weight.name in weights:
            packed = "" if weight.layout == "rows" else " packed"
            total[f"{weight.format}{packed}"] += weights[weight.name].nbytes
    return dict(total.most_common())
