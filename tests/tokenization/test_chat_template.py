"""Chat templates rendered here and by transformers, and malformed messages."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

from tests.tokenization.small_tokenizers import wrap
from tokenmill.errors import InvalidParameterError, UserError
from tokenmill.tokenization import ChatTemplate, Tokenizer

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

GEMMA3 = """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
    {%- endif -%}
    {%- if (message['role'] == 'assistant') -%}
        {%- set role = "model" -%}
    {%- else -%}
        {%- set role = message['role'] -%}
    {%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{'<start_of_turn>model\n'}}
{%- endif -%}
"""

TOOLS = """{% set ns = namespace(calls=0, last=none) %}
{% if tools %}
  # Tools ({{ tools | length }})
  {% for tool in tools %}
{{ tool | tojson(indent=2) }}
  {% endfor %}
{% endif %}
{% for message in messages %}
    {% if message.role == 'developer' %}{% continue %}{% endif %}
    {% if loop.index > 6 %}{% break %}{% endif %}
    {%- if message.tool_calls is defined %}
        {%- for call in message.tool_calls %}
            {%- set ns.calls = ns.calls + 1 %}
[call {{ ns.calls }}] {{ call.function.name }}({{ call.function.arguments | tojson }})
        {%- endfor %}
    {%- else %}
[{{ message['role'] | upper }}{{ ', ' + message.name if message.name }}] {{ message.content }}
    {%- endif %}
    {% set ns.last = message.role %}
{% endfor %}
{{ dict(last=ns.last, calls=ns.calls) | tojson }}{{ '&<>' | tojson }} {{ bos_token }}{{ eos_token }}{{ missing }}
"""

GENERATION = """{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{% generation %}{% set shown = message.content %}{{ shown }}{% endgeneration %}
{%- else -%}<{{ message.role }}>{{ message.content }}{%- endif -%}
{{ shown is defined }}{{ message.reasoning_content or '' }}{{ message.thinking or '' }}
{%- endfor -%}
{{ strftime_now('%Y') | int > 2000 }} {{ range(3) | list }} {{ enable_thinking | default(true) }}"""

CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "single": [{"role": "user", "content": "Why is the sky <blue> & 'deep'?\n"}],
    "system": [
        {"role": "system", "content": "Be brief. "},
        {"role": "user", "content": "  Hi "},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "日本語 \U0001f642"},
    ],
    "reasoning": [
        {"role": "user", "content": "2 + 2", "name": "ann"},
        {"role": "assistant", "content": "4", "reasoning": "easy"},
        {"role": "user", "content": "3 + 3"},
    ],
}
TOOL_CONVERSATION: list[dict[str, Any]] = [
    {"role": "developer", "content": "unseen"},
    {"role": "user", "content": "Weather in Paris and Rome?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Paris <3"}}},
            {
                "id": "2",
                "type": "function",
                "function": {"name": "weather", "arguments": {"city": "Rome", "n": [1, None]}},
            },
        ],
    },
    {"role": "tool", "tool_call_id": "1", "content": '{"temperature": 21}'},
    {"role": "tool", "tool_call_id": "2", "content": "25 °C"},
    {"role": "assistant", "content": "Warm."},
    {"role": "user", "content": "Thanks"},
    {"role": "user", "content": "past the break"},
]
SCHEMAS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The "weather" & more <now>',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
TRANSFORMERS = tuple(int(part) for part in transformers.__version__.split(".")[:2])


def with_names_of_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose `reasoning` is there by the two other names, too, as transformers does itself since 5.21."""
    names = ("reasoning_content", "thinking") if "reasoning" in message else ()
    return message | dict.fromkeys(names, message.get("reasoning"))


def by_transformers(source: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """What `PreTrainedTokenizer.apply_chat_template` renders (it drops keys whose value is None first)."""
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    if TRANSFORMERS < (5, 21):  # which does not know that a template may read reasoning by another name
        cleaned = [with_names_of_reasoning(message) for message in cleaned]
    rendered, _ = render_jinja_template(conversations=[cleaned], chat_template=source, **variables, **TOKENS)
    return str(rendered[0])


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize(
    "source", [SMOLLM2, GEMMA3, TOOLS, GENERATION], ids=["smollm2", "gemma3", "tools", "generation"]
)
def test_equals_transformers(source: str, conversation: str, add_generation_prompt: bool) -> None:
    messages = CONVERSATIONS[conversation]
    template = ChatTemplate({"default": source}, TOKENS)
    for variables in ({}, {"enable_thinking": False}):
        expected = by_transformers(source, messages, add_generation_prompt=add_generation_prompt, **variables)
        assert template.render(messages, add_generation_prompt=add_generation_prompt, **variables) == expected


def test_tools_equal_transformers() -> None:
    template = ChatTemplate({"default": TOOLS}, TOKENS)
    expected = by_transformers(TOOLS, TOOL_CONVERSATION, tools=SCHEMAS, add_generation_prompt=True)
    assert template.render(TOOL_CONVERSATION, tools=SCHEMAS) == expected
    assert '{"city": "Paris <3"}' in expected and "past the break" not in expected


def test_content_parts_equal_transformers() -> None:
    """A template that reads lists gets them."""
    messages = [{"role": "user", "content": [{"type": "text", "text": " a "}, {"type": "text", "text": "b"}]}]
    template = ChatTemplate({"default": GEMMA3}, TOKENS)
    assert template.render(messages) == by_transformers(GEMMA3, messages, add_generation_prompt=True)
    system = [{"role": "system", "content": [{"type": "text", "text": "S"}]}, *messages]
    assert template.render(system) == by_transformers(GEMMA3, system, add_generation_prompt=True)


def test_content_parts_are_joined_for_other_templates() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    joined = [{"role": "user", "content": "a\nb"}]
    for source in (SMOLLM2, TOOLS):  # the first fails on a list, the second would print it as Python does
        template = ChatTemplate({"default": source}, TOKENS)
        assert template.render(parts) == template.render(joined)


def test_template_that_takes_only_parts() -> None:
    source = "{% for m in messages %}{% for part in m.content %}{{ part['text'] }};{% endfor %}{% endfor %}"
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert ChatTemplate({"default": source}, {}).render(parts) == "a;b;"


def test_choice_among_templates() -> None:
    messages = CONVERSATIONS["single"]
    sources = {"default": "D{{ eos_token }}", "tool_use": "T", "rag": "R"}
    template = ChatTemplate(sources, TOKENS)
    assert template.render(messages) == "D<eos>"
    assert template.render(messages, tools=[]) == "D<eos>"
    assert template.render(messages, tools=SCHEMAS) == "T"
    assert template.render(messages, tools=SCHEMAS, chat_template="rag") == "R"
    assert template.render(messages, chat_template="own {{ messages | length }}") == "own 1"
    assert template.render(messages, eos_token="!") == "D!"  # the caller's variables win
    with pytest.raises(UserError, match="rag, tool_use"):
        ChatTemplate({"rag": "R", "tool_use": "T"}, {}).render(messages)


def test_no_template(byte_level: tokenizers.Tokenizer) -> None:
    with pytest.raises(UserError, match="no chat template") as caught:
        wrap(byte_level).apply_chat_template(CONVERSATIONS["single"])
    assert caught.value.field == "chat_template" and caught.value.remedy
    ids = wrap(byte_level).apply_chat_template(CONVERSATIONS["single"], chat_template="<|im_start|>a")
    assert ids[0] == 1 and len(ids) == 2


def test_many_templates_do_not_pile_up() -> None:
    template = ChatTemplate({}, {})
    for index in range(100):
        assert template.render(CONVERSATIONS["single"], chat_template=f"{index}") == str(index)
    assert len(template._compiled) <= 16


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("hi", "list of messages, got str"),
        ({"role": "user", "content": "x"}, "list of messages, got dict"),
        ([{"role": "user", "content": "x"}, "hi"], r"messages\[1\] is a str"),
        ([{"content": "x"}], r"messages\[0\] has no role"),
        ([{"role": "user", "content": "x"}, {"role": 3, "content": "x"}], r"messages\[1\]\.role .* got 3"),
        ([{"role": "", "content": "x"}], r"messages\[0\]\.role"),
        ([{"role": "user"}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "assistant", "content": None}], r"messages\[0\] has no content"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\.content must be a string or a list of parts, got int"),
        ([{"role": "user", "content": []}], r"messages\[0\]\.content is an empty list"),
        ([{"role": "user", "content": ["x"]}], r"messages\[0\]\.content\[0\] is a str"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            r"messages\[0\]\.content\[1\] has the unknown type 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"messages\[0\]\.content\[0\]\.text must be a string"),
        ([{"role": "assistant", "content": "x", "tool_calls": "f"}], r"messages\[0\]\.tool_calls"),
        ([{"role": "user", "content": "x", "extra": object()}], r"messages\[0\]\.extra is a object"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message) as caught:
        ChatTemplate({"default": SMOLLM2}, {}).render(messages)
    assert caught.value.field == "messages"


def test_nesting_is_bounded() -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    with pytest.raises(InvalidParameterError, match="nested more than"):
        ChatTemplate({"default": SMOLLM2}, {}).render([{"role": "user", "content": "x", "extra": deep}])


def test_refusal_and_failures_of_the_template() -> None:
    two_users = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(InvalidParameterError, match="Conversation roles must alternate") as caught:
        ChatTemplate({"default": GEMMA3}, TOKENS).render(two_users)
    assert caught.value.field == "messages"
    for source in ("{{ messages[0].content + 1 }}", "{{ messages[0].nothing.more }}", "{{ 1 / 0 }}", "{{ [][3].x }}"):
        with pytest.raises(InvalidParameterError, match="fails on these messages") as caught:
            ChatTemplate({}, {}).render(CONVERSATIONS["single"], chat_template=source)
        assert caught.value.field == "messages"
    with pytest.raises(InvalidParameterError, match="not valid Jinja") as caught:
        ChatTemplate({}, {}).render(CONVERSATIONS["single"], chat_template="{% for %}")
    assert caught.value.field == "chat_template"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append('x') }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ range(10**9) | list }}",
        "{{ raise_exception.__globals__ }}",
        "{{ dict.__class__ }}",
        "{% include 'x' %}",
    ],
)
def test_templates_are_boxed_in(source: str) -> None:
    template = ChatTemplate({}, {})
    try:
        rendered = template.render(CONVERSATIONS["single"], chat_template=source)
    except InvalidParameterError:
        return
    assert rendered == "", "an unsafe attribute is undefined at best"


def test_tools_are_checked() -> None:
    template = ChatTemplate({"default": TOOLS}, {})
    for tools, message in (("f", "got str"), ([len], r"tools\[0\]"), ({"name": "f"}, "got dict")):
        with pytest.raises(InvalidParameterError, match=message) as caught:
            template.render(CONVERSATIONS["single"], tools=tools)  # type: ignore[arg-type]
        assert caught.value.field == "tools"


def test_arguments_as_json_text_become_objects() -> None:
    """OpenAI's API writes them as text; templates quote whatever they get."""
    as_text = [dict(message) for message in TOOL_CONVERSATION]
    as_text[2] = {
        "role": "assistant",
        "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris <3"}'}},
            {
                "id": "2",
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Rome", "n": [1, null]}'},
            },
        ],
    }
    template = ChatTemplate({"default": TOOLS}, TOKENS)
    assert template.render(as_text) == template.render(TOOL_CONVERSATION)
    as_text[2]["tool_calls"] = [{"function": {"name": "f", "arguments": "{broken"}}]
    assert 'f("{broken")' in template.render(as_text)


def test_missing_content_is_empty_where_the_template_needs_it() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]
    rendered = ChatTemplate({"default": SMOLLM2}, {}).render(messages)
    assert rendered.endswith("<|im_start|>assistant\n<|im_end|>\n<|im_start|>assistant\n")


def test_values_are_reduced_to_plain_data() -> None:
    class Role(enum.StrEnum):
        USER = "user"

    messages = [{"role": Role.USER, "content": "x", "tags": ("a", Role.USER, True, 1.5)}]
    source = "{{ messages[0].role }} {{ messages[0].tags | tojson }} {{ messages[0].role.name is defined }}"
    assert ChatTemplate({}, {}).render(messages, chat_template=source) == 'user ["a", "user", true, 1.5] False'
    before = [dict(message) for message in messages]
    assert messages == before


def test_tokens_are_not_added_twice(byte_level: tokenizers.Tokenizer) -> None:
    tokenizer = Tokenizer(
        wrap(byte_level)._backend,
        wrap(byte_level)._special_tokens,
        {"default": "<|im_start|>{{ messages[0].content }}"},
    )
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text == "<|im_start|>hi"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert ids == tokenizer.encode(text, add_special_tokens=False) and ids.count(1) == 1
    with pytest.raises(InvalidParameterError, match="surrogate"):
        tokenizer.apply_chat_template([{"role": "user", "content": "\ud800"}])


@pytest.mark.real_model
def test_real_templates(smollm2: Tokenizer, gemma3: Tokenizer) -> None:
    assert smollm2.chat_templates["default"] == SMOLLM2
    text = smollm2.apply_chat_template(CONVERSATIONS["system"], tokenize=False)
    assert text == by_transformers(SMOLLM2, CONVERSATIONS["system"], add_generation_prompt=True)
    ids = smollm2.apply_chat_template(CONVERSATIONS["system"])
    assert smollm2.decode(ids, skip_special_tokens=False) == text and ids.count(1) == 5
    gemma_ids = gemma3.apply_chat_template(CONVERSATIONS["system"], chat_template=GEMMA3, bos_token="<bos>")
    assert gemma_ids.count(2) == 1 and gemma_ids.count(105) == 4  # the template writes the start token, once


def test_rendering_is_the_same_for_each_entry_point(byte_level: tokenizers.Tokenizer) -> None:
    render: Callable[..., Any] = wrap(byte_level).apply_chat_template
    assert (
        render(CONVERSATIONS["single"], chat_template="{{ x }}", x=[1, {"a": None}], tokenize=False)
        == "[1, {'a': None}]"
    )
    with pytest.raises(InvalidParameterError) as caught:
        render(CONVERSATIONS["single"], chat_template="{{ x }}", x=object())
    assert caught.value.field == "chat_template_kwargs"
