"""`ResponseQueue`: responses that nobody has taken yet. One thread puts them in; any number of threads wait for them.

A response is given to exactly one caller. All state is behind one lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from tokenmill.errors import ExecutorShutdownError, InvalidParameterError
from tokenmill.executor.low_level.response import Response
from tokenmill.executor.waiting import wait_for


class ResponseQueue:
    """Ready responses by request, and which requests have not had their final one."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._ready: dict[int, list[Response]] = {}
        self._open: set[int] = set()
        self._last_id = 0
        self._is_closed = False

    @property
    def num_open(self) -> int:
        """Requests without a final response."""
        return len(self._open)

    def open(self, request_ids: Iterable[int]) -> None:
        """Responses to new requests will come."""
        with self._changed:
            for request_id in request_ids:
                self._open.add(request_id)
                self._last_id = max(self._last_id, request_id)

    def put(self, responses: Iterable[Response]) -> None:
        """Responses to open requests, in order. The final one closes its request."""
        with self._changed:
            for response in responses:
                assert response.request_id in self._open, f"request {response.request_id} had its final response"
                self._ready.setdefault(response.request_id, []).append(response)
                if response.is_final:
                    self._open.remove(response.request_id)
            self._changed.notify_all()

    def close(self) -> None:
        """No request will be opened any more; who waits for any response and finds none left is told so."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def take_any(self, timeout: float | None) -> list[Response]:
        """All ready responses; waits for the first. Empty after `timeout` seconds.

        Raises:
            ExecutorShutdownError: closed, and none is left nor will come.
        """
        with self._changed:
            wait_for(self._changed, lambda: bool(self._ready) or self._has_ended(), timeout)
            if not self._ready and self._has_ended():
                raise ExecutorShutdownError("The executor is shut down, and all responses were given.")
            ready, self._ready = self._ready, {}
            return [response for responses in ready.values() for response in responses]

    def take(self, request_ids: list[int], timeout: float | None) -> list[Response]:
        """All ready responses of some requests; waits for the first. Empty after `timeout` seconds, or if none come.

        Raises:
            InvalidParameterError: no request has had such an id.
        """

        def is_settled() -> bool:
            return any(map(self._ready.__contains__, request_ids)) or self._open.isdisjoint(request_ids)

        with self._changed:
            self._check_ids(request_ids)
            wait_for(self._changed, is_settled, timeout)
            return [response for request_id in request_ids for response in self._ready.pop(request_id, ())]

    def num_ready(self, request_id: int | None) -> int:
        """Ready responses of one request, or of all.

        Raises:
            InvalidParameterError: no request has had this id.
        """
        with self._changed:
            if request_id is None:
                return sum(map(len, self._ready.values()))
            self._check_ids([request_id])
            return len(self._ready.get(request_id, ()))

    def _has_ended(self) -> bool:
        return self._is_closed and not self._open

    def _check_ids(self, request_ids: list[int]) -> None:
        for request_id in request_ids:
            if not 0 < request_id <= self._last_id:
                raise InvalidParameterError(
                    f"No request has had the id {request_id}.",
                    field="request_id",
                    remedy="Pass a number that enqueue_request gave.",
                )
