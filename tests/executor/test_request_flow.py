"""`RequestFlow` and `dispatch` without processes: order, places, second attempts, and requests that kill workers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill import SamplingParams
from tokenmill.engine.request import GenerationRequest
from tokenmill.errors import ExecutorShutdownError, WorkerDiedError
from tokenmill.executor import dispatch
from tokenmill.executor.dispatch import PrefixIndex, ReplicaLoad, choose_replica, prefix_keys
from tokenmill.executor.messages import Abort, EngineEvents, FinishSequence, Forget, OpenRequest, StepOutputs, Submit
from tokenmill.executor.postproc import Ended, OutputDelta, StopHit
from tokenmill.executor.replica import Job, Replica
from tokenmill.executor.request_flow import RequestFlow
from tokenmill.executor.request_table import RequestTable
from tokenmill.executor.result import GenerationResult
from tokenmill.outputs import RequestMetrics
from tokenmill.telemetry.stats import EngineStats, KvCacheStats

pytestmark = pytest.mark.spec("B2")

DIED = WorkerDiedError("It died.")
BLOCK = 4


@dataclass
class FakeProcess:
    """What the flow sees of a process."""

    index: int
    state: str = "ready"
    sent: list[Any] = field(default_factory=list)
    num_progress: int = 0

    def send(self, message: Any) -> None:
        if self.state == "ready":
            self.sent.append(message)

    def send_encoded(self, data: bytes) -> None:
        self.send(data)

    def progressed(self, now: float) -> None:
        self.num_progress += 1

    def take(self) -> list[Any]:
        sent, self.sent = self.sent, []
        return sent


@dataclass
class FakeDescription:
    """What replicas need of a description."""

    max_batch_size: int = 2
    num_blocks: int = 100
    tokens_per_block: int = BLOCK


class World:
    """A flow with fake processes and real results."""

    def __init__(self, num_replicas: int = 2, num_postproc: int = 0, max_attempts: int = 3) -> None:
        self.table = RequestTable(1000)
        self.workers = [FakeProcess(index) for index in range(num_replicas)]
        self.postprocs = [FakeProcess(index) for index in range(num_postproc)]
        self.replicas = [Replica(process) for process in self.workers]  # type: ignore[arg-type]
        for replica in self.replicas:
            replica.on_ready(FakeDescription())  # type: ignore[arg-type]
        self.flow = RequestFlow(self.table, self.replicas, self.postprocs, max_attempts)  # type: ignore[arg-type]
        self.results: dict[int, GenerationResult] = {}

    def submit(
        self,
        request_id: int,
        prompt: tuple[int, ...] = (1, 2, 3),
        *,
        streaming: bool = False,
        n: int = 1,
        priority: float = 0.0,
    ) -> GenerationResult:
        sampling = SamplingParams(max_tokens=10, n=n, temperature=1.0)
        request = GenerationRequest(request_id, prompt, sampling, priority=priority, arrival_time=1.0)
        result = self.table.open(request, None, streaming=streaming, abort=lambda _: False)
        self.results[request_id] = result
        job = Job(request, msgspec.Raw(b""), (-priority, request_id), prefix_keys(prompt, BLOCK), 4 * n)
        self.flow.submit(job)
        self.flow.dispatch()
        return result

    def submitted(self) -> list[list[int]]:
        """Attempts that each worker got since the last call."""
        return [[one.attempt for one in worker.take() if isinstance(one, Submit)] for worker in self.workers]

    def answer(self, attempt: int, text: str = "", *, end: bool = False) -> None:
        outputs = [(attempt, OutputDelta(0, text, (7,)))] if text else []
        ended = [Ended(attempt, RequestMetrics(1.0))] if end else []
        self.flow.on_outputs(StepOutputs(outputs, ended), from_worker=True)
        self.flow.dispatch()

    def kill(self, index: int) -> None:
        self.workers[index].state = "starting"
        self.flow.on_worker_death(self.replicas[index], DIED)
        self.flow.dispatch()

    def revive(self, index: int) -> None:
        self.workers[index].state = "ready"
        self.replicas[index].on_ready(FakeDescription())  # type: ignore[arg-type]
        self.flow.dispatch()


def test_a_worker_gets_two_batches_and_the_rest_waits() -> None:
    world = World(num_replicas=1)
    for request_id in range(10):
        world.submit(request_id)
    assert world.submitted() == [[1, 2, 3, 4]]
    assert world.flow.num_queued == 6
    world.answer(2, "x", end=True)
    assert world.results[1].result(0).outputs[0].text == "x"
    assert world.submitted() == [[5]]


def test_requests_spread_over_replicas() -> None:
    world = World(num_replicas=3)
    for request_id in range(6):
        world.submit(request_id, tuple(range(request_id * 10, request_id * 10 + 3)))
    assert [len(attempts) for attempts in world.submitted()] == [2, 2, 2]


def test_a_request_of_many_sequences_needs_room_for_all() -> None:
    world = World(num_replicas=1)
    world.submit(0, n=3)
    world.submit(1, n=2)
    world.submit(2)  # would fit, but nobody overtakes
    assert world.submitted() == [[1]]
    world.answer(1, "x", end=True)
    assert world.submitted() == [[2, 3]]


def test_a_request_larger_than_the_window_runs_on_an_idle_worker() -> None:
    world = World(num_replicas=1)
    world.submit(0, n=50)
    assert world.submitted() == [[1]]


def test_priority_decides_in_the_queue() -> None:
    world = World(num_replicas=1)
    for request_id in range(5):
        world.submit(request_id)
    world.submit(5, priority=0.1)
    world.submit(6, priority=0.9)
    world.submitted()
    for attempt in (1, 2):
        world.answer(attempt, "x", end=True)
    assert world.workers[0].sent and [job.request.request_id for job in world.replicas[0].jobs.values()] == [2, 3, 6, 5]


def test_unseen_answers_are_made_again_and_seen_ones_end() -> None:
    world = World(num_replicas=2)
    world.submit(0, streaming=True)
    world.submit(1, streaming=True)
    world.submit(2, streaming=False)
    (first, second) = world.submitted()
    for attempt in (1, 2, 3):
        world.answer(attempt, "abc")
    assert next(world.results[0]).outputs[0].text == "abc"
    world.workers[1].state = "silent"  # so that nothing goes there in between
    world.kill(0)
    world.kill(1)
    with pytest.raises(WorkerDiedError):
        next(world.results[0])
    assert not world.results[1].done and not world.results[2].done
    assert world.flow.num_queued == 2
    assert world.flow.num_retries == 2
    world.answer(2, "late")  # of the dead
    world.revive(1)
    assert world.submitted() == [[], [4, 5]]
    world.answer(4, "new", end=True)
    assert world.results[1].result(0).outputs[0].text == "new"
    assert sorted((*first, *second)) == [1, 2, 3]


def test_a_request_that_kills_workers_ends_and_takes_nobody_along() -> None:
    """Request 2 kills every worker that it is sent to; all others must get their answers."""
    world = World(num_replicas=2, max_attempts=3)
    for request_id in range(8):
        world.submit(request_id)
    num_deaths = 0
    for _ in range(100):
        if all(result.done for result in world.results.values()):
            break
        for index, replica in enumerate(world.replicas):
            open_ids = [job.request.request_id for job in replica.jobs.values()]
            if 2 in open_ids:
                num_deaths += 1
                world.kill(index)
                world.revive(index)
            elif open_ids:
                world.answer(next(iter(replica.jobs)), "x", end=True)
    with pytest.raises(WorkerDiedError, match="It was tried 3 times"):
        world.results[2].result(0)
    assert num_deaths == 3
    for request_id, result in world.results.items():
        assert request_id == 2 or result.result(0).outputs[0].text == "x"


def test_the_last_attempt_runs_alone() -> None:
    world = World(num_replicas=1, max_attempts=2)
    world.submit(0)
    world.submit(1)
    world.kill(0)
    world.submit(2)
    world.submitted()
    world.revive(0)
    assert world.submitted() == [[3]]
    world.answer(3, "x", end=True)
    assert world.submitted() == [[4]]
    world.answer(4, "x", end=True)
    assert world.submitted() == [[5]]


def test_one_attempt_means_no_second_and_no_waiting_alone() -> None:
    world = World(num_replicas=1, max_attempts=1)
    for request_id in range(3):
        world.submit(request_id)
    assert world.submitted() == [[1, 2, 3]]
    world.kill(0)
    for result in world.results.values():
        with pytest.raises(WorkerDiedError):
            result.result(0)


def test_cancelling_what_waits_what_runs_and_what_does_not_answer() -> None:
    world = World(num_replicas=1)
    for request_id in range(6):
        world.submit(request_id)
    world.submitted()
    world.flow.cancel(5, "cancelled", now=10.0)
    assert world.results[5].result(0).outputs[0].finish_reason == "cancelled"
    world.flow.cancel(0, "cancelled", now=10.0)
    world.flow.cancel(0, "cancelled", now=10.5)
    world.flow.cancel(1, "cancelled", now=10.5)
    world.flow.cancel(77, "cancelled", now=10.0)
    assert world.workers[0].take() == [Abort(1, "cancelled"), Abort(2, "cancelled")]
    world.answer(1, "x", end=True)
    assert world.results[0].done
    assert not world.results[1].done
    world.flow.give_up_on_cancelled(now=11.4)
    assert not world.results[1].done
    world.flow.give_up_on_cancelled(now=11.6)
    assert world.results[1].result(0).outputs[0].finish_reason == "cancelled"
    world.answer(2, "late", end=True)
    world.flow.cancel(2, "cancelled", now=12.0)
    world.kill(0)
    assert world.results[2].result(0).outputs[0].finish_reason == "cancelled", "cancelled, not tried again"
    assert not world.results[3].done


def test_what_ended_elsewhere_leaves_at_once() -> None:
    """A deadline: the caller has its error already, and the worker's answer is nobody's."""
    world = World(num_replicas=1, num_postproc=1)
    for request_id in range(5):
        world.submit(request_id)
    world.workers[0].take()
    world.postprocs[0].take()
    for request_id in (0, 4):
        world.table.finish(request_id, ExecutorShutdownError("Time is over."))
        world.flow.cancel(request_id, "timeout", now=1.0)
    assert world.workers[0].take() == [Abort(1, "timeout")]
    assert world.postprocs[0].take() == [Forget(1)]
    assert list(world.replicas[0].jobs) == [2, 3, 4]


def test_drain_ends_the_queue_and_gives_no_second_attempts() -> None:
    world = World(num_replicas=1)
    for request_id in range(6):
        world.submit(request_id)
    world.flow.drain(ExecutorShutdownError("End."))
    assert [request_id for request_id, result in world.results.items() if result.done] == [4, 5]
    late = world.submit(6)
    for result in (late, world.results[5]):
        with pytest.raises(ExecutorShutdownError):
            result.result(0)
    world.answer(1, "x", end=True)
    assert world.results[0].result(0).outputs[0].text == "x"
    world.kill(0)
    with pytest.raises(WorkerDiedError):
        world.results[1].result(0)


def test_postprocessing_workers_share_requests_and_may_die() -> None:
    world = World(num_replicas=1, num_postproc=2)
    for request_id in range(4):
        world.submit(request_id)
    opened = [[one.attempt for one in process.take() if isinstance(one, OpenRequest)] for process in world.postprocs]
    assert opened == [[1, 3], [2, 4]]
    assert [one.postproc for one in world.workers[0].take()] == [0, 1, 0, 1]
    world.flow.on_events(EngineEvents([(0, b"zero"), (1, b"one")], EngineStats()))
    assert [process.take() for process in world.postprocs] == [[b"zero"], [b"one"]]
    world.flow.on_outputs(StepOutputs([], [], [StopHit(1, 0)]), from_worker=False)
    assert world.workers[0].take() == [FinishSequence(StopHit(1, 0))]
    world.postprocs[0].state = "starting"
    world.flow.on_postproc_death(world.postprocs[0], DIED)  # type: ignore[arg-type]
    assert world.workers[0].take() == [Abort(1, "cancelled"), Abort(3, "cancelled")]
    world.flow.on_events(EngineEvents([(0, b"of the past")], EngineStats()))
    assert world.postprocs[0].take() == []
    world.flow.dispatch()
    assert [one.attempt for one in world.workers[0].take()] == [5, 6]
    assert [one.attempt for one in world.postprocs[1].take()] == [5, 6]
    world.postprocs[1].state = "starting"
    world.submit(9)
    assert world.workers[0].take() == [], "there is nobody to make text"


def test_counters_of_dead_processes_stay_and_gauges_do_not() -> None:
    replica = World(num_replicas=1).replicas[0]
    cache = KvCacheStats(10, 3, 5, 16, 100, 50, 7)
    stats = EngineStats(2, 1, 30, 40, 50, 1, {"stop": 3}, 5.0, kv_cache=cache)
    replica.on_stats(stats, 1.0)
    assert replica.stats() == stats
    replica.on_death()
    after = replica.stats()
    assert (after.num_running, after.num_waiting, after.num_steps, after.num_generated_tokens) == (0, 0, 30, 50)
    assert (after.kv_cache.num_blocks, after.kv_cache.num_hit_tokens) == (0, 50)
    replica.on_stats(replace(stats, num_steps=1), 2.0)
    assert replica.stats().num_steps == 31
    assert replica.stats().num_finished == {"stop": 6}


def test_progress_is_a_step_or_having_nothing_to_do() -> None:
    world = World(num_replicas=1)
    replica, process = world.replicas[0], world.workers[0]
    replica.on_stats(EngineStats(num_steps=0), 1.0)
    assert process.num_progress == 1, "idle"
    world.submit(0)
    for _ in range(3):
        replica.on_stats(EngineStats(num_steps=0), 2.0)
    assert process.num_progress == 1, "it has work and does nothing"
    replica.on_stats(EngineStats(num_steps=1), 3.0)
    assert process.num_progress == 2


# ---- choice of a replica -------------------------------------------------------------------------------------------


def choose(*loads: tuple[int, int, int], num_prompt_tokens: int = 100, num_blocks: int = 10) -> int:
    """(queued tokens, free blocks, cached tokens) of each replica."""
    made = [ReplicaLoad(index, *load, last_used=-index) for index, load in enumerate(loads)]
    return choose_replica(made, num_prompt_tokens=num_prompt_tokens, num_blocks=num_blocks, tokens_per_block=16)


def test_the_less_busy_replica_wins_and_of_equals_the_one_not_used_for_longest() -> None:
    assert choose((50, 99, 0), (40, 99, 0)) == 1
    assert choose((40, 99, 0), (40, 99, 0)) == 1


def test_a_cached_prefix_wins_unless_the_other_is_less_busy_by_more() -> None:
    assert choose((50, 99, 80), (0, 99, 0)) == 0
    assert choose((90, 99, 80), (0, 99, 0)) == 1


def test_a_full_cache_counts() -> None:
    assert choose((0, 5, 0), (70, 99, 0)) == 1
    assert choose((0, 5, 0), (90, 99, 0)) == 0


@given(st.lists(st.integers(0, 50), max_size=60), st.lists(st.integers(0, 50), max_size=60))
def test_keys_are_equal_exactly_as_far_as_the_tokens_are(left: list[int], right: list[int]) -> None:
    keys = prefix_keys(left, BLOCK), prefix_keys(right, BLOCK)
    assert [len(one) for one in keys] == [len(left) // BLOCK, len(right) // BLOCK]
    for count in range(min(map(len, keys))):
        end = (count + 1) * BLOCK
        assert (keys[0][count] == keys[1][count]) == (left[:end] == right[:end])


def test_a_prefix_index_remembers_the_latest_and_is_bounded() -> None:
    index = PrefixIndex(max_blocks=6)
    first, second = prefix_keys(range(100, 116), BLOCK), prefix_keys(range(16), BLOCK)
    index.add(first)
    assert index.num_matching(first) == 4
    assert index.num_matching((*first[:2], 5, first[3])) == 2
    index.add(second)
    assert index.num_matching(second) == 4
    assert index.num_matching(first) == 2, "the end of a prompt is forgotten first"
    index.clear()
    assert index.num_matching(second) == 0
    assert len(prefix_keys(range(100_000), BLOCK)) == dispatch.MAX_PREFIX_BLOCKS


def test_the_same_beginning_goes_to_the_same_replica() -> None:
    world = World(num_replicas=2)
    system = tuple(range(40))
    world.submit(0, (*system, 1))
    world.submit(1, (9, 9, 9))
    for attempt in (1, 2):
        world.answer(attempt, "x", end=True)
    world.submitted()
    for request_id in range(2, 6):
        world.submit(request_id, (*system, request_id))
        world.answer(request_id + 1, "x", end=True)
    assert [len(attempts) for attempts in world.submitted()] == [4, 0]
