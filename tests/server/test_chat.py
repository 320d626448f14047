"""`/v1/chat/completions`, through the official client."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.live_server import LiveServer

MESSAGES: list[Any] = [{"role": "user", "content": "The quick brown fox"}]
LONG: dict[str, Any] = {"ignore_eos": True}


def chat(client: openai.OpenAI, **arguments: Any) -> Any:
    """Ask; short answers unless the test says otherwise."""
    arguments = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "seed": 7, "extra_body": LONG} | arguments
    return client.chat.completions.create(**arguments)


def joined(stream: Any, num_choices: int = 1) -> list[str]:
    """The texts of a stream's choices."""
    texts = [""] * num_choices
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    return texts


@pytest.mark.spec("A6")
def test_answer_has_the_shape_of_openai(server: LiveServer, client: openai.OpenAI) -> None:
    answer = chat(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.model == "tiny"
    assert answer.system_fingerprint.startswith("tokenmill-")
    [choice] = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.refusal) == ("assistant", None)
    assert choice.message.content
    assert answer.usage.completion_tokens == 12
    prompt = server.llm.tokenizer.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True)
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.total_tokens == len(prompt) + 12


@pytest.mark.spec("A6")
@pytest.mark.parametrize("arguments", [{}, {"n": 3}, {"temperature": 0}, {"logprobs": True, "top_logprobs": 2}])
def test_stream_gives_what_the_whole_answer_gives(client: openai.OpenAI, arguments: dict[str, Any]) -> None:
    whole = chat(client, max_tokens=40, **arguments)
    texts, logprobs, reasons = [""] * len(whole.choices), [[] for _ in whole.choices], [None] * len(whole.choices)
    for chunk in chat(client, max_tokens=40, stream=True, **arguments):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.logprobs is not None:
                logprobs[choice.index] += choice.logprobs.content
            if choice.finish_reason is not None:
                assert reasons[choice.index] is None
                reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    if "logprobs" in arguments:
        [got], [expected] = logprobs, [choice.logprobs.content for choice in whole.choices]
        assert [item.token for item in got] == [item.token for item in expected]
        assert [item.logprob for item in got] == pytest.approx([item.logprob for item in expected], abs=1e-4)
    else:
        assert logprobs == [[] for _ in whole.choices]


@pytest.mark.spec("A6")
def test_events_of_a_stream(server: LiveServer) -> None:
    """The events on the wire: a role, pieces of text, the reason to end, the usage, `[DONE]`."""
    body = {
        "messages": MESSAGES,
        "max_tokens": 5,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert all(list(chunk["choices"][0]["delta"]) == ["content"] for chunk in middle)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in [first, *middle])
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "length")
    assert all(chunk["usage"] is None for chunk in [first, *middle, last])
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 5


def test_stream_without_usage_does_not_mention_it(server: LiveServer) -> None:
    body = {"messages": MESSAGES, "max_tokens": 2, "stream": True}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert '"usage"' not in response.text


def test_seed_makes_answers_repeatable(client: openai.OpenAI) -> None:
    first, second, other = (chat(client, n=2, seed=seed) for seed in (1, 1, 2))
    texts = [[choice.message.content for choice in answer.choices] for answer in (first, second, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[0][0] != texts[0][1]


def test_default_temperature_samples(client: openai.OpenAI) -> None:
    answers = {chat(client, seed=seed, max_tokens=8).choices[0].message.content for seed in range(4)}
    assert len(answers) > 1
    greedy = {chat(client, seed=seed, max_tokens=8, temperature=0).choices[0].message.content for seed in range(4)}
    assert len(greedy) == 1


def test_default_length_is_the_rest_of_the_context(server: LiveServer, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "x" * 4000}]
    answer = chat(client, messages=messages, max_tokens=openai.NOT_GIVEN)
    assert answer.usage.total_tokens == server.llm.max_seq_len == 4096
    assert answer.choices[0].finish_reason == "length"


def test_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=4, temperature=0)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert answer.choices[0].logprobs.refusal is None
    for item in content:
        assert item.logprob <= 0.0
        top = [candidate.logprob for candidate in item.top_logprobs]
        assert len(top) == 4
        assert top == sorted(top, reverse=True)
        assert item.token == item.top_logprobs[0].token, "greedy takes the most likely token"
        assert item.logprob == top[0]
    text = b"".join(bytes(item.bytes) for item in content).decode("utf-8", "replace")
    assert text == answer.choices[0].message.content


def test_logprobs_without_candidates(client: openai.OpenAI) -> None:
    content = chat(client, logprobs=True).choices[0].logprobs.content
    assert [item.top_logprobs for item in content] == [[]] * 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_stop_string_ends_the_answer_before_it(client: openai.OpenAI, stream: bool, as_list: bool) -> None:
    full = chat(client, max_tokens=40, extra_body=LONG).choices[0].message.content
    stop = full[20:23]
    arguments: dict[str, Any] = {"max_tokens": 40, "stop": ["never seen", stop] if as_list else stop, "stream": stream}
    if stream:
        assert joined(chat(client, **arguments)) == [full[: full.index(stop)]]
        return
    choice = chat(client, **arguments).choices[0]
    assert choice.message.content == full[: full.index(stop)]
    assert choice.finish_reason == "stop"
    assert choice.stop_reason == stop


def test_stop_string_can_be_kept(client: openai.OpenAI) -> None:
    full = chat(client, max_tokens=40).choices[0].message.content
    stop = full[20:23]
    kept = chat(client, max_tokens=40, stop=stop, extra_body={**LONG, "include_stop_str_in_output": True})
    assert kept.choices[0].message.content == full[: full.index(stop) + len(stop)]


def test_logit_bias_forces_a_token(server: LiveServer, client: openai.OpenAI) -> None:
    [token] = server.llm.tokenizer.encode("q", add_special_tokens=False)
    assert chat(client, logit_bias={str(token): 100}).choices[0].message.content == "q" * 12


def test_messages_reach_the_chat_template(client: openai.OpenAI) -> None:
    def answer(*messages: Any, **extra: Any) -> tuple[str, int]:
        got = chat(client, messages=list(messages), extra_body={**LONG, **extra})
        return got.choices[0].message.content, got.usage.prompt_tokens

    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a\nb"}
    plain = answer(system, user)
    assert answer({"role": "developer", "content": "Be brief."}, user) == plain
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert answer(system, {"role": "user", "content": parts}) == plain
    assert answer(user)[1] < plain[1]
    assert answer(system, user, add_generation_prompt=False)[1] < plain[1]
    assert answer(system, user, chat_template_kwargs={"greeting": "Hello"})[1] > plain[1]


def test_an_answer_can_be_sent_back_as_a_message(client: openai.OpenAI) -> None:
    message = chat(client).choices[0].message
    again = chat(client, messages=[*MESSAGES, message.model_dump(), *MESSAGES])
    assert again.choices[0].message.content


def test_cached_prompt_tokens_are_reported(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "counting cached tokens " * 10}]
    usages = [chat(client, messages=messages).usage for _ in range(2)]
    assert usages[0].prompt_tokens_details.cached_tokens < 16
    assert usages[1].prompt_tokens_details.cached_tokens > usages[1].prompt_tokens // 2


def test_fields_without_effect_are_accepted(client: openai.OpenAI) -> None:
    plain = chat(client).choices[0].message.content
    spoken = chat(
        client,
        user="someone",
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        metadata={"a": "b"},
        service_tier="auto",
    )
    assert spoken.choices[0].message.content == plain


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:,"}}


@pytest.mark.spec("A6")
@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "1"),
        ({"min_p": 2}, "min_p", "1"),
        ({"top_k": -2}, "top_k", "0"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0"),
        ({"presence_penalty": 1000}, "presence_penalty", "100"),
        ({"frequency_penalty": None, "n": 0}, "n", "1"),
        ({"n": 2, "temperature": 0}, "n", "temperature"),
        ({"n": 3, "best_of": 2}, "best_of", "less than n"),
        ({"n": True}, "n", "integer"),
        ({"seed": 2**70}, "seed", ""),
        ({"max_tokens": 0}, "max_tokens", "1"),
        ({"max_tokens": 2**40}, "max_tokens", ""),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "1"),
        ({"max_completion_tokens": 5, "min_tokens": 6}, "min_tokens", "max_tokens"),
        ({"stop": ""}, "stop", "at least 1"),
        ({"stop": 5}, "stop", "string"),
        ({"stop": ["a", 5]}, "stop[1]", "string"),
        ({"logit_bias": {"word": 1}}, "logit_bias", "token id"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "vocab"),
        ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
        ({"logprobs": 3}, "logprobs", "boolean"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "stream_options.include_usag", "include_usage"),
        ({"stream": True, "best_of": 3}, "best_of", "stream"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs", "stream"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]", "0"),
        ({"messages": []}, "messages", "1 item"),
        ({"messages": "hello"}, "messages", "list"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "Missing"),
        ({"messages": [*MESSAGES, {"role": "robot", "content": "a"}]}, "messages[1].role", "user"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "string"),
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].image_url", "not supported"),
        ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages[0].colour", "colour"),
        ({"messages": [{"role": "user", "content": "refused by the template"}]}, "messages", "no such conversation"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, "messages", ""),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
        ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs", "tokenize"),
        ({"tools": [TOOL]}, "tools", "not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported"),
        ({"functions": [{}]}, "functions", "not supported"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "not supported"),
        ({"use_beam_search": True}, "use_beam_search", "not supported"),
        ({"temprature": 1}, "temprature", "'temperature'"),
    ],
)
def test_bad_field_is_named(client: openai.OpenAI, fields: dict[str, Any], param: str, words: str) -> None:
    body = {"messages": MESSAGES} | fields
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert caught.value.code
    assert words in caught.value.message


def test_prompt_that_fills_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, messages=[{"role": "user", "content": "x" * 5000}])
    assert caught.value.code == "context_length_exceeded"


def test_model_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt-9")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert "tiny" in caught.value.message


@pytest.mark.spec("A6")
def test_concurrent_streams_each_get_their_own_text(server: LiveServer, client: openai.OpenAI) -> None:
    prompts = [[{"role": "user", "content": f"Client number {index}"}] for index in range(16)]
    alone = [chat(client, messages=prompt, max_tokens=24, seed=index) for index, prompt in enumerate(prompts)]
    expected = [answer.choices[0].message.content for answer in alone]
    assert len(set(expected)) == 16

    async def ask(client: openai.AsyncOpenAI, index: int) -> str:
        stream: Any = await client.chat.completions.create(
            model="tiny", messages=prompts[index], max_tokens=24, seed=index, stream=True, extra_body=LONG
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def ask_all() -> list[str]:
        async with server.async_client() as client:
            return await asyncio.gather(*(ask(client, index) for index in range(16)))

    assert asyncio.run(ask_all()) == expected
    server.wait_until_idle()
