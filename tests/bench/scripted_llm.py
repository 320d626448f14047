"""An LLM that answers on a schedule: what the benchmark client needs of one, on real `GenerationResult`s."""

from __future__ import annotations

import itertools
import threading
import time
from typing import Any

from tokenmill.errors import EngineError, TokenmillError, UserError
from tokenmill.executor.postproc import OutputDelta
from tokenmill.executor.result import GenerationResult
from tokenmill.outputs import RequestMetrics
from tokenmill.sampling_params import SamplingParams


class ScriptedLLM:
    """Gives `max_tokens` tokens, one each `interval` seconds, from a thread for each request.

    The prompt's first token picks the course: 1 is refused at once, 2 fails after one token, others succeed.
    """

    def __init__(self, interval: float = 0.002) -> None:
        self.interval = interval
        self.num_running = 0
        self.max_running = 0
        self.prompts: list[Any] = []
        self.aborted: list[int] = []
        self._ids = itertools.count(1)
        self._lock = threading.Lock()

    def generate_async(
        self, inputs: list[int], sampling_params: SamplingParams, *, streaming: bool = False
    ) -> GenerationResult:
        assert streaming
        assert sampling_params.ignore_eos
        assert sampling_params.greedy
        if inputs[0] == 1:
            raise UserError("refused")
        result = GenerationResult(
            next(self._ids), None, tuple(inputs), sampling_params,
            streaming=True, arrival_time=time.monotonic(), abort=self._abort,
        )  # fmt: skip
        with self._lock:
            self.prompts.append(inputs)
            self.num_running += 1
            self.max_running = max(self.max_running, self.num_running)
        threading.Thread(target=self._answer, args=(result, inputs, sampling_params.max_tokens), daemon=True).start()
        return result

    def _abort(self, request_id: int) -> bool:
        self.aborted.append(request_id)
        return True

    def _answer(self, result: GenerationResult, inputs: list[int], count: int) -> None:
        error: TokenmillError | None = None
        for index in range(count):
            time.sleep(self.interval)
            if result.request_id in self.aborted:
                break
            if inputs[0] == 2 and index == 1:
                error = EngineError("broke")
                break
            result.push(OutputDelta(sequence_index=0, token_ids=(index,)))
        with self._lock:
            self.num_running -= 1
        result.finish(RequestMetrics(arrival_time=0.0, num_cached_tokens=3), error)
