"""The report of a benchmark: what its numbers mean, how they are computed, how they are shown.

Counts are of tokens that arrived, never of tokens asked for. Failed requests are counted, and left out of all else.

    duration                    from the first request's start to the last one's end, seconds
    request throughput          finished requests / duration
    output throughput           generated tokens / duration
    total throughput            (prompt tokens + generated tokens) / duration; cached prompt tokens count as well
    TTFT                        time to first token: from the request's start to its first token at the caller
    latency (e2e)               from the request's start to its end at the caller
    TPOT                        time per output token: (latency - TTFT) / (tokens - 1); requests of two tokens or more
    inter-token latency         from each token of a request to its next; tokens that come together are 0 apart
    output speed per user       1 / TPOT: how fast an answer grows once it has begun, tokens/s
    output throughput per user  tokens / latency: the same with the wait for the first token, tokens/s
    cache hit rate              prompt tokens found in the prefix cache / prompt tokens looked up, in the run
    tokens per step             generated tokens / engine steps in the run: the mean batch of decoding

A request starts when it is sent, or when it is due if the run has a request rate: then the time that it waits for a
free slot of `--concurrency` is part of its TTFT and latency.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tokenmill.bench.client import RequestRecord
from tokenmill.bench.machine import Machine
from tokenmill.telemetry.latency import Distribution
from tokenmill.telemetry.stats import EngineStats

SCHEMA_VERSION = 1
"""Version of the JSON report's layout."""


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What was measured, and on what.

    Args:
        kind: `throughput` or `latency`.
        model: as the user named it.
        machine, versions: of the run.
        configuration: arguments of the engine.
        workload: what was sent.
        command: the command line, if there was one.
    """

    kind: str
    model: str
    machine: Machine
    versions: dict[str, str]
    configuration: dict[str, Any]
    workload: dict[str, Any]
    command: str = ""


@dataclass(frozen=True, slots=True)
class EngineUse:
    """What the engine did during the run: the difference of two snapshots of its counters."""

    num_steps: int
    num_preemptions: int
    num_queried_tokens: int
    num_hit_tokens: int
    num_generated_tokens: int

    @classmethod
    def between(cls, before: EngineStats, after: EngineStats) -> EngineUse:
        """From the snapshots at the start and at the end of the run."""
        return cls(
            num_steps=after.num_steps - before.num_steps,
            num_preemptions=after.num_preemptions - before.num_preemptions,
            num_queried_tokens=after.kv_cache.num_queried_tokens - before.kv_cache.num_queried_tokens,
            num_hit_tokens=after.kv_cache.num_hit_tokens - before.kv_cache.num_hit_tokens,
            num_generated_tokens=after.num_generated_tokens - before.num_generated_tokens,
        )

    @property
    def cache_hit_rate(self) -> float:
        """0 to 1."""
        return self.num_hit_tokens / self.num_queried_tokens if self.num_queried_tokens else 0.0

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a step gave."""
        return self.num_generated_tokens / self.num_steps if self.num_steps else 0.0


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """A finished run. The module's docstring defines the numbers.

    Args:
        description: what was measured, and on what.
        records: one for each request.
        engine: what the engine did.
        date: when the run ended, UTC.
    """

    description: RunDescription
    records: tuple[RequestRecord, ...]
    engine: EngineUse
    date: datetime

    @classmethod
    def of(
        cls, description: RunDescription, records: Sequence[RequestRecord], before: EngineStats, after: EngineStats
    ) -> BenchmarkReport:
        """A report of a run that ended now."""
        return cls(description, tuple(records), EngineUse.between(before, after), datetime.now(UTC))

    @property
    def finished(self) -> list[RequestRecord]:
        """Records of requests that did not fail."""
        return [record for record in self.records if record.error is None]

    @property
    def failed(self) -> list[RequestRecord]:
        """Records of requests that failed."""
        return [record for record in self.records if record.error is not None]

    @property
    def duration(self) -> float:
        """Seconds; 0 when nothing finished."""
        finished = self.finished
        if not finished:
            return 0.0
        return max(record.end_time for record in finished) - min(record.start_time for record in finished)

    def results(self) -> dict[str, Any]:
        """The numbers, as they stand in the JSON report. Times in milliseconds; None where nothing was measured."""
        finished, duration = self.finished, self.duration
        num_prompt_tokens = sum(record.num_prompt_tokens for record in finished)
        num_output_tokens = sum(record.num_output_tokens for record in finished)

        def per_second(count: int) -> float:
            return count / duration if duration else 0.0

        return {
            "num_requests": len(self.records),
            "num_finished": len(finished),
            "num_failed": len(self.failed),
            "duration_s": duration,
            "num_prompt_tokens": num_prompt_tokens,
            "num_output_tokens": num_output_tokens,
            "request_throughput": per_second(len(finished)),
            "output_throughput": per_second(num_output_tokens),
            "total_throughput": per_second(num_prompt_tokens + num_output_tokens),
            "cache_hit_rate": self.engine.cache_hit_rate,
            "tokens_per_step": self.engine.tokens_per_step,
            "num_steps": self.engine.num_steps,
            "num_preemptions": self.engine.num_preemptions,
            **{name: _plain(values, scale) for name, (values, scale) in self._measurements().items()},
        }

    def _measurements(self) -> dict[str, tuple[list[float], float]]:
        """Name -> (values, factor to the unit of the report)."""
        finished = self.finished
        first = [value for record in finished if (value := record.time_to_first_token) is not None]
        per_token = [value for record in finished if (value := record.time_per_output_token) is not None]
        gaps = [value for record in finished for value in record.inter_token_latencies]
        latencies = [record.latency for record in finished]
        return {
            "ttft_ms": (first, 1e3),
            "tpot_ms": (per_token, 1e3),
            "inter_token_latency_ms": (gaps, 1e3),
            "latency_ms": (latencies, 1e3),
            "output_speed_per_user": ([1.0 / value for value in per_token if value > 0], 1.0),
            "output_throughput_per_user": (
                [record.num_output_tokens / record.latency for record in finished if record.latency > 0],
                1.0,
            ),
        }

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data."""
        description = self.description
        origin = min((record.start_time for record in self.records), default=0.0)
        return {
            "schema_version": SCHEMA_VERSION,
            "benchmark": description.kind,
            "date": self.date.isoformat(timespec="seconds"),
            "command": description.command,
            "model": description.model,
            "machine": asdict(description.machine),
            "versions": description.versions,
            "configuration": description.configuration,
            "workload": description.workload,
            "results": self.results(),
            "requests": [_request_row(record, origin) for record in self.records],
        }

    def print(self, console: Console) -> None:
        """The report as tables."""
        console.print(self._description_table())
        console.print(self._throughput_table())
        console.print(self._latency_table())
        for record in self.failed[:3]:
            console.print(Text(f"failed: {record.error}", style="red"))

    def _description_table(self) -> Table:
        description = self.description
        table = _table(f"tokenmill bench {description.kind}", "", "")
        table.add_row("Model", description.model)
        table.add_row("Machine", description.machine.summary)
        table.add_row("Versions", ", ".join(f"{name} {version}" for name, version in description.versions.items()))
        table.add_row("Workload", _assignments(description.workload))
        table.add_row("Configuration", _assignments(description.configuration))
        return table

    def _throughput_table(self) -> Table:
        results = self.results()
        table = _table("Throughput", "", "", numbers_from=1)
        table.add_row("Requests finished", f"{results['num_finished']} of {results['num_requests']}")
        table.add_row("Prompt tokens", f"{results['num_prompt_tokens']:,}")
        table.add_row("Output tokens", f"{results['num_output_tokens']:,}")
        table.add_row("Duration", f"{results['duration_s']:.3f} s")
        table.add_row("Request throughput", f"{results['request_throughput']:.3f} requests/s")
        table.add_row("Output token throughput", f"{results['output_throughput']:.2f} tokens/s")
        table.add_row("Total token throughput", f"{results['total_throughput']:.2f} tokens/s")
        for label, name in (
            ("Output speed per user (1 / TPOT)", "output_speed_per_user"),
            ("Output throughput per user", "output_throughput_per_user"),
        ):
            value = results[name]
            table.add_row(label, "-" if value is None else f"{value['average']:.2f} tokens/s")
        table.add_row("Prefix cache hit rate", f"{results['cache_hit_rate']:.1%}")
        table.add_row("Tokens per step", f"{results['tokens_per_step']:.2f} (of {results['num_steps']} steps)")
        if results["num_preemptions"]:
            table.add_row("Preemptions", f"{results['num_preemptions']}")
        return table

    def _latency_table(self) -> Table:
        results = self.results()
        table = _table(
            "Latency in ms (TTFT: time to first token, TPOT: time per output token)",
            "",
            "min",
            "max",
            "avg",
            "P50",
            "P90",
            "P95",
            "P99",
            numbers_from=1,
        )
        for label, name in (
            ("TTFT", "ttft_ms"),
            ("TPOT", "tpot_ms"),
            ("Inter-token", "inter_token_latency_ms"),
            ("End to end", "latency_ms"),
        ):
            value = results[name]
            columns = ("minimum", "maximum", "average", "p50", "p90", "p95", "p99")
            table.add_row(label, *("-" if value is None else _milliseconds(value[column]) for column in columns))
        return table


def _plain(values: list[float], scale: float) -> dict[str, float | int] | None:
    distribution = Distribution.of(values)
    return None if distribution is None else distribution.to_dict(scale)


def _request_row(record: RequestRecord, origin: float) -> dict[str, Any]:
    first, per_token = record.time_to_first_token, record.time_per_output_token
    return {
        "start_s": record.start_time - origin,
        "num_prompt_tokens": record.num_prompt_tokens,
        "num_cached_tokens": record.num_cached_tokens,
        "num_output_tokens": record.num_output_tokens,
        "ttft_ms": None if first is None else first * 1e3,
        "tpot_ms": None if per_token is None else per_token * 1e3,
        "latency_ms": record.latency * 1e3,
        "error": record.error,
    }


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.2f}"


def _assignments(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _table(title: str, *columns: str, numbers_from: int | None = None) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE, show_header=any(columns))
    for index, column in enumerate(columns):
        is_number = numbers_from is not None and index >= numbers_from
        table.add_column(column, justify="right" if is_number else "left", overflow="fold", no_wrap=is_number)
    return table
