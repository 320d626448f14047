"""Postprocessing: characters are never split, requests never mixed, and a request that has no text ends alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokenmill import SamplingParams
from tokenmill.engine.events import Failed, Finished, TokenDelta
from tokenmill.errors import EngineError, InvalidLogitsError, ProtocolError
from tokenmill.executor.messages import Forget, OpenRequest, PostprocBatch, Shutdown, StepOutputs, Submit
from tokenmill.executor.postproc import Ended, Postprocessed, Postprocessor, StopHit, split_events
from tokenmill.executor.postproc_worker import PostprocWorker
from tokenmill.outputs import RequestMetrics
from tokenmill.tokenization import Tokenizer, load_tokenizer

pytestmark = pytest.mark.spec("B4")

METRICS = RequestMetrics(1.0, 2.0, 3.0, 4.0)
TEXTS = [
    "Gr\u00f6\u00dfe",
    "\u65e5\u672c\u8a9e",
    "\U0001f469\u200d\U0001f52c ok",
    "the quick brown fox",
    "e\u0301\u0000\ufffd!",
]


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    return load_tokenizer(model_dir)


def text_of(result: Postprocessed, request_id: int) -> str:
    return "".join(output.text for one, output in result.outputs if one == request_id)


@given(order=st.randoms(use_true_random=False), sizes=st.lists(st.integers(1, 4), min_size=1))
def test_characters_are_whole_however_tokens_come(tokenizer: Tokenizer, order: Any, sizes: list[int]) -> None:
    """Several requests interleaved at random, a few tokens at a time; one byte is one token for most characters."""
    postprocessor = Postprocessor(tokenizer)
    left = {request_id: tokenizer.encode(text) for request_id, text in enumerate(TEXTS)}
    pieces: dict[int, list[str]] = {request_id: [] for request_id in left}
    for request_id in left:
        postprocessor.open(request_id, SamplingParams(max_tokens=1000), (1,))
    turn = 0
    while left:
        request_id = order.choice(list(left))
        size = sizes[turn % len(sizes)]
        turn += 1
        token_ids, left[request_id] = left[request_id][:size], left[request_id][size:]
        is_last = not left[request_id]
        delta = TokenDelta(request_id, 0, tuple(token_ids), finish_reason="length" if is_last else None)
        result = postprocessor.process([delta], [Ended(request_id, METRICS)] if is_last else [])
        pieces[request_id].append(text_of(result, request_id))
        assert [one.request_id for one in result.ended] == ([request_id] if is_last else [])
        if is_last:
            del left[request_id]
    for request_id, text in enumerate(TEXTS):
        assert "".join(pieces[request_id]) == text
        if "\ufffd" not in text:
            assert not any("\ufffd" in piece for piece in pieces[request_id])
    assert postprocessor.num_requests == 0


@pytest.mark.parametrize("sizes", [(1,) * 20, (20,), (3, 4, 13)])
@pytest.mark.parametrize("min_tokens", [0, 1, 2, 4, 7, 12, 20])
def test_stop_strings_begin_behind_the_least_number_of_tokens(
    tokenizer: Tokenizer, sizes: tuple[int, ...], min_tokens: int
) -> None:
    token_ids = (tokenizer.encode("fox on fox on fox on fox on fox") * 2)[:20]
    postprocessor = Postprocessor(tokenizer)
    postprocessor.open(1, SamplingParams(max_tokens=50, min_tokens=min_tokens, stop="fox"), (1,))
    text, left, is_hit = "", list(token_ids), False
    for size in sizes:
        delta = TokenDelta(1, 0, tuple(left[:size]), finish_reason="length" if len(left) == size else None)
        left = left[size:]
        result = postprocessor.process([delta], [])
        text += text_of(result, 1)
        is_hit |= any(output.finish_reason == "stop" for _, output in result.outputs)
    whole = tokenizer.decode(token_ids)
    passed = tokenizer.decode(token_ids[:min_tokens])
    assert text == passed + whole[len(passed) :].partition("fox")[0]
    assert is_hit == ("fox" in whole[len(passed) :])


def test_a_request_without_text_ends_alone(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    postprocessor = Postprocessor(tokenizer)
    for request_id in (1, 2):
        postprocessor.open(request_id, SamplingParams(n=2, temperature=1.0), (1,))
    monkeypatch.setattr(postprocessor._requests[1], "process", lambda delta: 1 / 0)
    good = tuple(tokenizer.encode("fox"))
    result = postprocessor.process([TokenDelta(1, 0, good), TokenDelta(2, 0, good), TokenDelta(1, 1, good)], [])
    assert text_of(result, 2) == "fox"
    (ended,) = result.ended
    assert ended.request_id == 1
    assert isinstance(ended.error, EngineError) and "ZeroDivisionError" in ended.error.message
    assert result.stop_hits == [StopHit(1, 0), StopHit(1, 1)], "the engine is told to stop"
    later = postprocessor.process([TokenDelta(1, 0, (5,), finish_reason="stop")], [Ended(1, METRICS)])
    assert later == Postprocessed([], [], []), "its end has come already"


def test_events_of_a_step_keep_their_order() -> None:
    error = InvalidLogitsError("No.")
    first, second = TokenDelta(1, 0, (5,)), TokenDelta(2, 0, (6,), finish_reason="stop")
    deltas, ended = split_events([first, Failed(1, error, METRICS), second, Finished(2, METRICS)])
    assert deltas == [first, second]
    assert ended == [Ended(1, METRICS, error), Ended(2, METRICS)]


class FakeChild:
    """The proxy's side of a postprocessing worker."""

    def __init__(self, *messages: Any) -> None:
        self._messages: Iterator[Any] = iter(messages)
        self.sent: list[Any] = []

    def receive(self) -> Any:
        return next(self._messages)

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def beat(self, interval: float, make_heartbeat: Any) -> None:
        assert make_heartbeat().has_work is False


def test_the_worker_answers_what_the_proxy_says(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("the fox stops here")
    child = FakeChild(
        OpenRequest(1, SamplingParams(stop=" stops"), (1,)),
        OpenRequest(2, SamplingParams(), (1,)),
        PostprocBatch([TokenDelta(1, 0, tuple(tokens)), TokenDelta(2, 0, (tokens[0],)), TokenDelta(9, 0, (5,))], []),
        Forget(2),
        Forget(77),
        PostprocBatch([TokenDelta(2, 0, (5,)), TokenDelta(1, 0, (), finish_reason="stop")], [Ended(1, METRICS)]),
        PostprocBatch([TokenDelta(2, 0, (5,))], [Ended(2, METRICS)]),
        Shutdown(),
    )
    PostprocWorker(Postprocessor(tokenizer), child).serve(1.0)  # type: ignore[arg-type]
    first, second = child.sent
    assert isinstance(first, StepOutputs) and first.stop_hits == [StopHit(1, 0)]
    assert {one: output.text for one, output in first.outputs}[1] == "the fox"
    assert {one: output.stop_reason for one, output in first.outputs}[1] == " stops"
    assert second == StepOutputs([], [Ended(1, METRICS)], [])


def test_what_is_not_for_it_ends_the_worker(tokenizer: Tokenizer) -> None:
    import msgspec

    child = FakeChild(Submit(1, msgspec.Raw(b"")))
    with pytest.raises(ProtocolError, match="cannot answer Submit"):
        PostprocWorker(Postprocessor(tokenizer), child).serve(1.0)  # type: ignore[arg-type]
