"""Whatever arrives, is cancelled or fails, in whatever order: integrity after every step, one terminal event for each
request, the oracle's tokens, and no block lost."""

import random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from tests.support.engine_harness import MAX_UTILIZATION, NO_EVICT, STATIC_BATCH, Harness
from tokenmill.config import CapacitySchedulerPolicy
from tokenmill.engine.events import Failed
from tokenmill.errors import UserError

PREFIXES = [[(3 * i * (i + k)) % 50 for i in range(24)] for k in range(3)]


class EngineMachine(RuleBasedStateMachine):
    """Random life of an engine with a tiny cache."""

    @initialize(
        num_blocks=st.integers(6, 40),
        tokens_per_block=st.sampled_from([1, 2, 3, 4]),
        max_batch_size=st.integers(1, 6),
        max_num_tokens=st.integers(1, 40),
        chunked=st.booleans(),
        capacity_policy=st.sampled_from([NO_EVICT, MAX_UTILIZATION, MAX_UTILIZATION, STATIC_BATCH]),
        queue_policy=st.sampled_from(["fcfs", "priority"]),
        block_reuse=st.sampled_from([True, True, False]),
        partial_reuse=st.booleans(),
        overlap=st.booleans(),
        max_repeats=st.sampled_from([1, 2, 5]),
    )
    def build(self, chunked: bool, overlap: bool, max_repeats: int, **shape: object) -> None:
        max_repeats = 1 if overlap else max_repeats  # an engine does one or the other
        self.harness = Harness(
            max_seq_len=40, enable_chunked_prefill=chunked, overlap=overlap, max_repeats=max_repeats, **shape
        )
        self.failing_step: str | None = None
        self.bad_row: int | None = None
        runner = self.harness.runner
        runner.launch_error = lambda plan: self._take_failure("launch")
        runner.collect_error = lambda plan: self._take_failure("collect")
        runner.row_error = lambda plan, row: self._take_bad_row(row.slot)
        self.failures: list[int] = []

    def _take_failure(self, where: str) -> Exception | None:
        if self.failing_step != where:
            return None
        self.failing_step = None
        return RuntimeError(where)

    def _take_bad_row(self, slot: int) -> str | None:
        if self.bad_row is None or slot % 2 != self.bad_row:
            return None
        self.bad_row = None
        return "NaN"

    @rule(
        prefix=st.sampled_from(PREFIXES),
        prefix_len=st.integers(0, 20),
        suffix=st.lists(st.integers(0, 49), max_size=5),
        max_tokens=st.integers(1, 14),
        n=st.sampled_from([1, 1, 1, 2, 4]),
        end_ids=st.sampled_from([(), (7,), (7, 30)]),
        stop_token_ids=st.sampled_from([(), (), (11,), (7, 12)]),
        min_tokens=st.sampled_from([0, 0, 1, 3]),
        include=st.booleans(),
        prompt_logprobs=st.sampled_from([None, None, None, 0]),
        priority=st.sampled_from([0.1, 0.5, 0.9]),
    )
    def add(
        self,
        prefix: list[int],
        prefix_len: int,
        suffix: list[int],
        max_tokens: int,
        min_tokens: int,
        include: bool,
        **options: object,
    ) -> None:
        try:
            self.harness.add(
                prefix[:prefix_len] + suffix,
                max_tokens,
                min_tokens=min(min_tokens, max_tokens),
                include_stop_str_in_output=include,
                **options,
            )
        except UserError as error:
            assert error.field in ("prompt", "max_tokens", "n")

    @rule(num_steps=st.integers(1, 4))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.harness.step()

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.harness.requests)))
        is_open = request_id in self.harness.scheduler._ledger.requests
        assert self.harness.cancel(request_id) == is_open
        assert not self.harness.core.cancel(request_id)
        self.harness.core.check_integrity()

    @precondition(lambda self: self.harness.requests)
    @rule(data=st.data())
    def finish_one_sequence(self, data: st.DataObject) -> None:
        request_id = data.draw(st.sampled_from(sorted(self.harness.requests)))
        index = data.draw(st.integers(0, len(self.harness.answers[request_id]) - 1))
        self.harness.finish_sequence(request_id, index)
        assert not self.harness.core.finish_sequence(request_id, index, "stop")
        self.harness.core.check_integrity()

    @rule(where=st.sampled_from(["launch", "collect"]))
    def fail_a_step(self, where: str) -> None:
        self.failing_step = where
        self.harness.step()

    @rule(parity=st.integers(0, 1))
    def fail_a_row(self, parity: int) -> None:
        self.bad_row = parity
        self.harness.step()

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        self.failing_step = self.bad_row = None
        self.harness.run(max_steps=3000)
        failed = {request_id for request_id, end in self.harness.endings.items() if isinstance(end, Failed)}
        self.harness.check_finished(failed)
        if self.harness.settings.capacity_policy is not MAX_UTILIZATION:
            assert self.harness.core.stats().num_preemptions == 0


TestEngine = EngineMachine.TestCase
TestEngine.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
TestEngine = pytest.mark.spec("C4")(pytest.mark.spec("C2")(TestEngine))


@pytest.mark.spec("C4")
@pytest.mark.parametrize(("overlap", "max_repeats"), [(False, 1), (True, 1), (False, 4)])
@pytest.mark.parametrize("capacity_policy", [NO_EVICT, MAX_UTILIZATION, STATIC_BATCH])
def test_300_random_arrivals(capacity_policy: CapacitySchedulerPolicy, overlap: bool, max_repeats: int) -> None:
    rng = random.Random(f"{capacity_policy} {overlap}")
    harness = Harness(
        num_blocks=40,
        max_batch_size=8,
        max_num_tokens=48,
        max_seq_len=96,
        capacity_policy=capacity_policy,
        queue_policy="priority" if overlap else "fcfs",
        overlap=overlap,
        max_repeats=max_repeats,
    )
    prefixes = [[rng.randrange(50) for _ in range(60)] for _ in range(4)]
    num_cancelled = 0
    while len(harness.requests) < 300 or harness.core.has_work:
        if len(harness.requests) < 300 and rng.random() < 0.5:
            text = rng.choice(prefixes)[: rng.randrange(0, 60)] + [
                rng.randrange(50) for _ in range(rng.randrange(1, 9))
            ]
            harness.add(
                text,
                max_tokens=rng.randrange(1, 24),
                n=rng.choice([1, 1, 1, 1, 3]),
                end_ids=(rng.randrange(50),),
                stop_token_ids=rng.choice([(), (rng.randrange(50),)]),
                priority=rng.choice([0.2, 0.5, 0.8]),
            )
        if rng.random() < 0.05 and harness.requests:
            num_cancelled += harness.cancel(rng.randrange(len(harness.requests)))
        harness.step()
    harness.check_finished()
    stats = harness.core.stats()
    assert stats.num_finished["cancelled"] == num_cancelled > 5
    assert stats.kv_cache.num_evicted_blocks > 50 and 0.1 < stats.kv_cache.hit_rate < 0.9
    assert (stats.num_preemptions > 5) == (capacity_policy is MAX_UTILIZATION)
