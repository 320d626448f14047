"""A short run of `benchmarks/fuzz_http.py`: requests made from the OpenAPI document, against a server in a process."""

from __future__ import annotations

import pytest

from benchmarks.fuzz_http import FuzzOutcome, fuzz_server

pytestmark = pytest.mark.fuzz


@pytest.mark.spec("H2")
def test_requests_of_every_shape() -> None:
    pytest.importorskip("schemathesis")
    outcome = FuzzOutcome()
    fuzz_server(outcome, num_requests=500)
    assert not outcome.failures, outcome.failures[0]
    assert not outcome.problems, outcome.problems[0]
    assert outcome.num_requests >= 500
    assert outcome.statuses[200] > 50, "some requests are valid"
    assert outcome.statuses[400] > 50, "some are not"
    assert all(row.is_reached for row in outcome.rows(500)), outcome.statuses
