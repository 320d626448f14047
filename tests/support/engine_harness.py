"""`Harness`: an engine on the mock runner, with a record of all events and the checks that every run must pass."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.mock_runner import MockRunner, expected_answer
from tokenmill.config import CapacitySchedulerPolicy
from tokenmill.engine.core import EngineCore
from tokenmill.engine.events import EngineEvent, Failed, Finished, TokenDelta
from tokenmill.engine.policies import QueuePolicy
from tokenmill.engine.request import GenerationRequest
from tokenmill.engine.scheduler import Scheduler
from tokenmill.engine.settings import SchedulerSettings
from tokenmill.kv_cache.manager import KvCacheManager
from tokenmill.outputs import TokenLogprobs
from tokenmill.sampling_params import SamplingParams

NO_EVICT = CapacitySchedulerPolicy.GUARANTEED_NO_EVICT
MAX_UTILIZATION = CapacitySchedulerPolicy.MAX_UTILIZATION
STATIC_BATCH = CapacitySchedulerPolicy.STATIC_BATCH


@dataclass
class Answer:
    """What the events told about one sequence."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None


class Harness:
    """An engine of the given shape; `overlap` chooses how it is stepped."""

    def __init__(
        self,
        *,
        num_blocks: int = 64,
        tokens_per_block: int = 4,
        max_batch_size: int = 8,
        max_num_tokens: int = 64,
        max_seq_len: int = 64,
        enable_chunked_prefill: bool = True,
        capacity_policy: CapacitySchedulerPolicy = NO_EVICT,
        queue_policy: QueuePolicy = "fcfs",
        block_reuse: bool = True,
        partial_reuse: bool = True,
        overlap: bool = False,
        max_repeats: int = 1,
    ) -> None:
        self.settings = SchedulerSettings(
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_seq_len=max_seq_len,
            enable_chunked_prefill=enable_chunked_prefill,
            capacity_policy=capacity_policy,
            queue_policy=queue_policy,
            max_repeats=max_repeats,
        )
        self.kv = KvCacheManager(
            num_blocks, tokens_per_block, enable_block_reuse=block_reuse, enable_partial_reuse=partial_reuse
        )
        self.now = 0.0
        self.scheduler = Scheduler(self.settings, self.kv, clock=self._tick)
        self.runner = MockRunner(num_blocks, tokens_per_block, max_batch_size, gives_logprobs=max_repeats == 1)
        self.core = EngineCore(self.scheduler, self.runner)
        self.overlap = overlap
        self.requests: dict[int, GenerationRequest] = {}
        self.answers: dict[int, list[Answer]] = {}
        self.endings: dict[int, Finished | Failed] = {}
        self.ended_early: set[tuple[int, int]] = set()

    def _tick(self) -> float:
        self.now += 1.0
        return self.now

    def add(
        self,
        prompt: tuple[int, ...] | list[int],
        max_tokens: int = 8,
        *,
        end_ids: tuple[int, ...] = (),
        stop_token_ids: tuple[int, ...] = (),
        stop_words: tuple[tuple[int, ...], ...] = (),
        priority: float = 0.5,
        n: int = 1,
        streaming: bool = False,
        **sampling: object,
    ) -> int:
        """Add a request; returns its id. Its seed is its id."""
        request_id = len(self.requests)
        inputs = GenerationRequest(
            request_id,
            tuple(prompt),
            SamplingParams(max_tokens=max_tokens, n=n, temperature=1.0, **sampling),
            seed=request_id,
            end_ids=end_ids,
            stop_token_ids=stop_token_ids,
            priority=priority,
            stop_words=stop_words,
            streaming=streaming,
        )
        self.core.add(inputs)
        self.requests[request_id] = inputs
        self.answers[request_id] = [Answer() for _ in range(inputs.sampling.num_sequences)]
        return request_id

    def cancel(self, request_id: int) -> bool:
        """Cancel, and remember that the answer may be short."""
        self.ended_early.update((request_id, index) for index in range(len(self.answers[request_id])))
        return self.core.cancel(request_id)

    def finish_sequence(self, request_id: int, index: int) -> bool:
        """End one sequence from outside, and remember that the answer may be short."""
        self.ended_early.add((request_id, index))
        return self.core.finish_sequence(request_id, index, "stop")

    def step(self) -> list[EngineEvent]:
        """One step, with all checks that can be made after one."""
        events = self.core.step_overlapped() if self.overlap else self.core.step()
        assert not self.runner.mistakes, self.runner.mistakes
        for event in events:
            assert event.request_id not in self.endings, f"{event} comes after the terminal event"
            if isinstance(event, TokenDelta):
                self._record(event)
            else:
                self.endings[event.request_id] = event
        self.core.check_integrity()
        self._check_plan()
        return events

    def run(self, max_steps: int = 5000) -> None:
        """Step until there is nothing left to do."""
        for _ in range(max_steps):
            if not self.core.has_work:
                return
            self.step()
        raise AssertionError(f"the engine still has work after {max_steps} steps")

    def tokens(self, request_id: int, index: int = 0) -> list[int]:
        """The answer so far."""
        return self.answers[request_id][index].token_ids

    def check_finished(self, failed: set[int] | None = None) -> None:
        """All requests ended, once; answers are the oracle's; all blocks are free or cached."""
        assert not self.core.has_work
        assert set(self.endings) == set(self.requests), "a request has no terminal event"
        for request_id, inputs in self.requests.items():
            ending = self.endings[request_id]
            assert isinstance(ending, Failed) == (request_id in (failed or set())), f"request {request_id}: {ending}"
            for index, answer in enumerate(self.answers[request_id]):
                expected = expected_answer(inputs, index, max_seq_len=self.settings.max_seq_len)
                if isinstance(ending, Failed) or (request_id, index) in self.ended_early:
                    assert tuple(answer.token_ids) == expected.token_ids[: len(answer.token_ids)]
                    continue
                assert tuple(answer.token_ids) == expected.token_ids, f"request {request_id}, sequence {index}"
                assert (answer.finish_reason, answer.stop_reason) == (expected.finish_reason, expected.stop_reason)
            self._check_prompt_logprobs(request_id, isinstance(ending, Failed))
        stats = self.core.stats()
        assert stats.num_running == stats.num_waiting == 0
        assert stats.kv_cache.num_free_blocks == stats.kv_cache.num_blocks
        assert sum(stats.num_finished.values()) == len(self.requests)
        self.core.check_integrity()

    def _record(self, delta: TokenDelta) -> None:
        answer = self.answers[delta.request_id][delta.sequence_index]
        assert answer.finish_reason is None, f"{delta} comes after the sequence's end"
        assert len(delta.logprobs) == (len(delta.token_ids) if self.runner.gives_logprobs else 0)
        answer.token_ids += delta.token_ids
        answer.logprobs += delta.logprobs
        answer.prompt_logprobs += delta.prompt_logprobs
        answer.finish_reason = delta.finish_reason
        answer.stop_reason = delta.stop_reason

    def _check_plan(self) -> None:
        if self.runner.plans:
            plan = self.runner.plans[-1]
            assert plan.num_tokens <= self.settings.max_num_tokens
            assert len(plan.rows) <= self.settings.max_batch_size

    def _check_prompt_logprobs(self, request_id: int, is_failed: bool) -> None:
        inputs, answer = self.requests[request_id], self.answers[request_id][0]
        positions = [logprob.rank for entry in answer.prompt_logprobs for logprob in entry.values()]
        wanted = range(1, len(inputs.prompt_token_ids)) if inputs.sampling.prompt_logprobs is not None else range(0)
        if is_failed or (request_id, 0) in self.ended_early:
            assert positions == list(wanted)[: len(positions)]
        else:
            assert positions == list(wanted)
