"""Those who want something of an engine that repeats steps wait for the step under way, and for no other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from tests.support.engine_harness import Harness
from tests.support.mock_runner import MockRunner
from tokenmill.engine.core import EngineCore
from tokenmill.engine.plan import BatchPlan, Interruption, RowOutput
from tokenmill.engine.request import GenerationRequest
from tokenmill.executor.base_worker import BaseWorker
from tokenmill.executor.postproc import Postprocessed, Postprocessor
from tokenmill.sampling_params import SamplingParams

MAX_REPEATS = 8


class RepeatingRunner(MockRunner):
    """Repeats as often as it may; calls `hook` with the number of each step while that is computed."""

    max_repeats = MAX_REPEATS

    def __init__(self, hook: Callable[[int], None]) -> None:
        super().__init__(64, 4, 8, gives_logprobs=False)
        self.hook = hook
        self.num_steps = 0
        self.steps_of_plans: list[int] = []

    def interrupt_when(self, interruption: Interruption) -> None:
        self.interruption = interruption

    def _repeat(self, plan: BatchPlan, outputs: list[RowOutput]) -> list[RowOutput]:
        more: list[list[int]] = [[] for _ in plan.rows]
        self._next_step()
        while len(more[0]) + 1 < plan.max_repeats and not self.interruption.is_set:
            rows = tuple(replace(row, start=row.start + len(more[0]) + 1) for row in plan.rows)
            for found, output in zip(more, self._compute(BatchPlan(plan.step, rows)).rows, strict=True):
                assert output.token_id is not None
                found.append(output.token_id)
            self._next_step()
        self.steps_of_plans.append(1 + len(more[0]))
        return [replace(output, more_token_ids=tuple(found)) for output, found in zip(outputs, more, strict=True)]

    def _next_step(self) -> None:
        self.num_steps += 1
        self.hook(self.num_steps)


class Worker(BaseWorker):
    """Keeps what it should deliver."""

    def __init__(self, engine: EngineCore) -> None:
        super().__init__(engine, Postprocessor(None))
        self.results: list[Postprocessed] = []

    def deliver(self, result: Postprocessed) -> None:
        self.results.append(result)


def request(request_id: int, max_tokens: int) -> GenerationRequest:
    return GenerationRequest(request_id, (1, 2, 3 + request_id), SamplingParams(max_tokens=max_tokens))


def worker_of(hooks: dict[int, Callable[[Worker], None]]) -> tuple[Worker, RepeatingRunner]:
    """A worker whose hooks run in the middle of steps, by number."""
    runner = RepeatingRunner(lambda step: hooks.get(step, lambda worker: None)(worker))
    worker = Worker(EngineCore(Harness(max_repeats=MAX_REPEATS).scheduler, runner))
    return worker, runner


def test_a_request_and_a_cancellation_wait_for_one_step() -> None:
    worker, runner = worker_of(
        {
            11: lambda worker: worker.submit(request(1, 20)),
            21: lambda worker: worker.abort(0, "cancelled"),
            25: lambda worker: worker.stop(),
        }
    )
    worker.submit(request(0, 60))
    worker.run()
    assert runner.steps_of_plans == [8, 3, 8, 2, 4], "whole groups, cut where somebody came"
    first, second = ([delta for result in worker.results for id_, delta in result.outputs if id_ == n] for n in (0, 1))
    assert first[-1].finish_reason == "cancelled"
    assert sum(len(delta.token_ids) for delta in first) == 1 + 8 + 3 + 8 + 2
    assert sum(len(delta.token_ids) for delta in second) == 8 + 2 + 4, "its prompt, nearly all cached, is a step alike"


def test_a_command_is_heard_whenever_it_comes() -> None:
    """Set after the command is there, cleared before the look: none is left waiting while steps are repeated."""
    worker, runner = worker_of({})
    worker.call(lambda: worker.call(worker.stop))  # comes while commands are taken
    assert runner.interruption.is_set
    worker._take_commands()
    assert not worker.has_work or runner.interruption.is_set
    worker.run()
