"""`Coordinator`: the one thread that talks to processes. It starts and watches them and moves requests and results.

A turn of its loop: wait for messages, deaths or commands; take them; see who died, stalled or may be restarted; send
requests. Nothing in a turn waits for a process. Callers' threads only leave commands. Made by the proxy.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Final

import zmq

from tokenmill.errors import ProtocolError, TokenmillError, WorkerDiedError
from tokenmill.executor.description import EngineDescription
from tokenmill.executor.iteration_queue import IterationResultQueue
from tokenmill.executor.messages import (
    CheckIntegrity,
    EngineEvents,
    FromProcess,
    Heartbeat,
    IntegrityReport,
    Progress,
    Ready,
    Shutdown,
    StepOutputs,
)
from tokenmill.executor.replica import Replica
from tokenmill.executor.request_flow import RequestFlow
from tokenmill.executor.request_table import RequestTable
from tokenmill.executor.supervised import SupervisedProcess

logger = logging.getLogger(__name__)

_TURN_SECONDS: Final = 0.2
_LAST_WORDS_SECONDS: Final = 0.05  # messages of a process that has just ended may still be on their way
_END_SECONDS: Final = 2.0


class Coordinator:
    """See the module.

    Args:
        table: open requests.
        flow: what moves them.
        replicas, postprocs: the processes; not started yet.
        iterations: gets the records of steps.
        on_progress: called with a replica's progress while it loads for the first time.
    """

    def __init__(
        self,
        table: RequestTable,
        flow: RequestFlow,
        replicas: Sequence[Replica],
        postprocs: Sequence[SupervisedProcess],
        iterations: IterationResultQueue,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._table = table
        self._flow = flow
        self._replicas = replicas
        self._postprocs = postprocs
        # Postprocessing workers first: if one of them hangs, its requests leave their worker before that is suspected.
        self._processes = [*postprocs, *(replica.process for replica in replicas)]
        self._replica_of = {id(replica.process): replica for replica in replicas}
        self._iterations = iterations
        self._on_progress = on_progress
        self._commands: deque[Callable[[], None]] = deque()
        self._wake_receiver, self._wake_sender = os.pipe()
        os.set_blocking(self._wake_receiver, False)
        os.set_blocking(self._wake_sender, False)
        self._wake_lock = threading.RLock()  # `stop` may come from the garbage collector, in the middle of `call`
        self._ended = False
        self._calls: dict[int, queue.SimpleQueue[str | None]] = {}
        self._last_turn = time.monotonic()
        self._stopping = False
        self.clock = 0.0
        """Seconds; stands still while this process does."""
        self.started: queue.SimpleQueue[TokenmillError | None] = queue.SimpleQueue()
        """Gets one item: None when all processes are ready for the first time, or why one is not."""
        self._has_started = False

    # ---- any thread ------------------------------------------------------------------------------------------

    def call(self, command: Callable[[], None]) -> None:
        """Run `command` on the coordinator's thread; after its end, never."""
        self._commands.append(command)
        with self._wake_lock:  # the pipe's number may be another file's after its end
            if not self._ended:
                with suppress(BlockingIOError):  # full: it has reason enough to wake up
                    os.write(self._wake_sender, b"\0")

    @property
    def turn_age(self) -> float:
        """Seconds since the last turn of the loop."""
        return time.monotonic() - self._last_turn

    @property
    def description(self) -> EngineDescription | None:
        """Of the first replica that was ready."""
        return next((replica.description for replica in self._replicas if replica.description is not None), None)

    def stop(self) -> None:
        """End all processes and the loop. Twice is harmless."""
        self.call(self._stop)

    def fail(self, cause: Exception) -> None:
        """The thread has ended with an error."""
        self._table.fail(cause)
        self.started.put(self._table.closed_by)

    # ---- the thread ------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Start the processes and turn until `stop`."""
        try:
            for process in self._processes:
                process.start(self.clock)
            while not self._stopping:
                self._turn()
            self._end_processes()
        finally:
            for process in self._processes:
                process.stop(self.clock)
            with self._wake_lock:
                self._ended = True
                os.close(self._wake_sender)
                os.close(self._wake_receiver)

    def _turn(self) -> None:
        self._wait()
        now = time.monotonic()
        self.clock += min(now - self._last_turn, 2 * _TURN_SECONDS)
        self._last_turn = now
        while self._commands and not self._stopping:
            self._commands.popleft()()
        for process in self._processes:
            self._receive(process)
        for process in self._processes:
            self._watch(process)
        if self._table.closed_by is not None:
            self._flow.drain(self._table.closed_by)
        self._flow.give_up_on_cancelled(self.clock)
        self._flow.dispatch()

    def _wait(self) -> None:
        """Until something comes, or a turn's time is over."""
        poller = zmq.Poller()
        poller.register(self._wake_receiver, zmq.POLLIN)
        for process in self._processes:
            if process.child is not None and self._may_receive(process):
                for source in process.child.sources:
                    poller.register(source, zmq.POLLIN)
            if process.child is not None and process.child.is_congested:
                poller.register(process.child.sink, zmq.POLLOUT)
        for source, _ in poller.poll(round(_TURN_SECONDS * 1000)):
            if source == self._wake_receiver:
                os.read(self._wake_receiver, 4096)

    def _may_receive(self, process: SupervisedProcess) -> bool:
        """Workers are not listened to while a postprocessing worker does not keep up: their queues fill, they wait."""
        if process in self._postprocs:
            return True
        return not any(other.child is not None and other.child.is_congested for other in self._postprocs)

    def _receive(self, process: SupervisedProcess) -> None:
        child = process.child
        if child is None:
            return
        child.flush()
        if not self._may_receive(process):
            return
        timeout = 0.0 if child.exit_code is None else _LAST_WORDS_SECONDS
        try:
            for message in child.receive(timeout):
                process.on_message(message, self.clock)
                self._take(process, message)
        except ProtocolError as error:
            logger.error("%s sent nonsense and is restarted: %s", process.name, error)
            self._bury(process, WorkerDiedError(f"The process {process.name} failed: {error.message}"))

    def _take(self, process: SupervisedProcess, message: FromProcess) -> None:
        replica = self._replica_of.get(id(process))
        match message:
            case StepOutputs():
                if replica is not None and message.stats is not None:
                    replica.on_stats(message.stats, self.clock)
                self._flow.on_outputs(message, from_worker=replica is not None)
            case EngineEvents(_, stats):
                assert replica is not None
                replica.on_stats(stats, self.clock)
                self._flow.on_events(message)
            case Heartbeat(_, stats, iterations):
                if replica is not None and stats is not None:
                    replica.on_stats(stats, self.clock)
                    self._iterations.put_all(iterations)
                elif replica is None:
                    process.progressed(self.clock)
            case Ready(description):
                if replica is not None:
                    assert description is not None
                    replica.on_ready(description)
                self._report_start()
            case Progress():
                if replica is not None and replica.index == 0 and not self._has_started:
                    self._on_progress(message)
            case IntegrityReport(call, problem):
                if (outcome := self._calls.get(call)) is not None:
                    outcome.put(problem)
            case _:
                pass

    # ---- deaths and restarts ---------------------------------------------------------------------------------

    def _watch(self, process: SupervisedProcess) -> None:
        error = process.check(self.clock)
        if error is not None:
            self._bury(process, error)
        process.restart_if_due(self.clock)
        if process.state == "failed":
            self._give_up_if_hopeless()

    def _bury(self, process: SupervisedProcess, error: TokenmillError) -> None:
        may_restart = self._has_started and self._table.closed_by is None
        process.bury(error, self.clock, may_restart=may_restart)
        replica = self._replica_of.get(id(process))
        if replica is not None:
            self._flow.on_worker_death(replica, error)
        else:
            self._flow.on_postproc_death(process, error)
        if not self._has_started:
            self._has_started = True
            self.started.put(error)
        self._give_up_if_hopeless()

    def _give_up_if_hopeless(self) -> None:
        """If no process of a kind will ever be ready again, no request can wait for it."""
        for processes in ([replica.process for replica in self._replicas], list(self._postprocs)):
            if processes and all(process.state in ("failed", "stopped") for process in processes):
                cause = next((process.last_death for process in processes if process.last_death is not None), None)
                error = WorkerDiedError(
                    f"No process is left to run requests. The last one: {cause}", remedy="Create the LLM anew."
                )
                self._table.close(error)
                self._flow.fail_queued(error)

    def _report_start(self) -> None:
        if not self._has_started and all(process.state == "ready" for process in self._processes):
            self._has_started = True
            self.started.put(None)

    # ---- commands --------------------------------------------------------------------------------------------

    def check_integrity(self, timeout: float) -> list[str]:
        """Ask every ready worker; returns what is wrong. On any thread but the coordinator's.

        Raises:
            queue.Empty: no answer in time.
        """
        outcome: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        asked: queue.SimpleQueue[int] = queue.SimpleQueue()
        call = id(outcome)

        def ask() -> None:
            self._calls[call] = outcome
            ready = [replica.process for replica in self._replicas if replica.process.state == "ready"]
            for process in ready:
                process.send(CheckIntegrity(call))
            asked.put(len(ready))

        self.call(ask)
        try:
            answers = [outcome.get(timeout=timeout) for _ in range(asked.get(timeout=timeout))]
        finally:
            self.call(partial(self._forget_call, call))
        return [problem for problem in answers if problem is not None]

    def _forget_call(self, call: int) -> None:
        del self._calls[call]

    def _stop(self) -> None:
        self._stopping = True

    def _end_processes(self) -> None:
        """Ask those that listen to end, wait a little, and leave the rest to `ChildProcess.close`."""
        ready = [process for process in self._processes if process.state == "ready"]
        children = [process.child for process in ready if process.child is not None]
        for child in children:
            child.send(Shutdown())
        deadline = time.monotonic() + _END_SECONDS
        for child in children:
            child.wait(max(0.0, deadline - time.monotonic()))
