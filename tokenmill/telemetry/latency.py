"""Summaries of measured times: smallest, largest, mean and percentiles. Plain Python, for `bench` and the server."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass


def percentile(sorted_values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of `sorted_values` lie, linear between neighbours (numpy's default, type 7).

    Args:
        sorted_values: at least one, ascending.
        percent: 0 to 100.

    Raises:
        ValueError: no values, or `percent` out of range.
    """
    if not sorted_values:
        raise ValueError("no values")
    if not 0.0 <= percent <= 100.0:
        raise ValueError(f"percent must be 0 to 100, got {percent}")
    position = (len(sorted_values) - 1) * percent / 100.0
    low = math.floor(position)
    high = min(low + 1, len(sorted_values) - 1)
    return sorted_values[low] + (sorted_values[high] - sorted_values[low]) * (position - low)


@dataclass(frozen=True, slots=True)
class Distribution:
    """A set of measurements in numbers; all in the unit of the values.

    Args:
        count: how many.
        minimum, maximum, average, p50, p90, p95, p99: of them.
    """

    count: int
    minimum: float
    maximum: float
    average: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """Summarize `values`; None when there are none."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(
            count=len(ordered),
            minimum=ordered[0],
            maximum=ordered[-1],
            average=math.fsum(ordered) / len(ordered),
            p50=percentile(ordered, 50),
            p90=percentile(ordered, 90),
            p95=percentile(ordered, 95),
            p99=percentile(ordered, 99),
        )

    def to_dict(self, scale: float = 1.0) -> dict[str, float | int]:
        """Plain data, the values multiplied by `scale`."""
        return {name: value if name == "count" else value * scale for name, value in asdict(self).items()}
