"""`GenerationResult`: the caller's end of a request. One thread feeds it; a thread or an event loop reads it.

What arrives is added to the state at once; a reader gets a copy of the state, so a slow one simply gets more at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import suppress
from copy import copy
from typing import Any

from tokenmill.errors import TokenmillError
from tokenmill.executor.postproc import OutputDelta
from tokenmill.executor.waiting import wait_for
from tokenmill.outputs import CompletionOutput, RequestMetrics, RequestOutput
from tokenmill.sampling_params import SamplingParams


class GenerationResult:
    """A request under way.

    Wait for the end with `result()`, `await` or `aresult()`; iterate with `for` or `async for` to follow it: one
    `RequestOutput` for each step with `streaming`, else only the last. One reader iterates; any number may wait. The
    request goes on when one of them is cancelled (`asyncio.wait_for`, say): `abort` ends it, or a `timeout` of its own.

    Raises (from waiting and iterating):
        TokenmillError: the request failed; everything that came before was handed out first.
    """

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: tuple[int, ...],
        sampling: SamplingParams,
        *,
        streaming: bool,
        arrival_time: float,
        abort: Callable[[int], bool],
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = list(prompt_token_ids)
        self.streaming = streaming
        self._num_returned = sampling.n
        self._abort: Callable[[int], bool] | None = abort
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._async_waiters = _AsyncWaiters()
        self._has_news = False
        self._was_seen = False
        self._sequences = [CompletionOutput(index=index) for index in range(sampling.num_sequences)]
        self._read_marks = [(0, 0)] * sampling.num_sequences
        self._keeps_logprobs = sampling.logprobs is not None
        self._done = False
        self._final_was_read = False
        self._error: TokenmillError | None = None
        self._metrics = RequestMetrics(arrival_time=arrival_time)

    def __repr__(self) -> str:
        num_tokens = sum(len(sequence.token_ids) for sequence in self._sequences)
        state = "under way" if not self._done else "finished" if self._error is None else repr(self._error)
        return f"<GenerationResult of request {self.request_id}: {num_tokens} tokens, {state}>"

    # ---- the executor's side ---------------------------------------------------------------------------------

    def push(self, delta: OutputDelta) -> None:
        """Add what is new; after the terminal event it is ignored. Called by the executor."""
        with self._lock:  # `_changed` as well, without a call of Python code
            if self._done:
                return
            _apply(self._sequences[delta.sequence_index], delta)
            self._has_news = True
            if self.streaming:
                self._changed.notify_all()
                self._async_waiters.wake_all()

    def finish(self, metrics: RequestMetrics, error: TokenmillError | None = None) -> None:
        """The terminal event. Called by the executor, once."""
        with self._changed:
            assert not self._done, f"request {self.request_id} ended twice"
            self._metrics = metrics
            self._error = error
            self._done = True
            self._abort = None  # a result that is kept does not keep the engine
            self._changed.notify_all()
            self._async_waiters.wake_all()

    def restart(self) -> bool:
        """Forget what has come, because the request is run again. False, and nothing is changed, if somebody has seen
        some of it: a second answer could differ. Called by the executor."""
        with self._changed:
            if self._was_seen or self._done:
                return False
            self._sequences = [CompletionOutput(index=sequence.index) for sequence in self._sequences]
            self._has_news = False
            return True

    # ---- the caller's side -----------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the request ended."""
        return self._done

    finished = done

    @property
    def outputs(self) -> list[CompletionOutput]:
        """The sequences as far as they have come."""
        with self._changed:
            return self._snapshot().outputs

    def abort(self) -> bool:
        """Cancel the request; False when it had ended already. Its sequences end with `cancelled`."""
        abort = self._abort
        return abort is not None and abort(self.request_id)

    def exception(self) -> TokenmillError | None:
        """The error that ended the request, if any."""
        return self._error

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end.

        Args:
            timeout: seconds; None waits for ever.

        Raises:
            TimeoutError: the request has not ended in time; it goes on.
        """
        with self._changed:
            if not wait_for(self._changed, lambda: self._done, timeout):
                raise TimeoutError(f"request {self.request_id} has not ended within {timeout} s")
            return self._final()

    async def aresult(self) -> RequestOutput:
        """Wait for the end, in an event loop."""
        while True:
            with self._changed:
                if self._done:
                    return self._final()
                waiter = self._async_waiters.add()
            await waiter

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[RequestOutput]:
        return self

    def __next__(self) -> RequestOutput:
        with self._changed:
            wait_for(self._changed, self._readable)
            output = self._read()
        if output is None:
            raise StopIteration
        return output

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        while True:
            with self._changed:
                if self._readable():
                    output = self._read()
                    break
                waiter = self._async_waiters.add()
            await waiter
        if output is None:
            raise StopAsyncIteration
        return output

    # ---- under the lock --------------------------------------------------------------------------------------

    def _readable(self) -> bool:
        return self._done or (self.streaming and self._has_news)

    def _read(self) -> RequestOutput | None:
        """The next output of an iteration, None after the last."""
        if self._final_was_read:
            return None
        if self._done and self._error is not None and not (self.streaming and self._has_news):
            self._final_was_read = True
            raise copy(self._error) from self._error.__cause__  # see `_final`
        self._final_was_read = self._done and self._error is None
        self._has_news = False
        output = self._snapshot()
        self._read_marks = [(len(sequence.text), len(sequence.token_ids)) for sequence in self._sequences]
        return output

    def _final(self) -> RequestOutput:
        if self._error is not None:
            # With a traceback of its own: that names the frames of callers, which would live as long as this result.
            raise copy(self._error) from self._error.__cause__
        return self._snapshot()

    def _snapshot(self) -> RequestOutput:
        """A copy of the state, so that later deltas do not change what a caller holds."""
        self._was_seen = self._was_seen or any(sequence.token_ids or sequence.text for sequence in self._sequences)
        finished = self._done and self._error is None
        outputs = [
            CompletionOutput(
                index=sequence.index,
                text=sequence.text,
                token_ids=sequence.token_ids.copy(),
                cumulative_logprob=sequence.cumulative_logprob,
                logprobs=sequence.logprobs.copy() if self._keeps_logprobs else [],
                prompt_logprobs=self._sequences[0].prompt_logprobs.copy(),
                finish_reason=sequence.finish_reason,
                stop_reason=sequence.stop_reason,
                _last_text_len=mark[0],
                _last_num_tokens=mark[1],
            )
            for sequence, mark in zip(self._sequences, self._read_marks, strict=True)
        ]
        if finished and len(outputs) > self._num_returned:
            outputs = _most_likely(outputs, self._num_returned)
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=outputs,
            finished=finished,
            metrics=self._metrics,
        )


class _AsyncWaiters:
    """Tasks of event loops that wait for something to change. Used under the lock of a result."""

    def __init__(self) -> None:
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def add(self) -> asyncio.Future[None]:
        """Something for a task of the running loop to await."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        self._waiters.append((loop, future))
        return future

    def wake_all(self) -> None:
        """All go on. On any thread."""
        waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with suppress(RuntimeError):  # a loop that was closed in the meantime waits for nothing
                loop.call_soon_threadsafe(_set_result, future)


def _apply(sequence: CompletionOutput, delta: OutputDelta) -> None:
    sequence.text += delta.text
    sequence.token_ids.extend(delta.token_ids)
    sequence.prompt_logprobs.extend(delta.prompt_logprobs)
    if delta.logprobs:
        sequence.logprobs.extend(delta.logprobs)
        chosen = zip(delta.token_ids, delta.logprobs, strict=True)
        new_logprob = sum(logprobs[token_id].logprob for token_id, logprobs in chosen)
        sequence.cumulative_logprob = (sequence.cumulative_logprob or 0.0) + new_logprob
    if delta.finish_reason is not None:
        sequence.finish_reason = delta.finish_reason
        sequence.stop_reason = delta.stop_reason


def _most_likely(outputs: list[CompletionOutput], count: int) -> list[CompletionOutput]:
    """The `count` sequences of the highest cumulative log-probability, best first, numbered anew."""
    ranked = sorted(outputs, key=lambda output: -(output.cumulative_logprob or 0.0))[:count]
    for index, output in enumerate(ranked):
        output.index = index
    return ranked


def _set_result(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)
