"""Prometheus metrics of the processes that run engines, one series for each; and of requests by HTTP outcome."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class ProcessSample:
    """One process at one moment.

    Args:
        name: value of the label `process`: `engine` for the server's own, `worker-0`, `postproc-1`.
        is_ready: whether it can be counted on.
        heartbeat_age: seconds since it was last heard.
        last_step_age: seconds since its engine's last step; None before the first, and without an engine.
        progress_age: seconds that its engine has had work and finished no step; None without work.
        num_restarts: times it was started again.
        num_running, num_waiting, cache_usage: of its engine; None without one.
    """

    name: str
    is_ready: bool
    heartbeat_age: float
    last_step_age: float | None
    progress_age: float | None
    num_restarts: int
    num_running: int | None = None
    num_waiting: int | None = None
    cache_usage: float | None = None


class ProcessesCollector(Collector):
    """Metrics of all processes, read anew at each scrape.

    Args:
        read_processes: gives the processes at this moment.
        model_name: value of the label `model_name`.
    """

    def __init__(self, read_processes: Callable[[], Sequence[ProcessSample]], *, model_name: str) -> None:
        self._read_processes = read_processes
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        """All metrics; called by the registry."""
        processes = self._read_processes()
        restarts = CounterMetricFamily(
            "tokenmill:process_restarts",
            "Times that the process was started again.",
            labels=("model_name", "process"),
        )
        for process in processes:
            restarts.add_metric((self._model_name, process.name), process.num_restarts)
        yield restarts
        gauges: tuple[tuple[str, str, Callable[[ProcessSample], float | None]], ...] = (
            ("ready", "1 while the process can be counted on, else 0.", lambda one: float(one.is_ready)),
            ("heartbeat_age_seconds", "Since the process was last heard.", lambda one: one.heartbeat_age),
            ("last_step_age_seconds", "Since its engine's last step.", lambda one: one.last_step_age),
            (
                "progress_age_seconds",
                "Time that its engine has had work and finished no step; 0 without work.",
                lambda one: None if one.last_step_age is None else one.progress_age or 0.0,
            ),
            ("requests_running", "Sequences that its engine runs.", lambda one: one.num_running),
            ("requests_waiting", "Sequences in its engine's waiting queue.", lambda one: one.num_waiting),
            ("kv_cache_usage_perc", "Share of its engine's cache blocks in use.", lambda one: one.cache_usage),
        )
        for name, text, read in gauges:
            family = GaugeMetricFamily(f"tokenmill:process_{name}", text, labels=("model_name", "process"))
            for process in processes:
                value = read(process)
                if value is not None:
                    family.add_metric((self._model_name, process.name), value)
            yield family


class HttpOutcomes:
    """Counts answered HTTP requests by route and status."""

    def __init__(self, registry: CollectorRegistry, *, model_name: str) -> None:
        self._model_name = model_name
        self._requests = Counter(
            "tokenmill:http_requests",
            "HTTP requests by method, route and status; 499 if the client left before the answer began.",
            labelnames=("model_name", "method", "route", "status"),
            registry=registry,
        )

    def count(self, method: str, route: str, status: int) -> None:
        """Count one request.

        Args:
            method, route: from a limited set, as each makes a series of its own.
            status: 499: no answer was begun.
        """
        self._requests.labels(self._model_name, method, route, str(status)).inc()
