"""`ChatTemplate`: renders a conversation into a prompt with the model's Jinja template, as transformers does.

Owns the choice among a model's templates, compiled templates, and whether a template takes content as a list of parts.
`Tokenizer.apply_chat_template` calls it. Format: Hugging Face's (`chat_template` of tokenizer_config.json).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tokenmill.errors import InvalidParameterError, UserError
from tokenmill.tokenization.chat_messages import check_messages, check_tools, flatten_content, plain_data

if TYPE_CHECKING:
    import jinja2

_MAX_COMPILED = 16
_PROBE = "c0ffee probe c0ffee"
# What evaluating an expression of a template can raise, beside jinja2's own errors.
_EVALUATION_ERRORS = (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class ChatTemplate:
    """A model's chat templates.

    Args:
        sources: Jinja sources by name; `default` is used unless another is asked for, `tool_use` when there are tools.
        special_tokens: variables such as `bos_token` that every template sees.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.sources: Mapping[str, str] = MappingProxyType(dict(sources))
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, _CompiledTemplate] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **template_kwargs: Any,
    ) -> str:
        """The prompt as text; see `Tokenizer.apply_chat_template`."""
        checked = check_messages(messages)
        variables = {
            **self._special_tokens,
            **{key: plain_data(value, key, "chat_template_kwargs") for key, value in template_kwargs.items()},
            "tools": check_tools(tools),
            "add_generation_prompt": add_generation_prompt,
        }
        variables.setdefault("documents", None)
        template = self._compile(self.select(chat_template, has_tools=variables["tools"] is not None))
        has_parts = any(isinstance(message.get("content"), list) for message in checked)
        if has_parts and not template.takes_parts(self._special_tokens):
            checked = flatten_content(checked)
        try:
            return template.render(checked, variables)
        except InvalidParameterError:
            # An assistant's message with tool calls may lack content; some templates want an empty text instead.
            filled = [{"content": "", **message} for message in checked]
            if filled == checked:
                raise
            return template.render(filled, variables)

    def select(self, chat_template: str | None, *, has_tools: bool) -> str:
        """The source to use: the caller's, the one that the caller names, or the model's.

        Raises:
            UserError: the model has none, or several without a default.
        """
        if chat_template is not None:
            return self.sources.get(chat_template, chat_template)
        if has_tools and "tool_use" in self.sources:
            return self.sources["tool_use"]
        if "default" in self.sources:
            return self.sources["default"]
        if self.sources:
            raise UserError(
                f"The model has several chat templates and no default: {', '.join(sorted(self.sources))}.",
                field="chat_template",
                remedy="Name one of them in chat_template.",
            )
        raise UserError(
            "The model has no chat template.",
            field="chat_template",
            remedy="Use a chat (instruct) model, pass chat_template, or send a plain prompt.",
        )

    def _compile(self, source: str) -> _CompiledTemplate:
        template = self._compiled.get(source)
        if template is None:
            template = _CompiledTemplate(source)
            # Requests may bring templates of their own: keep only the latest few.
            while len(self._compiled) >= _MAX_COMPILED:
                self._compiled.pop(next(iter(self._compiled)), None)
            self._compiled[source] = template
        return template


class _CompiledTemplate:
    """One compiled Jinja source."""

    def __init__(self, source: str) -> None:
        # Late: a plain completion never needs jinja2.
        import jinja2

        from tokenmill.tokenization.jinja_environment import make_environment

        self._takes_parts: bool | None = None
        try:
            self._template: jinja2.Template = make_environment().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise InvalidParameterError(
                f"The chat template is not valid Jinja: {error}.",
                field="chat_template",
                remedy="Mend it, or pass another one in chat_template.",
            ) from None

    def render(self, messages: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        """The prompt.

        Raises:
            InvalidParameterError: the template refuses the messages, or fails on them.
        """
        import jinja2

        from tokenmill.tokenization.jinja_environment import TemplateRefusalError

        try:
            return self._template.render({**variables, "messages": messages})
        except TemplateRefusalError as error:
            raise InvalidParameterError(
                f"The chat template refuses these messages: {error.message}", field="messages"
            ) from None
        except jinja2.TemplateError as error:
            raise InvalidParameterError(
                f"The chat template fails on these messages: {error}.",
                field="messages",
                remedy="Check that each message has what the model's template reads, or pass another chat_template.",
            ) from None
        except _EVALUATION_ERRORS as error:
            raise InvalidParameterError(
                f"The chat template fails on these messages: {type(error).__name__}: {error}.",
                field="messages",
                remedy="Check that each message has what the model's template reads, or pass another chat_template.",
            ) from None

    def takes_parts(self, special_tokens: Mapping[str, str]) -> bool:
        """Whether the template reads content that is a list of parts.

        Found by trying: a template that does so writes the same prompt for a text and for a list of that one text.
        """
        if self._takes_parts is None:
            variables = {**special_tokens, "tools": None, "documents": None, "add_generation_prompt": True}
            as_text = [{"role": "user", "content": _PROBE}]
            as_parts = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
            try:
                parts = self.render(as_parts, variables)
                self._takes_parts = _PROBE in parts and parts == self._render_or_none(as_text, variables, parts)
            except InvalidParameterError:
                self._takes_parts = False
        return self._takes_parts

    def _render_or_none(self, messages: list[dict[str, Any]], variables: Mapping[str, Any], parts: str) -> str:
        """The prompt for plain text; `parts` when the template takes nothing but lists."""
        try:
            text = self.render(messages, variables)
        except InvalidParameterError:
            return parts
        return text if _PROBE in text else parts
