"""`/v1/completions`, through the official client."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.live_server import LiveServer

PROMPT = "The quick brown fox"
LONG: dict[str, Any] = {"ignore_eos": True}


def complete(client: openai.OpenAI, **arguments: Any) -> Any:
    """Ask; always the same seed, and no early end, unless the test says otherwise."""
    extra = LONG | arguments.pop("extra", {})
    arguments = {"model": "tiny", "prompt": PROMPT, "seed": 3, "extra_body": extra} | arguments
    return client.completions.create(**arguments)


@pytest.mark.spec("A6")
def test_completion_has_the_shape_of_openai(server: LiveServer, client: openai.OpenAI) -> None:
    answer = complete(client)
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text
    assert answer.usage.completion_tokens == 16, "OpenAI's default length"
    assert answer.usage.prompt_tokens == len(server.llm.tokenizer.encode(PROMPT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 16


def test_every_kind_of_prompt(server: LiveServer, client: openai.OpenAI) -> None:
    other = "a stitch in time"
    ids = [server.llm.tokenizer.encode(text) for text in (PROMPT, other)]
    expected = [complete(client, prompt=text).choices[0].text for text in (PROMPT, other)]
    for prompt in ([PROMPT, other], ids):
        answer = complete(client, prompt=prompt)
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert [choice.text for choice in answer.choices] == expected
        assert answer.usage.prompt_tokens == len(ids[0]) + len(ids[1])
    assert complete(client, prompt=ids[0]).choices[0].text == expected[0]


@pytest.mark.parametrize("arguments", [{}, {"n": 2}, {"echo": True}, {"logprobs": 2}, {"echo": True, "logprobs": 2}])
def test_stream_gives_what_the_whole_answer_gives(client: openai.OpenAI, arguments: dict[str, Any]) -> None:
    prompts = [PROMPT, "a stitch in time"]
    whole = complete(client, prompt=prompts, **arguments).model_dump()["choices"]
    pieces: list[dict[str, Any]] = [{"text": "", "finish_reason": None, "logprobs": {}} for _ in whole]
    for chunk in complete(client, prompt=prompts, stream=True, **arguments):
        [choice] = chunk.choices
        piece = pieces[choice.index]
        piece["text"] += choice.text
        assert piece["finish_reason"] is None, "a choice goes on after its end"
        piece["finish_reason"] = choice.finish_reason
        for name, values in (choice.logprobs.model_dump() if choice.logprobs else {}).items():
            piece["logprobs"].setdefault(name, []).extend(values)
    for piece, choice in zip(pieces, whole, strict=True):
        assert piece["text"] == choice["text"]
        assert piece["finish_reason"] == choice["finish_reason"]
        for name in ("tokens", "text_offset"):
            assert piece["logprobs"].get(name) == (choice["logprobs"] or {}).get(name)


def test_usage_of_a_stream(server: LiveServer) -> None:
    body = {"prompt": [PROMPT, "a"], "max_tokens": 3, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    lines = httpx.post(f"{server.url}/v1/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    *chunks, last = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6


def test_n_and_best_of(client: openai.OpenAI) -> None:
    answer = complete(client, n=2, best_of=4, logprobs=0, max_tokens=6)
    sums = [sum(choice.logprobs.token_logprobs) for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert sums == sorted(sums, reverse=True)
    of_all = complete(client, n=4, logprobs=0, max_tokens=6)
    best = sorted((sum(choice.logprobs.token_logprobs) for choice in of_all.choices), reverse=True)
    assert sums == pytest.approx(best[:2], abs=1e-3)


def test_choices_of_several_prompts_are_numbered_through(client: openai.OpenAI) -> None:
    both = complete(client, prompt=[PROMPT, "a stitch"], n=2, max_tokens=5)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    single = complete(client, prompt="a stitch", n=2, max_tokens=5)
    assert [choice.text for choice in both.choices[2:]] == [choice.text for choice in single.choices]


def test_logprobs_line_up_with_the_text(client: openai.OpenAI) -> None:
    answer = complete(client, logprobs=3, temperature=0)
    logprobs = answer.choices[0].logprobs
    lengths = {
        len(logprobs.tokens),
        len(logprobs.token_logprobs),
        len(logprobs.top_logprobs),
        len(logprobs.text_offset),
    }
    assert lengths == {16}
    assert logprobs.text_offset[0] == 0
    assert logprobs.text_offset == sorted(logprobs.text_offset)
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert 1 <= len(top) <= 4
        assert top[token] == logprob == max(top.values())


def test_echo_with_logprobs_scores_a_prompt(server: LiveServer, client: openai.OpenAI) -> None:
    """How evaluation tools score text: no new tokens, the prompt's own log-probabilities."""
    answer = complete(client, echo=True, logprobs=1, max_tokens=0)
    [choice] = answer.choices
    ids = server.llm.tokenizer.encode(PROMPT)
    assert choice.text == PROMPT
    assert answer.usage.completion_tokens == 0
    assert len(choice.logprobs.tokens) == len(ids)
    assert "".join(choice.logprobs.tokens) == PROMPT
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    for offset, token in zip(choice.logprobs.text_offset, choice.logprobs.tokens, strict=True):
        assert PROMPT[offset : offset + len(token)] == token
    for position in range(1, len(ids)):
        step = complete(client, prompt=ids[:position], logprobs=1, max_tokens=1, temperature=0)
        best_token, best = step.choices[0].logprobs.tokens[0], step.choices[0].logprobs.token_logprobs[0]
        assert choice.logprobs.top_logprobs[position][best_token] == pytest.approx(best, abs=1e-4)
        assert choice.logprobs.token_logprobs[position] <= best + 1e-4


def test_echo_returns_prompt_and_answer(server: LiveServer, client: openai.OpenAI) -> None:
    plain = complete(client).choices[0].text
    assert complete(client, echo=True).choices[0].text == PROMPT + plain
    assert complete(client, echo=True, prompt=server.llm.tokenizer.encode(PROMPT)).choices[0].text == PROMPT + plain


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = complete(client, max_tokens=1, extra={"prompt_logprobs": 2})
    entries = answer.choices[0].prompt_logprobs
    assert entries[0] is None
    assert len(entries) == answer.usage.prompt_tokens
    for entry in entries[1:]:
        assert 2 <= len(entry) <= 3
        assert min(value["rank"] for value in entry.values()) == 1


def test_sampling_fields_beyond_openai(client: openai.OpenAI) -> None:
    greedy = complete(client, temperature=0).choices[0].text
    assert complete(client, extra={"top_k": 1}).choices[0].text == greedy
    assert complete(client, extra={"min_p": 1.0}).choices[0].text == greedy
    assert complete(client, extra={"top_k": -1}).choices[0].text == complete(client).choices[0].text
    longer = complete(client, temperature=0, extra={"min_tokens": 16, "ignore_eos": False})
    assert longer.usage.completion_tokens == 16


def test_stop_token_ids(server: LiveServer, client: openai.OpenAI) -> None:
    tokens = complete(client, logprobs=0, temperature=0).choices[0].logprobs.tokens
    position, stop_id = next(
        (index, ids[0])
        for index, token in enumerate(tokens)
        if len(ids := server.llm.tokenizer.encode(token, add_special_tokens=False)) == 1 and token not in tokens[:index]
    )
    answer = complete(client, temperature=0, extra={"stop_token_ids": [stop_id]})
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].stop_reason == stop_id
    assert answer.usage.completion_tokens == position


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": None}, "prompt", "string"),
        ({"prompt": []}, "prompt", "token ids"),
        ({"prompt": [1.5]}, "prompt[0]", "integer"),
        ({"prompt": [True]}, "prompt", "token ids"),
        ({"prompt": [5, "a"]}, "prompt[1]", "integer"),
        ({"prompt": ["a", 5]}, "prompt[1]", "string"),
        ({"prompt": [[5], [6, -7]]}, "prompt[1][1]", "0"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt[0]", "at least 1"),
        ({"prompt": [100000]}, "prompt", "vocabulary"),
        ({"prompt": [1] * 5000}, "prompt", ""),
        ({"suffix": "end"}, "suffix", "not supported"),
        ({"max_tokens": 0}, "max_tokens", "echo"),
        ({"max_tokens": -1}, "max_tokens", "0"),
        ({"logprobs": True}, "logprobs", "integer"),
        ({"logprobs": 5000}, "logprobs", "1024"),
        ({"n": 1.5}, "n", "integer"),
        ({"echo": "yes"}, "echo", "boolean"),
        ({"messages": []}, "messages", "messages"),
        ({"best_of": 3, "stream": True}, "best_of", "stream"),
    ],
)
def test_bad_field_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"prompt": "a"} | fields, cast_to=object)
    assert caught.value.param == param
    assert words in caught.value.message


def test_prompt_is_required(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/completions", body={"model": "tiny"}, cast_to=object)
    assert (caught.value.param, caught.value.code) == ("prompt", "missing_required_parameter")


def test_one_bad_prompt_of_many_leaves_nothing_running(server: LiveServer, client: openai.OpenAI) -> None:
    before = server.llm.stats().num_finished.get("length", 0)
    with pytest.raises(openai.BadRequestError):
        complete(client, prompt=[[5] * 10, [5] * 10, [5] * 5000], max_tokens=3000)
    server.wait_until_idle()
    assert server.llm.stats().num_finished.get("length", 0) == before


def test_whole_numbers_may_be_written_with_a_point(client: openai.OpenAI) -> None:
    """JSON knows one kind of number: 4.0 is the integer 4."""
    exact = {"prompt": [5, 6], "max_tokens": 4, "seed": 7, "stop_token_ids": [319], "logprobs": 1}
    pointed = {"prompt": [5.0, 6], "max_tokens": 4.0, "seed": 7.0, "stop_token_ids": [319.0], "logprobs": 1.0}
    first, second = (
        client.post("/completions", body=body, cast_to=openai.types.Completion) for body in (exact, pointed)
    )
    assert first.choices == second.choices
