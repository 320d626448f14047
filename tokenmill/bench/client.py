"""Drives an `LLM` the way its users would, and writes down when each token came.

Everything is measured at the caller's end of the streaming API: tokenization of the prompt, queueing, detokenization
and the hand-over to the caller are part of what is measured.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tokenmill.bench.workload import BenchmarkRequest
from tokenmill.errors import InvalidParameterError, TokenmillError
from tokenmill.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tokenmill.llm import LLM


@dataclass(slots=True)
class RequestRecord:
    """One request as its caller saw it. Times are seconds of `time.perf_counter`.

    Args:
        start_time: when it was sent; when it was due, if the run has a request rate.
        token_times: when each token of the answer came; tokens that came together have the same time.
        end_time: when the end was reported.
        num_prompt_tokens, num_cached_tokens: of the prompt, and how many of them the prefix cache had.
        error: what ended it, if it failed.
    """

    start_time: float
    token_times: list[float] = field(default_factory=list)
    end_time: float = 0.0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer, counted."""
        return len(self.token_times)

    @property
    def latency(self) -> float:
        """End to end, seconds."""
        return self.end_time - self.start_time

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds; None without a token."""
        return self.token_times[0] - self.start_time if self.token_times else None

    @property
    def time_per_output_token(self) -> float | None:
        """Seconds for each token after the first; None for fewer than two tokens."""
        if len(self.token_times) < 2:
            return None
        return (self.end_time - self.token_times[0]) / (len(self.token_times) - 1)

    @property
    def inter_token_latencies(self) -> list[float]:
        """Seconds between each token and the one before; 0 for tokens that came together."""
        return [after - before for before, after in zip(self.token_times, self.token_times[1:], strict=False)]


async def run_requests(
    llm: LLM,
    requests: Sequence[BenchmarkRequest],
    *,
    concurrency: int | None = None,
    on_finished: Callable[[], None] | None = None,
) -> list[RequestRecord]:
    """Send every request when it is due, and follow all of them to their ends.

    Decoding is greedy and does not stop at end tokens.

    Args:
        concurrency: most requests under way at the same time; None: no limit. A request that is due and has to wait for
            this limit is timed from when it was due, if the requests have arrival times.
        on_finished: called after each request.

    Returns:
        One record for each request, in the order of `requests`.

    Raises:
        InvalidParameterError: `concurrency` is below 1.
    """
    if concurrency is not None and concurrency < 1:
        raise InvalidParameterError(f"concurrency must be at least 1, got {concurrency}.", field="concurrency")
    slots = asyncio.Semaphore(concurrency if concurrency is not None else max(1, len(requests)))
    run_start = time.perf_counter()
    timed_from_arrival = any(request.arrival > 0 for request in requests)

    async def send(request: BenchmarkRequest) -> RequestRecord:
        due = run_start + request.arrival
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        async with slots:
            record = RequestRecord(start_time=due if timed_from_arrival else time.perf_counter())
            await _follow(llm, request, record)
        if on_finished is not None:
            on_finished()
        return record

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(send(request)) for request in requests]
    except BaseExceptionGroup as errors:  # a request's own failure is in its record: this is a bug, the first one tells
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _follow(llm: LLM, request: BenchmarkRequest, record: RequestRecord) -> None:
    """Send one request and fill in its record. A cancelled caller aborts the request."""
    sampling = SamplingParams(max_tokens=request.output_len, ignore_eos=True)
    prompt = request.prompt if isinstance(request.prompt, str) else list(request.prompt)
    try:
        result = llm.generate_async(prompt, sampling, streaming=True)
    except TokenmillError as error:
        record.error, record.end_time = str(error), time.perf_counter()
        return
    try:
        async for output in result:
            now = time.perf_counter()
            num_new = len(output.outputs[0].token_ids) - len(record.token_times)
            record.token_times.extend([now] * num_new)
            record.num_prompt_tokens = len(output.prompt_token_ids)
            record.num_cached_tokens = output.metrics.num_cached_tokens
    except TokenmillError as error:
        record.error = str(error)
    except asyncio.CancelledError:
        result.abort()
        raise
    finally:
        record.end_time = time.perf_counter()
