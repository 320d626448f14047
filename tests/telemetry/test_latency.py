"""Percentiles against numpy, on random values and at the edges."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill.telemetry.latency import Distribution, percentile

finite = st.floats(min_value=-1e6, max_value=1e6)


@given(st.lists(finite, min_size=1, max_size=60), st.floats(min_value=0, max_value=100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(np.percentile(values, percent), rel=1e-9, abs=1e-6)


@given(st.lists(finite, min_size=1, max_size=60))
def test_distribution_is_numpys(values: list[float]) -> None:
    found = Distribution.of(values)
    assert found is not None
    assert found.count == len(values)
    expected = [np.min(values), np.max(values), np.mean(values), *np.percentile(values, [50, 90, 95, 99])]
    got = [found.minimum, found.maximum, found.average, found.p50, found.p90, found.p95, found.p99]
    assert got == pytest.approx(expected, rel=1e-9, abs=1e-6)


def test_known_percentiles() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([1.0, 2.0, 3.0, 4.0], 90) == pytest.approx(3.7)
    assert percentile([7.0], 99) == 7.0


def test_no_values_give_no_distribution() -> None:
    assert Distribution.of([]) is None


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], -1), ([1.0], 100.1)])
def test_wrong_arguments_are_refused(values: list[float], percent: float) -> None:
    with pytest.raises(ValueError):
        percentile(values, percent)


def test_scaling_leaves_the_count() -> None:
    found = Distribution.of([0.5, 1.5])
    assert found is not None
    assert found.to_dict(1000.0) == {
        "count": 2, "minimum": 500.0, "maximum": 1500.0, "average": 1000.0,
        "p50": 1000.0, "p90": 1400.0, "p95": 1450.0, "p99": 1490.0,
    }  # fmt: skip
