"""Metrics of processes and HTTP outcomes at known numbers."""

from __future__ import annotations

import pytest

from tests.telemetry.test_prometheus import samples
from tokenmill.telemetry.process_metrics import ProcessSample
from tokenmill.telemetry.prometheus import ServerMetrics
from tokenmill.telemetry.stats import EngineStats, WorkerStats

PROCESSES = (
    ProcessSample("worker-0", True, 0.25, 0.5, 0.125, 3, num_running=4, num_waiting=2, cache_usage=0.75),
    ProcessSample("worker-1", False, 9.0, None, None, 0, num_running=0, num_waiting=0, cache_usage=0.0),
    ProcessSample("postproc-0", True, 0.5, None, None, 1),
)
WORKERS = WorkerStats(num_replicas=2, num_ready=1, num_deaths=5, num_restarts=4, num_stalls=1, num_retries=7)


def make_metrics() -> ServerMetrics:
    stats = EngineStats(num_rejected=11, workers=WORKERS)
    return ServerMetrics(lambda: stats, lambda: False, lambda: PROCESSES, model_name="some/model")


@pytest.mark.spec("G3")
def test_workers() -> None:
    found = samples(make_metrics())
    expected = {
        "queue_rejections_total": 11,
        "workers": 2,
        "workers_ready": 1,
        "worker_deaths_total": 5,
        "worker_restarts_total": 4,
        "worker_stalls_total": 1,
        "request_retries_total": 7,
        "engine_healthy": 0,
    }
    assert {name: found[name, ""] for name in expected} == expected


def test_every_process_has_its_series() -> None:
    found = samples(make_metrics())

    def series(name: str) -> dict[str, float]:
        return {label: value for (metric, label), value in found.items() if metric == f"process_{name}"}

    assert series("ready") == {"worker-0": 1, "worker-1": 0, "postproc-0": 1}
    assert series("heartbeat_age_seconds") == {"worker-0": 0.25, "worker-1": 9.0, "postproc-0": 0.5}
    assert series("last_step_age_seconds") == {"worker-0": 0.5}, "the others never had a step"
    assert series("progress_age_seconds") == {"worker-0": 0.125}
    assert series("restarts_total") == {"worker-0": 3, "worker-1": 0, "postproc-0": 1}
    assert series("requests_running") == {"worker-0": 4, "worker-1": 0}
    assert series("requests_waiting") == {"worker-0": 2, "worker-1": 0}
    assert series("kv_cache_usage_perc") == {"worker-0": 0.75, "worker-1": 0.0}


def test_an_engine_with_nothing_to_do_has_a_progress_age_of_zero() -> None:
    idle = ProcessSample("engine", True, 0.0, 60.0, None, 0)
    metrics = ServerMetrics(EngineStats, lambda: True, lambda: (idle,), model_name="some/model")
    assert samples(metrics)["process_progress_age_seconds", "engine"] == 0


def test_http_outcomes() -> None:
    metrics = make_metrics()
    for status in (200, 200, 503):
        metrics.http.count("POST", "/v1/completions", status)
    metrics.http.count("GET", "other", 404)
    found = samples(metrics)
    assert found["http_requests_total", "POST,/v1/completions,200"] == 2
    assert found["http_requests_total", "POST,/v1/completions,503"] == 1
    assert found["http_requests_total", "GET,other,404"] == 1
