"""Prometheus metrics of one server: what the engine counts, and how long requests took.

`EngineCollector` turns an `EngineStats` snapshot into metrics whenever somebody scrapes; it keeps nothing and drains
nothing, so any number of scrapers see the same numbers. `RequestHistograms` is fed by the HTTP server, once for each
request and once for each step of a streamed answer. Both live in a registry that the application owns: two
applications in one process do not share metrics. Names are those that dashboards of other servers use, behind the
prefix `tokenmill:`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram, Metric, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from tokenmill.outputs import RequestMetrics
from tokenmill.telemetry.process_metrics import HttpOutcomes, ProcessesCollector, ProcessSample
from tokenmill.telemetry.stats import EngineStats

SUCCESS_REASONS = ("stop", "length")
"""Outcomes in `EngineStats.num_finished` that gave the caller a whole answer; all others count as failures."""

_FIRST_TOKEN_SECONDS = (
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0,
)  # fmt: skip
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0)
_REQUEST_SECONDS = (0.05, 0.1, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0)
_TOKEN_COUNTS = tuple(float(2**power) for power in range(18))


class EngineCollector(Collector):
    """Metrics of one engine, read anew at each scrape.

    Args:
        read_stats: gives the engine's statistics at this moment.
        is_healthy: whether the engine can run requests at this moment.
        model_name: value of the label `model_name` on every metric.
    """

    def __init__(
        self, read_stats: Callable[[], EngineStats], is_healthy: Callable[[], bool], *, model_name: str
    ) -> None:
        self._read_stats = read_stats
        self._is_healthy = is_healthy
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """All metrics of the engine; called by the registry."""
        stats = self._read_stats()
        yield self._gauge("engine_healthy", "1 while the engine can run requests, else 0.", float(self._is_healthy()))
        yield self._gauge("num_requests_running", "Sequences that the engine runs.", stats.num_running)
        yield self._gauge("num_requests_waiting", "Sequences in the waiting queue.", stats.num_waiting)
        yield self._counter("engine_steps", "Steps that the engine ran.", stats.num_steps)
        yield self._counter("num_preemptions", "Times a running sequence was put back to wait.", stats.num_preemptions)
        yield self._counter("prompt_tokens", "Prompt tokens computed; cached ones excluded.", stats.num_prompt_tokens)
        yield self._counter("generation_tokens", "Tokens sampled.", stats.num_generated_tokens)
        yield from self._collect_cache(stats)
        yield from self._collect_finished(stats)
        yield from self._collect_workers(stats)

    def _collect_cache(self, stats: EngineStats) -> Iterator[Metric]:
        cache = stats.kv_cache
        yield self._gauge("kv_cache_usage_perc", "Share of cache blocks in use; 1 is all of them.", cache.usage)
        yield self._gauge("kv_cache_blocks", "Blocks of the cache.", cache.num_blocks)
        yield self._gauge("kv_cache_free_blocks", "Blocks that can be given out now.", cache.num_free_blocks)
        yield self._counter(
            "prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", cache.num_queried_tokens
        )
        yield self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.", cache.num_hit_tokens)
        yield self._counter("prefix_cache_evictions", "Cached blocks given up for new work.", cache.num_evicted_blocks)

    def _collect_finished(self, stats: EngineStats) -> Iterator[Metric]:
        success = CounterMetricFamily(
            "tokenmill:request_success",
            "Requests answered, by the reason their generation ended.",
            labels=("model_name", "finished_reason"),
        )
        for reason in SUCCESS_REASONS:
            success.add_metric((self._model_name, reason), stats.num_finished.get(reason, 0))
        yield success
        failure = CounterMetricFamily(
            "tokenmill:request_failure",
            "Requests that ended without an answer, by the reason (`cancelled` or the code of an error).",
            labels=("model_name", "reason"),
        )
        for reason in sorted({"cancelled", *stats.num_finished}.difference(SUCCESS_REASONS)):
            failure.add_metric((self._model_name, reason), stats.num_finished.get(reason, 0))
        yield failure

    def _collect_workers(self, stats: EngineStats) -> Iterator[Metric]:
        workers = stats.workers
        yield self._counter("queue_rejections", "Requests refused because too many waited.", stats.num_rejected)
        yield self._gauge("workers", "Worker processes that there should be; 0: there are none.", workers.num_replicas)
        yield self._gauge("workers_ready", "Worker processes that can take requests.", workers.num_ready)
        yield self._counter("worker_deaths", "Times a worker process ended unasked.", workers.num_deaths)
        yield self._counter("worker_restarts", "Times a worker process was started again.", workers.num_restarts)
        yield self._counter("worker_stalls", "Times a worker was killed for lack of progress.", workers.num_stalls)
        yield self._counter("request_retries", "Requests run again because their process died.", workers.num_retries)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        metric = GaugeMetricFamily(f"tokenmill:{name}", text, labels=("model_name",))
        metric.add_metric((self._model_name,), value)
        return metric

    def _counter(self, name: str, text: str, value: float) -> Metric:
        metric = CounterMetricFamily(f"tokenmill:{name}", text, labels=("model_name",))
        metric.add_metric((self._model_name,), value)
        return metric


class RequestHistograms:
    """How long the requests of one server took, and how many tokens they had."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(
                f"tokenmill:{name}", text, labelnames=("model_name",), buckets=buckets, registry=registry
            )
            return family.labels(model_name)

        self._time_to_first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token.", _FIRST_TOKEN_SECONDS
        )
        self._inter_token_latency = histogram(
            "inter_token_latency_seconds", "Between two outputs of a streamed answer.", _TOKEN_SECONDS
        )
        self._time_per_output_token = histogram(
            "request_time_per_output_token_seconds",
            "From the first to the last token, by the number of tokens after the first; once a request.",
            _TOKEN_SECONDS,
        )
        self._queue_time = histogram(
            "request_queue_time_seconds", "From arrival until the engine took the request.", _REQUEST_SECONDS
        )
        self._latency = histogram("e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_SECONDS)
        self._prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKEN_COUNTS)
        self._generation_tokens = histogram(
            "request_generation_tokens", "Tokens generated for a request.", _TOKEN_COUNTS
        )

    def observe_inter_token_latency(self, seconds: float) -> None:
        """Count the time between two outputs of one streamed answer."""
        self._inter_token_latency.observe(seconds)

    def observe_request(self, metrics: RequestMetrics, *, prompt_tokens: int, output_lens: list[int]) -> None:
        """Count a finished request; `output_lens` holds the generated tokens of each of its sequences."""
        self._prompt_tokens.observe(prompt_tokens)
        self._generation_tokens.observe(sum(output_lens))
        arrival, first, end = metrics.arrival_time, metrics.first_token_time, metrics.finished_time
        if metrics.first_scheduled_time is not None:
            self._queue_time.observe(metrics.first_scheduled_time - arrival)
        if first is not None:
            self._time_to_first_token.observe(first - arrival)
        if end is not None:
            self._latency.observe(end - arrival)
        longest = max(output_lens, default=0)
        if first is not None and end is not None and longest > 1:
            self._time_per_output_token.observe((end - first) / (longest - 1))


class ServerMetrics:
    """The registry of one server: its engine, its requests and its process.

    Args:
        read_stats: gives the engine's statistics at this moment.
        is_healthy: whether the engine can run requests at this moment.
        read_processes: gives the processes that run engines at this moment.
        model_name: value of the label `model_name`.
    """

    def __init__(
        self,
        read_stats: Callable[[], EngineStats],
        is_healthy: Callable[[], bool],
        read_processes: Callable[[], Sequence[ProcessSample]] = tuple,
        *,
        model_name: str,
    ) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ProcessesCollector(read_processes, model_name=model_name))
        self._registry.register(EngineCollector(read_stats, is_healthy, model_name=model_name))
        ProcessCollector(registry=self._registry)
        self.requests = RequestHistograms(self._registry, model_name=model_name)
        self.http = HttpOutcomes(self._registry, model_name=model_name)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The metrics in the text format that the HTTP `Accept` header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
