"""Metrics of an engine at known numbers, read back with Prometheus' own parser."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tokenmill.outputs import RequestMetrics
from tokenmill.telemetry.prometheus import ServerMetrics
from tokenmill.telemetry.stats import EngineStats, KvCacheStats

STATS = EngineStats(
    num_running=3,
    num_waiting=2,
    num_steps=100,
    num_prompt_tokens=50,
    num_generated_tokens=70,
    num_preemptions=4,
    num_finished={"stop": 5, "length": 6, "cancelled": 7, "engine_error": 1},
    kv_cache=KvCacheStats(
        num_blocks=10, num_free_blocks=4, num_queried_tokens=90, num_hit_tokens=40, num_evicted_blocks=2
    ),
)


def samples(metrics: ServerMetrics) -> dict[tuple[str, str], float]:
    """Value by name and the label beside the model's name."""
    content, content_type = metrics.render("")
    assert content_type.startswith("text/plain")
    found = {}
    for family in text_string_to_metric_families(content.decode()):
        for sample in family.samples:
            if not sample.name.startswith("tokenmill:"):
                continue
            labels = dict(sample.labels)
            assert labels.pop("model_name") == "some/model"
            found[sample.name.removeprefix("tokenmill:"), ",".join(labels.values())] = sample.value
    return found


def make_metrics(stats: EngineStats = STATS, *, is_healthy: bool = True) -> ServerMetrics:
    return ServerMetrics(lambda: stats, lambda: is_healthy, model_name="some/model")


@pytest.mark.spec("G3")
def test_engine_metrics() -> None:
    found = samples(make_metrics())
    expected = {
        ("engine_healthy", ""): 1,
        ("num_requests_running", ""): 3,
        ("num_requests_waiting", ""): 2,
        ("engine_steps_total", ""): 100,
        ("num_preemptions_total", ""): 4,
        ("prompt_tokens_total", ""): 50,
        ("generation_tokens_total", ""): 70,
        ("kv_cache_usage_perc", ""): 0.6,
        ("kv_cache_blocks", ""): 10,
        ("kv_cache_free_blocks", ""): 4,
        ("prefix_cache_queries_total", ""): 90,
        ("prefix_cache_hits_total", ""): 40,
        ("prefix_cache_evictions_total", ""): 2,
        ("request_success_total", "stop"): 5,
        ("request_success_total", "length"): 6,
        ("request_failure_total", "cancelled"): 7,
        ("request_failure_total", "engine_error"): 1,
    }
    assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_engine_that_has_done_nothing_shows_zeros() -> None:
    found = samples(make_metrics(EngineStats(), is_healthy=False))
    assert found["engine_healthy", ""] == 0
    assert found["request_success_total", "stop"] == 0
    assert found["request_failure_total", "cancelled"] == 0
    assert found["kv_cache_usage_perc", ""] == 0


@pytest.mark.spec("G3")
def test_times_of_a_request() -> None:
    metrics = make_metrics()
    times = RequestMetrics(arrival_time=10.0, first_scheduled_time=10.25, first_token_time=11.0, finished_time=13.0)
    metrics.requests.observe_request(times, prompt_tokens=7, output_lens=[5, 3])
    found = samples(metrics)
    assert found["request_queue_time_seconds_sum", ""] == 0.25
    assert found["time_to_first_token_seconds_sum", ""] == 1.0
    assert found["e2e_request_latency_seconds_sum", ""] == 3.0
    assert found["request_time_per_output_token_seconds_sum", ""] == 0.5, "2 s for the 4 tokens after the first"
    assert found["request_prompt_tokens_sum", ""] == 7
    assert found["request_generation_tokens_sum", ""] == 8
    assert found["time_to_first_token_seconds_bucket", "0.75"] == 0
    assert found["time_to_first_token_seconds_bucket", "1.0"] == 1
    assert found["inter_token_latency_seconds_count", ""] == 0
    metrics.requests.observe_inter_token_latency(0.02)
    assert samples(metrics)["inter_token_latency_seconds_sum", ""] == 0.02


def test_answer_of_one_token_has_no_time_per_token() -> None:
    metrics = make_metrics()
    times = RequestMetrics(arrival_time=0.0, first_scheduled_time=0.0, first_token_time=1.0, finished_time=1.0)
    metrics.requests.observe_request(times, prompt_tokens=1, output_lens=[1])
    metrics.requests.observe_request(RequestMetrics(arrival_time=0.0), prompt_tokens=1, output_lens=[])
    found = samples(metrics)
    assert found["request_time_per_output_token_seconds_count", ""] == 0
    assert found["time_to_first_token_seconds_count", ""] == 1
    assert found["request_prompt_tokens_count", ""] == 2


def test_two_servers_have_their_own_numbers() -> None:
    first, second = make_metrics(), make_metrics()
    first.requests.observe_inter_token_latency(1.0)
    assert samples(first)["inter_token_latency_seconds_count", ""] == 1
    assert samples(second)["inter_token_latency_seconds_count", ""] == 0


def test_openmetrics() -> None:
    content, content_type = make_metrics().render("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert content.endswith(b"# EOF\n")
