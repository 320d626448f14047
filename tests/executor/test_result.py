"""`GenerationResult`: waiting, iterating, merging, errors, from threads and from event loops."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from tokenmill.errors import EngineError
from tokenmill.executor.postproc import OutputDelta
from tokenmill.executor.result import GenerationResult
from tokenmill.outputs import Logprob, RequestMetrics
from tokenmill.sampling_params import SamplingParams

pytestmark = pytest.mark.spec("B1")


def make_result(sampling: SamplingParams | None = None, *, streaming: bool = True) -> GenerationResult:
    return GenerationResult(
        7,
        "a prompt",
        (1, 2, 3),
        sampling or SamplingParams(),
        streaming=streaming,
        arrival_time=1.0,
        abort=lambda request_id: request_id == 7,
    )


def finish(result: GenerationResult) -> None:
    result.finish(RequestMetrics(arrival_time=1.0, finished_time=2.0))


def test_result_waits_for_the_end_of_another_thread() -> None:
    result = make_result(streaming=False)

    def feed() -> None:
        result.push(OutputDelta(0, text="Hel", token_ids=(4,)))
        time.sleep(0.05)
        result.push(OutputDelta(0, text="lo", token_ids=(5,), finish_reason="length"))
        finish(result)

    threading.Thread(target=feed).start()
    output = result.result(timeout=5)
    assert output.finished
    assert output.prompt == "a prompt"
    assert output.prompt_token_ids == [1, 2, 3]
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("Hello", [4, 5])
    assert output.outputs[0].finish_reason == "length"
    assert output.metrics.finished_time == 2.0


def test_result_times_out_and_goes_on() -> None:
    result = make_result()
    with pytest.raises(TimeoutError, match="request 7"):
        result.result(timeout=0.01)
    finish(result)
    assert result.result(timeout=1).finished


def test_a_slow_reader_gets_several_deltas_at_once_and_snapshots_do_not_change() -> None:
    result = make_result()
    result.push(OutputDelta(0, text="a", token_ids=(1,)))
    first = next(result)
    result.push(OutputDelta(0, text="b", token_ids=(2,)))
    result.push(OutputDelta(0, text="c", token_ids=(3,)))
    assert result.outputs[0].text == "abc"  # looking does not take from the iteration
    second = next(result)
    assert (first.outputs[0].text, first.outputs[0].text_diff) == ("a", "a")
    assert (second.outputs[0].text, second.outputs[0].text_diff) == ("abc", "bc")
    assert second.outputs[0].token_ids_diff == [2, 3]
    assert not second.finished
    finish(result)
    last = next(result)
    assert last.finished
    assert last.outputs[0].text_diff == ""
    with pytest.raises(StopIteration):
        next(result)


def test_without_streaming_an_iteration_gives_the_end_alone() -> None:
    result = make_result(streaming=False)
    result.push(OutputDelta(0, text="a", token_ids=(1,)))
    result.push(OutputDelta(0, text="b", token_ids=(2,), finish_reason="stop"))
    finish(result)
    assert [output.outputs[0].text_diff for output in result] == ["ab"]


def test_an_error_comes_after_what_was_generated() -> None:
    result = make_result()
    result.push(OutputDelta(0, text="a", token_ids=(1,)))
    result.finish(RequestMetrics(arrival_time=1.0), EngineError("broken"))
    assert next(result).outputs[0].text == "a"
    with pytest.raises(EngineError, match="broken"):
        next(result)
    with pytest.raises(StopIteration):
        next(result)
    with pytest.raises(EngineError):
        result.result()
    assert isinstance(result.exception(), EngineError)


def test_event_loop_reads_what_another_thread_feeds() -> None:
    async def main() -> tuple[str, str]:
        result = make_result()

        def feed() -> None:
            for text in "abcdef":
                time.sleep(0.002)
                result.push(OutputDelta(0, text=text, token_ids=(1,)))
            finish(result)

        threading.Thread(target=feed).start()
        text = ""
        async for output in result:
            text += output.outputs[0].text_diff
        return text, (await result).outputs[0].text

    assert asyncio.run(main()) == ("abcdef", "abcdef")


def test_many_waiters_all_wake() -> None:
    async def main() -> int:
        result = make_result(streaming=False)
        waiters = [asyncio.create_task(result.aresult()) for _ in range(5)]
        await asyncio.sleep(0.01)
        threading.Thread(target=finish, args=(result,)).start()
        return sum(output.finished for output in await asyncio.gather(*waiters))

    assert asyncio.run(asyncio.wait_for(main(), 5)) == 5


def test_best_of_returns_the_most_likely_first_and_hides_unasked_logprobs() -> None:
    result = make_result(SamplingParams(n=2, best_of=3, temperature=1.0), streaming=False)
    for index, logprob in enumerate((-2.0, -0.5, -1.0)):
        delta = OutputDelta(index, str(index), (9,), ({9: Logprob(logprob, 1)},), finish_reason="length")
        result.push(delta)
    finish(result)
    outputs = result.result().outputs
    assert [output.text for output in outputs] == ["1", "2"]
    assert [output.index for output in outputs] == [0, 1]
    assert [output.cumulative_logprob for output in outputs] == [-0.5, -1.0]
    assert outputs[0].logprobs == []


def test_a_second_terminal_event_is_a_bug() -> None:
    result = make_result()
    assert result.abort()
    finish(result)
    with pytest.raises(AssertionError, match="ended twice"):
        finish(result)
    assert not result.abort(), "the engine is not asked about what has ended"
