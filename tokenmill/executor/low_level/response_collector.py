"""`ResponseCollector`: one thread that follows all requests of a low-level executor and queues their responses.

An event loop with a task for each request: results wake it, so it costs nothing while nothing happens.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from contextlib import suppress

from tokenmill.errors import EngineError, TokenmillError
from tokenmill.executor.low_level.response_builder import ResponseBuilder
from tokenmill.executor.low_level.response_queue import ResponseQueue
from tokenmill.executor.result import GenerationResult
from tokenmill.executor.waiting import join

logger = logging.getLogger(__name__)


class ResponseCollector:
    """Started by its construction.

    Args:
        queue: gets the responses. Requests must be open in it before they are followed.
    """

    def __init__(self, queue: ResponseQueue) -> None:
        self._queue = queue
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._run, name="tokenmill-responses", daemon=True)
        self._thread.start()

    def follow(self, result: GenerationResult, builder: ResponseBuilder) -> None:
        """Queue the responses of a request as they come. From any thread, before `close`."""
        self._loop.call_soon_threadsafe(self._start, result, builder)

    def stop(self) -> None:
        """Stop when all followed requests have ended, for which this does not wait. Twice is harmless."""
        with suppress(RuntimeError):  # the loop is closed: it has stopped
            self._loop.call_soon_threadsafe(self._stop.set)

    def close(self) -> None:
        """Wait until all followed requests have ended, and stop. Twice is harmless."""
        self.stop()
        if threading.current_thread() is not self._thread:
            join(self._thread)

    def _run(self) -> None:
        self._loop.run_until_complete(self._wait())
        self._loop.close()

    async def _wait(self) -> None:
        await self._stop.wait()
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, result: GenerationResult, builder: ResponseBuilder) -> None:
        task = self._loop.create_task(self._follow(result, builder))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, result: GenerationResult, builder: ResponseBuilder) -> None:
        try:
            if builder.streaming:
                async for output in result:
                    self._queue.put(builder.build(output))
            else:
                self._queue.put(builder.build(await result.aresult()))
        except TokenmillError as error:
            self._queue.put([builder.fail(error)])
        except Exception as error:  # a request's boundary: a mistake of ours ends this request, and it alone
            logger.exception("Request %d could not be followed.", builder.request_id)
            result.abort()
            cause = EngineError(f"The response could not be made: {type(error).__name__}: {error}.")
            self._queue.put([builder.fail(cause)])
