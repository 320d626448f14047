"""`GenerationProbe`: proves that tokens come out of the engine now. `/health/generate` asks it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from tokenmill.errors import EngineStalledError, QueueFullError, RequestTimeoutError
from tokenmill.sampling_params import SamplingParams

if TYPE_CHECKING:
    from tokenmill.executor.result import GenerationResult
    from tokenmill.llm import LLM

_POLL_SECONDS: Final = 0.02
_HIGHEST_PRIORITY: Final = 1.0


class GenerationProbe:
    """Runs a request of one token; probes that come meanwhile share it.

    A busy engine may take that request late. Any token that the engine generates for anybody while the probe waits is
    as good a proof, so a full queue is no failure.

    Args:
        llm: to be probed.
    """

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._running: asyncio.Task[None] | None = None

    async def run(self, timeout: float) -> None:
        """Return when a token has come.

        Args:
            timeout: seconds to wait for it.

        Raises:
            EngineStalledError: none came in time.
            TokenmillError: why none can come.
        """
        self._llm.check_health()
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._wait_for_token(timeout))
            self._running.add_done_callback(_consume)
        try:
            await asyncio.wait_for(asyncio.shield(self._running), timeout)
        except (TimeoutError, RequestTimeoutError):
            raise EngineStalledError(f"No token was generated within {timeout:g} s.") from None

    async def _wait_for_token(self, timeout: float) -> None:
        before = self._llm.stats().num_generated_tokens
        result = self._submit(timeout)
        try:
            async with asyncio.timeout(timeout):
                while self._llm.stats().num_generated_tokens <= before:
                    if result is not None and result.done and (await result).outputs[0].token_ids:
                        return
                    self._llm.check_health()
                    await asyncio.sleep(_POLL_SECONDS)
        finally:
            if result is not None:
                result.abort()

    def _submit(self, timeout: float) -> GenerationResult | None:
        """The probe's request; None if there is no room for it."""
        with suppress(QueueFullError):
            sampling = SamplingParams(max_tokens=1, ignore_eos=True, detokenize=False)
            prompt = {"prompt_token_ids": [0]}
            return self._llm.generate_async(prompt, sampling, priority=_HIGHEST_PRIORITY, timeout=timeout)
        return None


def _consume(task: asyncio.Task[None]) -> None:
    """Take note of the task's error, so that nobody misses it when every caller has gone."""
    if not task.cancelled():
        task.exception()
