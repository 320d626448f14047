"""How endpoints wait for results: a client that goes away ends its request, and every finished request is counted.

`collect` serves whole answers, `stream` pieces of them, `EventStreamResponse` sends pieces as server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tokenmill.errors import RequestCancelledError, RequestTimeoutError, TokenmillError
from tokenmill.outputs import CompletionOutput, RequestOutput
from tokenmill.server.errors import exception_body
from tokenmill.server.responses import PromptTokensDetails, ResponseSchema, Usage
from tokenmill.telemetry.prometheus import SUCCESS_REASONS, RequestHistograms
from tokenmill.version import __version__

if TYPE_CHECKING:
    from tokenmill.executor.result import GenerationResult

logger = logging.getLogger(__name__)


def submit_all(submissions: Iterable[Callable[[], GenerationResult]]) -> list[GenerationResult]:
    """Submit several requests, or none: if one is refused, those before it are aborted."""
    results: list[GenerationResult] = []
    try:
        for submit in submissions:
            results.append(submit())
    except BaseException:
        _abort(results)
        raise
    return results


async def collect(
    results: Sequence[GenerationResult], receive: Receive, histograms: RequestHistograms
) -> list[RequestOutput]:
    """Wait until all results are complete.

    Raises:
        RequestCancelledError: the client disconnected, or somebody aborted a request.
        TokenmillError: a request failed. However this ends, no request of `results` goes on.
    """
    generation = asyncio.gather(*(result.aresult() for result in results))
    disconnect = asyncio.create_task(_client_gone(receive))
    try:
        either: set[asyncio.Future[Any]] = {generation, disconnect}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not generation.done():
            raise RequestCancelledError("The client disconnected before its answer was complete.")
        outputs: list[RequestOutput] = generation.result()
    finally:
        generation.cancel()
        disconnect.cancel()
        _abort(results)
        await asyncio.gather(generation, disconnect, return_exceptions=True)  # else asyncio logs that nobody looked
    for output in outputs:
        _count_finished(output, histograms)
    return outputs


async def stream(
    results: Sequence[GenerationResult], histograms: RequestHistograms
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """The outputs of several streaming results as they come, each with the index of its result.

    Raises:
        TokenmillError: one of the requests failed or was aborted.
    """
    queue: asyncio.Queue[tuple[int, RequestOutput] | asyncio.Task[None]] = asyncio.Queue()

    async def forward(index: int, result: GenerationResult) -> None:
        async for output in result:
            queue.put_nowait((index, output))

    tasks = [asyncio.create_task(forward(index, result)) for index, result in enumerate(results)]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    num_active = len(tasks)
    last_times: dict[int, float] = {}
    try:
        while num_active:
            item = await queue.get()
            if isinstance(item, asyncio.Task):
                item.result()
                num_active -= 1
                continue
            index, output = item
            now = time.monotonic()
            if any(completion.token_ids_diff for completion in output.outputs):
                if index in last_times:
                    histograms.observe_inter_token_latency(now - last_times[index])
                last_times[index] = now
            if output.finished:
                _count_finished(output, histograms)
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def server_sent_events(chunks: AsyncGenerator[ResponseSchema, None]) -> AsyncGenerator[bytes, None]:
    """Each chunk as an event, then `[DONE]`. If a chunk fails, an error object is the last event instead."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield _event(chunk.to_json())
    except Exception as error:
        if isinstance(error, TokenmillError):
            logger.error("A stream ended early: %s", error)
        else:
            logger.exception("A stream ended early.")
        _, body = exception_body(error)
        yield _event(json.dumps(body).encode())
    else:
        yield _event(b"[DONE]")


class EventStreamResponse(Response):
    """Sends events while they come; ends the requests behind them when the client goes away.

    Args:
        events: encoded server-sent events.
        results: the requests that make them; none goes on when the response ends, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None], results: Sequence[GenerationResult]) -> None:
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._results = results

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events or the client's patience end."""
        sender = asyncio.create_task(self._send_events(send))
        disconnect = asyncio.create_task(_client_gone(receive))
        try:
            await asyncio.wait({sender, disconnect}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
        finally:
            sender.cancel()
            disconnect.cancel()
            _abort(self._results)
            await asyncio.gather(sender, disconnect, return_exceptions=True)

    async def _send_events(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def reply_identity(prefix: str, model_name: str) -> dict[str, Any]:
    """The fields that every object and every chunk of one reply carry alike; ids are `prefix` and a random number."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": model_name,
        "system_fingerprint": f"tokenmill-{__version__}",
    }


def json_response(body: ResponseSchema) -> Response:
    """A whole answer."""
    return Response(body.to_json(), media_type="application/json")


def finish_reason(completion: CompletionOutput) -> Literal["stop", "length"] | None:
    """Why the sequence ended, in OpenAI's words; None while it runs.

    Raises:
        RequestCancelledError, RequestTimeoutError: it ended without a whole answer.
    """
    match completion.finish_reason:
        case "cancelled":
            raise RequestCancelledError("The request was cancelled before its answer was complete.")
        case "timeout":
            raise RequestTimeoutError("The request's deadline passed before its answer was complete.")
        case reason:
            return reason


def usage(outputs: Iterable[RequestOutput]) -> Usage:
    """Tokens of a request, over all its prompts and answers."""
    outputs = list(outputs)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    completion_tokens = sum(completion.length for output in outputs for completion in output.outputs)
    cached_tokens = sum(output.metrics.num_cached_tokens for output in outputs)
    return Usage(
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        total_tokens=prompt_tokens + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
    )


def _event(data: bytes) -> bytes:
    # Only CR and LF end a line of a stream, but many clients split at every character that Unicode calls a line end.
    for line_end, escape in ((b"\xe2\x80\xa8", b"\\u2028"), (b"\xe2\x80\xa9", b"\\u2029"), (b"\xc2\x85", b"\\u0085")):
        data = data.replace(line_end, escape)
    return b"data: " + data + b"\n\n"


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _abort(results: Iterable[GenerationResult]) -> None:
    for result in results:
        result.abort()


def _count_finished(output: RequestOutput, histograms: RequestHistograms) -> None:
    if any(completion.finish_reason not in SUCCESS_REASONS for completion in output.outputs):
        return
    histograms.observe_request(
        output.metrics,
        prompt_tokens=len(output.prompt_token_ids),
        output_lens=[completion.length for completion in output.outputs],
    )
