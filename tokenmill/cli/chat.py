"""`tokenmill chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tokenmill.cli.answer import Answer, stream_answer
from tokenmill.cli.chat_commands import run_slash_command
from tokenmill.cli.command import command, examples
from tokenmill.cli.console import print_error, print_note, print_warning, write_answer
from tokenmill.cli.conversation import Conversation
from tokenmill.cli.line_input import LineReader
from tokenmill.cli.loading import loaded_llm
from tokenmill.cli.options import DEFAULT_MODEL, ONE_SEQUENCE, ModelOptions, SamplingOptions
from tokenmill.cli.prompting import chat_token_ids, require_chat_template, sampling_for_room
from tokenmill.env import read_environment
from tokenmill.errors import ExecutorShutdownError, TokenmillError

if TYPE_CHECKING:
    from tokenmill.llm import LLM

_EPILOG = examples(
    ("Talk with the demo model", "tokenmill chat"),
    ("Talk with a model of your own, greedily", "tokenmill chat path/to/model.gguf --temperature 0"),
    ("Give it a role", 'tokenmill chat --system "You answer in one sentence."'),
    ("Ask a list of questions from a file", "tokenmill chat < questions.txt > answers.txt"),
    ("In the chat", "/help  /system TEXT  /params temperature=0.2  /retry  /save chat.json  /exit"),
)

_DEFAULT_SAMPLING = {"temperature": 0.7, "top_p": 0.9}
"""How tokens are chosen when no option says it: /retry should give another answer."""

_MIN_ANSWER_TOKENS = 256
"""Room that is kept free for an answer: the oldest turns go first (less in a small context)."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    command(app, "chat", epilog=_EPILOG)(chat)


def chat(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="The model to talk with.", show_default=DEFAULT_MODEL)
    ] = None,
    *,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message: how to answer.")] = None,
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Go on with a conversation that /save wrote.")
    ] = None,
    sampling: SamplingOptions,
    model_options: ModelOptions,
) -> None:
    """Talk with a model: answers stream, the conversation is remembered.

    Ctrl-C stops an answer and keeps what was said; Ctrl-C or Ctrl-D on an empty line leaves. /help lists commands.
    Without sampling options the temperature is 0.7 and top_p 0.9.
    """
    conversation = Conversation() if load is None else Conversation.load(load)
    if system is not None:
        conversation.system = system
    values = sampling.sampling_parameters()
    if not values.keys() & {"temperature", "top_k", "top_p", "min_p"}:
        values |= _DEFAULT_SAMPLING
    arguments = model_options.llm_arguments(model, **ONE_SEQUENCE)
    with loaded_llm(arguments) as llm:
        ChatSession(llm, conversation, values).run()


class ChatSession:
    """One run of the chat: reads entries, answers them, keeps the conversation.

    Args:
        llm: what answers.
        conversation: what was said before.
        sampling: keyword arguments of `SamplingParams`.
    """

    def __init__(self, llm: LLM, conversation: Conversation, sampling: dict[str, Any]) -> None:
        require_chat_template(llm)
        self.llm = llm
        self.conversation = conversation
        self.sampling = sampling
        self.last_answer: Answer | None = None
        self.running = True

    def run(self) -> None:
        """Until /exit or the end of the input. From a pipe the first error ends it; on a terminal none does."""
        reader = LineReader(_history_file())
        if reader.interactive:
            print_note(f"{self.llm.model_name}. /help lists commands, Ctrl-D leaves.")
        try:
            while self.running and (entry := reader.read()) is not None:
                self._handle(entry, reader.interactive)
        finally:
            reader.save_history()

    def _handle(self, entry: str, interactive: bool) -> None:
        if not entry.strip():
            return
        try:
            if entry.startswith("/") and not entry.startswith("//"):
                run_slash_command(self, entry.strip())
            else:
                self.ask(entry[1:] if entry.startswith("//") else entry)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print_note("Interrupted.")  # just before or after an answer
        except TokenmillError as error:
            if not interactive or isinstance(error, ExecutorShutdownError):
                raise
            print_error(error)

    def ask(self, question: str) -> bool:
        """Stream the answer to `question` and remember both; False when it was stopped before the first word.

        Raises:
            TokenmillError: the question cannot be answered; the conversation is as before.
        """
        limit = self.llm.max_seq_len - min(_MIN_ANSWER_TOKENS, self.llm.max_seq_len // 4)
        num_dropped, num_prompt_tokens = self.conversation.fit(
            question, lambda messages: len(chat_token_ids(self.llm, messages)), limit
        )
        if num_dropped:
            turns = "turn was" if num_dropped == 1 else f"{num_dropped} turns were"
            print_warning(f"The context of {self.llm.max_seq_len} tokens is full: the oldest {turns} forgotten.")
        sampling = sampling_for_room(self.llm, self.sampling, num_prompt_tokens)
        prompt = chat_token_ids(self.llm, self.conversation.messages(question))
        result = self.llm.generate_async(prompt, sampling, streaming=True)
        try:
            answer = stream_answer(result, write_answer)
        except BaseException:
            result.abort()  # whatever went wrong: the engine must not go on talking to nobody
            raise
        write_answer("\n\n" if sys.stdout.isatty() else "\n")
        self.last_answer = answer
        if answer.finish_reason == "length":
            print_note(f"Cut off after {answer.num_tokens} tokens; /params max_tokens=N allows more.")
        if answer.interrupted:
            print_note("Stopped." if answer.text else "Stopped before the first word; the question is forgotten.")
        if answer.text or not answer.interrupted:
            self.conversation.remember(question, answer.text)
            return True
        return False


def _history_file() -> Path:
    return read_environment().cache_dir / "chat_history"
